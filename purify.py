"""Knowledge purification: M teachers' rationales in, one out. Five ways, and the controls they are measured against.

First the three routers, self-contained: from the embedding of a question to a probability for every teacher.
They share two methods, fit(embeddings (N, D), scores (N, M)) -> self and route(embeddings (N, D)) -> (N, M), where
scores[i, m] is the probability that teacher m gives to the right choice of question i; both raise ValueError for
shapes that do not match, M < 2, no rows, NaN and infinity. Then the purifiers, one class each with one small
interface: fit once, `rationales` before a step, `feedback` after it.

    python train.py --purifier router      # or plackett-luce, classifier, aggregate, rl; none, single, random, ...
"""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init
from tqdm import tqdm

import model as models
from kp import Targets, ask, chat_format, conclusion, rationale_prompt, sequence_losses

# --------------------------------------------------------------------------------------------- routers


def check_matrix(x, name):
    """x (N, D) as a floating CPU tensor; ValueError if it is not 2-D, is empty, or is not finite."""
    x = torch.as_tensor(x).detach().cpu()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name} must be a non-empty 2-D array, got shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, found NaN or infinity")
    return x


class Standardize:
    """q (N, D) -> (q - mean) / scale, one scale for all dimensions, chosen so that a coordinate has rms 1.

    Without the large vector that all sentence embeddings share, cosines are not all close to 1. One scale keeps the
    angles and makes a learning rate independent of the encoder's units.
    """

    def __init__(self, embeddings):
        self.mean, self.scale = check_matrix(embeddings, "embeddings").mean(dim=0, dtype=torch.float64), 1.0
        rms = self(embeddings).square().mean().sqrt()
        self.scale = rms.clamp(min=1e-6 * self.mean.abs().max().item() + 1e-30)  # of equal rows it is 0 or rounding noise

    def __call__(self, embeddings):
        embeddings = check_matrix(embeddings, "embeddings")
        if embeddings.shape[1] != len(self.mean):
            raise ValueError(f"embeddings have D = {embeddings.shape[1]}, fit had D = {len(self.mean)}")
        return (embeddings - self.mean.to(embeddings.dtype)).float() / self.scale


def prepare(embeddings, scores):
    """-> Standardize of embeddings (N, D), these standardized, scores (N, M) float32; ValueError if they do not match."""
    standardize, scores = Standardize(embeddings), check_matrix(scores, "scores").float()
    if len(scores) != len(embeddings):
        raise ValueError(f"got {len(embeddings)} embeddings but {len(scores)} rows of scores")
    if scores.shape[1] < 2:
        raise ValueError(f"routing needs M >= 2 teachers, got M = {scores.shape[1]}")
    return standardize, standardize(embeddings), scores


def fit_early_stopped(router, params, q, loss, validation_loss, generator):
    """Fit params by AdamW on loss(rows), rows being a minibatch of q (N, D). Call it under no_grad. -> validation rows

    15 % of the rows are for validation (up to 6 rows serve as both). It ends after router.steps minibatches, or 10
    epochs that do not lower validation_loss(rows) by 1e-4, and sets params back to where that was lowest.
    """
    order, n_val = torch.randperm(len(q), generator=generator), round(0.15 * len(q))
    train, val = (order[n_val:], order[:n_val]) if len(q) > 6 else (order, order)
    lr = router.lr * (256 / q.shape[1]) ** 0.5  # a step of Adam moves a coordinate of W q by up to lr * D
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    lowest, stale, step = torch.inf, 0, 0  # stale: epochs since the lowest loss
    while True:
        now = validation_loss(val)
        stale = 0 if now < lowest - 1e-4 else stale + 1
        if stale == 0:
            lowest, saved = now, [p.clone() for p in params]
        if stale == 10 or step >= router.steps:
            break
        for rows in train[torch.randperm(len(train), generator=generator)].split(router.batch):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(rows).backward()
            optimizer.step()
            step += 1
    for p, value in zip(params, saved, strict=True):
        p.copy_(value)
    return val


def best_teacher(scores):
    """(N, M) -> (N, M): 1 on the best teacher of each question, shared evenly by those that tie for it."""
    best = (scores >= scores.amax(dim=1, keepdim=True) - 1e-6).float()
    return best / best.sum(dim=1, keepdim=True)


class SimilarityRouter:
    """Learned similarity of question and teacher: P(m | q) = softmax_m(cos(W q + b, k_m) / tau).

    RouterDC (Chen et al., NeurIPS 2024, arXiv 2409.19886). Two contrastive losses train W, b and k:
      teacher loss   sum_{+ in top K} -log(e^{s_+} / (e^{s_+} + sum_- e^{s_-})), s_m = cos(W q + b, k_m) / tau
      question loss  the same with s_j = cos(W q + b, W q_j + b) / tau, + one question of the same k-means cluster of
                     embeddings, - `n_negatives` questions of other clusters.
    Negatives are all teachers below the top K: a question on which all teachers tie teaches nothing.
    Other than the paper: the encoder is frozen and W is trained in its place; k-means runs on the embeddings without
    t-SNE first; K = 1 and lam = 0.1, not 3 and 1 (better on held-out questions); negatives need not score below 0.5;
    training stops by the expected score on validation questions; and route() uses the tau that fits these best
    (temperature scaling, Guo et al. 2017), which leaves the argmax as it is.
    """

    def __init__(self, tau=0.1, top_k=1, lam=0.1, n_clusters=5, n_negatives=3, lr=1e-4, batch=128, steps=1500, seed=0):
        self.tau, self.top_k, self.lam = tau, top_k, lam  # temperature, K positives, question loss weight
        self.n_clusters, self.n_negatives = n_clusters, n_negatives
        self.lr, self.batch, self.steps, self.seed = lr, batch, steps, seed  # stops after `steps` minibatches

    @staticmethod
    def teacher_loss(logits, scores, top_k):
        """logits, scores (B, M) -> loss (B,). Ties at place K are all positive; the worst never are."""
        bar = scores.topk(min(top_k, scores.shape[1] - 1), dim=1).values[:, -1:]
        positive = (scores >= bar) & (scores > scores.amin(dim=1, keepdim=True))  # (B, M)
        negatives = logits.masked_fill(positive, -torch.inf).logsumexp(dim=1, keepdim=True)  # (B, 1)
        return (F.softplus(negatives - logits) * positive).sum(dim=1)

    @staticmethod
    def question_loss(z, cluster, n_negatives, tau, generator):
        """Unit z (B, d), cluster (B,) -> mean loss of the questions with a positive and H negatives."""
        same = cluster[:, None] == cluster
        friend = same & ~torch.eye(len(z), dtype=torch.bool)
        rand = torch.rand(same.shape, generator=generator) + 1e-6  # a random pick: the largest
        positive = (rand * friend).argmax(dim=1, keepdim=True)  # (B, 1)
        negatives = (rand * ~same).topk(min(n_negatives, len(z)), dim=1).indices  # (B, H)
        usable = friend.any(dim=1) & ((~same).sum(dim=1) >= n_negatives)
        logits = (z @ z.T / tau).gather(1, torch.cat([positive, negatives], dim=1))[usable]  # (B', 1 + H)
        return -F.log_softmax(logits, dim=1)[:, 0].sum() / max(len(logits), 1)

    def kmeans(self, q, generator):
        q = F.normalize(q, dim=1)
        centres = q[torch.randperm(len(q), generator=generator)[: self.n_clusters]]
        for _ in range(10):
            cluster = (q @ centres.T).argmax(dim=1)
            centres = F.normalize(F.one_hot(cluster, len(centres)).float().T @ q + 1e-6 * centres, dim=1)
        return cluster  # (N,)

    def logits(self, z):
        return z @ F.normalize(self.teachers, dim=1).T / self.tau  # (B, M)

    def embed(self, q):
        return F.normalize(self.project(q), dim=1)  # (B, d)

    @torch.no_grad()
    def fit(self, embeddings, scores):
        g = torch.Generator().manual_seed(self.seed)
        self.standardize, q, scores = prepare(embeddings, scores)
        m, cluster = scores.shape[1], self.kmeans(q, g)
        # Start as the router that ignores q: W = 0, b = e_0, k_m = c_m e_0 + sqrt(1 - c_m^2) e_m, with c_m
        # the mean score of m less that of all. d = M + 1 is enough: the argmax depends on span(k) alone.
        cos = (scores.mean(dim=0) - scores.mean()).clamp(-0.9, 0.9)[:, None]  # (M, 1)
        self.teachers = nn.Parameter(torch.cat([cos, torch.eye(m) * (1 - cos**2).sqrt()], dim=1))
        self.project = skip_init(nn.Linear, q.shape[1], m + 1)
        self.project.load_state_dict({"weight": torch.zeros(m + 1, q.shape[1]), "bias": torch.eye(m + 1)[0]})

        def loss(rows):
            z = self.embed(q[rows])
            teacher = self.teacher_loss(self.logits(z), scores[rows], self.top_k).mean()
            return teacher + self.lam * self.question_loss(z, cluster[rows], self.n_negatives, self.tau, g)

        def minus_expected_score(rows):
            return -(F.softmax(self.logits(self.embed(q[rows])), dim=1) * scores[rows]).sum(dim=1).mean()

        val = fit_early_stopped(self, [*self.project.parameters(), self.teachers], q, loss, minus_expected_score, g)
        cos, target = self.tau * self.logits(self.embed(q[val])), best_teacher(scores[val])
        taus = torch.logspace(-2, 2, 41)
        self.tau_route = taus[torch.stack([F.cross_entropy(cos / tau, target) for tau in taus]).argmin()].item()
        return self

    @torch.no_grad()
    def route(self, embeddings):
        z = self.embed(self.standardize(embeddings))
        return F.softmax(self.tau * self.logits(z) / self.tau_route, dim=1)


class PlackettLuceRouter:
    """Worths xi of the teachers for each q, from their rankings on similar questions: P(m | q) = xi_m.

    xi(q), summing to 1, maximises sum_i w_i log PL(ranking_i | xi) over training questions, w_i = exp(cos(q, q_i) / tau),
      log PL(ranking | xi) = sum over teachers m but the last  log xi_m - log(sum_{j not above m} xi_j),
    by minorise-maximise steps, which never lower it (Hunter, Ann. Stat. 2004):
      xi_m <- (weighted number of choices m won) / (sum over the choices m stood in of w_i / (sum_j xi_j)).
    RouteLLM (arXiv 2406.18665) weights games of two by 10^(1 + cos): on the micro world's valid questions the teachers
    it picks give the right answer 0.92, those picked here 0.97 (best possible 0.99).
    Ties (Breslow 1974): each of g tied teachers is chosen from all that are not ranked above the group; the lowest
    group counts as g - 1 choices, (g - 1) / g per teacher, for the last one standing is no choice. So for M = 2 a tie
    is half a win each: xi_1 / xi_2 = (wins + ties / 2) / (losses + ties / 2). `prior` is the weight (sum_i w_i = 1) of
    one more choice among all, which each wins to 1 / M: so who always loses has a worth above 0, and a maximum exists.
    Only ranks count: a teacher that wins often by little beats one that wins seldom by much. Questions with the same
    ranking add their weights (75 rankings with ties for M = 4); where more than `neighbours` rankings occur, only the
    `neighbours` training questions most similar to q are used.
    """

    taus = (100.0, 0.4, 0.2, 0.12, 0.08, 0.06, 0.04, 0.03, 0.02, 0.01)

    def __init__(self, tau=None, prior=0.01, neighbours=512, steps=100, sample=512, seed=0):
        self.tau, self.prior, self.neighbours = tau, prior, neighbours  # tau None: fit chooses one of `taus`
        self.steps, self.sample, self.seed = steps, sample, seed        # MM steps; questions to choose tau by

    def fit(self, embeddings, scores):
        self.standardize, q, self.scores = prepare(embeddings, scores)
        self.q = F.normalize(q, dim=1)  # (N, D)
        s = (self.scores * 1e6).round()  # differences below about 1e-6 are ties
        above = (s[:, None, :] > s[:, :, None]).sum(dim=2)  # (N, M) who beat m
        # Ranking r: order[r, p] is the teacher at place p, its tie group takes places start..end.
        above, self.ranking = torch.unique(above, dim=0, return_inverse=True)  # (R, M), (N,)
        self.start, self.order = above.sort(dim=1, stable=True)
        self.end = (self.start[:, None, :] <= self.start[:, :, None]).sum(dim=2) - 1
        size, lowest = (self.end - self.start + 1).float(), self.end == s.shape[1] - 1
        self.choices = torch.where(lowest, (size - 1) / size, 1.0)  # (R, M) won at place p
        K, M = min(len(self.order), self.neighbours), s.shape[1]
        self.chunk = min(256, max(1, 2**19 // (K * M)))  # queries at a time: a (B, K, M) tensor of 2 MB stays in the cache
        self.tau_route = self.choose_tau() if self.tau is None else self.tau
        return self

    def choose_tau(self):
        """The tau whose argmax teacher scores highest on training questions, each left out in turn."""
        g = torch.Generator().manual_seed(self.seed)
        sample, value = torch.randperm(len(self.q), generator=g)[: self.sample], torch.zeros(len(self.taus))
        for i in sample.split(self.chunk):
            cos = self.q[i] @ self.q.T
            cos[cos > 1 - 1e-5] = -1e6  # leave out the question itself and its duplicates
            for t, tau in enumerate(self.taus):
                xi, s = self.worths(*self.weigh(cos, tau)), self.scores[i]
                # The second part, the score expected under xi, decides between equals in favour of the sharper xi.
                value[t] += s.gather(1, xi.argmax(dim=1, keepdim=True)).sum() + 0.05 * (xi * s).sum()
        return self.taus[value.argmax()]

    def weigh(self, cos, tau):
        """cos (B, N) -> weights (B, K) that sum to 1 and the rankings (B, K) they belong to."""
        weights, rankings = F.softmax(cos / tau, dim=1), len(self.order)  # w_i / sum_i w_i
        if rankings <= self.neighbours:
            weights = torch.zeros(len(cos), rankings).index_add_(1, self.ranking, weights)
            return weights, torch.arange(rankings).expand(len(cos), rankings)
        weights, near = weights.topk(self.neighbours, dim=1)
        return weights / weights.sum(dim=1, keepdim=True), self.ranking[near]

    def worths(self, weights, ranking, tol=1e-5):
        """weights, ranking (B, K) -> xi (B, M) by MM steps until no worth moves by more than tol."""
        order, start, end = self.order[ranking], self.start[ranking], self.end[ranking]
        choices, m = weights[..., None] * self.choices[ranking], order.shape[2]  # (B, K, M) by place

        def to_teachers(x):  # (B, K, M) by place -> (B, M) by teacher
            return torch.zeros(len(x), m).scatter_add_(1, order.flatten(1), x.flatten(1))

        won = to_teachers(choices) + self.prior / m
        xi = to_teachers(choices * (start == 0)) + self.prior / m  # start: the first places
        xi = xi / xi.sum(dim=1, keepdim=True)
        for _ in range(self.steps):
            x = xi.gather(1, order.flatten(1)).view_as(choices)
            rivals = x.flip(2).cumsum(2).flip(2).gather(2, start)  # sum of xi from this tie group down
            new = won / (to_teachers((choices / rivals).cumsum(2).gather(2, end)) + self.prior)
            new = new / new.sum(dim=1, keepdim=True)
            moved, xi = (new - xi).abs().max(), new
            if moved < tol:
                break
        return xi

    @torch.no_grad()
    def route(self, embeddings):
        q, tau = F.normalize(self.standardize(embeddings), dim=1), self.tau_route
        return torch.cat([self.worths(*self.weigh(b @ self.q.T, tau)) for b in q.split(self.chunk)])


class ClassifierRouter:
    """A small classifier on the embedding, P(m | q) = softmax_m(head(q)), fitted to a target distribution.

    targets="soft": softmax_m(scores / temperature), rewards distilled into a router as in ZOOTER (Lu et al.,
    arXiv 2311.08692; cross-entropy to a fixed target is its KL loss up to a constant). targets="hard": the best
    teacher, shared by those that tie; any other is a ValueError. On the micro world's valid questions soft picks
    teachers who give the right answer 0.98, hard 0.97 (fitted on 250: 0.94, 0.93). Left out: ZOOTER's tag-based
    smoothing of rewards (there are no tags here), and training the encoder: `head` is a plain nn.Module and `target`
    takes scores only, so that a loop that also trains the encoder can use both.
    """

    def __init__(self, targets="soft", temperature=0.1, hidden=128, lr=3e-4, batch=128, steps=1500, seed=0):
        if targets not in ("soft", "hard"):
            raise ValueError(f"targets must be 'soft' or 'hard', got {targets!r}")
        self.targets, self.temperature, self.hidden = targets, temperature, hidden
        self.lr, self.batch, self.steps, self.seed = lr, batch, steps, seed  # stops after `steps` minibatches

    def target(self, scores):
        """scores (N, M) -> target distribution (N, M)."""
        return F.softmax(scores / self.temperature, dim=1) if self.targets == "soft" else best_teacher(scores)

    @torch.no_grad()
    def fit(self, embeddings, scores):
        g = torch.Generator().manual_seed(self.seed)
        self.standardize, q, scores = prepare(embeddings, scores)
        target = self.target(scores)
        first, last = skip_init(nn.Linear, q.shape[1], self.hidden), skip_init(nn.Linear, self.hidden, target.shape[1])
        self.head = nn.Sequential(first, nn.GELU(), last)
        # Start as the classifier that ignores q and predicts the mean target.
        first.weight.normal_(std=q.shape[1] ** -0.5, generator=g), first.bias.zero_()
        last.weight.zero_(), last.bias.copy_((target.mean(dim=0) + 1e-3).log())
        loss = lambda rows: F.cross_entropy(self.head(q[rows]), target[rows])  # noqa: E731
        fit_early_stopped(self, list(self.head.parameters()), q, loss, loss, g)
        return self

    @torch.no_grad()
    def route(self, embeddings):
        return F.softmax(self.head(self.standardize(embeddings)), dim=1)


# ------------------------------------------------------------------------------------------- purifiers


@dataclass
class World:
    """All that a purifier may look at: training questions, never the test."""

    questions: list  # what the student trains on
    visits: list  # visits[step]: the rows of `questions` in that step's batch
    fit_on: list  # what a purifier may be fitted on: the in-domain training questions
    teachers: object  # kp.Teachers: scores(questions), rationales(questions, picks)
    encoder: object  # () -> (sentence encoder, its tokenizer)
    aggregator: object  # () -> (T5, its tokenizer)
    embeddings: dict = field(default_factory=dict)  # {question: (D,)} so far

    def visited(self):
        return sorted({row for rows in self.visits for row in rows})

    def embed(self, questions):
        """-> (N, D), unit length; each question is embedded once."""
        if new := list({q: None for q in questions if q not in self.embeddings}):
            self.embeddings.update(zip(new, models.embed(*self.encoder(), [ask(q) for q in new])))
        return torch.stack([self.embeddings[q] for q in questions])


class Purifier:
    """The interface. The training loop calls `fit` once, then `rationales` before and `feedback` after each step.

    Who has all rationales before training only says how: `purify`. Who learns on the way has its own fit and rationales.
    """

    def __init__(self, args):
        self.args = args

    def fit(self, world):
        """Prepare for world.visits; ask the teachers for what is needed, and only for that. -> self"""
        self.world, self.rows = world, world.visited()
        self.texts = dict(zip(self.rows, self.purify(world, [world.questions[row] for row in self.rows])))
        return self

    def purify(self, world, questions):
        """-> for each of these questions, those of self.rows, the list of rationales to learn."""
        raise NotImplementedError

    def rationales(self, step):
        """-> for each question of this step's batch, the list of rationales to learn."""
        return [self.texts[row] for row in self.world.visits[step]]

    def feedback(self, step, answer_losses, rationale_losses):
        """The student's losses (B,) and (R,) on what it was just given. -> figures for metrics.jsonl."""
        return {}

    def chances(self, row):
        """P(m | question of this row), a list of M; None where the purifier has no such thing."""

    def state(self):
        """Tensors that change while the student trains, for a checkpoint."""
        return {}

    def restore(self, state, step):
        """Take them back, after `fit` and before this step."""

    def fit_questions(self, world, default=None):
        """--fit-questions of the questions that a purifier may be fitted on, drawn by the seed (default: all)."""
        n = self.args.fit_questions or default or len(world.fit_on)
        return random.Random(self.args.seed).sample(world.fit_on, min(n, len(world.fit_on)))


def all_rationales(world, questions):
    """-> for each question, the rationales of all M teachers."""
    M = len(world.teachers)
    texts = world.teachers.rationales([q for q in questions for _ in range(M)], list(range(M)) * len(questions))
    return [texts[i * M : (i + 1) * M] for i in range(len(questions))]


class Answers(Purifier):
    """Control: no rationale at all, the answer alone."""

    def purify(self, world, questions):
        return [[] for _ in questions]


class TinyLLM(Purifier):
    """The baseline (2402.04616), nothing purified: all M rationales of every question, each with its own L_DL."""

    def purify(self, world, questions):
        return all_rationales(world, questions)


class Choice(Purifier):
    """Purifiers that choose one teacher per question before training. A subclass says how: `choose`."""

    def choose(self, world, questions):
        """-> probabilities (N, M); the likeliest teacher writes, and no other is asked to."""
        raise NotImplementedError

    def purify(self, world, questions):
        probabilities = self.choose(world, questions)
        self.probabilities = dict(zip(self.rows, probabilities.tolist()))
        return [[text] for text in world.teachers.rationales(questions, probabilities.argmax(1).tolist())]

    def chances(self, row):
        return self.probabilities[row]


class Single(Choice):
    """Control: always the same teacher, --teacher K."""

    def choose(self, world, questions):
        return F.one_hot(torch.full((len(questions),), self.args.teacher), len(world.teachers)).float()


class Random(Choice):
    """Control: a teacher drawn at random for each question, once."""

    def choose(self, world, questions):
        generator, M = torch.Generator().manual_seed(self.args.seed), len(world.teachers)
        return F.one_hot(torch.randint(M, (len(questions),), generator=generator), M).float()


class Oracle(Choice):
    """Control, the most that choosing can do: the best-scoring teacher of each question, whose answer it needs for that."""

    def choose(self, world, questions):
        return F.one_hot(world.teachers.scores(questions).argmax(1), len(world.teachers)).float()


class Router(Choice):
    """Purification by a router, fitted on the teachers' scores of training questions (--fit-questions of them)."""

    router = SimilarityRouter

    def choose(self, world, questions):
        fit = self.fit_questions(world)
        router = self.router(seed=self.args.seed).fit(world.embed(fit), world.teachers.scores(fit))
        return router.route(world.embed(questions))


class PlackettLuce(Router):
    router = PlackettLuceRouter


class Classifier(Router):
    """PLM classifier: P(m | q) = softmax_m(MLP(encoder(q))), encoder and head trained together.

    ClassifierRouter fits the head on the frozen encoder first; then both are tuned for STEPS steps on the same targets,
    so that the untrained head does not spoil what the encoder knows.
    """

    STEPS, BATCH, LR = 150, 32, 1e-4

    def choose(self, world, questions):
        fit, (encoder, tokenizer) = self.fit_questions(world), world.encoder()
        asked, scores, device = [ask(q) for q in fit], world.teachers.scores(fit), models.device_of(encoder)
        router = ClassifierRouter(seed=self.args.seed).fit(models.embed(encoder, tokenizer, asked), scores)
        targets, ids = router.target(scores), Targets(tokenizer)(asked)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *router.head.parameters()], self.LR)
        draw = random.Random(self.args.seed)
        for _ in tqdm(range(self.STEPS), desc="tune classifier", unit="step", delay=1, leave=False):
            rows = [draw.randrange(len(fit)) for _ in range(self.BATCH)]
            tokens, mask = (x.to(device) for x in models.pad([ids[i] for i in rows]))
            q = (models.pool(encoder, tokens, mask).cpu() - router.standardize.mean.float()) / router.standardize.scale
            F.cross_entropy(router.head(q), targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return router.route(models.embed(encoder, tokenizer, map(ask, questions)))


class Aggregate(Purifier):
    """Knowledge aggregation: a sequence-to-sequence LM reads q and all M rationales and writes one.

    r_P = LM(AGGREGATE(q, r_1 .. r_M)), greedy. An instruction-tuned LM, --aggregator DIR, is used as it is. The micro
    world's T5 is not one: --tune-aggregator steps teach it on a labelled split, --fit-questions of the training questions
    (default 2,000 at most, and half of them), to write the rationale of the teacher who scores highest. Those questions'
    own r_P is that target; it is judged only by what it was not tuned on. Left out: feeding the student's mistakes back.
    """

    BATCH, LR = 16, 1e-3

    @staticmethod
    def prompt(q, rationales):
        listed = " ".join(f"({chr(ord('a') + m)}) {r}" for m, r in enumerate(rationales))
        return f"{listed} {rationale_prompt(q)}"  # as the T5 teacher is asked, with the others' rationales before it

    def purify(self, world, questions):
        (aggregator, tokenizer), texts, ledger = world.aggregator(), {}, world.teachers.ledger
        encode = Targets(tokenizer, max_length=2048)
        frame = chat_format(Path(self.args.aggregator), tokenizer) if self.args.aggregator else "{}"
        if self.args.tune_aggregator:
            fit = self.fit_questions(world, default=min(2000, len(world.fit_on) // 2))
            said, best = all_rationales(world, fit), world.teachers.scores(fit).argmax(1).tolist()
            texts = {q: r[m] for q, r, m in zip(fit, said, best)}
            self.tune(aggregator, encode, [(q, r, texts[q]) for q, r in zip(fit, said)])
        todo = [(q, r) for q, r in zip(questions, all_rationales(world, questions)) if q not in texts]
        prompts = encode([frame.format(self.prompt(q, r)) for q, r in todo])
        for batch in tqdm(models.by_length(prompts, 128), desc="aggregate", unit="batch", delay=1, leave=False):
            tokens, mask = (x.to(self.args.device) for x in models.pad([prompts[i] for i in batch]))
            new = aggregator.generate(tokens, mask, self.args.max_new_tokens).tolist()
            for i, row in zip(batch, new):
                texts[todo[i][0]] = tokenizer.decode(row).strip()
                ledger["aggregator_wrote"] += sum(token != aggregator.config["pad_token_id"] for token in row)
        ledger["aggregator_read"] = sum(map(len, prompts))
        return [[texts[q]] for q in questions]

    def tune(self, aggregator, encode, examples):
        """Cross-entropy on examples (question, M rationales, target), the question's choices in a new order each time."""
        aggregator.train()
        optimizer = torch.optim.AdamW(aggregator.parameters(), self.LR)
        draw = random.Random(self.args.seed)
        for step in tqdm(range(self.args.tune_aggregator), desc="tune aggregator", unit="step", delay=1, leave=False):
            for group in optimizer.param_groups:
                group["lr"] = self.LR * min((step + 1) / 50, 1 - step / self.args.tune_aggregator)
            questions, said, targets = zip(*[draw.choice(examples) for _ in range(self.BATCH)])
            shuffled = [replace(q, choices=tuple(draw.sample(q.choices, len(q.choices)))) for q in questions]
            losses = sequence_losses(aggregator, encode(list(map(self.prompt, shuffled, said))), encode(list(targets)))
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(aggregator.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        aggregator.eval()


class Reinforced(Purifier):
    """RL-based teacher selection: a policy pi(m | q) draws the teacher, the training itself rewards it.

    pi = softmax(W e(q) + b), REINFORCE (Williams 1992): ascend  E[(R - baseline) grad log pi(m | q)] + c grad H(pi).
    Reward  R = 1[the rationale concludes on the gold answer] - beta * z,  z the student's L_DL on that rationale,
    standardised over the batch. The first part can be verified because the teacher was not told the answer; with the
    second alone (an easy text is not a true one) the policy stays at chance. Unlike a router it needs no scores
    beforehand: it learns from what its own choices brought, on training questions only.

    Choices are drawn for AHEAD steps at once, so that each teacher is asked in one batch; the policy has then moved on
    a little, which the importance ratio pi_now / pi_then corrects. Left out of Yuan et al. (AAAI 2021): a subset of
    teachers (one is the point here), their soft labels in the state, the accuracy on a development set in the reward.
    """

    AHEAD, LR, BETA, ENTROPY = 10, 0.02, 0.1, 0.01

    def fit(self, world):
        self.world, rows = world, world.visited()
        e = world.embed([world.questions[row] for row in rows])
        self.states = dict(zip(rows, Standardize(e)(e)))
        self.policy = nn.Linear(e.shape[1], len(world.teachers))
        nn.init.zeros_(self.policy.weight), nn.init.zeros_(self.policy.bias)  # starts uniform
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.LR)
        self.baseline, self.plan, self.last = 0.0, {}, -1  # plan: {step: what look_up found}; last step with feedback
        return self

    def log_policy(self, rows):
        return self.policy(torch.stack([self.states[row] for row in rows])).log_softmax(1)  # (B, M)

    def ahead(self, step):
        return [row for batch in self.world.visits[step : step + self.AHEAD] for row in batch]

    def rationales(self, step):
        if step not in self.plan:
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
            with torch.no_grad():
                logp = self.log_policy(self.ahead(step))
            picks = torch.multinomial(logp.exp(), 1, generator=generator)  # (AHEAD * B, 1)
            self.look_up(step, picks, logp.gather(1, picks)[:, 0])
        return [[text] for text in self.plan[step][-1]]

    def look_up(self, step, picks, logp):
        """Have the rationales of these picks, from `step` on, written; note which conclude on the gold answer."""
        questions = [self.world.questions[row] for row in self.ahead(step)[: len(picks)]]
        texts = self.world.teachers.rationales(questions, picks[:, 0].tolist())
        right = torch.tensor([float(conclusion(t, q.choices) == q.answer) for t, q in zip(texts, questions)])
        B = len(self.world.visits[step])
        batches = [slice(i, i + B) for i in range(0, len(texts), B)]
        self.plan = {step + i: (picks[b], logp[b], right[b], texts[b]) for i, b in enumerate(batches)}

    def feedback(self, step, answer_losses, rationale_losses):
        self.last = step
        rows, (picks, logp_then, right, _) = self.world.visits[step], self.plan[step]
        losses = rationale_losses.float().cpu()
        reward = right - self.BETA * (losses - losses.mean()) / (losses.std(correction=0) + 1e-6)  # (B,)
        logp = self.log_policy(rows)
        entropy = -(logp.exp() * logp).sum(1).mean()
        chosen = logp.gather(1, picks)[:, 0]  # (B,)
        ratio = (chosen.detach() - logp_then).exp()
        loss = -(ratio * (reward - self.baseline) * chosen).mean() - self.ENTROPY * entropy
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.baseline += 0.1 * (reward.mean().item() - self.baseline)
        noted = dict(reward=reward.mean().item(), right=right.mean().item(), entropy=entropy.item())
        if self.args.log_agreement:  # for the reader of metrics.jsonl alone; the policy does not see it
            best = self.world.teachers.scores([self.world.questions[row] for row in rows], count=False).argmax(1)
            noted["agreement"] = (picks[:, 0] == best).float().mean().item()
        return noted

    def chances(self, row):
        return self.log_policy([row]).exp()[0].tolist()

    def state(self):
        tensors = models.state_of(policy=self.policy, optimizer=self.optimizer)
        tensors["baseline"] = torch.tensor(self.baseline, dtype=torch.float64)
        if left := [plan for step, plan in self.plan.items() if step > self.last]:
            tensors["picks"], tensors["logp"] = (torch.cat(x) for x in list(zip(*left))[:2])
        return tensors

    def restore(self, state, step):
        models.restore_state(state, policy=self.policy, optimizer=self.optimizer)
        self.baseline = state["baseline"].item()
        if "picks" in state:
            self.look_up(step, state["picks"], state["logp"])


PURIFIERS = {
    "router": Router, "plackett-luce": PlackettLuce, "classifier": Classifier, "aggregate": Aggregate, "rl": Reinforced,
    "none": TinyLLM, "single": Single, "random": Random, "oracle": Oracle, "answers": Answers,
}  # fmt: skip
