"""What a GPU needs. Most of it is tested without one, on a device that is pretended.

Tests that need CUDA skip without it. Run them with: python -m pytest tests/test_cuda.py
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, read_lines
from test_model import DECODERS, ENCODER_DECODERS, N, close, load, pad, trimmed
from test_train import on, result_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import kp
import model
import purify
import train

WRITERS = DECODERS + ENCODER_DECODERS
TEXTS = ["the otter nurses its young", "birds", "copper conducts heat and the mammals swim"]
CHOICES = [["birds", "the eggs", "copper"], ["heat", "rivers and birds"], ["swim", "lay eggs", "a young otter"]]
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
    far_sums, _ = kp.choice_logps(far, tokenizer, TEXTS, CHOICES)
    sums, _ = kp.choice_logps(lm, tokenizer, TEXTS, CHOICES)
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


QUESTIONS = [kp.Question("1", "t", "birds", ("heat", "the eggs"), 0), kp.Question("2", "t", "swim", ("a", "and"), 1)]
RATIONALES = [["the mammals swim", "birds lay eggs"], ["copper", ""]]


def one_loss(lm, tokenizer):
    lm.train()
    token_cache = kp.TokenCache(tokenizer, chat=kp.WITHOUT_CHAT)
    torch.manual_seed(0)
    return kp.dual_loss(lm, token_cache, QUESTIONS, RATIONALES, 2.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["flan-t5", "llama-3.1", "mistral-window", "qwen3"])
def test_nothing_waits_between_batch_and_step(name, recompute, there):
    """The loss, its gradients and their norm; and they are the CPU's."""
    lm, tokenizer = opened(name)
    lm.config["dropout_rate"] = 0.0
    far, _ = opened(name, "meta")
    for net in (lm, far):
        net.recompute = recompute
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
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
