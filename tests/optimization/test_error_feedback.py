"""EF21: its constants, its rounds against a plain loop, its weighted form, and bad input."""

import math

import numpy as np
import pytest
import torch

from polylib.optimization import EF21Simulator, NaturalRounding, TopK, ef21_stepsize, ef21_xi

N, D = 6, 5


def quadratics(seed=0, spread=1.0):
    """The gradients of n convex quadratics of different curvature, their matrices, and a start."""
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(N, D, D, generator=draw, dtype=torch.float64)
    size = torch.exp(spread * torch.randn(N, generator=draw, dtype=torch.float64))
    a = root @ root.mT / D * size[:, None, None]
    b = torch.randn(N, D, generator=draw, dtype=torch.float64)

    def gradients(x):
        return (a @ x[..., None, :, None])[..., 0] - b

    return gradients, a, torch.randn(D, generator=draw, dtype=torch.float64)


def constants(a):
    return torch.linalg.matrix_norm(a.mean(0), 2), torch.linalg.matrix_norm(a, 2)


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.5, 0.05, 1e-3])
def test_xi_has_three_forms(alpha):
    theta = 1 - math.sqrt(1 - alpha)
    beta = (1 - alpha) / theta
    assert ef21_xi(alpha) == pytest.approx(math.sqrt(beta / theta), rel=1e-11)
    assert ef21_xi(alpha) == pytest.approx(math.sqrt(1 - alpha) / theta, rel=1e-11)


def test_xi_of_a_small_alpha_does_not_cancel():
    # 2 / alpha - 3 / 2 + O(alpha)
    assert ef21_xi(1e-12) == pytest.approx(2e12, rel=1e-11)


def test_stepsizes():
    clients = torch.tensor([1.0, 1.0, 1.0, 100.0], dtype=torch.float64)
    xi = ef21_xi(0.25)
    assert ef21_stepsize(20.0, clients, 0.25).item() == pytest.approx(1 / (20 + 25.75 * xi))
    root = math.sqrt(10003 / 4)
    assert ef21_stepsize(20.0, clients, 0.25, "quadratic").item() == pytest.approx(1 / (20 + root * xi))
    assert root**2 == pytest.approx(25.75**2 + clients.var(correction=0).item())
    assert ef21_stepsize(20.0, clients, 1.0, "quadratic").item() == 1 / 20
    several = ef21_stepsize(torch.tensor([1.0, 20.0]), torch.stack([clients, clients]), 0.25)
    assert several[1].item() == pytest.approx(1 / (20 + 25.75 * xi))


def test_equal_clients_have_equal_means():
    clients = torch.full((7,), 3.0, dtype=torch.float64)
    steps = [ef21_stepsize(3.0, clients, 0.1, mean).item() for mean in ("arithmetic", "quadratic")]
    assert steps[0] == pytest.approx(steps[1])


def top(x, k):
    chosen = np.argsort(-np.abs(x), kind="stable")[:k]
    kept = np.zeros_like(x)
    kept[chosen] = x[chosen]
    return kept


@pytest.mark.parametrize("weighted", [False, True])
def test_rounds_are_those_of_a_plain_loop(weighted):
    gradients, a, start = quadratics()
    clients = constants(a)[1]
    weights = clients / clients.sum() if weighted else None
    sim = EF21Simulator(gradients, start, 0.05, TopK(0.4), weights=weights)
    norms = sim.run(30)

    share = np.full(N, 1 / N) if weights is None else weights.numpy()
    x = start.numpy().copy()
    own = gradients(torch.tensor(x)).numpy()
    kept = [top(own[i] / (N * share[i]), 2) for i in range(N)]
    wanted = [np.square(own.mean(0)).sum()]
    for _ in range(30):
        x = x - 0.05 * sum(share[i] * kept[i] for i in range(N))
        own = gradients(torch.tensor(x)).numpy()
        for i in range(N):
            kept[i] = kept[i] + top(own[i] / (N * share[i]) - kept[i], 2)
        wanted.append(np.square(own.mean(0)).sum())
    np.testing.assert_allclose(sim.x, x, rtol=1e-10)
    np.testing.assert_allclose(sim.clients, np.stack(kept), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(norms, wanted, rtol=1e-9)


def test_the_server_knows_the_mean_of_the_clients():
    gradients, a, start = quadratics()
    sim = EF21Simulator(gradients, start, ef21_stepsize(*constants(a), 0.2), TopK(0.2))
    for _ in range(5):
        sim.run(40)
        torch.testing.assert_close(sim.server, sim.clients.mean(0))


def test_without_compression_it_is_gradient_descent():
    gradients, a, start = quadratics()
    step = ef21_stepsize(*constants(a), 1.0)
    sim = EF21Simulator(gradients, start, step, TopK(1.0))
    sim.run(20)
    x = start
    for _ in range(20):
        x = x - step * gradients(x).mean(0)
    torch.testing.assert_close(sim.x, x)


def test_weights_change_nothing_for_a_homogeneous_compressor():
    gradients, a, start = quadratics(1)
    whole, clients = constants(a)
    step, weights = ef21_stepsize(whole, clients, 0.2), clients / clients.sum()
    for compressor, same in ((TopK(0.2), True), (NaturalRounding(TopK(0.2)), False)):
        sims = [EF21Simulator(gradients, start, step, compressor, weights=w) for w in (None, weights)]
        for sim in sims:
            sim.run(50)
        gap = (sims[0].x - sims[1].x).abs().max().item()
        assert (gap < 1e-12) == same
        if same:
            torch.testing.assert_close(sims[0].clients, sims[1].clients * (N * weights)[:, None])
        assert same or gap > 1e-6
    even = torch.full((N,), 1 / N, dtype=torch.float64)
    sims = [EF21Simulator(gradients, start, step, NaturalRounding(), weights=w) for w in (None, even)]
    torch.testing.assert_close(sims[0].run(50), sims[1].run(50))


def test_runs_side_by_side_are_those_alone():
    gradients, _, start = quadratics()
    steps = torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64)
    together = EF21Simulator(gradients, start.expand(3, D), steps, TopK(0.4))
    norms = together.run(10)
    for i, step in enumerate(steps.tolist()):
        alone = EF21Simulator(gradients, start, step, TopK(0.4))
        torch.testing.assert_close(norms[:, i], alone.run(10))


def test_the_rate_of_the_theory_is_kept():
    gradients, a, start = quadratics(2)
    whole, clients = constants(a)
    mean = a.mean(0)
    b = -gradients(torch.zeros(D, dtype=torch.float64)).mean(0)
    best = torch.linalg.solve(mean, b)
    first = ((start - best) @ mean @ (start - best) / 2).item()
    for ratio in (0.2, 0.6):
        compressor = TopK(ratio)
        step = ef21_stepsize(whole, clients, compressor.alpha(D)).item()
        weights = clients / clients.sum()
        sim = EF21Simulator(gradients, start, step, compressor, weights=weights)
        off = (sim.clients - gradients(start) / (N * weights)[:, None]).square().sum(1)
        theta = 1 - math.sqrt(1 - compressor.alpha(D))
        for rounds in (1, 10, 100):
            measured = EF21Simulator(gradients, start, step, compressor, weights=weights).run(rounds - 1).mean().item()
            bound = 2 * first / (step * rounds) + (weights * off).sum().item() / (theta * rounds)
            assert measured <= bound


def three_clients(x):
    """The gradients of (a_i . x)^2 + norm(x)^2 / 4 with a_1 = (-3, 2, 2) and its rotations."""
    a = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]], dtype=torch.float64)
    return 2 * (a @ x)[:, None] * a + x / 2


def test_without_feedback_three_clients_walk_uphill():
    start = torch.ones(3, dtype=torch.float64)
    naive = EF21Simulator(three_clients, start, 0.01, TopK(1 / 3), feedback=False)
    naive.run(100)
    torch.testing.assert_close(naive.x, start * (1 + 0.01 * 11 / 6) ** 100)
    kept = EF21Simulator(three_clients, start, 0.01, TopK(1 / 3))
    assert kept.run(1500)[-1] < 1e-10


def test_absent_clients_keep_their_estimates():
    gradients, a, start = quadratics()
    draw = torch.Generator().manual_seed(0)
    sim = EF21Simulator(gradients, start, 0.01, TopK(0.2), participation=0.5, generator=draw)
    took_part = torch.zeros(N)
    for _ in range(60):
        before = sim.clients
        sim.step()
        took_part += (sim.clients != before).any(1)
        torch.testing.assert_close(sim.server, sim.clients.mean(0))
    assert 15 < took_part.min() <= took_part.max() < 45
    step = ef21_stepsize(*constants(a), 0.2)
    sim = EF21Simulator(gradients, start, step, TopK(0.2), participation=0.5, generator=draw)
    norms = sim.run(1000)
    assert norms[-1] < 1e-2 * norms[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepsize": 0.0}, "stepsize must be above 0"),
        ({"weights": torch.full((N,), 0.5)}, "weights must be positive with the sum 1"),
        ({"weights": torch.full((N + 1,), 1 / (N + 1))}, "weights must have shape"),
        ({"participation": 0.0}, "participation must be"),
        ({"participation": 0.5, "feedback": False}, "participation must be 1"),
        ({"x": torch.tensor(1.0)}, "x must have shape"),
        ({"gradients": lambda x: x}, r"gradients\(x\) must have shape"),
    ],
)
def test_bad_rounds(change, message):
    gradients, _, start = quadratics()
    arguments = {"gradients": gradients, "x": start, "stepsize": 0.1, "compressor": TopK(0.2)}
    with pytest.raises(ValueError, match=message):
        EF21Simulator(**(arguments | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, torch.tensor([1.0, -1.0]), 0.5), "clients must be positive"),
        ((0.0, torch.ones(2), 0.5), "smoothness must be positive"),
        ((1.1, torch.ones(2), 0.5), "smoothness must be at most"),
        ((1.0, torch.ones(2), 0.0), "alpha must be"),
        ((1.0, torch.ones(2), 1.5), "alpha must be"),
        ((1.0, torch.ones(0), 0.5), "clients must have shape"),
        ((1.0, torch.ones(2), 0.5, "geometric"), "mean must be one of"),
    ],
)
def test_bad_constants(arguments, message):
    with pytest.raises(ValueError, match=message):
        ef21_stepsize(*arguments)


@pytest.mark.parametrize("size", [1e20, 1e-25, 1e38])
def test_constants_whose_squares_have_no_number(size):
    for mean in ("quadratic", "arithmetic"):
        step = ef21_stepsize(size, torch.tensor([size, size / 2]), 0.5, mean)
        wanted = ef21_stepsize(1.0, torch.tensor([1.0, 0.5]).double(), 0.5, mean) / size
        torch.testing.assert_close(step.double(), wanted, rtol=1e-5, atol=0.0)
    with pytest.raises(TypeError, match="dtype of clients must be a floating-point dtype"):
        ef21_stepsize(1.0, torch.tensor([1, 2]), 0.5)
