"""What the attention kernels share: tiles of rows of (batch, heads, places, numbers), and how they are cut."""

from __future__ import annotations

from typing import Any

import torch

from polylib.kernels._common import dot, dot_precision, registers, tl, triton

MOST_NUMBERS = 128  # of a place: a tile of places with all of their numbers stays on the chip


@triton.jit
def head_start(pair, HEADS, by_batch, by_head):
    """Return where the rows of one batch element's head start; `pair` counts batch elements and heads."""
    pair = pair.to(tl.int64)
    return pair // HEADS * by_batch + pair % HEADS * by_head


@triton.jit
def load_rows(start, row, ROWS, by_row, COLUMNS, BLOCK: tl.constexpr):
    """Return a tile (row, BLOCK) of neighbouring numbers, 0 where there are none."""
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * by_row + column[None, :]
    return tl.load(start + at, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def scores(rows, columns, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """Return all products of a row and a column, (rows, columns), both given as rows.

    TURNED forms the transpose: then `rows`, where it stays the same in a loop, is read again from shared memory. As the
    first factor of a product without matrix units it would be kept in registers, more than there are.
    """
    if TURNED:
        zero = tl.zeros((columns.shape[0], rows.shape[0]), tl.float32)
        return tl.trans(dot(columns, tl.trans(rows), zero, PRECISION))
    return dot(rows, tl.trans(columns), tl.zeros((rows.shape[0], columns.shape[0]), tl.float32), PRECISION)


def block_of(numbers: int) -> int:
    """Return the width of a tile that holds so many numbers: a power of two that tensor cores can multiply."""
    return max(triton.next_power_of_2(numbers), 16)


def attention_tile(value: torch.Tensor, widest: int, causal: bool) -> dict[str, Any]:
    """Return launch options but for widths: exact float32 products, made without matrix units, have smaller tiles."""
    exact = value.dtype == torch.float32
    return {
        "CAUSAL": causal, "BLOCK_I": 32 if exact else 64, "BLOCK_J": 16 if exact else 32, "EXACT": exact,
        "PRECISION": dot_precision(), "num_warps": 8 if exact or widest > 64 else 4, "num_stages": 1 if exact else 2,
    } | registers(255)  # fmt: skip


def head_steps(*tensors: torch.Tensor) -> list[int]:
    """Return, of each tensor in turn, the steps in memory between batch elements, heads and places."""
    return [step for t in tensors for step in t.stride()[:3]]


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy, so that the numbers of a place are neighbours in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
