"""What is timed and what is compiled of the cast to fixed point."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.launch import BOTH, Launch, formula
from polylib.kernels.fixed_point import cost, fixed_point, fixed_point_reference, raw_range

WIDTH = 8


def _installed_peers(int_bits: Tensor) -> dict[str, Callable]:
    """The fake quantisers of brevitas and qtorch with the same levels, where they are installed."""
    places = WIDTH - int(int_bits)
    peers: dict[str, Callable] = {}
    try:
        from brevitas.core.function_wrapper import RoundSte, TensorClamp
        from brevitas.core.quant import IntQuant
    except ImportError:
        pass
    else:
        module = IntQuant(
            signed=True, narrow_range=False, float_to_int_impl=RoundSte(), tensor_clamp_impl=TensorClamp()
        )
        scale, zero, bits = (int_bits.new_tensor(v) for v in (2.0**-places, 0.0, float(WIDTH)))
        peers["brevitas"] = lambda x: module.to(x.device)(scale, zero, bits, x)
    try:
        from qtorch.quant import fixed_point_quantize
    except ImportError:
        pass
    else:
        peers["qtorch"] = lambda x: fixed_point_quantize(x, WIDTH, places, rounding="nearest")
    return peers


def cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    Eight bits, three of them left of the point, which is fixed, or learned ("+p"). The peers round halves to even.
    PyTorch's learned step is any number and not a power of two, so that its gradient is another one.
    """
    sizes, dtypes = [(256, 1024), (1024, 1024)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(4096, 4096), (16384, 4096)], [torch.float32, torch.bfloat16]
    low, high = raw_range(WIDTH)
    int_bits = torch.tensor(3.0, device=device)
    step = torch.full((1,), 2.0 ** (3 - WIDTH), device=device)
    zero = torch.zeros(1, device=device)

    def reference(x, point=int_bits):
        return fixed_point_reference(x, point, WIDTH)

    def ours(x, point=int_bits):
        return fixed_point(x, point, WIDTH)

    def torch_fixed(x):
        return torch.fake_quantize_per_tensor_affine(x, step[0], zero[0].int(), low, high)

    def torch_learned(x, step):
        return torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, low, high, 1.0)

    for dtype in dtypes:
        for rows, columns in [(8, 64)] if quick else sizes:
            x = torch.randn(rows, columns, device=device, dtype=dtype)
            forward = cost(x.numel(), dtype)
            costs = (forward, forward + cost(x.numel(), dtype, "backward"))
            functions = {"reference": reference, "torch": torch_fixed, **_installed_peers(int_bits), "ours": ours}
            yield f"{rows}x{columns}", dtype, costs, {name: (function, (x,)) for name, function in functions.items()}
            learned = {
                "reference": (reference, (x, int_bits)),
                "torch": (torch_learned, (x, step)),
                "ours": (ours, (x, int_bits)),
            }
            yield f"{rows}x{columns} +p", dtype, costs, learned


def launches(small: bool = False) -> Iterator[Launch]:
    """Yield both directions of every overflow, at a size that is a multiple of 16 entries, and at one that is not."""
    like = torch.ones_like if small else torch.empty_like
    new = torch.ones if small else torch.empty
    sizes = [(16, 512), (3, 1667)] if small else [(4096, 4096), (4096, 4099)]
    for (rows, columns), overflow in [(sizes[0], "sat"), (sizes[1], "sat"), (sizes[0], "wrap")]:
        for dtype in BOTH:
            x, int_bits = new(rows, columns, dtype=dtype), torch.ones(())
            for way in ("forward", "backward"):

                def run(x=x, int_bits=int_bits, way=way, overflow=overflow):
                    settings = (WIDTH, True, "rnd", overflow)
                    if way == "forward":
                        return torch.ops.polylib.fixed_point(x, int_bits, *settings)
                    return torch.ops.polylib.fixed_point_backward(like(x), x, int_bits, *settings, True, True)

                def function(x, int_bits, overflow=overflow):
                    return fixed_point_reference(x, int_bits, WIDTH, overflow=overflow)

                eager = formula(function, (x, int_bits), way == "backward")
                label = f"{way} {rows}x{columns}{' wrap' if overflow == 'wrap' else ''}"
                yield Launch(label, dtype, run, x.numel(), cost(x.numel(), dtype, way), eager)
