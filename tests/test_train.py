import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import model
import purify
import train

PARTS = ["--steps", "6", "--batch-size", "4", "--eval-every", "3", "--max-new-tokens", "24"]


def run(world, teacher_folders, tmp_path, *arguments, name="run"):
    args = train.parse_args(
        ["--data", str(world), "--teachers", *map(str, teacher_folders), "--shots", "0", *PARTS]
        + ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / name), *arguments]
    )
    train.main(args)
    return tmp_path / name


@pytest.mark.parametrize("purifier", list(purify.PURIFIERS))
def test_every_purifier_trains_and_reports(world, teacher_folders, tmp_path, purifier, capsys):
    folder = run(world, teacher_folders, tmp_path, "--purifier", purifier, "--fit-questions", "16")
    result = json.loads((folder / "result.json").read_text())
    assert result["purifier"] == purifier and result["teachers"] == ["t5", "llama-2", "mistral", "llama-3.1"]
    assert set(result["accuracy"]) == {"nature", "science", "riddles", "medicine", "mean"}
    assert set(result["ood"]) == {"physical", "clinical", "mean"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(6))
    if purifier == "answers":
        assert result["teacher_tokens"] == 0 and all(line["rationale"] == 0 for line in lines if "loss" in line)
    else:
        assert 0 < result["teacher_tokens"] <= 24 * 24 * (4 if purifier in ("none", "aggregate") else 1)
    text = capsys.readouterr().out
    assert f"{result['accuracy']['mean']:.3f}" in text

    # eval.py prints the same figures from what was saved
    evaluation.show(evaluation.evaluate(evaluation.parse_args([str(folder)])))
    assert f"{result['accuracy']['mean']:.3f}" in capsys.readouterr().out


def test_two_runs_with_one_seed_are_equal_to_the_bit(world, teacher_folders, tmp_path):
    a = run(world, teacher_folders, tmp_path, "--purifier", "router", name="a")
    b = run(world, teacher_folders, tmp_path, "--purifier", "router", name="b")
    c = run(world, teacher_folders, tmp_path, "--purifier", "router", "--seed", "1", name="c")
    weights = [(folder / "student" / "model.safetensors").read_bytes() for folder in (a, b, c)]
    assert weights[0] == weights[1] != weights[2]
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_a_student_may_be_a_checkpoint(world, teacher_folders, tmp_path):
    folder = run(world, teacher_folders, tmp_path, "--purifier", "answers", "--student", str(teacher_folders[0]), "--lr", "0")
    before, _ = model.load(teacher_folders[0])
    after, _ = model.load(folder / "student")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))


def test_visits_cover_every_question_once_an_epoch():
    visits = train.draw_visits(10, 4, 7, seed=0)
    assert [len(v) for v in visits] == [4] * 7
    order = [row for rows in visits for row in rows]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert train.draw_visits(10, 4, 9, seed=0)[:7] == visits != train.draw_visits(10, 4, 7, seed=1)


def test_the_learning_rate_warms_up_and_decays_to_zero():
    args = train.parse_args(["--steps", "100", "--warmup", "10", "--lr", "2"])
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)


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


def test_eval_of_nothing_ends_with_one_line(tmp_path):
    out = command("eval.py", str(tmp_path / "nowhere"))
    assert out.returncode == 2 and "no such folder" in out.stderr and "Traceback" not in out.stderr


def test_help_names_every_purifier_and_is_quick():
    out = command("-X", "importtime", "train.py", "--help")
    assert out.returncode == 0 and all(name in out.stdout for name in purify.PURIFIERS)
    assert " torch" not in out.stderr
