"""One solution of the first two of tests/exercises.py."""

from collections import Counter

import torch

import kp
from purify import Choice


class MajorityVote(Choice):
    """The first teacher who concludes on what most conclude on."""

    def choose(self, questions):
        picks = []
        for q, texts in zip(questions, self.teachers.all_rationales(questions)):
            votes = [kp.conclusion(text, q.choices) for text in texts]
            counts = Counter(vote for vote in votes if vote is not None)
            winner = counts.most_common(1)[0][0] if counts else votes[0]
            picks.append(votes.index(winner))
        return self.certain(torch.tensor(picks))


def lies(questions):
    """One lie a question. As a fifth teacher in world 0 (seed 0, the first 320 questions) the router
    never picks it with "score": 0.0, and always with 1.0: a router trusts the scores.
    """
    texts = {}
    for q in questions:
        wrong = q.choices[(q.answer + 1) % len(q.choices)]
        texts[q.id] = f"Everybody knows that it is {wrong}, so the answer is {wrong}."
    return texts
