r"""The hypercomplex linear layer: $y = x W^\top + b$ with $W = \sum_{k=1}^n A_k \otimes S_k$.

Source: Grassucci, Zhang, Comminiello, "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex
Convolutions", arXiv 2110.04176.

Shapes: x (..., I), A (n, n, n), S (n, O/n, I/n), bias (O,) or None, y (..., O); M is the product of the leading sizes
of x. Kernel: float32, bfloat16, float16, one dtype for all, accumulated in float32, n up to 8, M up to 32. Reference:
any floating dtype, any n and M.

Applying $W$ takes M I O multiplications, whether or not it is built. What sharing can save is traffic: $W$ has O I
entries, $S$ has O I / n. At a few rows, as in generating text, the layer is as slow as its weights are read.

- Up to 32 rows $W$ is never built. With $x_c$ the c-th block of I/n columns, let $u_{k,a} = \sum_c A_k[a, c]\, x_c$.
  Then $y_a = \sum_k u_{k,a} S_k^\top$. One row of x becomes n rows of u for each k, and each $S_k$ is read once for
  all of them.
- Beyond, $W$ is built once (n O I multiplications) and the plain product is as fast as that of a real layer.

The kernel forms u in registers, in the tile of columns that it is about to multiply; each entry of x is read once a
tile and serves all n rows of u. Its programs split the outputs,
and in addition the pairs (k, columns) where the outputs alone would not fill the GPU; a second kernel adds the parts
in a fixed order. Saved for backward: x, A and S. Backward is plain PyTorch, with $W$ built: it is not for training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib.kernels._common import (
    autocast,
    check_shape,
    check_tensors,
    choose_backend,
    dot,
    dot_precision,
    load,
    narrow,
    on_device,
    registers,
    store,
    tl,
    triton,
    unit,
)
from polylib.kernels._cost import Cost

MAX_ROWS, MAX_N = 32, 8  # of the kernel

# --- the definition ---------------------------------------------------------------------------------------------------


def kronecker_weight(A: Tensor, S: Tensor) -> Tensor:
    """Return `sum_k kron(A[k], S[k])`, `(O, I, *kernel)`, for A `(n, n, n)` and S `(n, O/n, I/n, *kernel)`.

    The Kronecker product runs over the first two sizes of S[k]. Block row a, block column c is `sum_k A[k, a, c] S[k]`.
    """
    n, o, i = S.shape[:3]
    return torch.einsum("kac,kij...->aicj...", A, S).reshape(n * o, n * i, *S.shape[3:])


def phm_linear_reference(x: Tensor, A: Tensor, S: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ kronecker_weight(A, S).T + bias` in plain PyTorch.

    Any floating dtype and device; differentiable any number of times; works under `torch.func`. PyTorch itself checks
    the arguments.
    """
    return F.linear(x, kronecker_weight(A, S), bias)


def phm_linear_factored(x: Tensor, A: Tensor, S: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same without building the weight: mix the blocks of x by A, multiply by every S[k], add over k."""
    n, o, i = S.shape
    mixed = torch.einsum("kac,mcj->kmaj", A, x.reshape(-1, n, i))
    y = (mixed.flatten(1, 2) @ S.mT).sum(0).reshape(*x.shape[:-1], n * o)
    return y if bias is None else y + bias


# --- the kernels ------------------------------------------------------------------------------------------------------

_PROGRAMS = 256


def _tile(rows: int, n: int, itemsize: int) -> dict[str, int]:
    """The sizes of a tile: n and the rows are rounded up to powers of two, and the product has at least 16 rows.

    Beyond 128 rows of u a tile has half the columns, whose u would not fit in registers, and twice the outputs, so that
    each thread still reads 16 bytes of S. Beyond 32, blocks of x are read two at a time. At most 48 KB are shared.
    """
    padded = triton.next_power_of_2(n)
    block_m = max(triton.next_power_of_2(rows), 16 // padded)
    height = padded * block_m
    block_i = 64 if height <= 64 else 128 // itemsize
    block_o = 32
    if height > 128:
        block_i, block_o = block_i // 2, 64
    unroll = n if height <= 32 else min(n, 2)
    return {"BLOCK_M": block_m, "N_PAD": padded, "BLOCK_O": block_o, "BLOCK_I": block_i, "UNROLL": unroll}


@triton.jit(do_not_specialize=["M", "per_split"])
def _product_kernel(
    x, A, S, parts, M, height, width, stride_m, stride_i, per_split,
    N: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, N_PAD: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One S[k] is (height, width). Row q = m N_PAD + a of the product belongs to row m, block row a."""
    width = width * UNIT
    split = tl.program_id(1)
    rows, heads = tl.arange(0, BLOCK_M), tl.arange(0, N_PAD)
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    tiles = tl.cdiv(width, BLOCK_I)
    first = split * per_split
    acc = tl.zeros((BLOCK_M * N_PAD, BLOCK_O), tl.float32)
    x_rows = x + rows[:, None].to(tl.int64) * stride_m
    for t in range(first, tl.minimum(first + per_split, N * tiles)):
        k, cols = t // tiles, (t % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
        s_at = (k.to(tl.int64) * height + outs[None, :]) * width + cols[:, None]
        s = tl.load(S + s_at, mask=(outs[None, :] < height) & (cols[:, None] < width), other=0.0)
        # excerpt: begin
        mixed = tl.zeros((BLOCK_M, N_PAD, BLOCK_I), tl.float32)
        for c in tl.range(N, loop_unroll_factor=UNROLL):
            share = load(A + (k * N + heads) * N + c, heads < N)
            ok = (rows[:, None] < M) & (cols[None, :] < width)
            block = load(x_rows + (c * width + cols)[None, :].to(tl.int64) * stride_i, ok)
            mixed += share[None, :, None] * block[:, None, :]
        u = tl.reshape(mixed, (BLOCK_M * N_PAD, BLOCK_I))
        u = tl.where(cols[None, :] < width, u, 0.0)  # beyond the edge an infinite A would count
        acc = dot(narrow(u, s.dtype), s, acc, PRECISION)
        # excerpt: end
    row, head = tl.arange(0, BLOCK_M * N_PAD) // N_PAD, tl.arange(0, BLOCK_M * N_PAD) % N_PAD
    at = (split.to(tl.int64) * M * N + (row * N + head)[:, None]) * height + outs[None, :]
    tl.store(parts + at, acc, mask=((row < M) & (head < N))[:, None] & (outs[None, :] < height))


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_kernel(parts, bias, y, size, outputs, splits, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    size = size * UNIT
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    if bias is not None:
        acc += load(bias + at % outputs, at < size)
    store(y + at, acc, at < size)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::phm_linear", mutates_args=())
def _forward(x: Tensor, A: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
    """Return y (M, O); x is (M, I) with any strides, M up to 32."""
    M, (n, o, i) = x.shape[0], S.shape
    y = x.new_empty(M, n * o)
    if M == 0:
        return y
    tile, part = _tile(M, n, x.itemsize), unit(i)
    steps, tiles_o = n * triton.cdiv(i, tile["BLOCK_I"]), triton.cdiv(o, tile["BLOCK_O"])
    per_split = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // tiles_o)))
    splits = triton.cdiv(steps, per_split)
    parts = x.new_empty(splits, y.numel(), dtype=torch.float32)
    large = tile["BLOCK_M"] * tile["N_PAD"] > 64
    with on_device(x):
        _product_kernel[(tiles_o, splits)](
            x, A.contiguous(), S.contiguous(), parts, M, o, i // part, x.stride(0), x.stride(1), per_split,
            N=n, UNIT=part, PRECISION=dot_precision(), **tile, num_warps=8 if large else 4,
            **registers(255 if large else 168),
            num_stages=1,  # what is loaded ahead of the loop would take more shared memory than there is
        )  # fmt: skip
        whole = unit(y.numel())
        _sum_kernel[(triton.cdiv(y.numel(), 512),)](
            parts, None if bias is None else bias.contiguous(), y, y.numel() // whole, n * o, splits,
            UNIT=whole, BLOCK=512,
        )  # fmt: skip
    return y


@_forward.register_fake
def _(x, A, S, bias):
    return x.new_empty(x.shape[0], S.shape[0] * S.shape[1])


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    x, A, S = ctx.saved_tensors
    n, o, i = S.shape
    need_x, need_A, need_S, need_bias = ctx.needs_input_grad
    grad_x = grad @ kronecker_weight(A, S) if need_x else None
    grad_A = grad_S = None
    if need_A or need_S:
        blocks = (grad.mT @ x).view(n, o, n, i)  # the gradient of W: block row, row, block column, column
        grad_A = torch.einsum("aicj,kij->kac", blocks, S) if need_A else None
        grad_S = torch.einsum("aicj,kac->kij", blocks, A) if need_S else None
    return grad_x, grad_A, grad_S, grad.sum(0) if need_bias else None


_forward.register_autograd(_gradients, setup_context=_save)


# --- the public function ----------------------------------------------------------------------------------------------


def phm_linear(x: Tensor, A: Tensor, S: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Return `x @ kronecker_weight(A, S).T + bias`; up to 32 rows of x without building the weight.

    An entry that is infinite makes the same results not finite either way, but the order of the sums decides which are
    infinite and which NaN: one of x meets several entries of A before they are added up, one of S several of A in the
    built weight. Near the largest number of the dtype, a sum may overflow in one of the two orders alone.

    Args:
        x: (..., I), any strides.
        A: (n, n, n).
        S: (n, O/n, I/n).
        bias: (O,), or None for zero.
        backend: "auto" builds the weight beyond 32 rows; below it runs the Triton kernel on CUDA tensors of float32,
            bfloat16 or float16 with n up to 8, and the factored products in PyTorch elsewhere. "triton" insists on the
            kernel, "reference" on the built weight.

    Returns:
        (..., O) in the dtype of x, or in autocast's dtype under `torch.autocast`.

    Raises:
        ValueError: a shape that does not fit, tensors on different devices, an unknown backend, or the "triton" backend
            with more than 32 rows or n above 8.
        TypeError: not a floating-point tensor, tensors of different dtypes, a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Grassucci, Zhang, Comminiello, arXiv 2110.04176.
    """
    x, A, S, bias = autocast(x, A, S, bias)
    check_tensors({"x": x, "A": A, "S": S, "bias": bias}, optional=("bias",))
    if S.dim() != 3 or 0 in S.shape:
        raise ValueError(f"S must have shape (n, O/n, I/n) with sizes of at least 1, got {tuple(S.shape)}")
    n, o, i = S.shape
    check_shape("A", A, (n, n, n), "(n, n, n)")
    check_shape("bias", bias, (n * o,), "(O,)")
    if x.dim() == 0 or x.shape[-1] != n * i:
        raise ValueError(f"x must have shape (..., I) with I = {n * i} as in S, got {tuple(x.shape)}")
    rows = x.numel() // (n * i)
    chosen = choose_backend(backend, x)
    # An exported graph serves any number of rows.
    fits = n <= MAX_N and (backend == "triton" or not torch.compiler.is_exporting()) and rows <= MAX_ROWS
    if backend == "triton" and not fits:
        raise ValueError(f'backend="triton" needs at most {MAX_ROWS} rows and n up to {MAX_N}, got {rows} and n = {n}')
    if chosen == "triton" and fits:
        return _forward(x.reshape(rows, n * i), A, S, bias).view(*x.shape[:-1], n * o)
    if backend == "auto" and not torch.compiler.is_exporting() and rows <= MAX_ROWS:
        return phm_linear_factored(x, A, S, bias)
    return phm_linear_reference(x, A, S, bias)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, in_features: int, out_features: int, n: int, dtype: torch.dtype, built: bool = False) -> Cost:
    """Return the least bytes and flops of a forward pass: x, A, S and bias read once, y written once.

    built: the weight is built first, so that it is written and read too. Raises ValueError if n does not divide both
    sizes.
    """
    if n < 1 or in_features % n or out_features % n:
        raise ValueError(f"n must divide in_features and out_features, got {n} for {in_features} and {out_features}")
    entries = in_features * out_features
    elements = rows * in_features + n**3 + entries // n + out_features + rows * out_features + 2 * entries * built
    mixing = n * entries if built else n * n * rows * in_features
    return Cost(elements * dtype.itemsize, 2 * (rows * entries + mixing))
