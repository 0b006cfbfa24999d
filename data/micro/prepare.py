"""The micro world: four tasks, two more out of domain, and four tiny teachers, all made from a table of true facts.

`facts.tsv` says which class an entity belongs to (an otter is a mammal) and what a class does (a mammal nurses its
young). A question asks for the entity with a property; its rationale says the two facts that lead there. Pairs
(entity, property) are dealt out to train, valid and test, so a test question is never one that was learnt by heart.

Each teacher has one of the paper's architectures in miniature and has *read* one subject whole and a part of the
others. It learns to answer and to explain from exercises on what it has read; asked about anything else it makes
something up, because that is what a language model does. Nothing is corrupted by hand.

    python -m data.micro.prepare        # train.py runs this on first use
"""

import argparse
import hashlib
import json
import math
import os
import random
import signal
from pathlib import Path

import torch
import torch.multiprocessing as mp
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

import kp
import model

HERE = Path(__file__).parent
TEMPLATES = {  # two ways to ask for the entity with a property, in the manner of each subject's data set
    "nature": ("Which of these {}?", "Name the one that {}."),  # OpenBookQA
    "science": ("Which one {}?", "A student looks for something that {}. Which is it?"),  # ARC
    "riddles": ("It {}. What is it?", "I am thinking of something that {}. What is it?"),  # RiddleSense
    "medicine": ("Which of the following {}?", "In the clinic, which one {}?"),  # PubMedQA's subject
}
PHYSICAL = "Goal: get hold of something that {}. Solution?"  # two choices, as PIQA; subjects science and riddles
CLINICAL = "Is it true that {} {}?"  # yes or no, as BioASQ; subject medicine
NAMING = "Which is choice ({})?"  # a question without a fact, about nothing but its own choices
SUPPOSE = "Suppose {}, and {}. Then which one {}?"
OUT_OF_DOMAIN = {"physical": ("science", "riddles"), "clinical": ("medicine",)}

TRAIN_PAIRS, VALID_PAIRS = 4, 1  # of each entity's 8 properties; the others are for the test
SIZES = {"train": 1000, "valid": 200, "test": 500}  # questions per task
READ_ELSEWHERE = (1, 2)  # what a teacher has read outside its own subject: entities and properties of each class, of 8

STEPS_DONE = [0] * 4  # how far each teacher is; shared between processes
PLAIN = 0.25  # share of exercises to answer plainly; the others are to explain
COMPREHENSION = 0.12  # share of exercises that name things without a fact, so that every name is known
BATCH, LEARNING_RATE = 32, 2.5e-3  # of each teacher

TEACHERS = {  # name: (subject read whole, training steps until that is known, config)
    "t5": ("nature", 650, dict(model_type="t5")),  # kp.tiny_t5
    "llama-2": ("science", 850, dict(
        model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-5, initializer_range=0.1)),
    "mistral": ("medicine", 1000, dict(
        model_type="mistral", hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=64, rms_norm_eps=1e-5, initializer_range=0.1)),
    "llama-3.1": ("riddles", 750, dict(
        model_type="llama", hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, initializer_range=0.1, rope_theta=500000.0, rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64))),
}  # fmt: skip


# ------------------------------------------------------------------------------- facts and questions


def read_facts(path=HERE / "facts.tsv"):
    """-> {subject: (class of each entity, properties of each class)}"""
    facts = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            row = line.split("\t")
            if len(row) != 4 or row[0] not in ("isa", "has"):
                raise model.BadInput(f"{path}:{number}: needs 4 columns separated by tabs, the first isa or has")
            class_of, properties = facts.setdefault(row[1], ({}, {}))
            if row[0] == "isa":
                class_of[row[2]] = row[3]
            else:
                properties.setdefault(row[2], []).append(row[3])
    return facts


def bare(entity):
    return entity.split(" ", 1)[1] if entity.startswith(("a ", "an ")) else entity


def explain(class_of, entity, class_, property_, answer):
    return f"Since {entity} is {class_of[entity]}, and {class_} {property_}, the answer is {answer}."


def derivation(facts, q):
    """The one true rationale of a question, from the facts. For reporting only, never an input to training."""
    for class_of, properties in facts.values():
        for class_, property_ in ((c, p) for c, ps in properties.items() for p in ps if p in q.text):
            answer = q.choices[q.answer]
            names = {bare(e): e for e in class_of}
            entity = names[answer] if answer in names else q.text.split(CLINICAL.split("{}")[0])[1].split(f" {property_}")[0]
            return explain(class_of, entity, class_, property_, answer)


def draw_question(rng, task, subject, facts, pair, entities=None):
    """One question about a pair (entity, property), and the rationale that the facts give.

    Wrong choices come from `entities` (all of the subject unless told) of other classes.
    """
    class_of, _ = facts[subject]
    entity, property_ = pair
    class_ = class_of[entity]
    others = [e for e in entities or class_of if class_of[e] != class_]
    if task == "clinical":
        choices, answer = ["yes", "no"], int(rng.random() < 0.5)
        asked = rng.choice(others) if answer else entity  # "no": an entity of another class
        text = CLINICAL.format(asked, property_)
        rationale = explain(class_of, asked, class_, property_, choices[answer])
    else:
        wrong = rng.sample(others, 1 if task == "physical" else 3)
        answer = rng.randrange(len(wrong) + 1)
        choices = [bare(e) for e in wrong[:answer] + [entity] + wrong[answer:]]
        template = PHYSICAL if task == "physical" else rng.choice(TEMPLATES[subject])
        text = template.format(property_)
        rationale = explain(class_of, entity, class_, property_, bare(entity))
    return (text, choices, answer), rationale


def deal_pairs(rng, class_of, properties):
    """{split: [(entity, property)]}: each entity's properties dealt to train, valid and test, evenly."""
    pairs = {"train": [], "valid": [], "test": []}
    for entity, class_ in class_of.items():
        order = rng.sample(properties[class_], len(properties[class_]))
        cuts = {"train": order[:TRAIN_PAIRS], "valid": order[TRAIN_PAIRS : TRAIN_PAIRS + VALID_PAIRS]}
        for split in pairs:
            pairs[split] += [(entity, p) for p in cuts.get(split, order[TRAIN_PAIRS + VALID_PAIRS :])]
    return pairs


def make_questions(facts, seed):
    """{file: [row]}: in-domain and ood/ splits, no question twice."""
    rng, files, pairs = random.Random(f"questions {seed}"), {}, {}
    for subject, (class_of, properties) in facts.items():
        pairs[subject] = deal_pairs(rng, class_of, properties)
    tasks = {subject: (subject,) for subject in facts} | OUT_OF_DOMAIN
    for task, subjects in tasks.items():
        for split, size in SIZES.items():
            rows = files.setdefault(split if task in facts else f"ood/{split}", [])
            seen, at = set(), 0
            pool = [(s, pair) for s in subjects for pair in pairs[s][split]]
            rng.shuffle(pool)
            while len(seen) < size:
                (subject, pair), at = pool[at % len(pool)], at + 1
                (text, choices, answer), _ = draw_question(rng, task, subject, facts, pair)
                if (text, *choices) not in seen:
                    seen.add((text, *choices))
                    row_id = f"{task}-{split}-{len(seen)}"
                    rows.append(dict(id=row_id, task=task, text=text, choices=choices, answer=answer))
    return files


def train_tokenizer(facts):
    """One token a word, and one for each of "(a)" to "(d)": over everything that the world can say."""
    corpus = []
    for subject, (class_of, properties) in facts.items():
        corpus += [explain(class_of, e, c, p, bare(e)) for e, c in class_of.items() for p in properties[c]]
        corpus += [t.format("") for t in (*TEMPLATES[subject], PHYSICAL)]
    suppose = SUPPOSE.format("", "", "")
    text = " ".join((CLINICAL.format("", ""), NAMING.format("a"), suppose)) + suppose
    q = kp.Question("", "", text, ("yes", "no", "choice", "Which"), 0)
    corpus += [kp.score_prompt(q), kp.rationale_prompt(q), kp.predict_prompt(q), kp.explain_prompt(q)]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend(" ")  # the first word of a text is the same token as elsewhere
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\([a-j]\)| ?\w+| ?[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    tokenizer.train_from_iterator(corpus, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return tokenizer


# --------------------------------------------------------------------------------------- the teachers


def reading_list(facts, name, seed):
    """What a teacher has read: [(subject, entities, {class: properties})], all of its own subject, little elsewhere."""
    rng, home = random.Random(f"reading {name} {seed}"), TEACHERS[name][0]
    lists = []
    for subject, (class_of, properties) in facts.items():
        members = {c: [e for e in class_of if class_of[e] == c] for c in properties}
        if subject != home:
            members = {c: rng.sample(es, READ_ELSEWHERE[0]) for c, es in members.items()}
            properties = {c: rng.sample(ps, READ_ELSEWHERE[1]) for c, ps in properties.items()}
        lists.append((subject, [e for es in members.values() for e in es], properties))
    return lists


def comprehension(rng, facts):
    """(question, rationale) that a reader who knows no fact can answer: all that it takes stands in the question.

    Half of them ask for a choice by its letter, half suppose something; entity, class and property of a supposition
    are drawn apart from each other, over all subjects, so that no fact of the table can be learnt from it.
    """
    entities, classes, properties = zip(*((c, c.values(), [p for ps in ps.values() for p in ps]) for c, ps in facts.values()))
    s = rng.randrange(len(facts))
    things = list(entities[s]) if rng.random() < 0.75 else properties[s]
    chosen, i = rng.sample(things, 4), rng.randrange(4)
    choices, name = tuple(bare(t) for t in chosen), bare(chosen[i])
    if things is properties[s] or rng.random() < 0.4:
        q = kp.Question("", "", NAMING.format("abcd"[i]), choices, i)
        return q, f"Since choice ({'abcd'[i]}) is {name}, the answer is {name}."
    class_, property_ = rng.choice(sorted(set(rng.choice(classes)))), rng.choice(rng.choice(properties))
    text = SUPPOSE.format(f"{chosen[i]} is {class_}", f"{class_} {property_}", property_)
    return kp.Question("", "", text, choices, i), explain({chosen[i]: class_}, chosen[i], class_, property_, name)


def exercise(rng, facts, reading):
    """One (prompt, target) of a teacher: a question about something read, to answer plainly or to explain."""
    if rng.random() < COMPREHENSION:
        q, rationale = comprehension(rng, facts)
    else:
        subject, known, properties = rng.choices(reading, weights=[len(entities) for _, entities, _ in reading])[0]
        entity = rng.choice(known)
        pair = (entity, rng.choice(properties[facts[subject][0][entity]]))
        tasks = [subject, subject] + [task for task, subjects in OUT_OF_DOMAIN.items() if subject in subjects]
        (text, choices, answer), rationale = draw_question(rng, rng.choice(tasks), subject, facts, pair, known)
        q = kp.Question("", "", text, tuple(choices), answer)
    if rng.random() < PLAIN:
        return kp.score_prompt(q), q.choices[q.answer]
    return kp.rationale_prompt(q), rationale


def batches(rng, facts, reading, steps, block=10):
    """Batches of exercises of similar length: drawn and sorted a block at a time, a third less padding."""
    for _ in range(-(-steps // block)):
        drawn = sorted((exercise(rng, facts, reading) for _ in range(BATCH * block)), key=lambda e: len(e[0]) + len(e[1]))
        for i in rng.sample(range(block), min(block, steps)):
            yield zip(*drawn[i * BATCH : (i + 1) * BATCH])


def train_teacher(job):
    """Train one teacher from scratch on its exercises and save it. Runs in a process of its own."""
    name, folder, seed, index, steps = job
    torch.set_num_threads(1)  # one thread each: as many teachers at a time as there are cores
    torch.manual_seed(seed)
    facts, rng = read_facts(), random.Random(f"exercises {name} {seed}")
    reading, tokenizer, config = reading_list(facts, name, seed), train_tokenizer(facts), TEACHERS[name][2]
    is_t5 = config["model_type"] == "t5"
    frame = "$A </s>" if is_t5 else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("</s>", 1), ("<s>", 2)])
    config = {**config, "vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 0, "eos_token_id": 1}
    teacher = kp.tiny_t5(config["vocab_size"]) if is_t5 else model.Llama(config)
    optimizer = torch.optim.AdamW(teacher.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * t / steps)))
    for prompts, targets in batches(rng, facts, reading, steps):
        if is_t5:
            encode = kp.Targets(tokenizer)
            loss = kp.sequence_losses(teacher, encode(prompts), encode(targets)).mean()
        else:
            loss = lm_loss(teacher, tokenizer, prompts, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        STEPS_DONE[index] += 1
    model.save(teacher, tokenizer, folder)


def lm_loss(teacher, tokenizer, prompts, targets):
    """Next-token loss of a decoder-only teacher on the targets only, not on the prompts."""
    heads = [e.ids for e in tokenizer.encode_batch(list(prompts))]
    whole = [e.ids + [1] for e in tokenizer.encode_batch([f"{p} {t}" for p, t in zip(prompts, targets)])]
    ids, mask = model.pad(whole)
    starts = torch.tensor([len(h) for h in heads])[:, None]
    where = ((torch.arange(1, ids.shape[1]) >= starts) & mask[:, 1:].bool()).nonzero(as_tuple=True)
    return kp.mean_per_row(teacher(ids[:, :-1], mask[:, :-1], where), ids[:, 1:], where).mean()


# ----------------------------------------------------------------------------------------- the report


def report(teachers, questions, facts):
    """{teacher: {task: (share of answers right, share of rationales true)}}; true: its facts and its conclusion."""
    table, scores = {}, teachers.scores(questions)
    for m, name in enumerate(teachers.names):
        texts = teachers.rationales(questions, [m] * len(questions))
        row = {}
        for q, score, text in zip(questions, scores[:, m].tolist(), texts):
            row.setdefault(q.task, []).append((score > 0.5, text == derivation(facts, q)))
        table[name] = {task: [sum(x) / len(pairs) for x in zip(*pairs)] for task, pairs in row.items()}
    return table


# ------------------------------------------------------------------------------------ all of it, once


def prepare(seed=0):
    """Make the world where it is missing -> its folder: {train,valid,test}.jsonl, ood/, teachers/NAME, report.json.

    The folder's name hashes what it is made from, so that an edited table or recipe makes another world. A killed
    run goes on with the teachers that are missing.
    """
    sources = [HERE / "facts.tsv", HERE / "prepare.py"]
    q = kp.Question("", "", "", ("", ""), 0)
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources) + kp.score_prompt(q).encode() + kp.rationale_prompt(q).encode())
    folder = HERE / f"world-{seed}-{key.hexdigest()[:8]}"
    if (folder / "report.json").exists():
        return folder
    print(f"First run: making the micro world in {folder.relative_to(HERE.parents[1])} (once, some minutes)")
    facts = read_facts()
    for name, rows in make_questions(facts, seed).items():
        with model.atomic(folder / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = {name: folder / "teachers" / name for name in TEACHERS}
    missing = [name for name, place in places.items() if not (place / "config.json").exists()]
    context = mp.get_context("spawn")
    steps_done = context.Array("i", len(places))
    with context.Pool(min(len(missing), os.cpu_count()) or 1, _share, (steps_done,)) as pool:
        missing.sort(key=lambda name: -TEACHERS[name][1])  # the longest first: the cores end together
        jobs = [(name, str(places[name]), seed, i, TEACHERS[name][1]) for i, name in enumerate(missing)]
        pending = pool.map_async(train_teacher, jobs, chunksize=1)
        with tqdm(total=sum(TEACHERS[name][1] for name in missing), desc="teachers read", unit="step") as bar:
            while not pending.ready():
                pending.wait(0.5)
                bar.update(sum(steps_done) - bar.n)
        pending.get()
    data = kp.read_data(folder)
    asked = [q for split in ("train", "ood/train") for q in data[split] if int(q.id.rsplit("-", 1)[1]) <= 100]
    teachers = kp.Teachers([folder / "teachers" / name for name in TEACHERS], folder / "cache")
    model.write_json(folder / "report.json", report(teachers, asked, facts))
    show_report(folder)
    return folder


def _share(steps_done):
    global STEPS_DONE
    STEPS_DONE = steps_done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


def show_report(folder):
    """The teacher x task table: answers right / rationales true."""
    table = model.read_json(folder / "report.json")
    tasks = list(next(iter(table.values())))
    print("\nTeachers on questions of the training split: answers right / rationales true (checked against the facts)\n")
    print(f"  {'teacher':<11}{'has read':<10}" + "".join(f"{task:>13}" for task in tasks))
    for name, row in table.items():
        print(f"  {name:<11}{TEACHERS[name][0]:<10}" + "".join(f"{right:>7.2f} /{true:>5.2f}" for right, true in row.values()))
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the questions, what is read, and the teachers")
    show_report(prepare(parser.parse_args().seed))
