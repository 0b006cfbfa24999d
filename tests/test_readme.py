"""What the READMEs promise: links lead somewhere, names exist, commands are understood."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/**/README.md"))]
PAGES = [page for page in PAGES if not re.search(r"(^|/)(\.|out/|cache/|world-)", str(page.relative_to(ROOT)))]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@PAGE
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


@PAGE
def test_names_of_the_code_exist(page):
    modules = dict(kp="kp", purify="purify", train="train", model="model", eval="eval", prepare="data.micro.prepare")
    files = ("py", "md", "json", "jsonl", "safetensors")
    for module, name in re.findall(r"`(\w+)\.(\w+)[`(]", page.read_text()):
        if name not in files and module in modules:
            assert hasattr(importlib.import_module(modules[module]), name), f"{page}: {module}.{name}"
    for path in re.findall(r"`((?:data|tests)/[\w/.-]+)`", page.read_text()):
        assert path.startswith("data/paper") or (ROOT / path).exists(), f"{page}: {path}"


def commands(page):
    """Return the python commands that stand on lines of their own, with their continuations."""
    text = page.read_text().replace("\\\n", " ")
    for name, value in re.findall(r'^    (\w+)="(.*)"$', text, re.M):  # variables of the shell
        text = text.replace(f"${name}", value)
    return re.findall(r"^(?:    )?(?:pip .* && )?python (train|eval)\.py(.*)$", text, re.M)


@PAGE
def test_commands_are_understood(page):
    for script, arguments in commands(page):
        words = shlex.split(arguments, comments=True)
        if script == "train":
            train.parse_args(words)
            continue
        args = evaluation.parse_args(words)
        for row in args.compare or []:
            train.parse_args(shlex.split(row.split(": ", 1)[-1]))


def figures(text):
    """Return the shares "mean ± spread" and the intervals of a text, without signs."""
    return set(re.findall(r"\d+\.\d ± \d+\.\d", text))


def test_figures_are_told_by_the_stored_tables():
    results = ROOT / "data" / "micro" / "results"
    pooled = [sorted(results.glob(f"{name}-[12].json")) for name in ("world", "slow", "rl")]
    told = set()
    for files in [*pooled, *([file] for file in sorted(results.glob("*.json")))]:
        rows, against = evaluation.read_tables(files)
        told |= figures(evaluation.report(rows, list(rows), with_curves=False))
    for page in (ROOT / "README.md", ROOT / "data" / "micro" / "README.md"):
        assert figures(page.read_text()) <= told, f"{page}: {figures(page.read_text()) - told}"


def test_there_are_pages_and_commands():
    assert len(PAGES) >= 4 and sum(len(commands(page)) for page in PAGES) >= 8
