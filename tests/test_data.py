"""The micro world: its table, its questions, their rationales, and what its teachers have read."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from threading import Thread

import pytest
from conftest import ROOT

import kp
import model
from data.micro import prepare

FACTS = prepare.read_facts()


def class_and_property(text, subject):
    """Return the one class and property that a question's text asks about, without the code that made it."""
    found = []
    for class_, properties in subject.properties.items():
        for property_ in properties:
            if property_ in text:
                found.append((class_, property_))
    (pair,) = found
    return pair


def of_task(questions, task):
    return [q for q in questions if q.task == task]


def pairs_asked(questions, subject):
    """Return the set of (entity, property) that these questions ask about."""
    entities = {prepare.bare(entity): entity for entity in subject.class_of}
    pairs = set()
    for q in questions:
        _, property_ = class_and_property(q.text, subject)
        pairs.add((entities[q.right], property_))
    return pairs


def test_the_table_is_as_large_and_as_clear_as_promised():
    assert len(FACTS) == 4
    names = []
    phrases = []
    for subject in FACTS.values():
        assert len(subject.class_of) >= 40
        assert len(subject.properties) >= 5
        for properties in subject.properties.values():
            assert len(properties) >= 6
        assert set(subject.class_of.values()) == set(subject.properties)
        names += map(prepare.bare, subject.class_of)
        phrases += subject.all_properties()
    assert len(set(names)) == len(names)
    assert len(set(phrases)) == len(phrases)
    for phrase, other in itertools.permutations(phrases, 2):
        assert phrase not in other


def check_choices(q, subject):
    """One choice of four has the property, three have not."""
    class_, _ = class_and_property(q.text, subject)
    class_of = {prepare.bare(entity): c for entity, c in subject.class_of.items()}
    assert len(q.choices) == 4
    for i, choice in enumerate(q.choices):
        assert (class_of[choice] == class_) == (i == q.answer)


def check_kinds(q):
    """One choice of four is of the class that is asked for."""
    class_of = {}
    for subject in FACTS.values():
        class_of.update((prepare.bare(entity), class_) for entity, class_ in subject.class_of.items())
    (asked,) = {class_ for class_ in class_of.values() if f" {class_} " in q.text.replace("?", " ")}
    assert len(q.choices) == 4
    for i, choice in enumerate(q.choices):
        assert (class_of[choice] == asked) == (i == q.answer)
    assert kp.is_right(q.truth, q) and asked in q.truth


def test_questions_are_many_well_formed_and_balanced():
    files = prepare.make_questions(FACTS, seed=0)
    for split, size in prepare.SIZES.items():
        for task, subject in FACTS.items():
            questions = of_task(files[split], task)
            assert len(questions) == size
            for q in questions:
                check_choices(q, subject)
            assert set(Counter(q.answer for q in questions).values()) == {size // 4}
        assert {q.task for q in files[f"ood/{split}"]} == {"physical", "kinds"}
        for q in of_task(files[f"ood/{split}"], "kinds"):
            check_kinds(q)
    assert files == prepare.make_questions(FACTS, seed=0)
    assert files != prepare.make_questions(FACTS, seed=1)


def test_no_question_is_asked_twice_in_no_split():
    files = prepare.make_questions(FACTS, seed=5)
    seen = set()
    for questions in files.values():
        for q in questions:
            assert (q.text, q.choices) not in seen
            seen.add((q.text, q.choices))


def test_no_test_pair_is_asked_in_training():
    files = prepare.make_questions(FACTS, seed=3)
    for task, subject in FACTS.items():
        asked = {}
        for split in ("train", "valid", "test"):
            asked[split] = pairs_asked(of_task(files[split], task), subject)
        for split, other in itertools.combinations(asked, 2):
            assert not asked[split] & asked[other]
        in_training = dict(asked["train"])  # {entity: one of its properties}
        assert set(in_training) == set(subject.class_of)  # but something is asked about every entity


def test_answers_alone_never_join_what_a_test_question_asks_for():
    """Join what any right answer of train joins, as far as that leads: no test pair is among it."""
    files = prepare.make_questions(FACTS, seed=1)
    for task, subject in FACTS.items():
        part = {}  # {entity or property: the set of all that it is joined with}
        for entity, property_ in pairs_asked(of_task(files["train"], task), subject):
            joined = part.get(entity, {entity}) | part.get(property_, {property_})
            part.update(dict.fromkeys(joined, joined))
        for entity, property_ in pairs_asked(of_task(files["test"], task), subject):
            assert entity not in part[property_]


def test_no_choice_of_a_test_question_stood_beside_its_property_in_training():
    """Neither right nor wrong: so to count what stood where tells nothing."""
    files = prepare.make_questions(FACTS, seed=2)
    for task, subject in FACTS.items():
        beside = defaultdict(set)  # {property: choices}
        for q in of_task(files["train"], task):
            beside[class_and_property(q.text, subject)[1]].update(q.choices)
        for q in of_task(files["test"] + files["valid"], task):
            property_ = class_and_property(q.text, subject)[1]
            assert beside[property_] and not beside[property_] & set(q.choices)
    assert prepare.rule_without_rationales(FACTS, files["train"], files["test"]) == 0.25


def test_the_rule_without_rationales_on_a_hand_made_case():
    """pike and trout share a property, so pike has the other one of trout; of two that share
    nothing, the one that was a wrong choice before is not it.
    """
    fish = prepare.Subject({}, {"a fish": ["swims", "spawns", "glitters"]})

    def q(property_, answer, *others):
        return kp.Question("", "", f"Which {property_}?", (answer, *others), 0)

    train = [q("swims", "pike", "oak"), q("swims", "trout", "oak"), q("spawns", "trout", "elm")]
    facts = {"nature": fish}
    assert prepare.rule_without_rationales(facts, train, [q("spawns", "pike", "oak")]) == 1
    assert prepare.rule_without_rationales(facts, train, [q("spawns", "oak", "elm")]) == 1
    assert prepare.rule_without_rationales(facts, train, [q("glitters", "pike", "oak")]) == 0.5


@pytest.mark.parametrize("split", ["train", "ood/test"])
def test_the_true_rationale_is_true_to_the_table(split):
    class_of = {}
    for subject in FACTS.values():
        class_of |= subject.class_of
    for q in prepare.make_questions(FACTS, seed=0)[split][::97]:
        facts, answer = q.truth.removeprefix("Whatever ").split(", so the answer is ")
        has, _, isa = facts.rpartition(", " if q.task == "kinds" else ", and ")
        entity, its_class = re.fullmatch("(.*?) is (.*)", isa).groups()
        assert class_of[entity] == its_class
        assert answer == f"{q.right}."
        assert kp.conclusion(q.truth, q.choices) == q.answer
        if q.task == "kinds":
            assert has == "Among these" and its_class in q.text
            continue
        (property_,) = [p for s in FACTS.values() for p in s.properties.get(its_class, []) if p in has]
        assert has == f"{property_} is {its_class}"
        assert property_ in q.text


def n_pairs(subject):
    return sum(len(subject.properties[class_]) for class_ in subject.class_of.values())


def test_every_class_is_read_whole_by_one_teacher_across_all_subjects():
    dealt = []
    for teacher in prepare.TEACHERS:
        whole = prepare.classes_read(FACTS, teacher, seed=0)
        dealt += whole
        reading = prepare.reading_list(FACTS, teacher, seed=0)
        assert list(reading) == list(FACTS)
        for name, (class_of, properties) in reading.items():
            for class_ in properties:
                part = prepare.Subject({e: c for e, c in class_of.items() if c == class_}, properties)
                assert n_pairs(part) == (64 if class_ in whole else 2)
        subjects = {name for name, s in FACTS.items() if set(s.properties) & set(whole)}
        assert len(subjects) > 1  # whom to ask does not follow from the task
    assert sorted(dealt) == sorted(c for s in FACTS.values() for c in s.properties)


def test_a_fictional_world_has_the_same_names_dealt_anew():
    rng = random.Random(0)
    world = prepare.fiction(rng, FACTS)
    true = {}
    fictional = {}
    for name, subject in FACTS.items():
        assert Counter(world[name].class_of.values()) == Counter(subject.class_of.values())
        assert set(world[name].properties) == set(subject.properties)
        for facts, s in ((true, subject), (fictional, world[name])):
            facts.update(s.class_of)
            facts.update((p, c) for c, properties in s.properties.items() for p in properties)
    assert set(true) == set(fictional)
    same = [name for name in true if true[name] == fictional[name]]
    assert len(same) < 0.1 * len(true)  # by chance 1 of 24
    assert prepare.fiction(rng, FACTS) != world


@pytest.mark.parametrize("who", ["a worker", "all"])
def test_the_making_of_a_world_that_is_stopped_ends_at_once(who, tmp_path):
    """A worker killed (for want of memory), or Ctrl-C: no process stays, and nothing waits for it."""

    def stop():
        while not multiprocessing.active_children() or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            time.sleep(0.01)
        if who == "a worker":
            multiprocessing.active_children()[0].kill()
        else:
            os.kill(os.getpid(), signal.SIGINT)

    Thread(target=stop).start()
    expected = model.BadInput if who == "a worker" else KeyboardInterrupt
    with pytest.raises(expected, match="a process was killed" if who == "a worker" else None):
        prepare.train_models(tmp_path, 0, False)
    assert not multiprocessing.active_children()


def test_the_workers_that_make_a_world_end_when_their_parent_is_killed(tmp_path):
    making = "import pathlib, sys; from data.micro import prepare; "
    making += "prepare.train_models(pathlib.Path(sys.argv[1]), 0, False)"
    command = [sys.executable, "-c", making, tmp_path]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    parent.stderr.read(1)  # its progress bar
    time.sleep(3)  # now the workers start, or train
    parent.kill()
    parent.communicate(timeout=60)  # which waits until nobody holds the pipe, workers included
