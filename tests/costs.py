"""What each purifier adds to a run, in the micro world: parameters, and time a question. No test: run it.

    python tests/costs.py

Parameters that are trained. Milliseconds for each of 500 new questions: to embed it and choose, or to
merge its rationales. What teachers write is not in it. Median of five.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import kp
import train
from purify import PURIFIERS

NAMES = ("router", "plackett-luce", "classifier", "rl", "rl-verified", "aggregate")


def open_purifier(name, folder):
    """Return (a purifier that is not fitted, 500 questions that it was not fitted on)."""
    args = train.parse_args(["--purifier", name, "--out", str(folder / name)])
    train.settle(args)
    data, teachers, _, token_cache, open_lm = train.open_parts(args, train.Ranks(args.device))
    questions = data["test"][:500]
    teachers.all_rationales(questions)
    visits = train.draw_visits(data["train"], token_cache, args)
    return PURIFIERS[name](args, data["train"], visits, data["train"], teachers, open_lm), questions


def size(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def measure(name, folder):
    """Return (parameters, seconds for the questions) of a purifier."""
    purifier, questions = open_purifier(name, folder)
    if name == "aggregate":  # as fast before it is taught as after
        lm, tokenizer = purifier.open_lm(None)
        token_cache = kp.TokenCache(tokenizer, purifier.MAX_LENGTH)
        n = 2 * size(lm)

        def work():
            purifier.write(lm, token_cache, questions)

    elif name in ("rl", "rl-verified"):
        purifier.fit()
        n = size(purifier.policy)

        def work():
            purifier.policy(purifier.describe(questions)[0])

    else:
        purifier.fit()
        router = purifier.router().fit(**purifier.fitted_on)
        n = 0  # Plackett-Luce keeps the questions that it was fitted on
        if name == "router":
            n = size(router.project) + router.keys.numel()
        elif name == "classifier":
            encoder, _ = purifier.encoder
            n = size(router.head, encoder.encoder, encoder.shared)

        def work():
            router.route(purifier.embed(questions))

    seconds = []
    for _ in range(5):
        purifier.embeddings.clear()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return n, statistics.median(seconds)


if __name__ == "__main__":
    print("| purifier | parameters | ms a question |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            n, seconds = measure(name, Path(folder))
            print(f"| {name} | {n:,} | {1000 * seconds / 500:.2f} |", flush=True)
