r"""The group rational function: $F_g(x) = P_g(x) / Q_g(x)$, one for each group of neighbouring channels.

Source: Yang, Wang, "Kolmogorov-Arnold Transformer", arXiv 2409.10594. With $P = a_0 + a_1 x + \dots + a_m x^m$,

- variant "A" has $Q = 1 + \sum_j |b_j| |x|^j$, as in the authors' GPU code,
- variant "B" has $Q = 1 + |\sum_j b_j x^j|$, as in the formula of their paper.

Both are at least 1, so that there is no pole, but they are different functions: coefficients fit one of the two.

Shapes: x (..., D), split into G groups of W = D / G neighbours; numerator (G, m + 1) or, shared by all, (1, m + 1);
denominator (G, n) or (1, n); y (..., D). M is the product of the leading sizes of x. Kernels: x in float32, bfloat16 or
float16, order (m, n) = (5, 4). Reference: any floating dtype, any order. Coefficients have the dtype of x or float32.
Arithmetic is in float32 at least (x to the fifth leaves float16 at 9), and y has the dtype of x.

With $G = \partial L / \partial y$, $w = G / Q$ and the inner sum $A(u)$ of the denominator, at $u = |x|$ with
coefficients $|b_j|$ (variant A) or at $u = x$ with $b_j$ (variant B), and $\sigma$ the sign of $x$ or of $A$,

$$\nabla x = w (P' - F \sigma A'), \quad \nabla a_i = \sum w x^i, \quad
  \nabla |b_j| = -\sum w F u^j \;(A), \quad \nabla b_j = -\sum w F \sigma u^j \;(B),$$

where sums run over the rows and the channels of a group. **The sign of zero is +1**, for x, b and A alike. With 0,
which is what autograd takes for the derivative of `abs`, a denominator that starts at zero would never move.

What is saved for backward: x and the coefficients; P and Q are cheaper to compute again than to read. In bfloat16 that
leaves 4 bytes an element forward and 6 backward, so both passes should run at the speed of memory.
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
    registers,
    store,
    tl,
    triton,
    unit,
)
from polylib.kernels._cost import Cost

VARIANTS = ("A", "B")
ORDER = (5, 4)

# --- the definition ---------------------------------------------------------------------------------------------------


def _magnitude(x: Tensor) -> Tensor:
    """Return |x|, with the derivative +1 at zero."""
    return torch.where(x < 0, -x, x)


def _horner(x: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
    """Return c_0 + c_1 x + c_2 x^2 + ..."""
    *rest, value = coefficients
    for c in reversed(rest):
        value = c + x * value  # not addcmul, which takes twice as long under vmap
    return value


def group_rational_reference(
    x: Tensor, numerator: Tensor, denominator: Tensor, groups: int, variant: str = "A"
) -> Tensor:
    """Return P(x) / Q(x) by groups of channels in plain PyTorch; arguments as in `group_rational`, of any order.

    Any floating dtype and device; differentiable any number of times; works under `torch.func`.

    On a CPU it moves 210 bytes an entry of float32, and 446 for the gradients. The least is what one loop would
    move, 8 and 12; `torch.compile` fuses most of the steps.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = wide.unflatten(-1, (groups, x.shape[-1] // groups))
    a, b = numerator.to(wide.dtype), denominator.to(wide.dtype)
    u, b = (_magnitude(z), _magnitude(b)) if variant == "A" else (z, b)
    inner = u * _horner(u, b.unsqueeze(-1).unbind(-2))
    q = 1 + (inner if variant == "A" else _magnitude(inner))
    return (_horner(z, a.unsqueeze(-1).unbind(-2)) / q).flatten(-2).to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# A program owns one group and a strip of rows. It loads its ten coefficients once. A group of W = CHUNKS * LANES
# channels, LANES a power of two, is walked in units of LANES neighbours: unit number u is chunk u % CHUNKS of row
# u // CHUNKS. So a tile of UNITS x LANES is full whatever W is: 24 is 3 chunks of 8, 48 and 96 are 6 and 12. A unit is
# what a thread loads at once, 16 bytes, and the division is done once a unit and by a constant.


@triton.jit
def _polynomials(x, a, b, VARIANT_B: tl.constexpr):
    """P and Q at x. Coefficients are tuples of scalars."""
    p = a[0] + x * (a[1] + x * (a[2] + x * (a[3] + x * (a[4] + x * a[5]))))
    u = x if VARIANT_B else tl.abs(x)
    inner = u * (b[0] + u * (b[1] + u * (b[2] + u * b[3])))
    q = 1.0 + (tl.abs(inner) if VARIANT_B else inner)
    return p, q


@triton.jit
def _with_slopes(x, a, b, VARIANT_B: tl.constexpr):
    """P and P', and A and A' at u, by Horner's scheme, which gives a derivative for one product more a step."""
    p, dp = a[4] + x * a[5], a[5]
    dp, p = p + x * dp, a[3] + x * p
    dp, p = p + x * dp, a[2] + x * p
    dp, p = p + x * dp, a[1] + x * p
    dp, p = p + x * dp, a[0] + x * p
    u = x if VARIANT_B else tl.abs(x)
    inner, slope = b[2] + u * b[3], b[3]
    slope, inner = inner + u * slope, b[1] + u * inner
    slope, inner = inner + u * slope, b[0] + u * inner
    return p, dp, u, u * inner, inner + u * slope


@triton.jit
def _place(start, units, first, group, CHUNKS: tl.constexpr, LANES: tl.constexpr, UNITS: tl.constexpr):
    """Row and column of each entry of the tile whose first unit is `start`, and which units exist."""
    unit = start + tl.arange(0, UNITS)
    row = (first + unit // CHUNKS)[:, None]
    column = ((group * CHUNKS + unit % CHUNKS) * LANES)[:, None] + tl.arange(0, LANES)[None, :].to(tl.int64)
    return row, column, (unit < units)[:, None]


@triton.jit
def _coefficients(numerator, denominator, VARIANT_B: tl.constexpr):
    a0, a1 = tl.load(numerator).to(tl.float32), tl.load(numerator + 1).to(tl.float32)
    a2, a3 = tl.load(numerator + 2).to(tl.float32), tl.load(numerator + 3).to(tl.float32)
    a4, a5 = tl.load(numerator + 4).to(tl.float32), tl.load(numerator + 5).to(tl.float32)
    b1, b2 = tl.load(denominator).to(tl.float32), tl.load(denominator + 1).to(tl.float32)
    b3, b4 = tl.load(denominator + 2).to(tl.float32), tl.load(denominator + 3).to(tl.float32)
    if not VARIANT_B:
        b1, b2, b3, b4 = tl.abs(b1), tl.abs(b2), tl.abs(b3), tl.abs(b4)
    return (a0, a1, a2, a3, a4, a5), (b1, b2, b3, b4)


@triton.jit(do_not_specialize=["M", "rows_per_strip"])
def _forward_kernel(
    x, numerator, denominator, y, M, rows_per_strip, D, stride_m, stride_k, stride_a, stride_b,
    VARIANT_B: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    group, first = tl.program_id(0), tl.program_id(1).to(tl.int64) * rows_per_strip
    a, b = _coefficients(numerator + group * stride_a, denominator + group * stride_b, VARIANT_B)
    units = (tl.minimum(rows_per_strip, M - first) * CHUNKS).to(tl.int32)
    for start in range(0, units, UNITS):
        row, column, ok = _place(start, units, first, group, CHUNKS, LANES, UNITS)
        value = load(x + row * (stride_m * UNIT) + column * stride_k, ok)
        p, q = _polynomials(value, a, b, VARIANT_B)
        store(y + row * (D * LANES) + column, p / q, ok)


# The neighbours of a unit are added up at once: all of them are in one thread, which then keeps ten sums in registers
# for the whole strip, and not ten for each of its lanes. They are added over the threads once, at the end, and the
# caller adds the strips in a fixed order: no atomics, hence the same bits every time.
@triton.jit(do_not_specialize=["M", "rows_per_strip"])
def _backward_kernel(
    grad, x, numerator, denominator, grad_x, partial, M, rows_per_strip, D, stride_m, stride_k, stride_a, stride_b,
    VARIANT_B: tl.constexpr, UNIT: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    group, first = tl.program_id(0), tl.program_id(1).to(tl.int64) * rows_per_strip
    a, b = _coefficients(numerator + group * stride_a, denominator + group * stride_b, VARIANT_B)
    units = (tl.minimum(rows_per_strip, M - first) * CHUNKS).to(tl.int32)
    s0 = tl.zeros((UNITS,), tl.float32)
    s1, s2, s3, s4, s5 = s0, s0, s0, s0, s0
    t1, t2, t3, t4 = s0, s0, s0, s0
    for start in range(0, units, UNITS):
        row, column, ok = _place(start, units, first, group, CHUNKS, LANES, UNITS)
        value = load(x + row * (stride_m * UNIT) + column * stride_k, ok)
        g = load(grad + row * (D * LANES) + column, ok)
        # excerpt: begin
        p, dp, u, inner, slope = _with_slopes(value, a, b, VARIANT_B)
        inverse = 1.0 / (1.0 + (tl.abs(inner) if VARIANT_B else inner))  # the one division, all else are products
        w, f = tl.where(ok, g * inverse, 0.0), tl.where(ok, p * inverse, 0.0)
        sign = tl.where((inner if VARIANT_B else value) < 0, -1.0, 1.0)
        if grad_x is not None:
            store(grad_x + row * (D * LANES) + column, w * (dp - f * (sign * slope)), ok)
        # excerpt: end
        if partial is not None:
            h = -w * f * u * (sign if VARIANT_B else 1.0)
            s0 += tl.sum(w, axis=1)
            w *= value
            s1 += tl.sum(w, axis=1)
            w *= value
            s2 += tl.sum(w, axis=1)
            w *= value
            s3 += tl.sum(w, axis=1)
            w *= value
            s4 += tl.sum(w, axis=1)
            w *= value
            s5 += tl.sum(w, axis=1)
            t1 += tl.sum(h, axis=1)
            h *= u
            t2 += tl.sum(h, axis=1)
            h *= u
            t3 += tl.sum(h, axis=1)
            h *= u
            t4 += tl.sum(h, axis=1)
    if partial is not None:
        out = partial + (group * tl.num_programs(1).to(tl.int64) + tl.program_id(1)) * 10
        tl.store(out, tl.sum(s0))
        tl.store(out + 1, tl.sum(s1))
        tl.store(out + 2, tl.sum(s2))
        tl.store(out + 3, tl.sum(s3))
        tl.store(out + 4, tl.sum(s4))
        tl.store(out + 5, tl.sum(s5))
        tl.store(out + 6, tl.sum(t1))
        tl.store(out + 7, tl.sum(t2))
        tl.store(out + 8, tl.sum(t3))
        tl.store(out + 9, tl.sum(t4))


# Fixed tiles, so that the order of the sums depends on shape and dtype alone. 1,024 elements are 8 a thread with four
# warps, and a thread loads 16 bytes at a time.
_TILE = 1024
_PROGRAMS = 1056  # eight for each multiprocessor of an H100


def _registers(itemsize: int) -> dict[str, int]:
    """The registers of backward: with 72 seven blocks fit; float32 keeps values in memory on some GPUs below 91."""
    return registers(72 if itemsize == 2 else 91)


def _partition(M: int, width: int, groups: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """Return the number of strips, the rows of each, and how a group is cut into units."""
    lanes = min(width & -width, 16 // itemsize)
    units, chunks = _TILE // lanes, width // lanes
    tiles = triton.cdiv(M * chunks, units)
    strips = max(1, min(tiles, _PROGRAMS // groups, 65535))  # the grid has no more than that along its second axis
    rows_per_strip = triton.cdiv(M, strips)
    return triton.cdiv(M, rows_per_strip), rows_per_strip, {"CHUNKS": chunks, "LANES": lanes, "UNITS": units}


def _strides(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[tuple[int, ...], int]:
    """The strides of x, rows in units, and of the rows of coefficients, zero where groups share one; the unit."""
    part = unit(x.stride(0))
    rows = (0 if t.shape[0] == 1 else t.shape[1] for t in (numerator, denominator))
    return (x.stride(0) // part, x.stride(1), *rows), part


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::group_rational", mutates_args=())
def _forward(x: Tensor, numerator: Tensor, denominator: Tensor, groups: int, variant_b: bool) -> Tensor:
    """Return y. x is (M, D) with any strides."""
    M, D = x.shape
    y = x.new_empty(M, D)
    if M > 0:
        strips, rows, tile = _partition(M, D // groups, groups, x.itemsize)
        strides, tile["UNIT"] = _strides(x, numerator, denominator)
        with on_device(x):
            _forward_kernel[groups, strips](
                x, numerator.contiguous(), denominator.contiguous(), y, M, rows, D // tile["LANES"], *strides,
                VARIANT_B=variant_b, **tile,
            )  # fmt: skip
    return y


@_forward.register_fake
def _(x, numerator, denominator, groups, variant_b):
    return x.new_empty(x.shape)


@torch.library.custom_op("polylib::group_rational_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, groups: int, variant_b: bool,
    need_x: bool, need_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, numerator and denominator; empty where not needed."""
    M, D = x.shape
    grad_x = x.new_empty(M, D) if need_x else x.new_empty(0)
    strips, rows, tile = _partition(max(M, 1), D // groups, groups, x.itemsize)
    partial = x.new_zeros(groups, strips, 10, dtype=torch.float32) if need_coefficients else None
    if M > 0:
        strides, tile["UNIT"] = _strides(x, numerator, denominator)
        with on_device(x):
            _backward_kernel[groups, strips](
                grad.contiguous(), x, numerator.contiguous(), denominator.contiguous(), grad_x if need_x else None,
                partial, M, rows, D // tile["LANES"], *strides, VARIANT_B=variant_b, **tile, **_registers(x.itemsize),
            )  # fmt: skip
    if partial is None:
        return grad_x, numerator.new_empty(0), denominator.new_empty(0)
    sums = partial.sum(1)
    grad_a, grad_b = (
        part.sum(0, keepdim=True) if like.shape[0] == 1 else part
        for part, like in ((sums[:, :6], numerator), (sums[:, 6:], denominator))
    )
    if not variant_b:
        grad_b = torch.where(denominator < 0, -grad_b, grad_b)
    return grad_x, grad_a.to(numerator.dtype, copy=True), grad_b.to(denominator.dtype, copy=True)


@_backward.register_fake
def _(grad, x, numerator, denominator, groups, variant_b, need_x, need_coefficients):
    a, b = (numerator.shape, denominator.shape) if need_coefficients else ((0,), (0,))
    return x.new_empty(x.shape if need_x else (0,)), numerator.new_empty(a), denominator.new_empty(b)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, numerator, denominator, ctx.groups, ctx.variant_b = inputs
    ctx.save_for_backward(x, numerator, denominator)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    need = ctx.needs_input_grad[:3]
    grads = _backward(grad, *ctx.saved_tensors, ctx.groups, ctx.variant_b, need[0], need[1] or need[2])
    return (*(t if needed else None for t, needed in zip(grads, need, strict=True)), None, None)


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("group_rational"))


# --- the public function ----------------------------------------------------------------------------------------------


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, groups: int, variant: str = "A", *, backend: str = "auto"
) -> Tensor:
    """Return the rational function P(x) / Q(x) of each element, with the coefficients of its group of channels.

    Args:
        x: (..., D), any strides.
        numerator: (groups, m + 1), the coefficients a_0 ... a_m, or (1, m + 1) where all groups share them.
        denominator: (groups, n), the coefficients b_1 ... b_n, or (1, n).
        groups: how many blocks of neighbouring channels D is split into.
        variant: "A" for `Q = 1 + sum |b_j| |x|^j`, "B" for `Q = 1 + |sum b_j x^j|`.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 with order (5, 4), and
            the reference elsewhere and under `torch.func`; "triton" and "reference" insist.

    Returns:
        (..., D) in the dtype of x. Autocast changes nothing: the arithmetic is in float32 (float64 for such x) already.

    Raises:
        ValueError: D is not a multiple of `groups`, coefficients of another shape, tensors on different devices, an
            unknown variant or backend, kernels asked for another order than (5, 4).
        TypeError: not a floating-point tensor, coefficients that have neither the dtype of x nor float32, a dtype that
            the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Yang, Wang, "Kolmogorov-Arnold Transformer", arXiv 2409.10594.
    """
    check_tensors({"x": x})
    check_tensors({"numerator": numerator, "denominator": denominator})
    if numerator.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"numerator must have the dtype of x, {x.dtype}, or torch.float32, got {numerator.dtype}")
    if numerator.device != x.device:
        raise ValueError(f"numerator must be on the device of x, {x.device}, got {numerator.device}")
    if variant not in VARIANTS:
        raise ValueError(f'variant must be "A" or "B", got {variant!r}')
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be an integer of at least 1, got {groups!r}")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % groups:
        raise ValueError(f"x must have shape (..., D) with D a multiple of groups = {groups}, got {tuple(x.shape)}")
    for name, tensor, columns in (("numerator", numerator, "m + 1"), ("denominator", denominator, "n")):
        if tensor.dim() != 2 or tensor.shape[0] not in (1, groups) or tensor.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape ({groups}, {columns}) or (1, {columns}), got {tuple(tensor.shape)}"
            )
    chosen = choose_backend(backend, x)
    order = (numerator.shape[1] - 1, denominator.shape[1])
    if backend == "triton" and order != ORDER:
        raise ValueError(f'backend="triton" has order (m, n) = {ORDER} only, got {order}')
    if chosen == "reference" or order != ORDER:
        return group_rational_reference(x, numerator, denominator, groups, variant)
    return _forward(x.reshape(-1, x.shape[-1]), numerator, denominator, groups, variant == "B").view(x.shape)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, features: int, groups: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops at order (5, 4): every operand read once, every result written once.

    Coefficients count as float32, a numerator for each group. Flops of one element, absolute values and signs left out:
    forward 19 (P 10, Q 8, a division); backward 60 (P and Q 18, P' and Q' 14, a division, w and F 2, the gradient of x
    4, the sums for the numerator 11 and for the denominator 10). Raises ValueError for a direction other than
    "forward" and "backward".
    """
    elements, coefficients = rows * features, 10 * groups
    counts = {
        "forward": (2 * elements * dtype.itemsize + 4 * coefficients, 19 * elements),
        "backward": (3 * elements * dtype.itemsize + 8 * coefficients, 60 * elements),
    }
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    return Cost(*counts[direction])
