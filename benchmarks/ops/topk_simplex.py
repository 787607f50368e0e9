"""What is timed and what is compiled of the projection of rows on at most k entries of a given sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.topk_simplex import cost, topk_simplex, topk_simplex_reference


def by_topk(scores: Tensor, k: int) -> Tensor:
    """The same with PyTorch's selection, which takes any of equal entries; not for what is not finite."""
    u, order = scores.float().topk(k, dim=1)
    rank = torch.arange(1, k + 1, device=scores.device)
    theta = (u.cumsum(1) - 1) / rank
    inside = (u > theta).sum(1, keepdim=True)
    t = (u - theta.gather(1, inside - 1)).clamp(min=0)
    return torch.zeros_like(scores).scatter(1, order, t.to(scores.dtype))


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)}).

    Long rows are those of a router: of each expert the scores of all tokens. Short ones are its other side.
    """
    shapes, dtypes = [(64, 4096), (4096, 64)], [torch.float32]
    if device.type == "cuda":
        shapes, dtypes = [(64, 4096), (4096, 4096), (65536, 64)], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for R, m in [(4, 32)] if quick else shapes:
            scores = torch.randn(R, m, device=device).to(dtype)
            mass = torch.ones(R, device=device)
            forward = cost(R, m, dtype)
            costs = (forward, forward + cost(R, m, dtype, backward=True))
            for k in sorted({2, m // 8}):
                contestants = {
                    "reference": (lambda s, k=k, mass=mass: topk_simplex_reference(s, mass, k), (scores,)),
                    "torch.topk": (lambda s, k=k: by_topk(s, k), (scores,)),
                    "ours": (lambda s, k=k: topk_simplex(s, k), (scores,)),
                }
                yield f"{R}x{m}, {k} entries", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield projections and gradients of long, of short and of the longest rows, and of those of another length."""
    gen = torch.Generator().manual_seed(0)
    for R, m in [(8, 64), (2, 1024), (3, 37)] if small else [(65536, 64), (4096, 4096), (2048, 8192), (4096, 4099)]:
        for dtype in BOTH:
            scores = torch.randn(R, m, generator=gen).to(dtype) if small else torch.empty(R, m, dtype=dtype)
            mass = torch.ones(R)
            for way in ("forward", "backward"):

                def run(scores=scores, mass=mass, way=way, k=m // 8):
                    if way == "forward":
                        return torch.ops.polylib.topk_simplex(scores, mass, k)
                    return torch.ops.polylib.topk_simplex_backward(torch.zeros_like(scores), scores)

                eager = formula(lambda s, k=m // 8: by_topk(s, k), (scores,), way == "backward")
                least = cost(R, m, dtype, backward=way == "backward")
                yield Launch(f"{way} {R}x{m}", dtype, run, R * m, least, eager)
