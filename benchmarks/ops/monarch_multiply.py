"""What is timed and what is compiled of the product with a Monarch matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.monarch_multiply import cost, monarch_multiply, monarch_multiply_reference


def by_batches(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """As two batched products with copies between and behind them, as the authors' public code has it."""
    rows, (k, _, p), (lanes, s, r) = x.shape[0], w1.shape, w2.shape
    a = torch.bmm(x.view(rows, k, p).transpose(0, 1), w1.mT).transpose(0, 1)
    h = a.contiguous().view(rows, r, lanes).transpose(1, 2).contiguous().transpose(0, 1)
    return torch.bmm(h, w2.mT).permute(1, 2, 0).contiguous().view(rows, s * lanes)


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)}).

    Square matrices whose blocks are as many as they are long, and one of four large blocks, which has no kernel.
    """
    sizes, dtypes = [(256, 32, 32, 32, 32, 32, 32), (256, 4, 192, 192, 4, 192, 192)], [torch.float32]
    if device.type == "cuda":
        sizes = [(16384, *[64] * 6), (65536, *[32] * 6), (16384, 16, 16, 48, 16, 192, 16)]
        dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for rows, k, q, p, lanes, s, r in [(8, *[4] * 6)] if quick else sizes:
            shapes = [(rows, k * p), (k, q, p), (lanes, s, r)]
            tensors = tuple(torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes)
            forward = cost(rows, k, q, p, lanes, s, r, dtype)
            costs = (forward, forward + cost(rows, k, q, p, lanes, s, r, dtype, backward=True))
            functions = {"reference": monarch_multiply_reference, "batched": by_batches, "ours": monarch_multiply}
            contestants = {who: (function, tensors) for who, function in functions.items()}
            yield f"{rows}x{k * p}, {k} blocks", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes for blocks that fill a tile and that do not."""
    sizes = (
        [(64, 16, 16, 16, 16), (32, 32, 32, 32, 32)] if small else [(16384, 64, 64, 64, 64), (65536, 32, 32, 32, 32)]
    )
    for rows, k, p, lanes, s in [*sizes, (33, 5, 7, 5, 9) if small else (16384, 16, 48, 16, 192)]:
        for dtype in BOTH:
            shapes = [(rows, k * p), (k, lanes, p), (lanes, s, k)]
            tensors = tuple((torch.ones if small else torch.empty)(shape, dtype=dtype) for shape in shapes)
            grad = torch.empty(rows, lanes * s, dtype=dtype)

            def forward(tensors=tensors):
                return torch.ops.polylib.monarch_multiply(*tensors)

            def backward(grad=grad, tensors=tensors):
                return torch.ops.polylib.monarch_multiply_backward(grad, *tensors)

            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                least = cost(rows, k, lanes, p, lanes, s, k, dtype, backward=back)
                eager = formula(by_batches, tensors, back)
                yield Launch(f"{way} {rows}x{k * p}/{k}", dtype, run, rows * k * p, least, eager)
