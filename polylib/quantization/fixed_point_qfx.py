"""A residual block in which every operation is fixed point, and multipliers with few one-bits.

After Dai and others, "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs" (QFX, arXiv
2401.17544), without published code: the block, the order of its casts and the gradients are this library's own reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.quantization.fixed_point import FixedPoint

CASTS = ("weight", "product", "scale", "shift", "normalised", "sum")


def k_hot(raw: Tensor, k: int, *, rounding: str = "trn") -> Tensor:
    """Raw integers with at most k one-bits of magnitude: the k leading ones are kept, the sign too.

    A product with one of them takes at most k shifts, and k - 1 additions. The relative error is below 2**-k.

    Args:
        raw: integers, any shape.
        rounding: of what is left at the last one-bit: `"trn"` drops it; `"rnd"` takes the nearest power of two, the
            larger one in a tie, which may be one beyond the largest raw integer of a format.

    Raises:
        ValueError: k below 1, or an unknown rounding.
        TypeError: a tensor that does not hold signed integers.
    """
    k = _checks.integer("k", k, least=1)
    _checks.choice("rounding", rounding, ("trn", "rnd"))
    if raw.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"raw must be a tensor of signed integers, got {raw.dtype}")
    rest, kept = raw.abs(), torch.zeros_like(raw)
    for number in range(min(k, torch.iinfo(raw.dtype).bits)):
        leading = leading_one(rest)
        if number == k - 1 and rounding == "rnd":
            leading = torch.where(rest - leading >= leading - (leading >> 1), 2 * leading, leading)
        kept, rest = kept + leading, rest - leading
    return torch.where(raw < 0, -kept, kept)


def leading_one(size: Tensor) -> Tensor:
    """The power of two of the leading bit, 0 for 0: all bits below it are set, and taken off again."""
    shift = 1
    while shift < torch.iinfo(size.dtype).bits:
        size = size | size >> shift
        shift *= 2
    return size - (size >> 1)


class FixedPointResidualBlock(nn.Module):
    """relu(cast(cast(s a + t) + x)) with a = cast(x W^T): a linear layer, batch normalisation and a shortcut.

    Six casts, each with a binary point of its own, `casts[name].int_bits`: the weight, the product, the scale
    s = gamma / sqrt(var + eps) and the shift t = beta - mean s of the normalisation, what it returns, and the sum.
    Mean and variance are those of the batch in training, and running ones in evaluation.

    In evaluation mode all arithmetic is in float64, and so exact as long as no intermediate format has more than 52
    bits: the numbers are those of `export_integers`. Training computes in the dtype of x, float32 at least, in which
    the products are exact as long as their format has at most 26 bits (and no TF32 is allowed on a GPU). Autocast is
    switched off inside.

    Args:
        features: n, of input and output: `(..., n)`.
        width: bits of every format.
        k, k_weight: the scale, and the weight, have at most so many one-bits; None for any number. Gradients pass.
        rounding, overflow, learn: as in `FixedPoint`.
        int_bits: where all binary points start; `calibrate` puts them in better places.
        eps, momentum: as in `torch.nn.BatchNorm1d`.

    The input is meant to be in fixed point already, as another block or a `FixedPoint` returns it.

    Raises:
        ValueError: a setting out of range, another number of features, or one sample in training.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        k: int | None = None,
        k_weight: int | None = None,
        rounding: str = "rnd",
        overflow: str = "sat",
        learn: bool = True,
        int_bits: float = 3.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = _checks.integer("features", features, least=1)
        self.k = None if k is None else _checks.integer("k", k, least=1)
        self.k_weight = None if k_weight is None else _checks.integer("k_weight", k_weight, least=1)
        self.eps, self.momentum = _checks.number("eps", eps, above=0), _checks.number("momentum", momentum, least=0)
        self.weight = nn.Parameter(torch.empty(features, features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear does
        self.gamma, self.beta = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        modes = {"rounding": rounding, "overflow": overflow, "learn": learn}
        self.casts = nn.ModuleDict({name: FixedPoint(width, int_bits, **modes) for name in CASTS})

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, lambda name, value: self.casts[name](value))

    @torch.no_grad()
    def calibrate(self, x: Tensor, by: str = "range") -> Tensor:
        """Calibrate all casts, in order, on a pass in evaluation mode; see `FixedPoint.calibrate`. Returns the output.

        A linear layer that was trained in floating point is to be calibrated on the inputs that it had.
        """

        def cast(name: str, value: Tensor) -> Tensor:
            self.casts[name].calibrate(value, by)
            return self.casts[name](value)

        mode = self.training
        try:
            return self.eval()._forward(x, cast)
        finally:
            self.train(mode)

    def _forward(self, x: Tensor, cast: Callable[[str, Tensor], Tensor]) -> Tensor:
        _checks.shape("x", x, f"(..., {self.features})", x.dim() >= 1 and x.shape[-1] == self.features)
        dtype = torch.promote_types(x.dtype, torch.float32) if self.training else torch.float64
        device = "cpu" if x.is_meta else x.device.type  # autocast doesn't know the meta device
        with torch.autocast(device, enabled=False):
            wide = x.to(dtype)
            weight = self._few_ones(cast("weight", self.weight.to(dtype)), self.casts["weight"], self.k_weight)
            a = cast("product", F.linear(wide, weight))
            scale, shift = self.normalisation(a)
            scale = self._few_ones(cast("scale", scale), self.casts["scale"], self.k)
            normalised = cast("normalised", scale * a + cast("shift", shift))
            return cast("sum", normalised + wide).relu().to(x.dtype)

    def normalisation(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """What a is multiplied by, and what is added: (n,) each."""
        mean, var = self.running_mean.to(a.dtype), self.running_var.to(a.dtype)
        count = a.numel() // self.features
        if self.training and count:
            if count == 1:
                raise ValueError(f"x must be more than one sample in training, got shape {tuple(a.shape)}")
            rows = a.flatten(0, -2)
            mean = rows.mean(0)
            var = (rows - mean).square().mean(0)
            with torch.no_grad():
                for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                    running += self.momentum * (new.to(running.dtype) - running)
        scale = self.gamma / (var + self.eps).sqrt()
        return scale, self.beta - mean * scale

    @staticmethod
    def _few_ones(value: Tensor, point: nn.Module, k: int | None) -> Tensor:
        if k is None:
            return value
        lsb = torch.exp2(point.int_bits.detach().round() - point.width).to(value.dtype)
        rest = value.detach()
        return value + (k_hot((rest / lsb).round().long(), k) * lsb - rest)

    def extra_repr(self) -> str:
        return f"features={self.features}, k={self.k}, k_weight={self.k_weight}"
