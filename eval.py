"""Measure students: the accuracy of one, a close look at what it learnt, and tables over many runs.

    python eval.py out/router-0               # the figures that the run printed
    python eval.py out/router-0 --show 5      # what teachers wrote, what was chosen, what it says
    python eval.py CHECKPOINT --data DIR      # any checkpoint folder, any data set
    python eval.py --compare "--purifier router" "--purifier none --alpha 1"    # your own ablation
    python eval.py --table                    # every purifier and control
    python eval.py --conflict                 # TinyLLM and the router with 1, 2, 3, 4 teachers
    python eval.py --ood                      # purifiers used on tasks that they never saw
    python eval.py --fit-curve                # the router fitted on fewer questions

A table starts train.py as a user would, once for each row and seed, and keeps what is done. It
writes out/NAME.md and out/NAME.json. Points are paired by seed, with the 95 % interval of their mean.
"""

import argparse
import sys


def parse_args(argv=None):
    """Return the arguments."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=as_written)
    add = parser.add_argument_group("one student").add_argument
    add("run", nargs="?", help="a run's folder (out/RUN) or a checkpoint folder")
    add("--show", type=int, metavar="N", help="look at N training questions closely")
    add("--per-token", action="store_true", help="compare choices by log-probability per token")
    add("--device", help="cpu or cuda (default: cuda if there is one)")

    add = parser.add_argument_group("many runs: which").add_argument
    add("--compare", nargs="+", metavar="ARGUMENTS", help="rows: train.py's arguments, in quotes")
    for name in ("table", "conflict", "ood", "fit-curve"):
        add(f"--{name}", dest="table", action="store_const", const=name, help="see above")
    add("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    add("--jobs", type=int, default=1, help="runs at a time; they share the cores (default: 1)")
    add("--out", default="out", help="where runs and tables go (default: out)")
    add("--curve", action="store_true", help="also the measures of valid over the steps")
    add("--plot", metavar="FILE", help="draw the table too (needs matplotlib)")

    add = parser.add_argument_group("many runs: train.py's arguments for all of them").add_argument
    add("--data", help="data set (for one student: default is the run's own)")
    add("--teachers", nargs="+")
    add("--student")
    add("--world", type=int)
    add("--steps", type=int)
    add("--quick", action="store_true", help="a rehearsal: one seed, 200 steps")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help answers at once

import importlib.util
import os
import random
import re
import shlex
import statistics
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kp
import model
import train
from data.micro import prepare
from data.questions import read_data
from model import BadInput, require
from purify import PURIFIERS

# -------------------------------------------------------------------------------------- one student


def open_student(args):
    """Return (settings of the run, None for a bare checkpoint; student; kp.TokenCache)."""
    folder = Path(args.run)
    settings = None
    why = f"{folder}: no such folder; give a run (out/RUN) or a checkpoint folder"
    require(folder.is_dir(), why)
    if (folder / "metrics.jsonl").exists():
        why = f"{folder}: this run is not finished; go on with train.py ... --resume"
        require((folder / "result.json").exists(), why)
        settings = argparse.Namespace(**model.read_json(folder / "config.json"))
        settings.device = args.device
        folder = folder / "student"
    return settings, *kp.open_student(folder, args.device)


def evaluate(args):
    """Return {measure: {task: share, ..., "mean"}} of a student on test and ood/test: train.measure,
    and TinyLLM's accuracy, the share of answers that it generates word by word.
    """
    settings, student, token_cache = open_student(args)
    if settings is None:  # a bare checkpoint: measured as a run with default arguments would be
        settings = train.parse_args([])
        settings.data = args.data
        train.settle(settings)
    folder = args.data or settings.data
    data = read_data(folder or prepare.prepare(settings.world, settings.well_read))
    settings.per_token |= args.per_token
    n_prefixes = 0
    if settings.teacher_prefixes:
        n_prefixes = len(model.read_json(Path(args.run) / "result.json")["teachers"])
    prefixes = kp.explain_prefixes(n_prefixes)
    shares = {}
    for split, label in (("test", ""), ("ood/test", "out of domain: ")):
        questions = data.get(split, [])
        if questions:
            found = train.measure(settings, student, token_cache, questions, prefixes)
            for name, share in found.items():
                shares[label + name.replace("_", " ")] = share
            shares[label + "exact match"] = kp.exact_match(student, token_cache, questions)
    return shares


def look(args):
    """Print for some training questions what each teacher wrote, what the student was given, and
    what it says now.
    """
    settings, student, token_cache = open_student(args)
    require(settings, f"{args.run}: --show needs a run's folder (out/RUN), not a bare checkpoint")
    require(args.data is None, "--show takes the questions of the run itself; leave --data out")
    data, teachers, *_ = train.open_parts(settings, train.Ranks(args.device))
    questions = {q.id: q for q in train.training_questions(settings, data)[0]}
    rows = [row for _, row in model.read_rows(Path(args.run) / "purified.jsonl")]
    for row in random.Random(settings.seed).sample(rows, min(args.show, len(rows))):
        q = questions[row["id"]]
        print("-" * 100)
        print_line(q.task, kp.ask(q), bold=True)
        print_line("right answer", q.right)
        for m, name in enumerate(teachers.names):
            chance = f" P={row['probabilities'][m]:.2f}" if row["probabilities"] else ""
            print_rationale(name + chance, teachers.rationales([q], [m])[0], q)
        for text in row["rationales"]:
            print_rationale("=> student learnt", text, q)
        (guess,) = kp.guesses(student, token_cache, [q], settings.per_token)
        print_line("student answers", q.choices[guess], guess == q.answer)
        (text,) = kp.explanations(student, token_cache, [q], settings.max_new_tokens)
        print_rationale("student explains", text, q)
    print("-" * 100)
    print("+ concludes on the right answer   - on another or none   => what the purifier gave")


def print_rationale(label, text, q):
    print_line(label, text, kp.is_right(text, q))


def print_line(label, text, right=None, bold=False):
    """Print a label and a text of any length; right marks it + or -, in colour on a terminal."""
    mark = {None: " ", True: "+", False: "-"}[right]
    code = {None: "1" if bold else "0", True: "32", False: "31"}[right]
    text = "".join(c if c.isprintable() else " " for c in text)  # a file must not steer a terminal
    label = f"{mark} {label[:22]:<22} "
    text = textwrap.fill(text, 100, initial_indent=label, subsequent_indent=" " * len(label))
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[{code}m{text}\033[0m" if in_colour else text)


# ---------------------------------------------------------------------------------------- many runs


def rows_of(args):
    """Return (a table's rows, {label: train.py's arguments}; the labels with which the other rows
    are compared).
    """
    if args.compare:
        return {text: text for text in args.compare}, args.compare[:1]
    purifiers = [name for name in PURIFIERS if name != "single"]
    teachers = args.teachers or list(prepare.TEACHERS)
    if args.data and not args.teachers:
        teachers = list(map(str, sorted(Path(args.data).glob("rationales/*.jsonl"))))
    rows = {}
    if args.table == "table":  # the paper's main table: every purifier and control
        for name in purifiers:
            rows[name] = f"--purifier {name}"
        singles = {f"single {m}": f"--purifier single --teacher {m}" for m in range(len(teachers))}
        return {**rows, **singles}, ["none", "random", "answers", *singles]
    if args.table == "ood":  # fitted in domain, used on tasks that they never saw
        for name in purifiers:
            rows[f"{name} ood"] = f"--purifier {name} --ood"
    if args.table == "fit-curve":  # what a router needs beforehand
        for n in (250, 1000):
            rows[f"router fit {n}"] = f"--purifier router --fit-questions {n}"
        rows["router"] = "--purifier router"
    if args.table == "conflict":  # the paper's first figure: more and more teachers
        for n in range(1, len(teachers) + 1):
            first = shlex.join(teachers[:n])
            rows[f"none {n}"] = f"--purifier none --teachers {first}"
            if n > 1:  # of one teacher there is nothing to choose
                rows[f"router {n}"] = f"--purifier router --teachers {first}"
    return rows, []


def folder_of(args, label, seed):
    """Return the folder of the run of this row and seed."""
    kind = "quick" if args.quick else "runs"
    return Path(args.out) / kind / f"{as_file_name(label)}-{seed}"


def run_all(args, rows):
    """Train what is missing. Return {label: [the result of each seed]}."""
    common = []
    for name in ("data", "student", "world", "steps"):
        if getattr(args, name) is not None:
            common += [f"--{name}", str(getattr(args, name))]
    if args.teachers:
        common += ["--teachers", *args.teachers]
    folders = {}
    commands = []
    for label, arguments in rows.items():
        folders[label] = [folder_of(args, label, seed) for seed in range(args.seeds)]
        for seed, folder in enumerate(folders[label]):
            command = [*common, *shlex.split(arguments), "--seed", str(seed), "--out", str(folder)]
            same = is_run_of(folder, command)
            if not (same and (folder / "result.json").exists()):
                commands.append([*command, "--resume" if same else "--overwrite"])
    if not args.data:
        for arguments in rows.values():  # once, not in every run
            how = train.parse_args([*common, *shlex.split(arguments)])
            prepare.prepare(how.world, how.well_read)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(start, commands, [args.jobs] * len(commands))
        list(tqdm(done, "runs", len(commands), unit="run"))
    results = {}
    for label, each in folders.items():
        results[label] = [model.read_json(folder / "result.json") for folder in each]
    return results


def is_run_of(folder, command):
    """Tell whether this folder holds a run with just these arguments."""
    asked = train.parse_args(command)
    train.settle(asked)
    config = folder / "config.json"
    before = model.read_json(config) if config.exists() else {}
    settings = {name: before.get(name, value) for name, value in vars(asked).items()}
    return bool(before) and settings == vars(asked)


def start(command, jobs):
    """Run train.py with its share of the cores. Raise BadInput with its last line where it
    fails.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    script = str(Path(__file__).with_name("train.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    python = [sys.executable, script, *command]
    done = subprocess.run(python, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise BadInput(f"train.py {shlex.join(command)} failed: {last}")


def deviation(values):
    """Return the standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values):
    """Return shares as "mean ± standard deviation", in %."""
    shares = [100 * value for value in values]
    text = f"{statistics.mean(shares):.1f}"
    return f"{text} ± {deviation(shares):.1f}" if len(shares) > 1 else text


def t95(n):
    """Return the 97.5 % quantile of Student's t for n values (n - 1 degrees of freedom)."""
    small = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # n = 2 to 10
    if n <= 10:
        return small[n - 2]
    z = 1.959964  # Cornish and Fisher's expansion: right to 0.003
    f = n - 1
    return z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)


MEASURES = {  # in result.json, and what a table calls them
    "accuracy": "accuracy",
    "ood": "out of domain",
    "explains_right": "explains rightly",
    "explains_true": "explains truly",
}


def difference(a, b, measure="accuracy"):
    """Return by how many points of a measure's mean runs a lie above runs b, seed by seed, with the
    mean's 95 % interval.
    """
    gaps = [100 * (x[measure]["mean"] - y[measure]["mean"]) for x, y in zip(a, b)]
    text = f"{statistics.mean(gaps):+.1f}"
    if len(gaps) == 1:
        return text
    return f"{text} ± {t95(len(gaps)) * deviation(gaps) / len(gaps) ** 0.5:.1f}"


def costs(run):
    """Return tokens in thousands (teachers wrote, all read, student trained on) and training seconds."""
    wrote = 0
    read = 0
    for kind, n in run["ledger"].items():
        wrote += n * kind.endswith("wrote")
        read += n * kind.endswith("read")
    return wrote / 1000, read / 1000, run["student_tokens"] / 1000, run["seconds"]["train"]


def publish(args, name, header, lines, content):
    """Print a Markdown table; write it to out/NAME.md, and all that it was made from to
    out/NAME.json.
    """
    text = ""
    for line in [header, ["---"] * len(header), *lines]:
        text += "| " + " | ".join(line) + " |\n"
    with model.atomic(Path(args.out) / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    model.write_json(Path(args.out) / f"{name}.json", content)
    print("\n" + text)


def measured(runs):
    """Return the measures that there are in these runs: {name in result.json: name in a table}."""
    return {name: label for name, label in MEASURES.items() if runs[0].get(name)}


def compare(args):
    """Run a table's rows and publish them: shares in %, tokens in thousands, seconds of training;
    then differences, and the curves.
    """
    name = "compare" if args.compare else args.table
    rows, against = rows_of(args)
    results = run_all(args, rows)
    first = next(iter(results.values()))
    measures = measured(first)
    header = ["", *first[0]["accuracy"], *list(measures.values())[1:], "given true"]
    header += ["teachers wrote k", "all read k", "student k", "train s"]
    lines = []
    for label, runs in results.items():
        cells = [label]
        for task in first[0]["accuracy"]:
            cells.append(spread([run["accuracy"][task] for run in runs]))
        for measure in list(measures)[1:]:
            cells.append(spread([run[measure]["mean"] for run in runs]))
        true = [run["purified_true"] for run in runs if run["purified_true"] is not None]
        cells.append(spread(true) if true else "")
        for column in zip(*map(costs, runs)):
            cells.append(f"{statistics.mean(column):,.0f}")
        lines.append(cells)
    publish(args, name, header, lines, results)
    for other in against:
        lines = []
        for label, runs in results.items():
            gaps = [difference(runs, results[other], measure) for measure in measures]
            lines.append([label, *(gaps if label != other else [""] * len(gaps))])
        header = [f"points above {other}", *measures.values()]
        publish(args, f"{name}-above-{as_file_name(other)}", header, lines, lines)
    if args.curve:
        curve(args, name, rows)
    if name == "conflict":
        lines = []
        for label in list(results)[-2:]:  # TinyLLM and the router, with all teachers
            for when, *cosines in conflict_meter(folder_of(args, label, 0)):
                lines.append([f"{label}: {when}", *cosines])
        header = ["rationales, student", "same question", "same answer"]
        publish(args, "conflict-meter", header, lines, lines)
    if args.plot:
        plot(args, results, by_teachers=name == "conflict")


def as_file_name(label):
    """Return a label as a file name can have it."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")


def curve(args, name, rows):
    """Publish how the measures of valid rise over the steps: the mean of all seeds, in %."""
    lines = []
    for label in rows:
        points = {}  # {step: [the measures of each seed]}
        for seed in range(args.seeds):
            for _, line in model.read_rows(folder_of(args, label, seed) / "metrics.jsonl"):
                if "valid" in line:
                    points.setdefault(line["step"], []).append(line["valid"])
        for step, seeds in points.items():
            cells = [label, str(step)]
            for measure in measured(seeds):
                share = statistics.mean(valid[measure]["mean"] for valid in seeds)
                cells.append(f"{100 * share:.1f}")
            lines.append(cells)
    header = ["", "after step", *measured(seeds).values()]
    publish(args, f"{name}-curve", header, lines, lines)


def conflict_meter(run, n_pairs=64):
    """Yield how far a run's rationales pull its student apart: the mean cosine of the gradients
    that two of them give L_DL.

    "same question": two teachers' rationales of one question, where more than one is given. "same
    answer": two questions with the same right answer, a rationale of each. 1: they teach the
    same; 0: unrelated; below 0: opposed. Measured on n_pairs pairs, with the student's first
    weights and with its last. A row: label and two cosines, as texts.
    """
    settings = argparse.Namespace(**model.read_json(run / "config.json"))
    rng = random.Random(0)
    data, _, student, token_cache, _ = train.open_parts(settings, train.Ranks(settings.device))
    given = {row["id"]: row["rationales"] for _, row in model.read_rows(run / "purified.jsonl")}
    by_answer = {}
    for q in train.training_questions(settings, data)[0]:
        if given.get(q.id):
            by_answer.setdefault((q.task, q.right), []).append(q)
    groups = [group for group in by_answer.values() if len(group) > 1]
    pairs = [rng.sample(rng.choice(groups), 2) for _ in range(n_pairs)]
    trained, _ = model.load(run / "student", settings.device)
    for label, lm in (("before training", student), ("after training", trained)):
        same_question = []
        same_answer = []
        for q, other in pairs:
            for text, another in combinations(given[q.id], 2):
                same_question.append(gradient_cosine(lm, token_cache, (q, text), (q, another)))
            first = rng.choice(given[q.id])
            second = rng.choice(given[other.id])
            same_answer.append(gradient_cosine(lm, token_cache, (q, first), (other, second)))
        own = f"{statistics.mean(same_question):.3f}" if same_question else ""
        yield label, own, f"{statistics.mean(same_answer):.3f}"


def gradient_cosine(student, token_cache, *examples):
    """Return the cosine of the gradients of L_DL of two examples (question, rationale)."""
    gradients = []
    for q, text in examples:
        student.zero_grad()
        ids = token_cache.pairs(student, [kp.explain_prompt(q)], [text])
        kp.sequence_losses(student, *ids).sum().backward()
        parts = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    return F.cosine_similarity(*gradients, dim=0).item()


def plot(args, results, by_teachers):
    """Draw accuracy against the number of teachers, or against tokens. Error bars are standard
    deviations.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, runs in results.items():
        shares = [100 * run["accuracy"]["mean"] for run in runs]
        y = statistics.mean(shares)
        if by_teachers:
            x = len(runs[0]["teachers"])
        else:
            x = statistics.mean(sum(costs(run)[:3]) for run in runs) / 1000
        axes.errorbar(x, y, deviation(shares), fmt="o", color="black", capsize=3)
        axes.annotate(label, (x, y), xytext=(6, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("teachers" if by_teachers else "tokens read, written and trained on (millions)")
    axes.set_ylabel("mean in-domain test accuracy (%)")
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)
    print(f"drawn in {args.plot}")


def main(args):
    for name in ("seeds", "jobs", "show"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} {value}: must be at least 1")
    has_matplotlib = importlib.util.find_spec("matplotlib")
    require(not args.plot or has_matplotlib, "--plot needs matplotlib; pip install matplotlib")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.quick:
        args.seeds = 1
        args.steps = 200
    if args.compare or args.table:
        compare(args)
    else:
        require(args.run, "nothing to do: give a run's folder, --compare or a table; see --help")
        if args.show:
            look(args)
        else:
            train.print_shares(evaluate(args))


if __name__ == "__main__":
    with model.one_line_errors():
        main(ARGS)
