"""Turn a checkout of TinyLLM's public repository into data sets of this project, its two
teachers' texts included.

    git clone https://github.com/YikunHan42/TinyLLM
    python -m data.tinyllm.prepare TinyLLM --out data/paper
    python train.py --data data/paper/obqa --student hf/flan-t5-small --purifier router

There a data set is a folder datasets/NAME with NAME_train.json, NAME_valid.json, NAME_test.json,
and the rationales of FLAN-T5-xl and LLaMA-2 in llm/SPLIT_CoT_K.json, in the order of the
questions. Here it becomes DIR/NAME/ with train.jsonl, valid.jsonl, test.jsonl and
rationales/{flan-t5-xl,llama-2}.jsonl (of the training questions). The splits are those behind the
published figures. REPO may also be the folder of one data set. DIR/four/ holds the four sets on
which the paper fits its routers, together. See data/tinyllm/README.md for the whole recipe.
"""

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

import model
from data.questions import read_questions
from model import require

IN_DOMAIN = ("obqa", "arc", "riddle", "pubmedqa")
# How many test questions the published figures are of.
TEST_SIZES = {"obqa": 500, "arc": 1165, "riddle": 510, "pubmedqa": 400, "piqa": 919, "bioasq": 123}
AGAIN = "download the repository again"


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

    def number(file):
        k = file.stem.rpartition("_")[2]
        require(k.isdecimal(), f"{file}: must be called train_CoT_K.json; delete it")
        return int(k)

    files = sorted(folder.glob("llm/train_CoT_*.json"), key=number)  # 10 comes after 9
    require(files, f"{folder}: no rationales in llm/train_CoT_0.json; {AGAIN}")
    pairs = []
    for file in files:
        for place, text in model.read_rows(file):
            require(isinstance(text, str), f"{place}: a rationale must be a text; {AGAIN}")
            pairs.append(split_teachers(text))
    n = len(pairs)
    why = f"{n} rationales up to here for {n_questions} questions; {AGAIN}"
    require(n == n_questions, f"{files[-1]}: {why}")
    flan, llama = zip(*pairs)
    texts = {"flan-t5-xl": flan, "llama-2": llama}
    return {name: own for name, own in texts.items() if any(own)}  # piqa has none of LLaMA-2


def write_lines(file, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with model.atomic(file) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def convert(folder, out):
    """Write the data set in `folder` to `out`. Return {"train": n, "valid": n, "test": n,
    "teachers": names}.
    """
    name = folder.name
    train = next(folder.glob("*_train.json"))
    splits = {}
    for split in ("train", "valid", "test"):
        file = train.with_name(train.name.replace("_train", f"_{split}"))
        splits[split] = []
        for q in read_questions(file):
            splits[split].append(replace(q, task=name, id=f"{name}-{q.id}"))
    texts = read_texts(folder, len(splits["train"]))
    n = len(splits["test"])
    expected = TEST_SIZES.get(name, n)
    why = f"{n} test questions, the published figures are of {expected}; {AGAIN}"
    require(n == expected, f"{folder}: {why}")

    for split, questions in splits.items():
        rows = list(map(asdict, questions))
        for row in rows:
            del row["truth"]  # no rationale of theirs is known to be true
        write_lines(out / f"{split}.jsonl", rows)
    for teacher, own in texts.items():
        rows = [dict(id=q.id, rationale=text) for q, text in zip(splits["train"], own)]
        write_lines(out / "rationales" / f"{teacher}.jsonl", rows)
    sizes = {split: len(questions) for split, questions in splits.items()}
    return {**sizes, "teachers": list(texts)}


def prepare(repo, out):
    """Convert every data set of the checkout that is there. Return {name: counts}."""
    repo = Path(repo).absolute()  # "." has no name
    files = [*repo.glob("datasets/*/*_train.json"), *repo.glob("*_train.json")]
    why = "no datasets/NAME/NAME_train.json; give a checkout of YikunHan42/TinyLLM, or one data set of it"
    require(files, f"{repo}: {why}")
    report = {}
    for file in tqdm(sorted(files), "convert", leave=False):
        name = file.parent.name
        report[name] = convert(file.parent, Path(out) / name)
    if set(IN_DOMAIN) <= set(report):
        join([Path(out) / name for name in IN_DOMAIN], Path(out) / "four")
    return report


def join(folders, out):
    """Write the data sets of these folders as one."""
    for file in folders[0].rglob("*.jsonl"):
        name = file.relative_to(folders[0])
        rows = []
        for folder in folders:
            rows += [row for _, row in model.read_rows(folder / name)]
        write_lines(out / name, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repo", help="the checkout, or the folder of one data set")
    parser.add_argument("--out", default="data/paper", help="DIR of DIR/NAME/ (default: data/paper)")
    args = parser.parse_args()
    for name, counts in prepare(args.repo, args.out).items():
        sizes = [f"{counts[split]:>6} {split}" for split in ("train", "valid", "test")]
        print(f"{name:<10}{''.join(sizes)}   {', '.join(counts['teachers'])}")


if __name__ == "__main__":
    with model.one_line_errors():
        main()
