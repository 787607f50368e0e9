"""What is timed and what is compiled of sorting in pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.group_sort import cost, group_sort, group_sort_reference


def eager(x: Tensor) -> Tensor:
    """As libraries of 1-Lipschitz networks write MaxMin."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([torch.minimum(first, second), torch.maximum(first, second)], -1).flatten(-2)


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(256, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(1024, 1024), (16384, 4096)], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for shape in [(4, 8)] if quick else sizes:
            x = torch.randn(shape, device=device).to(dtype)
            one = cost(x.numel(), dtype)
            functions = {"reference": group_sort_reference, "eager": eager, "ours": group_sort}
            yield "x".join(map(str, shape)), dtype, (one, one + one), {who: (f, (x,)) for who, f in functions.items()}


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes for rows of whole vectors and for an odd number of pairs."""
    for shape in [(4, 256), (17, 34)] if small else [(16384, 4096), (999, 34)]:
        for dtype in BOTH:
            x = torch.zeros(shape, dtype=dtype) if small else torch.empty(shape, dtype=dtype)
            words = torch.zeros(-(-x.numel() // 1024) * 16, dtype=torch.int32)
            name = "x".join(map(str, shape))

            def forward(x=x):
                return torch.ops.polylib.group_sort(x)

            def backward(x=x, words=words):
                return torch.ops.polylib.group_sort_swap(x, words)

            one = cost(x.numel(), dtype)
            yield Launch(f"forward {name}", dtype, forward, x.numel(), one, formula(eager, (x,), False))
            yield Launch(f"backward {name}", dtype, backward, x.numel(), one, formula(eager, (x,), True))
