"""What is timed and what is compiled of the hypercomplex linear layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels._cost import Cost
from polylib.kernels.phm_linear import cost, kronecker_weight, phm_linear, phm_linear_factored, phm_linear_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    "built" has the weight ready, as a model that never changes would: the plain product of a real layer. Its gradient
    is that of the built weight alone.
    """
    sizes, dtypes = [(1, 1024, 4), (16, 1024, 4)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(rows, 4096, n) for rows in (1, 8, 32) for n in (2, 4, 8)], [torch.bfloat16]
    for dtype in dtypes:
        for rows, width, n in [(2, 64, 4)] if quick else sizes:
            A = torch.randn(n, n, n, device=device, dtype=dtype) / n**0.5
            S = torch.randn(n, width // n, width // n, device=device, dtype=dtype) / width**0.5
            x, bias = (torch.randn(*lead, width, device=device, dtype=dtype) for lead in ((rows,), ()))
            forward = cost(rows, width, width, n, dtype)
            backward = Cost(2 * forward.bytes, 2 * forward.flops)
            contestants = {
                "reference": (phm_linear_reference, (x, A, S, bias)),
                "factored": (phm_linear_factored, (x, A, S, bias)),
                "built": (F.linear, (x, kronecker_weight(A, S), bias)),
                "ours": (phm_linear, (x, A, S, bias)),
            }
            yield f"{rows}x{width}->{width}, n={n}", dtype, (forward, forward + backward), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield the classes of shapes that are dispatched: n and rows are rounded up to powers of two, up to 8 and 32.

    Entries are those of S: its traffic is what counts.
    """
    new = torch.ones if small else torch.empty
    for n in (2, 4, 8) if small else (1, 2, 3, 4, 8):
        for rows in (1, 32) if small else (1, 8, 32):
            width = (64 if small else 1024) * n
            for dtype in BOTH:
                x, A = new(rows, width, dtype=dtype), torch.ones(n, n, n, dtype=dtype)
                S, bias = new(n, width // n, width // n, dtype=dtype), torch.ones(width, dtype=dtype)

                def run(x=x, A=A, S=S, bias=bias):
                    return torch.ops.polylib.phm_linear(x, A, S, bias)

                eager = formula(phm_linear_reference, (x, A, S, bias), False)
                least = cost(rows, width, width, n, dtype)
                yield Launch(f"forward {rows} rows, n = {n}", dtype, run, S.numel(), least, eager)
