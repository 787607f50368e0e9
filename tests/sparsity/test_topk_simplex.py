"""The projection with at most k nonzeros: against all supports, against POT, its gradients, its limits, bad input."""

import contextlib
import io
from itertools import combinations

import numpy as np
import ot
import pytest
import torch

from polylib.kernels import topk_simplex
from polylib.sparsity import topk_simplex_projection


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_all_supports(s, k, mass):
    """The nearest of the feasible points, one for each support: the entries less a constant, if none is negative."""
    best, least = None, np.inf
    for size in range(1, k + 1):
        for support in map(list, combinations(range(len(s)), size)):
            t = np.zeros_like(s)
            t[support] = s[support] - (s[support].sum() - mass) / size
            distance = np.square(t - s).sum()
            if t.min() >= 0 and distance < least:
                best, least = t, distance
    return best


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("mass", [0.3, 4.0])
def test_nearest_of_all_supports(k, mass):
    for seed in range(5):
        s = draw(7, seed=seed)
        np.testing.assert_allclose(topk_simplex_projection(s, k, mass), by_all_supports(s.numpy(), k, mass), atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_as_pot(k):
    s, mass = draw(20, 6), torch.linspace(0.1, 3, 6, dtype=torch.float64)
    with contextlib.redirect_stdout(io.StringIO()):  # POT 0.9.7 prints a shape
        wanted = ot.utils.projection_sparse_simplex(s.numpy(), k, mass.numpy(), axis=0)
    np.testing.assert_allclose(topk_simplex_projection(s, k, mass), wanted, atol=1e-12)
    with contextlib.redirect_stdout(io.StringIO()):
        wanted = ot.utils.projection_sparse_simplex(s.numpy(), min(k, 6), 2.0, axis=1)
    np.testing.assert_allclose(topk_simplex_projection(s, k, 2.0, dim=1), wanted, atol=1e-12)


def test_without_a_bound_it_is_the_projection_on_the_simplex():
    s = draw(9, 4)
    wanted = ot.utils.proj_simplex(s.numpy(), 1.5)
    for k in (9, 1000):
        np.testing.assert_allclose(topk_simplex_projection(s, k, 1.5), wanted, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_gradients(k):
    s, mass = draw(8, 3).requires_grad_(), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s, mass: topk_simplex_projection(s, k, mass), (s, mass))
    torch.autograd.gradgradcheck(lambda s, mass: topk_simplex_projection(s, k, mass).square(), (s, mass))


def test_gradient_is_centred_on_what_is_kept():
    s = draw(8).requires_grad_()
    t = topk_simplex_projection(s, 3, 5.0)
    weight = draw(8, seed=1)
    (t * weight).sum().backward()
    kept = t > 0
    assert kept.sum() == 3
    torch.testing.assert_close(s.grad, torch.where(kept, weight - weight[kept].mean(), 0))


def test_any_dimension_of_a_batch():
    s = draw(2, 5, 3)
    for dim in (0, 1, -1):
        t = topk_simplex_projection(s, 2, 1.0, dim)
        got, own = (x.movedim(dim, -1).reshape(-1, s.shape[dim]) for x in (t, s))
        for i in range(len(own)):
            torch.testing.assert_close(got[i], topk_simplex_projection(own[i], 2))
    mass = torch.rand(2, 3, dtype=torch.float64) + 0.1
    torch.testing.assert_close(topk_simplex_projection(s, 2, mass, 1).sum(1), mass)
    assert topk_simplex_projection(s[:, :, :0], 2, dim=1).shape == (2, 5, 0)


def test_a_projection_again_changes_nothing():
    t = topk_simplex_projection(draw(30, 5), 4)
    assert (t > 0).sum(0).max() <= 4
    torch.testing.assert_close(topk_simplex_projection(t, 4), t)


def test_of_equal_entries_the_first_are_kept():
    s = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    assert topk_simplex_projection(s, 2, 1.0).tolist() == [0, 0.5, 0.5, 0, 0]
    assert topk_simplex_projection(s, 1, 1.0).tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(topk_simplex_projection(torch.zeros(6), 3), torch.tensor([1.0, 1, 1, 0, 0, 0]) / 3)


def test_a_large_constant_costs_no_digits():
    s = torch.arange(64.0).view(8, 8) / 64
    torch.testing.assert_close(topk_simplex_projection(s + 2**12, 3), topk_simplex_projection(s, 3), rtol=0, atol=1e-6)


def test_an_entry_of_minus_infinity_stays_zero():
    s = torch.tensor([-torch.inf, 0.2, -torch.inf, 0.0], requires_grad=True)
    t = topk_simplex_projection(s, 3)
    torch.testing.assert_close(t.detach(), torch.tensor([0.0, 0.6, 0.0, 0.4]))
    t[1].backward()
    torch.testing.assert_close(s.grad, torch.tensor([0.0, 0.5, 0.0, -0.5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    s = draw(40, 4, dtype=torch.float32).to(dtype)
    t = topk_simplex_projection(s, 5)
    assert t.dtype == dtype
    torch.testing.assert_close(t.float(), topk_simplex_projection(s.float(), 5), rtol=1e-2, atol=1e-3)


def test_bad_input():
    s = draw(4, 3)
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        topk_simplex_projection(s, 0)
    for mass in (0.0, -1.0, float("nan"), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="mass must be a finite number above 0"):
            topk_simplex_projection(s, 2, mass)
    with pytest.raises(ValueError, match="mass must be above 0 and finite"):
        topk_simplex_projection(s, 2, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"mass must have shape \(3,\)"):
        topk_simplex_projection(s, 2, torch.ones(4))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="s must have a finite largest entry"):
            topk_simplex_projection(torch.tensor([0.0, wrong]), 1)
    with pytest.raises(ValueError, match="s must have a finite largest entry"):
        topk_simplex_projection(torch.full((3,), -torch.inf), 1)
    with pytest.raises(ValueError, match="s must have shape"):
        topk_simplex_projection(s[:0], 1)
    with pytest.raises(ValueError, match="s must have shape"):
        topk_simplex_projection(s, 1, dim=2)
    with pytest.raises(TypeError, match="floating"):
        topk_simplex_projection(torch.tensor([1, 2]), 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_kernel_that_serves_on_a_gpu_is_the_same(backend):
    s = draw(9, 5, seed=3, dtype=torch.float32)
    s[[1, 4, 7], 2] = 3.0  # equal ones at the border
    mass = torch.linspace(0.2, 2, 5)
    for k in (1, 2, 20):
        found = topk_simplex(s.mT, k, mass, backend=backend).mT
        torch.testing.assert_close(found, topk_simplex_projection(s, k, mass), rtol=1e-5, atol=1e-6)


def test_a_mass_is_not_rounded_before_it_is_shared_out():
    plan = topk_simplex_projection(torch.zeros(10).half(), 10, 70000.0)
    torch.testing.assert_close(plan, torch.full((10,), 7000.0).half())
    plan = topk_simplex_projection(torch.zeros(2).half(), 2, 1e-6)
    torch.testing.assert_close(plan, torch.full((2,), 5e-7).half())
