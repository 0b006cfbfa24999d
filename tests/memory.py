"""Peak memory of a teacher that writes and scores prompts of 2,000 tokens, by --batch-tokens, and of a student's
training step with and without --recompute. No test: run it.

    python tests/memory.py

Teacher: a Llama of random weights, float32: 4 layers of 4 key-value heads of 64, so the cache of a token takes
2 * 4 * 4 * 64 * 4 bytes = 8 KiB. Student: Llama-3.2-1B's 16 layers at a quarter of their width, and 4 rows of 512
tokens. Each measurement is a process of its own.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import kp
import model
from data.questions import train_tokenizer

CONFIG = dict(model_type="llama", vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
CONFIG |= dict(num_attention_heads=4, pad_token_id=0, eos_token_id=1, max_position_embeddings=4096)
N = 8  # prompts
STUDENT = dict(CONFIG, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8)
STUDENT |= dict(num_key_value_heads=2, tie_word_embeddings=True)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB


def measure(kind, batch_tokens):
    words = [f"word{i}" for i in range(999)]
    questions = []
    for i in range(N):
        text = " ".join(words[(i * 7 + j) % 999] for j in range(990))
        questions.append(kp.Question(str(i), "t", text, ("alpha", "beta", "gamma", "delta"), 0))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(questions)
        model.save(model.Llama(CONFIG), tokenizer, Path(folder) / "llama")
        asking = kp.Asking(max_new_tokens=16, batch_tokens=batch_tokens)
        teacher = kp.CheckpointTeacher(Path(folder) / "llama", Path(folder) / "cache", asking)
        teacher.lm()
        n_tokens = len(tokenizer.encode(kp.score_prompt(questions[0])).ids)
        before = peak()
        if kind == "write":
            teacher.rationales(questions)
        else:
            teacher.scores(questions)
        print(f"{kind:<6} {batch_tokens:>6} tokens at once: {peak() - before:5.2f} GiB ({n_tokens} a prompt)")


def measure_training(recompute):
    student = model.Llama(STUDENT)
    student.recompute = recompute
    n = sum(p.numel() for p in student.parameters())
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)

    def step(n_rows, n_read, n_written):
        kp.sequence_losses(student, [[5] * n_read] * n_rows, [[7] * n_written] * n_rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    start = peak()
    step(1, 1, 1)  # makes gradients and AdamW's two moments
    before = peak()
    step(4, 448, 64)
    how = "with" if recompute else "without"
    print(f"train {how:>7} --recompute: {peak() - before:5.2f} GiB of activations ", end="")
    print(f"(gradients and AdamW {before - start:.2f} GiB, by arithmetic {12 * n / 2**30:.2f})")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        measure_training(sys.argv[1] == "recompute")
    elif len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        for kind in ("write", "score"):
            for batch_tokens in (2**12, 2**14):
                subprocess.run([sys.executable, __file__, kind, str(batch_tokens)], check=True)
        for how in ("keep", "recompute"):
            subprocess.run([sys.executable, __file__, how], check=True)
