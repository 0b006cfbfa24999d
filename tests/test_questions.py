"""Data sets: the questions, teachers that are files of texts, and what is converted from TinyLLM."""

import json
import math
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, converted, read_lines, tinyllm_folder, write_lines

import data.tinyllm.prepare as tinyllm
import eval as evaluation
import kp
import model
import train
from data.questions import read_data, read_questions, read_rationales
from data.tinyllm.prepare import convert, prepare, split_teachers
from model import BadInput

SAMPLE = ROOT.parent / "shared" / "data" / "tinyllm" / "obqa"  # a data set of TinyLLM's repository


def a_question(**change):
    row = dict(id="1", task="t", text="Which swims?", choices=["oak", "trout", "oak moss"], answer=1)
    return {**row, **change}


# ------------------------------------------------------------------------------------------- questions


def test_an_answer_may_be_an_index_or_a_choice(tmp_path):
    rows = [a_question(), a_question(answer="trout"), {**a_question(), "question": "Q?"}]
    by_index, by_text, other = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert by_index.answer == by_text.answer
    assert by_index.choices[by_index.answer] == "trout"
    assert other.text == "Which swims?"  # text comes before question
    assert len({by_index.id, by_text.id, other.id}) == 3  # though the file gives all of them one


def test_an_answer_may_be_a_letter(tmp_path):
    rows = [a_question(answer="B"), a_question(choices=["b", "a"], answer="a")]
    q, lettered = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert q.answer == 1
    assert lettered.right == "a"  # a choice comes before a letter


@pytest.mark.parametrize(
    "row, says",
    [
        ("{not json", "JSON"),
        (a_question(answer="shark"), "'shark' is not among the 3 choices"),
        (a_question(answer=3), "3 is not among"),
        (a_question(answer=-1), "-1 is not among"),
        (a_question(answer=True), "not among"),
        (a_question(choices=["one"]), "choices"),
        (a_question(choices="abc"), "choices"),
        (a_question(choices=["", "trout"]), "choices"),
        (a_question(choices=list("abcdefghijk")), "choices"),
        (a_question(choices=["\ud800", "trout"]), "half a character"),
        (a_question(text=" "), "no question"),
        ("[1, 2]", "no question"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, says):
    path = write_lines(tmp_path / "q.jsonl", [a_question(), row])
    with pytest.raises(BadInput, match="q.jsonl:2: ") as error:
        read_questions(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_utf8_is_named(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(json.dumps(a_question()).encode() + b'\n{"text": "\xff\xfe"}\n')
    with pytest.raises(BadInput, match="q.jsonl:2: not a line of JSON"):
        read_questions(tmp_path / "q.jsonl")


def test_an_empty_or_missing_data_set_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(BadInput, match="train.jsonl"):
        read_data(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        read_data(tmp_path / "nowhere")


def test_ids_that_splits_share_are_told_apart(tmp_path):
    for split in ("train", "valid", "test", "ood/train", "ood/test"):
        another = a_question(id="7", text=f"Another of {split}?")
        rows = [a_question(id="7"), another, a_question(id=f"only {split}")]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    data = read_data(tmp_path)
    assert list(data) == ["train", "valid", "test", "ood/test", "ood/train"]
    assert [q.id for q in data["train"]] == ["7", "train:7", "only train"]
    assert [q.id for q in data["valid"]] == ["valid:7", "valid:7#1", "only valid"]
    assert [q.id for q in data["ood/train"]] == ["ood/train:7", "ood/train:7#1", "only ood/train"]
    ids = [q.id for questions in data.values() for q in questions]
    assert len(set(ids)) == len(ids) == 15


# ------------------------------------------------------------------------------- teachers that are texts


def a_data_set(folder, ood=False):
    """Write three splits of three questions each, with ids of their own: train-0, train-1, ..."""
    splits = ["train", "valid", "test"]
    if ood:
        splits += ["ood/train", "ood/test"]
    for split in splits:
        rows = [a_question(id=f"{split}-{i}", text=f"Which of {split} swims {i}?") for i in range(3)]
        write_lines(folder / f"{split}.jsonl", rows)
    return read_data(folder)


def said(split, i, **change):
    return {"id": f"{split}-{i}", "rationale": f"Fish swim {i} times.", **change}


def test_rationales_and_scores_are_read_by_id(tmp_path):
    data = a_data_set(tmp_path)
    rows = [said("train", 2, score=0.25), said("train", 0, score=1), said("train", 1), said("test", 0)]
    file = write_lines(tmp_path / "rationales" / "a.jsonl", rows)
    texts, scores = read_rationales(file, data, ["train"], max_words=2)
    assert texts == {f"train-{i}": "Fish swim" for i in range(3)} | {"test-0": "Fish swim"}
    assert scores == {"train-2": 0.25, "train-0": 1.0}


@pytest.mark.parametrize(
    "row, says",
    [
        (said("train", 9), "r.jsonl:4: no question has the id 'train-9'"),
        ({"rationale": "Whose?"}, "r.jsonl:4: no question has the id 'None'"),
        ([1], "r.jsonl:4: no question has the id"),
        (said("train", 0), "r.jsonl:4: a second rationale for question train-0"),
        (said("valid", 0, rationale=None), "r.jsonl:4: a rationale must be a text"),
        (said("valid", 0, rationale="\ud800"), "r.jsonl:4: a rationale must be a text"),
        (said("valid", 0, score=1.5), "r.jsonl:4: a score must be a number from 0 to 1, not 1.5"),
        (said("valid", 0, score=-0.1), "r.jsonl:4: a score must be"),
        (said("valid", 0, score="high"), "r.jsonl:4: a score must be"),
        (said("valid", 0, score=True), "r.jsonl:4: a score must be"),
        (said("valid", 0, score=math.nan), "r.jsonl:4: a score must be"),
        ("{", "r.jsonl:4: not a line of JSON"),
    ],
)
def test_a_bad_line_of_rationales_is_named(tmp_path, row, says):
    data = a_data_set(tmp_path)
    file = write_lines(tmp_path / "r.jsonl", [said("train", 0), said("train", 1), said("train", 2), row])
    with pytest.raises(BadInput) as error:
        read_rationales(file, data, ["train"], 128)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_rationale_is_named(tmp_path):
    data = a_data_set(tmp_path, ood=True)
    file = write_lines(tmp_path / "r.jsonl", [said("train", 1)])
    says = "r.jsonl: no rationale for question .*train-0.* of train and 1 more"
    with pytest.raises(BadInput, match=says):
        read_rationales(file, data, ["train"], 128)
    write_lines(file, [said("train", 0), said("train", 1), said("train", 2), said("ood/train", 2)])
    assert read_rationales(file, data, ["train"], 128)
    says = "r.jsonl: no rationale for question .*ood/train-0.* of ood/train and 1 more"
    with pytest.raises(BadInput, match=says):
        read_rationales(file, data, ["train", "ood/train"], 128)


def text_teachers(folder, data, open_scorer=lambda: None, max_words=128):
    """Return the kp.Teachers of a data set's own rationales/*.jsonl."""
    judge = kp.Judge(open_scorer)
    teachers = []
    for file in sorted(folder.glob("rationales/*.jsonl")):
        texts, scores = read_rationales(file, data, ["train"], max_words)
        teachers.append(kp.TextTeacher(file.stem, texts, scores, judge))
    return kp.Teachers(teachers)


def test_scores_in_the_file_are_used_as_they_are_and_no_lm_is_opened(tmp_path):
    data = a_data_set(tmp_path)
    expected = [[0.0, 1.0], [0.1, 0.9], [0.2, 0.8]]
    for name, column in zip("ab", zip(*expected)):
        rows = [said("train", i, score=score) for i, score in enumerate(column)]
        write_lines(tmp_path / "rationales" / f"{name}.jsonl", rows)
    teachers = text_teachers(tmp_path, data)
    assert torch.equal(teachers.scores(data["train"]), torch.tensor(expected))
    assert teachers.ledger["score_read"] == 0


def test_only_rationales_without_a_score_are_judged(tmp_path, teacher_folders):
    data = a_data_set(tmp_path)
    rows = [said("train", 0, score=0.125), said("train", 1), said("train", 2)]
    write_lines(tmp_path / "rationales" / "a.jsonl", rows)
    opened = []

    def open_scorer():
        opened.append(1)
        return kp.CheckpointTeacher(teacher_folders[0], tmp_path / "cache")

    teachers = text_teachers(tmp_path, data, open_scorer)
    scores = teachers.scores(data["train"])
    assert scores[0, 0] == 0.125
    assert ((scores[1:] > 0) & (scores[1:] < 1)).all()
    _, tokenizer = model.load(teacher_folders[0])
    read = 0
    for q in data["train"][1:]:
        for prompt in (kp.score_prompt(q), kp.score_prompt(q, rationale=f"Fish swim {q.id[-1]} times.")):
            read += len(tokenizer.encode(prompt).ids) + len(tokenizer.encode(q.right).ids)
    assert teachers.ledger["score_read"] == read
    assert torch.equal(teachers.scores(data["train"]), scores)
    assert len(opened) == 1 and teachers.ledger["score_read"] == read  # asked twice, judged once


# ------------------------------------------------------------------------------------- TinyLLM's layout


@pytest.mark.parametrize("as_array", [True, False])
def test_tinyllm_s_layout_is_read(tmp_path, as_array):
    folder = converted(tmp_path, as_array=as_array)
    data = read_data(folder)
    assert [q.answer for q in data["train"]] == [0, 1, 0, 1, 0] and data["test"][0].task == "parity"
    teachers = text_teachers(folder, data)
    assert teachers.names == ["flan-t5-xl", "llama-2"]
    assert teachers.rationales(data["train"][2:4], [0, 1]) == ["Think of 2.", "It is 3.\nSo."]
    assert teachers.ledger["rationale_wrote"] == 3 + 4
    short = text_teachers(folder, data, max_words=2)
    assert short.rationales(data["train"][2:4], [0, 1]) == ["Think of", "It is"]


def test_ready_made_rationales_are_judged_by_how_much_they_help(tmp_path, teacher_folders):
    entries = ["llama rationale: It is so.", "A rationale. Thus, the answer is llama rationale:"]
    folder = converted(tmp_path, entries=entries + ["x llama rationale: y"] * 3)
    data = read_data(folder)
    first, second = data["train"][:2]
    for checkpoint in teacher_folders[:2]:  # a T5 and a Llama
        lm, tokenizer = model.load(checkpoint)
        scorer = kp.CheckpointTeacher(checkpoint, tmp_path / "cache")
        scores = text_teachers(folder, data, lambda: scorer).scores(data["train"])
        assert scores.shape == (5, 2)
        assert scores[0, 0] == 0 and scores[1, 1] == 0  # the empty ones
        judged = [(first, "It is so.", scores[0, 1]), (second, "A rationale.", scores[1, 0])]
        for q, text, score in judged:
            answer = q.choices[q.answer]
            plain = kp.score_prompt(q)
            prompts = [plain, plain.replace(" Answer:", f" Rationale: {text} Answer:")]
            token_cache = kp.TokenCache(tokenizer)
            sums, lengths = kp.choice_logps(lm, token_cache, prompts, [[answer], [answer]])
            ((without,), (given,)) = sums
            length = len(tokenizer.encode(answer, add_special_tokens=False).ids)
            length += checkpoint == teacher_folders[0]  # a T5 also says </s>
            assert lengths == [[length], [length]]
            expected = 1 / (1 + math.exp(-(given - without) / length))
            assert score.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "text, flan, llama",
    [
        ("Fish. Thus, the answer is (b)\n\nQ: Which? llama rationale: Let's think.", "Fish.", "Let's think."),
        ("It swims.\n  Q: Which? llama rationale: Let's think.", "It swims.", "Let's think."),
        ("It swims. Thus, the answer is (b) trout", "It swims.", ""),
        ("llama rationale: A.\nllama rationale: B.", "", "A.\nllama rationale: B."),
        ("", "", ""),
    ],
)
def test_one_string_holds_both_teachers(text, flan, llama):
    assert split_teachers(text) == (flan, llama)


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "entries, says",
    [
        (["only one"], "1 rationales up to here for 5 questions"),
        (["one too many"] * 6, "6 rationales up to here for 5 questions"),
        (["a", 7, "b", "c", "d"], "a rationale must be a text"),
    ],
)
def test_bad_rationale_files_are_named(tmp_path, entries, says):
    folder = tinyllm_folder(tmp_path / "their" / "parity", entries=entries)
    with pytest.raises(BadInput, match=says) as error:
        convert(folder, tmp_path / "out")
    assert "train_CoT_" in str(error.value)
    assert "\n" not in str(error.value)
    for file in folder.glob("llm/*"):
        file.unlink()
    with pytest.raises(BadInput, match="no rationales in llm/"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkout_is_converted_data_set_by_data_set(tmp_path):
    tinyllm_folder(tmp_path / "repo" / "datasets" / "parity")
    entries = ["Think. Thus, the answer is (a) yes"] * 4  # nobody recorded llama-2's
    tinyllm_folder(tmp_path / "repo" / "datasets" / "more", n=4, entries=entries)
    counts = prepare(tmp_path / "repo", tmp_path / "out")
    assert counts == {
        "more": {"train": 4, "valid": 4, "test": 4, "teachers": ["flan-t5-xl"]},
        "parity": {"train": 5, "valid": 5, "test": 5, "teachers": ["flan-t5-xl", "llama-2"]},
    }
    parity = tmp_path / "out" / "parity"
    texts = ["rationales/flan-t5-xl.jsonl", "rationales/llama-2.jsonl"]
    assert everything_in(parity) == [*texts, "test.jsonl", "train.jsonl", "valid.jsonl"]
    choices = ["yes", "no", "maybe"]
    expected = dict(id="parity-1", task="parity", text="1 even?", choices=choices, answer=1)
    assert read_lines(parity / "train.jsonl")[1] == expected
    more = tmp_path / "out" / "more"
    assert read_lines(more / "rationales" / "flan-t5-xl.jsonl")[3] == dict(id="more-3", rationale="Think.")
    data = read_data(more)
    assert len(data["train"]) == 4 and data["valid"][0].id == "valid:more-0"


def test_the_four_sets_in_domain_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyllm, "TEST_SIZES", {})
    for name in ("obqa", "arc", "riddle", "pubmedqa", "piqa"):
        tinyllm_folder(tmp_path / "repo" / "datasets" / name)
    prepare(tmp_path / "repo", tmp_path / "out")
    four = read_data(tmp_path / "out" / "four")
    assert Counter(q.task for q in four["train"]) == dict.fromkeys(("obqa", "arc", "riddle", "pubmedqa"), 5)
    texts, _ = read_rationales(tmp_path / "out/four/rationales/llama-2.jsonl", four, ["train"], 100)
    assert texts["arc-3"] == "It is 3.\nSo." and len(texts) == 20


def test_a_wrong_number_of_test_questions_is_refused(tmp_path):
    folder = tinyllm_folder(tmp_path / "their" / "obqa")
    says = "obqa: 5 test questions, the published figures are of 500"
    with pytest.raises(BadInput, match=says) as error:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_sets_is_named(tmp_path):
    with pytest.raises(BadInput, match="no datasets/NAME/NAME_train.json"):
        prepare(tmp_path, tmp_path / "out")
    arguments = [str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "data.tinyllm.prepare", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("error: ") and str(tmp_path / "nowhere") in line
    assert not (tmp_path / "out").exists()


def test_null_is_as_if_it_were_not_there_and_of_equal_choices_the_first_is_right(tmp_path):
    row = dict(id=None, task=None, truth=None, text="Which?", choices=["x", "y", "x"], answer=2)
    (q,) = read_questions(write_lines(tmp_path / "d" / "q.jsonl", [row]))
    with pytest.raises(BadInput, match="task cannot be called 'mean'"):
        read_questions(write_lines(tmp_path / "d" / "r.jsonl", [row | {"task": "mean"}]))
    assert q == kp.Question("0", "d", "Which?", ("x", "y", "x"), 0)
    assert kp.is_right("So the answer is x.", q)


def test_tinyllm_s_layout_in_data_says_how_to_convert_it(tmp_path):
    folder = tinyllm_folder(tmp_path / "parity")
    with pytest.raises(BadInput, match="python -m data.tinyllm.prepare .*parity --out"):
        read_data(folder)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"the sample of TinyLLM's data is not there: {SAMPLE}")
def test_a_real_data_set_is_converted_whole(tmp_path):
    counts = convert(SAMPLE, tmp_path / "obqa")
    assert counts == {"train": 4957, "valid": 500, "test": 500, "teachers": ["flan-t5-xl", "llama-2"]}
    data = read_data(tmp_path / "obqa")
    teachers = text_teachers(tmp_path / "obqa", data)
    flan = teachers.rationales(data["train"], [0] * 4957)
    llama = teachers.rationales(data["train"], [1] * 4957)

    # the first question, by hand
    q = data["train"][0]
    assert (q.id, q.task, q.text) == ("obqa-7-980", "obqa", "The sun is responsible for")
    assert q.choices[q.answer] == "plants sprouting, blooming and wilting"
    assert flan[0] == "Sun is responsible for plants sprouting, blooming and wilting."
    begins = "Let's think step by step.\nIf the sun is not there, the plants will not sprout"
    assert llama[0].startswith(begins)

    # others, against the source: 500 rationales a file, in the order of the questions
    theirs = read_lines(SAMPLE / "obqa_train.json")
    for row in (499, 500, 2750, 4956):
        texts = json.loads((SAMPLE / "llm" / f"train_CoT_{row // 500}.json").read_text())
        first, second = texts[row % 500].split("llama rationale:")
        assert data["train"][row].text == theirs[row]["question"]
        assert flan[row] and first.startswith(flan[row])
        assert llama[row] and second.strip().startswith(llama[row])
        assert len(llama[row].split()) <= 128


def test_every_command_of_the_recipe_runs_with_stand_ins(tmp_path, teacher_folders, monkeypatch):
    """The commands of data/tinyllm/README.md, as they stand there, with a few steps more or less."""
    for name in tinyllm.TEST_SIZES:
        tinyllm_folder(tmp_path / "TinyLLM" / "datasets" / name)
    monkeypatch.setattr(tinyllm, "TEST_SIZES", {})  # stand-ins are small
    monkeypatch.chdir(tmp_path)
    stand_ins = {"flan-t5-xl": 0, "flan-t5-small": 0, "flan-t5-large": 0, "Llama-2-7b-chat-hf": 1}
    stand_ins |= {"BioMistral-7B-st": 2, "Llama-3.1-8B-Instruct": 3, "Llama-3.2-1B-Instruct": 3}
    (tmp_path / "hf").mkdir()
    for name, m in stand_ins.items():
        (tmp_path / "hf" / name).symlink_to(teacher_folders[m])
    (tmp_path / "hf" / "all-MiniLM-L6-v2").symlink_to(ROOT / "tests" / "fixtures" / "bert")
    recipe = (ROOT / "data" / "tinyllm" / "README.md").read_text()
    commands = re.findall("^    python (?:-m )?(.*)", recipe, re.MULTILINE)
    others = ("-c", "zipfile", "data.tinyllm.smollm2", "eval.py --data data/paper/obqa --student hf/SmolLM2")
    commands = [command for command in commands if not command.startswith(others)]  # those fetch real weights
    assert len(commands) == 8
    first = commands.pop(0).split()
    monkeypatch.setattr(sys, "argv", first)
    assert first[0] == "data.tinyllm.prepare" and tinyllm.main() is None
    few = "--steps 2 --batch-size 2 --accumulate 1 --max-new-tokens 4 --fit-questions 20 --tune-aggregator 0"
    for command in commands:
        script, arguments = command.split(" ", 1)
        if script == "eval.py":
            arguments = arguments.replace("--seeds 3", "--seeds 1").replace('" ', f' {few}" ')
        else:
            arguments += f" {few}"
        it = {"train.py": train, "eval.py": evaluation}[script]
        it.main(it.parse_args(shlex.split(arguments)))
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/result.json")]
    assert {result["purifier"] for result in results} == {"router", "aggregate"}
    assert (tmp_path / "out" / "four" / "router.safetensors").exists()
