"""Monarch factors: of the Fourier transform, exact; of a dense matrix, the nearest."""

import math

import pytest
import torch

from polylib.kernels import monarch_multiply
from polylib.sequences import (
    MonarchLinear,
    causal_convolution,
    dft_factors,
    monarch_dense,
    project_to_monarch,
    shuffled,
)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (4, 2), (64, None), (12, None), (12, 4), (7, None), (256, 8)])
def test_the_fourier_transform(n, blocks):
    torch.manual_seed(0)
    w1, w2 = dft_factors(n, blocks)
    x = torch.randn(3, n, dtype=torch.complex128)
    y = monarch_multiply(shuffled(x, len(w1)), w1, w2)
    torch.testing.assert_close(y, torch.fft.fft(x), rtol=1e-12, atol=1e-12)


def test_phases_of_a_long_transform():
    w1, w2 = dft_factors(2**14, dtype=torch.complex64)
    x = torch.randn(2**14, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    y = monarch_multiply(shuffled(x, 128), w1, w2)
    torch.testing.assert_close(y, torch.fft.fft(x), rtol=1e-4, atol=1e-3)


def test_a_convolution_by_monarch_matrices():
    torch.manual_seed(0)
    u, k = torch.randn(2, 32, dtype=torch.float64)
    w1, w2 = dft_factors(64)
    M = monarch_dense(w1, w2)[:, shuffled(torch.arange(64), 8).argsort()]  # M @ x, with x in its own order
    padded = [torch.cat([x, torch.zeros(32)]).to(M.dtype) for x in (u, k)]
    y = torch.linalg.solve(M, (M @ padded[0]) * (M @ padded[1]))[:32].real
    torch.testing.assert_close(y, causal_convolution(u, k), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    ("n", "sizes", "rank"), [(16, None, 1), (12, None, 1), (12, (2, 3), 2), (16, (4, 4), 4), (6, (1, 2), 3)]
)
def test_a_monarch_matrix_is_its_own_projection(n, sizes, rank, dtype):
    torch.manual_seed(0)
    k, l = sizes or ((4, 4) if n == 16 else (3, 4))  # noqa: E741 - the paper's letters
    dense = monarch_dense(torch.randn(k, rank * l, n // k, dtype=dtype), torch.randn(l, n // l, k * rank, dtype=dtype))
    w1, w2 = project_to_monarch(dense, sizes, rank)
    assert (w1.shape, w2.shape) == ((k, rank * l, n // k), (l, n // l, k * rank))
    torch.testing.assert_close(monarch_dense(w1, w2), dense, rtol=1e-4, atol=1e-4)


def test_a_trained_layer_is_recovered():
    torch.manual_seed(0)
    layer = MonarchLinear(16, 16, 2)
    w1, w2 = project_to_monarch(layer.to_dense(), (2, 2), rank=4)
    assert (w1.shape, w2.shape) == (layer.w1.shape, layer.w2.shape)
    torch.testing.assert_close(monarch_dense(w1, w2), layer.to_dense())


@pytest.mark.parametrize("n", [16, 64, 256])
def test_the_shuffled_transform_projects_to_itself(n):
    F = torch.fft.fft(torch.eye(n), dim=0)[:, shuffled(torch.arange(n), math.isqrt(n))]
    assert (monarch_dense(*project_to_monarch(F)) - F).norm() < 2e-6 * F.norm()
    plain = torch.fft.fft(torch.eye(n), dim=0)
    assert (monarch_dense(*project_to_monarch(plain)) - plain).norm() > 0.3 * plain.norm()


def test_no_other_monarch_matrix_is_nearer():
    """Alternating least squares from other starts ends no lower, and the slope at the projection is zero."""
    torch.manual_seed(0)
    dense = torch.randn(9, 9, dtype=torch.float64)
    factors = [w.requires_grad_() for w in project_to_monarch(dense)]
    least = (monarch_dense(*factors) - dense).square().sum()
    assert all(g.abs().max() < 1e-10 for g in torch.autograd.grad(least, factors))
    for _ in range(3):
        others = [torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.LBFGS(others, max_iter=200, line_search_fn="strong_wolfe")

        def distance(others=others, optimizer=optimizer):
            optimizer.zero_grad()
            value = (monarch_dense(*others) - dense).square().sum()
            value.backward()
            return value

        optimizer.step(distance)
        assert distance().item() > least.item() - 1e-9


def test_a_higher_rank_is_nearer_and_a_full_one_exact():
    torch.manual_seed(0)
    dense = torch.randn(16, 16, dtype=torch.float64)
    errors = [(monarch_dense(*project_to_monarch(dense, (4, 4), rank)) - dense).norm() for rank in (1, 2, 3, 4)]
    assert errors[0] > errors[1] > errors[2] > 0.1
    assert errors[3] < 1e-12


def test_bad_input():
    for shape in ((3, 4), (0, 0), (4,)):
        with pytest.raises(ValueError, match=r"dense must have shape \(n, n\)"):
            project_to_monarch(torch.zeros(shape))
    for sizes in ((3, 4), (4, 0), (2, 2.5)):
        with pytest.raises(ValueError, match="must be a divisor of n = 16"):
            project_to_monarch(torch.eye(16), sizes)
    with pytest.raises(ValueError, match="sizes must be two"):
        project_to_monarch(torch.eye(16), (4, 2, 2))
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 2"):
        project_to_monarch(torch.eye(16), (2, 8), 3)
    with pytest.raises(ValueError, match="dense must be finite"):
        project_to_monarch(torch.full((4, 4), math.nan))
    with pytest.raises(TypeError, match="dense must have a floating-point or complex dtype"):
        project_to_monarch(torch.ones(4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="n must be"):
        dft_factors(0)
    with pytest.raises(ValueError, match="blocks must be a divisor"):
        dft_factors(16, 3)
    with pytest.raises(ValueError, match="dtype must be one of"):
        dft_factors(16, dtype=torch.float32)
    with pytest.raises(ValueError, match="blocks must be a divisor"):
        shuffled(torch.zeros(6), 4)
