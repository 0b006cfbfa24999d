"""What a run survives: kills at any moment, full disks, two runs at once, bad files.

It starts the commands as a user would.

    python -m pytest tests/test_faults.py                 # nine kills
    python tests/test_faults.py --long                    # the soak: 100 kills
    python tests/test_faults.py --ranks                   # 60 kills of one rank of two
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ONE_THREAD, ROOT, TWO_RANKS, dying_at_step, make_world, read_lines, torchrun
from safetensors.torch import load_file, save_file

import model
import train

SHORT = ["--steps", "12", "--batch-size", "2", "--eval-every", "2"]
SHORT += ["--max-new-tokens", "16", "--fit-questions", "16"]


def start(*arguments, launcher=(), **options):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=ONE_THREAD, **pipes, **options)


def given(world, folder, *arguments):
    teachers = sorted((world / "teachers").iterdir())
    where = ["--cache", folder / "cache", "--out", folder / "run"]
    return ["--data", world, "--teachers", *teachers, "--shots", 0, *SHORT, *where, *arguments]


def finish(*arguments, **options):
    """Return (exit code, what it wrote to stderr) of a run that goes on to its end."""
    process = start(*arguments, **options)
    _, error = process.communicate(timeout=300)
    return process.returncode, error


def outcome(folder):
    """Return what must not depend on kills: the student's weights, all losses, what it was given."""
    run = folder / "run"
    lines = read_lines(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(len(steps)))
    weights = (run / "student" / "model.safetensors").read_bytes()
    return weights, lines, (run / "purified.jsonl").read_text()


def ledger(folder):
    return json.loads((folder / "run" / "result.json").read_text())["ledger"]


def paid(folder):
    """Return how many times a teacher answered, and how many different answers these were."""
    answers = []
    for file in (folder / "cache").rglob("said.jsonl"):
        for line in file.read_text().split("\n"):
            if line.endswith("}"):
                answers.append((file, json.loads(line)["key"]))
    return len(answers), len(set(answers))


def ranks_of(process):
    """Return the process ids of the ranks that this torchrun has started, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill_until_done(world, folder, purifier, seed, kills, longest, launcher=(), more=()):
    """Start the run and kill -9 it at a random moment, `kills` times; then let it end. With a
    launcher one of its ranks is killed.
    """
    draw = random.Random(seed)
    arguments = given(world, folder, "--purifier", purifier, "--resume", *more)
    done = 0
    while done < kills:
        from_nothing = not (folder / "run").exists()
        began = time.time()
        process = start(*arguments, launcher=launcher)
        try:
            process.wait(draw.uniform(0.1, longest))
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(folder / "run")  # faster than the kill: once more, with teachers paid
            if from_nothing:
                longest = min(longest, time.time() - began)
        except subprocess.TimeoutExpired:
            pids = ranks_of(process) if launcher else [process.pid]
            if pids:  # else torchrun has not started them yet, or they have just ended
                os.kill(draw.choice(pids), signal.SIGKILL)
                done += 1
        process.communicate(timeout=600)
    code, error = finish(*arguments, launcher=launcher)
    assert code == 0, error


def kills_at_random_moments_change_nothing(world, folder, purifier, kills):
    began = time.time()
    code, error = finish(*given(world, folder / "whole", "--purifier", purifier))
    assert code == 0, error
    longest = time.time() - began
    seed = random.randrange(10**6)
    kill_until_done(world, folder / "killed", purifier, seed, kills, longest)
    assert outcome(folder / "killed") == outcome(folder / "whole"), f"seed {seed}"
    assert ledger(folder / "killed") == ledger(folder / "whole"), f"seed {seed}"
    assert paid(folder / "killed")[1] == paid(folder / "whole")[1], f"seed {seed}"


def a_signal_saves_and_says_how_to_go_on(world, folder, number, expected_code):
    arguments = given(world, folder, "--purifier", "rl-verified", "--steps", "400", "--eval-every", "200")
    process = start(*arguments)
    metrics = folder / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == expected_code
    assert "--resume" in error.strip().splitlines()[-1] and "Traceback" not in error
    assert read_lines(metrics)[-1]["step"] < 399
    assert (folder / "run" / "checkpoint.safetensors").exists()
    code, error = finish(*arguments)  # without --resume
    assert code == 2 and "--resume" in error and "--overwrite" in error


def a_full_disk_ends_in_one_line_and_can_be_gone_on_from(world, folder):
    code, error = finish(*given(world, folder / "whole", "--purifier", "random"))
    assert code == 0, error
    arguments = given(world, folder / "full", "--purifier", "random", "--resume")

    def files_of_at_most(limit):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    for limit in (2000, 500_000):  # full while a teacher writes, full at the first checkpoint
        code, error = finish(*arguments, preexec_fn=files_of_at_most(limit))
        line = error.replace("\r", "\n").strip().splitlines()[-1]
        assert code == 2 and line.startswith("error: ")
        assert "make room" in line and "Traceback" not in error
        assert not list((folder / "full").rglob("*.tmp"))
    code, error = finish(*arguments)
    assert code == 0, error
    assert outcome(folder / "full") == outcome(folder / "whole")


def two_runs_share_a_cache_but_not_a_folder(world, folder):
    long = ["--steps", 10**5, "--eval-every", 10**5]
    a = start(*given(world, folder, "--purifier", "none"))
    b = start(*given(world, folder, "--purifier", "none", "--out", folder / "run-b"))
    c = start(*given(world, folder, "--purifier", "random", *long, "--out", folder / "run-c"))
    for process in (a, b):
        assert process.communicate(timeout=300) and process.returncode == 0
    weights = "student/model.safetensors"
    assert (folder / "run" / weights).read_bytes() == (folder / "run-b" / weights).read_bytes()
    code, error = finish(*given(world, folder, "--out", folder / "run-c", "--overwrite"))
    assert code == 2 and "another run is writing there" in error and c.poll() is None
    c.kill()
    c.communicate()


SMALL_MICRO_WORLD = """
import pathlib
import sys

sys.path.insert(0, {root!r})
from data.micro import prepare

prepare.HERE = pathlib.Path({here!r})
prepare.SIZES = prepare.OOD_SIZES = dict(train=4, valid=4, test=4)
prepare.TEACHERS = {{name: (8, config) for name, (_, config) in prepare.TEACHERS.items()}}
prepare.FICTIONS = 1
prepare.STEPS_IN_EACH = 8
if __name__ == "__main__":
    {command}
"""


def small_micro_world(folder, command):
    """Write a script that runs a command in a micro world of its own, of few questions and steps."""
    here = folder / "data" / "micro"
    here.mkdir(parents=True)
    for file in ("facts.tsv", "prepare.py"):
        shutil.copy(ROOT / "data" / "micro" / file, here)
    script = folder / "script.py"
    script.write_text(SMALL_MICRO_WORLD.format(root=str(ROOT), here=str(here), command=command))
    return script


def a_killed_preparation_of_the_micro_world_goes_on(world, folder):
    """Killed twice, it ends as the one that was not killed."""
    made = []
    for name, kills in (("whole", 0), ("killed", 2)):
        script = small_micro_world(folder / name, "prepare.prepare(3)")
        for i in range(kills):
            quiet = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, **quiet)
            time.sleep(2.5 + 2 * i)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([sys.executable, str(script)], check=True, capture_output=True, timeout=300)
        (micro_world,) = (folder / name / "data" / "micro").glob("world-3-*")
        files = {}
        for path in micro_world.rglob("*"):
            if path.is_file() and "cache" not in path.parts:
                files[path.relative_to(micro_world)] = path.read_bytes()
        made.append(files)
    assert made[0] == made[1] and len(made[0]) == 1 + 6 + 5 * 4


def a_first_torchrun_makes_the_micro_world(world, folder):
    """Two processes, no micro world yet: one makes it, both train there. rl asks teachers meanwhile."""
    script = small_micro_world(folder, "import train; train.main(train.parse_args(sys.argv[1:]))")
    where = ["--cache", folder / "cache", "--out", folder / "run"]
    how = ["--world", "3", "--purifier", "rl-verified", *SHORT, "--steps", "5", "--eval-every", "100"]
    process = torchrun(script, *how, *where, timeout=300)
    assert process.returncode == 0, process.stderr
    (micro_world,) = (folder / "data" / "micro").glob("world-3-*")
    assert (micro_world / "report.json").exists()
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["steps"] == 5
    assert process.stdout.count("making the micro world") == process.stdout.count("test accuracy") == 1


def torchrun_starts_a_killed_rank_again(world, folder):
    """The ranks go on from the last checkpoint by themselves, without --resume."""
    how = ["--purifier", "rl-verified", "--steps", "10"]
    code, error = finish(*given(world, folder / "whole", *how), launcher=TWO_RANKS)
    assert code == 0, error
    again = [*TWO_RANKS, "--max-restarts", "3"]
    process = start(*given(world, folder / "killed", *how), launcher=again)
    while not (folder / "killed" / "run" / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "exitcode: -9" in error, error
    assert outcome(folder / "killed") == outcome(folder / "whole")
    assert ledger(folder / "killed") == ledger(folder / "whole")
    assert paid(folder / "killed") == paid(folder / "whole")


def a_killed_torchrun_takes_its_ranks_along(world, folder):
    how = ["--purifier", "answers", "--steps", 10**5, "--eval-every", 2]
    process = start(*given(world, folder, *how), launcher=TWO_RANKS)
    checkpoint = folder / "run" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    ranks = ranks_of(process)
    process.kill()
    try:
        _, error = process.communicate(timeout=60)  # until the ranks have let go of it
        line = error.strip().splitlines()[-1]
        assert line.startswith("stopped after step") and "--resume" in line
    finally:
        for pid in ranks:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


SLOW = [
    (kills_at_random_moments_change_nothing, "rl-verified", 5),
    (kills_at_random_moments_change_nothing, "router", 4),
    (a_killed_preparation_of_the_micro_world_goes_on,),
    (a_first_torchrun_makes_the_micro_world,),
    (torchrun_starts_a_killed_rank_again,),
    (a_killed_torchrun_takes_its_ranks_along,),
    (a_full_disk_ends_in_one_line_and_can_be_gone_on_from,),
    (two_runs_share_a_cache_but_not_a_folder,),
    (a_signal_saves_and_says_how_to_go_on, signal.SIGINT, 130),
    (a_signal_saves_and_says_how_to_go_on, signal.SIGTERM, 143),
]
NAMES = ["-".join([test.__name__, *map(str, rest)]) for test, *rest in SLOW]


@pytest.mark.parametrize("number", range(len(SLOW)), ids=NAMES)
def test_that(beside, number):
    beside[number].result()


# ------------------------------------------------------------------------------------------ bad files


# Each returns what spoils a folder.


def deleting(name):
    return lambda folder: (folder / name).unlink()


def writing(name, text):
    return lambda folder: (folder / name).write_text(text)


def setting(**change):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))

    return spoil


def with_tensor(name, value=None):
    """The value: by default the tensor that is there, all NaN."""

    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = torch.full_like(tensors[name], math.nan) if value is None else value
        save_file(tensors, folder / "model.safetensors")

    return spoil


def sharded(weight_map):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])


def header_claims_more(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + whole[8:])


def only_pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": torch.zeros(1)}, folder / "pytorch_model.bin")


T5 = [  # what is done to a copy of the T5 teacher -> what the line says
    (writing("config.json", "{"), "config.json: not readable as JSON"),
    (writing("config.json", "[]"), "holds no settings"),
    (setting(model_type="gpt2"), "gpt2"),
    (setting(d_model=10**9), "d_model must be"),
    (setting(num_heads=-1), "num_heads must be"),
    (setting(vocab_size=20), "vocab_size 20"),
    (setting(decoder_start_token_id=None), "decoder_start_token_id must be"),
    (writing("tokenizer.json", "no"), "tokenizer.json: not a tokenizer"),
    (deleting("tokenizer.json"), "tokenizer.json: no such file"),
    (cut_short, "not a whole safetensors"),
    (header_claims_more, "not a whole safetensors"),
    (with_tensor("shared.weight"), "shared.weight holds NaN"),
    (with_tensor("shared.weight", torch.zeros(3, 3)), "shared.weight is (3, 3)"),
    (with_tensor("extra", torch.zeros(1)), "extra has no place"),
    (only_pickled, "only pickled weights (pytorch_model.bin)"),
    (sharded({"shared.weight": "../../etc/passwd"}), "which is not in the folder"),
    (sharded({"shared.weight": "missing.safetensors"}), "which is not in the folder"),
    (sharded({}), "has no weight_map"),
]


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(arguments, capsys):
    """Return the line that the command ends with; in this process, for speed."""
    with pytest.raises(SystemExit) as end, model.one_line_errors():
        train.main(train.parse_args([*map(str, arguments)]))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("spoil, says", T5, ids=[says for _, says in T5])
def test_a_bad_student_is_refused_in_one_line(world, tmp_path, spoil, says, capsys):
    shutil.copytree(world / "teachers" / "t5", tmp_path / "bad")
    spoil(tmp_path / "bad")
    before = tree(tmp_path)
    bad = ["--purifier", "answers", "--student", tmp_path / "bad"]
    line = one_line(given(world, tmp_path, *bad), capsys)
    assert says in line and str(tmp_path / "bad") in line and tree(tmp_path) == before


def test_a_teacher_without_settings_is_refused_in_one_line(world, tmp_path, capsys):
    shutil.copytree(world / "teachers" / "t5", tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text("[]")
    before = tree(tmp_path)
    line = one_line([*given(world, tmp_path), "--teachers", tmp_path / "bad", tmp_path / "bad"], capsys)
    assert "bad/config.json: holds no settings" in line and tree(tmp_path) == before


DATA = [  # the last line of train.jsonl -> what the line says
    (b"{", "not a line of JSON"),
    (b'{"text": "\xff"}', "not a line of JSON"),
    (b"null", "no question"),
    (b'{"text": "Q?", "choices": ["a"], "answer": 0}', "choices must be"),
    (b'{"text": "Q?", "choices": ["a", "b"], "answer": "c"}', "'c' is not among the 2 choices"),
    (b'{"text": "Q?", "choices": ["a", "b"], "answer": 2}', "2 is not among the 2 choices"),
    (b'{"text": "Q?", "choices": ["a", "b"]}', "None is not among the 2 choices"),
]


@pytest.mark.parametrize("last, says", DATA)
def test_a_bad_question_is_refused_in_one_line(world, tmp_path, last, says, capsys):
    shutil.copytree(world, tmp_path / "data", ignore=shutil.ignore_patterns("teachers"))
    with open(tmp_path / "data" / "train.jsonl", "ab") as f:
        f.write(last + b"\n")
    before = tree(tmp_path)
    line = one_line([*given(world, tmp_path), "--data", tmp_path / "data"], capsys)
    assert says in line and "train.jsonl:97: " in line and tree(tmp_path) == before


def test_control_characters_of_a_question_do_not_reach_the_terminal(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "data", ignore=shutil.ignore_patterns("teachers"))
    row = {"text": "Q?", "choices": ["a", "b"], "answer": "\x1b[2J\x07"}
    with open(tmp_path / "data" / "train.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    assert one_line([*given(world, tmp_path), "--data", tmp_path / "data"], capsys).isprintable()


@pytest.mark.parametrize("purifier", ["answers", "rl-verified"])
def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, capsys, purifier):
    bad = ["--purifier", purifier, "--lr", "1e9", "--warmup", "1"]
    arguments = given(world, tmp_path, *bad, "--steps", "40", "--eval-every", "20")
    with pytest.raises(SystemExit), model.one_line_errors():
        train.main(train.parse_args([*map(str, arguments)]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "step" in line and purifier in line and "not finite" in line
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_model_s_folder_is_no_run_s(world, tmp_path, capsys, flag):
    shutil.copytree(world / "student", tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert "no run's, perhaps a model's" in one_line(given(world, tmp_path, flag), capsys)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_what_a_kill_left_is_cleared_and_a_lost_log_is_told(world, tmp_path, capsys):
    arguments = [*map(str, given(world, tmp_path, "--purifier", "answers"))]
    with dying_at_step(8):
        train.main(train.parse_args(arguments))
    run = tmp_path / "run"
    (run / ".checkpoint.safetensors.77.tmp").write_bytes(b"half")
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes()
    metrics.write_bytes(lines[:100])
    with pytest.raises(model.BadInput, match="metrics.jsonl: its end is lost") as lost:
        train.main(train.parse_args([*arguments, "--resume"]))
    traceback.clear_frames(lost.tb)  # they hold the lock of the run
    metrics.write_bytes(lines)
    train.main(train.parse_args([*arguments, "--resume", "--out", f"{run}/../run"]))  # the same folder
    assert (run / "result.json").exists() and not list(run.rglob(".*.tmp"))


def test_a_run_of_another_format_is_not_gone_on_with(world, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"format": 99, "purifier": "router"}')
    line = one_line(given(world, tmp_path, "--resume"), capsys)
    assert "begun with --format 99, not 3" in line


def test_another_number_of_processes_does_not_go_on(world, tmp_path, capsys):
    """Each step's batch would be another one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"format": 3, "nproc_per_node": 2, "purifier": "router"}')
    line = one_line(given(world, tmp_path, "--resume"), capsys)
    assert "begun with --nproc-per-node 2, not 1" in line


def soak(world, folder, purifier, number, launcher, more):
    began = time.time()
    code, error = finish(*given(world, folder / "whole", "--purifier", purifier, *more), launcher=launcher)
    assert code == 0, error
    longest = time.time() - began
    kill_until_done(world, folder / "killed", purifier, number, 20, longest, launcher, more)
    assert outcome(folder / "killed") == outcome(folder / "whole")
    assert ledger(folder / "killed") == ledger(folder / "whole")
    n_paid, n_different = paid(folder / "killed")
    print(f"{purifier}: 20 kills, same bits; ", end="")
    print(f"{n_paid} answers of teachers paid for, {n_different} different; ", end="")
    print(f"{time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--long"]:
        how = [(), ()]
        purifiers = ["router", "rl-verified", "none", "classifier", "aggregate"]
    elif sys.argv[1:2] == ["--ranks"]:
        how = [TWO_RANKS, ["--steps", "30"]]
        purifiers = ["router", "rl-verified", "none"]
    else:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        world = make_world(Path(name) / "world")
        for number, purifier in enumerate(sys.argv[2:] or purifiers):
            soak(world, Path(name) / purifier, purifier, number, *how)
