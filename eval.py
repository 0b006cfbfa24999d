"""Measure students: the accuracy of one, a close look at what it learnt, and tables over many runs.

    python eval.py out/router-0               # the figures that the run printed
    python eval.py out/router-0 --show 5      # what teachers wrote, what was chosen, what it says
    python eval.py out/router-0 --html a.html # the same as a page, with the run's table and curve
    python eval.py out/none-0 --meter         # how much its rationales contradict each other
    python eval.py CHECKPOINT --data DIR      # any checkpoint folder, any data set
    python eval.py --compare "--purifier router" "TinyLLM: --purifier none"     # your own ablation
    python eval.py --table                    # every purifier and control
    python eval.py --conflict                 # the router and TinyLLM with 1, 2, 3, 4 teachers
    python eval.py --ood                      # purifiers used on tasks that they never saw
    python eval.py --fit-curve                # the router fitted on fewer questions
    python eval.py --from out/table.json --plot table.svg --over tokens      # printed again, and drawn

A table starts train.py as a user would, once for each row and seed, and keeps what is done. It
writes out/NAME.json, which holds all that it tells and draws, and out/NAME.md. --compare and --table
also compare rows seed by seed, with the 95 % interval of the mean difference.

The file reads top to bottom: one student, many runs, a table's file, its words, its
picture, a run's page.
"""

import argparse
import sys

OVER = {
    "steps": "training steps",
    "teachers": "number of teachers",
    "tokens": "million tokens read, written and trained on",
}


def parse_args(argv=None):
    """Return the arguments."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=as_written)
    parser.error = refuse
    add = parser.add_argument_group("one student").add_argument
    add("run", nargs="?", help="a run's folder (out/RUN) or a checkpoint folder")
    add("--show", type=int, metavar="N", help="look at N training questions closely")
    add("--html", metavar="FILE", help="write that look as a page (12 questions without --show)")
    add("--meter", action="store_true", help="how much its rationales contradict each other")
    add("--per-token", action="store_true", help="compare choices by log-probability per token")
    add("--device", help="cpu or cuda (default: cuda if there is one)")

    add = parser.add_argument_group("many runs: which").add_argument
    add("--compare", nargs="+", metavar="ROW", help='rows: "ARGUMENTS of train.py" or "LABEL: ARGUMENTS"')
    for name in ("table", "conflict", "ood", "fit-curve"):
        add(f"--{name}", dest="table", action="store_const", const=name, help="see above")
    add("--from", dest="stored", nargs="+", metavar="FILE", help="no runs: print these out/NAME.json, pooled")
    add("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    add("--jobs", type=int, default=1, help="runs at a time; they share the cores (default: 1)")
    add("--out", default="out", help="where runs and tables go (default: out)")
    add("--curve", action="store_true", help="also the measures of valid over the steps")
    add("--plot", metavar="FILE.svg", help="draw the table too (needs matplotlib)")
    add("--over", choices=list(OVER), default="steps", help="the picture's x axis (default: steps)")

    add = parser.add_argument_group("many runs: train.py's arguments for all of them").add_argument
    add("--data", help="data set (for one student: default is the run's own)")
    add("--teachers", nargs="+")
    add("--student")
    add("--world", type=int)
    add("--steps", type=int)
    return parser.parse_args(argv)


def refuse(message):
    print(f"error: {message.removeprefix('argument ')}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help answers at once

import hashlib
import html
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations, cycle
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kp
import model
import train
from data.micro import prepare, students
from data.questions import read_data
from model import BadInput, require
from purify import PURIFIERS

# -------------------------------------------------------------------------------------- one student


def open_run(args):
    """Return what belongs to one student: settings, the data's folder, (student, kp.TokenCache),
    the prefixes of its explanations.
    """
    folder = Path(args.run)
    why = f"{folder}: no such folder; give a run (out/RUN) or a checkpoint folder"
    require(folder.is_dir(), why)
    settings = train.parse_args([])
    n_prefixes = 0
    if (folder / "metrics.jsonl").exists():
        why = f"{folder}: this run is not finished; go on with train.py ... --resume"
        require((folder / "result.json").exists(), why)
        vars(settings).update(model.read_config(folder))
        if settings.teacher_prefixes:
            n_prefixes = len(model.read_json(folder / "result.json")["teachers"])
        folder = folder / "student"
    else:  # a bare checkpoint: measured as a run with default arguments would be
        settings.data = args.data
        settings.world = args.world or 0
        train.settle(settings)
    settings.device = args.device
    settings.per_token |= args.per_token
    student = kp.open_student(folder, args.device)
    data = args.data or settings.data or prepare.prepare(settings.world, settings.well_read)
    return settings, Path(data), student, kp.explain_prefixes(n_prefixes)


def evaluate(args):
    """Return {measure: {task: share, ..., "mean"}} of a student on test and ood/test: train.measure,
    and TinyLLM's accuracy, the share of answers that it generates word by word.
    """
    settings, folder, student, prefixes = open_run(args)
    data = read_data(folder)
    shares = {}
    for split, label in (("test", ""), ("ood/test", "out of domain: ")):
        questions = data.get(split, [])
        if questions:
            found = train.measure(settings, *student, questions, prefixes)
            for name, share in found.items():
                shares[label + name.replace("_", " ")] = share
            shares[label + "exact match"] = kp.exact_match(*student, questions)
    return shares


def read_purified(args):
    """Return what a run gave its student, the rows of its purified.jsonl."""
    file = Path(args.run) / "purified.jsonl"
    why = f"{args.run}: --show, --html and --meter need a finished run (out/RUN)"
    require(file.exists(), why)
    return [row for _, row in model.read_rows(file)]


def look(args):
    """Return a close look at N training questions of a run: [(Question, what was said of it)].

    What was said: tuples of who said it, the text, what it is worth (`rate`), and whether the
    student learnt it.
    """
    require(args.data is None, "--show takes the questions of the run itself; leave --data out")
    rows = read_purified(args)
    settings, folder, student, prefixes = open_run(args)
    data = read_data(folder)
    teachers = train.open_teachers(settings, folder, data, None, train.Ranks(args.device))
    by_id = {q.id: q for q in train.training_questions(settings, data)[0]}
    rows = random.Random(settings.seed).sample(rows, min(args.show, len(rows)))
    require(all(row["id"] in by_id for row in rows), f"{folder}: not the questions of this run")
    questions = [by_id[row["id"]] for row in rows]
    written = teachers.all_rationales(questions)
    guesses = kp.guesses(*student, questions, settings.per_token)
    seen = []
    for q, row, texts, guess in zip(questions, rows, written, guesses):
        said = []
        for m, (name, text) in enumerate(zip(teachers.names, texts)):
            if row["probabilities"]:
                name += f" P={row['probabilities'][m]:.2f}"
            said.append((name, text, rate(text, q), text in row["rationales"]))
        for text in row["rationales"]:
            if text not in texts:
                said.append(("purifier", text, rate(text, q), True))
        worth = "right answer" if guess == q.answer else "wrong answer"
        said.append(("student answers", q.choices[guess], worth, False))
        for prefix in prefixes:
            (text,) = kp.explanations(*student, [q], settings.max_new_tokens, prefix)
            who = prefix.replace("explain", "student explains")
            said.append((who, text, rate(text, q), False))
        seen.append((q, said))
    return seen


def rate(text, q):
    """Return what a rationale is worth, in words. Only the micro world knows which are true."""
    if q.truth and text == q.truth:
        return "true"
    if kp.is_right(text, q):
        return "right answer, untrue" if q.truth else "right answer"
    return "wrong answer"


def show(seen):
    """Print a close look."""
    for q, said in seen:
        print("-" * 100)
        print_line(q.task, kp.with_choices(q))
        print_line("right answer", q.right)
        for who, text, worth, learnt in said:
            print_line("=> " * learnt + who, f"{text} [{worth}]", worth)
    print("-" * 100)
    print("=> the student learnt it   [true] word for word the true rationale, where that is known")


def print_line(label, text, worth="right answer"):
    """Print a label and a text of any length, in colour on a terminal."""
    text = "".join(c if c.isprintable() else " " for c in text)  # a file must not steer a terminal
    label = f"{label[:24]:<24} "
    text = textwrap.fill(text, 100, initial_indent=label, subsequent_indent=" " * len(label))
    code = {"true": "32", "wrong answer": "31"}.get(worth, "0")
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[{code}m{text}\033[0m" if in_colour else text)


N_PAIRS = 64  # of questions, for the conflict meter


def conflict_meter(args):
    """Return how much a run's rationales contradict each other, as rows of a table: the mean cosine
    of the gradients that two of them give L_DL.

    "same question": two teachers' rationales of one question, where more than one is given. "same
    answer": two questions with the same right answer, a rationale of each. 1: they teach the
    same; 0: unrelated; below 0: opposed. Measured on N_PAIRS pairs, with the student's first
    weights and with its last.
    """
    settings, _, (trained, token_cache), prefixes = open_run(args)
    given = {}  # {id: [(prefix, rationale), ...]}, as the student reads and learns them
    for row in read_purified(args):
        pairs = zip(cycle(prefixes), row["rationales"])
        given[row["id"]] = [(prefix, text) for prefix, text in pairs if text]
    data, _, student, *_ = train.open_parts(settings, train.Ranks(args.device))
    rng = random.Random(0)
    by_answer = {}
    for q in train.training_questions(settings, data)[0]:
        if given.get(q.id):
            by_answer.setdefault((q.task, q.right), []).append(q)
    groups = [group for group in by_answer.values() if len(group) > 1]
    require(groups, f"{args.run}: no two questions with one answer were given rationales")
    pairs = [rng.sample(rng.choice(groups), 2) for _ in range(N_PAIRS)]
    table = []
    for when, lm in (("before training", student), ("after training", trained)):
        rng = random.Random(1)  # the same rationales both times
        same_question = []
        same_answer = []
        for q, other in pairs:
            gradients = [gradient(lm, token_cache, q, *said) for said in given[q.id]]
            for first, second in combinations(gradients, 2):
                same_question.append(cosine(first, second))
            another = gradient(lm, token_cache, other, *rng.choice(given[other.id]))
            same_answer.append(cosine(rng.choice(gradients), another))
        row = {"cosine of gradients": when}
        if same_question:
            row["same question"] = f"{fmean(same_question):.3f}"
        row["same answer"] = f"{fmean(same_answer):.3f}"
        table.append(row)
    return table


def gradient(student, token_cache, q, prefix, text):
    """Return the gradient of L_DL of a question's rationale, (P,)."""
    student.zero_grad()
    ids = token_cache.pairs(student, [kp.explain_prompt(q, prefix)], [text])
    kp.sequence_losses(student, *ids).sum().backward()
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


# ---------------------------------------------------------------------------------------- many runs

NAMES = {"none": "TinyLLM", "answers": "answers only"}  # of purifiers; the others are called as --purifier


def rows_of(args):
    """Return (a table's rows, {label: train.py's arguments}; the labels with which the other rows
    are compared).
    """
    rows = {}
    if args.compare:
        for text in args.compare:
            label, _, arguments = text.rpartition(": ")
            label = label or text
            require(label not in rows, f"--compare: two rows are called {label!r}")
            rows[label] = arguments
        return rows, list(rows)[:1]
    teachers = args.teachers or list(prepare.TEACHERS)
    if args.data and not args.teachers:
        teachers = list(map(str, sorted(Path(args.data).glob("rationales/*.jsonl"))))
    if args.table in ("table", "ood"):  # the paper's main table; on tasks that they never saw
        ood = " --ood" if args.table == "ood" else ""
        for name in PURIFIERS:
            if name != "single":
                rows[NAMES.get(name, name)] = f"--purifier {name}{ood}"
    if args.table == "table":
        for m in range(len(teachers)):
            rows[f"single {m}"] = f"--purifier single --teacher {m}"
        return rows, ["TinyLLM", "random", "answers only", *list(rows)[-len(teachers) :]]
    if args.table == "fit-curve":  # what a router needs beforehand
        for n in (250, 1000):
            rows[f"router fit {n}"] = f"--purifier router --fit-questions {n}"
        rows["router"] = "--purifier router"
    if args.table == "conflict":  # the paper's first figure: more and more teachers
        for name, least in (("router", 2), ("none", 1)):  # of one there is nothing to choose
            for n in range(least, len(teachers) + 1):
                first = shlex.join(teachers[:n])
                rows[f"{NAMES.get(name, name)} {n}"] = f"--purifier {name} --teachers {first}"
    return rows, []


def words_of(args, arguments):
    """Return train.py's arguments, a list: those of all rows and those of this one, a text."""
    words = []
    for name in ("data", "teachers", "student", "world", "steps"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", *map(str, model.as_list(value))]
    try:
        return words + shlex.split(arguments)
    except ValueError as error:
        raise BadInput(f"--compare {arguments}: {error}") from None


def folder_of(args, arguments, seed):
    """Return the folder of the run with these arguments and this seed, its own in all tables."""
    name = re.sub(r"[^\w.]+", "-", arguments).strip("-")[:190]  # file systems take 255
    text = shlex.join(words_of(args, arguments))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(args.out) / "runs" / f"{name}-{digest}-{seed}"


def train_all(args):
    """Train what is missing of a table. Write the table's file and return its path."""
    rows, against = rows_of(args)
    folders = []
    commands = {}
    needed = set()  # of the micro world: its worlds and students
    for label, arguments in rows.items():
        for seed in range(args.seeds):
            folder = folder_of(args, arguments, seed)
            folders.append((label, folder))
            command = ["--seed", str(seed), "--out", str(folder), *words_of(args, arguments)]
            asked = train.parse_args(command)
            own = (asked.seed, asked.out, asked.resume, asked.overwrite) == (seed, str(folder), False, False)
            require(own, f"--compare {arguments}: leave --seed, --out, --resume and --overwrite to eval.py")
            train.settle(asked)
            same = is_run_of(folder, asked)
            if not (same and (folder / "result.json").exists()):
                commands[folder] = [*command, "--resume" if same else "--overwrite"]
            if not asked.data:
                needed.add((asked.world, asked.well_read, asked.student))
    n_kept = len(folders) - len(commands)
    if n_kept:
        why = "where code or world have changed, give another --out"
        print(f"{n_kept} of {len(folders)} runs are there already; {why}", file=sys.stderr)
    for world, well_read, student in needed:  # once, not in every run
        folder = prepare.prepare(world, well_read)
        if student in students.STUDENTS:
            students.prepare_student(student, folder, world)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(start, commands.values(), [args.jobs] * len(commands))
        list(tqdm(done, "runs", len(commands), unit="run"))
    path = Path(args.out) / f"{args.table or 'compare'}.json"
    write_table(path, against, [run_of(*labelled) for labelled in folders])
    return path


def is_run_of(folder, asked):
    """Tell whether this folder holds a run with just these arguments."""
    config = folder / "config.json"
    before = model.read_json(config) if config.exists() else {}
    same = [name == "out" or before.get(name, value) == value for name, value in vars(asked).items()]
    return bool(before) and all(same)


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


# ----------------------------------------------------------------------------------- a table's file

KEPT = """purifier seed steps teachers accuracy ood explains_right explains_true purified_true
teacher_tokens ledger student_tokens seconds""".split()  # of a run's result.json


def run_of(label, folder):
    """Return what a table needs to know of a finished run, a dict. Its curve: the measures' means
    on valid, [{"step": steps done, measure: mean, ...}].
    """
    result = model.read_json(folder / "result.json")
    run = {"label": label}
    for name in KEPT:
        run[name] = result.get(name)
    run["curve"] = []
    for _, line in model.read_rows(folder / "metrics.jsonl"):
        if "valid" in line:
            point = {"step": min(line["step"] + 1, result["steps"])}
            for measure, share in line["valid"].items():
                point[measure] = share["mean"]
            run["curve"].append(point)
    return run


def write_table(path, against, runs):
    """Write a table's file: one run a line, numbers with 5 decimals."""
    lines = []
    for run in runs:
        exact = json.dumps(run)
        short = json.loads(exact, parse_float=lambda number: round(float(number), 5))
        lines.append(json.dumps(short, ensure_ascii=False))
    text = ",\n".join(lines)
    write_text(path, f'{{"against": {json.dumps(against)}, "runs": [\n{text}\n]}}\n')


def read_tables(paths):
    """Return what these files hold together: rows, {label: [run, ...]}; the labels to compare with
    (the first file's).

    Run i of any two rows has the same file and seed. A row that lacks some is left out, with a note.
    """
    rows = {}
    pairs = {}
    for path in paths:
        for run in model.read_json(path)["runs"]:
            known = rows.setdefault(run["label"], [])
            require(run not in known, f"{path}: a run of {run['label']!r} is in another file too")
            known.append(run)
            pairs.setdefault(run["label"], []).append((path, run["seed"]))
    complete = max(pairs.values(), key=len)
    require(len(set(complete)) == len(complete), f"{paths[0]}: a run is there twice")
    for label in pairs:
        if pairs[label] != complete:
            model.say_once(f"note: {label!r} is left out: other rows have other files or seeds")
            del rows[label]
    against = model.read_json(paths[0])["against"]
    return rows, [label for label in against if label in rows]


# ---------------------------------------------------------------------------------- a table's words

MEASURES = {  # in result.json, and what a table calls them
    "accuracy": "accuracy",
    "ood": "out of domain",
    "explains_right": "explains rightly",
    "explains_true": "explains truly",
}


def spread(values):
    """Return shares as "mean ± standard deviation", in %."""
    shares = [100 * value for value in values]
    text = f"{fmean(shares):.1f}" if shares else ""
    return f"{text} ± {stdev(shares):.1f}" if len(shares) > 1 else text


def t95(n):
    """Return the 97.5 % quantile of Student's t for n values (n - 1 degrees of freedom)."""
    small = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # n = 2 to 10
    if n <= 10:
        return small[n - 2]
    z = 1.959964  # Cornish and Fisher's expansion: right to 0.003
    f = n - 1
    return z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)


def interval(values):
    """Return half the width of the 95 % interval of the mean; 0 of one value."""
    n = len(values)
    return t95(n) * stdev(values) / n**0.5 if n > 1 else 0.0


def difference(a, b, measure="accuracy"):
    """Return the mean difference a - b of a measure over paired runs, in points, with its 95 %
    interval.
    """
    gaps = [100 * (x[measure]["mean"] - y[measure]["mean"]) for x, y in zip(a, b, strict=True)]
    text = f"{fmean(gaps):+.1f}"
    return f"{text} ± {interval(gaps):.1f}" if len(gaps) > 1 else text


def tokens(run):
    """Return the tokens of a run in thousands, {who did what: n}."""
    read = 0
    wrote = 0
    for kind, n in run["ledger"].items():
        read += n * kind.endswith("read")
        wrote += n * kind.endswith("wrote")
    student = run["student_tokens"]
    return {"teachers wrote k": wrote / 1000, "all read k": read / 1000, "student k": student / 1000}


def summary(label, runs):
    """Return a row of a table, {column: text}: shares in %, tokens in thousands, seconds."""
    row = {"": label}
    for task in runs[0]["accuracy"]:
        row[task] = spread([run["accuracy"][task] for run in runs])
    for measure in list(MEASURES)[1:]:
        if runs[0][measure]:
            row[MEASURES[measure]] = spread([run[measure]["mean"] for run in runs])
    row["given true"] = spread([run["purified_true"] for run in runs if run["purified_true"] is not None])
    for column in tokens(runs[0]):
        row[column] = f"{fmean(tokens(run)[column] for run in runs):,.0f}"
    row["train s"] = f"{fmean(run['seconds']['train'] for run in runs):,.0f}"
    return row


def differences(rows, other):
    """Yield the rows of the table of differences to another row."""
    for label, runs in rows.items():
        row = {f"points above {other}": label}
        for measure, title in MEASURES.items():
            if runs[0][measure]:
                row[title] = difference(runs, rows[other], measure)
        if label != other:
            yield row


def curve(runs, measure):
    """Return a measure of valid over the steps, {step: [% of each run]}."""
    points = {}
    for run in runs:
        for point in run["curve"]:
            if measure in point:
                points.setdefault(point["step"], []).append(100 * point[measure])
    return points


def curves(rows, measure):
    """Return the table of a measure's curves, a row a step."""
    table = {}
    for label, runs in rows.items():
        for step, shares in curve(runs, measure).items():
            row = table.setdefault(step, {f"valid, {MEASURES[measure]}, after step": str(step)})
            row[label] = f"{fmean(shares):.1f}"
    return [table[step] for step in sorted(table)]


def report(rows, against, with_curves):
    """Return a table's whole report, in Markdown."""
    tables = [[summary(label, runs) for label, runs in rows.items()]]
    tables += [list(differences(rows, other)) for other in against]
    if with_curves:
        tables += [curves(rows, measure) for measure in MEASURES]
    return "\n".join(markdown(table) for table in tables if table)


def markdown(table):
    """Return rows, {column: text} each, as a Markdown table. A column that a row lacks is empty."""
    columns = list(dict.fromkeys(chain.from_iterable(table)))
    lines = [columns, ["---"] * len(columns)]
    for row in table:
        lines.append([row.get(column, "") for column in columns])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# --------------------------------------------------------------------------------- a table's picture

GREY = "#7d8590"  # it can be read on white and on black


def picture(rows, over):
    """Return a table's picture, an SVG: accuracy and explanations over steps, teachers or tokens."""
    some = next(iter(rows.values()))
    panels = {}
    for measure in ("accuracy", "explains_true" if some[0]["explains_true"] else "explains_right"):
        lines = {}
        for label, runs in rows.items():
            shares = [100 * run[measure]["mean"] for run in runs if run[measure]]
            if over == "steps":
                lines[label] = curve(runs, measure)
            elif over == "teachers":  # "router 2", "router 3", ... are one line
                n_teachers = len(runs[0]["teachers"])
                line = lines.setdefault(label.removesuffix(f" {n_teachers}"), {})
                line[n_teachers] = shares
            elif shares:
                lines[label] = {fmean(sum(tokens(run).values()) for run in runs) / 1000: shares}
        split = "valid" if over == "steps" else "test"
        panels[f"{MEASURES[measure]}, {split} questions (%)"] = lines
    n = len(some)
    caption = f" (mean of {n} runs, 95 % interval)" if n > 1 else ""
    return draw(panels, OVER[over] + caption)


def draw(panels, x_title):
    """Return panels side by side, {title: {label: {x: [y of each run]}}}, as an SVG that can be read
    on white and on black. Labels stand at the ends of lines.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    pyplot.rcParams.update(dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY))
    pyplot.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), GREY))
    n = len(panels)
    figure, grid = pyplot.subplots(1, n, figsize=(5.2 * n, 3.2), squeeze=False, layout="constrained")
    figure.supxlabel(x_title, fontsize=9)
    for axes, (title, lines) in zip(grid[0], panels.items()):
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
        ends = []
        for label, line in lines.items():
            x = list(line)
            y = [fmean(shares) for shares in line.values()]
            half = [interval(shares) for shares in line.values()]
            drawn = axes.errorbar(x, y, half, marker="o", markersize=3, capsize=2)
            ends.append((y[-1], x[-1], label, drawn[0].get_color()))
        least = 0.065 * axes.viewLim.height  # between two labels
        height = math.inf
        for y, x, label, colour in sorted(ends, reverse=True):
            height = min(y, height - least)
            place = dict(xytext=(1.03, height), textcoords=axes.get_yaxis_transform())
            pointer = dict(arrowstyle="-", color=colour, alpha=0.4)
            axes.annotate(label, (x, y), **place, color=colour, va="center", arrowprops=pointer)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same picture, the same bytes
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    pyplot.close(figure)
    _, tag, rest = file.getvalue().partition("<svg")
    return tag + rest


# ------------------------------------------------------------------------------------ a run's page

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: #d1d9e0; --right: #1a7f37; --untrue: #9a6700; --wrong: #cf222e }
body { color: #1f2328; background: #fff; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 1100px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2.5rem 0 0 } p { margin: .25rem 0 0 }
svg { max-width: 100%; height: auto; margin-top: 1rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .6rem }
.cards { margin: .6rem 0 }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem }
.card small { display: block }
.learnt { outline: 2px solid #2f81f7 }
.true small, .right small { color: var(--right) }
.untrue small { color: var(--untrue) }
.wrong small { color: var(--wrong) }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --right: #3fb950; --untrue: #d29922; --wrong: #ff7b72 }
  body { color: #e6edf3; background: #0d1117 }
}
</style>
"""
LEGEND = """Framed in blue: the student learnt it. True: word for word the true rationale, where that is
known. P: the probability that the purifier gave to this teacher."""


def page(args):
    """Return a run as a page of HTML that needs nothing else: its figures, its curve (where
    matplotlib draws it), a close look.
    """
    seen = look(args)
    run = run_of("", Path(args.run))
    name = NAMES.get(run["purifier"], run["purifier"])
    title = html.escape(f"{name}, seed {run['seed']}, {run['steps']} steps")
    body = f"<title>{title}</title>\n<h1>{title}</h1>\n"
    body += "<p>Shares of test questions in %, tokens in thousands (k), seconds (s).</p>\n"
    row = summary("", [run])
    body += cards((column, row[column], "", False) for column in row if column)
    lines = {}
    for measure in run["curve"][-1]:
        if measure in MEASURES:
            lines[MEASURES[measure]] = curve([run], measure)
    if importlib.util.find_spec("matplotlib"):
        body += draw({"valid questions (%)": lines}, OVER["steps"])
    body += f"<p>{LEGEND}</p>\n"
    for q, said in seen:
        body += f"<h2>{html.escape(kp.with_choices(q))}</h2>\n"
        body += f"<p>{html.escape(q.task)}; right answer: {html.escape(q.right)}</p>\n"
        body += cards(said)
    return HEAD + body


def cards(boxes):
    """Return boxes side by side: who, text, what it is worth and whether it was learnt."""
    body = ""
    for who, text, worth, learnt in boxes:
        kinds = worth.replace(",", "") + " learnt" * learnt
        body += f'<div class="card {kinds}"><b>{html.escape(who)}</b>'
        body += f"<small>{worth}{', learnt' * learnt}</small><p>{html.escape(text)}</p></div>\n"
    return f'<div class="cards">\n{body}</div>\n'


# ---------------------------------------------------------------------------------------- the start


def tell(args):
    """Print a table, from fresh runs or from files; write what is asked for."""
    files = args.stored or [train_all(args)]
    try:
        rows, against = read_tables(files)
        text = report(rows, against, args.curve)
        drawn = picture(rows, args.over) if args.plot else ""
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = "not written by eval.py, or tables of different data sets"
        raise BadInput(f"{', '.join(map(str, files))}: {why} ({error!r})") from error
    print("\n" + text)
    if not args.stored:
        write_text(files[0].with_suffix(".md"), text)
    if args.plot:
        write_text(args.plot, drawn)
        print(f"drawn in {args.plot}")


def write_text(path, text):
    with model.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(args):
    for name in ("seeds", "jobs", "show"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} {value}: must be at least 1")
    if args.plot:
        why = f"--plot {args.plot}: pictures are SVG; give FILE.svg"
        require(args.plot.endswith(".svg"), why)
        found = importlib.util.find_spec("matplotlib")
        require(found, "--plot needs matplotlib; pip install matplotlib")
    args.device = train.pick_device(args.device)
    if args.stored or args.compare or args.table:
        tell(args)
    else:
        require(args.run, "nothing to do: give a run's folder, --compare or a table; see --help")
        if args.html:
            args.show = args.show or 12
            write_text(args.html, page(args))
            print(f"written to {args.html}")
        elif args.show:
            show(look(args))
        elif args.meter:
            print(markdown(conflict_meter(args)))
        else:
            train.print_shares(evaluate(args))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # in a pipe to `head` it ends without a word
    with model.one_line_errors():
        main(ARGS)
