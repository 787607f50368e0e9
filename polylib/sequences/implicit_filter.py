"""Long convolutions whose kernels a small network computes from the time, so that their length costs no weights.

D. Fu and others, "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023 (arXiv 2310.12109). The
kernels are those of M. Poli and others, "Hyena Hierarchy: Towards Larger Convolutional Language Models", ICML 2023
(arXiv 2302.10866); details as in HazyResearch/m2.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import widened
from polylib.sequences.long_convolution import causal_convolution, two_sided_convolution


class ImplicitFilter(nn.Module):
    """Convolution kernels that a small network of sines computes from the time, (channels, L) for any L up to `l_max`.

    The network sees t from 0 to 1 and the slow waves exp(-i f w), w = 2 pi l / l_max. Its three hidden layers are sines
    of frequencies that start at 10 and are shared by the three. Its outputs are multiplied by a window, exp(-t decay)
    with a decay for each channel.

    Attributes:
        positions: (l_max, embedding), what the network sees; trained.
        frequency: (order,), trained.
        decay: (channels,), fixed, from 3.07 (a hundredth at t = 1.5) to 15.35 (at t = 0.3).

    Args:
        channels: how many kernels.
        l_max: the longest.
        order: the width of the network.
        embedding: how many numbers it sees of a time, odd and at least 3.
        decay: the decays are multiplied by it; 0 is no window.

    Raises:
        ValueError: sizes that are no positive integers, an even `embedding`, a `decay` below 0.
    """

    decay: Tensor
    times: Tensor

    def __init__(self, channels: int, l_max: int, order: int = 16, embedding: int = 5, decay: float = 1.0) -> None:
        super().__init__()
        channels, self.l_max = _checks.integer("channels", channels, least=1), _checks.integer("l_max", l_max, least=1)
        order, embedding = _checks.integer("order", order, least=1), _checks.integer("embedding", embedding, least=3)
        if embedding % 2 == 0:
            raise ValueError(f"embedding must be odd, got {embedding}")
        waves = torch.linspace(1e-4, (embedding - 1) / 2 - 1, (embedding - 1) // 2)
        times = torch.linspace(0, 1, self.l_max)
        angle = torch.arange(self.l_max)[:, None] * (2 * math.pi / self.l_max) * waves
        self.positions = nn.Parameter(torch.cat([times[:, None], angle.cos(), -angle.sin()], 1))
        self.frequency = nn.Parameter(torch.full((order,), 10.0))
        self.layers = nn.ModuleList(nn.Linear(size, order) for size in (embedding, order, order))
        self.output = nn.Linear(order, channels, bias=False)
        hundredth = math.log(100) * _checks.number("decay", decay, least=0)
        self.register_buffer("times", times)
        self.register_buffer("decay", torch.linspace(hundredth / 1.5, hundredth / 0.3, channels))

    def forward(self, L: int) -> Tensor:
        """Return the kernels at the first L times, (channels, L), in at least float32.

        Raises:
            ValueError: an L that is not from 1 to `l_max`.
        """
        L = _checks.integer("L", L, least=1, most=self.l_max)
        device = self.times.device.type
        if not torch.amp.is_autocast_available(device):
            return self._kernels(L)
        with torch.autocast(device, enabled=False):  # sines of frequency 10 leave bfloat16 few digits
            return self._kernels(L)

    def _kernels(self, L: int) -> Tensor:
        x = widened(self.positions[:L])
        for layer in self.layers:
            weight, bias = (widened(p) for p in layer.parameters())
            x = torch.sin(widened(self.frequency) * F.linear(x, weight, bias))
        kernels = F.linear(x, widened(self.output.weight))
        return (kernels * torch.exp(-widened(self.times[:L, None]) * widened(self.decay))).T


class LongConvolution(nn.Module):
    """A convolution along the sequence with an implicit kernel for each channel, and a direct path: k * u + beta u.

    Attributes:
        filter: of the lags 0, 1, 2, ...
        filter_back: of the lags -1, -2, ..., or None if `causal`.
        beta: (channels,), starts standard normal.

    Args:
        channels, l_max: of the filters.
        causal: leave out the lags that look ahead.
        options: for `ImplicitFilter`.
    """

    def __init__(self, channels: int, l_max: int, causal: bool, **options: Any) -> None:
        super().__init__()
        self.filter = ImplicitFilter(channels, l_max, **options)
        self.filter_back = None if causal else ImplicitFilter(channels, l_max, **options)
        self.beta = nn.Parameter(torch.randn(channels))

    def forward(self, u: Tensor) -> Tensor:
        """Return (..., N, channels) of the same, N up to `l_max`.

        Raises:
            TypeError: inputs that are not floating.
            ValueError: another shape.
        """
        _checks.shape("u", u, f"(..., N, {len(self.beta)})", u.dim() >= 2 and u.shape[-1] == len(self.beta))
        k = self.filter(u.shape[-2])
        if self.filter_back is None:
            y = causal_convolution(u.mT, k)
        else:
            y = two_sided_convolution(u.mT, k, self.filter_back(u.shape[-2]))
        return y.mT + self.beta * u
