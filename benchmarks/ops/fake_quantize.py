"""What is timed and what is compiled of fake quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.fake_quantize import code_range, cost, fake_quantize, fake_quantize_reference


def _installed_peers(bits: int, rows: int, columns: int, per_channel: bool, steps: Tensor) -> dict[str, Callable]:
    """The fake quantisers of torchao and brevitas with a fixed step, where they are installed."""
    low, high = code_range(bits)
    peers: dict[str, Callable] = {}
    try:
        from torchao.quantization.quant_primitives import _fake_quantize_affine as torchao_op
    except ImportError:
        pass
    else:
        block = (1, columns) if per_channel else (rows, columns)
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        peers["torchao"] = lambda x: torchao_op(x, block, steps, zeros, torch.int8, low, high)
    try:
        from brevitas.core.function_wrapper import RoundSte, TensorClamp
        from brevitas.core.quant import IntQuant
    except ImportError:
        pass
    else:
        module = IntQuant(False, True, RoundSte(), TensorClamp()).to(steps.device)
        by_row = steps.view(-1, 1) if per_channel else steps
        zero, width = by_row.new_zeros(()), by_row.new_tensor(float(bits))
        peers["brevitas"] = lambda x: module(by_row, zero, width, x)
    return peers


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    Four bits; one step ("t"), or one for each row, a channel ("c"); fixed, or learned ("+s"). The peers are PyTorch's
    own fake quantisers, whose learned form is what its quantisation-aware training uses, and for a fixed step torchao
    and brevitas where they are installed.
    """
    sizes, dtypes = [(256, 1024), (1024, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(4096, 4096), (16384, 4096)], [torch.float32, torch.bfloat16]
    bits, (low, high) = 4, code_range(4)
    for dtype in dtypes:
        for rows, columns in [(8, 64)] if quick else sizes:
            x = torch.randn(rows, columns, device=device, dtype=dtype)
            for name, axis, channels in (("t", None, 1), ("c", 0, rows)):
                steps = torch.full((channels,), 0.3, device=device)
                zeros = torch.zeros(channels, device=device)
                whole = zeros.int()
                forward = cost(x.numel(), channels, dtype)
                costs = (forward, forward + cost(x.numel(), channels, dtype, "backward"))

                def reference(x, scale, axis=axis):
                    return fake_quantize_reference(x, scale, bits, axis)

                def ours(x, scale, axis=axis):
                    return fake_quantize(x, scale, bits, axis=axis)

                def torch_fixed(x, scale=steps, zeros=whole, axis=axis):
                    if axis is None:
                        return torch.fake_quantize_per_tensor_affine(x, scale, zeros, low, high)
                    return torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, low, high)

                def torch_learned(x, scale, zeros=zeros, axis=axis):
                    if axis is None:
                        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zeros, low, high, 1.0)
                    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zeros, axis, low, high, 1.0)

                fixed = {
                    "reference": (lambda x, f=reference, s=steps: f(x, s), (x,)),
                    "torch": (torch_fixed, (x,)),
                    **{n: (f, (x,)) for n, f in _installed_peers(bits, rows, columns, axis == 0, steps).items()},
                    "ours": (lambda x, f=ours, s=steps: f(x, s), (x,)),
                }
                learned = {
                    "reference": (reference, (x, steps)),
                    "torch": (torch_learned, (x, steps)),
                    "ours": (ours, (x, steps)),
                }
                yield f"{rows}x{columns} {name}", dtype, costs, fixed
                yield f"{rows}x{columns} {name}+s", dtype, costs, learned


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions for one step, a step a row, and a step a column or an inner channel."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    sizes = [
        ("tensor", (4096, 4096), None),
        ("row", (4096, 4096), 0),
        ("column", (4096, 4096), 1),
        ("channel", (512, 512, 3, 3), 1),
        ("channel", (64, 256, 28, 28), 1),
    ]
    if small:
        sizes = [
            ("tensor", (64, 128), None),
            ("row", (16, 1024), 0),
            ("column", (128, 256), 1),
            ("channel", (64, 64, 3, 3), 1),
            ("channel", (2, 8, 28, 28), 1),
        ]
    for kind, shape, axis in sizes:
        for dtype in BOTH:
            x, scale = new(shape, dtype=dtype), torch.ones(1 if axis is None else shape[axis])
            for way in ("forward", "backward"):

                def run(x=x, scale=scale, axis=axis, way=way):
                    if way == "forward":
                        return torch.ops.polylib.fake_quantize(x, scale, None, 4, axis, True, True)
                    backward = torch.ops.polylib.fake_quantize_backward
                    return backward(like(x), x, scale, None, 4, axis, True, True, True, True)

                def function(x, scale, axis=axis):
                    return fake_quantize_reference(x, scale, 4, axis)

                eager = formula(function, (x, scale), way == "backward")
                label = f"{way} {'x'.join(map(str, shape))} step a {kind}"
                yield Launch(label, dtype, run, x.numel(), cost(x.numel(), scale.numel(), dtype, way), eager)
