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

The contiguous axis of memory is the inner axis of a tile, whichever axis has the steps. Where all entries of a stretch
of memory share a step (one step for all; the first axis; an axis before large ones) x is seen as (rows, inner), and a
program reads the step of each row. Else x is seen as (outer, channels * inner): a program reads the steps of its
columns once and walks down a strip of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    check_tensors,
    choose_backend,
    load,
    no_double_backward,
    on_device,
    round_half_even,
    store,
    tl,
    triton,
    unit,
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

    On a CPU it moves 32 bytes an entry of float32, and 93 for the gradients. The least is what one loop would
    move, 8 and 12; `torch.compile` fuses most of the steps.
    """
    low, high = code_range(bits, signed)
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    step = widened(scale).view(shape)
    zero = None if zero_point is None else widened(zero_point).view(shape)
    # torch.compile can't trace a formula for forward mode.
    function = _FakeQuantize if torch.compiler.is_compiling() else _FakeQuantizeBothModes
    return function.apply(widened(x), step, zero, low, high, signed and bits == 1, clip).to(x.dtype)


def _codes(x: Tensor, step: Tensor, zero: Tensor | None, low: float, high: float, binary: bool) -> tuple[Tensor, ...]:
    """Return v = x / step, v within the levels, and the code."""
    v = x / torch.where(step == 0, torch.inf, step)
    bound = v.clamp(low, high) if zero is None else v.clamp(low - zero, high - zero)
    return v, bound, torch.where(bound < 0, -1.0, 1.0).to(v.dtype) if binary else bound.round()


class _FakeQuantize(torch.autograd.Function):
    """The straight-through gradients, in the few operations that they need.

    What autograd would make of the formula divides by the square of the step, which is zero for a subnormal one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, step, zero, low, high, binary, clip):
        v, _bound, code = _codes(x, step, zero, low, high, binary)
        return step * torch.where(v.isnan(), v, code) if binary else code.mul_(step)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, step, zero, *ctx.settings = inputs
        ctx.save_for_backward(x, step, zero)

    @staticmethod
    def slopes(ctx, *saved):
        """Return where x counts, and dy/ds. Both are constants for higher derivatives: y is a line in x and s."""
        x, step, zero = (None if t is None else t.detach() for t in saved)
        *levels, clip = ctx.settings
        v, bound, code = _codes(x, step, zero, *levels)
        inside = v == bound
        return inside & (step != 0) if clip else torch.ones_like(inside), torch.where(inside, code - v, bound)

    @staticmethod
    def backward(ctx, grad):
        need_x, need_step = ctx.needs_input_grad[:2]
        if not ctx.settings[-1] and not need_step:
            return grad, *(None,) * 6
        saved = ctx.saved_tensors  # once: gradient checkpointing allows no second look
        passes, slope = _FakeQuantize.slopes(ctx, *saved)
        grad_x = torch.where(passes, grad, 0.0) if need_x else None
        grad_step = (grad * slope).sum_to_size(saved[1].shape) if need_step else None
        return grad_x, grad_step, *(None,) * 5


class _FakeQuantizeBothModes(_FakeQuantize):
    """The same, and its tangents for forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _FakeQuantize.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx, x_tangent, step_tangent, *_others):
        passes, slope = _FakeQuantize.slopes(ctx, *ctx.saved_tensors)
        tangent = torch.zeros_like(slope)
        if x_tangent is not None:
            tangent = torch.where(passes, x_tangent, tangent)
        return tangent if step_tangent is None else tangent + step_tangent * slope


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 1024  # entries of a tile: eight a thread with four warps
_STRIP = 8  # tiles that a program walks down, where steps belong to columns


@triton.jit
def _step(scale, zero, channel, ok):
    """The steps and the zero points of some channels."""
    s = load(scale + channel, ok)
    if zero is None:
        z = tl.zeros_like(s)
    else:
        z = load(zero + channel, ok)
    return s, z


@triton.jit
def _step_of_rows(scale, zero, row, rows, channels, ROWS: tl.constexpr):
    """The steps and zero points of the rows of a tile, each read once; one row's are scalars."""
    if ROWS == 1:
        s, z = _step(scale, zero, tl.sum(row, axis=0) % channels, None)
    else:
        s, z = _step(scale, zero, row % channels, row < rows)
        s, z = s[:, None], z[:, None]
    return s, z


# excerpt: begin
@triton.jit
def _quantize(x, s, z, low, high, BINARY: tl.constexpr):
    """Return v, v within the levels, and the code."""
    v = tl.div_rn(x, tl.broadcast_to(tl.where(s == 0, float("inf"), s), x.shape))
    low, high = tl.broadcast_to(low - z, x.shape), tl.broadcast_to(high - z, x.shape)
    bound = tl.where(v < low, low, tl.where(v > high, high, v))  # keeps what is not a number
    code = tl.where(v < 0, -1.0, tl.where(v >= 0, 1.0, v)) if BINARY else round_half_even(bound)
    return v, bound, code


# excerpt: end


@triton.jit
def _gradient(g, v, bound, code, s, grad_x, at, ok, CLIP: tl.constexpr):
    """Store the gradient of x, and return what each entry adds to that of the step."""
    inside = bound == v
    if grad_x is not None:
        store(grad_x + at, tl.where(inside & (tl.broadcast_to(s, g.shape) != 0), g, 0.0) if CLIP else g, ok)
    return g * tl.where(inside, code - v, bound)


# One row is the whole tensor, with one step: its full blocks need no mask, as in poly_relu.
@triton.jit
def _rows_tile(rows, inner, UNIT: tl.constexpr, ONE_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of this program's tile, its offsets, which of them exist, whether all do, and its block of columns."""
    width = inner.to(tl.int64) * UNIT
    blocks = tl.cdiv(width, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    row = pid // blocks * ROWS + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if ONE_ROW:
        at, ok = column, column < width
    else:
        at, ok = row[:, None] * width + column, (row < rows)[:, None] & (column < width)
    return row, at, ok, (block + 1) * COLUMNS <= width, block, blocks


@triton.jit(do_not_specialize=["rows", "channels", "inner", "low", "high"])
def _rows_forward_kernel(
    x, scale, zero, y, rows, channels, inner, low, high,
    BINARY: tl.constexpr, UNIT: tl.constexpr, ONE_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, at, ok, full, _block, _blocks = _rows_tile(rows, inner, UNIT, ONE_ROW, ROWS, COLUMNS)
    s, z = _step_of_rows(scale, zero, row, rows, channels, ROWS)
    if ONE_ROW and full:
        _v, _bound, code = _quantize(load(x + at, None), s, z, low, high, BINARY)
        store(y + at, s * code, None)
    else:
        _v, _bound, code = _quantize(load(x + at, ok), s, z, low, high, BINARY)
        store(y + at, s * code, ok)


@triton.jit
def _rows_backward_tile(
    grad, x, s, z, grad_x, sums, at, ok, low, high, BINARY: tl.constexpr, CLIP: tl.constexpr
):  # fmt: skip
    v, bound, code = _quantize(load(x + at, ok), s, z, low, high, BINARY)
    terms = _gradient(load(grad + at, ok), v, bound, code, s, grad_x, at, ok, CLIP)
    if ok is not None:
        terms = tl.where(ok, terms, 0.0)
    return tl.sum(terms, axis=1)


@triton.jit(do_not_specialize=["rows", "channels", "inner", "low", "high"])
def _rows_backward_kernel(
    grad, x, scale, zero, grad_x, sums, rows, channels, inner, low, high, BINARY: tl.constexpr, CLIP: tl.constexpr,
    UNIT: tl.constexpr, ONE_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, at, ok, full, block, blocks = _rows_tile(rows, inner, UNIT, ONE_ROW, ROWS, COLUMNS)
    s, z = _step_of_rows(scale, zero, row, rows, channels, ROWS)
    if ONE_ROW and full:
        total = _rows_backward_tile(grad, x, s, z, grad_x, sums, at, None, low, high, BINARY, CLIP)
    else:
        total = _rows_backward_tile(grad, x, s, z, grad_x, sums, at, ok, low, high, BINARY, CLIP)
    if sums is not None:
        tl.store(sums + row * blocks + block, total, mask=row < rows)


@triton.jit
def _columns_tile(width, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr):
    """The first rows of this program's strip, its columns and their channels."""
    blocks = tl.cdiv(width, COLUMNS)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * (ROWS * STRIP) + tl.arange(0, ROWS)[:, None]
    column = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, column // inner, pid // blocks


@triton.jit(do_not_specialize=["outer", "width", "inner", "low", "high"])
def _columns_forward_kernel(
    x, scale, zero, y, outer, width, inner, low, high, BINARY: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    width = width * UNIT
    row, column, channel, _strip = _columns_tile(width, inner, ROWS, COLUMNS, STRIP)
    s, z = _step(scale, zero, channel, column < width)
    for _ in range(STRIP):
        at, ok = row * width + column, (row < outer) & (column < width)
        _v, _bound, code = _quantize(load(x + at, ok), s, z, low, high, BINARY)
        store(y + at, s * code, ok)
        row += ROWS


@triton.jit(do_not_specialize=["outer", "width", "inner", "low", "high"])
def _columns_backward_kernel(
    grad, x, scale, zero, grad_x, sums, outer, width, inner, low, high, BINARY: tl.constexpr, CLIP: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    width = width * UNIT
    row, column, channel, strip = _columns_tile(width, inner, ROWS, COLUMNS, STRIP)
    s, z = _step(scale, zero, channel, column < width)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(STRIP):
        at, ok = row * width + column, (row < outer) & (column < width)
        v, bound, code = _quantize(load(x + at, ok), s, z, low, high, BINARY)
        terms = _gradient(load(grad + at, ok), v, bound, code, s, grad_x, at, ok, CLIP)
        total += tl.where(ok, terms, 0.0)
        row += ROWS
    if sums is not None:
        here = sums + strip.to(tl.int64) * width + column
        tl.store(here, tl.sum(total, axis=0)[None, :], mask=column < width)


# --- registration -----------------------------------------------------------------------------------------------------


def _by_columns(x: Tensor, axis: int | None) -> bool:
    """Tell whether neighbours in memory belong to different steps more often than once in 256."""
    return axis is not None and x.shape[:axis].numel() > 1 and x.shape[axis + 1 :].numel() < 256


def _rows_layout(x: Tensor, axis: int | None) -> tuple[tuple[int, ...], dict[str, int | bool], int, int]:
    """How x is seen where a row has one step: (rows, channels, inner), the tile, and the programs down and across."""
    channels = 1 if axis is None else x.shape[axis]
    inner = x.numel() if axis is None else x.shape[axis + 1 :].numel()
    rows, part = x.numel() // inner, unit(inner)
    columns = min(triton.next_power_of_2(inner), _BLOCK)
    tile = {"ROWS": 1 if axis is None else _BLOCK // columns, "COLUMNS": columns}
    sizes = (rows, channels, inner // part)
    tile |= {"UNIT": part, "ONE_ROW": axis is None}
    return sizes, tile, triton.cdiv(rows, tile["ROWS"]), triton.cdiv(inner, columns)


def _columns_layout(x: Tensor, axis: int) -> tuple[tuple[int, ...], dict[str, int], int, int]:
    """How x is seen where columns have steps: (outer, width, inner), the tile, and the programs down and across."""
    outer, inner = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    width = x.shape[axis] * inner
    columns = min(triton.next_power_of_2(width), 128)
    rows, part = min(_BLOCK // columns, triton.next_power_of_2(outer)), unit(width)
    strip = min(_STRIP, triton.cdiv(outer, rows))
    tile = {"UNIT": part, "ROWS": rows, "COLUMNS": columns, "STRIP": strip}
    return (outer, width // part, inner), tile, triton.cdiv(outer, rows * strip), triton.cdiv(width, columns)


@torch.library.custom_op("polylib::fake_quantize", mutates_args=())
def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int | None, signed: bool, clip: bool
) -> Tensor:
    """Return y, contiguous; x has any strides; axis is None or not negative."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        zero = None if zero_point is None else zero_point.contiguous()
        columns = _by_columns(x, axis)
        kernel = _columns_forward_kernel if columns else _rows_forward_kernel
        sizes, tile, down, across = _columns_layout(x, axis) if columns else _rows_layout(x, axis)
        with on_device(x):
            kernel[(down * across,)](
                x, scale.contiguous(), zero, y, *sizes, *map(float, code_range(bits, signed)),
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
    grad_x = x.new_empty(x.shape if need_x else (0,))
    if x.numel() == 0:
        return grad_x, scale.new_zeros(scale.shape if need_scale else (0,))
    zero = None if zero_point is None else zero_point.contiguous()
    columns = _by_columns(x, axis)
    kernel = _columns_backward_kernel if columns else _rows_backward_kernel
    sizes, tile, down, across = _columns_layout(x, axis) if columns else _rows_layout(x, axis)
    channels = scale.numel()
    shape = (down, x.numel() // sizes[0]) if columns else (sizes[0], across)
    sums = x.new_empty(shape, dtype=torch.float32) if need_scale else None
    with on_device(x):
        kernel[(down * across,)](
            grad, x, scale.contiguous(), zero, grad_x if need_x else None, sums, *sizes,
            *map(float, code_range(bits, signed)), BINARY=signed and bits == 1, CLIP=clip, **tile,
        )  # fmt: skip
    if sums is None:
        return grad_x, scale.new_empty(0)
    sums = sums.view(-1, channels, sums.shape[1] // channels if columns else across).sum((0, 2))
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


# --- cost -------------------------------------------------------------------------------------------------------------


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
