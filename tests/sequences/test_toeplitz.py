"""Toeplitz products against scipy's, their gradients, and bad input."""

import numpy as np
import pytest
import scipy.linalg
import torch

from polylib.sequences import toeplitz_matmul


@pytest.mark.parametrize("n", [1, 2, 3, 8, 37])
def test_against_scipy(n):
    torch.manual_seed(0)
    lags, x = torch.randn(2 * n - 1).double(), torch.randn(n, 4).double()
    found = toeplitz_matmul(lags, x)
    column, row = lags[:n].flip(0).numpy(), lags[n - 1 :].numpy()  # the lags 0, -1, -2, ... and 0, 1, 2, ...
    np.testing.assert_allclose(found, scipy.linalg.toeplitz(column, row) @ x.numpy(), atol=1e-12)
    np.testing.assert_allclose(found, scipy.linalg.matmul_toeplitz((column, row), x.numpy()), atol=1e-12)


def test_an_impulse_goes_to_earlier_places_by_positive_lags():
    x = torch.zeros(5, 1)
    x[3] = 1
    lags = torch.arange(-4.0, 5.0)  # c of a lag is the lag: T_i3 = 3 - i
    torch.testing.assert_close(toeplitz_matmul(lags, x)[:, 0], torch.tensor([3.0, 2, 1, 0, -1]))


def test_leading_dimensions_broadcast():
    torch.manual_seed(0)
    lags, x = torch.randn(3, 9).double(), torch.randn(2, 3, 5, 4).double()
    found = toeplitz_matmul(lags, x)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(found[b, h], toeplitz_matmul(lags[h], x[b, h]))
    assert toeplitz_matmul(lags, x[:0]).shape == (0, 3, 5, 4)


def test_gradients():
    torch.manual_seed(0)
    lags = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(toeplitz_matmul, (lags, x))
    assert torch.autograd.gradgradcheck(toeplitz_matmul, (lags, x))


def test_half_precision():
    torch.manual_seed(0)
    lags, x = torch.randn(9), torch.randn(5, 3).bfloat16()
    found = toeplitz_matmul(lags, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), toeplitz_matmul(lags.double(), x.double()), rtol=0.01, atol=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match=r"lags must have shape \(\.\.\., 2n - 1\) with 2n - 1 = 9, got \(10,\)"):
        toeplitz_matmul(torch.zeros(10), torch.zeros(5, 2))
    for shape in ((5,), (0, 2)):
        with pytest.raises(ValueError, match="x must have shape"):
            toeplitz_matmul(torch.zeros(9), torch.zeros(shape))
    with pytest.raises(TypeError, match="dtype of lags must be"):
        toeplitz_matmul(torch.zeros(9).long(), torch.zeros(5, 2))
