"""Fixed-point blocks exported to integers, and computed there by products, shifts, additions and comparisons alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from polylib.quantization.fixed_formats import (
    FixedFormat,
    fixed_add_format,
    fixed_dot_format,
    fixed_mul_format,
    integer_cast,
)
from polylib.quantization.fixed_point import FixedPoint
from polylib.quantization.fixed_point_qfx import CASTS, FixedPointResidualBlock, k_hot, leading_one

_EXACT_BITS = 52  # of float64's 53, one is for the half that rounding adds


class IntegerBlock(NamedTuple):
    """A `FixedPointResidualBlock` in evaluation mode, in int64: raw integers in, raw integers out.

    `weight` is `(n, n)`, `scale` and `shift` are `(n,)`, all raw; `formats` has those of the six casts and `"input"`.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    k: int | None
    k_weight: int | None
    formats: dict[str, FixedFormat]
    rounding: str
    overflow: str

    def __call__(self, raw: Tensor) -> Tensor:
        f = self.formats
        modes = {"rounding": self.rounding, "overflow": self.overflow}
        dot = fixed_dot_format(f["input"], f["weight"], self.weight.shape[1])
        if self.k_weight is None:
            products = raw @ self.weight.T
        else:
            products = _shifted(raw[..., None, :], self.weight, self.k_weight).sum(-1)
        a = integer_cast(products, dot, f["product"], **modes)
        scaled = a * self.scale if self.k is None else _shifted(a, self.scale, self.k)
        total = _added(scaled, fixed_mul_format(f["product"], f["scale"]), self.shift, f["shift"])
        normalised = integer_cast(*total, f["normalised"], **modes)
        return integer_cast(*_added(normalised, f["normalised"], raw, f["input"]), f["sum"], **modes).clamp(min=0)


class IntegerNetwork(NamedTuple):
    """What `export_integers` returns: called with raw integers of `input`, it returns those of `output`, int64."""

    input: FixedFormat
    blocks: list[IntegerBlock]
    output: FixedFormat

    def __call__(self, raw: Tensor) -> Tensor:
        for block in self.blocks:
            raw = block(raw)
        return raw


def export_integers(model: nn.Sequential) -> IntegerNetwork:
    """The integers of a `FixedPoint` followed by residual blocks, with the running statistics folded in.

    In evaluation mode the model returns exactly `network.output.lsb * network(model[0].raw(x))`.

    Raises:
        TypeError: a model that is not such a sequence.
        ValueError: an intermediate format of more than 52 bits, which float64 would not hold exactly.
    """
    kinds = [type(part) for part in model] if isinstance(model, nn.Sequential) else []
    if not kinds or kinds[0] is not FixedPoint or any(kind is not FixedPointResidualBlock for kind in kinds[1:]):
        names = [kind.__name__ for kind in kinds] or type(model).__name__
        raise TypeError(f"model must be a Sequential of a FixedPoint and FixedPointResidualBlocks, got {names}")
    first, *rest = model
    source, blocks = first.format, []
    for block in rest:
        blocks.append(_exported(block, source))
        source = blocks[-1].formats["sum"]
    return IntegerNetwork(first.format, blocks, source)


@torch.no_grad()
def _exported(block: FixedPointResidualBlock, source: FixedFormat) -> IntegerBlock:
    mode = block.training
    try:
        scale, shift = block.eval().normalisation(torch.empty(0, block.features, dtype=torch.float64))
    finally:
        block.train(mode)
    casts = block.casts
    f = {"input": source} | {name: casts[name].format for name in CASTS}
    scaled = fixed_add_format(fixed_mul_format(f["product"], f["scale"]), f["shift"])
    for grown in (
        fixed_dot_format(source, f["weight"], block.features),
        scaled,
        fixed_add_format(f["normalised"], source),
    ):
        if grown.width > _EXACT_BITS:
            raise ValueError(f"model must have intermediate formats of at most {_EXACT_BITS} bits, got {grown}")
    factors = []
    for name, value, k in (("weight", block.weight, block.k_weight), ("scale", scale, block.k)):
        raw = casts[name].raw(value)
        factors.append(raw if k is None else k_hot(raw, k))
    modes = (casts["scale"].rounding, casts["scale"].overflow)
    return IntegerBlock(*factors, casts["shift"].raw(shift), block.k, block.k_weight, f, *modes)


def _shifted(a: Tensor, factor: Tensor, k: int) -> Tensor:
    """a times a factor of at most k one-bits, without a multiplication: a shift for each of them, and additions."""
    rest, product = factor.abs(), torch.zeros_like(a + factor)
    for _ in range(k):
        leading = leading_one(rest)
        places = torch.frexp(leading.double()).exponent - 1
        product = product + torch.where(leading > 0, a << places.clamp(min=0), 0)
        rest = rest - leading
    return torch.where(factor < 0, -product, product)


def _added(a: Tensor, of_a: FixedFormat, b: Tensor, of_b: FixedFormat) -> tuple[Tensor, FixedFormat]:
    """The sum of two tensors of raw integers, at the lower of the two binary points, and its format."""
    places = max(of_a.fraction_bits, of_b.fraction_bits)
    return (a << places - of_a.fraction_bits) + (b << places - of_b.fraction_bits), fixed_add_format(of_a, of_b)
