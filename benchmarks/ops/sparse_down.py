"""What is timed and what is compiled of the product with the active rows of a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.sparse_down import cost, sparse_down, sparse_down_reference


def dense(values: Tensor, indices: Tensor, weight_t: Tensor) -> Tensor:
    """All rows, of which most are multiplied by zero."""
    return (
        torch.zeros(len(values), len(weight_t), dtype=values.dtype).to(values).scatter_add(1, indices, values)
        @ weight_t
    )


def bags(values: Tensor, indices: Tensor, weight_t: Tensor) -> Tensor:
    """PyTorch's weighted sum of rows of a table; it is differentiable by all."""
    return F.embedding_bag(indices, weight_t, mode="sum", per_sample_weights=values)


def gathered(values: Tensor, indices: Tensor, weight_t: Tensor) -> Tensor:
    return torch.bmm(values[:, None], weight_t[indices])[:, 0]


def active(B: int, k: int, m: int, d: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    indices = torch.rand(B, m, generator=gen).argsort(1)[:, :k].contiguous().to(device)
    values, weight_t = (torch.randn(shape, generator=gen).to(device, dtype) for shape in ((B, k), (m, d)))
    return values, indices, weight_t / k**0.5


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)}).

    One token and some, at a thirtieth to a third of the units active.
    """
    sizes, dtypes = [(1, 128, 4096, 1024), (1, 1280, 4096, 1024), (8, 128, 4096, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes = [(B, k, 16384, 4096) for B in (1, 8, 64) for k in (512, 1638, 4915)]
        dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for B, k, m, d in [(2, 3, 8, 4)] if quick else sizes:
            values, indices, weight_t = active(B, k, m, d, dtype, device)
            forward = cost(B, k, d, dtype)
            costs = (forward, forward + cost(B, k, d, dtype, m=m, backward=True))
            functions = {
                "reference": sparse_down_reference, "dense": dense, "embedding_bag": bags, "gathered": gathered,
                "ours": sparse_down,
            }  # fmt: skip
            contestants = {
                who: (lambda v, w, f=f, indices=indices: f(v, indices, w), (values, weight_t))
                for who, f in functions.items()
            }
            yield f"{B} tokens, {k} of {m}, {d} wide", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes for one token, for some, and for rows of no multiple of a tile. Entries are those read."""
    sizes = [(1, 40, 64, 512), (4, 16, 64, 64), (3, 5, 16, 37)]
    for B, k, m, d in sizes if small else [(1, 1638, 16384, 4096), (64, 512, 16384, 4096), (8, 100, 1000, 1001)]:
        for dtype in BOTH:
            values, weight_t = (
                torch.ones(s, dtype=dtype) if small else torch.empty(s, dtype=dtype) for s in ((B, k), (m, d))
            )
            indices = torch.arange(B * k).view(B, k) % m
            grad = torch.ones(B, d)

            def forward(values=values, indices=indices, weight_t=weight_t):
                return torch.ops.polylib.sparse_down(values, indices, weight_t)

            def backward(grad=grad, values=values, indices=indices, weight_t=weight_t):
                return torch.ops.polylib.sparse_down_backward(grad, values, indices, weight_t)

            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                eager = formula(lambda v, w, indices=indices: gathered(v, indices, w), (values, weight_t), back)
                least = cost(B, k, d, dtype, m=m, backward=back)
                yield Launch(f"{way} {B}x{k}x{d}", dtype, run, B * k * d, least, eager)
