r"""The second product of an MLP on the few hidden units that are not zero.

Source: Li et al., "The Lazy Neuron Phenomenon", ICLR 2023, arXiv 2210.06313, section 3.4.

Shapes: values v (B, k), indices (B, k) int64, weight_t (m, d), bias (d,), result (B, d).

$$y_b = \sum_j v_{bj}\,W_{\text{idx}_{bj}} + \text{bias}$$

with the row W_i of weight_t. An index that occurs twice counts twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_shape, check_tensors, choose_backend, widened
from polylib.kernels._cost import Cost


def sparse_down_reference(values: Tensor, indices: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the sums (B, d) in plain PyTorch."""
    out = torch.einsum("bk,bkd->bd", widened(values), widened(weight_t)[indices])
    return (out if bias is None else out + widened(bias)).to(values.dtype)


def sparse_down(
    values: Tensor, indices: Tensor, weight_t: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return the sum of the rows of `weight_t` that `indices` names, weighted by `values`, plus `bias`.

    Args:
        values: (B, k).
        indices: (B, k) int64, from 0 to m - 1.
        weight_t: (m, d).
        bias: (d,), or None.
        backend: "auto" or "reference".

    Raises:
        ValueError: shapes that don't fit, or on a CPU an index out of range.
        TypeError: values or weights that are not floating, indices that are not int64.
    """
    check_tensors({"values": values, "weight_t": weight_t} | ({} if bias is None else {"bias": bias}))
    _checks.shape("values", values, "(B, k)", values.dim() == 2)
    _checks.shape("weight_t", weight_t, "(m, d)", weight_t.dim() == 2)
    check_shape("indices", indices, tuple(values.shape), "that of values")
    if bias is not None:
        check_shape("bias", bias, (weight_t.shape[1],), "the columns of weight_t")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.numel() and indices.device.type == "cpu":
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= len(weight_t):
            raise ValueError(f"indices must be from 0 to {len(weight_t) - 1}, got from {low} to {high}")
    choose_backend(backend, values)
    return sparse_down_reference(values, indices, weight_t, bias)


def cost(B: int, k: int, d: int, dtype: torch.dtype) -> Cost:
    """Return the least bytes and flops: k rows of d entries read for each of B results, with their weights."""
    return Cost(B * k * (d * dtype.itemsize + dtype.itemsize + 8) + B * d * dtype.itemsize, 2 * B * k * d)
