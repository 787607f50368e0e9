r"""Rank-one refresh of many inverse covariance factors at once, in place, with the stabiliser in the same passes.

Source: Mozaffari, Li, Zhang, Mehri Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1
Updates", arXiv 2306.01685, with the exact formula of Sherman and Morrison in place of the printed one.

Shapes: factor $J_k$ ($d_k$, $d_k$), symmetric, the inverse of a covariance; statistics $v_k$ ($d_k$,); $m_k$, the
largest magnitude in $J_k$. If $m_k > \varepsilon$, first $J \leftarrow \zeta J + (1-\zeta) I$; then

$$y = Jv,\qquad c = v^\top y,\qquad
  J \leftarrow \frac1\gamma\Bigl(J - \frac{\frac{1-\gamma}\gamma}{1 + \frac{1-\gamma}\gamma c}\,yy^\top\Bigr),\qquad
  m \leftarrow \max_{ij}|J_{ij}|,$$

the inverse of $\gamma A + (1-\gamma) vv^\top$ for $J = A^{-1}$. Kernels: factors and statistics in float32, bfloat16 or
float16, arithmetic in float32. Reference: any floating dtype, half precisions computed in float32.

A model has two factors a layer, and each is small: called one by one, they wait for launches. So all factors lie in
one tensor, the arena, in which rows begin at multiples of 16 entries, and a program works on one tile of one of them.
Three launches do all: products of the tiles, their sums in a fixed order, the update. The factors are symmetric:
tiles on and below the diagonal alone are read, by both passes, and the update writes each to both of its places, since
the product that follows in an optimizer needs the whole matrix. `torch.mv` and `addr_` read all of it twice.

The stabiliser is linear, so that y and c follow from those of the factor as it stands, and no pass is its own. The
largest magnitude is found by the update for the next refresh: nothing waits for the host. Maxima don't depend on the
order in which they are taken, and a NaN is the largest of all.

Nothing is saved and nothing is differentiated: this is the state of an optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import (
    check_shape,
    check_tensors,
    choose_backend,
    load,
    narrow,
    on_device,
    tl,
    triton,
    wide,
    widened,
)
from polylib.kernels._cost import Cost

_ALIGNED = 16  # entries: what a row of the arena begins at a multiple of
_TILE = 64

# --- the arena --------------------------------------------------------------------------------------------------------


def factor_arena(
    sizes: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return one tensor that holds an identity matrix of each of `sizes`, and the matrices, which are views of it.

    What lies between the rows is zero, and must stay so.

    Raises:
        ValueError: a size that is no positive integer.
    """
    sizes = _checked_sizes(sizes)
    arena = torch.zeros(sum(_room(d) for d in sizes), dtype=dtype, device=device)
    factors = factors_of(arena, sizes)
    for factor in factors:
        factor.fill_diagonal_(1.0)
    return arena, factors


def factors_of(arena: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the matrices (d, d) that lie in an arena, one for each of `sizes`, as views."""
    starts = accumulate((_room(d) for d in sizes), initial=0)
    return [arena[at : at + _room(d)].view(d, -1)[:, :d] for at, d in zip(starts, sizes, strict=False)]


def _stride(d: int) -> int:
    """From the beginning of one row of a factor to that of the next."""
    return -(-d // _ALIGNED) * _ALIGNED


def _room(d: int) -> int:
    """The entries of the arena that a factor takes, with what lies between its rows."""
    return d * _stride(d)


# --- the definition ---------------------------------------------------------------------------------------------------


def mkor_refresh_reference(
    arena: Tensor,
    vectors: Tensor,
    largest: Tensor,
    sizes: Sequence[int],
    gamma: float,
    threshold: float,
    zeta: float,
) -> None:
    """Change arena and largest in plain PyTorch, one factor after the other."""
    ratio = (1 - gamma) / gamma
    for k, (factor, v) in enumerate(zip(factors_of(arena, sizes), vectors.split(list(sizes)), strict=True)):
        J, v = widened(factor), widened(v).to(widened(factor).dtype)
        kept = 1 - (1 - zeta) * (largest[k] > threshold).to(J.dtype)
        J = kept * J
        J.diagonal().add_(1 - kept)
        y = J @ v
        J = (J - ratio / (1 + ratio * (v @ y)) * y.outer(y)) / gamma
        factor.copy_(J)
        largest[k] = factor.abs().max()


# --- the kernels ------------------------------------------------------------------------------------------------------
# A line of the table is one tile: the number k of its factor, its row i and its column j of tiles, d, the width of a
# row of the arena and the start of the factor in it (both in units of 16 entries), the start of v, the tiles along a
# side, and the tiles along the sides of the factors before, and their squares.


@triton.jit
def _line(table):
    """The numbers of this program's tile."""
    at = table + tl.program_id(0).to(tl.int64) * 10
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4).to(tl.int64) * 16,
        tl.load(at + 5).to(tl.int64) * 16, tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
    )  # fmt: skip


@triton.jit
def _entries(at, width, d, row, column):
    """The tile of the factor at `at` that has these rows and columns, in float32; zero outside of the factor."""
    # What lies behind a row is read with it, so that 16 neighbours exist or don't exist as one: the reads are wide.
    a = load(at + row.to(tl.int64)[:, None] * width + column[None, :], (row < d)[:, None] & (column < width)[None, :])
    return tl.where((column < d)[None, :], a, 0.0)


@triton.jit
def _product_kernel(arena, vectors, table, sums, TILE: tl.constexpr):
    """Of each tile, its part of y in its own rows and, by symmetry, in the rows of its mirror image."""
    _k, i, j, d, width, start, place, side, _before, squares = _line(table)
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    a = _entries(arena + start, width, d, row, column)
    sums += squares.to(tl.int64) * TILE + tl.arange(0, TILE)
    v = load(vectors + place + column, column < d)
    tl.store(sums + (i * side + j) * TILE, tl.sum(a * v[None, :], axis=1))
    if i != j:
        v = load(vectors + place + row, row < d)
        tl.store(sums + (j * side + i) * TILE, tl.sum(a * v[:, None], axis=0))


@triton.jit
def _sum_kernel(vectors, table, sums, largest, y, dots, before_max, TILE: tl.constexpr):
    """One row of tiles: y, its parts of v'y and v'v. The first of a factor also puts aside its largest magnitude."""
    k, i, _j, d, _width, _start, place, side, before, squares = _line(table)
    row = i * TILE + tl.arange(0, TILE)
    sums += (squares.to(tl.int64) + i * side) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for part in range(side):
        total += tl.load(sums + part * TILE)
    v = load(vectors + place + row, row < d)
    tl.store(y + (before + i) * TILE + tl.arange(0, TILE), total)
    tl.store(dots + 2 * (before + i), tl.sum(v * total, axis=0))
    tl.store(dots + 2 * (before + i) + 1, tl.sum(v * v, axis=0))
    if i == 0:
        tl.store(before_max + k, tl.load(largest + k))
        tl.store(largest + k, 0.0)


@triton.jit
def _stabilised(y, vectors, place, d, before, part, at, kept, TILE: tl.constexpr):
    """The part of y that belongs to one row of tiles, after the stabiliser."""
    inner = tl.arange(0, TILE)
    return kept * tl.load(y + (before + part) * TILE + inner) + (1 - kept) * load(vectors + place + at, at < d)


@triton.jit(do_not_specialize=["threshold", "zeta", "ratio", "growth"])
def _update_kernel(
    arena, vectors, table, y, dots, before_max, bits, threshold, zeta, ratio, growth, TILE: tl.constexpr
):
    k, i, j, d, width, start, place, side, before, _squares = _line(table)
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    kept = tl.where(tl.load(before_max + k) > threshold, zeta, 1.0)
    c, square = 0.0, 0.0
    for part in range(side):
        c += tl.load(dots + 2 * (before + part))
        square += tl.load(dots + 2 * (before + part) + 1)
    # excerpt: begin
    kappa = ratio / (1 + ratio * (kept * c + (1 - kept) * square))
    left = _stabilised(y, vectors, place, d, before, i, row, kept, TILE)
    right = _stabilised(y, vectors, place, d, before, j, column, kept, TILE)
    a = _entries(arena + start, width, d, row, column)
    a = kept * a + tl.where(row[:, None] == column[None, :], 1 - kept, 0.0)
    a = growth * (a - kappa * (left[:, None] * right[None, :]))
    inside = (row < d)[:, None] & (column < d)[None, :]
    stored = narrow(tl.where(inside, a, 0.0), arena.dtype.element_ty)
    magnitude = tl.max(tl.max(tl.abs(wide(stored)).to(tl.int32, bitcast=True), axis=1), axis=0)
    tl.atomic_max(bits + k, magnitude)  # exact in any order; as an integer, a NaN is the largest
    at = arena + start + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(at, stored, mask=(row < d)[:, None] & (column < width)[None, :])
    # excerpt: end
    if i != j:  # the same above the diagonal
        at = arena + start + column.to(tl.int64)[:, None] * width + row[None, :]
        tl.store(at, tl.trans(stored), mask=(column < d)[:, None] & (row < width)[None, :])


# --- registration -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tiles on and below the diagonals, and those on the diagonals, a line each (see above)."""
    tiles, rows = [], []
    start = place = before = squares = 0
    for k, d in enumerate(sizes):
        side = -(-d // _TILE)
        same = (d, _stride(d) // _ALIGNED, start // _ALIGNED, place, side, before, squares)
        tiles += [(k, i, j, *same) for i in range(side) for j in range(i + 1)]
        rows += [(k, i, i, *same) for i in range(side)]
        start, place, before, squares = start + d * _stride(d), place + d, before + side, squares + side**2
    tables = [torch.tensor(lines, dtype=torch.int32).to(device) for lines in (tiles, rows)]
    return tables[0], tables[1]


@torch.library.custom_op("polylib::mkor_refresh", mutates_args=("arena", "largest"))
def _refresh(
    arena: Tensor, vectors: Tensor, largest: Tensor, sizes: list[int], gamma: float, threshold: float, zeta: float
) -> None:
    """Change arena and largest (K,) float32, both contiguous; vectors (sum of sizes,), contiguous."""
    if not sizes:
        return
    tiles, rows = _tables(tuple(sizes), arena.device)
    sides = [-(-d // _TILE) for d in sizes]
    new = {"dtype": torch.float32, "device": arena.device}
    sums = torch.empty(sum(side**2 for side in sides) * _TILE, **new)
    y, dots, before = (torch.empty(n, **new) for n in (sum(sides) * _TILE, 2 * sum(sides), len(sizes)))
    with on_device(arena):
        _product_kernel[(len(tiles),)](arena, vectors, tiles, sums, TILE=_TILE)
        _sum_kernel[(len(rows),)](vectors, rows, sums, largest, y, dots, before, TILE=_TILE)
        _update_kernel[(len(tiles),)](
            arena, vectors, tiles, y, dots, before, largest.view(torch.int32), threshold, zeta, (1 - gamma) / gamma,
            1 / gamma, TILE=_TILE,
        )  # fmt: skip


@_refresh.register_fake
def _(arena, vectors, largest, sizes, gamma, threshold, zeta):
    return None


# --- the public function ----------------------------------------------------------------------------------------------


@torch.no_grad()
def mkor_refresh_(
    arena: Tensor,
    vectors: Tensor,
    largest: Tensor,
    sizes: Sequence[int],
    *,
    gamma: float = 0.95,
    threshold: float = math.inf,
    zeta: float = 0.95,
    backend: str = "auto",
) -> None:
    """Refresh all factors in an arena by one statistic each, in place.

    Args:
        arena: from `factor_arena`, with symmetric matrices in it; changed. Float32, bfloat16 or float16 for the
            kernels, any floating dtype for the reference.
        vectors: (sum of sizes,), the statistics one behind the other, any floating dtype.
        largest: (K,) float32, contiguous, the largest magnitude in each factor, 1 at the beginning; changed.
        sizes: the K sizes d of the factors, as `factor_arena` was given them.
        gamma: how much of the covariance is kept, between 0 and 1.
        threshold: a factor with a larger magnitude than this is stabilised first; never by default.
        zeta: how much of a stabilised factor is kept, from 0 to 1; the rest is the identity.
        backend: "auto" runs the Triton kernels for a CUDA arena of one of their dtypes and the reference elsewhere;
            "triton" and "reference" insist.

    Raises:
        ValueError: shapes or devices that don't fit, a tensor that is not contiguous, a number outside its range, an
            unknown backend.
        TypeError: not a floating-point tensor, `largest` of another dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2306.01685, with the formula of Sherman and Morrison for an averaged covariance.
    """
    sizes = _checked_sizes(sizes)
    for name, tensor, length, meaning in (
        ("arena", arena, sum(_room(d) for d in sizes), "(entries of factor_arena(sizes),)"),
        ("vectors", vectors, sum(sizes), "(sum of sizes,)"),
        ("largest", largest, len(sizes), "(K,)"),
    ):
        check_tensors({name: tensor})
        check_shape(name, tensor, (length,), meaning)
        if tensor.device != arena.device:
            raise ValueError(f"{name} must be on the device of arena, {arena.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if largest.dtype != torch.float32:
        raise TypeError(f"largest must have dtype torch.float32, got {largest.dtype}")
    gamma = _checks.number("gamma", gamma, above=0, below=1)
    zeta = _checks.number("zeta", zeta, least=0, most=1)
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold!r}")
    refresh = _refresh if choose_backend(backend, arena) == "triton" else mkor_refresh_reference
    refresh(arena, vectors, largest, sizes, gamma, float(threshold), zeta)


def _checked_sizes(sizes: Sequence[int]) -> list[int]:
    return [_checks.integer(f"sizes[{k}]", d, least=1) for k, d in enumerate(sizes)]


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(sizes: Sequence[int], dtype: torch.dtype) -> Cost:
    """Return the least bytes and flops of a refresh: of each factor a triangle read once and all of it written once."""
    numbers = sum(d * (d + 1) // 2 + d * d for d in sizes)
    return Cost(numbers * dtype.itemsize + 4 * sum(sizes) + 8 * len(sizes), sum(5 * d * d for d in sizes))
