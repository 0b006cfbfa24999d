"""Golden checkpoints for tests/test_model.py: tiny, random, one of each spelling, answered by transformers.

    python tests/make_fixtures.py                # needs transformers; rewrites tests/fixtures/
    python tests/make_fixtures.py qwen2 qwen3    # these alone

Each folder is a checkpoint (config.json, weights, tokenizer.json) and golden.safetensors: inputs, logits and
greedy tokens as transformers computes them in float32, with its version in the metadata. Every row of a decoder-only
model is computed alone, so the golden values know nothing of padding. The end-of-text token is chosen from what
the model generates, so that rows end at different times.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FIXTURES = Path(__file__).parent / "fixtures"
VOCAB, WORDS = 64, "the a otter nurses its young mammals swim in rivers and birds lay eggs copper conducts heat".split()
LENGTHS, NEW = (24, 17, 9, 3, 1), 20
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # with theta 500: one fast, one middling, two slow frequencies
T5 = dict(vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=3, relative_attention_num_buckets=8,
          relative_attention_max_distance=16, decoder_start_token_id=0, pad_token_id=0)
LLAMA = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512, pad_token_id=None, bos_token_id=1)
CASES = {  # name: (config, changes of the spelling, or of the storage, of what transformers writes)
    "t5": (transformers.T5Config(**T5, feed_forward_proj="relu", num_decoder_layers=1), ("torch_dtype",)),
    "flan-t5": (transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), ("flan",)),
    "llama-2": (transformers.LlamaConfig(**LLAMA), ("torch_dtype", "rope_theta")),
    "llama-3.1": (
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, head_dim=8,
                                 rope_parameters={"rope_theta": 500.0, **LLAMA3}),
        ("torch_dtype", "rope_theta", "sharded")),
    "llama-3.2": (
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
                                 rope_parameters={"rope_theta": 500.0, **LLAMA3}),
        ("bfloat16",)),
    "mistral-window": (transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=5), ()),
    "mistral": (transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=None, head_dim=6),
                ("torch_dtype", "rope_theta")),
    "llama-bias": (transformers.LlamaConfig(**LLAMA, attention_bias=True), ()),
    "qwen2": (transformers.Qwen2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
              ("torch_dtype", "rope_theta", "window")),
    "qwen3": (transformers.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=6), ("sharded",)),
    "bert": (transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=24, max_position_embeddings=40), ("torch_dtype",)),
}
CLASSES = {"t5": transformers.T5ForConditionalGeneration, "llama": transformers.LlamaForCausalLM,
           "mistral": transformers.MistralForCausalLM, "qwen2": transformers.Qwen2ForCausalLM,
           "qwen3": transformers.Qwen3ForCausalLM, "bert": transformers.BertModel}


def make_tokenizer(kind):
    tokenizer = byte_tokenizer() if kind.startswith("qwen") else word_tokenizer(kind)
    tokenizer.enable_truncation(8)  # stored so in real tokenizer.json files; `load` must switch both off
    tokenizer.enable_padding(length=8)
    return tokenizer


def byte_tokenizer():
    """transformers takes Qwen's own class for a Qwen, whatever is stored: it knows bytes and merges alone."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(ord("a"), ord("z") + 1)), "Ġ", "th", "the"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = transformers.Qwen2Tokenizer(vocab, [("t", "h"), ("th", "e")]).backend_tokenizer
    tokenizer.add_special_tokens(tokens[:3])
    return tokenizer


def word_tokenizer(kind):
    special = {"t5": ["<pad>", "</s>", "<unk>"], "bert": ["[PAD]", "[CLS]", "[SEP]", "<unk>"]}
    special = special.get(kind, ["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    around = {"t5": "$A </s>", "bert": "[CLS] $A [SEP]"}.get(kind, "<s> $A")
    ids = [(t, tokenizer.token_to_id(t)) for t in around.split() if t != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return tokenizer


def randomise(model):
    """Large, different weights everywhere: with the usual small ones attention hardly matters, nor does a mistake."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(0.3 * torch.randn_like(p) + ("norm" in name.lower() and "bias" not in name))
            else:
                table = "emb" in name or "shared" in name  # small: a large tied one would only repeat its input
                p.normal_(std=0.2 if table else 1.0 if "bias" in name else 1.3 * p.shape[1] ** -0.5)
            p.copy_(p.bfloat16())  # so that a bfloat16 fixture loses nothing


def lengths(tokens, eos):
    """How many tokens each row generates if it ends at the first of `eos`."""
    ends = torch.isin(tokens, torch.tensor(eos)).int()
    return [int(e.argmax()) + 1 if e.any() else len(e) for e in ends]


def ends(tokens, eos):
    """The tokens that the rows end with."""
    return {row[n - 1] for row, n in zip(tokens.tolist(), lengths(tokens, eos), strict=True)}


def choose_eos(tokens, several):
    """The token (or two) that ends the rows at the most different times, but not all of them."""
    ids = sorted(set(tokens.flatten().tolist()) - {0})
    choices = [[a, b] for a in ids for b in ids if a < b] if several else [[a] for a in ids]
    return max(choices, default=[0], key=lambda eos: (ends(tokens, eos) >= set(eos), len(set(lengths(tokens, eos)))))


def generate(model, rows, eos):
    """Greedy tokens (B, NEW) of every row alone, padded with -1 after its end; eos None: never ends."""
    out, margin = torch.full((len(rows), NEW), -1), 9.0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    for i, row in enumerate(rows):
        mask = torch.ones_like(row)[None]
        g = model.generate(row[None], attention_mask=mask, max_new_tokens=NEW, do_sample=False,
                           output_scores=True, return_dict_in_generate=True)
        new = g.sequences[0, -len(g.scores) :]
        out[i, : len(new)] = new
        top = torch.cat(g.scores).topk(2).values
        margin = min(margin, float((top[:, 0] - top[:, 1]).min()))
    return out, margin


def build(name, seed):
    """Write one fixture; False if this seed's answers are too close to call or end all at once."""
    config, changes = CASES[name]
    folder, kind = FIXTURES / name, config.model_type
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = CLASSES[kind](config).eval()
    if "flan" in name:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, config.d_model))
    randomise(model)
    rows = [torch.randint(3, VOCAB, (n,)) for n in LENGTHS]
    golden = {f"row{i}": row for i, row in enumerate(rows)}
    tokenizer = make_tokenizer(kind)
    with torch.no_grad():
        if kind == "bert":
            golden |= {f"hidden{i}": model(row[None]).last_hidden_state[0] for i, row in enumerate(rows)}
        elif kind == "t5":
            golden["decoder"] = torch.cat((torch.zeros(5, 1).long(), torch.randint(3, VOCAB, (5, 21))), 1)
            for i, row in enumerate(rows):
                out = model(row[None], decoder_input_ids=golden["decoder"][i : i + 1])
                golden[f"logits{i}"], golden[f"hidden{i}"] = out.logits[0], out.encoder_last_hidden_state[0]
        else:
            golden |= {f"logits{i}": model(row[None]).logits[0] for i, row in enumerate(rows)}
        if kind != "bert":
            free, margin = generate(model, rows, None)
            eos = choose_eos(free, several=name in ("llama-3.1", "qwen3"))
            golden["generated"], _ = generate(model, rows, eos)
            if margin < 1e-3 or len(set(lengths(free, eos))) < 4 or max(lengths(free, eos)) < NEW:
                return False
            config.eos_token_id = eos if len(eos) > 1 else eos[0]
        else:
            golden |= text_embeddings(model, tokenizer)

    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="9KB" if "sharded" in changes else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    raw = json.loads((folder / "config.json").read_text())
    if "torch_dtype" in changes:
        raw["torch_dtype"] = raw.pop("dtype")
    if "rope_theta" in changes:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope if rope.pop("rope_type") != "default" else None
        if raw["rope_scaling"]:
            raw["rope_scaling"]["rope_type"] = "llama3"
    if "flan" in changes:  # as Google's checkpoints say it; transformers 5 writes another pair
        raw["tie_word_embeddings"] = raw.pop("scale_decoder_outputs")
    if "window" in changes:  # as Qwen's checkpoints say it: the window does not count; transformers 5 says null
        raw["sliding_window"] = 5
        del raw["layer_types"]
    if "bfloat16" in changes:
        raw["dtype"] = "bfloat16"
        weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    golden = {k: v.clone().contiguous() for k, v in golden.items()}
    save_file(golden, folder / "golden.safetensors", metadata={"transformers": transformers.__version__})
    return True


def text_embeddings(model, tokenizer):
    """Mean over the tokens, unit length: as sentence-transformers pools MiniLM. The last text is over-long."""
    texts = ["the otter nurses its young", "birds", "copper conducts heat and the mammals swim", "eggs " * 60]
    out, tokenizer = [], Tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(40)  # max_position_embeddings; it keeps [SEP]
    tokenizer.no_padding()
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        out.append(torch.nn.functional.normalize(model(ids).last_hidden_state.mean(1), dim=-1))
    return {"embeddings": torch.cat(out)}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for name in sys.argv[1:] or CASES:
        seed = next(seed for seed in range(500) if build(name, seed))
        size = sum(f.stat().st_size for f in (FIXTURES / name).iterdir())
        print(f"{name}: seed {seed}, {size / 1e3:.0f} kB, {len(list((FIXTURES / name).iterdir()))} files")
