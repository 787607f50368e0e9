"""What is timed and what is compiled of the group rational function."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.group_rational import cost, group_rational, group_rational_reference


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    The sizes on a GPU are those of the hidden layer of ViT-T, S and B at 64 images, and of ViT-B at 256.
    """
    sizes, dtypes = [(2048, 192), (2048, 768)], [torch.float32]
    if device.type == "cuda":
        sizes = [(64 * 197, 192), (64 * 197, 768), (64 * 197, 1536), (64 * 197, 3072), (256 * 197, 3072)]
        dtypes = [torch.bfloat16, torch.float32]
    groups = 8

    def reference(x, numerator, denominator):
        return group_rational_reference(x, numerator, denominator, groups)

    def ours(x, numerator, denominator):
        return group_rational(x, numerator, denominator, groups)

    for dtype in dtypes:
        for M, D in [(64, 48)] if quick else sizes:
            args = (
                torch.randn(M, D, device=device, dtype=dtype),
                torch.randn(1, 6, device=device),
                torch.randn(groups, 4, device=device),
            )
            forward = cost(M, D, groups, dtype)
            costs = (forward, forward + cost(M, D, groups, dtype, "backward"))
            yield f"{M}x{D}/{groups}", dtype, costs, {"reference": (reference, args), "ours": (ours, args)}


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions at widths of a group of 24, 96 and 384, both variants."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    groups = 8
    sizes = [(12608, 192), (12608, 768), (50432, 3072)]
    for rows, width in [(64, width) for _, width in sizes] if small else sizes:
        for dtype in BOTH:
            for variant in "AB" if width == 768 else "A":
                x, numerator = new(rows, width, dtype=dtype), torch.ones(groups, 6)
                denominator = torch.ones(groups, 4)
                args = (x, numerator, denominator)
                for way in ("forward", "backward"):

                    def run(args=args, variant=variant, way=way):
                        if way == "forward":
                            return torch.ops.polylib.group_rational(*args, groups, variant == "B")
                        backward = torch.ops.polylib.group_rational_backward
                        return backward(like(args[0]), *args, groups, variant == "B", True, True)

                    def function(*tensors, variant=variant):
                        return group_rational_reference(*tensors, groups, variant)

                    eager = formula(function, args, way == "backward")
                    least = cost(rows, width, groups, dtype, way)
                    yield Launch(f"{way} {rows}x{width}/{groups} {variant}", dtype, run, x.numel(), least, eager)
