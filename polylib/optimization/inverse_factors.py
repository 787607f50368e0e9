"""Inverse covariances that follow new vectors by rank-one formulas, and gradients multiplied by them.

M. Mozaffari, S. Li, Z. Zhang and M. Mehri Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
Rank-1 Updates", NeurIPS 2023 (arXiv 2306.01685). A covariance A that is averaged over time, A <- g A + (1 - g) v v^T,
has an inverse J that follows in quadratic time by the formula of Sherman and Morrison. The formula that its
authors print, in the figure of their repository, is another one, and their package has a third; all three are here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from polylib import _checks


@torch.no_grad()
def sherman_morrison_ema_(inverse: Tensor, v: Tensor, gamma: float) -> Tensor:
    """The inverse of an average after one more vector: J = A^-1 becomes (g A + (1 - g) v v^T)^-1, in place.

    J <- J / g - k (J v) (J v)^T  with  k = (1 - g) / g^2 / (1 + (1 - g) / g v^T J v). It takes about 4 d^2 additions
    and multiplications. A direction that no vector ever has grows by 1 / g each time: see `stabilise_`.

    Args:
        inverse: J, symmetric and positive definite, `(..., d, d)`. Half precision is computed in float32.
        v: `(..., d)`, with the same leading dimensions.
        gamma: g, the weight of the past, above 0 and below 1.

    Returns:
        `inverse`, changed.

    Raises:
        ValueError: shapes that don't fit, or `gamma` out of its range.
    """
    gamma = _check(inverse, v, gamma)
    along, quadratic = _moved(inverse, v)
    ratio = (1 - gamma) / gamma
    size = ratio / gamma / (1 + ratio * quadratic)
    return _rank_one_(inverse, 1 / gamma, -1, size.sqrt() * along)


@torch.no_grad()
def package_refresh_(inverse: Tensor, v: Tensor, gamma: float) -> Tensor:
    """The refresh of the authors' package, in place: M = g J + (1 - g) I, then J <- M - M v v^T M / (1 + v^T M v).

    That is the inverse of M^-1 + v v^T. Nothing in it grows: J never exceeds M, so that from the identity on all
    eigenvalues stay above 0 and at most 1. The package has 0.95 in the place of g. Arguments as in
    `sherman_morrison_ema_`.
    """
    gamma = _check(inverse, v, gamma)
    inverse.mul_(gamma).diagonal(dim1=-2, dim2=-1).add_(1 - gamma)
    along, quadratic = _moved(inverse, v)
    return _rank_one_(inverse, 1, -1, (1 + quadratic).rsqrt() * along)


@torch.no_grad()
def printed_refresh_(inverse: Tensor, v: Tensor, gamma: float) -> Tensor:
    """The refresh as the authors print it, in place: J <- g J + (1 - g) / (g^2 (1 + g (1 - g) v^T J v)) (J v) (J v)^T.

    It is positive definite, but not the inverse of an average: what is added should be subtracted, and g should be
    1 / g. It amplifies the direction of v, which an inverse has to damp. For comparison only. Arguments as in
    `sherman_morrison_ema_`.
    """
    gamma = _check(inverse, v, gamma)
    along, quadratic = _moved(inverse, v)
    size = (1 - gamma) / gamma**2 / (1 + gamma * (1 - gamma) * quadratic)
    return _rank_one_(inverse, gamma, 1, size.sqrt() * along)


REFRESHES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "exact": sherman_morrison_ema_,
    "package": package_refresh_,
    "printed": printed_refresh_,
}


@torch.no_grad()
def stabilise_(inverse: Tensor, threshold: float, zeta: float) -> Tensor:
    """Blend with the identity, J <- zeta J + (1 - zeta) I, in place, where an entry is larger than `threshold`.

    Args:
        inverse: `(..., d, d)`; each matrix is judged by itself, on its device.
        threshold: of the largest absolute entry, above 0.
        zeta: what is kept, from 0 to 1. Below the weight of the past of the refresh it bounds what grows; at that
            weight a direction without vectors still grows, but by the same amount and not the same factor each time.

    Returns:
        `inverse`, changed.

    Raises:
        ValueError: no square matrices, or a number out of its range.
    """
    _check_square(inverse)
    threshold, zeta = _checks.number("threshold", threshold, above=0), _checks.number("zeta", zeta, least=0, most=1)
    if inverse.numel():
        largest = inverse.abs().amax((-2, -1), keepdim=True)
        kept = torch.where(largest > threshold, zeta, 1.0).to(inverse.dtype)
        inverse.mul_(kept).diagonal(dim1=-2, dim2=-1).add_(1 - kept[..., 0])
    return inverse


def kronecker_precondition(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L^-1 G R^-1: a gradient G, `(..., o, i)`, between inverse factors `(..., o, o)` and `(..., i, i)`.

    The result has the dtype of `grad`, and is computed in the wider of its dtype and that of the factors.

    Raises:
        ValueError: shapes that don't fit.
    """
    _checks.shape("grad", grad, "(..., o, i)", grad.dim() > 1)
    for name, factor, size in (("left", left, grad.shape[-2]), ("right", right, grad.shape[-1])):
        _checks.shape(name, factor, f"(..., {size}, {size}), as grad", factor.shape[-2:] == (size, size))
    wide = torch.promote_types(grad.dtype, torch.promote_types(left.dtype, right.dtype))
    wide = torch.promote_types(wide, torch.float32)
    return (left.to(wide) @ grad.to(wide) @ right.to(wide)).to(grad.dtype)


def rescaled(direction: Tensor, gradient: Tensor) -> Tensor:
    """`direction` with the length of `gradient`, `(..., o, i)` each: as Frobenius norms; zero if either is zero."""
    wide = torch.promote_types(direction.dtype, torch.float32)
    unit, own, _ = _unit(direction.to(wide))
    _, wanted, largest = _unit(gradient.to(wide))
    return (unit * (wanted / own) * largest).to(direction.dtype)


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices whose largest entry is 1, or zeros; their lengths, whose squares can't overflow; and what it was."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    unit = x / torch.where(largest > 0, largest, 1)
    return unit, torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True).clamp(min=1), largest


def _moved(inverse: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """J v, `(..., d)`, and v^T J v, `(..., 1)`, in float32 at least."""
    wide = torch.promote_types(inverse.dtype, torch.float32)
    v = v.to(wide)
    along = (inverse.to(wide) @ v[..., None])[..., 0]
    return along, (along * v).sum(-1, keepdim=True)


def _rank_one_(inverse: Tensor, scale: float, sign: int, u: Tensor) -> Tensor:
    """scale J + sign u u^T, in place: symmetric if J is, and read and written once."""
    if inverse.dim() == 2 and inverse.dtype == u.dtype:
        return inverse.addr_(u, u, beta=scale, alpha=sign)
    product = u[..., :, None] * u[..., None, :]
    return inverse.copy_(inverse.to(u.dtype).mul(scale).add(product, alpha=sign))


def _check_square(inverse: Tensor) -> None:
    square = inverse.dim() > 1 and inverse.shape[-1] == inverse.shape[-2]
    _checks.shape("inverse", inverse, "(..., d, d)", square)


def _check(inverse: Tensor, v: Tensor, gamma: float) -> float:
    _check_square(inverse)
    _checks.shape("v", v, f"{tuple(inverse.shape[:-1])}, as inverse", v.shape == inverse.shape[:-1])
    return _checks.number("gamma", gamma, above=0, below=1)
