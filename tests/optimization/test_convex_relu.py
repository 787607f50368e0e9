"""The convex program of two-layer ReLU networks: ADMM against cvxpy, the networks it gives, and bad input."""

import math

import pytest
import torch

from polylib.optimization import (
    admm_relu,
    all_activation_patterns,
    network_objective,
    recover_network,
    sample_activation_patterns,
    solve_convex_relu,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=8, d=2, seed=0):
    draw = generator(seed)
    x = torch.cat([torch.randn(n, d - 1, generator=draw), torch.ones(n, 1)], 1).double()
    return x, torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(n, generator=draw).double()


def columns(patterns):
    return {tuple(column) for column in patterns.T.tolist()}


@pytest.mark.parametrize(("n", "d"), [(5, 2), (9, 3), (6, 4), (3, 3)])
def test_all_patterns_are_as_many_as_they_must_be(n, d):
    x = torch.randn(n, d, generator=generator(1)).double()
    patterns = all_activation_patterns(x)
    most = 2 * sum(math.comb(n - 1, k) for k in range(d))
    # Where one direction passes all, the opposite one passes nothing: that pattern is left out.
    assert patterns.shape[1] == most - int(patterns.all(0).any())
    assert len(columns(patterns)) == patterns.shape[1]
    drawn, _ = sample_activation_patterns(x, 5000, generator())
    assert columns(drawn) <= columns(patterns)


def test_drawn_patterns_are_those_of_their_directions():
    x, _ = problem(9, 3)
    patterns, gates = sample_activation_patterns(x, 2000, generator())
    assert torch.equal(x @ gates >= 0, patterns)
    assert len(columns(patterns)) == patterns.shape[1]
    assert patterns.any(0).all()
    few, _ = sample_activation_patterns(x, 3, generator())
    assert few.shape[1] <= 3


def test_admm_finds_what_a_general_solver_finds():
    x, y = problem()
    patterns, _ = sample_activation_patterns(x, 500, generator(1))
    exact = solve_convex_relu(x, y, patterns, 0.1)
    for rho in (0.3, 1.0):
        found = admm_relu(x, y, patterns, 0.1, rho=rho, max_iter=3000)
        assert found.objective == pytest.approx(exact.objective, rel=1e-3)
        assert found.violation < 1e-3
    signs = 2 * patterns.double() - 1
    assert (signs * (x @ exact.v)).min() > -1e-6
    f = (patterns * (x @ (exact.v - exact.w))).sum(1)
    assert exact.loss == pytest.approx(((f - y) ** 2).sum().item() / 2, rel=1e-6)


def test_the_step_is_that_of_a_dense_inverse():
    """One iteration from zero is the solution of the whole system, built entry by entry."""
    x, y = problem(6, 3)
    patterns, _ = sample_activation_patterns(x, 8, generator(1))
    (n, d), count, rho, beta = x.shape, patterns.shape[1], 0.3, 0.05
    f = torch.cat([sign * patterns[:, [i]] * x for sign in (1, -1) for i in range(count)], 1)
    signs = 2 * patterns.double() - 1
    g = torch.block_diag(*(signs[:, [i]] * x for _ in range(2) for i in range(count)))
    size = 2 * d * count
    assert g.shape == (2 * n * count, size)
    u = torch.linalg.solve(torch.eye(size).double() + f.T @ f / rho + g.T @ g, f.T @ y / rho)
    u = u.view(2, count, d).mT
    norms = u.norm(dim=1, keepdim=True)
    expected = u * (1 - beta / rho / norms).clamp(min=0)
    found = admm_relu(x, y, patterns, beta, rho=rho, max_iter=1)
    torch.testing.assert_close(torch.stack([found.v, found.w]), expected)


def test_the_network_has_the_value_of_the_program():
    x, y = problem()
    patterns, _ = sample_activation_patterns(x, 500, generator(1))
    exact = solve_convex_relu(x, y, patterns, 0.1)
    net = recover_network(exact.v, exact.w)
    assert network_objective(net, x, y, 0.1).item() == pytest.approx(exact.objective, rel=1e-6)
    first, _, last = net
    torch.testing.assert_close(first.weight.norm(dim=1), last.weight[0].abs())


def test_more_patterns_never_raise_the_optimum():
    x, y = problem(seed=2)
    patterns, _ = sample_activation_patterns(x, 500, generator(1))
    values = [solve_convex_relu(x, y, patterns[:, :p], 0.05).objective for p in (2, 5, patterns.shape[1])]
    assert values[0] >= values[1] - 1e-7 and values[1] >= values[2] - 1e-7


def test_one_sample_has_a_solution_on_paper():
    """f = |x| c for the one neuron along x, so that c is y / |x| less the penalty, and never below zero."""
    x, beta = torch.tensor([[3.0, 4.0]]).double(), 0.5
    for target, expected in ((2.0, 2.0 - beta / 5), (0.05, 0.0), (-2.0, -2.0 + beta / 5)):
        y = torch.tensor([target]).double()
        found = admm_relu(x, y, torch.tensor([[True]]), beta, rho=5.0, tol=1e-8)
        assert (x @ (found.v - found.w)).item() == pytest.approx(expected, abs=1e-5)


def test_a_large_penalty_leaves_nothing():
    x, y = problem()
    patterns, _ = sample_activation_patterns(x, 200, generator())
    found = admm_relu(x, y, patterns, 1e3, rho=100.0)
    assert not found.v.any() and not found.w.any()
    assert found.objective == pytest.approx(y.square().sum().item() / 2)
    assert recover_network(found.v, found.w)(x).shape == (8, 1)


def test_single_precision_is_close():
    x, y = problem()
    patterns, _ = sample_activation_patterns(x, 200, generator())
    wide, single = (admm_relu(x.to(t), y.to(t), patterns, 0.1, max_iter=600) for t in (torch.float64, torch.float32))
    assert single.v.dtype == torch.float32
    assert single.objective == pytest.approx(wide.objective, rel=1e-3)


def test_the_adversarial_value_bounds_the_worst_loss():
    draw = generator(3)
    x = torch.cat([2 * torch.rand(14, 2, generator=draw) - 1, torch.ones(14, 1)], 1).double()
    y = torch.where(x[:, 0] * x[:, 1] > 0, 1.0, -1.0).double()
    patterns, _ = sample_activation_patterns(x, 40, draw)
    radius = 0.15
    plain = solve_convex_relu(x, y, patterns, 0.1, loss="hinge")
    robust = solve_convex_relu(x, y, patterns, 0.1, loss="hinge", radius=radius)
    assert robust.objective >= plain.objective - 1e-6
    net = recover_network(robust.v, robust.w)
    steps = torch.linspace(-radius, radius, 11).double()
    moves = torch.cartesian_prod(steps, steps)
    moved = x[:, None] + torch.cat([moves, torch.zeros(len(moves), 1).double()], 1)
    worst = (1 - y[:, None] * net(moved)[..., 0]).clamp(min=0).amax(1).sum().item()
    assert worst <= robust.loss + 1e-5
    assert worst == pytest.approx(robust.loss, rel=0.02)  # and the bound is tight
    # The same by the formula of the program's loss.
    passed = patterns.double()
    slope = (passed @ (robust.v - robust.w).mT)[:, :2].abs().sum(1)
    f = (passed * (x @ (robust.v - robust.w))).sum(1)
    assert robust.loss == pytest.approx((1 - y * f + radius * slope).clamp(min=0).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 2)}, "x must have shape"),
        ({"x": torch.full((4, 2), math.nan)}, "x must be finite"),
        ({"y": torch.zeros(3)}, "y must have shape"),
        ({"y": torch.full((4,), math.inf)}, "y finite"),
        ({"patterns": torch.ones(4, 2)}, "patterns must be booleans"),
        ({"patterns": torch.ones(3, 2, dtype=torch.bool)}, "patterns must have shape"),
        ({"beta": 0.0}, "beta must be"),
        ({"rho": -1.0}, "rho must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"tol": 0.0}, "tol must be"),
    ],
)
def test_admm_bad_input(change, message):
    arguments = {"x": torch.ones(4, 2), "y": torch.ones(4), "patterns": torch.ones(4, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        admm_relu(**(arguments | {"beta": 0.1} | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "logistic"}, "loss must be one of"),
        ({"radius": 0.1}, "radius must be 0"),
        ({"loss": "hinge", "y": torch.zeros(4)}, "y must be -1 or 1"),
        ({"patterns": torch.ones(4, 0, dtype=torch.bool)}, "patterns must have shape"),
        ({"beta": -1.0}, "beta must be"),
    ],
)
def test_exact_bad_input(options, message):
    arguments = {"x": torch.ones(4, 2), "y": torch.ones(4), "patterns": torch.ones(4, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        solve_convex_relu(**(arguments | {"beta": 0.1} | options))


def test_other_bad_input():
    with pytest.raises(ValueError, match="x must have shape"):
        all_activation_patterns(torch.ones(2, 3))
    with pytest.raises(ValueError, match="at most 100,000 choices"):
        all_activation_patterns(torch.randn(60, 6))
    with pytest.raises(ValueError, match="num must be"):
        sample_activation_patterns(torch.ones(3, 2), 0)
    with pytest.raises(ValueError, match="w must have shape"):
        recover_network(torch.zeros(2, 3), torch.zeros(2, 4))
