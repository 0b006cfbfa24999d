"""Train a student by knowledge purification: ask the teachers, purify, train, evaluate, save.

    python train.py --purifier router       # the micro world, from nothing, in minutes
    python train.py --purifier none         # TinyLLM: all teachers' rationales, nothing purified
    python train.py --purifier router --data DIR --teachers DIR DIR DIR --student DIR
    torchrun --nproc_per_node=8 train.py ...                                # on several GPUs

The file reads top to bottom: the arguments, `train` (the story), the parts that it is made of, the
run's folder, torchrun's ranks, the closing table. A run writes out/RUN/: config.json (every
argument), metrics.jsonl (a line a step, and one an evaluation), purified.jsonl (what the student
was given), result.json, and the student as a checkpoint folder, student/.
"""

import argparse
import os
import sys


WHICH_PURIFIERS = """router, plackett-luce, rl, rl-published, classifier, aggregate; or a control:
none (TinyLLM, all rationales), single, task (the best teacher of each task), random, oracle (the
best-scoring teacher of each question), answers (no rationale)"""
WHICH_TEACHERS = """checkpoint folders, and .jsonl files of ready rationales (default: DATA/rationales/*;
in the micro world: names of its teachers)"""


def at_least(least):
    """Return a check for argparse: a number of the type of `least`, and not smaller."""

    def number(text):
        value = type(least)(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    number.__name__ = "number"  # which argparse names where the text is no number
    return number


positive = at_least(1)
natural = at_least(0)
weight = at_least(0.0)
flag = None

# {group: [(name, check, default, meaning)]}. Defaults that depend on other arguments: `settle`.
ARGUMENTS = {
    "what to run": [
        ("purifier", str, "router", WHICH_PURIFIERS),
        ("seed", natural, 0, "of everything random"),
        ("out", str, None, "folder of this run (default: out/PURIFIER-SEED)"),
        ("resume", flag, False, "go on from the run's last checkpoint"),
        ("overwrite", flag, False, "start an unfinished run anew (a finished one needs no flag)"),
    ],
    "data and models (default: the micro world)": [
        ("world", natural, 0, "seed of the micro world: its questions and its teachers"),
        ("well-read", flag, False, "a control: a micro world whose teachers have read everything"),
        ("data", str, None, "folder with train.jsonl, valid.jsonl, test.jsonl"),
        ("teachers", list, None, WHICH_TEACHERS),
        ("student", str, "tiny", "checkpoint folder of a T5, or tiny: the micro world's, or a new one"),
        ("encoder", str, None, "sentence encoder (default: a T5 teacher, else the student)"),
        ("scorer", str, None, "scores ready rationales (default: a T5 teacher, else the student)"),
        ("ood", flag, False, "train on the out-of-domain tasks; purifiers are fitted in domain"),
        ("per-token", flag, False, "compare choices by log-probability per token, not in sum"),
        ("cache", str, "cache", "what teachers said, kept for all runs"),
    ],
    "purification": [
        ("router", str, None, "folder of a run whose fitted router to use, instead of fitting one"),
        ("fit-questions", positive, None, "questions that fit a router (default: all of train)"),
        ("aggregator", str, None, "LM for aggregate (default: a T5 teacher, else the student)"),
        ("tune-aggregator", natural, None, "steps that teach it (default: 800 in the micro world)"),
        ("teacher", natural, 0, "which teacher --purifier single takes"),
        ("shots", natural, None, "examples in a prompt (default: 0 in the micro world, else 2)"),
        ("teacher-forcing", flag, False, "tell the teachers the answer, as TinyLLM does"),
        ("max-new-tokens", positive, None, "of a rationale (default: 64 in the micro world, else 256)"),
        ("batch-tokens", positive, 2**14, "that a teacher holds at once: prompts, choices, rationales"),
    ],
    "training": [
        ("lam", weight, None, "weight of the rationale loss (default: 4 in the micro world, else 1)"),
        ("teacher-prefixes", flag, False, "a prefix for each teacher's rationales, as TinyLLM has"),
        ("alpha", weight, None, "weight of each rationale, alpha_m (default: lambda / M)"),
        ("steps", positive, 1000, "optimiser steps"),
        ("batch-size", positive, 16, "questions in a pass (and process, under torchrun)"),
        ("accumulate", positive, 1, "passes whose gradients make one step"),
        ("lr", weight, None, "peak learning rate (default: 1.5e-3 for tiny, else 3e-4)"),
        ("weight-decay", weight, 0.1, "of AdamW"),
        ("warmup", natural, 50, "steps of linear warm-up, then cosine decay to zero"),
        ("clip", weight, 1.0, "largest norm of the gradient"),
        ("explain", positive, None, "questions to explain, measured (default: micro world all, else 100)"),
        ("eval-every", positive, 500, "steps between evaluations on valid, and checkpoints"),
        ("device", str, None, "cpu or cuda (default: cuda if there is one)"),
        ("dtype", str, None, "float32 or bfloat16 (default: bfloat16 on cuda)"),
        ("compile", flag, False, "torch.compile the student: a slow start, faster steps"),
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
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

import kp
import model
import purify
from data.micro import prepare
from data.questions import read_data, read_rationales, train_tokenizer
from model import BadInput, require

# ---------------------------------------------------------------------------------------- the story


def train(args):
    """Train one student. Return the run's result; None on ranks other than 0."""
    ranks = Ranks(args.device)
    seconds = Stopwatch()
    with seconds("set up"):
        data, teachers, student, tokenizer, open_lm = open_parts(args, ranks)
        run = Run(args, ranks)
        if run.finished():
            return run.read_result()
        questions, valid = training_questions(args, data)
        token_cache = kp.TokenCache(tokenizer)
        prefixes = kp.explain_prefixes(len(teachers) if args.teacher_prefixes else 0)
        weights = args.lam, args.alpha, prefixes
        visits = draw_visits(token_cache.prompts(map(kp.ask, questions)), args, ranks.count)
        optimizer = new_optimizer(student, args)

    # Fit the purifier. Most purifiers ask the teachers here, and only for what they need.
    with seconds("purify"):
        make = purify.PURIFIERS[args.purifier]
        purifier = make(args, questions, visits, data["train"], teachers, open_lm)
        purifier.fit()

    # Train on the dual loss.
    run.restore(student, optimizer, purifier, seconds)
    net = ranks.wrap(student, args.compile)
    for step in run.steps():
        with seconds("purify"):
            rationales = purifier.rationales(step)  # B lists of one rationale; TinyLLM: of all M
        with seconds("train"):
            rate = begin_step(args, step, student, optimizer)
            batch = ranks.share([questions[row] for row in visits[step]])
            own = ranks.share(rationales)
            losses = []
            for part in parts_of(batch, args.accumulate):
                with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                    loss = kp.dual_loss(net, token_cache, batch[part], own[part], *weights)
                (loss.total / args.accumulate).backward()
                losses.append(loss)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = ranks.gather(kp.join(losses), rationales)
        with seconds("purify"):
            noted = purifier.feedback(step, loss)
        run.log_loss(step, loss, norm=norm, lr=rate, **noted)
        if run.evaluates(step):
            with seconds("evaluate"):
                run.log(step, valid=measure(args, student, tokenizer, valid, prefixes))
        if run.saves(step):
            run.save(step + 1, student, optimizer, purifier, seconds)

    # Evaluate, and write what the run leaves behind. All ranks ask teachers, rank 0 does the rest.
    with seconds("evaluate"):
        figures = purifier.figures()
        if ranks.rank != 0:
            return None
        run.log(args.steps, valid=measure(args, student, tokenizer, valid, prefixes))
        figures |= measure_test(args, student, tokenizer, data, prefixes)
    model.save(student, tokenizer, run.folder / "student")
    return run.finish(purifier, figures, seconds)


# ---------------------------------------------------------------------------------------- the parts


def settle(args):
    """Fill in the defaults that depend on other arguments. Raise BadInput for what cannot work."""
    known = ", ".join(purify.PURIFIERS)
    why = f"--purifier {args.purifier}: unknown; take one of {known}"
    require(args.purifier in purify.PURIFIERS, why)
    has_cuda = torch.cuda.is_available()
    why = f"--device {args.device}: no such device here; take cpu"
    require(args.device in (None, "cpu") or args.device == "cuda" and has_cuda, why)
    in_micro_world = args.data is None
    defaults = dict(
        device="cuda" if has_cuda else "cpu",
        out=f"out/{args.purifier}{'-ood' if args.ood else ''}-{args.seed}",
        lam=4.0 if in_micro_world else 1.0,
        lr=1.5e-3 if args.student == "tiny" else 3e-4,
        shots=0 if in_micro_world else 2,
        explain=10**9 if in_micro_world else 100,
        max_new_tokens=64 if in_micro_world else 256,
        tune_aggregator=800 if in_micro_world and not args.aggregator else 0,
    )
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    why = f"--dtype {args.dtype}: take float32 or bfloat16"
    require(args.dtype in (None, "float32", "bfloat16"), why)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"


def open_parts(args, ranks):
    """Return what a run is made of: data {split: [Question]}, kp.Teachers, the student and its
    tokenizer, and open_lm.

    open_lm(path) loads that checkpoint, or without a path the T5 at hand: the micro world's, the
    first T5 teacher, or else the student as it starts.
    """
    with ranks.first_alone():  # rank 0 makes the micro world, the others find it there
        folder = Path(args.data) if args.data else prepare.prepare(args.world, args.well_read)
    data = read_data(folder)
    for split in ("train", "test"):
        require(not args.ood or f"ood/{split}" in data, f"--ood: {folder} has no ood/{split}.jsonl")

    def open_lm(path):
        if path or t5s:
            return model.load(path or t5s[0], args.device)
        return copy.deepcopy(student).eval(), tokenizer

    teachers = open_teachers(args, folder, data, kp.Judge(lambda: open_lm(args.scorer)), ranks)
    if args.data:
        t5s = [teacher.folder for teacher in teachers.teachers if teacher.kind == "t5"]
    else:
        t5s = [folder / "teachers" / "t5"]
    own = folder / "student" if args.student == "tiny" and not args.data else args.student
    student, tokenizer = load_student(own, args, t5s, data["train"])
    if args.encoder:
        encoder, _ = open_lm(args.encoder)
        why = f"--encoder {args.encoder}: not an encoder; take a Bert or a T5"
        require(hasattr(encoder, "encode"), why)
    return data, teachers, student, tokenizer, open_lm


def open_teachers(args, folder, data, judge, ranks=kp.ONE_PROCESS):
    """Return kp.Teachers: those that --teachers names, the micro world's, or the data set's own
    rationales/*.jsonl.
    """
    if args.data:
        paths = [Path(path) for path in args.teachers or sorted(folder.glob("rationales/*.jsonl"))]
        require(paths, f"{folder}: no teachers in rationales/*.jsonl; give --teachers DIR ...")
    else:
        names = args.teachers or prepare.TEACHERS
        for name in names:
            known = ", ".join(prepare.TEACHERS)
            why = f"--teachers {name}: the micro world's are {known}; others need --data"
            require(name in prepare.TEACHERS, why)
        paths = [folder / "teachers" / name for name in names]
    n = len(paths)
    require(args.teacher < n, f"--teacher {args.teacher}: there are {n} teachers, numbered from 0")
    asking = kp.Asking(
        device=args.device,
        dtype=torch.bfloat16 if args.device == "cuda" else None,
        shots=args.shots,
        max_new_tokens=args.max_new_tokens,
        tell_answer=args.teacher_forcing,
        per_token=args.per_token,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
    )
    needed = ("train", "ood/train") if args.ood else ("train",)
    teachers = []
    for path in paths:
        if path.suffix == ".jsonl":
            texts, scores = read_rationales(path, data, needed, args.max_new_tokens)
            teachers.append(kp.TextTeacher(path.stem, texts, scores, judge))
        else:
            teachers.append(kp.CheckpointTeacher(path, args.cache, asking, data["train"], ranks))
    return kp.Teachers(teachers)


def load_student(path, args, t5s, questions):
    """Return (T5, tokenizer): a checkpoint, or for the path "tiny" a new small T5 with the
    tokenizer of the first of t5s or of the questions.
    """
    if path != "tiny":
        student, tokenizer = model.load(path, args.device, torch.float32)
        kind = student.config["model_type"]
        require(kind == "t5", f"--student {args.student}: a student is a T5; this is a {kind}")
        return student, tokenizer
    config = {}
    if t5s:
        config = model.read_config(t5s[0])
        tokenizer = model.load_tokenizer(t5s[0] / "tokenizer.json", config["vocab_size"])
    else:
        tokenizer = train_tokenizer(questions)
    torch.manual_seed(args.seed)
    special = config.get("pad_token_id", 0), config.get("eos_token_id", 1)
    return prepare.tiny_t5(tokenizer.get_vocab_size(), *special).to(args.device), tokenizer


def training_questions(args, data):
    """Return what the student trains on, and what it is looked at with meanwhile."""
    if not args.ood:
        return data["train"], data["valid"]
    return data["ood/train"], data.get("ood/valid", data["valid"])


def measure(args, student, tokenizer, questions, prefixes):
    """Return what a student can, in shares {task: x, ..., "mean": x}: accuracy; explains_right,
    its own explanations that conclude on the right choice; and where the data set knows the true
    rationales explains_true, those that are it word by word; both of --explain questions. Of
    several prefixes the best counts, which flatters them.
    """
    best = {}
    n = len(questions)
    rows = random.Random(0).sample(range(n), min(args.explain, n))
    some = [questions[row] for row in sorted(rows)]
    for prefix in prefixes:
        texts = kp.explanations(student, tokenizer, some, args.max_new_tokens, prefix)
        shares = {"explains_right": kp.by_task(some, map(kp.is_right, texts, some))}
        if all(q.truth for q in some):
            true = [text == q.truth for text, q in zip(texts, some)]
            shares["explains_true"] = kp.by_task(some, true)
        for name, share in shares.items():
            best[name] = max(share, best.get(name, share), key=lambda share: share["mean"])
    return {"accuracy": kp.accuracy(student, tokenizer, questions, args.per_token), **best}


def measure_test(args, student, tokenizer, data, prefixes):
    """Return `measure` of test, and the accuracy out of domain as "ood"."""
    shares = measure(args, student, tokenizer, data["test"], prefixes)
    shares["ood"] = kp.accuracy(student, tokenizer, data.get("ood/test", []), args.per_token)
    return shares


def draw_visits(prompts, args, n_ranks=1, block=8):
    """Return visits, where visits[step] are the rows of that step's batch. Each epoch visits
    every row once.

    prompts: N lists of ids. Each `block` of batches is sorted by length: 5 % of the tokens are
    padding instead of 19 %.
    """
    size = args.batch_size * args.accumulate * n_ranks
    n_visits = args.steps * size
    order = []
    for epoch in range(math.ceil(n_visits / len(prompts))):
        order += random.Random(f"{args.seed} {epoch}").sample(range(len(prompts)), len(prompts))
    visits = []
    for start in range(0, n_visits, block * size):
        rows = order[start : min(start + block * size, n_visits)]
        rows.sort(key=lambda row: len(prompts[row]))
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        visits += random.Random(f"{args.seed} {start}").sample(batches, len(batches))
    return visits


def new_optimizer(student, args):
    betas = 0.9, 0.98
    decay = args.weight_decay
    return torch.optim.AdamW(student.parameters(), args.lr, betas, weight_decay=decay, fused=True)


def parts_of(batch, n):
    """Return the n slices into which gradient accumulation cuts a batch."""
    size = len(batch) // n
    return [slice(start, start + size) for start in range(0, len(batch), size)]


def begin_step(args, step, student, optimizer):
    """Return the learning rate, after setting it. Dropout depends on seed and step alone, so a
    resumed run repeats it.
    """
    student.train()
    torch.manual_seed(args.seed * 1_000_003 + step)
    rate = learning_rate(step, args)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate(step, args):
    """Return the rate of a step: linear warm-up to --lr, then cosine decay to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------- a run's folder

FORMAT = 3  # of a run's folder; another is refused, not misread
LOG_EVERY = 20  # steps between two moments at which the loop waits for the device, to write its log


class Run:
    """The folder out/RUN/, locked while the run lasts; its checkpoint, its log, and the signals
    that stop it.

    Rank 0 alone writes. The other ranks read the checkpoint and follow the same steps.
    """

    def __init__(self, args, ranks):
        self.args = args
        self.ranks = ranks
        self.folder = Path(args.out)
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.metrics = self.folder / "metrics.jsonl"
        self.result = self.folder / "result.json"
        self.router = self.folder / "router.safetensors"
        self.first_step = 0
        self.student_tokens = 0
        self.pending = []  # lines of metrics.jsonl that are not written yet
        self.signals = []  # SIGINT or SIGTERM, once they came
        self.stopping = False
        self.valid = None
        with ranks.first_alone():
            if ranks.rank == 0:
                self.lock()
                self.begin()

    def lock(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except OSError:
            why = "another run is writing there; wait for its end or give another --out"
            raise BadInput(f"{self.folder}: {why}") from None

    def begin(self):
        """Make the folder ready: new or cleared, or with --resume as it is."""
        config = self.folder / "config.json"
        settings = {"format": FORMAT, **vars(self.args)}
        del settings["resume"], settings["overwrite"]
        before = model.read_json(config) if config.exists() else {}
        found = before.get("format", FORMAT)
        why = f"format {found!r}, this code writes {FORMAT}; give another --out"
        require(found == FORMAT, f"{config}: {why}")
        if before and self.args.resume:
            other = [name for name, value in settings.items() if before.get(name) != value]
            other = ", --".join(other).replace("_", "-")
            why = f"--resume with other arguments: --{other}; give the same"
            require(not other, f"{self.folder}: {why}")
            if self.checkpoint.exists() or self.finished():
                return
        elif before and not self.finished() and not self.args.overwrite:
            why = "holds an unfinished run; go on with --resume or start anew with --overwrite"
            raise BadInput(f"{self.folder}: {why}")
        for file in (self.checkpoint, self.metrics, self.result, self.router):
            file.unlink(missing_ok=True)
        model.write_json(config, settings)

    def read_result(self):
        return model.read_json(self.result) if self.ranks.rank == 0 else None

    def finished(self):
        return self.result.exists()

    # Steps and signals

    def steps(self):
        """Yield the steps that are left. After Ctrl-C or SIGTERM, end the process behind a step
        that was saved.
        """
        signals = self.signals
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: signals.append(number))
        steps = range(self.first_step, self.args.steps)
        name = f"train {self.args.purifier}"
        self.bar = tqdm(steps, name, initial=self.first_step, total=self.args.steps, unit="step")
        for step in self.bar:
            yield step
            if self.stopping:
                self.bar.close()
                if self.ranks.rank == 0:
                    again = "go on with the same command and --resume"
                    print(f"stopped after step {step + 1} and saved; {again}", file=sys.stderr)
                number = self.signals[0] if self.signals else signal.SIGTERM
                sys.exit(128 + number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the last evaluation may be stopped
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def evaluates(self, step):
        """Tell whether rank 0 looks at valid after this step."""
        step += 1
        return self.ranks.rank == 0 and step % self.args.eval_every == 0 and step < self.args.steps

    def saves(self, step):
        """Tell whether to save after this step: where it evaluates, and before it stops."""
        if self.ranks.count == 1:
            self.stopping = bool(self.signals)
        elif (step + 1) % LOG_EVERY == 0:  # all ranks stop behind the same step
            self.stopping = self.ranks.any_of(self.signals)
        return self.stopping or self.evaluates(step)

    # The log

    def log_loss(self, step, loss, **values):
        """Keep a step's figures, and write them every LOG_EVERY steps."""
        values["loss"] = loss.total.detach()
        values["answer"] = loss.answer.mean()
        values["rationale"] = loss.rationale.mean() if len(loss.rationale) else 0.0
        values["padding"] = 1 - loss.tokens / loss.padded
        self.log(step, tokens=loss.tokens, **values)
        if (step + 1) % LOG_EVERY == 0:
            self.flush()
            valid = f", valid {self.valid['accuracy']['mean']:.3f}" if self.valid else ""
            self.bar.set_postfix_str(f"loss {loss.total.item():.3f}{valid}")

    def log(self, step, **values):
        self.valid = values.get("valid", self.valid)
        self.pending.append({"step": step, **values})

    def flush(self):
        """Write the pending lines; this waits for the device. Raise BadInput where a loss is not
        finite.
        """
        for line in self.pending:
            for key, value in line.items():
                if torch.is_tensor(value):
                    line[key] = value.item()
            finite = math.isfinite(line.get("loss", 0.0)) and math.isfinite(line.get("norm", 0.0))
            place = f"{self.folder}: step {line['step']} of {self.args.purifier}"
            require(finite, f"{place}: the loss or its gradient is not finite; lower --lr")
            self.student_tokens += line.get("tokens", 0)
        if self.ranks.rank == 0:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.pending)
        self.pending.clear()

    # The checkpoint

    def save(self, step, student, optimizer, purifier, seconds):
        """Write everything that training changes and nothing can recompute, in one file.

        Random draws need no state, because they depend on seed and step alone. Neither does the
        ledger: fitting the purifier again asks for the same answers, which are in the cache by
        then.
        """
        self.flush()
        if self.ranks.rank != 0:
            return
        tensors = model.state_of(student=student, optimizer=optimizer)
        for name, value in purifier.state().items():
            tensors[f"purifier.{name}"] = value
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        log_bytes = self.metrics.stat().st_size
        counts = dict(student_tokens=self.student_tokens, log_bytes=log_bytes)
        progress = dict(step=step, seconds=seconds, **counts)
        with model.atomic(self.checkpoint) as temporary:
            save_file(tensors, temporary, {"progress": json.dumps(progress)})

    def restore(self, student, optimizer, purifier, seconds):
        """Go back to the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        tensors, metadata = model.read_tensors(self.checkpoint)
        progress = json.loads(metadata["progress"])
        model.restore_state(tensors, student=student, optimizer=optimizer)
        purifier.restore(model.part_of(tensors, "purifier"), progress["step"])
        seconds.update(progress["seconds"])
        self.first_step = progress["step"]
        self.student_tokens = progress["student_tokens"]
        if self.ranks.rank == 0:
            os.truncate(self.metrics, progress["log_bytes"])  # what came later comes again

    def finish(self, purifier, figures, seconds):
        """Write purified.jsonl and result.json, delete the checkpoint. Return the result."""
        self.flush()
        n_empty = 0
        true = []  # of the rationales whose truth is known, which are true
        with model.atomic(self.folder / "purified.jsonl") as temporary:
            with open(temporary, "w", encoding="utf-8") as file:
                for row in purifier.rows:
                    texts = purifier.given(row)
                    n_empty += texts.count("")
                    q = purifier.questions[row]
                    true += [text == q.truth for text in texts if q.truth]
                    line = dict(id=q.id, rationales=texts)
                    line["probabilities"] = purifier.probabilities(row)
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
            seconds={stage: round(value, 2) for stage, value in seconds.items()},
        )
        kept = purifier.kept()
        if kept:
            about = dict(purifier=self.args.purifier, teachers=purifier.teachers.names)
            about = {name: json.dumps(value) for name, value in about.items()}
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

    The whole batch has B rows, of which rank r trains on rows r, r + count, r + 2 count, ...
    """

    def __init__(self, device):
        self.rank = 0
        self.count = 1
        if "RANK" in os.environ:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self.rank = dist.get_rank()
            self.count = dist.get_world_size()

    def wait(self):
        """Wait for all ranks."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self):
        """Let rank 0 go through the block before the others: it makes what they only read."""
        if self.rank != 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def share(self, rows):
        """Return this rank's rows of the whole batch."""
        return rows[self.rank :: self.count]

    def wrap(self, student, compiles):
        """Return the student as the loss calls it: with gradients averaged over ranks, and
        perhaps compiled.
        """
        net = student
        if self.count > 1:
            net = torch.nn.parallel.DistributedDataParallel(student)
            net.config = student.config
        return torch.compile(net, dynamic=True) if compiles else net

    def any_of(self, flag):
        """Tell whether the flag is set on any rank."""
        flags = [None] * self.count
        dist.all_gather_object(flags, bool(flag))
        return any(flags)

    def gather(self, loss, rationales):
        """Return the kp.DualLoss of the whole batch, in its order; rationales are the whole
        batch's texts.
        """
        if self.count == 1:
            return loss
        parts = [None] * self.count
        on_cpu = dict(answer=loss.answer.cpu(), rationale=loss.rationale.cpu())
        own = loss._replace(total=loss.total.item(), **on_cpu)
        dist.all_gather_object(parts, tuple(own))
        totals, answers, explained, tokens, padded = zip(*parts)
        explained = [iter(losses) for losses in explained]  # each rank's, in the order of its rows
        rationale = []
        for row, texts in enumerate(rationales):
            rationale += [next(explained[row % self.count]) for _ in texts]
        answer = torch.stack(answers, 1).flatten()  # row i is of rank i % count
        total = torch.tensor(totals).mean()
        return kp.DualLoss(total, answer, torch.tensor(rationale), sum(tokens), sum(padded))


# -------------------------------------------------------------------------------- the closing table


def print_shares(shares):
    """Print {label: {task: share}} as a table, without what is empty."""
    width = max(map(len, shares))
    for label, row in shares.items():
        if row:
            print(f"  {label:<{width}}" + "".join(f"{task:>11}" for task in row))
            print(" " * (width + 2) + "".join(f"{share:>11.3f}" for share in row.values()))


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
    if result["empty_rationales"]:
        n = result["empty_rationales"]
        print(f"  {'note':<16} {n:,} empty rationales, from which nothing was learnt")
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in result["seconds"].items())
    print(f"  {'seconds':<16} {seconds}")


def main(args):
    torch.backends.cuda.matmul.allow_tf32 = True  # where a GPU computes in float32
    settle(args)
    result = train(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if result is None:  # on a rank other than 0
        return
    print_result(result)
    if args.data and args.student == "tiny":
        print("  note: a tiny student is near chance on real text; take --student DIR")
    print(f"  saved in {args.out}; look closer with: python eval.py {args.out} --show 5")


if __name__ == "__main__":
    with model.one_line_errors():
        main(ARGS)
