"""This project beside `transformers`: the same work, weights and machine, in turns.

    python tests/bench.py    # 7 minutes on 2 CPU cores; for a GPU: tests/gpu.py

It needs transformers, which nothing else does. It prints a table of medians of paired runs, and
writes it with --out FILE as JSON. Ratio: transformers' seconds / ours, above 1 where we are faster.
"""

import argparse
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import kp  # noqa: E402
import model  # noqa: E402
from purify import PURIFIERS  # noqa: E402

T5_SMALL = dict(
    model_type="t5",
    vocab_size=32128,
    d_model=512,
    d_kv=64,
    d_ff=1024,
    num_layers=8,
    num_heads=6,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
LLAMA = dict(
    model_type="llama",
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    pad_token_id=0,
)


class Words:
    """A tokenizer for both: the numbers in a text are its tokens. Only what is called is there."""

    def encode(self, text, add_special_tokens=True):
        return argparse.Namespace(ids=[int(word) for word in text.split() if word.isdigit()])

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def save(self, path):
        Tokenizer(BPE()).save(path)

    def id_to_token(self, token):
        return str(token)


def text_of(ids):
    return " ".join(map(str, ids))


@dataclass
class Pair:
    """The same random weights in this project's class and in transformers'."""

    config: dict
    folder: Path  # the checkpoint that holds them
    ours: torch.nn.Module
    theirs: torch.nn.Module
    device: str
    rounds: int

    @property
    def kind(self):
        return self.config["model_type"]

    def is_t5(self):
        return self.kind == "t5"

    def tokens(self, rng, low, high):
        """Draw a list of `low` to `high` token ids."""
        vocab_size = self.config["vocab_size"]
        return [rng.randrange(10, vocab_size) for _ in range(rng.randint(low, high))]

    def compare(self, name, ours, theirs, n_tokens=None, rounds=None):
        """Run both in turn. Return {name, ours, theirs (median seconds), ratio, its range, speed}."""
        seconds = []
        for _ in range(1 + (rounds or self.rounds)):  # the first warms up
            seconds.append((self.seconds_of(ours), self.seconds_of(theirs)))
        a, b = map(statistics.median, zip(*seconds[1:]))
        ratios = sorted(y / x for x, y in seconds[1:])
        row = dict(name=name, ours=a, theirs=b, ratio=statistics.median(ratios))
        row["low"] = ratios[0]
        row["high"] = ratios[-1]
        row["tokens_per_second"] = n_tokens / a if n_tokens else None
        spread = f"x{row['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed = f"{n_tokens / a:>10,.0f} tok/s" if n_tokens else ""
        tqdm.write(f"{name:<44}{a * 1e3:>9.0f} ms{b * 1e3:>9.0f} ms   {spread}{speed}")
        return row

    def seconds_of(self, run):
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def their_class(config):
    import transformers

    if config["model_type"] == "t5":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def make_pair(config, folder, rounds):
    torch.manual_seed(0)
    ours = model.ARCHITECTURES[config["model_type"]][0](config)
    model.save(ours, Words(), folder)
    theirs = their_class(config).from_pretrained(folder, dtype=torch.float32)
    return Pair(config, folder, ours.eval(), theirs.eval(), "cpu", rounds)


# ---------------------------------------------------------------------------------------- what is timed


def training(pair, batch, source, target):
    """(a) One step: forward and backward of L_PR and L_DL, clipping, AdamW."""
    rng = random.Random(0)
    prompts = [pair.tokens(rng, source // 2, source) for _ in range(batch)]
    answers = [pair.tokens(rng, 2, 5) for _ in range(batch)]
    texts = [pair.tokens(rng, target // 2, target) for _ in range(batch)]

    def our_losses():
        l_pr = kp.sequence_losses(pair.ours, prompts, answers).mean()
        return l_pr + kp.sequence_losses(pair.ours, prompts, texts).mean()

    def their_losses():
        total = 0.0
        for targets in (answers, texts):
            rows = prompts
            labels = targets
            if not pair.is_t5():  # prompt and target in one row, the loss on the target alone
                rows = [prompt + target for prompt, target in zip(prompts, targets)]
                labels = [[-100] * len(prompt) + target for prompt, target in zip(prompts, targets)]
            ids, mask = model.pad(rows)
            labels, _ = model.pad(labels, value=-100)
            tensors = dict(input_ids=ids, attention_mask=mask, labels=labels)
            total = total + pair.theirs(**{k: x.to(pair.device) for k, x in tensors.items()}).loss
        return total

    def step_of(lm, losses):
        optimizer = torch.optim.AdamW(lm.parameters(), 1e-4, fused=True)
        lm.train()

        def step():
            losses().backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    n_tokens = 2 * sum(map(len, prompts)) + sum(map(len, answers + texts))
    name = f"training step of {pair.kind}, {source} -> {target}, batch {batch}"
    our_step = step_of(pair.ours, our_losses)
    their_step = step_of(pair.theirs, their_losses)
    row = pair.compare(name, our_step, their_step, n_tokens)
    pair.ours.eval()
    pair.theirs.eval()
    return row


def generation(pair, batch, n_new, ends=None):
    """(b) Greedy, uneven prompts, rows that end at different times: every 12th token ends a row."""
    rng = random.Random(batch)
    ids, mask = model.pad([pair.tokens(rng, 20, 100) for _ in range(batch)])
    if not pair.is_t5():  # transformers wants decoder-only prompts padded on the left
        ids = ids.flip(1)
        mask = mask.flip(1)
    ids = ids.to(pair.device)
    mask = mask.to(pair.device)
    if ends is None:
        ends = list(range(1, pair.config["vocab_size"], 12))
    pair.ours.config["eos_token_id"] = ends
    pair.theirs.generation_config.eos_token_id = ends or None
    pair.theirs.generation_config.pad_token_id = 0

    def our_run():
        return pair.ours.generate(ids, mask, n_new)

    @torch.no_grad()
    def their_run():
        how = dict(max_new_tokens=n_new, do_sample=False)
        pair.theirs.generate(input_ids=ids, attention_mask=mask, **how)

    n_tokens = sum(len(model.until_end(row, ends)) for row in our_run().tolist())
    return pair.compare(f"{pair.kind} generates {n_new}, batch {batch}", our_run, their_run, n_tokens)


def their_logits(pair, rows, **labels):
    ids, mask = model.pad(rows)
    return pair.theirs(input_ids=ids.to(pair.device), attention_mask=mask.to(pair.device), **labels).logits


def scoring(pair, n=8):
    """(c) log p of four choices of n questions; transformers reads prompt and choice together."""
    rng = random.Random(0)
    prompts = [pair.tokens(rng, 60, 120) for _ in range(n)]
    choices = []
    for _ in range(n):
        choices.append([pair.tokens(rng, 1, 5) for _ in range(4)])
    prompt_texts = [text_of(prompt) for prompt in prompts]
    choice_texts = [list(map(text_of, own)) for own in choices]

    @torch.no_grad()
    def their_run():
        repeated = []
        flat = []
        for prompt, own in zip(prompts, choices):
            repeated += [prompt] * len(own)
            flat += own
        if pair.is_t5():
            labels = model.pad(flat)[0].to(pair.device)
            logits = their_logits(pair, repeated, labels=labels)
        else:
            rows = [prompt + choice for prompt, choice in zip(repeated, flat)]
            labels = model.pad(rows)[0][:, 1:].to(pair.device)
            logits = their_logits(pair, rows)[:, :-1]
        logits.float().log_softmax(-1).gather(2, labels[..., None]).sum()

    def our_run():
        kp.choice_logps(pair.ours, kp.TokenCache(Words(), kp.NO_LIMIT), prompt_texts, choice_texts)

    name = f"{pair.kind} scores the choices of {n} questions"
    return pair.compare(name, our_run, their_run, sum(map(len, prompts)))


def loading(pair):
    """(d) From disk to a model whose weights were used once: until then they may be on the disk still."""
    theirs = their_class(pair.config)

    def use(lm):
        for p in lm.parameters():
            p.sum()

    def our_run():
        use(model.load(pair.folder, pair.device)[0])

    def their_run():
        use(theirs.from_pretrained(pair.folder, dtype=torch.float32).to(pair.device))

    return pair.compare(f"{pair.kind} is loaded", our_run, their_run)


class Said:
    """M teachers whose rationales are at hand, so that a student's step is all that is timed."""

    def __init__(self, texts):
        self.texts = texts  # of each question, M

    def __len__(self):
        return len(self.texts[0])

    def rationales(self, questions, picks):
        return [self.texts[int(q.id)][m] for q, m in zip(questions, picks)]

    def all_rationales(self, questions):
        return [self.texts[int(q.id)] for q in questions]


def teachers(pair, batch=2):
    """(f) A student's step beside M teachers: TinyLLM on all M rationales, purified on one."""
    rng = random.Random(0)
    token_cache = kp.TokenCache(Words())
    questions = []
    said = []
    for i in range(batch):
        text = text_of(pair.tokens(rng, 30, 60))
        choices = (text_of(pair.tokens(rng, 2, 4)), text_of(pair.tokens(rng, 2, 4)))
        questions.append(kp.Question(str(i), "t", text, choices, 0))
    for _ in questions:
        said.append([text_of(pair.tokens(rng, 20, 40)) for _ in range(8)])

    def step_of(name, m):
        args = argparse.Namespace(seed=0)
        first = Said([texts[:m] for texts in said])
        purifier = PURIFIERS[name](args, questions, [range(batch)], questions, first, open_lm=None)
        purifier.fit()

        def step():
            loss = kp.dual_loss(pair.ours, token_cache, questions, purifier.rationales(0), 1.0)
            loss.total.backward()
            pair.ours.zero_grad(set_to_none=True)

        return step

    pair.ours.train()
    rows = []
    for m in (1, 2, 4, 8):
        name = f"student step, M = {m}: purified | TinyLLM"
        rows.append(pair.compare(name, step_of("random", m), step_of("none", m)))
    name = "purified step: M = 1 | M = 8"
    rows.append(pair.compare(name, step_of("random", 1), step_of("random", 8), rounds=4 * pair.rounds))
    pair.ours.eval()
    return rows


# ------------------------------------------------------------------------------------- what it comes to


def hours(rows):
    """Print how teacher and student hours grow, by this machine's tokens/s.

    A rationale: 300 tokens read, 128 written.
    """
    speed = {row["name"]: row["tokens_per_second"] for row in rows}
    write = speed["llama generates 64, batch 32"]
    read = speed["llama scores the choices of 8 questions"]
    train = next(value for name, value in speed.items() if name.startswith("training"))
    shapes = "teachers of the Llama shape, 3 epochs of the T5 shape"
    print(f"\nhours, arithmetic from the tokens/s above: {shapes}")
    print(" questions  teachers  processes  teachers: TinyLLM   router  student: TinyLLM   router")
    sizes = [(1e4, 4, 1), (1e4, 8, 1), (1e5, 4, 1), (1e5, 4, 8), (1e5, 8, 8), (1e6, 8, 64)]
    for n, m, processes in sizes:
        one = n * (300 / read + 128 / write) / 3600 / processes  # a rationale of each question
        scores = m * n * 300 / read / 3600 / processes
        student = 3 * n * (2 * 150 + 130) / train / 3600 / processes
        of_all = student * (150 + m * 280) / 430
        teachers = f"{m * one:>19,.1f}{scores + one:>9,.1f}"
        print(f"{n:>10,.0f}{m:>10}{processes:>11}{teachers}{of_all:>18,.1f}{student:>9,.1f}")


def main():
    summary = __doc__.split("\n\n")[0]
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=summary, formatter_class=show_defaults)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each")
    parser.add_argument("--out", metavar="FILE", help="write the table as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chip = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{chip}, torch {torch.__version__}, float32\n{'':<44}{'ours':>12}{'transformers':>13}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for config in (T5_SMALL, LLAMA, dict(LLAMA, model_type="mistral", sliding_window=64)):
            pair = make_pair(config, Path(folder), args.rounds)
            for batch in (1, 8, 32):
                rows.append(generation(pair, batch, 64))
            rows.append(scoring(pair))
            rows.append(loading(pair))
            if pair.kind != "mistral":
                rows.append(training(pair, 8, 128, 64))  # last, because it changes the weights
            if pair.is_t5():
                rows += teachers(pair)
    hours(rows)
    if args.out:
        model.write_json(args.out, dict(chip=chip, torch=torch.__version__, dtype="torch.float32", rows=rows))


if __name__ == "__main__":
    main()
