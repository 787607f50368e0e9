"""Rotary position embedding: queries and keys turned by their positions, so that their products know the distance.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864), with neighbouring
entries as pairs.
"""

import torch
from torch import Tensor

from polylib import _checks


def rotate_by_position(x: Tensor, start: int = 0, base: float = 10000.0) -> Tensor:
    """Turn the pair (2 i, 2 i + 1) at position t by the angle t base^(-2 i / d); the same shape.

    Args:
        x: `(..., n, d)` with an even d, at the positions start, ..., start + n - 1.
        start: the first position.
        base: of the angles.

    Angles have the precision of float32, or of a float64 x: in float32 they are off by t / 10^7 or so.

    Raises:
        TypeError: an x that is not floating.
        ValueError: an odd d, fewer than two axes, a negative start or a base that is not above 0.
    """
    start, base = _checks.integer("start", start, least=0), _checks.number("base", base, above=0)
    _checks.floating("dtype of x", x.dtype)
    fits = x.dim() >= 2 and x.shape[-1] % 2 == 0
    _checks.shape("x", x, "(..., n, d) with an even d", fits)
    n, d = x.shape[-2:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = base ** (-torch.arange(0, d, 2, device=x.device, dtype=wide) / d)
    angles = torch.arange(start, start + n, device=x.device, dtype=wide)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
