"""Compressors of vectors: what a client of distributed training sends in place of its gradient.

A compressor C is contractive if norm(C(x) - x)^2 <= (1 - alpha) norm(x)^2 for an alpha in (0, 1], which is all that
error feedback asks for. It is positively homogeneous if C(t x) = t C(x) for t > 0: the entries that it keeps depend on
the direction of x only. Each one works along the last dimension, so that all clients are compressed at once.

Of two entries of the same size the one with the lower index is kept. Infinities and NaN count as the largest.
"""

import torch
from torch import Tensor

from polylib import _checks


class TopK:
    """Keep the entries that are largest in size: alpha = k / d, homogeneous.

    Args:
        ratio: k / d, above 0 and at most 1. Of d entries max(1, round(ratio d)) are kept.
    """

    homogeneous = True

    def __init__(self, ratio: float) -> None:
        self.ratio = _checks.number("ratio", ratio, above=0, most=1)

    def kept(self, d: int) -> int:
        """How many of d entries are kept, which is how many are sent."""
        return max(1, round(self.ratio * _checks.integer("d", d, least=1)))

    def alpha(self, d: int) -> float:
        """The contraction for vectors of d entries."""
        return self.kept(d) / d

    def __call__(self, x: Tensor) -> Tensor:
        """`(..., d)`: x with all but the k largest entries of each row set to zero."""
        k = self.kept(_length(x))
        if k == x.shape[-1]:
            return x.clone()
        chosen = _largest(x, k)
        return torch.zeros_like(x).scatter_(-1, chosen, x.gather(-1, chosen))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is sent of `(..., d)`: the values kept and their int32 indices, `(..., k)` each, of the same size for
        every x; see `decode_`."""
        chosen = _largest(x, self.kept(_length(x)))
        return x.gather(-1, chosen), chosen.int()


class BlockTopK:
    """Keep the k largest entries of every block: alpha = k / block, homogeneous.

    The choice is local, which a GPU makes in one pass. Where d is not a multiple of `block` the last block is shorter,
    and of its entries as many are kept, all of them if there are fewer.

    Args:
        k: entries kept of a block, 1 to `block`.
        block: entries in a block.
    """

    homogeneous = True

    def __init__(self, k: int, block: int = 1024) -> None:
        self.block = _checks.integer("block", block, least=1)
        self.k = _checks.integer("k", k, least=1, most=self.block)

    def kept(self, d: int) -> int:
        """How many of d entries are sent: k of each block, the last one padded to k."""
        return self.k * -(-_checks.integer("d", d, least=1) // self.block)

    def alpha(self, d: int) -> float:
        """The contraction for vectors of d entries: that of the largest block."""
        largest = min(self.block, _checks.integer("d", d, least=1))
        return min(self.k, largest) / largest

    def __call__(self, x: Tensor) -> Tensor:
        """`(..., d)`: x with all but the k largest entries of each block set to zero."""
        values, indices = self.encode(x)
        return decode_(torch.zeros_like(x), values.flatten(-2), indices.flatten(-2))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is sent of `(..., d)`: values and int32 indices within the vector, `(..., blocks, k)` each. Where the
        last block has fewer than k entries, the rest are value 0 at index -1."""
        d = _length(x)
        blocks = -(-d // self.block)
        padded = torch.nn.functional.pad(x, (0, blocks * self.block - d)).unflatten(-1, (blocks, self.block))
        chosen = _largest(padded, self.k)  # the padding is zero and comes last: chosen only when nothing else is left
        values = padded.gather(-1, chosen)
        indices = chosen + self.block * torch.arange(blocks, device=x.device)[:, None]
        return values, torch.where(indices < d, indices, -1).int()


class NaturalRounding:
    """Round each entry to the nearest power of two, with its sign: alpha = 8 / 9, not homogeneous.

    The worst entry is one and a half times a power of two: a third of it is lost. After a choice of entries the
    contraction is the product of both, since what is not chosen is orthogonal to what is.

    Args:
        after: the choice of entries that is made first, `TopK` or `BlockTopK`; by default none.
    """

    homogeneous = False

    def __init__(self, after: TopK | BlockTopK | None = None) -> None:
        if after is not None and not isinstance(after, TopK | BlockTopK):
            raise TypeError(f"after must be a TopK, a BlockTopK or None, got {after!r}")
        self.after = after

    def alpha(self, d: int) -> float:
        """The contraction for vectors of d entries."""
        return 8 / 9 * (1.0 if self.after is None else self.after.alpha(d))

    def __call__(self, x: Tensor) -> Tensor:
        """`(..., d)`: x rounded; zeros, infinities and NaN stay. The upper end of a dtype may round to infinity."""
        if self.after is not None:
            x = self.after(x)
        else:
            _length(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mantissa, exponent = torch.frexp(wide)  # x = mantissa 2^exponent with a mantissa from 1/2 to 1
        nearest = torch.ldexp(mantissa.sign(), exponent - (mantissa.abs() < 0.75).int())
        return torch.where(x.isfinite(), nearest.to(x.dtype), x)


def decode_(total: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Add what was sent to `total` in place, and return it.

    Args:
        total: `(..., d)`.
        values, indices: `(..., k)`, as `encode` gives them for a row, with the blocks in one dimension. An index of -1
            stands for nothing.
    """
    indices = indices.long()
    # Nothing is a zero, added at index 0. No other index occurs twice in a row, so the order of the sums is no matter.
    return total.scatter_add_(-1, indices.clamp(min=0), torch.where(indices < 0, 0, values))


def _largest(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries by size of each row, `(..., k)`, in ascending order; of equal ones the first."""
    if k == 1:
        return x.abs().argmax(-1, keepdim=True)
    size = x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = size.topk(k, -1, sorted=False).values.amin(-1, keepdim=True)
    larger, equal = size > least, size == least
    wanted = k - larger.sum(-1, keepdim=True)
    # `topk` alone does not say which of equal entries it takes. A stable sort would, at five times the cost.
    chosen = larger | (equal & (equal.cumsum(-1) <= wanted))
    return chosen.nonzero()[:, -1].view(*x.shape[:-1], k)


def _length(x: Tensor) -> int:
    fits = x.dim() > 0 and x.shape[-1] > 0
    _checks.shape("x", x, "(..., d) with at least one entry", fits)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating-point dtype, got {x.dtype}")
    if x.shape[-1] >= 2**31:
        raise ValueError(f"x must have fewer than 2^31 entries, for indices of 32 bits, got {x.shape[-1]}")
    return x.shape[-1]
