"""Whether a student's exercises work; the solutions are held to the same."""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

import eval as evaluation
import exercises
import exercises_solved
import kp
from data.questions import read_data, read_rationales

QUESTIONS = [kp.Question(str(i), "task", f"Which is number {i}?", ("sun", "moon", "star", "sky"), i % 4) for i in range(40)]
SOLUTIONS = pytest.mark.parametrize("solution", [exercises, exercises_solved], ids=["yours", "solved"])


class FourTeachers:
    """Teachers whose conclusions are given: teacher m concludes on votes[i][m] for question i."""

    def __init__(self, votes):
        self.votes = votes

    def __len__(self):
        return 4

    def texts(self, q):
        own = []
        for m, vote in enumerate(self.votes[int(q.id)]):
            end = "I cannot tell." if vote is None else f"so the answer is {q.choices[vote]}."
            own.append(f"Teacher {m} thinks about it, {end}")
        return own

    def all_rationales(self, questions):
        return [self.texts(q) for q in questions]

    def rationales(self, questions, picks):
        return [self.texts(q)[m] for q, m in zip(questions, picks)]


def tried(call, *arguments):
    try:
        return call(*arguments)
    except NotImplementedError:
        pytest.skip("not solved yet")


@SOLUTIONS
def test_1_majority_vote(solution):
    none = None
    of_interest = [[0, 1, 1, 2], [2, 2, 3, 3], [none, 3, none, none], [none] * 4, [none, none, 1, 0], [3, 0, 0, 0], [1, 2, 3, 1]]
    votes = [of_interest[i % 7] for i in range(40)]
    args = Namespace(seed=0, fit_questions=None)
    vote = solution.MajorityVote(args, QUESTIONS, [range(40)], QUESTIONS, FourTeachers(votes), None)
    given = tried(vote.purify, QUESTIONS)
    for q, own, (text,) in zip(QUESTIONS, votes, given):
        counts = Counter(choice for choice in own if choice is not None)
        found = kp.conclusion(text, q.choices)
        assert counts[found] == max(counts.values(), default=0), f"{q.id}: {own} became {text!r}"
        assert text.startswith(f"Teacher {own.index(found)} "), f"{q.id}: {text!r} is not of the first of the majority"
    others = [replace(q, answer=(q.answer + 1) % 4) for q in QUESTIONS]
    assert vote.purify(others) == given, "the vote looks at the right answer"


@SOLUTIONS
def test_2_a_teacher_who_lies(solution, tmp_path):
    texts = tried(solution.lies, QUESTIONS)
    assert set(texts) == {q.id for q in QUESTIONS}, "a rationale of each question"
    for q in QUESTIONS:
        found = kp.conclusion(texts[q.id], q.choices)
        assert found is not None, f"{texts[q.id]!r} concludes on no choice of {q.choices}"
        assert found != q.answer, f"{texts[q.id]!r} is no lie"
    assert solution.lies(QUESTIONS) == texts, "a liar must stick to its story"
    for split in ("train", "valid", "test"):  # it can be given to train.py as a file
        own = QUESTIONS[:20] if split == "train" else QUESTIONS[20:]
        rows = [json.dumps(dict(id=q.id, task=q.task, text=f"{split} {q.text}", choices=q.choices, answer=q.answer)) for q in own]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    file = tmp_path / "liar.jsonl"
    file.write_text("\n".join(json.dumps({"id": q.id, "rationale": texts[q.id], "score": 1.0}) for q in QUESTIONS[:20]))
    data = read_data(tmp_path)
    assert read_rationales(file, data, ["train"], 64) == ({q.id: texts[q.id] for q in QUESTIONS[:20]}, {q.id: 1.0 for q in QUESTIONS[:20]})


def lead_of_tinyllm(file):
    """Return the lower end of the 95 % interval of TinyLLM's accuracy minus the router's, in points."""
    rows, _ = evaluation.read_tables([file])
    of_purifier = {runs[0]["purifier"]: runs for runs in rows.values()}
    assert {"none", "router"} <= set(of_purifier), "a row of each"
    gaps = []
    for tinyllm, router in zip(of_purifier["none"], of_purifier["router"], strict=True):
        gaps.append(100 * (tinyllm["accuracy"]["mean"] - router["accuracy"]["mean"]))
    assert len(gaps) >= 3, "three seeds or more"
    return fmean(gaps) - evaluation.interval(gaps)


def test_3_where_tinyllm_wins():
    if exercises.WHERE_TINYLLM_WINS is None:
        pytest.skip("not solved yet")
    file = Path(__file__).parent.parent / exercises.WHERE_TINYLLM_WINS
    assert lead_of_tinyllm(file) > 0, "it does not win by more than chance"


def test_3_knows_a_win_from_a_chance(tmp_path):
    def table(name, *leads):
        runs = []
        for seed, lead in enumerate(leads):
            runs.append(dict(label="a", purifier="none", seed=seed, accuracy={"mean": 0.5 + lead}))
            runs.append(dict(label="b", purifier="router", seed=seed, accuracy={"mean": 0.5}))
        evaluation.write_table(tmp_path / name, [], runs)
        return tmp_path / name

    # 10 points on average, with a standard deviation of 1 or 20; t = 4.303 for three seeds.
    assert lead_of_tinyllm(table("win.json", 0.09, 0.10, 0.11)) == pytest.approx(10 - 4.303 / 3**0.5)
    assert lead_of_tinyllm(table("chance.json", -0.1, 0.1, 0.3)) < 0
    with pytest.raises(AssertionError, match="three seeds"):
        lead_of_tinyllm(table("few.json", 0.1, 0.1))
