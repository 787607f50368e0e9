"""What is timed and what is compiled of the rank-one refresh of many inverse factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch
from polylib.kernels.mkor_refresh import cost, factor_arena, factors_of, mkor_refresh_, mkor_refresh_reference

GAMMA, THRESHOLD, ZETA = 0.95, 2.0, 0.95


def as_written(factors: list[Tensor], vectors: tuple[Tensor, ...]) -> None:
    """The formula, operation by operation, with the stabiliser."""
    for J, v in zip(factors, vectors, strict=True):
        kept = torch.where(J.abs().max() > THRESHOLD, ZETA, 1.0).to(J.dtype)
        identity = torch.eye(len(J), dtype=J.dtype, device=J.device)
        new = kept * J + (1 - kept) * identity
        y = new @ v
        ratio = (1 - GAMMA) / GAMMA
        J.copy_((new - ratio / (1 + ratio * (v @ y)) * torch.outer(y, y)) / GAMMA)


def two_calls(factors: list[Tensor], vectors: tuple[Tensor, ...]) -> None:
    """The fewest bytes that PyTorch's own operations allow, without a stabiliser: `mv` and `addr_` for each factor."""
    ratio = (1 - GAMMA) / GAMMA
    for J, v in zip(factors, vectors, strict=True):
        y = torch.mv(J, v)
        kappa = ratio / (1 + ratio * (v @ y))
        J.addr_(kappa * y, y, beta=1 / GAMMA, alpha=-1 / GAMMA)


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, None: no gradient), {contestant: (function, its tensors)})."""
    shapes, dtypes = {"8 of 257": [257] * 8, "2 of 1025": [1025] * 2}, [torch.float32]
    if device.type == "cuda":
        shapes = {"48 of 256": [256] * 48, "48 of 1025": [1025] * 48, "12 of 4096": [4096] * 12}
        dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for label, sizes in ({"5 and 70": [5, 70]} if quick else shapes).items():
            v = torch.randn(sum(sizes), device=device).to(dtype)

            def fresh(sizes: list[int] = sizes, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
                arena, _ = factor_arena(sizes, dtype=dtype, device=device)
                return arena, torch.ones(len(sizes), device=device)

            def reference(arena: Tensor, v: Tensor, largest: Tensor, sizes: list[int] = sizes) -> Tensor:
                mkor_refresh_reference(arena, v, largest, sizes, GAMMA, THRESHOLD, ZETA)
                return arena

            def ours(arena: Tensor, v: Tensor, largest: Tensor, sizes: list[int] = sizes) -> Tensor:
                mkor_refresh_(arena, v, largest, sizes, gamma=GAMMA, threshold=THRESHOLD, zeta=ZETA)
                return arena

            def by_factor(step, sizes: list[int] = sizes):
                def work(own: Tensor, statistics: Tensor, _largest: Tensor) -> Tensor:
                    step(factors_of(own, sizes), statistics.split(sizes))
                    return own

                return work

            contestants = {}
            functions = {"reference": reference, "eager": by_factor(as_written), "mv, addr_": by_factor(two_calls)}
            for who, function in (functions | {"ours": ours}).items():
                arena, largest = fresh()
                contestants[who] = (function, (arena, v, largest))
            yield label, dtype, (cost(sizes, dtype), None), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield a refresh of factors of several sizes, some no multiple of a tile. Entries are those of the factors."""
    shapes = {"refresh 48 of 1024": [1024] * 48, "refresh 769 and 3073": [769, 3073]}
    if small:
        shapes = {"refresh 2 of 256": [256] * 2, "refresh 130 and 257": [130, 257]}
    for label, sizes in shapes.items():
        for dtype in BOTH:
            arena = factor_arena(sizes, dtype=dtype)[0]
            v, largest = torch.ones(sum(sizes), dtype=dtype), torch.ones(len(sizes))

            def run(arena=arena, v=v, largest=largest, sizes=sizes):
                return torch.ops.polylib.mkor_refresh(arena, v, largest, sizes, GAMMA, THRESHOLD, ZETA)

            def eager(arena=arena, v=v, sizes=sizes):
                return lambda: as_written(factors_of(arena, sizes), v.split(sizes))

            yield Launch(label, dtype, run, sum(d * d for d in sizes), cost(sizes, dtype), eager)
