"""EvoNorm: normalisation and activation as one layer, found by evolution.

H. Liu, A. Brock, K. Simonyan and Q. V. Le, "Evolving Normalization-Activation Layers", NeurIPS 2020 (arXiv 2004.02967).
The search that found the layers is in `evonorm_search`.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import evonorm_s0
from polylib.kernels._common import widened

VARIANTS = ("B0", "B1", "B2", "S0", "S1", "S2")


def instance_std(x: Tensor, eps: float) -> Tensor:
    """The deviation of each channel of each sample, `(N, C, H, W)` to `(N, C, 1, 1)`: sqrt(biased variance + eps)."""
    return (x.var((2, 3), correction=0, keepdim=True) + eps).sqrt()


def instance_rms(x: Tensor, eps: float) -> Tensor:
    """The root mean square of each channel of each sample, `(N, C, H, W)` to `(N, C, 1, 1)`."""
    return (x.square().mean((2, 3), keepdim=True) + eps).sqrt()


class EvoNorm2d(nn.Module):
    r"""One of the six EvoNorm layers, in place of a normalisation and the activation after it.

    `(N, C, H, W)` to the same shape and dtype; y = f(x) weight + bias, with f by variant:

        B0  x / max(batch_std, v x + instance_std)      S0  x sigmoid(v x) / group_std
        B1  x / max(batch_std, (x + 1) instance_rms)    S1  x sigmoid(x) / group_std
        B2  x / max(batch_std, instance_rms - x)        S2  x sigmoid(x) / group_rms

    In training the B layers take the variance of the batch, and gradients flow through it; in evaluation they take its
    running mean. The instance terms always come from the input. The S layers know no batch and have no modes.

    Args:
        num_features: C.
        variant: one of the names above.
        groups: of channels, for the S layers; divides C.
        eps: added under every root; positive.
        momentum: weight of the newest batch in `running_var`.
        unbiased: keep the unbiased variance in `running_var`, as PyTorch's batch normalisation does. The authors' code
            keeps the biased one.
        apply_act: if false, only x weight + bias: what the authors put where a network normalises without activation.

    Parameters: `weight` (1), `bias` (0) and, for B0 and S0, `v` (1), all (C,). Buffer of the B layers:
    `running_var`, which stays in float32 when the layer is cast to half precision; there all is computed in float32.

    Raises:
        ValueError: an unknown variant, a size below 1, groups that do not divide C, eps or momentum out of range, an
            input that is not (N, C, H, W), or one value a channel when a B layer trains.
        TypeError: an input whose dtype is not that of the parameters.
    """

    def __init__(
        self,
        num_features: int,
        variant: str = "S0",
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.1,
        unbiased: bool = False,
        apply_act: bool = True,
    ) -> None:
        super().__init__()
        _checks.choice("variant", variant, VARIANTS)
        _checks.integer("num_features", num_features, least=1)
        if variant[0] == "S":
            _checks.divisor("groups", groups, "num_features", num_features)
        _checks.number("eps", eps, above=0)
        _checks.number("momentum", momentum, least=0, most=1)
        self.num_features, self.variant, self.groups, self.eps = num_features, variant, groups, eps
        self.momentum, self.unbiased, self.apply_act = momentum, unbiased, apply_act
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.v = nn.Parameter(torch.ones(num_features)) if variant[1] == "0" and apply_act else None
        self.register_buffer("running_var", torch.ones(num_features) if variant[0] == "B" and apply_act else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x must have shape (N, {self.num_features}, H, W), got {tuple(x.shape)}")
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must be {self.weight.dtype}, as the parameters, got {x.dtype}")
        if x.numel() == 0:  # the variance of nothing is no number; the parameters get gradients of zero
            scale = self.weight if self.v is None else self.weight * self.v
            return (x * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)
        if self.apply_act and self.variant == "S0":
            return evonorm_s0(x, self.weight, self.bias, self.v, self.groups, self.eps)
        y = widened(x)  # the square of 300 is no float16
        if self.apply_act:
            y = y / self._batch_denominator(y) if self.variant[0] == "B" else self._gated(y)
        return (y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in `Module`, but half precision, which can't hold the variance of inputs of 300, leaves `running_var`."""
        before = self.running_var
        super()._apply(fn, recurse)
        if before is not None and widened(self.running_var) is not self.running_var:
            self.running_var = before.to(self.running_var.device)
        return self

    def _gated(self, x: Tensor) -> Tensor:
        """S1 and S2 without their affine part."""
        grouped = x.unflatten(1, (self.groups, -1))
        if self.variant == "S1":
            square = grouped.var((2, 3, 4), correction=0, keepdim=True)
        else:
            square = grouped.square().mean((2, 3, 4), keepdim=True)
        scaled = (x * torch.sigmoid(x)).unflatten(1, (self.groups, -1)) / (square + self.eps).sqrt()
        return scaled.flatten(1, 2)

    def _batch_denominator(self, x: Tensor) -> Tensor:
        """The larger of the batch term and the instance term. The first is positive, so the second can't flip signs."""
        batch = (self._batch_variance(x) + self.eps).sqrt().view(-1, 1, 1)
        if self.variant == "B0":
            instance = self.v.view(-1, 1, 1) * x + instance_std(x, self.eps)
        elif self.variant == "B1":
            instance = (x + 1) * instance_rms(x, self.eps)
        else:
            instance = instance_rms(x, self.eps) - x
        return torch.maximum(batch, instance)

    def _batch_variance(self, x: Tensor) -> Tensor:
        count = x.numel() // self.num_features
        if not self.training:
            return self.running_var
        if count == 1:
            raise ValueError(f"x must have more than one value a channel in training, got shape {tuple(x.shape)}")
        variance = x.var((0, 2, 3), correction=0)
        with torch.no_grad():
            kept = variance * (count / (count - 1)) if self.unbiased else variance
            self.running_var.mul_(1 - self.momentum).add_(kept, alpha=self.momentum)
        return variance

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.variant[0] == "S" else ""
        return f"{self.num_features}, variant={self.variant!r}{groups}, eps={self.eps}, apply_act={self.apply_act}"
