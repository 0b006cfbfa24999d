"""One line per purifier: a hash of the student that a short run ends with. Two versions of the code that should
train the same students print the same lines.

    python tests/same_bits.py > before.txt                  # in one checkout
    python tests/same_bits.py > after.txt                   # in another
    diff before.txt after.txt
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PURIFIERS = "router plackett-luce classifier aggregate rl rl-verified none single task random oracle answers".split()


def student_hash(root, purifier, arguments, folder):
    """Train one student with one thread and hash its weights."""
    command = [sys.executable, "train.py", "--purifier", purifier, "--out", str(folder / purifier), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    weights = folder / purifier / "student" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", default=ROOT, help="the checkout to run (default: this one)")
    parser.add_argument("--purifiers", nargs="+", default=PURIFIERS)
    args, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        for purifier in args.purifiers:
            digest = student_hash(args.root, purifier, arguments or ["--steps", "60"], Path(folder))
            print(f"{purifier:<16}{digest}", flush=True)


if __name__ == "__main__":
    main()
