"""What is timed and what is compiled of StatsQ."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.fake_quantize import code_range
from polylib.kernels.stats_quantize import cost, stats_quantize, stats_quantize_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)}).

    PyTorch's own fake quantiser takes no statistics, so that as a peer it gets the scale from a reduction before it;
    its grid is uniform with a zero level.
    """
    sizes, dtypes = [(256, 1024), (1024, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(4096, 4096), (4096, 16384), (256, 65536)], [torch.float32, torch.bfloat16]
    bits = 4

    def reference(w):
        return stats_quantize_reference(w, bits)

    def ours(w):
        return stats_quantize(w, bits)

    def torch_peer(w):
        steps = (2 * w.detach().abs().mean(-1)).float() / 2 ** (bits - 1)
        return torch.fake_quantize_per_channel_affine(w, steps, torch.zeros_like(steps).int(), 0, *code_range(bits))

    for dtype in dtypes:
        for rows, width in [(8, 64)] if quick else sizes:
            w = torch.randn(rows, width, device=device, dtype=dtype)
            forward = cost(rows, width, dtype)
            functions = {"reference": reference, "torch": torch_peer, "ours": ours}
            contestants = {name: (function, (w,)) for name, function in functions.items()}
            yield f"{rows}x{width}", dtype, (forward, forward), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield the forward pass for rows that are held in registers, and for longer ones."""
    new = torch.ones if small else torch.empty
    sizes = [(4096, 4096), (4096, 16384), (256, 65536)]
    for rows, width in [(2, width) for _, width in sizes] if small else sizes:
        for dtype in BOTH:
            w = new(rows, width, dtype=dtype)

            def run(w=w):
                return torch.ops.polylib.stats_quantize(w, 4)

            eager = formula(lambda w: stats_quantize_reference(w, 4), (w,), False)
            yield Launch(f"forward {rows}x{width}", dtype, run, w.numel(), cost(rows, width, dtype), eager)
