"""Whole runs: every purifier, resumed runs, two processes, bad arguments."""

import json
import random
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, converted, dying_at_step, read_lines, torchrun, write_lines
from safetensors import safe_open
from safetensors.torch import save_file

import eval as evaluation
import kp
import model
import purify
import train
from data.micro.prepare import TEACHERS
from data.questions import read_data

SHORT = ["--steps", "6", "--batch-size", "4", "--eval-every", "3", "--max-new-tokens", "24"]


@pytest.fixture(autouse=True)
def short_tuning(monkeypatch):
    monkeypatch.setattr(purify.ClassifierRouting, "STEPS", 3)


def on(world, teacher_folders):
    """Return the arguments that name data and teachers."""
    return ["--data", str(world), "--teachers", *map(str, teacher_folders), "--shots", "0"]


def run(world, teacher_folders, tmp_path, *arguments, name="run"):
    """Train, and return the run's folder."""
    where = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / name)]
    train.main(train.parse_args([*on(world, teacher_folders), *SHORT, *where, *arguments]))
    return tmp_path / name


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def weights_of(folder):
    return (folder / "student" / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------- every purifier


@pytest.mark.parametrize("purifier", list(purify.PURIFIERS))
def test_every_purifier_trains_and_reports(world, teacher_folders, tmp_path, purifier, capsys):
    how = ["--purifier", purifier, "--fit-questions", "16", "--tune-aggregator", "3"]
    folder = run(world, teacher_folders, tmp_path, *how)
    result = result_of(folder)
    assert result["purifier"] == purifier
    assert result["teachers"] == ["t5", "llama-2", "mistral", "llama-3.1"]
    assert set(result["accuracy"]) == {"nature", "science", "riddles", "medicine", "mean"}
    assert set(result["ood"]) == {"physical", "kinds", "mean"}
    steps = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(6))
    if purifier == "answers":
        assert result["teacher_tokens"] == 0
        assert all(line["rationale"] == 0 for line in steps)
    else:
        a_question = {"none": 4 * 24, "rl": 4 * 24, "aggregate": 4 * (24 + 16)}.get(purifier, 24)
        assert 0 < result["teacher_tokens"] <= 24 * a_question
    assert (result["ledger"].get("aggregator_wrote", 0) > 0) == (purifier == "aggregate")
    mean = f"{result['accuracy']['mean']:.3f}"
    assert mean in capsys.readouterr().out

    # eval.py prints the same figures from what was saved
    train.print_shares(evaluation.evaluate(evaluation.parse_args([str(folder)])))
    assert mean in capsys.readouterr().out


@pytest.mark.parametrize("purifier", list(purify.PURIFIERS))
def test_every_purifier_trains_on_tinyllm_s_layout(teacher_folders, tmp_path, purifier, capsys):
    entries = [f"Because of {i}. Thus, the answer is llama rationale: Since {i}." for i in range(19)]
    folder = converted(tmp_path, n=20, entries=[*entries, "llama rationale: So."])
    where = ["--data", str(folder), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    scorer = ["--scorer", str(teacher_folders[0]), "--aggregator", str(teacher_folders[0])]
    train.main(train.parse_args([*where, *scorer, "--purifier", purifier, *SHORT]))
    result = result_of(tmp_path / "run")
    assert result["teachers"] == ["flan-t5-xl", "llama-2"]
    assert set(result["accuracy"]) == {"parity", "mean"}
    text = capsys.readouterr().out
    assert "take --student DIR" in text
    assert "1 empty rationale" in text or purifier not in ("none", "single")


@pytest.mark.parametrize("purifier", ["router", "task", "oracle", "aggregate"])
def test_a_student_that_knows_nothing_is_no_scorer(teacher_folders, tmp_path, purifier):
    folder = converted(tmp_path)
    where = ["--data", str(folder), "--out", str(tmp_path / "run"), "--encoder", str(teacher_folders[0])]
    arguments = train.parse_args([*where, "--purifier", purifier, "--tune-aggregator", "3", *SHORT])
    with pytest.raises(model.BadInput, match="a new student can neither score rationales nor merge them; give --scorer"):
        train.main(arguments)
    assert not (tmp_path / "run").exists()  # a finished run there would be lost for nothing


def test_two_runs_with_one_seed_are_equal_to_the_bit(world, teacher_folders, tmp_path):
    a = run(world, teacher_folders, tmp_path, "--purifier", "router", name="a")
    b = run(world, teacher_folders, tmp_path, "--purifier", "router", name="b")
    c = run(world, teacher_folders, tmp_path, "--purifier", "router", "--seed", "1", name="c")
    assert weights_of(a) == weights_of(b) != weights_of(c)
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_the_paper_s_recipe_runs_with_stand_in_weights(world, teacher_folders, tmp_path):
    """Chat-tuned teachers in half precision, a BERT to embed, two examples, the answer told."""
    teachers = []
    for i, folder in enumerate(teacher_folders):
        teachers.append(tmp_path / f"hf-{i}")
        shutil.copytree(folder, teachers[i])
        if i > 0:
            lm, tokenizer = model.load(folder, dtype=torch.bfloat16)
            model.save(lm, tokenizer, teachers[i])
            model.write_json(teachers[i] / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    _, tokenizer = model.load(teacher_folders[0])
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes["vocab_size"] = tokenizer.get_vocab_size()
    model.save(model.Bert(sizes), tokenizer, tmp_path / "bert")
    parts = ["--student", str(teacher_folders[0])]
    parts += ["--encoder", str(tmp_path / "bert")]
    parts += ["--aggregator", str(teachers[1])]
    for purifier in ("router", "classifier", "aggregate"):
        how = ["--purifier", purifier, "--shots", "2", "--lr", "1e-4", "--teacher-forcing"]
        folder = run(world, teachers, tmp_path, *how, *parts, name=purifier)
        assert result_of(folder)["teachers"] == [f"hf-{i}" for i in range(4)]


def test_a_student_writes_within_batch_tokens(world, teacher_folders, tmp_path, monkeypatch):
    generate = model.Model.generate
    held = []

    def watched(self, ids, mask, max_new_tokens):
        held.append((len(ids), ids.shape[1] + max_new_tokens))
        return generate(self, ids, mask, max_new_tokens)

    monkeypatch.setattr(model.Model, "generate", watched)
    run(world, teacher_folders, tmp_path, "--purifier", "answers", "--batch-tokens", "300")
    assert all(rows == 1 or rows * length <= 300 for rows, length in held)
    assert max(held)[0] > 1


@pytest.mark.parametrize("how", [
    ["--purifier", "answers", "--lr", "0"],
    ["--purifier", "answers", "--clip", "0", "--weight-decay", "0"],
    ["--purifier", "classifier", "--lr", "0"],  # without a T5 teacher it tunes a copy of the student
])  # fmt: skip
def test_a_student_may_be_a_checkpoint_and_learns_by_training_alone(world, teacher_folders, tmp_path, how):
    student = ["--student", str(teacher_folders[0]), "--explain", "1", "--fit-questions", "8"]
    folder = run(world, teacher_folders[1:], tmp_path, *student, *how)
    before, _ = model.load(teacher_folders[0])
    after, _ = model.load(folder / "student")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))


def test_dropout_falls_in_training_and_alike_in_a_resumed_run(world, teacher_folders, tmp_path):
    shutil.copytree(teacher_folders[0], tmp_path / "dropout")
    config = model.read_json(tmp_path / "dropout" / "config.json")
    model.write_json(tmp_path / "dropout" / "config.json", {**config, "dropout_rate": 0.2})

    def start(name, student, *more):
        how = ["--purifier", "answers", "--explain", "1", "--student", str(student), *more]
        return run(world, teacher_folders, tmp_path, *how, name=name)

    whole = start("whole", tmp_path / "dropout")
    with dying_at_step(5):
        start("killed", tmp_path / "dropout")
    torch.rand(7)
    assert weights_of(start("killed", tmp_path / "dropout", "--resume")) == weights_of(whole)
    assert weights_of(start("without", teacher_folders[0])) != weights_of(whole)


def test_a_new_student_is_drawn_by_the_seed():
    def weights(seed):
        args = SimpleNamespace(data="x", student="tiny", device="cpu", seed=seed)
        student, _ = train.load_student(args, None, of_lengths([3, 4]))
        return student.shared.weight

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


# --------------------------------------------------------------------- what arguments and splits are for


def settled(*arguments):
    args = train.parse_args([*map(str, arguments)])
    train.settle(args)
    return args


def test_defaults_of_the_micro_world_and_of_other_data():
    def defaults(*arguments):
        args = settled(*arguments)
        return args.lam, args.lr, args.shots, args.explain, args.max_new_tokens, args.tune_aggregator

    assert defaults() == (16.0, 6e-3, 0, 10**9, 64, 800)
    assert defaults("--student", "x", "--aggregator", "x") == (16.0, 3e-4, 0, 10**9, 64, 0)
    assert defaults("--data", "x") == (1.0, 1.5e-3, 2, 100, 256, 0)
    assert settled("--lam", "0", "--lr", "0").lam == 0


def test_teachers_are_asked_as_the_arguments_say():
    how = "--device cpu --dtype bfloat16 --shots 3 --max-new-tokens 9 --teacher-forcing --per-token"
    args = settled("--data", "x", *how.split(), "--batch-tokens", "99", "--seed", "5")
    assert train.asking(args) == kp.Asking("cpu", torch.bfloat16, 3, 9, True, True, 99, 5)


def test_ready_texts_are_cut_and_examples_are_training_questions(world, teacher_folders, tmp_path):
    folder, a = texts_for(world, tmp_path / "data", ["train"])
    where = ["--teachers", a, teacher_folders[1], "--cache", tmp_path]
    args = settled("--data", folder, *where, "--max-new-tokens", "3")
    data = read_data(folder)
    texts, checkpoint = train.open_teachers(args, folder, data, None, train.Ranks("cpu")).teachers
    assert set(texts.said.values()) == {"It is so,"}
    assert checkpoint.examples == data["train"]
    args.ood = True
    args.teachers = [teacher_folders[1]]
    (checkpoint,) = train.open_teachers(args, folder, data, None, train.Ranks("cpu")).teachers
    assert checkpoint.examples == data["train"] + data["ood/train"]  # an example is of the question's task


@pytest.mark.parametrize("how, valid", [([], "valid"), (["--ood"], "ood/valid")])
def test_valid_is_looked_at_while_training_and_test_at_the_end(
    world, teacher_folders, tmp_path, monkeypatch, how, valid
):
    split_of = {q.id: split for split, some in read_data(world).items() for q in some}
    looked = []

    def look(args, student, token_cache, questions):
        looked.append({split_of[q.id] for q in questions})
        return {"t": 0.5, "mean": 0.5}

    monkeypatch.setattr(train, "accuracy", look)
    run(world, teacher_folders, tmp_path, "--purifier", "answers", "--explain", "1", *how)
    assert looked == [{valid}, {valid}, {"test"}, {"ood/test"}]


def test_a_measure_explains_so_many_questions_and_takes_the_best_prefix(monkeypatch):
    truth = "So the answer is yes."
    questions = [kp.Question(str(i), "t", "Q?", ("yes", "no"), 0, truth) for i in range(5)]
    asked = []

    def explanations(student, token_cache, some, *limits):
        asked.append((len(some), *limits))
        return [truth if limits[1] == "explain 2" else "So the answer is no."] * len(some)

    monkeypatch.setattr(kp, "explanations", explanations)
    monkeypatch.setattr(kp, "accuracy", lambda *rest: rest[3:])  # per token or not, batch size
    how = "--explain 3 --max-new-tokens 9 --batch-tokens 99 --per-token --batch-size 2"
    args = train.parse_args(how.split())
    shares = train.measure(args, None, None, questions, kp.explain_prefixes(3))
    ones = {"t": 1.0, "mean": 1.0}
    assert shares == {"accuracy": (True, 8), "explains_right": ones, "explains_true": ones}
    assert asked == [(3, 9, f"explain {m}", 99) for m in (1, 2, 3)]


def test_purified_true_is_the_share_of_true_rationales_of_the_chosen_teacher(world, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("teachers"))
    rows = {"a": [], "b": []}
    for i, q in enumerate(read_data(folder)["train"]):
        right = f"So the answer is {q.right}."
        rows["a"].append(dict(id=q.id, rationale=right))
        rows["b"].append(dict(id=q.id, rationale=q.truth if i % 3 else right))
    teachers = [write_lines(folder / "rationales" / f"{name}.jsonl", rows[name]) for name in rows]
    how = ["--purifier", "single", "--teacher", "1", "--explain", "1", "--max-new-tokens", "64"]
    run(folder, teachers, tmp_path, *how)
    given = read_lines(tmp_path / "run" / "purified.jsonl")
    told = {row["id"]: row["rationale"] for row in rows["b"]}
    truths = {q.id: q.truth for q in read_data(folder)["train"]}
    assert all(line["rationales"] == [told[line["id"]]] for line in given)
    true = [line["rationales"] == [truths[line["id"]]] for line in given]
    assert result_of(tmp_path / "run")["purified_true"] == sum(true) / len(true) and 0 < sum(true) < len(true)


@pytest.mark.parametrize("arguments, recomputes", [([], False), (["--recompute"], True)])
def test_the_student_is_told_to_recompute(teacher_folders, arguments, recomputes):
    student, _ = model.load(teacher_folders[0])
    assert train.Ranks("cpu").wrap(student, train.parse_args(arguments)) is student
    assert student.recompute is recomputes


def test_the_readme_s_own_purifier_works(world, teacher_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(purify, "PURIFIERS", dict(purify.PURIFIERS))
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    exec(code, {})
    folder = run(world, teacher_folders, tmp_path, "--purifier", "nearest")
    assert result_of(folder)["purifier"] == "nearest"


# --------------------------------------------------------------------------------- visits, rates, clock


WORDS = SimpleNamespace(prompts=lambda texts: [text.split() for text in texts])


def of_lengths(lengths):
    """Return questions of so many words."""
    return [kp.Question(str(i), "t", "word " * n, (), 0) for i, n in enumerate(lengths)]


def test_visits_cover_every_question_as_often_in_batches_of_like_length():
    def visits(lengths, steps, seed=0):
        args = train.parse_args(["--batch-size", "4", "--steps", str(steps), "--seed", str(seed)])
        return train.draw_visits(of_lengths(lengths), WORDS, args)

    few = visits([5] * 10, 7)
    assert [len(batch) for batch in few] == [4] * 7
    times = Counter(row for batch in few for row in batch)
    assert set(times.values()) == {2, 3}  # 28 visits, 10 questions
    assert few == visits([5] * 10, 7) != visits([5] * 10, 7, seed=1)

    lengths = [random.Random(i).randint(20, 60) for i in range(320)]
    epoch = visits(lengths, 80)
    assert sorted(row for batch in epoch for row in batch) == list(range(320))
    padded = sum(4 * max(lengths[row] for row in batch) for batch in epoch)
    unsorted = sum(4 * max(lengths[i : i + 4]) for i in range(0, 320, 4))
    assert sum(lengths) / padded > 0.9 > sum(lengths) / unsorted


def test_epochs_differ_and_batches_do_not_grow_longer_and_longer():
    args = train.parse_args(["--batch-size", "4", "--steps", "4"])
    two_epochs = train.draw_visits(of_lengths([5] * 8), WORDS, args)
    assert len(set(map(tuple, two_epochs))) == 4
    shortest = [batch[0] for batch in train.draw_visits(of_lengths(range(16)), WORDS, args)]
    assert shortest != sorted(shortest)


def test_ranks_share_batches_that_are_as_many_times_as_large():
    args = train.parse_args(["--batch-size", "2", "--steps", "5"])
    twice = train.parse_args(["--batch-size", "4", "--steps", "5"])
    questions = of_lengths([5] * 10)
    shared = train.draw_visits(questions, WORDS, args, n_ranks=2)
    assert shared == train.draw_visits(questions, WORDS, twice)


def test_the_learning_rate_warms_up_and_decays_to_zero():
    args = train.parse_args(["--steps", "100", "--warmup", "10", "--lr", "2"])
    rates = [train.learning_rate(step, args) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)


@pytest.fixture
def as_micro_world(world, monkeypatch):
    """Take the tests' world for the micro world: a run without --data."""
    monkeypatch.setattr(train.prepare, "prepare", lambda seed, well_read: world)


def run_micro(tmp_path, *arguments):
    where = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    train.main(train.parse_args([*SHORT, *where, *arguments]))
    return tmp_path / "run"


def test_seconds_of_training_hold_no_teacher_s_work(as_micro_world, tmp_path, monkeypatch):
    """Time stands still but for the teachers: 1 second a batch of rationales, 100 a batch of scores."""
    clock = [0.0]
    slept = Counter()

    def taking(seconds, what, work):
        def slow(self, *arguments):
            clock[0] += seconds
            slept[what] += seconds
            return work(self, *arguments)

        return slow

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(kp.CheckpointTeacher, "write", taking(1, "write", kp.CheckpointTeacher.write))
    monkeypatch.setattr(kp.CheckpointTeacher, "score", taking(100, "score", kp.CheckpointTeacher.score))
    folder = run_micro(tmp_path, "--purifier", "rl-verified", "--steps", "12")
    result = result_of(folder)
    assert slept["write"] > 0 and "score" not in slept
    assert result["seconds"]["train"] == result["seconds"]["evaluate"] == 0
    assert result["seconds"]["purify"] == slept["write"]
    assert "score_read" not in result["ledger"]
    assert result["teachers"] == list(TEACHERS)


# ------------------------------------------------------------------------------------------ resumed runs


@pytest.mark.parametrize("purifier", ["router", "rl", "rl-verified"])
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(world, teacher_folders, tmp_path, purifier):
    def start(name, *arguments):
        return run(world, teacher_folders, tmp_path, "--purifier", purifier, *arguments, name=name)

    whole = start("whole")
    with dying_at_step(5):
        start("killed")
    with pytest.raises(model.BadInput, match="--resume"):
        start("killed")
    with pytest.raises(model.BadInput, match="--lam"):
        start("killed", "--resume", "--lam", "3")
    killed = start("killed", "--resume")
    for name in ("student/model.safetensors", "metrics.jsonl", "purified.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    a = result_of(killed)
    b = result_of(whole)
    assert a.pop("seconds").keys() == b.pop("seconds").keys()
    assert a == b  # the ledger, among others
    assert a["ledger"]["rationale_wrote"] > 0


def a_run(tmp_path, **settings):
    """Return a train.Run without its story."""
    usual = {"purifier": "answers", "resume": False, "overwrite": False}
    args = SimpleNamespace(out=str(tmp_path), **{**usual, **settings})
    return train.Run(args, train.Ranks("cpu"), train.Stopwatch())


def test_the_log_tells_tokens_losses_and_padding(tmp_path):
    log = a_run(tmp_path)
    loss = kp.DualLoss(torch.tensor(3.0), torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0]), 75, 100)
    log.log_loss(0, loss, lr=0.5)
    log.log_loss(1, loss._replace(rationale=torch.zeros(0)))
    log.flush()
    first, second = read_lines(log.metrics)
    assert first == dict(step=0, tokens=75, lr=0.5, loss=3.0, answer=1.5, rationale=5.0, padding=0.25)
    assert second["rationale"] == 0 and log.student_tokens == 150


def test_a_resumed_run_goes_on_with_its_clock_its_tokens_and_its_log(tmp_path):
    student = torch.nn.Linear(2, 2)
    purifier = purify.Purifier(SimpleNamespace(seed=0), [], [], [], None, None)
    parts = student, torch.optim.AdamW(student.parameters()), purifier
    stopped = a_run(tmp_path, resume=True)
    stopped.seconds["train"] = 5.0
    stopped.student_tokens = 9
    stopped.log(0, loss=1.0)
    stopped.save(1, *parts)
    stopped.log(1, loss=2.0)
    stopped.flush()  # and then it was killed
    stopped.lock_file.close()
    again = a_run(tmp_path, resume=True)
    assert again.restore(*parts) == 1
    assert again.seconds == {"train": 5.0} and again.student_tokens == 9
    assert read_lines(again.metrics) == [{"step": 0, "loss": 1.0}]


def test_a_run_that_begins_anew_keeps_nothing_of_the_one_before(tmp_path):
    for name in ("config.json", "checkpoint.safetensors", "metrics.jsonl", "router.safetensors"):
        (tmp_path / name).write_text('{"purifier": "answers"}')
    a_run(tmp_path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "config.json"]


def test_a_checkpoint_s_header_does_not_grow_with_the_visits(
    world, teacher_folders, tmp_path, monkeypatch
):
    headers = []
    save = train.Run.save

    def note_header(self, *arguments):
        save(self, *arguments)
        length = int.from_bytes(self.checkpoint.read_bytes()[:8], "little")
        with safe_open(self.checkpoint, "pt") as file:
            headers.append((length, file.metadata()))

    monkeypatch.setattr(train.Run, "save", note_header)
    how = ["--purifier", "rl-verified", "--steps", "16", "--batch-size", "8", "--eval-every", "4"]
    run(world, teacher_folders, tmp_path, *how)
    lengths = [length for length, _ in headers]
    assert len(lengths) == 3  # after 32, 64 and 96 visits
    assert max(lengths) - min(lengths) <= 64  # some digits
    for _, metadata in headers:
        assert set(metadata) == {"progress", "checksum"}
        progress = json.loads(metadata["progress"])
        assert set(progress) == {"step", "student_tokens", "log_bytes", "seconds"}
        assert len(metadata["progress"]) < 300


def test_a_finished_run_is_not_run_again(world, teacher_folders, tmp_path, monkeypatch, capsys):
    folder = run(world, teacher_folders, tmp_path, "--purifier", "random")
    assert not (folder / "checkpoint.safetensors").exists()
    table = capsys.readouterr().out
    monkeypatch.setattr(train.kp, "dual_loss", None)
    run(world, teacher_folders, tmp_path, "--purifier", "random", "--resume")
    assert capsys.readouterr().out == table


# -------------------------------------------------------------------------------------------- two ranks


def answers_in(cache):
    return sorted(file.read_text().count('"key"') for file in cache.rglob("said.jsonl"))


@pytest.mark.parametrize("purifier", ["none", "rl-verified"])
def test_two_ranks_train_as_one_with_twice_the_batch(world, teacher_folders, tmp_path, purifier):
    how = ["--purifier", purifier]
    if purifier == "none":
        how += ["--student", str(teacher_folders[1])]  # a Llama; the other one is a T5
    one = run(world, teacher_folders, tmp_path, *how, "--batch-size", "8", name="one")
    two = tmp_path / "two"
    where = ["--cache", tmp_path / "cache-two", "--out", two]
    arguments = [*on(world, teacher_folders), *SHORT, *how, *where]
    process = torchrun(ROOT / "train.py", *arguments)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("test accuracy") == 1
    a = read_lines(one / "metrics.jsonl")
    b = read_lines(two / "metrics.jsonl")
    assert len(a) == len(b) == 8
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in {"loss", "answer", "rationale", "norm", "tokens", "reward", "right"} & x.keys():
            assert y[key] == pytest.approx(x[key], rel=1e-3, abs=1e-4), key
    assert result_of(one)["ledger"] == result_of(two)["ledger"]
    assert result_of(one)["student_tokens"] == result_of(two)["student_tokens"]
    assert answers_in(tmp_path / "cache") == answers_in(tmp_path / "cache-two")  # nothing was written twice


GATHER = """
import sys

sys.path.insert(0, {root!r})
import torch

import kp
import train

ranks = train.Ranks("cpu")
for counts in ((2, 0, 3, 1, 1, 0), (1, 0, 1, 0), (0, 0), (4, 4, 4, 4)):
    rows = list(range(len(counts)))
    own = ranks.share(rows)
    answer = torch.tensor([100.0 + row for row in own])
    rationale = torch.tensor([10.0 * row + m for row in own for m in range(counts[row])])
    loss = kp.DualLoss(torch.tensor(2.0 * ranks.rank), answer, rationale, 5 + ranks.rank, 7)
    whole = ranks.gather(loss)
    assert whole.answer.tolist() == [100.0 + row for row in rows], whole
    assert whole.rationale.tolist() == [10.0 * row + m for row in rows for m in range(counts[row])], whole
    assert (whole.total.item(), whole.tokens, whole.padded) == (1.0, 11, 14), whole
assert any(ranks.collect(ranks.rank == 1)) and not any(ranks.collect(False))
print("gathered in order", flush=True)
train.main(train.parse_args(sys.argv[1:]))
"""


def test_two_ranks_gather_in_order_and_print_a_finished_run_once(world, teacher_folders, tmp_path):
    run(world, teacher_folders, tmp_path, "--purifier", "random")
    (tmp_path / "gather.py").write_text(GATHER.format(root=str(ROOT)))
    where = ["--cache", tmp_path / "cache", "--out", tmp_path / "run", "--resume"]
    arguments = [*on(world, teacher_folders), *SHORT, "--purifier", "random", *where]
    process = torchrun(tmp_path / "gather.py", *arguments, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("gathered in order") == 2
    assert process.stdout.count("test accuracy") == process.stdout.count("saved in") == 1


def test_a_failing_rank_ends_the_run_with_one_line(world, teacher_folders, tmp_path):
    how = [*SHORT, "--out", tmp_path / "run", "--purifier", "magic"]
    process = torchrun(ROOT / "train.py", *on(world, teacher_folders), *how, timeout=300)
    assert process.returncode != 0
    assert "error: --purifier magic: unknown" in process.stderr
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- teachers that are texts


def texts_for(world, folder, splits, scores=None):
    """Copy the world's questions and write rationales of `splits` into a.jsonl, perhaps with scores.

    Return the folder and that file.
    """
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("teachers"))
    data = read_data(folder)
    rows = []
    for split in splits:
        for i, q in enumerate(data[split]):
            row = {"id": q.id, "rationale": f"It is so, so the answer is {q.choices[i % 2]}."}
            if scores:
                row["score"] = scores[i % len(scores)]
            rows.append(row)
    return folder, write_lines(folder / "rationales" / "a.jsonl", rows)


def test_ready_rationales_and_ood_need_each_other_s_questions(world, teacher_folders, tmp_path):
    folder, a = texts_for(world, tmp_path / "data", ["train"])
    how = ["--ood", "--purifier", "router", "--fit-questions", "16", "--scorer", str(teacher_folders[0])]
    says = "a.jsonl: no rationale for question .* of ood/train"
    with pytest.raises(model.BadInput, match=says) as error:
        run(folder, [teacher_folders[1], a], tmp_path, *how)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

    folder, a = texts_for(world, tmp_path / "both", ["train", "ood/train"])
    run(folder, [teacher_folders[1], a], tmp_path, *how)
    result = result_of(tmp_path / "run")
    assert result["teachers"] == ["llama-2", "a"]
    assert result["ledger"]["score_read"] > 0


def test_texts_and_a_checkpoint_teach_together(world, teacher_folders, tmp_path):
    """Two texts with scores of their own and a checkpoint; nothing is left for a judge."""
    folder, a = texts_for(world, tmp_path / "data", ["train"], scores=[0.9, 0.1, 0.5])
    rows = read_lines(a)
    others = [{**row, "score": 1 - row["score"]} for row in rows]
    b = write_lines(folder / "rationales" / "b.jsonl", others)
    run(folder, [a, teacher_folders[2], b], tmp_path, "--purifier", "router")
    result = result_of(tmp_path / "run")
    assert result["teachers"] == ["a", "mistral", "b"]
    mistral = kp.CheckpointTeacher(teacher_folders[2], tmp_path / "cache")
    mistral.scores(read_data(folder)["train"])
    assert result["ledger"]["score_read"] == mistral.ledger["score_read"]
    purified = read_lines(tmp_path / "run" / "purified.jsonl")
    assert all(len(line["probabilities"]) == 3 for line in purified)
    texts = {row["id"]: row["rationale"] for row in rows}
    chosen = [line["probabilities"].index(max(line["probabilities"])) for line in purified]
    for line, m in zip(purified, chosen):
        if m != 1:
            assert line["rationales"] == [texts[line["id"]]]
    assert set(chosen) - {1}


def test_texts_without_scores_are_judged_by_the_scorer(world, teacher_folders, tmp_path):
    folder, a = texts_for(world, tmp_path / "data", ["train"])
    how = ["--purifier", "oracle", "--scorer", str(teacher_folders[1])]
    run(folder, [a, teacher_folders[2]], tmp_path, *how)
    ledger = result_of(tmp_path / "run")["ledger"]

    # The same once more, on what the run visited.
    purified = {line["id"]: line for line in read_lines(tmp_path / "run" / "purified.jsonl")}
    questions = read_data(folder)["train"]
    visited = [row for row, q in enumerate(questions) if q.id in purified]
    questions = [questions[row] for row in visited]
    texts = [f"It is so, so the answer is {q.choices[row % 2]}." for row, q in zip(visited, questions)]
    read = Counter()
    scorer = kp.CheckpointTeacher(teacher_folders[1], tmp_path / "other-cache")
    judged = kp.Judge(lambda: scorer).scores(questions, texts, read)
    mistral = kp.CheckpointTeacher(teacher_folders[2], tmp_path / "cache")
    theirs = mistral.scores(questions)
    assert read["score_read"] > 0
    assert ledger["score_read"] == read["score_read"] + mistral.ledger["score_read"]
    for q, text_s, mistral_s in zip(questions, judged, theirs):
        expected = [1.0, 0.0] if text_s >= mistral_s else [0.0, 1.0]
        assert purified[q.id]["probabilities"] == expected

    # Another run finds every score in the cache: the scorer is not even loaded.
    again = kp.CheckpointTeacher(teacher_folders[1], tmp_path / "cache")
    assert kp.Judge(lambda: again).scores(questions, texts, Counter()) == judged
    assert again.loaded is None


# ------------------------------------------------------------------------------------------- bad input


def command(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def bad_arguments(world, teacher_folders, tmp_path, arguments):
    where = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    return [*on(world, teacher_folders), *where, *SHORT, *arguments]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--purifier", "magic"], ["magic", "router"]),
        (["--steps", "0"], ["error: --steps: 0: must be at least 1"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--shots", "-1"], ["--shots", "-1", "must be at least 0"]),
        (["--lam", "nan"], ["--lam", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--seed", "x"], ["--seed", "x"]),
        (["--seed", "20261126183000"], ["--seed", "below 2^31"]),
        (["--magic"], ["unrecognized arguments: --magic"]),
    ],
)
def test_bad_arguments_end_with_one_line(world, teacher_folders, tmp_path, arguments, says):
    out = command("train.py", *bad_arguments(world, teacher_folders, tmp_path, arguments))
    assert out.returncode == 2 and "Traceback" not in out.stderr
    (line,) = out.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in says)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--data", "nowhere"], ["nowhere", "no such folder"]),
        (["--data", ""], ["--data", "names no folder"]),
        (["--teachers", "nowhere"], ["nowhere", "no such folder"]),
        (["--teacher", "7", "--purifier", "single"], ["7", "there are 4 teachers"]),
        (["--student", "nowhere"], ["nowhere", "no such folder"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--purifier", "none", "--router", "nowhere"], ["--router", "none is no router"]),
        (["--purifier", "rl", "--teacher-forcing"], ["--teacher-forcing", "rl"]),
        (["--purifier", "router", "--teacher-prefixes"], ["--teacher-prefixes", "--purifier none"]),
        (["--purifier", "aggregate", "--tune-aggregator", "3", "--fit-questions", "1"], ["two questions to fit on"]),
        (["--scorer", "nowhere"], ["nowhere", "no such folder"]),
    ],
)
def test_what_cannot_work_ends_with_one_line(world, teacher_folders, tmp_path, arguments, says, capsys):
    with pytest.raises(SystemExit) as end, model.one_line_errors():
        train.main(train.parse_args(bad_arguments(world, teacher_folders, tmp_path, arguments)))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    assert all(word in line for word in says)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def of_another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


@pytest.mark.parametrize(
    "spoil, says",
    [
        (without("config.json"), "config.json"),
        (without("tokenizer.json"), "tokenizer.json"),
        (without("model.safetensors"), "model.safetensors"),
        (of_another_kind, "gpt2"),
        (cut, "model.safetensors: not readable"),
    ],
)
def test_a_spoilt_teacher_is_named_before_anything_is_written(
    world, teacher_folders, tmp_path, spoil, says
):
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


def test_a_router_needs_two_teachers_and_an_aggregator_that_writes(world, teacher_folders, tmp_path):
    with pytest.raises(model.BadInput, match="needs two teachers"):
        run(world, teacher_folders[:1], tmp_path, "--purifier", "plackett-luce", name="a")
    bert = ["--aggregator", str(ROOT / "tests" / "fixtures" / "bert")]
    with pytest.raises(model.BadInput, match="model_type 'bert' cannot teach"):
        run(world, teacher_folders[:2], tmp_path, "--purifier", "aggregate", *bert, name="b")


def test_a_bert_cannot_be_a_student(world, teacher_folders, tmp_path):
    _, tokenizer = model.load(teacher_folders[0])
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes["vocab_size"] = tokenizer.get_vocab_size()
    model.save(model.Bert(sizes), tokenizer, tmp_path / "bert")
    with pytest.raises(model.BadInput, match="a bert cannot be a student; take one of t5, llama"):
        run(world, teacher_folders, tmp_path, "--student", str(tmp_path / "bert"))
    assert not (tmp_path / "run").exists()


def test_a_decoder_only_student_needs_an_encoder_beside_it(world, teacher_folders, tmp_path):
    """A T5 teacher is one; without it the line says what to give. It can score and aggregate itself."""

    def purifier(teachers, *how):
        arguments = [*on(world, teachers), "--student", str(teacher_folders[1]), *how]
        args = train.parse_args([*arguments, "--cache", str(tmp_path / "cache")])
        train.settle(args)
        data, teachers, student, _, open_lm = train.open_parts(args, train.Ranks("cpu"))
        assert student.config["model_type"] == "llama"
        return purify.PURIFIERS["router"](args, data["train"], [], data["train"], teachers, open_lm)

    questions = read_data(world)["train"]
    assert len(purifier(teacher_folders).embed(questions)) == len(questions)
    with pytest.raises(model.BadInput, match="no sentence encoder; give --encoder DIR") as error:
        purifier(teacher_folders[1:]).embed(questions)
    assert "\n" not in str(error.value)
    given = purifier(teacher_folders[1:], "--encoder", str(teacher_folders[0]))
    assert len(given.embed(questions)) == len(questions)
    assert given.open_lm(None)[0].config["model_type"] == "llama"


@pytest.mark.parametrize("purifier", ["router", "rl", "none"])  # none: it is not needed, but given
def test_a_missing_encoder_is_told_before_the_run_begins(world, teacher_folders, tmp_path, purifier):
    how = ["--purifier", purifier, "--encoder", str(teacher_folders[1])]  # a Llama
    with pytest.raises(model.BadInput, match="no sentence encoder; give --encoder DIR"):
        run(world, teacher_folders, tmp_path, *how)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("purifier", ["router", "classifier", "rl"])
def test_the_encoder_leaves_memory_before_the_student_trains(world, teacher_folders, tmp_path, purifier, monkeypatch):
    opened = []
    there = []
    pool = model.pool
    dual_loss = kp.dual_loss

    def note_encoder(encoder, *rest):
        opened.append(weakref.ref(encoder))
        return pool(encoder, *rest)

    def look(*arguments):
        there.extend(encoder() is not None for encoder in opened)
        return dual_loss(*arguments)

    monkeypatch.setattr(model, "pool", note_encoder)
    monkeypatch.setattr(kp, "dual_loss", look)
    run(world, teacher_folders, tmp_path, "--purifier", purifier, "--steps", "1")
    assert there and not any(there)


def test_eval_of_nothing_ends_with_one_line(tmp_path):
    out = command("eval.py", str(tmp_path / "nowhere"))
    assert out.returncode == 2 and "no such folder" in out.stderr and "Traceback" not in out.stderr


def test_help_names_every_purifier_and_is_quick():
    out = command("-X", "importtime", "train.py", "--help")
    assert out.returncode == 0
    assert all(name in out.stdout for name in purify.PURIFIERS)
    assert " torch" not in out.stderr


def test_accumulated_passes_make_the_step_of_one_large_batch(world, teacher_folders, tmp_path):
    """Two passes of 2 questions give the losses of one of 4, up to rounding."""
    curves = {}
    for name, how in (("one", ["--batch-size", "4"]), ("two", ["--batch-size", "2", "--accumulate", "2"])):
        folder = run(world, teacher_folders, tmp_path, "--purifier", "rl-verified", *how, name=name)
        lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        keys = ("loss", "answer", "rationale", "reward", "norm")
        curves[name] = [[line[key] for key in keys] for line in lines]
    for one, two in zip(*curves.values(), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("purifier", ["router", "plackett-luce", "classifier"])
def test_a_fitted_router_routes_another_data_set(world, teacher_folders, tmp_path, purifier, monkeypatch):
    """No score is asked for there, and the choices are those of the run that fitted it."""
    encoder = teacher_folders[0]
    if purifier == "classifier":  # which tunes it in float32, and takes it over so
        lm, tokenizer = model.load(encoder, dtype=torch.bfloat16)
        encoder = tmp_path / "encoder"
        model.save(lm, tokenizer, encoder)
    how = ["--purifier", purifier, "--encoder", str(encoder)]
    first = run(world, teacher_folders, tmp_path, *how, name="first")
    other = tmp_path / "other"
    shutil.copytree(world, other, ignore=shutil.ignore_patterns("teachers", "ood"))
    lines = read_lines(other / "train.jsonl")
    write_lines(other / "train.jsonl", lines[::2])  # other questions, of which the first run saw some
    monkeypatch.setattr(kp.CheckpointTeacher, "scores", lambda *rest: pytest.fail("asked for scores"))
    again = run(other, teacher_folders, tmp_path, *how, "--router", str(first), "--seed", "7", name="again")
    chosen = {}
    for folder in (first, again):
        chosen[folder] = {row["id"]: row["probabilities"] for row in read_lines(folder / "purified.jsonl")}
    assert len(chosen[again]) == 24
    both = chosen[again].keys() & chosen[first].keys()
    assert both
    for name in both:
        assert chosen[again][name] == pytest.approx(chosen[first][name], abs=1e-4)
    assert result_of(again)["ledger"].get("score_read", 0) == 0


def everything_in(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_router_that_does_not_fit_is_refused(world, teacher_folders, tmp_path):
    first = run(world, teacher_folders, tmp_path, "--purifier", "router", name="first")
    file = first / "router.safetensors"
    where = ["--router", str(first)]
    with pytest.raises(model.BadInput, match="fitted with purifier router, not plackett-luce"):
        run(world, teacher_folders, tmp_path, "--purifier", "plackett-luce", *where, name="a")
    with pytest.raises(model.BadInput, match="fitted with teachers"):
        run(world, teacher_folders[:2], tmp_path, "--purifier", "router", *where, name="b")
    with pytest.raises(model.BadInput, match="fitted with another encoder; give that one as --encoder"):
        encoder = ["--encoder", str(world / "student")]
        run(world, teacher_folders, tmp_path, "--purifier", "router", *where, *encoder, name="c")
    finished = everything_in(first)
    with pytest.raises(model.BadInput, match="is the folder of this run"):
        run(world, teacher_folders, tmp_path, "--purifier", "router", *where, name="first")
    with pytest.raises(model.BadInput, match="nowhere"):
        run(world, teacher_folders, tmp_path, "--purifier", "router", "--router", "nowhere", name="first")
    with pytest.raises(model.BadInput, match="nowhere: no such folder"):
        run(world, teacher_folders, tmp_path, "--purifier", "aggregate", "--aggregator", "nowhere", name="first")
    assert everything_in(first) == finished
    tuned = run(world, teacher_folders, tmp_path, "--purifier", "classifier", name="tuned")
    with pytest.raises(model.BadInput, match="fitted with another encoder; give that one as --encoder"):
        where = ["--router", str(tuned), "--encoder", str(ROOT / "tests" / "fixtures" / "bert")]
        run(world, teacher_folders, tmp_path, "--purifier", "classifier", *where, name="e")
    where = ["--router", str(first)]
    tensors, about = model.read_tensors(file)
    del tensors["probe"]
    save_file(tensors, file, about)
    with pytest.raises(model.BadInput, match="router.safetensors: holds no router"):
        run(world, teacher_folders, tmp_path, "--purifier", "router", *where, name="f")
    file.write_bytes(b"torn")
    with pytest.raises(model.BadInput, match="router.safetensors: not readable as safetensors"):
        run(world, teacher_folders, tmp_path, "--purifier", "router", *where, name="d")


@pytest.mark.parametrize("purifier", ["router", "none", "rl-verified"])
def test_teachers_that_are_texts_and_a_checkpoint_together(world, teacher_folders, tmp_path, purifier, monkeypatch):
    """Three files with their own scores and one checkpoint: none of the files needs a scoring LM."""
    data = tmp_path / "data"
    shutil.copytree(world, data, ignore=shutil.ignore_patterns("teachers", "ood"))
    paths = []
    for m, name in enumerate(("gpt", "claude", "gemini")):
        rows = []
        for i, q in enumerate(read_lines(data / "train.jsonl")):
            text = f"{name} thinks. So the answer is {q['choices'][q['answer']]}."
            rows.append(dict(id=q["id"], rationale=text, score=0.9 if i % 3 == m else 0.1))
        paths.append(write_lines(tmp_path / f"{name}.jsonl", rows))
    paths.insert(1, teacher_folders[1])
    monkeypatch.setattr(kp.Judge, "logps", lambda *rest: pytest.fail("the scorer was asked"))
    folder = run(data, paths, tmp_path, "--purifier", purifier)
    result = result_of(folder)
    assert result["teachers"] == ["gpt", "llama-2", "claude", "gemini"]
    given = [row["rationales"] for row in read_lines(folder / "purified.jsonl")]
    assert {len(texts) for texts in given} == {4 if purifier == "none" else 1}
    assert any("thinks. So the answer is" in text for texts in given for text in texts)
