r"""Fixed point with a trainable binary point: $y = \ell\,q$ with $q = \mathrm{ovf}(\mathrm{rnd}(x/\ell))$.

Sources: Dai and others, "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs", arXiv 2401.17544;
the gradient of the binary point is that of a quantiser's range in Jain and others, "Trained Quantization Thresholds",
MLSys 2020.

Shapes: x and y any; int_bits, a real number $\iota$ of shape (). A word has W bits; $I = \mathrm{round}(\iota)$ of them
stand left of the binary point, and I may exceed W or be negative. The last bit is worth $\ell = 2^{I-W}$. The raw
integers $l, \dots, h$ are $-2^{W-1}, \dots, 2^{W-1}-1$ (signed; I counts the sign) or $0, \dots, 2^W-1$ (unsigned).

`rounding` has the names of high-level synthesis: "trn" down, the default there; "trn_zero" towards zero; "rnd" to the
nearest and halves up; "rnd_conv" to the nearest and halves to the even one, as `torch.round`. `overflow`: "sat" takes
the nearer end of the range, "wrap", the default there, keeps the last W bits, $q = r - 2^W k$.
Kernels: x in float32, bfloat16 or float16; int_bits in that dtype or float32; arithmetic in float32. Reference: any
floating dtype, half precisions computed in float32.

With $G = \partial L/\partial y$, $v = x/\ell$ and $\partial\ell/\partial\iota := \ell\ln2$, the gradients are those of
a straight line in x and of a line in $\ell$, as if rounding added a constant to v:

$$\nabla x = \begin{cases} G & l \le v \le h \\ 0 & \text{else}\end{cases}, \qquad
  \nabla\iota = \ell\ln2\,\sum G \cdot \begin{cases} q - v & l \le v \le h \\ q & \text{else.}\end{cases}$$

With "wrap" they are the first lines everywhere, $\nabla x = G$ and $q - v$: the jumps of a word that wraps, $2^W k$,
are left out like those of rounding. Then a larger $\iota$ moves y away from x as far as there are turns k, and nothing
tells x to come back; train with "sat".

Exact: $\ell$ is a power of two made of its bits, so that x/l is exact where float32 can hold it (what is too small
counts as zero), and so is y. The width is limited to what the dtype of y can hold, its digits p (float64 53, float32
24, float16 11, bfloat16 8) and the sign. I from W - 126 to 127, so that all levels are normal numbers of float32;
else, or where int_bits is not finite, the result is not a number. float16 has fewer exponents: beyond, y is infinite or
a rounded subnormal.

What is saved for backward: x and int_bits. Forward reads x and writes y, two passes through memory. Backward reads x
and G and writes the gradient of x, three passes, and takes the sum for the binary point on the way: each program stores
one number, and one addition in a fixed order follows. No atomics: the same bits always.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polylib import _checks
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
    wide,
    widened,
)
from polylib.kernels._cost import Cost

ROUNDINGS = ("trn", "trn_zero", "rnd", "rnd_conv")
OVERFLOWS = ("sat", "wrap")

# --- the definition ---------------------------------------------------------------------------------------------------


def raw_range(width: int, signed: bool = True) -> tuple[int, int]:
    """Return the lowest and the highest raw integer of a word: (-2**(W-1), 2**(W-1) - 1) if signed, else (0, 2**W - 1).

    Raises ValueError for a width below 1, or below 2 if signed.
    """
    width = _checks.integer("width", width, least=2 if signed else 1)
    return (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)


def fixed_point_codes(
    x: Tensor, int_bits: Tensor, width: int, signed: bool = True, rounding: str = "rnd", overflow: str = "sat"
) -> tuple[Tensor, Tensor]:
    """Return the raw integers q of x and the worth l of their last bit, a power of two; the word stands for l * q.

    Both are detached, floating, and in at least float32; l has the shape of int_bits.
    """
    code, _v, _bound, lsb = _codes(widened(x).detach(), int_bits.detach(), width, signed, rounding, overflow)
    return code, lsb


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float32, from its bits; whole numbers from -126 to 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _rounded(v: Tensor, rounding: str) -> Tensor:
    if rounding == "trn":
        return v.floor()
    if rounding == "trn_zero":
        return v.trunc()
    if rounding == "rnd_conv":
        return v.round()
    floor = v.floor()  # v + 1/2 itself may round up to the next whole number
    return floor + (v - floor >= 0.5)


def _codes(x: Tensor, int_bits: Tensor, width: int, signed: bool, rounding: str, overflow: str) -> tuple[Tensor, ...]:
    """Return the codes, v = x / l, v within the range (as it is if it wraps), and l."""
    wanted = widened(int_bits).round() - width
    exponent = wanted.clamp(-126, 127 - width)
    lsb = torch.where(exponent == wanted, _power_of_two(exponent), torch.nan).to(x.dtype)
    v = x / lsb
    low, high = raw_range(width, signed)
    if overflow == "sat":
        bound = v.clamp(low, high)
        return _rounded(bound, rounding), v, bound, lsb
    code, span = _rounded(v, rounding), 2.0**width
    return code - span * _rounded(code / span, "rnd" if signed else "trn"), v, v, lsb


def fixed_point_reference(
    x: Tensor, int_bits: Tensor, width: int, signed: bool = True, rounding: str = "rnd", overflow: str = "sat"
) -> Tensor:
    """Return x in fixed point in plain PyTorch, in the dtype of x, with the gradients of x and of the binary point.

    Any floating dtype and device; works under `torch.func`. PyTorch itself checks the arguments.

    On a CPU it moves 58 bytes an entry of float32, and 125 for the gradients. The least is what one loop would
    move, 8 and 12; `torch.compile` fuses most of the steps.
    """
    # torch.compile can't trace a formula for forward mode.
    function = _FixedPoint if torch.compiler.is_compiling() else _FixedPointBothModes
    return function.apply(widened(x), widened(int_bits), width, signed, rounding, overflow).to(x.dtype)


class _FixedPoint(torch.autograd.Function):
    """The straight-through gradients, in the few operations that they need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, int_bits, width, signed, rounding, overflow):
        code, _v, _bound, lsb = _codes(x, int_bits, width, signed, rounding, overflow)
        return code * lsb

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, int_bits, *ctx.format = inputs
        ctx.save_for_backward(x, int_bits)

    @staticmethod
    def slopes(ctx, x, int_bits):
        """Return where x counts, and dy/d int_bits. Both are constants for higher derivatives: y is a line in both."""
        code, v, bound, lsb = _codes(x.detach(), int_bits.detach(), *ctx.format)
        inside = v == bound
        passes = torch.ones_like(inside) if ctx.format[-1] == "wrap" else inside
        return passes, torch.where(inside, code - v, code) * (lsb * math.log(2))

    @staticmethod
    def backward(ctx, grad):
        passes, slope = _FixedPoint.slopes(ctx, *ctx.saved_tensors)
        need_x, need_int_bits = ctx.needs_input_grad[:2]
        grad_x = torch.where(passes, grad, 0.0) if need_x else None
        return grad_x, (grad * slope).sum() if need_int_bits else None, *(None,) * 4


class _FixedPointBothModes(_FixedPoint):
    """The same, and its tangents for forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _FixedPoint.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx, x_tangent, point_tangent, *_others):
        passes, slope = _FixedPoint.slopes(ctx, *ctx.saved_tensors)
        tangent = torch.zeros_like(slope)
        if x_tangent is not None:
            tangent = torch.where(passes, x_tangent, tangent)
        return tangent if point_tangent is None else tangent + point_tangent * slope


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 1024  # entries a program: eight for each thread of four warps


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _format(int_bits, width):
    """The worth of the last bit, and its reciprocal."""
    point = round_half_even(wide(tl.load(int_bits)))
    ok = (point >= width - 126) & (point <= 127)
    exponent = tl.where(ok, point - width, 0.0).to(tl.int32)
    return tl.where(ok, _power(exponent), float("nan")), tl.where(ok, _power(-exponent), float("nan"))


# excerpt: begin
@triton.jit
def _round(v, ROUNDING: tl.constexpr):
    floor = tl.floor(v)
    if ROUNDING == "trn":
        return floor
    elif ROUNDING == "trn_zero":
        return tl.where(v < 0, tl.ceil(v), floor)
    elif ROUNDING == "rnd_conv":
        return round_half_even(v)
    return tl.where(v - floor >= 0.5, floor + 1, floor)


# excerpt: end


@triton.jit
def _codes_of(v, width, SIGNED: tl.constexpr, ROUNDING: tl.constexpr, WRAP: tl.constexpr):
    """The codes, and v within the range."""
    if WRAP:
        r = _round(v, ROUNDING)  # next the turns, by a product with a power of two, which is exact
        turns = _round(r * _power(-width), "rnd" if SIGNED else "trn")
        return r - turns * _power(width), v
    low = -_power(width - 1) if SIGNED else 0.0
    high = (_power(width - 1) if SIGNED else _power(width)) - 1
    bound = tl.where(v < low, low, tl.where(v > high, high, v))  # keeps what is not a number
    return _round(bound, ROUNDING), bound


@triton.jit
def _forward_block(
    x, y, lsb, per_lsb, width, at, ok, SIGNED: tl.constexpr, ROUNDING: tl.constexpr, WRAP: tl.constexpr
):  # fmt: skip
    code, _bound = _codes_of(load(x + at, ok) * per_lsb, width, SIGNED, ROUNDING, WRAP)
    store(y + at, code * lsb, ok)


# Full blocks need no mask, as in poly_relu. The width is no constant: another one compiles nothing.
@triton.jit(do_not_specialize=["width", "size"])
def _forward_kernel(
    x, int_bits, y, width, size, SIGNED: tl.constexpr, ROUNDING: tl.constexpr, WRAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    lsb, per_lsb = _format(int_bits, width)
    if start + BLOCK <= size:
        _forward_block(x, y, lsb, per_lsb, width, at, None, SIGNED, ROUNDING, WRAP)
    else:
        _forward_block(x, y, lsb, per_lsb, width, at, at < size, SIGNED, ROUNDING, WRAP)


@triton.jit
def _backward_block(
    grad, x, grad_x, sums, lsb, per_lsb, width, at, ok, SIGNED: tl.constexpr, ROUNDING: tl.constexpr,
    WRAP: tl.constexpr,
):  # fmt: skip
    v, g = load(x + at, ok) * per_lsb, load(grad + at, ok)
    code, bound = _codes_of(v, width, SIGNED, ROUNDING, WRAP)
    inside = bound == v
    if grad_x is not None:
        store(grad_x + at, g if WRAP else tl.where(inside, g, 0.0), ok)
    if sums is not None:  # what does not exist was read as zero, and has no slope
        total = tl.sum(g * tl.where(inside, code - v, code), axis=0)
        tl.store(sums + tl.program_id(0), total * (lsb * 0.6931471805599453))


@triton.jit(do_not_specialize=["width", "size"])
def _backward_kernel(
    grad, x, int_bits, grad_x, sums, width, size, SIGNED: tl.constexpr, ROUNDING: tl.constexpr, WRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    lsb, per_lsb = _format(int_bits, width)
    if start + BLOCK <= size:
        _backward_block(grad, x, grad_x, sums, lsb, per_lsb, width, at, None, SIGNED, ROUNDING, WRAP)
    else:
        _backward_block(grad, x, grad_x, sums, lsb, per_lsb, width, at, at < size, SIGNED, ROUNDING, WRAP)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::fixed_point", mutates_args=())
def _forward(x: Tensor, int_bits: Tensor, width: int, signed: bool, rounding: str, overflow: str) -> Tensor:
    """Return y, contiguous; x has any strides."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            _forward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
                x, int_bits, y, width, x.numel(), SIGNED=signed, ROUNDING=rounding, WRAP=overflow == "wrap",
                BLOCK=_BLOCK,
            )  # fmt: skip
    return y


@_forward.register_fake
def _(x, int_bits, width, signed, rounding, overflow):
    return x.new_empty(x.shape)


@torch.library.custom_op("polylib::fixed_point_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, int_bits: Tensor, width: int, signed: bool, rounding: str, overflow: str, need_x: bool,
    need_int_bits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of int_bits; empty where not needed."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x, programs = x.new_empty(x.shape if need_x else (0,)), triton.cdiv(x.numel(), _BLOCK)
    sums = x.new_empty(programs, dtype=torch.float32) if need_int_bits else None
    if programs > 0:
        with on_device(x):
            _backward_kernel[(programs,)](
                grad, x, int_bits, grad_x if need_x else None, sums, width, x.numel(), SIGNED=signed, ROUNDING=rounding,
                WRAP=overflow == "wrap", BLOCK=_BLOCK,
            )  # fmt: skip
    return grad_x, int_bits.new_empty(0) if sums is None else sums.sum().to(int_bits.dtype)


@_backward.register_fake
def _(grad, x, int_bits, width, signed, rounding, overflow, need_x, need_int_bits):
    return x.new_empty(x.shape if need_x else (0,)), int_bits.new_empty(() if need_int_bits else (0,))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, int_bits, *ctx.settings = inputs
    ctx.save_for_backward(x, int_bits)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    need_x, need_int_bits = ctx.needs_input_grad[:2]
    if not need_int_bits and ctx.settings[-1] == "wrap":
        return grad, *(None,) * 5  # the identity: no kernel
    grad_x, grad_int_bits = _backward(grad, *ctx.saved_tensors, *ctx.settings, need_x, need_int_bits)
    return grad_x if need_x else None, grad_int_bits if need_int_bits else None, *(None,) * 4


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("fixed_point"))


# --- the public function ----------------------------------------------------------------------------------------------


def fixed_point(
    x: Tensor, int_bits: Tensor, width: int, *, signed: bool = True, rounding: str = "rnd", overflow: str = "sat",
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return x in words of `width` bits, round(int_bits) of them left of the binary point, with straight-through
    gradients of x and of the place of the binary point.

    Args:
        x: any shape and strides.
        int_bits: one real number, of shape (); the format uses it rounded, its gradient is as if it did not.
        width: the bits of a word. Signed: 2 to p + 1, unsigned: 1 to p, where p is 53, 24, 11 or 8 for x in float64,
            float32, float16 or bfloat16: all raw integers are exact.
        signed: two's complement, where int_bits counts the sign, or from zero upwards.
        rounding: "trn" (down), "trn_zero", "rnd" (nearest, halves up) or "rnd_conv" (nearest, halves to even).
        overflow: "sat" (the nearer end of the range) or "wrap" (the last `width` bits).
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        The shape and dtype of x. What is not a number stays so, and gets no gradient; infinity saturates, and can't
        wrap. Where round(int_bits) is not from width - 126 to 127, nothing is a number.

    Raises:
        ValueError: a width that x can't hold, an unknown rounding or overflow, an int_bits that is not one number,
            tensors on different devices, an unknown backend.
        TypeError: not a floating-point tensor, an int_bits that has neither the dtype of x nor float32.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Dai and others, "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs", 2024.
    """
    check_tensors({"x": x})
    check_tensors({"int_bits": int_bits})
    if int_bits.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"int_bits must have the dtype of x, {x.dtype}, or torch.float32, got {int_bits.dtype}")
    if int_bits.device != x.device:
        raise ValueError(f"int_bits must be on the device of x, {x.device}, got {int_bits.device}")
    if int_bits.dim() != 0:
        raise ValueError(f"int_bits must have shape (), got {tuple(int_bits.shape)}")
    signed = _checks.choice("signed", signed, (True, False))
    digits = 1 - round(math.log2(torch.finfo(x.dtype).eps))
    try:
        width = _checks.integer("width", width, least=1 + signed, most=digits + signed)
    except ValueError as error:
        raise ValueError(f"{error}; x is {'signed' if signed else 'unsigned'} and in {x.dtype}") from None
    _checks.choice("rounding", rounding, ROUNDINGS)
    _checks.choice("overflow", overflow, OVERFLOWS)
    if choose_backend(backend, x) == "reference":
        return fixed_point_reference(x, int_bits, width, signed, rounding, overflow)
    return _forward(x, int_bits, width, signed, rounding, overflow)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(size: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops for `size` entries: x read and y written once; backward x and G read, and the
    gradient of x written.

    Flops of one entry, with "rnd" and "sat": forward 8 (two products, two bounds, rounding down, a difference, a
    comparison, a sum); backward 12 (the same without the last product, a comparison, a choice, a difference, a product,
    a sum). direction: "forward" or "backward" (both gradients). Raises ValueError for another direction.
    """
    counts = {"forward": (2 * size, 8 * size), "backward": (3 * size, 12 * size)}
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize, flops)
