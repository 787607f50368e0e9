"""Causal Monarch against polynomials that are multiplied as such, the plain convolution, and its own Jacobian."""

import numpy as np
import pytest
import torch
from numpy.polynomial import polynomial

from polylib.sequences import (
    causal_convolution,
    causal_monarch_convolution,
    causal_monarch_factors,
    monarch_dense,
    shuffled,
)


def bases(b, seed=0, size=0.3):
    torch.manual_seed(seed)
    return size * torch.randn(b, b).double(), size * torch.randn(b, b, b).double()


def polynomials(lam, rho, cap):
    """The coefficients (N, degree + 1) of all q_j, multiplied out."""
    b = len(lam)
    result = np.zeros((b * b, 2 * b * b))
    for j in range(b * b):
        j0, j1 = divmod(j, b)
        left = [1.0 if a == j1 else lam[j1, a].item() * (a > j1) for a in range(b)]
        right = np.zeros(b * (b - 1) + 1)
        for c in range(j0, b):
            gone = cap and j0 < b // 2 <= c
            right[b * c] = 1.0 if c == j0 else 0.0 if gone else rho[j1, j0, c].item()
        product = polynomial.polymul(left, right)
        result[j, : len(product)] = product
    return result


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("b", [2, 4, 6])
def test_the_factors_are_values_of_the_polynomials(b, cap):
    lam, rho = bases(b)
    N, M = b * b, monarch_dense(*causal_monarch_factors(lam, rho, cap))
    points = np.exp(-2j * np.pi * np.arange(N) / N)
    wanted = np.stack([polynomial.polyval(points, q) for q in polynomials(lam, rho, cap)], 1)
    order = shuffled(torch.arange(N), b)  # column c of M is polynomial order[c]
    np.testing.assert_allclose(M.numpy(), wanted[:, order.numpy()], atol=1e-11)


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("b", [2, 4])
def test_the_convolution_is_a_product_of_polynomials(b, cap):
    lam, rho = bases(b)
    N, n = b * b, b * b // 2
    u, k = torch.randn(2, n).double()
    q = polynomials(lam, rho, cap)
    product = np.convolve(u.numpy() @ q[:n], k.numpy() @ q[:n])
    wrapped = np.zeros(N)
    for degree, value in enumerate(product):
        wrapped[degree % N] += value
    basis = np.stack([[row[d::N].sum() for d in range(N)] for row in q])
    wanted = np.linalg.solve(basis.T, wrapped)[:n]
    np.testing.assert_allclose(causal_monarch_convolution(u, k, lam, rho, cap), wanted, atol=1e-11)


def test_by_hand_with_four_points():
    """q_0 = 1 + lam Z, q_1 = Z: y_0 = u_0 k_0, y_1 = u_0 k_1 + u_1 k_0 + lam u_0 k_0."""
    lam, rho = bases(2)
    lam[0, 1] = 0.5
    u, k = torch.tensor([2.0, 3.0]).double(), torch.tensor([5.0, 7.0]).double()
    y = causal_monarch_convolution(u, k, lam, rho)
    np.testing.assert_allclose(y, [10, 14 + 15 + 5], atol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_identities_give_the_plain_convolution(n):
    torch.manual_seed(0)
    u, k = torch.randn(3, n).double(), torch.randn(n).double()
    zero = torch.zeros(4, 4).double()
    y = causal_monarch_convolution(u, k, zero, zero.expand(4, 4, 4))
    torch.testing.assert_close(y, causal_convolution(u, k))


@pytest.mark.parametrize("b", [2, 4, 8])
def test_the_jacobian_is_triangular_with_the_cap_only(b):
    lam, rho = bases(b)
    u, k = torch.randn(2, b * b // 2).double()
    ahead = []
    for cap in (True, False):
        J = torch.func.jacrev(causal_monarch_convolution)(u, k, lam, rho, cap)
        ahead.append(J.triu(1).abs().max())
    assert ahead[0] < 1e-12
    assert ahead[1] > 1e-2


def test_gradients():
    lam, rho = bases(2)
    inputs = [torch.randn(2).double().requires_grad_() for _ in range(2)] + [lam.requires_grad_(), rho.requires_grad_()]
    assert torch.autograd.gradcheck(causal_monarch_convolution, inputs)


def test_bad_input():
    lam, rho = bases(4)
    u = torch.zeros(8).double()
    with pytest.raises(ValueError, match="lam must have shape"):
        causal_monarch_factors(torch.zeros(3, 3), torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="rho must have shape"):
        causal_monarch_factors(lam, lam)
    with pytest.raises(TypeError, match="float32 or float64"):
        causal_monarch_factors(lam, rho.float())
    with pytest.raises(TypeError, match="floating-point"):
        causal_monarch_factors(lam.long(), rho.long())
    with pytest.raises(ValueError, match="u must have shape"):
        causal_monarch_convolution(torch.zeros(9).double(), torch.zeros(9).double(), lam, rho)
    with pytest.raises(ValueError, match="k must have shape"):
        causal_monarch_convolution(u, u[:3], lam, rho)
    with pytest.raises(TypeError, match="u must have the dtype of lam"):
        causal_monarch_convolution(u.float(), u, lam, rho)
