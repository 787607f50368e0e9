"""What is timed and what is compiled of the sums of waves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import Launch, formula
from polylib.kernels.vandermonde import cost, vandermonde, vandermonde_factored, vandermonde_reference


def waves(H: int, N: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Weights and logarithms as a layer of a diagonal state space model has them at the beginning."""
    step = torch.logspace(-3, -1, H, device=device)[:, None]
    x = step * torch.complex(torch.full((N,), -0.5, device=device), torch.pi * torch.arange(N, device=device))
    return torch.randn(H, N, dtype=torch.complex64, device=device), x


def eager(v: Tensor, x: Tensor, L: int) -> Tensor:
    """As the formula is written, all in complex64."""
    times = torch.arange(L, device=x.device)
    return 2 * (v[..., None] * (x[..., None] * times).exp()).sum(-2).real


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of the gradients), {contestant: (function, its tensors)})."""
    sizes = [(16, 32, 1024)]
    if device.type == "cuda":
        sizes = [(128, 32, 1024), (256, 32, 16384), (1024, 32, 4096)]
    for H, N, L in [(2, 3, 50)] if quick else sizes:
        tensors = waves(H, N, device)
        functions = {
            "reference": vandermonde_reference,
            "eager": eager,
            "eager compiled": torch.compile(eager, dynamic=False),
            "two levels": vandermonde_factored,
            "two levels compiled": torch.compile(vandermonde_factored, dynamic=False),
            "ours": vandermonde,
        }
        contestants = {who: (lambda v, x, f=f, L=L: f(v, x, L), tensors) for who, f in functions.items()}
        yield f"{H}x{N}->{L}", torch.complex64, (cost(H, N, L), cost(H, N, L, backward=True)), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes, for kernels whose length is a multiple of a tile or not. Entries are those of the result."""
    new = torch.ones if small else torch.empty
    for H, N, L in [(2, 32, 16384), (2, 32, 1041)] if small else [(256, 32, 16384), (256, 32, 1024), (256, 40, 1041)]:
        v, x = (new(H, N, dtype=torch.complex64) for _ in range(2))
        if small:
            x = -x / 100
        grad = new(H, L)

        def forward(v=v, x=x, L=L):
            return torch.ops.polylib.vandermonde(v, x, L)

        def backward(grad=grad, v=v, x=x):
            return torch.ops.polylib.vandermonde_backward(grad, v, x)

        for way, run in (("forward", forward), ("backward", backward)):
            back = way == "backward"
            plain = formula(lambda v, x, L=L: eager(v, x, L), (v, x), back)
            least = cost(H, N, L, backward=back)
            yield Launch(f"{way} {H}x{N}->{L}", torch.float32, run, H * L, least, plain)
