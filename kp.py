"""The method's nouns, in order: a question, its prompts, the dual loss, scoring, teachers.

M teachers each write a rationale for a multiple-choice question. A purifier (purify.py) makes one
rationale of the M. The student learns the answer and that rationale with one loss,

    L_MTKD-KP = L_PR(answer | q) + lambda * L_DL(rationale | q)              (arXiv 2602.01064)

One model does both: the prefixes `predict:` and `explain:` name the task. Left out: everything
that a teacher might say besides text (logits, hidden states), because the method distils text
alone.
"""

import functools
import hashlib
import json
import math
import os
import random
import re
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import model
from model import BadInput, require

# --------------------------------------------------------------------------------------- a question

LETTERS = "abcdefghij"  # of the choices


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    task: str
    text: str
    choices: tuple
    answer: int  # index into choices
    truth: str = ""  # the true rationale, where it is known: to measure with, never to train on

    @property
    def right(self):
        """The text of the right choice."""
        return self.choices[self.answer]


# -------------------------------------------------------------------------------------- its prompts


def with_choices(q):
    """Return the question with its choices, as teacher and student both read it."""
    text = q.text
    for letter, choice in zip(LETTERS, q.choices):
        text += f" ({letter}) {choice}"
    return text


def predict_prompt(q):
    """Return the student's prompt for the answer."""
    return f"predict: {with_choices(q)}"


def explain_prompt(q, prefix="explain"):
    """Return the student's prompt for a rationale."""
    return f"{prefix}: {with_choices(q)}"


def explain_prefixes(n_teachers):
    """Return the prefix of each teacher's rationales, as TinyLLM publishes it; of 0 one for all."""
    if n_teachers == 0:
        return ["explain"]
    return [f"explain {m}" for m in range(1, n_teachers + 1)]


def score_prompt(q, examples=(), rationale=""):
    """Return the prompt that asks for the answer alone, perhaps in view of a rationale."""
    hint = f" Rationale: {rationale}" if rationale else ""
    return f"{''.join(examples)}Question: {with_choices(q)}{hint} Answer:"


def rationale_prompt(q, examples=(), tell_answer=False):
    """Return the prompt that asks a teacher to explain; it may tell the answer, as TinyLLM does.

    It asks for a conclusion, because rl checks it.
    """
    told = f" The answer is {q.right}." if tell_answer else ""
    how = "Think step by step, and end with: the answer is (x)."
    return f"{''.join(examples)}Question: {with_choices(q)}{told} {how}"


def solved(q):
    """Return an example to stand before a score_prompt."""
    return f"{score_prompt(q)} {q.right}\n\n"


def explained(q, rationale, tell_answer=False):
    """Return an example to stand before a rationale_prompt."""
    return f"{rationale_prompt(q, tell_answer=tell_answer)} {rationale}\n\n"


def aggregation_prompt(q, rationales):
    """Return the prompt that asks for one rationale of M. Rationales have numbers, choices have letters."""
    prompt = f"Question: {with_choices(q)}"
    for m, text in enumerate(rationales, 1):
        prompt += f" Rationale {m}: {text}"
    told = "Merge these rationales into one that is right, and end with: the answer is (x)."
    return f"{prompt} {told}"


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA_3 = """<|start_header_id|>user<|end_header_id|>

{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""
LLAMA_31_SYSTEM = """<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

<|eot_id|>"""  # the template's default date
CHAT_FORMATS = {  # {a mark in a template: what that template renders}; the first mark found counts
    "Cutting Knowledge Date": LLAMA_31_SYSTEM + LLAMA_3,
    "<|start_header_id|>": LLAMA_3,
    "enable_thinking": CHATML + "<think>\n\n</think>\n\n",
    "<|im_start|>": CHATML,
    " [/INST]": "[INST] {} [/INST]",  # Llama-2 and the first Mistrals put spaces inside
    "[INST] ": "[INST] {}[/INST]",
    "[INST]": "[INST]{}[/INST]",
    "<|user|>": "<|user|>\n{}</s>\n<|assistant|>\n",
}
WITHOUT_CHAT = "{} Answer:"  # a decoder-only student has to see where the prompt ends
CHATML_SYSTEM = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}]+)<\|im_end\|>")


def chat_format(folder, tokenizer):
    """Return how this checkpoint is addressed, a text with one {} for the prompt.

    It is what the family's chat template renders for one user's message: Llama-3's headers (3.1
    begins with a system block), ChatML of Qwen (without thinking) and SmolLM2 with the system
    message that its template holds, [INST] of Llama-2 and Mistral, TinyLlama's marks. Without a
    template (T5, base models) it is "{}". tokenizer: not read; it adds <s> itself.
    """
    template = chat_template(folder)
    for mark, rendered in CHAT_FORMATS.items():
        if mark in template:
            system = CHATML_SYSTEM.search(template)
            if system:
                rendered = f"<|im_start|>system\n{system[1]}<|im_end|>\n{rendered}"
            return rendered
    if template:
        model.say_once(f"{folder}: unknown chat template; prompts are written without it")
    return "{}"


def chat_template(folder):
    """Return the text of a checkpoint's chat template; "" without one."""
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text(encoding="utf-8")
        file = folder / "tokenizer_config.json"
        settings = model.read_config(folder, file.name) if file.exists() else {}
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        return str(template or "")
    except (TypeError, KeyError, UnicodeDecodeError):
        raise BadInput(f"{file}: no chat template can be read; download it again") from None


EDGE = " :.\"'"  # what may stand around a conclusion


def conclusion(rationale, choices):
    """Return the index of the choice that a rationale concludes on ("... the answer is X", the
    last time that it says so), or None.

    X is the text of a choice, perhaps with an article, or its letter as "(b)" or "b". Words are
    whole, so "not clear" is no "no". Where several choices fit, the longest one counts. It does not
    understand marks of Markdown, "B. text" or "option (b)".
    """

    def plain(text):
        return " ".join(text.lower().split())

    _, cue, tail = plain(rationale).rpartition("answer is")
    if not cue:
        return None
    tail = tail.strip(EDGE)
    named = []
    for i, choice in enumerate(map(plain, choices)):
        letter = LETTERS[i]
        text = choice.strip(EDGE) or choice
        for end in (tail, re.sub("^(an?|the) ", "", tail)):
            if begins(end, text) or begins(end, f"({letter})") or re.fullmatch(rf"{letter}\W*", end):
                named.append(i)
    return max(named, key=lambda i: len(choices[i]), default=None)


def begins(text, words):
    """Tell whether a text begins with these words, whole."""
    return text.startswith(words) and not re.match(r"\w", text[len(words) :])


def is_right(rationale, q):
    """Tell whether a rationale concludes on the right choice."""
    return conclusion(rationale, q.choices) == q.answer


# ------------------------------------------------------------------------------------ the dual loss

WRITERS = ("t5", "llama", "mistral", "qwen2", "qwen3")  # model_types that can learn and teach
MAX_LENGTH = 512  # tokens of a student's prompt, and of a target
PREFIX = re.compile(r"\s*\S*( \d+:)?")  # "predict:", "explain 2:"; of other prompts the first word
NO_LIMIT = 10**9
BATCH_TOKENS = 2**14  # that a model which writes holds at once: this bounds the memory of its cache


class TokenCache:
    """Turn texts into lists of token ids. The last KEPT texts are not tokenised again."""

    KEPT = 2**17  # 4 bytes a token

    def __init__(self, tokenizer, max_length=MAX_LENGTH, chat="{}"):
        """chat: how a decoder-only model is addressed, see `chat_format`."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.kept = functools.lru_cache(self.KEPT)(lambda text: array("i", tokenizer.encode(text).ids))
        start = "".join(map(tokenizer.id_to_token, self.ids("")))
        self.chat = chat.removeprefix(start)  # the tokenizer adds it itself

    def ids(self, text):
        """Return the ids of a text, with the tokenizer's start and end tokens."""
        return self.kept(text).tolist()

    def prompts(self, texts):
        """Return the ids of prompts. What is too long loses the beginning of its context.

        Question and choices stand at the end. The prefix stays: it names the task.
        """
        rows = []
        for text in texts:
            ids = self.ids(self.chat.format(text))
            if len(ids) > self.max_length:
                # Keep what stands before the question: the chat's start and the task's prefix.
                prefix = PREFIX.match(text)[0]
                head = self.ids(self.chat.split("{}")[0] + prefix)
                same = os.path.commonprefix([ids, head])  # head without its end token
                ids = model.keep_end(ids, self.max_length, len(same))
                model.say_once(f"prompts over {self.max_length} tokens lose their beginning")
            rows.append(ids)
        return rows

    def targets(self, texts):
        """Return the ids of targets. What is too long loses its end, but not the end token."""
        most = self.max_length
        return [model.keep_end(self.ids(text), most, most - 1) for text in texts]

    def pairs(self, lm, prompts, texts, end=True):
        """Return the ids of prompts and of the texts that this model is to write after them.

        An encoder-decoder (T5) reads the prompt and writes the text apart. For a decoder-only model
        the text is tokenised together with its prompt, as generation would continue it. With `end`
        an end token follows: the one that ends a turn of its chat, or else the config's first.
        """
        inputs = self.prompts(prompts)
        if lm.config["model_type"] == "t5":
            return inputs, self.targets(texts)
        ends = model.as_list(lm.config["eos_token_id"])
        in_chat = [i for i in ends if str(self.tokenizer.id_to_token(i)) in self.chat]
        ends = (in_chat or ends)[:1] if end else []
        targets = []
        for prompt, text in zip(map(self.chat.format, prompts), texts):
            seam = "" if prompt[-1:].isspace() else " "
            ids = self.ids(prompt + seam + text)[len(self.ids(prompt)) :]
            targets.append(ids[: self.max_length - 1] + ends)
        return inputs, targets


def open_student(path, device="cpu", dtype=None):
    """Return (LM, its TokenCache) of a checkpoint folder. Raise BadInput where it cannot write."""
    lm, tokenizer = model.load(path, device, dtype)
    kind = lm.config["model_type"]
    why = f"a {kind} cannot be a student; take one of {', '.join(WRITERS)}"
    require(kind in WRITERS, f"{path}: {why}")
    chat = chat_format(Path(path), tokenizer)
    if chat == "{}" and kind != "t5":
        chat = WITHOUT_CHAT
    return lm, TokenCache(tokenizer, chat=chat)


class DualLoss(NamedTuple):
    total: torch.Tensor  # (), to call backward() on
    answer: torch.Tensor  # (B,) L_PR of each question, detached
    rationale: torch.Tensor  # (R,) L_DL of each rationale, detached
    tokens: int  # read and predicted
    padded: int  # the same with padding, prompts and texts apart


def join(losses):
    """Return the DualLoss of a batch that was computed in parts of equal size."""
    totals, answers, rationales, tokens, padded = zip(*losses)
    total = torch.stack(totals).detach().mean()
    return DualLoss(total, torch.cat(answers), torch.cat(rationales), sum(tokens), sum(padded))


def dual_loss(student, token_cache, questions, rationales, lam, alpha=None, prefixes=("explain",)):
    """Return the loss of a batch, L_PR + lambda * L_DL(r_P), as a DualLoss.

    questions: B of them. rationales: B lists of texts, none, one or M each. With M of them it is
    TinyLLM's L_PR + sum_m alpha_m L_DL(r_m) (2402.04616, eq. 4). alpha: every alpha_m; by default
    lambda / M, so that rationales weigh the same however many there are. An empty rationale
    weighs nothing. prefixes: the first one is for a question's first rationale, and so on. The
    tasks are two passes, because in one the answers would be padded to the length of rationales.
    """
    # L_PR: the answer, given "predict: q"
    prompts = list(map(predict_prompt, questions))
    predict, answers = token_cache.pairs(student, prompts, [q.right for q in questions])
    l_pr = sequence_losses(student, predict, answers)  # (B,)

    # L_DL: each rationale, given "explain: q"
    prompts = []
    texts = []
    weights = []
    for q, texts_of_q in zip(questions, rationales):
        for text, prefix in zip(texts_of_q, cycle(prefixes)):
            prompts.append(explain_prompt(q, prefix))
            texts.append(text)
            weight = lam / len(texts_of_q) if alpha is None else alpha
            weights.append(weight if text else 0.0)
    explain, targets = token_cache.pairs(student, prompts, texts)
    l_dl = sequence_losses(student, explain, targets) if targets else l_pr.new_zeros(0)  # (R,)

    # The mean over questions of L_PR + sum_m alpha_m L_DL(r_m)
    (weights,) = move(l_pr.device, torch.tensor(weights))
    total = l_pr.mean() + (weights * l_dl).sum() / len(questions)
    tokens = 0
    padded = 0
    for rows in (predict, answers, explain, targets):
        lengths = list(map(len, rows))
        tokens += sum(lengths)
        padded += len(rows) * max(lengths, default=0)
    return DualLoss(total, l_pr.detach(), l_dl.detach(), tokens, padded)


def sequence_losses(student, inputs, targets):
    """Return the mean cross-entropy per target token of each row, (B,).

    inputs, targets: B lists of ids each. A T5 reads inputs and writes targets. A decoder-only model
    reads both in one row, and each token of a target is predicted from all before it.
    """
    if student.config["model_type"] == "t5":
        labels, is_label = model.pad(targets)  # (B, T)
        start = student.config["decoder_start_token_id"]
        decoder_input_ids = F.pad(labels[:, :-1], (1, 0), value=start)  # (B, T): one place later
        read = [*model.pad(inputs), decoder_input_ids]
    else:
        ids, mask = model.pad([prompt + target for prompt, target in zip(inputs, targets)])
        ids, mask = widen(ids, mask, model.device_of(student))
        read = [ids[:, :-1], mask[:, :-1]]
        labels = ids[:, 1:]  # (B, T): one place earlier
        is_label = mask[:, 1:].clone()
        for row, prompt in enumerate(inputs):
            is_label[row, : len(prompt) - 1] = 0
    rows, places = is_label.nonzero(as_tuple=True)  # before the tensors move: no waiting for a GPU
    tensors = [*read, labels, is_label.sum(1), rows, places]
    *read, labels, counts, rows, places = move(model.device_of(student), *tensors)
    keep = (rows, places)
    logits = student(*read, keep)  # (N, V) of the N labels alone: no padding
    losses = F.cross_entropy(logits.float(), labels[keep], reduction="none")  # (N,)
    zeros = torch.zeros_like(labels, dtype=torch.float)  # (B, T)
    return zeros.index_put(keep, losses).sum(1) / counts  # of each row, its mean


def widen(ids, mask, device):
    """Return ids and mask (B, T) with one more column where Hopper's gradient would be NaN.

    cuDNN's kernel gives it for rows of 64 tokens beyond a multiple of 128 (pytorch issue 196678), and
    what a model reads has one token less than `ids`.
    """
    if device.type == "cuda" and ids.shape[1] % 128 == 65:
        return F.pad(ids, (0, 1)), F.pad(mask, (0, 1))
    return ids, mask


def move(device, *tensors):
    """Return tensors on the device. None waits for a GPU: the memory is pinned and contiguous."""
    if device.type == "cpu":
        return tensors
    return [x.contiguous().pin_memory().to(device, non_blocking=True) for x in tensors]


# ------------------------------------------------------------------------------------------ scoring


def progress(steps, name):
    """Show a bar over these steps where they take more than a second."""
    if len(steps) == 1:
        return steps
    return tqdm(steps, name, delay=1, leave=False)


@torch.no_grad()
def choice_logps(lm, token_cache, prompts, choices, batch_size=64, end=False):
    """Return log p(choice | prompt) in nats, summed over the choice's tokens, and how many tokens
    each choice has: two lists of N lists.

    prompts: N texts. choices: N lists of texts. end: a choice of a decoder-only model ends with its
    end token, as a T5's always does and as students learn it. Teachers are scored without it,
    because a chat model may go on talking; so "5" is never less likely than "50", which begins so.
    Each prompt is read once. All first choices are read after the prompts, then all second ones in
    their place, and so on.
    """
    device = model.device_of(lm)
    prompt_ids = token_cache.prompts(prompts)
    tails = []  # N lists, the ids of each choice
    lengths = []  # N lists, how many ids that are
    for prompt, texts in zip(prompts, choices):
        tails.append(token_cache.pairs(lm, [prompt] * len(texts), texts, end)[1])
        lengths.append(list(map(len, tails[-1])))
    sums = [None] * len(prompts)
    for rows in progress(model.by_length(prompt_ids, batch_size), "score"):
        read = model.pad([prompt_ids[row] for row in rows], device)  # ids and mask, (B, S)
        batch = [tails[row] for row in rows]
        room = max(map(len, sum(batch, [])))
        cache, first = lm.prefill(*read, room)  # first: (B, V)
        n_read = cache.length
        logps = []
        for i in range(max(map(len, batch))):
            # A question with fewer choices reads one again, which does not count.
            tokens, is_token = model.pad([of_q[i % len(of_q)] for of_q in batch], device)  # (B, T)
            logits = first[:, None]  # of each choice's first token: the prompt alone decides
            if tokens.shape[1] > 1:
                cache.length = n_read  # the next choice overwrites the one before
                logits = torch.cat((logits, lm.step(tokens[:, :-1], cache)), 1)  # (B, T, V)
            logp = -F.cross_entropy(logits.float().mT, tokens, reduction="none")  # (B, T)
            logps.append((logp * is_token).sum(1))
        for row, found in zip(rows, torch.stack(logps, 1).tolist()):
            sums[row] = found[: len(tails[row])]
    return sums, lengths


def weigh_choices(sums, lengths, per_token):
    """Return one question's log-probabilities as choices are compared: in sum, or per token.

    The sum is the probability of the choice as a text, what the student is trained for: so it is
    the default. It favours short choices; per token long ones have no handicap.
    """
    return [s / max(n, 1) for s, n in zip(sums, lengths)] if per_token else sums


def write(lm, tokenizer, prompts, max_new_tokens, batch_tokens=BATCH_TOKENS):
    """Return what the LM writes, greedily, for N prompts (lists of ids): N pairs of (text, its
    tokens). batch_tokens: how many tokens it holds at once, prompts and what it writes.
    """
    written = [None] * len(prompts)
    batches = model.by_length(prompts, 128, batch_tokens, lambda ids: len(ids) + max_new_tokens)
    for rows in progress(batches, "write"):
        batch = model.pad([prompts[row] for row in rows], model.device_of(lm))
        new = lm.generate(*batch, max_new_tokens)
        for row, tokens in zip(rows, new.tolist()):
            tokens = model.until_end(tokens, lm.ends)
            written[row] = (tokenizer.decode(tokens).strip(), len(tokens))
    return written


def guesses(student, token_cache, questions, per_token=False, batch_size=64):
    """Return the index of the choice that the student finds likeliest, for each question."""
    student.eval()
    prompts = list(map(predict_prompt, questions))
    choices = [q.choices for q in questions]
    scored = choice_logps(student, token_cache, prompts, choices, batch_size, end=True)
    picks = []
    for sums, lengths in zip(*scored):
        logps = weigh_choices(sums, lengths, per_token)
        picks.append(logps.index(max(logps)))  # the first one of equals
    return picks


def accuracy(student, token_cache, questions, per_token=False, batch_size=64):
    """Return {task: share of questions that the student answers rightly, "mean": over tasks}."""
    picks = guesses(student, token_cache, questions, per_token, batch_size)
    return by_task(questions, [pick == q.answer for q, pick in zip(questions, picks)])


def say(student, token_cache, prompts, max_new_tokens, batch_tokens=BATCH_TOKENS):
    """Return what the student writes for N prompts, given as texts: N texts."""
    student.eval()
    ids = token_cache.prompts(prompts)
    written = write(student, token_cache.tokenizer, ids, max_new_tokens, batch_tokens)
    return [text for text, _ in written]


def explanations(
    student, token_cache, questions, max_new_tokens, prefix="explain", batch_tokens=BATCH_TOKENS
):
    """Return the student's own rationale of each question."""
    prompts = [explain_prompt(q, prefix) for q in questions]
    return say(student, token_cache, prompts, max_new_tokens, batch_tokens)


def exact_match(student, token_cache, questions, max_new_tokens=64):
    """Return {task: share of questions to which the student says the right choice, word by word},
    and the mean over tasks: the accuracy that TinyLLM reports.
    """
    texts = say(student, token_cache, map(predict_prompt, questions), max_new_tokens)
    # What was taught: some choices have double spaces, or characters that the tokenizer lacks.
    taught = token_cache.targets([q.right for q in questions])
    rights = map(str.strip, map(token_cache.tokenizer.decode, taught))
    return by_task(questions, [text in (q.right, right) for text, q, right in zip(texts, questions, rights)])


def by_task(questions, marks):
    """Return the share of marks that are True: {task: share, "mean": over tasks}; {} of none."""
    of_task = defaultdict(list)
    for q, mark in zip(questions, marks):
        of_task[q.task].append(mark)
    shares = {task: fmean(its_marks) for task, its_marks in of_task.items()}
    if shares:
        shares["mean"] = fmean(shares.values())
    return shares


# ----------------------------------------------------------------------------------------- teachers


class Teachers:
    """M teachers: their scores and their rationales.

    A score is the probability that a teacher, asked plainly, gives to the right choice (of ready
    texts it is the judge's); nothing is generated for it. A rationale is expensive, so it is
    written only when a purifier asks for it.
    """

    def __init__(self, teachers, open_another=None):
        """open_another: path -> CheckpointTeacher; without a path the T5 at hand, or the student."""
        self.teachers = teachers
        self.open_another = open_another
        self.names = [teacher.name for teacher in teachers]
        self.are_large = sum(teacher.size for teacher in teachers) >= 2**30  # bytes

    def __len__(self):
        return len(self.teachers)

    def in_turn(self, numbers):
        """Yield (m, teacher m) of these m. Small teachers stay in memory, large ones take turns."""
        for m in numbers:
            yield m, self.teachers[m]
            if self.are_large:
                self.teachers[m].loaded = None

    def open_scorers(self, questions):
        """Open what `scores` of these questions needs. Raise BadInput where it is not there."""
        for teacher in self.teachers:
            if teacher.kind == "text" and teacher.without_score(questions):
                teacher.judge.open_scorer()

    def scores(self, questions):
        """Return (N, M)."""
        columns = [teacher.scores(questions) for _, teacher in self.in_turn(range(len(self)))]
        return torch.tensor(columns).T

    def rationales(self, questions, picks):
        """Return the rationale that teacher picks[i] gives to questions[i], N texts."""
        texts = {}  # of each teacher, in the order of the questions
        for m, teacher in self.in_turn(sorted(set(picks))):
            picked = [q for q, pick in zip(questions, picks) if pick == m]
            texts[m] = iter(teacher.rationales(picked))
        return [next(texts[m]) for m in picks]

    def all_rationales(self, questions):
        """Return the rationales of all teachers for each question: N lists of M texts."""
        columns = [teacher.rationales(questions) for _, teacher in self.in_turn(range(len(self)))]
        return list(map(list, zip(*columns)))

    @property
    def ledger(self):
        """Tokens that this run needed, {"score_read": n, "rationale_read": n, "rationale_wrote":
        n}; cached ones count too.
        """
        ledger = Counter()
        for teacher in self.teachers:
            ledger += teacher.ledger
        return ledger


@dataclass(frozen=True)
class Asking:
    """How checkpoints are asked."""

    device: str = "cpu"
    dtype: object = None  # as stored
    shots: int = 0  # examples in the prompt, of the question's own task
    max_new_tokens: int = 64
    tell_answer: bool = False  # TinyLLM's teacher forcing; without it a conclusion can be checked
    per_token: bool = False  # choices are compared by log-probability per token
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0  # draws the examples


ONE_PROCESS = SimpleNamespace(rank=0, count=1, wait=lambda: None)  # train.Ranks without torchrun
TRIED = 16  # training questions of a task, among which a teacher finds its examples


class CheckpointTeacher:
    """A teacher that is a checkpoint folder. What it says is kept, and paid for once.

    The cache is an append-only JSONL file in a folder named by the fingerprint of the weights. A
    line's key hashes the prompt and the choices (of a rationale: its longest length), so a changed
    question is asked again. The key leaves out the dtype, so a CPU can reuse what a GPU computed.
    Under torchrun each rank computes its share of what is missing, and reads the others' share from
    the cache.
    """

    def __init__(self, folder, cache, asking=Asking(), examples=(), ranks=ONE_PROCESS):
        """examples: questions that may stand solved in a prompt. Raise BadInput where the folder
        cannot teach.
        """
        self.folder = Path(folder)
        why = "no such folder; give a checkpoint folder (--teachers takes .jsonl files too)"
        require(self.folder.is_dir(), f"{folder}: {why}")
        config = model.read_config(self.folder)
        self.kind = config.get("model_type")
        why = f"model_type {self.kind!r} cannot teach; take one of {', '.join(WRITERS)}"
        require(self.kind in WRITERS, f"{self.folder / 'config.json'}: {why}")
        for key in ("vocab_size", "max_position_embeddings", "n_positions"):
            why = f"{self.folder / 'config.json'}: {key} must be a number, not {config.get(key)!r:.80}"
            require(type(config.get(key, 0)) is int, why)
        self.name = self.folder.name
        self.asking = asking
        self.examples = examples if asking.shots else ()
        self.ask_rationale = functools.partial(rationale_prompt, tell_answer=asking.tell_answer)
        self.ranks = ranks
        self.loaded = None
        self.counted = set()
        self.ledger = Counter()

        # How it reads: its tokenizer, its chat format, the room for a prompt.
        vocab_size = config.get("vocab_size", 2**31)
        self.tokenizer = model.load_tokenizer(self.folder / "tokenizer.json", vocab_size)
        self.chat = chat_format(self.folder, self.tokenizer)
        self.room = config.get("max_position_embeddings", config.get("n_positions", 512))
        if self.kind != "t5":
            self.room -= asking.max_new_tokens

        # What these weights have said.
        weights = model.weight_files(self.folder)
        for file in weights:
            model.read_tensors(file)  # raises where it is damaged; nothing is read yet
        self.size = sum(file.stat().st_size for file in weights)
        decisive = [self.folder / "config.json", self.folder / "tokenizer.json", *weights]
        ends = self.folder / "generation_config.json"
        if ends.exists():
            decisive.append(ends)
        self.said = Said(Path(cache) / fingerprint(decisive)[:16] / "said.jsonl")

    def scores(self, questions):
        """Return the probability of the right choice among the choices, N floats."""
        tried = self.tried(questions)
        examples = list(zip(tried, map(solved, tried)))
        prompts = self.prompts(questions, score_prompt, examples)
        scores = []
        for q, record in zip(questions, self.look_up("score", questions, prompts)):
            logps = weigh_choices(record["logps"], record["lengths"], self.asking.per_token)
            probabilities = torch.tensor(logps).softmax(0)
            scores.append(float(probabilities[q.answer]))
        return scores

    def rationales(self, questions):
        """Return N rationales: greedy, and by default written without knowing the answer.

        The examples are training questions on which this teacher's own rationale, written without
        examples, concludes on the right answer.
        """
        tried = self.tried(questions)
        examples = []
        for e, text in zip(tried, self.texts(tried, ())):
            if is_right(text, e):
                examples.append((e, explained(e, text, self.asking.tell_answer)))
        return self.texts(questions, examples)

    def texts(self, questions, examples):
        prompts = self.prompts(questions, self.ask_rationale, examples)
        return [record["text"] for record in self.look_up("rationale", questions, prompts)]

    def tried(self, questions):
        """Return the training questions that may become examples for these: of each task TRIED."""
        tried = []
        for task in sorted({q.task for q in questions}):
            others = [e for e in self.examples if e.task == task]
            tried += random.Random(self.asking.seed).sample(others, min(TRIED, len(others)))
        return tried

    def prompts(self, questions, prompt, examples):
        """Return prompt(q, examples) for each question as this teacher wants it.

        examples: [(question, its text)], of which the seed and the question's id draw some of the
        same task. A prompt that is too long loses examples, never the question. The text of a
        special token is deleted.
        """
        texts = []
        for q in questions:
            others = []
            for e, text in examples:
                is_q = e.id == q.id or (e.text, e.choices) == (q.text, q.choices)
                if e.task == q.task and not is_q:
                    others.append(text)
            draw = random.Random(f"{self.asking.seed} {q.id}")
            shown = draw.sample(others, min(self.asking.shots, len(others)))
            text = self.frame(prompt(q, shown))
            while shown and len(self.tokenizer.encode(text).ids) > self.room:
                shown = shown[1:]
                text = self.frame(prompt(q, shown))
                model.say_once(f"{self.name}: prompts over {self.room} tokens lose examples")
            texts.append(text)
        return texts

    def frame(self, text):
        before = None
        while text != before:  # again: what stood around a token may now be one
            before = text
            for token in self.tokenizer.get_added_tokens_decoder().values():
                if token.special:
                    text = text.replace(token.content, "")
        return self.chat.format(text.strip())

    def look_up(self, kind, questions, prompts):
        """Yield the record of each prompt, from the cache or computed now; count it once in the
        ledger.
        """
        keys = []
        missing = {}
        for q, prompt in zip(questions, prompts):
            setting = q.choices if kind == "score" else self.asking.max_new_tokens
            key = hashlib.sha256(json.dumps([kind, prompt, setting]).encode()).hexdigest()[:32]
            keys.append(key)
            if key not in self.said and int(key, 16) % self.ranks.count == self.ranks.rank:
                missing[key] = (prompt, q.choices)
        if missing:
            self.ask(kind, missing)
        if keys and self.ranks.count > 1:
            self.ranks.wait()
            self.said.find_lines()
        for key, record in zip(keys, self.said.records(keys)):
            if key not in self.counted:
                self.counted.add(key)
                self.ledger[f"{kind}_read"] += record["read"]
                self.ledger[f"{kind}_wrote"] += record.get("wrote", 0)
            yield record

    def ask(self, kind, missing):
        """Compute what is missing, {key: (prompt, choices)}, and append it to the cache line by
        line.
        """
        keys = list(missing)
        prompts, choices = zip(*missing.values())
        ids = model.token_ids(self.tokenizer, prompts)
        room = self.asking.max_new_tokens  # for a rationale; a choice is shorter
        batches = model.by_length(ids, 128, self.asking.batch_tokens, lambda ids: len(ids) + room)
        for rows in progress(batches, f"{self.name}: {kind}"):
            if kind == "score":
                answers = self.score([prompts[row] for row in rows], [choices[row] for row in rows])
            else:
                answers = self.write([ids[row] for row in rows])
            records = []
            for row, answer in zip(rows, answers):
                read = len(ids[row]) + sum(answer.get("lengths", ()))
                records.append(dict(key=keys[row], read=read, **answer))
            self.said.append(records)

    def lm(self):
        """Return the model, loaded at the first call."""
        self.loaded = self.loaded or model.load(self.folder, self.asking.device, self.asking.dtype)
        return self.loaded[0]

    def score(self, prompts, choices):
        """Yield {"logps", "lengths"} for each question of a batch."""
        token_cache = TokenCache(self.tokenizer, NO_LIMIT)
        scored = choice_logps(self.lm(), token_cache, prompts, choices, len(prompts))
        for logps, lengths in zip(*scored):
            why = "gives probabilities that are not finite; give --dtype bfloat16"
            require(all(map(math.isfinite, logps)), f"{self.folder}: {why}")
            yield dict(logps=logps, lengths=lengths)

    def write(self, ids):
        """Yield {"text", "wrote"} for each question of a batch."""
        limits = self.asking.max_new_tokens, self.asking.batch_tokens
        for text, n in write(self.lm(), self.tokenizer, ids, *limits):
            yield dict(text=text, wrote=n)


def fingerprint(files):
    """Return the sha256 of files."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            for chunk in iter(lambda: opened.read(2**24), b""):
                digest.update(chunk)
    return digest.hexdigest()


class Said:
    """What a teacher has said: an append-only JSONL file, a record a line. Memory holds only the places
    of lines, so millions of records are found without reading them.

    A line that a kill or a full disk tore is no record. Other runs may append at the same time.
    """

    WHOLE = re.compile(rb'{"key": "([0-9a-f]{32})".*"checksum": "0x[0-9a-f]+"}\n')

    def __init__(self, path):
        self.path = path
        self.places = {}  # {key: where its line begins}
        self.end = 0  # of the lines that were looked at
        self.find_lines()

    def __contains__(self, key):
        return key in self.places

    def find_lines(self):
        """Look at the lines added since the last call. Raise BadInput at JSON that is no record."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.end)
            for line in file:
                if not line.endswith(b"\n"):  # torn, or another run is writing it
                    break
                whole = self.WHOLE.fullmatch(line)
                if whole:
                    self.places[whole[1].decode()] = self.end
                elif line.strip() and is_json(line):
                    self.refuse(self.end)
                self.end += len(line)

    def records(self, keys):
        """Yield the record of each key. Raise BadInput at one that is not as it was written."""
        with open(self.path, "rb") as file:
            for key in keys:
                file.seek(self.places[key])
                try:
                    record = json.loads(file.readline())
                except ValueError:
                    record = {}
                if record.pop("checksum", None) != model.checksum(record):
                    self.refuse(self.places[key])
                yield record

    def refuse(self, place):
        number = self.path.read_bytes()[:place].count(b"\n") + 1
        why = "damaged, or of another format; delete the line or give another --cache"
        raise BadInput(f"{self.path}:{number}: {why}")

    def append(self, records):
        """Write records, each by one append."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Other runs may write to the same file: the buffer makes one append of each line.
        with open(self.path, "ab", buffering=2**24) as file:
            for record in records:
                checked = {**record, "checksum": model.checksum(record)}
                line = json.dumps(checked, ensure_ascii=False)
                file.write(f"\n{line}\n".encode())  # the first \n ends a line torn before
                file.flush()
        self.find_lines()


def is_json(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# -------------------------------------------------------------------------- teachers that are texts


class TextTeacher:
    """A teacher whose rationales are ready (see data.questions.read_rationales). Words count as
    tokens generated.
    """

    kind = "text"
    size = 0  # in memory: no weights

    def __init__(self, name, rationales, scores, judge):
        """rationales: {id: text} of every question that will be asked. scores: {id: score}; the
        judge gives the others.
        """
        self.name = name
        self.said = rationales
        self.known_scores = scores
        self.judge = judge
        self.counted = set()
        self.ledger = Counter()

    def scores(self, questions):
        """Return N floats: the probability of the right choice where it is known, else the
        judge's score.
        """
        unknown = self.without_score(questions)
        texts = [self.said[q.id] for q in unknown]
        for q, score in zip(unknown, self.judge.scores(unknown, texts, self.ledger)):
            self.known_scores[q.id] = score
        return [self.known_scores[q.id] for q in questions]

    def without_score(self, questions):
        return [q for q in questions if q.id not in self.known_scores]

    def rationales(self, questions):
        """Return N texts."""
        texts = []
        for q in questions:
            text = self.said[q.id]
            texts.append(text)
            if q.id not in self.counted:
                self.counted.add(q.id)
                self.ledger["rationale_wrote"] += len(text.split())
        return texts


class Judge:
    """A scoring LM: how much likelier a rationale r makes the right answer a,

        s(q, r) = sigmoid((log p(a | q, r) - log p(a | q)) / |a|),  |a| in tokens; 0 if r is empty.
    """

    def __init__(self, open_scorer):
        """open_scorer: () -> CheckpointTeacher, called at the first score."""
        self.open_scorer = functools.cache(open_scorer)

    def scores(self, questions, rationales, ledger):
        """Return N floats for N questions, each with its rationale; add the tokens read to the
        ledger.
        """
        if not questions:
            return []
        scorer = self.open_scorer()
        before = scorer.ledger.copy()
        told = self.logps(scorer, questions, rationales)
        plain = self.logps(scorer, questions, [""] * len(questions))
        scorer.loaded = None
        ledger.update(scorer.ledger - before)
        scores = []
        for with_r, without, r in zip(told, plain, rationales):
            scores.append(1 / (1 + math.exp(without - with_r)) if r else 0.0)
        return scores

    def logps(self, scorer, questions, rationales):
        """Return log p(a | q, r) / |a| of each question."""
        asked = [replace(q, choices=(q.right,)) for q in questions]  # the right choice alone
        prompts = [scorer.frame(score_prompt(q, rationale=r)) for q, r in zip(questions, rationales)]
        records = scorer.look_up("score", asked, prompts)
        return [record["logps"][0] / max(record["lengths"][0], 1) for record in records]
