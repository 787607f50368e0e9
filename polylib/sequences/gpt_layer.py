"""A layer of GPT in the three pieces that a swap of activations needs: before, in and after the attention.

Two of the pieces treat every token alone, so that any rows of what they compute can be had again from the same rows of
their inputs. Only the attention between them joins tokens. P. Zhao and others, "MEMO", SIGMOD 2025 (arXiv 2407.12117).
"""

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks


@runtime_checkable
class TokenwiseLayer(Protocol):
    """What `TokenwiseOffload` asks of a layer: it is `after(x, attend(*before(x)))`, with x `(batch, tokens, width)`.

    `before` and `after` must treat every token alone, and keep tensors whose storage runs over batch, then tokens, then
    the rest. They must draw no random numbers.
    """

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the attention reads, such as queries, keys and values."""

    def attend(self, *inputs: Tensor) -> Tensor:
        """The part that joins tokens, with an output of shape `(batch, tokens, any)`."""

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The output of the layer, of x and of what `attend` returned."""


class GPTLayer(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then r + W2 GELU(W1 norm(r)); `(batch, tokens, width)` to the same.

    The attention is causal and torch's fused one, which keeps no `(tokens, tokens)` matrix. For its backward pass a
    layer keeps 16 numbers for each of the tokens' channels, counted as `skeletal` does, and some for each token.

    Args:
        width: of a token.
        heads: of the attention, a divisor of the width.
        expansion: hidden units of the feed-forward part for each channel.
    """

    def __init__(self, width: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        width = _checks.multiple("width", width, "heads", heads)
        inner = _checks.integer("expansion", expansion, least=1) * width
        self.heads, self.expansion = int(heads), inner // width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    @property
    def skeletal(self) -> dict[str, int]:
        """The tensors that the backward pass needs, in units of batch x tokens x width."""
        attention = {"input": 1, "norm 1": 1, "q": 1, "k": 1, "v": 1, "attention": 1}
        rest = {"residual": 1, "norm 2": 1, "up": self.expansion, "GELU": self.expansion}
        return attention | rest

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each `(batch, heads, tokens, width / heads)`."""
        parts = self.inputs(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        return parts.movedim(-3, 0).transpose(-3, -2).unbind(0)

    def attend(self, *inputs: Tensor) -> Tensor:
        """Attention of queries, keys and values, `(batch, tokens, width)`, without the output's linear map."""
        q, k, v = inputs
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer."""
        r = x + self.output(attended)
        return r + self.down(F.gelu(self.up(self.norm2(r))))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, self.attend(*self.before(x)))
