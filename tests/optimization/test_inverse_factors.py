"""Inverse covariances by rank-one formulas: against dense averages and inverses in float64."""

import math

import pytest
import torch

from polylib.optimization import (
    kronecker_precondition,
    package_refresh_,
    printed_refresh_,
    rescaled,
    sherman_morrison_ema_,
    stabilise_,
)

REFRESHES = [sherman_morrison_ema_, package_refresh_, printed_refresh_]


def vectors(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_average(vs, gamma, size):
    """The average itself, from the identity on."""
    average = torch.eye(size, dtype=torch.float64)
    for v in vs:
        average = gamma * average + (1 - gamma) * torch.outer(v, v)
    return average


@pytest.mark.parametrize(("gamma", "count"), [(0.95, 50), (0.5, 20), (0.99, 1)])
def test_the_exact_refresh_is_the_inverse_of_the_average(gamma, count):
    vs = vectors(count, 12)
    inverse = torch.eye(12, dtype=torch.float64)
    for v in vs:
        assert sherman_morrison_ema_(inverse, v, gamma) is inverse
        torch.linalg.cholesky(inverse)
        torch.testing.assert_close(inverse, inverse.mT, rtol=0, atol=1e-10 * inverse.abs().max().item())
    torch.testing.assert_close(inverse, torch.linalg.inv(dense_average(vs, gamma, 12)), rtol=1e-8, atol=1e-10)


def test_by_hand():
    v = torch.tensor([2.0, 0.0])
    for refresh, expected in zip(REFRESHES, ([0.4, 2.0], [0.2, 1.0], [4.5, 0.5]), strict=True):
        torch.testing.assert_close(refresh(torch.eye(2), v, 0.5), torch.diag(torch.tensor(expected)))


def test_the_package_refresh_is_an_inverse_and_never_grows():
    vs, inverse = vectors(60, 8), torch.eye(8, dtype=torch.float64)
    for v in vs:
        blend = 0.95 * inverse + 0.05 * torch.eye(8, dtype=torch.float64)
        expected = torch.linalg.inv(torch.linalg.inv(blend) + torch.outer(v, v))
        package_refresh_(inverse, v, 0.95)
        torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-12)
        values = torch.linalg.eigvalsh(inverse)
        assert values[0] > 0 and values[-1] <= 1 + 1e-12


def test_the_printed_refresh_is_its_formula_and_no_inverse_of_the_average():
    vs, inverse = vectors(20, 6), torch.eye(6, dtype=torch.float64)
    for v in vs:
        along = inverse @ v
        weight = 0.1 / (0.9**2 * (1 + 0.9 * 0.1 * (v @ along)))
        expected = 0.9 * inverse + weight * torch.outer(along, along)
        printed_refresh_(inverse, v, 0.9)
        torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-12)
        torch.linalg.cholesky(inverse)
    right = torch.linalg.inv(dense_average(vs, 0.9, 6))
    assert (inverse - right).norm() > 0.5 * right.norm()
    # One vector, from the identity: its direction grows where the inverse shrinks.
    unit = torch.tensor([0.0, 3.0], dtype=torch.float64)
    assert printed_refresh_(torch.eye(2, dtype=torch.float64), unit, 0.9)[1, 1] > 1
    assert sherman_morrison_ema_(torch.eye(2, dtype=torch.float64), unit, 0.9)[1, 1] < 1


@pytest.mark.parametrize("refresh", REFRESHES)
def test_many_at_once_are_each_alone(refresh):
    vs = vectors(5, 2, 3, 4)
    many = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1, 1)
    alone = many.clone()
    for v in vs:
        refresh(many, v, 0.9)
        for i in range(2):
            for j in range(3):
                refresh(alone[i, j], v[i, j], 0.9)
    torch.testing.assert_close(many, alone)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_narrow_factors_drift_little(dtype, tolerance):
    vs = vectors(50, 16)
    narrow, exact = torch.eye(16, dtype=dtype), torch.eye(16, dtype=torch.float64)
    for v in vs:
        sherman_morrison_ema_(narrow, v.to(dtype), 0.95)
        sherman_morrison_ema_(exact, v.to(dtype).double(), 0.95)
    assert narrow.dtype == dtype
    assert (narrow.double() - exact).norm() < tolerance * exact.norm()


def test_a_direction_without_vectors_grows_and_the_stabiliser_slows_it():
    free, held, bounded = (torch.eye(4, dtype=torch.float64) for _ in range(3))
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        v = torch.cat([torch.randn(2, generator=draw, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)])
        sherman_morrison_ema_(free, v, 0.95)
        sherman_morrison_ema_(stabilise_(held, 2.0, 0.95), v, 0.95)
        sherman_morrison_ema_(stabilise_(bounded, 2.0, 0.9), v, 0.95)
    assert free[3, 3].item() == pytest.approx(0.95**-200)
    assert round(free.abs().max().item()) == 28529
    # At zeta = gamma each refresh adds (1 - zeta) / gamma, below it the entries stay near the threshold.
    assert 2 < held[3, 3] < 2 / 0.95 + 200 * 0.05 / 0.95 + 0.1
    assert bounded[3, 3] <= 2 / 0.95


def test_stabiliser():
    large, small = torch.tensor([[3.0, 0.5], [0.5, 1.0]]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    both = torch.stack([large, small])
    stabilise_(both, 2.0, 0.9)
    torch.testing.assert_close(both[0], 0.9 * large + 0.1 * torch.eye(2))
    assert torch.equal(both[1], small)
    negative = torch.tensor([[1.0, -3.0], [-3.0, 10.0]])
    torch.testing.assert_close(stabilise_(negative.clone(), 2.0, 0.0), torch.eye(2))


def test_precondition_is_the_inverse_of_a_kronecker_product():
    a, b = (torch.linalg.inv(m @ m.mT + torch.eye(len(m))) for m in (vectors(3, 3), vectors(4, 4, seed=1)))
    grad = vectors(3, 4, seed=2)
    whole = torch.kron(a, b) @ grad.flatten()
    torch.testing.assert_close(kronecker_precondition(grad, a, b), whole.view(3, 4))
    half = kronecker_precondition(grad.half(), a.float(), b.float())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), kronecker_precondition(grad, a, b), rtol=0.01, atol=0.01)


def test_bad_input():
    for refresh in REFRESHES:
        with pytest.raises(ValueError, match="inverse must have shape"):
            refresh(torch.zeros(2, 3), torch.zeros(2), 0.9)
        with pytest.raises(ValueError, match="v must have shape"):
            refresh(torch.eye(3), torch.zeros(2), 0.9)
        for gamma in (0, 1, math.nan):
            with pytest.raises(ValueError, match="gamma must be a finite number above 0, below 1"):
                refresh(torch.eye(2), torch.zeros(2), gamma)
    with pytest.raises(ValueError, match="threshold must be"):
        stabilise_(torch.eye(2), 0, 0.9)
    with pytest.raises(ValueError, match="zeta must be"):
        stabilise_(torch.eye(2), 1, 1.1)
    with pytest.raises(ValueError, match="left must have shape"):
        kronecker_precondition(torch.zeros(2, 3), torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="right must have shape"):
        kronecker_precondition(torch.zeros(2, 3), torch.eye(2), torch.eye(2))


@pytest.mark.parametrize("size", [1e20, 1e-25, 1e38])
def test_a_length_whose_square_has_no_number(size):
    gradient, direction = torch.tensor([[3.0, 0], [0, 4]]) / 5 * size, torch.tensor([[0.0, 2], [0, 0]]) * size
    torch.testing.assert_close(rescaled(direction, gradient), torch.tensor([[0.0, 1], [0, 0]]) * size)
