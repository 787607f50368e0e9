r"""Periodic binarisation: $y = \sin(\omega w)$, or its sign, with the gradient of the sine in both cases.

Source: Vargas, Correa, Hinojosa, Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024.

Shapes: w and y any; the frequency $\omega$ is one positive number. With `hard` y is the square wave, 1 where
$\sin(\omega w) \ge 0$ and -1 elsewhere, so that zero becomes 1 (the authors' code leaves it at zero, which is no bit).
Kernels: w in float32, bfloat16 or float16; arithmetic in float32. Reference: any floating dtype, half precisions
computed in float32. In both, $\omega$ and the phase $t = \omega w$ are rounded to the dtype of the arithmetic, and the
sine is that of this phase, however large: the phase itself is sure to $2^{-24}|t|$ only.

With $G = \partial L/\partial y$ the gradient is $\nabla w = \omega\cos(\omega w)\,G$ for both: exact for the sine, and
for the square wave as if the sign were the identity. It is zero at the crests, where the bit is most
certain, and turns its sign with each branch.

What is saved for backward: w alone. Forward reads w and writes y, backward reads w and G and writes the gradient.

The kernels have a sine of their own. CUDA's keeps the digits of pi that a large argument asks for in memory, a table
for each thread; here they are constants of a branch that only a block with such an argument enters.
"""

from __future__ import annotations

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
    widened,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def sine_binarize_reference(w: Tensor, freq: float, hard: bool) -> Tensor:
    """Return the sine of freq * w, or its sign, in plain PyTorch, in the dtype of w.

    Any floating dtype and device; differentiable any number of times, as the sine is; works under `torch.func`. PyTorch
    itself checks the arguments.

    On a CPU it moves 16 bytes an entry of float32 for the sine, 50 for the square wave, and 36 for the gradient. The
    least is what one loop would move, 8 and 12; `torch.compile` fuses the steps.
    """
    sine = (freq * widened(w)).sin()
    if hard:
        level = sine.detach()
        sine = torch.where(level < 0, -1.0, 1.0).to(sine.dtype) + (sine - level)  # what is not a number stays
    return sine.to(w.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 1024  # entries a program: eight for each thread of four warps


@triton.jit
def _digits(j):
    """The j-th 32 binary digits of 2**-32 / (2 pi), j from 0 to 6, in int64."""
    far = tl.where(j == 4, 0x7D4D3770, tl.where(j == 5, 0x36D8A566, 0x4F10E410)).to(tl.int64)
    near = tl.where(j == 2, 0x9391054A, tl.where(j == 3, 0x7F09D5F4, far)).to(tl.int64)
    return tl.where(j == 0, 0, tl.where(j == 1, 0x28BE60DB, near)).to(tl.int64)


@triton.jit
def _turned(t):
    """Quarter turns mod 4 and the rest in radians, -pi/4 to pi/4, of |t| >= 1, exactly: integers that overflow.

    With t = m 2**n, m an integer, the turns are m times the digits of 2**n / (2 pi) after the point; 64 of them are
    enough, since no phase in float32 is nearer than 2**-30 to a multiple of pi / 2.
    """
    bits = t.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    shift = ((bits >> 23) & 0xFF) - 118  # n + 32
    j, left = shift >> 5, (shift & 31).to(tl.int64)
    digits = (((_digits(j) << 32) | _digits(j + 1)) << left) | (_digits(j + 2) >> (32 - left))
    turns = mantissa * digits  # in units of 2**-64
    turns = tl.where(bits < 0, -turns, turns)
    quarter = (turns + 0x2000000000000000) >> 62
    rest = turns - (quarter << 62)
    return (quarter & 3).to(tl.int32), rest.to(tl.float32) * 3.4061215800865545e-19  # 2 pi / 2**64


@triton.jit
def _reduced(t):
    """Quarter turns mod 4, and the rest in radians, of any t."""
    large = tl.abs(t) > 8192
    near = tl.where(tl.abs(t) <= 8192, t, 0.0)
    k = round_half_even(near * 0.6366197723675814)
    # pi/2 in three numbers, the first two of eleven digits each: their products with k are exact.
    rest = ((near - k * 1.5703125) - k * 0.0004837512969970703) - k * 7.549790126404332e-08
    quarter = k.to(tl.int32) & 3
    if tl.max(large.to(tl.int32), axis=0) > 0:
        far_quarter, far_rest = _turned(tl.where(large, t, 8192.0))
        quarter, rest = tl.where(large, far_quarter, quarter), tl.where(large, far_rest, rest)
    return quarter, tl.where(tl.abs(t) < float("inf"), rest, float("nan"))


# excerpt: begin
@triton.jit
def _sine(t, AHEAD: tl.constexpr):
    """sin(t), or with AHEAD = 1, a quarter turn ahead, cos(t)."""
    quarter, r = _reduced(t)
    quarter += AHEAD
    z = r * r
    sine = r + r * z * (-0.16666655 + z * (0.008332176 - z * 0.00019516975))
    cosine = 1.0 - (0.5 * z - z * z * (0.041666646 - z * (0.0013887364 - z * 2.4438088e-05)))
    value = tl.where(quarter % 2 == 1, cosine, sine)
    return tl.where((quarter & 2) == 2, -value, value)


# excerpt: end


@triton.jit
def _forward_block(w, y, freq, at, ok, HARD: tl.constexpr):
    value = _sine(freq * load(w + at, ok), 0)
    if HARD:
        value = tl.where(value < 0, -1.0, tl.where(value >= 0, 1.0, value))  # keeps what is not a number
    store(y + at, value, ok)


# Full blocks need no mask, as in poly_relu.
@triton.jit(do_not_specialize=["size"])
def _forward_kernel(w, y, freq, size, HARD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _forward_block(w, y, freq, at, None, HARD)
    else:
        _forward_block(w, y, freq, at, at < size, HARD)


@triton.jit
def _backward_block(grad, w, grad_w, freq, at, ok):
    slope = freq * _sine(freq * load(w + at, ok), 1)
    store(grad_w + at, load(grad + at, ok) * slope, ok)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(grad, w, grad_w, freq, size, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _backward_block(grad, w, grad_w, freq, at, None)
    else:
        _backward_block(grad, w, grad_w, freq, at, at < size)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::sine_binarize", mutates_args=())
def _forward(w: Tensor, freq: float, hard: bool) -> Tensor:
    """Return y, contiguous; w has any strides."""
    w = w.contiguous()
    y = torch.empty_like(w)
    if w.numel() > 0:
        with on_device(w):
            _forward_kernel[(triton.cdiv(w.numel(), _BLOCK),)](w, y, freq, w.numel(), HARD=hard, BLOCK=_BLOCK)
    return y


@_forward.register_fake
def _(w, freq, hard):
    return w.new_empty(w.shape)


@torch.library.custom_op("polylib::sine_binarize_backward", mutates_args=())
def _backward(grad: Tensor, w: Tensor, freq: float) -> Tensor:
    """Return the gradient of w."""
    grad, w = grad.contiguous(), w.contiguous()
    grad_w = torch.empty_like(w)
    if w.numel() > 0:
        with on_device(w):
            _backward_kernel[(triton.cdiv(w.numel(), _BLOCK),)](grad, w, grad_w, freq, w.numel(), BLOCK=_BLOCK)
    return grad_w


@_backward.register_fake
def _(grad, w, freq):
    return w.new_empty(w.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    w, ctx.freq, _hard = inputs
    ctx.save_for_backward(w)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return _backward(grad, *ctx.saved_tensors, ctx.freq), None, None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("sine_binarize"))


# --- the public function ----------------------------------------------------------------------------------------------


def sine_binarize(w: Tensor, freq: float, hard: bool, *, backend: str = "auto") -> Tensor:
    """Return `sin(freq * w)`, or its sign, entry by entry; both have the gradient of the sine.

    Args:
        w: any shape and strides.
        freq: the frequency, above zero, in radians for each unit of w.
        hard: the square wave of -1 and 1, where zero becomes 1; else the sine.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        The shape and dtype of w; half precisions are computed in float32 and rounded once. Not a number where w is
        infinite or not a number.

    Raises:
        ValueError: a frequency that is not finite and above zero, a `hard` that is no truth value, an unknown backend.
        TypeError: not a floating-point tensor.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Vargas, Correa, Hinojosa, Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024.
    """
    check_tensors({"w": w})
    freq = _checks.number("freq", freq, above=0)
    hard = _checks.choice("hard", hard, (True, False))
    if choose_backend(backend, w) == "reference":
        return sine_binarize_reference(w, freq, hard)
    return _forward(w, freq, hard)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(size: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops for `size` entries: w read and y written once; backward w and G read, and the
    gradient of w written.

    Flops of one entry: forward 31 (a product; 10 for the rest of the phase, 8 for each power series and their powers, 4
    choices); backward 33, with two products more. direction: "forward" or "backward". Raises ValueError for another
    direction.
    """
    counts = {"forward": (2 * size, 31 * size), "backward": (3 * size, 33 * size)}
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize, flops)
