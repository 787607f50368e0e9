"""What is timed and what is compiled of EvoNorm-S0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.evonorm_s0 import cost, evonorm_s0, evonorm_s0_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    The peer with the same traffic is PyTorch's own group normalisation followed by SiLU, two fused operations.
    """
    sizes, dtypes = [(16, 64, 28, 28), (16, 256, 14, 14)], [torch.float32]
    if device.type == "cuda":
        sizes = [(256, 64, 56, 56), (256, 256, 56, 56), (256, 512, 28, 28), (256, 2048, 7, 7)]
        dtypes = [torch.bfloat16, torch.float32]
    formats = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    for dtype in dtypes:
        for shape in [(2, 8, 4, 4)] if quick else sizes:
            for suffix, memory_format in formats.items():
                x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
                weight, bias, v = torch.randn(3, shape[1], device=device, dtype=dtype)
                groups = min(32, shape[1])
                forward, backward = (cost(*shape, groups, dtype, way) for way in ("forward", "backward"))

                def norm_silu(x, weight, bias, groups=groups):
                    return F.silu(F.group_norm(x, groups, weight, bias))

                def ours(*tensors, groups=groups):
                    return evonorm_s0(*tensors, groups)

                def reference(*tensors, groups=groups):
                    return evonorm_s0_reference(*tensors, groups)

                contestants = {
                    "reference": (reference, (x, weight, bias, v)),
                    "group_norm+silu": (norm_silu, (x, weight, bias)),
                    "ours": (ours, (x, weight, bias, v)),
                }
                yield "x".join(map(str, shape)) + suffix, dtype, (forward, forward + backward), contestants


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions and both formats for large images and few channels, and for the reverse."""
    like = torch.ones_like if small else torch.empty_like
    # Small ones keep the channels of a group. Where a group is one run, the traffic depends on the number of samples,
    # and is not counted.
    sizes = [(256, 64, 56, 56), (256, 256, 56, 56), (256, 512, 28, 28), (256, 2048, 7, 7), (256, 96, 17, 17)]
    small_sizes = [(1, 8, 56, 56), (1, 16, 56, 56), (1, 32, 28, 28)]
    for number, shape in enumerate(small_sizes if small else sizes):
        groups = shape[1] * 32 // sizes[number][1]
        for name, memory_format in (("", torch.contiguous_format), (" channels_last", torch.channels_last)):
            for dtype in BOTH:
                x = torch.ones(shape, dtype=dtype).to(memory_format=memory_format) if small else None
                x = torch.empty(shape, dtype=dtype, memory_format=memory_format) if x is None else x
                weight, bias, v = torch.ones(3, shape[1], dtype=dtype).unbind()
                means, rstds = torch.ones(2, shape[0], groups).unbind()
                args = (x, weight, bias, v)
                for way in ("forward", "backward"):

                    def run(args=args, means=means, rstds=rstds, groups=groups, way=way):
                        x, weight, _, v = args
                        if way == "forward":
                            return torch.ops.polylib.evonorm_s0(*args, groups, 1e-5)
                        return torch.ops.polylib.evonorm_s0_backward(like(x), x, weight, v, means, rstds, True)

                    def function(*tensors, groups=groups):
                        return evonorm_s0_reference(*tensors, groups)

                    least = cost(*shape, groups, dtype, way)
                    label = f"{way} {'x'.join(map(str, shape))}{name}"
                    yield Launch(label, dtype, run, x.numel(), least, formula(function, args, way == "backward"))
