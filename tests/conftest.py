"""A very small world for tests: real questions, and four teachers that have read for a few steps only."""

import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import kp  # noqa: E402
from data.micro import prepare  # noqa: E402
from data.tinyllm.prepare import convert  # noqa: E402

torch.set_num_threads(1)  # models this small gain nothing from a second
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_world(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SIZES", {"train": 24, "valid": 4, "test": 8})
        patch.setattr(prepare, "OOD_SIZES", prepare.SIZES)
        for name, questions in prepare.make_questions(prepare.read_facts(), seed=1).items():
            write_lines(folder / f"{name}.jsonl", map(asdict, questions))
    torch.manual_seed(1)
    prepare.practise(folder / "student", 1, steps=4, steps_done=torch.zeros(()))
    facts = prepare.read_facts()
    for name in prepare.TEACHERS:
        reading = prepare.reading_list(facts, name, 1)
        prepare.train_teacher(name, folder / "teachers", 1, reading, 4, steps_done=torch.zeros(()))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def teacher_folders(world):
    return [world / "teachers" / name for name in prepare.TEACHERS]


def pytest_collection_modifyitems(items):
    """Put the tests of `beside` last: then they have been running since the start."""
    items.sort(key=lambda item: item.originalname == "test_that")


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """Run the stories of test_faults.py, in processes of their own, beside all other tests. Return
    {number: what will be its result}.
    """
    pending = {}
    pool = ThreadPoolExecutor(1)
    for item in request.session.items:
        if item.originalname == "test_that":
            number = item.callspec.params["number"]
            test, *rest = item.module.SLOW[number]
            world = request.getfixturevalue("world")
            pending[number] = pool.submit(test, world, tmp_path_factory.mktemp(test.__name__), *rest)
    yield pending
    pool.shutdown(cancel_futures=True)


def write_lines(path, rows):
    """Write a file of JSON lines. A row that is a text stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_teachers(folders, cache, asking=kp.Asking(), examples=()):
    return kp.Teachers([kp.CheckpointTeacher(folder, cache, asking, examples) for folder in folders])


@contextmanager
def dying_at_step(n):
    """Within this, a run of train.py dies of a MemoryError in its n-th dual loss."""
    dual_loss = kp.dual_loss
    steps = []

    def dies(*arguments):
        steps.append(0)
        if len(steps) == n:
            raise MemoryError
        return dual_loss(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError) as died:
        patch.setattr(kp, "dual_loss", dies)
        yield
    traceback.clear_frames(died.tb)  # they hold the lock of the run that died


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
TWO_RANKS = [*TORCHRUN, "--nproc_per_node=2"]


def torchrun(script, *arguments, timeout=200, processes=2):
    """Run a script in several processes, as on several GPUs."""
    command = [sys.executable, *TORCHRUN, f"--nproc_per_node={processes}", str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ONE_THREAD)


# ------------------------------------------------------------------------------------- TinyLLM's layout


def tinyllm_folder(folder, as_array=True, n=5, entries=None):
    """Write n questions, and the rationales of both teachers, as TinyLLM's repository lays them out."""
    rows = []
    texts = []
    for i in range(n):
        answer = ("yes", "no")[i % 2]
        choices = ["yes", "no", "maybe"]
        rows.append(dict(id=str(i), question=f"{i} even?", choices=choices, answer=answer))
        flan = f"Think of {i}. Thus, the answer is (a) yes\n\nQ: Is it?"
        texts.append(f"{flan} llama rationale: It is {i}.\nSo.")
    if entries is not None:
        texts = entries
    for split in ("train", "valid", "test"):
        file = write_lines(folder / f"parity_{split}.json", rows)
        if as_array:
            file.write_text(json.dumps(rows))
    (folder / "llm").mkdir()
    (folder / "llm" / "train_CoT_0.json").write_text(json.dumps(texts[:3]))  # the files have 500 each
    (folder / "llm" / "train_CoT_1.json").write_text(json.dumps(texts[3:]))
    return folder


def converted(folder, **layout):
    """Return such a data set as `python -m data.tinyllm.prepare` converts it."""
    convert(tinyllm_folder(folder / "their" / "parity", **layout), folder / "parity")
    return folder / "parity"
