"""Train a student by knowledge purification: read, ask the teachers, purify, train, evaluate, save.

    python train.py --purifier router                 # the micro world, from nothing, in minutes
    python train.py --purifier none                   # TinyLLM: all teachers' rationales, nothing purified
    python train.py --purifier router --data DIR --teachers DIR DIR DIR --student DIR      # your own

Reads top to bottom: arguments, the parts, the loop, the closing table. Writes out/RUN/: config.json (every
argument), metrics.jsonl (a line a step), result.json, and the student as a checkpoint folder, student/.
"""

import argparse
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
    add("--data", metavar="DIR", help="folder with train.jsonl, valid.jsonl, test.jsonl")
    add("--teachers", metavar="DIR", nargs="+", help="checkpoint folders of the teachers")
    add("--student", metavar="DIR", default="tiny", help="checkpoint folder of a T5, or tiny: a new small one")
    add("--encoder", metavar="DIR", help="sentence encoder of the routers, Bert or T5 (default: the first T5 teacher)")
    add("--cache", metavar="DIR", default="cache", help="what teachers said, kept for all runs")
    add = parser.add_argument_group("purification").add_argument
    add("--fit-questions", type=int, metavar="N", help="fit the router on N training questions (default: all)")
    add("--aggregator", metavar="DIR", help="instruction-tuned T5 for aggregate (default: the T5 teacher, tuned first)")
    add("--teacher", type=int, metavar="K", default=0, help="which teacher --purifier single takes, from 0")
    add("--shots", type=int, metavar="N", help="examples in a teacher's prompt (default: 0 for the micro world, else 2)")
    add("--teacher-forcing", action="store_true", help="tell the teachers the answer, as TinyLLM does")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest rationale, in tokens")
    add = parser.add_argument_group("training").add_argument
    add("--lam", type=float, default=1.0, metavar="X", help="weight of the rationale loss, lambda")
    add("--steps", type=int, default=600, metavar="N", help="optimiser steps")
    add("--batch-size", type=int, default=16, metavar="N", help="questions per step")
    add("--lr", type=float, metavar="X", help="peak learning rate (default: 3e-3 for tiny, else 3e-4)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW")
    add("--warmup", type=int, default=50, metavar="N", help="steps of linear warm-up, then cosine decay to zero")
    add("--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient")
    add("--eval-every", type=int, default=200, metavar="N", help="steps between evaluations on valid, and checkpoints")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", default=None, choices=("float32", "bfloat16"), help="of the forward pass (default: bfloat16 on cuda)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help answers at once

import json
import math
import random
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import kp
import model as models
from kp import BadInput
from purify import PURIFIERS, World

# ------------------------------------------------------------------------------------------- the parts


def set_up(args):
    """Arguments -> (data {split: [Question]}, teacher folders). Without --data this is the micro world."""
    if args.purifier not in PURIFIERS:
        raise BadInput(f"--purifier {args.purifier}: unknown; take one of {', '.join(PURIFIERS)}")
    for name in ("steps", "batch_size", "eval_every", "max_new_tokens", "fit_questions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    folder, teachers = args.data, args.teachers
    if folder is None and teachers is None:
        from data.micro import prepare

        folder = prepare.prepare()
        teachers = [folder / "teachers" / name for name in prepare.TEACHERS]
    elif folder is None or teachers is None:
        raise BadInput("--data and --teachers go together: give both, or neither for the micro world")
    if not 0 <= args.teacher < len(teachers):
        raise BadInput(f"--teacher {args.teacher}: there are {len(teachers)} teachers, numbered from 0")
    return kp.read_data(folder), teachers


def make_student(args, encoder_folder):
    """-> (T5, tokenizer): a checkpoint, or a new tiny one with the T5 teacher's tokenizer."""
    if args.student != "tiny":
        student, tokenizer = models.load(args.student, args.device, torch.float32)
        if not isinstance(student, models.T5):
            raise BadInput(f"--student {args.student}: a student is a T5; this is a {student.config['model_type']}")
        return student, tokenizer
    config = models.read_json(encoder_folder / "config.json")
    tokenizer = models.load_tokenizer(encoder_folder / "tokenizer.json", config["vocab_size"])
    torch.manual_seed(args.seed)
    return kp.tiny_t5(tokenizer.get_vocab_size(), config["pad_token_id"], config["eos_token_id"]).to(args.device), tokenizer


def draw_visits(n_questions, batch_size, steps, seed):
    """visits[step]: rows of that step's batch; every question once per epoch, in a new order each."""
    visits, order = [], []
    for epoch in range(-(-steps * batch_size // n_questions)):
        rows = list(range(n_questions))
        random.Random(f"{seed} {epoch}").shuffle(rows)
        order += rows
    return [order[s * batch_size : (s + 1) * batch_size] for s in range(steps)]


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


# -------------------------------------------------------------------------------------------- the loop


def train(args):
    seconds = Stopwatch()
    with seconds("set up"):
        data, teacher_folders = set_up(args)
        teachers = kp.Teachers(
            teacher_folders, args.cache, args.device, torch.bfloat16 if args.device == "cuda" else None,
            shots=args.shots, max_new_tokens=args.max_new_tokens, tell_answer=args.teacher_forcing, seed=args.seed)  # fmt: skip
        t5s = [f for f in teachers.folders if models.read_json(f / "config.json").get("model_type") == "t5"]
        encoder_folder = Path(args.encoder) if args.encoder else t5s[0] if t5s else None
        if encoder_folder is None:
            raise BadInput("no T5 among the teachers to embed questions with; give --encoder DIR")
        student, tokenizer = make_student(args, encoder_folder)
        encode = kp.Targets(tokenizer)
        optimizer = torch.optim.AdamW(
            student.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)  # fmt: skip
        visits = draw_visits(len(data["train"]), args.batch_size, args.steps, args.seed)

    def embed(questions):
        encoder, encoder_tokenizer = models.load(encoder_folder, args.device)
        return models.embed(encoder, encoder_tokenizer, [kp.ask(q) for q in questions])

    run = Path(args.out)
    run.mkdir(parents=True, exist_ok=True)
    models.write_json(run / "config.json", vars(args))
    metrics = open(run / "metrics.jsonl", "w")

    with seconds("purify"):  # teachers are asked here, and only for what the purifier wants
        world = World(data["train"], visits, teachers, embed, t5s[0] if t5s else None, args)
        purifier = PURIFIERS[args.purifier](args).fit(world)

    bar = tqdm(range(args.steps), desc=f"train {args.purifier}", unit="step")
    student_tokens, valid, lines = 0, None, []
    for step in bar:
        with seconds("train"):
            student.train()
            torch.manual_seed(args.seed * 1_000_003 + step)  # dropout depends on (seed, step) alone
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            questions = [data["train"][row] for row in visits[step]]
            rationales = purifier.rationales(step)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss, answer_losses, rationale_losses, n_tokens = kp.dual_loss(
                    student, encode, questions, rationales, args.lam)  # fmt: skip
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            noted = purifier.feedback(step, answer_losses, rationale_losses)
            student_tokens += n_tokens
            lines.append(dict(step=step, loss=loss.detach(), answer=answer_losses.mean(),
                              rationale=rationale_losses.mean() if len(rationale_losses) else 0.0,
                              norm=norm, lr=learning_rate(step, args), tokens=n_tokens, **noted))  # fmt: skip
            if step % 20 == 19 or step + 1 == args.steps:  # the only place where the loop waits for the device
                for line in lines:
                    metrics.write(json.dumps({k: float(v) if torch.is_tensor(v) else v for k, v in line.items()}) + "\n")
                bar.set_postfix_str(f"loss {float(loss):.3f}" + (f", valid {valid['mean']:.3f}" if valid else ""))
                lines = []
        if (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            with seconds("evaluate"):
                valid = kp.accuracy(student, tokenizer, data["valid"])
                metrics.write(json.dumps({"step": step, "valid": valid}) + "\n")

    with seconds("evaluate"):
        valid, accuracy = (kp.accuracy(student, tokenizer, data[split]) for split in ("valid", "test"))
        ood = kp.accuracy(student, tokenizer, data["ood/test"]) if "ood/test" in data else {}
        metrics.write(json.dumps({"step": args.steps, "valid": valid, "test": accuracy, "ood": ood}) + "\n")
    models.save(student.cpu(), tokenizer, run / "student")
    result = dict(
        purifier=args.purifier, seed=args.seed, teachers=teachers.names, steps=args.steps, accuracy=accuracy, ood=ood,
        valid=valid, teacher_tokens=teachers.ledger["rationale_wrote"], ledger=dict(teachers.ledger),
        student_tokens=student_tokens, seconds={k: round(v, 2) for k, v in seconds.items()})  # fmt: skip
    models.write_json(run / "result.json", result)
    return result


# --------------------------------------------------------------------------------------- the closing table


def show(result):
    """What the run brought and what it cost, for a person."""
    print(f"\n{result['purifier']}, seed {result['seed']}, {len(result['teachers'])} teachers, {result['steps']} steps\n")
    for title, accuracy in (("test accuracy", result["accuracy"]), ("out of domain", result["ood"])):
        if accuracy:
            print(f"  {title:<16}" + "".join(f"{task:>11}" for task in accuracy))
            print(" " * 18 + "".join(f"{share:>11.3f}" for share in accuracy.values()))
    print(f"  {'tokens':<16} teachers wrote {result['teacher_tokens']:,}, student trained on {result['student_tokens']:,}")
    print(f"  {'seconds':<16} " + ", ".join(f"{stage} {s:.0f}" for stage, s in result["seconds"].items()))


def main(args):
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.out = args.out or f"out/{args.purifier}-{args.seed}"
    args.lr = args.lr or (3e-3 if args.student == "tiny" else 3e-4)
    args.log_agreement = args.teachers is None
    args.shots = args.shots if args.shots is not None else (2 if args.teachers else 0)
    show(train(args))
    print(f"  saved in {args.out}; look closer with: python eval.py {args.out}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
