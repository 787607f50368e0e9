"""What is timed and what is compiled of attention to a block and to the summaries of others."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.combiner_attention import combiner_attention, combiner_attention_reference, cost


@functools.lru_cache
def _mask(length: int, span: int, device: torch.device) -> BlockMask:
    """The keys of `by_flex`: all places, then all summaries."""

    def sees(_batch, _head, query, key):
        near = (key < length) & (key <= query) & (key // span == query // span)
        return near | ((key >= length) & (key - length < query // span))

    return create_block_mask(sees, None, None, length, length + length // span, device=device)


def by_flex(span: int, compiled: bool):
    """As PyTorch's flex_attention over places and summaries, which are made by plain PyTorch."""
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        in_blocks = [t.unflatten(-2, (-1, span)) for t in (q, k, v)]
        top = in_blocks[0].amax(-2, keepdim=True)
        within = (top @ in_blocks[1].mT / q.shape[-1] ** 0.5).softmax(-1)
        keys = torch.cat([k, in_blocks[1].amax(-2)], -2)
        values = torch.cat([v, (within @ in_blocks[2]).squeeze(-2)], -2)
        return attend(q, keys, values, block_mask=_mask(q.shape[-2], span, q.device))

    return function


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(1, 2, 1024, 32, 32, 32), (1, 2, 4096, 32, 32, 64)], [torch.float32]
    if device.type == "cuda":
        sizes = [(8, 8, 4096, 64, 64, 64), (4, 8, 16384, 64, 64, 128), (1, 8, 65536, 64, 64, 256)]
        dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for size in [(1, 2, 12, 4, 3, 4)] if quick else sizes:
            batch, heads, length, d, e, span = size
            tensors = tuple(torch.randn(batch, heads, length, width, device=device, dtype=dtype) for width in (d, d, e))
            forward = cost(*size, dtype)
            costs = (forward, forward + cost(*size, dtype, backward=True))
            functions = {
                "reference": lambda q, k, v, span=span: combiner_attention_reference(q, k, v, span),
                "flex": by_flex(span, device.type == "cuda"),
                "ours": lambda q, k, v, span=span: combiner_attention(q, k, v, span),
            }
            contestants = {who: (function, tensors) for who, function in functions.items()}
            yield f"{'x'.join(map(str, size[:-1]))}/{span}", dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes, with widths that fill a tile and that do not, causal and not."""
    sizes = [((1, 2, 128, 16, 16, 16), True), ((1, 1, 96, 48, 16, 12), False)] if small else [
        ((4, 16, 4096, 64, 64, 64), True), ((4, 16, 4096, 128, 128, 64), False), ((4, 16, 1040, 16, 48, 20), True)
    ]  # fmt: skip
    for size, causal in sizes:
        batch, heads, length, d, e, span = size
        for dtype in BOTH:
            tensors = tuple(torch.ones(batch, heads, length, width, dtype=dtype) for width in (d, d, e))
            saved = (
                torch.ones(batch, heads, length, e, dtype=dtype),
                torch.ones(batch, heads, length // span, d, dtype=dtype),
                torch.ones(batch, heads, length // span, e, dtype=dtype),
                torch.ones(batch, heads, length),
                torch.ones(batch, heads, length // span),
            )

            def forward(tensors=tensors, span=span, causal=causal):
                return torch.ops.polylib.combiner_attention(*tensors, span, causal)

            def backward(tensors=tensors, saved=saved, span=span, causal=causal):
                return torch.ops.polylib.combiner_attention_backward(saved[0], *tensors, *saved, span, causal)

            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                least = cost(*size, dtype, causal=causal, backward=back)

                def definition(q, k, v, span=span, causal=causal):
                    return combiner_attention_reference(q, k, v, span, causal)

                label = f"{way} {'x'.join(map(str, size[:-1]))}/{span}{' causal' if causal else ''}"
                eager = formula(definition, tensors, back)
                yield Launch(label, dtype, run, batch * heads * length * e, least, eager)
