"""Knowledge purification: M teachers' rationales in, one out. The paper's five ways, one of ours
(rl-verified), and the controls they are measured against.

In this order: the interface; the controls; the purifiers that choose one teacher for each
question; aggregation; reinforcement learning; and last the three routers' mathematics, each
usable alone.

    python train.py --purifier router      # or plackett-luce, classifier, aggregate, rl, none, ...
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

import kp
import model
from model import BadInput, require

# ------------------------------------------------------------------------------------ the interface


class Purifier:
    """What the training loop calls: `open` and `fit` once, `rationales` before each step, `feedback`
    after it.

    Most purifiers have all rationales before training: they override `purify` alone, or
    `Choice.choose`. The others (rl) override `fit` and `rationales`.
    """

    needs_encoder = False

    def __init__(self, args, questions, visits, fit_on, teachers, open_lm):
        """Take all that a purifier may look at: training questions, never the test."""
        self.args = args
        self.seed = args.seed
        self.questions = questions  # what the student trains on
        self.visits = visits  # visits[step]: the rows of `questions` in that step's batch
        self.rows = sorted(set(chain.from_iterable(visits)))  # all rows that training visits
        self.to_purify = [questions[row] for row in self.rows]
        self.fit_on = fit_on  # what a purifier may be fitted on: the in-domain training questions
        self.teachers = teachers  # kp.Teachers
        self.open_lm = open_lm  # path or None -> (LM or sentence encoder, its tokenizer)
        self.embeddings = {}  # {text: (D,)} so far
        self.ledger = Counter()  # tokens that this purifier spends, besides the teachers'

    def fit(self):
        """Get ready for all visits. Ask the teachers for what is needed, and only for that."""
        self.texts = dict(zip(self.rows, self.purify(self.to_purify)))

    def purify(self, questions):
        """Return the list of rationales to learn, for each of these questions."""
        raise NotImplementedError

    def rationales(self, step):
        """Return the list of rationales to learn, for each question of this step's batch."""
        return [self.texts[row] for row in self.visits[step]]

    def feedback(self, step, loss):
        """Take the student's losses (kp.DualLoss) on what it was just given. Return figures for
        metrics.jsonl.
        """
        return {}

    def given(self, row):
        """Return the rationales that the student was last given for the question of this row."""
        return self.texts[row]

    def probabilities(self, row):
        """Return P(m | question of this row), a list of M; None where the purifier has no such
        thing.
        """

    def state(self):
        """Return the tensors that change while the student trains, for a checkpoint."""
        return {}

    def restore(self, state, step):
        """Restore the tensors of `state`, after `fit` and before this step."""

    def kept(self):
        """Return the tensors with which another run can purify as this one does (--router)."""
        return {}

    def questions_to_fit_on(self, default=None):
        """Return --fit-questions of the questions that a purifier may be fitted on, drawn by the
        seed (default: all).
        """
        n = self.args.fit_questions or default or len(self.fit_on)
        return random.Random(self.seed).sample(self.fit_on, min(n, len(self.fit_on)))

    def questions_to_score(self):
        """Return the questions whose scores `fit` will ask for. `open` opens what they need."""
        return []

    @cached_property
    def encoder(self):
        """Open the sentence encoder, --encoder, and its tokenizer, when they are first needed."""
        encoder, tokenizer = self.open_lm(self.args.encoder)
        why = "a decoder-only model is no sentence encoder; give --encoder DIR, a Bert or a T5"
        require(hasattr(encoder, "encode"), f"{encoder.folder}: {why}")
        return encoder, tokenizer

    def open(self):
        """Open what `fit` needs, before a run begins: what is wrong ends it with nothing overwritten."""
        if self.needs_encoder or self.args.encoder:
            self.encoder
        self.teachers.open_scorers(self.questions_to_score())

    def close_encoder(self):
        """Free its memory for the student: after `fit` nothing new is embedded."""
        vars(self).pop("encoder", None)
        self.embeddings.clear()

    def embed(self, questions):
        """Return E(q), (N, D) of unit length."""
        return self.embed_texts(map(kp.with_choices, questions))

    def embed_texts(self, texts):
        """Return E(text), (N, D) of unit length. Each text is embedded once."""
        texts = list(texts)
        new = [text for text in dict.fromkeys(texts) if text not in self.embeddings]
        self.embeddings.update(zip(new, model.embed(*self.encoder, new)))
        return torch.stack([self.embeddings[text] for text in texts])


class Choice(Purifier):
    """A purifier that chooses one teacher for each question before training. A subclass says how:
    `choose`.
    """

    def choose(self, questions):
        """Return P(m | q), (N, M). The likeliest teacher writes, and no other is asked to."""
        raise NotImplementedError

    def purify(self, questions):
        probabilities = same_on_all_ranks(self.choose(questions))  # (N, M)
        self.chosen = dict(zip(self.rows, probabilities.tolist()))
        texts = self.teachers.rationales(questions, probabilities.argmax(1).tolist())
        return [[text] for text in texts]

    def probabilities(self, row):
        return self.chosen[row]

    def certain(self, picks):
        """Return probabilities (N, M) that are 1 for the picked teachers, (N,)."""
        return F.one_hot(picks, len(self.teachers)).float()


def same_on_all_ranks(value):
    """Return rank 0's value: under torchrun, sums on GPUs may differ from rank to rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


# -------------------------------------------------------------------- the baseline and the controls


class TinyLLM(Purifier):
    """The baseline (2402.04616), nothing purified: all M rationales of every question, each with
    its own L_DL.
    """

    def purify(self, questions):
        return self.teachers.all_rationales(questions)


class AnswersOnly(Purifier):
    """Control: no rationale at all, the answer alone."""

    def purify(self, questions):
        return [[] for _ in questions]


class SingleTeacher(Choice):
    """Control: always the same teacher, --teacher K."""

    def choose(self, questions):
        picks = torch.full((len(questions),), self.args.teacher)
        return self.certain(picks)


class RandomTeacher(Choice):
    """Control: a teacher drawn at random for each question, once."""

    def choose(self, questions):
        generator = torch.Generator().manual_seed(self.seed)
        picks = torch.randint(len(self.teachers), (len(questions),), generator=generator)
        return self.certain(picks)


class TaskTeacher(Choice):
    """Control: the best-scoring teacher of each task, or of all tasks for a task not fitted on."""

    def questions_to_score(self):
        return self.questions_to_fit_on()

    def choose(self, questions):
        fit = self.questions_to_score()
        scores = self.teachers.scores(fit)  # (N, M)
        best = {}
        for task in {q.task for q in questions}:
            rows = [row for row, q in enumerate(fit) if q.task == task] or range(len(fit))
            best[task] = scores[rows].mean(0).argmax()
        return self.certain(torch.stack([best[q.task] for q in questions]))


class Oracle(Choice):
    """Control: the best-scoring teacher of each question. It needs the scores of all that it purifies,
    so it has no rule for a question whose answer is unknown.
    """

    def questions_to_score(self):
        return self.to_purify

    def choose(self, questions):
        return self.certain(self.teachers.scores(questions).argmax(1))


# ----------------------------------------------------------------------- routers choose one teacher


PROBE = "Which of these conducts electricity?"


class Routing(Choice):
    """A router, fitted on the teachers' scores of training questions (--fit-questions of them), or
    taken from another run (--router), which needs nobody's scores here.

    What is kept is what it was fitted on: fitting it again takes seconds and gives the same router.
    The embedding of PROBE shows later whether the encoder is still the same.
    """

    needs_encoder = True

    def router(self):
        """Return a new router."""
        raise NotImplementedError

    def open(self):
        super().open()
        require(len(self.teachers) > 1, "a router needs two teachers or more; give --teachers")
        if self.args.router:
            folder = Path(self.args.router)
            is_this = folder.resolve() == Path(self.args.out).resolve()
            require(not is_this, f"--router {folder}: is the folder of this run; give another --out")
            self.fitted_on = self.take_over(folder / "router.safetensors")

    def questions_to_score(self):
        return [] if self.args.router else self.questions_to_fit_on()

    def choose(self, questions):
        if not self.args.router:
            fit = self.questions_to_score()
            scores = self.teachers.scores(fit).contiguous()  # (N, M); safetensors needs it whole
            self.tune(fit, scores)
            self.fitted_on = dict(embeddings=self.embed(fit), scores=scores)
        router = self.router().fit(**self.fitted_on)
        seed = torch.tensor(self.seed)
        self.to_keep = {**self.fitted_on, "probe": self.embed_texts([PROBE]), "seed": seed}
        return router.route(self.embed(questions))

    def tune(self, questions, scores):
        """Train the encoder too, where a method does that."""

    def kept(self):
        return self.to_keep

    def take_over(self, file):
        """Return what another run's router was fitted on."""
        tensors, metadata = model.read_tensors(file)
        for name, ours in (("purifier", self.args.purifier), ("teachers", self.teachers.names)):
            theirs = json.loads(metadata.get(name, "null"))
            require(theirs == ours, f"{file}: fitted with {name} {theirs}, not {ours}")
        needed = {"embeddings", "scores", "probe", "seed"}
        require(needed <= tensors.keys(), f"{file}: holds no router; give the folder of a run")
        other = f"{file}: fitted with another encoder; give that one as --encoder"
        tuned = model.part_of(tensors, "encoder")
        if tuned:
            encoder = self.encoder[0].float()
            try:
                encoder.load_state_dict(tuned)
            except RuntimeError:  # tensors of other names or shapes
                raise BadInput(other) from None
        probe = self.embed_texts([PROBE])
        theirs = tensors["probe"]
        same = probe.shape == theirs.shape and probe.allclose(theirs, atol=1e-3)
        require(same, other)
        self.seed = int(tensors["seed"])
        return dict(embeddings=tensors["embeddings"], scores=tensors["scores"])


class SimilarityRouting(Routing):
    """The similarity-based router."""

    def router(self):
        return SimilarityRouter(seed=self.seed)


class PlackettLuceRouting(Routing):
    """Plackett-Luce ranking."""

    def router(self):
        return PlackettLuceRouter(seed=self.seed)


class ClassifierRouting(Routing):
    """PLM classifier: P(m | q) = softmax_m(MLP(E(q))).

    A head is fitted first on the frozen encoder, because an untrained head would spoil what the
    encoder knows. Then encoder and head are tuned together for STEPS steps, and a new head is
    fitted on the tuned encoder. The paper's encoder is mDeBERTa.
    """

    STEPS = 150
    BATCH = 32
    LR = 3e-4

    def router(self):
        return ClassifierRouter(seed=self.seed)

    def tune(self, questions, scores):
        encoder, tokenizer = self.encoder
        encoder.float()  # small updates are lost in bfloat16
        router = self.router().fit(self.embed(questions), scores)
        self.embeddings.clear()  # they are of the untuned encoder
        room = encoder.config.get("max_position_embeddings", kp.MAX_LENGTH)
        ids = kp.TokenCache(tokenizer, room).prompts(map(kp.with_choices, questions))
        targets = router.target(scores)
        parameters = [*encoder.parameters(), *router.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, self.LR)
        draw = random.Random(self.seed)
        for _ in kp.progress(range(self.STEPS), "tune classifier"):
            rows = [draw.randrange(len(ids)) for _ in range(self.BATCH)]
            batch = model.pad([ids[row] for row in rows], model.device_of(encoder))
            q = model.pool(encoder, *batch).cpu()  # (B, D)
            loss = F.cross_entropy(router.head(router.standardize(q)), targets[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def choose(self, questions):
        probabilities = super().choose(questions)
        encoder, _ = self.encoder
        self.to_keep |= model.state_of(encoder=encoder.cpu())
        return probabilities


# -------------------------------------------------------------------------------------- aggregation


LETTER = re.compile(r"\([a-j]\)")  # of a choice


class Aggregation(Purifier):
    """Knowledge aggregation: an LM reads q and all M rationales and writes one, r_P = LM(q, r_1
    .. r_M), greedy.

    The paper asks GPT-4. Here it is --aggregator DIR, an instruction-tuned LM. The micro world's
    T5 is not one, so it is trained for --tune-aggregator steps, on --fit-questions of the training
    questions (by default 2,000 at most), to write what the highest-scoring teacher wrote. Each half
    of them trains one aggregator. The second writes for the first one's half, and the first for all
    other questions: none writes for a question that it was trained on.
    """

    BATCH = 16
    LR = 1e-3
    MAX_LENGTH = 2048  # tokens of question and rationales

    def open(self):
        super().open()
        if self.args.aggregator or not self.args.tune_aggregator:
            self.writer = self.teachers.open_another(self.args.aggregator)
        if self.args.tune_aggregator:
            require(len(self.questions_to_score()) > 1, "aggregate needs two questions to fit on")

    def questions_to_score(self):
        return self.questions_to_fit_on(default=2000) if self.args.tune_aggregator else []

    def purify(self, questions):
        if not self.args.tune_aggregator:
            return self.ask(questions)
        fit = self.questions_to_score()
        purified = {}
        for half in (fit[0::2], fit[1::2]):
            seen = {*half, *purified}  # taught to this one, or written by the first one
            todo = [q for q in questions if q not in seen]
            if not todo:  # out of domain: the first one was taught none of them, and wrote all
                continue
            aggregator, tokenizer = self.open_lm(self.args.aggregator)
            chat = kp.chat_format(aggregator.folder, tokenizer) if aggregator.folder else "{}"
            token_cache = kp.TokenCache(tokenizer, self.MAX_LENGTH, chat)
            self.tune(aggregator, token_cache, half)
            purified.update(zip(todo, self.write(aggregator, token_cache, todo)))
        return same_on_all_ranks([[purified[q]] for q in questions])

    def ask(self, questions):
        """Return [r_P] of each question. The LM is asked as a teacher is, and its answers are cached."""
        writer = self.writer
        said = self.teachers.all_rationales(questions)
        prompts = [writer.frame(text) for text in map(kp.aggregation_prompt, questions, said)]
        texts = [[record["text"]] for record in writer.look_up("rationale", questions, prompts)]
        for did in ("read", "wrote"):
            self.ledger[f"aggregator_{did}"] = writer.ledger[f"rationale_{did}"]
        return texts

    def write(self, aggregator, token_cache, questions):
        """Return r_P of each question, by an aggregator that was tuned."""
        said = self.teachers.all_rationales(questions)
        prompts = token_cache.prompts(map(kp.aggregation_prompt, questions, said))
        limits = self.args.max_new_tokens, self.args.batch_tokens
        written = kp.write(aggregator, token_cache.tokenizer, prompts, *limits)
        self.ledger["aggregator_wrote"] += sum(n for _, n in written)
        self.ledger["aggregator_read"] += sum(map(len, prompts))
        return [text for text, _ in written]

    def tune(self, aggregator, token_cache, questions):
        """Train by cross-entropy to write the rationale of each question's best-scoring teacher."""
        said = self.teachers.all_rationales(questions)
        best = self.teachers.scores(questions).argmax(1).tolist()
        lessons = list(zip(questions, said, best))
        aggregator.float().train()  # small updates are lost in bfloat16
        optimizer = torch.optim.AdamW(aggregator.parameters(), self.LR)
        n_steps = self.args.tune_aggregator
        draw = random.Random(self.seed)
        for step in kp.progress(range(n_steps), "tune aggregator"):
            warm_up = (step + 1) / 50
            decay = 1 - step / n_steps
            optimizer.param_groups[0]["lr"] = self.LR * min(warm_up, decay)
            prompts = []
            targets = []
            for q, texts, teacher in draw.choices(lessons, k=self.BATCH):
                # The choices and teachers in a new order each time: their places mean nothing.
                if not any(LETTER.search(text) for text in texts):  # which would then name others
                    shuffled = draw.sample(q.choices, len(q.choices))
                    q = replace(q, choices=tuple(shuffled))
                prompts.append(kp.aggregation_prompt(q, draw.sample(texts, len(texts))))
                targets.append(texts[teacher])
            prompts, targets = token_cache.pairs(aggregator, prompts, targets)
            loss = kp.sequence_losses(aggregator, prompts, targets).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(aggregator.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        aggregator.eval()


# --------------------------------------------------------------------------- reinforcement learning


class Reinforced(Purifier):
    """RL-based teacher selection: a policy draws the teacher, and the training itself rewards the
    draw.

    State of teacher m: [E(q), E(r_m) 1(teacher m was right)]; it was right if r_m concludes on the
    answer. Policy: sigmoid_m(MLP(state)). Reward of a draw: R = -L_PR - L_DL, the student's two
    losses on the question. REINFORCE (Williams 1992) ascends

        E[(R - baseline) grad log pi(m | q)] + c grad H(pi).

    It differs from the paper in that one teacher is drawn, by the sigmoids scaled to sum 1. All
    teachers write all rationales, because the states hold them. No scores are needed.

    Every step also learns again from REPLAYS earlier ones, and draws are made for AHEAD steps at
    once, so that each teacher is asked in one batch. The policy has moved on meanwhile; the
    importance ratio pi_now / pi_then, at most 2, corrects for that.
    """

    needs_encoder = True
    AHEAD = 10  # steps whose draws are made at once
    REPLAYS = 4  # of the last MEMORY steps
    MEMORY = 250
    LR = 1e-3
    HIDDEN = 256  # units of the MLP
    ENTROPY = 0.01  # c

    def fit(self):
        states, n_outputs = self.describe(self.to_purify)
        states = same_on_all_ranks(states)
        self.states = torch.empty(len(self.questions), *states.shape[1:])
        self.states[self.rows] = states  # no other row is ever looked up
        generator = torch.Generator().manual_seed(self.seed)
        self.policy = mlp(states.shape[-1], self.HIDDEN, torch.zeros(n_outputs), generator)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.LR)
        self.baseline = torch.zeros((), dtype=torch.float64)

        # Of each visit: the teacher drawn, log pi then, and the reward. All batches have one size.
        self.visited = torch.tensor(self.visits)  # (steps, B)
        self.picks = torch.zeros_like(self.visited)
        self.logp = torch.zeros(self.visited.shape)
        self.rewards = torch.zeros(self.visited.shape)
        self.written = []  # [text] of each visit so far
        self.texts = {}

    def describe(self, questions):
        """Return the states of questions and teachers, (N, M, 2 D), and the policy's number of
        outputs per state, 1.
        """
        q = self.embed(questions)
        q = Standardize(q)(q)  # (N, D)
        states = []
        for texts in zip(*self.teachers.all_rationales(questions)):  # one teacher's, N
            right = torch.tensor(list(map(kp.is_right, texts, questions)))  # (N,)
            r = self.embed_texts(texts) * right[:, None]  # (N, D)
            states.append(torch.cat((q, r), 1))
        return torch.stack(states, 1), 1

    def log_policy(self, rows):
        """Return log pi(m | q) of these rows, (B, M)."""
        outputs = self.policy(self.states[rows])[..., 0]  # (B, M)
        return F.logsigmoid(outputs).log_softmax(1)  # log of sigmoid_m / (sum of sigmoids)

    def rationales(self, step):
        B = len(self.visits[step])
        start = step * B
        if start == len(self.written):
            ahead = slice(step, step + self.AHEAD)
            visited = self.visited[ahead]  # (AHEAD, B)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            with torch.no_grad():
                logp = self.log_policy(visited.flatten())  # (AHEAD * B, M)
            picks = torch.multinomial(logp.exp(), 1, generator=generator)
            self.picks[ahead] = picks.view_as(visited)
            self.logp[ahead] = logp.gather(1, picks).view_as(visited)
            self.write(ahead)
        return self.written[start : start + B]

    def write(self, steps):
        """Have the picked teachers write for these steps, a slice."""
        rows = self.visited[steps].flatten().tolist()
        picks = self.picks[steps].flatten().tolist()
        texts = self.teachers.rationales([self.questions[row] for row in rows], picks)
        texts = [[text] for text in texts]
        self.written += texts
        self.texts.update(zip(rows, texts))

    def reward(self, step, loss):
        """Return R of this step's draws, (B,)."""
        return -(loss.answer + loss.rationale).float().cpu()

    def feedback(self, step, loss):
        self.rewards[step] = self.reward(step, loss)
        finite = self.rewards[step].isfinite().all()
        why = f"step {step} of {self.args.purifier}: the student's losses are not finite; lower --lr"
        require(finite, why)
        mean = self.rewards[step].mean()
        entropy = self.learn(step)
        draw = random.Random(f"{self.seed} {step}")
        earlier = range(max(0, step - self.MEMORY), step)
        for before in draw.sample(earlier, min(self.REPLAYS, len(earlier))):
            self.learn(before)
        self.baseline += 0.1 * (mean - self.baseline)
        return dict(reward=mean, entropy=entropy)

    def learn(self, step):
        """Take one step of gradient ascent on the draws of one step of training. Return H(pi)."""
        logp = self.log_policy(self.visited[step])  # (B, M)
        entropy = -(logp.exp() * logp).sum(1).mean()
        chosen = logp.gather(1, self.picks[step][:, None])[:, 0]  # (B,)
        ratio = (chosen.detach() - self.logp[step]).exp().clamp(max=2)  # pi_now / pi_then
        gain = (ratio * (self.rewards[step] - self.baseline) * chosen).mean()
        self.optimizer.zero_grad()
        (-gain - self.ENTROPY * entropy).backward()
        self.optimizer.step()
        return entropy.detach()

    def probabilities(self, row):
        return self.log_policy([row]).exp()[0].tolist()

    def state(self):
        drawn = dict(picks=self.picks, logp=self.logp, rewards=self.rewards)
        learned = model.state_of(policy=self.policy, optimizer=self.optimizer)
        return {**drawn, **learned, "baseline": self.baseline}

    def restore(self, state, step):
        model.restore_state(state, policy=self.policy, optimizer=self.optimizer)
        self.baseline = state["baseline"]
        self.picks = state["picks"]
        self.logp = state["logp"]
        self.rewards = state["rewards"]
        for start in range(0, step, self.AHEAD):
            self.write(slice(start, start + self.AHEAD))  # the teachers' answers are in the cache


class VerifiedReinforced(Reinforced):
    """The same at half the teachers' cost: the policy reads the question alone, so only what is drawn
    is written.

    Policy: pi(m | q) = softmax_m(MLP(E(q))). Reward: R = 1[r_m concludes on the answer] - beta z,
    where z is the student's L_DL on r_m, standardised over the batch. The first part can be checked
    because the teacher was not told the answer. Not in the paper.
    """

    BETA = 0.1  # weight of z in the reward

    def describe(self, questions):
        """Return the states of questions, (N, D), and the policy's number of outputs per state, M."""
        q = self.embed(questions)
        return Standardize(q)(q), len(self.teachers)

    def log_policy(self, rows):
        return self.policy(self.states[rows]).log_softmax(1)

    def reward(self, step, loss):
        right = []
        for row, (text,) in zip(self.visits[step], self.rationales(step)):
            right.append(kp.is_right(text, self.questions[row]))
        l_dl = loss.rationale.float().cpu()  # (B,)
        z = F.layer_norm(l_dl, l_dl.shape)  # mean 0, deviation 1
        return torch.tensor(right).float() - self.BETA * z


# ------------------------------------------------------------------------- the routers' mathematics


class Router:
    """Map the embedding q of a question to a probability for each of M teachers.

    `fit` and `route` take tensors or arrays and work on the CPU. They raise ValueError if shapes do
    not match, if there are no rows or fewer than two teachers, and if a number is NaN or infinite.
    All random numbers come from `seed`: the same data give the same router. A subclass has `learn`
    and `predict`, of standardised q.
    """

    @torch.no_grad()
    def fit(self, embeddings, scores):
        """Learn from embeddings (N, D) and scores (N, M). Return self.

        scores[i, m] is the probability that teacher m gives to the right choice of question i (or 1
        and 0, for right and wrong).
        """
        self.standardize = Standardize(embeddings)
        scores = check_matrix(scores, "scores")
        N = len(embeddings)
        if len(scores) != N or scores.shape[1] < 2:
            raise ValueError(f"scores must be ({N}, M >= 2), got {tuple(scores.shape)}")
        self.learn(self.standardize(embeddings), scores)
        return self

    @torch.no_grad()
    def route(self, embeddings):
        """Return P(m | q) (N, M) of embeddings (N, D), each row with sum 1."""
        return self.predict(self.standardize(embeddings))


@dataclass
class SimilarityRouter(Router):
    """Route by learned similarity: P(m | q) = softmax_m(cos(f(q), k_m) / tau).

    Teacher m has a vector k_m. RouterDC (Chen et al., NeurIPS 2024, arXiv 2409.19886) trains f and k
    with two contrastive losses:

        loss = teacher_loss + lam * question_loss
        teacher_loss = sum over + of  -log(e^s_+ / (e^s_+ + sum over - of e^s_-))
            s_m = cos(f(q), k_m) / tau
            "+": the K best teachers of the question, "-": all others
        question_loss = mean over + of  -log(e^s_+ / (e^s_+ + sum over - of e^s_-))
            s_j = cos(f(q), f(q_j)) / tau
            "+": the questions of the batch in the same k-means cluster, "-": all others

    Differences from RouterDC's paper and code: f is a two-layer MLP on a frozen encoder, instead of
    the encoder itself; k-means runs on the embeddings, without t-SNE; K = 1 and lam = 0.1 instead
    of 3 and 1 (better on held-out questions); tau = 0.3 instead of 1; "-" are all other teachers,
    not only the 3 lowest of those that score at most 0.5; question_loss takes the whole batch, not
    one + and 3 - drawn from it; training stops when the expected score on validation questions
    stops rising; and `route` uses the tau that suits these questions best (temperature scaling, Guo
    et al. 2017), which leaves the argmax as it is.
    """

    tau: float = 0.3  # temperature of both losses
    top_k: int = 1  # K, how many teachers are positive, at most M
    lam: float = 0.1  # weight of question_loss
    n_clusters: int = 5
    hidden: int = 256  # units of f
    lr: float = 6e-4  # where D = 256, see fit_early_stopped
    batch: int = 128
    steps: int = 1500  # minibatches, at most; the last epoch is finished
    seed: int = 0

    def learn(self, q, scores):
        """Train f (`project`) and k (`keys`), then choose the tau of `predict`."""
        generator = torch.Generator().manual_seed(self.seed)
        cluster = self.kmeans(q, generator)  # (N,)

        # Start as the router that ignores q: f(q) = e_0, k_m = c_m e_0 + e_m, where c_m is the mean
        # score of teacher m less that of all teachers. Then cos(f(q), k_m) rises with c_m.
        # d = M + 1 dimensions are enough: of f(q), only the part in the span of k moves the argmax.
        c = scores.mean(0) - scores.mean()  # (M,)
        M = len(c)
        self.keys = nn.Parameter(torch.cat((c[:, None], torch.eye(M)), 1))  # k, (M, d)
        self.project = mlp(q.shape[1], self.hidden, torch.eye(M + 1)[0], generator)

        def loss(rows):
            z = self.embed(q[rows])  # (B, d)
            teacher_loss = self.teacher_loss(self.cos(z) / self.tau, scores[rows], self.top_k)
            question_loss = self.question_loss(z @ z.T / self.tau, cluster[rows])
            return (teacher_loss + self.lam * question_loss).mean()

        def minus_expected_score(rows):
            return -(self.predict(q[rows]) * scores[rows]).sum(1).mean()

        self.tau_route = self.tau  # while it learns
        parameters = [*self.project.parameters(), self.keys]
        val = fit_early_stopped(self, parameters, loss, minus_expected_score, q, generator)

        cos = self.cos(self.embed(q[val]))  # (N_val, M)
        target = best_teacher(scores[val])
        taus = torch.logspace(-2, 2, 41).tolist()
        self.tau_route = min(taus, key=lambda tau: F.cross_entropy(cos / tau, target))

    def predict(self, q):
        return (self.cos(self.embed(q)) / self.tau_route).softmax(1)

    def embed(self, q):
        """Return z = f(q) at unit length (B, d), of q (B, D)."""
        return F.normalize(self.project(q))

    def cos(self, z):
        """Return cos(z, k_m) (B, M), of z (B, d) at unit length."""
        return z @ F.normalize(self.keys).T

    @staticmethod
    def teacher_loss(logits, scores, top_k):
        """Return the loss (B,) of each question from logits s_m and scores, both (B, M).

        Teachers that tie at place K are all positive. The lowest score is always negative, so a
        question on which all teachers tie has loss 0. Example: of the scores (0.9, 0.9, 0.5, 0.1),
        two are positive for K = 1 and K = 2, three for K = 3 and K = 4.
        """
        kth = scores.topk(top_k).values[:, -1:]  # (B, 1)
        lowest = scores.amin(1, keepdim=True)  # (B, 1)
        positive = (scores >= kth) & (scores > lowest)  # (B, M)
        return contrast(logits, positive, ~positive)

    @staticmethod
    def question_loss(logits, cluster):
        """Return the loss (B,) of each question from logits s_j (B, B) and clusters (B,).

        It is the mean over its friends in the batch; 0 without a friend, or without a stranger.
        """
        stranger = cluster[:, None] != cluster  # (B, B)
        friend = (~stranger).fill_diagonal_(False)  # same cluster, but not the question itself
        return contrast(logits, friend, stranger) / friend.sum(1).clamp(min=1)

    def kmeans(self, q, generator):
        """Return the cluster (N,) of each q (N, D), after ten rounds of k-means by cosine."""
        q = F.normalize(q)
        centres = q[torch.randperm(len(q), generator=generator)[: self.n_clusters]]
        for _ in range(10):
            cluster = (q @ centres.T).argmax(1)  # (N,)
            members = F.one_hot(cluster, len(centres)).float()  # (N, n_clusters)
            centres = F.normalize(members.T @ q + 1e-6 * centres)  # an empty cluster stays
        return cluster


def contrast(logits, positive, negative):
    """Return the contrastive loss (B,) of logits s (B, K) and masks of + and - (B, K):

    sum over + of  -log(e^s_+ / (e^s_+ + sum over - of e^s_-)),  0 without a + or a -
    """
    n = logits.masked_fill(~negative, -1e9).logsumexp(1, keepdim=True)  # e^n = sum of e^s_-
    loss = F.softplus(n - logits)  # log(1 + e^(n - s)) = -log(e^s / (e^s + e^n))
    return (loss * positive).sum(1)


@dataclass
class PlackettLuceRouter(Router):
    """Route by the teachers' worths xi, from rankings on similar questions: P(m | q) = xi_m.

    For each q, xi (with sum 1) maximises a weighted likelihood of the training questions' rankings:

        sum_i w_i log PL(ranking_i | xi),  w_i = exp(cos(q, q_i) / tau), scaled to sum 1
        log PL(ranking | xi) = sum over m of  log(xi_m / sum of xi_j over all j not above m)

    So a ranking is a series of choices: the best teacher from all, the next from the rest, and so
    on. The last one is alone, which is no choice. Minorise-maximise (MM) steps find xi; none lowers
    the likelihood (Hunter, Ann. Stat. 2004):

        xi_m <- won_m / stood_m, scaled to sum 1
            won_m = sum of w_i over the choices that m won
            stood_m = sum of w_i / (sum of xi_j over all j in the choice), over the choices m was in

    All choices from the same set of teachers share that denominator, so their weights are added
    once, before the steps. M teachers make at most 2^M - 1 sets, however many questions there are.

    Ties (Breslow 1974): each of g tied teachers is chosen from all that are not above the group.
    The lowest group counts as g - 1 choices, (g - 1) / g for each teacher. So for M = 2 a tie is
    half a win for each: xi_1 / xi_2 = (wins + ties / 2) / (losses + ties / 2).

    Prior: one more choice of weight `prior` among all teachers, of which each wins 1 / M. So a
    teacher that always loses has a worth above 0, and a maximum exists.

    Differences from RouteLLM (arXiv 2406.18665): rankings of M teachers, not only games of two, and
    sharper weights than its 10^(1 + cos(q, q_i) / max_j cos(q, q_j)). On valid questions of micro
    world 0, the picked teachers give the right answer a mean probability of 0.83 with these weights,
    of 0.47 with 10^(1 + cos) (the best single teacher 0.38, the best of each question 0.995).

    Only ranks count: a teacher that wins often by little beats one that wins seldom by much.
    """

    tau: float | None = None  # None: fit chooses one of `taus`
    prior: float = 0.01
    steps: int = 100  # MM steps; more sharpen xi a little, and pick the same teachers
    sample: int = 2048  # how many training questions choose tau; with fewer, chance does
    seed: int = 0

    taus = (100.0, 0.4, 0.2, 0.12, 0.08, 0.06, 0.04, 0.03, 0.02, 0.01)

    def learn(self, q, scores):
        """Keep the training questions with their choices, then choose the tau of `predict`.

        Example: the scores (0.5, 0.9, 0.5) of one question, whose teachers 0 and 2 tie.

            stands = [[1, 0, 1], [1, 1, 1], [1, 0, 1]]  who stands in the choice that m wins
            sets   = [[1, 0, 1], [1, 1, 1]]             the different ones
            won    = [1/2, 1, 1/2]                      half of one choice from two, one from three
            made   = [1, 1]                             choices from each set
        """
        self.q = F.normalize(q)  # (N, D)
        s = (scores * 1e6).round()  # differences below about 1e-6 are ties
        stands = s[:, None, :] <= s[:, :, None]  # (N, M, M): [i, m, j], j is not above m
        size = stands.sum(2)  # (N, M)
        lowest = s == s.amin(1, keepdim=True)
        self.won = torch.where(lowest, (size - 1) / size, 1.0)  # (N, M)
        sets, which = stands.flatten(0, 1).unique(dim=0, return_inverse=True)
        self.sets = sets.float()  # (S, M)
        zeros = torch.zeros(len(s), len(sets))
        self.made = zeros.scatter_add(1, which.view_as(s), self.won)  # (N, S)
        self.tau_route = self.tau or self.choose_tau(scores)

    def predict(self, q):
        # A question that was fitted on is its own nearest neighbour: there xi is nearly the oracle.
        parts = F.normalize(q).split(256)
        return torch.cat([self.worths(part @ self.q.T, self.tau_route) for part in parts])

    def worths(self, cos, tau):
        """Return xi (B, M) from cos(q, q_i) (B, N).

        The example in `learn`, with weight 1 and no prior, one step from xi = (0.2, 0.5, 0.3):

            rivals = [0.5, 1.0]       sum of xi over each set
            stood  = [3, 1, 3]        1 / 0.5 + 1 / 1.0 for teachers 0 and 2, who are in both sets
            xi     = [1/8, 6/8, 1/8]  won / stood = [1/6, 1, 1/6], scaled to sum 1
        """
        weights = (cos / tau).softmax(1)  # (B, N), w_i
        won = weights @ self.won + self.prior / self.won.shape[1]  # (B, M)
        made = weights @ self.made  # (B, S)
        xi = sum_to_one(won)
        for _ in range(self.steps):
            rivals = xi @ self.sets.T  # (B, S)
            stood = (made / rivals) @ self.sets + self.prior  # (B, M)
            xi = sum_to_one(won / stood)
        return xi

    def choose_tau(self, scores):
        """Return the tau whose picks, and a little its P(m | q), score highest on training questions, each
        left out in turn.
        """
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randperm(len(scores), generator=generator)[: self.sample]
        values = dict.fromkeys(self.taus, 0.0)
        for rows in sample.split(256):
            cos = self.q[rows] @ self.q.T  # (B, N)
            cos[cos > 1 - 1e-5] = -1e6  # leave one out, with its duplicates
            for tau in self.taus:
                xi = self.worths(cos, tau)  # (B, M)
                picked = scores[rows].gather(1, xi.argmax(1, keepdim=True)).sum()
                expected = (xi * scores[rows]).sum()
                values[tau] += picked + 0.05 * expected  # a sharper xi is better
        return max(self.taus, key=values.get)


@dataclass
class ClassifierRouter(Router):
    """Route by a small classifier: P(m | q) = softmax_m(MLP(q)), fitted to a target distribution.

    The target is softmax_m(scores / temperature), as ZOOTER (Lu et al., arXiv 2311.08692) distils
    rewards into a router; cross-entropy to a fixed target is its KL loss up to a constant.

    Left out: ZOOTER's smoothing of rewards by tags (there are no tags here). The encoder is not
    trained here: ClassifierRouting.tune does that, with `head`, a plain nn.Module, and `target`.
    """

    temperature: float = 0.1
    hidden: int = 128  # units of the MLP
    lr: float = 3e-4  # where D = 256, see fit_early_stopped
    batch: int = 128
    steps: int = 1500  # minibatches, at most; the last epoch is finished
    seed: int = 0

    def target(self, scores):
        """Return the target distribution (N, M) of scores (N, M)."""
        return (scores / self.temperature).softmax(1)

    def learn(self, q, scores):
        """Train the MLP (`head`)."""
        generator = torch.Generator().manual_seed(self.seed)
        target = self.target(scores)  # (N, M)

        # Start as the classifier that ignores q and predicts the mean target.
        mean_target = target.mean(0) + 1e-3
        self.head = mlp(q.shape[1], self.hidden, mean_target.log(), generator)

        def loss(rows):
            return F.cross_entropy(self.head(q[rows]), target[rows])

        fit_early_stopped(self, [*self.head.parameters()], loss, loss, q, generator)

    def predict(self, q):
        return self.head(q).softmax(1)


# What the routers share: training, targets, checked input.


@torch.no_grad()
def fit_early_stopped(router, parameters, loss, validation_loss, q, generator):
    """Train parameters by AdamW on loss(rows), on minibatches of the rows of q (N, D), with the
    router's `lr`, `batch` and `steps`.

    15 % of the rows are kept for validation; of 6 rows or fewer, all serve both purposes. Training ends when
    10 epochs in a row have not lowered validation_loss(rows) by 1e-4, or after the epoch in which
    the number of minibatches reaches `steps`. Then the parameters go back to where that loss was
    lowest. Return the rows kept for validation.
    """
    order = torch.randperm(len(q), generator=generator)
    val, train = order.tensor_split([round(0.15 * len(q))])
    if len(q) <= 6:
        val = train = order

    # A step of AdamW moves each weight by about lr. So it moves a coordinate of W q, a sum of D
    # terms of rms 1, by about lr * sqrt(D) if their signs are independent, and by lr * D at most, if
    # all agree. Make the former the same for every D.
    lr = router.lr * (256 / q.shape[1]) ** 0.5
    optimizer = torch.optim.AdamW(parameters, lr)
    lowest = torch.inf
    stale = 0  # epochs since the lowest loss
    step = 0
    while True:
        now = validation_loss(val)
        stale += 1
        if now < lowest - 1e-4:
            lowest = now
            best = [p.clone() for p in parameters]
            stale = 0
        if stale == 10 or step >= router.steps:
            break
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for rows in shuffled.split(router.batch):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(rows).backward()
            optimizer.step()
            step += 1
    for p, value in zip(parameters, best):
        p.copy_(value)
    return val


def best_teacher(scores):
    """Return (N, M): 1 at the best teacher of each question, shared by those that tie."""
    best = scores >= scores.amax(1, keepdim=True) - 1e-6
    return sum_to_one(best.float())


def sum_to_one(x):
    """Return x (N, M) with each row divided by its sum."""
    return x / x.sum(1, keepdim=True)


@torch.no_grad()
def mlp(D, hidden, output, generator):
    """Return a two-layer MLP of inputs (B, D) that starts at this output, whatever the input.

    skip_init: nn.Linear(...) alone would draw from the global random numbers.
    """
    first = skip_init(nn.Linear, D, hidden)
    first.weight.normal_(0, D**-0.5, generator=generator)
    first.bias.zero_()
    last = skip_init(nn.Linear, hidden, len(output))
    last.weight.zero_()
    last.bias.copy_(output)
    return nn.Sequential(first, nn.GELU(), last)


class Standardize:
    """Map q (N, D) to (q - mean) / scale, so that a coordinate has rms 1.

    Without the large vector that all sentence embeddings share, cosines are not all close to 1. One
    scale for all dimensions keeps the angles, and makes a learning rate independent of the
    encoder's units.
    """

    def __init__(self, embeddings):
        q = check_matrix(embeddings, "embeddings")
        self.mean = q.mean(0, dtype=torch.float64).float()  # (D,)
        noise = 1e-6 * self.mean.abs().max() + 1e-30  # what rms can be if all rows are equal
        self.scale = (q - self.mean).square().mean().sqrt().clamp(min=noise)

    def __call__(self, embeddings):
        q = check_matrix(embeddings, "embeddings")
        if q.shape[1] != len(self.mean):
            raise ValueError(f"embeddings have D = {q.shape[1]}, fit had {len(self.mean)}")
        return (q - self.mean) / self.scale


def check_matrix(x, name):
    """Return x (N, D) in float32 on the CPU, or raise ValueError."""
    x = torch.as_tensor(x).float().cpu()
    if x.ndim != 2 or x.numel() == 0 or not x.isfinite().all():
        raise ValueError(f"{name} must be 2-D, not empty, all finite; got shape {tuple(x.shape)}")
    return x


# What --purifier takes.
PURIFIERS = {
    "router": SimilarityRouting,
    "plackett-luce": PlackettLuceRouting,
    "classifier": ClassifierRouting,
    "aggregate": Aggregation,
    "rl": Reinforced,
    "rl-verified": VerifiedReinforced,
    "none": TinyLLM,
    "single": SingleTeacher,
    "task": TaskTeacher,
    "random": RandomTeacher,
    "oracle": Oracle,
    "answers": AnswersOnly,
}
