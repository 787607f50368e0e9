"""Sparsity-constrained transport: its limits, POT's dual functions, a cone programme, its gradient, ties, bad input."""

import contextlib
import io
import warnings

import cvxpy as cp
import numpy as np
import ot
import ot.smooth
import pytest
import torch

from polylib.sparsity import sparse_ot
from polylib.sparsity.sparse_transport import dual, semi_dual


def problem(m, n, seed=0):
    """Unequal masses, and squared distances of points in the plane, divided by the largest."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, 2, generator=generator, dtype=torch.float64) for count in (m, n))
    a, b = (0.5 + torch.rand(count, generator=generator, dtype=torch.float64) for count in (m, n))
    C = torch.cdist(x, y).square()
    return a / a.sum(), b / b.sum(), C / C.max()


def uniform(m, n, seed=0):
    *_, C = problem(m, n, seed)
    return torch.full((m,), 1 / m, dtype=C.dtype), torch.full((n,), 1 / n, dtype=C.dtype), C


def cost(plan, C, gamma):
    return (plan * C).sum() + gamma / 2 * plan.square().sum()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_dual_functions_are_those_of_pot(k):
    a, b, C = problem(8, 5)
    alpha, beta = (torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=C.dtype) / 5 for x in (a, b))
    inputs = [x.numpy() for x in (a, b, C)]
    with contextlib.redirect_stdout(io.StringIO()):  # POT 0.9.7 prints a shape
        wanted, slope = ot.smooth.semi_dual_obj_grad(
            alpha.numpy(), *inputs, ot.smooth.SparsityConstrained(gamma=0.7, max_nz=k)
        )
    value, plan, _, best = semi_dual(a, b, C, alpha, k=k, gamma=0.7)
    assert value.item() == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_allclose(a - plan.sum(1), slope, atol=1e-12)
    # With that beta the dual function has the value of the semi-dual one, and the same plan.
    torch.testing.assert_close(dual(a, b, C, alpha, best, k=k, gamma=0.7)[:2], (value, plan))
    regular = ot.smooth.SparsityConstrained(gamma=0.7, max_nz=min(k, 7))  # POT refuses k = m here
    if k < 8:
        wanted, *slopes = ot.smooth.dual_obj_grad(alpha.numpy(), beta.numpy(), *inputs, regular)
        value, plan, *_ = dual(a, b, C, alpha, beta, k=k, gamma=0.7)
        assert value.item() == pytest.approx(wanted, rel=1e-12)
        np.testing.assert_allclose(a - plan.sum(1), slopes[0], atol=1e-12)
        np.testing.assert_allclose(b - plan.sum(0), slopes[1], atol=1e-12)


def test_gradient_of_the_semi_dual_is_what_is_missing_of_the_rows():
    a, b, C = problem(6, 4)
    alpha = torch.linspace(-0.3, 0.2, 6, dtype=C.dtype)
    plan = semi_dual(a, b, C, alpha, k=2, gamma=0.5)[1]
    for i in range(6):
        shift = torch.zeros_like(alpha)
        shift[i] = 1e-6
        up, down = (semi_dual(a, b, C, alpha + h, k=2, gamma=0.5)[0] for h in (shift, -shift))
        assert (up - down).item() / 2e-6 == pytest.approx((a - plan.sum(1))[i].item(), abs=1e-8)


def test_with_one_nonzero_it_is_plain_transport():
    a, b, C = uniform(12, 12)
    result = sparse_ot(a, b, C, 1, 0.8)
    plain = ot.emd2(a.numpy(), b.numpy(), C.numpy())
    assert result.value.item() == pytest.approx(plain + 0.4 * b.square().sum().item(), rel=1e-9)
    assert result.converged and not result.has_ties
    np.testing.assert_allclose(result.plan, ot.emd(a.numpy(), b.numpy(), C.numpy()), atol=1e-12)


@pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
def test_with_many_nonzeros_it_is_quadratic_transport(formulation):
    a, b, C = problem(10, 7)
    inputs = [x.numpy() for x in (a, b, C)]
    options = {"reg_type": "l2", "stopThr": 1e-12, "numItermax": 5000, "log": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of an option of SciPy's that POT sets
        plan, log = ot.smooth.smooth_ot_semi_dual(*inputs, 0.3, **options)
    wanted = -log["res"].fun
    for k in ((plan > 1e-6).sum(0).max(), 10, 1000):
        result = sparse_ot(a, b, C, int(k), 0.3, formulation=formulation)
        assert result.value.item() == pytest.approx(wanted, abs=1e-8)
        np.testing.assert_allclose(result.plan, plan, atol=1e-5)
        assert result.row_error < 1e-5 and result.column_error < 1e-5 and not result.has_ties


def test_every_column_full_if_there_is_no_more_room():
    a, b, C = uniform(12, 4)
    result = sparse_ot(a, b, C, 3, 0.5)
    plain = ot.emd2(a.numpy(), b.numpy(), C.numpy())
    assert result.value.item() == pytest.approx(plain + 0.25 / 12, rel=1e-5)


@pytest.mark.parametrize("k", [2, 3])
def test_value_is_that_of_the_cone_programme(k):
    a, b, C = problem(7, 4, seed=2)
    T, Z = cp.Variable(C.shape, nonneg=True), cp.Variable(C.shape, nonneg=True)
    squares = sum(cp.quad_over_lin(T[i, j], Z[i, j]) for i in range(7) for j in range(4))
    limits = [cp.sum(T, axis=1) == a.numpy(), cp.sum(T, axis=0) == b.numpy(), Z <= 1, cp.sum(Z, axis=0) <= k]
    least = cp.Problem(cp.Minimize(cp.sum(cp.multiply(C.numpy(), T)) + 0.2 * squares), limits).solve(cp.CLARABEL)
    for formulation in ("semi_dual", "dual"):
        value = sparse_ot(a, b, C, k, 0.4, formulation=formulation).value.item()
        assert value == pytest.approx(least, abs=1e-5 if formulation == "dual" else 1e-6)


def test_without_ties_the_plan_is_feasible_and_attains_the_bound():
    certified = 0
    for seed in range(3):
        a, b, C = problem(9, 6, seed)
        previous = np.inf
        for k in (2, 4, 5, 9):
            result = sparse_ot(a, b, C, k, 0.5, max_iter=100)
            value = result.value.item()
            assert (result.plan > 0).sum(0).max() <= k and value <= previous + 1e-5
            assert result.column_error < 1e-12
            assert result.converged or result.has_ties
            if result.converged:
                certified += 1
                assert result.row_error < 1e-5
                assert cost(result.plan, C, 0.5).item() == pytest.approx(value, abs=1e-6)
            previous = value
    assert certified >= 4


def test_a_tie_by_hand():
    # Source 1 has 0.1 more than target 1 takes. With one source a column there is no plan: column 2 is torn.
    a, b = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])
    result = sparse_ot(a, b, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1, 1.0)
    assert result.value.item() == pytest.approx(0.35, abs=1e-6)
    assert result.ties.tolist() == [False, True] and result.has_ties and not result.converged
    assert result.row_error == pytest.approx(0.2, abs=1e-5) or result.row_error == pytest.approx(0.8, abs=1e-5)
    result = sparse_ot(a, b, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2, 1.0)
    torch.testing.assert_close(result.plan, torch.tensor([[0.5, 0.1], [0.0, 0.4]]))
    assert result.value.item() == pytest.approx(0.31, abs=1e-6)


def test_gradient_of_the_value():
    a, b, C = problem(6, 4, seed=2)
    inputs = [x.clone().requires_grad_() for x in (a, b, C)]
    result = sparse_ot(*inputs, 3, 0.6)
    assert not result.has_ties and not result.plan.requires_grad
    slopes = torch.autograd.grad(3 * result.value, inputs)
    torch.testing.assert_close(slopes[2], 3 * result.plan)
    for place in range(3):
        change = torch.randn(inputs[place].shape, generator=torch.Generator().manual_seed(place), dtype=C.dtype)
        if place < 2:
            change -= change.mean()  # the sums stay equal
        values = []
        for step in (1e-4, -1e-4):
            moved = [a, b, C]
            moved[place] = moved[place] + step * change
            values.append(3 * sparse_ot(*moved, 3, 0.6, tol=1e-10).value.item())
        assert (values[0] - values[1]) / 2e-4 == pytest.approx((slopes[place] * change).sum().item(), rel=1e-4)


def test_a_second_derivative_is_refused():
    a, b, C = problem(4, 4)
    C.requires_grad_()
    (slope,) = torch.autograd.grad(sparse_ot(a, b, C, 2, 0.6).value, C, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()


def test_float32_is_solved_in_float64():
    a, b, C = problem(6, 4)
    narrow = sparse_ot(a.float(), b.float(), C.float(), 3, 0.6)
    assert {x.dtype for x in (narrow.plan, narrow.alpha, narrow.beta, narrow.value)} == {torch.float32}
    assert narrow.value.item() == pytest.approx(sparse_ot(a, b, C, 3, 0.6).value.item(), rel=1e-6)


def test_bad_input():
    a, b, C = uniform(6, 3)
    with pytest.raises(ValueError, match="k must be at least m / n = 2, got 1"):
        sparse_ot(a, b, C, 1, 1.0)
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        sparse_ot(a, b, C, 0, 1.0)
    with pytest.raises(ValueError, match="gamma must be a finite number above 0"):
        sparse_ot(a, b, C, 2, 0.0)
    with pytest.raises(ValueError, match="a must be positive and finite"):
        sparse_ot(a * torch.tensor([0, 2, 1, 1, 1, 1]), b, C, 2, 1.0)
    with pytest.raises(ValueError, match="a and b must have the same sum"):
        sparse_ot(a, 2 * b, C, 2, 1.0)
    with pytest.raises(ValueError, match=r"b must have shape \(3,\)"):
        sparse_ot(a, a, C, 2, 1.0)
    with pytest.raises(ValueError, match="C must have shape"):
        sparse_ot(a, b, C[0], 2, 1.0)
    with pytest.raises(ValueError, match="C must be finite"):
        sparse_ot(a, b, C.log().masked_fill(C > 0.2, torch.inf), 2, 1.0)
    with pytest.raises(ValueError, match="formulation must be one of"):
        sparse_ot(a, b, C, 2, 1.0, formulation="primal")
    with pytest.raises(TypeError, match="floating"):
        sparse_ot(a, b, C.long(), 2, 1.0)


def test_a_gamma_that_is_too_small_for_the_costs():
    even = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="gamma must not be so small"):
        sparse_ot(even, even, torch.rand(3, 3), 2, 1e-320)
