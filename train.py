"""Train a student by knowledge purification: ask the teachers, purify, train, evaluate, save.

    python train.py --purifier router       # the micro world, from nothing, in minutes
    python train.py --purifier none         # TinyLLM: all teachers' rationales, nothing purified
    python train.py --purifier router --data DIR --teachers DIR DIR DIR --student DIR
    torchrun --nproc_per_node=8 train.py ...                                # on several GPUs

The file reads top to bottom: the arguments, `train` (the story), the parts that it is made of, the
run's folder, torchrun's ranks, the closing table. A run writes out/RUN/: config.json (every
argument), metrics.jsonl (one line for each step and each evaluation), purified.jsonl (what the student
was given), result.json, and the student as a checkpoint folder, student/.
"""

import argparse
import os
import sys


WHICH_PURIFIERS = """router, plackett-luce, rl, rl-verified, classifier, aggregate; or a control:
none (TinyLLM, all rationales), single, task (the best teacher of each task), random, oracle (the
best-scoring teacher of each question), answers (no rationale)"""
WHICH_TEACHERS = """checkpoint folders, and .jsonl files of ready rationales (default: DATA/rationales/*;
in the micro world: names of its teachers)"""
WHICH_STUDENT = """checkpoint folder (T5, Llama, Mistral, Qwen2, Qwen3), or the micro world's: tiny (a
T5), tiny-half and tiny-quarter (of its width), tiny-llama; with --data, tiny is a new T5"""


def at_least(least):
    """Return a check for argparse: a number of the type of `least`, not smaller, below 2^31."""

    def number(text):
        value = type(least)(text)
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}, and below 2^31")
        return value

    number.__name__ = "number"  # which argparse names where the text is no number
    return number


positive = at_least(1)
natural = at_least(0)
weight = at_least(0.0)
flag = "flag"  # no value: given or not

# {group: [(name, check, default, meaning)]}. Defaults that depend on other arguments: `settle`.
ARGUMENTS = {
    "what to run": [
        ("purifier", str, "router", WHICH_PURIFIERS),
        ("seed", natural, 0, "seed of all random numbers"),
        ("out", str, None, "folder of this run (default: out/PURIFIER-SEED)"),
        ("resume", flag, False, "go on from the run's last checkpoint"),
        ("overwrite", flag, False, "start an unfinished run anew (a finished one needs no flag)"),
    ],
    "data and models (default: the micro world)": [
        ("world", natural, 0, "seed of the micro world: its questions and its teachers"),
        ("well-read", flag, False, "a control: a micro world whose teachers have read everything"),
        ("data", str, None, "folder with train.jsonl, valid.jsonl, test.jsonl"),
        ("teachers", list, None, WHICH_TEACHERS),
        ("student", str, "tiny", WHICH_STUDENT),
        ("encoder", str, None, "sentence encoder (default: a T5 teacher, else the student)"),
        ("scorer", str, None, "scores ready rationales (default: a T5 teacher, else the student)"),
        ("ood", flag, False, "train on the out-of-domain tasks; purifiers are fitted in domain"),
        ("per-token", flag, False, "compare choices by log-probability per token, not in sum"),
        ("cache", str, "cache", "folder that keeps what teachers said, for all runs"),
    ],
    "purification": [
        ("router", str, None, "folder of a run: take its fitted router, fit none"),
        ("fit-questions", positive, None, "how many questions to fit on (default: all; aggregate: 2,000)"),
        ("aggregator", str, None, "LM for aggregate (default: a T5 teacher, else the student)"),
        ("tune-aggregator", natural, None, "steps to train it (default: 800 in the micro world)"),
        ("teacher", natural, 0, "which teacher --purifier single takes"),
        ("shots", natural, None, "examples in a prompt (default: 0 in the micro world, else 2)"),
        ("teacher-forcing", flag, False, "tell the teachers the answer, as TinyLLM does (not for rl)"),
        ("max-new-tokens", positive, None, "tokens of a rationale (default: 256; micro world: 64)"),
        ("batch-tokens", positive, 2**14, "tokens that a model holds at once to write: prompts and texts"),
    ],
    "training": [
        ("lam", weight, None, "weight of the rationale loss (default: 16 in the micro world, else 1)"),
        ("teacher-prefixes", flag, False, "for none: a prefix for each teacher, as TinyLLM has it"),
        ("alpha", weight, None, "weight of each rationale, alpha_m (default: lambda / M)"),
        ("steps", positive, 1000, "optimiser steps"),
        ("batch-size", positive, 16, "questions in a pass (and process, under torchrun)"),
        ("accumulate", positive, 1, "passes whose gradients make one step"),
        ("lr", weight, None, "peak learning rate (default: 3e-4; a tiny student: 6e-3, with --data 1.5e-3)"),
        ("weight-decay", weight, 0.1, "AdamW's weight decay"),
        ("warmup", natural, 50, "steps of linear warm-up, then cosine decay to zero"),
        ("clip", weight, 1.0, "largest norm of the gradient"),
        ("explain", positive, None, "valid and test questions to explain (default: 100; micro world: all)"),
        ("eval-every", positive, 500, "steps between evaluations on valid, and checkpoints"),
        ("device", str, None, "cpu or cuda (default: cuda if there is one)"),
        ("dtype", str, None, "float32 or bfloat16 (default: bfloat16 on cuda)"),
        ("compile", flag, False, "compile the student's blocks: a slow start, faster steps"),
        ("recompute", flag, False, "recompute activations in the backward pass: less memory, a third slower"),
    ],
}


def parse_args(argv=None):
    """Return the arguments. A bad one ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = refuse
    for group, rows in ARGUMENTS.items():
        add = parser.add_argument_group(group).add_argument
        for name, check, default, meaning in rows:
            if check is flag:
                add(f"--{name}", action="store_true", help=meaning)
            elif check is list:
                add(f"--{name}", nargs="+", help=meaning)
            else:
                told = "" if default is None else f" (default: {default})"
                add(f"--{name}", type=check, default=default, help=meaning + told)
    return parser.parse_args(argv)


def refuse(message):
    print(f"error: {message.removeprefix('argument ')}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help answers at once
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # under torchrun only rank 0 shows bars

import copy
import fcntl
import json
import math
import random
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Lock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

import kp
import model
import purify
from data.micro import prepare, students
from data.questions import read_data, read_rationales, train_tokenizer
from model import BadInput, require

# ---------------------------------------------------------------------------------------- the story


def train(args):
    """Train one student. Return the run's result; None on ranks other than 0."""
    ranks = Ranks(args.device)
    seconds = Stopwatch()
    with seconds("set up"):
        data, teachers, student, token_cache, open_lm = open_parts(args, ranks)
        questions, valid = training_questions(args, data)
        prefixes = kp.explain_prefixes(len(teachers) if args.teacher_prefixes else 0)
        visits = draw_visits(questions, token_cache, args, ranks.count)
        purifier = purify.PURIFIERS[args.purifier](args, questions, visits, data["train"], teachers, open_lm)
        purifier.open()
        run = Run(args, ranks, seconds)
        if run.result.exists():
            return model.read_json(run.result) if ranks.rank == 0 else None
        how = dict(betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
        optimizer = torch.optim.AdamW(student.parameters(), **how)

    # Fit the purifier. Most purifiers ask the teachers here, and only for what they need.
    with seconds("purify"):
        purifier.fit()
        purifier.close_encoder()

    # Train on the dual loss.
    net = ranks.wrap(student, args)  # what the loss calls; `student` is what is saved and measured
    for step in run.steps(student, optimizer, purifier):
        with seconds("purify"):
            rationales = purifier.rationales(step)  # B lists of one rationale; TinyLLM: of all M
        with seconds("train"):
            batch = [questions[row] for row in ranks.share(visits[step])]
            texts = ranks.share(rationales)
            torch.manual_seed((args.seed * 1_000_003 + step) * ranks.count + ranks.rank)  # of dropout
            student.train()
            rate = learning_rate(step, args)
            optimizer.param_groups[0]["lr"] = rate
            losses = []
            for start in range(0, len(batch), args.batch_size):
                part = slice(start, start + args.batch_size)
                with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                    loss = kp.dual_loss(
                        net, token_cache, batch[part], texts[part], args.lam, args.alpha, prefixes
                    )
                (loss.total / args.accumulate).backward()
                losses.append(loss)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            loss = ranks.gather(kp.join(losses))
        with seconds("purify"):
            policy = purifier.feedback(step, loss)  # figures of rl's policy, else {}
        run.log_loss(step, loss, norm=norm, lr=rate, **policy)
        if run.evaluates(step):
            with seconds("evaluate"):
                run.log(step, valid=measure(args, student, token_cache, valid, prefixes))

    # Evaluate, and write what the run leaves behind.
    with seconds("evaluate"):
        run.log(args.steps, valid=measure(args, student, token_cache, valid, prefixes))
        figures = measure(args, student, token_cache, data["test"], prefixes)
        figures["ood"] = accuracy(args, student, token_cache, data.get("ood/test", []))
    return run.finish(student, token_cache.tokenizer, purifier, figures)


# ---------------------------------------------------------------------------------------- the parts


def settle(args):
    """Fill in the defaults that depend on other arguments. Raise BadInput for what cannot work."""
    require(args.data != "", "--data: names no folder")
    known = ", ".join(purify.PURIFIERS)
    why = f"--purifier {args.purifier}: unknown; take one of {known}"
    require(args.purifier in purify.PURIFIERS, why)
    kind = purify.PURIFIERS[args.purifier]
    if args.router:
        require(issubclass(kind, purify.Routing), f"--router: --purifier {args.purifier} is no router")
    if args.teacher_prefixes:
        require(issubclass(kind, purify.TinyLLM), "--teacher-prefixes: is for --purifier none")
    if args.teacher_forcing:
        require(not issubclass(kind, purify.Reinforced), "--teacher-forcing: rl checks who was right")
    args.device = pick_device(args.device)
    in_micro_world = args.data is None
    tiny_lr = 6e-3 if in_micro_world else 1.5e-3
    defaults = dict(
        dtype="bfloat16" if args.device == "cuda" else "float32",
        out=f"out/{args.purifier}{'-ood' if args.ood else ''}-{args.seed}",
        lam=16.0 if in_micro_world else 1.0,
        lr=tiny_lr if args.student in ("tiny", *students.STUDENTS) else 3e-4,
        shots=0 if in_micro_world else 2,
        explain=10**9 if in_micro_world else 100,
        max_new_tokens=64 if in_micro_world else 256,
        tune_aggregator=800 if in_micro_world and not args.aggregator else 0,
    )
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    why = f"--dtype {args.dtype}: take float32 or bfloat16"
    require(args.dtype in ("float32", "bfloat16"), why)


def pick_device(name):
    """Return this device, or without a name the best one. Raise BadInput where it is not there."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    name = name or devices[0]
    require(name in devices, f"--device {name}: no such device here; take cpu")
    return name


def open_parts(args, ranks):
    """Return what a run is made of: data {split: [Question]}, kp.Teachers, the student and its
    kp.TokenCache, and open_lm.

    open_lm(path) loads that checkpoint, or without a path the T5 at hand: the micro world's, the
    first T5 teacher, or else the student as it starts.
    """
    if ranks.rank > 0:
        ranks.wait()  # for rank 0, which makes the micro world and its student
    folder = Path(args.data) if args.data else prepare.prepare(args.world, args.well_read)
    data = read_data(folder)
    student, token_cache = load_student(args, folder, data["train"])
    if ranks.rank == 0:
        ranks.wait()
    require(not args.ood or "ood/train" in data, f"--ood: {folder} has no ood/train.jsonl")

    def open_lm(path):  # called later: t5 is set below
        if path or t5:
            return model.load(path or t5, args.device)
        return copy.deepcopy(student).eval(), token_cache.tokenizer

    def open_another(path):
        path = path or t5 or student.folder
        why = "a new student can neither score rationales nor merge them; give --scorer or --aggregator DIR"
        require(path, why)
        return kp.CheckpointTeacher(path, args.cache, asking(args), ranks=ranks)

    teachers = open_teachers(args, folder, data, open_another, ranks)
    t5s = [teacher.folder for teacher in teachers.teachers if teacher.kind == "t5"]
    t5 = next(iter(t5s), None) if args.data else folder / "teachers" / "t5"
    return data, teachers, student, token_cache, open_lm


def open_teachers(args, folder, data, open_another, ranks):
    """Return kp.Teachers: those that --teachers names, the micro world's, or the data set's own
    rationales/*.jsonl. open_another(path): see kp.Teachers.
    """
    if args.data:
        paths = args.teachers or sorted(folder.glob("rationales/*.jsonl"))
        require(paths, f"{folder}: no teachers in rationales/*.jsonl; give --teachers DIR ...")
    else:
        paths = [folder / "teachers" / name for name in args.teachers or prepare.TEACHERS]
    n = len(paths)
    require(args.teacher < n, f"--teacher {args.teacher}: there are {n} teachers, numbered from 0")
    needed = ["train", "ood/train"] if args.ood else ["train"]
    examples = [q for split in needed for q in data[split]]  # prompts may show some of these
    judge = kp.Judge(lambda: open_another(args.scorer))
    if args.scorer and open_another:  # a bad one ends a run before it begins
        judge.open_scorer()

    reading = Lock()  # one file of texts at a time: in turns threads would only slow each other down

    def open_one(path):
        if path.suffix == ".jsonl":
            with reading:
                texts, scores = read_rationales(path, data, needed, args.max_new_tokens)
            return kp.TextTeacher(path.stem, texts, scores, judge)
        return kp.CheckpointTeacher(path, args.cache, asking(args), examples, ranks)

    with ThreadPoolExecutor() as pool:  # to hash a large one takes 15 s
        return kp.Teachers(list(pool.map(open_one, map(Path, paths))), open_another)


def asking(args):
    """Return how checkpoints are asked, a kp.Asking."""
    return kp.Asking(
        device=args.device,
        dtype=torch.bfloat16 if args.dtype == "bfloat16" else None,
        shots=args.shots,
        max_new_tokens=args.max_new_tokens,
        tell_answer=args.teacher_forcing,
        per_token=args.per_token,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
    )


def load_student(args, folder, questions):
    """Return (student, kp.TokenCache): a checkpoint, the micro world's, or for --data and "tiny" a
    new small T5 with a tokenizer made of the questions.
    """
    if args.data and args.student == "tiny":
        tokenizer = train_tokenizer(questions)
        torch.manual_seed(args.seed)
        student = prepare.tiny_t5(tokenizer.get_vocab_size())
        return student.to(args.device), kp.TokenCache(tokenizer)
    path = args.student
    if path == "tiny":
        path = folder / "student"
    elif path in students.STUDENTS:
        why = f"--student {path} is the micro world's; with --data give --student DIR"
        require(not args.data, why)
        path = students.prepare_student(path, folder, args.world)
    return kp.open_student(path, args.device, torch.float32)


def training_questions(args, data):
    """Return the questions that the student trains on, and those that it is validated on."""
    if not args.ood:
        return data["train"], data["valid"]
    return data["ood/train"], data.get("ood/valid", data["valid"])


def measure(args, student, token_cache, questions, prefixes):
    """Return shares {task: x, ..., "mean": x} of a student.

    accuracy: it finds the right choice likeliest. On --explain questions, explains_right: its
    explanation concludes on the right choice; explains_true: it is the true rationale, word by
    word, where the data set has one. With several prefixes the best one counts, which flatters
    TinyLLM.
    """
    best = {}
    n = len(questions)
    rows = random.Random(0).sample(range(n), min(args.explain, n))
    some = [questions[row] for row in sorted(rows)]
    for prefix in prefixes:
        limits = args.max_new_tokens, prefix, args.batch_tokens
        texts = kp.explanations(student, token_cache, some, *limits)
        shares = {"explains_right": kp.by_task(some, map(kp.is_right, texts, some))}
        if all(q.truth for q in some):
            true = [text == q.truth for text, q in zip(texts, some)]
            shares["explains_true"] = kp.by_task(some, true)
        for name, share in shares.items():
            best[name] = max(share, best.get(name, share), key=lambda share: share["mean"])
    return {"accuracy": accuracy(args, student, token_cache, questions), **best}


def accuracy(args, student, token_cache, questions):
    """Return kp.accuracy. Without gradients there is room for four times as many questions."""
    return kp.accuracy(student, token_cache, questions, args.per_token, 4 * args.batch_size)


def draw_visits(questions, token_cache, args, n_ranks=1):
    """Return visits, where visits[step] are the rows of that step's batch. Each epoch visits
    every row once.

    Eight batches at a time are sorted by length and cut again, so 5 % of the tokens are padding
    instead of 19 %. Questions that no step visits are not tokenised.
    """
    size = args.batch_size * args.accumulate * n_ranks
    n_visits = args.steps * size
    n = len(questions)
    order = []
    for epoch in range(math.ceil(n_visits / n)):
        order += random.Random(f"{args.seed} {epoch}").sample(range(n), n)
    del order[n_visits:]
    visits = []
    for start in range(0, n_visits, 8 * size):
        rows = sorted(
            order[start : start + 8 * size],
            key=lambda row: len(token_cache.prompts([kp.with_choices(questions[row])])[0])
        )
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        visits += random.Random(f"{args.seed} {start}").sample(batches, len(batches))
    return visits


def learning_rate(step, args):
    """Return the rate of a step: linear warm-up to --lr, then cosine decay to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / (args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------- a run's folder

FORMAT = 3  # of a run's folder; a folder of another format cannot be resumed
LOG_EVERY = 20  # steps between writes of the log: each waits for the device


class Run:
    """The folder out/RUN/, locked while the run lasts; its checkpoint, its log, and the signals
    that stop it.

    Rank 0 alone writes. The other ranks read the checkpoint and follow the same steps.
    """

    def __init__(self, args, ranks, seconds):
        self.args = args
        self.ranks = ranks
        self.seconds = seconds
        self.folder = Path(args.out)
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.metrics = self.folder / "metrics.jsonl"
        self.result = self.folder / "result.json"
        self.router = self.folder / "router.safetensors"
        self.student_tokens = 0
        self.pending = []  # lines of metrics.jsonl that are not written yet
        self.valid = None
        if ranks.rank == 0:
            self.lock()
            self.begin()
        ranks.wait()

    def lock(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except OSError:
            why = "another run is writing there; wait for its end or give another --out"
            raise BadInput(f"{self.folder}: {why}") from None
        for half in self.folder.glob(f".{self.checkpoint.name}.*.tmp"):  # a kill while it was saved
            half.unlink()

    def begin(self):
        """Make the folder ready: new or cleared, or with --resume as it is."""
        config = self.folder / "config.json"
        settings = {"format": FORMAT, "nproc_per_node": self.ranks.count, **vars(self.args)}
        del settings["resume"], settings["overwrite"]
        before = model.read_config(self.folder) if config.exists() else settings
        why = "its config.json is no run's, perhaps a model's; give another --out"
        require("purifier" in before, f"{self.folder}: {why}")
        if self.args.resume or self.ranks.restarts != "0":
            for name, value in settings.items():
                was = before.get(name, value)
                why = f"begun with --{name.replace('_', '-')} {was}, not {value}; --resume takes the same"
                printed = name == "nproc_per_node" and self.result.exists()  # a finished run is only printed
                moved = name == "out"  # or the same folder by another path
                require(was == value or printed or moved, f"{self.folder}: {why}")
            if self.checkpoint.exists() or self.result.exists():
                return
        elif config.exists() and not self.result.exists():
            why = "holds an unfinished run; go on with --resume or start anew with --overwrite"
            require(self.args.overwrite, f"{self.folder}: {why}")
        for file in (self.checkpoint, self.metrics, self.result, self.router):
            file.unlink(missing_ok=True)
        model.write_json(config, settings)

    # Steps and signals

    def steps(self, student, optimizer, purifier):
        """Yield the steps that are left. Save after those at which the run evaluates. Ctrl-C and
        SIGTERM let the step end, save, and end the process.
        """
        first = self.restore(student, optimizer, purifier)
        signals = [0]  # 0, then the numbers of the signals that came
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: signals.append(number))
        n = self.args.steps
        name = f"train {self.args.purifier}"
        self.bar = tqdm(range(first, n), name, initial=first, total=n, unit="step")
        for step in self.bar:
            yield step
            if self.ranks.count > 1 and os.getppid() != self.ranks.parent:
                signals.append(signal.SIGTERM)  # torchrun was killed, and can stop no process
            stopping = max(self.ranks.collect(max(signals)))  # for all ranks the same
            if stopping or self.evaluates(step):
                self.save(step + 1, student, optimizer, purifier)
            if stopping:
                self.bar.close()
                self.ranks.wait()  # torchrun kills the others soon after the first one ends
                if self.ranks.rank == 0:
                    again = "go on with the same command and --resume"
                    print(f"stopped after step {step + 1} and saved; {again}", file=sys.stderr)
                sys.exit(128 + stopping)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the last evaluation may be stopped
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def evaluates(self, step):
        """Tell whether to look at valid after this step, and to save."""
        step += 1
        return step % self.args.eval_every == 0 and step < self.args.steps

    # The log

    def log_loss(self, step, loss, **figures):
        """Log a step's losses and figures; show them every LOG_EVERY steps."""
        self.student_tokens += loss.tokens
        self.log(
            step,
            tokens=loss.tokens,
            **figures,
            loss=loss.total,
            answer=loss.answer.mean(),
            rationale=loss.rationale.mean() if len(loss.rationale) else 0.0,
            padding=1 - loss.tokens / loss.padded,
        )
        if (step + 1) % LOG_EVERY == 0:
            self.flush()
            valid = f", valid {self.valid['accuracy']['mean']:.3f}" if self.valid else ""
            self.bar.set_postfix_str(f"loss {loss.total.item():.3f}{valid}")

    def log(self, step, **figures):
        self.valid = figures.get("valid", self.valid)
        self.pending.append({"step": step, **figures})

    def flush(self):
        """Write the pending lines; this waits for the device. Raise BadInput where a figure is not
        finite.
        """
        lines = []
        for line in self.pending:
            try:
                text = json.dumps(line, default=torch.Tensor.item, allow_nan=False)
            except ValueError:
                place = f"{self.folder}: step {line['step']} of {self.args.purifier}"
                why = "the loss or its gradient is not finite; lower --lr"
                raise BadInput(f"{place}: {why}") from None
            lines.append(text + "\n")
        self.pending.clear()
        if self.ranks.rank == 0:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.writelines(lines)

    # The checkpoint

    def save(self, step, student, optimizer, purifier):
        """Write everything that training changes and nothing can recompute, in one file.

        Random draws need no state, because they depend on seed and step alone. Neither does the
        ledger: fitting the purifier again asks for the same answers, which are in the cache by
        then. (A tuned aggregator's are not kept: it writes again.)
        """
        self.flush()
        if self.ranks.rank != 0:
            return
        tensors = model.state_of(student=student, optimizer=optimizer)
        for name, value in purifier.state().items():
            tensors[f"purifier.{name}"] = value
        progress = dict(
            step=step,
            student_tokens=self.student_tokens,
            log_bytes=self.metrics.stat().st_size,
            seconds=self.seconds,
        )
        text = json.dumps(progress)
        with open(self.metrics, "rb") as file:
            os.fsync(file.fileno())  # after a power cut too, the log is as long as the checkpoint says
        with model.atomic(self.checkpoint) as temporary:
            about = {"progress": text, "checksum": model.checksum(text, tensors)}
            save_file(tensors, temporary, about)

    def restore(self, student, optimizer, purifier):
        """Go back to the checkpoint, if there is one. Return the first step that is left."""
        if not self.checkpoint.exists():
            return 0
        tensors, metadata = model.read_tensors(self.checkpoint)
        text = metadata.get("progress")
        why = "damaged, or of another version; start anew with --overwrite"
        whole = metadata.get("checksum") == model.checksum(text, tensors)
        require(whole, f"{self.checkpoint}: {why}")
        progress = json.loads(text)
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        why = "its end is lost; start anew with --overwrite"
        require(size >= progress["log_bytes"], f"{self.metrics}: {why}")
        model.restore_state(tensors, student=student, optimizer=optimizer)
        purifier.restore(model.part_of(tensors, "purifier"), progress["step"])
        self.seconds.update(progress["seconds"])
        self.student_tokens = progress["student_tokens"]
        if self.ranks.rank == 0:
            os.truncate(self.metrics, progress["log_bytes"])  # later lines will be written again
        return progress["step"]

    # The end

    def finish(self, student, tokenizer, purifier, figures):
        """Write what the run leaves behind, and delete the checkpoint. Return the result."""
        self.flush()
        if self.ranks.rank != 0:
            return None
        model.save(student, tokenizer, self.folder / "student")
        n_empty = 0
        true = []  # for each rationale whose truth is known: is it true?
        purified = self.folder / "purified.jsonl"
        with model.atomic(purified) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for row in purifier.rows:
                q = purifier.questions[row]
                texts = purifier.given(row)
                n_empty += texts.count("")
                true += [text == q.truth for text in texts if q.truth]
                line = dict(id=q.id, rationales=texts, probabilities=purifier.probabilities(row))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        ledger = purifier.teachers.ledger + purifier.ledger
        result = dict(
            purifier=self.args.purifier,
            seed=self.args.seed,
            teachers=purifier.teachers.names,
            steps=self.args.steps,
            **figures,
            valid=self.valid,
            purified_true=sum(true) / len(true) if true else None,
            teacher_tokens=ledger["rationale_wrote"],
            ledger=ledger,
            student_tokens=self.student_tokens,
            empty_rationales=n_empty,
            seconds={stage: round(value, 2) for stage, value in self.seconds.items()},
        )
        kept = purifier.kept()
        if kept:
            about = {name: json.dumps(result[name]) for name in ("purifier", "teachers")}
            with model.atomic(self.router) as temporary:
                save_file(kept, temporary, about)
        model.write_json(self.result, result)
        self.checkpoint.unlink(missing_ok=True)
        return result


class Stopwatch(dict):
    """Seconds by stage: `with seconds("train"): ...` adds to seconds["train"]."""

    @contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        self[stage] = self.get(stage, 0.0) + time.perf_counter() - start


# --------------------------------------------------------------------------------- torchrun's ranks


class Ranks:
    """The processes that torchrun starts, one a GPU (nccl), or on CPUs (gloo). Without torchrun
    it is this one alone.

    The whole batch has B rows, of which rank 0 trains on the first B / count, and so on.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.parent = os.getppid()
        self.restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of torchrun --max-restarts
        if self.count > 1 and not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "nccl" if device == "cuda" else "gloo"
            store, *_ = next(dist.rendezvous("env://"))  # it may hold keys of processes that ended
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(self.restarts, store),
                rank=self.rank,
                world_size=self.count,
                timeout=timedelta(days=7),  # teachers take hours
            )

    def wait(self):
        """Wait for all ranks."""
        if self.count > 1:
            dist.barrier()

    def share(self, rows):
        """Return this rank's rows of the whole batch."""
        size = len(rows) // self.count
        start = self.rank * size
        return rows[start : start + size]

    def wrap(self, student, args):
        """Return the student as the loss calls it: with gradients averaged over ranks, and
        compiled or recomputing where --compile or --recompute say so.
        """
        student.recompute = args.recompute  # which the model reads
        if args.compile:  # block by block: they are alike, so this takes seconds and not minutes
            for block in student.blocks():
                block.compile(dynamic=True)
        if self.count == 1:
            return student
        net = torch.nn.parallel.DistributedDataParallel(student)
        net.config = student.config
        return net

    def collect(self, value):
        """Return the value that each rank has."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def gather(self, loss):
        """Return the kp.DualLoss of the whole batch, in its order."""
        if self.count == 1:
            return loss
        total, answer, rationale, tokens, padded = loss
        part = kp.DualLoss(total.cpu(), answer.cpu(), rationale.cpu(), tokens, padded)
        return kp.join(self.collect(part))


# -------------------------------------------------------------------------------- the closing table


def print_shares(shares):
    """Print {label: {task: share}} as a table, without what is empty."""
    width = max(map(len, shares))
    for label, row in shares.items():
        if row:
            wide = max(10, *map(len, row)) + 1
            print(f"  {label:<{width}}" + "".join(f"{task:>{wide}}" for task in row))
            print(" " * (width + 2) + "".join(f"{share:>{wide}.3f}" for share in row.values()))


def print_result(result):
    """Print what the run brought and what it cost."""
    n = len(result["teachers"])
    print(f"\n{result['purifier']}, seed {result['seed']}, {n} teachers, {result['steps']} steps\n")
    print_shares({
        "test accuracy": result["accuracy"],
        "out of domain": result["ood"],
        "explains rightly": result["explains_right"],
        "explains truly": result.get("explains_true"),
    })
    if result["purified_true"] is not None:
        print(f"  {'rationales given':<16} {result['purified_true']:.3f} of them true")
    print(f"  {'tokens':<16} teachers wrote {result['teacher_tokens']:,}, ", end="")
    print(f"student trained on {result['student_tokens']:,}")
    n = result["empty_rationales"]
    if n:
        print(f"  {'note':<16} {n:,} empty rationales, from which nothing was learnt")
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in result["seconds"].items())
    print(f"  {'seconds':<16} {seconds}")


def main(args):
    torch.backends.cuda.matmul.allow_tf32 = True  # where a GPU computes in float32
    settle(args)
    try:
        result = train(args)
    except RuntimeError as error:  # only the name gloo in its text tells that a process is gone
        require("gloo" not in str(error), "another process of this run ended; start again with --resume")
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if result is None:  # on a rank other than 0
        return
    print_result(result)
    if args.data and args.student == "tiny":
        print("  note: a tiny student is near chance on real text; take --student DIR")
    print(f"  saved in {args.out}; look closer with: python eval.py {shlex.quote(args.out)} --show 5")


if __name__ == "__main__":
    with model.one_line_errors():
        main(ARGS)
