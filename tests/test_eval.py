"""eval.py: tables over many runs, and a close look at one."""

import html
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import product
from xml.etree import ElementTree

import pytest

import eval as evaluation
import kp
import model
import train
from conftest import ROOT, write_lines

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


def test_rows_have_names_and_folders_of_their_own(tmp_path):
    args = evaluation.parse_args(["--compare", "--lam 1", "--lam 1"])
    with pytest.raises(model.BadInput, match="two rows are called '--lam 1'"):
        evaluation.rows_of(args)
    rows = ("--data a/b", "--data a-b", "--data " + 200 * "c" + "1", "--data " + 200 * "c" + "2")
    folders = {evaluation.folder_of(args, row, 0) for row in rows}
    args.steps = 7  # of all rows: another table, whose runs must not take the place of these
    folders |= {evaluation.folder_of(args, row, 0) for row in rows}
    assert len(folders) == 8 and all(len(folder.name) < 255 for folder in folders)


def test_nothing_is_not_the_true_rationale():
    q = kp.Question("1", "t", "Which?", ("yes", "no"), 0)
    assert evaluation.rate("", q) == "wrong answer"
    told = kp.Question("1", "t", "Which?", ("yes", "no"), 0, truth="So the answer is yes.")
    assert evaluation.rate(told.truth, told) == "true" and evaluation.rate("", told) == "wrong answer"


def test_a_number_at_a_label_s_end_need_not_count_teachers():
    runs = {label: [made_up_run(label, 0, 0.5, 3)] for label in ("lam 1", "lam 3", "lam 16")}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "draw", lambda panels, x_title: drawn.append(panels))
        evaluation.picture(runs, "teachers")
    assert all(set(lines) == {"lam 1", "lam", "lam 16"} for lines in drawn[0].values())


def test_compare_runs_what_is_missing_and_nothing_twice(world, teacher_folders, tmp_path, monkeypatch, capsys):
    texts = ["--purifier random --lam 2", "--purifier answers"]
    common = f" --eval-every 2 --shots 0 --batch-size 2 --max-new-tokens 8 --cache {tmp_path / 'cache'}"
    rows = [texts[0] + common, f"answers only: {texts[1]}{common}"]
    arguments = ["--compare", *rows, "--steps", "4", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path), "--curve"]
    arguments += ["--data", str(world), "--teachers", *map(str, teacher_folders[:2])]
    evaluation.main(evaluation.parse_args(arguments))
    told = capsys.readouterr().out
    assert f"points above {rows[0]}" in told and "explains truly" in told
    file = tmp_path / "compare.json"
    runs = json.loads(file.read_text())["runs"]
    assert [run["label"] for run in runs] == [rows[0], rows[0], "answers only", "answers only"]
    assert [(run["purifier"], run["seed"]) for run in runs] == list(product(("random", "answers"), (0, 1)))
    assert runs[0]["teachers"] == ["t5", "llama-2"]
    assert len(file.read_text().splitlines()) == 2 + len(runs)  # one run a line
    for run, text in zip(runs, [texts[0]] * 2 + [texts[1]] * 2):  # what the runs themselves wrote
        folder = evaluation.folder_of(evaluation.parse_args(arguments), text + common, run["seed"])
        result = json.loads((folder / "result.json").read_text())
        assert run["accuracy"] == pytest.approx(result["accuracy"], abs=6e-6)
        assert [point["step"] for point in run["curve"]] == [2, 4]
        means = {name: share["mean"] for name, share in result["valid"].items()}
        assert run["curve"][-1] == pytest.approx({"step": 4, **means}, abs=6e-6)

    # A stored table tells the same, and a second call trains nothing.
    evaluation.main(evaluation.parse_args(["--from", str(file), "--curve"]))
    assert capsys.readouterr().out == told == "\n" + (tmp_path / "compare.md").read_text() + "\n"
    started = []
    monkeypatch.setattr(evaluation, "start", lambda command, jobs: started.append(command))
    evaluation.main(evaluation.parse_args(arguments))
    evaluation.main(evaluation.parse_args([*arguments, "--out", f"{tmp_path}/."]))  # the same folder
    assert not started
    shutil.copy(file, tmp_path / "copy.json")
    with pytest.raises(model.BadInput, match="copy.json: a run of '--purifier random .* is in another file too"):
        evaluation.main(evaluation.parse_args(["--from", str(file), str(tmp_path / "copy.json")]))
    with pytest.raises(model.BadInput, match="leave --seed, --out, --resume and --overwrite"):
        evaluation.main(evaluation.parse_args([*arguments, "--compare", "--purifier random --seed 5"]))
    (folder / "result.json").unlink()
    with pytest.raises(model.BadInput, match="no such file"):  # nothing writes it here
        evaluation.main(evaluation.parse_args(arguments))
    (command,) = started
    assert command[-1] == "--resume" and "--seed 1" in " ".join(command)


def made_up_run(label, seed, accuracy, n_teachers=2):
    shares = {"nature": accuracy, "mean": accuracy}
    curve = [{"step": step, "accuracy": accuracy * step / 4, "explains_right": 0.5} for step in (2, 4)]
    return dict(
        label=label, purifier="router", seed=seed, steps=4, teachers=["a", "b", "c"][:n_teachers],
        accuracy=shares, ood={}, explains_right=shares, explains_true=None, purified_true=None,
        teacher_tokens=10, ledger={"score_read": 1000, "rationale_wrote": 10}, student_tokens=2000,
        seconds={"train": 1.5}, curve=curve,
    )  # fmt: skip


def made_up_table(file, runs, against=("router",)):
    evaluation.write_table(file, list(against), runs)
    return str(file)


def test_tables_of_two_files_are_pooled_and_paired_by_file_and_seed(tmp_path, capsys):
    model.say_once.cache_clear()
    files = []
    for name, (router, others) in {"a": ((0.3, 0.4), (0.4, 0.48)), "b": ((0.6, 0.8), (0.72, 0.9))}.items():
        runs = [made_up_run("router", seed, share) for seed, share in enumerate(router)]
        runs += [made_up_run("other", seed, share) for seed, share in enumerate(others)]
        runs += [made_up_run(f"only in {name}", seed, 0.5) for seed in (0, 1)]
        files.append(made_up_table(tmp_path / f"{name}.json", runs))
    evaluation.main(evaluation.parse_args(["--from", *files]))
    out, err = capsys.readouterr()
    # Gaps of 10, 8, 12 and 10 points: mean 10, standard deviation sqrt(8 / 3), t = 3.182 for four.
    assert "| other | +10.0 ± 2.6 | +10.0 ± 2.6 |" in out
    assert "| router | 52.5 ± 22.2 |" in out  # of 30, 40, 60, 80
    assert "only in" not in out and "'only in a' is left out" in err and "'only in b' is left out" in err


def texts_of(svg):
    """Return {text: [(x, y), ...]} of a picture."""
    places = {}
    for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        places.setdefault(text.text, []).append((float(text.get("x")), float(text.get("y"))))
    return places


@pytest.mark.parametrize("over, x_title", evaluation.OVER.items())
def test_a_picture_is_svg_with_its_labels_as_texts(over, x_title, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = []
    for label, n in (("<router> & co 2", 2), ("<router> & co 3", 3), ("TinyLLM 2", 2), ("TinyLLM 3", 3)):
        runs += [made_up_run(label, seed, 0.1 * n + 0.01 * seed, n) for seed in (0, 1)]
    file = made_up_table(tmp_path / "conflict.json", runs, against=())
    plot = tmp_path / "a.svg"
    evaluation.main(evaluation.parse_args(["--from", file, "--plot", str(plot), "--over", over]))
    places = texts_of(plot.read_text())
    labels = ["<router> & co", "TinyLLM"] if over == "teachers" else [f"{name} {n}" for name in ("<router> & co", "TinyLLM") for n in (2, 3)]
    for label in labels:
        assert len(places[label]) == (2 if over == "steps" else 1)
    assert f"{x_title} (mean of 2 runs, 95 % interval)" in places
    first = plot.read_bytes()
    evaluation.main(evaluation.parse_args(["--from", file, "--plot", str(plot), "--over", over]))
    assert plot.read_bytes() == first


def test_labels_stand_at_their_lines_and_apart():
    pytest.importorskip("matplotlib")
    lines = {f"line {n}": {0: [0, 0], 100: [10, 10]} for n in range(5)}  # one upon another
    places = texts_of(evaluation.draw({"title": {**lines, "low": {0: [0, 0], 100: [0, 0]}}}, "x"))
    heights = sorted(places[f"line {n}"][0][1] for n in range(5))
    assert all(below - above > 9 for above, below in zip(heights, heights[1:]))  # 9: the letters' height
    assert places["10"][0][1] == pytest.approx(heights[-1], abs=5) and places["0"][-1][1] == pytest.approx(places["low"][0][1], abs=5)


HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> so the answer is \x1b[2J"


class Balanced(HTMLParser):
    """Collect tags and attributes; notice an end tag that does not fit."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], Counter(), Counter()
        self.feed(text)
        self.close()
        assert self.open == ["html"]  # whose end tag may be left out

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attributes)
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_close_look_is_at_the_questions_that_the_student_learnt(world, tmp_path, capsys):
    """train and ood/train share ids here: the run is of the second. The teacher is hostile."""
    data = tmp_path / "data"
    shutil.copytree(world, data, ignore=shutil.ignore_patterns("teachers"))
    for name in ("train.jsonl", "ood/train.jsonl"):
        rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
        for number, row in enumerate(rows):
            row["id"] = str(number)
        write_lines(data / name, rows)
    ids = [*map(str, range(4 * 24)), *map("ood/train:{}".format, range(2 * 24))]
    said = [{"id": name, "rationale": HOSTILE, "score": 0.5} for name in ids]
    teacher = write_lines(tmp_path / "hostile.jsonl", said)
    run(data, [teacher], tmp_path / "run", "--purifier", "random", "--ood")
    capsys.readouterr()
    arguments = [str(tmp_path / "run"), "--show", "100", "--device", "cpu"]
    evaluation.main(evaluation.parse_args(arguments))
    shown = capsys.readouterr().out
    assert "\nphysical " in shown and "=> hostile P=1.00" in shown and "\x1b" not in shown
    for task in ("nature", "science", "riddles", "medicine"):
        assert f"\n{task} " not in shown
    with pytest.raises(model.BadInput, match="leave --data out"):
        evaluation.main(evaluation.parse_args([*arguments, "--data", str(world)]))

    evaluation.main(evaluation.parse_args([*arguments[:1], "--html", str(tmp_path / "a.html"), "--device", "cpu"]))
    text = (tmp_path / "a.html").read_text()
    page = Balanced(text)
    n = min(12, shown.count("=> hostile"))
    assert text.count(html.escape(HOSTILE)) == n > 0 and text.count("wrong answer, learnt") == n
    has_curve = importlib.util.find_spec("matplotlib") is not None
    assert page.tags["h2"] == n and page.tags["svg"] == has_curve
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not {"src", "href", "onerror"} & set(page.attributes)
    assert "url(" not in text.replace("url(#", "") and "@import" not in text


def test_the_conflict_meter_tells_agreement_from_conflict(world, teacher_folders, tmp_path, capsys, monkeypatch):
    """Two teachers with the same texts teach the same: cosine 1. With others they do not."""
    monkeypatch.setattr(evaluation, "N_PAIRS", 8)
    ids = [json.loads(line)["id"] for line in (world / "train.jsonl").read_text().splitlines()]
    tables = []
    for name, other in (("alike", "it is so"), ("apart", "whatever nurses its young is a mammal")):
        teachers = []
        for m, text in enumerate(("it is so", other)):
            rows = [{"id": q, "rationale": text, "score": 0.5} for q in ids]
            teachers.append(write_lines(tmp_path / name / f"{m}.jsonl", rows))
        run(world, teachers, tmp_path / f"run-{name}", "--purifier", "none", "--steps", "24")
        capsys.readouterr()
        evaluation.main(evaluation.parse_args([str(tmp_path / f"run-{name}"), "--meter", "--device", "cpu"]))
        lines = capsys.readouterr().out.strip().splitlines()
        tables.append([[float(cell) for cell in line.split("|")[2:4]] for line in lines[2:]])
    for alike, apart in zip(*tables, strict=True):  # before training, after it
        assert alike[0] == 1 and apart[0] < 0.9
        assert -1 <= apart[1] <= alike[1] <= 1

    run(world, teachers, tmp_path / "answers", "--purifier", "answers")
    with pytest.raises(model.BadInput, match="no two questions with one answer were given rationales"):
        evaluation.main(evaluation.parse_args([str(tmp_path / "answers"), "--meter", "--device", "cpu"]))


@pytest.mark.parametrize("arguments, says", [(["--jobs", "0"], "--jobs 0"), (["--seeds", "0"], "--seeds 0"), ([], "nothing to do"),
    (["--compare", "x: --purifier 'router"], "No closing quotation"), (["out", "--device", "abacus"], "--device abacus"),
])
def test_bad_arguments_end_in_one_line(arguments, says, capsys):
    with pytest.raises(model.BadInput, match=says):
        evaluation.main(evaluation.parse_args(arguments))


@pytest.mark.parametrize("spoil, says", [
    (lambda table: [], "not written by eval.py"),
    (lambda table: {**table, "runs": []}, "not written by eval.py"),
    (lambda table: {**table, "runs": [{"label": "router", "seed": 0}]}, "not written by eval.py"),
    (lambda table: {**table, "runs": [{**run, "accuracy": "high"} for run in table["runs"]]}, "not written by eval.py"),
    (lambda table: {"router": table["runs"]}, "KeyError"),
])  # fmt: skip
def test_a_bad_table_ends_in_one_line(spoil, says, tmp_path):
    file = tmp_path / "a.json"
    made_up_table(file, [made_up_run("router", seed, 0.5) for seed in (0, 1)])
    file.write_text(json.dumps(spoil(json.loads(file.read_text()))))
    with pytest.raises(model.BadInput, match=says) as error:
        evaluation.main(evaluation.parse_args(["--from", str(file)]))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_table_and_a_picture_of_another_kind_end_in_one_line(tmp_path):
    for arguments, says in ((["--from", str(tmp_path / "no.json")], "no such file"), (["--table", "--plot", "a.png"], "give FILE.svg")):
        with pytest.raises(model.BadInput, match=says):
            evaluation.main(evaluation.parse_args(arguments))


def test_a_reader_who_goes_away_ends_it_without_a_word():
    command = [sys.executable, "eval.py", "--from", "data/micro/results/world-1.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == ""
