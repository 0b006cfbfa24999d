"""Decoder-only students, in the formats of the checkpoints that people deploy.

Each family is a random tiny checkpoint with the files, the fields of config.json and the special
tokens of its namesake, and a chat template in its shape, without tools.
"""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import dying_at_step, read_lines, write_lines
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import eval as evaluation
import kp
import model
import train
from data.micro import students

jinja2 = pytest.importorskip("jinja2")  # torch needs it too

PLACES = ["pond", "forest", "desert", "kitchen", "harbour", "barn", "cave", "meadow"]
QUESTIONS = []
for number, place in enumerate(PLACES):
    wrong = PLACES[number - 1]
    choices = (f"the {place}", f"a {wrong}") if number % 2 else (f"a {wrong}", f"the {place}")
    text = f"Where, said Ann's guide on day {number}, is what belongs in the {place}?"
    QUESTIONS.append(kp.Question(str(number), "places", text, choices, 1 - number % 2))

# ------------------------------------------------------------------------------------------ four families

CHATML = (
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
QWEN_25 = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n" + CHATML
)
QWEN_3 = (
    "{%- if messages[0].role == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}\n"
    "    {%- if message.role == 'assistant' and loop.last %}\n"
    "        {{- '<think>\\n' + '\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "    {{- message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}"
)
LLAMA_32 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- set date_string = '26 Jul 2024' %}\n"
    "{%- endif %}\n"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
    '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
    '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
    '{{- "<|eot_id|>" }}\n'
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'ipython' %}\n"
    '        {{- "<|eom_id|>" }}\n'
    "    {%- else %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "        {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
TINY_LLAMA = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}"
)
ROPE_SCALING = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3")
ROPE_SCALING["original_max_position_embeddings"] = 8192
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, hidden_act="silu", attention_dropout=0.0, use_cache=True)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]

# {its name: (special tokens, chat template, config, ends in config.json, ends of generation_config.json)}
FAMILIES = {
    "SmolLM2-Instruct": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        SMOLLM_2,
        dict(model_type="llama", bos_token_id=1, pad_token_id=2, rope_theta=100000, rms_norm_eps=1e-5),
        "<|im_end|>",
        None,
    ),
    "Llama-3.2-1B-Instruct": (
        ["<|begin_of_text|>", "<|end_of_text|>", *HEADERS],
        LLAMA_32,
        dict(model_type="llama", head_dim=8, rope_scaling=ROPE_SCALING, rope_theta=500000.0, bos_token_id=0),
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    ),
    "Qwen2.5-0.5B-Instruct": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        QWEN_25,
        dict(model_type="qwen2", sliding_window=32768, use_sliding_window=False, max_window_layers=21),
        "<|im_end|>",
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "Qwen3-0.6B": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        QWEN_3,
        dict(model_type="qwen3", head_dim=16, sliding_window=None, use_sliding_window=False),
        "<|im_end|>",
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "TinyLlama-1.1B-Chat": (
        ["<unk>", "<s>", "</s>"],
        TINY_LLAMA,
        dict(model_type="llama", bos_token_id=1, tie_word_embeddings=False),
        "</s>",
        None,
    ),
}
LAST = {"Llama-3.2-1B-Instruct": "<|eot_id|>", "TinyLlama-1.1B-Chat": "</s>"}  # what ends a turn


WORDS = (  # how Llama-3 and Qwen split a text, up to the length of numbers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer(special, starts):
    """A small byte-pair encoding; `special` come first. Llamas begin a text with `starts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([kp.with_choices(q) for q in QUESTIONS], trainer)
    if starts:
        ids = [(starts, tokenizer.token_to_id(starts))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{starts} $A", special_tokens=ids)
    return tokenizer


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """{name: SimpleNamespace of its folder, its tokenizer, `render`, which is transformers'}"""
    made = {}
    for name, (special, template, config, ends, more_ends) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        starts = {"<|begin_of_text|>", "<s>"} & set(special)
        tokenizer = byte_tokenizer(special, "".join(starts))

        def ids_of(tokens, tokenizer=tokenizer):
            if isinstance(tokens, str):
                return tokenizer.token_to_id(tokens)
            return [tokenizer.token_to_id(token) for token in tokens]

        config = {**SIZES, "tie_word_embeddings": True, **config, "eos_token_id": ids_of(ends)}
        config |= dict(vocab_size=384, max_position_embeddings=2048, initializer_range=0.2)
        torch.manual_seed(0)
        model.save(model.Llama(config), tokenizer, folder)
        named = dict(eos_token=LAST.get(name, "<|im_end|>"), bos_token="".join(starts) or None)
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", **named)
        if name == "Qwen3-0.6B":
            (folder / "chat_template.jinja").write_text(template)
        else:
            settings["chat_template"] = template
        model.write_json(folder / "tokenizer_config.json", settings)
        if more_ends:
            model.write_json(folder / "generation_config.json", dict(eos_token_id=ids_of(more_ends)))
        compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)

        def render(*said, compiled=compiled, named=named):
            messages = []
            for role, content in zip(("user", "assistant"), said):
                messages.append(dict(role=role, content=content))
            asks = dict(add_generation_prompt=len(said) == 1, enable_thinking=False)
            text = compiled.render(messages=messages, **asks, **named)
            starts = named["bos_token"] or ""
            return starts + text.removeprefix(starts)  # TinyLlama leaves it to the tokenizer

        made[name] = SimpleNamespace(folder=folder, tokenizer=tokenizer, render=render)
    return made


@pytest.fixture(params=FAMILIES)
def family(families, request):
    return families[request.param]


# ---------------------------------------------------------------------------------- what it reads and learns


def plain_ids(family, text):
    return family.tokenizer.encode(text, add_special_tokens=False).ids


def test_a_conversation_is_what_its_chat_template_renders(family):
    """Prompt and target together are the template's text up to the token that ends the turn."""
    student, token_cache = kp.open_student(family.folder)
    prompts = [kp.predict_prompt(QUESTIONS[0]), kp.explain_prompt(QUESTIONS[1])]
    texts = [QUESTIONS[0].right, "It belongs there, so the answer is the forest."]
    inputs, targets = token_cache.pairs(student, prompts, texts)
    _, without_end = token_cache.pairs(student, prompts, texts, end=False)
    for prompt, text, read, learnt, choice in zip(prompts, texts, inputs, targets, without_end):
        assert read == plain_ids(family, family.render(prompt))
        whole = family.tokenizer.decode(read + learnt, skip_special_tokens=False)
        assert whole == family.render(prompt, text).rstrip("\n")
        assert learnt[:-1] == choice
        assert learnt[-1] in model.as_list(student.config["eos_token_id"])  # where generation ends


def test_the_dual_loss_is_that_of_each_token_read_alone(family):
    student, token_cache = kp.open_student(family.folder)
    questions = QUESTIONS[:3]
    rationales = [["Fish swim there."], ["It is so.", "Oaks grow there, so the answer is the forest."], []]

    def slow_loss(prompt, target):
        ids = plain_ids(family, family.render(prompt, target).rstrip("\n"))
        n = len(plain_ids(family, family.render(prompt)))
        losses = []
        for place in range(n, len(ids)):  # no padding, and nothing behind this token
            before = torch.tensor([ids[:place]])
            logits = student(before, torch.ones_like(before))[0, -1]
            losses.append(F.cross_entropy(logits, torch.tensor(ids[place])))
        return sum(losses) / len(losses)

    expected = 0.0
    for q, texts in zip(questions, rationales):
        expected += slow_loss(kp.predict_prompt(q), q.right) / 3
        for text in texts:
            expected += 0.7 * slow_loss(kp.explain_prompt(q), text) / len(texts) / 3
    loss = kp.dual_loss(student, token_cache, questions, rationales, 0.7)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["Llama-3.2-1B-Instruct", "Qwen3-0.6B"])
def test_a_student_that_has_learnt_stops_where_its_turn_ends(families, name):
    """Learnt by heart, the answer is generated word by word, and likeliest."""
    family = families[name]
    student, token_cache = kp.open_student(family.folder)
    questions = QUESTIONS[:3]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(30):
        loss = kp.dual_loss(student, token_cache, questions, [["So it is."], [], []], 1.0)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kp.exact_match(student, token_cache, questions, 24)["mean"] == 1
    assert kp.accuracy(student, token_cache, questions)["mean"] == 1
    assert kp.explanations(student, token_cache, questions[:1], 24) == ["So it is."]


def test_a_base_model_is_told_where_the_prompt_ends(families, tmp_path):
    """Without a chat template the text is plain, and of several end tokens the first one is learnt."""
    family = families["Llama-3.2-1B-Instruct"]
    model.save(*model.load(family.folder), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    student, token_cache = kp.open_student(tmp_path)
    (read,), (learnt,) = token_cache.pairs(student, ["predict: Where?"], ["a pond"])
    assert family.tokenizer.decode(read, skip_special_tokens=False) == "<|begin_of_text|>predict: Where? Answer:"
    assert family.tokenizer.decode(learnt, skip_special_tokens=False) == " a pond<|end_of_text|>"


# -------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    for split, some in (("train", QUESTIONS[:5]), ("valid", QUESTIONS[5:6]), ("test", QUESTIONS[6:])):
        write_lines(folder / f"{split}.jsonl", [asdict(replace(q, truth="")) for q in some])
    for name in ("gpt", "claude"):
        rows = [dict(id=q.id, rationale=f"{name} knows, so the answer is {q.right}.") for q in QUESTIONS[:5]]
        write_lines(folder / "rationales" / f"{name}.jsonl", rows)
    return folder


def run(places, student, out, *more):
    how = ["--purifier", "none", "--steps", "4", "--batch-size", "2", "--eval-every", "2", "--explain", "1"]
    how += ["--max-new-tokens", "8", "--warmup", "1", "--lr", "3e-3"]
    where = ["--data", str(places), "--student", str(student), "--out", str(out)]
    train.main(train.parse_args([*where, *how, *more]))
    return out


def test_it_trains_resumes_with_the_same_bits_and_exports(places, family, tmp_path):
    whole = run(places, family.folder, tmp_path / "whole")
    with dying_at_step(4):
        run(places, family.folder, tmp_path / "killed")
    killed = run(places, family.folder, tmp_path / "killed", "--resume")
    for name in ("student/model.safetensors", "metrics.jsonl", "purified.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    losses = [line["loss"] for line in read_lines(whole / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]

    # The export is what it came from, but for its weights.
    export = whole / "student"
    before = json.loads((family.folder / "config.json").read_text())
    after = json.loads((export / "config.json").read_text())
    assert {name: after[name] for name in before} == before
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        file = family.folder / name
        assert (export / name).exists() == file.exists()
        assert not file.exists() or (export / name).read_bytes() == file.read_bytes()
    student, token_cache = kp.open_student(export)
    prompt = kp.predict_prompt(QUESTIONS[0])
    assert token_cache.prompts([prompt]) == [plain_ids(family, family.render(prompt))]
    assert not torch.equal(next(student.parameters()), next(kp.open_student(family.folder)[0].parameters()))
    shares = evaluation.evaluate(evaluation.parse_args([str(whole)]))
    assert shares["accuracy"] == json.loads((whole / "result.json").read_text())["accuracy"]


def test_another_student_in_the_same_folder_leaves_no_template_behind(places, families, tmp_path):
    run(places, families["Qwen3-0.6B"].folder, tmp_path / "run")
    bare = tmp_path / "bare"
    model.save(*model.load(families["TinyLlama-1.1B-Chat"].folder), bare)
    (bare / "tokenizer_config.json").unlink()
    export = run(places, bare, tmp_path / "run") / "student"
    assert not (export / "chat_template.jinja").exists() and not (export / "generation_config.json").exists()
    assert kp.open_student(export)[1].chat == "{} Answer:"
    assert json.loads((export / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_ready_texts_are_scored_by_a_decoder_only_student_itself(places, families, tmp_path):
    out = run(places, families["SmolLM2-Instruct"].folder, tmp_path / "run", "--purifier", "oracle")
    assert json.loads((out / "result.json").read_text())["ledger"]["score_read"] > 0


def test_a_recomputing_student_trains_alike(places, families, tmp_path):
    for name, how in (("kept", []), ("recomputed", ["--recompute"])):
        run(places, families["Qwen3-0.6B"].folder, tmp_path / name, *how)
    kept = model.load(tmp_path / "kept" / "student")[0]
    recomputed = model.load(tmp_path / "recomputed" / "student")[0]
    for one, other in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name, model_type, width", [("tiny-llama", "llama", 96), ("tiny-half", "t5", 48)])
def test_another_student_of_the_micro_world_is_made_once(
    name, model_type, width, world, places, tmp_path, monkeypatch
):
    monkeypatch.setattr(students, "STEPS", 3)
    monkeypatch.setattr(train.prepare, "prepare", lambda seed, well_read: world)
    how = ["--student", name, "--purifier", "answers", "--steps", "2", "--batch-size", "2"]
    how += ["--explain", "1", "--max-new-tokens", "8", "--cache", str(tmp_path / "cache")]
    for run_name in ("first", "second"):
        train.main(train.parse_args([*how, "--out", str(tmp_path / run_name)]))
        monkeypatch.setattr(students, "practise", None)  # made by the first run
    (folder,) = world.glob(f"student-{name}-*")
    config = model.load(folder)[0].config
    assert config["model_type"] == model_type
    assert width in (config.get("hidden_size"), config.get("d_model"))
    weights = [(tmp_path / run_name / "student" / "model.safetensors").read_bytes() for run_name in ("first", "second")]
    assert weights[0] == weights[1]
    with pytest.raises(model.BadInput, match=f"{name} is the micro world's; with --data give --student DIR"):
        run(places, name, tmp_path / "third")
