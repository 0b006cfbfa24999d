"""Measure students: the accuracy of one, and (below) the paper's tables over many runs.

    python eval.py out/router-0                      # the figures that the run printed
    python eval.py CHECKPOINT --data DIR             # any T5 checkpoint folder, any data set
"""

import argparse
import sys


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("run", help="a run's folder (out/RUN) or a checkpoint folder")
    add("--data", metavar="DIR", help="data set (default: the run's own)")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help answers at once

from pathlib import Path

import torch

import kp
import model as models
from kp import BadInput


def evaluate(args):
    """-> {split: {task: accuracy, ..., "mean"}} of a run's or checkpoint's student on test and ood/test."""
    folder = Path(args.run)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a run (out/RUN) or a checkpoint folder")
    settings = {}
    if (folder / "student").is_dir():
        settings, folder = models.read_json(folder / "config.json"), folder / "student"
    data = args.data or settings.get("data")
    if data is None:
        from data.micro import prepare

        data = prepare.prepare()
    data = kp.read_data(data)
    student, tokenizer = models.load(folder, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not isinstance(student, models.T5):
        raise BadInput(f"{folder}: a student is a T5; this is a {student.config['model_type']}")
    return {split: kp.accuracy(student, tokenizer, data[split]) for split in ("test", "ood/test") if split in data}


def show(accuracies):
    for split, accuracy in accuracies.items():
        print(f"  {'out of domain' if split == 'ood/test' else 'test accuracy':<16}" + "".join(f"{t:>11}" for t in accuracy))
        print(" " * 18 + "".join(f"{share:>11.3f}" for share in accuracy.values()))


if __name__ == "__main__":
    try:
        show(evaluate(ARGS))
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
