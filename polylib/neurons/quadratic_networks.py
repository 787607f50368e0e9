"""Quadratic networks, and ReLinear, the training that keeps them from collapsing.

F.-L. Fan, M. Li, F. Wang, R. Lai and G. Wang, "On Expressivity and Trainability of Quadratic Networks", IEEE TNNLS,
2023 (arXiv 2110.06081). A quadratic neuron replaces the inner product of the conventional neuron by

    y = (x W_r^T + b_r) * (x W_g^T + b_g) + (x * x) W_b^T + b_b.

With W_g = 0, b_g = 1, W_b = 0 and b_b = 0 it *is* the conventional neuron. ReLinear starts there and holds the
quadratic parts back, either by smaller learning rates (`relinear_param_groups`) or by shrinking them after each step
(`relinear_shrink_`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import quadratic_linear

INITS = ("relinear", "random")


def _at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        _checks.integer(name, value, least=1)


class _Quadratic(nn.Module):
    """What the linear and the convolutional layer share: the three parts, their initial values and their names."""

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        compact: bool,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _checks.choice("init", init, INITS)
        _checks.floating("dtype", dtype)
        self.compact = compact

        def parameter(size: tuple[int, ...], wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if wanted else None

        self.weight_r = parameter(shape)
        self.bias_r = parameter(shape[:1], bias)
        self.weight_g = parameter(shape, not compact)
        self.bias_g = parameter(shape[:1], not compact)
        self.weight_b = parameter(shape)
        self.bias_b = parameter(shape[:1], bias)
        self.reset_parameters(init)

    def reset_parameters(self, init: str = "relinear") -> None:
        """Draw new values: `weight_r` and `bias_r` first, so that a conventional twin from the same seed has them."""
        fan_in = self.weight_r[0].numel()
        nn.init.kaiming_normal_(self.weight_r, nonlinearity="relu")
        if self.bias_r is not None:
            nn.init.uniform_(self.bias_r, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.bias_b is not None:
            nn.init.zeros_(self.bias_b)
        if self.bias_g is not None:
            nn.init.ones_(self.bias_g)
        for weight in (self.weight_g, self.weight_b):
            if weight is None:
                continue
            if init == "random":
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
            else:
                nn.init.zeros_(weight)
        if init == "random":  # what a layer gets that is initialised like any other
            for bias in (self.bias_g, self.bias_b):
                if bias is not None:
                    nn.init.uniform_(bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _check(self, x: Tensor) -> None:
        if x.device != self.weight_r.device:
            raise ValueError(f"x must be on {self.weight_r.device}, where the weights are, got {x.device}")
        if x.dtype != self.weight_r.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must be {self.weight_r.dtype}, as the weights, got {x.dtype}")

    def quadratic_parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that ReLinear holds back: `g`, the second factor of the product, and `b`, the power term."""
        parts = {"g": (self.weight_g, self.bias_g), "b": (self.weight_b, self.bias_b)}
        return {name: [value for value in values if value is not None] for name, values in parts.items()}


class QuadraticLinear(_Quadratic):
    """A layer of quadratic neurons: `(..., in_features)` to `(..., out_features)`, with 3 (N K + N) parameters.

    Args:
        in_features, out_features: K and N, at least 1.
        bias: learn `bias_r` and `bias_b`. `bias_g` is always there: it is the coefficient of the linear term.
        compact: leave out the product, y = (x W_r^T + b_r) + (x * x) W_b^T + b_b, with 2 (N K + N) parameters.
        init: `"relinear"` starts as the conventional layer (W_r Kaiming normal, W_g = 0, b_g = 1, W_b = 0, b_b = 0);
            `"random"` draws all three weights like W_r, which is what the paper warns against.

    Raises:
        ValueError: a size below 1, an unknown `init`, or an input whose last dimension is not `in_features`.
        TypeError: an integer `dtype`, or an input whose dtype is not that of the weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compact: bool = False,
        init: str = "relinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _at_least_one(in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), bias, compact, init, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.compact:
            if x.shape[-1] != self.in_features:
                raise ValueError(f"x must have in_features = {self.in_features} features, got {x.shape[-1]}")
            self._check(x)
            return F.linear(x, self.weight_r, self.bias_r) + F.linear(x * x, self.weight_b, self.bias_b)
        return quadratic_linear(x, self.weight_r, self.bias_r, self.weight_g, self.bias_g, self.weight_b, self.bias_b)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias_r is not None}, compact={self.compact}"


class QuadraticConv2d(_Quadratic):
    """A convolution of quadratic neurons: three convolutions of one geometry, the third one over x * x.

    `(batch, in_channels, height, width)` to `(batch, out_channels, height', width')`. Zero padding is consistent,
    since 0 * 0 = 0. Arguments, initial values and errors as in `QuadraticLinear` and `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        compact: bool = False,
        init: str = "relinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        _at_least_one(in_channels=in_channels, out_channels=out_channels, kernel_height=height, kernel_width=width)
        super().__init__((out_channels, in_channels, height, width), bias, compact, init, device, dtype)
        self.in_channels, self.stride, self.padding = in_channels, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"x must have shape (batch, {self.in_channels}, height, width), got {tuple(x.shape)}")
        self._check(x)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(x, weight, bias, self.stride, self.padding)

        y = convolve(x, self.weight_r, self.bias_r)
        if not self.compact:
            y = y * convolve(x, self.weight_g, self.bias_g)
        return y + convolve(x * x, self.weight_b, self.bias_b)


def relinear_param_groups(
    module: nn.Module, lr: float, gamma_g: float, gamma_b: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer that hold the quadratic parts back by smaller learning rates (the
    paper's "sg").

    Everything else in `module` learns at `lr`, the parts g and b of its quadratic layers at `gamma_g * lr` and
    `gamma_b * lr`. At gamma = 0 the network stays conventional. `bias_g` is exempt from weight decay, which would
    pull it from 1 towards 0 and so switch the linear term off.

    Raises:
        ValueError: a negative `lr`, gamma or `weight_decay`, or a module without a quadratic layer.
    """
    for name, value in (("lr", lr), ("gamma_g", gamma_g), ("gamma_b", gamma_b), ("weight_decay", weight_decay)):
        _checks.number(name, value, least=0)
    held: dict[str, list[nn.Parameter]] = {"g": [], "b": [], "gate bias": []}
    for layer in _quadratic_layers(module):
        for name, parameters in layer.quadratic_parts().items():
            held[name] += [p for p in parameters if p is not layer.bias_g]
        held["gate bias"] += [] if layer.bias_g is None else [layer.bias_g]
    apart = {id(p) for parameters in held.values() for p in parameters}
    groups = [
        {"params": [p for p in module.parameters() if id(p) not in apart], "lr": lr, "weight_decay": weight_decay},
        {"params": held["g"], "lr": gamma_g * lr, "weight_decay": weight_decay},
        {"params": held["gate bias"], "lr": gamma_g * lr, "weight_decay": 0.0},
        {"params": held["b"], "lr": gamma_b * lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def relinear_shrink_(module: nn.Module, alpha_g: float, alpha_b: float) -> None:
    """Shrink the quadratic parts towards the conventional neuron, in place, after an optimizer step (the paper's "sw").

    W_g and b_g - 1 are multiplied by `alpha_g`, W_b and b_b by `alpha_b`: 0 makes the network conventional, 1 leaves it
    alone. The paper names this family without a rule; this is the projection of least assumptions.

    Raises:
        ValueError: a factor outside [0, 1], or a module without a quadratic layer.
    """
    for name, value in (("alpha_g", alpha_g), ("alpha_b", alpha_b)):
        _checks.number(name, value, least=0, most=1)
    for layer in _quadratic_layers(module):
        parts = layer.quadratic_parts()
        for name, factor in (("g", alpha_g), ("b", alpha_b)):
            for parameter in parts[name]:
                centre = 1.0 if parameter is layer.bias_g else 0.0
                parameter.sub_(centre).mul_(factor).add_(centre)


def _quadratic_layers(module: nn.Module) -> list[_Quadratic]:
    layers = [layer for layer in module.modules() if isinstance(layer, _Quadratic)]
    if not layers:
        raise ValueError(f"module must have at least one quadratic layer, got a {type(module).__name__} without")
    return layers
