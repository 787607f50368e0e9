r"""A product with a Monarch matrix: two block-diagonal matrices with a transposition between them.

Source: Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", arXiv 2310.12109. The order of the
output is that of the authors' public code.

Shapes: x (R, n) is read as (R, k, p), w1 (k, q, p), w2 (l, s, r) with kq = lr, y (R, m) with m = ls.

$$a_{kq}=\sum_pW^1_{kqp}\,x_{kp},\qquad h_{lr}=a_{(r\,l_{\max}+l)},\qquad y_{(s\,l_{\max}+l)}=\sum_rW^2_{lsr}\,h_{lr}.$$

The k blocks of w1 act on neighbours; then the q results of each block are numbered through, and dealt out one by one to
the l blocks of w2, of which the outputs are interleaved. With q = l, and so k = r, the middle is a plain transposition.
For k = p = q = l = s = r = $\sqrt n$ this is the classic Monarch matrix of $2n^{3/2}$ numbers in place of $n^2$.

In plain PyTorch the two products are batched, each with a copy before or after it that only moves numbers: eight
passes over memory. Here a program has some rows and 16 of the blocks of w2. It forms all that enters these blocks, from
all blocks of w1, turns it round on the chip, multiplies, and writes: x is read (again from the cache for other blocks)
and y written. The middle is rounded to the dtype of x, as it is between two products.

The transposed matrix has the same form, with both pairs of sizes exchanged, so that the gradient of x is the same
kernel with other strides. A gradient of a weight is, for each block, a sum over the rows of products of two vectors:
of the middle, which is formed again, with the gradient of y, or of the middle of the transposed product with x. Rows
are shared out among programs, whose sums in float32 are added up in a fixed order. Nothing is saved but x.

The kernels have q = l with k, l up to 64, of any other sizes; then a row's share of the middle fits into registers.
Few and large blocks are matrix products that a library does as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    autocast,
    check_tensors,
    choose_backend,
    dot,
    dot_precision,
    narrow,
    no_double_backward,
    on_device,
    store,
    tl,
    triton,
)
from polylib.kernels._cost import Cost

_MOST_BLOCKS = 64
_PROGRAMS = 264  # of a sum over rows: two for each multiprocessor of a large GPU

# --- the definition ---------------------------------------------------------------------------------------------------


def monarch_multiply_reference(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return (..., l s) in plain PyTorch, for complex numbers too."""
    rows, (k, _, p), (lanes, s, r) = x.shape[:-1], w1.shape, w2.shape
    a = torch.einsum("...kp,kqp->...kq", x.reshape(*rows, k, p), w1)
    h = a.reshape(*rows, r, lanes)
    return torch.einsum("...rl,lsr->...sl", h, w2).reshape(*rows, s * lanes)


# --- the kernels ------------------------------------------------------------------------------------------------------
# Both have the transposed product, too. Names of the axes: i the blocks of the first factor, j what it sums over; c the
# blocks of the second, o its results. x is (R, i, j), the first factor (i, c, j), the second (c, o, i), y is (R, c, o).


@triton.jit
def _middle(
    x, first, row, i, c, R, NI, NC, NJ, x_row, x_i, x_j, f_i, f_c, f_j,
    BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the results of the first factor, (i, row, c), rounded to the dtype of x."""
    acc = tl.zeros((i.shape[0], row.shape[0], c.shape[0]), tl.float32)
    for start in range(0, NJ, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        from_x = row.to(tl.int64)[None, :, None] * x_row + i[:, None, None] * x_i + j[None, None, :] * x_j
        from_first = i[:, None, None] * f_i + c[None, None, :] * f_c + j[None, :, None] * f_j
        ok = (i < NI)[:, None, None] & (j < NJ)[None, None, :] & (row < R)[None, :, None]
        values = tl.load(x + from_x, mask=ok, other=0.0)
        ok = (i < NI)[:, None, None] & (j < NJ)[None, :, None] & (c < NC)[None, None, :]
        weights = tl.load(first + from_first, mask=ok, other=0.0)
        acc = dot(values, weights, acc, PRECISION)
    return narrow(acc, x.dtype.element_ty)


@triton.jit(do_not_specialize=["R"])
def _multiply_kernel(
    x, first, second, y, R, NI, NC, NJ, NO, x_row, x_i, x_j, f_i, f_c, f_j, s_c, s_o, s_i, y_row, y_c, y_o,
    BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_I)
    # excerpt: begin
    a = _middle(x, first, row, i, c, R, NI, NC, NJ, x_row, x_i, x_j, f_i, f_c, f_j, BLOCK_J, PRECISION)
    h = tl.permute(a, (2, 1, 0))  # (c, row, i): the only time that the numbers move
    for start in range(0, NO, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        at = c[:, None, None] * s_c + i[None, :, None] * s_i + o[None, None, :] * s_o
        ok = (c < NC)[:, None, None] & (i < NI)[None, :, None] & (o < NO)[None, None, :]
        weights = tl.load(second + at, mask=ok, other=0.0)
        acc = dot(h, weights, tl.zeros((BLOCK_C, BLOCK_R, BLOCK_O), tl.float32), PRECISION)
        at = row.to(tl.int64)[None, :, None] * y_row + c[:, None, None] * y_c + o[None, None, :] * y_o
        ok = (c < NC)[:, None, None] & (row < R)[None, :, None] & (o < NO)[None, None, :]
        store(y + at, acc, ok)
    # excerpt: end


@triton.jit(do_not_specialize=["R", "per_split"])
def _weight_kernel(
    x, first, grad, parts, R, NI, NC, NJ, NO, x_row, x_i, x_j, f_i, f_c, f_j, g_row, g_c, g_o, per_split,
    BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program's part of the gradient of the second factor, (c, o, i): a sum over its rows."""
    split = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_C, BLOCK_O, BLOCK_I), tl.float32)
    for step in range(per_split):
        row = (split * per_split + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        a = _middle(x, first, row, i, c, R, NI, NC, NJ, x_row, x_i, x_j, f_i, f_c, f_j, BLOCK_J, PRECISION)
        at = row[None, None, :] * g_row + c[:, None, None] * g_c + o[None, :, None] * g_o
        ok = (c < NC)[:, None, None] & (row < R)[None, None, :] & (o < NO)[None, :, None]
        acc = dot(tl.load(grad + at, mask=ok, other=0.0), tl.permute(a, (2, 1, 0)), acc, PRECISION)
    at = (split * NC + c[:, None, None]) * NO * NI + o[None, :, None] * NI + i[None, None, :]
    ok = (c < NC)[:, None, None] & (o < NO)[None, :, None] & (i < NI)[None, None, :]
    tl.store(parts + at, acc, mask=ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _tile(blocks: int, x: Tensor, sums: int) -> dict[str, Any]:
    """Return the launch options for a first factor of so many blocks: `sums` tiles stay in registers at once.

    A share of the middle has 256 numbers a block, 64 a thread; half as many in float32.
    """
    wide, exact = max(triton.next_power_of_2(blocks), 16), x.dtype == torch.float32
    crowded = sums == 2 and wide == 64  # a block has as many threads as it may have: tiles are smaller instead
    return {
        "BLOCK_I": wide, "BLOCK_R": 16, "BLOCK_J": 16,
        "BLOCK_C": 8 if exact or crowded else 16, "BLOCK_O": 8 if exact and crowded else 16,
        "PRECISION": dot_precision(), "num_warps": wide // 8 * sums, "num_stages": 1,
    }  # fmt: skip


def _strides(w1: Tensor, w2: Tensor, transposed: bool) -> tuple[tuple, tuple, tuple, tuple, tuple]:
    """Return the sizes (I, C, J, O), and the strides of x, the first factor, the second and y, by the kernels' axes."""
    (k, q, p), s = w1.shape, w2.shape[1]
    by_first, by_second = (k, q, p, s), (q, k, s, p)
    w1_forward, w2_forward = (q * p, p, 1), (s * k, k, 1)
    if not transposed:
        return by_first, (k * p, p, 1), w1_forward, w2_forward, (q * s, 1, q)
    return by_second, (q * s, 1, q), (s * k, 1, k), (q * p, 1, p), (k * p, p, 1)


def _product(x: Tensor, w1: Tensor, w2: Tensor, transposed: bool) -> Tensor:
    """Return the rows of x times the Monarch matrix or its transpose; all tensors contiguous."""
    sizes, of_x, of_first, of_second, of_y = _strides(w1, w2, transposed)
    first, second = (w2, w1) if transposed else (w1, w2)
    y = x.new_empty(x.shape[0], sizes[1] * sizes[3])
    tile = _tile(sizes[0], x, 1)
    grid = (triton.cdiv(len(x), tile["BLOCK_R"]), triton.cdiv(sizes[1], tile["BLOCK_C"]))
    if len(x):
        with on_device(x):
            _multiply_kernel[grid](
                x, first, second, y, len(x), *sizes, *of_x, *of_first, *of_second, *of_y, **tile
            )  # fmt: skip
    return y


def _second_gradient(x: Tensor, grad: Tensor, w1: Tensor, w2: Tensor, transposed: bool) -> Tensor:
    """Return the gradient of the second factor, in float32; of the transposed product that is w1, as (k, p, q)."""
    sizes, of_x, of_first, _, of_y = _strides(w1, w2, transposed)
    blocks, NC, _, NO = sizes
    tile = _tile(blocks, x, 2)
    groups = triton.cdiv(NC, tile["BLOCK_C"]), triton.cdiv(NO, tile["BLOCK_O"])
    steps = max(triton.cdiv(len(x), tile["BLOCK_R"]), 1)
    per_split = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // (groups[0] * groups[1]))))
    splits = triton.cdiv(steps, per_split)
    parts = x.new_empty(splits, NC, NO, blocks, dtype=torch.float32)
    with on_device(x):
        _weight_kernel[(splits, *groups)](
            x, w2 if transposed else w1, grad, parts, len(x), *sizes, *of_x, *of_first, *of_y, per_split, **tile
        )  # fmt: skip
    return parts.sum(0)


@torch.library.custom_op("polylib::monarch_multiply", mutates_args=())
def _forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Return y (R, l s); x (R, k p), w1 (k, l, p), w2 (l, s, k)."""
    return _product(x.contiguous(), w1.contiguous(), w2.contiguous(), False)


@_forward.register_fake
def _(x, w1, w2):
    return x.new_empty(x.shape[0], w2.shape[0] * w2.shape[1])


@torch.library.custom_op("polylib::monarch_multiply_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, w1 and w2."""
    grad, x, w1, w2 = (t.contiguous() for t in (grad, x, w1, w2))
    by_w2 = _second_gradient(x, grad, w1, w2, False)
    by_w1 = _second_gradient(grad, x, w1, w2, True).mT.contiguous()
    return _product(grad, w1, w2, True), by_w1.to(w1.dtype), by_w2.to(w2.dtype)


@_backward.register_fake
def _(grad, x, w1, w2):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w1, w2))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("monarch_multiply"))


# --- the public function ----------------------------------------------------------------------------------------------


def monarch_multiply(x: Tensor, w1: Tensor, w2: Tensor, *, backend: str = "auto") -> Tensor:
    """Return each row of x times the Monarch matrix of two block-diagonal factors.

    Args:
        x: (..., k p), any strides.
        w1: (k, q, p), the k blocks of the first factor, each from p numbers to q.
        w2: (l, s, r), the l blocks of the second, each from r numbers to s, with l r = k q.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16 where q = l and k and
            l are at most 64, and the reference elsewhere and under `torch.func`; "triton" and "reference" insist. The
            kernels can be differentiated once.

    Returns:
        (..., l s), of which the entry s l + l' is that of row s of block l'; in the dtype of x, or in autocast's under
        `torch.autocast`.

    Raises:
        ValueError: sizes or devices that don't fit, an unknown backend, or the kernels asked for other blocks than they
            have.
        TypeError: tensors of different dtypes, or neither floating-point nor complex; complex ones with the kernels.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2310.12109.
    """
    x, w1, w2 = autocast(x, w1, w2)
    if all(isinstance(t, Tensor) and t.is_complex() for t in (x, w1, w2)):
        check_tensors({"x": x.real, "w1": w1.real, "w2": w2.real})
    else:
        check_tensors({"x": x, "w1": w1, "w2": w2})
    for name, w, meaning in (("w1", w1, "(k, q, p)"), ("w2", w2, "(l, s, r)")):
        if w.dim() != 3 or 0 in w.shape:
            raise ValueError(f"{name} must have shape {meaning} with sizes of at least 1, got {tuple(w.shape)}")
    (k, q, p), (lanes, s, r) = w1.shape, w2.shape
    if lanes * r != k * q:
        raise ValueError(f"w2 must have shape (l, s, r) with l r = k q = {k * q} as in w1, got {tuple(w2.shape)}")
    if x.dim() == 0 or x.shape[-1] != k * p:
        raise ValueError(f"x must have shape (..., k p) with k p = {k * p} as in w1, got {tuple(x.shape)}")
    chosen = choose_backend(backend, x)
    fits = q == lanes and max(k, q) <= _MOST_BLOCKS
    if backend == "triton" and not fits:
        raise ValueError(
            f'backend="triton" needs q = l, and k and l of at most {_MOST_BLOCKS}, got w1 of {tuple(w1.shape)} and w2 '
            f"of {tuple(w2.shape)}"
        )
    if chosen == "triton" and fits:
        return _forward(x.reshape(-1, k * p), w1, w2).view(*x.shape[:-1], lanes * s)
    return monarch_multiply_reference(x, w1, w2)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(
    rows: int, k: int, q: int, p: int, lanes: int, s: int, r: int, dtype: torch.dtype, *, backward: bool = False
) -> Cost:
    """Return the least bytes and flops: x and both factors read, y written; with `backward`, all three gradients.

    Backward reads x, the gradient of y and both factors, and writes the gradients of x and of both factors. Its flops
    are those of the middle, which is formed again, and of two products for each factor.
    """
    weights, products = k * q * p + lanes * s * r, 2 * rows * (k * q * p + lanes * s * r)
    if not backward:
        return Cost((rows * (k * p + lanes * s) + weights) * dtype.itemsize, products)
    flops = 2 * products + 2 * rows * k * q * p
    return Cost((rows * (2 * k * p + lanes * s) + 2 * weights) * dtype.itemsize, flops)
