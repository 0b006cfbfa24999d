"""The method's nouns: questions, prompts, teachers who score and explain, and the student's dual loss.

A multiple-choice `Question` goes to M `Teachers`. Each can `score` it (how probable does it find the right
choice? cheap: nothing is generated) and write a rationale for it (expensive: so it is written only when a
purifier asks for it, and kept on disk for ever). The student learns from both with one loss,

    L_MTKD-KP = L_PR(answer | q) + lambda * L_DL(rationale | q)          (arXiv 2602.01064; TinyLLM, 2402.04616)

where one model does both, told apart by the prefixes `predict:` and `explain:`.
Read in this order: questions, prompts, scoring, teachers, the dual loss.
"""

import hashlib
import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as models
from model import BadInput, by_length, device_of, pad

# -------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    id: str
    task: str
    text: str
    choices: tuple
    answer: int  # index into choices


def read_jsonl(path):
    """Yield (line number, object) of a JSON-lines file; BadInput names the line that does not parse."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise BadInput(f"{path}:{number}: not a line of JSON ({error}); mend or delete it") from None


def read_questions(path):
    """One question a line: {"id", "task", "text", "choices", "answer"}, the answer a choice or its index."""
    questions = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        row = row if isinstance(row, dict) else {}
        text, choices, answer = row.get("text", row.get("question")), row.get("choices"), row.get("answer")
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{where}: no question; each line needs text, choices and answer")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise BadInput(f"{where}: choices must be a list of two or more texts")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise BadInput(f"{where}: the answer {answer!r} is not among the {len(choices)} choices; give its text or index")
        task = str(row.get("task", Path(path).resolve().parent.name))
        questions.append(Question(str(row.get("id", number)), task, text, tuple(choices), answer))
    if not questions:
        raise BadInput(f"{path}: holds no question; write one a line")
    return questions


def read_data(folder):
    """A folder with train, valid and test.jsonl, and perhaps the same under ood/ -> {split: [Question]}.

    The out-of-domain splits are named ood/train, ood/valid, ood/test; only ood/test need exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give one with train.jsonl, valid.jsonl and test.jsonl")
    data = {split: read_questions(folder / f"{split}.jsonl") for split in ("train", "valid", "test")}
    for file in sorted(folder.glob("ood/*.jsonl")):
        data[f"ood/{file.stem}"] = read_questions(file)
    return data


# ---------------------------------------------------------------------------------------------- prompts


def printable(text):
    """Without control characters: what a file says must not steer the reader's terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def ask(q):
    """The question with its choices, as teacher and student both read it."""
    return q.text + "".join(f" ({'abcdefghij'[i]}) {choice}" for i, choice in enumerate(q.choices))


def predict_prompt(q):
    return f"predict: {ask(q)}"


def explain_prompt(q):
    return f"explain: {ask(q)}"


def score_prompt(q, examples=()):
    return "".join(f"Question: {ask(e)} Answer: {e.choices[e.answer]}\n\n" for e in examples) + f"Question: {ask(q)} Answer:"


def rationale_prompt(q, examples=(), tell_answer=False):
    """As TinyLLM asks: examples, question, choices, (the answer, if told), "step by step"."""
    told = f" The answer is {q.choices[q.answer]}." if tell_answer else ""
    return score_prompt(q, examples).removesuffix(" Answer:") + told + " Let's think step by step."


def conclusion(rationale, choices):
    """The index of the choice that a rationale ends on ("... the answer is X"), or None. Letters count too."""
    tail = re.split(r"answer is:?", rationale, flags=re.IGNORECASE)[-1].strip(" .\"'").lower()
    letter = re.match(r"\(?([a-j])\)", tail)
    if letter and ord(letter[1]) - ord("a") < len(choices):
        return ord(letter[1]) - ord("a")
    named = [i for i, c in enumerate(choices) if tail.startswith(c.lower())]
    return max(named, key=lambda i: len(choices[i])) if named else None


# ---------------------------------------------------------------------------------------------- scoring


def continuation(tokenizer, prompt, text):
    """The ids that `text` adds behind `prompt` (tokenised together: joins at the seam are the model's own)."""
    return tokenizer.encode(f"{prompt} {text}").ids[len(tokenizer.encode(prompt).ids) :]


@torch.no_grad()
def choice_logps(model, tokenizer, prompts, choices, batch_size=64, progress=None):
    """log p(choice | prompt) of every choice: a list of N lists. Each prompt is read once, not once per choice."""
    encoder_decoder, device, out = hasattr(model, "encode"), device_of(model), [None] * len(prompts)
    ids = [e.ids for e in tokenizer.encode_batch(prompts)]
    if encoder_decoder:
        tails = [[e.ids for e in tokenizer.encode_batch(list(c))] for c in choices]
    else:
        tails = [[continuation(tokenizer, p, c) for c in cs] for p, cs in zip(prompts, choices)]
    for rows in by_length(ids, batch_size):
        flat = [tail for row in rows for tail in tails[row]]
        owner = torch.tensor([i for i, row in enumerate(rows) for _ in tails[row]], device=device)
        tokens, is_token = (x.to(device) for x in pad(flat))
        cache, first = model.prefill(*(x.to(device) for x in pad([ids[row] for row in rows])), tokens.shape[1])
        cache.select(owner)
        logits = torch.cat((first[owner, None], model.step(tokens[:, :-1], cache)), 1) if tokens.shape[1] > 1 else first[owner, None]  # fmt: skip
        logp = -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        logp = iter((logp * is_token).sum(1).tolist())
        for row in rows:
            out[row] = [next(logp) for _ in tails[row]]
        if progress:
            progress(rows, out)
    return out


def accuracy(model, tokenizer, questions, batch_size=64):
    """The share of questions, per task and as "mean" over tasks, whose right choice is the likeliest answer."""
    model.eval()
    logps = choice_logps(model, tokenizer, [predict_prompt(q) for q in questions], [q.choices for q in questions], batch_size)
    right, total = Counter(), Counter(q.task for q in questions)
    for q, lp in zip(questions, logps):
        right[q.task] += max(range(len(lp)), key=lp.__getitem__) == q.answer
    shares = {task: right[task] / n for task, n in total.items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


# --------------------------------------------------------------------------------------------- teachers


def fingerprint(folder):
    """sha256 over everything of a checkpoint that decides what it says."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", folder / "tokenizer.json", *models.weight_files(folder)]:
        if not file.exists():
            raise BadInput(f"{file}: no such file; a teacher is a folder with config.json, tokenizer.json and safetensors")
        with open(file, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


@dataclass
class Asking:
    """How teachers are asked."""

    device: str = "cpu"
    dtype: object = None  # as stored
    shots: int = 0  # examples in the prompt, of the question's own task
    max_new_tokens: int = 64
    tell_answer: bool = False  # TinyLLM's teacher forcing; without it a conclusion can be checked
    batch_size: int = 128
    seed: int = 0  # draws the examples


class Teachers:
    """M checkpoint folders, asked one after the other; what they said is kept, and paid for once.

    The cache is one append-only JSONL file per teacher in a folder named by the teacher's fingerprint; a line's
    key hashes the prompt and the settings, so it is never stale. `ledger` counts the tokens that this run needed
    (cache hits as if they had been computed): score_read, rationale_read and rationale_wrote.
    """

    def __init__(self, folders, cache, asking=None, examples=()):
        self.folders, self.asking, self.examples = [Path(f) for f in folders], asking or Asking(), examples
        for f in self.folders:
            if not f.is_dir():
                raise BadInput(f"{f}: no such folder; --teachers takes checkpoint folders")
            kind = models.read_json(f / "config.json").get("model_type")
            if kind not in ("t5", "llama", "mistral"):
                raise BadInput(f"{f / 'config.json'}: model_type {kind!r} cannot teach; take a t5, llama or mistral")
        self.names = [f.name for f in self.folders]
        self.files = [Path(cache) / fingerprint(f)[:16] / "said.jsonl" for f in self.folders]
        self.said = [self._recall(f) for f in self.files]
        self.loaded, self.counted, self.ledger = {}, set(), Counter()
        size = sum(w.stat().st_size for f in self.folders for w in models.weight_files(f))
        self.keep_all = size < 2**30  # small teachers stay in memory together, large ones take turns

    def __len__(self):
        return len(self.folders)

    def _recall(self, file):
        """What this teacher has said: {key: record}. A last line torn by a kill is cut off."""
        if not file.exists():
            return {}
        whole = file.read_bytes()
        if not whole.endswith(b"\n"):
            with open(file, "r+b") as f:
                f.truncate(whole.rfind(b"\n") + 1)
        return {record["key"]: record for _, record in read_jsonl(file)}

    def model(self, m):
        if m not in self.loaded:
            if not self.keep_all:
                self.loaded.clear()
            self.loaded[m] = models.load(self.folders[m], self.asking.device, self.asking.dtype)
        return self.loaded[m]

    def _prompts(self, questions, prompt):
        """In-context examples are drawn per question, from its own task, by the seed and the question's id."""
        prompts, how = [], self.asking
        for q in questions:
            others = [e for e in self.examples if e.task == q.task and e.id != q.id] if how.shots else []
            prompts.append(prompt(q, random.Random(f"{how.seed} {q.id}").sample(others, min(how.shots, len(others)))))
        return prompts

    def _answers(self, m, kind, prompts, extras, compute):
        """Records for these prompts; `compute(model, tokenizer, rows, save)` makes the ones not said before."""
        keys = [hashlib.sha256(json.dumps([kind, p, e]).encode()).hexdigest()[:32] for p, e in zip(prompts, extras)]
        todo = list({key: row for row, key in enumerate(keys) if key not in self.said[m]}.values())
        if todo:
            model, tokenizer = self.model(m)
            self.files[m].parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.files[m], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            bar = tqdm(total=len(todo), desc=f"{self.names[m]}: {kind}", leave=False, unit="q", delay=1)

            def save(row, record):
                self.said[m][keys[row]] = record = {"key": keys[row], **record}
                os.write(fd, json.dumps(record, ensure_ascii=False).encode() + b"\n")  # one append: others may write too
                bar.update()

            compute(model, tokenizer, todo, save)
            os.close(fd)
            bar.close()
        records = [self.said[m][key] for key in keys]
        for key, record in zip(keys, records):
            if (m, key) not in self.counted:
                self.counted.add((m, key))
                self.ledger[f"{kind}_read"] += record["read"]
                self.ledger[f"{kind}_wrote"] += record.get("wrote", 0)
        return records

    def scores(self, questions, count=True):
        """(N, M): the probability that each teacher, asked plainly, gives to the right one among the choices.

        count=False keeps it out of the ledger: for figures that no purifier sees.
        """
        ledger = Counter(self.ledger), set(self.counted)
        columns = []
        for m in range(len(self)):
            prompts = self._prompts(questions, score_prompt)

            def compute(model, tokenizer, rows, save):
                asked, choices = [prompts[row] for row in rows], [questions[row].choices for row in rows]

                def progress(done, logps):
                    for i in done:
                        read = tokenizer.encode_batch([asked[i], *choices[i]])
                        save(rows[i], {"logps": logps[i], "read": sum(len(e.ids) for e in read)})

                choice_logps(model, tokenizer, asked, choices, self.asking.batch_size, progress)

            records = self._answers(m, "score", prompts, [q.choices for q in questions], compute)
            columns.append([float(torch.tensor(r["logps"]).softmax(0)[q.answer]) for q, r in zip(questions, records)])
        if not count:
            self.ledger, self.counted = ledger
        return torch.tensor(columns).T

    def rationales(self, questions, picks):
        """The rationale of teacher picks[i] for questions[i]: greedy, and by default not told the answer."""
        out, how = [None] * len(questions), self.asking
        for m in sorted(set(picks)):
            mine = [i for i, pick in enumerate(picks) if pick == m]
            prompts = self._prompts([questions[i] for i in mine], lambda q, e: rationale_prompt(q, e, how.tell_answer))

            def compute(model, tokenizer, rows, save):
                ids = [e.ids for e in tokenizer.encode_batch([prompts[row] for row in rows])]
                for batch in by_length(ids, how.batch_size):
                    tokens, mask = (x.to(how.device) for x in pad([ids[i] for i in batch]))
                    with torch.no_grad():
                        new = model.generate(tokens, mask, how.max_new_tokens).tolist()
                    stop = model.config["eos_token_id"]
                    for i, row in zip(batch, new):
                        ends = [t for t, token in enumerate(row) if token in (stop if isinstance(stop, list) else [stop])]
                        row = row[: ends[0] + 1] if ends else row
                        save(rows[i], {"text": tokenizer.decode(row).strip(), "read": len(ids[i]), "wrote": len(row)})

            records = self._answers(m, "rationale", prompts, [how.max_new_tokens] * len(mine), compute)
            for i, record in zip(mine, records):
                out[i] = record["text"]
        return out


# -------------------------------------------------------------------------------------------- dual loss


class Targets:
    """Texts -> token ids, each text tokenised once."""

    def __init__(self, tokenizer, max_length=512):
        self.tokenizer, self.max_length, self.known = tokenizer, max_length, {}

    def __call__(self, texts):
        new = list({t for t in texts if t not in self.known})
        for text, e in zip(new, self.tokenizer.encode_batch(new)):
            ids = e.ids
            self.known[text] = ids if len(ids) <= self.max_length else ids[: self.max_length - 1] + ids[-1:]
        return [self.known[t] for t in texts]


def sequence_losses(student, inputs, targets):
    """Lists of ids -> mean cross-entropy per target token of each row, (rows,)."""
    device = device_of(student)
    ids, mask = (x.to(device, non_blocking=True) for x in pad(inputs))
    labels, is_token = (x.to(device, non_blocking=True) for x in pad(targets))
    start = torch.full_like(labels[:, :1], student.config["decoder_start_token_id"])
    decoder_ids, where = torch.cat((start, labels[:, :-1]), 1), is_token.bool()
    return mean_per_row(student(ids, mask, decoder_ids, where), labels, where)


def mean_per_row(logits, labels, where):
    """logits (N, V) of the N tokens `where` (B, T) is true, labels (B, T) -> mean cross-entropy per row (B,)."""
    losses = F.cross_entropy(logits.float(), labels[where], reduction="none")
    return torch.zeros_like(where, dtype=torch.float).masked_scatter(where, losses).sum(1) / where.sum(1)


def dual_loss(student, encode, questions, rationales, lam, alpha=None):
    """L_PR + lambda * L_DL(r_P); with M rationales L_PR + sum_m alpha_m L_DL(r_m) (TinyLLM).

    alpha_m is lambda / M unless told: the rationales weigh the same however many there are. B questions, B lists of texts
    (none, one or M each), one forward pass for both tasks. Returns the loss, the answers' losses (B,) and the
    rationales' losses (R,), both detached, and the number of tokens read and predicted.
    """
    owners = [q for q, texts in zip(questions, rationales) for _ in texts]
    inputs = encode([predict_prompt(q) for q in questions] + [explain_prompt(q) for q in owners])
    targets = encode([q.choices[q.answer] for q in questions] + [text for texts in rationales for text in texts])
    losses = sequence_losses(student, inputs, targets)
    answers, explained = losses.split([len(questions), len(owners)])
    weights = [lam / len(texts) if alpha is None else alpha for texts in rationales for _ in texts]
    loss = answers.mean() + (torch.tensor(weights, device=losses.device) * explained).sum() / len(questions)
    return loss, answers.detach(), explained.detach(), sum(map(len, inputs)) + sum(map(len, targets))


def tiny_t5(vocab_size, pad_token_id=0, eos_token_id=1):
    """A new T5 of half a million weights that a CPU trains in a minute: the default student, and one of its teachers."""
    t5 = models.T5(dict(
        vocab_size=vocab_size, d_model=96, d_kv=12, d_ff=256, num_layers=2, num_heads=8, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, dropout_rate=0.0, pad_token_id=pad_token_id, eos_token_id=eos_token_id))  # fmt: skip
    t5.shared.weight.data *= 0.3  # T5's unit-scale embeddings move too slowly for a run this short
    return t5
