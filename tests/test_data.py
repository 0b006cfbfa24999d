import pytest

import kp
from data.micro import prepare

FACTS = prepare.read_facts()


def pairs_asked(questions, subject):
    """(entity, property) of every question, found in its text without the code that made it."""
    class_of, properties = FACTS[subject]
    names = {prepare.bare(e): e for e in class_of}
    found = set()
    for q in questions:
        (property_,) = [p for ps in properties.values() for p in ps if p in q["text"]]
        found.add((names[q["choices"][q["answer"]]], property_))
    return found


def test_the_table_is_as_large_and_as_clear_as_promised():
    assert len(FACTS) == 4
    names, phrases = [], []
    for class_of, properties in FACTS.values():
        assert len(class_of) >= 40 and len(properties) >= 5 and all(len(ps) >= 6 for ps in properties.values())
        assert set(class_of.values()) == set(properties)
        names += [prepare.bare(e) for e in class_of]
        phrases += [p for ps in properties.values() for p in ps]
    assert len(set(names)) == len(names) and len(set(phrases)) == len(phrases)
    assert not any(p in other for p in phrases for other in phrases if p != other)


def test_questions_are_many_well_formed_and_never_repeat():
    files = prepare.make_questions(FACTS, seed=0)
    for split, size in prepare.SIZES.items():
        rows = files[split]
        for subject, (class_of, properties) in FACTS.items():
            mine = [r for r in rows if r["task"] == subject]
            assert len(mine) == size
            assert len({(r["text"], *r["choices"]) for r in mine}) == size
            names = {prepare.bare(e): c for e, c in class_of.items()}
            for r in mine:  # one choice has the property, three have not
                (class_,) = [c for c, ps in properties.items() for p in ps if p in r["text"]]
                assert [names[c] == class_ for c in r["choices"]] == [i == r["answer"] for i in range(4)]
        assert {r["task"] for r in files[f"ood/{split}"]} == {"physical", "clinical"}
    assert files == prepare.make_questions(FACTS, seed=0) != prepare.make_questions(FACTS, seed=1)


def test_no_test_pair_is_asked_in_training():
    files = prepare.make_questions(FACTS, seed=3)
    for subject, (class_of, properties) in FACTS.items():
        asked = {s: pairs_asked([r for r in files[s] if r["task"] == subject], subject) for s in ("train", "valid", "test")}
        assert not asked["train"] & asked["test"] and not asked["train"] & asked["valid"] and not asked["valid"] & asked["test"]
        assert {e for e, _ in asked["train"]} == set(class_of)  # but of every entity something is


@pytest.mark.parametrize("split", ["train", "ood/test"])
def test_the_derivation_is_true_to_the_table(split):
    for r in prepare.make_questions(FACTS, seed=0)[split][::97]:
        q = kp.Question(r["id"], r["task"], r["text"], tuple(r["choices"]), r["answer"])
        text = prepare.derivation(FACTS, q)
        isa, has = text.removeprefix("Since ").split(", the answer is ")[0].split(", and ", 1)
        entity, class_ = isa.split(" is ", 1)
        assert any(class_of.get(entity) == class_ for class_of, _ in FACTS.values())
        assert has.startswith(class_ + " ") == (q.choices[q.answer] != "no")
        assert kp.conclusion(text, q.choices) == q.answer


def test_a_teacher_reads_its_own_subject_whole_and_little_else():
    for name, (home, *_) in prepare.TEACHERS.items():
        for subject, known, properties in prepare.reading_list(FACTS, name, 0):
            class_of, all_properties = FACTS[subject]
            share = sum(len(properties[class_of[e]]) for e in known) / sum(len(all_properties[class_of[e]]) for e in class_of)
            assert share == 1 if subject == home else 0 < share < 0.1
