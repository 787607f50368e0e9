r"""Combiner attention, pattern Fixed: softmax over the query's own block and over one summary of each other block.

Source: Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai, "Combiner: Full Attention Transformer with Sparse Computation
Cost", arXiv 2107.05768.

Shapes: query and key (B, H, L, d), value and the result (B, H, L, dv), L a multiple of the span s. Block $\Omega$ has
the key $\max_{j\in\Omega}k_j$ and the query $\max_{j\in\Omega}q_j$, elementwise, and the value

$$v_\Omega=\sum_{j\in\Omega}p(j|\Omega)\,v_j,\qquad
  p(\cdot|\Omega)=\mathrm{softmax}_{j\in\Omega}(q_\Omega\cdot k_j/\sqrt d).$$

One softmax runs over $q_i\cdot k_j/\sqrt d$ for the j of the query's own block (causal: $j\le i$) and over
$q_i\cdot k_\Omega/\sqrt d$ for the other blocks (causal: the earlier ones).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, choose_backend, widened

# --- the definition ---------------------------------------------------------------------------------------------------


def combiner_attention_reference(query: Tensor, key: Tensor, value: Tensor, span: int, causal: bool = True) -> Tensor:
    """Return (..., L, dv) in plain PyTorch; L is a multiple of span. Half precisions are computed in float32."""
    blocks = query.shape[-2] // span
    query, key, value, dtype = widened(query) / query.shape[-1] ** 0.5, widened(key), widened(value), value.dtype
    q, k, v = (x.unflatten(-2, (blocks, span)) for x in (query, key, value))
    within = (q.amax(-2, keepdim=True) * k).sum(-1, keepdim=True).softmax(-2)  # (..., blocks, span, 1)
    summary_key, summary = k.amax(-2), (within * v).sum(-2)  # (..., blocks, d) and (..., blocks, dv)
    own = q @ k.mT  # (..., blocks, span, span)
    far = (query @ summary_key.mT).unflatten(-2, (blocks, span))  # (..., blocks, span, blocks)
    block = torch.arange(blocks, device=query.device)
    hidden = block >= block[:, None] if causal else block == block[:, None]
    far = far.masked_fill(hidden[:, None], -torch.inf)
    if causal:
        token = torch.arange(span, device=query.device)
        own = own.masked_fill(token > token[:, None], -torch.inf)
    near_weights, far_weights = torch.cat([own, far], -1).softmax(-1).split([span, blocks], -1)
    return ((near_weights @ v).flatten(-3, -2) + far_weights.flatten(-3, -2) @ summary).to(dtype)


# --- the public function ----------------------------------------------------------------------------------------------


def combiner_attention(
    query: Tensor, key: Tensor, value: Tensor, span: int, causal: bool = True, *, backend: str = "auto"
) -> Tensor:
    """Return the attention of each query over its own block of `span` tokens and over summaries of the other blocks.

    Args:
        query, key: (B, H, L, d), L a multiple of `span`.
        value: (B, H, L, dv).
        span: tokens of a block.
        causal: a query sees no later token: of its own block those up to itself, and the summaries of earlier blocks.
        backend: "auto" and "reference" are the definition in PyTorch.

    Returns:
        (B, H, L, dv), in the dtype of the inputs.

    Raises:
        ValueError: shapes or devices that don't fit, an L that is no multiple of `span`, an unknown backend.
        TypeError: not floating-point tensors of one dtype.

    Source: arXiv 2107.05768.
    """
    check_tensors({"query": query, "key": key, "value": value})
    _checks.shape("query", query, "(B, H, L, d) with d at least 1", query.dim() == 4 and query.shape[-1] > 0)
    _checks.shape("key", key, f"that of query, {tuple(query.shape)}", key.shape == query.shape)
    fits = value.dim() == 4 and value.shape[:-1] == query.shape[:-1]
    _checks.shape("value", value, f"{tuple(query.shape[:-1])} and dv, as query has it", fits)
    span = _checks.integer("span", span, least=1)
    if query.shape[-2] % span:
        raise ValueError(f"L must be a multiple of span = {span}, got {query.shape[-2]}")
    if choose_backend(backend, query) == "triton" and backend == "triton":
        raise RuntimeError('backend="triton" has no kernel for combiner_attention')
    return combiner_attention_reference(query, key, value, span, causal)
