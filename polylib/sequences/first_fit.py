"""Plans for memory, and the simplest way to make one: each tensor at the lowest address that is free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polylib import _checks
from polylib.sequences.memory_requests import Requests, checked, pairs_at_once


@dataclass(frozen=True)
class MemoryPlan:
    """Addresses for all requests.

    Attributes:
        peak: the end of the highest tensor.
        offsets: `(n,)`, int64, the first address of each tensor.
        status: `"optimal"`, if no plan has a lower peak; `"feasible"` otherwise.
        lower_bound: what is proved: no plan has a peak below.
        binaries: pairs of tensors whose order the integer program had to choose.
        nodes: of its search tree; 0 if a simple rule met the bound.
    """

    peak: int
    offsets: Tensor
    status: Literal["optimal", "feasible"]
    lower_bound: int
    binaries: int = 0
    nodes: int = 0


def first_fit_plan(
    sizes: Tensor | Sequence[int],
    starts: Tensor | Sequence[int],
    ends: Tensor | Sequence[int],
    order: Literal["time", "size"] = "time",
) -> MemoryPlan:
    """Each tensor in turn at the lowest address where it meets no other one.

    In the order of `"time"` it is what an allocator without foresight does; in that of `"size"`, largest first, it has
    to know all requests before. Arguments and errors as in `solve_offset_allocation`.
    """
    requests = checked(sizes, starts, ends)
    _checks.choice("order", order, ("time", "size"))
    key = requests.starts if order == "time" else -requests.sizes
    offsets = place(requests, key.argsort(stable=True).tolist())
    bound, top = requests.lower_bound, peak(requests, offsets)
    return MemoryPlan(top, offsets, "optimal" if top == bound else "feasible", bound)


def place(requests: Requests, order: Sequence[int]) -> Tensor:
    """First fit: each tensor in that order at the lowest address that is free all its time."""
    meets = pairs_at_once(requests)
    meets = meets | meets.T
    offsets = torch.zeros_like(requests.sizes)
    placed = torch.zeros_like(requests.sizes, dtype=torch.bool)
    tops = requests.sizes.tolist()
    for k in order:
        own, size, at = meets[k] & placed, tops[k], 0
        low, first = offsets[own].sort(stable=True)
        for begin, length in zip(low.tolist(), requests.sizes[own][first].tolist(), strict=True):
            if begin - at >= size:
                break
            at = max(at, begin + length)
        offsets[k], placed[k] = at, True
    return offsets


def peak(requests: Requests, offsets: Tensor) -> int:
    """The end of the highest tensor."""
    return int((offsets + requests.sizes).max()) if len(offsets) else 0
