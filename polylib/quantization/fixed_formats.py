"""Formats of fixed-point numbers, how they grow in sums and products, and the cast from one to another in integers.

The fixed-point type of high-level synthesis, whose names are kept: a format of W bits, I of them before the binary
point (the sign included), holds r 2**(I - W) for the raw integers r of W bits. I may exceed W or be negative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels import raw_range
from polylib.kernels.fixed_point import OVERFLOWS, ROUNDINGS


class FixedFormat(NamedTuple):
    """`width` bits in all, `int_bits` of them before the binary point, the sign of a signed format included."""

    width: int
    int_bits: int
    signed: bool = True

    @property
    def fraction_bits(self) -> int:
        """How many bits stand after the binary point; negative if the least bit counts more than 1."""
        return self.width - self.int_bits

    @property
    def lsb(self) -> float:
        """What the least significant bit counts."""
        return math.ldexp(1.0, self.int_bits - self.width)

    @property
    def raw_range(self) -> tuple[int, int]:
        """The least and the largest raw integer."""
        return raw_range(self.width, self.signed)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest number."""
        low, high = self.raw_range
        return low * self.lsb, high * self.lsb


def fixed_add_format(a: FixedFormat, b: FixedFormat) -> FixedFormat:
    """The least format that holds every sum of a number of `a` and one of `b`: one bit more in front."""
    a, b = _checked("a", a), _checked("b", b)
    signed = a.signed or b.signed
    int_bits = max(own.int_bits + (signed and not own.signed) for own in (a, b)) + 1
    return FixedFormat(int_bits + max(a.fraction_bits, b.fraction_bits), int_bits, signed)


def fixed_mul_format(a: FixedFormat, b: FixedFormat) -> FixedFormat:
    """A format that holds every product of a number of `a` and one of `b`: both counts of bits add up."""
    a, b = _checked("a", a), _checked("b", b)
    return FixedFormat(a.width + b.width, a.int_bits + b.int_bits, a.signed or b.signed)


def fixed_dot_format(a: FixedFormat, b: FixedFormat, n: int) -> FixedFormat:
    """A format that holds every sum of n such products: ceil(log2 n) bits more in front."""
    extra = (_checks.integer("n", n, least=1) - 1).bit_length()
    width, int_bits, signed = fixed_mul_format(a, b)
    return FixedFormat(width + extra, int_bits + extra, signed)


def integer_cast(
    raw: Tensor, source: FixedFormat, target: FixedFormat, rounding: str = "rnd", overflow: str = "sat"
) -> Tensor:
    """The raw integers of `target` that raw integers of `source` are cast to, by shifts, comparisons and additions.

    Args:
        raw: int64, any shape.
        rounding: `"trn"` down, `"trn_zero"` toward zero, `"rnd"` to the nearest with ties up, `"rnd_conv"` with ties to
            the even one.
        overflow: `"sat"` to the nearest end of the range, `"wrap"` modulo 2**width.

    Raises:
        ValueError: an unknown mode, or a shift that would not fit into 63 bits.
        TypeError: a tensor that is not int64.
    """
    source, target = _checked("source", source), _checked("target", target)
    modes(rounding, overflow)
    if raw.dtype != torch.int64:
        raise TypeError(f"raw must be an int64 tensor, got {raw.dtype}")
    places = source.fraction_bits - target.fraction_bits  # that are lost; negative: zeros that are appended
    if (places < 0 and source.width - places > 63) or source.width > 62:
        raise ValueError(f"source must fit into 63 bits at the binary point of target, got {source} and {target}")
    # Beyond 63 places nothing but the sign is left anyway.
    raw = raw << -places if places <= 0 else _shifted_right(raw, min(places, 63), rounding)
    low, high = target.raw_range
    return raw.clamp(low, high) if overflow == "sat" else ((raw - low) & ((1 << target.width) - 1)) + low


def _shifted_right(raw: Tensor, places: int, rounding: str) -> Tensor:
    down = raw >> places  # toward minus infinity
    rest = raw - (down << places)
    if rounding == "trn":
        return down
    if rounding == "trn_zero":
        return down + ((raw < 0) & (rest != 0))
    half = 1 << places - 1
    up = rest >= half if rounding == "rnd" else (rest > half) | ((rest == half) & (down & 1 == 1))
    return down + up


def _checked(name: str, given: FixedFormat) -> FixedFormat:
    width, int_bits, signed = given
    width = _checks.integer(f"{name}.width", width, 2 if signed else 1)
    return FixedFormat(width, _checks.integer(f"{name}.int_bits", int_bits), bool(signed))


def modes(rounding: str, overflow: str) -> tuple[str, str]:
    return _checks.choice("rounding", rounding, ROUNDINGS), _checks.choice("overflow", overflow, OVERFLOWS)
