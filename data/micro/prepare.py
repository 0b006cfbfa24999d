"""The micro world: questions about true facts, tiny teachers who each know a part of them, and a
tiny student who can read and knows none.

`facts.tsv` says which class an entity belongs to (an otter is a mammal) and what a class does (a
mammal nurses its young with milk). A question asks for the entity with a property; its rationale
goes from two facts to the answer:

    Name the one that nurses its young with milk. (a) robin (b) pike (c) otter (d) oak
    Whatever nurses its young with milk is a mammal, and an otter is a mammal, so the answer is otter.

There are four tasks in domain, one for each subject of the table, and two tasks out of domain. The
pairs (entity, property) are dealt out to train, valid and test, so no test question of a property
can be learnt by heart: who answers it has put two facts together. The answers of train do not tell
which two.

Each of four teachers, with the paper's architectures in miniature, has *read* a quarter of the
classes whole, dealt by the seed across all tasks, and a small part of the others. Asked about
anything else it makes something up, because that is what a language model does. Nothing is
corrupted by hand. A router has to read the question to know whom to ask.

The student, a tiny T5, comes pretrained, as FLAN-T5 does: it has practised to answer and to explain
in fictional worlds, where the same names are dealt over the classes at random. So it can read,
reason and learn, and knows nothing that is true.

    python -m data.micro.prepare        # train.py runs this on first use

Read in this order: facts, questions, exercises, the models, the student's practice, the teachers'
reading, the report, and `prepare`, which makes it all, once.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from threading import Thread
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


def explain(property_, class_, entity):
    """Return the rationale: two facts, then the answer."""
    facts = f"Whatever {property_} is {class_}, and {entity} is {class_}"
    return f"{facts}, so the answer is {bare(entity)}."


def explain_kind(class_, entity):
    """Return the rationale where the question asks for the class itself: one fact, then the answer."""
    return f"Among these, {entity} is {class_}, so the answer is {bare(entity)}."


# ---------------------------------------------------------------------------------------- questions

# Ways to ask for the entity with a property. All tasks share them, so they do not name the task.
TEMPLATES = (
    "Which of these {}?",
    "Name the one that {}.",
    "It {}. What is it?",
    "A student looks for something that {}. Which is it?",
)
PHYSICAL = ("Goal: get hold of something that {}. Solution?",)  # two choices, as PIQA
KINDS = ("Which of these is {}?", "Find {} among these.")  # asks for a class: one fact is enough
OUT_OF_DOMAIN = {"physical": ("science", "riddles"), "kinds": ("nature", "medicine")}

SIZES = {"train": 1000, "valid": 200, "test": 500}  # questions per task
OOD_SIZES = {"train": 500, "valid": 100, "test": 500}


def draw_question(rng, task, subject, entity, property_, half=None):
    """Draw a question, without an id, to which an entity is the answer, because of a property.

    Wrong choices are entities of other classes of the subject. With `half`, from `deal_halves`, they
    are of the half that the right one is in.
    """
    class_ = subject.class_of[entity]
    others = [e for e in subject.class_of if subject.class_of[e] != class_]
    if half:
        others = [e for e in others if half[e] == half[entity]]
    choices = rng.sample(others, 1 if task == "physical" else 3)
    answer = rng.randrange(len(choices) + 1)
    choices.insert(answer, entity)
    truth = explain(property_, class_, entity)
    asks_for = property_
    templates = TEMPLATES
    if task == "physical":
        templates = PHYSICAL
    if task == "kinds":
        templates = KINDS
        asks_for = class_
        truth = explain_kind(class_, entity)
    text = rng.choice(templates).format(asks_for)
    return kp.Question("", task, text, tuple(map(bare, choices)), answer, truth)


def deal_halves(rng, subject):
    """Return {entity or property: 0 or 1}. It halves each class's entities, and its properties."""
    half = {}
    for class_, properties in subject.properties.items():
        members = [e for e in subject.class_of if subject.class_of[e] == class_]
        for names in (members, properties):
            shuffled = rng.sample(names, len(names))
            for i, name in enumerate(shuffled):
                half[name] = i * 2 // len(names)
    return half


def deal_pairs(rng, subject, half):
    """Return {split: [(entity, property)]} of all pairs that are true.

    In train entities meet properties of their own half. Pairs that cross the halves go to valid (a
    quarter) and test (the rest). Wrong choices are of the same half as the right one. So no question
    of train, and no wrong choice in it, joins an entity to a property that a test question joins it
    to. What joins them is the class, and only rationales name it.
    """
    pairs = defaultdict(list)
    for entity, class_ in subject.class_of.items():
        for property_ in subject.properties[class_]:
            split = "train" if half[entity] == half[property_] else "crossing"
            pairs[split].append((entity, property_))
    crossing = pairs.pop("crossing")
    rng.shuffle(crossing)
    n_valid = len(crossing) // 4
    pairs["valid"] = crossing[:n_valid]
    pairs["test"] = crossing[n_valid:]
    return pairs


def make_questions(facts, seed):
    """Return {"train": [Question], ..., "ood/test": [Question]}.

    No task repeats a question, in no split. The right choices stand at each place equally often.
    """
    rng = random.Random(f"questions {seed}")
    pairs = {}
    half = {}
    tasks = {}
    for name, subject in facts.items():
        half |= deal_halves(rng, subject)
        pairs[name] = deal_pairs(rng, subject, half)
        tasks[name] = (name,)
    tasks |= OUT_OF_DOMAIN
    files = defaultdict(list)
    for task, names in tasks.items():
        seen = set()
        for split, size in (SIZES if task in facts else OOD_SIZES).items():
            file = files[split if task in facts else f"ood/{split}"]
            pool = [(name, pair) for name in names for pair in pairs[name][split]]
            rng.shuffle(pool)
            turns = itertools.cycle(pool)  # each pair in turn, as often as it takes
            places = Counter()
            draws = 0
            why = f"too few facts for {size} questions of {task}; lower SIZES or add some"
            while places.total() < size:
                draws += 1
                model.require(draws < 100 * size, f"{HERE / 'facts.tsv'}: {why}")
                name, pair = next(turns)
                q = draw_question(rng, task, facts[name], *pair, half)
                if q not in seen and places[q.answer] < size / len(q.choices):
                    seen.add(q)
                    places[q.answer] += 1
                    file.append(replace(q, id=f"{task}-{split}-{places.total()}"))
    return files


def class_asked(q):
    """Return the class that a question is about."""
    return re.search(" is ([^,]+), so the answer", q.truth)[1]


def property_asked(facts, q):
    """Return the property that a question asks for. No property is part of another."""
    for subject in facts.values():
        for property_ in subject.all_properties():
            if property_ in q.text:
                return property_


def rule_without_rationales(facts, train, test):
    """Return the accuracy that the answers of train alone make possible on test, by a rule.

    The rule: choose the entity that shares most properties, as asked in train, with the entities
    that answered this property there; among equals, the one that was least often a wrong choice. It
    guesses between those that are equal in both.
    """
    answered = defaultdict(set)  # {property: entities}
    has = defaultdict(set)  # {entity: properties}
    wrong = Counter()  # {(property, entity): times it was a wrong choice}
    for q in train:
        property_ = property_asked(facts, q)
        answered[property_].add(q.right)
        has[q.right].add(property_)
        wrong.update((property_, choice) for choice in q.choices if choice != q.right)
    right = []
    for q in test:
        property_ = property_asked(facts, q)
        ranks = []
        for choice in q.choices:
            shared = sum(len(has[choice] & has[e]) for e in answered[property_])
            ranks.append((shared, -wrong[property_, choice]))
        best = max(ranks)
        right.append((ranks[q.answer] == best) / ranks.count(best))
    return fmean(right)


# ---------------------------------------------------------------------------------------- exercises

BATCH = 32  # exercises
BLOCK = 10  # batches that are drawn together and sorted by length: a third less padding
LEARNING_RATE = 2.5e-3
WARM_UP = 50  # steps
PLAIN = 0.3  # share of exercises to answer plainly; the others are to explain


def exercise(rng, world, reading, prompts):
    """Draw one (prompt, target): a question about something read, to answer or to explain.

    world: {name: Subject}, whose entities are the choices. reading: the part of it that was read.
    prompts: what asks for an answer, and what asks for a rationale.
    """
    weights = [len(subject.class_of) for subject in reading.values()]
    (name,) = rng.choices(list(reading), weights)
    class_of, properties = reading[name]
    entity = rng.choice(list(class_of))
    property_ = rng.choice(properties[class_of[entity]])
    # Two of three questions are of the subject's own task.
    tasks = [name, name] + [task for task, names in OUT_OF_DOMAIN.items() if name in names]
    q = draw_question(rng, rng.choice(tasks), world[name], entity, property_)
    for_answer, for_rationale = prompts
    if rng.random() < PLAIN:
        return for_answer(q), q.right
    return for_rationale(q), q.truth


def batches(draw, rng):
    """Yield batches of what draw() returns without end, each of exercises of similar length."""
    while True:
        drawn = [draw() for _ in range(BATCH * BLOCK)]
        drawn.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        for i in rng.sample(range(BLOCK), BLOCK):
            yield drawn[i * BATCH : (i + 1) * BATCH]


def train_on(lm, tokenizer, endless, steps, lowest, steps_done):
    """Train a model on the batches [(prompt, target)] of an endless iterator.

    The learning rate warms up, then falls along a cosine to `lowest`, a share of the highest.
    steps_done, a tensor () in shared memory, counts for the progress bar of another process.
    """
    biases = []  # of T5's distances: numbers near 3 that start near 0, and so need a higher rate
    others = []
    for name, p in lm.named_parameters():
        group = biases if "relative" in name else others
        group.append(p)
    groups = [dict(params=others, pace=1)]
    if biases:
        groups.append(dict(params=biases, pace=10))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step, batch in enumerate(itertools.islice(endless, steps)):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        rate = LEARNING_RATE * min((step + 1) / WARM_UP, lowest + (1 - lowest) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = group["pace"] * rate
        loss_of(lm, tokenizer, batch).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps_done += 1


def loss_of(lm, tokenizer, batch):
    """Return the mean cross-entropy of a batch [(prompt, target)], over its targets only."""
    prompts, targets = zip(*batch)
    ids = kp.TokenCache(tokenizer).pairs(lm, prompts, targets)
    return kp.sequence_losses(lm, *ids).mean()


# ----------------------------------------------------------------------------- tokenizer, T5, Llama

NO_QUESTION = kp.Question("", "", "", ("", "", "", ""), 0)  # its choices add "(a)" to "(d)"
PROMPTS = [
    kp.score_prompt(NO_QUESTION),
    kp.rationale_prompt(NO_QUESTION),
    kp.predict_prompt(NO_QUESTION),
    kp.explain_prompt(NO_QUESTION),
    kp.aggregation_prompt(NO_QUESTION, [""] * 4),
]


def train_tokenizer(facts):
    """Return a tokenizer: one token for each word of the world, and for each of "(a)" to "(d)"."""
    corpus = [template.format("") for template in (*TEMPLATES, *PHYSICAL, *KINDS)]
    for class_of, properties in facts.values():
        for entity, class_ in class_of.items():
            corpus.append(explain_kind(class_, entity))
            corpus += [explain(p, class_, entity) for p in properties[class_]]
    corpus += PROMPTS
    corpus.append(" ".join(kp.explain_prefixes(len(TEACHERS))))

    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = Prepend(" ")  # the first word of a text is the same token as elsewhere
    tokenizer.pre_tokenizer = Split(Regex(r" ?\([a-j]\)| ?\w+| ?[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special_tokens = ["<pad>", "</s>", "<s>", "<unk>"]  # 0 to 3
    trainer = WordLevelTrainer(special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def tiny_t5(vocab_size, **sizes):
    """Return a new T5 that a CPU trains in minutes (0.8 M weights), or one of other sizes.

    It is the default student, and one of the teachers.
    """
    config = dict(
        vocab_size=vocab_size,
        d_model=96,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=8,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    t5 = model.T5(config | sizes)
    t5.shared.weight.data *= 0.3  # T5's unit-scale embeddings move too slowly for a run this short
    return t5


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


def new_llama(config, tokenizer):
    """Return an untrained Llama. Its tokenizer then adds a start instead of an end."""
    frame(tokenizer, "<s> $A")
    vocab_size = tokenizer.get_vocab_size()
    return model.Llama(dict(config, vocab_size=vocab_size, pad_token_id=0, eos_token_id=1))


def frame(tokenizer, single):
    ends = [("</s>", 1), ("<s>", 2)]
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)


# --------------------------------------------------------------------------- the student's practice

FICTIONS = 5  # fictional worlds that the student practises in, one after the other
STEPS_IN_EACH = 300


def fiction(rng, facts):
    """Return a world {name: Subject} with the names of the true one, dealt over its classes at
    random.
    """
    entities = []
    properties = []
    for subject in facts.values():
        entities += subject.class_of
        properties += subject.all_properties()
    rng.shuffle(entities)
    rng.shuffle(properties)
    world = {}
    for name, subject in facts.items():
        world[name] = Subject({}, {})
        for class_ in subject.properties:
            n = len(subject.properties[class_])
            world[name].properties[class_] = [properties.pop() for _ in range(n)]
            n = list(subject.class_of.values()).count(class_)
            world[name].class_of.update((entities.pop(), class_) for _ in range(n))
    return world


def fictional_exercises(facts, seed, prompts):
    """Yield batches of exercises without end, from one fictional world after another."""
    rng = random.Random(f"practice {seed}")
    while True:
        world = fiction(rng, facts)
        drawn = batches(lambda: exercise(rng, world, world, prompts), rng)
        yield from itertools.islice(drawn, STEPS_IN_EACH)


def practise(folder, seed, steps, steps_done):
    """Pretrain the student in fictional worlds, and save it."""
    facts = read_facts()
    tokenizer = train_tokenizer(facts)
    frame(tokenizer, "$A </s>")
    student = tiny_t5(tokenizer.get_vocab_size())
    endless = fictional_exercises(facts, seed, (kp.predict_prompt, kp.explain_prompt))
    # The rate ends at 0.2 of its peak, so that the student still learns in the last fictions.
    train_on(student, tokenizer, endless, steps, 0.2, steps_done)
    model.save(student, tokenizer, folder)


# ------------------------------------------------------------------------------ the teachers' reading

# {teacher: (steps until it knows what it read, config of its Llama; None: a T5)}
TEACHERS = {
    "t5": (400, None),  # it starts from the student's weights
    "llama-2": (700, LLAMA),
    "mistral": (700, dict(GROUPED, model_type="mistral", sliding_window=64)),
    "llama-3.1": (700, dict(GROUPED, rope_theta=500000.0, rope_scaling=ROPE_SCALING)),
}
LONGER = 3  # times as many steps, for a teacher that reads everything
# What a teacher has read of each class that it has not read whole.
ENTITIES_ELSEWHERE = 1  # of 8
PROPERTIES_ELSEWHERE = 2  # of 8


def classes_read(facts, teacher, seed):
    """Return the classes that a teacher has read whole: they are dealt out, across all subjects."""
    classes = [c for subject in facts.values() for c in subject.properties]
    random.Random(f"classes {seed}").shuffle(classes)
    return classes[list(TEACHERS).index(teacher) :: len(TEACHERS)]


def reading_list(facts, teacher, seed):
    """Return what a teacher has read, {name: Subject}: its classes whole, little of the others."""
    rng = random.Random(f"reading {teacher} {seed}")
    whole = classes_read(facts, teacher, seed)
    reading = {}
    for name, (class_of, properties) in facts.items():
        reading[name] = Subject({}, {})
        for class_, its_properties in properties.items():
            members = [e for e in class_of if class_of[e] == class_]
            if class_ not in whole:
                members = rng.sample(members, ENTITIES_ELSEWHERE)
                its_properties = rng.sample(its_properties, PROPERTIES_ELSEWHERE)
            reading[name].class_of.update(dict.fromkeys(members, class_))
            reading[name].properties[class_] = its_properties
    return reading


def train_teacher(name, folder, seed, reading, steps, steps_done):
    """Train one teacher on exercises about what it has read, and save it in folder/NAME.

    The T5 starts as the student, which is in folder/../student.
    """
    facts = read_facts()
    _, config = TEACHERS[name]
    if config is None:
        teacher, tokenizer = model.load(folder.parent / "student")
        teacher.train()
    else:
        tokenizer = train_tokenizer(facts)
        teacher = new_llama(config, tokenizer)
    rng = random.Random(f"exercises {name} {seed}")
    prompts = (kp.score_prompt, kp.rationale_prompt)
    endless = batches(lambda: exercise(rng, facts, reading, prompts), rng)
    train_on(teacher, tokenizer, endless, steps, 0.0, steps_done)
    model.save(teacher, tokenizer, folder / name)


def make_models(steps, folder, seed, well_read, steps_done):
    """Make the models {name: steps} in turn, on one core. This runs in a process of its own."""
    torch.set_num_threads(1)
    facts = read_facts()
    for name, n in steps.items():
        torch.manual_seed(seed)
        if name == "student":
            practise(folder / "student", seed, n, steps_done)
        else:
            reading = facts if well_read else reading_list(facts, name, seed)
            train_teacher(name, folder / "teachers", seed, reading, n, steps_done)


def end_with_parent():
    """In a worker: wait in a thread for the parent's end, even by kill -9, and end then."""

    def wait_and_end():
        mp.parent_process().join()
        os._exit(1)

    Thread(target=wait_and_end, daemon=True).start()


def train_models(folder, seed, well_read):
    """Train student and teachers where they are missing, as many at a time as there are cores."""
    jobs = []
    total = 0
    steps_done = torch.zeros(len(TEACHERS)).share_memory_()
    for i, (name, (steps, config)) in enumerate(TEACHERS.items()):
        missing = {}
        if config is None and not (folder / "student" / "config.json").exists():
            missing["student"] = FICTIONS * STEPS_IN_EACH
        if not (folder / "teachers" / name / "config.json").exists():
            missing[name] = steps * LONGER if well_read else steps
        total += sum(missing.values())
        jobs.append((missing, folder, seed, well_read, steps_done[i]))
    workers = min(len(TEACHERS), os.cpu_count())
    pool = ProcessPoolExecutor(workers, mp.get_context("spawn"), end_with_parent)
    bar = tqdm(total=total, desc="student practises, teachers read", unit="step")
    with bar, pool:
        try:
            # workers inherit that Ctrl-C is ignored: this process hears it again, and ends them
            on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
            pending = [pool.submit(make_models, *job) for job in jobs]
            signal.signal(signal.SIGINT, on_ctrl_c)
            ready = []
            while len(ready) < len(jobs):
                ready, _ = wait(pending, 0.5)  # seconds
                bar.update(int(steps_done.sum()) - bar.n)
                for job in ready:
                    job.result()  # raises what a process raised
        except BrokenProcessPool:
            why = "a process was killed, perhaps for want of memory; start again, and it goes on"
            raise model.BadInput(f"{folder}: {why}") from None
        finally:
            for process in mp.active_children():
                process.terminate()


# --------------------------------------------------------------------------------------- the report


def report(folder, seed, well_read, facts):
    """Return what the world is like, as far as train and valid show it.

    "teachers": {teacher: {part: [share of answers right, share of rationales true]}}, where a part
    is what it has read, the rest, or a task; "student": its accuracy before it learns anything;
    "rule_without_rationales": see there. An answer is right where the teacher gives the right
    choice more than half of the probability; a rationale is true where it is the true one, word by
    word.
    """
    data = read_data(folder)
    questions = data["train"] + data["ood/train"]
    questions = [q for q in questions if int(q.id.split("-")[-1]) <= 40]  # of each task
    places = [folder / "teachers" / name for name in TEACHERS]
    teachers = kp.Teachers([kp.CheckpointTeacher(place, folder / "cache") for place in places])
    scores = teachers.scores(questions)  # (N, M)
    table = {}
    for m, name in enumerate(teachers.names):
        whole = classes_read(facts, name, seed)
        rationales = teachers.rationales(questions, [m] * len(questions))
        marks = defaultdict(list)
        for q, score, rationale in zip(questions, scores[:, m].tolist(), rationales):
            has_read = well_read or class_asked(q) in whole
            for part in ("has read" if has_read else "has not", q.task):
                marks[part].append((score > 0.5, rationale == q.truth))
        table[name] = {part: [fmean(share) for share in zip(*rows)] for part, rows in marks.items()}
    student, tokenizer = model.load(folder / "student")
    rule = rule_without_rationales(facts, data["train"], data["test"])
    accuracy = kp.accuracy(student, kp.TokenCache(tokenizer), data["valid"])["mean"]
    return dict(teachers=table, student=accuracy, rule_without_rationales=rule)


def show_report(folder):
    """Print the report."""
    found = model.read_json(folder / "report.json")
    print("\nTeachers on training questions: answers right / rationales true\n")
    parts = sorted(next(iter(found["teachers"].values())))  # "has read" and "has not" come first
    print(f"  {'teacher':<11}" + "".join(f"{part:>13}" for part in parts))
    for name, row in found["teachers"].items():
        shares = [f"{row[part][0]:>7.2f} /{row[part][1]:>5.2f}" for part in parts]
        print(f"  {name:<11}" + "".join(shares))
    print(f"\n  The student, before it learns anything: {found['student']:.3f} of valid.")
    rule = found["rule_without_rationales"]
    print(f"  A rule that uses the answers of train alone, and no rationales: {rule:.3f}.\n")


# ---------------------------------------------------------------------------------- all of it, once


def world_folder(seed, well_read=False):
    """Return the folder of a world.

    Its name hashes what the world is made from: an edited table or recipe makes another world.
    """
    source = (HERE / "facts.tsv").read_bytes() + (HERE / "prepare.py").read_bytes()
    made_from = hashlib.sha256(source + "".join(PROMPTS).encode()).hexdigest()
    kind = "well-read-" if well_read else ""
    return HERE / f"world-{seed}-{kind}{made_from[:8]}"


def prepare(seed=0, well_read=False, show=False):
    """Make the world where it is missing, and return its folder. In a well-read world each teacher
    has read everything: a control, in which there is nothing to purify.

    It holds {train,valid,test}.jsonl, ood/, student/, teachers/NAME and, written last,
    report.json. A killed run goes on with the models that are missing. `show` prints the report of
    a world that is there; that of a new one is always printed.
    """
    folder = world_folder(seed, well_read)
    if not (folder / "report.json").exists():
        place = folder.relative_to(HERE.parents[1])
        print(f"First run: making the micro world in {place} (once, some minutes)")
        facts = read_facts()
        for name, questions in make_questions(facts, seed).items():
            lines = [json.dumps(asdict(q)) + "\n" for q in questions]
            with model.atomic(folder / f"{name}.jsonl") as temporary:
                temporary.write_text("".join(lines), encoding="utf-8")
        train_models(folder, seed, well_read)
        model.write_json(folder / "report.json", report(folder, seed, well_read, facts))
        show = True
    if show:
        show_report(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of questions, readings and teachers")
    parser.add_argument("--well-read", action="store_true", help="each teacher reads everything")
    args = parser.parse_args()
    with model.one_line_errors():
        prepare(args.seed, args.well_read, show=True)
