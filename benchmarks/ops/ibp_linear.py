"""What is timed and what is compiled of a linear layer on intervals."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.launch import Launch, formula
from polylib.kernels.ibp_linear import cost, ibp_linear, ibp_linear_reference


def loss(parts: tuple[Tensor, Tensor]) -> Tensor:
    return parts[0].sum() + parts[1].sum()


def bounds(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As libraries of bounds write it: from the lower and the upper end, by the positive and negative weights."""
    lower, upper = center - radius, center + radius
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    low = F.linear(lower, positive, bias) + F.linear(upper, negative)
    high = F.linear(upper, positive, bias) + F.linear(lower, negative)
    return (low + high) / 2, (high - low) / 2


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(128, 512, 512)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(32, 4096, 4096), (256, 4096, 4096), (8192, 1024, 1024)], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for M, K, N in [(8, 32, 32)] if quick else sizes:
            center, radius = torch.randn(M, K, device=device).to(dtype), torch.rand(M, K, device=device).to(dtype)
            weight, bias = torch.randn(N, K, device=device).to(dtype) / K**0.5, torch.zeros(N, device=device).to(dtype)
            forward = cost(M, K, N, dtype)
            functions = {"reference": ibp_linear_reference, "four products": bounds, "ours": ibp_linear}
            contestants = {
                who: (lambda *args, f=f: loss(f(*args)), (center, radius, weight, bias)) for who, f in functions.items()
            }
            yield f"{M}x{K}->{N}", dtype, (forward, forward + cost(M, K, N, dtype, backward=True)), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions in bfloat16, in float32 with tensor cores (tf32) and exactly. Entries are those of W."""
    M, K, N = (64, 64, 64) if small else (128, 4096, 4096)
    new = torch.zeros if small else torch.empty
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest")):
        center, radius, g, h = (new(M, size, dtype=dtype) for size in (K, K, N, N))
        weight, bias = new(N, K, dtype=dtype), new(N, dtype=dtype)
        kind = "" if dtype == torch.bfloat16 else " tf32" if precision == "high" else " exact"
        tensors = (center, radius, weight)
        for way in ("forward", "backward"):

            def run(way=way, tensors=tensors, bias=bias, g=g, h=h, precision=precision):
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision(precision)
                try:
                    if way == "backward":
                        return torch.ops.polylib.ibp_linear_backward(g, h, *tensors, True, True)
                    return torch.ops.polylib.ibp_linear(*tensors, bias)
                finally:
                    torch.set_float32_matmul_precision(before)

            back = way == "backward"
            eager = formula(lambda *args: torch.cat(ibp_linear_reference(*args)), (*tensors, bias), back)
            least = cost(M, K, N, dtype, backward=back)
            yield Launch(f"{way} {M}x{K}->{N}{kind}", dtype, run, weight.numel(), least, eager)
