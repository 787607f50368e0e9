r"""The quadratic neuron: $y = (x W_r^\top + b_r) \circ (x W_g^\top + b_g) + (x \circ x) W_b^\top + b_b$.

Source: Fan, Li, Wang, Lai, Wang, "On Expressivity and Trainability of Quadratic Networks", arXiv 2110.06081.

Shapes: x (..., K), each weight (N, K), each bias (N,), y (..., N); M is the product of the leading sizes of x.
Kernels: float32, bfloat16, float16, one dtype for all, accumulated in float32. Reference: any floating dtype.
x is squared in float32 and rounded to its own dtype, as PyTorch does, so that the product can use the tensor cores.

With $G = \partial L/\partial y$, the two factors $r$ and $g$, $D_r = G \circ g$ and $D_g = G \circ r$, the gradients
are

$$\nabla x = D_r W_r + D_g W_g + 2 x \circ (G W_b), \quad
  \nabla W_r = D_r^\top x, \quad \nabla W_g = D_g^\top x, \quad \nabla W_b = G^\top (x \circ x),$$

and the sums over rows of $D_r$, $D_g$ and $G$ for the three biases.

What is saved for backward: x, the weights, and the factors r and g. Counted in elements:

- forward writes y, r and g (3 MN); without gradients only y (MN). Eager PyTorch passes over MN nine times (writes
  r, g, q; reads two and writes one, twice), and over MK three more times for x * x.
- backward has two kernels (grad x; all six parameter gradients), and each reads G, r and g once in the ideal (3 MN).
- to recompute r and g instead costs 4 MNK flops (a third more). Each kernel visits a tile of (r, g) once for every
  tile of K, and would repeat the work each time; done once, in a kernel of its own, it writes and reads the same
  2 MN that saving does. So unless all of K is one tile, recomputing is slower: what it buys is 2 MN less held between
  forward and backward.
- D_r, D_g and x * x are formed in registers and never written. In memory the first two would cost 5 MN (read G, r and
  g, write both), x * x another MK written in each direction.

At M = 8192, K = N = 1024 in bfloat16 MN is 16.8 MB: forward moves at least 17 + 50 + 6 MB (x; y, r, g; weights).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib.kernels._common import (
    autocast,
    autotune,
    check_shape,
    check_tensors,
    choose_backend,
    dot,
    dot_precision,
    needs_grad,
    no_double_backward,
    on_device,
    row_bucket,
    tl,
    triton,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def quadratic_linear_reference(
    x: Tensor, weight_r: Tensor, bias_r: Tensor | None, weight_g: Tensor, bias_g: Tensor | None,
    weight_b: Tensor, bias_b: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return `(x @ weight_r.T + bias_r) * (x @ weight_g.T + bias_g) + (x * x) @ weight_b.T + bias_b` in plain PyTorch.

    x (..., K), weights (N, K), biases (N,) or None for zero; the result is (..., N). Any floating dtype and device;
    differentiable any number of times; works under `torch.func`. PyTorch itself checks the arguments.
    """
    return F.linear(x, weight_r, bias_r) * F.linear(x, weight_g, bias_g) + F.linear(x * x, weight_b, bias_b)


# --- the kernels ------------------------------------------------------------------------------------------------------
# (block sizes, warps, pipeline stages), apart for products on tensor cores in 16 bits ("half") and in tf32, and exact
# in float32 ("ieee"), where the product runs on the ordinary units and wants many registers. The first of each is small
# enough for every GPU; none of them spills. In tf32 the tensor cores take operands in one order only: what the
# gradients read the other way round is turned on its way through registers, and so not copied ahead of the loop (one
# stage), or it would travel 4 bytes at a time.


def _tiles(kinds: dict[str, list[tuple[int, int, int, int, int]]]) -> list[tuple[dict[str, Any], int, int]]:
    """One list of all tiles; KIND says what product a tile is for."""
    return [
        ({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "KIND": kind}, warps, stages)
        for kind, sizes in kinds.items()
        for m, n, k, warps, stages in sizes
    ]


def _suits(tile: dict[str, Any], arguments: dict[str, Any]) -> bool:
    return tile["KIND"] == (arguments["PRECISION"] if arguments["x"].dtype == torch.float32 else "half")


_FORWARD = _tiles(
    {
        "half": [(64, 64, 32, 4, 2), (128, 64, 32, 8, 3), (128, 64, 64, 8, 3), (64, 128, 32, 8, 3)],
        "tf32": [(64, 64, 32, 8, 2), (128, 64, 32, 8, 2), (64, 64, 32, 4, 2)],
        "ieee": [(32, 32, 32, 4, 2), (64, 64, 16, 8, 2)],
    }
)
_GRAD_X = _tiles(
    {
        "half": [(64, 16, 64, 4, 2), (128, 32, 64, 8, 3)],
        "tf32": [(64, 16, 64, 4, 1), (64, 32, 64, 8, 1)],
        "ieee": [(32, 16, 64, 4, 2), (64, 16, 64, 8, 2)],
    }
)
_GRAD_PARAMS = _tiles(
    {
        "half": [(32, 64, 64, 8, 2), (64, 64, 64, 8, 2)],
        "tf32": [(16, 64, 64, 8, 1), (32, 64, 64, 8, 1)],
        "ieee": [(16, 64, 64, 8, 2), (16, 32, 64, 4, 2)],
    }
)
_KEY = ["N", "K", "m_bucket", "PRECISION"]


@triton.jit
def _square(x):
    wide = x.to(tl.float32)
    return (wide * wide).to(x.dtype)


# Neighbouring programs share rows in groups of eight, so that the tiles they read are still in the L2 cache.
@autotune(_FORWARD, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _forward_kernel(
    x, w_r, b_r, w_g, b_g, w_b, b_b, y, r, g,
    M, N, K, stride_m, stride_k, m_bucket,
    PRECISION: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    pid_m, pid_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, 8)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    row_ok, col_ok = rows[:, None] < M, cols[None, :] < N

    x_tile = x + rows[:, None] * stride_m + ks[None, :] * stride_k
    w_offsets = cols[None, :] * K + ks[:, None]
    step = tl.cast(stride_k, tl.int64) * BLOCK_K
    acc_r = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_q = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # excerpt: begin
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(x_tile, mask=row_ok & (ks[None, :] < K - k0), other=0.0)
        w_ok = col_ok & (ks[:, None] < K - k0)
        acc_r = dot(a, tl.load(w_r + w_offsets, mask=w_ok, other=0.0), acc_r, PRECISION)
        acc_g = dot(a, tl.load(w_g + w_offsets, mask=w_ok, other=0.0), acc_g, PRECISION)
        acc_q = dot(_square(a), tl.load(w_b + w_offsets, mask=w_ok, other=0.0), acc_q, PRECISION)
        x_tile += step
        w_offsets += BLOCK_K
    # excerpt: end

    if b_r is not None:
        acc_r += tl.load(b_r + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if b_g is not None:
        acc_g += tl.load(b_g + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if b_b is not None:
        acc_q += tl.load(b_b + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    out = rows[:, None] * N + cols[None, :]
    tl.store(y + out, (acc_r * acc_g + acc_q).to(y.dtype.element_ty), mask=row_ok & col_ok)
    if r is not None:
        tl.store(r + out, acc_r.to(r.dtype.element_ty), mask=row_ok & col_ok)
        tl.store(g + out, acc_g.to(g.dtype.element_ty), mask=row_ok & col_ok)


@autotune(_GRAD_X, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _grad_x_kernel(
    grad, x, w_r, w_g, w_b, r, g, grad_x,
    M, N, K, stride_m, stride_k, m_bucket,
    PRECISION: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    pid_m, pid_k = tl.swizzle2d(pid // tiles_k, pid % tiles_k, tiles_m, tiles_k, 8)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    row_ok, k_ok = rows[:, None] < M, ks[None, :] < K

    offsets = rows[:, None] * N + cols[None, :]
    w_offsets = cols[:, None] * K + ks[None, :]
    step = tl.cast(K, tl.int64) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    acc_q = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        ok = row_ok & (cols[None, :] < N - n0)
        w_ok = k_ok & (cols[:, None] < N - n0)
        d = tl.load(grad + offsets, mask=ok, other=0.0)
        wide = d.to(tl.float32)
        d_r = (wide * tl.load(g + offsets, mask=ok, other=0.0).to(tl.float32)).to(d.dtype)
        d_g = (wide * tl.load(r + offsets, mask=ok, other=0.0).to(tl.float32)).to(d.dtype)
        acc = dot(d_r, tl.load(w_r + w_offsets, mask=w_ok, other=0.0), acc, PRECISION)
        acc = dot(d_g, tl.load(w_g + w_offsets, mask=w_ok, other=0.0), acc, PRECISION)
        acc_q = dot(d, tl.load(w_b + w_offsets, mask=w_ok, other=0.0), acc_q, PRECISION)
        offsets += BLOCK_N
        w_offsets += step

    a = tl.load(x + rows[:, None] * stride_m + ks[None, :] * stride_k, mask=row_ok & k_ok, other=0.0).to(tl.float32)
    out = (acc + 2.0 * a * acc_q).to(grad_x.dtype.element_ty)
    tl.store(grad_x + rows[:, None] * K + ks[None, :], out, mask=row_ok & k_ok)


# Each program sums one range of rows for one tile of all three weights, and writes float32 partial sums that the caller
# adds in a fixed order: no atomics, hence the same bits every time.
@autotune(_GRAD_PARAMS, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket", "rows_per_split"])
def _grad_params_kernel(
    grad, x, r, g, grad_w, grad_b,
    M, N, K, stride_m, stride_k, rows_per_split, m_bucket,
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

    offsets = rows[:, None] * N + cols[None, :]
    x_tile = x + rows[:, None] * stride_m + ks[None, :] * stride_k
    step = tl.cast(N, tl.int64) * BLOCK_M
    x_step = tl.cast(stride_m, tl.int64) * BLOCK_M
    acc_r = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_g = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_q = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sum_r = tl.zeros((BLOCK_N,), tl.float32)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_q = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(start, stop, BLOCK_M):
        row_ok = rows[:, None] < stop
        a = tl.load(x_tile, mask=row_ok & k_ok, other=0.0)
        d = tl.load(grad + offsets, mask=row_ok & col_ok, other=0.0)
        wide = d.to(tl.float32)
        d_r = wide * tl.load(g + offsets, mask=row_ok & col_ok, other=0.0).to(tl.float32)
        d_g = wide * tl.load(r + offsets, mask=row_ok & col_ok, other=0.0).to(tl.float32)
        acc_r = dot(tl.trans(d_r.to(d.dtype)), a, acc_r, PRECISION)
        acc_g = dot(tl.trans(d_g.to(d.dtype)), a, acc_g, PRECISION)
        acc_q = dot(tl.trans(d), _square(a), acc_q, PRECISION)
        if pid_k == 0:  # the sums are the same for every tile of K, and not free
            sum_r += tl.sum(d_r, axis=0)
            sum_g += tl.sum(d_g, axis=0)
            sum_q += tl.sum(wide, axis=0)
        rows += BLOCK_M
        offsets += step
        x_tile += x_step

    size = tl.cast(N, tl.int64) * K
    out = grad_w + split * 3 * size + cols[:, None] * K + ks[None, :]
    ok = (cols[:, None] < N) & k_ok
    tl.store(out, acc_r, mask=ok)
    tl.store(out + size, acc_g, mask=ok)
    tl.store(out + 2 * size, acc_q, mask=ok)
    if pid_k == 0:
        out_b = grad_b + split * 3 * N + cols
        tl.store(out_b, sum_r, mask=cols < N)
        tl.store(out_b + N, sum_g, mask=cols < N)
        tl.store(out_b + 2 * N, sum_q, mask=cols < N)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::quadratic_linear", mutates_args=())
def _forward(
    x: Tensor, weight_r: Tensor, bias_r: Tensor | None, weight_g: Tensor, bias_g: Tensor | None,
    weight_b: Tensor, bias_b: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, and r and g for the backward pass (empty unless `save`). x is (M, K) with any strides."""
    (M, K), N = x.shape, weight_r.shape[0]
    y = x.new_empty(M, N)
    r, g = (torch.empty_like(y), torch.empty_like(y)) if save else (x.new_empty(0), x.new_empty(0))
    parameters = [None if t is None else t.contiguous() for t in (weight_r, bias_r, weight_g, bias_g, weight_b, bias_b)]
    if M > 0:
        with on_device(x):
            _forward_kernel[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)](
                x, *parameters, y, r if save else None, g if save else None,
                M, N, K, x.stride(0), x.stride(1), row_bucket(M), PRECISION=dot_precision(),
            )  # fmt: skip
    return y, r, g


@_forward.register_fake
def _(x, weight_r, bias_r, weight_g, bias_g, weight_b, bias_b, save):
    shape = (x.shape[0], weight_r.shape[0]) if save else (0,)
    return x.new_empty(x.shape[0], weight_r.shape[0]), x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("polylib::quadratic_linear_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight_r: Tensor, weight_g: Tensor, weight_b: Tensor, r: Tensor, g: Tensor,
    need_x: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x (M, K), the weights (3, N, K) and the biases (3, N); empty where not needed."""
    (M, K), N = x.shape, weight_r.shape[0]
    grad, r, g = grad.contiguous(), r.contiguous(), g.contiguous()
    shared = (M, N, K, x.stride(0), x.stride(1))
    grad_x = x.new_empty(M, K) if need_x else x.new_empty(0)
    if need_x and M > 0:
        with on_device(x):
            _grad_x_kernel[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(K, meta["BLOCK_K"]),)](
                grad, x, weight_r.contiguous(), weight_g.contiguous(), weight_b.contiguous(), r, g, grad_x,
                *shared, row_bucket(M), PRECISION=dot_precision(),
            )  # fmt: skip
    if not need_parameters:
        return grad_x, x.new_empty(0), x.new_empty(0)
    if M == 0:
        return grad_x, x.new_zeros(3, N, K), x.new_zeros(3, N)
    # Enough programs to fill a large GPU, with up to 256 rows each or more. Only the shape decides, not the device.
    splits = max(1, min(triton.cdiv(M, 256), 256 // (triton.cdiv(N, 64) * triton.cdiv(K, 64))))
    grad_w = x.new_empty(splits, 3, N, K, dtype=torch.float32)
    grad_b = x.new_empty(splits, 3, N, dtype=torch.float32)
    with on_device(x):
        _grad_params_kernel[lambda meta: (triton.cdiv(N, meta["BLOCK_N"]) * triton.cdiv(K, meta["BLOCK_K"]), splits)](
            grad, x, r, g, grad_w, grad_b, *shared, triton.cdiv(M, splits), row_bucket(M), PRECISION=dot_precision()
        )
    return grad_x, grad_w.sum(0).to(x.dtype), grad_b.sum(0).to(x.dtype)


@_backward.register_fake
def _(grad, x, weight_r, weight_g, weight_b, r, g, need_x, need_parameters):
    N, K = weight_r.shape
    w, b = ((3, N, K), (3, N)) if need_parameters else ((0,), (0,))
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(w), x.new_empty(b)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight_r, _, weight_g, _, weight_b, _, _ = inputs
    _, r, g = output
    ctx.mark_non_differentiable(r, g)
    ctx.set_materialize_grads(False)
    ctx.saved = inputs[-1]
    ctx.save_for_backward(x, weight_r, weight_g, weight_b, r, g)


def _gradients(ctx: Any, grad: Tensor | None, _grad_r: None, _grad_g: None) -> tuple:
    if grad is None:
        return (None,) * 8
    if not ctx.saved:
        raise RuntimeError("polylib::quadratic_linear was called with save=False and can't be differentiated")
    need = ctx.needs_input_grad[:7]
    grad_x, grad_w, grad_b = _backward(grad, *ctx.saved_tensors, need[0], any(need[1:]))
    if not any(need[1:]):
        return (grad_x,) + (None,) * 7
    all_grads = (grad_x, grad_w[0], grad_b[0], grad_w[1], grad_b[1], grad_w[2], grad_b[2])
    return (*(t if needed else None for t, needed in zip(all_grads, need, strict=True)), None)


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("quadratic_linear"))


# --- the public function ----------------------------------------------------------------------------------------------


def quadratic_linear(
    x: Tensor, weight_r: Tensor, bias_r: Tensor | None, weight_g: Tensor, bias_g: Tensor | None,
    weight_b: Tensor, bias_b: Tensor | None, *, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return `(x @ weight_r.T + bias_r) * (x @ weight_g.T + bias_g) + (x * x) @ weight_b.T + bias_b`.

    Args:
        x: (..., K), any strides; a view that can be seen as one matrix is read where it is, without a copy.
        weight_r, weight_g, weight_b: (N, K).
        bias_r, bias_g, bias_b: (N,), or None for zero.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        (..., N) in the dtype of x, or in autocast's dtype under `torch.autocast`. To export a model for inference do so
        under `torch.no_grad()`, so that the factors kept for the backward pass are not written.

    Raises:
        ValueError: a shape that does not fit, K or N of zero, tensors on different devices, an unknown backend.
        TypeError: not a floating-point tensor, tensors of different dtypes, a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Fan, Li, Wang, Lai, Wang, "On Expressivity and Trainability of Quadratic Networks", arXiv 2110.06081.
    """
    args = autocast(x, weight_r, bias_r, weight_g, bias_g, weight_b, bias_b)
    tensors = dict(zip(("x", "weight_r", "bias_r", "weight_g", "bias_g", "weight_b", "bias_b"), args, strict=True))
    check_tensors(tensors, optional=("bias_r", "bias_g", "bias_b"))
    x, weight_r = args[:2]
    if weight_r.dim() != 2 or 0 in weight_r.shape:
        raise ValueError(f"weight_r must have shape (N, K) with N, K >= 1, got {tuple(weight_r.shape)}")
    N, K = weight_r.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must have shape (..., K) with K = {K} as in weight_r, got {tuple(x.shape)}")
    for name, tensor in tensors.items():
        if name.startswith("weight"):
            check_shape(name, tensor, (N, K), "(N, K)")
        elif name.startswith("bias"):
            check_shape(name, tensor, (N,), "(N,)")
    if choose_backend(backend, x) == "reference":
        return quadratic_linear_reference(*args)
    y, _, _ = _forward(x.reshape(-1, K), *args[1:], needs_grad(*args))
    return y.view(*x.shape[:-1], N)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, in_features: int, out_features: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops: every operand read once, every result written once, products counted alone.

    direction: "forward" (for training: r and g are written too), "inference" or "backward" (every gradient). All three
    biases are counted. Raises ValueError for another direction.
    """
    M, K, N = rows, in_features, out_features
    parameters = 3 * (N * K + N)
    counts = {
        "inference": (M * K + parameters + M * N, 6 * M * N * K),
        "forward": (M * K + parameters + 3 * M * N, 6 * M * N * K),
        "backward": (3 * M * N + 2 * (M * K + parameters) - 3 * N, 12 * M * N * K),
    }
    if direction not in counts:
        raise ValueError(f'direction must be "forward", "inference" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize, flops)
