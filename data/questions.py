"""Read and check a data set: a folder of multiple-choice questions.

    train.jsonl, valid.jsonl, test.jsonl       one question a line
    ood/train.jsonl, ood/valid.jsonl, ...      perhaps: tasks out of domain
    rationales/NAME.jsonl                      perhaps: teachers that are texts (kp.TextTeacher)

A line: {"id": "1", "task": "science", "text": "Which is a metal?", "choices": ["iron", "oxygen"],
"answer": 0}. The answer is an index, a letter or a choice. Optional are the id, the task (by
default the folder's name), and "truth", the true rationale, which only measures explanations.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

import model
from kp import LETTERS, Question, explain_prompt
from model import BadInput, require


def read_data(folder):
    """Return {split: [Question]} of a folder: train, valid, test, and ood/train, ood/valid,
    ood/test where they exist.

    Raise BadInput with file, line and remedy for a row that is no question.
    """
    folder = Path(folder)
    why = "no such folder; give one with train.jsonl, valid.jsonl and test.jsonl"
    require(folder.is_dir(), f"{folder}: {why}")
    if not (folder / "train.jsonl").exists() and list(folder.glob("*_train.json")):
        command = f"python -m data.tinyllm.prepare {folder} --out DIR"
        raise BadInput(f"{folder}: has TinyLLM's layout; convert it with {command}")
    files = {split: folder / f"{split}.jsonl" for split in ("train", "valid", "test")}
    for file in sorted(folder.glob("ood/*.jsonl")):
        files[f"ood/{file.stem}"] = file
    data = {}
    taken = set()
    for split, file in files.items():
        data[split] = read_questions(file, split, taken)
    return data


def read_questions(file, split="", taken=None):
    """Return the questions of one file.

    taken: the ids of splits read before. Splits may share ids: a later "7" is called "test:7",
    one more "test:7#12".
    """
    questions = []
    taken = set() if taken is None else taken
    folder = Path(file).resolve().parent.name
    for place, row in model.read_rows(file):
        row = row if isinstance(row, dict) else {}
        row = {key: value for key, value in row.items() if value is not None}
        text = row.get("text", row.get("question"))
        choices = row.get("choices")
        why = "no question; each needs text, choices and answer"
        require(isinstance(text, str) and text.strip(), f"{place}: {why}")
        require(are_choices(choices), f"{place}: choices must be a list of 2 to 10 texts")
        answer = answer_index(row.get("answer"), choices)
        why = f"is not among the {len(choices)} choices; give its text or index"
        require(answer is not None, f"{place}: the answer {row.get('answer')!r} {why}")
        task = sys.intern(str(row.get("task", folder)))  # one text for all its questions
        require(task != "mean", f"{place}: a task cannot be called 'mean'; rename it")
        name = str(row.get("id", len(questions)))
        if name in taken and split:
            name = f"{split}:{name}"
        if name in taken:
            name = f"{name}#{len(questions)}"
        taken.add(name)
        truth = str(row.get("truth", ""))
        whole = is_text("".join((text, name, task, truth, *choices)))
        require(whole, f"{place}: holds half a character (a lone surrogate); correct or delete it")
        questions.append(Question(name, task, text, tuple(choices), answer, truth))
    require(questions, f"{file}: holds no question; write one a line")
    return questions


def read_rationales(file, data, needed, max_words):
    """Return ({id: rationale}, {id: score}) of a teacher that is a file of texts.

    A line: {"id": "1", "rationale": "Metals conduct ..., so the answer is iron."}, and perhaps
    "score": the probability that this teacher gave to the right choice. data: {split:
    [Question]}. needed: the splits that will be asked for. Longer rationales are cut to
    max_words. Raise BadInput for an id that is unknown, comes twice or is missing.
    """
    rationales = {}
    scores = {}
    ids = {}  # an id and itself: the question's own text, so that none is held twice
    for questions in data.values():
        for q in questions:
            ids[q.id] = q.id
    for place, row in model.read_rows(file):
        row = row if isinstance(row, dict) else {}
        name = str(row.get("id"))
        text = row.get("rationale")
        score = row.get("score")
        why = f"no question has the id {name!r:.80}; take the ids of train.jsonl"
        require(name in ids, f"{place}: {why}")
        name = ids[name]
        why = f"a second rationale for question {name}; delete one, or give each question its own id"
        require(name not in rationales, f"{place}: {why}")
        require(is_text(text), f"{place}: a rationale must be a text, without half a character")
        text = text.strip()
        beyond = "".join(text.split(maxsplit=max_words)[max_words:])
        rationales[name] = text[: len(text) - len(beyond)].rstrip()
        if score is not None:
            is_score = type(score) in (int, float) and 0 <= score <= 1
            require(is_score, f"{place}: a score must be a number from 0 to 1, not {score!r:.80}")
            scores[name] = float(score)
    for split in needed:
        missing = [q.id for q in data[split] if q.id not in rationales]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            why = f"no rationale for question {missing[0]!r} of {split}{more}; add a line"
            raise BadInput(f"{file}: {why}")
    return rationales, scores


def is_text(value):
    """Tell whether this is a text. JSON can hold one half of a surrogate pair, which is none."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def are_choices(choices):
    if not isinstance(choices, list) or not 2 <= len(choices) <= 10:
        return False
    return all(isinstance(choice, str) and choice for choice in choices)


def answer_index(answer, choices):
    """Return the index of an answer that is a choice, a letter or an index; None for
    anything else. Of equal choices it is the first.
    """
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer not in choices:
        answer = letters.find(answer.lower())
    if type(answer) is int and 0 <= answer < len(choices):
        answer = choices[answer]
    return choices.index(answer) if answer in choices else None


def train_tokenizer(questions, vocab_size=4096):
    """Return a byte-pair encoding of these questions, for a student without a tokenizer. <pad> is
    0, </s> is 1.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    some = questions[:: 1 + len(questions) // 100_000]  # of a million it takes a minute, to the same effect
    tokenizer.train_from_iterator(map(explain_prompt, some), trainer)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
