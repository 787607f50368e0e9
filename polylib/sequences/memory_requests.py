"""Requests for memory: how much, from when to when."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polylib import _checks


class Requests(NamedTuple):
    """What is asked for: `sizes`, and for each the half-open time from `starts` to `ends`; whole numbers, `(n,)`.

    A tensor that is freed at a time, and one that is asked for at that time, may share addresses.
    """

    sizes: Tensor
    starts: Tensor
    ends: Tensor

    @property
    def live(self) -> Tensor:
        """What is live at each start, `(n,)`. The largest is the least memory that any plan needs."""
        alive = (self.starts[:, None] >= self.starts) & (self.starts[:, None] < self.ends)
        return (alive * self.sizes).sum(1)

    @property
    def lower_bound(self) -> int:
        """The most that is live at one time."""
        return int(self.live.max()) if len(self.sizes) else 0


def checked(sizes: Tensor | Sequence[int], starts: Tensor | Sequence[int], ends: Tensor | Sequence[int]) -> Requests:
    """The three columns as tensors of int64.

    Raises:
        ValueError: as `solve_offset_allocation` says.
    """
    columns = []
    for name, column in (("sizes", sizes), ("starts", starts), ("ends", ends)):
        own = torch.as_tensor(column).cpu()
        if own.dim() != 1 or own.is_complex() or (own.is_floating_point() and not _whole(own)):
            raise ValueError(f"{name} must be a vector of whole numbers, got {own.tolist()!r:.80}")
        columns.append(own.long())
    requests = Requests(*columns)
    lengths = [len(own) for own in requests]
    if len(set(lengths)) > 1:
        raise ValueError(f"sizes, starts and ends must have the same length, got {lengths}")
    if (requests.sizes < 0).any():
        raise ValueError(f"sizes must be at least 0, got {int(requests.sizes.min())}")
    if (requests.ends <= requests.starts).any():
        k = int((requests.ends <= requests.starts).nonzero()[0])
        times = f"{int(requests.starts[k])} to {int(requests.ends[k])}"
        raise ValueError(f"ends must be after starts, got {times} for tensor {k}")
    return requests


def _whole(column: Tensor) -> bool:
    return bool(((column == column.round()) & column.isfinite()).all())


def pairs_at_once(requests: Requests) -> Tensor:
    """`(n, n)`, booleans: i < j, both of some size, live at a common time."""
    sizes, starts, ends = requests
    both = (starts[:, None] < ends) & (starts < ends[:, None]) & (sizes > 0) & (sizes[:, None] > 0)
    return both.triu(1)


def overlaps(requests: Requests, offsets: Tensor) -> int:
    """How many pairs of tensors share an address at a common time: 0 for a plan."""
    sizes, starts, ends = checked(*requests)
    _checks.shape("offsets", offsets, f"({len(sizes)},)", offsets.shape == sizes.shape)
    times = (starts[:, None] < ends) & (starts < ends[:, None])
    places = (offsets[:, None] < offsets + sizes) & (offsets < (offsets + sizes)[:, None])
    return int((times & places).triu(1).sum())
