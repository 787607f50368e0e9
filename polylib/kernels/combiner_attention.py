r"""Attention to near places one by one, and to far ones through the summaries of their blocks.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv 2107.05768; pattern
"Fixed". The kernels and their derivative are derived here.

Shapes: q and k (B, H, L, d), v (B, H, L, e); the L places are cut into blocks of `span` = s, so that L = N s. The
summaries of block r, with maxima taken number by number:

$$\bar q_r=\max_{j\in r}q_j,\quad\bar k_r=\max_{j\in r}k_j,\quad
\bar v_r=\sum_{j\in r}p_jv_j,\quad p=\mathrm{softmax}_{j\in r}(\bar q_r\cdot k_j/\sqrt d).$$

A query then has one softmax over the places of its own block, up to itself where causal, and over the summaries of all
earlier blocks (where not causal, of all others): s + L / s scores in place of L. Every place keeps a weight, but those
of a far block are in the same proportions for all queries.

In plain PyTorch the scores of (L, s + N) are written and read several times, and the blocks copied. Here a first kernel
reads each block, its keys twice, and writes its summaries; a second is flash attention over two lists of keys, those of
the blocks that its queries lie in and the summaries. Saved are the inputs, the summaries, the result and the logarithm
of the sum of each softmax.

The derivative has four steps: gradients by queries; by places as keys; by summaries as keys, which all later queries
have seen; then through the summaries to the places. A maximum passes its gradient on to those that attain it, in equal
parts. No atomic additions. For d and e up to 128, any span.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from polylib.kernels._attention import (
    MOST_NUMBERS,
    attention_tile,
    block_of,
    by_rows,
    head_start,
    head_steps,
    load_rows,
    scores,
)
from polylib.kernels._common import (
    autocast,
    check_shape,
    check_tensors,
    choose_backend,
    dot,
    narrow,
    no_double_backward,
    on_device,
    store,
    tl,
    triton,
    wide,
    widened,
)
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def combiner_attention_reference(query: Tensor, key: Tensor, value: Tensor, span: int, causal: bool = True) -> Tensor:
    """Return (B, H, L, e), in at least float32, by forming the scores of each query in its block and of summaries."""
    q, k, v = (widened(t).unflatten(-2, (-1, span)) for t in (query, key, value))
    blocks, scale = q.shape[-3], 1 / math.sqrt(query.shape[-1])
    key_summary = k.amax(-2)
    within = (q.amax(-2, keepdim=True) @ k.mT * scale).softmax(-1)
    value_summary = (within @ v).squeeze(-2)
    near = q @ k.mT * scale
    far = q @ key_summary.unsqueeze(-3).mT * scale  # (B, H, N, s, N)
    if causal:
        near = near.masked_fill(near.new_ones(span, span, dtype=torch.bool).triu(1), -math.inf)
    unseen = far.new_ones(blocks, blocks, dtype=torch.bool)
    unseen = unseen.triu() if causal else unseen.tril().triu()
    far = far.masked_fill(unseen[:, None], -math.inf)
    weights = torch.cat([near, far], -1).softmax(-1)
    out = weights[..., :span] @ v + weights[..., span:] @ value_summary.unsqueeze(-3)
    return out.flatten(-3, -2).to(value.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# i counts queries, j keys: places first, then summaries. Scores are in units of ln 2 = 0.693...: SCALE holds that.


@triton.jit
def _seen(i, j, L, KEYS, SPAN, CAUSAL: tl.constexpr, FAR: tl.constexpr):
    """Tell which keys a query sees, (i, j): those of its block, or, if FAR, the summaries of others."""
    ok = (i < L)[:, None] & (j < KEYS)[None, :]
    own = (i // SPAN)[:, None]
    if FAR:
        return ok & (j[None, :] < own) if CAUSAL else ok & (j[None, :] != own)
    ok = ok & ((j // SPAN)[None, :] == own)
    return ok & (j[None, :] <= i[:, None]) if CAUSAL else ok


@triton.jit
def _keys_of(first, L, SPAN, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, FAR: tl.constexpr):
    """Return the first key that BLOCK queries from `first` on see, and the end of those they see."""
    last = tl.minimum(first + BLOCK, L) - 1
    if FAR:
        return 0, (last // SPAN if CAUSAL else L // SPAN)
    return first // SPAN * SPAN, (last + 1 if CAUSAL else (last // SPAN + 1) * SPAN)


@triton.jit
def _attend(
    acc, norm, most, q, keys, values, first, L, KEYS, SPAN, D, E, k_n, v_n, SCALE,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the three running values of a softmax after one list of keys."""
    i = first + tl.arange(0, BLOCK_I)
    begin, end = _keys_of(first, L, SPAN, BLOCK_I, CAUSAL, FAR)
    for start in range(begin, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        k = load_rows(keys, j, KEYS, k_n, D, BLOCK_D)
        s = scores(q, k, EXACT, PRECISION) * SCALE
        s = tl.where(_seen(i, j, L, KEYS, SPAN, CAUSAL, FAR), s, -float("inf"))
        now = tl.maximum(most, tl.max(s, 1))
        base = tl.where(now == -float("inf"), 0.0, now)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(most - base)
        norm = norm * fade + tl.sum(p, 1)
        v = load_rows(values, j, KEYS, v_n, E, BLOCK_E)
        acc = dot(narrow(p, v.dtype), v, acc * fade[:, None], PRECISION)
        most = now
    return acc, norm, most


@triton.jit
def _largest(x):
    """Return the largest of each column, or NaN if there is one."""
    return tl.max(x, 0) + tl.sum(tl.where(x != x, x, 0.0), 0)


@triton.jit
def _maxima(q, k, begin, L, SPAN, D, q_n, k_n, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the largest of each number among the queries and the keys of a block, in float32."""
    d = tl.arange(0, BLOCK_D)
    of_q = tl.full((BLOCK_D,), -float("inf"), tl.float32)
    of_k = tl.full((BLOCK_D,), -float("inf"), tl.float32)
    for start in range(0, SPAN, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        here = (inside < SPAN)[:, None] & (d < D)[None, :]
        qs = tl.where(here, wide(load_rows(q, begin + inside, L, q_n, D, BLOCK_D)), -float("inf"))
        ks = tl.where(here, wide(load_rows(k, begin + inside, L, k_n, D, BLOCK_D)), -float("inf"))
        of_q = tl.maximum(of_q, _largest(qs), propagate_nan=tl.PropagateNan.ALL)
        of_k = tl.maximum(of_k, _largest(ks), propagate_nan=tl.PropagateNan.ALL)
    return tl.where(d < D, of_q, 0.0), tl.where(d < D, of_k, 0.0)


@triton.jit(do_not_specialize=["L", "SPAN"])
def _summary_kernel(
    queries, keys, values, key_summary, value_summary, within, HEADS, L, SPAN, D, E,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, SCALE,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    blocks = L // SPAN
    pair, region = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    q = queries + head_start(pair, HEADS, q_b, q_h)
    k = keys + head_start(pair, HEADS, k_b, k_h)
    v = values + head_start(pair, HEADS, v_b, v_h)
    begin = region * SPAN
    # excerpt: begin
    top_q, top_k = _maxima(q, k, begin, L, SPAN, D, q_n, k_n, BLOCK, BLOCK_D)
    acc = tl.zeros((BLOCK_E,), tl.float32)
    norm, most = 0.0, -float("inf")
    for start in range(0, SPAN, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        rows = wide(load_rows(k, begin + inside, L, k_n, D, BLOCK_D))
        s = tl.where(inside < SPAN, tl.sum(rows * top_q[None, :], 1) * SCALE, -float("inf"))
        now = tl.maximum(most, tl.max(s, 0))
        p = tl.exp2(s - now)
        fade = tl.exp2(most - now)
        p_v = p[:, None] * wide(load_rows(v, begin + inside, L, v_n, E, BLOCK_E))
        acc = acc * fade + tl.sum(tl.where((inside < SPAN)[:, None], p_v, 0.0), 0)
        norm = norm * fade + tl.sum(p, 0)
        most = now
    # excerpt: end
    row = tl.program_id(0).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    store(key_summary + row * D + d, top_k, d < D)
    store(value_summary + row * E + e, acc / norm, e < E)
    tl.store(within + row, most + tl.log2(norm))


@triton.jit(do_not_specialize=["L", "SPAN"])
def _forward_kernel(
    queries, keys, values, key_summary, value_summary, out, total, HEADS, L, SPAN, D, E,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, SCALE,
    CAUSAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(L, BLOCK_I)
    pair = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_I  # the last queries, which see most, begin
    i = first + tl.arange(0, BLOCK_I)
    q = load_rows(queries + head_start(pair, HEADS, q_b, q_h), i, L, q_n, D, BLOCK_D)
    regions, wide_pair = L // SPAN, pair.to(tl.int64)
    acc = tl.zeros((BLOCK_I, BLOCK_E), tl.float32)
    norm = tl.zeros((BLOCK_I,), tl.float32)
    most = tl.full((BLOCK_I,), -float("inf"), tl.float32)
    acc, norm, most = _attend(
        acc, norm, most, q, keys + head_start(pair, HEADS, k_b, k_h), values + head_start(pair, HEADS, v_b, v_h),
        first, L, L, SPAN, D, E, k_n, v_n, SCALE, CAUSAL, False, BLOCK_I, BLOCK_J, BLOCK_D, BLOCK_E, EXACT, PRECISION,
    )  # fmt: skip
    acc, norm, most = _attend(
        acc, norm, most, q, key_summary + wide_pair * regions * D, value_summary + wide_pair * regions * E,
        first, L, regions, SPAN, D, E, D, E, SCALE, CAUSAL, True, BLOCK_I, BLOCK_J, BLOCK_D, BLOCK_E, EXACT, PRECISION,
    )  # fmt: skip
    norm = tl.where(i < L, norm, 1.0)
    row, e = wide_pair * L + i, tl.arange(0, BLOCK_E)
    store(out + row[:, None] * E + e[None, :], acc / norm[:, None], (i < L)[:, None] & (e < E)[None, :])
    tl.store(total + row, most + tl.log2(norm), mask=i < L)


@triton.jit
def _by_query(
    acc, q, g, delta, lse, keys, values, first, L, KEYS, SPAN, D, E, k_n, v_n, SCALE,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc and what one list of keys adds to the gradient of the queries."""
    i = first + tl.arange(0, BLOCK_I)
    begin, end = _keys_of(first, L, SPAN, BLOCK_I, CAUSAL, FAR)
    for start in range(begin, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        k = load_rows(keys, j, KEYS, k_n, D, BLOCK_D)
        v = load_rows(values, j, KEYS, v_n, E, BLOCK_E)
        s = scores(q, k, EXACT, PRECISION) * SCALE
        p = tl.where(_seen(i, j, L, KEYS, SPAN, CAUSAL, FAR), tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (scores(g, v, EXACT, PRECISION) - delta[:, None])
        acc = dot(narrow(ds, k.dtype), k, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["L", "SPAN"])
def _query_kernel(
    queries, keys, values, key_summary, value_summary, out, total, grad, dots, dq, HEADS, L, SPAN, D, E,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, SCALE,
    CAUSAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of some queries, and what `_key_kernel` needs: g . out."""
    tiles = tl.cdiv(L, BLOCK_I)
    pair = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)
    regions, wide_pair = L // SPAN, pair.to(tl.int64)
    row = wide_pair * L + i
    q = load_rows(queries + head_start(pair, HEADS, q_b, q_h), i, L, q_n, D, BLOCK_D)
    g = load_rows(grad + head_start(pair, HEADS, g_b, g_h), i, L, g_n, E, BLOCK_E)
    delta = tl.sum(wide(g) * wide(load_rows(out + wide_pair * L * E, i, L, E, E, BLOCK_E)), 1)
    tl.store(dots + row, delta, mask=i < L)
    lse = tl.load(total + row, mask=i < L, other=0.0)
    acc = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    acc = _by_query(
        acc, q, g, delta, lse, keys + head_start(pair, HEADS, k_b, k_h), values + head_start(pair, HEADS, v_b, v_h),
        first, L, L, SPAN, D, E, k_n, v_n, SCALE, CAUSAL, False, BLOCK_I, BLOCK_J, BLOCK_D, BLOCK_E, EXACT, PRECISION,
    )  # fmt: skip
    acc = _by_query(
        acc, q, g, delta, lse, key_summary + wide_pair * regions * D, value_summary + wide_pair * regions * E,
        first, L, regions, SPAN, D, E, D, E, SCALE, CAUSAL, True, BLOCK_I, BLOCK_J, BLOCK_D, BLOCK_E, EXACT, PRECISION,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    acc *= SCALE * 0.6931471805599453
    store(dq + row[:, None] * D + d[None, :], acc, (i < L)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["L", "SPAN"])
def _key_kernel(
    queries, keys, values, total, grad, dots, dk, dv, HEADS, L, KEYS, SPAN, D, E,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, SCALE,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of some keys and values: of places from their own blocks, or of summaries from all others."""
    tiles = tl.cdiv(KEYS, BLOCK_J)
    pair = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_J
    j = first + tl.arange(0, BLOCK_J)
    last = tl.minimum(first + BLOCK_J, KEYS) - 1
    queries += head_start(pair, HEADS, q_b, q_h)
    grad += head_start(pair, HEADS, g_b, g_h)
    k = load_rows(keys + head_start(pair, HEADS, k_b, k_h), j, KEYS, k_n, D, BLOCK_D)
    v = load_rows(values + head_start(pair, HEADS, v_b, v_h), j, KEYS, v_n, E, BLOCK_E)
    by_key = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    by_value = tl.zeros((BLOCK_J, BLOCK_E), tl.float32)
    if FAR:
        begin, end = ((first + 1) * SPAN if CAUSAL else 0), L
    else:
        begin, end = (first if CAUSAL else first // SPAN * SPAN), (last // SPAN + 1) * SPAN
    for start in range(begin, end, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        at = pair.to(tl.int64) * L + i
        q = load_rows(queries, i, L, q_n, D, BLOCK_D)
        g = load_rows(grad, i, L, g_n, E, BLOCK_E)
        s = scores(q, k, False, PRECISION) * SCALE - tl.load(total + at, mask=i < L, other=0.0)[:, None]
        p = tl.where(_seen(i, j, L, KEYS, SPAN, CAUSAL, FAR), tl.exp2(s), 0.0)
        by_value = dot(tl.trans(narrow(p, g.dtype)), g, by_value, PRECISION)
        ds = p * (scores(g, v, False, PRECISION) - tl.load(dots + at, mask=i < L, other=0.0)[:, None])
        by_key = dot(tl.trans(narrow(ds, q.dtype)), q, by_key, PRECISION)
    row, d, e = pair.to(tl.int64) * KEYS + j, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    ok = (j < KEYS)[:, None]
    store(dk + row[:, None] * D + d[None, :], by_key * (SCALE * 0.6931471805599453), ok & (d < D)[None, :])
    store(dv + row[:, None] * E + e[None, :], by_value, ok & (e < E)[None, :])


@triton.jit(do_not_specialize=["L", "SPAN"])
def _through_kernel(
    queries, keys, values, within, key_summary_grad, value_summary_grad, dq, dk, dv, HEADS, L, SPAN, D, E,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, SCALE,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block what comes through its summaries."""
    blocks = L // SPAN
    pair, region = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row, wide_pair = tl.program_id(0).to(tl.int64), pair.to(tl.int64)
    q = queries + head_start(pair, HEADS, q_b, q_h)
    k = keys + head_start(pair, HEADS, k_b, k_h)
    v = values + head_start(pair, HEADS, v_b, v_h)
    dq += wide_pair * L * D
    dk += wide_pair * L * D
    dv += wide_pair * L * E
    begin = region * SPAN
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    top_q, top_k = _maxima(q, k, begin, L, SPAN, D, q_n, k_n, BLOCK, BLOCK_D)
    lse = tl.load(within + row)
    g_v = tl.load(value_summary_grad + row * E + e, mask=e < E, other=0.0)
    mean = 0.0  # of the gradients of the weights p, by p
    ties_q, ties_k = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    p_k = tl.zeros((BLOCK_D,), tl.float32)  # sums over the block of p k, and of p (dv . v) k
    p_g_k = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, SPAN, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        here = inside < SPAN
        qs = wide(load_rows(q, begin + inside, L, q_n, D, BLOCK_D))
        ks = wide(load_rows(k, begin + inside, L, k_n, D, BLOCK_D))
        ties_q += tl.sum(tl.where(here[:, None] & (qs == top_q[None, :]), 1.0, 0.0), 0)
        ties_k += tl.sum(tl.where(here[:, None] & (ks == top_k[None, :]), 1.0, 0.0), 0)
        p = tl.where(here, tl.exp2(tl.sum(ks * top_q[None, :], 1) * SCALE - lse), 0.0)
        p_g = p * tl.sum(wide(load_rows(v, begin + inside, L, v_n, E, BLOCK_E)) * g_v[None, :], 1)
        mean += tl.sum(p_g, 0)
        p_k += tl.sum(p[:, None] * ks, 0)
        p_g_k += tl.sum(p_g[:, None] * ks, 0)
    slope = SCALE * 0.6931471805599453
    g_q = (p_g_k - mean * p_k) * slope / ties_q
    g_k = tl.load(key_summary_grad + row * D + d, mask=d < D, other=0.0) / ties_k
    for start in range(0, SPAN, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        here = inside < SPAN
        qs = wide(load_rows(q, begin + inside, L, q_n, D, BLOCK_D))
        ks = wide(load_rows(k, begin + inside, L, k_n, D, BLOCK_D))
        vs = wide(load_rows(v, begin + inside, L, v_n, E, BLOCK_E))
        p = tl.where(here, tl.exp2(tl.sum(ks * top_q[None, :], 1) * SCALE - lse), 0.0)
        ds = p * (tl.sum(vs * g_v[None, :], 1) - mean) * slope
        to_d = (begin + inside).to(tl.int64)[:, None] * D + d[None, :]
        to_e = (begin + inside).to(tl.int64)[:, None] * E + e[None, :]
        ok = here[:, None] & (d < D)[None, :]
        old = wide(tl.load(dq + to_d, mask=ok, other=0.0))
        store(dq + to_d, old + tl.where(qs == top_q[None, :], g_q[None, :], 0.0), ok)
        old = wide(tl.load(dk + to_d, mask=ok, other=0.0))
        add = ds[:, None] * top_q[None, :] + tl.where(ks == top_k[None, :], g_k[None, :], 0.0)
        store(dk + to_d, old + add, ok)
        ok = here[:, None] & (e < E)[None, :]
        old = wide(tl.load(dv + to_e, mask=ok, other=0.0))
        store(dv + to_e, old + p[:, None] * g_v[None, :], ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _tiles(query: Tensor, value: Tensor, causal: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the launch options for attention and for summaries, of which a tile has 16 numbers a thread."""
    widths = {"BLOCK_D": block_of(query.shape[-1]), "BLOCK_E": block_of(value.shape[-1])}
    widest = max(widths.values())
    return attention_tile(value, widest, causal) | widths, {"BLOCK": 2048 // widest, **widths, "num_warps": 4}


def _scale(query: Tensor) -> float:
    return 1 / (math.sqrt(query.shape[-1]) * math.log(2))


@torch.library.custom_op("polylib::combiner_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, span: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, the summaries of keys and values, and the logarithms of the sums of both softmaxes."""
    q, k, v = (by_rows(t) for t in (query, key, value))
    batch, heads, length, e = v.shape
    d, regions = q.shape[-1], length // span
    out, total = v.new_empty(v.shape), v.new_empty(batch, heads, length, dtype=torch.float32)
    key_summary, value_summary = k.new_empty(batch, heads, regions, d), v.new_empty(batch, heads, regions, e)
    within = total.new_empty(batch, heads, regions)
    if out.numel():
        (attend, summarise), steps, scale = _tiles(q, v, causal), head_steps(q, k, v), _scale(q)
        sizes = (heads, length, span, d, e)
        with on_device(v):
            _summary_kernel[(batch * heads * regions,)](
                q, k, v, key_summary, value_summary, within, *sizes, *steps, scale, **summarise
            )
            _forward_kernel[(triton.cdiv(length, attend["BLOCK_I"]) * batch * heads,)](
                q, k, v, key_summary, value_summary, out, total, *sizes, *steps, scale, **attend
            )
    return out, key_summary, value_summary, total, within


@_forward.register_fake
def _(query, key, value, span, causal):
    batch, heads, length, d = query.shape
    regions = length // span
    return (
        value.new_empty(value.shape),
        key.new_empty(batch, heads, regions, d),
        value.new_empty(batch, heads, regions, value.shape[-1]),
        value.new_empty(batch, heads, length, dtype=torch.float32),
        value.new_empty(batch, heads, regions, dtype=torch.float32),
    )


@torch.library.custom_op("polylib::combiner_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, key_summary: Tensor, value_summary: Tensor,
    total: Tensor, within: Tensor, span: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries, keys and values."""
    grad, q, k, v = (by_rows(t) for t in (grad, query, key, value))
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if not v.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    batch, heads, length, e = v.shape
    d, regions = q.shape[-1], length // span
    dots = torch.empty_like(total)
    by_keys, by_values = (torch.empty_like(t, dtype=torch.float32) for t in (key_summary, value_summary))
    (attend, summarise), scale = _tiles(q, v, causal), _scale(q)
    sizes, steps = (heads, length, span, d, e), head_steps(q, k, v, grad)
    far = head_steps(q, key_summary, value_summary, grad)
    pairs, tall = batch * heads, attend["BLOCK_J"]
    with on_device(v):
        _query_kernel[(triton.cdiv(length, attend["BLOCK_I"]) * pairs,)](
            q, k, v, key_summary, value_summary, out, total, grad, dots, dq, *sizes, *steps, scale,
            **attend | {"num_warps": 8, "num_stages": 1},
        )  # fmt: skip
        _key_kernel[(triton.cdiv(length, tall) * pairs,)](
            q, k, v, total, grad, dots, dk, dv, heads, length, length, span, d, e, *steps, scale, FAR=False, **attend
        )
        _key_kernel[(triton.cdiv(regions, tall) * pairs,)](
            q, key_summary, value_summary, total, grad, dots, by_keys, by_values, heads, length, regions, span, d, e,
            *far, scale, FAR=True, **attend,
        )  # fmt: skip
        _through_kernel[(regions * pairs,)](
            q, k, v, within, by_keys, by_values, dq, dk, dv, *sizes, *head_steps(q, k, v), scale, **summarise
        )
    return dq, dk, dv


@_backward.register_fake
def _(grad, query, key, value, out, key_summary, value_summary, total, within, span, causal):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *_others: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("combiner_attention"))


# --- the public function ----------------------------------------------------------------------------------------------


def combiner_attention(
    query: Tensor, key: Tensor, value: Tensor, span: int, causal: bool = True, *, backend: str = "auto"
) -> Tensor:
    """Return attention to the places of each query's own block, and to the summaries of the others, in one softmax.

    Args:
        query: (B, H, L, d), L a multiple of span; any strides, as those of the others. Scores are divided by the root
            of d here.
        key: (B, H, L, d).
        value: (B, H, L, e).
        span: places in a block. About the root of L costs least; L gives full attention, and so does 1.
        causal: a query sees its block up to itself and the summaries of earlier blocks. Otherwise it sees all of its
            block and the summaries of all others.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16 with d and e of at most
            128, and the reference elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be
            differentiated once.

    Returns:
        (B, H, L, e) in the dtype of value, or in autocast's under `torch.autocast`.

    Raises:
        ValueError: sizes or devices that don't fit, a span that does not divide L, an unknown backend, or the kernels
            asked for more than 128 numbers.
        TypeError: tensors that are not floating-point or of different dtypes, a span that is not an integer, or a dtype
            the kernels don't have.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2107.05768, pattern Fixed.
    """
    query, key, value = autocast(query, key, value)
    check_tensors({"query": query, "key": key, "value": value})
    if query.dim() != 4 or query.shape[-1] == 0:
        raise ValueError(f"query must have shape (B, H, L, d), d at least 1, got {tuple(query.shape)}")
    batch, heads, length, d = query.shape
    check_shape("key", key, (batch, heads, length, d), "(B, H, L, d)")
    check_shape("value", value, (batch, heads, length, value.shape[-1] if value.dim() else 0), "(B, H, L, e)")
    if not isinstance(span, numbers.Integral) or isinstance(span, bool):
        raise TypeError(f"span must be an integer, got {type(span).__name__}")
    span = span if isinstance(span, int) else int(span)  # such as numpy's
    if span < 1 or length % span:
        raise ValueError(f"span must be at least 1 and divide L = {length}, got {span}")
    chosen = choose_backend(backend, value)
    fits = max(d, value.shape[-1]) <= MOST_NUMBERS
    if backend == "triton" and not fits:
        raise ValueError(f'backend="triton" needs d and e of at most {MOST_NUMBERS}, got {d} and {value.shape[-1]}')
    if chosen == "triton" and fits:
        return _forward(query, key, value, span, causal)[0]
    device = value.device.type if torch.amp.is_autocast_available(value.device.type) else "cpu"
    with torch.autocast(device, enabled=False):  # which would round the scores
        return combiner_attention_reference(query, key, value, span, causal)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(
    batch: int, heads: int, length: int, d: int, e: int, span: int, dtype: torch.dtype, *,
    causal: bool = True, backward: bool = False,
) -> Cost:  # fmt: skip
    """Return the least bytes and flops: q, k and v read by both kernels, the result, summaries and sums written.

    With `backward` inputs, result, its gradient, summaries and sums are read, and the gradients and those of the
    summaries written; scores and the products of gradients and values are formed twice, and three sums of that size.
    """
    regions, size = length // span, dtype.itemsize
    pairs = length * (span + 1) // 2 + length * (regions - 1) // 2 if causal else length * (span + regions - 1)
    places, summaries = length * (2 * d + e) * size, regions * (d + e) * size
    sums = 4 * (length + regions)
    if not backward:
        moved = 2 * places + length * e * size + 2 * summaries + sums
        flops = 2 * pairs * (d + e) + 2 * length * (d + e)
    else:
        moved = 4 * places + 2 * length * e * size + summaries + 8 * regions * (d + e) + sums + 8 * length
        flops = 2 * pairs * (4 * d + 3 * e) + 8 * length * (d + e)
    return Cost(batch * heads * moved, batch * heads * flops)
