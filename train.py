"""Train a student by knowledge purification: read, ask the teachers, purify, train, evaluate, save.

    python train.py --purifier router                 # the micro world, from nothing, in minutes
    python train.py --purifier none                   # TinyLLM: all teachers' rationales, nothing purified
    python train.py --purifier router --data DIR --teachers DIR DIR DIR --student DIR      # your own
    torchrun --nproc_per_node=8 train.py ...                                               # on several GPUs

Reads top to bottom: arguments, the parts, the loop, the closing table. Writes out/RUN/: config.json (every
argument), metrics.jsonl (a line a step), result.json, and the student as a checkpoint folder, student/.
"""

import argparse
import os
import sys


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--purifier", default="router", help="router, plackett-luce, classifier, aggregate, rl; none (TinyLLM: all "
        "rationales), single, random, oracle (the best-scoring teacher of each question), answers (no rationale)")  # fmt: skip
    add("--seed", type=int, default=0, help="of everything random; a CPU run repeats to the bit")
    add("--out", metavar="DIR", help="folder of this run (default: out/PURIFIER-SEED)")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add("--overwrite", action="store_true", help="start an unfinished run anew")
    add = parser.add_argument_group("data and models (default: the micro world)").add_argument
    add("--world", type=int, default=0, metavar="N", help="seed of the micro world: its questions and its teachers")
    add("--data", metavar="DIR", help="folder with train.jsonl, valid.jsonl, test.jsonl")
    add("--teachers", metavar="DIR", nargs="+", help="their checkpoint folders (without --data: names of the micro world's)")
    add("--student", metavar="DIR", default="tiny", help="checkpoint folder of a T5, or tiny: the micro world's, or a new one")
    add("--encoder", metavar="DIR", help="sentence encoder of the routers, Bert or T5 (default: the first T5 teacher)")
    add("--scorer", metavar="DIR", help="LM that judges ready-made rationales, TinyLLM's layout (default: the new student)")
    add("--ood", action="store_true", help="train the student on the out-of-domain tasks; purifiers are fitted in domain")
    add("--cache", metavar="DIR", default="cache", help="what teachers said, kept for all runs")
    add = parser.add_argument_group("purification").add_argument
    add("--fit-questions", type=int, metavar="N", help="fit the router on N training questions (default: all)")
    add("--aggregator", metavar="DIR", help="instruction-tuned LM for aggregate (default: the T5 teacher, else the student)")
    add("--tune-aggregator", type=int, metavar="N", help="steps that teach it to (default: 800 in the micro world, else 0)")
    add("--teacher", type=int, metavar="K", default=0, help="which teacher --purifier single takes, from 0")
    add("--shots", type=int, metavar="N", help="examples in a teacher's prompt (default: 0 for the micro world, else 2)")
    add("--teacher-forcing", action="store_true", help="tell the teachers the answer, as TinyLLM does")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest rationale, in tokens")
    add = parser.add_argument_group("training").add_argument
    add("--lam", type=float, default=1.0, metavar="X", help="weight of the rationale loss, lambda")
    add("--alpha", type=float, metavar="X", help="weight of each rationale, alpha_m (default: lambda / their number)")
    add("--steps", type=int, default=600, metavar="N", help="optimiser steps")
    add("--batch-size", type=int, default=16, metavar="N", help="questions per step (and process, under torchrun)")
    add("--lr", type=float, metavar="X", help="peak learning rate (default: 3e-3 for tiny, else 3e-4)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW")
    add("--warmup", type=int, default=50, metavar="N", help="steps of linear warm-up, then cosine decay to zero")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient")
    add("--eval-every", type=int, default=200, metavar="N", help="steps between evaluations on valid, and checkpoints")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", default=None, choices=("float32", "bfloat16"), help="of the forward pass (default: bfloat16 on cuda)")
    add("--compile", action="store_true", help="torch.compile the student: minutes at the start, fewer at each step")
    args = parser.parse_args(argv)
    args.command = [a for a in (sys.argv[1:] if argv is None else argv) if a not in ("--resume", "--overwrite")]
    return args


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
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import kp
import model as models
from model import BadInput, require
from purify import PURIFIERS, World

# ------------------------------------------------------------------------------------------- the parts


def check(args):
    """Fill in what depends on other arguments; refuse what cannot work before anything is read or written."""
    require(args.purifier in PURIFIERS, f"--purifier {args.purifier}: unknown; take one of {', '.join(PURIFIERS)}")
    for name in ("steps", "batch_size", "eval_every", "max_new_tokens", "fit_questions"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: must be at least 1")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: no such device here; take cpu")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.out = args.out or f"out/{args.purifier}{'-ood' if args.ood else ''}-{args.seed}"
    args.lr = args.lr if args.lr is not None else (3e-3 if args.student == "tiny" else 3e-4)
    args.shots = args.shots if args.shots is not None else (2 if args.data else 0)
    if args.tune_aggregator is None:
        args.tune_aggregator = 0 if args.data or args.aggregator else 800
    args.log_agreement = args.data is None  # needs every teacher's scores, which are cheap only in the micro world


def read_world(args):
    """-> data {split: [Question]}; teacher folders, none where rationales are ready-made; folder of the T5 teacher or None."""
    folder, teachers, t5 = args.data, [Path(t) for t in args.teachers or ()], None
    if folder is None:
        from data.micro import prepare

        folder = prepare.prepare(args.world)
        for name in args.teachers or ():
            known = name in prepare.TEACHERS
            require(known, f"--teachers {name}: the micro world's are {', '.join(prepare.TEACHERS)}; others need --data")
        teachers = [folder / "teachers" / name for name in args.teachers or prepare.TEACHERS]
        t5 = folder / "teachers" / "t5"  # embeds questions, whoever teaches
    data = kp.read_data(folder)
    for split in ("train", "test"):
        require(not args.ood or f"ood/{split}" in data, f"--ood: {folder} has no ood/{split}.jsonl")
    return data, teachers, t5


def open_teachers(args, folders, data, scorer):
    """The checkpoints in `folders`, or without any the rationales that --data brings along, judged by `scorer`."""
    if folders:
        asking = kp.Asking(args.device, torch.bfloat16 if args.device == "cuda" else None, args.shots, args.max_new_tokens,
                           args.teacher_forcing, seed=args.seed)  # fmt: skip
        teachers = kp.Teachers(folders, args.cache, asking, data["train"])
    else:
        teachers = kp.ReadyMade(args.data, data["train"], scorer, args.max_new_tokens)
    ok = 0 <= args.teacher < len(teachers)
    require(ok, f"--teacher {args.teacher}: there are {len(teachers)} teachers, numbered from 0")
    return teachers


def load_student(args, t5, texts):
    """-> (T5, tokenizer): a checkpoint, or a new small one with the T5 teacher's tokenizer or one trained on `texts`."""
    if args.student != "tiny":
        student, tokenizer = models.load(args.student, args.device, torch.float32)
        kind = student.config["model_type"]
        require(kind == "t5", f"--student {args.student}: a student is a T5; this is a {kind}")
        return student, tokenizer
    if t5:
        config = models.read_config(t5)
        tokenizer = models.load_tokenizer(t5 / "tokenizer.json", config["vocab_size"])
        special = config["pad_token_id"], config["eos_token_id"]
    else:
        tokenizer, special = kp.train_tokenizer(texts), (0, 1)
    torch.manual_seed(args.seed)
    return kp.tiny_t5(tokenizer.get_vocab_size(), *special).to(args.device), tokenizer


def draw_visits(lengths, args, block=8):
    """visits[step]: rows of that step's batch. Every question comes once per epoch, in a new order each.

    Each `block` of batches is sorted by the questions' lengths: 5 % of the tokens are padding instead of 19 %.
    """
    order, visits, size = [], [], args.batch_size * kp.rank_and_ranks()[1]
    for epoch in range(-(-args.steps * size // len(lengths))):
        order += random.Random(f"{args.seed} {epoch}").sample(range(len(lengths)), len(lengths))
    for start in range(0, args.steps * size, block * size):
        rows = sorted(order[start : min(start + block * size, args.steps * size)], key=lambda row: lengths[row])
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        visits += random.Random(f"{args.seed} {start}").sample(batches, len(batches))
    return visits


def learning_rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


class Stopwatch(dict):
    """with seconds("train"): ... adds to seconds["train"]."""

    @contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        self[stage] = self.get(stage, 0.0) + time.perf_counter() - start


# ------------------------------------------------------------------------------- ranks, under torchrun


def join_ranks(args):
    """Under torchrun: one process a GPU (nccl), or on CPUs (gloo). -> (rank, ranks), (0, 1) without it."""
    if "RANK" in os.environ and not dist.is_initialized():
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return kp.rank_and_ranks()


@contextmanager
def rank_0_first():
    """Rank 0 goes through the block before the others: it makes what they only read."""
    rank, ranks = kp.rank_and_ranks()
    if rank:
        dist.barrier()
    yield
    if ranks > 1 and not rank:
        dist.barrier()


def over_ranks(x):
    """(n,) of each rank -> (n * ranks,) in the order of the whole batch, of which rank r has rows r, r + ranks, ..."""
    _, ranks = kp.rank_and_ranks()
    parts = [torch.empty_like(x) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(parts, x.contiguous())
    return torch.stack(parts, 1).flatten() if ranks > 1 else x


# ----------------------------------------------------------------------------------------- checkpoints


FORMAT = 1  # of a run's folder; another is refused, not misread


def open_folder(args):
    """The run's folder, locked: new, or cleared, or with --resume as it is. -> (folder, its checkpoint or None, lock)"""
    run, settings = Path(args.out), {"format": FORMAT, **vars(args)}
    del settings["resume"], settings["overwrite"]
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however this process ends
    except OSError:
        raise BadInput(f"{run}: another run is writing there; wait for its end or give another --out") from None
    before = models.read_json(run / "config.json") if (run / "config.json").exists() else {}
    if before and before.get("format") != FORMAT:
        raise BadInput(f"{run / 'config.json'}: format {before.get('format')!r}, this code writes {FORMAT}; give another --out")
    checkpoint, finished = run / "checkpoint.safetensors", (run / "result.json").exists()
    if before and args.resume:
        other = [k for k, v in settings.items() if k != "command" and before.get(k) != v]
        if other:
            raise BadInput(f"{run}: --resume with other arguments: --{', --'.join(other).replace('_', '-')}; give the same")
        if checkpoint.exists() or finished:
            return run, checkpoint, lock
    elif before and not finished and not args.overwrite:
        raise BadInput(f"{run}: holds an unfinished run; go on with --resume or start anew with --overwrite")
    for name in ("checkpoint.safetensors", "result.json", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)
    models.write_json(run / "config.json", settings)
    return run, None, lock


def save_checkpoint(path, student, optimizer, purifier, progress):
    """Everything that training changes, in one file. Random draws need no state: they depend on (seed, step) alone."""
    tensors = models.state_of(student=student, optimizer=optimizer)
    tensors |= {f"purifier.{k}": v for k, v in purifier.state().items()}
    with models.atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"progress": json.dumps(progress)})


def load_checkpoint(path, student, optimizer, purifier):
    """-> progress"""
    with safe_open(path, "pt") as f:
        progress, tensors = json.loads(f.metadata()["progress"]), {k: f.get_tensor(k) for k in f.keys()}
    models.restore_state(tensors, student=student, optimizer=optimizer)
    purifier.restore(models.part_of(tensors, "purifier"), progress["step"])
    return progress


# -------------------------------------------------------------------------------------------- the loop


def train(args):
    torch.backends.cuda.matmul.allow_tf32 = True  # where a GPU computes in float32
    (rank, ranks), seconds = join_ranks(args), Stopwatch()
    with seconds("set up"):
        with rank_0_first():
            data, teacher_folders, t5 = read_world(args)

        def lm(folder):
            """That checkpoint, or where none is given the T5 at hand: the T5 teacher, else the student as it starts."""
            if folder or t5:
                return models.load(folder or t5, args.device)
            return copy.deepcopy(student).eval(), tokenizer

        teachers = open_teachers(args, teacher_folders, data, lambda: lm(args.scorer))
        t5 = t5 or next((f for f in teachers.folders if models.read_config(f)["model_type"] == "t5"), None)
        student, tokenizer = load_student(args, t5, map(kp.explain_prompt, data["train"]))
        if args.encoder and not hasattr(lm(args.encoder)[0], "encode"):
            raise BadInput(f"--encoder {args.encoder}: not an encoder; take a Bert or a T5")
        optimizer = torch.optim.AdamW(
            student.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)  # fmt: skip
        questions, encode = data["ood/train" if args.ood else "train"], kp.Targets(tokenizer)
        visits = draw_visits([len(ids) for ids in encode([kp.explain_prompt(q) for q in questions])], args)
        with rank_0_first():
            run, checkpoint, lock = open_folder(args) if rank == 0 else (Path(args.out), None, None)  # noqa: F841 (held)
            if rank and (run / "checkpoint.safetensors").exists():
                checkpoint = run / "checkpoint.safetensors"
        if (run / "result.json").exists():
            return models.read_json(run / "result.json")  # --resume of a finished run

    with seconds("purify"):  # teachers are asked here, and only for what the purifier wants
        world = World(questions, visits, data["train"], teachers, lambda: lm(args.encoder), lambda: lm(args.aggregator))
        purifier = PURIFIERS[args.purifier](args).fit(world)

    done = dict(step=0, student_tokens=0, given={}, lines=0)  # what a checkpoint remembers besides the tensors
    if checkpoint:
        done = load_checkpoint(checkpoint, student, optimizer, purifier)
        seconds.update(done.pop("seconds"))
        teachers.ledger = type(teachers.ledger)(done.pop("ledger"))
        teachers.counted |= {tuple(key) for key in done.pop("counted")}
        if rank == 0:
            kept = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[: done["lines"]]
            with models.atomic(run / "metrics.jsonl") as temporary:
                temporary.write_bytes(b"".join(kept))
    net = student
    if ranks > 1:
        net = torch.nn.parallel.DistributedDataParallel(student)
        net.config = student.config
    if args.compile:
        net = torch.compile(net, dynamic=True)

    def keep(step):
        flush()
        progress = dict(done, step=step, seconds=seconds, ledger=dict(teachers.ledger), counted=list(teachers.counted))
        save_checkpoint(run / "checkpoint.safetensors", student, optimizer, purifier, progress)

    pending, stopped, valid = [], [], None
    metrics = open(run / "metrics.jsonl" if rank == 0 else os.devnull, "a", encoding="utf-8")

    def flush():  # the only place where the loop waits for the device
        for line in pending:
            metrics.write(json.dumps({k: float(v) if torch.is_tensor(v) else v for k, v in line.items()}) + "\n")
            if not math.isfinite(line.get("loss", 0.0)) or not math.isfinite(line.get("norm", 0.0)):
                raise BadInput(f"{run}: step {line['step']} of {args.purifier}: the loss or its gradient is not finite; lower --lr")
            done["student_tokens"] += int(line.get("tokens", 0))
        done["lines"] += len(pending)
        pending.clear()
        metrics.flush()

    for name in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, say how to go on
        signal.signal(name, lambda number, frame: stopped.append(number))
    bar = tqdm(range(done["step"], args.steps), f"train {args.purifier}", initial=done["step"], total=args.steps, unit="step")
    for step in bar:
        with seconds("train"):
            student.train()
            torch.manual_seed(args.seed * 1_000_003 + step)  # dropout depends on (seed, step) alone
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            rationales = purifier.rationales(step)
            batch, texts = [questions[row] for row in visits[step]][rank::ranks], rationales[rank::ranks]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss, answer_losses, rationale_losses, n_tokens, n_padded = kp.dual_loss(
                    net, encode, batch, texts, args.lam, args.alpha)  # fmt: skip
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            answer_losses, rationale_losses = over_ranks(answer_losses), over_ranks(rationale_losses)
            noted = purifier.feedback(step, answer_losses, rationale_losses)
            done["given"].update((str(row), texts) for row, texts in zip(visits[step], rationales))
            explained = rationale_losses.mean() if len(rationale_losses) else 0.0
            pending.append(dict(step=step, loss=over_ranks(loss.detach()[None]).mean(), answer=answer_losses.mean(),
                                rationale=explained, norm=norm, lr=learning_rate(step, args),
                                tokens=over_ranks(loss.new_tensor([n_tokens])).sum(),
                                padding=1 - n_tokens / n_padded, **noted))  # fmt: skip
            if step % 20 == 19:
                flush()
                bar.set_postfix_str(f"loss {loss.item():.3f}" + (f", valid {valid['mean']:.3f}" if valid else ""))
        if rank == 0 and (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            with seconds("evaluate"):
                valid = kp.accuracy(student, tokenizer, data["ood/valid" if args.ood and "ood/valid" in data else "valid"])
                pending.append({"step": step, "valid": valid})
            keep(step + 1)
        if stopped if ranks == 1 else step % 20 == 19 and over_ranks(loss.new_tensor([len(stopped)])).any():
            bar.close()
            if rank == 0:
                keep(step + 1)
                print(f"stopped after step {step + 1} and saved; go on with the same command and --resume", file=sys.stderr)
            sys.exit(128 + (stopped or [signal.SIGTERM])[0])
    if rank:
        return None

    with seconds("evaluate"):
        splits = {name: kp.accuracy(student, tokenizer, data[name]) for name in ("valid", "test", "ood/test") if name in data}
        pending.append({"step": args.steps, **splits})
    flush()
    with models.atomic(run / "purified.jsonl") as temporary:
        rows = [dict(id=questions[int(row)].id, rationales=texts, probabilities=purifier.chances(int(row)))
                for row, texts in done["given"].items()]  # fmt: skip
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    models.save(student, tokenizer, run / "student")
    result = dict(
        purifier=args.purifier, seed=args.seed, teachers=teachers.names, steps=args.steps, accuracy=splits["test"],
        ood=splits.get("ood/test", {}), valid=splits["valid"], teacher_tokens=teachers.ledger["rationale_wrote"],
        ledger=dict(teachers.ledger), student_tokens=done["student_tokens"],
        empty_rationales=sum(not text for texts in done["given"].values() for text in texts),
        seconds={k: round(v, 2) for k, v in seconds.items()})  # fmt: skip
    models.write_json(run / "result.json", result)
    (run / "checkpoint.safetensors").unlink(missing_ok=True)
    return result


# --------------------------------------------------------------------------------------- the closing table


def print_accuracies(accuracies):
    """{"test": {task: accuracy}, "ood/test": ...} for a person."""
    for split, accuracy in accuracies.items():
        print(f"  {'out of domain' if split == 'ood/test' else 'test accuracy':<16}" + "".join(f"{task:>11}" for task in accuracy))
        print(" " * 18 + "".join(f"{share:>11.3f}" for share in accuracy.values()))


def show(result):
    """What the run brought and what it cost, for a person."""
    print(f"\n{result['purifier']}, seed {result['seed']}, {len(result['teachers'])} teachers, {result['steps']} steps\n")
    print_accuracies({split: shares for split, shares in (("test", result["accuracy"]), ("ood/test", result["ood"])) if shares})
    print(f"  {'tokens':<16} teachers wrote {result['teacher_tokens']:,}, student trained on {result['student_tokens']:,}")
    if result["empty_rationales"]:
        print(f"  {'note':<16} {result['empty_rationales']:,} empty rationales, from which nothing was learnt")
    print(f"  {'seconds':<16} " + ", ".join(f"{stage} {s:.0f}" for stage, s in result["seconds"].items()))


def main(args):
    check(args)
    result = train(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    if result is None:  # a rank other than 0
        return
    show(result)
    if args.data and args.student == "tiny":
        print("  note: a tiny student starts from nothing, near chance on real text; take --student DIR, say of flan-t5-small")
    print(f"  saved in {args.out}; look closer with: python eval.py {args.out} --show 5")


if __name__ == "__main__":
    with models.one_line_errors():
        main(ARGS)
