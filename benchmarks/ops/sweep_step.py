"""What is timed and what is compiled of one step for K stacked models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch
from polylib.kernels.sweep_step import (
    cost,
    sweep_adam_step,
    sweep_adam_step_reference,
    sweep_sgd_step,
    sweep_sgd_step_reference,
)


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, None: no gradient), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(16, 2**14), (64, 2**16)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(16, 2**20), (128, 2**18), (512, 2**16)], [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        for rows, columns in [(3, 50)] if quick else sizes:
            w, g = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(2))
            m, s = (torch.zeros(rows, columns, device=device) for _ in range(2))
            rate = torch.logspace(-6, -4, rows, device=device)
            label = f"{rows}x{columns}"
            both = {"reference": _sgd_reference_for_bench, "ours": _sgd_for_bench}
            yield (
                f"momentum {label}",
                dtype,
                (cost(rows, columns, dtype, "momentum"), None),
                {
                    **{who: (step, (w.clone(), g, m.clone(), rate)) for who, step in both.items()},
                    "K fused": (_fused(torch.optim.SGD, w, g, rate, momentum=0.9), ()),
                },
            )
            both = {"reference": _adam_reference_for_bench, "ours": _adam_for_bench}
            yield (
                f"adam {label}",
                dtype,
                (cost(rows, columns, dtype, "adam"), None),
                {
                    **{who: (step, (w.clone(), g, m.clone(), s.clone(), rate)) for who, step in both.items()},
                    "K fused": (_fused(torch.optim.AdamW, w, g, rate, weight_decay=0.0), ()),
                },
            )


def _sgd_reference_for_bench(w: Tensor, g: Tensor, velocity: Tensor, rate: Tensor) -> Tensor:
    sweep_sgd_step_reference(w, g, velocity, rate, None, None, 0.9)
    return w


def _sgd_for_bench(w: Tensor, g: Tensor, velocity: Tensor, rate: Tensor) -> Tensor:
    sweep_sgd_step(w, g, rate, velocity=velocity, momentum=0.9)
    return w


def _adam_reference_for_bench(w: Tensor, g: Tensor, first: Tensor, second: Tensor, rate: Tensor) -> Tensor:
    sweep_adam_step_reference(w, g, first, second, rate, None, None, 10, 0.9, 0.999, 1e-8)
    return w


def _adam_for_bench(w: Tensor, g: Tensor, first: Tensor, second: Tensor, rate: Tensor) -> Tensor:
    sweep_adam_step(w, g, first, second, rate, step=10)
    return w


def _fused(optimizer: type, w: Tensor, g: Tensor, rate: Tensor, **options: float):
    """Return a step of a fused torch optimizer with one parameter group a row."""
    rows = [torch.nn.Parameter(row.clone()) for row in w]
    for row, gradient in zip(rows, g, strict=True):
        row.grad = gradient.clone()
    groups = [{"params": [row], "lr": float(r)} for row, r in zip(rows, rate, strict=True)]
    fused = optimizer(groups, lr=0.0, fused=True, **options)

    def step() -> Tensor:
        fused.step()
        return rows[0]

    return step


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield a step of both optimizers, with decay and scale, for rows that are a multiple of 16 entries or not."""
    new = torch.ones if small else torch.empty
    sizes = [(128, 262144), (16, 17003)]
    for rows, columns in [(4, 4096), (4, 4099)] if small else sizes:
        for dtype in BOTH:
            w, g = new(rows, columns, dtype=dtype), new(rows, columns, dtype=dtype)
            m, s = new(rows, columns), new(rows, columns)
            rate, decay, scale = torch.ones(3, rows).unbind()

            def momentum(w=w, g=g, m=m, rate=rate, decay=decay, scale=scale):
                return torch.ops.polylib.sweep_sgd_step(w, g, m, rate, decay, scale, 0.9)

            def adam(w=w, g=g, m=m, s=s, rate=rate, decay=decay, scale=scale):
                return torch.ops.polylib.sweep_adam_step(w, g, m, s, rate, decay, scale, 10, 0.9, 0.999, 1e-8)

            def eager_momentum(w=w, g=g, m=m, rate=rate, decay=decay, scale=scale):
                return lambda: sweep_sgd_step_reference(w, g, m, rate, decay, scale, 0.9)

            def eager_adam(w=w, g=g, m=m, s=s, rate=rate, decay=decay, scale=scale):
                return lambda: sweep_adam_step_reference(w, g, m, s, rate, decay, scale, 10, 0.9, 0.999, 1e-8)

            both = {"momentum": (momentum, eager_momentum), "adam": (adam, eager_adam)}
            for name, (run, eager) in both.items():
                least = cost(rows, columns, dtype, name)
                yield Launch(f"{name} {rows}x{columns}", dtype, run, w.numel(), least, eager)
