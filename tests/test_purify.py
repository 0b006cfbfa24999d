import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kp
from purify import ClassifierRouter, PlackettLuceRouter, Reinforced, SimilarityRouter, best_teacher

ROUTERS = [SimilarityRouter, PlackettLuceRouter, ClassifierRouter]


def quick(router, **kwargs):
    """A router with few training steps, where the test does not need a good one."""
    return router(**kwargs) if router is PlackettLuceRouter else router(steps=100, lr=1e-3, **kwargs)


def clusters(n, m=4, d=32, seed=0, shift=20.0):
    """n questions around 2 m centres; teacher c % m is good on cluster c, the others bad (0.95, 0.25)."""
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(2 * m, d, generator=g)
    c = torch.randint(2 * m, (n,), generator=g)
    embeddings = centres[c] + torch.randn(n, d, generator=g) + shift
    scores = 0.2 + 0.7 * F.one_hot(c % m, m) + 0.1 * torch.rand(n, m, generator=g)
    return embeddings, scores


def routed(probs, scores):
    return scores.gather(1, probs.argmax(dim=1, keepdim=True)).mean().item()


# ---- all three routers

@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("binary", [False, True])
def test_finds_the_best_teacher_of_each_cluster(router, binary):
    x, s = clusters(1200)
    target = s.round() if binary else s
    probs = quick(router).fit(x[:800], target[:800]).route(x[800:])
    assert probs.shape == (400, 4) and probs.dtype == torch.float32
    assert torch.allclose(probs.sum(dim=1), torch.ones(400), atol=1e-5) and (probs >= 0).all()
    assert routed(probs, s[800:]) >= 0.95 * s[800:].amax(dim=1).mean()
    best = probs.argmax(dim=1) == s[800:].argmax(dim=1)
    assert abs(probs.amax(dim=1).mean() - best.float().mean()) < 0.35  # not far from calibrated


@pytest.mark.parametrize("router", ROUTERS)
def test_never_far_below_the_best_single_teacher(router):
    # Embeddings say nothing, with D > N: only which teacher is best on average is to be learned.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 512, generator=g)
    s = (torch.tensor([0.2, 0.4, 0.7]) + 0.3 * torch.randn(500, 3, generator=g)).clamp(0, 1)
    value = routed(router().fit(x[:300], s[:300]).route(x[300:]), s[300:])
    assert value > 0.97 * s[300:, 2].mean()


@pytest.mark.parametrize("router", [SimilarityRouter, ClassifierRouter])
def test_large_rare_losses_outweigh_small_frequent_wins(router):
    g = torch.Generator().manual_seed(0)
    x, win = torch.randn(400, 16, generator=g), torch.rand(400, generator=g) < 0.7
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
    a = quick(router).fit(x, s).route(x)
    b = quick(router).fit(300 * x + 30000, s).route(300 * x + 30000)
    assert (a - b).abs().max() < 0.03
    assert (a.argmax(dim=1) == b.argmax(dim=1)).float().mean() > 0.99


@pytest.mark.parametrize("router", ROUTERS)
def test_permuted_teachers_permute_the_answer(router):
    x, s = clusters(600)
    perm = torch.tensor([2, 0, 3, 1])
    a = quick(router).fit(x, s).route(x)[:, perm]
    b = quick(router).fit(x, s[:, perm]).route(x)
    assert (a.argmax(dim=1) == b.argmax(dim=1)).float().mean() > 0.99
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
    b = quick(router).fit(x.double().numpy(), s.double().numpy()).route(x.double().numpy())
    assert torch.allclose(a, b, atol=1e-3) and b.dtype == torch.float32
    assert quick(router).fit(x.half(), s.half()).route(x.half().numpy()).dtype == torch.float32


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_tiny_and_duplicated_data(router, n):
    x, s = clusters(n, m=2)
    probs = quick(router).fit(x, s).route(x)
    assert torch.isfinite(probs).all()
    probs = quick(router).fit(x[:1].expand(50, -1), s[:1].expand(50, -1)).route(x)
    assert torch.isfinite(probs).all() and (probs[0].argmax() == s[0].argmax())


@pytest.mark.parametrize("router", ROUTERS)
def test_bad_input_raises(router):
    x, s = clusters(20)
    nan, inf = x.clone(), s.clone()
    nan[3, 1], inf[0, 0] = math.nan, math.inf
    for bad in [(x, s[:10]), (x, s[:, :1]), (x[:0], s[:0]), (nan, s), (x, inf), (x[0], s), (x, s[:, 0])]:
        with pytest.raises(ValueError):
            quick(router).fit(*bad)
    fitted = quick(router).fit(x, s)
    for bad in [x[:, :5], nan, x[0], x[:0]]:
        with pytest.raises(ValueError):
            fitted.route(bad)


# ---- Plackett-Luce

def stages(scores):
    """One question's choices, in plain loops, under the tie rule: [(winner, risk set, share)]."""
    out = []
    for value in sorted(set(scores), reverse=True):
        group = [m for m, s in enumerate(scores) if s == value]
        risk = [m for m, s in enumerate(scores) if s <= value]
        share = (len(group) - 1) / len(group) if len(group) == len(risk) else 1.0
        out += [(m, risk, share) for m in group]
    return out


def slow_log_likelihood(log_xi, scores, weights, prior):
    total = prior * (log_xi.mean() - log_xi.logsumexp(dim=0))
    for row, w in zip(scores.tolist(), weights.tolist(), strict=True):
        for winner, risk, share in stages(row):
            total = total + w * share * (log_xi[winner] - log_xi[risk].logsumexp(dim=0))
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
    """exp(cos / tau) after centring by the training mean, normalised to sum 1, for one query."""
    mean = x.mean(dim=0)
    w = torch.stack([torch.exp(F.cosine_similarity(q - mean, row - mean, dim=0) / tau) for row in x])
    return (w / w.sum()).double()


@pytest.mark.parametrize("m, levels, neighbours", [(3, 3, 512), (4, 2, 512), (4, 100, 512), (5, 4, 40)])
def test_pl_matches_a_slow_maximiser(m, levels, neighbours):
    g = torch.Generator().manual_seed(m + levels)
    x = torch.randn(40, 6, generator=g) + 5
    s = torch.randint(levels, (40, m), generator=g) / levels  # few levels: many ties
    queries = torch.randn(2, 6, generator=g) + 5
    router = PlackettLuceRouter(tau=0.5, prior=0.02, neighbours=neighbours).fit(x, s)
    cos = F.normalize(router.standardize(queries), dim=1) @ router.q.T
    router.steps = 3000
    got = router.worths(*router.weigh(cos, 0.5), tol=0)
    for q, xi in zip(queries, got, strict=True):
        want = slow_worths(s, weights_of(x, q, 0.5), prior=0.02)
        assert torch.allclose(xi.double(), want, atol=2e-4)
    router.steps = 30
    assert torch.allclose(router.route(queries), got, atol=0.01)  # the default steps come close


def test_pl_nearest_neighbours_only_drop_the_rest():
    # 6 rankings occur, more than 5 neighbours.
    x, s = clusters(60, m=3)
    few = PlackettLuceRouter(tau=1.0, prior=0.3, neighbours=5).fit(x, s).route(x[:1])
    w = weights_of(x, x[0], 1.0)
    near = w.topk(5).indices
    want = slow_worths((s * 1e6).round()[near], w[near] / w[near].sum(), prior=0.3)
    assert torch.allclose(few[0].double(), want, atol=0.01)


def test_pl_closed_form_for_two_teachers():
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(50, 4, generator=g), torch.randint(3, (50, 2), generator=g) / 2
    p = PlackettLuceRouter(tau=0.3, prior=1e-6).fit(x, s).route(x[:3])
    for i in range(3):
        w = weights_of(x, x[i], 0.3)
        gap = s[:, 0] - s[:, 1]
        wins, losses, ties = w[gap > 0].sum(), w[gap < 0].sum(), w[gap == 0].sum()
        assert ties > 0
        assert p[i, 0] / p[i, 1] == pytest.approx(float((wins + ties / 2) / (losses + ties / 2)), rel=2e-3)


def test_pl_ranks_teachers_and_does_not_average_scores():
    # Teacher 0 beats teacher 1 on three questions of four by 0.01, and loses the fourth by 0.9.
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    s = torch.tensor([[0.51, 0.5]] * 30 + [[0.05, 0.95]] * 10)
    p = PlackettLuceRouter(tau=100.0, prior=1e-6).fit(x, s).route(x[:1])[0]
    assert s[:, 1].mean() > s[:, 0].mean() + 0.2
    assert p[0] == pytest.approx(0.75, abs=0.01)
    squashed = PlackettLuceRouter(tau=100.0, prior=1e-6).fit(x, s**3).route(x[:1])[0]  # same ranks
    assert torch.allclose(p, squashed)


def test_pl_worths_are_those_of_the_likelihood_not_the_share_of_first_places():
    # Teacher 2 is first as rarely as never, yet second often: only the second choices separate 1 from 2.
    s = torch.tensor([[0.9, 0.5, 0.1]] * 6 + [[0.9, 0.1, 0.5]] * 2 + [[0.1, 0.9, 0.5]] * 2)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    xi = PlackettLuceRouter(tau=1e6, prior=1e-6, steps=500).fit(x, s).route(x[:1])[0]
    want = slow_worths(s, torch.full((10,), 0.1, dtype=torch.float64), 1e-6)
    assert torch.allclose(xi.double(), want, atol=2e-4)


@pytest.mark.parametrize("levels", [2, 50])
def test_pl_every_step_raises_the_likelihood(levels):
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(60, 6, generator=g), torch.randint(levels, (60, 5), generator=g) / levels
    router = PlackettLuceRouter(tau=0.2).fit(x, s)
    weights, ranking = router.weigh(router.q[:8] @ router.q.T, 0.2)
    ll = []
    for router.steps in range(25):
        xi = router.worths(weights, ranking, tol=0).log().double()
        ll.append(torch.stack([slow_log_likelihood(xi[i], s, weights_of(x, x[i], 0.2), prior=0.01) for i in range(8)]))
    ll = torch.stack(ll)
    assert (ll.diff(dim=0) > -1e-5).all() and (ll[-1] > ll[0] + 1e-4).all()


def test_pl_worths_stay_positive_for_a_teacher_that_always_loses():
    x, s = clusters(100, m=3)
    s[:, 2] = 0
    p = PlackettLuceRouter().fit(x, s).route(x)
    assert torch.isfinite(p).all() and (p[:, 2] > 0).all() and (p[:, 2] < 0.05).all()


def test_pl_chooses_a_local_tau_for_clusters_and_a_global_one_for_noise():
    x, s = clusters(400)
    assert PlackettLuceRouter().fit(x, s).tau_route < 1
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=g)
    s = (torch.rand(400, 2, generator=g) < torch.tensor([0.3, 0.9])).float()
    assert PlackettLuceRouter().fit(x, s).tau_route >= 0.1


def test_pl_leaving_out_also_leaves_out_duplicates():
    # Every row occurs twice with the same noisy scores; a tau fitted to the copy would be the smallest.
    g = torch.Generator().manual_seed(0)
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
        minus = [m for m in range(4) if m not in plus]
        want = 0.0
        for p in plus:
            want -= math.log(math.exp(z[p]) / (math.exp(z[p]) + sum(math.exp(z[n]) for n in minus)))
        assert loss == pytest.approx(want, abs=1e-5)


def test_question_loss_matches_plain_loops():
    # One friend each and exactly H strangers, so that the random draw has no choice.
    z = F.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    cluster, tau = torch.tensor([0, 0, 1, 1]), 0.4
    got = SimilarityRouter.question_loss(z, cluster, 2, tau, torch.Generator().manual_seed(0))
    want = 0.0
    for i, plus, minus in [(0, 1, [2, 3]), (1, 0, [2, 3]), (2, 3, [0, 1]), (3, 2, [0, 1])]:
        e = {j: math.exp(float(z[i] @ z[j]) / tau) for j in [plus, *minus]}
        want -= math.log(e[plus] / sum(e.values())) / 4
    assert got.item() == pytest.approx(want, abs=1e-5)
    alone = SimilarityRouter.question_loss(z, torch.arange(4), 2, tau, torch.Generator().manual_seed(0))
    same = SimilarityRouter.question_loss(z, torch.zeros(4), 2, tau, torch.Generator().manual_seed(0))
    assert alone.item() == 0 and same.item() == 0  # no friend, or no stranger


def test_question_loss_pulls_clusters_together():
    # Teachers tie everywhere, so only the question loss is left: same-cluster questions must come closer.
    x, s = clusters(300, m=2, d=16)
    g = torch.Generator().manual_seed(0)
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
        SimilarityRouter.question_loss(unit, cluster, 3, 0.2, g).backward()
        opt.step()
    assert gap[-1] > gap[0] + 0.5


def test_similarity_router_starts_from_the_mean_and_knows_its_parameters():
    x, s = clusters(300)
    s[:, 1] = 1.0
    router = SimilarityRouter(steps=0).fit(x, s)  # untrained: the best single teacher for every question
    assert (router.route(x).argmax(dim=1) == 1).all()
    z = router.project(router.standardize(x))
    cos = F.cosine_similarity(z[:, None], router.teachers[None], dim=2)
    assert torch.allclose(router.route(x), F.softmax(cos / router.tau_route, dim=1), atol=1e-5)


def test_similarity_router_is_not_overconfident():
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(600, 16, generator=g), (torch.rand(600, 3, generator=g) < 0.5).float()
    probs = quick(SimilarityRouter).fit(x[:300], s[:300]).route(x[300:])
    assert probs.amax(dim=1).mean() < 0.6  # scores are coin flips


def test_classifier_targets():
    s = torch.tensor([[0.9, 0.1, 0.9], [0.2, 0.4, 0.3], [0.5, 0.5, 0.5]])
    hard = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(ClassifierRouter(targets="hard").target(s), hard)
    assert torch.allclose(best_teacher(s), hard)
    soft = torch.stack([torch.exp(row / 0.5) / torch.exp(row / 0.5).sum() for row in s])
    assert torch.allclose(ClassifierRouter(targets="soft", temperature=0.5).target(s), soft)
    with pytest.raises(ValueError):
        ClassifierRouter(targets="both")


def test_classifier_hard_targets_route_as_well():
    x, s = clusters(1000)
    router = quick(ClassifierRouter, targets="hard").fit(x[:700], s[:700])
    assert isinstance(router.head, torch.nn.Module)
    assert routed(router.route(x[700:]), s[700:]) >= 0.95 * s[700:].amax(dim=1).mean()


# ---- REINFORCE


class Bandit:
    """Questions in 8 clusters; teacher c % 4 is right on 95 % of cluster c, the others on 25 %. Stands in for World."""

    def __init__(self, steps, n=600, batch=16):
        g = torch.Generator().manual_seed(0)
        self.vectors, scores = clusters(n)
        self.best = scores.argmax(dim=1)
        self.questions = [kp.Question(str(i), "t", f"question {i}?", ("yes", "no"), 0) for i in range(n)]
        self.visits = [torch.randint(n, (batch,), generator=g).tolist() for _ in range(steps)]
        self.right = torch.rand(n, 4, generator=g) < torch.where(F.one_hot(self.best, 4).bool(), 0.95, 0.25)
        self.teachers, self.asked = self, 0

    def __len__(self):
        return 4

    def visited(self):
        return sorted({row for rows in self.visits for row in rows})

    def embed(self, questions):
        return self.vectors[[int(q.id) for q in questions]]

    def rationales(self, questions, picks):
        self.asked += len(questions)
        return [f"the answer is {'yes' if self.right[int(q.id), m] else 'no'}" for q, m in zip(questions, picks)]


def play(world, steps, seed=0):
    """-> the policy after these steps and the share of its draws, per step, that were the best arm."""
    args = SimpleNamespace(seed=seed, log_agreement=False)
    policy, hits, g = Reinforced(args).fit(world), [], torch.Generator().manual_seed(seed)
    for step in range(steps):
        policy.rationales(step)
        hits.append((policy.plan[step][0][:, 0] == world.best[world.visits[step]]).float().mean().item())
        losses = torch.rand(len(world.visits[step]), generator=g)  # of the student: here it says nothing
        policy.feedback(step, losses, losses)
    return policy, hits


def test_rl_finds_the_best_arm_of_a_contextual_bandit():
    world = Bandit(300)
    policy, hits = play(world, 300)
    assert abs(sum(hits[:10]) / 10 - 0.25) < 0.1  # at first at random
    assert sum(hits[80:100]) / 20 > 0.6 and sum(hits[-50:]) / 50 > 0.9
    rows = world.visited()
    greedy = policy.log_policy(rows).argmax(1)
    assert (greedy == world.best[rows]).float().mean() > 0.95
    assert world.asked == 300 * 16  # one rationale a visit: it pays for its own choices only


def test_rl_s_step_is_the_gradient_of_the_expected_reward():
    # Enumerate what REINFORCE samples: E over picks of its gradient is grad of sum_m pi(m) R(m) + c H(pi), exactly.
    world = Bandit(20)
    args, row = SimpleNamespace(seed=0, log_agreement=False), world.visits[0][0]
    policy, world.visits = Reinforced(args).fit(world), [[row]]
    torch.manual_seed(0)
    with torch.no_grad():
        policy.policy.weight.normal_(std=0.1)
    right = world.right[row].float()
    logp = policy.log_policy([row])[0]
    exact = torch.autograd.grad(-(logp.exp() @ right - policy.ENTROPY * logp.exp() @ logp), policy.policy.weight)[0]
    expected = torch.zeros_like(exact)
    for m in range(4):
        logp = policy.log_policy([row])[0].detach()
        policy.optimizer, policy.baseline = torch.optim.SGD(policy.policy.parameters(), 0.0), 0.3
        policy.plan = {0: (torch.tensor([[m]]), logp[[m]], right[[m]], ["text"])}
        gradients = []
        policy.policy.weight.register_post_accumulate_grad_hook(lambda p, into=gradients: into.append(p.grad.clone()))
        policy.feedback(0, torch.zeros(1), torch.zeros(1))
        expected += logp[m].exp() * gradients[0]
    assert torch.allclose(expected, exact, atol=1e-6)
