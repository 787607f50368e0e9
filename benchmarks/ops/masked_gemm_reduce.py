"""What is timed and what is compiled of masked products summed along rows, and of their adjoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launch import Launch, formula
from polylib.kernels.masked_gemm_reduce import (
    cost,
    masked_gemm_adjoint,
    masked_gemm_adjoint_reference,
    masked_gemm_reduce,
    masked_gemm_reduce_reference,
    pack_mask,
)


def eager(x, delta, mask):
    """As the formula is written, with the mask as numbers."""
    return (mask * (x @ delta)).sum(1)


def eager_adjoint(x, r, mask):
    return x.mT @ (mask * r[:, None])


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, None), {contestant: (function, its tensors)}); mask and words are given.

    The gradient by delta is the adjoint, which is timed by itself. The reference has the mask as numbers, as the eager
    formulas do, and computes the same without writing the product.
    """
    sizes, dtypes = [(256, 16, 1024), (1024, 64, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(8192, 16, 8192), (8192, 64, 8192), (8192, 512, 8192)], [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        for n, d, P in [(40, 8, 70)] if quick else sizes:
            x, delta = (torch.randn(*shape, device=device, dtype=dtype) / d**0.5 for shape in ((n, d), (d, P)))
            patterns, r = torch.rand(n, P, device=device) < 0.5, torch.randn(n, device=device, dtype=dtype)
            mask, words, costs = patterns.to(dtype), pack_mask(patterns), (cost(n, d, P, dtype), None)
            contestants = {
                "reference": (masked_gemm_reduce_reference, (x, delta, mask)),
                "eager": (eager, (x, delta, mask)),
                "eager compiled": (torch.compile(eager, dynamic=False), (x, delta, mask)),
                "ours": (masked_gemm_reduce, (x, delta, words)),
            }
            yield f"reduce {n}x{d}->{P}", dtype, costs, contestants
            contestants = {
                "reference": (lambda x, r, mask, P=P: masked_gemm_adjoint_reference(x, r, mask, P), (x, r, mask)),
                "eager": (eager_adjoint, (x, r, mask)),
                "eager compiled": (torch.compile(eager_adjoint, dynamic=False), (x, r, mask)),
                "ours": (lambda x, r, words, P=P: masked_gemm_adjoint(x, r, words, P), (x, r, words)),
            }
            yield f"adjoint {n}x{d}->{P}", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both operations with rows of x that are one tile, of 16 and 64 numbers, and that are several; and with rows
    and columns that are no multiple of 16 bytes. Entries are those of the mask.
    """
    new = torch.ones if small else torch.empty
    sizes = [(8192, 16, 8192), (8192, 64, 8192), (8192, 512, 8192), (8192, 17, 1041)]
    if small:
        sizes = [(64, 16, 128), (64, 64, 128), (64, 128, 128), (64, 17, 1041)]
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest")):
        kind = "" if dtype == torch.bfloat16 else " tf32" if precision == "high" else " exact"
        for n, d, P in sizes:
            x, delta, r, mask = (new(*shape, dtype=dtype) for shape in ((n, d), (d, P), (n,), (n, P)))
            words = new(n, -(-P // 32), dtype=torch.int32)
            calls = {
                "reduce": lambda x=x, delta=delta, words=words: torch.ops.polylib.masked_gemm_reduce(x, delta, words),
                "adjoint": lambda x=x, r=r, words=words, P=P: torch.ops.polylib.masked_gemm_adjoint(x, r, words, P),
            }
            formulas = {"reduce": (eager, (x, delta, mask)), "adjoint": (eager_adjoint, (x, r, mask))}
            for way, call in calls.items():

                def run(call=call, precision=precision):
                    before = torch.get_float32_matmul_precision()
                    torch.set_float32_matmul_precision(precision)
                    try:
                        return call()
                    finally:
                        torch.set_float32_matmul_precision(before)

                least = cost(n, d, P, dtype)
                yield Launch(f"{way} {n}x{d}->{P}{kind}", dtype, run, n * P, least, formula(*formulas[way], False))
