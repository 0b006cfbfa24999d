"""The micro world: tasks and tiny teachers, all made from a table of true facts.

`facts.tsv` says which class an entity belongs to (an otter is a mammal) and what a class does (a
mammal nurses its young with milk). A question asks for the entity with a property; its rationale
states the two facts that lead to the answer:

    Name the one that nurses its young with milk. (a) robin (b) pike (c) otter (d) oak
    Since an otter is a mammal, and a mammal nurses its young with milk, the answer is otter.

There are four tasks in domain, one for each subject of the table, and two tasks out of domain. The
pairs (entity, property) are dealt out to train, valid and test, so that no test question can be
learnt by heart.

There are four teachers, each with one of the paper's architectures in miniature. Each has *read*
one subject whole and a small part of the others: it learns to answer and to explain from exercises
on what it has read. Asked about anything else, it makes something up, because that is what a language
model does. Nothing is corrupted by hand.

    python -m data.micro.prepare        # train.py runs this on first use

Read in this order: facts, questions, teachers, the report, and `prepare`, which makes it all, once.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import signal
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.multiprocessing as mp
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.normalizers import Prepend
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from tqdm import tqdm

import kp
import model
from data.questions import read_data

HERE = Path(__file__).parent

# -------------------------------------------------------------------------------------------- facts


class Subject(NamedTuple):
    """What the table says about one subject, or the part of it that a teacher has read."""

    class_of: dict  # {"an otter": "a mammal", ...}
    properties: dict  # {"a mammal": ["nurses its young with milk", ...], ...}

    def all_properties(self):
        return sum(self.properties.values(), [])


def read_facts(path=HERE / "facts.tsv"):
    """Return {name: Subject}. Raise BadInput that names the line where the columns are wrong."""
    facts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        kind, *columns = line.split("\t")
        if kind not in ("isa", "has") or len(columns) != 3:
            why = "needs 4 columns separated by tabs, the first isa or has"
            raise model.BadInput(f"{path}:{number}: {why}")
        name, key, value = columns
        subject = facts.setdefault(name, Subject({}, {}))
        if kind == "isa":
            subject.class_of[key] = value
        else:
            subject.properties.setdefault(key, []).append(value)
    return facts


def bare(entity):
    """Return an entity without its article: "an otter" -> "otter"."""
    return entity.removeprefix("a ").removeprefix("an ")


def explain(entity, its_class, class_, property_, answer):
    """Return the rationale that states two facts. Their classes differ where the answer is no."""
    return f"Since {entity} is {its_class}, and {class_} {property_}, the answer is {answer}."


# ---------------------------------------------------------------------------------------- questions

# Two ways to ask for the entity with a property, in the manner of a data set of the field.
TEMPLATES = {
    "nature": ("Which of these {}?", "Name the one that {}."),  # as OpenBookQA
    "science": ("Which one {}?", "A student looks for something that {}. Which is it?"),  # as ARC
    "riddles": ("It {}. What is it?", "I am thinking of something that {}. What is it?"),  # as RiddleSense
    "medicine": ("Which of the following {}?", "In the clinic, which one {}?"),  # about PubMedQA's subject
}
PHYSICAL = "Goal: get hold of something that {}. Solution?"  # two choices, as PIQA
CLINICAL = "Is it true that {} {}?"  # yes or no, as BioASQ
OUT_OF_DOMAIN = {"physical": ("science", "riddles"), "clinical": ("medicine",)}  # task: subjects

SIZES = {"train": 1000, "valid": 200, "test": 500}  # questions per task
# How each entity's 8 properties, once shuffled, go to the splits.
DEAL = {"train": slice(0, 4), "valid": slice(4, 5), "test": slice(5, None)}


def draw_question(rng, task, subject, entity, property_):
    """Draw a question about a property of an entity. Return it, without an id, and its rationale.

    Wrong choices are entities of other classes. They come from `subject`: for a data set the whole
    of it, for an exercise what the teacher has read of it.
    """
    class_ = subject.class_of[entity]
    others = [e for e in subject.class_of if subject.class_of[e] != class_]
    if task == "clinical":
        choices = ("yes", "no")
        answer = int(rng.random() < 0.5)
        if choices[answer] == "no":
            entity = rng.choice(others)  # which lacks the property
        text = CLINICAL.format(entity, property_)
    else:
        wrong = rng.sample(others, 1 if task == "physical" else 3)
        answer = rng.randrange(len(wrong) + 1)
        choices = tuple(map(bare, wrong[:answer] + [entity] + wrong[answer:]))
        template = PHYSICAL if task == "physical" else rng.choice(TEMPLATES[task])
        text = template.format(property_)
    rationale = explain(entity, subject.class_of[entity], class_, property_, choices[answer])
    return kp.Question("", task, text, choices, answer), rationale


def deal_pairs(rng, subject):
    """Return {split: [(entity, property)]}: each entity's properties, shuffled and dealt out."""
    pairs = defaultdict(list)
    for entity, class_ in subject.class_of.items():
        properties = subject.properties[class_]
        shuffled = rng.sample(properties, len(properties))
        for split, part in DEAL.items():
            pairs[split] += [(entity, p) for p in shuffled[part]]
    return pairs


def make_questions(facts, seed):
    """Return {"train": rows, ..., "ood/test": rows}. No task repeats a question."""
    rng = random.Random(f"questions {seed}")
    pairs = {}
    tasks = {}
    for name, subject in facts.items():
        pairs[name] = deal_pairs(rng, subject)
        tasks[name] = (name,)
    tasks |= OUT_OF_DOMAIN
    files = defaultdict(list)
    for task, names in tasks.items():
        for split, size in SIZES.items():
            rows = files[split if task in facts else f"ood/{split}"]
            pool = [(name, pair) for name in names for pair in pairs[name][split]]
            rng.shuffle(pool)
            turns = itertools.cycle(pool)  # each pair in turn, as often as it takes
            seen = set()
            while len(seen) < size:
                name, pair = next(turns)
                q, _ = draw_question(rng, task, facts[name], *pair)
                if q not in seen:
                    seen.add(q)
                    rows.append(asdict(replace(q, id=f"{task}-{split}-{len(seen)}")))
    return files


# --------------------------------------------------------------------- teachers: what each has read


class Recipe(NamedTuple):
    """How a teacher is made."""

    home: str  # the subject that the teacher reads whole
    steps: int  # of training, until it knows that subject
    config: dict  # of a Llama, without the vocabulary; None: tiny_t5


LLAMA = dict(
    model_type="llama",
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
)
GROUPED = dict(LLAMA, num_key_value_heads=2)  # two heads share keys and values
ROPE_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
TEACHERS = {
    "t5": Recipe("nature", 650, None),
    "llama-2": Recipe("science", 850, LLAMA),
    "mistral": Recipe("medicine", 1000, dict(GROUPED, model_type="mistral", sliding_window=64)),
    "llama-3.1": Recipe("riddles", 750, dict(GROUPED, rope_theta=500000.0, rope_scaling=ROPE_SCALING)),
}
# What a teacher has read of each class of the other subjects.
ENTITIES_ELSEWHERE = 1  # of 8
PROPERTIES_ELSEWHERE = 2  # of 8


def reading_list(facts, teacher, seed):
    """Return what a teacher has read, {name: Subject}: its home whole, little of the others."""
    rng = random.Random(f"reading {teacher} {seed}")
    reading = {}
    for name, (class_of, properties) in facts.items():
        elsewhere = name != TEACHERS[teacher].home
        known = {}
        for class_ in properties:
            members = [e for e in class_of if class_of[e] == class_]
            if elsewhere:
                members = rng.sample(members, ENTITIES_ELSEWHERE)
            known |= dict.fromkeys(members, class_)
        if elsewhere:
            properties = {c: rng.sample(ps, PROPERTIES_ELSEWHERE) for c, ps in properties.items()}
        reading[name] = Subject(known, properties)
    return reading


# ------------------------------------------------------------------------------ teachers: exercises

# Questions that need no fact: with them a teacher learns every name, and to read the choices.
NAMING = "Which is choice ({})?"
SUPPOSE = "Suppose {}, and {}. Then which one {}?"
COMPREHENSION = 0.12  # share of exercises that need no fact
PLAIN = 0.25  # share of exercises to answer plainly; the others are to explain
BATCH = 32  # exercises
BLOCK = 10  # batches that are drawn together and sorted by length: a third less padding


def comprehension(rng, facts):
    """Draw a question that needs no fact, only what its own text says. Return it and its rationale.

    About half ask for a choice by its letter, the others suppose something. What is supposed joins
    an entity, a class and a property drawn independently, so that it teaches no fact of the table.
    """
    subjects = list(facts.values())
    subject = rng.choice(subjects)
    about_entities = rng.random() < 0.75
    things = list(subject.class_of) if about_entities else subject.all_properties()
    chosen = rng.sample(things, 4)
    choices = tuple(map(bare, chosen))
    answer = rng.randrange(4)
    name = choices[answer]
    if not about_entities or rng.random() < 0.4:
        letter = "abcd"[answer]
        text = NAMING.format(letter)
        rationale = f"Since choice ({letter}) is {name}, the answer is {name}."
    else:
        entity = chosen[answer]
        class_ = rng.choice(sorted(rng.choice(subjects).properties))
        property_ = rng.choice(rng.choice(subjects).all_properties())
        text = SUPPOSE.format(f"{entity} is {class_}", f"{class_} {property_}", property_)
        rationale = explain(entity, class_, class_, property_, name)
    return kp.Question("", "", text, choices, answer), rationale


def exercise(rng, facts, reading):
    """Draw one (prompt, target): a question, most often about something read, to answer or explain."""
    if rng.random() < COMPREHENSION:
        q, rationale = comprehension(rng, facts)
    else:
        weights = [len(subject.class_of) for subject in reading.values()]
        (name,) = rng.choices(list(reading), weights)
        subject = reading[name]
        entity = rng.choice(list(subject.class_of))
        property_ = rng.choice(subject.properties[subject.class_of[entity]])
        # At least every second question is of the subject's own task.
        tasks = [name, name] + [task for task, names in OUT_OF_DOMAIN.items() if name in names]
        q, rationale = draw_question(rng, rng.choice(tasks), subject, entity, property_)
    if rng.random() < PLAIN:
        return kp.score_prompt(q), q.right
    return kp.rationale_prompt(q), rationale


def batches(rng, facts, reading):
    """Yield batches [(prompt, target)] without end, each of exercises of similar length."""
    while True:
        drawn = [exercise(rng, facts, reading) for _ in range(BATCH * BLOCK)]
        drawn.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        for i in rng.sample(range(BLOCK), BLOCK):
            yield drawn[i * BATCH : (i + 1) * BATCH]


# ------------------------------------------------------------------------------- teachers: training

LEARNING_RATE = 2.5e-3
WARM_UP = 50  # steps


def train_tokenizer(facts):
    """Return a tokenizer: one token for each word of the world, and for each of "(a)" to "(d)"."""
    corpus = []
    for name, (class_of, properties) in facts.items():
        for entity, class_ in class_of.items():
            corpus += [explain(entity, class_, class_, p, bare(entity)) for p in properties[class_]]
        corpus += [template.format("") for template in (*TEMPLATES[name], PHYSICAL)]
    # The second `suppose` follows without a space. That adds a token which no text uses. It stays:
    # the numbers of the other tokens, and so the teachers, depend on it.
    suppose = SUPPOSE.format("", "", "")
    text = f"{CLINICAL.format('', '')} {NAMING.format('a')} {suppose}{suppose}"
    q = kp.Question("", "", text, ("yes", "no", "choice", "Which"), 0)  # choices add "(a)" to "(d)"
    corpus += [kp.score_prompt(q), kp.rationale_prompt(q), kp.predict_prompt(q), kp.explain_prompt(q)]

    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = Prepend(" ")  # the first word of a text is the same token as elsewhere
    tokenizer.pre_tokenizer = Split(Regex(r" ?\([a-j]\)| ?\w+| ?[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special_tokens = ["<pad>", "</s>", "<s>", "<unk>"]  # 0 to 3
    trainer = WordLevelTrainer(special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def tiny_t5(vocab_size, pad_token_id=0, eos_token_id=1):
    """Return a new T5 of half a million weights, which a CPU trains in a minute.

    It is the default student, and one of the teachers.
    """
    config = dict(
        vocab_size=vocab_size,
        d_model=96,
        d_kv=12,
        d_ff=256,
        num_layers=2,
        num_heads=8,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    t5 = model.T5(config)
    t5.shared.weight.data *= 0.3  # T5's unit-scale embeddings move too slowly for a run this short
    return t5


def new_teacher(config, tokenizer):
    """Return an untrained teacher. Its tokenizer then adds an end (T5) or a start (Llama)."""
    vocab_size = tokenizer.get_vocab_size()
    if config is None:
        frame = "$A </s>"
        teacher = tiny_t5(vocab_size)
    else:
        frame = "<s> $A"
        teacher = model.Llama(dict(config, vocab_size=vocab_size, pad_token_id=0, eos_token_id=1))
    ends = [("</s>", 1), ("<s>", 2)]
    tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=ends)
    return teacher


def teacher_loss(teacher, tokenizer, batch):
    """Return the mean cross-entropy of a batch [(prompt, target)], over its targets only."""
    prompts, targets = zip(*batch)
    prompt_ids = model.encode(tokenizer, prompts)
    if isinstance(teacher, model.T5):
        return kp.sequence_losses(teacher, prompt_ids, model.encode(tokenizer, targets)).mean()

    # A Llama reads prompt and target as one text, and predicts each token from those before it. With a
    # prompt of 3 tokens, the predictions of tokens 3, 4, ... count, up to </s>; those of 1 and 2 do not.
    texts = map(" ".join, batch)
    ids, mask = model.pad([row + [1] for row in model.encode(tokenizer, texts)])  # (B, T); 1 is </s>
    starts = torch.tensor(list(map(len, prompt_ids)))  # (B,): where the targets begin
    in_target = torch.arange(1, ids.shape[1]) >= starts[:, None]  # (B, T - 1): tokens 1 to T - 1
    keep = (in_target & mask[:, 1:].bool()).nonzero(as_tuple=True)  # rows and places of N tokens
    logits = teacher(ids[:, :-1], mask[:, :-1], keep)  # (N, V)
    return kp.mean_per_row(logits, ids[:, 1:], keep).mean()


def train_teacher(name, folder, seed, steps, steps_done):
    """Train one teacher from scratch on its exercises and save it.

    This runs in a process of its own. It counts up `steps_done`, a tensor () in shared memory, which
    the progress bar of the parent process reads. `steps` is the recipe's, or less in a test.
    """
    torch.set_num_threads(1)  # as many teachers at a time as there are cores, each on one
    torch.manual_seed(seed)
    facts = read_facts()
    tokenizer = train_tokenizer(facts)
    teacher = new_teacher(TEACHERS[name].config, tokenizer)
    optimizer = torch.optim.AdamW(
        teacher.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    rng = random.Random(f"exercises {name} {seed}")
    endless = batches(rng, facts, reading_list(facts, name, seed))
    for step, batch in enumerate(itertools.islice(endless, steps)):
        # The learning rate warms up, then falls along a cosine.
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, cosine)
        teacher_loss(teacher, tokenizer, batch).backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps_done += 1
    model.save(teacher, tokenizer, folder)


def train_teachers(folder, seed):
    """Train the teachers that are missing from the folder, as many at a time as there are cores."""
    missing = [name for name in TEACHERS if not (folder / name / "config.json").exists()]
    missing.sort(key=lambda name: -TEACHERS[name].steps)  # longest first: the cores end together
    steps_done = torch.zeros(len(TEACHERS)).share_memory_()
    total = 0
    jobs = []
    for name, counter in zip(missing, steps_done):
        steps = TEACHERS[name].steps
        total += steps
        jobs.append((name, folder / name, seed, steps, counter))
    processes = min(len(TEACHERS), os.cpu_count())
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # this process hears Ctrl-C and ends the others
    with mp.get_context("spawn").Pool(processes, signal.signal, ignore_interrupt) as pool:
        pending = pool.starmap_async(train_teacher, jobs, chunksize=1)
        with tqdm(total=total, desc="teachers read", unit="step") as bar:
            while not pending.ready():
                pending.wait(0.5)
                bar.update(int(steps_done.sum()) - bar.n)
        pending.get()  # raises what a teacher's process raised


# --------------------------------------------------------------------------------------- the report


def derivation(facts, q):
    """Return the one true rationale of a question: for reports only, never an input to training."""
    answer = q.right
    for subject in facts.values():
        # One fact at most: no property is part of another.
        asked = [(c, p) for c, ps in subject.properties.items() for p in ps if p in q.text]
        for class_, property_ in asked:
            # The entity is the right choice, or a yes-or-no question names it.
            for entity, its_class in subject.class_of.items():
                if bare(entity) == answer or q.text == CLINICAL.format(entity, property_):
                    return explain(entity, its_class, class_, property_, answer)


def report(teachers, questions, facts):
    """Return {teacher: {task: [share of answers right, share of rationales true]}}.

    An answer is right where the teacher gives the right choice more than half of the probability.
    A rationale is true where it is the question's derivation, word by word.
    """
    scores = teachers.scores(questions)  # (N, M)
    table = {}
    for m, name in enumerate(teachers.names):
        rationales = teachers.rationales(questions, [m] * len(questions))
        marks = {}
        for q, score, rationale in zip(questions, scores[:, m].tolist(), rationales):
            right, true = marks.setdefault(q.task, ([], []))
            right.append(score > 0.5)
            true.append(rationale == derivation(facts, q))
        table[name] = {task: [fmean(right), fmean(true)] for task, (right, true) in marks.items()}
    return table


def show_report(folder):
    """Print the table of teachers and tasks: answers right / rationales true."""
    table = model.read_json(folder / "report.json")
    print("\nTeachers on training questions: answers right / rationales true (checked against the facts)\n")
    tasks = next(iter(table.values()))
    print(f"  {'teacher':<11}{'has read':<10}" + "".join(f"{task:>13}" for task in tasks))
    for name, row in table.items():
        shares = [f"{right:>7.2f} /{true:>5.2f}" for right, true in row.values()]
        print(f"  {name:<11}{TEACHERS[name].home:<10}" + "".join(shares))
    print()


# ---------------------------------------------------------------------------------- all of it, once


def world_folder(seed):
    """Return the folder of a world.

    Its name hashes what the world is made from: an edited table or recipe makes another world.
    """
    q = kp.Question("", "", "", ("", ""), 0)
    made_from = hashlib.sha256((HERE / "facts.tsv").read_bytes() + (HERE / "prepare.py").read_bytes())
    made_from.update((kp.score_prompt(q) + kp.rationale_prompt(q)).encode())
    return HERE / f"world-{seed}-{made_from.hexdigest()[:8]}"


def prepare(seed=0, show=False):
    """Make the world where it is missing, and return its folder.

    It holds {train,valid,test}.jsonl, ood/, teachers/NAME and, written last, report.json. A killed
    run goes on with the teachers that are missing. `show` prints the report of a world that is there;
    that of a new one is always printed.
    """
    folder = world_folder(seed)
    if not (folder / "report.json").exists():
        place = folder.relative_to(HERE.parents[1])
        print(f"First run: making the micro world in {place} (once, some minutes)")
        facts = read_facts()
        for name, rows in make_questions(facts, seed).items():
            lines = [json.dumps(row) + "\n" for row in rows]
            with model.atomic(folder / f"{name}.jsonl") as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        train_teachers(folder / "teachers", seed)
        data = read_data(folder)
        questions = data["train"] + data["ood/train"]
        first = [q for q in questions if int(q.id.split("-")[-1]) <= 100]  # of each task
        places = [folder / "teachers" / name for name in TEACHERS]
        teachers = kp.Teachers([kp.CheckpointTeacher(place, folder / "cache") for place in places])
        model.write_json(folder / "report.json", report(teachers, first, facts))
        show = True
    if show:
        show_report(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of questions, readings and teachers")
    prepare(parser.parse_args().seed, show=True)
