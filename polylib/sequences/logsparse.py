"""Combiner attention in the pattern Logsparse: each query reads the past through at most log2 L summaries.

H. Ren, H. Dai, Z. Dai, M. Yang, J. Leskovec, D. Schuurmans and B. Dai, "Combiner: Full Attention Transformer with
Sparse Computation Cost", NeurIPS 2021 (arXiv 2107.05768).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, widened


def combiner_logsparse_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Causal attention of token i, counted from 0, over itself and one region for each bit that is set in i.

    The region of bit l is $[((i\gg l)-1)2^l,\ (i\gg l)2^l)$; together they tile the tokens before i. A region is read
    as in `polylib.kernels.combiner_attention`: its key and query are elementwise maxima, its value the mean of its
    values under softmax of that query with the keys. One softmax runs over the token and its regions.

    Cut into pairs of blocks of $2^l$ tokens, the first of each pair is the region of all tokens in the second. So a
    level takes one scores for each token, and all levels L log2 L.

    Args:
        q, k: `(..., L, d)`, any L.
        v: `(..., L, dv)`.

    Returns:
        `(..., L, dv)`. Half precisions are computed in float32.

    Raises:
        TypeError: tensors that are not floating or have different dtypes.
        ValueError: shapes or devices that don't fit.
    """
    check_tensors({"q": q, "k": k, "v": v})
    _checks.shape("q", q, "(..., L, d) with d at least 1", q.dim() >= 2 and q.shape[-1] > 0)
    _checks.shape("k", k, f"that of q, {tuple(q.shape)}", k.shape == q.shape)
    fits = v.dim() == q.dim() and v.shape[:-1] == q.shape[:-1]
    _checks.shape("v", v, f"{tuple(q.shape[:-1])} and dv, as q has it", fits)
    L, dtype = q.shape[-2], v.dtype
    q, k, v = widened(q) / q.shape[-1] ** 0.5, widened(k), widened(v)
    sizes = [1 << level for level in range(max(L - 1, 0).bit_length())]
    logits, summaries = [(q * k).sum(-1, keepdim=True)], []
    for size in sizes:
        (q_region, q_later), (k_region, _), (v_region, _) = (_pairs(x, size) for x in (q, k, v))
        # Sums of products: a CPU takes them faster than the many matrix products with one row, which they are.
        within = (q_region.amax(-2, keepdim=True) * k_region).sum(-1, keepdim=True).softmax(-2)
        summaries.append((within * v_region).sum(-2, keepdim=True))  # (..., pairs, 1, dv)
        score = (q_later * k_region.amax(-2, keepdim=True)).sum(-1, keepdim=True)
        logits.append(_placed(score, L, -torch.inf))
    weights = torch.cat(logits, -1).softmax(-1).split(1, -1)
    result = weights[0] * v
    for size, weight, summary in zip(sizes, weights[1:], summaries, strict=True):
        result = result + _placed(_pairs(weight, size)[1] * summary, L, 0.0)
    return result.to(dtype)


def _pairs(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first and the second blocks of `size` tokens, (..., pairs, size, d), of the pairs whose first is complete."""
    L = x.shape[-2]
    pairs = ((L - 1) // size + 1) // 2
    whole = 2 * size * pairs
    x = F.pad(x, (0, 0, 0, whole - L)) if whole > L else x[..., :whole, :]
    first, second = x.unflatten(-2, (pairs, 2, size)).unbind(-3)
    return first, second


def _placed(second: Tensor, L: int, filled: float) -> Tensor:
    """What belongs to the second blocks of pairs, (..., pairs, size, d), at their tokens, (..., L, d)."""
    x = F.pad(second.unsqueeze(-3), (0, 0, 0, 0, 1, 0), value=filled).flatten(-4, -2)
    return F.pad(x, (0, 0, 0, L - x.shape[-2]), value=filled) if x.shape[-2] < L else x[..., :L, :]
