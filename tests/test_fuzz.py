"""Damaged files: each is read, or refused as model.BadInput; nothing else, whatever the damage.

    python -m pytest tests/test_fuzz.py          # a few hundred mutations
    python tests/test_fuzz.py 5000               # as many as that
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_world, write_lines
from safetensors.torch import save_file

import kp
import model
import train
from data.questions import read_data, read_rationales

ODD = [None, True, -1, 0, 10**30, 1.5, float("nan"), "", "\x00", "\ud800", "(a)", [], [[]], {}, {"": 0}, "a" * 10**5]
ODD += [["a", "a"], -(10**400), "1e999", [0] * 11]


def flip(draw, data):
    """Turn some bits."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 30))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(draw, data):
    return data[: draw.randrange(len(data))]


def double(draw, data):
    """Have a span twice, or somewhere else besides."""
    start = draw.randrange(len(data))
    span = data[start : start + draw.choice((1, 10, 1000))]
    place = draw.randrange(len(data))
    return data[:place] + span + data[place:]


def drop(draw, data):
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.choice((1, 10, 1000)) :]


def odd_value(draw, data):
    """Put an odd value at a random place of a JSON file, of a line of one, or of a safetensors header;
    or rename or delete something there.
    """
    n = int.from_bytes(data[:8], "little")
    if n < len(data):
        header = odd_value(draw, data[8 : 8 + n])
        return len(header).to_bytes(8, "little") + header + data[8 + n :]
    lines = data.split(b"\n")
    number = draw.randrange(len(lines))
    try:
        json.loads(data)
    except ValueError:
        pass
    else:
        lines = [data]
        number = 0
    try:
        top = {"": json.loads(lines[number])}
    except ValueError:
        return flip(draw, data)
    within, key = top, ""
    while isinstance(within[key], (dict, list)) and within[key] and draw.random() < 0.8:
        within = within[key]
        key = draw.choice(list(within)) if isinstance(within, dict) else draw.randrange(len(within))
    chance = draw.random()
    if chance < 0.2 and within is not top:
        del within[key]
    elif chance < 0.3 and within is not top and isinstance(within, dict):
        within[f"{key}x"] = within.pop(key)
    else:
        within[key] = draw.choice(ODD)
    lines[number] = json.dumps(top[""]).encode()
    return b"\n".join(lines)


MUTATIONS = (flip, cut, double, drop, odd_value, odd_value, odd_value)


def make_targets(world, folder):
    """Return {file: what reads it}: each reader does all that training does with what the file says."""
    shutil.copytree(world, folder / "world")
    world = folder / "world"
    t5 = world / "teachers" / "t5"
    data = read_data(world)
    questions = data["train"][:2]

    rows = [dict(id=q.id, rationale=q.truth, score=0.5) for q in data["train"]]
    ready = write_lines(folder / "ready.jsonl", rows)

    sharded = folder / "sharded"
    shutil.copytree(t5, sharded)
    (sharded / "model.safetensors").rename(sharded / "one.safetensors")
    names = dict.fromkeys(model.read_tensors(sharded / "one.safetensors")[0], "one.safetensors")
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=names)))

    student, token_cache = kp.open_student(t5)
    optimizer = torch.optim.AdamW(student.parameters())
    kp.dual_loss(student, token_cache, questions, [["So."], ["So."]], 1.0).total.backward()
    optimizer.step()
    run = a_run(folder / "run")
    run.save(2, student, optimizer, PicksOnly())

    asking = kp.Asking(max_new_tokens=8)

    def ask_again():
        teacher = kp.CheckpointTeacher(t5, folder / "cache", asking)
        assert all(0 <= score <= 1 for score in teacher.scores(data["train"][:8]))
        token_cache.targets(teacher.rationales(data["train"][:8]))
        json.dumps(teacher.ledger)
        return teacher.said.path

    said = ask_again()

    def loss_of(student, token_cache, questions):
        return kp.dual_loss(student, token_cache, questions, [[q.text] for q in questions], 1.0)

    def read_questions():
        few = read_data(world)["train"]
        loss_of(student, token_cache, [few[0], few[-1]])
        for q in few:
            json.dumps(vars_of(q), ensure_ascii=False).encode()

    def read_ready():
        texts, _ = read_rationales(ready, data, ["train"], 8)
        for text in texts.values():
            token_cache.targets([text])

    def open_t5(path=t5):
        loss_of(*kp.open_student(path), questions[:1])

    def restore():
        a_run(folder / "run").restore(student, optimizer, PicksOnly())
        optimizer.step()

    return {
        world / "train.jsonl": read_questions,
        ready: read_ready,
        t5 / "config.json": open_t5,
        t5 / "tokenizer.json": open_t5,
        t5 / "tokenizer_config.json": open_t5,
        t5 / "model.safetensors": open_t5,
        index: lambda: open_t5(sharded),
        run.checkpoint: restore,
        said: ask_again,
    }


def vars_of(q):
    return [q.id, q.task, q.text, q.choices, q.truth]


class PicksOnly:
    def state(self):
        return {"picks": torch.zeros(3)}

    def restore(self, state, step):
        state["picks"][step]


def a_run(folder):
    """Return what of a train.Run its `save` and `restore` look at."""
    run = object.__new__(train.Run)
    run.checkpoint = folder / "checkpoint.safetensors"
    run.metrics = folder / "metrics.jsonl"
    folder.mkdir(exist_ok=True)
    run.metrics.touch()
    run.ranks = kp.ONE_PROCESS
    run.seconds = {"train": 1.0}
    run.student_tokens = 9
    run.pending = []
    return run


def damage(file, read, seed):
    """Read a file once with the damage that this seed does. Return whether it was refused."""
    whole = file.read_bytes()
    draw = random.Random(f"{file.name} {seed}")
    mutation = draw.choice(MUTATIONS)
    try:
        file.write_bytes(mutation(draw, whole))
        read()
    except model.BadInput as error:
        assert len(str(error).splitlines()) == 1 and str(file.parent) in str(error), error
        return True
    finally:
        file.write_bytes(whole)
    return False


@pytest.fixture(scope="module")
def targets(world, tmp_path_factory):
    return make_targets(world, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("number", range(9))
def test_a_damaged_file_is_read_or_refused(targets, number):
    file, read = list(targets.items())[number]
    read()
    refused = 0
    for seed in range(25):
        refused += damage(file, read, seed)
    assert refused > 3


@pytest.mark.parametrize("name", ["student.shared.weight", "optimizer.3.exp_avg", "purifier.picks", "progress"])
@pytest.mark.parametrize("how", ["without", "renamed", "changed"])
def test_a_checkpoint_that_is_not_as_it_was_saved_is_refused(targets, name, how):
    """It is a good safetensors file: what is wrong with it would show at a later step, or never."""
    (file,) = [file for file in targets if file.name == "checkpoint.safetensors"]
    whole = file.read_bytes()
    tensors, about = model.read_tensors(file)
    part = about if name == "progress" else tensors
    value = part.pop(name)
    if how == "renamed":
        part[f"{name}x"] = value
    elif how == "changed":
        part[name] = value.replace("2", "3") if part is about else value + 1
    try:
        save_file(tensors, file, about)
        with pytest.raises(model.BadInput, match="checkpoint.safetensors: damaged, .*--overwrite"):
            targets[file]()
    finally:
        file.write_bytes(whole)


def main(n):
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world")
        targets = make_targets(world, Path(folder) / "fuzz")
        for file, read in targets.items():
            seen = {}
            refused = 0
            for seed in range(1000, 1000 + n // len(targets)):
                try:
                    refused += damage(file, read, seed)
                except Exception as error:
                    place = error.__traceback__
                    while place.tb_next:
                        place = place.tb_next
                    where = f"{type(error).__name__} {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
                    seen.setdefault(where, []).append((seed, str(error)[:90]))
            print(f"{file.name}: {n // len(targets)} mutations, {refused} refused", flush=True)
            for where, errors in seen.items():
                print("   ", where, len(errors), errors[0], flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
