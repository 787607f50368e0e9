"""What is timed and what is compiled of ReLU, rounding and the changes between frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.delta_relu import cost, delta_relu, delta_relu_reference


def eager(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As a reader would write it, with the usual gradient of a rounding that is let through."""
    ratio = x.float().relu() / q
    y = q * (ratio + (ratio.round() - ratio).detach())
    change = y[:, 1:] - y[:, :-1]
    return y.to(x.dtype), change.abs().sum(), (change != 0).sum()


def loss(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return parts[0].sum() + parts[1]


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)}).

    The layers of a convolutional network, with one step a channel.
    """
    sizes, dtypes = [(16, 8, 16, 12, 12)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(32, 16, 64, 56, 56), (32, 16, 512, 14, 14)], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for shape in [(2, 2, 3, 4, 4)] if quick else sizes:
            x, q = torch.randn(shape, device=device).to(dtype), torch.full((shape[2], 1, 1), 0.3, device=device)
            forward = cost(x.numel(), shape[2], dtype)
            costs = (forward, forward + cost(x.numel(), shape[2], dtype, backward=True))
            functions = {"reference": delta_relu_reference, "eager": eager, "ours": delta_relu}
            contestants = {who: (lambda x, q, f=f: loss(f(x, q)), (x, q)) for who, f in functions.items()}
            yield "x".join(map(str, shape)), dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes with a step a channel, with one of all, and for frames of no multiple of a vector."""
    sizes = [(2, 4, 256, 16), (2, 8, 512, 1), (3, 3, 37, 37)]
    for B, T, N, S in sizes if small else [(32, 16, 64 * 56 * 56, 64), (32, 16, 512 * 14 * 14, 1), (32, 4, 1001, 1001)]:
        for dtype in BOTH:
            x = (torch.ones if small else torch.empty)(B, T, N, dtype=dtype)
            q, grad, one = torch.ones(S), torch.zeros_like(x), torch.ones(())

            def forward(x=x, q=q):
                return torch.ops.polylib.delta_relu(x, q, True)

            def backward(grad=grad, one=one, x=x, q=q):
                return torch.ops.polylib.delta_relu_backward(grad, one, x, q, True)

            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                wide = q[:, None].expand(S, N // S).reshape(N)
                plain = formula(lambda x, q: loss(eager(x, q)), (x, wide), back)
                yield Launch(
                    f"{way} {B}x{T}x{N}", dtype, run, x.numel(), cost(x.numel(), S, dtype, backward=back), plain
                )
