"""What is timed and what is compiled of attention by products of features and a bias by distance."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.kernel_attention_rpe import cost, kernel_attention_rpe, kernel_attention_rpe_reference


def by_fourier(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As the paper does it: sums over keys by Fourier transforms of the products of features and values. Not causal."""
    n = v.shape[-2]
    columns = k.float()[..., :, None] * torch.cat([v, torch.ones_like(v[..., :1])], -1).float()[..., None, :]
    weights = (bias.float() - bias.float().amax(-1, keepdim=True)).exp()
    ring = torch.cat([weights[:, : n - 1].new_zeros(len(bias), 1), weights], -1).roll(-n, -1)  # lag 0 first
    spectrum = torch.fft.rfft(ring).conj()[:, :, None, None]
    sums = torch.fft.irfft(torch.fft.rfft(columns, 2 * n, dim=-3) * spectrum, 2 * n, dim=-3)[..., :n, :, :]
    out = (q.float()[..., None, :] @ sums).squeeze(-2)
    return (out[..., :-1] / out[..., -1:]).to(v.dtype)


def by_flex(compiled: bool):
    """As PyTorch's flex_attention: the exponential of log(product) + bias is the same weight."""
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        last = v.shape[-2] - 1

        def score(product, _batch, head, query, key):
            return product.log() + bias[head, key - query + last]

        return attend(q, k, v, score_mod=score, scale=1.0)

    return function


def features(batch: int, heads: int, n: int, m: int, d: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
    """Positive features, values and a bias as at the beginning of training."""
    q, k = (torch.rand(batch, heads, n, m, device=device, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, heads, n, d, device=device, dtype=dtype)
    return q, k, v, torch.randn(heads, 2 * n - 1, device=device, dtype=dtype)


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(1, 2, 512, 32, 32), (1, 2, 2048, 32, 32)], [torch.float32]
    if device.type == "cuda":
        sizes = [(16, 8, 1024, 64, 64), (2, 8, 8192, 64, 64), (1, 2, 65536, 32, 64)]
        dtypes = [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for size in [(1, 2, 12, 4, 3)] if quick else sizes:
            tensors = features(*size, dtype, device)
            forward = cost(*size, dtype)
            costs = (forward, forward + cost(*size, dtype, backward=True))
            functions = {
                "reference": kernel_attention_rpe_reference,
                "Fourier": by_fourier,
                "flex": by_flex(device.type == "cuda"),
                "ours": kernel_attention_rpe,
            }
            contestants = {who: (function, tensors) for who, function in functions.items()}
            yield "x".join(map(str, size)), dtype, costs, contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both passes, with widths that fill a tile and that do not, all keys and only earlier ones."""
    sizes = [((1, 1, 128, 16, 16), False), ((1, 2, 65, 16, 48), True)] if small else [
        ((4, 16, 4096, 64, 64), False), ((4, 16, 4096, 128, 128), True), ((4, 16, 1041, 16, 48), True)
    ]  # fmt: skip
    for size, causal in sizes:
        batch, heads, n, _, d = size
        for dtype in BOTH:
            tensors = features(*size, dtype)
            z = torch.empty(batch, heads, n, d, dtype=dtype)
            total = torch.ones(batch, heads, n)

            def forward(tensors=tensors, causal=causal):
                return torch.ops.polylib.kernel_attention_rpe(*tensors, causal)

            def backward(z=z, total=total, tensors=tensors, causal=causal):
                return torch.ops.polylib.kernel_attention_rpe_backward(z, *tensors, z, total, causal)

            for way, run in (("forward", forward), ("backward", backward)):
                back = way == "backward"
                least = cost(*size, dtype, causal=causal, backward=back)
                eager = formula(lambda *t, causal=causal: kernel_attention_rpe_reference(*t, causal), tensors, back)
                label = f"{way} {'x'.join(map(str, size))}{' causal' if causal else ''}"
                yield Launch(label, dtype, run, batch * heads * n * d, least, eager)
