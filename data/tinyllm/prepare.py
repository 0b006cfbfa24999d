"""Turn a checkout of TinyLLM's public repository into data sets of this project, its two
teachers' texts included.

    git clone https://github.com/YikunHan42/TinyLLM
    python -m data.tinyllm.prepare TinyLLM --out data/paper
    python train.py --data data/paper/obqa --student hf/flan-t5-small --purifier router

There a data set is a folder datasets/NAME with NAME_train.json, NAME_valid.json, NAME_test.json,
and the rationales of FLAN-T5-xl and LLaMA-2 in llm/SPLIT_CoT_K.json, in the order of the
questions. Here it becomes DIR/NAME/ with train.jsonl, valid.jsonl, test.jsonl and
rationales/{flan-t5-xl,llama-2}.jsonl (of the training questions). The splits are those behind the
published figures. REPO may also be the folder of one data set.
"""

import argparse
import json
import re
from pathlib import Path

from tqdm import tqdm

import model
from data.questions import read_questions
from model import BadInput, require

TEST_SIZES = {"obqa": 500, "arc": 1165, "riddle": 510, "pubmedqa": 400, "piqa": 919, "bioasq": 123}  # as published


def split_teachers(text):
    """Return the two rationales that stand in one string, FLAN-T5-xl's without its conclusion and
    LLaMA-2's.

    "It swims. Thus, the answer is (b) trout\\n\\nQ: Which swims? ... llama rationale: Let's
    think." -> "It swims.", "Let's think."
    """
    flan, _, llama = text.partition("llama rationale:")
    flan = re.split(r"Thus, the answer is|\n\s*Q:", flan)[0]
    return flan.strip(), llama.strip()


def read_texts(folder, n_questions):
    """Return {teacher: a text for each training question}. Raise BadInput where their number
    differs.
    """
    files = sorted(folder.glob("llm/train_CoT_*.json"), key=lambda file: int(file.stem.rpartition("_")[2]))
    require(files, f"{folder}: no rationales in llm/train_CoT_0.json; download the repository again")
    pairs = []
    for file in files:
        for place, text in model.read_rows(file):
            require(isinstance(text, str), f"{place}: a rationale must be a text; download the repository again")
            pairs.append(split_teachers(text))
    n = len(pairs)
    require(n == n_questions, f"{files[-1]}: {n} rationales up to here for {n_questions} questions; download it again")
    flan, llama = zip(*pairs)
    texts = {"flan-t5-xl": flan, "llama-2": llama}
    return {name: own for name, own in texts.items() if any(own)}  # nobody recorded LLaMA-2's for piqa


def write_lines(file, rows):
    with model.atomic(file) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def convert(folder, out):
    """Write the data set in `folder` to `out`. Return {"train": n, "valid": n, "test": n,
    "teachers": names}.
    """
    name = folder.name
    train = next(folder.glob("*_train.json"))
    splits = {}
    for split in ("train", "valid", "test"):
        splits[split] = read_questions(train.with_name(train.name.replace("_train", f"_{split}")))
    texts = read_texts(folder, len(splits["train"]))
    n = len(splits["test"])
    expected = TEST_SIZES.get(name, n)
    require(n == expected, f"{folder}: {n} test questions, the published figures are of {expected}; download it again")

    for split, questions in splits.items():
        rows = [dict(id=q.id, task=name, text=q.text, choices=q.choices, answer=q.answer) for q in questions]
        write_lines(out / f"{split}.jsonl", rows)
    for teacher, own in texts.items():
        rows = [dict(id=q.id, rationale=text) for q, text in zip(splits["train"], own)]
        write_lines(out / "rationales" / f"{teacher}.jsonl", rows)
    sizes = {split: len(questions) for split, questions in splits.items()}
    return {**sizes, "teachers": list(texts)}


def prepare(repo, out):
    """Convert every data set of the checkout that is there. Return {name: counts}."""
    repo = Path(repo)
    found = sorted(file.parent for file in [*repo.glob("datasets/*/*_train.json"), *repo.glob("*_train.json")])
    if not found:
        raise BadInput(f"{repo}: no datasets/NAME/NAME_train.json; give a checkout of YikunHan42/TinyLLM, or one of its data sets")
    return {folder.name: convert(folder, Path(out) / folder.name) for folder in tqdm(found, "convert", leave=False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repo", help="the checkout, or the folder of one data set")
    parser.add_argument("--out", default="data/paper", help="where DIR/NAME/ are written (default: data/paper)")
    args = parser.parse_args()
    for name, counts in prepare(args.repo, args.out).items():
        teachers = ", ".join(counts["teachers"])
        print(f"{name:<10} {counts['train']:>6} train {counts['valid']:>5} valid {counts['test']:>5} test   {teachers}")


if __name__ == "__main__":
    with model.one_line_errors():
        main()
