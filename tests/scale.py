"""Peak memory and seconds before the first step, by the number of training questions. No test: run it.

    python tests/scale.py                                          # 10,000, 100,000 and 300,000
    python tests/scale.py 1000000 --purifiers none
    python tests/scale.py 10000 --root ../other-checkout           # another version of the code

Questions of four choices and the ready rationales of three teachers, with their scores: nothing is
generated. A measurement is a process of its own, with one thread, which ends where its first step would
begin; its CPU seconds depend less on what else the machine does.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SYLLABLES = "ba ce di fo gu ka le mi no pu ra se ti vo zu".split()
TEACHERS = ("ada", "ben", "cleo")


def make_data(folder, n):
    """Write n training questions of about 100 characters, and M rationales of about 150 for each."""
    draw = random.Random(n)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(5000)]
    (folder / "rationales").mkdir(parents=True)
    said = [open(folder / "rationales" / f"{name}.jsonl", "w") for name in TEACHERS]
    for split, size in (("train", n), ("valid", 200), ("test", 200)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in range(size):
                name = f"{split}-{i}"
                choices = draw.sample(words, 4)
                text = f"Which of these has {' '.join(draw.choices(words, k=10))}?"
                row = dict(id=name, task=f"task {i % 5}", text=text, choices=choices, answer=i % 4)
                file.write(json.dumps(row) + "\n")
                for teacher in said:
                    why = f"Whatever has {' '.join(draw.choices(words, k=16))}, so the answer is {choices[i % 4]}."
                    line = dict(id=name, rationale=why, score=round(draw.random(), 3))
                    teacher.write(json.dumps(line) + "\n")
    for teacher in said:
        teacher.close()


def measure(root, arguments):
    """Run train.py in this process up to its first step, and print what that took."""
    began = time.time()
    sys.path.insert(0, str(root))
    import train

    def steps(*_):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{peak:8.2f} GiB {time.time() - began:8.1f} s {time.process_time():8.1f} CPU s", flush=True)
        os._exit(0)  # nothing to tidy up: freeing a million questions takes seconds

    train.Run.steps = steps
    train.main(train.parse_args(arguments))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[10_000, 100_000, 300_000])
    parser.add_argument("--root", default=ROOT, help="the checkout to run (default: this one)")
    parser.add_argument("--purifiers", nargs="+", default=["router", "none", "random"])
    parser.add_argument("--data", help="folder that keeps the data sets (default: a temporary one)")
    args, how = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        for n in args.sizes:
            data = Path(args.data or temporary) / str(n)
            if not data.exists():
                make_data(data, n)
            for purifier in args.purifiers:
                print(f"{n:>9,} questions, {purifier:<14}", end="", flush=True)
                where = ["--data", str(data), "--out", f"{temporary}/{purifier}-{n}", "--fit-questions", "1000"]
                command = [sys.executable, __file__, "--measure", args.root, "--purifier", purifier, *where, *how]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, stderr=subprocess.PIPE, env=environment)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]).resolve(), sys.argv[3:])
    else:
        main()
