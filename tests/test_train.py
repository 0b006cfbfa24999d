import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

from test_kp import tinyllm_folder

import eval as evaluation
import model
import purify
import train

PARTS = ["--steps", "6", "--batch-size", "4", "--eval-every", "3", "--max-new-tokens", "24"]


@pytest.fixture(autouse=True)
def short_tuning(monkeypatch):
    monkeypatch.setattr(purify.Classifier, "STEPS", 3)


def run(world, teacher_folders, tmp_path, *arguments, name="run"):
    args = train.parse_args(
        ["--data", str(world), "--teachers", *map(str, teacher_folders), "--shots", "0", *PARTS]
        + ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / name), *arguments]
    )
    train.main(args)
    return tmp_path / name


@pytest.mark.parametrize("purifier", list(purify.PURIFIERS))
def test_every_purifier_trains_and_reports(world, teacher_folders, tmp_path, purifier, capsys):
    folder = run(world, teacher_folders, tmp_path, "--purifier", purifier, "--fit-questions", "16", "--tune-aggregator", "3")
    result = json.loads((folder / "result.json").read_text())
    assert result["purifier"] == purifier and result["teachers"] == ["t5", "llama-2", "mistral", "llama-3.1"]
    assert set(result["accuracy"]) == {"nature", "science", "riddles", "medicine", "mean"}
    assert set(result["ood"]) == {"physical", "clinical", "mean"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(6))
    if purifier == "answers":
        assert result["teacher_tokens"] == 0 and all(line["rationale"] == 0 for line in lines if "loss" in line)
    else:
        assert 0 < result["teacher_tokens"] <= 24 * {"none": 4 * 24, "aggregate": 4 * (24 + 16)}.get(purifier, 24)
    text = capsys.readouterr().out
    assert f"{result['accuracy']['mean']:.3f}" in text

    # eval.py prints the same figures from what was saved
    train.print_accuracies(evaluation.evaluate(evaluation.parse_args([str(folder)])))
    assert f"{result['accuracy']['mean']:.3f}" in capsys.readouterr().out


def test_two_runs_with_one_seed_are_equal_to_the_bit(world, teacher_folders, tmp_path):
    a = run(world, teacher_folders, tmp_path, "--purifier", "router", name="a")
    b = run(world, teacher_folders, tmp_path, "--purifier", "router", name="b")
    c = run(world, teacher_folders, tmp_path, "--purifier", "router", "--seed", "1", name="c")
    weights = [(folder / "student" / "model.safetensors").read_bytes() for folder in (a, b, c)]
    assert weights[0] == weights[1] != weights[2]
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_the_paper_s_recipe_runs_with_stand_in_weights(world, teacher_folders, tmp_path):
    """Chat-tuned teachers in half precision, a BERT to embed questions, two examples, the answer told, a T5 as student."""
    teachers = []
    for i, folder in enumerate(teacher_folders):
        shutil.copytree(folder, tmp_path / f"hf-{i}")
        teachers.append(tmp_path / f"hf-{i}")
        if i:
            net, tokenizer = model.load(folder, dtype=torch.bfloat16)
            model.save(net, tokenizer, teachers[i])
            model.write_json(teachers[i] / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    net, tokenizer = model.load(teacher_folders[0])
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes["vocab_size"] = tokenizer.get_vocab_size()
    model.save(model.Bert(sizes), tokenizer, tmp_path / "bert")
    for purifier in ("router", "classifier", "aggregate"):
        parts = ["--student", str(teacher_folders[0]), "--encoder", str(tmp_path / "bert"), "--aggregator", str(teachers[1])]
        how = ["--purifier", purifier, "--shots", "2", "--lr", "1e-4", "--teacher-forcing"]
        folder = run(world, teachers, tmp_path, *how, *parts, name=purifier)
        assert json.loads((folder / "result.json").read_text())["teachers"] == [f"hf-{i}" for i in range(4)]


@pytest.mark.parametrize("purifier", list(purify.PURIFIERS))
def test_every_purifier_trains_on_tinyllm_s_layout(tmp_path, purifier, capsys):
    entries = [f"Because of {i}. Thus, the answer is llama rationale: Since {i}." for i in range(19)] + ["llama rationale: So."]
    tinyllm_folder(tmp_path / "parity", True, n=20, entries=entries)
    where = ["--data", str(tmp_path / "parity"), "--out", str(tmp_path / "run")]
    train.main(train.parse_args([*where, "--purifier", purifier, *PARTS]))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["teachers"] == ["flan-t5-xl", "llama-2"] and set(result["accuracy"]) == {"parity", "mean"}
    text = capsys.readouterr().out
    assert "take --student DIR" in text and ("1 empty rationale" in text or purifier not in ("none", "single"))


def test_a_student_may_be_a_checkpoint(world, teacher_folders, tmp_path):
    folder = run(world, teacher_folders, tmp_path, "--purifier", "answers", "--student", str(teacher_folders[0]), "--lr", "0")
    before, _ = model.load(teacher_folders[0])
    after, _ = model.load(folder / "student")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))


def test_visits_cover_every_question_as_often_in_batches_of_like_length():
    def visits(lengths, steps, seed=0):
        return train.draw_visits(lengths, train.parse_args(["--batch-size", "4", "--steps", str(steps), "--seed", str(seed)]))

    few = visits([5] * 10, 7)
    assert [len(batch) for batch in few] == [4] * 7
    assert set(Counter(row for batch in few for row in batch).values()) == {2, 3}  # 28 visits, 10 questions
    assert few == visits([5] * 10, 7) != visits([5] * 10, 7, seed=1)
    lengths = [random.Random(i).randint(20, 60) for i in range(320)]
    epoch = visits(lengths, 80)
    assert sorted(row for batch in epoch for row in batch) == list(range(320))
    padded = sum(4 * max(lengths[row] for row in batch) for batch in epoch)
    assert sum(lengths) / padded > 0.9 > sum(lengths) / sum(4 * max(lengths[i : i + 4]) for i in range(0, 320, 4))


def test_the_learning_rate_warms_up_and_decays_to_zero():
    args = train.parse_args(["--steps", "100", "--warmup", "10", "--lr", "2"])
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)


@pytest.mark.parametrize("purifier", ["router", "rl"])
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(world, teacher_folders, tmp_path, purifier, monkeypatch):
    whole = run(world, teacher_folders, tmp_path, "--purifier", purifier, name="whole")
    losses, kp_loss = [], train.kp.dual_loss

    def dies_at_the_fifth_step(*arguments):
        losses.append(0)
        if len(losses) == 5:
            raise MemoryError
        return kp_loss(*arguments)

    monkeypatch.setattr(train.kp, "dual_loss", dies_at_the_fifth_step)
    with pytest.raises(MemoryError):
        run(world, teacher_folders, tmp_path, "--purifier", purifier, name="killed")
    monkeypatch.undo()
    with pytest.raises(model.BadInput, match="--resume"):
        run(world, teacher_folders, tmp_path, "--purifier", purifier, name="killed")
    with pytest.raises(model.BadInput, match="--lam"):
        run(world, teacher_folders, tmp_path, "--purifier", purifier, "--resume", "--lam", "3", name="killed")
    killed = run(world, teacher_folders, tmp_path, "--purifier", purifier, "--resume", name="killed")
    for name in ("student/model.safetensors", "metrics.jsonl", "purified.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (killed, whole))
    assert a.pop("seconds").keys() == b.pop("seconds").keys() and a == b


@pytest.mark.parametrize("purifier", ["none", "rl"])
def test_two_ranks_train_as_one_with_twice_the_batch(world, teacher_folders, tmp_path, purifier):
    given = ["--data", str(world), "--teachers", *map(str, teacher_folders), "--shots", "0", *PARTS, "--purifier", purifier]
    one = run(world, teacher_folders, tmp_path, "--purifier", purifier, "--batch-size", "8", name="one")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *given]
    out = subprocess.run(
        [sys.executable, *command, "--cache", str(tmp_path / "cache-two"), "--out", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert out.returncode == 0, out.stderr
    a, b = ([json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, tmp_path / "two"))
    assert len(a) == len(b) == 8
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in {"loss", "answer", "rationale", "norm", "tokens", "reward", "right"} & x.keys():
            assert y[key] == pytest.approx(x[key], rel=1e-3, abs=1e-4), key
    r, s = (json.loads((f / "result.json").read_text()) for f in (one, tmp_path / "two"))
    assert r["ledger"] == s["ledger"] and r["student_tokens"] == s["student_tokens"]
    files = [(tmp_path / name).rglob("said.jsonl") for name in ("cache", "cache-two")]
    said = [sorted(file.read_text().count('"key"') for file in both) for both in files]
    assert said[0] == said[1]  # nothing was written twice


def test_a_failing_rank_ends_the_run_with_one_line(world, teacher_folders, tmp_path):
    given = ["--data", str(world), "--teachers", *map(str, teacher_folders), *PARTS, "--out", str(tmp_path / "run")]
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"),
         *given, "--purifier", "magic"], capture_output=True, text=True, timeout=100)  # fmt: skip
    assert out.returncode != 0 and "error: --purifier magic: unknown" in out.stderr
    assert not (tmp_path / "run").exists()


def test_the_readme_s_sixth_purifier_works(world, teacher_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(purify, "PURIFIERS", dict(purify.PURIFIERS))
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    exec(code, {})
    monkeypatch.setattr(train, "PURIFIERS", purify.PURIFIERS)
    folder = run(world, teacher_folders, tmp_path, "--purifier", "nearest")
    assert json.loads((folder / "result.json").read_text())["purifier"] == "nearest"


# ------------------------------------------------------------------------------------------- bad input


def command(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--purifier", "magic"], ["magic", "router"]),
        (["--data", "nowhere"], ["nowhere", "no such folder"]),
        (["--teachers", "nowhere"], ["nowhere", "no such folder"]),
        (["--teacher", "7", "--purifier", "single"], ["7", "there are 4 teachers"]),
        (["--student", "nowhere"], ["nowhere", "no such folder"]),
        (["--steps", "0"], ["--steps"]),
        (["--batch-size", "-1"], ["--batch-size"]),
    ],
)
def test_bad_arguments_end_with_one_line(world, teacher_folders, tmp_path, arguments, says):
    out = command(
        "train.py", "--data", str(world), "--teachers", *map(str, teacher_folders), "--out", str(tmp_path / "run"),
        "--cache", str(tmp_path / "cache"), *PARTS, *arguments)  # fmt: skip
    assert out.returncode == 2 and "Traceback" not in out.stderr
    (line,) = out.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in says)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
    ],
)
def test_a_spoilt_teacher_is_named_before_anything_is_written(world, teacher_folders, tmp_path, spoil, says):
    shutil.copytree(teacher_folders[2], tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(model.BadInput, match=says) as error:
        run(world, [*teacher_folders[:2], tmp_path / "bad"], tmp_path, "--purifier", "router")
    assert "\n" not in str(error.value) and str(tmp_path / "bad") in str(error.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("encoder", ["nowhere", "llama"])
def test_a_bad_encoder_is_named_before_anything_is_written(world, teacher_folders, tmp_path, encoder):
    given = teacher_folders[1] if encoder == "llama" else tmp_path / encoder
    with pytest.raises(model.BadInput, match="encoder|no such folder"):
        run(world, teacher_folders, tmp_path, "--encoder", str(given))
    assert not (tmp_path / "run").exists()


def test_eval_of_nothing_ends_with_one_line(tmp_path):
    out = command("eval.py", str(tmp_path / "nowhere"))
    assert out.returncode == 2 and "no such folder" in out.stderr and "Traceback" not in out.stderr


def test_help_names_every_purifier_and_is_quick():
    out = command("-X", "importtime", "train.py", "--help")
    assert out.returncode == 0 and all(name in out.stdout for name in purify.PURIFIERS)
    assert " torch" not in out.stderr
