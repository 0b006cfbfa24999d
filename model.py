"""Transformers from scratch: T5, Llama (Llama-2, Llama-3.x, Mistral) and BERT, in plain PyTorch.

Knowledge purification needs decoder-only and encoder-decoder teachers, an encoder-decoder student, and a sentence encoder for
the routers. Attributes have the names of the Hugging Face checkpoints, so a state dict loads as it is. In this order: small parts,
the key-value cache and greedy generation that decoders share, T5, Llama, Bert, then `load` and `save`.

References: T5 (1910.10683), GLU variants (2002.05202), LLaMA (2302.13971), Llama 3 (2407.21783), Mistral (2310.06825), RoPE
(2104.09864), grouped queries (2305.13245), BERT (1810.04805). Left out: beam search and sampling (the method needs one repeatable
rationale), quantised weights, and every model it does not name.

    python -c "import model; m, tok = model.load('PATH/TO/flan-t5-small'); print(m.config)"
"""

import contextlib
import errno
import functools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn


class BadInput(Exception):
    """Something the user gave is wrong. The text names the file, the place and the mend, in one line."""


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: bad input and what the system refuses end in one line and exit code 2, Ctrl-C in 130."""
    who = f"rank {rank}: " if (rank := os.environ.get("RANK", "0")) != "0" else ""
    try:
        yield
    except BadInput as error:
        sys.exit(print(f"{who}error: {error}", file=sys.stderr) or 2)
    except (OSError, SafetensorError) as error:  # what was written before is whole: see `atomic`
        full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) or isinstance(error, SafetensorError)
        mend = "make room" if full else "mend that"
        sys.exit(print(f"{who}error: {error}; {mend} and go on with --resume", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped; go on with the same command and --resume", file=sys.stderr) or 130)


def require(ok, message):
    if not ok:
        raise BadInput(message)


def checked(config, defaults):
    """`config` over `defaults`, if every value has its default's type and a size that some real model could have."""
    config = {**defaults, **config}
    for key, default in defaults.items():
        value, limit = config[key], 10**3 if key.endswith("layers") else 10**6
        if key.endswith("token_id"):
            ids = value if isinstance(value, list) and value else [value]
            ok, want = value is None or all(type(i) is int for i in ids), "a token's number"
        elif isinstance(default, (bool, str)):
            ok, want = type(value) is type(default), f"like {default!r}"
        elif isinstance(default, float):
            ok, want = type(value) in (int, float) and 0 <= value < 1e12, "a number, not negative"
        else:  # a size; its default is None where another size stands in for it
            ok, want = type(value) is int and 1 <= value <= limit, f"a whole number from 1 to {limit}"
            ok |= default is None and value is None
        require(ok, f"{key} must be {want}, not {value!r:.80}")
    return config


def onednn(x, weight):
    """x (..., D_in), weight (D_out, D_in) -> (..., D_out)"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class OneDNN(torch.autograd.Function):
    """`onednn` with its gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return onednn(grad, weight.mT), onednn(grad.flatten(0, -2).mT, x.flatten(0, -2).mT)


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LARGE = 2**17  # weights from which on that pays


def linear(x, weight):
    """x @ weight^T. On CPUs PyTorch gives float32 products to MKL; on AMD's, oneDNN takes half the time for large ones."""
    large = HAS_ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE
    if not large or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight)
    return OneDNN.apply(x, weight) if torch.is_grad_enabled() else onednn(x, weight)


class Linear(nn.Linear):
    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_new": functools.partial(F.gelu, approximate="tanh")}


def tree(**parts):
    return nn.ModuleDict(parts)


def split_heads(x, n_heads):
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, T, H * Dh) -> (B, H, T, Dh)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, H, T, Dh) -> (B, T, H * Dh)


def causal(n_queries, n_keys, device, window=None):
    """(n_queries, n_keys) bool, True where the query (the last n_queries of the keys) may look."""
    q = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    k = torch.arange(n_keys, device=device)
    return (k <= q) & (k > q - window) if window else k <= q


# ------------------------------------------------------------------------- cache, batches, generation


class Cache:
    """Keys and values of the tokens that a decoder has read, in buffers allocated once and written in place."""

    def __init__(self, n_layers, shape, like):
        self.k, self.v = ([like.new_empty(shape) for _ in range(n_layers)] for _ in "kv")  # (B, H, room, Dh) each
        self.length = 0  # tokens held so far
        self.mask = self.sees_all = self.cross = self.bias = None  # filled by the model's prefill

    def append(self, layer, k, v):
        """k, v (B, H, T, Dh) of the next T tokens -> all keys and values of this layer so far."""
        start, end = self.length, self.length + k.shape[2]
        self.k[layer][:, :, start:end], self.v[layer][:, :, start:end] = k, v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def select(self, rows):
        """Keep these rows of the batch, in this order; a row named twice is copied."""
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]
        self.cross = self.cross and [(k[rows], v[rows]) for k, v in self.cross]
        self.mask = self.mask[rows]


def pad(sequences, value=0):
    """Lists of ids -> (B, longest) ids and mask, both int64, padded on the right."""
    ids = torch.full((len(sequences), max(map(len, sequences))), value)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(sequences):
        ids[row, : len(s)], mask[row, : len(s)] = torch.as_tensor(s), 1
    return ids, mask


def by_length(sequences, batch_size):
    """Index lists of at most batch_size, of similar length, the longest first: little padding, no late surprise."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def device_of(model):
    return next(model.parameters()).device


@torch.no_grad()
def generate(model, input_ids, attention_mask, max_new_tokens):
    """Greedy decoding. ids, mask (B, S), padded on either side -> (B, <= max_new_tokens) new ids, padded after eos."""
    eos, pad_id = model.config["eos_token_id"], model.config["pad_token_id"]
    eos = eos if isinstance(eos, list) else [eos]
    filler = next(i for i in (pad_id, *eos, 0) if i is not None and i >= 0)  # old Llamas say pad_token_id: -1
    eos = torch.tensor([i for i in eos if i is not None], device=input_ids.device)
    out = input_ids.new_full((len(input_ids), max_new_tokens), filler)
    rows = torch.arange(len(input_ids), device=eos.device)  # which rows of the batch `tokens` and `cache` hold
    alive, cache, tokens = torch.ones_like(rows, dtype=torch.bool), None, None
    for t in range(max_new_tokens):
        if cache is None:
            cache, logits = model.prefill(input_ids, attention_mask, max_new_tokens)
        else:
            logits = model.step(tokens[:, None], cache)[:, -1]
        tokens = logits.argmax(-1)
        out[rows[alive], t] = tokens[alive]
        alive &= ~torch.isin(tokens, eos)
        n_alive = int(alive.sum())
        if n_alive == 0:
            return out[:, : t + 1]
        if n_alive <= 0.75 * len(rows):  # copying the cache costs about one step: wait until it saves that much
            cache.select(alive)
            rows, tokens, alive = rows[alive], tokens[alive], alive[alive]
    return out


# ------------------------------------------------------------------------------------------------ T5


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be used in training later
def relative_position_buckets(n_queries, n_keys, bidirectional, n_buckets, max_distance):
    """T5's buckets of key - query distance: exact when near, logarithmic when far. (n_queries, n_keys) int64."""
    distance = torch.arange(n_keys)[None] - torch.arange(n_queries)[:, None]
    if bidirectional:  # one half of the buckets for keys behind, the other for keys ahead
        n_buckets //= 2
        first, distance = (distance > 0) * n_buckets, distance.abs()
    else:
        first, distance = 0, -distance.clamp(max=0)
    exact = n_buckets // 2
    far = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact) * (n_buckets - exact)
    far = (exact + far.long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def additive(mask, dtype):
    """(B, S) of 1 and 0 -> (B, 1, 1, S) of 0 and a very negative number (finite: an all-pad row stays finite)."""
    return (mask[:, None, None] == 0).to(dtype) * torch.finfo(dtype).min


class T5Block(nn.Module):
    """Self-attention, (in the decoder) cross-attention, feed-forward; each h + f(norm(h))."""

    def __init__(self, c, is_decoder):
        super().__init__()
        D, inner, self.n_heads, self.p = c.d_model, c.num_heads * c.d_kv, c.num_heads, c.dropout_rate
        gate, _, name = c.feed_forward_proj.rpartition("-")
        name = "gelu_new" if c.feed_forward_proj == "gated-gelu" else name  # FLAN-T5's spelling of tanh-GELU
        known = gate in ("", "gated") and name in ACTIVATIONS
        require(known, f"feed_forward_proj {c.feed_forward_proj!r} is not known; take relu or gated-gelu")
        self.act, w_in = ACTIVATIONS[name], ("wi_0", "wi_1") if gate else ("wi",)
        parts = {name: tree(q=Linear(D, inner), k=Linear(D, inner), v=Linear(D, inner), o=Linear(inner, D))
                 for name in ("SelfAttention", "EncDecAttention")[: 1 + is_decoder]}
        parts["DenseReluDense"] = tree(**{name: Linear(D, c.d_ff) for name in w_in}, wo=Linear(c.d_ff, D))
        norm = functools.partial(nn.RMSNorm, D, c.layer_norm_epsilon)
        self.layer = nn.ModuleList(tree(**{name: part, "layer_norm": norm()}) for name, part in parts.items())

    def dropout(self, x):
        return F.dropout(x, self.p, self.training)

    def keys_values(self, attention, x):
        return tuple(split_heads(attention[name](x), self.n_heads) for name in "kv")

    def attend(self, attention, x, keys_values, bias):
        """x (B, T, D), bias (1 or B, 1 or H, T, S) added to the scores. T5 does not scale by 1/sqrt(Dh)."""
        q, (k, v), p = split_heads(attention["q"](x), self.n_heads), keys_values, self.p if self.training else 0.0
        if x.is_cuda or not torch.is_grad_enabled():
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)
        else:  # the same, written out: on a CPU the fused kernel takes no bias that learns, and this is 4 % faster
            h = self.dropout((q @ k.mT).add_(bias).softmax(-1, dtype=torch.float32).to(q.dtype)) @ v
        return self.dropout(attention["o"](merge_heads(h)))

    def forward(self, h, bias, cross, cross_bias, store):
        """h (B, T, D); cross: the encoder's keys and values, or None; store(k, v) adds those of earlier steps."""
        attention, norm = self.layer[0].values()
        x = norm(h)
        h = h + self.attend(attention, x, store(*self.keys_values(attention, x)), bias)
        if cross is not None:
            attention, norm = self.layer[1].values()
            h = h + self.attend(attention, norm(h), cross, cross_bias)
        feed_forward, norm = self.layer[-1].values()
        *w_in, w_out = feed_forward.values()  # the gate, if there is one, is the second
        x = norm(h)
        x = math.prod((w(x) for w in w_in[1:]), start=self.act(w_in[0](x)))
        return h + self.dropout(w_out(self.dropout(x)))


class T5Stack(nn.Module):
    """The encoder or the decoder, between the embedding and the head."""

    def __init__(self, c, is_decoder):
        super().__init__()
        n_layers = (c.num_decoder_layers or c.num_layers) if is_decoder else c.num_layers
        self.block = nn.ModuleList(T5Block(c, is_decoder) for _ in range(n_layers))
        table = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)  # stands in the first block, for all of them
        self.block[0].layer[0]["SelfAttention"]["relative_attention_bias"] = table
        self.final_layer_norm, self.p = nn.RMSNorm(c.d_model, c.layer_norm_epsilon), c.dropout_rate
        self.buckets = (not is_decoder, c.relative_attention_num_buckets, c.relative_attention_max_distance)

    def position_bias(self, n):
        """(1, H, n, n); minus infinity where the decoder must not look ahead."""
        table = self.block[0].layer[0]["SelfAttention"]["relative_attention_bias"]
        bidirectional, buckets = self.buckets[0], relative_position_buckets(n, n, *self.buckets)
        bias = table(buckets.to(table.weight.device)).permute(2, 0, 1)[None]
        return bias if bidirectional else bias.masked_fill(~causal(n, n, bias.device), -math.inf)

    def cross_keys_values(self, encoded):
        return [block.keys_values(block.layer[1]["EncDecAttention"], encoded) for block in self.block]

    def forward(self, h, bias, cross=None, cross_bias=None, store=lambda layer, k, v: (k, v), where=slice(None)):
        """h (B, T, D), embedded -> hidden states (B, T, D), or only those `where`. cross[i] and store(i, k, v) are block i's."""
        h = F.dropout(h, self.p, self.training)
        for i, block in enumerate(self.block):
            h = block(h, bias, cross[i] if cross else None, cross_bias, functools.partial(store, i))
        return F.dropout(self.final_layer_norm(h)[where], self.p, self.training)


class T5(nn.Module):
    """Encoder-decoder: T5 v1.0 (ReLU, tied head), T5 v1.1 and FLAN-T5 (gated GELU, untied head)."""

    DEFAULTS = dict(
        model_type="t5", vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=None, num_heads=8,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.1, layer_norm_epsilon=1e-6,
        feed_forward_proj="relu", tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    # What some checkpoints store besides: copies of `shared`, and a bias that T5 v1.0 never uses.
    IGNORED = ("embed_tokens.weight", "lm_head.weight", "EncDecAttention.relative_attention_bias.weight")

    def __init__(self, config):
        super().__init__()
        config = dict(config)  # transformers 5 says tie_word_embeddings: true always, and what it means elsewhere
        config["tie_word_embeddings"] = config.pop("scale_decoder_outputs", config.get("tie_word_embeddings", True))
        self.config = checked(config, self.DEFAULTS)
        self.c = c = SimpleNamespace(**self.config)
        n_buckets = c.relative_attention_num_buckets
        require(n_buckets % 4 == 0, f"relative_attention_num_buckets must be a multiple of 4, not {n_buckets}")
        require(c.relative_attention_max_distance > n_buckets // 2, "relative_attention_max_distance is too small")
        require(c.dropout_rate < 1, f"dropout_rate must be below 1, not {c.dropout_rate}")
        require(type(c.decoder_start_token_id) is int, "decoder_start_token_id must be a token's number")
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder, self.decoder = T5Stack(c, is_decoder=False), T5Stack(c, is_decoder=True)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.d_model, c.vocab_size)
        for name, p in self.named_parameters():  # the standard deviations of Mesh TensorFlow's T5
            if p.dim() == 2 and not p.is_meta:
                fan_in = c.d_model * c.d_kv if ".q." in name else 1 if "shared" in name else p.shape[1]
                nn.init.normal_(p, std=(c.d_model if "relative" in name else fan_in) ** -0.5)

    def encode(self, input_ids, attention_mask):
        """(B, S) ids and mask -> hidden states (B, S, D)."""
        h = self.shared(input_ids)
        return self.encoder(h, self.encoder.position_bias(h.shape[1]) + additive(attention_mask, h.dtype))

    def head(self, h):
        return linear(h * self.c.d_model**-0.5, self.shared.weight) if self.c.tie_word_embeddings else self.lm_head(h)

    def forward(self, input_ids, attention_mask, decoder_input_ids, where=slice(None)):
        """ids (B, S), mask (B, S), decoder ids (B, T), padded on the right -> logits (B, T, V).

        With `where`, rows and places of N tokens: (N, V), of those alone; a loss need not pay for the padding's logits.
        """
        cross = self.decoder.cross_keys_values(self.encode(input_ids, attention_mask))
        h = self.shared(decoder_input_ids)
        bias, cross_bias = self.decoder.position_bias(h.shape[1]), additive(attention_mask, h.dtype)
        return self.head(self.decoder(h, bias, cross, cross_bias, where=where))

    def prefill(self, input_ids, attention_mask, room):
        """Encode the prompt once -> (cache with room for that many decoder tokens, logits (B, V) of the first)."""
        encoded = self.encode(input_ids, attention_mask)
        cache = Cache(len(self.decoder.block), (len(input_ids), self.c.num_heads, room, self.c.d_kv), encoded)
        cache.cross, cache.mask = self.decoder.cross_keys_values(encoded), additive(attention_mask, encoded.dtype)
        cache.bias = self.decoder.position_bias(room)
        return cache, self.step(torch.full_like(input_ids[:, :1], self.c.decoder_start_token_id), cache)[:, -1]

    def step(self, tokens, cache):
        """The next decoder tokens (B, T) -> logits (B, T, V); the cache grows by T."""
        end = cache.length + tokens.shape[1]
        bias = cache.bias[:, :, cache.length : end, :end]
        h, cache.length = self.decoder(self.shared(tokens), bias, cache.cross, cache.mask, cache.append), end
        return self.head(h)

    generate = generate


# --------------------------------------------------------------------------------------------- Llama


def rope_frequencies(dim, theta, scaling=None):
    """Rotary frequencies (dim / 2,), float32. Llama-3.1 slows the low ones down (2407.21783, section 3.2)."""
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "default":
        return inverse
    require(kind == "llama3", f"rope_scaling of type {kind!r} is not supported, only 'llama3' and none")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, length = (scaling.get(name) for name in names)
    ok = all(type(x) in (int, float) and x > 0 for x in (factor, low, high, length)) and high > low
    require(ok, f"rope_scaling must give {', '.join(names)}, positive, high above low")
    smooth = (length * inverse / (2 * math.pi) - low) / (high - low)  # 0 for waves too long to turn in `length`
    return torch.lerp(inverse / factor, inverse, smooth.clamp(0, 1))


def rotate(x, cos, sin):
    """RoPE: each pair (x_i, x_{i + Dh/2}) of x (B, H, T, Dh) turned by its angle; cos, sin from `rotations`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)  # roll brings each one its partner


def rotations(positions, frequencies, dtype):
    """positions (T,) -> cos, sin (T, Dh); in the first half the sine is negative, as a rotation has it."""
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class LlamaLayer(nn.Module):
    """h + attention(norm(h)), then h + SwiGLU(norm(h)). Several query heads may share one key-value head."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.n_kv = c.num_attention_heads, c.num_key_value_heads
        inner, inner_kv, D, F_ = self.n_heads * c.head_dim, self.n_kv * c.head_dim, c.hidden_size, c.intermediate_size
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(D, c.rms_norm_eps) for _ in "12")
        self.self_attn = tree(
            q_proj=Linear(D, inner), k_proj=Linear(D, inner_kv), v_proj=Linear(D, inner_kv), o_proj=Linear(inner, D))
        self.mlp = tree(gate_proj=Linear(D, F_), up_proj=Linear(D, F_), down_proj=Linear(F_, D))

    def forward(self, h, cos, sin, mask, store):
        """h (B, T, D); store(k, v) adds the keys and values of earlier steps."""
        project_q, project_k, project_v, project_out = self.self_attn.values()
        gate, up, down = self.mlp.values()
        x = self.input_layernorm(h)
        q, k = rotate(split_heads(project_q(x), self.n_heads), cos, sin), split_heads(project_k(x), self.n_kv)
        k, v = store(rotate(k, cos, sin), split_heads(project_v(x), self.n_kv))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.n_kv != self.n_heads)
        h = h + project_out(merge_heads(a))
        x = self.post_attention_layernorm(h)
        return h + down(F.silu(gate(x)) * up(x))


class Llama(nn.Module):
    """Decoder-only: Llama-2, Llama-3.x (grouped queries, scaled RoPE), Mistral (sliding window)."""

    DEFAULTS = dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=None,
        tie_word_embeddings=False, hidden_act="silu", initializer_range=0.02, pad_token_id=None, eos_token_id=2)
    IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")  # the second: a copy, where the head is tied

    def __init__(self, config):
        super().__init__()
        config = dict(config)  # transformers 5 says rope_parameters for what others call rope_theta and rope_scaling
        rope = config.pop("rope_parameters", None) or config.get("rope_scaling") or {}
        require(isinstance(rope, dict), f"rope_scaling must be an object, not {rope!r:.80}")
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} or None
        config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        self.config = checked(config, self.DEFAULTS)
        self.c = c = SimpleNamespace(**self.config)
        c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
        c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        divides = c.num_attention_heads % c.num_key_value_heads == 0
        require(divides, f"num_key_value_heads {c.num_key_value_heads} must divide {c.num_attention_heads} heads")
        require(c.head_dim % 2 == 0 < c.head_dim, f"head_dim must be even and not {c.head_dim}")
        require(c.rope_theta > 0, "rope_theta must be positive")
        require(c.hidden_act == "silu", f"hidden_act must be 'silu', not {c.hidden_act!r}")
        self.frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)  # no buffer: always float32
        self.model = tree(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(LlamaLayer(c) for _ in range(c.num_hidden_layers)),
            norm=nn.RMSNorm(c.hidden_size, c.rms_norm_eps))
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size)
        for p in self.parameters():
            if p.dim() == 2 and not p.is_meta:
                nn.init.normal_(p, std=c.initializer_range)

    def logits(self, tokens, start, mask, store, where):
        """tokens (B, T), the first at place `start`; store(layer, k, v) -> all keys and values. Returns what `forward` does."""
        embedding, h = self.model["embed_tokens"].weight, self.model["embed_tokens"](tokens)
        self.frequencies = self.frequencies.to(h.device)
        places = torch.arange(start, start + h.shape[1], device=h.device)  # padding counts: RoPE's scores know distances alone
        cos, sin = rotations(places, self.frequencies, h.dtype)
        for i, layer in enumerate(self.model["layers"]):
            h = layer(h, cos, sin, mask, functools.partial(store, i))
        h = self.model["norm"](h)[where]
        return linear(h, embedding) if self.c.tie_word_embeddings else self.lm_head(h)

    def mask(self, is_token, n_queries):
        """is_token (B, S) -> (B, 1, n_queries, S) bool. Padding sees itself, so that no row is empty."""
        n = is_token.shape[1]
        mask = causal(n_queries, n, is_token.device, self.c.sliding_window) & is_token[:, None, None]
        return mask | torch.eye(n, dtype=torch.bool, device=mask.device)[n - n_queries :]

    def forward(self, input_ids, attention_mask, where=slice(None)):
        """ids (B, T), mask (B, T) of 1 (token) and 0 (padding, either side) -> logits (B, T, V); `where` as in T5."""
        mask = self.mask(attention_mask.bool(), input_ids.shape[1])
        return self.logits(input_ids, 0, mask, lambda layer, k, v: (k, v), where)

    def prefill(self, input_ids, attention_mask, room):
        """Read the prompts once -> (cache with room for that many more tokens, logits (B, V) of the next one)."""
        longest = int(attention_mask.sum(1).max())
        order = attention_mask.argsort(dim=1, stable=True)[:, -longest:]  # all padding left, tokens in their order
        tokens, is_token, c = input_ids.gather(1, order), attention_mask.gather(1, order).bool(), self.c
        shape = (len(tokens), c.num_key_value_heads, longest + room, c.head_dim)
        cache = Cache(c.num_hidden_layers, shape, self.model["embed_tokens"].weight)
        cache.mask = F.pad(is_token, (0, room), value=True)
        cache.sees_all = not c.sliding_window and bool(is_token.all())
        return cache, self.step(tokens, cache, where=(slice(None), -1))

    def step(self, tokens, cache, where=slice(None)):
        """The next tokens (B, T) -> logits (B, T, V), or only those `where`; the cache grows by T."""
        T, end = tokens.shape[1], cache.length + tokens.shape[1]
        mask = None if T == 1 and cache.sees_all else self.mask(cache.mask[:, :end], T)
        logits, cache.length = self.logits(tokens, cache.length, mask, cache.append, where), end
        return logits

    generate = generate


# ---------------------------------------------------------------------------------------------- BERT


class Bert(nn.Module):
    """Sentence encoder: BERT, MiniLM. Left out: the pooler and the masked-language head, which no router uses."""

    DEFAULTS = dict(
        model_type="bert", vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12,
        hidden_act="gelu", position_embedding_type="absolute", pad_token_id=0)
    IGNORED = ("embeddings.position_ids", "pooler.dense.", "cls.")

    def __init__(self, config):
        super().__init__()
        self.config = checked(config, self.DEFAULTS)
        self.c = c = SimpleNamespace(**self.config)
        require(c.hidden_size % c.num_attention_heads == 0, "num_attention_heads must divide hidden_size")
        require(c.hidden_act in ACTIVATIONS, f"hidden_act {c.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        require(c.position_embedding_type == "absolute", "position_embedding_type must be 'absolute'")
        D, F_ = c.hidden_size, c.intermediate_size
        norm = functools.partial(nn.LayerNorm, D, eps=c.layer_norm_eps)
        self.embeddings = tree(
            word_embeddings=nn.Embedding(c.vocab_size, D), position_embeddings=nn.Embedding(c.max_position_embeddings, D),
            token_type_embeddings=nn.Embedding(c.type_vocab_size, D), LayerNorm=norm())
        self.encoder = tree(layer=nn.ModuleList(tree(
            attention=tree(
                self=tree(query=nn.Linear(D, D), key=nn.Linear(D, D), value=nn.Linear(D, D)),
                output=tree(dense=nn.Linear(D, D), LayerNorm=norm())),
            intermediate=tree(dense=nn.Linear(D, F_)), output=tree(dense=nn.Linear(F_, D), LayerNorm=norm()),
        ) for _ in range(c.num_hidden_layers)))

    def forward(self, input_ids, attention_mask):
        """ids (B, T), mask (B, T), padded on the right -> hidden states (B, T, D)."""
        e, H = self.embeddings, self.c.num_attention_heads
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        h = e["word_embeddings"](input_ids) + e["position_embeddings"](positions) + e["token_type_embeddings"].weight[0]
        h, mask = e["LayerNorm"](h), additive(attention_mask, h.dtype)
        for layer in self.encoder["layer"]:
            q, k, v = (split_heads(f(h), H) for f in layer["attention"]["self"].values())
            a = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
            h = layer["attention"]["output"]["LayerNorm"](h + layer["attention"]["output"]["dense"](a))
            x = ACTIVATIONS[self.c.hidden_act](layer["intermediate"]["dense"](h))
            h = layer["output"]["LayerNorm"](h + layer["output"]["dense"](x))
        return h

    encode = forward


def pool(encoder, input_ids, attention_mask):
    """ids, mask (B, T) -> (B, D): hidden states of a Bert or of a T5's encoder, averaged over the tokens, scaled to unit length."""
    h = encoder.encode(input_ids, attention_mask).float() * attention_mask[..., None]
    return F.normalize(h.sum(1), dim=-1)  # the mean's direction is the sum's


@torch.no_grad()
def embed(encoder, tokenizer, texts, batch_size=64):
    """Texts -> (N, D) float32, as `pool` makes them; a text too long for Bert's positions keeps its last token, an end mark."""
    limit = encoder.config.get("max_position_embeddings", 512)
    ids = [e.ids for e in tokenizer.encode_batch(list(texts))]
    ids = [i if len(i) <= limit else i[: limit - 1] + i[-1:] for i in ids]
    out = torch.empty(len(ids), encoder.config.get("hidden_size") or encoder.config["d_model"])
    for rows in by_length(ids, batch_size):
        tokens, mask = (x.to(device_of(encoder)) for x in pad([ids[i] for i in rows]))
        out[rows] = pool(encoder, tokens, mask).cpu()
    return out


# --------------------------------------------------------------------------------------- load and save

ARCHITECTURES = {  # by config.json's model_type: the class here, and its name in transformers
    "t5": (T5, "T5ForConditionalGeneration"), "llama": (Llama, "LlamaForCausalLM"), "mistral": (Llama, "MistralForCausalLM"),
    "bert": (Bert, "BertModel")}


@contextlib.contextmanager
def atomic(path):
    """Every file is written through this: to a temporary file beside it, synced, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"not readable as JSON ({error})"
        raise BadInput(f"{path}: {why}") from None


def read_config(folder):
    config = read_json(folder / "config.json")
    require(isinstance(config, dict), f"{folder / 'config.json'}: holds no settings (model_type, sizes); download it again")
    return config


def load(path, device="cpu", dtype=None):
    """A checkpoint folder in Hugging Face's layout -> (model in eval mode, tokenizers.Tokenizer).

    The model is laid out without memory, then takes the tensors as they are read: straight to `device`, in the dtype stored or
    the one asked for. Anything missing, left over, of another shape or not finite is a BadInput. Not read: pickles, which can
    run code, and generation_config.json.
    """
    path = Path(path)
    require(path.is_dir(), f"{path}: no such folder; give one with config.json, model.safetensors and tokenizer.json")
    file, config, known = path / "config.json", read_config(path), list(ARCHITECTURES)
    kind = config.get("model_type")
    require(kind in known, f"{file}: model_type {kind!r} is not supported; take one of {', '.join(known)}")
    try:
        with torch.device("meta"):
            model = ARCHITECTURES[kind][0](config)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    tokenizer = load_tokenizer(path / "tokenizer.json", model.config["vocab_size"])
    model.load_state_dict(read_weights(path, model, device, dtype), assign=True)
    return model.eval(), tokenizer


def load_tokenizer(file, vocab_size):
    save_it = "save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    require(file.exists(), f"{file}: no such file; {save_it}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise BadInput(f"{file}: not a tokenizer ({error}); {save_it}") from None
    last = max(tokenizer.get_vocab().values(), default=0)
    require(last < vocab_size, f"{file}: token id {last}, but config.json says vocab_size {vocab_size}; {save_it}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def weight_files(path):
    """The folder's safetensors files: one, or the shards that its index names."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    pickled = sorted(p.name for p in path.glob("*.bin"))
    why = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no model.safetensors"
    require(index.exists(), f"{path}: {why}; convert with transformers: save_pretrained(..., safe_serialization=True)")
    shards = read_json(index)
    shards = shards.get("weight_map") if isinstance(shards, dict) else None
    require(shards and isinstance(shards, dict), f"{index}: has no weight_map; download it again")
    inside = [f.name for f in path.iterdir() if f.is_file()]
    for name in shards.values():
        require(name in inside, f"{index}: names {name!r}, which is not in the folder; download it again")
    return [path / name for name in sorted(set(shards.values()))]


def read_weights(path, model, device, dtype):
    """{name: tensor} of all that `model` wants; dtype None: that of the first tensor."""
    wanted, found = model.state_dict(), {}
    device = f"cuda:{torch.cuda.current_device()}" if str(device) == "cuda" else device  # torchrun: each rank its own
    for file in weight_files(path):
        try:
            with safe_open(file, "pt", device=str(device)) as f:
                for key in f.keys():
                    name = key.removeprefix("bert.")
                    if name in wanted:
                        found[name] = read_tensor(f, key, tuple(wanted[name].shape), dtype)
                        dtype = found[name].dtype
                    elif not any(part in name for part in model.IGNORED):
                        raise BadInput(f"tensor {key} has no place in the {type(model).__name__} of config.json")
        except (BadInput, SafetensorError, OSError) as error:
            why = error if isinstance(error, BadInput) else f"not a whole safetensors file ({error})"
            raise BadInput(f"{file}: {why}; download the folder again") from None
    if missing := sorted(set(wanted) - set(found)):
        more = f", and {len(missing) - 1} more" * (len(missing) > 1)
        raise BadInput(f"{path}: tensor {missing[0]} is missing{more}; download the folder again")
    return found


def read_tensor(f, key, wanted, dtype):
    """One tensor, its header's claims checked before it takes memory."""
    shape, stored = tuple(f.get_slice(key).get_shape()), f.get_slice(key).get_dtype()
    require(shape == wanted, f"tensor {key} is {shape}, config.json says {wanted}")
    require(stored in ("F64", "F32", "F16", "BF16"), f"tensor {key} is stored as {stored}, quantised, not supported")
    tensor = f.get_tensor(key).to(dtype)
    ends = torch.stack(tensor.aminmax())  # NaN and infinity show there; 20 times as fast as isfinite()
    require(ends.isfinite().all(), f"tensor {key} holds NaN or infinite numbers")
    return tensor


def save(model, tokenizer, path):
    """Write a checkpoint folder that `load` and `transformers` read. config.json comes last: with it, it is whole."""
    path, config = Path(path), {k: v for k, v in model.config.items() if k != "dtype"}
    with atomic(path / "model.safetensors") as temporary:
        tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic(path / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    special = {key: config.get(f"{key}_id") for key in ("pad_token", "eos_token")}
    special = {key: i[0] if isinstance(i, list) else i for key, i in special.items()}
    special = {key: tokenizer.id_to_token(i) for key, i in special.items() if i is not None and i >= 0}
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    config["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    config["architectures"] = [ARCHITECTURES[config["model_type"]][1]]
    write_json(path / "config.json", config)


def state_of(**parts):
    """Modules and optimisers by name -> {"name.key": tensor}, an optimiser's "name.i.key" for its i-th parameter."""
    tensors = {}
    for name, part in parts.items():
        state = part.state_dict()
        if isinstance(part, torch.optim.Optimizer):
            state = {f"{i}.{key}": value for i, each in state["state"].items() for key, value in each.items()}
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


def part_of(tensors, name):
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def restore_state(tensors, **parts):
    """Give modules and optimisers what `state_of` took from them."""
    for name, part in parts.items():
        state = part_of(tensors, name)
        if isinstance(part, torch.optim.Optimizer):
            by_parameter = {}
            for key, value in state.items():
                i, _, key = key.partition(".")
                by_parameter.setdefault(int(i), {})[key] = value
            state = {**part.state_dict(), "state": by_parameter}
        part.load_state_dict(state)
