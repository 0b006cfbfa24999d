"""Measure students: the accuracy of one, a close look at what it learnt, and the paper's tables over many runs.

    python eval.py out/router-0                      # the figures that the run printed
    python eval.py out/router-0 --show 5             # what teachers wrote, what was chosen, what the student says
    python eval.py CHECKPOINT --data DIR             # any T5 checkpoint folder, any data set
    python eval.py --table [--quick]                 # every purifier and control, three seeds: the main table
    python eval.py --conflict                        # TinyLLM and the router with 1, 2, 3, 4 teachers; the conflict meter
    python eval.py --ood                             # purifiers fitted in domain, used on tasks they never saw
    python eval.py --fit-curve                       # the router fitted on 250, 1,000 and all questions

Measurements start train.py as a user would, keep what is done, and write their tables to out/NAME.md and .json.
"""

import argparse
import sys


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", help="a run's folder (out/RUN) or a checkpoint folder")
    add("--data", metavar="DIR", help="data set (default: the run's own)")
    add("--show", type=int, metavar="N", help="look at N training questions closely")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    add = parser.add_argument_group("measurements over many runs").add_argument
    for name in ("table", "conflict", "ood", "fit-curve"):
        add(f"--{name}", action="store_true", help="see above")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each, with seeds 0 to N - 1")
    add("--world", type=int, default=0, metavar="N", help="seed of the micro world")
    add("--steps", type=int, metavar="N", help="optimiser steps of each run (default: train.py's)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, the cores shared out among them")
    add("--quick", action="store_true", help="one seed and 200 steps, a rehearsal: students are near chance")
    add("--out", metavar="DIR", default="out", help="where runs and tables go")
    add("--plot", metavar="FILE", help="with --conflict or --table: draw it (needs matplotlib)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help answers at once

import os
import random
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
import model as models
import train
from data.micro import prepare
from model import BadInput, require
from purify import PURIFIERS

# ------------------------------------------------------------------------------------------ one student


def open_run(args):
    """-> (settings of the run, {} for a bare checkpoint; data; student; tokenizer)."""
    folder, settings = Path(args.run), {}
    require(folder.is_dir(), f"{folder}: no such folder; give a run (out/RUN) or a checkpoint folder")
    if (folder / "purified.jsonl").exists() or (folder / "metrics.jsonl").exists():
        require((folder / "result.json").exists(), f"{folder}: this run is not finished; go on with train.py ... --resume")
        settings, folder = models.read_json(folder / "config.json"), folder / "student"
    data = kp.read_data(args.data or settings.get("data") or prepare.prepare(settings.get("world", 0)))
    student, tokenizer = models.load(folder, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    require(isinstance(student, models.T5), f"{folder}: a student is a T5; this is a {student.config['model_type']}")
    return settings, data, student, tokenizer


def evaluate(args):
    """-> {split: {task: accuracy, ..., "mean"}} of a run's or checkpoint's student on test and ood/test."""
    _, data, student, tokenizer = open_run(args)
    return {split: kp.accuracy(student, tokenizer, data[split]) for split in ("test", "ood/test") if split in data}


def look(args):
    """For some training questions: what each teacher wrote, what the student was given, what it says now."""
    settings, data, student, tokenizer = open_run(args)
    require(settings, f"{args.run}: --show needs a run's folder (out/RUN), not a bare checkpoint")
    chosen = [row for _, row in kp.read_rows(Path(args.run) / "purified.jsonl")]
    questions = {q.id: q for q in data["train"] + data.get("ood/train", [])}
    known = [row for row in chosen if row["id"] in questions]
    shown = random.Random(settings["seed"]).sample(known, max(0, min(args.show, len(known))))
    asked = argparse.Namespace(**settings)
    teachers = train.open_teachers(asked, train.read_world(asked)[1], data, lambda: (student, tokenizer))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def line(label, text, right=None, code="0"):
        mark, code = {None: (" ", code), True: ("+", "32"), False: ("-", "31")}[right]
        label = f"{mark} {label[:22]:<22} "
        text = textwrap.fill(kp.printable(text), 100, initial_indent=label, subsequent_indent=" " * len(label))
        print(f"\033[{code}m{text}\033[0m" if colour else text)

    for row in shown:
        q = questions[row["id"]]
        print("-" * 100)
        line(q.task, kp.ask(q), code="1")
        line("right answer", q.choices[q.answer])
        for m, name in enumerate(teachers.names):
            given = f" P={row['probabilities'][m]:.2f}" if row["probabilities"] else ""
            (text,) = teachers.rationales([q], [m])
            line(f"{name}{given}", text, kp.conclusion(text, q.choices) == q.answer)
        for text in row["rationales"]:
            line("=> student learnt", text, kp.conclusion(text, q.choices) == q.answer)
        (logps,) = kp.choice_logps(student, tokenizer, [kp.predict_prompt(q)], [q.choices])
        guess = logps.index(max(logps))
        line("student answers", q.choices[guess], guess == q.answer)
        ids, mask = (x.to(models.device_of(student)) for x in models.pad([tokenizer.encode(kp.explain_prompt(q)).ids]))
        text = tokenizer.decode(student.generate(ids, mask, settings["max_new_tokens"])[0].tolist()).strip()
        line("student explains", text, kp.conclusion(text, q.choices) == q.answer)
    print("-" * 100 + "\n+ concludes on the right answer   - on another   => what the purifier gave to the student")


# ------------------------------------------------------------------------------------------- many runs


def folder_of(args, label, seed):
    return Path(args.out) / ("quick" if args.quick else "runs") / f"{label}-{seed}"


def run_all(args, jobs):
    """jobs {label: train.py's arguments} x seeds -> {label: [result of each seed]}. What is done is not done again."""
    steps, todo, results = 200 if args.quick else args.steps, [], {label: [] for label in jobs}
    for label, arguments in jobs.items():
        for seed in range(1 if args.quick else args.seeds):
            out = folder_of(args, label, seed)
            asked = [*map(str, arguments), *(["--steps", str(steps)] if steps else []), "--world", str(args.world)]
            asked += ["--seed", str(seed), "--out", str(out)]
            same = (out / "config.json").exists() and models.read_json(out / "config.json").get("command") == asked
            results[label].append(out / "result.json")
            if not (same and (out / "result.json").exists()):
                todo.append([*asked, "--resume" if same else "--overwrite"])
    prepare.prepare(args.world)  # once, not in every run
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}

    def run(asked):
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *asked]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadInput(f"train.py {' '.join(asked)} failed: {done.stderr.strip().splitlines()[-1]}")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(run, todo), "runs", len(todo), unit="run"))
    return {label: [models.read_json(path) for path in paths] for label, paths in results.items()}


def deviation(values):
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values):
    """Shares -> mean ± standard deviation over seeds, in %."""
    return f"{100 * statistics.mean(values):.1f}" + (f" ± {100 * deviation(values):.1f}" if len(values) > 1 else "")


T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by seeds


def difference(a, b):
    """Points of mean accuracy by which runs `a` lie above runs `b`, seed by seed, with the 95 % interval of the mean."""
    gaps = [100 * (x["accuracy"]["mean"] - y["accuracy"]["mean"]) for x, y in zip(a, b)]
    interval = f" ± {T95.get(len(gaps), 1.96) * statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.1f}{interval}"


def total(result, *kinds):
    """Tokens of these kinds in the run's ledger."""
    return sum(n for kind, n in result["ledger"].items() if any(kind.endswith(k) for k in kinds))


def publish(args, name, header, rows, results):
    """Print a Markdown table; write it, and all that it was made from, to out/NAME.md and out/NAME.json."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
    with models.atomic(Path(args.out) / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    models.write_json(Path(args.out) / f"{name}.json", results)
    print("\n" + text)


def result_rows(results):
    """One row a label: accuracies in %, tokens in thousands, seconds of training."""
    first = next(iter(results.values()))[0]
    shares = [(split, task) for split in ("accuracy", "ood") for task in first[split]]
    header = ["", *first["accuracy"], *(f"{task} (ood)" for task in first["ood"])]
    header += ["teachers wrote k", "all read k", "student k", "train s"]
    rows = []
    for label, runs in results.items():
        cost = [[total(r, "wrote") for r in runs], [total(r, "read") for r in runs], [r["student_tokens"] for r in runs]]
        cells = [spread([r[split][task] for r in runs]) for split, task in shares]
        cells += [f"{statistics.mean(c) / 1000:,.0f}" for c in cost]
        rows.append([label, *cells, f"{statistics.mean(r['seconds']['train'] for r in runs):.0f}"])
    return header, rows


def measure(args, name, jobs):
    """Run these jobs and publish a row of each."""
    results = run_all(args, jobs)
    publish(args, name, *result_rows(results), results)
    return results


def table(args):
    """The paper's main table: every purifier and control."""
    jobs = {}
    for name in PURIFIERS:
        each = {f"single-{t}": ["--purifier", name, "--teacher", m] for m, t in enumerate(prepare.TEACHERS)}
        jobs |= each if name == "single" else {name: ["--purifier", name]}
    results = measure(args, "table", jobs)
    singles = [runs for label, runs in results.items() if label.startswith("single-")]
    best = max(singles, key=lambda runs: statistics.mean(r["valid"]["mean"] for r in runs))  # by valid, not by test
    against = {"TinyLLM": results["none"], "random": results["random"], "best single": best}
    rows = [[label, *(difference(runs, other) for other in against.values())] for label, runs in results.items()]
    publish(args, "differences", ["points above", *against], rows, rows)
    return results


def ood(args):
    """Purifiers fitted on the in-domain tasks only choose the rationales of tasks that they never saw."""
    measure(args, "ood", {f"ood-{name}": ["--purifier", name, "--ood"] for name in PURIFIERS if name != "single"})


def fit_curve(args):
    """What a router needs beforehand: accuracy and tokens when it is fitted on fewer questions."""
    jobs = {f"router-fit-{n}": ["--purifier", "router", "--fit-questions", n] for n in (250, 1000)}
    measure(args, "fit-curve", {**jobs, "router": ["--purifier", "router"]})


def conflict(args):
    """Accuracy against the number of teachers (the paper's first figure), and the conflict meter."""
    names, jobs = list(prepare.TEACHERS), {}
    for n in range(1, len(names) + 1):
        for purifier in ("none", "router")[:n]:  # of one teacher there is nothing to choose
            given = ["--teachers", *names[:n]] if n < len(names) else []
            jobs[f"{purifier}-{n}-teachers" if given else purifier] = ["--purifier", purifier, *given]
    results, rows = measure(args, "conflict", jobs), []
    for purifier in ("none", "router"):
        rows += [[f"{purifier}: {label}", *cosines] for label, *cosines in conflict_meter(folder_of(args, purifier, 0))]
    publish(args, "conflict-meter", ["rationales, student", "same question", "same answer"], rows, rows)
    return results


def conflict_meter(run, n_pairs=64):
    """How far a run's rationales pull its student apart: the mean cosine of the gradients of L_DL for two rationales.

    "same question": two teachers' rationales of one question (only where more than one is given). "same answer": two
    questions with the same right answer, a rationale of each. 1: they teach the same; 0: unrelated; below 0: opposed.
    Measured on n_pairs pairs before training (the student's first weights) and after it. -> rows of text.
    """
    asked, rng = argparse.Namespace(**models.read_json(run / "config.json")), random.Random(0)
    data, _, t5 = train.read_world(asked)
    given = {row["id"]: row["rationales"] for _, row in kp.read_rows(run / "purified.jsonl")}
    by_answer = {}
    for q in data["train"]:
        if given.get(q.id):
            by_answer.setdefault((q.task, q.choices[q.answer]), []).append(q)
    groups = [g for g in by_answer.values() if len(g) > 1]
    pairs = [rng.sample(rng.choice(groups), 2) for _ in range(n_pairs)]

    def cosine(student, encode, *two):
        gradients = []
        for q, text in two:
            student.zero_grad()
            kp.sequence_losses(student, encode([kp.explain_prompt(q)]), encode([text])).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        return F.cosine_similarity(*gradients, dim=0).item()

    first = train.load_student(asked, t5, map(kp.explain_prompt, data["train"]))
    for label, (student, tokenizer) in (("before training", first), ("after training", models.load(run / "student"))):
        encode = kp.Targets(tokenizer)
        own = [cosine(student, encode, (q, r), (q, s)) for q, _ in pairs for r, s in combinations(given[q.id], 2)]
        same = [cosine(student, encode, *((q, rng.choice(given[q.id])) for q in pair)) for pair in pairs]
        yield label, f"{statistics.mean(own):.3f}" if own else "", f"{statistics.mean(same):.3f}"


def plot(args, results):
    """The main table: accuracy against tokens; else against the number of teachers. Error bars are standard deviations."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))

    def draw(points, **style):  # {x: runs}
        ys = [[100 * r["accuracy"]["mean"] for r in runs] for _, runs in sorted(points.items())]
        axes.errorbar(sorted(points), [statistics.mean(y) for y in ys], [deviation(y) for y in ys], color="black", **style)

    if args.table:
        for marker, (label, runs) in zip("osv^<>DPX*hd8p1234", results.items()):
            tokens = statistics.mean(total(r, "wrote", "read") + r["student_tokens"] for r in runs) / 1e6
            draw({tokens: runs}, fmt=marker, mfc="none", capsize=3, label=label)
        axes.set(xlabel="tokens read, written and trained on (millions)")
    else:
        for purifier, fmt, label in (("none", "s--", "TinyLLM (all rationales)"), ("router", "o-", "router (one rationale)")):
            points = {len(runs[0]["teachers"]): runs for runs in results.values() if runs[0]["purifier"] == purifier}
            draw(points, fmt=fmt, capsize=4, label=label)
        axes.set(xlabel="teachers", xticks=[1, 2, 3, 4])
    axes.set_ylabel("mean in-domain test accuracy (%)")
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)
    print(f"drawn in {args.plot}")


def main(args):
    for measurement in (table, conflict, ood, fit_curve):
        if getattr(args, measurement.__name__):
            results = measurement(args)
            return plot(args, results) if args.plot and measurement in (table, conflict) else None
    require(args.run is not None, "nothing to do: give a run's folder, or one of --table, --conflict, --ood, --fit-curve")
    look(args) if args.show else train.print_accuracies(evaluate(args))


if __name__ == "__main__":
    with models.one_line_errors():
        main(ARGS)
