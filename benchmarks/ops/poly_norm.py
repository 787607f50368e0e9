"""What is timed and what is compiled of PolyNorm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels._polynomials import ORDER
from polylib.kernels.poly_norm import EPS, cost, poly_norm, poly_norm_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    Liger-Kernel's PolyNorm is a contestant on a GPU where the package `liger-kernel` is installed.
    """
    sizes, dtypes = [(256, 1024), (512, 4096)], [torch.float32]
    peers = {}
    if device.type == "cuda":
        sizes, dtypes = [(16384, 2048), (16384, 5632), (16384, 8192), (2048, 32768)], [torch.bfloat16, torch.float32]
        try:
            from liger_kernel.ops.poly_norm import LigerPolyNormFunction
        except ImportError:
            pass
        else:
            peers["liger"] = lambda x, weight, bias: LigerPolyNormFunction.apply(x, weight, bias, EPS, False)
    for dtype in dtypes:
        for rows, width in [(8, 64)] if quick else sizes:
            x = torch.randn(rows, width, device=device, dtype=dtype)
            args = (x, torch.full((ORDER,), 1 / 3, device=device, dtype=dtype), x.new_zeros(1))
            functions = {"reference": poly_norm_reference, **peers, "ours": poly_norm}
            forward = cost(rows, width, dtype)
            contestants = {name: (function, args) for name, function in functions.items()}
            yield f"{rows}x{width}", dtype, (forward, forward + cost(rows, width, dtype, "backward")), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions for rows that are kept in registers, for rows that are walked, and for an odd width."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    sizes = [(16384, 2048), (16384, 5632), (16384, 8192), (2048, 32768), (4096, 1001)]
    for rows, width in [(4, width) for _, width in sizes] if small else sizes:
        for dtype in BOTH:
            x, weight, bias = new(rows, width, dtype=dtype), torch.ones(ORDER), torch.ones(1)
            args = (x, weight, bias)
            for way in ("forward", "backward"):

                def run(x=x, weight=weight, bias=bias, way=way):
                    if way == "forward":
                        return torch.ops.polylib.poly_norm(x, weight, bias, EPS)
                    return torch.ops.polylib.poly_norm_backward(like(x), x, weight, EPS)

                eager = formula(poly_norm_reference, args, way == "backward")
                yield Launch(f"{way} {rows}x{width}", dtype, run, x.numel(), cost(rows, width, dtype, way), eager)
