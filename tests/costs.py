"""What each purifier adds to a run, in the micro world. No test: run it alone on a machine.

    python tests/costs.py

Parameters that it trains. Seconds of `fit`, on all training questions, when the teachers have said all
before: for rl also of what it learns while the student trains. Milliseconds for each new question, of
500 at once: to embed it and choose, or to merge its rationales; no teacher's writing is in it.
"""

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import kp
import train
from purify import PURIFIERS

NAMES = ("router", "plackett-luce", "classifier", "rl", "rl-published", "aggregate")
RL_STEPS = 1000


def open_purifier(name, folder):
    """Return (a purifier that is not fitted, test questions), with all teachers' texts and scores paid."""
    args = train.parse_args(["--purifier", name, "--out", str(folder / name)])
    train.settle(args)
    ranks = train.Ranks(args.device)
    data, teachers, student, token_cache, open_lm = train.open_parts(args, ranks)
    teachers.scores(data["train"])
    teachers.all_rationales(data["train"] + data["test"])
    visits = train.draw_visits(data["train"], token_cache, args)
    return PURIFIERS[name](args, data["train"], visits, data["train"], teachers, open_lm), data["test"][:500]


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def seconds_of(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name, folder):
    """Return (parameters, seconds to fit, seconds for the questions) of a purifier."""
    purifier, questions = open_purifier(name, folder)
    took = seconds_of(purifier.fit)
    if name == "aggregate":
        lm, tokenizer = purifier.open_lm(None)
        token_cache = kp.TokenCache(tokenizer, purifier.MAX_LENGTH)
        return 2 * size(lm), took, seconds_of(lambda: purifier.write(lm, token_cache, questions))
    if name in ("rl", "rl-published"):
        for step in range(RL_STEPS):
            texts = purifier.rationales(step)
            losses = torch.rand(len(texts))
            took += seconds_of(lambda: purifier.feedback(step, kp.DualLoss(None, losses, losses, 0, 0)))

        def choose():
            purifier.policy(purifier.describe(questions)[0])

        return size(purifier.policy), took, seconds_of(choose)
    router = purifier.router().fit(**purifier.fitted_on)
    n = 0
    if name == "router":
        n = size(router.project) + router.teachers.numel()
    if name == "classifier":
        n = size(router.head, purifier.encoder[0].encoder, purifier.encoder[0].shared)
    return n, took, seconds_of(lambda: router.route(purifier.embed(questions)))


if __name__ == "__main__":
    print("| purifier | parameters | fit s | ms a question |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            n, fit, chooses = measure(name, Path(folder))
            print(f"| {name} | {n:,} | {fit:.1f} | {1000 * chooses / 500:.2f} |", flush=True)
