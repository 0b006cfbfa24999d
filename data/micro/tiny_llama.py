"""The micro world's decoder-only student: `--student tiny-llama`, a small Llama beside the T5.

It practises as the T5 does (see prepare.py): it answers and explains in fictional worlds, so it can
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

CONFIG = prepare.LLAMA
STEPS = prepare.FICTIONS * prepare.STEPS_IN_EACH


class Bar(tqdm):
    """A progress bar that `prepare.train_on` counts on."""

    def __iadd__(self, n):
        self.update(n)
        return self


def practise(folder, seed):
    """Pretrain a Llama in fictional worlds, on one core, and save it."""
    facts = prepare.read_facts()
    tokenizer = prepare.train_tokenizer(facts)
    torch.manual_seed(seed)
    student = prepare.new_llama(CONFIG, tokenizer)

    def for_answer(q):
        return kp.WITHOUT_CHAT.format(kp.predict_prompt(q))

    def for_rationale(q):
        return kp.WITHOUT_CHAT.format(kp.explain_prompt(q))

    endless = prepare.fictional_exercises(facts, seed, (for_answer, for_rationale))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on every machine
    with Bar(total=STEPS, desc="tiny-llama practises", unit="step") as bar:
        prepare.train_on(student, tokenizer, endless, STEPS, 0.2, bar)
    torch.set_num_threads(n_threads)
    model.save(student, tokenizer, folder)


def prepare_student(world, seed):
    """Make the student of this world's folder where it is missing, and return its folder.

    The folder's name hashes this file, as the world's hashes what the world is made from.
    """
    made_from = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    folder = world / f"student-llama-{made_from[:8]}"
    if not (folder / "config.json").exists():
        practise(folder, seed)
    return folder
