"""eval.py: tables over many runs, and a close look at one."""

import json
import shutil

import pytest

import eval as evaluation
import model
import train

SMALL = ["--shots", "0", "--steps", "4", "--batch-size", "2", "--max-new-tokens", "8"]


def run(world, teacher_folders, folder, *arguments):
    where = ["--data", str(world), "--teachers", *map(str, teacher_folders), "--out", str(folder)]
    train.main(train.parse_args([*where, "--cache", str(folder.parent / "cache"), *SMALL, *arguments]))


@pytest.mark.parametrize("n, t", [(2, 12.706), (5, 2.776), (10, 2.262), (11, 2.228), (21, 2.086), (61, 2.000)])
def test_student_s_t(n, t):
    assert evaluation.t95(n) == pytest.approx(t, abs=0.004)


def with_mean(*means):
    return [{"accuracy": {"mean": mean}} for mean in means]


def test_differences_are_paired_by_seed():
    a = with_mean(0.50, 0.70, 0.90)
    b = with_mean(0.40, 0.61, 0.79)
    # Gaps of 10, 9 and 11 points: mean 10, standard deviation 1, t = 4.303 for three seeds.
    assert evaluation.difference(a, b) == "+10.0 ± 2.5"
    assert evaluation.difference(a[:1], b[:1]) == "+10.0"
    other = [{"accuracy": {"mean": 0.5}, "ood": {"mean": share}} for share in (0.2, 0.3)]
    assert evaluation.difference(other[1:], other[:1], "ood") == "+10.0"
    assert evaluation.spread([0.5, 0.7]) == "60.0 ± 14.1"


def test_compare_runs_what_is_missing_and_nothing_twice(world, teacher_folders, tmp_path, monkeypatch, capsys):
    texts = ["--purifier random --lam 2", "--purifier answers"]
    common = f" --eval-every 2 --shots 0 --batch-size 2 --max-new-tokens 8 --cache {tmp_path / 'cache'}"
    arguments = ["--compare", *(text + common for text in texts), "--steps", "4", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path), "--curve"]
    arguments += ["--data", str(world), "--teachers", *map(str, teacher_folders[:2])]
    evaluation.main(evaluation.parse_args(arguments))
    table = json.loads((tmp_path / "compare.json").read_text())
    rows = list(table.values())
    assert [len(runs) for runs in rows] == [2, 2]
    assert [run["purifier"] for runs in rows for run in runs] == ["random", "random", "answers", "answers"]
    assert [run["seed"] for run in rows[0]] == [0, 1] and rows[0][0]["teachers"] == ["t5", "llama-2"]
    out = capsys.readouterr().out
    assert "points above --purifier random" in out and "explains truly" in out
    curve = json.loads((tmp_path / "compare-curve.json").read_text())
    assert [(line[0], line[1]) for line in curve] == [(text + common, step) for text in texts for step in ("1", "4")]
    for label, runs in table.items():  # the last point is what the runs ended with
        means = [100 * sum(run["valid"][m]["mean"] for run in runs) / 2 for m in ("accuracy", "explains_right")]
        assert [f"{mean:.1f}" for mean in means] == next(line[2:4] for line in reversed(curve) if line[0] == label)

    started = []
    monkeypatch.setattr(evaluation, "start", lambda command, jobs: started.append(command))
    evaluation.main(evaluation.parse_args(arguments))
    assert not started
    folder = evaluation.folder_of(evaluation.parse_args(arguments), texts[1] + common, 1)
    (folder / "result.json").unlink()
    with pytest.raises(model.BadInput, match="no such file"):  # nothing writes it here
        evaluation.main(evaluation.parse_args(arguments))
    (command,) = started
    assert command[-1] == "--resume" and "--seed 1" in " ".join(command)


def test_show_takes_the_questions_that_the_student_learnt(world, teacher_folders, tmp_path, capsys):
    """train and ood/train share ids here: the run is of the second."""
    data = tmp_path / "data"
    shutil.copytree(world, data, ignore=shutil.ignore_patterns("teachers"))
    for name in ("train.jsonl", "ood/train.jsonl"):
        rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
        for number, row in enumerate(rows):
            row["id"] = str(number)
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(data, teacher_folders, tmp_path / "run", "--purifier", "random", "--ood")
    capsys.readouterr()
    arguments = [str(tmp_path / "run"), "--show", "100", "--device", "cpu"]
    evaluation.main(evaluation.parse_args(arguments))
    shown = capsys.readouterr().out
    assert "physical" in shown or "kinds" in shown
    for task in ("nature", "science", "riddles", "medicine"):
        assert f"\n  {task} " not in shown
    with pytest.raises(model.BadInput, match="leave --data out"):
        evaluation.main(evaluation.parse_args([*arguments, "--data", str(world)]))


@pytest.mark.parametrize("arguments, says", [(["--jobs", "0"], "--jobs 0"), (["--seeds", "0"], "--seeds 0"), ([], "nothing to do")])
def test_bad_arguments_end_in_one_line(arguments, says, capsys):
    with pytest.raises(model.BadInput, match=says):
        evaluation.main(evaluation.parse_args(arguments))


def test_a_plot_without_matplotlib_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    arguments = ["--compare", "--purifier random", "--plot", str(tmp_path / "a.png"), "--out", str(tmp_path)]
    with pytest.raises(model.BadInput, match="pip install matplotlib"):
        evaluation.main(evaluation.parse_args(arguments))
    assert not list(tmp_path.iterdir())


