r"""How far apart two Gaussian mixtures of experts are: as densities, and as sets of experts.

H. Nguyen, P. Akbarian and N. Ho, ICML 2024 (arXiv 2401.13875), compare parameters by losses over Voronoi cells: each
fitted expert belongs to the nearest true one. The exponents here are derived, not taken from the paper.
"""

import torch
from torch import Tensor

from polylib import _checks
from polylib.sparsity.gaussian_moe import GaussianMoE, Parts, check_vectors
from polylib.sparsity.moe_scores import log_density

_POWERS = (1.0, 1.0, 4.0, 6.0)  # of the intercept, by the number of experts in a cell; half of it for the variance


def voronoi_loss(fitted: GaussianMoE, true: GaussianMoE, theta: Tensor | None = None) -> Tensor:
    r"""How far the experts of a fitted mixture are from those of the true one.

    Each fitted expert is one point, its gate's slope, its slope, its intercept and its variance, and goes to the
    nearest true one. With its weight $w_i=e^{\beta_{0i}/\tau}$ (no division where the bias is outside), a cell adds

    $$\Big|\sum_i w_i-w^*\Big|+\sum_iw_iD_i$$

    where $D_i$ is the sum of the powers q of $\lVert\Delta\beta_1\rVert$, $\Delta\tau$ and $\lVert\Delta a\rVert$, r
    of $\Delta b$ and r/2 of $\Delta\nu$, all in absolute value, with q = r = 1 and no halving for a cell of one
    expert. With several q = 2, as their first-order changes can cancel; and, as
    $\partial^2f/\partial b^2=2\,\partial f/\partial\nu$ for a
    Gaussian density f, intercepts and variances can cancel further: r = 4 for two and 6 for three (Ho and Nguyen
    2016).

    Args:
        fitted: a mixture with at least as many experts as the true one.
        true: the true one, of the same inputs.
        theta: `(..., p)`, parameters to take instead of those of `fitted`.

    Returns:
        `(...)`, in the dtype of `theta`.

    Raises:
        ValueError: fewer experts or other inputs, bad parameters, or more than three experts in a cell.
    """
    _check_pair(fitted, true)
    if fitted.experts < true.experts:
        raise ValueError(f"fitted must have at least {true.experts} experts, as true has, got {fitted.experts}")
    theta = _rows(fitted, theta)
    mine, other = fitted.split(theta), true.split(true.vector().detach().to(theta))
    points, centres = _points(mine), _points(other)
    cell = torch.cdist(points, centres).argmin(-1)
    member = torch.nn.functional.one_hot(cell, true.experts).to(theta)
    together = member.sum(-2).gather(-1, cell)
    if together.max() >= len(_POWERS):
        raise ValueError(f"a cell must have at most {len(_POWERS) - 1} experts, got {int(together.max())}")
    weight, true_weight = _weights(mine, fitted), _weights(other, true)
    d = fitted.in_dim
    apart = points - centres[cell]
    several = together > 1
    q = torch.where(several, 2.0, 1.0).to(theta)
    r = torch.tensor(_POWERS).to(theta)[together.long()]
    slopes = apart[..., :d].norm(dim=-1) ** q + apart[..., d : 2 * d].norm(dim=-1) ** q
    levels = apart[..., -2].abs() ** r + apart[..., -1].abs() ** torch.where(several, r / 2, r)
    temperature = (mine.tau - other.tau).abs() ** q
    masses = (weight[..., None, :] @ member)[..., 0, :]
    return (weight * (slopes + levels + temperature)).sum(-1) + (masses - true_weight).abs().sum(-1)


def hellinger(
    fitted: GaussianMoE, true: GaussianMoE, x: Tensor, y: Tensor, weights: Tensor, theta: Tensor | None = None
) -> Tensor:
    r"""The Hellinger distance of the densities of y given x, averaged over x.

    That is the root of the mean of $\frac12\int(\sqrt{g}-\sqrt{g^*})^2\,dy$, with the integral as a sum over equal
    steps of y, which for smooth densities has an error far below that of the sums of a lower order.

    Args:
        fitted: a mixture.
        true: another one of the same inputs.
        x: `(m, d)`, inputs.
        y: `(l,)`, at least two rising outputs in equal steps that reach beyond all of both densities.
        weights: `(m,)`, of the inputs, with the sum 1.
        theta: `(..., p)`, parameters to take instead of those of `fitted`.

    Returns:
        `(...)`, from 0 to 1.

    Raises:
        ValueError: other inputs, bad parameters, steps that are not equal, or shapes that do not fit.
    """
    _check_pair(fitted, true)
    _checks.shape("x", x, f"(m, {true.in_dim})", x.dim() == 2 and x.shape[1] == true.in_dim and len(x) > 0)
    _checks.shape("y", y, "(l,) with l of at least 2", y.dim() == 1 and len(y) > 1)
    _checks.shape("weights", weights, f"({len(x)},), as x has it", weights.shape == x.shape[:1])
    steps = y.diff()
    if not (steps > 0).all() or not torch.allclose(steps, steps[:1], rtol=1e-4):
        raise ValueError("y must rise in equal steps, got others")
    theta = _rows(fitted, theta)
    rows = theta.reshape(-1, fitted.size)
    inputs, outputs = x.repeat_interleave(len(y), 0).to(theta), y.repeat(len(x)).to(theta)

    def roots(model: GaussianMoE, rows: Tensor) -> Tensor:
        found = log_density(model, rows, inputs.expand(len(rows), -1, -1), outputs.expand(len(rows), -1))
        return (0.5 * found).exp().view(len(rows), len(x), len(y))

    apart = (roots(fitted, rows) - roots(true, true.vector().detach().to(theta)[None])).square()
    squares = 0.5 * apart.sum(-1) * steps.mean().to(theta) @ weights.to(theta)
    return squares.sqrt().view(theta.shape[:-1])


def _points(parts: Parts) -> Tensor:
    """The experts as points `(..., k, 2 d + 2)`."""
    reference = torch.zeros_like(parts.beta1[..., :1, :])
    each = [torch.cat([parts.beta1, reference], -2), parts.a, parts.b[..., None], parts.log_nu.exp()[..., None]]
    return torch.cat(each, -1)


def _weights(parts: Parts, model: GaussianMoE) -> Tensor:
    bias = parts.beta0 / parts.tau if model.bias_inside else parts.beta0
    return torch.cat([bias, torch.zeros_like(bias[..., :1])], -1).exp()


def _rows(model: GaussianMoE, theta: Tensor | None) -> Tensor:
    if theta is None:
        return model.vector().detach()
    check_vectors("theta", theta, model)
    return theta


def _check_pair(fitted: GaussianMoE, true: GaussianMoE) -> None:
    if fitted.in_dim != true.in_dim:
        raise ValueError(f"fitted must have inputs of length {true.in_dim}, as true has, got {fitted.in_dim}")
