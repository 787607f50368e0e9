"""What is timed and what is compiled of the product of packed signs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.binary_linear import (
    binary_linear,
    binary_linear_reference,
    cost,
    cost_of_packing,
    pack_signs,
    pack_signs_reference,
    unpack_signs,
)


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, None), {contestant: (function, its tensors)}); there are no gradients.

    The peers multiply signs that are stored as numbers: "dense" in the dtype at hand, "int8" with PyTorch's integer
    product, where it has one for the shape. "packing" is ours with the packing of x before it.
    """
    sizes, dtype = [(1, 1024, 1024), (64, 1024, 1024)], torch.float32
    if device.type == "cuda":
        sizes, dtype = [(1, 4096, 4096), (8, 4096, 4096), (64, 4096, 4096), (8192, 4096, 4096)], torch.bfloat16
    for rows, features, outputs in [(8, 96, 16), (32, 100, 16)] if quick else sizes:
        x, w = (torch.randn(n, features, device=device, dtype=dtype) for n in (rows, outputs))
        words = pack_signs(x), pack_signs(w)
        signs = tuple(unpack_signs(t, features, dtype) for t in words)
        bytes_ = tuple(t.to(torch.int8) for t in signs)
        contestants = {
            "reference": (lambda a, b, k=features: binary_linear_reference(a, b, k), words),
            "dense": (F.linear, signs),
            "int8": (lambda a, b: torch._int_mm(a, b.mT), bytes_),
            "packing": (lambda a, b, k=features: binary_linear(pack_signs(a), b, k), (x, words[1])),
            "ours": (lambda a, b, k=features: binary_linear(a, b, k), words),
        }
        yield f"{rows}x{features}->{outputs}", dtype, (cost(rows, features, outputs), None), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield packing, and the product for few rows, for some and for many, and with words that are no multiple of 4."""
    new = torch.ones if small else torch.empty
    for rows, width in [(4, 1024), (3, 1041)] if small else [(4096, 4096), (4096, 1041)]:
        for dtype in BOTH:
            x = new(rows, width, dtype=dtype)

            def pack(x=x):
                return torch.ops.polylib.pack_signs(x)

            least, eager = cost_of_packing(rows, width, dtype), formula(pack_signs_reference, (x,), False)
            yield Launch(f"pack {rows}x{width}", dtype, pack, x.numel(), least, eager)
    sizes = [(1, 4096, 4096), (64, 4096, 4096), (8192, 4096, 4096), (64, 1041, 4096)]
    if small:
        sizes = [(1, 1024, 64), (64, 1024, 64), (128, 512, 64), (64, 1041, 64)]
    for rows, features, outputs in sizes:
        x, w = (new(n, -(-features // 32), dtype=torch.int32) for n in (rows, outputs))

        def run(x=x, w=w, features=features):
            return torch.ops.polylib.binary_linear(x, w, features)

        def function(x, w, features=features):
            return binary_linear_reference(x, w, features)

        least, eager = cost(rows, features, outputs), formula(function, (x, w), False)
        yield Launch(f"product {rows}x{features}->{outputs}", torch.int32, run, rows * outputs, least, eager)
