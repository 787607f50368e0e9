import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from polylib.neurons.basis_functions import FAMILIES, basis

GRID = torch.linspace(-1.2, 1.2, 241, dtype=torch.float64)[:-1]


@pytest.mark.parametrize("n_basis", [4, 8, 11])
def test_bsplines_are_scipys_and_add_up_to_one(n_basis):
    step = 2.4 / (n_basis - 3)
    knots = -1.2 + step * np.arange(-3, n_basis + 1)
    expected = BSpline.design_matrix(GRID.numpy(), knots, 3).toarray()
    values = basis(GRID, "bspline", n_basis)
    torch.testing.assert_close(values, torch.from_numpy(expected))
    torch.testing.assert_close(values.sum(-1), torch.ones_like(GRID))
    narrow = basis(GRID.float(), "bspline", n_basis)
    torch.testing.assert_close(narrow.double(), torch.from_numpy(expected), rtol=0, atol=2e-6)


def test_bsplines_vanish_far_outside():
    assert not basis(torch.tensor([-5.0, 5.0]), "bspline").any()


def test_chebyshev_polynomials_are_numpys():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    expected = np.stack([np.polynomial.chebyshev.chebval(np.tanh(x.numpy()), np.eye(8)[n]) for n in range(8)], -1)
    torch.testing.assert_close(basis(x, "chebyshev"), torch.from_numpy(expected))


def test_the_other_families_by_their_formulas():
    x = torch.tensor([0.3], dtype=torch.float64)
    centre, step = -1.2 + 2.4 / 7 * torch.arange(8), 2.4 / 7
    u = (x - centre) / (1.2 * step)
    hat = 2 / (math.sqrt(3) * math.pi**0.25) * (u * u - 1) * torch.exp(-u * u / 2)
    torch.testing.assert_close(basis(x, "mexican_hat")[0], hat.double())
    torch.testing.assert_close(basis(x, "rbf")[0], torch.exp(-(((x - centre) / step) ** 2)))
    waves = [f(n * math.pi * 0.3) for n in range(1, 5) for f in (math.cos, math.sin)]
    torch.testing.assert_close(basis(x, "fourier")[0], torch.tensor(waves, dtype=torch.float64))
    torch.testing.assert_close(basis(x, "fourier", 7), basis(x, "fourier", 8)[..., :7])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_derivatives(name):
    x = torch.tensor([-1.1, -0.4, 0.05, 0.77], dtype=torch.float64, requires_grad=True)
    assert basis(x, name, 5).shape == (4, 5)
    assert torch.autograd.gradcheck(lambda t: basis(t, name, 5), x)


def test_chebyshev_has_a_finite_gradient_where_tanh_saturates():
    x = torch.tensor([-40.0, 40.0], requires_grad=True)
    basis(x, "chebyshev").sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sine",), r"name must be one of.*, got 'sine'"),
        (("rbf", 3), r"n_basis must be an integer.*, got 3"),
        (("rbf", 8, 1.0, 1.0), r"grid_range must be two increasing numbers, got \(1\.0, 1\.0\)"),
    ],
)
def test_bad_input_raises(arguments, words):
    with pytest.raises(ValueError, match=words):
        basis(torch.zeros(3), *arguments)
