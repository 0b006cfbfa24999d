"""Everything that wants a GPU, measured in one go: real shapes, random weights. No test: run it.

    python tests/gpu.py                        # minutes of an H100; writes tests/gpu.json
    python tests/gpu.py --only decode prefill  # these sections alone; the others in the file stay
    python tests/gpu.py --tiny --out FILE      # the same code with tiny shapes, on a CPU too

The file is written anew after each section, so a run that is cut keeps what it has. A section that fails
leaves its error there beside what it found before, and the others go on. Beside transformers where it is installed.
"""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from bench import LLAMA, T5_SMALL, Pair, Words, generation, scoring, text_of, their_class, training
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import kp  # noqa: E402
import model  # noqa: E402

T5_LARGE = {**T5_SMALL, "d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
LLAMA_8B = dict(
    LLAMA,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
)
MISTRAL_7B = dict(LLAMA_8B, model_type="mistral", vocab_size=32000, rope_theta=1e4, sliding_window=4096)
LLAMA_2_7B = dict(LLAMA_8B, vocab_size=32000, intermediate_size=11008, num_key_value_heads=32, rope_theta=1e4)
TEACHERS = {  # the paper's: shape, tokens of a long prompt
    "FLAN-T5-xl": (dict(T5_LARGE, d_model=2048, d_ff=5120, num_heads=32), 512),
    "Llama-2-7b-chat": (LLAMA_2_7B, 2000),
    "BioMistral-7B": (MISTRAL_7B, 2000),
    "Llama-3.1-8B-Instruct": (LLAMA_8B, 2000),
}
SMALL = dict(vocab_size=500)
SMALL_T5 = dict(SMALL, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
SMALL_LLAMA = dict(SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
PAPER_HOURS = dict(TinyLLM=2.6, router="1.4 to 1.8")
LIMITS = {  # by a part of the name: dense bfloat16 FLOP/s, bytes/s; the first that fits
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.56e12),
    "RTX 4090": (165e12, 1.01e12),
    "L40S": (362e12, 0.864e12),
}
KERNELS = dict(  # by parts of their names; the first that fits
    attention=("sdpa", "fmha", "flash", "attention"),
    products=("nvjet", "gemm", "cutlass", "splitk"),
    optimizer=("multi_tensor", "adam"),
    the_rest=("",),
)
SHARD = 5 * 10**9  # bytes of a file, as Hugging Face cuts a checkpoint


class Numbers(Words):
    """Texts of numbers, which are their tokens; for reading and for writing."""

    def decode(self, ids):
        return text_of(ids)


class Machine:
    """The device, its limits, and how time and memory are measured on it."""

    def __init__(self, device, args):
        self.device = device
        self.tiny = args.tiny
        self.disk = args.disk
        self.questions = args.questions
        self.stop_at = time.perf_counter() + 60 * args.minutes
        self.on_cuda = device == "cuda"
        self.repeats = 1 if self.tiny else 5
        self.name = torch.cuda.get_device_name() if self.on_cuda else "CPU"
        for part, limits in LIMITS.items():
            if part in self.name:
                self.peak, self.bandwidth = limits
                self.limits_are = "the data sheet's"
                return
        self.limits_are = "measured"
        self.peak = self.measure_peak()
        self.bandwidth = self.measure_bandwidth()

    def wait(self):
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, run, repeats=None):
        """Return the median seconds of a call. One before warms up."""
        taken = []
        for _ in range(1 + (repeats or self.repeats)):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def measure_peak(self):
        """FLOP/s of a large product in bfloat16."""
        n = 256 if self.tiny else 8192
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        return 2 * n**3 / self.seconds(lambda: a @ a)

    def measure_bandwidth(self):
        """Bytes/s of a copy, each read and written."""
        n = 2**20 if self.tiny else 2**32
        a = torch.zeros(n, device=self.device, dtype=torch.uint8)
        b = torch.empty_like(a)
        return 2 * n / self.seconds(lambda: b.copy_(a))

    def shape(self, config):
        """Return the shape, or with --tiny a small one of its kind."""
        if not self.tiny:
            return config
        if config["model_type"] == "t5":
            return {**config, **SMALL_T5}
        grouped = config["num_key_value_heads"] < config["num_attention_heads"]
        return {**config, **SMALL_LLAMA, "num_key_value_heads": 2 if grouped else 4}

    def size(self, real, tiny):
        return tiny if self.tiny else real

    def make(self, config, dtype=torch.bfloat16):
        """Return a model of random weights, made on the device. No text of it ever ends."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                lm = model.ARCHITECTURES[config["model_type"]][0](config)
        finally:
            torch.set_default_dtype(before)
        if isinstance(lm, model.Llama):
            lm.frequencies = lm.frequencies.to(self.device)
        lm.config["eos_token_id"] = -1
        return lm.eval()

    def peak_memory(self, run):
        """Return (seconds, GB at most held while it ran). On a CPU the second is None."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        taken = time.perf_counter() - start
        return taken, torch.cuda.max_memory_allocated() / 1e9 if self.on_cuda else None


    def profile(self, run):
        """Return where the GPU's time goes: {kind of kernel: ms}, and how many kernels there are."""
        if not self.on_cuda:
            return {}
        self.wait()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            run()
            self.wait()
        ms = dict.fromkeys(KERNELS, 0.0)
        n_kernels = 0
        for event in profiled.key_averages():
            names = event.key.lower()
            kind = next(kind for kind, parts in KERNELS.items() if any(part in names for part in parts))
            ms[kind] += event.self_device_time_total / 1e3
            n_kernels += event.count
        return dict(**{f"{kind}_ms": value for kind, value in ms.items()}, kernels=n_kernels)


def ids_of(n, vocab_size, seed=0):
    """Return n token ids."""
    return [10 + (seed * 7919 + i * 31) % (vocab_size - 10) for i in range(n)]


def questions_of(n, length, vocab_size):
    """Return n questions of four choices of 4 tokens, with prompts of `length` tokens."""
    questions = []
    for i in range(n):
        choices = [text_of(ids_of(4, vocab_size, 4 * i + c)) for c in range(4)]
        text = text_of(ids_of(length - 16, vocab_size, i))
        questions.append(kp.Question(str(i), "t", text, tuple(choices), 0))
    return questions


def size_of(lm):
    return sum(p.numel() for p in lm.parameters())


def drop(*_):
    """Give memory back between two models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------ 1. the student


def t5_flops(lm, n_read, n_written):
    """FLOPs of one row of a training step of a T5: three times those of its forward pass, which has

        2 * parameters of the encoder, and of the cross-attention's keys and values, for each token read,
        2 * the decoder's other parameters and the head's for each token written,
        4 * H * Dh * T * S for each attention of T tokens to S: q k^T and the weighted sum of v.

    The decoder's triangle counts whole, recomputed activations not at all (as in PaLM, arXiv 2204.02311).
    """
    c = lm.c
    inner = c.num_heads * c.d_kv
    n_layers = c.num_decoder_layers or c.num_layers
    reads = size_of(lm.encoder) + n_layers * 2 * inner * c.d_model
    writes = size_of(lm.decoder) - n_layers * 2 * inner * c.d_model + c.vocab_size * c.d_model
    attention = c.num_layers * n_read**2 + n_layers * (n_written**2 + n_written * n_read)
    return 3 * (2 * reads * n_read + 2 * writes * n_written + 4 * inner * attention)


def student_step(machine, student, batch, n_rationales=1, compiled=False):
    """Return (a training step as train.py takes it, its tokens, its FLOPs): 512 -> 4 and 512 -> 128."""
    n_read = machine.size(512, 64)
    n_written = machine.size(128, 8)
    questions = questions_of(batch, n_read, student.config["vocab_size"])
    texts = [[text_of(ids_of(n_written, student.config["vocab_size"]))] * n_rationales] * batch
    token_cache = kp.TokenCache(Numbers())
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5, fused=True)
    if compiled:  # as train.Ranks.wrap; a rehearsal does not wait for the compiler
        for block in student.blocks():
            block.compile(dynamic=True, backend="eager" if machine.tiny else "inductor")
    student.train()

    def step():
        with torch.autocast(machine.device, torch.bfloat16):
            loss = kp.dual_loss(student, token_cache, questions, texts, 1.0)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    n_tokens = batch * (n_read + 4 + n_rationales * (n_read + n_written))
    flops = t5_flops(student, n_read, 4) + n_rationales * t5_flops(student, n_read, n_written)
    return step, n_tokens, batch * flops


def time_student(machine, found, compiled):
    student = machine.make(machine.shape(T5_LARGE), torch.float32)
    batch = machine.size(32, 2)
    step, n_tokens, flops = student_step(machine, student, batch, compiled=compiled)
    start = time.perf_counter()
    step()
    machine.wait()
    found |= dict(batch=batch, first_step_seconds=time.perf_counter() - start)
    taken = machine.seconds(step)
    found |= dict(seconds=taken, tokens_per_second=n_tokens / taken, mfu=flops / taken / machine.peak)
    found["gb"] = machine.peak_memory(step)[1]
    found["profile"] = machine.profile(step)


def student(machine, found):
    """FLAN-T5-large trains, float32 weights under autocast: both losses, clipping, AdamW."""
    time_student(machine, found, compiled=False)


def student_compiled(machine, found):
    """The same with --compile."""
    time_student(machine, found, compiled=True)


# ------------------------------------------------------------------------------------------ 2. the teacher


def prompt_batch(machine, lm, batch, n_read):
    ids = torch.tensor([ids_of(n_read, lm.config["vocab_size"], i) for i in range(batch)])
    return ids.to(machine.device), torch.ones_like(ids).to(machine.device)


def decode(machine, found):
    """A Llama-3.1-8B writes. Of the bandwidth's limit: weights (one row of the embedding) and cache, read
    once a token. The prompt's time is taken off.
    """
    lm = machine.make(machine.shape(LLAMA_8B))
    n_read = machine.size(512, 16)
    n_new = machine.size(128, 4)
    weights = 2 * (size_of(lm) - lm.model.embed_tokens.weight.numel())
    a_token = 2 * 2 * lm.c.num_hidden_layers * lm.c.num_key_value_heads * lm.c.head_dim  # bytes of the cache
    for batch in (1, machine.size(64, 2)):
        ids, mask = prompt_batch(machine, lm, batch, n_read)
        with_one = machine.seconds(lambda: lm.generate(ids, mask, 1), 3)
        a_step = (machine.seconds(lambda: lm.generate(ids, mask, 1 + n_new), 3) - with_one) / n_new
        read = weights + batch * a_token * (n_read + n_new / 2)
        found[f"batch_{batch}"] = dict(
            tokens_per_second=batch / a_step,
            ms_per_step=1e3 * a_step,
            of_bandwidth=read / machine.bandwidth / a_step,
        )


def llama_flops(lm, n_tokens):
    """FLOPs of reading n tokens: 2 * a layer's parameters each, and 2 * H * Dh * n^2 for each layer's
    attention, of which the triangle counts. The head reads the last token alone.
    """
    c = lm.c
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * n_tokens**2
    return 2 * size_of(lm.model.layers) * n_tokens + attention


def prefill(machine, found):
    """A Llama-3.1-8B reads 8 prompts of 2,000 tokens, then scores four choices behind each."""
    lm = machine.make(machine.shape(LLAMA_8B))
    batch = machine.size(8, 2)
    n_read = machine.size(2000, 40)
    ids, mask = prompt_batch(machine, lm, batch, n_read)
    flops = batch * llama_flops(lm, n_read)
    with torch.no_grad():
        taken = machine.seconds(lambda: lm.prefill(ids, mask, 8))
        found |= dict(batch=batch, profile=machine.profile(lambda: lm.prefill(ids, mask, 8)))
    found["prefill_tokens_per_second"] = batch * n_read / taken
    found["prefill_of_peak"] = flops / taken / machine.peak
    questions = questions_of(batch, n_read, lm.config["vocab_size"])
    prompts = [kp.score_prompt(q) for q in questions]
    choices = [q.choices for q in questions]
    taken = machine.seconds(
        lambda: kp.choice_logps(lm, kp.TokenCache(Numbers(), kp.NO_LIMIT), prompts, choices))
    found["scored_questions_per_second"] = batch / taken
    found["scoring_of_peak"] = flops / taken / machine.peak


def launches(machine, found):
    """One step of a Llama-3.1-8B at batch 1 and 64, kernel by kernel and as a CUDA graph."""
    lm = machine.make(machine.shape(LLAMA_8B))
    for batch in (1, machine.size(64, 2)):
        ids, mask = prompt_batch(machine, lm, batch, machine.size(512, 16))
        with torch.no_grad():
            cache, logits = lm.prefill(ids, mask, 64)
            tokens = logits.argmax(-1)[:, None]

            def step(run, tokens=tokens, cache=cache):
                run(tokens, cache)
                cache.length -= 1  # the same place again

            row = dict(by_kernel_ms=1e3 * machine.seconds(lambda: step(lm.step)))
            start = time.perf_counter()
            step(lm.next_logits)
            machine.wait()
            row["capture_ms"] = 1e3 * (time.perf_counter() - start)
            row["graph_ms"] = 1e3 * machine.seconds(lambda: step(lm.next_logits), 10)
            row["profile"] = machine.profile(lambda: step(lm.next_logits))
        found[f"batch_{batch}"] = row


# --------------------------------------------------------------------------------------------- 3. loading


def write_checkpoint(lm, folder, shard):
    """Write a checkpoint in shards, as Hugging Face does."""
    shards = [{}]
    for name, tensor in lm.state_dict().items():
        held = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and held + tensor.nbytes > shard:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(tensor.nbytes for tensor in lm.state_dict().values())
    index = dict(metadata=dict(total_size=total), weight_map=weight_map)
    model.write_json(folder / "model.safetensors.index.json", index)
    model.write_json(folder / "config.json", {**lm.config, "eos_token_id": 2})
    Numbers().save(str(folder / "tokenizer.json"))
    return total


def forget(files):
    """Take files out of the system's page cache, where it allows that."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files):
    """Read files from end to end, as dd does."""
    buffer = bytearray(2**24)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def loading(machine, found):
    """A Llama-3.1-8B is loaded from shards: cold (from the disk) and warm (from memory), beside reading
    the files, and beside copies from pinned memory. And its fingerprint, which a teacher needs.
    """
    config = machine.shape(LLAMA_8B)
    lm = machine.make(config)
    needed = 1.1 * sum(tensor.nbytes for tensor in lm.state_dict().values())
    free = shutil.disk_usage(machine.disk or tempfile.gettempdir()).free
    if free < needed:
        need = f"{free / 1e9:.0f} GB of disk free, {needed / 1e9:.0f} needed"
        found["note"] = f"skipped: {need}; give --disk DIR"
        return
    with tempfile.TemporaryDirectory(dir=machine.disk) as temporary:
        folder = Path(temporary)
        size = write_checkpoint(lm, folder, machine.size(SHARD, 20_000))
        del lm
        drop()
        files = model.weight_files(folder)

        def timed(run, is_cold=False):
            if is_cold:
                forget(files)
            taken = machine.peak_memory(run)[0]
            return dict(seconds=taken, gb_per_second=size / 1e9 / taken)

        def load():
            model.load(folder, machine.device)
            drop()

        found |= dict(gb=size / 1e9, files=len(files))
        found["read_cold"] = timed(lambda: read_all(files), is_cold=True)
        found["load_cold"] = timed(load, is_cold=True)
        found["read_warm"] = timed(lambda: read_all(files))
        found["load_warm"] = timed(load)
        found["fingerprint"] = timed(lambda: kp.fingerprint(files))
    n = min(size, 2**30)
    pinned = torch.empty(n, dtype=torch.uint8, pin_memory=machine.on_cuda)
    there = torch.empty(n, dtype=torch.uint8, device=machine.device)
    found["pinned_copy_gb_per_second"] = n / 1e9 / machine.seconds(lambda: there.copy_(pinned))


# --------------------------------------------------------------------------------------------- 4. it fits


def asked(machine, lm, n_read, n_new, n):
    """Return (score, write): n questions as kp.CheckpointTeacher asks them, by its --batch-tokens."""
    questions = questions_of(n, n_read, lm.config["vocab_size"])
    prompts = [kp.score_prompt(q) for q in questions]
    ids = [Numbers().encode(prompt).ids for prompt in prompts]
    batch_tokens = kp.Asking().batch_tokens
    batches = model.by_length(ids, 128, batch_tokens, lambda ids: len(ids) + n_new)

    def score():
        for rows in batches:
            texts = [prompts[row] for row in rows]
            choices = [questions[row].choices for row in rows]
            token_cache = kp.TokenCache(Numbers(), kp.NO_LIMIT)  # nothing is cached from run to run
            kp.choice_logps(lm, token_cache, texts, choices, len(rows))

    def write():
        for rows in batches:
            kp.write(lm, Numbers(), [ids[row] for row in rows], n_new)

    return score, write


def memory(machine, found):
    """Peak GB: each teacher scores and writes one full batch of long prompts; FLAN-T5-large trains at the
    batch of train.py (16), of the recipe (8, accumulated to the paper's 64) and of the paper in one pass.
    """
    for name, (config, n_read) in TEACHERS.items():
        lm = machine.make(machine.shape(config))
        n_read = machine.size(n_read, 40)
        n_new = machine.size(256, 4)
        n = machine.size(kp.Asking().batch_tokens // (n_read + n_new), 2)
        score, write = asked(machine, lm, n_read, n_new, n)
        weights = sum(p.nbytes for p in lm.parameters()) / 1e9
        score_gb = machine.peak_memory(score)[1]
        write_gb = machine.peak_memory(write)[1]
        found[name] = dict(weights_gb=weights, rows=n, score_gb=score_gb, write_gb=write_gb)
        del lm, score, write
        drop()
    for recompute in (False, True):
        for batch in (8, 16, 64):
            batch = machine.size(batch, 2)
            student = machine.make(machine.shape(T5_LARGE), torch.float32)
            student.recompute = recompute
            how = ", --recompute" if recompute else ""
            name = f"FLAN-T5-large trains, batch {batch}{how}"
            step, *_ = student_step(machine, student, batch)
            try:
                step()  # makes AdamW's moments
                found[name] = dict(gb=machine.peak_memory(step)[1])
            except torch.OutOfMemoryError:
                found[name] = dict(note="does not fit")
            del student, step
            drop()


# --------------------------------------------------------------------------------------------- 5. the recipe


def recipe(machine, found):
    """The paper's work on 500 questions of 300 tokens, rationales of 128, and its student's steps of 64
    questions; scaled to its four data sets in domain (N questions) and 10,000 steps for each of them.

    Router: every teacher scores, and one of them writes a rationale, on average a fourth of the questions
    each. TinyLLM: every teacher writes for every question, and the student reads four rationales.
    """
    n = machine.size(500, 4)
    n_read = machine.size(300, 40)
    n_new = machine.size(128, 4)
    score_seconds = found["score_seconds"] = {}
    write_seconds = found["write_seconds"] = {}
    step_seconds = found["step_seconds"] = {}
    for name, (config, _) in TEACHERS.items():
        lm = machine.make(machine.shape(config))
        score, write = asked(machine, lm, n_read, n_new, n)
        score_seconds[name] = machine.peak_memory(score)[0]
        write_seconds[name] = machine.peak_memory(write)[0]
        del lm, score, write
        drop()
    batch = machine.size(8, 2)
    passes = 64 // 8
    for name, n_rationales in (("router", 1), ("TinyLLM", 4)):
        student = machine.make(machine.shape(T5_LARGE), torch.float32)
        step, *_ = student_step(machine, student, batch, n_rationales)
        step_seconds[name] = passes * machine.seconds(step)  # AdamW counts in each pass: a little too much
        del student, step
        drop()
    scores = sum(score_seconds.values()) / n  # a question
    writes = sum(write_seconds.values()) / n
    found["paper_hours"] = PAPER_HOURS
    for questions in (500, machine.questions):
        asks = dict(router=questions * (scores + writes / 4), TinyLLM=questions * writes)
        for name, seconds in asks.items():
            found[f"teachers_hours_{name}_{questions}"] = seconds / 3600
    for name, seconds in step_seconds.items():
        found[f"student_hours_{name}_10000_steps"] = 10_000 * seconds / 3600


# ---------------------------------------------------------------------------------- 6. beside transformers


def both(machine, config):
    """Return bench.Pair: the same random weights here and in transformers, made on the device."""
    from transformers import AutoConfig

    ours = machine.make(machine.shape(config))
    settings = {**ours.config, "eos_token_id": None}
    how = AutoConfig.for_model(settings.pop("model_type"), **settings)
    how.tie_word_embeddings = ours.config["tie_word_embeddings"]  # a T5's class sets it to true
    with torch.device(machine.device):
        theirs = their_class(ours.config).from_config(how, dtype=torch.bfloat16)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    if hasattr(theirs, "shared"):  # a T5's embeddings have three names there
        theirs.encoder.embed_tokens = theirs.decoder.embed_tokens = theirs.shared
    return Pair(ours.config, None, ours, theirs.eval(), machine.device, machine.size(3, 1))


def beside_transformers(machine, found):
    """tests/bench.py's pairs on these shapes, both in bfloat16 without autocast: ratio above 1, we are
    faster. No row ends before the last token. A Llama's generation also beside transformers' compiled
    static cache.
    """
    if importlib.util.find_spec("transformers") is None:
        found["note"] = "transformers is not installed"
        return

    def add(row, how=""):
        found[row.pop("name") + how] = row

    add(training(both(machine, T5_LARGE), *machine.size((32, 512, 128), (2, 32, 8))))
    drop()
    pair = both(machine, LLAMA_8B)
    n_new = machine.size(64, 4)
    batches = (machine.size(64, 2), 1)
    for batch in batches:
        add(generation(pair, batch, n_new, ends=[]))
    add(scoring(pair))
    if machine.on_cuda:
        pair.theirs.generation_config.cache_implementation = "static"
        for batch in batches:
            add(generation(pair, batch, n_new, ends=[]), ", their compiled static cache")


# ------------------------------------------------------------------------------------------------ together

# The dearest last: a run that is cut has the others.
SECTIONS = dict(
    student=student,
    decode=decode,
    prefill=prefill,
    launches=launches,
    memory=memory,
    recipe=recipe,
    loading=loading,
    transformers=beside_transformers,
    compiled=student_compiled,
)


def flat(value, name=""):
    """Yield (name, value) of what is nested."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}, {key}" if name else key)
    else:
        yield name, value


def print_table(sections):
    """Print all figures as Markdown."""
    print("\n| section | figure | value |\n|---|---|---|")
    for section, found in sections.items():
        for name, value in flat(found):
            text = f"{value:,.4g}" if isinstance(value, float) else str(value)
            print(f"| {section} | {name.replace('_', ' ')} | {text} |")


def measure(machine, names, file):
    """Run the sections; write the file after each. Return all that it holds."""
    about = dict(device=machine.name, torch=torch.__version__, tiny=machine.tiny)
    about |= dict(peak_flops=machine.peak, bandwidth=machine.bandwidth, limits_are=machine.limits_are)
    sections = {}
    if file.exists():
        before = model.read_json(file)
        if before["device"] == machine.name and before["tiny"] == machine.tiny:
            sections = before["sections"]
    for name in names:
        start = time.perf_counter()
        if start > machine.stop_at:
            print(f"{name}: no time left; run it with --only {name}")
            continue
        found = {}
        try:
            SECTIONS[name](machine, found)
        except Exception as error:
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
        drop()
        sections[name] = {**found, "section_seconds": time.perf_counter() - start}
        model.write_json(file, dict(about, sections=sections))
        print(f"{name}: {json.dumps(sections[name])}", flush=True)
    return sections


def main(argv=None):
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=show_defaults)
    known = list(SECTIONS)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="SECTION", help="of these")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a rehearsal, on a CPU too")
    parser.add_argument("--out", default=Path(__file__).with_name("gpu.json"), type=Path, help="the JSON")
    parser.add_argument("--disk", help="folder with 18 GB free (default: the system's temporary one)")
    parser.add_argument("--minutes", type=float, default=25, help="after which no section begins")
    parser.add_argument("--questions", type=int, default=10_036, help="that the recipe is scaled to")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.require(args.tiny or device == "cuda", "no CUDA GPU here; rehearse with --tiny --out FILE")
    torch.backends.cuda.matmul.allow_tf32 = True  # as in train.py
    machine = Machine(device, args)
    sections = measure(machine, args.only, args.out)
    print_table(sections)
    return sections


if __name__ == "__main__":
    with model.one_line_errors():
        main()
