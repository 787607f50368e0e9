r"""Products with a Monarch matrix: two block-diagonal matrices with a transposition between them.

Source: Fu and others, "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", arXiv 2310.12109.

Shapes: x (..., n) with n = k p, w1 (k, q, p), w2 (l, s, r) with l r = k q; y (..., l s). The first factor takes the k
blocks of x,

$$a_{kq} = \sum_p w^1_{kqp}\,x_{kp};$$

a, row by row, is a list of r l numbers, of which the second factor takes every l-th:

$$h_{lr} = a_{rl}, \qquad y_{sl} = \sum_r w^2_{lsr}\,h_{lr}.$$

Entry (s, l) of y is entry s l_max + l of its last axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import autocast, choose_backend
from polylib.kernels._cost import Cost


def monarch_multiply_reference(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return y (..., l s) in plain PyTorch, of any dtype, complex ones too. Differentiable any number of times."""
    (k, _, p), (l, _, r) = w1.shape, w2.shape  # noqa: E741 - the paper's letters
    a = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (k, p)), w1)
    h = a.flatten(-2).unflatten(-1, (r, l))
    return torch.einsum("...rl,lsr->...sl", h, w2).flatten(-2)


def monarch_multiply(x: Tensor, w1: Tensor, w2: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the product of the Monarch matrix of w1 and w2 with the last axis of x.

    Args:
        x: (..., n), any strides.
        w1: (k, q, p) with k p = n.
        w2: (l, s, r) with l r = k q.
        backend: "auto" or "reference".

    Returns:
        (..., l s) in the dtype of x, or in autocast's dtype under `torch.autocast`.

    Raises:
        ValueError: shapes or devices that don't fit, an unknown backend.
        TypeError: not floating or complex tensors of one dtype.

    Source: Fu and others, arXiv 2310.12109.
    """
    x, w1, w2 = autocast(x, w1, w2)
    for name, tensor in (("x", x), ("w1", w1), ("w2", w2)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name} must have a floating-point or complex dtype, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    for name, tensor, letters in (("w1", w1, "(k, q, p)"), ("w2", w2, "(l, s, r)")):
        _checks.shape(name, tensor, f"{letters} with sizes of at least 1", tensor.dim() == 3 and 0 not in tensor.shape)
    k, q, p = w1.shape
    _checks.shape("x", x, f"(..., k p) with k p = {k * p} as in w1", x.dim() > 0 and x.shape[-1] == k * p)
    _checks.shape("w2", w2, f"(l, s, r) with l r = k q = {k * q}", w2.shape[0] * w2.shape[2] == k * q)
    choose_backend(backend, x)
    return monarch_multiply_reference(x, w1, w2)


def cost(
    rows: int,
    k: int,
    q: int,
    p: int,
    l: int,  # noqa: E741 - the paper's letter
    s: int,
    r: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> Cost:
    """Return the least bytes and flops: x, w1, w2 read once, y written once.

    Backward: x, w1, w2 and the gradient of y read, three gradients written; a again, and two products for each factor.
    """
    weights, products = k * q * p + l * s * r, 2 * rows * (k * q * p + l * s * r)
    if not backward:
        return Cost((rows * (k * p + l * s) + weights) * dtype.itemsize, products)
    elements = rows * (2 * k * p + l * s) + 2 * weights
    return Cost(elements * dtype.itemsize, 2 * products + 2 * rows * k * q * p)
