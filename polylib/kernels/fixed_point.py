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
and G and writes the gradient of x, three passes, and takes the sum for the binary point on the way: each program stores one
number, and one addition in a fixed order follows. No atomics: the same bits always.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, choose_backend, widened

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
    point = widened(int_bits).round()
    ok = (point >= width - 126) & (point <= 127)
    exponent = torch.where(ok, point - width, 0.0)
    lsb = torch.where(ok, _power_of_two(exponent), torch.nan).to(x.dtype)
    v = x * torch.where(ok, _power_of_two(-exponent), torch.nan).to(x.dtype)
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
    """
    wide, point = widened(x), widened(int_bits)
    x0, point0 = wide.detach(), point.detach()  # what follows is a line in x and in int_bits, with slopes at these
    code, v, bound, lsb = _codes(x0, point0, width, signed, rounding, overflow)
    inside = v == bound
    moved = wide - x0 if overflow == "wrap" else torch.where(inside, wide - x0, 0.0)
    slope = torch.where(inside, code - v, code) * (lsb * math.log(2))
    return (code * lsb + moved + slope * (point - point0)).to(x.dtype)


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
    choose_backend(backend, x)
    return fixed_point_reference(x, int_bits, width, signed, rounding, overflow)
