"""What is timed and what is compiled of periodic binarisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.sine_binarize import cost, sine_binarize, sine_binarize_reference

FREQ = 20.0


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)}).

    No library is known that has it; "sign" is the cheaper thing it competes with, a sign with the clipped gradient.
    """
    sizes, dtypes = [(256, 1024), (1024, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(4096, 4096), (16384, 4096)], [torch.float32, torch.bfloat16]

    def sign(w):
        clipped = w.clamp(-1, 1)
        return torch.where(w.detach() < 0, -1.0, 1.0).to(w.dtype) + (clipped - clipped.detach())

    for dtype in dtypes:
        for rows, columns in [(8, 64)] if quick else sizes:
            w = torch.randn(rows, columns, device=device, dtype=dtype)
            forward = cost(w.numel(), dtype)
            costs = (forward, forward + cost(w.numel(), dtype, "backward"))
            for name, hard in (("sine", False), ("square wave", True)):
                contestants = {
                    "reference": (lambda w, hard=hard: sine_binarize_reference(w, FREQ, hard), (w,)),
                    "sign": (sign, (w,)),
                    "ours": (lambda w, hard=hard: sine_binarize(w, FREQ, hard), (w,)),
                }
                yield f"{rows}x{columns} {name}", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield the sine, the square wave and the gradient, at a multiple of 16 entries, and at another size."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    for rows, columns in [(16, 512), (3, 1667)] if small else [(4096, 4096), (4096, 4099)]:
        for dtype in BOTH:
            w = new(rows, columns, dtype=dtype)
            for way, hard in (("forward", False), ("forward", True), ("backward", False)):

                def run(w=w, way=way, hard=hard):
                    if way == "forward":
                        return torch.ops.polylib.sine_binarize(w, FREQ, hard)
                    return torch.ops.polylib.sine_binarize_backward(like(w), w, FREQ)

                def function(w, hard=hard):
                    return sine_binarize_reference(w, FREQ, hard)

                eager = formula(function, (w,), way == "backward")
                label = f"{way} {rows}x{columns}{' hard' if hard else ''}"
                yield Launch(label, dtype, run, w.numel(), cost(w.numel(), dtype, way), eager)
