"""Families of univariate basis functions: what Kolmogorov-Arnold layers are made of.

Each is a function `(x, n_basis, lo, hi)` of x (...) with values (..., n_basis). The range from `lo` to `hi` is where
inputs are expected.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polylib import _checks

Basis = Callable[[Tensor, int, float, float], Tensor]


def bspline(x: Tensor, n_basis: int, lo: float, hi: float) -> Tensor:
    """Cubic B-splines on n_basis - 3 equal intervals, by the recursion of Cox and de Boor; they add up to 1."""
    step = (hi - lo) / (n_basis - 3)
    t = lo + step * torch.arange(-3, n_basis + 1, device=x.device, dtype=x.dtype)
    z = x.unsqueeze(-1)
    value = ((z >= t[:-1]) & (z < t[1:])).to(x.dtype)
    for k in (1, 2, 3):
        rising, falling = (z - t[: -k - 1]) / (k * step), (t[k + 1 :] - z) / (k * step)
        value = rising * value[..., :-1] + falling * value[..., 1:]
    return value


def _bumps(x: Tensor, n_basis: int, lo: float, hi: float) -> Tensor:
    """The distance to each of n_basis equally spaced centres, in units of their spacing."""
    centres = torch.linspace(lo, hi, n_basis, device=x.device, dtype=x.dtype)
    return (x.unsqueeze(-1) - centres) * ((n_basis - 1) / (hi - lo))


def rbf(x: Tensor, n_basis: int, lo: float, hi: float) -> Tensor:
    """Gaussian radial basis functions, as wide as their centres are apart."""
    return torch.exp(-_bumps(x, n_basis, lo, hi).square())


def chebyshev(x: Tensor, n_basis: int, lo: float, hi: float) -> Tensor:
    """Chebyshev polynomials of tanh(x), of degree 0 to n_basis - 1, by their recurrence; `lo` and `hi` are not used."""
    t = torch.tanh(x)
    values = [torch.ones_like(t), t]
    for _ in range(n_basis - 2):
        values.append(2 * t * values[-1] - values[-2])
    return torch.stack(values[:n_basis], -1)


def fourier(x: Tensor, n_basis: int, lo: float, hi: float) -> Tensor:
    """cos(pi x), sin(pi x), cos(2 pi x), ..., n_basis of them; `lo` and `hi` are not used."""
    n = torch.arange(1, n_basis // 2 + n_basis % 2 + 1, device=x.device, dtype=x.dtype)
    angle = math.pi * x.unsqueeze(-1) * n
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)[..., :n_basis]


def mexican_hat(x: Tensor, n_basis: int, lo: float, hi: float) -> Tensor:
    """Mexican-hat wavelets, 1.2 times as wide as their centres are apart."""
    square = (_bumps(x, n_basis, lo, hi) / 1.2).square()
    return 2 / (math.sqrt(3) * math.pi**0.25) * (square - 1) * torch.exp(-square / 2)


FAMILIES: dict[str, Basis] = {
    "bspline": bspline,
    "rbf": rbf,
    "chebyshev": chebyshev,
    "fourier": fourier,
    "mexican_hat": mexican_hat,
}


def basis(x: Tensor, name: str, n_basis: int = 8, lo: float = -1.2, hi: float = 1.2) -> Tensor:
    """Evaluate one family: x (...) to (..., n_basis).

    Raises:
        ValueError: an unknown `name`, `n_basis` below 4, or an empty range.
    """
    _checks.choice("name", name, FAMILIES)
    check_grid(n_basis, (lo, hi))
    return FAMILIES[name](x, n_basis, lo, hi)


def check_grid(n_basis: int, grid_range: tuple[float, float]) -> None:
    """Raise ValueError unless there are enough functions for a cubic spline and the range is not empty."""
    if not isinstance(n_basis, int) or n_basis < 4:
        raise ValueError(f"n_basis must be an integer of at least 4, the order of a cubic plus one, got {n_basis!r}")
    if not grid_range[0] < grid_range[1]:
        raise ValueError(f"grid_range must be two increasing numbers, got {grid_range}")
