"""Combiner: attention over all tokens at the cost of a sparse pattern, through summaries of regions.

H. Ren, H. Dai, Z. Dai, M. Yang, J. Leskovec, D. Schuurmans and B. Dai, "Combiner: Full Attention Transformer with
Sparse Computation Cost", NeurIPS 2021 (arXiv 2107.05768). What query i reads is cut into tokens near it and disjoint
regions. Its attention to a token j of a region is p(region | i) p(j | region), and the second factor does not depend
on i: so it is computed once a region. Regions have elementwise maxima as keys and queries.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels.combiner_attention import combiner_attention
from polylib.sequences.logsparse import combiner_logsparse_attention

PATTERNS = ("fixed", "logsparse")


def combiner_weights(q: Tensor, k: Tensor, pattern: str = "fixed", span: int | None = None) -> Tensor:
    """The attention of every query to every token that Combiner has in effect, causal: `(..., L, L)`, rows sum to 1.

    It is what the attention makes of a unit vector for each token as values, so that it is never formed otherwise.

    Args:
        q, k: `(..., L, d)`, at most two leading axes.
        pattern: `"fixed"`: the block of `span` tokens that i lies in, and all earlier blocks as regions.
            `"logsparse"`: token i, and a region for each bit set in i.
        span: of Fixed; L must be a multiple of it.

    Raises:
        TypeError: tensors that are not floating or have different dtypes.
        ValueError: an unknown pattern, no span for Fixed or one for Logsparse, or shapes that don't fit.
    """
    _checks.choice("pattern", pattern, PATTERNS)
    _checks.shape("q", q, "(..., L, d), at most two axes before L", 2 <= q.dim() <= 4)
    _checks.shape("k", k, f"that of q, {tuple(q.shape)}", k.shape == q.shape)
    if (span is None) == (pattern == "fixed"):
        raise ValueError(f"span must be given for the pattern 'fixed' alone, got {span} for {pattern!r}")
    L = q.shape[-2]
    values = torch.eye(L, dtype=q.dtype, device=q.device).expand(*q.shape[:-1], L)
    if pattern == "logsparse":
        return combiner_logsparse_attention(q, k, values)
    before = (None,) * (4 - q.dim())
    return combiner_attention(q[before], k[before], values[before], span).view(values.shape)  # type: ignore[arg-type]


class CombinerSelfAttention(nn.Module):
    """Multi-head self-attention by Combiner, `(batch, L, d_model)` to the same; projections have no bias.

    Args:
        d_model, n_heads: the width, and the number of heads that share it.
        pattern: `"fixed"` or `"logsparse"`.
        span: of the blocks of Fixed; by default the root of L, rounded up, at which the cost is least. If causal, any
            L will do: the last block is then nobody's region, and may be incomplete.
        causal: whether a token sees no later one. Without, Fixed alone, with a `span` that divides L.

    Raises:
        ValueError: `d_model` that is no multiple of `n_heads`, an unknown pattern, a `span` below 1 or for Logsparse,
            or what has no causal form only.
    """

    def __init__(
        self, d_model: int, n_heads: int, pattern: str = "fixed", span: int | None = None, causal: bool = True
    ) -> None:
        super().__init__()
        _checks.multiple("d_model", d_model, "n_heads", n_heads)
        self.pattern = _checks.choice("pattern", pattern, PATTERNS)
        if span is not None:
            span = _checks.integer("span", span, least=1)
            _checks.choice("pattern with a span", pattern, ["fixed"])
        if not causal and span is None:
            raise ValueError(f"span must be given without causal, and so pattern 'fixed', got {span} for {pattern!r}")
        self.n_heads, self.span, self.causal = n_heads, span, causal
        self.inputs = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, L, d_model) of the same.

        Raises:
            ValueError: without `causal`, an L that is no multiple of `span`.
        """
        L = x.shape[-2]
        qkv = self.inputs(x).unflatten(-1, (3, self.n_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        if self.pattern == "logsparse":
            y = combiner_logsparse_attention(qkv[0], qkv[1], qkv[2])
        else:
            span = self.span or max(math.isqrt(max(L - 1, 0)) + 1, 1)
            if self.causal and L % span:
                qkv = F.pad(qkv, (0, 0, 0, span - L % span))
            y = combiner_attention(qkv[0], qkv[1], qkv[2], span, self.causal)[..., :L, :]
        return self.output(y.transpose(-3, -2).flatten(-2))

    def extra_repr(self) -> str:
        return f"pattern={self.pattern!r}, span={self.span}, causal={self.causal}"
