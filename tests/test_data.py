"""The micro world: its table, its questions, their rationales, and what its teachers have read."""

import itertools

import pytest

import kp
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


def of_task(rows, task):
    return [row for row in rows if row["task"] == task]


def pairs_asked(rows, subject):
    """Return the set of (entity, property) that these questions ask about."""
    entities = {prepare.bare(entity): entity for entity in subject.class_of}
    pairs = set()
    for row in rows:
        _, property_ = class_and_property(row["text"], subject)
        right = row["choices"][row["answer"]]
        pairs.add((entities[right], property_))
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


def check_choices(row, subject):
    """One choice of four has the property, three have not."""
    class_, _ = class_and_property(row["text"], subject)
    class_of = {prepare.bare(entity): c for entity, c in subject.class_of.items()}
    assert len(row["choices"]) == 4
    for i, choice in enumerate(row["choices"]):
        assert (class_of[choice] == class_) == (i == row["answer"])


def test_questions_are_many_well_formed_and_never_repeat():
    files = prepare.make_questions(FACTS, seed=0)
    for split, size in prepare.SIZES.items():
        for task, subject in FACTS.items():
            rows = of_task(files[split], task)
            assert len(rows) == size
            assert len({(row["text"], *row["choices"]) for row in rows}) == size
            for row in rows:
                check_choices(row, subject)
        assert {row["task"] for row in files[f"ood/{split}"]} == {"physical", "clinical"}
    assert files == prepare.make_questions(FACTS, seed=0)
    assert files != prepare.make_questions(FACTS, seed=1)


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


@pytest.mark.parametrize("split", ["train", "ood/test"])
def test_the_derivation_is_true_to_the_table(split):
    class_of = {}
    for subject in FACTS.values():
        class_of |= subject.class_of
    for row in prepare.make_questions(FACTS, seed=0)[split][::97]:
        q = kp.Question(**row)
        text = prepare.derivation(FACTS, q)
        facts, _ = text.removeprefix("Since ").split(", the answer is ")
        isa, has = facts.split(", and ", 1)
        entity, class_ = isa.split(" is ", 1)
        assert class_of[entity] == class_
        assert has.startswith(class_ + " ") == (q.choices[q.answer] != "no")
        assert kp.conclusion(text, q.choices) == q.answer


def n_pairs(subject):
    return sum(len(subject.properties[class_]) for class_ in subject.class_of.values())


def test_a_teacher_reads_its_own_subject_whole_and_little_else():
    for teacher, recipe in prepare.TEACHERS.items():
        reading = prepare.reading_list(FACTS, teacher, seed=0)
        assert list(reading) == list(FACTS)
        for name, subject in reading.items():
            share = n_pairs(subject) / n_pairs(FACTS[name])
            if name == recipe.home:
                assert share == 1
            else:
                assert 0 < share < 0.1
