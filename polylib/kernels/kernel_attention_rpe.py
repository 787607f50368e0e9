r"""Kernelized attention with a relative positional bias, from features of queries and keys.

Source: Luo et al., "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", arXiv
2106.12566.

Shapes: query_features and key_features (B, H, n, m), value (B, H, n, dv), bias (H, 2n - 1), result (B, H, n, dv).

$$z_i=\frac{\sum_j e^{b_{j-i}}\,(\phi^q_i\cdot\phi^k_j)\,v_j}{\sum_j e^{b_{j-i}}\,(\phi^q_i\cdot\phi^k_j)},$$

where $b_\delta$ stands in `bias[h, delta + n - 1]`. With `causal` only $j\le i$ enter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib.kernels._common import autocast, check_shape, check_tensors, choose_backend

# --- the definition ---------------------------------------------------------------------------------------------------


def kernel_attention_rpe_reference(
    query_features: Tensor, key_features: Tensor, value: Tensor, bias: Tensor, causal: bool = False
) -> Tensor:
    """Return (B, H, n, dv) in plain PyTorch, by way of the n x n weights."""
    n = value.shape[-2]
    if n == 0:
        return torch.zeros_like(value)
    if causal:
        ahead = torch.arange(2 * n - 1, device=bias.device) >= n
        bias = bias.masked_fill(ahead, float("-inf"))
    relative = bias.exp().unfold(-1, n, 1).flip(-2)  # (H, n, n), of which row i holds the lags -i, ..., n - 1 - i
    weights = (query_features @ key_features.mT) * relative
    return (weights @ value) / weights.sum(-1, keepdim=True)


# --- the public function ----------------------------------------------------------------------------------------------


def kernel_attention_rpe(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    bias: Tensor,
    causal: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return attention whose weights are products of features, times the exponential of a bias for each lag.

    Args:
        query_features: (B, H, n, m).
        key_features: (B, H, n, m).
        value: (B, H, n, dv).
        bias: (H, 2n - 1), for the lags j - i from -(n - 1) to n - 1.
        causal: whether a query sees only keys at its own place and before it.
        backend: "auto" or "reference".

    Returns:
        (B, H, n, dv). A query whose weights sum to 0 gives NaN.

    Raises:
        ValueError: sizes or devices that don't fit, or an unknown backend.
        TypeError: tensors of different dtypes, or not floating-point.

    Source: arXiv 2106.12566.
    """
    query_features, key_features, value, bias = autocast(query_features, key_features, value, bias)
    named = {"query_features": query_features, "key_features": key_features, "value": value, "bias": bias}
    check_tensors(named)
    if query_features.dim() != 4:
        raise ValueError(f"query_features must have shape (B, H, n, m), got {tuple(query_features.shape)}")
    b, h, n, _ = query_features.shape
    check_shape("key_features", key_features, tuple(query_features.shape), "(B, H, n, m)")
    if value.dim() != 4 or value.shape[:3] != query_features.shape[:3]:
        raise ValueError(f"value must have shape (B, H, n, dv) = ({b}, {h}, {n}, dv), got {tuple(value.shape)}")
    check_shape("bias", bias, (h, max(2 * n - 1, 0)), "(H, 2n - 1)")
    choose_backend(backend, query_features)
    return kernel_attention_rpe_reference(query_features, key_features, value, bias, causal)
