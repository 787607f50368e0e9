"""Products of tokens with a matrix of which each token uses some groups of rows or columns: what is skipped is saved.

They do what `MoHDSublayer` does by masks, and are for measuring what skipping is worth. Groups that all tokens use are
one product with a part of the matrix. Each other group has a product of its own, over the tokens that use it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from polylib import _checks


def from_groups(x: Tensor, weight: Tensor, used: Tensor) -> Tensor:
    """`x @ weight.T` for x `(tokens, d)` that is zero outside of the groups of columns that a token uses.

    Args:
        weight: `(f, d)`.
        used: bool, `(tokens, groups)`; d is a multiple of `groups`.

    Returns:
        `(tokens, f)`. What x holds outside of the groups is not read.

    Raises:
        TypeError: `used` that is not bool.
        ValueError: shapes that don't fit.
    """
    _check("x", x, weight.dim() == 2 and x.shape[-1:] == weight.shape[-1:], used, weight.shape[-1])
    out = x.new_zeros(len(x), len(weight))
    for rows, group in _parts(used, weight.shape[1]):
        if rows is None:
            out += x[:, group] @ weight[:, group].T
        else:
            out.index_add_(0, rows, x[rows, group] @ weight[:, group].T)
    return out


def to_groups(h: Tensor, weight: Tensor, used: Tensor) -> Tensor:
    """`h @ weight.T` for h `(tokens, f)`, only in the groups of outputs that a token uses, and zero elsewhere.

    Args:
        weight: `(d, f)`.
        used: as in `from_groups`.

    Returns:
        `(tokens, d)`.

    Raises:
        TypeError, ValueError: as `from_groups`.
    """
    _check("h", h, weight.dim() == 2 and h.shape[-1:] == weight.shape[-1:], used, len(weight))
    out = h.new_zeros(len(h), len(weight))
    for rows, group in _parts(used, len(weight)):
        if rows is None:
            out[:, group] = h @ weight[group].T
        else:
            out[rows, group] = h[rows] @ weight[group].T
    return out


def _parts(used: Tensor, d: int) -> Iterator[tuple[Tensor | None, slice]]:
    """For runs of groups that all tokens use, None and their dimensions; for each other one its tokens, if any."""
    width = d // used.shape[1]
    counts = used.sum(0).tolist()
    first = 0
    while first < len(counts):
        last = first + 1
        if counts[first] == len(used):
            while last < len(counts) and counts[last] == len(used):
                last += 1
            yield None, slice(first * width, last * width)
        elif counts[first]:
            yield used[:, first].nonzero()[:, 0], slice(first * width, last * width)
        first = last


def _check(name: str, x: Tensor, fits: bool, used: Tensor, d: int) -> None:
    _checks.shape(name, x, "(tokens, n), with n the columns of weight", x.dim() == 2 and fits)
    _checks.shape("used", used, f"({len(x)}, groups)", used.dim() == 2 and len(used) == len(x))
    if used.dtype != torch.bool:
        raise TypeError(f"used must have dtype torch.bool, got {used.dtype}")
    _checks.divisor("groups of used", used.shape[1], "d", d)
