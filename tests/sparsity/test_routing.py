"""The router: what holds exactly, where it ends, its gradient, batches, scales, and bad input."""

import pytest
import torch

from polylib.sparsity import SparseOTRouter, sparse_ot, topk_simplex_projection


def scores(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("iters", [0, 3, 50])
def test_the_bound_and_the_sum_of_an_expert_hold_at_any_step(iters):
    weights = SparseOTRouter(5, iters=iters)(3 * scores(2, 20, 4))
    assert (weights >= 0).all() and (weights > 0).sum(-2).max() <= 5
    torch.testing.assert_close(weights.sum(-2), torch.full((2, 4), 5.0, dtype=weights.dtype))


def test_without_steps_it_is_a_projection():
    x = scores(12, 3)
    torch.testing.assert_close(SparseOTRouter(4, 0.5, 0)(x), topk_simplex_projection(x / 0.5, 4, 4.0))


def test_it_ends_at_the_plan():
    x = scores(16, 4)
    weights = SparseOTRouter(8, 0.5, 1000)(x)
    sixteenth, quarter = (torch.full((n,), 1 / n, dtype=x.dtype) for n in (16, 4))
    # The plan has the sum 1, the weights have the sum 16.
    result = sparse_ot(sixteenth, quarter, -x, 8, 0.5 * 16)
    assert not result.has_ties
    torch.testing.assert_close(weights, 16 * result.plan, rtol=0, atol=1e-4)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(x[:, 0]), rtol=0, atol=1e-4)


def test_it_scales_with_the_scores():
    x = scores(12, 3)
    one, other = SparseOTRouter(5, 0.3, 20)(x), SparseOTRouter(5, 3.0, 20)(10 * x + torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(one, other)  # nor does a constant for an expert count


def test_each_of_a_batch_for_itself():
    x = scores(2, 3, 12, 4)
    router = SparseOTRouter(4, iters=10)
    together = router(x)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], router(x[i, j]))


def test_an_empty_batch():
    x = scores(0, 12, 3).requires_grad_()
    weights = SparseOTRouter(4, iters=2)(x)
    weights.sum().backward()
    assert weights.shape == x.grad.shape == (0, 12, 3)


def test_gradient_is_that_of_the_last_projection():
    x = scores(12, 3).requires_grad_()
    torch.autograd.gradcheck(SparseOTRouter(5, 0.4, 0), (x,))
    weights = SparseOTRouter(5, 0.4, 30)(x)
    upstream = scores(12, 3, seed=1)
    (slope,) = torch.autograd.grad(weights, x, upstream)
    kept = weights > 0
    mean = torch.where(kept, upstream, 0).sum(0) / kept.sum(0)
    torch.testing.assert_close(slope, torch.where(kept, (upstream - mean) / 0.4, 0))


def test_bfloat16():
    x = scores(12, 3).bfloat16()
    weights = SparseOTRouter(6, iters=10)(x)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float(), SparseOTRouter(6, iters=10)(x.float()), rtol=1e-2, atol=1e-2)


def test_bad_input():
    with pytest.raises(ValueError, match="k must be at least tokens / experts = 4, got 3"):
        SparseOTRouter(3)(scores(12, 3))
    with pytest.raises(ValueError, match="scores must have shape"):
        SparseOTRouter(3)(scores(3))
    with pytest.raises(TypeError, match="floating"):
        SparseOTRouter(3)(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        SparseOTRouter(0)
    with pytest.raises(ValueError, match="gamma must be a finite number above 0"):
        SparseOTRouter(1, 0.0)
    with pytest.raises(ValueError, match="iters must be an integer of at least 0"):
        SparseOTRouter(1, iters=-1)
