"""The mixers of a Monarch Mixer: gated long convolutions along the sequence, block-diagonal GLUs along the channels.

D. Fu, S. Arora, J. Grogan, I. Johnson, S. Eyuboglu, A. Thomas, B. Spector, M. Poli, A. Rudra and C. Re, "Monarch Mixer:
A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023 (arXiv 2310.12109); details as in the BERT models of the
authors' code, HazyResearch/m2. The long convolutions are computed by FFT, which a Monarch matrix can express.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.sequences.implicit_filter import ImplicitFilter, LongConvolution
from polylib.sequences.monarch import BlockDiagonalLinear


class ShortConvolution(nn.Module):
    """A causal convolution of each channel for itself with `size` weights, (..., N, channels) to the same.

    Weights and biases start uniform within 1 / root of `size`, as torch's do.

    Attributes:
        weight: (channels, size), the last for the present.
        bias: (channels,).
    """

    def __init__(self, channels: int, size: int = 3) -> None:
        super().__init__()
        channels, size = _checks.integer("channels", channels, least=1), _checks.integer("size", size, least=1)
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., N, channels) of the same.

        Raises:
            ValueError: another shape.
        """
        channels, size = self.weight.shape
        _checks.shape("x", x, f"(..., N, {channels})", x.dim() >= 2 and x.shape[-1] == channels)
        # A few shifted products: torch's own depthwise convolution is several times slower on a CPU.
        past = F.pad(x, (0, 0, size - 1, 0))
        y = self.bias + self.weight[:, -1] * x
        for lag in range(1, size):
            y = y + self.weight[:, -1 - lag] * past[..., size - 1 - lag : past.shape[-2] - lag, :]
        return y


class MonarchMixer(nn.Module):
    """A sequence mixer in place of attention, (batch, N, d_model) to the same: two gates around a long convolution.

    z = W u is convolved along the sequence with three weights a channel and cut into x1, x2, v; then

        y = x2 * conv(x1 * v),   y = y + conv'(u) if `residual_conv`,   result: W' y.

    Gates are plain products. Residual connections and normalisation are left to the network around it.

    Args:
        d_model: channels.
        l_max: the longest sequence.
        causal: whether an output sees no later input.
        filter_order: the width of the networks that compute the kernels.
        residual_conv: add a second long convolution, of the layer's input itself.
        short_conv: weights a channel of the short convolution, which is always causal; 0 leaves it out.
        decay: multiplies the decays of the kernels' windows.

    Raises:
        ValueError: sizes that are no positive integers, a `short_conv` or `decay` below 0.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        causal: bool,
        filter_order: int = 16,
        residual_conv: bool = True,
        short_conv: int = 3,
        decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.d_model = _checks.integer("d_model", d_model, least=1)
        self.l_max = _checks.integer("l_max", l_max, least=1)
        short_conv = _checks.integer("short_conv", short_conv, least=0)
        self.inputs = nn.Linear(d_model, 3 * d_model)
        self.short = ShortConvolution(3 * d_model, short_conv) if short_conv else nn.Identity()
        self.long = LongConvolution(d_model, l_max, causal, order=filter_order, decay=decay)
        self.residual = None
        if residual_conv:
            self.residual = LongConvolution(d_model, l_max, causal, order=filter_order, decay=decay)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, u: Tensor) -> Tensor:
        """Return (batch, N, d_model) of the same.

        Raises:
            ValueError: another shape, or an N that is not from 1 to `l_max`.
        """
        fits = u.dim() == 3 and 0 < u.shape[1] <= self.l_max and u.shape[2] == self.d_model
        _checks.shape("u", u, f"(batch, N, {self.d_model}) with N from 1 to l_max = {self.l_max}", fits)
        x1, x2, v = self.short(self.inputs(u)).chunk(3, -1)
        y = x2 * self.long(x1 * v)
        return self.output(y if self.residual is None else y + self.residual(u))


class BlockDiagonalGLU(nn.Module):
    """A channel mixer in place of a dense MLP, (..., d_model) to the same: B'(GELU(g) * h), g and h the halves of B x.

    B and B' are block-diagonal. The product of halves is all that lets blocks meet: those of g hold the first half of
    the channels, those of h the second.

    Args:
        d_model: channels.
        expansion: g and h have `expansion` times as many.
        nblocks: of both matrices; 1 is a dense GLU.
        bias: of the second matrix.

    Raises:
        ValueError: sizes that are no positive integers.
    """

    def __init__(self, d_model: int, expansion: int = 4, nblocks: int = 4, bias: bool = True) -> None:
        super().__init__()
        width = _checks.integer("d_model", d_model, least=1) * _checks.integer("expansion", expansion, least=1)
        self.inputs = BlockDiagonalLinear(d_model, 2 * width, nblocks, bias=False)
        self.output = BlockDiagonalLinear(width, d_model, nblocks, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d_model) of the same."""
        g, h = self.inputs(x).chunk(2, -1)
        return self.output(F.gelu(g) * h)


def monarch_mixer_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 1e-5,
    filter_rate: float = 1e-3,
    filter_decay: float = 0.1,
    position_rate: float = 1e-5,
) -> list[dict[str, Any]]:
    """Return the parameter groups of the authors' code, for any optimizer of torch.

    The networks of all implicit filters inside `model` get `filter_rate` and `filter_decay`, the times that they see
    `position_rate` and no decay, and everything else the first two numbers.
    """
    filters = [module for module in model.modules() if isinstance(module, ImplicitFilter)]
    places = {id(f.positions) for f in filters}
    inside = {id(p) for f in filters for p in f.parameters()} - places
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in inside | places]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in inside], "lr": filter_rate, "weight_decay": filter_decay},
        {"params": [p for p in trained if id(p) in places], "lr": position_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
