"""A cast to fixed point whose binary point is learned.

After Dai and others, "Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs" (QFX, arXiv
2401.17544).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import fixed_point, fixed_point_codes
from polylib.quantization.fixed_formats import FixedFormat, modes


class FixedPoint(nn.Module):
    """Casts to fixed point and back: every number becomes the nearest one of the format. The binary point is learned.

    The parameter `int_bits` is a real number, used as the nearest integer; its gradient passes that rounding. Entries
    beyond the range get no gradient, and pull the binary point instead, up if the loss wants them larger.

    Args:
        width: bits in all: 2 to 25, or 1 to 24 if unsigned, so that float32 holds every number of the format.
        int_bits: where the binary point starts.
        signed: two's complement, or from zero upwards.
        rounding, overflow: as in `integer_cast`. The default of synthesis tools is `"trn"` and `"wrap"`.
        learn: whether `int_bits` requires a gradient.

    NaN stays NaN. Shapes and dtypes are kept; half precisions can't hold every number of more than 8 or 11 bits.

    Raises:
        ValueError: a width out of range, an unknown mode; in `raw` and `calibrate`, a tensor with NaN.
    """

    def __init__(
        self,
        width: int,
        int_bits: float = 1.0,
        *,
        signed: bool = True,
        rounding: str = "rnd",
        overflow: str = "sat",
        learn: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.signed = _checks.integer("width", width, 1 + signed, 24 + signed), signed
        self.rounding, self.overflow = modes(rounding, overflow)
        value = torch.tensor(_checks.number("int_bits", int_bits), dtype=torch.get_default_dtype())
        self.int_bits = nn.Parameter(value, requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        options = {"signed": self.signed, "rounding": self.rounding, "overflow": self.overflow}
        return fixed_point(x, self.int_bits, self.width, **options)

    @property
    def format(self) -> FixedFormat:
        """The format with the binary point as it stands."""
        return FixedFormat(self.width, round(self.int_bits.item()), self.signed)

    @property
    def lsb(self) -> float:
        """What the least significant bit counts."""
        return self.format.lsb

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest number."""
        return self.format.range

    @torch.no_grad()
    def raw(self, x: Tensor) -> Tensor:
        """The raw integers that entries are cast to, int64."""
        if x.isnan().any():
            raise ValueError("x must be without NaN, got some")
        codes, _lsb = fixed_point_codes(x, self.int_bits, self.width, self.signed, self.rounding, self.overflow)
        return codes.long()

    @torch.no_grad()
    def calibrate(self, x: Tensor, by: str = "range") -> None:
        """Choose the binary point for the entries of x.

        A tensor of zeros, or without entries, says nothing and leaves the point where it is.

        Args:
            by: `"range"` puts the largest magnitude just in range, I = ceil(log2 max abs(x)) + 1, without the 1 if
                unsigned; a largest entry that is a power of two loses one step. `"error"` takes, of that point and all
                that lie up to `width` bits lower, the one with the least sum of squared differences.

        Raises:
            ValueError: a tensor that is not finite, or an unknown rule.
        """
        _checks.choice("by", by, ("range", "error"))
        if not x.isfinite().all():
            raise ValueError("x must be finite, got inf or nan")
        largest = x.abs().max().item() if x.numel() else 0.0
        if largest == 0:
            return
        part, power = math.frexp(largest)  # exact, as log2 is not
        highest, errors = power - (part == 0.5) + self.signed, []
        for int_bits in range(highest, highest - (self.width if by == "error" else 0) - 1, -1):
            self.int_bits.fill_(int_bits)
            errors.append((self(x) - x).double().square().sum().item())
        self.int_bits.fill_(highest - errors.index(min(errors)))

    def extra_repr(self) -> str:
        return f"width={self.width}, signed={self.signed}, rounding={self.rounding}, overflow={self.overflow}"
