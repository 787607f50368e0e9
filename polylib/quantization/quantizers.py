"""Five weight quantisers, each a small module: a float tensor in, the same tensor on its levels out.

Every one can be registered with `torch.nn.utils.parametrize` (`quantize_model` does it for a whole network), and every
one has `integers(x)`, which returns codes q, steps and zero points such that `forward(x)` is `step * (q - zero)`. Codes
are whole numbers from -2**(bits - 1) to 2**(bits - 1) - 1, or from 0 to 2**bits - 1 for the unsigned ones.

"Per channel" means one step for each index of the first axis, the output channels of a weight. Steps that are computed
from the tensor are computed again in every forward pass, and no gradient flows through them. Steps and codes are
computed in float32 at least, also where x is in half precision: only the result is rounded to the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import code_range, fake_quantize, stats_codes, stats_quantize
from polylib.kernels._common import transformed, widened

Integers = tuple[Tensor, Tensor, Tensor]


class UniformQuantizer(nn.Module):
    """Levels at equal distances that reach as far as the largest entry (min-max). Every entry gets its own gradient.

    With n = 2**(bits - 1) - 1 the symmetric step is max ``|x|`` / n, with zero on a level; codes are -n to n, so that 2
    bits have three levels. The asymmetric step is (max - min) / (2**bits - 1) and the codes start at 0; the range is
    widened to contain zero, whose code is the zero point.

    Args:
        bits: 2 to 16, or 1 to 16 if not symmetric.
        symmetric: the same reach on both sides of zero.
        per_channel: one step for each index of the first axis.

    Raises:
        ValueError: bits out of range; an empty tensor; in `integers`, a tensor that is not finite.

    Source: Dong and others, "HAWQ-V2", NeurIPS 2020 (its published quantiser).
    """

    def __init__(self, bits: int, *, symmetric: bool = True, per_channel: bool = False) -> None:
        super().__init__()
        self.bits = _checks.integer("bits", bits, 2 if symmetric else 1, 16)
        self.signed, self.per_channel = symmetric, per_channel

    def forward(self, x: Tensor) -> Tensor:
        step, zero = self._step(x)
        axis = 0 if self.per_channel else None
        return fake_quantize(x, step, self.bits, axis=axis, signed=self.signed, zero_point=zero, clip=False)

    def integers(self, x: Tensor) -> Integers:
        """Codes, and step and zero point shaped to be broadcast over them."""
        _check_finite(x)
        step, zero = self._step(x)
        return _codes(x, *_along(x, step, zero, self.per_channel), self.bits, self.signed)

    def _step(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = _wide_rows(x, self.per_channel)
        if self.signed:
            return _shaped(rows.abs().amax(1).clamp(min=1e-8) / (2 ** (self.bits - 1) - 1), self.per_channel), None
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        step = (high - low).clamp(min=1e-8) / (2**self.bits - 1)
        return _shaped(step, self.per_channel), _shaped((-low / step).round(), self.per_channel)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.signed}, per_channel={self.per_channel}"


class FixedPointQuantizer(nn.Module):
    """Signed fixed point: the step is a power of two, so that a multiplication by it is a shift.

    With I = ceil(log2 max ``|x|``) + 1 bits before the binary point, sign included, the step is 2**(I - bits): the
    least power of two at which the largest entry is in range. An entry that is that power of two loses one step.
    Rounding is half to even; every entry gets its own gradient. A tensor of zeros gives zeros.

    Args:
        bits: 2 to 16, sign included.
        per_channel: one step for each index of the first axis.

    Raises:
        ValueError: bits out of range; an empty tensor; in `integers`, a tensor that is not finite.

    Source: the signed format of high-level synthesis, as in Dai and others, "Trainable Fixed-Point Quantization for
    Deep Learning Acceleration on FPGAs", arXiv 2401.17544.
    """

    def __init__(self, bits: int, *, per_channel: bool = False) -> None:
        super().__init__()
        self.bits, self.per_channel, self.signed = _checks.integer("bits", bits, 2, 16), per_channel, True

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self._step(x), self.bits, axis=0 if self.per_channel else None, clip=False)

    def integers(self, x: Tensor) -> Integers:
        """Codes, and step and zero point (zero) shaped to be broadcast over them."""
        _check_finite(x)
        return _codes(x, *_along(x, self._step(x), None, self.per_channel), self.bits)

    def _step(self, x: Tensor) -> Tensor:
        largest = _wide_rows(x, self.per_channel).abs().amax(1).clamp(min=1e-30)
        return _shaped(torch.exp2(largest.log2().ceil() + 1 - self.bits), self.per_channel)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}"


class StatsQuantizer(nn.Module):
    """StatsQ: levels at half-integers, none at zero, with the scale 2 mean ``|x|``. Every entry gets its own gradient.

    With n = 2**(bits - 1) the levels are scale * (k + 0.5) / n for k = -n, ..., n - 1: equally likely codes, more or
    less, if the entries have the shape of a bell. One bit gives plus or minus the mean magnitude.

    Args:
        bits: 1 to 16.
        per_channel: one scale for each index of the first axis.

    Raises:
        ValueError: bits out of range; an empty tensor; in `integers`, a tensor that is not finite.

    Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023.
    """

    def __init__(self, bits: int, *, per_channel: bool = True) -> None:
        super().__init__()
        self.bits, self.per_channel, self.signed = _checks.integer("bits", bits, 1, 16), per_channel, True

    def forward(self, x: Tensor) -> Tensor:
        return stats_quantize(_rows(x, self.per_channel), self.bits).view(x.shape)

    def integers(self, x: Tensor) -> Integers:
        """Codes, and step and zero point (-0.5) shaped to be broadcast over them."""
        _check_finite(x)
        codes, scale = stats_codes(_wide_rows(x, self.per_channel), self.bits)
        step = _shaped(scale[:, 0], self.per_channel) / 2 ** (self.bits - 1)
        return codes.view(x.shape), *_along(x, step, torch.full_like(step, -0.5), self.per_channel)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}"


class BinaryQuantizer(nn.Module):
    """The sign of each entry times the mean magnitude, the factor that brings the signs nearest to x.

    Zero counts as positive; every entry gets its own gradient. The codes are -1 and 0.

    Args:
        per_channel: one factor for each index of the first axis.

    Source: Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net", ECCV 2016, with a straight-through gradient.
    """

    bits, signed = 1, True

    def __init__(self, *, per_channel: bool = True) -> None:
        super().__init__()
        self.per_channel = per_channel

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self._step(x), 1, axis=0 if self.per_channel else None, clip=False)

    def integers(self, x: Tensor) -> Integers:
        """Codes, and step and zero point (-0.5) shaped to be broadcast over them."""
        _check_finite(x)
        step, zero = _along(x, 2 * self._step(x), None, self.per_channel)
        return torch.where(x < 0, -1.0, 0.0), step, zero - 0.5

    def _step(self, x: Tensor) -> Tensor:
        return _shaped(_wide_rows(x, self.per_channel).abs().mean(1), self.per_channel)

    def extra_repr(self) -> str:
        return f"per_channel={self.per_channel}"


class LSQQuantizer(nn.Module):
    """LSQ: levels at equal distances, whose step is a parameter, `scale`, and is learned with the weights.

    For levels from -Qn to Qp, the step starts at 2 mean ``|x|`` / sqrt(Qp) of the first tensor seen (4 mean ``|x|``
    / sqrt(Qp) if unsigned; the mean magnitude for one signed bit). Its gradient is multiplied by 1 / sqrt(Qp m), where
    m is the number of entries that share it, and in use it is at least 1e-5. Entries beyond the last level get no
    gradient.

    Before the first tensor the parameter is empty, with no entries: it can be saved, moved and given to an optimizer. A
    tensor of nothing but zeros says nothing about the step and passes as it is; a step that saw only zeros in a tensor
    with others starts at the mean of these. Registering the module as a parametrisation shows it a tensor. Show it one
    before networks are stacked, compiled or trained in parallel.

    Args:
        bits: 1 to 16; one signed bit has the levels -scale and scale.
        axis: the axis with a step for each index (0 for the output channels of a weight); None for one step.
        unsigned: levels from zero upwards.

    Raises:
        ValueError: bits out of range; a first tensor that is empty, not finite, or first seen under `torch.func`; one
            with another number of steps than the first; in `integers`, a tensor that is not finite.

    Source: Esser and others, "Learned Step Size Quantization", ICLR 2020, with the initial values and the floor of the
    code of Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023.
    """

    def __init__(self, bits: int, axis: int | None = None, unsigned: bool = False) -> None:
        super().__init__()
        self.bits, self.axis, self.signed = _checks.integer("bits", bits, 1, 16), axis, not unsigned
        self.high = code_range(self.bits, self.signed)[1]
        self.scale = nn.Parameter(torch.empty(0))
        self.register_load_state_dict_pre_hook(_make_room)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.scale.numel() == 0 and not self._initialize(x):
            return x
        scale = self.scale.to(torch.promote_types(x.dtype, torch.float32))
        shared = x.numel() // scale.numel()
        slow = scale / max(1, self.high * shared) ** 0.5
        step = slow + (scale.clamp(min=1e-5) - slow).detach()
        return fake_quantize(x, step, self.bits, axis=self.axis, signed=self.signed)

    def integers(self, x: Tensor) -> Integers:
        """Codes, and step and zero point (zero; -0.5 for one signed bit) shaped to be broadcast over them."""
        _check_finite(x)
        self._check(x)
        step = widened(self.scale.detach()).clamp(min=1e-5)
        if self.scale.numel() == 0:
            if x.any():
                raise ValueError("scale must have a value, got none: call the quantizer with a first tensor")
            step = widened(x.new_zeros(() if self.axis is None else x.shape[self.axis]))
        step = step if self.axis is None else step.view([-1 if d == self.axis % x.dim() else 1 for d in range(x.dim())])
        if self.signed and self.bits == 1:
            return torch.where(x < 0, -1.0, 0.0), 2 * step, torch.full_like(step, -0.5)
        return _codes(x, step, torch.zeros_like(step), self.bits, self.signed)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        if self.axis is None:
            return
        if not -x.dim() <= self.axis < x.dim():
            raise ValueError(f"x must have an axis {self.axis}, got shape {tuple(x.shape)}")
        steps = self.scale.numel()
        if steps and x.shape[self.axis] != steps:
            raise ValueError(
                f"x must have {steps} entries along axis {self.axis}, one for each step, as the first tensor had, got"
                f" shape {tuple(x.shape)}"
            )

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> bool:
        """Set the step by a first tensor, and whether that could be done: zeros say nothing about it."""
        if transformed():
            raise ValueError("LSQQuantizer must have seen a first tensor before torch.func, got none")
        if x.numel() == 0:
            raise ValueError(f"the first tensor must have entries, for the step, got shape {tuple(x.shape)}")
        others = [d for d in range(x.dim()) if self.axis is None or d != self.axis % x.dim()]
        sizes = widened(x.detach()).abs()
        mean = sizes.mean(others) if others else sizes
        if not x.is_meta:
            if not mean.isfinite().all():
                raise ValueError("the first tensor must be finite, for the step, got entries that are not")
            if not mean.any():
                return False
            mean = torch.where(mean == 0, mean.sum() / (mean != 0).sum(), mean)
        factor = 4.0 if not self.signed else 1.0 if self.bits == 1 else 2.0
        start = (factor * mean / self.high**0.5).clamp(min=1e-5)
        with torch.inference_mode(False):  # a first tensor in inference mode must not make the step untrainable
            self.scale.data = start.to(torch.promote_types(x.dtype, self.scale.dtype)).clone()
        return True

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}, unsigned={not self.signed}"


def _make_room(module: LSQQuantizer, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    saved = state.get(prefix + "scale")
    if module.scale.numel() == 0 and saved is not None:
        module.scale.data = saved.new_empty(saved.shape, device=module.scale.device)


def stored_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest code that `integers` returns: two's complement, also for one signed bit."""
    return (-1, 0) if signed and bits == 1 else code_range(bits, signed)


def _check_finite(x: Tensor) -> None:
    if not transformed() and not x.isfinite().all():  # under vmap nothing can depend on a value
        raise ValueError("x must be finite, got entries that are not")


def _rows(x: Tensor, per_channel: bool) -> Tensor:
    """x as a matrix whose rows have one step each."""
    if x.numel() == 0:
        raise ValueError(f"x must have entries, got shape {tuple(x.shape)}")
    return x.reshape(x.shape[0] if per_channel else 1, -1)


def _wide_rows(x: Tensor, per_channel: bool) -> Tensor:
    """The same without gradient, of float32 at least."""
    return widened(_rows(x.detach(), per_channel))


def _shaped(values: Tensor, per_channel: bool) -> Tensor:
    """One value for each row, as `fake_quantize` wants it."""
    return values if per_channel else values[0]


def _along(x: Tensor, step: Tensor, zero: Tensor | None, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Step and zero point, shaped to be broadcast over x."""
    shape = [-1] + [1] * (x.dim() - 1) if per_channel else [1] * x.dim()
    return step.view(shape), (torch.zeros_like(step) if zero is None else zero).view(shape)


def _codes(x: Tensor, step: Tensor, zero: Tensor, bits: int, signed: bool = True) -> Integers:
    whole = (widened(x.detach()) / torch.where(step == 0, torch.inf, step)).round()
    return (whole + zero).clamp(*code_range(bits, signed)), step, zero
