r"""Fake quantisation: $y = s\,q$ with $q = \mathrm{clamp}(\mathrm{round}(v),\,l,\,h)$ and $v = x/s$, and its gradients.

Sources: the step gradient is that of Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization",
ICLR 2020 (equation 3); with `clip=False` the gradient of x is that of Dong and others, "HAWQ-V2", NeurIPS 2020.

Shapes: x and y any; the step s is one number, or (C,) with one for each index along `axis`. With b bits the levels
$l, \dots, h$ are $-2^{b-1}, \dots, 2^{b-1}-1$ (signed) or $0, \dots, 2^b-1$ (unsigned). One signed bit has two levels,
-1 and 1, and no zero: q is the sign of x, and zero counts as positive. A zero point z, a whole number, shifts the
levels to $l - z, \dots, h - z$. Rounding is half to even. A step of zero gives zeros.
Kernels: x in float32, bfloat16 or float16; s and z in that dtype or float32; arithmetic in float32, so that a code is
the same in every dtype. Reference: any floating dtype, half precisions computed in float32.

With $G = \partial L/\partial y$, the gradients are those of a straight line within the levels, of a constant beyond,

$$\nabla x = \begin{cases} G & l \le v \le h \\ 0 & \text{else}\end{cases}, \qquad
  \nabla s = \sum G \cdot \begin{cases} q - v & l \le v \le h \\ q & \text{else.}\end{cases}$$

With `clip=False` $\nabla x = G$ everywhere, as if nothing had been done to x.

What is saved for backward: x and s. Forward reads x and writes y, two passes through memory, where PyTorch's operations
one after the other take 14 (divide, clamp, round, a difference, a sum, a product). Backward reads x and G and writes
the gradient of x, three passes, and takes the sum for the step on the way: each program stores one number for each row
of its tile, and one addition in a fixed order follows. No atomics: the same bits always.

x is seen as (rows, inner), where all entries of a row share one step, so the channel is found once a row and not once
an entry. Where `axis` is the last, rows have one entry, and the sums take one more pass of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    check_tensors,
    choose_backend,
    no_double_backward,
    on_device,
    round_half_even,
    tl,
    triton,
    widened,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """Return the lowest and the highest code of b bits: (-2**(b-1), 2**(b-1) - 1) if signed, else (0, 2**b - 1).

    One signed bit has the codes -1 and 1. Raises ValueError for a number of bits that is not an integer from 1 to 16.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 1 to 16, got {bits!r}")
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def fake_quantize_reference(
    x: Tensor, scale: Tensor, bits: int, axis: int | None = None, signed: bool = True,
    zero_point: Tensor | None = None, clip: bool = True,
) -> Tensor:  # fmt: skip
    """Return `scale * clamp(round(x / scale), low, high)` in plain PyTorch, in the dtype of x.

    x of any shape; scale and zero_point hold one number, or one for each index along `axis`. Any floating dtype and
    device; works under `torch.func`. PyTorch itself checks the arguments.
    """
    low, high = code_range(bits, signed)
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    wide, step = widened(x), widened(scale).view(shape)
    if zero_point is not None:
        zero = widened(zero_point).view(shape)
        low, high = low - zero, high - zero
    inner = wide if clip else wide.detach()
    bound = (inner / torch.where(step == 0, torch.inf, step)).clamp(low, high)
    code = torch.where(bound < 0, -1.0, 1.0) if signed and bits == 1 else bound.round()
    y = step * (bound + (code - bound).detach())
    return (y if clip else y + (wide - inner)).to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 2048  # entries of a tile: sixteen a thread with four warps


@triton.jit
def _quantize(x, scale, zero, at, row, ok, row_ok, channels, low, high, BINARY: tl.constexpr):
    """Load a tile, and return the step of each row, v, v within the levels, and the code."""
    channel = row % channels
    s = tl.load(scale + channel, mask=row_ok, other=1.0).to(tl.float32)
    if zero is not None:
        z = tl.load(zero + channel, mask=row_ok, other=0.0).to(tl.float32)
        low, high = low - z, high - z
    divisor = tl.where(s == 0, float("inf"), s)
    wide = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    v = tl.div_rn(wide, tl.broadcast_to(divisor, wide.shape))
    bound = tl.where(v < low, low, tl.where(v > high, high, v))  # keeps what is not a number
    code = tl.where(v < 0, -1.0, tl.where(v >= 0, 1.0, v)) if BINARY else round_half_even(bound)
    return s, v, bound, code


@triton.jit
def _tile(rows, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of this program's tile, the number of its columns' block, its offsets, and which of them exist."""
    blocks = tl.cdiv(inner, COLUMNS)
    pid = tl.program_id(0)
    block = pid % blocks
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, block, blocks, row * inner + column, (row < rows) & (column < inner)


@triton.jit(do_not_specialize=["rows", "channels", "low", "high"])
def _forward_kernel(
    x, scale, zero, y, rows, channels, inner, low, high,
    BINARY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, _, _, at, ok = _tile(rows, inner, ROWS, COLUMNS)
    s, _, _, code = _quantize(x, scale, zero, at, row, ok, row < rows, channels, low, high, BINARY)
    tl.store(y + at, (s * code).to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "channels", "low", "high"])
def _backward_kernel(
    grad, x, scale, zero, grad_x, sums, rows, channels, inner, low, high,
    BINARY: tl.constexpr, CLIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, block, blocks, at, ok = _tile(rows, inner, ROWS, COLUMNS)
    s, v, bound, code = _quantize(x, scale, zero, at, row, ok, row < rows, channels, low, high, BINARY)
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    inside = bound == v
    if grad_x is not None:
        slope = tl.where(inside & (s != 0), g, 0.0) if CLIP else g
        tl.store(grad_x + at, slope.to(grad_x.dtype.element_ty), mask=ok)
    if sums is not None:
        terms = tl.where(ok, g * tl.where(inside, code - v, bound), 0.0)
        tl.store(sums + row * blocks + block, tl.sum(terms, axis=1)[:, None], mask=row < rows)


# --- registration -----------------------------------------------------------------------------------------------------


def _layout(x: Tensor, axis: int | None) -> tuple[int, int, int, dict[str, int]]:
    """How x is seen: (rows, channels, inner), and the tile."""
    channels = 1 if axis is None else x.shape[axis]
    inner = x.numel() if axis is None else x.shape[axis + 1 :].numel()
    rows = x.numel() // inner if inner else 0
    columns = min(triton.next_power_of_2(max(inner, 1)), _BLOCK)
    return rows, channels, inner, {"ROWS": _BLOCK // columns, "COLUMNS": columns}


def _programs(rows: int, inner: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(inner, tile["COLUMNS"]),)


@torch.library.custom_op("polylib::fake_quantize", mutates_args=())
def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int | None, signed: bool, clip: bool
) -> Tensor:
    """Return y, contiguous; x has any strides; axis is None or not negative."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, channels, inner, tile = _layout(x, axis)
    if rows > 0:
        zero = None if zero_point is None else zero_point.contiguous()
        with on_device(x):
            _forward_kernel[_programs(rows, inner, tile)](
                x, scale.contiguous(), zero, y, rows, channels, inner, *map(float, code_range(bits, signed)),
                BINARY=signed and bits == 1, **tile,
            )  # fmt: skip
    return y


@_forward.register_fake
def _(x, scale, zero_point, bits, axis, signed, clip):
    return x.new_empty(x.shape)


@torch.library.custom_op("polylib::fake_quantize_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int | None, signed: bool,
    clip: bool, need_x: bool, need_scale: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of the step; empty where not needed."""
    grad, x = grad.contiguous(), x.contiguous()
    rows, channels, inner, tile = _layout(x, axis)
    blocks = triton.cdiv(inner, tile["COLUMNS"])
    grad_x = x.new_empty(x.shape if need_x else (0,))
    sums = x.new_empty(rows, blocks, dtype=torch.float32) if need_scale else None
    if rows > 0:
        zero = None if zero_point is None else zero_point.contiguous()
        with on_device(x):
            _backward_kernel[_programs(rows, inner, tile)](
                grad, x, scale.contiguous(), zero, grad_x if need_x else None, sums,
                rows, channels, inner, *map(float, code_range(bits, signed)),
                BINARY=signed and bits == 1, CLIP=clip, **tile,
            )  # fmt: skip
    if not need_scale:
        return grad_x, scale.new_empty(0)
    sums = sums.view(rows // channels if channels else 0, channels, blocks).sum((0, 2))
    return grad_x, sums.view(scale.shape).to(scale.dtype)


@_backward.register_fake
def _(grad, x, scale, zero_point, bits, axis, signed, clip, need_x, need_scale):
    return x.new_empty(x.shape if need_x else (0,)), scale.new_empty(scale.shape if need_scale else (0,))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, scale, zero_point, *ctx.settings = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    need_x, need_scale = ctx.needs_input_grad[:2]
    if not need_scale and not ctx.settings[-1]:
        return (grad,) + (None,) * 6  # the identity: no kernel
    grad_x, grad_scale = _backward(grad, *ctx.saved_tensors, *ctx.settings, need_x, need_scale)
    return grad_x if need_x else None, grad_scale if need_scale else None, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("fake_quantize"))


# --- the public function ----------------------------------------------------------------------------------------------


def fake_quantize(
    x: Tensor, scale: Tensor, bits: int, *, axis: int | None = None, signed: bool = True,
    zero_point: Tensor | None = None, clip: bool = True, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return `scale * clamp(round(x / scale), low, high)` with the straight-through gradient of x and that of the step.

    Args:
        x: any shape and strides.
        scale: the step between two levels, not negative: one number, of shape () or (1,); with `axis`, (C,) for the C
            indices along it. A step of zero gives zeros.
        bits: 1 to 16. One signed bit means the levels -scale and scale.
        axis: the axis of x that has a step for each index (0 for the output channels of a weight); None for one step.
        signed: levels on both sides of zero, or from zero upwards.
        zero_point: whole numbers, shaped as scale: the code that stands for zero. It gets no gradient.
        clip: whether entries beyond the last level get no gradient, as in LSQ, or one like all others, as in HAWQ
            (for finite x).
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        The shape and dtype of x; half precisions are computed in float32 and rounded once.

    Raises:
        ValueError: bits outside 1 to 16, an axis that x lacks, a scale or zero point of another shape, a zero point
            with one signed bit, tensors on different devices, an unknown backend.
        TypeError: not a floating-point tensor, a scale or zero point that has neither the dtype of x nor float32.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Esser and others, "Learned Step Size Quantization", ICLR 2020.
    """
    check_tensors({"x": x})
    code_range(bits, signed)
    if axis is not None:
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"axis must be an axis of x, whose shape is {tuple(x.shape)}, got {axis}")
        axis %= x.dim()
    if zero_point is not None and signed and bits == 1:
        raise ValueError("zero_point must be None for one signed bit, whose levels are -scale and scale")
    shapes = [(), (1,)] if axis is None else [(x.shape[axis],)]
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is None and name == "zero_point":
            continue
        check_tensors({name: tensor})
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, or torch.float32, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
        if tuple(tensor.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if choose_backend(backend, x) == "reference":
        return fake_quantize_reference(x, scale, bits, axis, signed, zero_point, clip)
    return _forward(x, scale, zero_point, bits, axis, signed, clip)


# --- cost and benchmark -----------------------------------------------------------------------------------------------


def cost(size: int, channels: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops for `size` entries: x read and y written once; backward x and G read, and the
    gradient of x written. Steps count as float32.

    Flops of one entry: forward 6 (a division, two bounds, two additions that round, a product); backward 10 (the same
    without the last, a comparison, a choice, a difference, a product, a sum). direction: "forward" or "backward" (both
    gradients). Raises ValueError for another direction.
    """
    counts = {
        "forward": (2 * size * dtype.itemsize + 4 * channels, 6 * size),
        "backward": (3 * size * dtype.itemsize + 8 * channels, 10 * size),
    }
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    return Cost(*counts[direction])


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


def bench_cases(device: torch.device, quick: bool) -> Iterator[tuple]:
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
