"""Peak memory of a teacher that writes and scores prompts of 2,000 tokens, by --batch-tokens. No test: run it.

    python tests/memory.py

A Llama of random weights, float32: 4 layers of 4 key-value heads of 64, so the cache of a token takes
2 * 4 * 4 * 64 * 4 bytes = 8 KiB. Each measurement is a process of its own.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kp
import model
from data.questions import train_tokenizer

CONFIG = dict(model_type="llama", vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
CONFIG |= dict(num_attention_heads=4, pad_token_id=0, eos_token_id=1, max_position_embeddings=4096)
N = 8  # prompts


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


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        for kind in ("write", "score"):
            for batch_tokens in (2**12, 2**14):
                subprocess.run([sys.executable, __file__, kind, str(batch_tokens)], check=True)
