"""The activation patterns of ReLU neurons: which samples a direction lets through.

M. Pilanci and T. Ergen, "Neural Networks are Convex Regularizers", ICML 2020: n samples in d dimensions have at most
2 sum_{k<d} binom(n - 1, k) of them, the cells into which n planes through the origin cut the space of directions.
"""

import itertools
import math

import torch
from torch import Tensor

from polylib import _checks


def sample_activation_patterns(x: Tensor, num: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The patterns (x @ g >= 0) of random normal directions g, each once, and without the one that passes nothing.

    n samples in d dimensions have at most 2 sum_{k<d} binom(n - 1, k) patterns; with many directions all are found.

    Args:
        x: the samples, `(n, d)`. A column of ones makes a bias.
        num: of directions to draw, at least 1.

    Returns:
        Patterns, `(n, P)` of booleans, and a direction for each, `(d, P)`; P is at most `num`, and may be 0.

    Raises:
        ValueError: samples of another shape or not finite, or `num` below 1.
    """
    check_samples(x)
    num = _checks.integer("num", num, least=1)
    source = None if generator is None else generator.device
    gates = torch.randn(x.shape[1], num, generator=generator, dtype=x.dtype, device=source).to(x.device)
    patterns, which = torch.unique(x @ gates >= 0, dim=1, return_inverse=True)
    first = torch.full((patterns.shape[1],), num, device=x.device).scatter_reduce(
        0, which, torch.arange(num, device=x.device), "amin"
    )
    some = patterns.any(0)
    return patterns[:, some], gates[:, first[some]]


def all_activation_patterns(x: Tensor) -> Tensor:
    """All patterns of samples in general position (no d of them linearly dependent), but the one that passes nothing.

    The patterns are the cells into which the samples, as planes through the origin, cut the space of directions. Each
    cell has a corner ray on d - 1 of the planes; next to that ray lie the cells with every choice of side for these.

    Args:
        x: the samples, `(n, d)`, with d at least 2 and at most n.

    Returns:
        `(n, P)` of booleans, P = 2 sum_{k<d} binom(n - 1, k), less one if a direction passes nothing.

    Raises:
        ValueError: samples of another shape or not finite, or more than 100,000 choices of d - 1 samples.
    """
    check_samples(x)
    n, d = x.shape
    _checks.shape("x", x, "(n, d) with d from 2 to n", 2 <= d <= n)
    if math.comb(n, d - 1) > 100_000:
        raise ValueError(f"x must have at most 100,000 choices of d - 1 rows, got {math.comb(n, d - 1):,}")
    chosen = torch.combinations(torch.arange(n, device=x.device), d - 1)
    rays = torch.linalg.svd(x[chosen].double()).Vh[:, -1]  # the direction that is orthogonal to the chosen samples
    found = []
    for sides in itertools.product((True, False), repeat=d - 1):
        for signed in (rays, -rays):
            patterns = x.double() @ signed.mT >= 0
            side = torch.tensor(sides, device=x.device)[:, None].expand(-1, len(chosen))
            found.append(patterns.scatter(0, chosen.mT, side))
    patterns = torch.unique(torch.cat(found, 1), dim=1)
    return patterns[:, patterns.any(0)]


def check_samples(x: Tensor) -> None:
    """Nothing, if x holds samples `(n, d)` of finite numbers; else a ValueError."""
    _checks.shape("x", x, "(n, d) with at least one sample", x.dim() == 2 and x.numel() > 0)
    if not x.isfinite().all():
        raise ValueError("x must be finite, got values that are not")
