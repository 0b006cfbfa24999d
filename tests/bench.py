"""This project beside `transformers`: the same work, weights and machine, taking turns. Medians of paired runs.

    python tests/bench.py                        # 7 minutes on 2 CPU cores; needs transformers, which nothing else does
    python tests/bench.py --device cuda --large  # FLAN-T5-large's and an 8B Llama's shapes, bfloat16

Prints a table and writes it with --out FILE as JSON. Ratio: transformers' seconds / ours, above 1 where we are faster.
"""

import argparse
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import kp  # noqa: E402
import model as models  # noqa: E402
from purify import PURIFIERS, World  # noqa: E402

T5_SMALL = dict(model_type="t5", vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
T5_LARGE = {**T5_SMALL, "d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
LLAMA = dict(model_type="llama", vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
             num_attention_heads=8, num_key_value_heads=4, pad_token_id=0)  # fmt: skip
LLAMA_8B = {**LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0}  # fmt: skip


class Words:
    """A tokenizer for both: a text of numbers is those tokens. Only what the functions under test call."""

    def encode(self, text, add_special_tokens=True):
        return argparse.Namespace(ids=[int(word) for word in text.split()])

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def save(self, path):
        models.Tokenizer(kp.BPE()).save(path)

    def id_to_token(self, i):
        return str(i)


def both(config, folder, device, dtype):
    """The same random weights in this project's class and in transformers'."""
    import transformers

    torch.manual_seed(0)
    ours = models.ARCHITECTURES[config["model_type"]][0](config)
    models.save(ours, Words(), folder)
    kind = transformers.AutoModelForSeq2SeqLM if config["model_type"] == "t5" else transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(folder, dtype=dtype)
    return ours.to(device, dtype).eval(), theirs.to(device).eval()


def paired(name, ours, theirs, device, rounds, tokens=None):
    """Run both in turn -> {name, ours, theirs (median seconds), ratio, its range over the rounds}"""
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        pair = []
        for run in (ours, theirs):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    a, b = (statistics.median(column) for column in zip(*seconds[1:]))
    ratios = sorted(y / x for x, y in seconds[1:])
    row = dict(name=name, ours=a, theirs=b, ratio=statistics.median(ratios), low=ratios[0], high=ratios[-1])
    row["tokens_per_second"] = tokens / a if tokens else None
    speed = f"{tokens / a:>10,.0f} tok/s" if tokens else ""
    tqdm.write(f"{name:<44}{a * 1e3:>9.0f} ms{b * 1e3:>9.0f} ms   x{row['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}){speed}")
    return row


def draw(rng, low, high, vocabulary):
    return [rng.randrange(10, vocabulary) for _ in range(rng.randint(low, high))]


def training(config, ours, theirs, device, rounds, batch, source, target):
    """(a) One step: forward and backward of L_PR and L_DL, clipping, AdamW."""
    rng, V = random.Random(0), config["vocab_size"]
    prompts = [draw(rng, source // 2, source, V) for _ in range(batch)]
    answers, texts = [draw(rng, 2, 5, V) for _ in range(batch)], [draw(rng, target // 2, target, V) for _ in range(batch)]
    optimizers = [torch.optim.AdamW(net.parameters(), 1e-4, fused=True) for net in (ours, theirs)]
    ours.train(), theirs.train()

    def step(net, optimizer, losses):
        losses().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def our_losses():
        return kp.sequence_losses(ours, prompts, answers).mean() + kp.sequence_losses(ours, prompts, texts).mean()

    def their_losses():
        ids, mask = (x.to(device) for x in models.pad(prompts))
        labels = [models.pad(rows, value=-100)[0].to(device) for rows in (answers, texts)]
        return sum(theirs(input_ids=ids, attention_mask=mask, labels=rows).loss for rows in labels)

    tokens = 2 * sum(map(len, prompts)) + sum(map(len, answers + texts))
    row = paired(f"training step, {source} -> {target}, batch {batch}", lambda: step(ours, optimizers[0], our_losses),
                 lambda: step(theirs, optimizers[1], their_losses), device, rounds, tokens)  # fmt: skip
    ours.eval(), theirs.eval()
    return row


def generation(config, ours, theirs, device, rounds, batch, n_new):
    """(b) Greedy, uneven prompts, rows that end at different times: every 12th token ends a row."""
    rng, V = random.Random(batch), config["vocab_size"]
    ids, mask = models.pad([draw(rng, 20, 100, V) for _ in range(batch)])
    if config["model_type"] != "t5":
        ids, mask = ids.flip(1), mask.flip(1)  # transformers wants decoder-only prompts padded on the left
    ids, mask, ends = ids.to(device), mask.to(device), list(range(1, V, 12))
    ours.config["eos_token_id"] = theirs.generation_config.eos_token_id = ends
    theirs.generation_config.pad_token_id = 0
    length = []

    def our_run():
        is_end = torch.isin(ours.generate(ids, mask, n_new), torch.tensor(ends, device=device))
        length[:] = ((is_end.cumsum(1) - is_end.long()) == 0).sum(1).tolist()  # tokens up to the first end

    def their_run():
        with torch.no_grad():
            theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False)

    our_run()
    return paired(f"{config['model_type']} generates {n_new}, batch {batch}", our_run, their_run, device, rounds, sum(length))


def scoring(config, ours, theirs, device, rounds, n=8):
    """(c) log p of four choices of n questions; transformers reads prompt and choice together, as people do."""
    rng, V = random.Random(0), config["vocab_size"]
    prompts = [draw(rng, 60, 120, V) for _ in range(n)]
    choices = [[draw(rng, 1, 5, V) for _ in range(4)] for _ in range(n)]
    text = lambda ids: " ".join(map(str, ids))  # noqa: E731
    texts, options = [text(p) for p in prompts], [[text(c) for c in cs] for cs in choices]

    @torch.no_grad()
    def their_run():
        flat = [(p, c) for p, cs in zip(prompts, choices) for c in cs]
        if config["model_type"] == "t5":
            (ids, mask), (labels, _) = models.pad([p for p, _ in flat]), models.pad([c for _, c in flat])
            logits = theirs(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).logits
        else:
            ids, mask = models.pad([p + c for p, c in flat])
            logits, labels = theirs(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1], ids[:, 1:]
        logits.float().log_softmax(-1).gather(2, labels.to(device)[..., None]).sum()

    def our_run():
        kp.choice_logps(ours, Words(), texts, options)

    tokens = sum(map(len, prompts))
    return paired(f"{config['model_type']} scores the choices of {n} questions", our_run, their_run, device, rounds, tokens)


def loading(config, folder, device, rounds):
    """(d) From disk to a model that is ready to run."""
    import transformers

    kind = transformers.AutoModelForSeq2SeqLM if config["model_type"] == "t5" else transformers.AutoModelForCausalLM
    return paired(f"{config['model_type']} is loaded", lambda: models.load(folder, device),
                  lambda: kind.from_pretrained(folder, dtype=torch.float32).to(device), device, rounds)  # fmt: skip


class Said:
    """M teachers whose rationales are at hand, so that a student's step is all that is timed."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts[0])

    def rationales(self, questions, picks):
        return [self.texts[int(q.id)][m] for q, m in zip(questions, picks)]


def teachers(config, ours, device, rounds, batch=2):
    """(f) A student's step beside M teachers: TinyLLM on all M rationales, purified on one, whatever M is."""
    rng, V, rows = random.Random(0), config["vocab_size"], []
    encode = lambda texts: [[int(word) for word in text.split() if word.isdigit()] for text in texts]  # noqa: E731
    text = lambda low, high: " ".join(map(str, draw(rng, low, high, V)))  # noqa: E731
    questions = [kp.Question(str(i), "t", text(30, 60), (text(2, 4), text(2, 4)), 0) for i in range(batch)]
    said = [[text(20, 40) for _ in range(8)] for _ in questions]

    def step_of(name, m):
        world = World(questions, [range(batch)], questions, Said([texts[:m] for texts in said]), None, None)
        purifier = PURIFIERS[name](argparse.Namespace(seed=0)).fit(world)

        def step():
            kp.dual_loss(ours, encode, questions, purifier.rationales(0), 1.0)[0].backward()
            ours.zero_grad(set_to_none=True)

        return step

    ours.train()
    for m in (1, 2, 4, 8):
        rows.append(paired(f"student step, M = {m}: purified | TinyLLM", step_of("random", m), step_of("none", m), device, rounds))
    rows.append(paired("purified step: M = 1 | M = 8", step_of("random", 1), step_of("random", 8), device, 4 * rounds))
    ours.eval()
    return rows


def hours(rows):
    """How teacher and student hours grow, by this machine's tokens/s: 300 tokens read and 128 written a rationale."""
    speed = {row["name"]: row["tokens_per_second"] for row in rows if row["tokens_per_second"]}
    write = next(v for k, v in speed.items() if k.startswith("llama generates") and k.endswith("batch 32"))
    read = next(v for k, v in speed.items() if k.startswith("llama scores"))
    train = next(v for k, v in speed.items() if k.startswith("training"))
    print("\nhours, arithmetic from the tokens/s above: teachers of the Llama shape, 3 epochs of the T5 shape")
    print(" questions  teachers  processes  teachers: TinyLLM   router  student: TinyLLM   router")
    for n, m, g in ((1e4, 4, 1), (1e4, 8, 1), (1e5, 4, 1), (1e5, 4, 8), (1e5, 8, 8), (1e6, 8, 64)):
        one, score, student = n * (300 / read + 128 / write) / 3600, n * 300 / read / 3600, 3 * n * (2 * 150 + 130) / train / 3600
        row = m * one, m * score + one, student * (150 + m * 280) / 430, student
        print(f"{n:>10,.0f}{m:>10}{g:>11}{row[0] / g:>19,.1f}{row[1] / g:>9,.1f}{row[2] / g:>18,.1f}{row[3] / g:>9,.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="FLAN-T5-large and Llama-3.1-8B shapes in bfloat16, for a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each")
    parser.add_argument("--out", metavar="FILE", help="write the table as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.large else torch.float32
    t5, llama = (T5_LARGE, LLAMA_8B) if args.large else (T5_SMALL, LLAMA)
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{chip}, torch {torch.__version__}, {dtype}\n{'':<44}{'ours':>12}{'transformers':>13}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for config in (t5, llama, {**llama, "model_type": "mistral", "sliding_window": 64}):
            ours, theirs = both(config, Path(folder), args.device, dtype)
            common = config, ours, theirs, args.device, args.rounds
            rows += [generation(*common, batch, 64) for batch in (1, 8, 32)]
            rows.append(scoring(*common))
            rows.append(loading(config, folder, args.device, args.rounds))
            if config is t5:  # last, for it changes the weights
                rows.append(training(*common, *((32, 512, 128) if args.large else (8, 128, 64))))
                rows += teachers(config, ours, args.device, args.rounds)
            if args.large:
                report_limits(config, rows, sum(p.numel() for p in ours.parameters()))
    hours(rows)
    if args.out:
        models.write_json(args.out, dict(chip=chip, torch=torch.__version__, dtype=str(dtype), rows=rows))


def report_limits(config, rows, n_parameters):
    """(e) Against the chip: model FLOPs of training, bytes of weights moved by one-row generation."""
    peak, bandwidth = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.04e12)}.get(
        next((name for name in ("H100", "H200", "A100") if name in torch.cuda.get_device_name()), ""), (None, None))  # fmt: skip
    speed = {row["name"]: row["tokens_per_second"] for row in rows}
    if peak and config["model_type"] == "t5":
        step = next(v for k, v in speed.items() if k.startswith("training"))
        print(f"training: {6 * n_parameters / 2 * step / peak:.0%} of peak FLOPs (each token passes half of the parameters)")
    elif bandwidth:
        one = speed[f"{config['model_type']} generates 64, batch 1"]
        print(f"generation: {2 * n_parameters * one / bandwidth:.0%} of peak bandwidth")


if __name__ == "__main__":
    main()
