r"""Attention whose weights are products of features, with a learned weight for each distance.

Source: Luo et al., "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
arXiv 2106.12566. The tiled form and its derivative are derived here.

Shapes: features of queries and keys $\phi$ (B, H, n, m), values v (B, H, n, d), bias b (H, 2n - 1), of which the entry
n - 1 is that of distance 0; result z (B, H, n, d).

$$P_{ij}=(\phi^q_i\cdot\phi^k_j)\,e^{b_{j-i}},\qquad \ell_i=\sum_jP_{ij},\qquad z_i=\frac1{\ell_i}\sum_jP_{ij}v_j.$$

The paper's way is a fast Fourier transform along the places, of a tensor of n m (d + 1) numbers for each head. That is
of order n log n, but every one of these numbers is moved several times. The kernels form tiles of P instead, as flash
attention does, and keep nothing of size n^2: 2 n^2 (m + d) flops on matrix units, and O(n) memory. There is no running
maximum: a constant in all b that a query sees cancels, so that the largest of them, which needs no look at queries or
keys, is taken off before.

Derivative, with g that of z, $\Delta_i=g_i\cdot z_i$ and $dP_{ij}=(g_i\cdot v_j-\Delta_i)/\ell_i$:

$$d\phi^q_i=\sum_jdP_{ij}e^{b_{j-i}}\phi^k_j,\quad d\phi^k_j=\sum_idP_{ij}e^{b_{j-i}}\phi^q_i,\quad
dv_j=\sum_i\frac{P_{ij}}{\ell_i}g_i,\quad db_\delta=\sum_{j-i=\delta}dP_{ij}P_{ij}.$$

Three kernels: by queries, by keys, and by distances. In the last a program has all tiles at the same distance from the
diagonal of one head; they are added up as they are, and only their sum is cut into diagonals. So there are no atomic
additions, and the same numbers come out each time. Saved are the inputs, z and $\ell$. For m and d up to 128.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
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

_PROGRAMS = 528  # that sum over distances: four for each multiprocessor of a large GPU

# --- the definition ---------------------------------------------------------------------------------------------------


def kernel_attention_rpe_reference(
    query_features: Tensor, key_features: Tensor, value: Tensor, bias: Tensor, causal: bool = False
) -> Tensor:
    """Return (B, H, n, d) by forming all pairs, in at least float32."""
    queries, keys, v, b = (widened(t) for t in (query_features, key_features, value, bias))
    place = torch.arange(value.shape[-2], device=value.device)
    lag = place - place[:, None]
    pairs = b[:, lag + len(place) - 1]
    if causal:
        pairs = pairs.masked_fill(lag > 0, -math.inf)
    if len(place):
        pairs = pairs - pairs.detach().amax(-1, keepdim=True)  # a constant of a row, which cancels
    p = queries @ keys.mT * pairs.exp().to(queries.dtype)
    if causal:
        p = p.masked_fill(lag > 0, 0.0)  # be it NaN
    return (p @ v / p.sum(-1, keepdim=True)).to(value.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# i counts queries, j keys. Of each tensor by heads come the steps between batch elements, heads and places.


@triton.jit
def _by_distance(bias, most, i, j, N, CAUSAL: tl.constexpr):
    """Return exp(b - the largest b of the query), (i, j), and 0 where there is no pair; both b are in units of ln 2."""
    ok = (i < N)[:, None] & (j < N)[None, :]
    if CAUSAL:
        ok = ok & (j[None, :] <= i[:, None])
    b = tl.load(bias + (N - 1 + j[None, :] - i[:, None]), mask=ok, other=-float("inf"))
    return tl.exp2(b - tl.load(most + i, mask=i < N, other=0.0)[:, None])


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    queries, keys, v, bias, most, z, total, HEADS, N, M, D, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    CAUSAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_I)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_I  # the last queries, which see most, begin
    i = first + tl.arange(0, BLOCK_I)
    queries += head_start(pair, HEADS, q_b, q_h)
    keys += head_start(pair, HEADS, k_b, k_h)
    v += head_start(pair, HEADS, v_b, v_h)
    bias += (pair % HEADS).to(tl.int64) * (2 * N - 1)
    most += (pair % HEADS).to(tl.int64) * N
    acc = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_I,), tl.float32)
    # excerpt: begin
    phi_q = load_rows(queries, i, N, q_n, M, BLOCK_M)
    end = tl.minimum(first + BLOCK_I, N) if CAUSAL else N
    for start in range(0, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        phi_k = load_rows(keys, j, N, k_n, M, BLOCK_M)
        p = scores(phi_q, phi_k, EXACT, PRECISION) * _by_distance(bias, most, i, j, N, CAUSAL)
        if CAUSAL:
            p = tl.where(j[None, :] <= i[:, None], p, 0.0)  # what is behind does no harm, be it NaN
        norm += tl.sum(p, 1)
        acc = dot(narrow(p, v.dtype.element_ty), load_rows(v, j, N, v_n, D, BLOCK_D), acc, PRECISION)
    row = pair.to(tl.int64) * N + i
    # excerpt: end
    d = tl.arange(0, BLOCK_D)
    ok = (i < N)[:, None]
    norm = tl.where(i < N, norm, 1.0)
    store(z + row[:, None] * D + d[None, :], acc / norm[:, None], ok & (d < D)[None, :])
    tl.store(total + row, norm, mask=i < N)


@triton.jit(do_not_specialize=["N"])
def _query_kernel(
    queries, keys, v, bias, most, z, total, grad, dots, dqueries, HEADS, N, M, D,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    CAUSAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the features of some queries, and what `_key_kernel` needs: g . z."""
    blocks = tl.cdiv(N, BLOCK_I)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)
    row = pair.to(tl.int64) * N + i
    keys += head_start(pair, HEADS, k_b, k_h)
    v += head_start(pair, HEADS, v_b, v_h)
    bias += (pair % HEADS).to(tl.int64) * (2 * N - 1)
    most += (pair % HEADS).to(tl.int64) * N
    g = load_rows(grad + head_start(pair, HEADS, g_b, g_h), i, N, g_n, D, BLOCK_D)
    own = load_rows(z + pair.to(tl.int64) * N * D, i, N, D, D, BLOCK_D)
    delta = tl.sum(wide(g) * wide(own), 1)
    tl.store(dots + row, delta, mask=i < N)
    norm = tl.load(total + row, mask=i < N, other=1.0)
    acc = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
    end = tl.minimum(first + BLOCK_I, N) if CAUSAL else N
    for start in range(0, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        ds = scores(g, load_rows(v, j, N, v_n, D, BLOCK_D), EXACT, PRECISION)
        ds = (ds - delta[:, None]) * _by_distance(bias, most, i, j, N, CAUSAL) / norm[:, None]
        acc = dot(narrow(ds, v.dtype.element_ty), load_rows(keys, j, N, k_n, M, BLOCK_M), acc, PRECISION)
    f = tl.arange(0, BLOCK_M)
    store(dqueries + row[:, None] * M + f[None, :], acc, (i < N)[:, None] & (f < M)[None, :])


@triton.jit(do_not_specialize=["N"])
def _key_kernel(
    queries, keys, v, bias, most, total, grad, dots, dkeys, dv, HEADS, N, M, D,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    CAUSAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the features of some keys, and of their values."""
    blocks = tl.cdiv(N, BLOCK_J)
    pair = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_J
    j = first + tl.arange(0, BLOCK_J)
    row = pair.to(tl.int64) * N + j
    queries += head_start(pair, HEADS, q_b, q_h)
    grad += head_start(pair, HEADS, g_b, g_h)
    bias += (pair % HEADS).to(tl.int64) * (2 * N - 1)
    most += (pair % HEADS).to(tl.int64) * N
    phi_k = load_rows(keys + head_start(pair, HEADS, k_b, k_h), j, N, k_n, M, BLOCK_M)
    values = load_rows(v + head_start(pair, HEADS, v_b, v_h), j, N, v_n, D, BLOCK_D)
    by_key = tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
    by_value = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    begin = first // BLOCK_I * BLOCK_I if CAUSAL else 0
    for start in range(begin, N, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        at = pair.to(tl.int64) * N + i
        share = _by_distance(bias, most, i, j, N, CAUSAL) / tl.load(total + at, mask=i < N, other=1.0)[:, None]
        phi_q = load_rows(queries, i, N, q_n, M, BLOCK_M)
        g = load_rows(grad, i, N, g_n, D, BLOCK_D)
        p = scores(phi_q, phi_k, False, PRECISION) * share
        by_value = dot(tl.trans(narrow(p, grad.dtype.element_ty)), g, by_value, PRECISION)
        ds = scores(g, values, False, PRECISION)
        ds = (ds - tl.load(dots + at, mask=i < N, other=0.0)[:, None]) * share
        by_key = dot(tl.trans(narrow(ds, grad.dtype.element_ty)), phi_q, by_key, PRECISION)
    f, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    ok = (j < N)[:, None]
    store(dkeys + row[:, None] * M + f[None, :], by_key, ok & (f < M)[None, :])
    store(dv + row[:, None] * D + d[None, :], by_value, ok & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "BATCH", "per_split"])
def _distance_kernel(
    queries, keys, v, bias, most, total, grad, dots, parts, BATCH, HEADS, N, M, D, per_split,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program's part of the gradient of the bias: the sum of all tiles that are as far from the diagonal."""
    blocks = tl.cdiv(N, BLOCK)
    bands = blocks if CAUSAL else 2 * blocks - 1
    band = tl.program_id(0) % bands
    head = tl.program_id(0) // bands % HEADS
    split = tl.program_id(0) // bands // HEADS
    away = band - (blocks - 1)  # key tile less query tile
    bias += head.to(tl.int64) * (2 * N - 1)
    most += head.to(tl.int64) * N
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    inside = tl.arange(0, BLOCK)
    for b in range(split * per_split, tl.minimum((split + 1) * per_split, BATCH)):
        pair = b * HEADS + head
        for tile in range(tl.maximum(-away, 0), blocks - tl.maximum(away, 0)):
            i, j = tile * BLOCK + inside, (tile + away) * BLOCK + inside
            at = pair.to(tl.int64) * N + i
            phi_q = load_rows(queries + head_start(pair, HEADS, q_b, q_h), i, N, q_n, M, BLOCK_M)
            phi_k = load_rows(keys + head_start(pair, HEADS, k_b, k_h), j, N, k_n, M, BLOCK_M)
            g = load_rows(grad + head_start(pair, HEADS, g_b, g_h), i, N, g_n, D, BLOCK_D)
            values = load_rows(v + head_start(pair, HEADS, v_b, v_h), j, N, v_n, D, BLOCK_D)
            share = _by_distance(bias, most, i, j, N, CAUSAL) / tl.load(total + at, mask=i < N, other=1.0)[:, None]
            p = scores(phi_q, phi_k, False, PRECISION) * share
            acc += (scores(g, values, False, PRECISION) - tl.load(dots + at, mask=i < N, other=0.0)[:, None]) * p
    place = (BLOCK - 1 - inside)[:, None] * BLOCK + inside[None, :]  # the last query first
    tl.store(parts + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + place, acc)


# --- registration -----------------------------------------------------------------------------------------------------


def _tile(query_features: Tensor, value: Tensor, causal: bool) -> dict[str, Any]:
    """Return the launch options."""
    m, d = block_of(query_features.shape[-1]), block_of(value.shape[-1])
    return attention_tile(value, max(m, d), causal) | {"BLOCK_M": m, "BLOCK_D": d}


def _largest(bias: Tensor, n: int, causal: bool) -> Tensor:
    """Return the largest bias that each query meets, (H, n): each sees distance 0, and all up to its ends."""
    past = bias[:, :n].flip(-1).cummax(-1).values
    return past if causal else torch.maximum(past, bias[:, n - 1 :].cummax(-1).values.flip(-1))


def _tables(bias: Tensor, n: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the bias and the largest that each query meets, float32, as exponents of 2."""
    exponent = (bias.float() / math.log(2)).contiguous()
    return exponent, _largest(exponent, n, causal).contiguous()


def _diagonals(parts: Tensor, n: int, causal: bool) -> Tensor:
    """Return the sums along the diagonals, (H, 2n - 1), of band sums (H, bands, block, block), the last query first."""
    heads, bands, block, _ = parts.shape
    skewed = F.pad(parts, (0, block)).flatten(-2)[..., :-block].view(heads, bands, block, 2 * block - 1)
    halves = F.pad(skewed.sum(-2), (0, 1)).view(heads, bands, 2, block)  # a band shares each half with a neighbour
    lags = F.pad(halves[:, :, 0], (0, 0, 0, 1)) + F.pad(halves[:, :, 1], (0, 0, 1, 0))
    blocks = -(-n // block)
    lags = lags.flatten(1)[:, blocks * block - n :]
    return F.pad(lags[:, :n], (0, n - 1)) if causal else lags[:, : 2 * n - 1]


@torch.library.custom_op("polylib::kernel_attention_rpe", mutates_args=())
def _forward(
    query_features: Tensor, key_features: Tensor, value: Tensor, bias: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return z (B, H, n, d) and the sums of the weights (B, H, n)."""
    queries, keys, v = (by_rows(t) for t in (query_features, key_features, value))
    batch, heads, n, d = v.shape
    z, total = v.new_empty(v.shape), v.new_empty(v.shape[:3], dtype=torch.float32)
    if z.numel():
        tile = _tile(queries, v, causal)
        tables = _tables(bias, n, causal)
        with on_device(v):
            _forward_kernel[(triton.cdiv(n, tile["BLOCK_I"]) * batch * heads,)](
                queries,
                keys,
                v,
                *tables,
                z,
                total,
                heads,
                n,
                queries.shape[-1],
                d,
                *head_steps(queries, keys, v),
                **tile,
            )
    return z, total


@_forward.register_fake
def _(query_features, key_features, value, bias, causal):
    return value.new_empty(value.shape), value.new_empty(value.shape[:3], dtype=torch.float32)


@torch.library.custom_op("polylib::kernel_attention_rpe_backward", mutates_args=())
def _backward(
    grad: Tensor, query_features: Tensor, key_features: Tensor, value: Tensor, bias: Tensor, z: Tensor, total: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of both features, of the values and of the bias."""
    grad, queries, keys, v = (by_rows(t) for t in (grad, query_features, key_features, value))
    batch, heads, n, d = v.shape
    m = queries.shape[-1]
    dqueries, dkeys, dv = (t.new_empty(t.shape) for t in (queries, keys, v))
    if not v.numel():
        return dqueries.zero_(), dkeys.zero_(), dv.zero_(), torch.zeros_like(bias)
    dots = torch.empty_like(total)
    tile, tables, steps = _tile(queries, v, causal), _tables(bias, n, causal), head_steps(queries, keys, v, grad)
    block = tile["BLOCK_J"]
    bands = -(-n // block) if causal else 2 * -(-n // block) - 1
    per_split = triton.cdiv(batch, max(1, min(batch, _PROGRAMS // (heads * bands))))
    splits = triton.cdiv(batch, per_split)
    parts = v.new_empty(splits, heads, bands, block, block, dtype=torch.float32)
    square = {name: option for name, option in tile.items() if name not in ("BLOCK_I", "BLOCK_J")}
    square |= {"BLOCK": block, "num_warps": 8, "num_stages": 1}
    with on_device(v):
        _query_kernel[(triton.cdiv(n, tile["BLOCK_I"]) * batch * heads,)](
            queries, keys, v, *tables, z, total, grad, dots, dqueries, heads, n, m, d, *steps, **tile
        )
        _key_kernel[(triton.cdiv(n, tile["BLOCK_J"]) * batch * heads,)](
            queries, keys, v, *tables, total, grad, dots, dkeys, dv, heads, n, m, d, *steps, **tile
        )
        _distance_kernel[(bands * heads * splits,)](
            queries, keys, v, *tables, total, grad, dots, parts, batch, heads, n, m, d, per_split, *steps, **square
        )
    return dqueries, dkeys, dv, _diagonals(parts.sum(0), n, causal).to(bias.dtype)


@_backward.register_fake
def _(grad, query_features, key_features, value, bias, z, total, causal):
    tensors = (query_features, key_features, value, bias)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.causal = inputs[4]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _total: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors, ctx.causal), None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("kernel_attention_rpe"))


# --- the public function ----------------------------------------------------------------------------------------------


def kernel_attention_rpe(
    query_features: Tensor, key_features: Tensor, value: Tensor, bias: Tensor, causal: bool = False, *,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention whose weights are products of features times the exponential of a bias by distance.

    The weight of place j for the query i is the product of their features, times exp(b) with the bias of j - i; the
    weights of a query are divided by their sum.

    Args:
        query_features: (B, H, n, m), usually not negative; any strides, as those of the others.
        key_features: (B, H, n, m). A key of zeros is left out.
        value: (B, H, n, d).
        bias: (H, 2n - 1), of any floating-point dtype, which autocast leaves as it is; the entry n - 1 is that of
            distance 0, and the next that of a key one place behind the query. A constant that is added to all of it
            changes nothing.
        causal: leave out keys behind the query.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16 with m and d of at most
            128, and elsewhere, and under `torch.func`, the reference, which forms all pairs; "triton" and "reference"
            insist. The kernels can be differentiated once. In float16 a product of features must not exceed 65,504.

    Returns:
        (B, H, n, d) in the dtype of value, or in autocast's under `torch.autocast`. A query whose weights add up to 0
        gets NaN.

    Raises:
        ValueError: sizes or devices that don't fit, an unknown backend, or the kernels asked for more than 128 numbers.
        TypeError: tensors that are not floating-point, features and values of different dtypes, or of one
            that the kernels don't have.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2106.12566.
    """
    query_features, key_features, value = autocast(query_features, key_features, value)
    check_tensors({"query_features": query_features, "key_features": key_features, "value": value})
    check_tensors({"bias": bias})
    if bias.device != value.device:
        raise ValueError(f"bias must be on the device of query_features, {value.device}, got {bias.device}")
    if query_features.dim() != 4 or query_features.shape[-1] == 0:
        raise ValueError(f"query_features must have shape (B, H, n, m), m >= 1, got {tuple(query_features.shape)}")
    batch, heads, n, m = query_features.shape
    check_shape("key_features", key_features, (batch, heads, n, m), "(B, H, n, m)")
    check_shape("value", value, (batch, heads, n, value.shape[-1] if value.dim() else 0), "(B, H, n, d)")
    check_shape("bias", bias, (heads, max(2 * n - 1, 0)), "(H, 2n - 1)")
    chosen = choose_backend(backend, value)
    fits = max(m, value.shape[-1]) <= MOST_NUMBERS
    if backend == "triton" and not fits:
        raise ValueError(f'backend="triton" needs m and d of at most {MOST_NUMBERS}, got {m} and {value.shape[-1]}')
    if chosen == "triton" and fits:
        return _forward(query_features, key_features, value, bias, causal)[0]
    return kernel_attention_rpe_reference(query_features, key_features, value, bias, causal)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(
    batch: int, heads: int, n: int, m: int, d: int, dtype: torch.dtype, *, causal: bool = False, backward: bool = False
) -> Cost:
    """Return the least bytes and flops of the tiled form: all inputs read once, the result and the sums written.

    With `backward` the result, the sums and its gradient are read too, and four gradients written. Products of features
    are formed for the keys and for the distances, those of gradients and values for all three, and summed three times.
    """
    pairs = batch * heads * (n * (n + 1) // 2 if causal else n * n)
    inputs = batch * heads * n * (2 * m + d) * dtype.itemsize + heads * (2 * n - 1) * dtype.itemsize
    result = batch * heads * n * (d * dtype.itemsize + 4)
    if not backward:
        return Cost(inputs + result, 2 * pairs * (m + d))
    grad = batch * heads * n * d * dtype.itemsize
    return Cost(2 * inputs + result + grad, 8 * pairs * (m + d))
