"""A small transformer that several chapters use: the feed-forward part is what they exchange."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polylib import _checks


class Attention(nn.Module):
    """Multi-head self-attention, `(batch, length, width)` to the same; with `causal` a token sees no later one."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        _checks.multiple("width", width, "heads", heads)
        self.heads, self.causal = heads, causal
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        # Written out: the fused function of torch has no rule for vmap, which `train_many` needs.
        scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)
        if self.causal:
            scores = scores + x.new_full((x.shape[-2], x.shape[-2]), float("-inf")).triu(1)
        return self.output((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, attention: nn.Module, feed_forward: nn.Module, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1, self.attention = norm(width), attention
        self.norm2, self.feed_forward = norm(width), feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Decoder(nn.Module):
    """A language model: tokens `(batch, length)`, int64, to logits `(batch, length, vocabulary)`.

    Args:
        vocabulary, length: the number of symbols, and the longest input.
        feed_forward: makes the feed-forward part of one block, a module that keeps the shape `(..., width)`.
        norm: makes a normalisation from a width.
        attention: makes the attention of one block, a causal module that keeps the shape `(batch, length, width)`;
            by default `Attention`.
        positions: add a learned vector for each position; without, `attention` must tell positions apart.
        bias: of the output layer.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        feed_forward: Callable[[], nn.Module],
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        attention: Callable[[], nn.Module] | None = None,
        positions: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        attention = attention or (lambda: Attention(width, heads, causal=True))
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width)) if positions else None
        self.blocks = nn.Sequential(*(Block(width, attention(), feed_forward(), norm) for _ in range(depth)))
        self.norm, self.head = norm(width), nn.Linear(width, vocabulary, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[-1]]
        return self.head(self.norm(self.blocks(x)))


class SignalTransformer(nn.Module):
    """A vision transformer for one-dimensional signals: `(batch, samples)` to logits `(batch, classes)`.

    The signal is cut into patches, each embedded linearly with a learned position; outputs are averaged over patches.
    Arguments as in `Decoder`.
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        feed_forward: Callable[[], nn.Module],
        patch: int = 4,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        _checks.multiple("samples", samples, "patch", patch)
        self.patch = patch
        self.embedding = nn.Linear(patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn(samples // patch, width))
        blocks = (Block(width, Attention(width, heads, causal=False), feed_forward(), norm) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = norm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.unflatten(-1, (-1, self.patch))) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(-2))
