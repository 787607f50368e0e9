r"""Intervals through a linear layer: the centre by the weight, the radius by its absolute values, from one read of it.

Source: Gowal et al., "On the effectiveness of interval bound propagation for training verifiably robust models",
arXiv 1810.12715; for training, Shi et al., arXiv 2103.17268.

Shapes: c, r (..., K), W (N, K), b (N,), results (..., N); M is the product of the leading sizes.

$$c' = c\,W^\top + b,\qquad r' = r\,\lvert W\rvert^\top .$$

These are the exact bounds of $Wz+b$ over the box $c\pm r$ with $r\ge0$, but for rounding, which is to the nearest and
not outward. With the gradients $g$ of $c'$ and $h$ of $r'$,

$$\nabla c = gW,\quad \nabla r = h\lvert W\rvert,\quad
  \nabla W = g^\top c + \mathrm{sign}(W)\circ(h^\top r),\quad \nabla b=\textstyle\sum g .$$

Eager PyTorch writes the absolute values of W, reads them, and reads W itself: five passes over W for two, a copy as
large as W that is kept for the backward pass, and there two products as large as W beside their sum. Here a tile of W
is read once and serves both products, forward and for the inputs' gradients by the same kernel; the weight's gradient
is put together in registers. Saved are c, r and W. This counts where W is large beside the batch, up to some hundred
rows; for larger ones all forms are bound by the products.

Kernels: float32, bfloat16 or float16, one dtype for all, accumulated in float32. Reference: any floating dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import (
    autocast,
    autotune,
    check_shape,
    check_tensors,
    choose_backend,
    dot,
    dot_precision,
    load,
    no_double_backward,
    on_device,
    row_bucket,
    store,
    tl,
    triton,
    wide,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def ibp_linear_reference(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the centre and the radius of the outputs in plain PyTorch."""
    return F.linear(center, weight, bias), F.linear(radius, weight.abs())


# --- the kernels ------------------------------------------------------------------------------------------------------
# (block sizes, warps, pipeline stages), apart for products on tensor cores in 16 bits ("half") and in tf32, and exact
# in float32 ("ieee"). In tf32 the tensor cores take operands in one order only: a weight that is read the other way
# round, as backward reads it, is turned in registers, and so not copied ahead of the loop (one stage).


def _tiles(kinds: dict[str, list[tuple[int, int, int, int, int]]]) -> list[tuple[dict[str, Any], int, int]]:
    """One list of all tiles; KIND says what product a tile is for."""
    return [
        ({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "KIND": kind}, warps, stages)
        for kind, sizes in kinds.items()
        for m, n, k, warps, stages in sizes
    ]


def _suits(tile: dict[str, Any], arguments: dict[str, Any]) -> bool:
    kind = arguments["PRECISION"] if arguments["x"].dtype == torch.float32 else "half"
    return tile["KIND"] == (f"{kind} back" if arguments["BACK"] and kind == "tf32" else kind)


_PRODUCTS = _tiles(
    {
        "half": [(64, 64, 32, 4, 2), (128, 64, 64, 8, 3), (64, 128, 32, 8, 3)],
        "tf32": [(64, 64, 32, 8, 2), (128, 64, 32, 8, 2)],
        "tf32 back": [(64, 64, 16, 4, 1), (64, 64, 32, 8, 1)],
        "ieee": [(32, 32, 16, 4, 2), (64, 64, 16, 8, 2)],
    }
)
_WEIGHT = _tiles(
    {
        "half": [(32, 64, 64, 8, 2), (64, 64, 64, 8, 2)],
        "tf32 back": [(16, 64, 64, 8, 1), (32, 64, 64, 8, 1)],
        "ieee": [(16, 32, 64, 4, 2)],
    }
)
_KEY = ["N", "K", "m_bucket", "PRECISION", "BACK"]


# Rows of x times the columns of w and rows of s times those of |w|. `stride_n` and `stride_k` say where w has its
# (output, input) entries: forward these are those of W, backward those of W turned round, and N and K change places.
@autotune(_PRODUCTS, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _products_kernel(
    x, s, w, bias, y, z, M, N, K, stride_n, stride_k, m_bucket, BACK: tl.constexpr,
    PRECISION: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, 8)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_ok, col_ok = rows[:, None] < M, cols[None, :] < N
    at = rows[:, None] * K + ks[None, :]
    w_tile = w + cols[None, :] * stride_n + ks[:, None] * stride_k
    step = tl.cast(stride_k, tl.int64) * BLOCK_K
    by_w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    by_size = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # excerpt: begin
    for k0 in range(0, K, BLOCK_K):
        ok = row_ok & (ks[None, :] < K - k0)
        part = tl.load(w_tile, mask=col_ok & (ks[:, None] < K - k0), other=0.0)
        size = tl.abs(part.to(tl.float32)).to(part.dtype)
        by_w = dot(tl.load(x + at, mask=ok, other=0.0), part, by_w, PRECISION)
        by_size = dot(tl.load(s + at, mask=ok, other=0.0), size, by_size, PRECISION)
        at += BLOCK_K
        w_tile += step
    # excerpt: end
    if bias is not None:
        by_w += load(bias + cols, cols < N)[None, :]
    out = rows[:, None] * N + cols[None, :]
    store(y + out, by_w, row_ok & col_ok)
    store(z + out, by_size, row_ok & col_ok)


# Each program sums one range of rows for one tile of the weight, and writes float32 partial sums that the caller adds
# in a fixed order.
@autotune(_WEIGHT, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket", "rows_per_split"])
def _weight_kernel(
    g, h, x, s, w, grad_w, grad_b, M, N, K, rows_per_split, m_bucket, BACK: tl.constexpr,
    PRECISION: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    pid, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pid_n, pid_k = tl.swizzle2d(pid // tiles_k, pid % tiles_k, tiles_n, tiles_k, 8)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, M)
    rows = start + tl.arange(0, BLOCK_M)
    col_ok, k_ok = cols[None, :] < N, ks[None, :] < K
    by_w = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    by_size = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(start, stop, BLOCK_M):
        row_ok = rows[:, None] < stop
        of_y, of_x = rows[:, None] * N + cols[None, :], rows[:, None] * K + ks[None, :]
        d = tl.load(g + of_y, mask=row_ok & col_ok, other=0.0)
        by_w = dot(tl.trans(d), tl.load(x + of_x, mask=row_ok & k_ok, other=0.0), by_w, PRECISION)
        e = tl.load(h + of_y, mask=row_ok & col_ok, other=0.0)
        by_size = dot(tl.trans(e), tl.load(s + of_x, mask=row_ok & k_ok, other=0.0), by_size, PRECISION)
        if pid_k == 0:  # the same for every tile of K
            total += tl.sum(wide(d), axis=0)
        rows += BLOCK_M
    at = cols[:, None] * K + ks[None, :]
    ok = (cols[:, None] < N) & k_ok
    own = load(w + at, ok)
    sign = tl.where(own > 0, 1.0, tl.where(own < 0, -1.0, own))  # a NaN stays
    tl.store(grad_w + split * N * K + at, by_w + sign * by_size, mask=ok)
    if pid_k == 0:
        tl.store(grad_b + split * N + cols, total, mask=cols < N)


# --- registration -----------------------------------------------------------------------------------------------------


def _products(x: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    """Return x W^T + b and s |W|^T, or, backward, x W and s |W|, for matrices x and s."""
    stride_n, stride_k = weight.stride()[::-1] if back else weight.stride()
    (M, K), N = x.shape, weight.shape[1 if back else 0]
    y, z = x.new_empty(M, N), x.new_empty(M, N)
    if M > 0:
        with on_device(x):
            _products_kernel[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)](
                x, s, weight, bias, y, z, M, N, K, stride_n, stride_k, row_bucket(M), BACK=back,
                PRECISION=dot_precision(),
            )  # fmt: skip
    return y, z


@torch.library.custom_op("polylib::ibp_linear", mutates_args=())
def _forward(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (c', r') for c and r (M, K), W (N, K) and b (N,)."""
    tensors = center.contiguous(), radius.contiguous(), weight.contiguous()
    return _products(*tensors, None if bias is None else bias.contiguous(), False)


@_forward.register_fake
def _(center, radius, weight, bias):
    return tuple(center.new_empty(center.shape[0], weight.shape[0]) for _ in range(2))


@torch.library.custom_op("polylib::ibp_linear_backward", mutates_args=())
def _backward(
    g: Tensor, h: Tensor, center: Tensor, radius: Tensor, weight: Tensor, inputs: bool, parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of c, r, W and b; empty where not needed."""
    g, h, center, radius, weight = (t.contiguous() for t in (g, h, center, radius, weight))
    (M, K), N = center.shape, weight.shape[0]
    none = center.new_empty(0)
    by_c, by_r = _products(g, h, weight, None, True) if inputs else (none, none.clone())
    if not parameters:
        return by_c, by_r, none.clone(), none.clone()
    if M == 0:
        return by_c, by_r, torch.zeros_like(weight), weight.new_zeros(N)
    # Enough programs to fill a large GPU, with up to 256 rows each or more. Only the shape decides, not the device.
    splits = max(1, min(triton.cdiv(M, 256), 256 // (triton.cdiv(N, 64) * triton.cdiv(K, 64))))
    by_w = center.new_empty(splits, N, K, dtype=torch.float32)
    by_b = center.new_empty(splits, N, dtype=torch.float32)
    with on_device(center):
        _weight_kernel[lambda meta: (triton.cdiv(N, meta["BLOCK_N"]) * triton.cdiv(K, meta["BLOCK_K"]), splits)](
            g, h, center, radius, weight, by_w, by_b, M, N, K, triton.cdiv(M, splits), row_bucket(M), BACK=True,
            PRECISION=dot_precision(),
        )  # fmt: skip
    return by_c, by_r, by_w.sum(0).to(weight.dtype), by_b.sum(0).to(weight.dtype)


@_backward.register_fake
def _(g, h, center, radius, weight, inputs, parameters):
    shape, (N, K) = center.shape if inputs else (0,), weight.shape if parameters else (0, 0)
    w = weight.new_empty((N, K) if parameters else (0,))
    return center.new_empty(shape), center.new_empty(shape), w, weight.new_empty(N)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx: Any, g: Tensor, h: Tensor) -> tuple:
    need = ctx.needs_input_grad
    found = _backward(g, h, *ctx.saved_tensors, need[0] or need[1], need[2] or need[3])
    return tuple(t if needed else None for t, needed in zip(found, need, strict=True))


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("ibp_linear"))


# --- the public function ----------------------------------------------------------------------------------------------


def ibp_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the centre and the radius of the box that a linear layer maps a box into.

    Args:
        center: (..., K).
        radius: (..., K), half the width of each interval. That it is not negative is not looked at.
        weight: (N, K).
        bias: (N,), or None for zero.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        `center @ weight.T + bias` and `radius @ weight.abs().T`, (..., N), in the dtype of the arguments, or in
        autocast's under `torch.autocast`.

    Raises:
        ValueError: a shape that does not fit, K or N of zero, tensors on different devices, an unknown backend.
        TypeError: not a floating-point tensor, tensors of different dtypes, a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 1810.12715.
    """
    args = autocast(center, radius, weight, bias)
    check_tensors(dict(zip(("center", "radius", "weight", "bias"), args, strict=True)), optional=("bias",))
    center, radius, weight, bias = args
    _checks.shape("weight", weight, "(N, K) with N, K >= 1", weight.dim() == 2 and 0 not in weight.shape)
    N, K = weight.shape
    _checks.shape("center", center, f"(..., {K}), as weight", center.dim() > 0 and center.shape[-1] == K)
    _checks.shape("radius", radius, f"{tuple(center.shape)}, as center", radius.shape == center.shape)
    check_shape("bias", bias, (N,), "(N,)")
    if choose_backend(backend, center) == "reference":
        return ibp_linear_reference(center, radius, weight, bias)
    y, z = _forward(center.reshape(-1, K), radius.reshape(-1, K), weight, bias)
    return y.view(*center.shape[:-1], N), z.view(*center.shape[:-1], N)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, in_features: int, out_features: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Return the least bytes and flops: every operand read once, every result written once, products counted alone."""
    M, K, N = rows, in_features, out_features
    ends = 2 * M * K + 2 * M * N
    elements = ends + 2 * M * K + 2 * N * K + N if backward else ends + N * K + N
    return Cost(elements * dtype.itemsize, (8 if backward else 4) * M * N * K)
