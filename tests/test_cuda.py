"""What a GPU needs. Most of it is tested without one, on a device that is pretended.

Tests that need CUDA skip without it. Run them with: python -m pytest tests/test_cuda.py
"""

import contextlib
from statistics import fmean

import gpu
import pytest
import torch
from conftest import ROOT, dying_at_step, read_lines, torchrun
from test_model import DECODERS, ENCODER_DECODERS, N, close, load, pad, trimmed
from test_train import on, result_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import kp
import model
import purify
import train

WRITERS = DECODERS + ENCODER_DECODERS
TEXTS = ["the otter nurses its young", "birds", "copper conducts heat and the mammals swim"]
CHOICES = [["birds", "the eggs"], ["heat", "rivers and birds", "copper"], ["swim", "a young otter"]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


# ------------------------------------------------------------------------------ a device that is pretended


class There(torch.Tensor):
    """A tensor that says it is on the device "meta". Its numbers are `here`, on the CPU."""

    @staticmethod
    def __new__(cls, here):
        layout = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device="meta", **layout)

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the pretended device")


class Pretended(TorchDispatchMode):
    """Every operation on "meta" is computed on the CPU, under the rules of a GPU.

    Operands are on one device, or are CPU scalars. What makes the CPU wait for a GPU is written down in
    `waits`: a number that is read, a selection by a mask, a copy, except from pinned and whole memory.
    """

    READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
    INDEXED = ("index", "index_put", "index_put_")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, There)]
        goes_to = kwargs.get("device")
        if goes_to is not None:
            kwargs["device"] = "cpu"
        if goes_to is None and name != "copy_":
            for x in tensors:
                assert not there or isinstance(x, There) or x.dim() == 0, f"{func}: tensors of two devices"
        is_there = bool(there) if goes_to is None else torch.device(goes_to).type == "meta"
        if self.waits_for(name, args, kwargs, bool(there), is_there):
            self.waits.append(name)
        args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
        out = func(*args, **kwargs)
        if is_there and tensors and out is args[0]:  # written in place
            return tensors[0]
        return tree_map(lambda x: There(x) if is_there and isinstance(x, torch.Tensor) else x, out)

    def waits_for(self, name, args, kwargs, was_there, is_there):
        if was_there and not is_there:
            return True
        if was_there:
            masks = []
            if name in self.INDEXED:
                masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            return name in self.READ or bool(masks)
        if is_there and name in ("_to_copy", "copy_"):
            pinned = getattr(args[0], "is_pinned_here", False) and args[0].is_contiguous()
            return not (pinned and kwargs.get("non_blocking"))
        return False


@pytest.fixture
def there(monkeypatch):
    """The pretended device, switched on."""
    tensor = torch.tensor

    def then_copied(data, device="cpu", **how):  # as on a GPU
        return tensor(data, **how).to(device)

    monkeypatch.setattr(torch, "tensor", then_copied)
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    with Pretended() as mode:
        yield mode


def opened(name, device="cpu"):
    return model.load(ROOT / "tests" / "fixtures" / name, device, torch.float32)


def test_the_pretended_device_tells_what_waits(there):
    x = torch.arange(6.0).to("meta")
    there.waits.clear()
    y = (x * 2 + torch.ones_like(x)).sum()
    x[torch.arange(2, device="meta")] += 1
    x[4:] = 0
    assert there.waits == []
    assert y.item() == 36
    assert x.cpu().tolist() == [1, 2, 2, 3, 0, 0]
    for wait in (lambda: x[x > 2], lambda: x.nonzero(), lambda: bool((x > 2).all()), lambda: x.cpu()):
        there.waits.clear()
        wait()
        assert there.waits
    for wait in (False, True):
        there.waits.clear()
        pinned = torch.ones(4, 2).pin_memory()
        (pinned[:, 0] if wait else pinned).to("meta", non_blocking=True)
        assert bool(there.waits) == wait
    with pytest.raises(AssertionError, match="two devices"):
        x + torch.ones(6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_model_stays_on_its_device(name, there):
    """All is loaded and computed there, and comes out as on the CPU."""
    lm, tokenizer = opened(name)
    far, _ = opened(name, "meta")
    _, _, golden, rows = load(name)
    ids, mask = pad(rows, "left")
    decoder = (golden["decoder"],) if "decoder" in golden else ()
    with torch.no_grad():
        found = far(ids.to("meta"), mask.to("meta"), *[x.to("meta") for x in decoder])
        want = lm(ids, mask, *decoder)
    shown = torch.ones_like(golden["decoder"]) if decoder else mask  # what stands at padding does not count
    close(found.cpu()[shown.bool()], want[shown.bool()])
    token_cache = kp.TokenCache(tokenizer)
    far_sums, _ = kp.choice_logps(far, token_cache, TEXTS, CHOICES)
    sums, _ = kp.choice_logps(lm, token_cache, TEXTS, CHOICES)
    for a, b in zip(far_sums, sums):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_generation_waits_once_a_token(name, there):
    """For whether a row is alive; and once more where finished rows leave the batch."""
    far, _ = opened(name, "meta")
    _, _, golden, rows = load(name)
    ids, mask = pad(rows, "left")
    ids = ids.to("meta")
    mask = mask.to("meta")
    there.waits.clear()
    out = far.generate(ids, mask, 20)
    waits = list(there.waits)
    eos = far.config["eos_token_id"]
    assert trimmed(out, eos) == trimmed(golden["generated"], eos)
    assert waits.count("_local_scalar_dense") == out.shape[1]
    assert waits.count("nonzero") <= N
    assert len(waits) == out.shape[1] + waits.count("nonzero") + 1  # the end tokens are copied


def test_sentence_vectors_on_a_device(there):
    near = model.embed(*opened("bert"), TEXTS)
    close(model.embed(*opened("bert", "meta"), TEXTS), near)


def test_what_is_added_to_scores_has_the_form_that_fused_kernels_take(there, monkeypatch):
    """Any other is copied in every layer, and kept for the backward pass, or no such kernel takes it."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, attn_mask, **how):
        seen.append(attn_mask)
        return attention(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    for name in ("flan-t5", "llama-2"):
        _, _, golden, rows = load(name)
        ids, mask = pad(rows, "left")
        decoder = (golden["decoder"].to("meta"),) if "decoder" in golden else ()
        opened(name, "meta")[0](ids.to("meta"), mask.to("meta"), *decoder)
    assert any(bias.requires_grad for bias in seen)
    for bias in seen:
        *strides, last = bias.stride()
        assert last == 1
        assert all(stride % 16 == 0 for stride in strides)


QUESTIONS = [
    kp.Question("1", "t", "birds", ("heat", "the eggs"), 0),
    kp.Question("2", "t", "swim", ("a", "and"), 1),
]
RATIONALES = [["the mammals swim", "birds lay eggs"], ["copper", ""]]


def without_dropout(lm, tokenizer):
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return lm, tokenizer


def one_loss(lm, tokenizer):
    lm.train()
    token_cache = kp.TokenCache(tokenizer, chat=kp.WITHOUT_CHAT)
    torch.manual_seed(0)
    return kp.dual_loss(lm, token_cache, QUESTIONS, RATIONALES, 2.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["flan-t5", "llama-3.1", "mistral-window", "qwen3"])
def test_nothing_waits_between_batch_and_step(name, recompute, there):
    """The loss, its gradients and their norm; and they are the CPU's."""
    lm, tokenizer = without_dropout(*opened(name))
    far, _ = without_dropout(*opened(name, "meta"))
    lm.recompute = recompute
    far.recompute = recompute
    want = one_loss(lm, tokenizer)
    want.total.backward()
    there.waits.clear()
    loss = one_loss(far, tokenizer)
    loss.total.backward()
    torch.nn.utils.clip_grad_norm_(far.parameters(), 1e9)
    loss.answer.mean()
    loss.rationale.mean()
    assert there.waits == []
    close(loss.total.cpu(), want.total)
    for (place, p), q in zip(far.named_parameters(), lm.parameters()):
        assert (p.grad is None) == (q.grad is None), place
        if q.grad is not None:
            close(p.grad.cpu(), q.grad, atol=1e-4)


# ------------------------------------------------------------------------------ whole runs, without a GPU

SHORT = ["--steps", "2", "--batch-size", "4", "--max-new-tokens", "8", "--explain", "2"]


@pytest.fixture
def run(world, teacher_folders, tmp_path, monkeypatch):
    """Train on a device, and return the lines of the log that hold losses."""
    monkeypatch.setattr(purify.ClassifierRouting, "STEPS", 2)

    def run(*arguments, device="cpu", name="run"):
        where = ["--cache", str(tmp_path / f"cache-{device}"), "--out", str(tmp_path / name)]
        known = "cpu" if device == "meta" else device
        args = train.parse_args([*on(world, teacher_folders), *SHORT, *where, "--device", known, *arguments])
        train.settle(args)
        args.device = device
        train.train(args)
        return [line for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]

    return run


@pytest.mark.parametrize("purifier", ["classifier", "rl"])  # these took all twelve once: in a minute
def test_a_run_stays_on_its_device(run, purifier, monkeypatch, request):
    """Teachers, encoder, purifier and student; the log is the CPU's."""
    how = ["--purifier", purifier, "--fit-questions", "8"]
    near = run(*how, name="near")
    request.getfixturevalue("there")
    adamw = torch.optim.AdamW
    save_file = train.save_file

    def save(tensors, *how):
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, *how)

    # What knows CUDA by its name.
    monkeypatch.setattr(torch, "autocast", lambda *how, enabled: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *how, fused=False, **more: adamw(*how, **more))
    monkeypatch.setattr(train, "save_file", save)
    monkeypatch.setattr(model, "save", lambda *how: None)
    far = run(*how, device="meta", name="far")
    assert len(near) == len(far) == 2
    for a, b in zip(near, far):
        for key in {"loss", "answer", "rationale", "norm", "reward"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key


def test_autocast_covers_the_loss_and_leaves_weights_and_losses_in_float32(run, monkeypatch):
    """On the CPU as on CUDA, `train` hands autocast its own device."""
    linear = model.linear
    dual_loss = kp.dual_loss
    products = []
    totals = []

    def noted_linear(x, weight):
        y = linear(x, weight)
        if torch.is_grad_enabled():
            products.append((weight.dtype, y.dtype))
        return y

    def noted_loss(student, *how):
        loss = dual_loss(student, *how)
        totals.append(loss.total.dtype)
        return loss

    monkeypatch.setattr(model, "linear", noted_linear)
    monkeypatch.setattr(kp, "dual_loss", noted_loss)
    how = ["--purifier", "none", "--steps", "4", "--dtype"]
    for student in ("t5", "llama"):
        if student == "llama":
            how = ["--student", str(ROOT / "tests" / "fixtures" / "llama-3.1"), *how]
        runs = {}
        for dtype in ("float32", "bfloat16"):
            products.clear()
            runs[dtype] = run(*how, dtype, name=f"{student}-{dtype}")
            assert set(products) == {(torch.float32, getattr(torch, dtype))}
        assert set(totals) == {torch.float32}
        for a, b in zip(runs["float32"], runs["bfloat16"]):
            assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
            assert b["loss"] != a["loss"]


def test_the_script_for_a_gpu_runs(tmp_path, monkeypatch):
    """One section with tiny shapes; what fails is written down; what was there stays."""
    file = tmp_path / "gpu.json"

    def fails(machine, found):
        found["before"] = 1
        raise ValueError("not\nhere")

    monkeypatch.setitem(gpu.SECTIONS, "launches", fails)
    gpu.main(["--tiny", "--out", str(file), "--only", "launches"])
    gpu.main(["--tiny", "--out", str(file), "--only", "decode", "loading"])
    sections = model.read_json(file)["sections"]
    assert list(sections) == ["launches", "decode", "loading"]
    assert sections["launches"]["error"] == "ValueError: not"
    assert sections["launches"]["before"] == 1
    assert sections["loading"]["files"] > 1
    assert sections["decode"].keys() >= {"batch_1", "batch_2"}


def test_flops_of_a_t5_written_out():
    """One layer each, width 2, one head of 3, feed-forward 5 with a gate, 7 tokens known."""
    config = dict(model_type="t5", vocab_size=7, d_model=2, d_kv=3, d_ff=5, num_layers=1, num_heads=1)
    lm = model.T5({**config, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    attention = 4 * 2 * 3  # q, k, v, o
    forward = 3 * 2 * 5
    norms = 2 + 2  # of self-attention and feed-forward; and the last
    buckets = 32
    reads = attention + forward + norms + 2 + buckets + attention / 2  # and the cross-attention's k, v
    writes = attention + forward + norms + 2 + 2 + buckets + attention / 2 + 2 * 7
    scores = 4 * 3 * (11 * 11 + 2 * 2 + 2 * 11)
    assert gpu.t5_flops(lm, 11, 2) == 3 * (2 * 11 * reads + 2 * 2 * writes + scores)


# ------------------------------------------------------------------------------------------------- on CUDA


@pytest.fixture
def exact():
    """Products of float32 in float32: train.py allows TF32, whose numbers have ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def logits_of(name, device, dtype):
    """Return the logits of a fixture's tokens, (N tokens, V) float32 on the CPU, and the golden ones."""
    lm, _ = model.load(ROOT / "tests" / "fixtures" / name, device, dtype)
    _, _, golden, rows = load(name)
    ids, mask = pad(rows, "left", extra=2)
    inputs = [ids, mask]
    shown = mask.bool()
    if "decoder" in golden:
        inputs.append(golden["decoder"])
        shown = torch.ones_like(golden["decoder"]).bool()
    logits = lm(*[x.to(device) for x in inputs]).float().cpu()[shown]
    return logits, torch.cat([golden[f"logits{i}"] for i in range(N)])


def off_by(found, want):
    return float((found - want).norm() / want.norm())


@needs_cuda
@pytest.mark.parametrize("name", WRITERS)
def test_float32_on_cuda_is_the_golden_one(name, exact):
    with torch.no_grad():
        close(*logits_of(name, "cuda", torch.float32))
    close(*logits_of(name, "cuda", torch.float32))  # with gradients attention may take another kernel


@needs_cuda
@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_bfloat16_on_cuda_is_as_near_as_on_the_cpu(name):
    """Both round to eight bits after each operation, in another order; a fused kernel rounds less often.

    So the two errors have one size, and over a thousand logits their norms differ little: twice is ample.
    """
    far = off_by(*logits_of(name, "cuda", torch.bfloat16))
    near = off_by(*logits_of(name, "cpu", torch.bfloat16))
    assert torch.finfo(torch.bfloat16).eps / 10 < far < 2 * near


@needs_cuda
@pytest.mark.parametrize("name", WRITERS)
def test_generation_on_cuda_token_for_token(name, exact):
    far, _ = opened(name, "cuda")
    _, _, golden, rows = load(name)
    ids, mask = pad(rows, "left", extra=1)
    out = far.generate(ids.cuda(), mask.cuda(), 20)
    eos = far.config["eos_token_id"]
    assert trimmed(out, eos) == trimmed(golden["generated"], eos)


@needs_cuda
@pytest.mark.parametrize("name", WRITERS)
def test_scoring_on_cuda(name, exact):
    lm, tokenizer = opened(name)
    far, _ = opened(name, "cuda")
    token_cache = kp.TokenCache(tokenizer)
    sums, lengths = kp.choice_logps(lm, token_cache, TEXTS, CHOICES)
    far_sums, far_lengths = kp.choice_logps(far, token_cache, TEXTS, CHOICES)
    assert far_lengths == lengths
    for a, b in zip(far_sums, sums):
        assert a == pytest.approx(b, abs=1e-3)


@needs_cuda
def test_sentence_vectors_on_cuda(exact):
    close(model.embed(*opened("bert", "cuda"), TEXTS), model.embed(*opened("bert"), TEXTS))


@needs_cuda
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["flan-t5", "llama-3.1", "mistral-window", "qwen3"])
def test_gradients_on_cuda(name, recompute, exact):
    nets = []
    for device in ("cpu", "cuda"):
        lm, tokenizer = without_dropout(*opened(name, device))
        lm.recompute = recompute
        one_loss(lm, tokenizer).total.backward()
        nets.append(lm)
    for (place, p), q in zip(nets[1].named_parameters(), nets[0].parameters()):
        assert off_by(p.grad.cpu(), q.grad) < 1e-4, place


@needs_cuda
@pytest.mark.parametrize("name", ["flan-t5", "llama-3.1"])
def test_a_step_on_cuda_never_waits(name):
    lm, tokenizer = opened(name, "cuda")
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)
    for debug_mode in ("default", "error"):  # the first step makes what the others find
        torch.cuda.set_sync_debug_mode(debug_mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = one_loss(lm, tokenizer)
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@needs_cuda
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("n_heads", [8, 2])
@pytest.mark.parametrize("n", [1, 100])
def test_attention_takes_a_fused_kernel(n_heads, n, learns):
    q = torch.randn(2, 8, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=learns)
    k = torch.randn(2, n_heads, 100, 64, device="cuda", dtype=torch.bfloat16)
    bias = torch.full((2, 1, n, 100), -torch.inf, device="cuda", dtype=torch.bfloat16).triu(101 - n)
    with sdpa_kernel(FUSED), torch.set_grad_enabled(learns):  # raises where none of these can
        found = model.attend(q, k, k, bias)
    near = q.detach().cpu().float().requires_grad_(learns)
    want = model.attend(near, k.cpu().float(), k.cpu().float(), bias.cpu().float())
    assert off_by(found.float().cpu(), want) < 0.02
    if learns:
        found.sum().backward()
        want.sum().backward()
        assert off_by(q.grad.float().cpu(), near.grad) < 0.02


@needs_cuda
@pytest.mark.parametrize("name", WRITERS)
def test_a_graph_s_steps_are_the_steps(name, exact):
    """Also after rows have left, and in buffers that hold something else behind the place."""
    lm, _ = opened(name, "cuda")
    _, _, _, rows = load(name)
    ids, mask = (x.cuda() for x in pad(rows, "right"))
    with torch.no_grad():
        plain, _ = lm.prefill(ids, mask, 12)
        graphed, _ = lm.prefill(ids, mask, 12)
        for step in range(10):
            if step == 5:
                kept = torch.arange(0, N, 2, device="cuda")
                plain.select(kept)
                graphed.select(kept)
            tokens = torch.randint(3, 64, (len(plain.mask), 1), device="cuda")
            close(lm.next_logits(tokens, graphed), lm.step(tokens, plain)[:, -1])
    assert plain.length == graphed.length


@needs_cuda
def test_a_t5_s_learning_bias_takes_a_fused_kernel():
    _, tokenizer = opened("flan-t5")
    lm = model.T5(dict(model_type="t5", vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4))
    lm.cuda()
    with sdpa_kernel(FUSED), torch.autocast("cuda", torch.bfloat16):  # raises where none of these can
        one_loss(lm, tokenizer).total.backward()
    table = lm.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert table.weight.grad.abs().sum() > 0


@needs_cuda
@pytest.mark.parametrize("purifier", list(purify.PURIFIERS))
def test_every_purifier_trains_on_cuda(run, purifier):
    how = ["--steps", "30", "--eval-every", "15", "--lr", "1e-3", "--warmup", "5", "--purifier", purifier]
    lines = run(*how, "--tune-aggregator", "5", device="cuda")
    losses = [line["loss"] for line in lines]
    assert len(losses) == 30
    assert fmean(losses[-5:]) < fmean(losses[:5])


@needs_cuda
@pytest.mark.parametrize("purifier", ["router", "rl"])
def test_a_run_killed_on_cuda_goes_on(run, purifier):
    """Its losses are the whole run's, but for the order of sums: bfloat16 keeps three digits."""
    how = ["--purifier", purifier, "--steps", "8", "--eval-every", "4"]
    whole = run(*how, device="cuda", name="whole")
    with dying_at_step(6):
        run(*how, device="cuda", name="killed")
    killed = run(*how, "--resume", device="cuda", name="killed")
    assert len(killed) == len(whole) == 8
    for a, b in zip(killed, whole):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@needs_cuda
@pytest.mark.parametrize("student", ["llama-3.1", None])
def test_a_compiled_student_on_cuda(run, student):
    how = ["--purifier", "none", "--steps", "6"]
    if student:
        how += ["--student", str(ROOT / "tests" / "fixtures" / student)]
    eager = run(*how, device="cuda", name="eager")
    compiled = run(*how, "--compile", device="cuda", name="compiled")
    for a, b in zip(compiled, eager):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02 if student else 0.2)  # a T5 draws its dropout


@needs_cuda
def test_torchrun_with_one_process_on_cuda(world, teacher_folders, tmp_path):
    where = ["--cache", tmp_path / "cache", "--out", tmp_path / "run", "--device", "cuda"]
    how = [*on(world, teacher_folders), *SHORT, *where, "--purifier", "router"]
    process = torchrun(ROOT / "train.py", *how, processes=1, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("test accuracy") == 1
    assert result_of(tmp_path / "run")["steps"] == 2
