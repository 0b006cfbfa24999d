"""The micro world's other students, beside `--student tiny`: a decoder-only one, and other widths.

Each practises as `tiny` does (see prepare.py): it answers and explains in fictional worlds, so it can
read, reason and learn, and knows nothing that is true. It is made when it is first asked for.

    python train.py --purifier router --student tiny-llama
"""

import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

import kp
import model
from data.micro import prepare

STUDENTS = {  # {name: the T5's sizes; None: a Llama}
    "tiny-half": dict(d_model=48, num_heads=4, d_ff=128),
    "tiny-quarter": dict(d_model=24, num_heads=2, d_ff=64),
    "tiny-llama": None,  # as large as tiny
}
STEPS = prepare.FICTIONS * prepare.STEPS_IN_EACH


class Bar(tqdm):
    """A progress bar that `prepare.train_on` counts on."""

    def __iadd__(self, n):
        self.update(n)
        return self


def answer_after(q):
    return kp.WITHOUT_CHAT.format(kp.predict_prompt(q))


def rationale_after(q):
    return kp.WITHOUT_CHAT.format(kp.explain_prompt(q))


def practise(name, folder, seed):
    """Pretrain a student in fictional worlds, on one core, and save it."""
    facts = prepare.read_facts()
    tokenizer = prepare.train_tokenizer(facts)
    sizes = STUDENTS[name]
    torch.manual_seed(seed)
    if sizes is None:
        student = prepare.new_llama(prepare.LLAMA, tokenizer)
        prompts = (answer_after, rationale_after)
    else:
        prepare.frame(tokenizer, "$A </s>")
        student = prepare.tiny_t5(tokenizer.get_vocab_size(), **sizes)
        prompts = (kp.predict_prompt, kp.explain_prompt)

    endless = prepare.fictional_exercises(facts, seed, prompts)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on every machine
    with Bar(total=STEPS, desc=f"{name} practises", unit="step") as bar:
        prepare.train_on(student, tokenizer, endless, STEPS, 0.2, bar)
    torch.set_num_threads(n_threads)
    model.save(student, tokenizer, folder)


def prepare_student(name, world, seed):
    """Make a student of this world's folder where it is missing, and return its folder.

    The folder's name hashes this file, as the world's hashes what the world is made from.
    """
    made_from = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    folder = world / f"student-{name}-{made_from[:8]}"
    if not (folder / "config.json").exists():
        practise(name, folder, seed)
    return folder
