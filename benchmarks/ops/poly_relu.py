"""What is timed and what is compiled of PolyReLU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels._polynomials import ORDER
from polylib.kernels.poly_relu import cost, poly_relu, poly_relu_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(256, 1024), (512, 4096)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(16384, 2048), (16384, 8192), (4096, 32768)], [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        for rows, width in [(8, 64)] if quick else sizes:
            x = torch.randn(rows, width, device=device, dtype=dtype)
            args = (x, torch.full((ORDER,), 1 / 3, device=device, dtype=dtype), x.new_zeros(1))
            forward = cost(x.numel(), dtype)
            contestants = {"reference": (poly_relu_reference, args), "ours": (poly_relu, args)}
            yield f"{rows}x{width}", dtype, (forward, forward + cost(x.numel(), dtype, "backward")), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions at a size that is a multiple of 16 entries, and at one that is not."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    for rows, width in [(16, 512), (3, 1667)] if small else [(16384, 8192), (4096, 4099)]:
        for dtype in BOTH:
            x, weight, bias = new(rows, width, dtype=dtype), torch.ones(ORDER), torch.ones(1)
            args = (x, weight, bias)
            for way in ("forward", "backward"):

                def run(x=x, weight=weight, bias=bias, way=way):
                    if way == "forward":
                        return torch.ops.polylib.poly_relu(x, weight, bias)
                    return torch.ops.polylib.poly_relu_backward(like(x), x, weight)

                eager = formula(poly_relu_reference, args, way == "backward")
                yield Launch(f"{way} {rows}x{width}", dtype, run, x.numel(), cost(x.numel(), dtype, way), eager)
