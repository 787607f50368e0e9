"""Binary weights through a periodic function: the sign of a sine, trained through the sine.

Vargas, Correa, Hinojosa and Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024 (arXiv
2404.01278), and the authors' code. A layer trains in two stages. In the first its weights are sin(freq * w), real
numbers, and its inputs already signs. In the second the weights are the signs of that sine, with the gradient of the
sine, and training goes on from where the first stage ended: `set_stage(model, 2)` and a new optimizer.

A weight of zero counts as positive here, in weights and inputs; the authors' code leaves it at zero, which is no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import binary_linear, pack_signs, sine_binarize


def sign_bireal(a: Tensor) -> Tensor:
    """The sign of each entry, -1 or 1, with the gradient max(0, 2 - 2 abs(a)): a triangle around zero.

    Zero becomes 1. What is not a number stays so.

    Raises:
        TypeError: not a floating-point tensor.

    Source: Liu and others, "Bi-Real Net", ECCV 2018.
    """
    if not a.is_floating_point():
        raise TypeError(f"a must be a floating-point tensor, got {a.dtype}")
    inside = a.clamp(-1, 1)
    smooth = inside * (2 - inside.abs())  # its derivative is the triangle
    return torch.where(a < 0, -1.0, 1.0).to(a.dtype) + (smooth - smooth.detach())


class _BiPer(nn.Module):
    """What the three layers share: weights, scales, frequency and stage."""

    dimensions: int  # of the positions: 0 for a linear layer

    def __init__(self, shape: tuple[int, ...], freq: float, stage: int) -> None:
        super().__init__()
        self.freq = _checks.number("freq", freq, above=0)
        self.stage = _checks.choice("stage", stage, (1, 2))
        self.weight, self.scale = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values: Kaiming normal weights, of deviation sqrt(2 / fan-in), and scales evenly from 0 to 1."""
        nn.init.kaiming_normal_(self.weight)
        nn.init.uniform_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.training:  # a sign doesn't depend on the size of x, but the window of its gradient does
            dims = list(range(-1 - self.dimensions, 0))
            some = self.weight.shape[1] * math.prod(x.shape[x.dim() - self.dimensions :])
            centred = x - x.mean(dims, keepdim=True)  # x.var warns of empty batches
            x = x / (centred.square().sum(dims, keepdim=True) / max(1, some - 1) + 1e-5).sqrt()
        y = self._product(sign_bireal(x), self.binary_weight())
        return y * self.scale.view(-1, *[1] * self.dimensions)

    def binary_weight(self) -> Tensor:
        """What the layer multiplies with, of the shape of the weight: the sine in stage 1, its sign in stage 2."""
        return sine_binarize(self.weight, self.freq, self.stage == 2)

    @torch.no_grad()
    def quantization_error(self) -> Tensor:
        """The mean distance between the sine of a weight and its sign, without the scales: 0 to 1."""
        return 1 - (self.freq * self.weight).sin().abs().mean()

    def set_stage(self, stage: int) -> None:
        """Stage 1: real weights; stage 2: binary ones. All parameters stay as they are.

        Raises:
            ValueError: another stage.
        """
        self.stage = _checks.choice("stage", stage, (1, 2))

    def _check(self, x: Tensor) -> None:
        inputs = self.weight.shape[1]
        if self.dimensions == 0:
            _checks.shape("x", x, f"(..., {inputs})", x.dim() >= 1 and x.shape[-1] == inputs)
        else:
            sizes = ", ".join(["batch", str(inputs), *["size"] * self.dimensions])
            _checks.shape("x", x, f"({sizes})", x.dim() == self.dimensions + 2 and x.shape[1] == inputs)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class BiPerLinear(_BiPer):
    """A linear layer of binary inputs and periodic weights, without a bias: `(..., inputs)` to `(..., outputs)`.

    y = scale * (sign(x) @ v.T), where v is sin(freq * weight) in stage 1 and the sign of it in stage 2. Both have the
    gradient freq * cos(freq * weight) towards the weight, that of a sign is as in `sign_bireal`. In training mode x is
    first divided by its deviation over the features; the mean stays.

    What a frequency does depends on the spread of the weights: freq times their initial deviation, sqrt(2 / inputs), is
    the spread of the phases in radians.

    Args:
        in_features, out_features: sizes, at least 1.
        freq: the frequency, above 0, the same for all weights. The authors take 20.
        stage: 1 or 2; see `set_stage`. It is not a part of the state dict.

    Raises:
        ValueError: sizes, frequency or stage out of range; an input of another shape.
    """

    dimensions = 0

    def __init__(self, in_features: int, out_features: int, freq: float, stage: int = 1) -> None:
        shape = (_checks.integer("out_features", out_features, 1), _checks.integer("in_features", in_features, 1))
        super().__init__(shape, freq, stage)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, freq={self.freq:g}, stage={self.stage}"


class _BiPerConv(_BiPer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        freq: float,
        stage: int = 1,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        channels = _checks.integer("out_channels", out_channels, 1), _checks.integer("in_channels", in_channels, 1)
        kernel = (_checks.integer("kernel_size", kernel_size, 1),) * self.dimensions
        super().__init__((*channels, *kernel), freq, stage)
        self.stride = _checks.integer("stride", stride, 1)
        self.padding = _checks.integer("padding", padding, 0)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = F.conv1d if self.dimensions == 1 else F.conv2d
        return convolve(x, weight, None, self.stride, self.padding)

    def extra_repr(self) -> str:
        outputs, inputs, kernel = self.weight.shape[:3]
        sizes = f"{inputs}, {outputs}, kernel_size={kernel}, freq={self.freq:g}, stage={self.stage}"
        return f"{sizes}, stride={self.stride}, padding={self.padding}"


class BiPerConv1d(_BiPerConv):
    """As `BiPerLinear`, a convolution: `(batch, in_channels, length)` to `(batch, out_channels, length')`.

    The deviation of an input is over all channels and positions of a sample. Zeros are padded after the sign, so that
    fewer terms are added at the border.

    Args:
        in_channels, out_channels, kernel_size: sizes, at least 1.
        freq, stage: as in `BiPerLinear`. The spread of the phases is freq * sqrt(2 / (in_channels * kernel_size)).
        stride, padding: as in `torch.nn.Conv1d`.

    Raises:
        ValueError: sizes, frequency or stage out of range; an input of another shape.
    """

    dimensions = 1


class BiPerConv2d(_BiPerConv):
    """As `BiPerConv1d`, for `(batch, in_channels, height, width)`; the kernel is square."""

    dimensions = 2


def set_stage(model: nn.Module, stage: int) -> None:
    """Set the stage of all periodic layers of a model. Nothing else changes; begin with a new optimizer.

    Raises:
        ValueError: another stage, or a model without such a layer.
    """
    for layer in list(_layers(model)):
        layer.set_stage(stage)


def periodic_penalty(model: nn.Module, tau: float) -> Tensor:
    """tau times the sum over the periodic layers of the mean of sin(freq * weight) squared, as in the authors' code.

    Added to the loss with tau above zero it pulls the sines towards 0, *away* from the signs. With tau below zero it
    pulls them towards -1 and 1.

    Raises:
        ValueError: a tau that is not finite, or a model without such a layer.
    """
    tau = _checks.number("tau", tau)
    each = [(layer.freq * layer.weight).sin().square().mean() for layer in _layers(model)]
    return tau * torch.stack(each).sum()


def laplace_binarization_error(spread: float, kind: str = "absolute") -> float:
    """The error of replacing the sine by its sign when the weights have a Laplace distribution.

    With v = freq * beta, where beta is the mean magnitude of the weights, E abs(sin) = v / (1 + v^2) coth(pi / (2 v))
    and E sin^2 = 2 v^2 / (1 + 4 v^2).

    Args:
        spread: v, above 0.
        kind: `"absolute"`, the mean of abs(sin - sign), 1 - E abs(sin); or `"squared"`, the mean of (sin - g sign)^2 at
            the best scale g = E abs(sin), which is E sin^2 - g^2.

    Raises:
        ValueError: a spread that is not above 0, or an unknown kind.
    """
    v = _checks.number("spread", spread, above=0)
    _checks.choice("kind", kind, ("absolute", "squared"))
    mean = v / (1 + v * v) / math.tanh(math.pi / (2 * v))
    return 1 - mean if kind == "absolute" else 2 * v * v / (1 + 4 * v * v) - mean * mean


class PackedBinary(nn.Module):
    """A trained periodic layer with one bit a weight: the same outputs as in evaluation mode, from whole numbers.

    Inputs are packed 32 signs to a word, and multiplied by `polylib.kernels.binary_linear`. A convolution unfolds its
    input first. Its zeros at the border are packed as if they were ones, and what they add is taken off.

    Args:
        layer: one of the periodic layers, in stage 2. The frequency and the latent weights are not kept.

    Raises:
        TypeError: another module.
        ValueError: a layer in stage 1; an input of another shape.
    """

    words: Tensor
    taps: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, _BiPer):
            raise TypeError(f"layer must be a BiPerLinear, BiPerConv1d or BiPerConv2d, got {type(layer).__name__}")
        if layer.stage != 2:
            raise ValueError(f"layer must be in stage 2, got stage {layer.stage}")
        signs = layer.binary_weight().detach()
        self.dimensions, self.inputs, self.features = layer.dimensions, signs.shape[1], signs[0].numel()
        self.kernel = (1, *signs.shape[2:])[-2:] if self.dimensions else (1, 1)
        self.stride, self.padding = getattr(layer, "stride", 1), getattr(layer, "padding", 0)
        self.register_buffer("words", pack_signs(signs.flatten(1)))
        self.register_buffer("taps", signs.flatten(2).sum(1).T.to(torch.int32) if self.dimensions else None)
        self.scale = nn.Parameter(layer.scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.dimensions == 0:
            _checks.shape("x", x, f"(..., {self.inputs})", x.dim() >= 1 and x.shape[-1] == self.inputs)
            return self.scale * binary_linear(pack_signs(x), self.words, self.features)
        sizes = ", ".join(["batch", str(self.inputs), *["size"] * self.dimensions])
        _checks.shape("x", x, f"({sizes})", x.dim() == self.dimensions + 2 and x.shape[1] == self.inputs)
        wide = x.detach() if self.dimensions == 2 else x.detach().unsqueeze(2)
        counts = binary_linear(pack_signs(self._patches(wide).mT), self.words, self.features)
        if self.padding:
            inside = self._patches(wide.new_ones(1, 1, *wide.shape[2:]))
            outside = (1 - inside[0].T).to(torch.int32)  # (positions, taps)
            counts = counts - (outside[..., None] * self.taps).sum(1, dtype=torch.int32)
        y = (self.scale * counts).mT
        size = [
            (length + 2 * pad - k) // step + 1
            for length, pad, k, step in zip(wide.shape[2:], *self._geometry(), strict=True)
        ]
        return y.unflatten(-1, size[-self.dimensions :])

    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Padding, kernel and stride of the two axes; one dimension is an image of height 1."""
        rows = (self.padding, self.stride) if self.dimensions == 2 else (0, 1)
        return (rows[0], self.padding), self.kernel, (rows[1], self.stride)

    def _patches(self, x: Tensor) -> Tensor:
        """`(batch, channels * taps, positions)`."""
        padding, kernel, stride = self._geometry()
        return F.unfold(x, kernel, padding=padding, stride=stride)


def _layers(model: nn.Module) -> Iterator[_BiPer]:
    found = [layer for layer in model.modules() if isinstance(layer, _BiPer)]
    if not found:
        raise ValueError(f"model must hold a periodic layer, got {type(model).__name__} without one")
    return iter(found)
