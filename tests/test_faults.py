"""What a run survives: kills at any moment, full disks, two runs at once, bad files. Starts the commands as a user would.

    python -m pytest tests/test_faults.py                 # a dozen kills
    python tests/test_faults.py --long                    # the soak: 100 kills
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_world
from safetensors.torch import load_file, save_file

import model
import train

SHORT = ["--steps", "12", "--batch-size", "2", "--eval-every", "2", "--max-new-tokens", "16", "--fit-questions", "16"]


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)  # fmt: skip


def given(world, folder, *arguments):
    teachers = sorted((world / "teachers").iterdir())
    return ["--data", world, "--teachers", *teachers, "--shots", 0, *SHORT, "--cache", folder / "cache", "--out", folder / "run",
            *arguments]  # fmt: skip


def finish(*arguments, **options):
    process = start(*arguments, **options)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def outcome(folder):
    """What must not depend on kills: the student's weights, every step's losses, what the student was given."""
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(len(steps)))
    return (run / "student" / "model.safetensors").read_bytes(), lines, (run / "purified.jsonl").read_text()


def paid(folder):
    """How many times a teacher answered, and how many different answers these were."""
    said = [(file, line) for file in (folder / "cache").rglob("said.jsonl") for line in file.read_text().split("\n")]
    keys = [(file, json.loads(line)["key"]) for file, line in said if line.endswith("}")]
    return len(keys), len(set(keys))


def kill_until_done(world, folder, purifier, seed, kills, longest):
    """kill -9 at random moments, then --resume, `kills` times; then let it end."""
    rng, done = random.Random(seed), 0
    while done < kills:
        process, wait = start(*given(world, folder, "--purifier", purifier, "--resume")), rng.uniform(0.1, longest)
        try:
            process.wait(wait)
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(folder / "run")  # it was faster than the kill: once more from the start, teachers are paid for
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        process.communicate()
    code, _, error = finish(*given(world, folder, "--purifier", purifier, "--resume"))
    assert code == 0, error


def kills_at_random_moments_change_nothing(world, folder, purifier, kills):
    began = time.time()
    code, _, error = finish(*given(world, folder / "whole", "--purifier", purifier))
    assert code == 0, error
    seed, longest = random.randrange(10**6), time.time() - began
    kill_until_done(world, folder / "killed", purifier, seed, kills, longest)
    assert outcome(folder / "killed") == outcome(folder / "whole"), f"seed {seed}"
    assert paid(folder / "killed")[1] == paid(folder / "whole")[1], f"seed {seed}"


def a_signal_saves_and_says_how_to_go_on(world, folder, number, code):
    arguments = given(world, folder, "--purifier", "rl", "--steps", "400", "--eval-every", "200")
    process = start(*arguments)
    while not (folder / "run" / "metrics.jsonl").exists() or not (folder / "run" / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in error.strip().splitlines()[-1] and "Traceback" not in error
    steps = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert steps < 399 and (folder / "run" / "checkpoint.safetensors").exists()
    code, _, error = finish(*arguments)  # without --resume
    assert code == 2 and "--resume" in error and "--overwrite" in error


def a_full_disk_ends_in_one_line_and_can_be_gone_on_from(world, folder):
    code, _, error = finish(*given(world, folder / "whole", "--purifier", "random"))
    assert code == 0, error
    full = lambda limit: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    for limit in (2000, 500_000):  # full while a teacher writes, full at the first checkpoint
        code, _, error = finish(*given(world, folder / "full", "--purifier", "random", "--resume"), preexec_fn=full(limit))
        line = error.replace("\r", "\n").strip().splitlines()[-1]
        assert code == 2 and line.startswith("error: ") and "make room" in line and "Traceback" not in error
        assert not list((folder / "full").rglob("*.tmp"))
    assert finish(*given(world, folder / "full", "--purifier", "random", "--resume"))[0] == 0
    assert outcome(folder / "full") == outcome(folder / "whole")


def two_runs_share_a_cache_but_not_a_folder(world, folder):
    a = start(*given(world, folder, "--purifier", "none"))
    b = start(*given(world, folder, "--purifier", "none", "--out", folder / "run-b"))
    c = start(*given(world, folder, "--purifier", "random", "--steps", 10**5, "--eval-every", 10**5, "--out", folder / "run-c"))
    for process in (a, b):
        assert process.communicate(timeout=120) and process.returncode == 0
    weights = [(folder / name / "student" / "model.safetensors").read_bytes() for name in ("run", "run-b")]
    assert weights[0] == weights[1]
    code, _, error = finish(*given(world, folder, "--out", folder / "run-c", "--overwrite"))
    assert code == 2 and "another run is writing there" in error and c.poll() is None
    c.kill()
    c.communicate()


def a_killed_preparation_of_the_micro_world_goes_on(world, folder):
    """The world with teachers of few steps, in a folder of its own: killed twice, it ends as the one that was not."""
    code = (
        "import sys, pathlib; sys.path.insert(0, {root!r})\n"
        "from data.micro import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare.HERE = pathlib.Path({here!r})\n"
        "    prepare.SIZES = dict(train=8, valid=4, test=4)\n"
        "    prepare.TEACHERS = {{n: (s, 8, c) for n, (s, _, c) in prepare.TEACHERS.items()}}\n"
        "    prepare.prepare(3)\n"
    )
    files = []
    for name, kills in (("whole", 0), ("killed", 2)):
        here = folder / name / "data" / "micro"
        here.mkdir(parents=True)
        for file in ("facts.tsv", "prepare.py"):
            shutil.copy(ROOT / "data" / "micro" / file, here)
        script = folder / f"{name}.py"
        script.write_text(code.format(root=str(ROOT), here=str(here)))
        for i in range(kills):
            quiet = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, **quiet)
            time.sleep(2.5 + 2 * i)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([sys.executable, str(script)], check=True, capture_output=True, timeout=100)
        (made,) = here.glob("world-3-*")
        files.append({p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file() and "cache" not in p.parts})
    assert files[0] == files[1] and len(files[0]) == 1 + 6 + 4 * 4


SLOW = [
    (kills_at_random_moments_change_nothing, "rl", 7), (kills_at_random_moments_change_nothing, "router", 6),
    (a_killed_preparation_of_the_micro_world_goes_on,), (a_full_disk_ends_in_one_line_and_can_be_gone_on_from,),
    (two_runs_share_a_cache_but_not_a_folder,), (a_signal_saves_and_says_how_to_go_on, signal.SIGINT, 130),
    (a_signal_saves_and_says_how_to_go_on, signal.SIGTERM, 143),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """All of SLOW, two at a time, for they mostly wait for a process to start."""
    with ThreadPoolExecutor(2) as pool:
        yield [pool.submit(test, world, tmp_path_factory.mktemp(test.__name__), *rest) for test, *rest in SLOW]


@pytest.mark.parametrize("number", range(len(SLOW)), ids=["-".join([test.__name__, *map(str, rest)]) for test, *rest in SLOW])
def test_that(results, number):
    results[number].result()


# ------------------------------------------------------------------------------------------ bad files


def spoil_json(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def spoil_weights(folder, value=None, name="shared.weight"):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], math.nan) if value is None else value
    save_file(tensors, folder / "model.safetensors")


def header_claims_more(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + whole[8:])


def only_pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def sharded(weight_map):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


T5 = [  # what is done to a copy of the T5 teacher -> what the line says
    (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "model_type"),
    (lambda f: spoil_json(f / "config.json", model_type="gpt2"), "gpt2"),
    (lambda f: spoil_json(f / "config.json", d_model=10**9), "d_model must be"),
    (lambda f: spoil_json(f / "config.json", num_heads=-1), "num_heads must be"),
    (lambda f: spoil_json(f / "config.json", vocab_size=20), "vocab_size 20"),
    (lambda f: (f / "tokenizer.json").write_text("no"), "tokenizer.json: not a tokenizer"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "not a whole safetensors"),
    (header_claims_more, "not a whole safetensors"),
    (spoil_weights, "shared.weight holds NaN"),
    (lambda f: spoil_weights(f, torch.zeros(3, 3)), "shared.weight is (3, 3)"),
    (lambda f: spoil_weights(f, torch.zeros(1), "extra"), "extra has no place"),
    (only_pickled, "only pickled weights (pytorch_model.bin)"),
    (sharded({"shared.weight": "../../etc/passwd"}), "which is not in the folder"),
    (sharded({"shared.weight": "missing.safetensors"}), "which is not in the folder"),
    (sharded({}), "has no weight_map"),
]  # fmt: skip


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(arguments, capsys):
    """The line that the command ends with; in this process, for speed."""
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
    line = one_line(given(world, tmp_path, "--purifier", "answers", "--student", tmp_path / "bad"), capsys)
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


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, capsys):
    bad = ["--purifier", "answers", "--lr", "1e30", "--steps", "40", "--warmup", "1", "--eval-every", "20"]
    arguments = given(world, tmp_path, *bad)
    with pytest.raises(SystemExit), model.one_line_errors():
        train.main(train.parse_args([*map(str, arguments)]))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step" in line and "answers" in line and "not finite" in line and not (tmp_path / "run" / "student").exists()


def test_a_run_of_another_format_is_refused(world, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"format": 99}')
    line = one_line(given(world, tmp_path, "--overwrite"), capsys)
    assert "format 99, this code writes 1" in line


if __name__ == "__main__":  # the soak
    assert sys.argv[1:2] == ["--long"], __doc__
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder, world = Path(name), make_world(Path(name) / "world")
        for number, purifier in enumerate(sys.argv[2:] or ("router", "rl", "none", "classifier", "aggregate")):
            began = time.time()
            assert finish(*given(world, folder / f"whole-{purifier}", "--purifier", purifier))[0] == 0
            kill_until_done(world, folder / f"killed-{purifier}", purifier, number, 20, longest=time.time() - began)
            assert outcome(folder / f"killed-{purifier}") == outcome(folder / f"whole-{purifier}")
            twice = paid(folder / f"killed-{purifier}")
            print(f"{purifier}: 20 kills, same bits; {twice[0]} answers of teachers paid for, {twice[1]} different;"
                  f" {time.time() - began:.0f} s", flush=True)  # fmt: skip
