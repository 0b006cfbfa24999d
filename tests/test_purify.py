import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kp
import model
from data.questions import read_questions, train_tokenizer
from purify import (
    Aggregation,
    ClassifierRouter,
    ClassifierRouting,
    PlackettLuceRouter,
    Purifier,
    RandomTeacher,
    VerifiedReinforced,
    Reinforced,
    SimilarityRouter,
    TaskTeacher,
    best_teacher,
    fit_early_stopped,
)

ROUTERS = [SimilarityRouter, PlackettLuceRouter, ClassifierRouter]


def quick(router, **kwargs):
    """Return a router with few training steps, where the test does not need a good one."""
    if router is PlackettLuceRouter:
        return router(**kwargs)
    return router(steps=100, lr=1e-3, **kwargs)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n, m=4, d=32, seed=0, shift=20.0):
    """Return n questions around 2 m centres. On cluster c, teacher c % m scores 0.95, the others 0.25."""
    g = seeded(seed)
    centres = 2 * torch.randn(2 * m, d, generator=g)
    c = torch.randint(2 * m, (n,), generator=g)
    embeddings = centres[c] + torch.randn(n, d, generator=g) + shift
    scores = 0.2 + 0.7 * F.one_hot(c % m, m) + 0.1 * torch.rand(n, m, generator=g)
    return embeddings, scores


def routed(probs, scores):
    """Return the mean score of the teachers that have the highest probability."""
    return scores.gather(1, probs.argmax(dim=1, keepdim=True)).mean().item()


def same_choice(a, b):
    """Return the share of questions for which a and b (N, M) prefer the same teacher."""
    return (a.argmax(dim=1) == b.argmax(dim=1)).float().mean()


# ---- all three routers


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("binary", [False, True])
def test_finds_the_best_teacher_of_each_cluster(router, binary):
    x, s = clusters(1200)
    target = s.round() if binary else s
    held_out = s[800:]
    probs = quick(router).fit(x[:800], target[:800]).route(x[800:])
    assert probs.shape == (400, 4)
    assert probs.dtype == torch.float32
    assert torch.allclose(probs.sum(dim=1), torch.ones(400), atol=1e-5)
    assert (probs >= 0).all()
    assert routed(probs, held_out) >= 0.95 * held_out.amax(dim=1).mean()
    assert abs(probs.amax(dim=1).mean() - same_choice(probs, held_out)) < 0.35  # not far from calibrated


@pytest.mark.parametrize("router", ROUTERS)
def test_never_far_below_the_best_single_teacher(router):
    # Embeddings say nothing, with D > N: only which teacher is best on average is to be learned.
    g = seeded()
    x = torch.randn(500, 512, generator=g)
    mean = torch.tensor([0.2, 0.4, 0.7])
    s = (mean + 0.3 * torch.randn(500, 3, generator=g)).clamp(0, 1)
    value = routed(router().fit(x[:300], s[:300]).route(x[300:]), s[300:])
    assert value > 0.97 * s[300:, 2].mean()


@pytest.mark.parametrize("router", [SimilarityRouter, ClassifierRouter])
def test_large_rare_losses_outweigh_small_frequent_wins(router):
    g = seeded()
    x = torch.randn(400, 16, generator=g)
    win = torch.rand(400, generator=g) < 0.7
    s = torch.stack([torch.full((400,), 0.6), torch.where(win, 0.65, 0.1)], dim=1)
    assert routed(router().fit(x, s).route(x), s) > 0.55  # always the second teacher: 0.485


@pytest.mark.parametrize("router", ROUTERS)
def test_all_ties_give_uniform(router):
    x, _ = clusters(300, m=3)
    probs = quick(router).fit(x, torch.full((300, 3), 0.5)).route(x)
    assert torch.allclose(probs, torch.full_like(probs, 1 / 3), atol=0.02)


@pytest.mark.parametrize("router", ROUTERS)
def test_shift_and_scale_of_embeddings_change_nothing(router):
    x, s = clusters(400, shift=0.0)
    moved = 300 * x + 30000
    a = quick(router).fit(x, s).route(x)
    b = quick(router).fit(moved, s).route(moved)
    assert (a - b).abs().max() < 0.03
    assert same_choice(a, b) > 0.99


@pytest.mark.parametrize("router", ROUTERS)
def test_permuted_teachers_permute_the_answer(router):
    x, s = clusters(600)
    perm = torch.tensor([2, 0, 3, 1])
    a = quick(router).fit(x, s).route(x)[:, perm]
    b = quick(router).fit(x, s[:, perm]).route(x)
    assert same_choice(a, b) > 0.99
    assert (a - b).abs().max() < 0.05


@pytest.mark.parametrize("router", ROUTERS)
def test_deterministic_and_leaves_the_global_generator_alone(router):
    x, s = clusters(200)
    state = torch.get_rng_state()
    a = quick(router, seed=3).fit(x, s).route(x)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    r = quick(router, seed=3)
    assert torch.equal(a, r.fit(x, s).route(x))
    assert torch.equal(a, r.fit(x, s).route(x))  # fitting again starts anew


@pytest.mark.parametrize("router", ROUTERS)
def test_accepts_numpy_and_other_float_types(router):
    x, s = clusters(200, shift=0.0)
    a = quick(router).fit(x, s).route(x)
    array = x.double().numpy()
    b = quick(router).fit(array, s.double().numpy()).route(array)
    assert torch.allclose(a, b, atol=1e-3)
    assert b.dtype == torch.float32
    half = quick(router).fit(x.half(), s.half()).route(x.half().numpy())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_tiny_and_duplicated_data(router, n):
    x, s = clusters(n, m=2)
    probs = quick(router).fit(x, s).route(x)
    assert torch.isfinite(probs).all()
    probs = quick(router).fit(x[:1].expand(50, -1), s[:1].expand(50, -1)).route(x)
    assert torch.isfinite(probs).all()
    assert probs[0].argmax() == s[0].argmax()


@pytest.mark.parametrize("router", ROUTERS)
def test_bad_input_raises(router):
    x, s = clusters(20)
    nan = x.clone()
    nan[3, 1] = math.nan
    inf = s.clone()
    inf[0, 0] = math.inf
    shapes = [(x, s[:10]), (x, s[:, :1]), (x[:0], s[:0]), (x[0], s), (x, s[:, 0])]
    for bad in [*shapes, (nan, s), (x, inf)]:
        with pytest.raises(ValueError):
            quick(router).fit(*bad)
    fitted = quick(router).fit(x, s)
    for bad in [x[:, :5], nan, x[0], x[:0]]:
        with pytest.raises(ValueError):
            fitted.route(bad)


# ---- Plackett-Luce


def choices(scores):
    """Return one question's choices, in plain loops: [(winner, who stands in it, share)]."""
    out = []
    for value in sorted(set(scores), reverse=True):
        group = [m for m, s in enumerate(scores) if s == value]
        standing = [m for m, s in enumerate(scores) if s <= value]
        share = 1.0
        if len(group) == len(standing):
            share = (len(group) - 1) / len(group)
        out += [(m, standing, share) for m in group]
    return out


def slow_log_likelihood(log_xi, scores, weights, prior):
    total = prior * (log_xi.mean() - log_xi.logsumexp(dim=0))
    for row, w in zip(scores.tolist(), weights.tolist(), strict=True):
        for winner, standing, share in choices(row):
            total = total + w * share * (log_xi[winner] - log_xi[standing].logsumexp(dim=0))
    return total


def slow_worths(scores, weights, prior):
    log_xi = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([log_xi], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = -slow_log_likelihood(log_xi, scores, weights, prior)
        loss.backward()
        return loss

    opt.step(closure)
    return log_xi.detach().softmax(dim=0)


def weights_of(x, q, tau):
    """Return exp(cos / tau) after centring by the training mean, scaled to sum 1, for one query."""
    mean = x.mean(dim=0)
    cos = torch.stack([F.cosine_similarity(q - mean, row - mean, dim=0) for row in x])
    w = torch.exp(cos / tau)
    return (w / w.sum()).double()


@pytest.mark.parametrize("m, levels", [(3, 3), (4, 2), (4, 100), (5, 4), (8, 100)])
def test_pl_matches_a_slow_maximiser(m, levels):
    g = seeded(m + levels)
    x = torch.randn(40, 6, generator=g) + 5
    s = torch.randint(levels, (40, m), generator=g) / levels  # few levels: many ties
    queries = torch.randn(2, 6, generator=g) + 5
    router = PlackettLuceRouter(tau=0.5, prior=0.02).fit(x, s)
    cos = F.normalize(router.standardize(queries), dim=1) @ router.q.T
    router.steps = 3000
    got = router.worths(cos, 0.5)
    for q, xi in zip(queries, got, strict=True):
        want = slow_worths(s, weights_of(x, q, 0.5), prior=0.02)
        assert torch.allclose(xi.double(), want, atol=2e-4)
    router.steps = 30
    assert torch.allclose(router.route(queries), got, atol=0.01)  # the default steps come close


def test_pl_of_many_rankings_keeps_all_of_them():
    # Nearly every question has a ranking of its own, but all are made of at most 2^8 - 1 sets.
    x, s = clusters(400, m=8)
    assert len(s.argsort(dim=1).unique(dim=0)) > 350
    router = PlackettLuceRouter(tau=1.0, prior=0.3).fit(x, s)
    assert router.sets.shape[0] < 256
    want = slow_worths((s * 1e6).round(), weights_of(x, x[0], 1.0), prior=0.3)
    assert torch.allclose(router.route(x[:1])[0].double(), want, atol=5e-4)


def test_pl_closed_form_for_two_teachers():
    g = seeded()
    x = torch.randn(50, 4, generator=g)
    s = torch.randint(3, (50, 2), generator=g) / 2
    p = PlackettLuceRouter(tau=0.3, prior=1e-6).fit(x, s).route(x[:3])
    gap = s[:, 0] - s[:, 1]
    for i in range(3):
        w = weights_of(x, x[i], 0.3)
        wins = w[gap > 0].sum()
        losses = w[gap < 0].sum()
        ties = w[gap == 0].sum()
        assert ties > 0
        want = float((wins + ties / 2) / (losses + ties / 2))
        assert p[i, 0] / p[i, 1] == pytest.approx(want, rel=2e-3)


def test_pl_ranks_teachers_and_does_not_average_scores():
    # Teacher 0 beats teacher 1 on three questions of four by 0.01, and loses the fourth by 0.9.
    x = torch.randn(40, 4, generator=seeded())
    s = torch.tensor([[0.51, 0.5]] * 30 + [[0.05, 0.95]] * 10)
    p = PlackettLuceRouter(tau=100.0, prior=1e-6).fit(x, s).route(x[:1])[0]
    assert s[:, 1].mean() > s[:, 0].mean() + 0.2
    assert p[0] == pytest.approx(0.75, abs=0.01)
    squashed = PlackettLuceRouter(tau=100.0, prior=1e-6).fit(x, s**3).route(x[:1])[0]  # same ranks
    assert torch.allclose(p, squashed)


def test_pl_worths_are_those_of_the_likelihood_not_the_share_of_first_places():
    # Teacher 2 is never first, yet often second: only the second choices separate 1 from 2.
    s = torch.tensor([[0.9, 0.5, 0.1]] * 6 + [[0.9, 0.1, 0.5]] * 2 + [[0.1, 0.9, 0.5]] * 2)
    x = torch.randn(10, 4, generator=seeded())
    xi = PlackettLuceRouter(tau=1e6, prior=1e-6, steps=500).fit(x, s).route(x[:1])[0]
    want = slow_worths(s, torch.full((10,), 0.1, dtype=torch.float64), 1e-6)
    assert torch.allclose(xi.double(), want, atol=2e-4)


@pytest.mark.parametrize("levels", [2, 50])
def test_pl_every_step_raises_the_likelihood(levels):
    g = seeded()
    x = torch.randn(40, 6, generator=g)
    s = torch.randint(levels, (40, 5), generator=g) / levels
    router = PlackettLuceRouter(tau=0.2).fit(x, s)
    cos = router.q[:4] @ router.q.T
    slow_weights = [weights_of(x, q, 0.2) for q in x[:4]]
    history = []
    for router.steps in range(25):
        log_xi = router.worths(cos, 0.2).log().double()
        now = [slow_log_likelihood(log_xi[i], s, slow_weights[i], prior=0.01) for i in range(4)]
        history.append(torch.stack(now))
    ll = torch.stack(history)  # (25, 4)
    assert (ll.diff(dim=0) > -1e-5).all()
    assert (ll[-1] > ll[0] + 1e-4).all()


def test_pl_worths_stay_positive_for_a_teacher_that_always_loses():
    x, s = clusters(100, m=3)
    s[:, 2] = 0
    p = PlackettLuceRouter().fit(x, s).route(x)
    assert torch.isfinite(p).all()
    assert (p[:, 2] > 0).all()
    assert (p[:, 2] < 0.05).all()


def test_pl_chooses_a_local_tau_for_clusters_and_a_global_one_for_noise():
    x, s = clusters(400)
    assert PlackettLuceRouter().fit(x, s).tau_route < 1
    g = seeded()
    x = torch.randn(400, 32, generator=g)
    s = (torch.rand(400, 2, generator=g) < torch.tensor([0.3, 0.9])).float()
    assert PlackettLuceRouter().fit(x, s).tau_route >= 0.1


def test_pl_leaving_out_also_leaves_out_duplicates():
    # Every row occurs twice with the same noisy scores; a tau fitted to the copy would be the smallest.
    g = seeded()
    x = torch.randn(150, 32, generator=g).repeat(2, 1)
    s = (torch.rand(150, 2, generator=g) < torch.tensor([0.3, 0.9])).float().repeat(2, 1)
    assert PlackettLuceRouter().fit(x, s).tau_route >= 0.1


# ---- SimilarityRouter and ClassifierRouter


@pytest.mark.parametrize("top_k", [1, 2])
def test_teacher_loss_matches_plain_loops(top_k):
    logits = torch.tensor([[0.3, -1, 2, 0.5], [1, 0, -1, 2], [0.1, 0.2, 0.3, 0.4], [2, 1, 0, 0]])
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.3], [1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0]])
    positives = {1: [[0], [0, 1], [], [1]], 2: [[0, 2], [0, 1], [], [1]]}[top_k]
    got = SimilarityRouter.teacher_loss(logits, scores, top_k)
    for z, plus, loss in zip(logits.tolist(), positives, got.tolist(), strict=True):
        negatives = sum(math.exp(z[m]) for m in range(4) if m not in plus)
        want = 0.0
        for p in plus:
            want -= math.log(math.exp(z[p]) / (math.exp(z[p]) + negatives))
        assert loss == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("cluster", [[0, 0, 1, 1], [0, 0, 0, 1, 1, 2]])
def test_question_loss_matches_plain_loops(cluster):
    n = len(cluster)
    z = F.normalize(torch.randn(n, 5, generator=seeded()), dim=1)
    logits = z @ z.T / 0.4
    got = SimilarityRouter.question_loss(logits, torch.tensor(cluster))
    for i in range(n):
        e = [math.exp(value) for value in logits[i].tolist()]
        friends = [j for j in range(n) if cluster[j] == cluster[i] and j != i]
        strangers = sum(e[j] for j in range(n) if cluster[j] != cluster[i])
        want = 0.0
        for j in friends:
            want -= math.log(e[j] / (e[j] + strangers)) / len(friends)
        assert got[i].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("cluster", [torch.arange(4), torch.zeros(4)])
def test_question_loss_without_a_friend_or_a_stranger_is_zero(cluster):
    logits = torch.randn(4, 4, generator=seeded(), requires_grad=True)
    loss = SimilarityRouter.question_loss(logits, cluster)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (logits.grad == 0).all()


def test_question_loss_pulls_clusters_together():
    # Trained by the question loss alone, vectors of the same cluster come closer.
    g = seeded()
    z = torch.nn.Parameter(torch.randn(40, 8, generator=g))
    cluster = torch.arange(40) % 2
    same = cluster[:, None] == cluster
    gap = []
    opt = torch.optim.Adam([z], lr=0.05)
    for _ in range(60):
        unit = F.normalize(z, dim=1)
        cos = (unit @ unit.T).detach()
        gap.append((cos[same].mean() - cos[~same].mean()).item())
        opt.zero_grad()
        SimilarityRouter.question_loss(unit @ unit.T / 0.2, cluster).mean().backward()
        opt.step()
    assert gap[-1] > gap[0] + 0.5


def test_similarity_router_starts_from_the_mean_and_knows_its_parameters():
    x, s = clusters(300)
    s[:, 1] = 1.0
    router = SimilarityRouter(steps=0).fit(x, s)  # untrained: the best single teacher for every question
    assert (router.route(x).argmax(dim=1) == 1).all()
    z = router.project(router.standardize(x))
    cos = F.cosine_similarity(z[:, None], router.keys[None], dim=2)
    assert torch.allclose(router.route(x), F.softmax(cos / router.tau_route, dim=1), atol=1e-5)


@pytest.mark.parametrize("setting", [dict(lam=1.0), dict(lam=0.0), dict(top_k=2)])
def test_similarity_router_hears_its_settings(setting):
    x, s = clusters(100)
    usual = SimilarityRouter(steps=20).fit(x, s).route(x)
    assert not torch.equal(SimilarityRouter(steps=20, **setting).fit(x, s).route(x), usual)


def test_the_learning_rate_is_that_of_256_dimensions():
    """Of 64 dimensions it is twice as high; a step of AdamW moves a weight by it, less some decay."""
    router = SimpleNamespace(lr=0.01, batch=8, steps=1)
    weight = torch.nn.Parameter(torch.tensor([5.0]))

    def loss(rows):
        return weight.sum()

    fit_early_stopped(router, [weight], loss, loss, torch.zeros(4, 64), seeded())
    assert 5 - weight.item() == pytest.approx(0.02 + 0.02 * 0.01 * 5, abs=1e-4)


def test_similarity_router_is_not_overconfident():
    g = seeded()
    x = torch.randn(600, 16, generator=g)
    s = (torch.rand(600, 3, generator=g) < 0.5).float()
    probs = quick(SimilarityRouter).fit(x[:300], s[:300]).route(x[300:])
    assert probs.amax(dim=1).mean() < 0.6  # scores are coin flips


def test_classifier_targets():
    s = torch.tensor([[0.9, 0.1, 0.9], [0.2, 0.4, 0.3], [0.5, 0.5, 0.5]])
    hard = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(best_teacher(s), hard)
    soft = torch.stack([torch.exp(row / 0.5) / torch.exp(row / 0.5).sum() for row in s])
    assert torch.allclose(ClassifierRouter(temperature=0.5).target(s), soft)
    x, s = clusters(1000)
    router = quick(ClassifierRouter).fit(x[:700], s[:700])
    assert isinstance(router.head, torch.nn.Module)
    assert routed(router.route(x[700:]), s[700:]) >= 0.95 * s[700:].amax(dim=1).mean()


# ---- REINFORCE


class Bandit:
    """Teachers of questions in 8 clusters: c % 4 is right on 95 % of cluster c, the others on 25 %."""

    def __init__(self, steps, n=600, batch=16):
        g = torch.Generator().manual_seed(0)
        self.vectors, scores = clusters(n)
        self.best = scores.argmax(dim=1)
        self.questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 0) for i in range(n)]
        self.visits = [torch.randint(n, (batch,), generator=g).tolist() for _ in range(steps)]
        is_best = F.one_hot(self.best, 4).bool()
        self.right = torch.rand(n, 4, generator=g) < torch.where(is_best, 0.95, 0.25)
        self.asked = 0

    def __len__(self):
        return 4

    def rationales(self, questions, picks):
        self.asked += len(questions)
        texts = []
        for q, m in zip(questions, picks):
            answer = "yes" if self.right[int(q.id), m] else "no"
            texts.append(f"the answer is {answer}")
        return texts

    def policy(self, seed=0):
        """Return the purifier under test, fitted: it embeds a question as the bandit does."""
        args = SimpleNamespace(seed=seed, purifier="rl-verified")
        policy = VerifiedReinforced(args, self.questions, self.visits, self.questions, self, open_lm=None)
        policy.embed = lambda questions: self.vectors[[int(q.id) for q in questions]]
        policy.fit()
        return policy


def losses_on(rationales):
    """Return the kp.DualLoss of a student that had these losses (B,) on its rationales."""
    return kp.DualLoss(rationales.mean(), rationales, rationales, tokens=0, padded=0)


def play(bandit, steps, seed=0):
    """Return the policy after these steps and, of each step, the share of draws of the best arm."""
    policy = bandit.policy(seed)
    g = torch.Generator().manual_seed(seed)
    hits = []
    for step in range(steps):
        policy.rationales(step)
        picks = policy.picks[step]
        hits.append((picks == bandit.best[bandit.visits[step]]).float().mean().item())
        losses = torch.rand(len(bandit.visits[step]), generator=g)  # of the student: they say nothing
        policy.feedback(step, losses_on(losses))
    return policy, hits


def test_rl_finds_the_best_arm_of_a_contextual_bandit():
    bandit = Bandit(300)
    policy, hits = play(bandit, 300)
    assert abs(sum(hits[:10]) / 10 - 0.25) < 0.1  # at first at random
    assert sum(hits[80:100]) / 20 > 0.6 and sum(hits[-50:]) / 50 > 0.9
    greedy = policy.log_policy(policy.rows).argmax(1)
    assert (greedy == bandit.best[policy.rows]).float().mean() > 0.95
    assert bandit.asked == 300 * 16  # one rationale a visit: it pays for its own choices only


def test_rl_s_step_is_the_gradient_of_the_expected_reward():
    # Enumerate what REINFORCE samples: over all picks, the mean of its gradients is exactly that of
    # sum_m pi(m) R(m) + c H(pi).
    bandit = Bandit(20)
    row = bandit.visits[0][0]
    policy = bandit.policy()
    policy.visits = [[row]]
    policy.visited = torch.tensor([[row]])
    torch.manual_seed(0)
    with torch.no_grad():
        policy.policy[2].weight.normal_(std=0.1)
    right = bandit.right[row].float()
    logp = policy.log_policy([row])[0]
    objective = logp.exp() @ right - policy.ENTROPY * logp.exp() @ logp
    (exact,) = torch.autograd.grad(-objective, policy.policy[2].weight)

    gradients = []
    policy.policy[2].weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    expected = torch.zeros_like(exact)
    for m in range(4):
        logp = policy.log_policy([row])[0].detach()
        policy.optimizer = torch.optim.SGD(policy.policy.parameters(), 0.0)
        policy.baseline = 0.3
        policy.picks = torch.tensor([[m]])
        policy.logp = logp[m].view(1, 1)
        policy.rewards = right[m].view(1, 1)
        policy.learn(0)
        expected += logp[m].exp() * gradients[-1]
    assert torch.allclose(expected, exact, atol=1e-6)


def test_rl_corrects_for_a_policy_that_moved_on():
    """pi_now / pi_then is 3, which counts as 2, and 1/2. Rewards count above the baseline."""
    policy = Bandit(1, batch=2).policy()
    policy.ENTROPY = 0.0
    policy.baseline = 0.3
    policy.picks = torch.tensor([[0, 1]])
    policy.rewards = torch.tensor([[1.0, 0.5]])
    chosen = policy.log_policy(policy.visited[0])[[0, 1], [0, 1]]
    policy.logp = (chosen.detach() - torch.tensor([3.0, 0.5]).log())[None]
    gain = (2 * 0.7 * chosen[0] + 0.5 * 0.2 * chosen[1]) / 2
    (expected,) = torch.autograd.grad(-gain, policy.policy[2].weight)
    policy.learn(0)
    assert torch.allclose(policy.policy[2].weight.grad, expected, atol=1e-6)


def test_rl_verified_rewards_what_is_right_and_a_little_what_is_easy():
    bandit = Bandit(1, batch=4)
    policy = bandit.policy()
    policy.rationales(0)
    right = bandit.right[bandit.visits[0], policy.picks[0]].float()
    easy = torch.tensor([1.0, 2.0, 3.0, 6.0])  # the losses: mean 3, deviation sqrt(3.5)
    expected = right - 0.1 * (easy - 3) / 3.5**0.5
    assert torch.allclose(policy.reward(0, losses_on(easy)), expected, atol=1e-4)


def test_rl_draws_anew_and_learns_again_from_earlier_steps(monkeypatch):
    bandit = Bandit(20)
    bandit.visits = bandit.visits[:1] * 20
    policy = bandit.policy()
    learned = []
    monkeypatch.setattr(policy, "learn", lambda step: learned.append(step) or torch.tensor(0.0))
    for step in range(12):
        policy.rationales(step)
        del learned[:]
        policy.feedback(step, losses_on(torch.rand(16, generator=seeded())))
    assert learned[0] == 11 and len(set(learned)) == 5 and max(learned[1:]) < 11
    assert not torch.equal(policy.picks[:10], policy.picks[10:])  # the same questions, by the same policy


def test_rl_goes_on_from_its_state_as_if_it_had_not_stopped():
    bandit = Bandit(25)
    whole, _ = play(bandit, 25)
    stopped, _ = play(bandit, 13)  # in the middle of what was drawn ahead
    again = bandit.policy()
    again.restore(stopped.state(), 13)
    g = torch.Generator().manual_seed(0)
    for step in range(25):
        losses = torch.rand(16, generator=g)
        if step >= 13:
            again.rationales(step)
            again.feedback(step, losses_on(losses))
    assert torch.equal(again.policy[2].weight, whole.policy[2].weight)
    assert again.baseline == whole.baseline
    assert torch.equal(again.picks, whole.picks)
    assert torch.equal(again.rewards, whole.rewards)
    assert again.written == whole.written
    assert [again.given(row) for row in again.rows] == [whole.given(row) for row in whole.rows]
    for name in ("picks", "logp", "rewards"):  # a number a visit
        assert whole.state()[name].shape == (25, 16)


# ---- aggregation and the classifier, in other formats than the micro world's


def texts_of(questions, open_another=None):
    """Return two teachers that are texts."""
    teachers = []
    for name in ("a", "b"):
        rationales = {}
        scores = {}
        for i, q in enumerate(questions):
            rationales[q.id] = f"{q.choices[0]} {name}"
            scores[q.id] = 0.9 if name == "ab"[i % 2] else 0.2
        teachers.append(kp.TextTeacher(name, rationales, scores, kp.Judge(lambda: None)))
    return kp.Teachers(teachers, open_another)


def fitted(purifier, questions, open_lm, open_another=None, **settings):
    """Return a purifier that is fitted for one batch of all questions."""
    defaults = dict(seed=0, max_new_tokens=20, fit_questions=None, encoder=None, aggregator=None, router=None)
    args = SimpleNamespace(**{**defaults, "tune_aggregator": 0, "batch_tokens": 2**14, **settings})
    visits = [list(range(len(questions)))]
    made = purifier(args, questions, visits, questions, texts_of(questions, open_another), open_lm)
    made.open()
    made.fit()
    return made


def test_padding_does_not_count_as_written_by_a_llama_without_a_pad_token(
    world, teacher_folders, tmp_path, monkeypatch
):
    shutil.copytree(teacher_folders[1], tmp_path / "llama")
    config = model.read_json(tmp_path / "llama" / "config.json")
    config["pad_token_id"] = None
    config["eos_token_id"] = list(range(1, config["vocab_size"], 7))  # rows end at different lengths
    model.write_json(tmp_path / "llama" / "config.json", config)
    questions = read_questions(world / "train.jsonl")[:12]
    aggregator = str(tmp_path / "llama")

    def open_another(path):
        return kp.CheckpointTeacher(path, tmp_path / "cache", kp.Asking(max_new_tokens=20))

    made = fitted(Aggregation, questions, None, open_another, aggregator=aggregator)

    lm, tokenizer = model.load(aggregator)
    read = []
    wrote = []
    for q, said in zip(questions, made.teachers.all_rationales(questions)):
        ids = torch.tensor([tokenizer.encode(kp.aggregation_prompt(q, said)).ids])
        new = lm.generate(ids, torch.ones_like(ids), 20)[0].tolist()  # alone: no padding
        assert made.texts[questions.index(q)] == [tokenizer.decode(new).strip()]
        read.append(ids.numel())
        wrote.append(len(new))
    assert len(set(wrote)) > 2
    assert made.ledger == {"aggregator_read": sum(read), "aggregator_wrote": sum(wrote)}

    monkeypatch.setattr(model, "load", lambda *rest: pytest.fail("another run asked again"))
    again = fitted(Aggregation, questions, None, open_another, aggregator=aggregator)
    assert again.texts == made.texts and again.ledger == made.ledger


@pytest.mark.parametrize("purifier", [Aggregation, ClassifierRouting])
def test_a_bfloat16_checkpoint_is_tuned_in_float32(world, teacher_folders, monkeypatch, purifier):
    monkeypatch.setattr(ClassifierRouting, "STEPS", 3)
    questions = read_questions(world / "train.jsonl")[:8]
    tuned = []
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        lm, tokenizer = model.load(teacher_folders[0], dtype=torch.bfloat16)
        tuned.append(lm.to(dtype))

        def open_lm(path):
            return tuned[-1], tokenizer

        made = fitted(purifier, questions, open_lm, tune_aggregator=3, fit_questions=6)
        results.append([(made.given(row), made.probabilities(row)) for row in made.rows])
    stored, _ = model.load(teacher_folders[0], dtype=torch.bfloat16)
    moved = 0
    for before, a, b in zip(stored.parameters(), tuned[0].parameters(), tuned[1].parameters()):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)  # as if the checkpoint had been stored in float32
        moved += not torch.equal(before.float(), a)
    assert moved > 0
    assert results[0] == results[1]


def test_a_classifier_s_last_head_is_fitted_on_the_tuned_encoder(world, teacher_folders, monkeypatch):
    monkeypatch.setattr(ClassifierRouting, "STEPS", 3)
    questions = read_questions(world / "train.jsonl")[:8]
    lm, tokenizer = model.load(teacher_folders[0])
    made = fitted(ClassifierRouting, questions, lambda path: (lm, tokenizer), fit_questions=6)
    texts = [kp.with_choices(q) for q in made.questions_to_fit_on()]
    assert torch.allclose(made.kept()["embeddings"], model.embed(lm, tokenizer, texts), atol=1e-5)


@pytest.mark.parametrize("rationale, shuffles", [("so it is yes", True), ("so the answer is (b)", False)])
def test_choices_are_not_shuffled_under_the_letters_of_rationales(teacher_folders, monkeypatch, rationale, shuffles):
    choices = ("yes", "no", "maybe", "never")
    questions = [kp.Question(str(i), "t", f"question {i}?", choices, 1) for i in range(4)]
    lm, tokenizer = model.load(teacher_folders[0])
    seen = set()
    prompt = kp.aggregation_prompt
    monkeypatch.setattr(kp, "aggregation_prompt", lambda q, texts: seen.add(q.choices) or prompt(q, texts))
    args = SimpleNamespace(seed=0, tune_aggregator=2)
    scores = torch.tensor([[0.9, 0.1]] * 4)
    teachers = SimpleNamespace(all_rationales=lambda qs: [[rationale, "no"] for _ in qs], scores=lambda qs: scores)
    made = Aggregation(args, questions, [[0]], questions, teachers, None)
    made.tune(lm, kp.TokenCache(tokenizer), questions)
    assert (len(seen) > 1) == shuffles


def test_an_aggregator_is_taught_what_the_best_teacher_wrote(teacher_folders, monkeypatch):
    questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 1) for i in range(4)]
    lm, tokenizer = model.load(teacher_folders[0])
    asked = []
    taught = set()
    pairs = kp.TokenCache.pairs

    def note(self, lm, prompts, texts):
        asked.extend(prompts)
        taught.update(texts)
        return pairs(self, lm, prompts, texts)

    monkeypatch.setattr(kp.TokenCache, "pairs", note)
    scores = torch.tensor([[0.1, 0.9]] * 4)
    said = [["bad", "good"]] * 4
    teachers = SimpleNamespace(all_rationales=lambda qs: said, scores=lambda qs: scores)
    args = SimpleNamespace(seed=0, tune_aggregator=2)
    made = Aggregation(args, questions, [[0]], questions, teachers, None)
    made.tune(lm, kp.TokenCache(tokenizer), questions)
    assert taught == {"good"} and not lm.training
    orders = "Rationale 1: bad Rationale 2: good", "Rationale 1: good Rationale 2: bad"
    assert all(any(order in prompt for prompt in asked) for order in orders)


def test_a_tuned_aggregator_s_tokens_are_counted(monkeypatch):
    questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 0) for i in range(10)]
    args = SimpleNamespace(seed=0, max_new_tokens=20, batch_tokens=99)
    made = Aggregation(args, questions, [[0]], questions, texts_of(questions), None)
    limits = set()

    def write(lm, tokenizer, prompts, *rest):
        limits.add(rest)
        return [("so", 3)] * len(prompts)

    monkeypatch.setattr(kp, "write", write)
    token_cache = kp.TokenCache(train_tokenizer(questions))
    for half in (questions[:4], questions[4:]):
        assert made.write(None, token_cache, half) == ["so"] * len(half)
    prompts = map(kp.aggregation_prompt, questions, made.teachers.all_rationales(questions))
    read = sum(map(len, token_cache.prompts(prompts)))
    assert made.ledger == {"aggregator_read": read, "aggregator_wrote": 30} and limits == {(20, 99)}


def test_no_purified_text_was_taught_to_its_writer(monkeypatch):
    """Each half of the fitting questions teaches one aggregator; the other one writes for it."""
    questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 0) for i in range(10)]
    taught = []
    pairs = []

    def write(self, aggregator, token_cache, todo):
        pairs.extend((q.id, tuple(taught[-1])) for q in todo)
        return [f"written after {len(taught)}" for _ in todo]

    def tune(self, aggregator, token_cache, half):
        taught.append([q.id for q in half])

    def open_lm(path):
        return SimpleNamespace(folder=None, config={"model_type": "t5"}), train_tokenizer(questions)

    monkeypatch.setattr(Aggregation, "tune", tune)
    monkeypatch.setattr(Aggregation, "write", write)
    made = fitted(Aggregation, questions, open_lm, tune_aggregator=3, fit_questions=6)
    assert len(taught) == 2 and len(set(taught[0]) | set(taught[1])) == 6
    assert sorted(name for name, _ in pairs) == sorted(q.id for q in questions)  # each is written once
    assert all(name not in half for name, half in pairs)
    assert all(len(made.given(row)) == 1 for row in made.rows)


def test_the_published_rl_draws_by_its_sigmoids_and_sees_only_right_rationales():
    questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 0) for i in range(4)]
    visits = [[0, 1, 2, 3]] * 3
    made = Reinforced(SimpleNamespace(seed=0), questions, visits, questions, Sayings(), None)
    made.embed_texts = lambda texts: torch.tensor([[float(len(text)), 1.0] for text in texts])
    made.fit()
    state = made.states[2]  # (M, 2 D)
    assert torch.equal(state[0, 2:], torch.tensor([len("the answer is yes"), 1.0]))  # right: it is seen
    assert torch.equal(state[1, 2:], torch.zeros(2))  # wrong: it is not
    with torch.no_grad():
        made.policy[2].weight.normal_()
    chances = made.policy(torch.stack([made.states[row] for row in range(4)]))[..., 0].sigmoid()
    assert torch.allclose(made.log_policy([0, 1, 2, 3]).exp(), chances / chances.sum(1, keepdim=True))
    made.rationales(0)
    loss = kp.DualLoss(None, torch.tensor([1.0, 2, 3, 4]), torch.full((4,), 0.5), 0, 0)
    assert torch.equal(made.reward(0, loss), torch.tensor([-1.5, -2.5, -3.5, -4.5]))
    with torch.no_grad():
        made.policy[2].bias.fill_(-1000.0)  # where each sigmoid is 0 in float32
    assert torch.allclose(made.log_policy([0, 1, 2, 3]).exp().sum(1), torch.ones(4))


class Sayings:
    """Two teachers: the first is always right, the second never."""

    def __len__(self):
        return 2

    def all_rationales(self, questions):
        return [["the answer is yes", "the answer is no"] for _ in questions]

    def rationales(self, questions, picks):
        return [("the answer is yes", "the answer is no")[m] for m in picks]


def test_a_purifier_is_fitted_on_a_draw_of_the_questions_for_that():
    questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 0) for i in range(20)]
    fit_on = questions[10:]

    def drawn(fit_questions, seed=0, **default):
        args = SimpleNamespace(seed=seed, fit_questions=fit_questions)
        return Purifier(args, questions[:10], [], fit_on, None, None).questions_to_fit_on(**default)

    assert len(drawn(4, default=3)) == 4 and set(drawn(4)) <= set(fit_on)
    assert drawn(4) == drawn(4) != drawn(4, seed=1) and drawn(4) != fit_on[:4]
    assert len(drawn(None, default=3)) == 3
    assert sorted(drawn(None), key=fit_on.index) == sorted(drawn(99), key=fit_on.index) == fit_on


def test_after_fit_no_embedding_stays_in_memory():
    made = Purifier(SimpleNamespace(seed=0), [], [], [], None, None)
    made.embeddings["a text"] = torch.zeros(2)
    made.close_encoder()
    assert not made.embeddings


def test_a_random_teacher_is_drawn_by_the_seed():
    def picks(seed):
        made = RandomTeacher(SimpleNamespace(seed=seed), [], [], [], Sayings(), None)
        return made.choose(range(30)).tolist()

    assert picks(0) == picks(0) != picks(1) and [1.0, 0.0] in picks(0) and [0.0, 1.0] in picks(0)


def test_the_best_teacher_of_each_task_and_of_all_where_a_task_is_new():
    def q(i, task):
        return kp.Question(str(i), task, f"question {i}?", ("yes", "no"), 0)

    fit = [q(0, "a"), q(1, "a"), q(2, "b")]
    scores = {"0": (0.9, 0.1), "1": (0.2, 0.4), "2": (0.0, 0.3)}
    teachers = SimpleNamespace(scores=lambda qs: torch.tensor([scores[q.id] for q in qs]), __len__=None)
    made = TaskTeacher(SimpleNamespace(seed=0, fit_questions=None), fit, [[0]], fit, teachers, None)
    made.certain = lambda picks: picks.tolist()
    assert made.choose([q(5, "b"), q(6, "a"), q(7, "new")]) == [1, 0, 0]  # means .37 and .27 over all
