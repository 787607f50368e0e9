r"""The second product of a feed-forward layer from its active units alone: a weighted sum of gathered rows.

Source: Li et al., "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers", ICLR 2023,
arXiv 2210.06313, where few of the m units of a layer are active in a token, or k by construction.

Shapes: values v (B, k), indices (B, k) of integers from 0 to m - 1, weight_t W (m, d), one row a unit, bias (d,),
y (B, d).

$$y_b=\sum_{j:\,v_{bj}\ne0}v_{bj}\,W_{\text{indices}_{bj}}+\text{bias}.$$

A unit that is named twice counts twice. A value of zero counts for nothing, and its row is not read: where fewer than
k units are active, the rest may be filled up with zeros. Of such a row, entries that are not finite are taken for zero,
in the gradient too. Gradients are the ordinary ones:

$$\bar v_{bj}=\bar y_b\cdot W_{\text{indices}_{bj}},\qquad
  \bar W_i=\sum_{(b,j):\,\text{indices}_{bj}=i}v_{bj}\,\bar y_b.$$

The dense product reads all of W for a token. Here a program has one token and a share of the units and of the columns;
it reads their rows, which are contiguous since W is stored transposed, and sums in float32. Shares of the units are
added up in a fixed order. Few tokens are what this is for: with many, most rows are active in some token, and the dense
product reads each once for all of them.

The gradient of the values reads the same rows again. That of W has for each row the tokens that name it, in the order
of a stable sort of the indices: no atomics, and the same sum each time. Saved are the arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    TRITON_DTYPES,
    autocast,
    check_shape,
    check_tensors,
    choose_backend,
    load,
    no_double_backward,
    on_device,
    store,
    tl,
    transformed,
    triton,
    widened,
)
from polylib.kernels._cost import Cost

_PROGRAMS = 528  # four for each multiprocessor of a large GPU

# --- the definition ---------------------------------------------------------------------------------------------------


def sparse_down_reference(values: Tensor, indices: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (B, d) in plain PyTorch; half precisions are added up in float32."""
    v, rows = widened(values)[..., None], widened(weight_t[indices])
    y = (v * torch.where((v == 0) & ~rows.isfinite(), 0.0, rows)).sum(-2)
    return (y if bias is None else y + bias).to(values.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["k", "per_split"])
def _sum_kernel(
    values, indices, weight, out, B, k, m, d, per_split, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program's part of a token's sum, written to (split, B, d)."""
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # excerpt: begin
    for step in range(per_split):
        j = (split * per_split + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        v = load(values + b * k + j, j < k)
        row = tl.load(indices + b * k + j, mask=j < k, other=0)
        known = (row >= 0) & (row < m)
        active = (known & (v != 0))[:, None] & (column < d)[None, :]  # what is not active is not read
        w = load(weight + row[:, None] * d + column[None, :], active)
        acc += tl.where(known, v, float("nan"))[:, None] * w  # an index that there is not must not go unseen
    y = tl.sum(acc, axis=0)
    # excerpt: end
    store(out + (split * B + b) * d + column, y, column < d)


@triton.jit(do_not_specialize=["k"])
def _by_values_kernel(
    grad, values, indices, weight, by_values, k, m, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The products of a token's gradient with its rows."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    silent = load(values + b * k + j, j < k) == 0
    row = tl.load(indices + b * k + j, mask=j < k, other=0)
    known = (row >= 0) & (row < m)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        ok = (known & (j < k))[:, None] & (column < d)[None, :]
        w = load(weight + row[:, None] * d + column[None, :], ok)
        w = tl.where(silent[:, None] & ~(tl.abs(w) < float("inf")), 0.0, w)
        acc += w * load(grad + b * d + column, column < d)[None, :]
    store(by_values + b * k + j, tl.where(known, tl.sum(acc, axis=1), float("nan")), j < k)


@triton.jit(do_not_specialize=["k"])
def _by_weight_kernel(grad, values, order, ends, by_weight, k, d, BLOCK_D: tl.constexpr):
    """One row of the weight: the sum over the entries that name it, which follow each other in `order`."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for place in range(tl.load(ends + i), tl.load(ends + i + 1)):
        entry = tl.load(order + place)
        v = load(values + entry, None)
        acc += v * load(grad + entry // k * d + column, column < d)
    store(by_weight + i * d + column, acc, column < d)


# --- registration -----------------------------------------------------------------------------------------------------


def _columns(d: int) -> int:
    return min(max(triton.next_power_of_2(d), 16), 256)


@torch.library.custom_op("polylib::sparse_down", mutates_args=())
def _forward(values: Tensor, indices: Tensor, weight_t: Tensor) -> Tensor:
    """Return y (B, d) in float32, without a bias; values and indices (B, k), weight_t (m, d)."""
    values, indices, weight_t = values.contiguous(), indices.contiguous(), weight_t.contiguous()
    (B, k), (m, d) = values.shape, weight_t.shape
    if values.numel() * d == 0:
        return values.new_zeros(B, d, dtype=torch.float32)
    block_k, block_d = 16, _columns(d)
    tiles, steps = triton.cdiv(d, block_d), triton.cdiv(k, block_k)
    per_split = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // (B * tiles))))
    splits = triton.cdiv(steps, per_split)
    parts = values.new_empty(splits, B, d, dtype=torch.float32)
    with on_device(values):
        _sum_kernel[(B, tiles, splits)](
            values, indices, weight_t, parts, B, k, m, d, per_split, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4
        )
    return parts.sum(0) if splits > 1 else parts[0]


@_forward.register_fake
def _(values, indices, weight_t):
    return values.new_empty(len(values), weight_t.shape[1], dtype=torch.float32)


@torch.library.custom_op("polylib::sparse_down_backward", mutates_args=())
def _backward(grad: Tensor, values: Tensor, indices: Tensor, weight_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of values and weight_t; grad (B, d) float32."""
    grad, values, indices, weight_t = (t.contiguous() for t in (grad, values, indices, weight_t))
    (B, k), (m, d) = values.shape, weight_t.shape
    by_values, by_weight = torch.zeros_like(values), torch.zeros_like(weight_t)
    if values.numel() * d == 0:
        return by_values, by_weight
    sorted_, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_, torch.arange(m + 1, device=sorted_.device, dtype=sorted_.dtype))
    block_d = _columns(d)
    with on_device(values):
        _by_values_kernel[(B, triton.cdiv(k, 16))](
            grad, values, indices, weight_t, by_values, k, m, d, BLOCK_K=16, BLOCK_D=block_d, num_warps=4
        )
        _by_weight_kernel[(m, triton.cdiv(d, block_d))](
            grad, values, order, ends, by_weight, k, d, BLOCK_D=block_d, num_warps=1
        )
    return by_values, by_weight


@_backward.register_fake
def _(grad, values, indices, weight_t):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (values, weight_t))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    values, indices, weight_t = ctx.saved_tensors
    by_values, by_weight = _backward(grad, values, indices, weight_t)
    return by_values, None, by_weight


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("sparse_down"))


# --- the public function ----------------------------------------------------------------------------------------------


def sparse_down(
    values: Tensor, indices: Tensor, weight_t: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return for each token the sum of the rows of `weight_t` that `indices` name, times `values`, plus the bias.

    Args:
        values: (..., k), any strides; what is zero counts for nothing.
        indices: (..., k), int32 or int64, from 0 to m - 1, in any order, also the same one twice.
        weight_t: (m, d), a row for each unit: the transpose of the weight of an `nn.Linear(m, d)`.
        bias: (d,), or None for zero.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16, and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once,
            by values, weight_t and bias.

    Returns:
        (..., d), in the dtype of values, or in autocast's dtype under `torch.autocast`.

    Raises:
        ValueError: shapes or devices that don't fit, an unknown backend, or an index outside the rows, on a CPU. On a
            GPU, where to look would mean to wait, such an index makes its token NaN.
        TypeError: indices that are not integers; other tensors that are not of one floating-point dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2210.06313.
    """
    values, weight_t, bias = autocast(values, weight_t, bias)
    check_tensors({"values": values, "weight_t": weight_t, "bias": bias}, optional=("bias",))
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be a tensor of int32 or int64, got {found}")
    if values.dim() == 0:
        raise ValueError("values must have shape (..., k), got a number")
    check_shape("indices", indices, tuple(values.shape), "that of values")
    if indices.device != values.device:
        raise ValueError(f"indices must be on the device of values, {values.device}, got {indices.device}")
    if weight_t.dim() != 2:
        raise ValueError(f"weight_t must have shape (m, d), got {tuple(weight_t.shape)}")
    m, d = weight_t.shape
    check_shape("bias", bias, (d,), "(d,)")
    chosen = choose_backend(backend, values, TRITON_DTYPES)
    if indices.device.type == "cpu" and indices.numel() and not transformed() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in indices.aminmax())
        if low < 0 or high >= m:
            raise ValueError(f"indices must be from 0 to m - 1 = {m - 1}, got {low if low < 0 else high}")
    if chosen == "triton":
        *rows, k = values.shape
        flat = math.prod(rows), k
        y = _forward(values.reshape(flat), indices.reshape(flat).long(), weight_t).view(*rows, d)
        return (y if bias is None else y + bias).to(values.dtype)
    return sparse_down_reference(values, indices.long(), weight_t, bias)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(B: int, k: int, d: int, dtype: torch.dtype, *, m: int = 0, backward: bool = False) -> Cost:
    """Return the least bytes and flops if all B k rows differ: these and values and indices read, y written.

    Backward: the rows, the arguments and the gradient of y read, and the gradients of the values and of all m rows of
    the weight written.
    """
    entries = B * k
    if not backward:
        return Cost((entries * (d + 1) + B * d) * dtype.itemsize + 8 * entries, 2 * entries * d)
    return Cost((entries * (d + 2) + B * d + m * d) * dtype.itemsize + 8 * entries, 4 * entries * d)
