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

The kernel forms u in registers, in the tile of columns that it is about to multiply. Its programs split the outputs,
and in addition the pairs (k, columns) where the outputs alone would not fill the GPU; a second kernel adds the parts
in a fixed order. Saved for backward: x, A and S. Backward is plain PyTorch, with $W$ built: it is not for training.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    on_device,
    tl,
    triton,
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

_BLOCK_O, _BLOCK_I, _PROGRAMS = 32, 64, 256


@triton.jit(do_not_specialize=["M", "per_split"])
def _product_kernel(
    x, A, S, parts, M, height, width, stride_m, stride_i, per_split,
    N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One S[k] is (height, width). Row q = m N + a of the product belongs to row m, block row a."""
    split = tl.program_id(1)
    qs = tl.arange(0, BLOCK_Q)
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    tiles = tl.cdiv(width, BLOCK_I)
    first = split * per_split
    acc = tl.zeros((BLOCK_Q, BLOCK_O), tl.float32)
    x_rows = x + (qs // N)[:, None].to(tl.int64) * stride_m
    for t in range(first, tl.minimum(first + per_split, N * tiles)):
        k, cols = t // tiles, (t % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
        s_at = (k.to(tl.int64) * height + outs[None, :]) * width + cols[:, None]
        s = tl.load(S + s_at, mask=(outs[None, :] < height) & (cols[:, None] < width), other=0.0)
        mixed = tl.zeros((BLOCK_Q, BLOCK_I), tl.float32)
        ok = (qs[:, None] < M * N) & (cols[None, :] < width)
        for c in tl.static_range(N):
            share = tl.load(A + (k * N + qs % N) * N + c).to(tl.float32)
            block = tl.load(x_rows + (c * width + cols)[None, :].to(tl.int64) * stride_i, mask=ok, other=0.0)
            mixed += share[:, None] * block.to(tl.float32)
        acc = dot(mixed.to(s.dtype), s, acc, PRECISION)
    at = (split.to(tl.int64) * M * N + qs[:, None]) * height + outs[None, :]
    tl.store(parts + at, acc, mask=(qs[:, None] < M * N) & (outs[None, :] < height))


@triton.jit(do_not_specialize=["size", "splits"])
def _sum_kernel(parts, bias, y, size, outputs, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    if bias is not None:
        acc += tl.load(bias + at % outputs, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=at < size)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::phm_linear", mutates_args=())
def _forward(x: Tensor, A: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
    """Return y (M, O); x is (M, I) with any strides, M up to 32."""
    M, (n, o, i) = x.shape[0], S.shape
    y = x.new_empty(M, n * o)
    if M == 0:
        return y
    steps, tiles_o = n * triton.cdiv(i, _BLOCK_I), triton.cdiv(o, _BLOCK_O)
    block_q = max(16, triton.next_power_of_2(M * n))
    per_split = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // tiles_o)))
    splits = triton.cdiv(steps, per_split)
    parts = x.new_empty(splits, y.numel(), dtype=torch.float32)
    with on_device(x):
        _product_kernel[(tiles_o, splits)](
            x, A.contiguous(), S.contiguous(), parts, M, o, i, x.stride(0), x.stride(1), per_split,
            N=n, PRECISION=dot_precision(), BLOCK_Q=block_q, BLOCK_O=_BLOCK_O, BLOCK_I=_BLOCK_I,
            num_warps=4 if block_q <= 64 else 8,  # with four, the larger blocks would spill their registers
        )  # fmt: skip
        _sum_kernel[(triton.cdiv(y.numel(), 512),)](
            parts, None if bias is None else bias.contiguous(), y, y.numel(), n * o, splits, BLOCK=512
        )
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
    chosen, fits = choose_backend(backend, x), rows <= MAX_ROWS and n <= MAX_N
    if backend == "triton" and not fits:
        raise ValueError(f'backend="triton" needs at most {MAX_ROWS} rows and n up to {MAX_N}, got {rows} and n = {n}')
    if chosen == "triton" and fits:
        return _forward(x.reshape(rows, n * i), A, S, bias).view(*x.shape[:-1], n * o)
    if backend == "auto" and rows <= MAX_ROWS:
        return phm_linear_factored(x, A, S, bias)
    return phm_linear_reference(x, A, S, bias)


# --- cost and benchmark -----------------------------------------------------------------------------------------------


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


def bench_cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    "built" has the weight ready, as a model that never changes would: the plain product of a real layer. Its gradient
    is that of the built weight alone.
    """
    sizes, dtypes = [(1, 1024, 4), (16, 1024, 4)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(rows, 4096, n) for rows in (1, 8, 32) for n in (2, 4, 8)], [torch.bfloat16]
    for dtype in dtypes:
        for rows, width, n in [(2, 64, 4)] if quick else sizes:
            A = torch.randn(n, n, n, device=device, dtype=dtype) / n**0.5
            S = torch.randn(n, width // n, width // n, device=device, dtype=dtype) / width**0.5
            x, bias = (torch.randn(*lead, width, device=device, dtype=dtype) for lead in ((rows,), ()))
            forward = cost(rows, width, width, n, dtype)
            backward = Cost(2 * forward.bytes, 2 * forward.flops)
            contestants = {
                "reference": (phm_linear_reference, (x, A, S, bias)),
                "factored": (phm_linear_factored, (x, A, S, bias)),
                "built": (F.linear, (x, kronecker_weight(A, S), bias)),
                "ours": (phm_linear, (x, A, S, bias)),
            }
            yield f"{rows}x{width}->{width}, n={n}", dtype, (forward, forward + backward), contestants
