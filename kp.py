"""The method's nouns: questions, prompts, teachers who score and explain, and the student's dual loss.

A multiple-choice `Question` goes to M `Teachers`. Each can score it (how probable does it find the right choice?
cheap: nothing is generated) and write a rationale for it (expensive: so it is written only when a purifier asks
for it, and kept on disk for ever). The student learns from both with one loss,

    L_MTKD-KP = L_PR(answer | q) + lambda * L_DL(rationale | q)          (arXiv 2602.01064; TinyLLM, 2402.04616)

where one model does both, told apart by the prefixes `predict:` and `explain:`.
Read in this order: questions, prompts, scoring, teachers, the dual loss.
"""

import errno
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm

import model as models
from model import BadInput, by_length, device_of, pad, require

# -------------------------------------------------------------------------------------------- questions

LETTERS = "abcdefghij"  # of the choices


@dataclass(frozen=True)
class Question:
    id: str
    task: str
    text: str
    choices: tuple
    answer: int  # index into choices


def read_rows(path):
    """Yield (place, object) of a file of JSON lines, or of one JSON array; BadInput names the line that does not parse."""
    try:
        whole = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if whole.lstrip().startswith(b"["):
        yield from ((f"{path}: entry {i}", row) for i, row in enumerate(models.read_json(path), 1))
        return
    for number, line in enumerate(whole.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}:{number}: not a line of JSON ({error}); mend or delete it") from None


def read_questions(path):
    """One question a line or entry: {"id", "task", "text", "choices", "answer"}, the answer a choice, its index or letter."""
    questions, taken = [], set()
    for where, row in read_rows(path):
        row = row if isinstance(row, dict) else {}
        text, choices, answer = row.get("text", row.get("question")), row.get("choices"), row.get("answer")
        require(isinstance(text, str) and text.strip(), f"{where}: no question; each needs text, choices and answer")
        listed = isinstance(choices, list) and 2 <= len(choices) <= 10 and all(isinstance(c, str) and c for c in choices)
        require(listed, f"{where}: choices must be a list of 2 to 10 texts")
        if isinstance(answer, str):
            names = choices if answer in choices else LETTERS.upper()[: len(choices)]
            answer = names.index(answer) if answer in names and answer else answer
        known = type(answer) is int and 0 <= answer < len(choices)
        require(known, f"{where}: the answer {answer!r} is not among the {len(choices)} choices; give its text or index")
        task = str(row.get("task", Path(path).resolve().parent.name))
        name = str(row.get("id", len(questions)))
        name = f"{name}#{len(questions)}" if name in taken else name  # data sets put together may share ids
        taken.add(name)
        questions.append(Question(name, task, text, tuple(choices), answer))
    require(questions, f"{path}: holds no question; write one a line")
    return questions


def read_data(folder):
    """A folder with train, valid and test.jsonl, and perhaps ood/train, ood/valid and ood/test.jsonl -> {split: [Question]}.

    Or a folder in TinyLLM's layout: NAME_train.json, NAME_valid.json, NAME_test.json (and llm/, see ReadyMade).
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder; give one with train.jsonl, valid.jsonl and test.jsonl")
    train = min(folder.glob("*_train.json"), default=folder / "train.jsonl")
    files = {split: train.with_name(train.name.replace("train", split)) for split in ("train", "valid", "test")}
    files |= {f"ood/{file.stem}": file for file in sorted(folder.glob("ood/*.jsonl"))}
    return {split: read_questions(file) for split, file in files.items()}


# ---------------------------------------------------------------------------------------------- prompts


def printable(text):
    """Without control characters: what a file says must not steer the reader's terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def ask(q):
    """The question with its choices, as teacher and student both read it."""
    return q.text + "".join(f" ({letter}) {choice}" for letter, choice in zip(LETTERS, q.choices))


def predict_prompt(q):
    return f"predict: {ask(q)}"


def explain_prompt(q):
    return f"explain: {ask(q)}"


def score_prompt(q, examples=(), rationale=""):
    shown = "".join(f"Question: {ask(e)} Answer: {e.choices[e.answer]}\n\n" for e in examples)
    return f"{shown}Question: {ask(q)}" + (f" Rationale: {rationale}" if rationale else "") + " Answer:"


def rationale_prompt(q, examples=(), tell_answer=False):
    """As TinyLLM asks: examples, question, choices, (the answer, if told), "step by step"."""
    told = f" The answer is {q.choices[q.answer]}." if tell_answer else ""
    return score_prompt(q, examples).removesuffix(" Answer:") + told + " Let's think step by step."


def chat_format(folder, tokenizer):
    """How a chat model is addressed: Llama-3, or Llama-2 and Mistral; "{}" for T5 and base models, without chat template."""
    file, template = folder / "tokenizer_config.json", (folder / "chat_template.jinja").exists()
    if not template and not (file.exists() and models.read_json(file).get("chat_template")):
        return "{}"
    if tokenizer.token_to_id("<|start_header_id|>") is None:
        return "[INST] {} [/INST]"  # behind <s>, which is the tokenizer's to add
    return "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def conclusion(rationale, choices):
    """The index of the choice that a rationale ends on ("... the answer is X"), or None. Letters count too."""
    tail = re.split(r"answer is:?", rationale, flags=re.IGNORECASE)[-1].strip(" .\"'").lower()
    if letter := re.match(rf"\(?([{LETTERS[: len(choices)]}])\)", tail):
        return LETTERS.index(letter[1])
    named = [i for i, c in enumerate(choices) if tail.startswith(c.lower())]
    return max(named, key=lambda i: len(choices[i])) if named else None


# ---------------------------------------------------------------------------------------------- scoring


def continuation(tokenizer, prompt, n_prompt, text):
    """The ids that `text` adds behind `prompt`, itself n_prompt ids (tokenised together: joins at the seam are the model's own)."""
    seam = "" if prompt[-1:].isspace() else " "
    return tokenizer.encode(prompt + seam + text).ids[n_prompt:]


@torch.no_grad()
def choice_logps(model, tokenizer, prompts, choices, batch_size=64, bar=None):
    """log p(choice | prompt) of every choice: a list of N lists. Each prompt is read once, not once per choice."""
    device, out = device_of(model), [None] * len(prompts)
    ids = [e.ids for e in tokenizer.encode_batch(prompts)]
    if hasattr(model, "encode"):  # an encoder-decoder
        tails = [[e.ids for e in tokenizer.encode_batch(list(c))] for c in choices]
    else:
        tails = [[continuation(tokenizer, p, len(own), c) for c in cs] for p, own, cs in zip(prompts, ids, choices)]
    for rows in by_length(ids, batch_size):
        flat = [tail for row in rows for tail in tails[row]]
        owner = torch.tensor([i for i, row in enumerate(rows) for _ in tails[row]], device=device)
        tokens, is_token = (x.to(device) for x in pad(flat))
        cache, first = model.prefill(*(x.to(device) for x in pad([ids[row] for row in rows])), tokens.shape[1])
        cache.select(owner)
        logits = first[owner, None]  # (choices, 1, V)
        if tokens.shape[1] > 1:
            logits = torch.cat((logits, model.step(tokens[:, :-1], cache)), 1)
        logp = -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none") * is_token
        logp = iter(logp.sum(1).tolist())
        for row in rows:
            out[row] = [next(logp) for _ in tails[row]]
        if bar is not None:
            bar.update(len(rows))
    return out


def accuracy(model, tokenizer, questions):
    """The share of questions, per task and as "mean" over tasks, whose right choice is the likeliest answer."""
    model.eval()
    logps = choice_logps(model, tokenizer, [predict_prompt(q) for q in questions], [q.choices for q in questions])
    total = Counter(q.task for q in questions)
    right = Counter(q.task for q, lp in zip(questions, logps) if lp.index(max(lp)) == q.answer)
    shares = {task: right[task] / n for task, n in total.items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


# --------------------------------------------------------------------------------------------- teachers


def fingerprint(folder):
    """sha256 over everything of a checkpoint that decides what it says."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", folder / "tokenizer.json", *models.weight_files(folder)]:
        require(file.exists(), f"{file}: no such file; a teacher is a folder with config.json, tokenizer.json and safetensors")
        with open(file, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


FORMAT = 1  # of the cache's records; another is refused, not misread


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


def rank_and_ranks():
    """This process's number and how many there are: (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Teachers:
    """M checkpoint folders, asked one after the other; what they said is kept, and paid for once.

    The cache is one append-only JSONL file per teacher in a folder named by the teacher's fingerprint; a line's
    key hashes the prompt and the settings, so it is never stale. `ledger` counts the tokens that this run needed
    (cache hits as if they had been computed): score_read, rationale_read and rationale_wrote.
    """

    def __init__(self, folders, cache, asking=None, examples=()):
        self.folders, self.asking, self.examples = [Path(f) for f in folders], asking or Asking(), examples
        for f in self.folders:
            require(f.is_dir(), f"{f}: no such folder; --teachers takes checkpoint folders")
            kind = models.read_config(f).get("model_type")
            why = f"{f / 'config.json'}: model_type {kind!r} cannot teach; take a t5, llama or mistral"
            require(kind in ("t5", "llama", "mistral"), why)
        self.names = [f.name for f in self.folders]
        self.files = [Path(cache) / fingerprint(f)[:16] / "said.jsonl" for f in self.folders]
        self.said = [self._recall(f) for f in self.files]
        self.loaded, self.manner, self.told = {}, {}, False
        self.counted, self.ledger = set(), Counter()
        self.size = sum(w.stat().st_size for f in self.folders for w in models.weight_files(f))

    def __len__(self):
        return len(self.folders)

    def _recall(self, file):
        """What this teacher has said: {key: record}. A line torn by a kill or a full disk is no record."""
        records = {}
        for number, line in enumerate(file.read_bytes().split(b"\n") if file.exists() else (), 1):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found = record.get("format")
            require(found == FORMAT, f"{file}:{number}: format {found!r}, this code reads {FORMAT}; give another --cache")
            records[record["key"]] = record
        return records

    def model(self, m):
        if m not in self.loaded:
            if self.size >= 2**30:  # small teachers stay in memory together, large ones take turns
                self.loaded.clear()
            self.loaded[m] = models.load(self.folders[m], self.asking.device, self.asking.dtype)
        return self.loaded[m]

    def _manner(self, m):
        """How teacher m reads: tokenizer, its special tokens, tokens that a prompt may have, chat format."""
        if m not in self.manner:
            config = models.read_config(self.folders[m])
            tokenizer = models.load_tokenizer(self.folders[m] / "tokenizer.json", config.get("vocab_size", 2**31))
            special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
            room = config.get("max_position_embeddings", config.get("n_positions", 512))
            room -= 0 if config["model_type"] == "t5" else self.asking.max_new_tokens
            self.manner[m] = tokenizer, special, room, chat_format(self.folders[m], tokenizer)
        return self.manner[m]

    def _prompts(self, m, questions, prompt):
        """Prompts as teacher m wants them. Examples are drawn per question, from its own task, by seed and id.

        What is too long loses examples, never the question. The text of a special token is no such token.
        """
        (tokenizer, special, room, chat), prompts, how = self._manner(m), [], self.asking
        for q in questions:
            others = [e for e in self.examples if e.task == q.task and e.id != q.id] if how.shots else []
            others = random.Random(f"{how.seed} {q.id}").sample(others, min(how.shots, len(others)))
            while True:
                text = prompt(q, others)
                for token in special:
                    text = text.replace(token, "")
                text = chat.format(text)
                if not others or len(text.encode()) < room or len(tokenizer.encode(text).ids) <= room:
                    break
                others = others[1:]
                if not self.told:
                    tqdm.write(f"{self.names[m]} reads {room} tokens at most: examples are left out of longer prompts", sys.stderr)
                    self.told = True
            prompts.append(text)
        return prompts

    def _answers(self, m, kind, questions, prompt, extra, compute, count=True):
        """What teacher m says when asked prompt(q, examples): a record a question, known by the prompt and extra(q).

        `compute(model, tokenizer, questions, prompts, their ids)` makes a batch of those that were not said before.
        """
        prompts, said, records = self._prompts(m, questions, prompt), self.said[m], []
        keys = [hashlib.sha256(json.dumps([kind, p, extra(q)]).encode()).hexdigest()[:32] for p, q in zip(prompts, questions)]
        rank, ranks = rank_and_ranks()  # under torchrun each rank does its share, and learns the others' from the cache
        todo = {key: row for row, key in enumerate(keys) if key not in said and int(key, 16) % ranks == rank}
        if todo := list(todo.values()):
            model, tokenizer = self.model(m)
            ids = [e.ids for e in tokenizer.encode_batch([prompts[row] for row in todo])]
            self.files[m].parent.mkdir(parents=True, exist_ok=True)
            bar = tqdm(total=len(todo), desc=f"{self.names[m]}: {kind}", leave=False, unit="q", delay=1)
            with open(self.files[m], "ab", buffering=0) as file, bar:
                for batch in by_length(ids, self.asking.batch_size):
                    rows = [todo[i] for i in batch]
                    theirs = [questions[row] for row in rows], [prompts[row] for row in rows], [ids[i] for i in batch]
                    for row, answer in zip(rows, compute(model, tokenizer, *theirs)):
                        said[keys[row]] = record = {"format": FORMAT, "key": keys[row], **answer}
                        line = f"\n{json.dumps(record, ensure_ascii=False)}\n".encode()  # a torn line before it ends there
                        if file.write(line) < len(line):  # one append a line: other runs may write too
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.files[m]))
                        bar.update()
        if ranks > 1:
            dist.barrier()
            self.said[m] = self._recall(self.files[m])
        for key in keys:
            records.append(self.said[m][key])
            if count and (m, key) not in self.counted:
                self.counted.add((m, key))
                self.ledger[f"{kind}_read"] += records[-1]["read"]
                self.ledger[f"{kind}_wrote"] += records[-1].get("wrote", 0)
        return records

    def scores(self, questions, count=True):
        """(N, M): the probability that each teacher, asked plainly, gives to the right one among the choices.

        count=False keeps it out of the ledger: for figures that no purifier sees.
        """

        def compute(model, tokenizer, questions, prompts, ids):
            choices = [q.choices for q in questions]
            for logps, own, c in zip(choice_logps(model, tokenizer, prompts, choices, len(prompts)), ids, choices):
                yield {"logps": logps, "read": len(own) + sum(len(e.ids) for e in tokenizer.encode_batch(list(c)))}

        columns = []
        for m in range(len(self)):
            records = self._answers(m, "score", questions, score_prompt, lambda q: q.choices, compute, count)
            columns.append([float(torch.tensor(r["logps"]).softmax(0)[q.answer]) for q, r in zip(questions, records)])
        return torch.tensor(columns).T

    def rationales(self, questions, picks):
        """The rationale of teacher picks[i] for questions[i]: greedy, and by default not told the answer."""
        out, how = [None] * len(questions), self.asking

        def prompt(q, examples):
            return rationale_prompt(q, examples, how.tell_answer)

        def compute(model, tokenizer, questions, prompts, ids):
            tokens, mask = (x.to(how.device) for x in pad(ids))
            stop = model.config["eos_token_id"]
            stop = stop if isinstance(stop, list) else [stop]
            for own, row in zip(ids, model.generate(tokens, mask, how.max_new_tokens).tolist()):
                row = row[: next((n for n, token in enumerate(row, 1) if token in stop), None)]
                yield {"text": tokenizer.decode(row).strip(), "read": len(own), "wrote": len(row)}

        for m in sorted(set(picks)):
            mine = [i for i, pick in enumerate(picks) if pick == m]
            asked = [questions[i] for i in mine]
            records = self._answers(m, "rationale", asked, prompt, lambda q: how.max_new_tokens, compute)
            for i, record in zip(mine, records):
                out[i] = record["text"]
        return out


class ReadyMade:
    """The two teachers whose rationales come with a data set in TinyLLM's layout: text only, no weights.

    Each string of FOLDER/llm/train_CoT_K.json holds FLAN-T5-xl's rationale, up to "Thus, the answer is", and LLaMA-2's,
    behind "llama rationale:". A scoring LM judges them, by how much likelier each makes the right answer a:

        s_m(q) = sigmoid((log p(a | q, r_m) - log p(a | q)) / |a|),  |a| in tokens; 0 for an empty rationale
    """

    names, folders = ("flan-t5-xl", "llama-2"), ()

    def __init__(self, folder, questions, scorer, max_words=128):
        """scorer: () -> (model, tokenizer). Longer rationales are cut off, as if no more had been asked for."""
        files = sorted(Path(folder).glob("llm/train_CoT_*.json"), key=lambda f: (len(f.name), f.name))
        require(files, f"{folder}: no rationales in llm/train_CoT_0.json; give --teachers DIR ...")
        texts = [(where, text) for file in files for where, text in read_rows(file)]
        few = f"{files[-1]}: {len(texts)} rationales up to here for {len(questions)} questions; download it again"
        require(len(texts) >= len(questions), few)
        self.said, self.scorer, self.known, self.counted, self.ledger = {}, scorer, {}, set(), Counter()
        for q, (where, text) in zip(questions, texts):
            require(isinstance(text, str), f"{where}: a rationale must be a text")
            flan, _, llama = text.partition("llama rationale:")
            whole = re.split(r"Thus, the answer is|\n\s*Q:", flan)[0], llama
            self.said[q] = tuple(re.match(rf"(\S+\s*){{0,{max_words}}}", w.strip())[0].strip() for w in whole)

    def __len__(self):
        return len(self.names)

    def scores(self, questions, count=True):
        """(N, 2), as the equation above."""
        if new := [q for q in dict.fromkeys(questions) if q not in self.known]:
            model, tokenizer = self.scorer()
            prompts = [score_prompt(q, rationale=r) for q in new for r in ("", *self.said[q])]
            answers = [(q.choices[q.answer],) for q in new for _ in range(1 + len(self))]
            with tqdm(total=len(prompts), desc="score", leave=False, unit="prompt", delay=1) as bar:
                logps = choice_logps(model, tokenizer, prompts, answers, bar=bar)
            length = [len(tokenizer.encode(a, add_special_tokens=False).ids) for (a,) in answers]
            per_token = torch.tensor([lp / n for (lp,), n in zip(logps, length)]).view(len(new), -1)
            for q, row in zip(new, torch.sigmoid(per_token[:, 1:] - per_token[:, :1])):
                self.known[q] = torch.where(torch.tensor([bool(r) for r in self.said[q]]), row, 0.0)
            self.ledger["score_read"] += sum(len(e.ids) for e in tokenizer.encode_batch(prompts)) if count else 0
        return torch.stack([self.known[q] for q in questions])

    def rationales(self, questions, picks):
        """The text of teacher picks[i] for questions[i]; its words are counted as if they had been generated."""
        for q, m in zip(questions, picks):
            if (m, q.id) not in self.counted:
                self.counted.add((m, q.id))
                self.ledger["rationale_wrote"] += len(self.said[q][m].split())
        return [self.said[q][m] for q, m in zip(questions, picks)]


# -------------------------------------------------------------------------------------------- dual loss


class Targets:
    """Texts -> token ids, each text tokenised once."""

    def __init__(self, tokenizer, max_length=512):
        self.tokenizer, self.max_length, self.known = tokenizer, max_length, {}

    def __call__(self, texts):
        new, limit = list({t for t in texts if t not in self.known}), self.max_length
        for text, ids in zip(new, (e.ids for e in self.tokenizer.encode_batch(new))):
            self.known[text] = ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:]
        return [self.known[t] for t in texts]


def sequence_losses(student, inputs, targets):
    """Lists of ids -> mean cross-entropy per target token of each row, (rows,)."""
    (ids, mask), (labels, is_token), device = pad(inputs), pad(targets), device_of(student)
    start = torch.full_like(labels[:, :1], student.config["decoder_start_token_id"])
    where = is_token.nonzero(as_tuple=True)  # found before the tensors move: nothing waits for the GPU
    tensors = ids, mask, torch.cat((start, labels[:, :-1]), 1), labels, *where
    if device.type == "cuda":
        tensors = (x.pin_memory().to(device, non_blocking=True) for x in tensors)
    ids, mask, decoder_ids, labels, *where = tensors
    return mean_per_row(student(ids, mask, decoder_ids, tuple(where)), labels, tuple(where))


def mean_per_row(logits, labels, where):
    """logits (N, V) of N tokens, labels (B, T), where: their rows and places, (N,) each -> mean cross-entropy per row (B,)."""
    losses = F.cross_entropy(logits.float(), labels[where], reduction="none")
    zeros = torch.zeros_like(labels, dtype=torch.float)
    return zeros.index_put(where, losses).sum(1) / zeros.index_put(where, torch.ones_like(losses)).sum(1)


def dual_loss(student, encode, questions, rationales, lam, alpha=None):
    """L_PR + lambda * L_DL(r_P); with M rationales L_PR + sum_m alpha_m L_DL(r_m) (TinyLLM).

    alpha_m is lambda / M unless told: the rationales weigh the same however many there are, an empty one nothing. B questions,
    B lists of texts (none, one or M each). One pass per task: one for both, answers padded like
    rationales, takes 14 % longer for FLAN-T5-small and 2 % less for the tiny student.
    Returns the loss; the answers' losses (B,) and the rationales' (R,), detached; tokens read and predicted; those and padding.
    """
    owners = [q for q, texts in zip(questions, rationales) for _ in texts]
    predict, explain = encode([predict_prompt(q) for q in questions]), encode([explain_prompt(q) for q in owners])
    answers, texts = encode([q.choices[q.answer] for q in questions]), encode([r for rs in rationales for r in rs])
    l_pr = sequence_losses(student, predict, answers)  # (B,)
    l_dl = sequence_losses(student, explain, texts) if texts else l_pr.new_zeros(0)  # (R,)
    weights = [bool(r) * (lam / len(rs) if alpha is None else alpha) for rs in rationales for r in rs]
    loss = l_pr.mean() + (l_pr.new_tensor(weights) * l_dl).sum() / len(questions)
    batches = [rows for rows in (predict, explain, answers, texts) if rows]
    n_padded = sum(len(rows) * max(map(len, rows)) for rows in batches)
    return loss, l_pr.detach(), l_dl.detach(), sum(len(ids) for rows in batches for ids in rows), n_padded


def tiny_t5(vocab_size, pad_token_id=0, eos_token_id=1):
    """A new T5 of half a million weights that a CPU trains in a minute: the default student, and one of its teachers."""
    t5 = models.T5(dict(
        vocab_size=vocab_size, d_model=96, d_kv=12, d_ff=256, num_layers=2, num_heads=8, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, dropout_rate=0.0, pad_token_id=pad_token_id, eos_token_id=eos_token_id))  # fmt: skip
    t5.shared.weight.data *= 0.3  # T5's unit-scale embeddings move too slowly for a run this short
    return t5


def train_tokenizer(texts, vocab_size=4096):
    """Byte-pair encoding of these texts, for a student that has no tokenizer of its own: <pad> is 0, </s> 1."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(), decoders.ByteLevel()
    special, alphabet = ["<pad>", "</s>"], ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
