"""What is timed and what is compiled of the state spaces that go along a sequence by chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import Launch, formula
from benchmarks.ops.vandermonde import waves
from polylib.kernels.s4d_scan import cost, s4d_scan, s4d_scan_reference
from polylib.kernels.vandermonde import vandermonde
from polylib.sequences.long_convolution import causal_convolution


def by_transforms(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """The kernels by our other op, and torch's Fourier transforms."""
    return causal_convolution(u, vandermonde(v, x, u.shape[-1]))


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of the gradients), {contestant: (function, its tensors)})."""
    sizes = [(4, 16, 32, 1024)]
    if device.type == "cuda":
        sizes = [(16, 256, 32, 1024), (16, 256, 32, 16384), (50, 128, 32, 1024), (1, 512, 32, 65536)]
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    for B, H, N, L in [(2, 3, 4, 50)] if quick else sizes:
        v, x = waves(H, N, device)
        for dtype in dtypes:
            u = torch.randn(B, H, L, device=device, dtype=dtype)
            functions = {
                "reference": s4d_scan_reference,
                "transforms": by_transforms,
                "transforms compiled": torch.compile(by_transforms, dynamic=False),
                "ours": s4d_scan,
            }
            contestants = {who: (f, (u, v, x)) for who, f in functions.items()}
            costs = tuple(cost(B, H, N, L, dtype, backward=back) for back in (False, True))
            yield f"{B}x{H}x{L}, {N}", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes, for lengths that are a multiple of a chunk or not. Entries are those of the result."""
    new = torch.ones if small else torch.empty
    sizes = [(16, 2, 32, 1024), (20, 2, 32, 1041)] if small else [(16, 256, 32, 4096), (50, 128, 32, 1041)]
    for dtype in (torch.bfloat16, torch.float32):
        for B, H, N, L in [*sizes, (16, 2, 64, 1024)] if small else [*sizes, (16, 256, 64, 4096)]:
            u, grad = new(B, H, L, dtype=dtype), new(B, H, L, dtype=dtype)
            T = 32 if N == 64 else 64
            matrices = new(H, T, T), new(H, 2, T, N), new(H, 2, N, T), new(H, 2, N)
            if small:
                matrices = tuple(matrix / 1000 for matrix in matrices)

            def forward(u=u, matrices=matrices):
                return torch.ops.polylib.s4d_scan(u, *matrices)

            def backward(grad=grad, u=u, matrices=matrices):
                return torch.ops.polylib.s4d_scan_backward(grad, u, *matrices)

            v, x = waves(H, N)
            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                plain = formula(by_transforms, (u, v, x), back)
                least = cost(B, H, N, L, dtype, backward=back)
                yield Launch(f"{way} {B}x{H}x{L}, {N}", dtype, run, B * H * L, least, plain)
