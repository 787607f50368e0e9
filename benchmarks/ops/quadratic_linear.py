"""What is timed and what is compiled of the quadratic neuron."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.launch import Launch, formula
from polylib.kernels.quadratic_linear import cost, quadratic_linear, quadratic_linear_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    The strong peer has the weights of r and g stacked, one product for both, and compiles what follows the products.
    """
    sizes, dtypes = [(1024, 256, 256), (2048, 512, 512)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(8192, 256, 256), (8192, 1024, 1024), (8192, 4096, 4096)], [torch.bfloat16, torch.float32]
    epilogue = torch.compile(lambda rg, q: rg[..., : q.shape[-1]] * rg[..., q.shape[-1] :] + q, dynamic=False)

    def stacked(x, weight_rg, bias_rg, weight_b, bias_b):
        return epilogue(F.linear(x, weight_rg, bias_rg), F.linear(x * x, weight_b, bias_b))

    for dtype in dtypes:
        for M, K, N in [(64, 32, 32)] if quick else sizes:
            x, w_rg, w_b = (torch.randn(rows, K, device=device, dtype=dtype) / K**0.5 for rows in (M, 2 * N, N))
            b_rg, b_b = torch.randn(2 * N, device=device, dtype=dtype), torch.randn(N, device=device, dtype=dtype)
            args = (x, w_rg[:N].clone(), b_rg[:N].clone(), w_rg[N:].clone(), b_rg[N:].clone(), w_b, b_b)
            forward, backward = cost(M, K, N, dtype), cost(M, K, N, dtype, "backward")
            contestants = {
                "reference": (quadratic_linear_reference, args),
                "stacked": (stacked, (x, w_rg, b_rg, w_b, b_b)),
                "ours": (quadratic_linear, args),
            }
            yield f"{M}x{K}->{N}", dtype, (cost(M, K, N, dtype, "inference"), forward + backward), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions in bfloat16, in float32 with tensor cores (tf32) and exactly. Entries are those of y."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    rows, width, outputs = (64, 64, 64) if small else (8192, 1024, 1024)
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest")):
        x, y = new(rows, width, dtype=dtype), new(rows, outputs, dtype=dtype)
        weights = [new(outputs, width, dtype=dtype) for _ in range(3)]
        biases = [new(outputs, dtype=dtype) for _ in range(3)]
        parameters = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
        kind = "" if dtype == torch.bfloat16 else " tf32" if precision == "high" else " exact"
        for way in ("inference", "forward", "backward"):

            def run(way=way, x=x, y=y, weights=weights, parameters=parameters, precision=precision):
                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision(precision)
                try:
                    if way == "backward":
                        backward = torch.ops.polylib.quadratic_linear_backward
                        r, g = like(y), like(y)
                        return backward(y, x, *weights, r, g, True, True)
                    return torch.ops.polylib.quadratic_linear(x, *parameters, way == "forward")
                finally:
                    torch.set_float32_matmul_precision(before)

            eager = formula(quadratic_linear_reference, (x, *parameters), way == "backward")
            least = cost(rows, width, outputs, dtype, way)
            yield Launch(f"{way} {rows}x{width}->{outputs}{kind}", dtype, run, y.numel(), least, eager)
