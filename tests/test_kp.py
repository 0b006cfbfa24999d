import json

import pytest
import torch

import kp
import model
from model import BadInput


def a_question(**change):
    row = dict(id="1", task="t", text="Which swims?", choices=["oak", "trout", "oak moss"], answer=1)
    return {**row, **change}


def write_lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


# ------------------------------------------------------------------------------------------- questions


def test_an_answer_may_be_an_index_or_a_choice(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", a_question(), a_question(answer="trout"), {**a_question(), "question": "Q?"})
    by_index, by_text, _ = kp.read_questions(path)
    assert by_index == by_text and by_index.choices[by_index.answer] == "trout"


@pytest.mark.parametrize(
    "row, says",
    [
        ("{not json", "JSON"),
        (a_question(answer="shark"), "'shark' is not among the 3 choices"),
        (a_question(answer=3), "3 is not among"),
        (a_question(answer=-1), "-1 is not among"),
        (a_question(answer=True), "not among"),
        (a_question(choices=["one"]), "choices"),
        (a_question(choices="abc"), "choices"),
        (a_question(text=" "), "no question"),
        ("[1, 2]", "no question"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, says):
    path = write_lines(tmp_path / "q.jsonl", a_question(), row)
    with pytest.raises(BadInput, match="q.jsonl:2: ") as error:
        kp.read_questions(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_empty_or_missing_data_set_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="holds no question"):
        kp.read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(BadInput, match="train.jsonl"):
        kp.read_data(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        kp.read_data(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text, index",
    [
        ("An oak is a tree. So the answer is oak.", 0),
        ("So the answer is oak moss.", 2),
        ("First the answer is oak, no: the answer is trout", 1),
        ("Thus, the answer is (b) trout", 1),
        ("the answer is: (C)", 2),
        ("The answer is (e)", None),
        ("It swims.", None),
        ("So the answer is shark.", None),
    ],
)
def test_conclusion(text, index):
    assert kp.conclusion(text, ("oak", "trout", "oak moss")) == index


# --------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("teacher", [0, 1, 2, 3])
def test_choices_score_as_if_each_were_read_alone(world, teacher_folders, teacher):
    net, tokenizer = model.load(teacher_folders[teacher])
    questions = kp.read_questions(world / "train.jsonl")[:5] + kp.read_questions(world / "ood" / "train.jsonl")[-3:]
    prompts = [kp.score_prompt(q) for q in questions]
    batched = kp.choice_logps(net, tokenizer, prompts, [q.choices for q in questions], batch_size=3)
    for q, prompt, logps in zip(questions, prompts, batched):
        for choice, logp in zip(q.choices, logps):
            if teacher == 0:
                ids, target = tokenizer.encode(prompt).ids, tokenizer.encode(choice).ids
                logits = net(torch.tensor([ids]), torch.ones(1, len(ids)), torch.tensor([[0] + target[:-1]]))[0]
            else:
                ids, n = tokenizer.encode(f"{prompt} {choice}").ids, len(tokenizer.encode(prompt).ids)
                target = ids[n:]
                logits = net(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0, n - 1 : -1]
            alone = sum(row.log_softmax(0)[t].item() for row, t in zip(logits, target))
            assert logp == pytest.approx(alone, abs=1e-3)


# -------------------------------------------------------------------------------------------- teachers


def test_a_rationale_is_what_the_teacher_writes_alone(world, teacher_folders, tmp_path):
    questions = kp.read_questions(world / "train.jsonl")[::7]
    teachers = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=12, batch_size=4))
    for m, folder in enumerate(teacher_folders):
        net, tokenizer = model.load(folder)
        for q, text in zip(questions, teachers.rationales(questions, [m] * len(questions))):
            ids = torch.tensor([tokenizer.encode(kp.rationale_prompt(q)).ids])
            assert text == tokenizer.decode(net.generate(ids, torch.ones_like(ids), 12)[0].tolist()).strip()


def test_only_the_chosen_teachers_write_and_nothing_is_paid_twice(world, teacher_folders, tmp_path, monkeypatch):
    questions = kp.read_questions(world / "train.jsonl")[:6]
    teachers = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=8))
    texts = teachers.rationales(questions, [0, 2, 0, 2, 2, 0])
    assert set(teachers.loaded) == {0, 2}
    scores, paid = teachers.scores(questions), dict(teachers.ledger)
    assert scores.shape == (6, 4) and ((scores > 0) & (scores < 1)).all()
    assert paid["rationale_wrote"] <= 6 * 8

    # the next run finds all of it on disk, and its ledger counts it as if it had been generated
    again = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=8))
    monkeypatch.setattr(kp.models, "load", None)
    assert again.rationales(questions, [0, 2, 0, 2, 2, 0]) == texts
    assert torch.equal(again.scores(questions), scores) and dict(again.ledger) == paid
    again.rationales(questions, [0, 2, 0, 2, 2, 0])
    assert dict(again.ledger) == paid  # asked twice in one run, paid once


def test_other_settings_are_other_rationales(world, teacher_folders, tmp_path):
    questions = kp.read_questions(world / "train.jsonl")[:3]
    short = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=3))
    long = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=9))
    assert short.rationales(questions, [1] * 3) != long.rationales(questions, [1] * 3)


def test_a_torn_last_line_is_cut_off(world, teacher_folders, tmp_path):
    questions = kp.read_questions(world / "train.jsonl")[:4]
    teachers = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=8))
    texts = teachers.rationales(questions, [1] * 4)
    whole = teachers.files[1].read_bytes()
    teachers.files[1].write_bytes(whole[:-20])
    again = kp.Teachers(teacher_folders, tmp_path, kp.Asking(max_new_tokens=8))
    assert len(again.said[1]) == 3
    assert again.rationales(questions, [1] * 4) == texts
    assert teachers.files[1].read_bytes() == whole


# ------------------------------------------------------------------------------------------- dual loss


def test_the_dual_loss_is_the_two_losses_computed_apart(world, teacher_folders):
    student, tokenizer = model.load(teacher_folders[0])
    encode = kp.Targets(tokenizer)
    questions = kp.read_questions(world / "train.jsonl")[::20]
    rationales = [["It has gills.", "A trout is a fish."], [], ["So the answer is oak."], ["a", "b", "c d e"], ["f"]]
    rationales = rationales[: len(questions)]

    def alone(prompt, target):  # one row, no padding
        ids, labels = tokenizer.encode(prompt).ids, tokenizer.encode(target).ids
        logits = student(torch.tensor([ids]), torch.ones(1, len(ids)), torch.tensor([[0] + labels[:-1]]))[0]
        return -sum(row.log_softmax(0)[t] for row, t in zip(logits, labels)) / len(labels)

    answers = [alone(f"predict: {kp.ask(q)}", q.choices[q.answer]) for q in questions]
    explained = [alone(f"explain: {kp.ask(q)}", t) for q, texts in zip(questions, rationales) for t in texts]
    parts = iter(explained)
    grouped = [[next(parts) for _ in texts] for texts in rationales]
    expected = sum(answers) / len(questions) + 0.7 * sum(sum(own) / len(own) for own in grouped if own) / len(questions)
    loss, got_answers, got_explained, tokens = kp.dual_loss(student, encode, questions, rationales, 0.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(got_answers, torch.stack(answers).detach(), atol=1e-5)
    assert torch.allclose(got_explained, torch.stack(explained).detach(), atol=1e-5)
    assert tokens == sum(
        len(tokenizer.encode(text).ids)
        for q, texts in zip(questions, rationales)
        for text in [kp.predict_prompt(q), q.choices[q.answer], *texts, *[kp.explain_prompt(q)] * len(texts)]
    )

    def gradient(loss):
        student.zero_grad()
        loss.backward()
        return student.encoder.block[0].layer[0]["SelfAttention"].q.weight.grad.clone()

    assert torch.allclose(gradient(loss), gradient(expected), atol=1e-6)


def test_accuracy_counts_the_likeliest_choice(world, teacher_folders):
    student, tokenizer = model.load(teacher_folders[0])
    questions = kp.read_questions(world / "test.jsonl")
    result = kp.accuracy(student, tokenizer, questions)
    for task in {q.task for q in questions}:
        mine = [q for q in questions if q.task == task]
        right = 0
        for q in mine:
            ids = tokenizer.encode(kp.predict_prompt(q)).ids
            losses = [kp.sequence_losses(student, [ids], [t]).item() * len(t) for t in (tokenizer.encode(c).ids for c in q.choices)]
            right += losses.index(min(losses)) == q.answer
        assert result[task] == right / len(mine)
    assert result["mean"] == pytest.approx(sum(v for k, v in result.items() if k != "mean") / 4)
