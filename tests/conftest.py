"""A very small world for tests: real questions, and four teachers that have read for a few steps only."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data.micro import prepare  # noqa: E402


torch.set_num_threads(1)  # models this small gain nothing from a second


def make_world(folder):
    facts, patch = prepare.read_facts(), pytest.MonkeyPatch()
    patch.setattr(prepare, "SIZES", {"train": 24, "valid": 8, "test": 12})
    for name, rows in prepare.make_questions(facts, seed=1).items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, name in enumerate(prepare.TEACHERS):
        prepare.train_teacher((name, str(folder / "teachers" / name), 1, i, 4))
    patch.undo()
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def teacher_folders(world):
    return [world / "teachers" / name for name in prepare.TEACHERS]
