"""Late generalisation in a two-layer network of polynomial units, and the few numbers that describe it exactly.

T. Kumar and others, "Grokking as the transition from lazy to rich training dynamics", ICLR 2024 (arXiv 2310.06110).

The network is f(x) = alpha / N sum_i phi(w_i . x) with phi(h) = h + epsilon h^2 / 2. Completing the square gives
phi(h) = ((1 + epsilon h)^2 - 1) / (2 epsilon), so that with the *lifted moment* C = mean_i (1, w_i) (1, w_i)^T

    f(x) = alpha epsilon / 2 z^T C z - alpha / (2 epsilon),    z = (1 / epsilon, x).

Of N weight vectors only the D (D + 3) / 2 numbers in C enter the function, its tangent kernel and its test loss. All
functions take any number of leading dimensions, such as one for seeds and one for settings; they broadcast.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from polylib import _checks

Scale = float | Tensor  # one number, or one for each network


class PolynomialTwoLayer(nn.Module):
    """f(x) = alpha / width sum_i phi(w_i . x), phi(h) = h + epsilon h^2 / 2; the read-out is fixed.

    Args:
        dim: D, of the input.
        width: N, the number of units. Their weights start as standard normal numbers.
        alpha: the scale of the output, above 0.
        epsilon: how quadratic a unit is, above 0.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, dim: int, width: int, alpha: float, epsilon: float) -> None:
        super().__init__()
        dim, width = _checks.integer("dim", dim, least=1), _checks.integer("width", width, least=1)
        self.alpha = _checks.number("alpha", alpha, above=0)
        self.epsilon = _checks.number("epsilon", epsilon, above=0)
        self.weight = nn.Parameter(torch.randn(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        """From inputs `(..., D)` the outputs `(...)`."""
        fits = x.dim() > 0 and x.shape[-1] == self.weight.shape[1]
        _checks.shape("x", x, f"(..., {self.weight.shape[1]})", fits)
        h = x @ self.weight.T
        return self.alpha * (h + self.epsilon / 2 * h.square()).mean(-1)


class QuadraticTestLoss(NamedTuple):
    """The mean squared error and its three parts, each `(...)`; see `quadratic_test_loss`."""

    total: Tensor
    linear: Tensor
    trace: Tensor
    misalignment: Tensor


def lifted_moment(weight: Tensor) -> Tensor:
    """C = mean_i (1, w_i) (1, w_i)^T: from weights `(..., N, D)`, `(..., D + 1, D + 1)`.

    Its first row holds 1 and the mean of the weights, the rest their second moment.
    """
    _checks.shape("weight", weight, "(..., N, D) with N of at least 1", weight.dim() >= 2 and weight.shape[-2] > 0)
    lifted = torch.cat([torch.ones_like(weight[..., :1]), weight], -1)
    return lifted.mT @ lifted / weight.shape[-2]


def moment_output(moment: Tensor, x: Tensor, alpha: Scale, epsilon: Scale) -> Tensor:
    """The outputs `(..., P)` of the network with a lifted moment `(..., D + 1, D + 1)`, on inputs `(..., P, D)`."""
    alpha, epsilon = scales(moment, x, alpha, epsilon)
    z = lifted_input(x, epsilon)
    half = (alpha * epsilon / 2)[..., None]
    return half * torch.linalg.vecdot(z @ moment, z) - (alpha / (2 * epsilon))[..., None]


def moment_kernel(moment: Tensor, x: Tensor, epsilon: Scale) -> Tensor:
    """The tangent kernel K(x, x') = x . x' mean_i phi'(w_i . x) phi'(w_i . x'), `(..., P, P)`.

    It is N / alpha^2 times the product of the gradients by the weights. Arguments as in `moment_output`.
    """
    _, epsilon = scales(moment, x, 1.0, epsilon)
    z = lifted_input(x, epsilon)
    return (x @ x.mT) * (z @ moment @ z.mT) * epsilon[..., None, None] ** 2


def quadratic_test_loss(moment: Tensor, beta: Tensor, alpha: Scale, epsilon: Scale) -> QuadraticTestLoss:
    """The expected squared error on y = (beta . x)^2 / 2 for x ~ N(0, I / D), exactly.

    With the mean m and the second moment M of the weights and A = alpha epsilon M - beta beta^T it is the sum of
    alpha^2 m.m / D, the linear part, (tr A)^2 / (4 D^2), the trace part, and tr(A^2) / (2 D^2), the misalignment. It
    holds for the linearised twin too, whose m and M are those of `linearized_descent`.

    Args:
        moment: `(..., D + 1, D + 1)`, see `lifted_moment`.
        beta: `(..., D)`.
        alpha, epsilon: numbers above 0, or tensors `(...)`.

    Raises:
        ValueError: shapes that don't fit, or a scale that is not above 0.
    """
    alpha, epsilon = scales(moment, beta[..., None, :], alpha, epsilon)
    dim = beta.shape[-1]
    power = moment[..., 0, 1:].square().sum(-1)
    gap = (alpha * epsilon)[..., None, None] * moment[..., 1:, 1:] - beta[..., :, None] * beta[..., None, :]
    linear = alpha**2 * power / dim
    trace = gap.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / (4 * dim**2)
    misalignment = gap.square().sum((-2, -1)) / (2 * dim**2)
    return QuadraticTestLoss(linear + trace + misalignment, linear, trace, misalignment)


def lifted_input(x: Tensor, epsilon: Tensor) -> Tensor:
    """z = (1 / epsilon, x): from `(..., P, D)`, `(..., P, D + 1)`."""
    batch = torch.broadcast_shapes(x.shape[:-2], epsilon.shape)
    first = (1 / epsilon)[..., None, None].expand(*batch, x.shape[-2], 1)
    return torch.cat([first, x.expand(*batch, *x.shape[-2:])], -1)


def scales(moment: Tensor, x: Tensor, alpha: Scale, epsilon: Scale) -> tuple[Tensor, Tensor]:
    """Alpha and epsilon as tensors like `x`, after the checks that all doors share."""
    _checks.shape("x", x, "(..., P, D)", x.dim() >= 2)
    size = x.shape[-1] + 1
    _checks.shape(
        "moment", moment, f"(..., {size}, {size}), for inputs of {size - 1}", moment.shape[-2:] == (size,) * 2
    )
    checked = []
    for name, value in (("alpha", alpha), ("epsilon", epsilon)):
        tensor = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if not (tensor > 0).all() or not tensor.isfinite().all():
            raise ValueError(f"{name} must be above 0 and finite, got {tensor.tolist()}")
        checked.append(tensor)
    return checked[0], checked[1]
