"""What is timed and what is compiled of the blockwise largest entries with error feedback, and of their sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch
from polylib.kernels.topk_residual import (
    cost,
    topk_decompress_,
    topk_decompress_reference,
    topk_residual_,
    topk_residual_reference,
)

BLOCK = 1024


def whole(gradient: Tensor, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest entries of the whole vector, as PyTorch selects them."""
    difference = gradient - state
    indices = torch.topk(difference.abs(), k, sorted=False).indices
    values = difference[indices]
    state[indices] += values
    return values, indices.int()


def blockwise(gradient: Tensor, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same of each block of a vector that is a multiple of one long."""
    difference = (gradient - state).view(-1, BLOCK)
    indices = torch.topk(difference.abs(), k, dim=1, sorted=False).indices
    values = difference.gather(1, indices)
    state.view(-1, BLOCK).scatter_add_(1, indices, values)
    return values, indices.int()


def by_sample(gradient: Tensor, state: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """All entries above a threshold that is estimated from every hundredth entry: a message of any length."""
    difference = gradient - state
    threshold = torch.quantile(difference[::100][:100_000].abs().float(), 1 - share)
    indices = (difference.abs() > threshold).nonzero().squeeze(1)
    values = difference[indices]
    state[indices] += values
    return values, indices.int()


def low_rank(gradient: Tensor, state: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """PowerSGD's message for a square matrix, with what it leaves out kept in the state."""
    side = int(gradient.numel() ** 0.5)
    M = (gradient + state).view(side, side)
    P = torch.linalg.qr((M @ torch.ones(side, rank, device=M.device, dtype=M.dtype)).float()).Q.to(M.dtype)
    Q = M.mT @ P
    state.copy_((M - P @ Q.mT).view(-1))
    return P, Q


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, None: no gradient), {contestant: (function, its tensors)})."""
    sides, dtypes = [1024], [torch.float32]
    if device.type == "cuda":
        sides, dtypes = [4096, 8192], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for side in [32] if quick else sides:
            N, k, ranks = side * side, 10, 4 if quick else 8
            gradient, state = (torch.randn(N, device=device).to(dtype) for _ in range(2))
            sent = -(-N // BLOCK) * k
            contestants = {
                "reference": lambda g, s, k=k: topk_residual_reference(g, s, k, BLOCK, g.dtype),
                "torch.topk": lambda g, s, sent=sent: whole(g, s, sent),
                "torch.topk a block": lambda g, s, k=k: blockwise(g, s, k),
                "sampled threshold": lambda g, s, share=sent / N: by_sample(g, s, share),
                "PowerSGD 4": lambda g, s: low_rank(g, s, 4),
                "ours": lambda g, s, k=k: topk_residual_(g, s, k, BLOCK),
            }
            own = {who: (function, (gradient, state.clone())) for who, function in contestants.items()}
            yield f"residual {N}", dtype, (cost(N, k, BLOCK, dtype), None), own

            messages = [topk_residual_(torch.randn_like(gradient), state.clone(), k, BLOCK) for _ in range(ranks)]
            values, indices = (torch.stack(parts) for parts in zip(*messages, strict=True))
            weights = torch.full((ranks,), 1 / ranks, device=device)
            least = cost(N, k, BLOCK, dtype, ranks=ranks)
            yield f"sum of {ranks}, {N}", dtype, (least, None), sums(state, values, indices, weights)


def sums(state: Tensor, values: Tensor, indices: Tensor, weights: Tensor) -> dict[str, tuple]:
    """Those who add the messages of some ranks to a copy of the state."""

    def reference(total: Tensor) -> Tensor:
        topk_decompress_reference(total, values, indices, weights, BLOCK)
        return total

    def index_add(total: Tensor) -> Tensor:
        """In any order, with atomics."""
        return total.index_add_(0, indices.view(-1).long(), (values * weights[:, None, None].to(values.dtype)).view(-1))

    def ours(total: Tensor) -> Tensor:
        topk_decompress_(total, values, indices, weights, BLOCK)
        return total

    functions = {"reference": reference, "index_add_": index_add, "ours": ours}
    return {who: (function, (state.clone(),)) for who, function in functions.items()}


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield messages of one and of ten entries in a hundred, and their sum over eight ranks, for whole blocks and for a
    vector that ends in the middle of one. Entries are those of the vector.
    """
    gen = torch.Generator().manual_seed(0)
    for N in [8 * BLOCK, 8 * BLOCK + 824] if small else [2**24, 2**24 + 824]:
        for dtype in BOTH:
            whole_blocks = -(-N // BLOCK)
            gradient = torch.randn(N, generator=gen).to(dtype) if small else torch.empty(N, dtype=dtype)
            state = torch.zeros_like(gradient)
            for k in (10, 102):

                def run(gradient=gradient, state=state, k=k):
                    return torch.ops.polylib.topk_residual(gradient, state.clone(), k, BLOCK, gradient.dtype)

                def eager(gradient=gradient, state=state, sent=whole_blocks * k):
                    return lambda: whole(gradient, state.clone(), sent)

                yield Launch(f"residual {N}, {k} of {BLOCK}", dtype, run, N, cost(N, k, BLOCK, dtype), eager)
            ranks, k = 8, 102
            # Different entries from each rank, so that all that is touched is counted.
            offset = torch.arange(ranks)[:, None, None] + ranks * torch.arange(k)
            indices = (offset + BLOCK * torch.arange(whole_blocks)[None, :, None]).int()
            indices = torch.where(indices < N, indices, -1)
            values, weights = torch.ones(indices.shape, dtype=dtype), torch.ones(ranks)

            def add(state=state, values=values, indices=indices, weights=weights):
                return torch.ops.polylib.topk_decompress(state, values, indices, weights, BLOCK)

            def eager_add(state=state, values=values, indices=indices, weights=weights):
                def work():
                    for value, index, weight in zip(values, indices, weights, strict=True):
                        state.index_add_(0, index.view(-1).clamp(min=0), (weight * value).to(state.dtype).view(-1))

                return lambda: work()

            least = cost(N, k, BLOCK, dtype, ranks=ranks)
            yield Launch(f"sum {N}, {ranks} x {k} of {BLOCK}", dtype, add, N, least, eager_add)
