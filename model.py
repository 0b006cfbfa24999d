"""Transformers from scratch: T5, Llama (also Mistral, Qwen2, Qwen3) and BERT, in plain PyTorch.

Knowledge purification needs teachers and students of both kinds, decoder-only and encoder-decoder,
and a sentence encoder for the routers. Modules have the names that they have in Hugging Face
checkpoints, so a state dict loads as it is. In this order: what the models share, with greedy
generation; T5, Llama, Bert; batches and the key-value cache; sentence vectors; `load` and `save`;
files and errors; a faster matrix product for CPUs.

References: T5 (arXiv 1910.10683), gated feed-forward (2002.05202), LLaMA (2302.13971), Llama 3
(2407.21783), Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388), RoPE (2104.09864),
grouped queries (2305.13245), BERT (1810.04805). Left out: beam search and sampling (the method
needs one repeatable rationale), quantised weights, and every model that is not named here.

Letters in shapes: B rows, T tokens (S where others attend to them), D width of the model, H heads,
Dh width of a head, V vocabulary.

    python -c "import model; lm, tokenizer = model.load('PATH/TO/flan-t5-small'); print(lm.config)"
"""

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------- what the models share

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
}


class Model(nn.Module):
    """What T5, Llama and Bert share: settings (config.json's override DEFAULTS), and generation,
    which a Bert cannot do.

    With lm.recompute = True a T5 or Llama trains in less memory and more time: see `Cache.run`.
    """

    recompute = False
    folder = None  # that it was loaded from
    more_ends = ()  # of its generation_config.json

    def __init__(self, config):
        super().__init__()
        self.c = SimpleNamespace(**checked(config, self.DEFAULTS))
        self.config = vars(self.c)  # the same, as a dict

    @property
    def ends(self):
        """Return the ids of the tokens that end a text. Qwen's config.json says only one of its two."""
        return [*as_list(self.config["eos_token_id"]), *self.more_ends]

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens):
        """Continue prompts with the likeliest token each time -> (B, <= max_new_tokens) new ids.

        For T5 and Llama. ids, mask (B, S), padded on either side. A row that has ended is filled up
        with pad_token_id, or with its end token where there is no such id. `until_end` tells what
        was written.
        """
        fillers = [*as_list(self.config["pad_token_id"]), *self.ends, 0]
        filler = next(i for i in fillers if i >= 0)  # old Llamas say pad_token_id: -1
        ends = torch.tensor(self.ends, device=input_ids.device)
        out = input_ids.new_full((len(input_ids), max_new_tokens), filler)
        rows = torch.arange(len(input_ids), device=input_ids.device)  # rows of `out` still computed
        alive = torch.ones_like(rows, dtype=torch.bool)  # which of these have not ended
        cache, logits = self.prefill(input_ids, attention_mask, max_new_tokens)
        for t in range(max_new_tokens):
            if t > 0:
                logits = self.next_logits(tokens[:, None], cache)
            tokens = logits.argmax(-1)  # (rows,)
            out[rows, t] = tokens.where(alive, filler)
            alive &= ~torch.isin(tokens, ends)
            n_alive = int(alive.sum())
            if n_alive == 0:
                return out[:, : t + 1]
            # Rows that have ended leave the batch once that pays: it costs a step, on a GPU also a new
            # graph. A GPU reads all weights in each step, however few rows there are.
            if n_alive <= len(rows) * (0.75 if tokens.is_cpu else 0.25):
                kept = alive.nonzero()[:, 0]  # numbers: each selection by `alive` waits for a GPU
                cache.select(kept)
                rows = rows[kept]
                tokens = tokens[kept]
                alive = alive[kept]
        return out

    def next_logits(self, tokens, cache):
        """The next token of each row (B, 1) -> logits (B, V). On a GPU the step is a CUDA graph.

        A step of one token is a thousand small kernels: to launch them takes longer than to run them.
        As a graph they are launched at once, again and again, with other tokens at another place.
        """
        if not tokens.is_cuda:
            return self.step(tokens, cache)[:, -1]
        if cache.graph is None:
            n_read = cache.length
            cache.tokens = tokens.clone()
            cache.place = torch.full((1,), n_read, device=tokens.device)
            self.step(cache.tokens, cache)  # what a first call sets up must not be in the graph
            cache.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(cache.graph, capture_error_mode="thread_local"):
                cache.logits = self.step(cache.tokens, cache)[:, -1]
            cache.length = n_read
        cache.tokens.copy_(tokens)
        cache.place.fill_(cache.length)
        cache.graph.replay()
        cache.length += 1
        return cache.logits


class Linear(nn.Linear):
    """y = x W^T, or x W^T + b. `linear`, at the end of this file, picks the faster product."""

    def __init__(self, d_in, d_out, bias=False):
        super().__init__(d_in, d_out, bias)

    def forward(self, x):
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of x^2) * weight."""

    def forward(self, x):
        x = super().forward(x)
        return x.to(product_dtype(x))  # once, and not in every product that reads it


def product_dtype(x):
    """Return the dtype in which autocast would multiply x; its own without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def parts(**modules):
    """Return a module that holds these: parts(q=Linear(...)).q, and q.weight in the state dict."""
    return nn.ModuleDict(modules)


def split_heads(x, width):
    return x.unflatten(-1, (-1, width)).transpose(1, 2)  # (B, T, H * Dh) -> (B, H, T, Dh)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, H, T, Dh) -> (B, T, H * Dh)


def additive(mask, h):
    """(B, S) of 1 (token) and 0 (padding) -> (B, 1, 1, S) of 0 and a very negative number.

    It is added to the scores of attention in h. It is finite, so a row of nothing but padding stays
    finite.
    """
    dtype = product_dtype(h)
    return for_attention((mask[:, None, None] == 0).to(dtype) * torch.finfo(dtype).min)


def for_attention(bias):
    """Give a bias (..., S) the form that fused kernels take: rows of a multiple of 16 in memory, and
    autocast's dtype. Otherwise each layer keeps a copy, or takes a kernel that keeps all scores.
    """
    bias = bias.to(product_dtype(bias))
    if bias.is_cpu:
        return bias
    n = bias.shape[-1]
    return F.pad(bias.contiguous(), (0, -n % 16))[..., :n]


# --------------------------------------------------------------------------------------------- T5


def relative_position_buckets(distance, bidirectional, n_buckets, max_distance):
    """Return T5's buckets for distances from queries to keys, int64.

    Near distances have a bucket each. Far ones share buckets that grow logarithmically, up to
    max_distance; what is farther falls into the last (1910.10683, section 2.1).
    """
    first = 0
    if bidirectional:  # keys ahead (distance above 0) take the second half of the buckets
        n_buckets //= 2
        first = (distance > 0) * n_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = n_buckets // 2
    far = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)  # 0 to 1
    far = (exact + (far * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class T5Attention(nn.Module):
    """Multi-head attention, with a bias for distance. T5 does not divide the scores by sqrt(Dh)."""

    def __init__(self, c):
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.width = c.d_kv
        self.q = Linear(c.d_model, inner)
        self.k = Linear(c.d_model, inner)
        self.v = Linear(c.d_model, inner)
        self.o = Linear(inner, c.d_model)
        self.dropout = nn.Dropout(c.dropout_rate)

    def keys_values(self, x):
        """x (B, S, D) -> keys and values, (B, H, S, Dh) each."""
        return split_heads(self.k(x), self.width), split_heads(self.v(x), self.width)

    def forward(self, x, k, v, bias):
        """x (B, T, D); k, v from `keys_values`; bias (1 or B, 1 or H, 1 or T, S) -> (B, T, D)."""
        q = split_heads(self.q(x), self.width)
        if not (x.is_cpu and torch.is_grad_enabled()):
            p = self.dropout.p if self.training else 0.0
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)
        else:  # the same, written out: on a CPU the fused kernel takes no bias that learns
            weights = (q @ k.mT).add_(bias).softmax(-1)  # (B, H, T, S)
            h = self.dropout(weights) @ v
        return self.dropout(self.o(merge_heads(h)))


class T5FeedForward(nn.Module):
    """wo(act(wi(x))), or with a gate wo(act(wi_0(x)) * wi_1(x))."""

    def __init__(self, c):
        super().__init__()
        kind = c.feed_forward_proj
        name = kind.removeprefix("gated-")
        require(name in ACTIVATIONS, f"feed_forward_proj {kind!r} is not known; take gated-gelu")
        if kind == "gated-gelu":  # T5 v1.1 and FLAN-T5 mean the tanh approximation
            name = "gelu_new"
        self.act = ACTIVATIONS[name]
        self.is_gated = kind.startswith("gated-")
        names = ("wi_0", "wi_1") if self.is_gated else ("wi",)
        for name in names:
            self.add_module(name, Linear(c.d_model, c.d_ff))
        self.wo = Linear(c.d_ff, c.d_model)
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(self, x):
        if self.is_gated:
            x = self.act(self.wi_0(x)) * self.wi_1(x)
        else:
            x = self.act(self.wi(x))
        return self.dropout(self.wo(self.dropout(x)))


class T5Block(nn.Module):
    """Self-attention, cross-attention (in the decoder) and feed-forward, each as h + f(norm(h))."""

    def __init__(self, c, is_decoder):
        super().__init__()
        norm = functools.partial(RMSNorm, c.d_model, c.layer_norm_epsilon)
        layers = [parts(SelfAttention=T5Attention(c), layer_norm=norm())]
        if is_decoder:
            layers.append(parts(EncDecAttention=T5Attention(c), layer_norm=norm()))
        layers.append(parts(DenseReluDense=T5FeedForward(c), layer_norm=norm()))
        self.layer = nn.ModuleList(layers)

    def forward(self, h, bias, cross, append=None):
        """h (B, T, D), bias (1 or B, H, T, S) -> (B, T, D).

        cross: keys, values and mask of the encoder's output, or (). append: see `Cache.run`.
        """
        layer = self.layer[0]
        x = layer.layer_norm(h)
        k, v = layer.SelfAttention.keys_values(x)
        if append:
            k, v = append(k, v)
        h = h + layer.SelfAttention(x, k, v, bias)
        if cross:
            layer = self.layer[1]
            h = h + layer.EncDecAttention(layer.layer_norm(h), *cross)
        layer = self.layer[-1]
        return h + layer.DenseReluDense(layer.layer_norm(h))


class T5Stack(nn.Module):
    """The encoder or the decoder: all between the embedding and the head."""

    def __init__(self, c, n_layers, is_decoder):
        super().__init__()
        self.is_decoder = is_decoder
        self.max_distance = c.relative_attention_max_distance
        self.block = nn.ModuleList(T5Block(c, is_decoder) for _ in range(n_layers))
        # One bias per bucket and head. The first block holds them, all blocks use them.
        table = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)
        self.block[0].layer[0].SelfAttention.relative_attention_bias = table
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)
        self.dropout = nn.Dropout(c.dropout_rate)

    def bias(self, n, cache):
        """Return what is added to the attention scores of the next n tokens, (1 or B, H, n, S).

        It is minus infinity where the decoder must not look ahead, and very negative at the
        encoder's padding.
        """
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        query, key = cache.places(n)
        distance = key - query[:, None]  # (n, S)
        buckets = relative_position_buckets(
            distance, not self.is_decoder, table.num_embeddings, self.max_distance)
        bias = table(buckets).permute(2, 0, 1)[None]
        bias = bias.masked_fill(distance > 0, -math.inf) if self.is_decoder else bias + cache.mask
        return for_attention(bias)

    def forward(self, h, cache, keep=slice(None)):
        """h (B, T, D), the next T tokens -> hidden states (B, T, D), or of the tokens `keep` alone."""
        n = h.shape[1]
        bias = self.bias(n, cache)
        h = self.dropout(h)
        for i, block in enumerate(self.block):
            cross = (*cache.cross[i], cache.mask) if cache.cross else ()
            h = cache.run(block, i, h, bias, cross)
        cache.length += n
        return self.dropout(self.final_layer_norm(h)[keep])


class T5(Model):
    """Encoder-decoder: T5 v1.0 (ReLU, tied head), T5 v1.1 and FLAN-T5 (gated GELU, own head)."""

    DEFAULTS = dict(
        model_type="t5", vocab_size=32128, d_model=512, d_kv=64, d_ff=2048,
        num_layers=6, num_decoder_layers=None, num_heads=8,
        relative_attention_num_buckets=32, relative_attention_max_distance=128,
        feed_forward_proj="relu", dropout_rate=0.1, layer_norm_epsilon=1e-6,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)

    def __init__(self, config):
        config = dict(config)
        # T5 v1.0 has no head of its own: `shared` is its head, and what goes into it is scaled.
        # `tie_word_embeddings` says here that it is scaled. transformers 5 says that with
        # `scale_decoder_outputs`, and writes `tie_word_embeddings: true` for every T5.
        if "scale_decoder_outputs" in config:
            config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
        super().__init__(config)
        c = self.c
        require(c.dropout_rate < 1, f"dropout_rate must be below 1, not {c.dropout_rate}")
        buckets = c.relative_attention_num_buckets
        fit = 4 <= buckets < 2 * c.relative_attention_max_distance
        require(fit, f"relative_attention_num_buckets must be from 4 to 2 * max_distance, not {buckets}")
        require(c.decoder_start_token_id < c.vocab_size, "decoder_start_token_id is beyond vocab_size")
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = T5Stack(c, c.num_layers, is_decoder=False)
        self.decoder = T5Stack(c, c.num_decoder_layers or c.num_layers, is_decoder=True)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.d_model, c.vocab_size)
        # Mesh TensorFlow's T5 begins so: normal, with deviation 1 / sqrt(fan in).
        for name, p in self.named_parameters():
            if p.dim() == 1:  # a norm's scale stays 1
                continue
            fan_in = p.shape[1]
            if "shared" in name:
                fan_in = 1
            elif "relative" in name:
                fan_in = c.d_model
            elif ".q." in name:  # attention does not divide by sqrt(Dh): the weights begin divided
                fan_in *= c.d_kv
            nn.init.normal_(p, std=fan_in**-0.5)

    def blocks(self):
        return [*self.encoder.block, *self.decoder.block]

    def encode(self, input_ids, attention_mask):
        """ids and mask (B, S) -> the encoder's hidden states (B, S, D)."""
        h = self.shared(input_ids)
        cache = Cache(additive(attention_mask, h), self.recompute)
        return self.encoder(h, cache)

    def forward(self, input_ids, attention_mask, decoder_input_ids, keep=slice(None)):
        """ids (B, S), mask (B, S) of 1 and 0, decoder ids (B, T) -> logits (B, T, V).

        The mask is 0 at padding, which may stand on either side. Decoder ids are padded on the right.
        keep: rows and places of N tokens, to get the logits of these alone, (N, V).
        """
        return self.step(decoder_input_ids, self.begin(input_ids, attention_mask), keep)

    def begin(self, input_ids, attention_mask):
        """Encode the prompts -> a cache with the keys and values of the decoder's cross-attention."""
        encoded = self.encode(input_ids, attention_mask)
        cache = Cache(additive(attention_mask, encoded), self.recompute)
        for block in self.decoder.block:
            cache.cross.append(block.layer[1].EncDecAttention.keys_values(encoded))
        return cache

    def prefill(self, input_ids, attention_mask, room):
        """Encode the prompts -> cache with room for `room` tokens, logits (B, V) of the first."""
        cache = self.begin(input_ids, attention_mask)
        cache.room = room
        start = torch.full_like(input_ids[:, :1], self.c.decoder_start_token_id)
        return cache, self.step(start, cache)[:, -1]

    def step(self, tokens, cache, keep=slice(None)):
        """The next T tokens (B, T) -> logits (B, T, V), or of the tokens `keep` alone."""
        h = self.decoder(self.shared(tokens), cache, keep)
        if self.c.tie_word_embeddings:
            h = h * self.c.d_model**-0.5
        head = self.lm_head or self.shared
        return linear(h, head.weight)


# ------------------------------------------------------------------------------------------ Llama


def rope_frequencies(dim, theta, scaling):
    """Return the angles (dim / 2,), float32, by which RoPE turns a pair from one place to the next.

    Llama-3.1 makes the small ones smaller, as `llama3` of transformers' modeling_rope_utils.py.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    require(kind == "llama3", f"rope_scaling of type {kind!r} is not supported, only llama3")
    names = "low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"
    try:
        low, high, factor, length = (float(scaling[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"rope_scaling must give the numbers {', '.join(names)}") from None
    # Turns within the first training's length: below `low` divided by factor, above `high` unchanged.
    turns = length * frequencies / (2 * math.pi)
    smooth = (turns - low) / (high - low)
    return torch.lerp(frequencies / factor, frequencies, smooth.clamp(0, 1))


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x_i, x_{i + Dh/2}) of x (B, H, T, Dh) by its angle.

    cos and sin (T, Dh), the sine negative in the first half. The result is
    (a cos - b sin, b cos + a sin).
    """
    partners = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partners, sin)


def attend(q, k, v, bias):
    """Attention of q (B, H, T, Dh) to k, v (B, K, S, Dh), where H / K heads of q share one -> like q."""
    n_sharing = q.shape[1] // k.shape[1]
    can_share = q.is_cpu or not torch.is_grad_enabled() and has_shared_heads(q.device, q.dtype)
    if n_sharing == 1 or can_share:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=n_sharing > 1)
    # Without such a kernel PyTorch writes out all scores. So the heads that share keys become more
    # rows of one head.
    q = q.unflatten(1, (-1, n_sharing)).flatten(2, 3)  # (B, K, H / K * T, Dh)
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=for_attention(bias.repeat(1, 1, n_sharing, 1)))
    return a.unflatten(2, (n_sharing, -1)).flatten(1, 2)


@functools.cache
def has_shared_heads(device, dtype):
    """Tell whether a GPU's fused kernel lets heads share keys under a bias: cuDNN's, on Hopper.

    On Blackwell it writes wrong texts (pytorch issue 193893), or there is none.
    """
    if device.type != "cuda" or dtype == torch.float32 or torch.__version__ < (2, 11):
        return False
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return is_hopper and torch.backends.cudnn.version() > 91500


class LlamaLayer(nn.Module):
    """h + attention(norm(h)), then h + SwiGLU(norm(h)). Query heads may share a key-value head.

    Qwen2 adds biases to queries, keys and values. Qwen3 normalises each head's queries and keys.
    """

    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        inner = c.intermediate_size
        d_q = c.num_attention_heads * c.head_dim
        d_kv = c.num_key_value_heads * c.head_dim
        self.width = c.head_dim
        self.input_layernorm = RMSNorm(D, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(D, c.rms_norm_eps)
        bias = c.attention_bias or c.model_type == "qwen2"
        self.self_attn = parts(
            q_proj=Linear(D, d_q, bias),
            k_proj=Linear(D, d_kv, bias),
            v_proj=Linear(D, d_kv, bias),
            o_proj=Linear(d_q, D, c.attention_bias))
        if c.model_type == "qwen3":
            self.self_attn.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.self_attn.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.mlp = parts(
            gate_proj=Linear(D, inner),
            up_proj=Linear(D, inner),
            down_proj=Linear(inner, D))

    def forward(self, h, rotation, bias, append=None):
        """h (B, T, D); rotation: cos and sin of the T places; bias (B, 1, T, S) -> (B, T, D).

        append: see `Cache.run`.
        """
        attention = self.self_attn
        x = self.input_layernorm(h)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (split_heads(projection(x), self.width) for projection in projections)
        if "q_norm" in attention:
            q = attention.q_norm(q)
            k = attention.k_norm(k)
        n_heads = q.shape[1], k.shape[1]
        q, k = rotate(torch.cat((q, k), 1), *rotation).split(n_heads, 1)
        if append:
            k, v = append(k, v)
        a = attend(q, k, v, bias)
        h = h + attention.o_proj(merge_heads(a))
        x = self.post_attention_layernorm(h)
        return h + self.mlp.down_proj(F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


class Llama(Model):
    """Decoder-only: Llama-2, Llama-3.x (grouped queries, scaled RoPE), Mistral (sliding window),
    Qwen2, Qwen2.5 and Qwen3 (without a sliding window).
    """

    DEFAULTS = dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=None, head_dim=None,
        attention_bias=False, rope_theta=10000.0, sliding_window=None, hidden_act="silu",
        rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=False, pad_token_id=None,
        eos_token_id=2)

    def __init__(self, config):
        config = dict(config)
        # transformers 5 says rope_parameters for rope_scaling and rope_theta together
        rope = config.pop("rope_parameters", None) or config.get("rope_scaling") or {}
        require(isinstance(rope, dict), f"rope_scaling must be an object, not {rope!r:.80}")
        config["rope_scaling"] = rope or None
        if "rope_theta" in rope:
            config["rope_theta"] = rope["rope_theta"]
        super().__init__(config)
        c = self.c
        c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
        c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        require(c.head_dim % 2 == 0, f"head_dim must be even, not {c.head_dim}")
        divides = c.num_attention_heads % c.num_key_value_heads == 0
        require(divides, "num_key_value_heads must divide num_attention_heads")
        require(c.hidden_act == "silu", f"hidden_act must be 'silu', not {c.hidden_act!r}")
        if c.model_type in ("qwen2", "qwen3"):
            require(not config.get("use_sliding_window"), "use_sliding_window must be false")
        if c.model_type != "mistral":  # other configs may hold a window, and do not use it
            c.sliding_window = None
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, rope)
        # `rotate` wants the first half of the sine negative; the cosine is the same for both signs.
        self.frequencies = torch.cat((-frequencies, frequencies))  # (Dh,)
        self.model = parts(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(LlamaLayer(c) for _ in range(c.num_hidden_layers)),
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps))
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=c.initializer_range)

    def blocks(self):
        return list(self.model.layers)

    def bias(self, query, key, is_token):
        """Places (n,) and (S,), is_token (B, S) -> what is added to the scores, (B, 1, n, S): minus
        infinity where a token must not look.

        A token sees the tokens before it and itself, `sliding_window` of them at most. Padding sees
        itself too, so no row is empty.
        """
        query = query[:, None]
        seen = is_token[:, None, None] & (key < query)
        if self.c.sliding_window:
            seen &= key > query - self.c.sliding_window
        seen = seen | (key == query)
        bias = torch.zeros(seen.shape, dtype=self.model.norm.weight.dtype, device=seen.device)
        return for_attention(bias.masked_fill(~seen, -math.inf))

    def forward(self, input_ids, attention_mask, keep=slice(None)):
        """ids (B, T), mask (B, T) of 1 and 0 -> logits (B, T, V). Mask and `keep` are as in T5."""
        return self.step(input_ids, Cache(attention_mask.bool(), self.recompute), keep)

    def prefill(self, input_ids, attention_mask, room):
        """Read the prompts -> cache with room for `room` more tokens, logits (B, V) of the next."""
        mask, order = attention_mask.sort(dim=1, stable=True)  # (B, S): padding first, then the tokens
        cache = Cache(F.pad(mask.bool(), (0, room), value=True))
        cache.room = cache.mask.shape[1]
        return cache, self.step(input_ids.gather(1, order), cache, keep=(slice(None), -1))

    def step(self, tokens, cache, keep=slice(None)):
        """The next T tokens (B, T) -> logits (B, T, V), or of the tokens `keep` alone."""
        n = tokens.shape[1]
        query, key = cache.places(n)
        bias = self.bias(query, key, cache.mask[:, : len(key)])
        h = self.model.embed_tokens(tokens)
        # Padding counts as places too: RoPE's scores depend on distances alone.
        angles = query[:, None] * self.frequencies.to(h.device)  # (n, Dh)
        rotation = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        for i, layer in enumerate(self.model.layers):
            h = cache.run(layer, i, h, rotation, bias)
        cache.length += n
        head = self.lm_head or self.model.embed_tokens
        return linear(self.model.norm(h)[keep], head.weight)


# ------------------------------------------------------------------------------------------- BERT


class Bert(Model):
    """Sentence encoder: BERT, MiniLM. Left out, as no router uses them: pooler, masked-language head."""

    DEFAULTS = dict(
        model_type="bert", vocab_size=30522, hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, type_vocab_size=2, hidden_act="gelu",
        max_position_embeddings=512, position_embedding_type="absolute", layer_norm_eps=1e-12,
        pad_token_id=0)

    def __init__(self, config):
        super().__init__(config)
        c = self.c
        D = c.hidden_size
        require(D % c.num_attention_heads == 0, "num_attention_heads must divide hidden_size")
        require(c.hidden_act in ACTIVATIONS, f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
        require(
            c.position_embedding_type == "absolute", "position_embedding_type must be 'absolute'")
        norm = functools.partial(nn.LayerNorm, D, c.layer_norm_eps)
        dense = functools.partial(nn.Linear, D)
        self.embeddings = parts(
            word_embeddings=nn.Embedding(c.vocab_size, D),
            position_embeddings=nn.Embedding(c.max_position_embeddings, D),
            token_type_embeddings=nn.Embedding(c.type_vocab_size, D),
            LayerNorm=norm())
        layers = nn.ModuleList()
        for _ in range(c.num_hidden_layers):
            heads = parts(query=dense(D), key=dense(D), value=dense(D))
            layers.append(parts(
                attention=parts(self=heads, output=parts(dense=dense(D), LayerNorm=norm())),
                intermediate=parts(dense=dense(c.intermediate_size)),
                output=parts(dense=nn.Linear(c.intermediate_size, D), LayerNorm=norm())))
        self.encoder = parts(layer=layers)

    def forward(self, input_ids, attention_mask):
        """ids (B, T), mask (B, T), padded on the right -> hidden states (B, T, D)."""
        width = self.c.hidden_size // self.c.num_attention_heads
        act = ACTIVATIONS[self.c.hidden_act]
        table = self.embeddings
        places = table.position_embeddings.weight[: input_ids.shape[1]]
        h = table.word_embeddings(input_ids) + places + table.token_type_embeddings.weight[0]
        h = table.LayerNorm(h)
        mask = additive(attention_mask, h)
        for layer in self.encoder.layer:
            heads = layer.attention.self
            out = layer.attention.output
            q, k, v = (split_heads(head(h), width) for head in heads.values())
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            h = out.LayerNorm(h + out.dense(merge_heads(a)))
            x = act(layer.intermediate.dense(h))
            h = layer.output.LayerNorm(h + layer.output.dense(x))
        return h

    encode = forward


# -------------------------------------------------------------------------------- batches and cache


def pad(sequences, device="cpu", value=0):
    """Lists of ids -> ids and mask of 1 and 0, (B, longest) int64 each, padded on the right."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=value)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)


def by_length(sequences, batch_size, limit=math.inf, held=len):
    """Return lists of at most batch_size indices, of similar length, the longest first.

    So there is little padding, and what does not fit into memory shows at once. held(sequence): how
    many tokens its row holds. A batch holds `limit` at most, unless one row alone holds more.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches = []
    start = 0
    while start < len(order):
        fitting = limit // held(sequences[order[start]])  # all rows are padded to the first
        n_rows = max(1, min(batch_size, fitting))
        batches.append(order[start : start + n_rows])
        start += n_rows
    return batches


def keep_end(ids, limit, first=1):
    """Cut a list of token ids to `limit`: the first `first` and the end stay, what is between goes.

    keep_end([1, 2, 3, 4, 5], limit=3) is [1, 4, 5]. Question and choices stand at a text's end.
    """
    if len(ids) <= limit:
        return ids
    return ids[:first] + ids[len(ids) - limit + first :]


def as_list(token_ids):
    """Return a list of what a config gives as a number, a list or null: [5] of 5, [] of None."""
    if token_ids is None:
        return []
    return token_ids if isinstance(token_ids, list) else [token_ids]


def until_end(tokens, eos_token_id):
    """Return a list of generated ids up to and with its first end token; all of it without one."""
    ends = as_list(eos_token_id)
    for n, token in enumerate(tokens, 1):
        if token in ends:
            return tokens[:n]
    return tokens


class Cache:
    """What a decoder keeps between steps: keys and values, in buffers that are written in place.

    Without room it keeps nothing: then one step is a pass over all tokens, as in training.
    """

    def __init__(self, mask, recompute=False):
        self.recompute = recompute  # see `run`
        self.mask = mask  # T5: of the prompts, from `additive`. Llama: (B, room) bool, True at tokens
        self.room = 0  # tokens that the buffers can hold
        self.length = 0  # tokens that they hold
        self.kept = []  # per layer keys and values of these tokens, (2, B, H, room, Dh)
        self.cross = []  # T5: the same of the encoder's output, (B, H, S, Dh) each
        self.graph = None  # see Model.next_logits
        self.place = None  # with a graph: where the next token goes, (1,); `length` otherwise

    def places(self, n):
        """Return where the next n tokens stand, (n,), and all places that there are then, (S,)."""
        if self.place is not None:  # a graph has one size: places that are still empty are masked
            return self.place, torch.arange(self.room, device=self.mask.device)
        key = torch.arange(self.length + n, device=self.mask.device)
        return key[self.length :], key

    def run(self, block, i, *inputs):
        """Return what block i makes of its inputs, and of the keys and values that are kept.

        In training nothing is kept, and the block runs compiled where train.py compiled it. With
        `recompute` autograd keeps the inputs alone, and its backward pass runs the block again
        (gradient checkpointing, arXiv 1604.06174).
        """
        append = functools.partial(self.append, i) if self.room > 0 else None
        if append or not torch.is_grad_enabled():  # `forward` itself is never compiled
            return block.forward(*inputs, append)
        if self.recompute:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def append(self, layer, k, v):
        """k, v (B, H, T, Dh) of the next T tokens -> all keys and values of this layer so far."""
        new = torch.stack((k, v))
        end = self.length + new.shape[3]
        if layer == len(self.kept):
            self.kept.append(F.pad(new, (0, 0, 0, self.room - end)))
        elif self.place is not None:
            return self.kept[layer].index_copy_(3, self.place, new)
        else:
            self.kept[layer][:, :, :, self.length : end] = new
        return self.kept[layer][:, :, :, :end]

    def select(self, rows):
        """Keep these rows of the batch, in this order; a row named twice is copied."""
        self.kept = [buffer[:, rows] for buffer in self.kept]
        self.cross = [(k[rows], v[rows]) for k, v in self.cross]
        self.mask = self.mask[rows]
        self.graph = None
        self.place = None


# ------------------------------------------------------------------------------- sentence vectors


def pool(encoder, input_ids, attention_mask):
    """ids, mask (B, T) -> (B, D): mean hidden state of a Bert or a T5's encoder, at unit length."""
    h = encoder.encode(input_ids, attention_mask).float()  # (B, T, D)
    h = h * attention_mask[..., None]
    return F.normalize(h.sum(1), dim=-1)  # the mean's direction is the sum's


@torch.no_grad()
def embed(encoder, tokenizer, texts, batch_size=64):
    """N texts -> (N, D) float32 on the CPU, from `pool`. A text too long loses its beginning.

    What sentence_bert_config.json says is not read: all-MiniLM-L6-v2 takes 512 tokens here, 256 there.
    """
    limit = encoder.config.get("max_position_embeddings", 512)
    ids = token_ids(tokenizer, texts)
    if max(map(len, ids), default=0) > limit:
        say_once(f"the encoder reads {limit} tokens at most; longer texts lose their beginning")
    table = next(encoder.parameters())  # the embeddings of the tokens, (V, D)
    out = torch.empty(len(ids), table.shape[1])
    for rows in by_length(ids, batch_size):
        batch = pad([keep_end(ids[row], limit) for row in rows], table.device)
        out[rows] = pool(encoder, *batch).cpu()
    why = "gives vectors that are not finite; store it in float32 or bfloat16"
    require(out.isfinite().all(), f"{encoder.folder}: {why}")
    return out


# ---------------------------------------------------------------------------------- load and save

ARCHITECTURES = {  # by config.json's model_type: the class here, and its name in transformers
    "t5": (T5, "T5ForConditionalGeneration"),
    "llama": (Llama, "LlamaForCausalLM"),
    "mistral": (Llama, "MistralForCausalLM"),
    "qwen2": (Llama, "Qwen2ForCausalLM"),
    "qwen3": (Llama, "Qwen3ForCausalLM"),
    "bert": (Bert, "BertModel"),
}
IGNORED = (  # what some checkpoints store besides
    "embed_tokens.weight", "lm_head.weight",  # copies of a T5's `shared`, or of a tied embedding
    "EncDecAttention.relative_attention_bias.weight",  # T5 v1.0 never uses it
    "rotary_emb.inv_freq", "position_ids",  # computed here
    "pooler.dense.", "cls.")  # BERT's heads
BESIDE = (  # files beside the weights that tell how a model is addressed, and when it ends
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json")


def device_of(lm):
    return next(lm.parameters()).device


def token_ids(tokenizer, texts):
    """Return the token ids of each text, with the tokenizer's start and end tokens.

    Take a thousand texts at a time, on all cores, and keep only the ids of each encoding.
    """
    texts = list(texts)
    ids = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer.encode_batch(texts[start : start + 1000])
        ids += [encoding.ids for encoding in batch]
    return ids


def load(path, device="cpu", dtype=None):
    """Read a checkpoint folder in Hugging Face's layout -> model in eval mode, its tokenizer.

    The weights go straight to `device`, in the dtype stored or the one asked for. Raise BadInput
    where one is missing, left over, of another shape or not finite. Not read: pickles, which can
    run code, and generation_config.json, but for its end tokens (so no penalty of repetition).
    """
    path = Path(path)
    require(
        path.is_dir(),
        f"{path}: no such folder; give one with config.json, model.safetensors and tokenizer.json")
    config = read_config(path)
    kind = config.get("model_type")
    known = list(ARCHITECTURES)
    require(
        kind in known,
        f"{path}/config.json: model_type {kind!r} is not supported; take one of {', '.join(known)}")
    why = "quantised weights are not read; take the checkpoint as it was before"
    require(not config.get("quantization_config"), f"{path}: {why}")
    try:
        with torch.device("meta"):  # its shape, without memory
            lm = ARCHITECTURES[kind][0](config)
    except BadInput as error:
        raise BadInput(f"{path}/config.json: {error}") from None
    tokenizer = load_tokenizer(path / "tokenizer.json", lm.config["vocab_size"])
    lm.load_state_dict(read_weights(lm, path, device, dtype), assign=True)
    if isinstance(lm, Llama):
        lm.frequencies = lm.frequencies.to(device)  # now: a copy in each step waits for a GPU
    lm.folder = path
    lm.more_ends = generation_ends(path)
    return lm.eval(), tokenizer


def generation_ends(path):
    """Return the end tokens that a folder's generation_config.json names."""
    file = path / "generation_config.json"
    ends = as_list(read_config(path, file.name).get("eos_token_id")) if file.exists() else []
    require(all(type(i) is int for i in ends), f"{file}: eos_token_id must be a number or some, not {ends}")
    return ends


def load_tokenizer(file, vocab_size):
    """Read tokenizer.json. Raise BadInput where it cannot encode, or has ids beyond vocab_size.

    Special tokens may lie beyond where no text gets them: copies of Llama-2 have such a <pad>.
    """
    mend = "save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    require(file.exists(), f"{file}: no such file; {mend}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        some = tokenizer.encode("Zq7 \u00ea \u6f22")  # raises where unknown text has no token
    except Exception as error:  # the library raises a bare Exception
        raise BadInput(f"{file}: not a tokenizer ({error}); {mend}") from None
    ids = set(tokenizer.get_vocab().values())
    for i, token in tokenizer.get_added_tokens_decoder().items():
        if token.special and i not in some.ids:
            ids.discard(i)
    last = max(ids, default=0)
    require(
        last < vocab_size,
        f"{file}: token id {last}, but config.json says vocab_size {vocab_size}; {mend}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def weight_files(path):
    """Return the folder's safetensors files: one, or the shards that its index names."""
    whole = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    why = "no model.safetensors"
    pickles = sorted(path.glob("*.bin"))
    if pickles:
        why = f"only pickled weights ({pickles[0].name}), which can run code"
    require(
        index.exists(),
        f"{path}: {why}; convert with transformers: save_pretrained(..., safe_serialization=True)")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (AttributeError, KeyError, TypeError):
        names = []
    require(names, f"{index}: has no weight_map; download it again")
    inside = os.listdir(path)
    for name in names:
        require(name in inside, f"{index}: names {name!r}, which is not in the folder; download it")
    return [path / name for name in names]


def current_name(name):
    """Return what a tensor of an old BERT, as bert-base-uncased stores it, is called today."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def read_weights(lm, path, device, dtype):
    """Return the state dict of `lm`, from the folder; dtype None: as stored, but a float16 T5 in float32.

    Raise BadInput if a tensor is missing, wrong, or has no place in the model.
    """
    again = "download the folder again"
    tensors = {}
    for file in weight_files(path):
        tensors |= read_tensors(file)[0]  # maps of the file, not read yet
    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    if isinstance(lm, T5):
        whole = any(name.startswith("decoder.block.") for name in tensors)
        require(whole, f"{path}: an encoder alone is not supported; take a whole T5, or a BERT")
        if "lm_head.weight" not in tensors:
            lm.lm_head = None  # then `shared` is the head, as in transformers 5
        if "decoder.embed_tokens.weight" in tensors:  # a copy of `shared`; MADLAD-400 has no other
            tensors.setdefault("shared.weight", tensors["decoder.embed_tokens.weight"])
    state = lm.state_dict()
    missing = sorted(state.keys() - tensors.keys())
    if missing:
        raise BadInput(
            f"{path}: tensor {missing[0]} is missing, and {len(missing) - 1} more; {again}")
    for name in sorted(tensors.keys() - state.keys()):
        ignored = any(part in name for part in IGNORED)
        require(ignored, f"{path}: tensor {name} has no place in config.json's model; {again}")
    for name, want in state.items():
        place = f"{path}: tensor {name}"
        tensor = tensors[name]
        require(
            tensor.shape == want.shape,
            f"{place} is {tuple(tensor.shape)}, config.json says {tuple(want.shape)}; {again}")
        require(
            tensor.is_floating_point() and tensor.itemsize > 1,
            f"{place} is stored as {tensor.dtype}, quantised; take the weights as they were before")
        if dtype is None:  # a T5's sums are too large for float16, in which some store its weights
            too_narrow = isinstance(lm, T5) and tensor.dtype == torch.float16
            dtype = torch.float32 if too_narrow else tensor.dtype
        state[name] = tensor.to(device).to(dtype)
        ends = torch.stack(state[name].aminmax())  # 20 times as fast as isfinite() of all
        require(ends.isfinite().all(), f"{place} holds NaN or infinite numbers; {again}")
    return state


def save(lm, tokenizer, path):
    """Write a checkpoint folder for `load` and transformers. config.json comes last: then it is whole.

    Copy the chat template and the other files in BESIDE from the folder that the model came from.
    """
    path = Path(path)
    with atomic(path / "model.safetensors") as temporary:
        save_file(lm.state_dict(), temporary, metadata={"format": "pt"})
    with atomic(path / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    for name in BESIDE:
        if lm.folder and (lm.folder / name).exists():
            with atomic(path / name) as temporary:
                shutil.copyfile(lm.folder / name, temporary)
        else:
            (path / name).unlink(missing_ok=True)
    if not (path / "tokenizer_config.json").exists():
        # transformers' AutoTokenizer learns here which tokens pad and end a text.
        special = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name in ("pad_token", "eos_token"):
            ids = as_list(lm.config.get(f"{name}_id"))
            if ids and ids[0] >= 0:
                special[name] = tokenizer.id_to_token(ids[0])
        write_json(path / "tokenizer_config.json", special)
    config = dict(lm.config)
    config.pop("dtype", None)
    config["torch_dtype"] = str(next(lm.parameters()).dtype).removeprefix("torch.")
    config["architectures"] = [ARCHITECTURES[config["model_type"]][1]]
    write_json(path / "config.json", config)


def state_of(**modules):
    """Return {"name.key": tensor} of modules and optimisers, given by name.

    The key of an optimiser's tensor is "i.key" for its i-th parameter.
    """
    tensors = {}
    for name, module in modules.items():
        state = module.state_dict()
        if isinstance(module, torch.optim.Optimizer):
            for i, moments in state["state"].items():
                tensors |= {f"{name}.{i}.{key}": value for key, value in moments.items()}
        else:
            tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


def read_tensors(file):
    """Return ({name: tensor}, metadata) of one safetensors file. Raise BadInput where it is none."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        why = "not readable as safetensors: damaged, or not a whole safetensors file"
        raise BadInput(f"{file}: {why} ({error})") from None


def part_of(tensors, name):
    """Return the tensors whose keys begin with "name.", without that prefix."""
    start = f"{name}."
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def restore_state(tensors, **modules):
    """Give modules and optimisers what `state_of` took from them."""
    for name, module in modules.items():
        state = part_of(tensors, name)
        if isinstance(module, torch.optim.Optimizer):
            numbers = {key.partition(".")[0] for key in state}
            moments = {int(i): part_of(state, i) for i in numbers}
            state = {**module.state_dict(), "state": moments}
        module.load_state_dict(state)


# ------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path to write to; rename it to `path` when that is done and on the disk.

    So a file is the old one or the new one, never half of it. Files that grow line by line are not
    written this way: a teacher's cache, and metrics.jsonl while a run goes on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(value, tensors={}):
    """Return a checksum of a value and of {name: tensor}; stored with them, it shows damage later."""
    parts = [value]
    for name, tensor in sorted(tensors.items()):
        parts.append((name, tensor.shape, zlib.crc32(tensor.cpu().numpy())))
    return hex(zlib.crc32(ascii(parts).encode()))  # not repr: it changes with Python's Unicode


def write_json(path, value):
    with atomic(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path):
    """Return what a JSON file holds. Raise BadInput where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None


def read_config(folder, name="config.json"):
    """Return a checkpoint's config.json, or another file of settings, a dict."""
    file = folder / name
    config = read_json(file)
    require(
        isinstance(config, dict),
        f"{file}: holds no settings; download it again")
    return config


def read_rows(path):
    """Yield (place, object) of a file of JSON lines or of one JSON array.

    Raise BadInput where the file cannot be read, and where a line does not parse.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        if file.peek().lstrip().startswith(b"["):
            for number, row in enumerate(read_json(path), 1):
                yield f"{path}: entry {number}", row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(
                    f"{path}:{number}: not a line of JSON ({error}); correct or delete it") from None
            yield f"{path}:{number}", row


# ----------------------------------------------------------------------------------------- errors


class BadInput(Exception):
    """Something the user gave is wrong. The text names the file, the place and the fix, in one line."""


def require(ok, message):
    if not ok:
        raise BadInput(message)


def checked(config, defaults):
    """Return `config` over `defaults`. Raise BadInput at a wrong type or an absurd size."""
    config = {**defaults, **config}
    for key, default in defaults.items():
        value = config[key]
        kind = type(default)
        if key in ("pad_token_id", "eos_token_id"):
            ok = all(type(i) is int and i < 2**31 for i in as_list(value))
        elif kind in (bool, str):
            ok = type(value) is kind
        elif kind is float:
            ok = type(value) in (int, float) and value >= 0
        else:  # a size; its default is None where another size stands in for it
            limit = 1000 if key.endswith("layers") else 10**6
            ok = value is default or type(value) is int and 1 <= value <= limit
        require(ok, f"{key} must be like {default!r}, not {value!r:.80}")
    return config


@functools.cache
def say_once(message):
    """Print a line to stderr, the first time only."""
    print(message, file=sys.stderr)


@contextlib.contextmanager
def one_line_errors():
    """Put this around a script's main: bad input, and what the system refuses, end it in one line.

    The exit code is then 2; after Ctrl-C it is 130. Under torchrun the line names the rank.
    """
    code = 2
    try:
        yield
        return
    except BadInput as error:
        message = f"error: {error}"
    except (OSError, SafetensorError) as error:  # what was written before is whole: see `atomic`
        message = f"error: {error}; solve that, or make room, and start again (train.py: --resume)"
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_full and "can't allocate memory" not in str(error):  # a CPU's is a bare RuntimeError
            raise
        less = "a smaller --batch-size (with --accumulate) or --batch-tokens, or --recompute"
        message = f"error: out of memory; give {less}"
    except KeyboardInterrupt:
        code = 130
        message = "\nstopped; the same command goes on from there (train.py: with --resume)"
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------- a faster product for CPUs

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
LARGE = 2**17  # from this many weights on, oneDNN pays


def linear(x, weight):
    """x (..., D_in), weight (D_out, D_in) -> x @ weight^T, (..., D_out).

    On a CPU, PyTorch gives float32 products to MKL. For large ones oneDNN can be faster: it took half
    the time on an AMD EPYC (tests/bench.py).
    """
    large = x.is_cpu and x.dtype == weight.dtype == torch.float32 and weight.numel() >= LARGE
    # Autocast and torch.compile pick a product themselves.
    picked = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if large and HAS_ONEDNN and not picked:
        return OneDNN.apply(x, weight)
    return F.linear(x, weight)


def onednn(x, weight):
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
        grad_x = onednn(grad, weight.mT)
        grad_weight = onednn(grad.flatten(0, -2).mT, x.flatten(0, -2).mT)  # (D_out, D_in)
        return grad_x, grad_weight
