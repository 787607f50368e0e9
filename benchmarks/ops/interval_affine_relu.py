"""What is timed and what is compiled of batch normalisation and ReLU on intervals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.interval_affine_relu import cost, interval_affine_relu, interval_affine_relu_reference


def loss(parts: tuple[Tensor, ...]) -> Tensor:
    return sum(part.sum() for part in parts)


def eager(center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """As a reader would write it, in the dtype of the tensors."""
    shape = (-1,) + (1,) * (center.dim() - 2)
    k, t = (own.view(shape).to(center.dtype) for own in (scale, shift))
    m, d = center * k + t, radius * k.abs()
    low, high = (m - d).relu(), (m + d).relu()
    return (low + high) / 2, (high - low) / 2


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(128, 64, 8, 8)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(256, 128, 16, 16), (256, 512)], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for shape in [(2, 3, 4, 4)] if quick else sizes:
            center, radius = torch.randn(shape, device=device).to(dtype), torch.rand(shape, device=device).to(dtype)
            scale, shift = torch.randn(shape[1], device=device), torch.randn(shape[1], device=device)
            forward = cost(center.numel(), shape[1], dtype)
            costs = (forward, forward + cost(center.numel(), shape[1], dtype, backward=True))
            functions = {"reference": interval_affine_relu_reference, "eager": eager, "ours": interval_affine_relu}
            contestants = {
                who: (lambda *args, f=f: loss(f(*args)), (center, radius, scale, shift)) for who, f in functions.items()
            }
            yield "x".join(map(str, shape)), dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes, without and with the bounds before ReLU, and for rows of no multiple of a vector."""
    wide = (2, 256, 16) if small else (256, 128 * 16 * 16, 128)
    for B, N, C, bounds in [(*wide, False), (*wide, True), (3, 1001, 7, False)]:
        for dtype in BOTH:
            new = torch.ones if small else torch.empty
            tensors = [new(B, N, dtype=dtype) for _ in range(2)] + [torch.ones(C), torch.zeros(C)]
            grads = [new(B, N, dtype=dtype) for _ in range(4 if bounds else 2)] + [None] * (0 if bounds else 2)

            def forward(tensors=tensors, bounds=bounds):
                return torch.ops.polylib.interval_affine_relu(*tensors, bounds)

            def backward(tensors=tensors, grads=grads):
                return torch.ops.polylib.interval_affine_relu_backward(*grads, *tensors)

            def plain(c, r, k, t, bounds=bounds, C=C):
                parts = interval_affine_relu_reference(c.view(len(c), C, -1), r.view(len(c), C, -1), k, t, bounds)
                return torch.cat(parts)

            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                least = cost(B * N, C, dtype, bounds=bounds, backward=back)
                label = f"{way}{' with bounds' if bounds else ''} {B}x{N}"
                yield Launch(label, dtype, run, B * N, least, formula(plain, tuple(tensors), back))
