"""Quantised activations, and the two attentions of the oscillation-free vision transformer.

Source: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.quantization.oscillation import confidence_mask
from polylib.quantization.quantizers import LSQQuantizer, StatsQuantizer


class ActivationQuantizer(nn.Module):
    """LSQ between two learned shifts of each channel: `(..., channels)` to the same, q(x + shift_in) + shift_out.

    The shifts start at zero. They let a grid of few levels sit where the values of a channel are, which for an unsigned
    quantiser includes the negative values of a GELU.

    Args:
        bits: 1 to 16.
        channels: the size of the last axis.
        axis: the axis with a step for each index: -2 for one step a token, -1 for one a channel; None for one step.
        unsigned: levels from zero upwards.
    """

    def __init__(self, bits: int, channels: int, axis: int | None = -2, unsigned: bool = False) -> None:
        super().__init__()
        self.quantizer = LSQQuantizer(bits, axis, unsigned)
        self.shift_in, self.shift_out = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x + self.shift_in) + self.shift_out


def activation_quantizer(bits: int, channels: int, axis: int | None = -2, unsigned: bool = False) -> nn.Module:
    """An `ActivationQuantizer`, or the identity at 32 bits."""
    return nn.Identity() if bits == 32 else ActivationQuantizer(bits, channels, axis, unsigned)


class _Attention(nn.Module):
    """What both attentions share: all but `logits(x)`, which takes the quantised input."""

    def __init__(self, dim: int, heads: int, bits: int) -> None:
        super().__init__()
        _checks.multiple("dim", dim, "heads", heads)
        self.dim, self.heads = int(dim), int(heads)
        self.input = activation_quantizer(bits, dim)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value_levels = activation_quantizer(bits, dim, axis=-1)
        self.probability_levels = nn.Identity() if bits == 32 else LSQQuantizer(bits, axis=-2, unsigned=True)
        self.output_input = activation_quantizer(bits, dim)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = self.input(x)
        v = _split(self.value_levels(self.value(x)), self.heads)
        p = self.probability_levels((self.logits(x) / (self.dim // self.heads) ** 0.5).softmax(-1))
        return self.output(self.output_input((p @ v).transpose(-3, -2).flatten(-2)))

    def _check(self, x: Tensor) -> None:
        _checks.shape("x", x, f"(..., tokens, {self.dim})", x.dim() >= 2 and x.shape[-1] == self.dim)
        tokens = self.input.quantizer.scale.numel() if isinstance(self.input, ActivationQuantizer) else 0
        if tokens and x.shape[-2] != tokens:
            raise ValueError(
                f"x must have {tokens} tokens, as the first input had: each has a step of its own, got shape"
                f" {tuple(x.shape)}"
            )


class QuantizedAttention(_Attention):
    """Self-attention in which queries and keys are quantised apart, `(batch, tokens, dim)` to the same.

    Quantised are the input, the queries and the keys, one step a token; the values, one step a channel; the
    probabilities, unsigned, one step a query; the input of the output layer, one step a token. The weights of the four
    layers are left to `quantize_model`. Queries and keys have no biases.

    The first input sets the steps, and with them the number of tokens. In full precision it is free.

    Args:
        dim, heads: the width, a multiple of the number of heads.
        bits: of the activations; 32 means full precision.

    Raises:
        ValueError: bits or heads out of range; an input of another width, or with another number of tokens than the
            first.
    """

    def __init__(self, dim: int, heads: int, bits: int) -> None:
        super().__init__(dim, heads, bits)
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.query_levels, self.key_levels = (activation_quantizer(bits, dim) for _ in range(2))

    def logits(self, x: Tensor) -> Tensor:
        """Queries times keys, `(batch, heads, tokens, tokens)`, from the quantised input."""
        q, k = self.query_levels(self.query(x)), self.key_levels(self.key(x))
        return _split(q, self.heads) @ _split(k, self.heads).transpose(-2, -1)


class QKReparamAttention(_Attention):
    """Self-attention in which the product of the weights of queries and keys is quantised, once for each head.

    The latent weights are `query_weight` and `key_weight`, (dim, dim). For head h the product of the transposed query
    weight and the key weight, (dim, dim), is quantised by rows, and the logits are x W x^T. So there is one rounded
    weight where there were two whose errors multiply, and the product of x and W is quantised in place of queries and
    keys, one step for each token and head. Everything else is as in `QuantizedAttention`; in full precision both are
    the same function.

    Args:
        dim, heads: the width, a multiple of the number of heads.
        bits: of weights and activations; 32 means full precision.
        quantizer: makes the quantiser of the product from a number of bits; it sees (heads * dim, dim).

    Setting `boundary_range` after training lets gradients pass only where the product is near a threshold, as
    `confidence_guided` does for other weights; it needs StatsQ.
    """

    def __init__(self, dim: int, heads: int, bits: int, quantizer: Callable[[int], nn.Module] = StatsQuantizer) -> None:
        super().__init__(dim, heads, bits)
        self.query_weight, self.key_weight = (nn.Parameter(torch.empty(dim, dim)) for _ in range(2))
        for weight in (self.query_weight, self.key_weight):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.bits, self.boundary_range = bits, None
        self.quantizer = nn.Identity() if bits == 32 else quantizer(bits)
        width = heads * dim
        self.shift_in, self.shift_out = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.product_levels = nn.Identity() if bits == 32 else LSQQuantizer(bits, axis=-2)

    def product(self) -> Tensor:
        """The products of all heads, quantised, stacked to (heads * dim, dim)."""
        q, k = (w.unflatten(0, (self.heads, -1)) for w in (self.query_weight, self.key_weight))
        latent = (q.transpose(-2, -1) @ k).flatten(0, 1)
        if self.boundary_range is None or self.bits == 32:
            return self.quantizer(latent)
        mask = confidence_mask(latent, self.bits, self.boundary_range)
        return self.quantizer(latent).detach() + mask * (latent - latent.detach())

    def logits(self, x: Tensor) -> Tensor:
        """x W x^T of each head, `(batch, heads, tokens, tokens)`, from the quantised input."""
        y = (F.linear(x, self.product()) + self.shift_in).unflatten(-1, (self.heads, self.dim))
        y = self.product_levels(y.flatten(-3, -2)).unflatten(-2, (-1, self.heads))  # one step a token and head
        y = y + self.shift_out.unflatten(0, (self.heads, self.dim))
        return x.unsqueeze(-3) @ y.movedim(-3, -1)


def _split(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, dim) to (batch, heads, tokens, dim / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)
