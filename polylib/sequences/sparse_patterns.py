"""Sparse attention: which pairs of tokens a pattern keeps, as masks, and attention under such a mask.

The patterns are those that Combiner extends to all pairs: H. Ren and others, "Combiner: Full Attention Transformer with
Sparse Computation Cost", NeurIPS 2021 (arXiv 2107.05768). Fixed is of R. Child, S. Gray, A. Radford and I. Sutskever,
"Generating Long Sequences with Sparse Transformers", 2019 (arXiv 1904.10509).
"""

import torch
from torch import Tensor, nn

from polylib import _checks

PATTERNS = ("full", "window", "fixed", "logsparse")


def sparse_attention_mask(
    length: int, pattern: str, span: int = 1, columns: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """Which pairs a causal pattern keeps: `(length, length)`, boolean, as `F.scaled_dot_product_attention` takes it.

    Row i holds the tokens that query i may read, counted from 0, i itself among them.

    Args:
        pattern: `"full"`: all up to i. `"window"`: the last `span` tokens. `"fixed"`: the block of `span` tokens that
            i lies in, up to i, and the last `columns` tokens of each earlier block. `"logsparse"`: i, and for each bit
            l set in i the last `columns` tokens of the region of 2^l tokens that ends where i has its lower bits zero.
        span: of a window or block.
        columns: that stand for a block or region. Combiner has one summary in their place.
        device: of the mask.

    Raises:
        ValueError: an unknown pattern, or a number that is no integer of at least 1 (`length`: 0).
    """
    _checks.choice("pattern", pattern, PATTERNS)
    length, span = _checks.integer("length", length, least=0), _checks.integer("span", span, least=1)
    columns = _checks.integer("columns", columns, least=1)
    i, j = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    if pattern == "window":
        return (j <= i) & (i - j < span)
    if pattern == "fixed":
        return (j <= i) & ((i // span == j // span) | (j % span >= span - columns))
    if pattern == "logsparse":
        level = torch.arange(max(length - 1, 0).bit_length(), device=device)[:, None, None]
        end = i >> level << level
        inside = (j < end) & (j >= end - (1 << level).clamp(max=columns)) & ((i >> level) % 2 == 1)
        return inside.any(0) | (i == j)
    return j <= i


class SparseSelfAttention(nn.Module):
    """Causal self-attention under a mask: `(batch, L, d_model)` to the same, any L. The baseline of Combiner.

    All pairs are computed and most then dropped, so that it learns as a sparse layer does, at the cost of a full one.
    It is written out, since the fused function of torch has no rule for `vmap`.

    Args:
        d_model, n_heads: the width, and the number of heads that share it.
        pattern, span, columns: as in `sparse_attention_mask`.

    Raises:
        ValueError: `d_model` that is no multiple of `n_heads`, or settings that `sparse_attention_mask` refuses.
    """

    def __init__(self, d_model: int, n_heads: int, pattern: str = "fixed", span: int = 1, columns: int = 1) -> None:
        super().__init__()
        _checks.multiple("d_model", d_model, "n_heads", n_heads)
        sparse_attention_mask(0, pattern, span, columns)
        self.n_heads, self.pattern, self.span, self.columns = n_heads, pattern, span, columns
        self.inputs = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.n_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mask = sparse_attention_mask(x.shape[-2], self.pattern, self.span, self.columns, x.device)
        scores = ((q / q.shape[-1] ** 0.5) @ k.mT).masked_fill(~mask, -torch.inf)
        return self.output((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))

    def extra_repr(self) -> str:
        return f"pattern={self.pattern!r}, span={self.span}, columns={self.columns}"
