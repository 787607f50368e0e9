r"""A diagonal state space along a sequence, without a Fourier transform: chunk by chunk, by products of matrices.

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models", arXiv
2206.11893: the layer. The chunks and the derivative are derived here.

Shapes: u (B, H, L), real; v and x (H, N), complex, as in `vandermonde`; y (B, H, L):

$$y_t = \sum_{l\le t} K_l\,u_{t-l}, \qquad K_l = 2\,\mathrm{Re}\sum_n v_n e^{x_n l}.$$

By Fourier transforms K is formed, padded to 2 L, transformed with u, multiplied, transformed back: u passes through
memory many times. But y is also the output of a recurrence with a state of N numbers, and T of its steps are four
products. With S the state before a chunk, u and y row vectors of a chunk, and j and r counting its places,

$$y = u M + \mathrm{Re}(S P), \qquad S \leftarrow e^{xT} S + u F,$$
$$M_{jr} = K_{r-j}\ (r \ge j), \qquad F_{jn} = e^{x_n(T-1-j)}, \qquad P_{nr} = 2\,v_n e^{x_n(r+1)}.$$

M, F and P are small and formed in PyTorch, the exponentials in complex128; through them go the gradients of v and x. A
program takes one channel and some rows of the batch, keeps their states in registers, and goes along the sequence: u is
read once, y written once, and K, longer than T, is nowhere. The products are made of three in tf32 each for float32
(`tf32x3`), and of one in tf32 for 16 bits.

Backward is the same recurrence from the end to the beginning, with the transposed M, and F and P in each other's place;
its states are the gradients of the states. What is saved are the inputs: the states before each chunk, 2 N numbers for
T places, are formed again. Then the gradients of M, F, P and of the factor are products over all rows and chunks. Parts
of them are added in a fixed order: the same bits always.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import (
    choose_backend,
    load,
    no_double_backward,
    on_device,
    registers,
    store,
    tl,
    triton,
    widened,
)
from polylib.kernels._cost import Cost
from polylib.kernels.vandermonde import check_waves, vandermonde, vandermonde_reference

# --- the definition ---------------------------------------------------------------------------------------------------


def s4d_scan_reference(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return y (B, H, L) in plain PyTorch: the kernels term by term, and Fourier transforms without wrap-around."""
    return _by_transforms(u, vandermonde_reference(v, x, u.shape[-1]))


def _by_transforms(u: Tensor, K: Tensor) -> Tensor:
    L = u.shape[-1]
    if u.numel() == 0:  # which some libraries of transforms refuse
        return u * K[..., :1].to(u.dtype)
    product = torch.fft.rfft(widened(u), n=2 * L) * torch.fft.rfft(K, n=2 * L)
    return torch.fft.irfft(product, n=2 * L)[..., :L].to(u.dtype)


def _chunk_matrices(v: Tensor, x: Tensor, T: int, waves: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M (H, T, T), F (H, 2, T, W), P (H, 2, W, T) and e^(xT) (H, 2, W), in float32.

    Real and imaginary parts, the latter of P with the other sign, so that Re(S P) is a sum; W, a power of two, is N and
    zeros behind it.
    """
    v, x = (t.to(torch.complex128) for t in (v, x))
    powers = (x[..., None] * torch.arange(T + 1, device=x.device)).exp()
    answers = 2 * v[..., None] * powers
    K = F.pad(answers[..., :T].sum(-2).real, (T - 1, 0))
    more = waves - v.shape[-1]
    into = F.pad(powers[..., :T].flip(-1).mT, (0, more))
    out = F.pad(answers[..., 1:], (0, 0, 0, more))
    factor = F.pad(powers[..., T], (0, more))
    M = K.unfold(-1, T, 1).flip(-2)
    parts = torch.stack([into.real, into.imag], 1), torch.stack([out.real, -out.imag], 1)
    return tuple(t.float().contiguous() for t in (M, *parts, torch.stack([factor.real, factor.imag], 1)))  # type: ignore[return-value]


# --- the kernels ------------------------------------------------------------------------------------------------------

MOST_WAVES, _ROWS = 64, 16  # rows of a tile: of the batch, or chunks


@triton.jit
def _whole(matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a whole matrix, (ROWS, COLUMNS)."""
    return tl.load(matrix + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit(do_not_specialize=["batch", "chunks"])
def _scan_kernel(
    u, square, into, out, factor, y, states, batch, heads, length, chunks,
    REVERSE: tl.constexpr, OUTPUT: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, WAVES: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, here = b * heads + h, (b < batch)[:, None]
    n = tl.arange(0, WAVES)
    square += h * T * T
    into += h * 2 * T * WAVES
    out += h * 2 * T * WAVES
    f_re = tl.load(factor + h * 2 * WAVES + n)[None, :]
    f_im = tl.load(factor + h * 2 * WAVES + WAVES + n)[None, :]
    s_re, s_im = tl.zeros((ROWS, WAVES), tl.float32), tl.zeros((ROWS, WAVES), tl.float32)
    # excerpt: begin
    for step in range(0, chunks):
        chunk = chunks - 1 - step if REVERSE else step
        time = chunk * T + tl.arange(0, T)
        at, ok = row[:, None] * length + time[None, :], here & (time < length)[None, :]
        now = load(u + at, ok)
        if STATES:  # those before the chunk
            place = states + ((row * chunks + chunk) * 2 * WAVES)[:, None] + n[None, :]
            tl.store(place, s_re, mask=here)
            tl.store(place + WAVES, s_im, mask=here)
        if OUTPUT:
            total = tl.zeros((ROWS, T), tl.float32)
            total = tl.dot(now, _whole(square, T, T), total, input_precision=PRECISION)
            total = tl.dot(s_re, _whole(out, WAVES, T), total, input_precision=PRECISION)
            total = tl.dot(s_im, _whole(out + WAVES * T, WAVES, T), total, input_precision=PRECISION)
            store(y + at, total, ok)
        kept_re = s_re * f_re - s_im * f_im
        kept_im = s_re * f_im + s_im * f_re
        s_re = tl.dot(now, _whole(into, T, WAVES), kept_re, input_precision=PRECISION)
        s_im = tl.dot(now, _whole(into + T * WAVES, T, WAVES), kept_im, input_precision=PRECISION)
    # excerpt: end


@triton.jit(do_not_specialize=["chunks", "rows", "part"])
def _sum_kernel(
    u, grad, states, back, by_square, by_into, by_out, by_factor, heads, length, chunks, rows, part,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, WAVES: tl.constexpr,
):  # fmt: skip
    """Products over the rows of a part: each is a chunk of an entry of the batch."""
    h, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inside, n = tl.arange(0, T), tl.arange(0, WAVES)
    of_square = tl.zeros((T, T), tl.float32)
    into_re, into_im = tl.zeros((T, WAVES), tl.float32), tl.zeros((T, WAVES), tl.float32)
    out_re, out_im = tl.zeros((T, WAVES), tl.float32), tl.zeros((T, WAVES), tl.float32)  # turned, as fewer operands are
    f_re, f_im = tl.zeros((WAVES,), tl.float32), tl.zeros((WAVES,), tl.float32)
    for start in range(split * part, (split + 1) * part, ROWS):
        k = start + tl.arange(0, ROWS)
        row, time = (k // chunks) * heads + h, (k % chunks)[:, None] * T + inside[None, :]
        at, ok = row[:, None] * length + time, (k < rows)[:, None] & (time < length)
        now, g = load(u + at, ok), load(grad + at, ok)
        place, here = ((row * chunks + k % chunks) * 2 * WAVES)[:, None] + n[None, :], (k < rows)[:, None]
        s_re, s_im = load(states + place, here), load(states + place + WAVES, here)
        r_re, r_im = load(back + place, here), load(back + place + WAVES, here)
        turned = tl.trans(now)
        of_square = tl.dot(turned, g, of_square, input_precision=PRECISION)
        into_re = tl.dot(turned, r_re, into_re, input_precision=PRECISION)
        into_im = tl.dot(turned, r_im, into_im, input_precision=PRECISION)
        turned = tl.trans(g)
        out_re = tl.dot(turned, s_re, out_re, input_precision=PRECISION)
        out_im = tl.dot(turned, s_im, out_im, input_precision=PRECISION)
        f_re += tl.sum(r_re * s_re + r_im * s_im, 0)
        f_im += tl.sum(r_im * s_re - r_re * s_im, 0)
    at = split.to(tl.int64) * tl.num_programs(0) + h
    square_at = inside[:, None] * T + inside[None, :]
    matrix_at = inside[:, None] * WAVES + n[None, :]
    tl.store(by_square + at * T * T + square_at, of_square)
    tl.store(by_into + at * 2 * T * WAVES + matrix_at, into_re)
    tl.store(by_into + (at * 2 + 1) * T * WAVES + matrix_at, into_im)
    tl.store(by_out + at * 2 * T * WAVES + matrix_at, out_re)
    tl.store(by_out + (at * 2 + 1) * T * WAVES + matrix_at, out_im)
    tl.store(by_factor + at * 2 * WAVES + n, f_re)
    tl.store(by_factor + (at * 2 + 1) * WAVES + n, f_im)


# --- registration -----------------------------------------------------------------------------------------------------


def _sizes(L: int, N: int) -> tuple[int, int]:
    """T, and W. The products of 64 places with 64 waves would not stay in registers."""
    T, waves = (max(triton.next_power_of_2(size), 16) for size in (L, N))
    return min(T, 64 if waves <= 32 else 32), waves


def _precision(dtype: torch.dtype) -> str:
    exact = "bf16x6" if torch.version.hip else "tf32x3"
    return exact if dtype == torch.float32 else "tf32"


def _scan(
    u: Tensor, matrices: tuple[Tensor, ...], *, output: bool = True, states: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Run along (B, H, L): what comes out, and the states before each chunk; what is not asked for is empty."""
    (batch, heads, length), (T, waves) = u.shape, matrices[1].shape[-2:]
    chunks = triton.cdiv(length, T)
    y = torch.empty_like(u) if output else u.new_empty(0)
    kept = (batch, heads, chunks, 2, waves) if states else (0,)
    before = u.new_empty(kept, dtype=torch.float32)
    with on_device(u):
        _scan_kernel[(heads, triton.cdiv(batch, _ROWS))](
            u, *matrices, y, before, batch, heads, length, chunks, REVERSE=reverse, OUTPUT=output, STATES=states,
            PRECISION=_precision(u.dtype), ROWS=_ROWS, T=T, WAVES=waves,
            num_warps=8 if u.dtype == torch.float32 else 4, num_stages=2, **registers(255),
        )  # fmt: skip
    return y, before


@torch.library.custom_op("polylib::s4d_scan", mutates_args=())
def _forward(u: Tensor, square: Tensor, into: Tensor, out: Tensor, factor: Tensor) -> Tensor:
    """Return y (B, H, L); the matrices as `_chunk_matrices` makes them."""
    u = u.contiguous()
    return _scan(u, (square, into, out, factor))[0] if u.numel() else torch.empty_like(u)


@_forward.register_fake
def _(u, square, into, out, factor):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.custom_op("polylib::s4d_scan_backward", mutates_args=())
def _backward(
    grad: Tensor, u: Tensor, square: Tensor, into: Tensor, out: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u and of the four matrices."""
    grad, u = grad.contiguous(), u.contiguous()
    (batch, heads, length), (T, waves) = u.shape, into.shape[-2:]
    if u.numel() == 0:
        return torch.empty_like(u), *(torch.zeros_like(t) for t in (square, into, out, factor))  # type: ignore[return-value]
    back = factor * factor.new_tensor([1.0, -1.0])[:, None]
    turned = (square.mT.contiguous(), out.mT.contiguous(), into.mT.contiguous(), back)
    _, states = _scan(u, (square, into, out, factor), output=False, states=True)
    du, of_states = _scan(grad, turned, states=True, reverse=True)
    chunks, tall = triton.cdiv(length, T), _ROWS if u.dtype == torch.float32 else 2 * _ROWS
    rows = batch * chunks
    # Only the shape decides how the sum is split: its order is the same on every device.
    splits = max(1, min(triton.cdiv(rows, tall), 512 // heads))
    part = triton.cdiv(triton.cdiv(rows, tall), splits) * tall
    splits = triton.cdiv(rows, part)
    sums = [t.new_empty(splits, *t.shape) for t in (square, into, out.mT, factor)]
    with on_device(u):
        _sum_kernel[(heads, splits)](
            u, grad, states, of_states, *sums, heads, length, chunks, rows, part,
            PRECISION=_precision(u.dtype), ROWS=tall, T=T, WAVES=waves, num_warps=8, num_stages=1, **registers(255),
        )  # fmt: skip
    by_square, by_into, by_out, by_factor = (t.sum(0) for t in sums)
    return du, by_square, by_into, by_out.mT.contiguous(), by_factor


@_backward.register_fake
def _(grad, u, square, into, out, factor):
    contiguous = torch.empty_like(u, memory_format=torch.contiguous_format)
    return contiguous, *(torch.empty_like(t) for t in (square, into, out, factor))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("s4d_scan"))


# --- the public function ----------------------------------------------------------------------------------------------


def s4d_scan(u: Tensor, v: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the causal convolution of u with `vandermonde(v, x, L)`, the response of diagonal state spaces.

    Args:
        u: (B, H, L), real, any strides: H channels at L times.
        v: (H, N), complex: weights of the waves, each of which also stands for its conjugate.
        x: (H, N), as v: the logarithm of what a wave is multiplied by from one time to the next.
        backend: "auto" runs the Triton kernels on CUDA tensors, u of float32, bfloat16 or float16 and v of complex64,
            with at most 64 waves; elsewhere and under `torch.func` it takes `vandermonde` and Fourier transforms.
            "triton" insists; "reference" adds the waves term by term. The kernels can be differentiated once.

    Returns:
        (B, H, L) in the dtype of u.

    Raises:
        ValueError: shapes or devices that don't fit, no time at all, an unknown backend, or the kernels asked for more
            than 64 waves.
        TypeError: a u that is not floating-point, v and x that are not complex tensors of one dtype, or a dtype the
            kernels don't have.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Gu and others, arXiv 2206.11893.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"u must be a torch.Tensor, got {type(u).__name__}")
    _checks.floating("dtype of u", u.dtype)
    _checks.shape("u", u, "(B, H, L) with L of at least 1", u.dim() == 3 and u.shape[-1] > 0)
    check_waves(v, x)
    _checks.shape("v", v, f"(H, N) with H = {u.shape[1]}", v.dim() == 2 and v.shape[0] == u.shape[1])
    if v.device != u.device:
        raise ValueError(f"v must be on the device of u, {u.device}, got {v.device}")
    chosen = choose_backend(backend, u)
    fits = v.shape[1] <= MOST_WAVES and v.dtype == torch.complex64
    if backend == "triton" and not fits:
        raise ValueError(
            f'backend="triton" needs at most {MOST_WAVES} waves in complex64, got {v.shape[1]} in {v.dtype}'
        )
    if chosen == "triton" and fits:
        T, waves = _sizes(u.shape[-1], v.shape[1])
        return _forward(u, *_chunk_matrices(v, x, T, waves))
    if backend == "reference":
        return s4d_scan_reference(u, v, x)
    return _by_transforms(u, vandermonde(v, x, u.shape[-1]))


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(batch: int, H: int, N: int, L: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Return the least bytes and flops, with chunks of 64: u read, y written, and the products.

    Backward: u and the gradient of y read, that of u written, and four times the products: the states again, the
    recurrence from the end, and the gradients of the matrices. What states take is no part of the least.
    """
    entries, T = batch * H * L, 64
    one = 2 * T + 8 * N
    small = 16 * H * N
    if backward:
        return Cost(3 * entries * dtype.itemsize + 2 * small, entries * (2 * one + 4 * N))
    return Cost(2 * entries * dtype.itemsize + small, entries * one)
