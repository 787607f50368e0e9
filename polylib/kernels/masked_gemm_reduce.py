r"""Masked products summed along rows: $f_k = \sum_i D_{ki}\,(X\Delta)_{ki}$, and the adjoint $X^\top(D \circ r1^\top)$.

Source: Bai, Gautam, Sojoudi, "Efficient Global Optimization of Two-layer ReLU Networks", arXiv 2201.01965. There a
column of the mask D is an activation pattern, which samples a neuron lets through, and f is the output of the convex
program; its solvers need f and the adjoint, the gradient of $\sum_k r_k f_k$ by $\Delta$, at every step.

Shapes: x (n, d), delta (d, P), the mask (n, P), f and r (n,). Kernels: float32, bfloat16, float16, one dtype for all,
accumulated in float32; the mask has one bit an entry, in words (n, L) of int32 with L = ceil(P / 32) from `pack_mask`:
bit b of word j, counted from the lowest, is the entry of column 32 j + b. Reference: any floating dtype.

Eager PyTorch writes $X\Delta$, n P numbers, to read it twice more: with small d it waits for memory. The kernel makes a
tile of the product in registers, puts the mask on it, and keeps a sum for every row; neither the product nor the mask
as numbers is ever in memory. Where there are few rows the columns are split among programs, and their sums added in a
fixed order. The adjoint puts mask and r on the operand as it is loaded, and splits the rows alike.

The same f is $\sum_j X_{kj}\,(D\Delta^\top)_{kj}$, which needs no n P numbers but the mask: so the reference has it.

A gradient by delta, or by r, is the other of the two operations, on the same words: nothing but the inputs is saved,
and they can be differentiated any number of times. The gradient by x, $r1^\top \circ (D\Delta^\top)$, comes from
PyTorch, with the mask written out as numbers; a solver does not ask for it.
"""

from __future__ import annotations

from typing import Any

import torch
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
    narrow,
    on_device,
    registers,
    row_bucket,
    store,
    tl,
    triton,
    unit,
)
from polylib.kernels._cost import Cost
from polylib.kernels.binary_linear import WORD, pack_signs, unpack_signs

# --- the definition ---------------------------------------------------------------------------------------------------


def masked_gemm_reduce_reference(x: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """Return `(mask * (x @ delta)).sum(1)`, (n,), in plain PyTorch, without writing the product.

    x (n, d), delta (d, P), mask (n, P) of booleans or of zeros and ones in the dtype of x, or words (n, L) of int32.
    Any floating dtype and device; differentiable any number of times. PyTorch itself checks the arguments.
    """
    return (x * (_numbers(mask, delta.shape[1], x) @ delta.mT)).sum(1)


def masked_gemm_adjoint_reference(x: Tensor, r: Tensor, mask: Tensor, columns: int) -> Tensor:
    """Return `x.mT @ (mask * r[:, None])`, (d, P), in plain PyTorch; x (n, d), r (n,), mask as above, columns P."""
    return x.mT @ (_numbers(mask, columns, x) * r[:, None])


def _numbers(mask: Tensor, columns: int, like: Tensor) -> Tensor:
    """The mask (n, P) as zeros and ones in the dtype of `like`."""
    if mask.dtype == torch.int32:
        mask = unpack_signs(mask, columns, torch.int8) > 0
    return mask.to(like.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# (rows, columns, warps, stages) of a tile, apart for products on tensor cores in 16 bits ("half") and in tf32, and
# exact in float32 ("ieee"). The first of each is chosen where nothing is tuned. On tensor cores that of the adjoint
# has a row for each thread: with fewer rows every thread reads a word and a number of r for each entry. In tf32 the
# operands are turned on their way through registers, and so not copied ahead of the loop (one stage).


def _tiles(kinds: dict[str, list[tuple[int, int, int, int]]]) -> list[tuple[dict[str, Any], int, int]]:
    return [
        ({"ROWS": rows, "COLUMNS": columns, "KIND": kind}, warps, stages)
        for kind, sizes in kinds.items()
        for rows, columns, warps, stages in sizes
    ]


def _suits(tile: dict[str, Any], arguments: dict[str, Any]) -> bool:
    return tile["KIND"] == (arguments["PRECISION"] if arguments["x"].dtype == torch.float32 else "half")


_REDUCE = _tiles(
    {
        "half": [(64, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 3)],
        "tf32": [(64, 64, 4, 1), (128, 64, 8, 1)],
        "ieee": [(32, 64, 4, 2), (64, 64, 8, 2)],
    }
)
_ADJOINT = _tiles(
    {
        "half": [(128, 64, 4, 2), (64, 64, 4, 2)],
        "tf32": [(128, 64, 4, 1)],
        "ieee": [(32, 64, 4, 2), (64, 64, 8, 2)],
    }
)
_KEY = ["width", "columns", "bucket", "PRECISION", "UNIT", "COLUMN_UNIT"]
_PART = 128  # columns and rows that are never split: a multiple of those of every tile


@triton.jit
def _gates(words, row_ok, word, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1.0 and 0.0 (ROWS, COLUMNS), from the word `word` on of the rows that `words` (ROWS,) points to."""
    place = tl.arange(0, COLUMNS)[None, :]
    chosen = tl.zeros((ROWS, COLUMNS), tl.int32)
    for part in tl.static_range(COLUMNS // 32):
        each = tl.load(words + word + part, mask=row_ok & (word + part < length), other=0)
        chosen = tl.where(place // 32 == part, each[:, None], chosen)
    return tl.where((chosen & (1 << (place % 32))) != 0, 1.0, 0.0)


@autotune(_REDUCE, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["rows", "width", "columns", "length", "part", "bucket"])
def _reduce_kernel(
    x, delta, words, partial, rows, width, columns, length, part, bucket,
    UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    WHOLE: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    width, columns = width * UNIT, columns * COLUMN_UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    first = split * part * PART
    column, k = tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    row_ok = row < rows
    x += row[:, None] * width + k[None, :]
    delta += k[:, None].to(tl.int64) * columns + column
    if WHOLE:  # a row of x is one tile, and stays
        a = tl.load(x, mask=row_ok[:, None] & (k[None, :] < width), other=0.0)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    # excerpt: begin
    for start in range(first, tl.minimum(first + part * PART, columns), COLUMNS):
        ok = column < columns - start
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        if WHOLE:
            b = tl.load(delta + start, mask=ok & (k[:, None] < width), other=0.0)
            product = dot(a, b, product, PRECISION)
        else:
            for k0 in range(0, width, DEPTH):
                a = tl.load(x + k0, mask=row_ok[:, None] & (k[None, :] < width - k0), other=0.0)
                at = delta + start + tl.cast(columns, tl.int64) * k0
                b = tl.load(at, mask=ok & (k[:, None] < width - k0), other=0.0)
                product = dot(a, b, product, PRECISION)
        sums += _gates(words + row * length, row_ok, start // 32, length, ROWS, COLUMNS) * product
    # excerpt: end
    store(partial + split.to(tl.int64) * rows + row, tl.sum(sums, axis=1), row_ok)


@autotune(_ADJOINT, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["rows", "width", "columns", "length", "part", "bucket"])
def _adjoint_kernel(
    x, r, words, out, rows, width, columns, length, part, bucket,
    UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    width, columns = width * UNIT, columns * COLUMN_UNIT
    tiles = tl.cdiv(width, DEPTH)
    first = (tl.program_id(0) // tiles) * COLUMNS
    k = (tl.program_id(0) % tiles) * DEPTH + tl.arange(0, DEPTH)[None, :]
    split = tl.program_id(1).to(tl.int64)
    start = split * part * PART
    stop = tl.minimum(start + part * PART, rows)
    row = start + tl.arange(0, ROWS)
    sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for _ in range(start, stop, ROWS):
        ok = row < stop
        a = tl.load(x + row[:, None] * width + k, mask=ok[:, None] & (k < width), other=0.0)
        gates = _gates(words + row * length, ok, first // 32, length, ROWS, COLUMNS)
        masked = narrow(gates * load(r + row, ok)[:, None], a.dtype)
        sums = dot(tl.trans(masked), a, sums, PRECISION)
        row += ROWS
    column = first + tl.arange(0, COLUMNS)[:, None]
    at = out + (split * width + k) * columns + column
    store(at, sums, (column < columns) & (k < width))


# --- registration -----------------------------------------------------------------------------------------------------


def _depth(width: int, most: int) -> int:
    """How much of a row of x is loaded at once: all of it, if that is no more than `most`."""
    return min(max(triton.next_power_of_2(width), 16), most)


def _parts(size: int, programs: int) -> tuple[int, int]:
    """How many parts what is summed is split into, and the size of each in multiples of _PART, so that there are up to
    512 programs, which fill a large GPU. Only the shape decides: the order of a sum is the same on every device.
    """
    parts = max(1, min(triton.cdiv(size, 2 * _PART), 512 // programs))
    each = triton.cdiv(triton.cdiv(size, parts), _PART)
    return triton.cdiv(size, each * _PART), each


@torch.library.custom_op("polylib::masked_gemm_reduce", mutates_args=())
def _reduce(x: Tensor, delta: Tensor, words: Tensor) -> Tensor:
    """Return f (n,); x (n, d), delta (d, P) and words (n, L) have any strides."""
    x, delta, words = x.contiguous(), delta.contiguous(), words.contiguous()
    (n, d), P = x.shape, delta.shape[1]
    if n == 0 or d == 0 or P == 0:
        return x.new_zeros(n)
    precision = dot_precision()
    depth = _depth(d, 32 if d > 64 or (x.dtype == torch.float32 and precision == "ieee") else 64)
    splits, part = _parts(P, triton.cdiv(n, 64))
    partial = x.new_empty(splits, n, dtype=x.dtype if splits == 1 else torch.float32)
    units = {"UNIT": unit(d), "COLUMN_UNIT": unit(P), "PART": _PART}
    with on_device(x):
        _reduce_kernel[lambda meta: (triton.cdiv(n, meta["ROWS"]), splits)](
            x, delta, words, partial, n, d // units["UNIT"], P // units["COLUMN_UNIT"], words.shape[1], part,
            row_bucket(n), **units, PRECISION=precision, WHOLE=d <= depth, DEPTH=depth,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0).to(x.dtype)


@_reduce.register_fake
def _(x, delta, words):
    return x.new_empty(x.shape[0])


@torch.library.custom_op("polylib::masked_gemm_adjoint", mutates_args=())
def _adjoint(x: Tensor, r: Tensor, words: Tensor, columns: int) -> Tensor:
    """Return X^T (D * r) (d, P); x (n, d), r (n,) and words (n, L) have any strides."""
    x, r, words = x.contiguous(), r.contiguous(), words.contiguous()
    (n, d), P = x.shape, columns
    if n == 0 or d == 0 or P == 0:
        return x.new_zeros(d, P)
    depth = _depth(d, 64)
    splits, part = _parts(n, triton.cdiv(P, 64) * triton.cdiv(d, depth))
    out = x.new_empty(splits, d, P, dtype=x.dtype if splits == 1 else torch.float32)
    units = {"UNIT": unit(d), "COLUMN_UNIT": unit(P), "PART": _PART}
    precision = dot_precision()
    free = registers(255) if x.dtype == torch.float32 and precision == "tf32" else {}  # or it spills on Blackwell
    with on_device(x):
        _adjoint_kernel[lambda meta: (triton.cdiv(P, meta["COLUMNS"]) * triton.cdiv(d, depth), splits)](
            x, r, words, out, n, d // units["UNIT"], P // units["COLUMN_UNIT"], words.shape[1], part,
            row_bucket(n), **units, PRECISION=precision, DEPTH=depth, **free,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


@_adjoint.register_fake
def _(x, r, words, columns):
    return x.new_empty(x.shape[1], columns)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _by_x(r: Tensor, delta: Tensor, words: Tensor) -> Tensor:
    return r[:, None] * (_numbers(words, delta.shape[1], r) @ delta.mT)


def _reduce_gradients(ctx: Any, grad: Tensor) -> tuple:
    x, delta, words = ctx.saved_tensors
    by_x, by_delta, _ = ctx.needs_input_grad
    return (
        _by_x(grad, delta, words) if by_x else None,
        _adjoint(x, grad, words, delta.shape[1]) if by_delta else None,
        None,
    )


def _adjoint_gradients(ctx: Any, grad: Tensor) -> tuple:
    x, r, words = ctx.saved_tensors
    by_x, by_r, _, _ = ctx.needs_input_grad
    return (
        _by_x(r, grad, words) if by_x else None,
        _reduce(x, grad, words) if by_r else None,
        None,
        None,
    )


_reduce.register_autograd(_reduce_gradients, setup_context=_save)
_adjoint.register_autograd(_adjoint_gradients, setup_context=_save)


# --- the public functions ---------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Return a mask of booleans, (n, P), as words of int32, (n, ceil(P / 32)), one bit an entry.

    The words are 8 times smaller than the booleans; pack a mask once, and use it at every step.

    Raises:
        ValueError: another shape, an unknown backend.
        TypeError: not a tensor of booleans.
        RuntimeError: the "triton" backend was asked for and can't run here.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of torch.bool, got {given}")
    _checks.shape("mask", mask, "(n, P)", mask.dim() == 2)
    if mask.shape[1] == 0:
        return mask.new_empty(mask.shape, dtype=torch.int32)
    return pack_signs(mask.half() - 0.5, backend=backend)


def masked_gemm_reduce(x: Tensor, delta: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Return `(mask * (x @ delta)).sum(1)`.

    Args:
        x: (n, d), any strides.
        delta: (d, P), any strides.
        mask: (n, P) of booleans, or its words (n, ceil(P / 32)) from `pack_mask`, which is what the kernels read.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. Float32 is multiplied exactly, unless
            `torch.set_float32_matmul_precision` allows tf32.

    Returns:
        (n,) in the dtype of x, or in autocast's dtype under `torch.autocast`.

    Raises:
        ValueError: a shape that does not fit, tensors on different devices, an unknown backend.
        TypeError: not a floating-point tensor, tensors of different dtypes, a mask of another dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Bai and others, "Efficient Global Optimization of Two-layer ReLU Networks", arXiv 2201.01965.
    """
    x, delta = autocast(x, delta)
    check_tensors({"x": x, "delta": delta})
    _checks.shape("x", x, "(n, d)", x.dim() == 2)
    fits = delta.dim() == 2 and delta.shape[0] == x.shape[1]
    _checks.shape("delta", delta, f"(d, P) with d = {x.shape[1]} as in x", fits)
    _check_mask(mask, x, delta.shape[1])
    if choose_backend(backend, x) == "reference":
        return masked_gemm_reduce_reference(x, delta, mask)
    return _reduce(x, delta, mask if mask.dtype == torch.int32 else pack_mask(mask, backend=backend))


def masked_gemm_adjoint(x: Tensor, r: Tensor, mask: Tensor, columns: int, *, backend: str = "auto") -> Tensor:
    """Return `x.mT @ (mask * r[:, None])`, the adjoint of `masked_gemm_reduce`: the gradient of `r @ f` by delta.

    Args:
        x: (n, d), any strides.
        r: (n,).
        mask, backend: as for `masked_gemm_reduce`.
        columns: P, which words alone do not tell.

    Returns:
        (d, P) in the dtype of x, or in autocast's dtype under `torch.autocast`.

    Raises:
        As `masked_gemm_reduce`; ValueError: `columns` that is no integer of at least 0.
    """
    x, r = autocast(x, r)
    check_tensors({"x": x, "r": r})
    _checks.shape("x", x, "(n, d)", x.dim() == 2)
    check_shape("r", r, (x.shape[0],), "(n,)")
    columns = _checks.integer("columns", columns, least=0)
    _check_mask(mask, x, columns)
    if choose_backend(backend, x) == "reference":
        return masked_gemm_adjoint_reference(x, r, mask, columns)
    return _adjoint(x, r, mask if mask.dtype == torch.int32 else pack_mask(mask, backend=backend), columns)


def _check_mask(mask: Tensor, x: Tensor, columns: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.int32):
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of torch.bool, or of torch.int32 from pack_mask, got {given}")
    n, words = x.shape[0], mask.dtype == torch.int32
    check_shape(
        "mask", mask, (n, -(-columns // WORD) if words else columns), "(n, ceil(P / 32))" if words else "(n, P)"
    )
    if mask.device != x.device:
        raise ValueError(f"mask must be on the device of x, {x.device}, got {mask.device}")


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, width: int, columns: int, dtype: torch.dtype) -> Cost:
    """Return the least bytes and flops of either operation, which read and write the same tensors: x, delta, the words
    of the mask, and a number for each row; the products counted alone.
    """
    numbers = rows * width + width * columns + rows
    return Cost(numbers * dtype.itemsize + 4 * rows * -(-columns // WORD), 2 * rows * width * columns)
