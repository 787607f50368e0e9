r"""Sums of decaying waves: $K_{hl} = 2\,\mathrm{Re}\sum_n v_{hn}\,e^{x_{hn} l}$ at the times $l = 0, \dots, L-1$.

Source: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models", arXiv
2206.11893: the kernel of a diagonal state space model, a Vandermonde matrix times a vector. A wave stands for itself
and for its conjugate, hence the 2.

Shapes: v and x (..., N), complex, x the logarithm of a wave's factor from one time to the next; K (..., L), real.
Kernels: complex64, accumulated in float32. Reference: complex64 and complex128.

Written out, this is one exponential for each of H N L terms. With $l = T l_1 + l_2$ it is a product of matrices, and
$L/T + T$ exponentials for each wave:

$$K_{l_1 l_2} = 2\,\mathrm{Re}\sum_n U_{l_1 n} E_{n l_2}, \qquad
  U_{l_1 n} = v_n e^{x_n T l_1}, \qquad E_{n l_2} = e^{x_n l_2}.$$

A program makes a tile of K: a tile of U and one of E in registers, two products of real matrices, one store. Neither U
nor E is ever in memory, and K is written once. Two steps have more digits than the rest. Phases reach thousands of
turns, of which float32 would leave two digits: the turns are counted in float64, and their fraction goes on in float32.
And the products are made of three products in tf32 each (`tf32x3`), as good as float32 and still on tensor cores.

What is saved for backward: v and x. With G the gradient of K,

$$\nabla v_n = 2\sum_l G_l\,\overline{e^{x_n l}}, \qquad
  \nabla x_n = 2\,\overline{v_n}\sum_l l\,G_l\,\overline{e^{x_n l}},$$

in PyTorch's convention for complex numbers. In two levels: with $R^0 = G E^*$ and $R^1 = (G \circ l_2) E^*$, both
products of a tile of G that is read once, the sums over $l_1$ of $\overline{e^{xTl_1}}R^0$ and of
$\overline{e^{xTl_1}}(T l_1 R^0 + R^1)$. Parts of these are added in a fixed order: the same bits always.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import choose_backend, no_double_backward, on_device, registers, tl, triton
from polylib.kernels._cost import Cost

# --- the definition ---------------------------------------------------------------------------------------------------


def vandermonde_reference(v: Tensor, x: Tensor, L: int) -> Tensor:
    """Return K (..., L) in plain PyTorch, with one exponential for each term, (..., N, L) numbers.

    Exponentials are computed in complex128, their sum in the dtype of v. Differentiable any number of times.
    """
    times = torch.arange(L, device=x.device)
    return 2 * (v[..., None] * _exponentials(x, times)).sum(-2).real


def vandermonde_factored(v: Tensor, x: Tensor, L: int) -> Tensor:
    """Return the same by the two-level product, with about the square root of L exponentials for each wave."""
    T = 2 ** round(math.log2(max(L, 1)) / 2)
    first, second = (torch.arange(n, device=x.device) for n in (-(-L // T), T))
    U = v[..., None, :] * _exponentials(x, T * first).mT
    E = _exponentials(x, second)
    device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    with torch.autocast(device, enabled=False):  # it would leave the products of complex64 three digits
        K = U.real @ E.real - U.imag @ E.imag
    return 2 * K.flatten(-2)[..., :L]


def _exponentials(x: Tensor, times: Tensor) -> Tensor:
    """e^(x l), (..., N, times), rounded to the dtype of x."""
    return (x.to(torch.complex128)[..., None] * times).exp().to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------

_WAVES, _ROWS = 16, 32  # waves that a program adds at a time, and rows of the largest tile


@triton.jit
def _wave(re, im, times):
    """Real and imaginary part of exp((re + i im) times), all in float32 but the turns."""
    turns = im.to(tl.float64) * 0.15915494309189535 * times.to(tl.float64)
    turn = (turns - tl.floor(turns + 0.5)).to(tl.float32)
    # To the nearest quarter of a turn, and from there by the first terms of the series, which are exact to float32:
    # the library's sine keeps a table in memory for angles that don't occur here.
    quarter = tl.floor(4 * turn + 0.5)
    angle = 6.283185307179586 * (turn - 0.25 * quarter)
    square = angle * angle
    sine = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square / 362880))))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square / 40320)))
    odd, size = tl.abs(quarter) == 1, tl.exp(re * times.to(tl.float32))
    sign = tl.where(tl.abs(quarter) == 2, -1.0, 1.0)
    cos = tl.where(odd, -quarter * sine, sign * cosine)
    sin = tl.where(odd, quarter * cosine, sign * sine)
    return size * cos, size * sin


@triton.jit
def _pair(numbers, at, ok):
    """Real and imaginary parts of complex numbers, which lie side by side."""
    return tl.load(numbers + 2 * at, mask=ok, other=0.0), tl.load(numbers + 2 * at + 1, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["waves"])
def _forward_kernel(
    v, x, out, waves, length,
    PRECISION: tl.constexpr, WAVES: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    second = tl.arange(0, T)
    total = tl.zeros((ROWS, T), tl.float32)
    # excerpt: begin
    for start in range(0, waves, WAVES):
        n = start + tl.arange(0, WAVES)
        ok = n < waves
        v_re, v_im = _pair(v, h * waves + n, ok)
        x_re, x_im = _pair(x, h * waves + n, ok)
        e_re, e_im = _wave(x_re[:, None], x_im[:, None], second[None, :])
        a_re, a_im = _wave(x_re[None, :], x_im[None, :], first[:, None] * T)
        u_re = v_re[None, :] * a_re - v_im[None, :] * a_im
        u_im = v_re[None, :] * a_im + v_im[None, :] * a_re
        total = tl.dot(u_re, e_re, total, input_precision=PRECISION)
        total = tl.dot(-u_im, e_im, total, input_precision=PRECISION)
    # excerpt: end
    time = first[:, None] * T + second[None, :]
    tl.store(out + h * length + time, 2 * total, mask=time < length)


@triton.jit(do_not_specialize=["waves", "part"])
def _backward_kernel(
    grad, v, x, by_v, by_x, waves, length, part,
    PRECISION: tl.constexpr, WAVES: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    h, split = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * WAVES + tl.arange(0, WAVES)
    ok, second = n < waves, tl.arange(0, T)
    x_re, x_im = _pair(x, h * waves + n, ok)
    e_re, e_im = _wave(x_re[None, :], x_im[None, :], second[:, None])
    v_grad_re, v_grad_im = tl.zeros((WAVES,), tl.float32), tl.zeros((WAVES,), tl.float32)
    x_grad_re, x_grad_im = tl.zeros((WAVES,), tl.float32), tl.zeros((WAVES,), tl.float32)
    for tile in range(split * part, (split + 1) * part):
        first = tile * ROWS + tl.arange(0, ROWS)
        time = first[:, None] * T + second[None, :]
        g = tl.load(grad + h * length + time, mask=time < length, other=0.0)
        later = g * second[None, :].to(tl.float32)
        zero = tl.zeros((ROWS, WAVES), tl.float32)
        r_re = tl.dot(g, e_re, zero, input_precision=PRECISION)
        r_im = -tl.dot(g, e_im, zero, input_precision=PRECISION)
        s_re = tl.dot(later, e_re, zero, input_precision=PRECISION)
        s_im = -tl.dot(later, e_im, zero, input_precision=PRECISION)
        anchor = tl.where(first * T < length, first * T, 0)[:, None]  # beyond the end a growing wave may overflow
        a_re, a_im = _wave(x_re[None, :], x_im[None, :], anchor)
        s_re += anchor.to(tl.float32) * r_re
        s_im += anchor.to(tl.float32) * r_im
        v_grad_re += tl.sum(a_re * r_re + a_im * r_im, axis=0)
        v_grad_im += tl.sum(a_re * r_im - a_im * r_re, axis=0)
        x_grad_re += tl.sum(a_re * s_re + a_im * s_im, axis=0)
        x_grad_im += tl.sum(a_re * s_im - a_im * s_re, axis=0)
    v_re, v_im = _pair(v, h * waves + n, ok)
    at = (split * tl.num_programs(0) + h) * waves + n
    tl.store(by_v + 2 * at, 2 * v_grad_re, mask=ok)
    tl.store(by_v + 2 * at + 1, 2 * v_grad_im, mask=ok)
    tl.store(by_x + 2 * at, 2 * (v_re * x_grad_re + v_im * x_grad_im), mask=ok)
    tl.store(by_x + 2 * at + 1, 2 * (v_re * x_grad_im - v_im * x_grad_re), mask=ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _tile(L: int, widest: int) -> tuple[int, int]:
    """T, and the rows of a tile, so that short kernels fill it, too."""
    T = min(max(triton.next_power_of_2(math.isqrt(max(L - 1, 0)) + 1), 16), widest)
    return T, min(max(triton.next_power_of_2(triton.cdiv(L, T)), 16), _ROWS)


def _precision() -> str:
    return "bf16x6" if torch.version.hip else "tf32x3"


@torch.library.custom_op("polylib::vandermonde", mutates_args=())
def _forward(v: Tensor, x: Tensor, L: int) -> Tensor:
    """Return K (H, L); v and x (H, N)."""
    (H, N), (T, rows) = v.shape, _tile(L, 128)
    out = v.new_empty(H, L, dtype=torch.float32)
    if H == 0 or N == 0:
        return out.zero_()
    with on_device(v):
        _forward_kernel[(H, triton.cdiv(L, rows * T))](
            torch.view_as_real(v.contiguous()), torch.view_as_real(x.contiguous()), out, N, L,
            PRECISION=_precision(), WAVES=_WAVES, ROWS=rows, T=T, num_warps=max(rows * T // 512, 1), **registers(255),
        )  # fmt: skip
    return out


@_forward.register_fake
def _(v, x, L):
    return v.new_empty(v.shape[0], L, dtype=torch.float32)


@torch.library.custom_op("polylib::vandermonde_backward", mutates_args=())
def _backward(grad: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of v and x (H, N); grad (H, L)."""
    (H, N), L = v.shape, grad.shape[1]
    if H == 0 or N == 0:
        return torch.zeros_like(v), torch.zeros_like(x)
    T, rows = _tile(L, 32)  # its exponentials stay in registers; more of them would not
    tiles, blocks = triton.cdiv(L, rows * T), triton.cdiv(N, _WAVES)
    # Only the shape decides how the sum over time is split: its order is the same on every device.
    part = triton.cdiv(tiles, max(1, min(tiles, 512 // (H * blocks))))
    splits = triton.cdiv(tiles, part)
    by_v, by_x = (v.new_empty(splits, H, N, 2, dtype=torch.float32) for _ in range(2))
    with on_device(v):
        _backward_kernel[(H, blocks, splits)](
            grad.contiguous(), torch.view_as_real(v.contiguous()), torch.view_as_real(x.contiguous()), by_v, by_x,
            N, L, part, PRECISION=_precision(), WAVES=_WAVES, ROWS=rows, T=T, num_warps=max(rows * T // 256, 1),
            **registers(255),
        )  # fmt: skip
    return torch.view_as_complex(by_v.sum(0)), torch.view_as_complex(by_x.sum(0))


@_backward.register_fake
def _(grad, v, x):
    return torch.empty_like(v), torch.empty_like(x)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("vandermonde"))


# --- the public function ----------------------------------------------------------------------------------------------


def check_waves(v: Tensor, x: Tensor) -> None:
    """Raise TypeError unless v and x are complex tensors of one dtype, ValueError unless of one shape and device."""
    for name, tensor in (("v", v), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.complex64, torch.complex128):
            raise TypeError(f"{name} must have dtype torch.complex64 or torch.complex128, got {tensor.dtype}")
    _checks.shape("v", v, "(..., N)", v.dim() >= 1)
    _checks.shape("x", x, f"that of v, {tuple(v.shape)}", x.shape == v.shape)
    if x.dtype != v.dtype:
        raise TypeError(f"x must have the dtype of v, {v.dtype}, got {x.dtype}")
    if x.device != v.device:
        raise ValueError(f"x must be on the device of v, {v.device}, got {x.device}")


def vandermonde(v: Tensor, x: Tensor, L: int, *, backend: str = "auto") -> Tensor:
    """Return `2 * (v[..., None] * exp(x[..., None] * arange(L))).sum(-2).real`.

    Args:
        v: (..., N), complex, any strides: weights of the waves, each of which also stands for its conjugate.
        x: (..., N), as v: the logarithm of what a wave is multiplied by from one time to the next.
        L: how many times, at least 1.
        backend: "auto" runs the Triton kernels on CUDA tensors of complex64 and the two-level product in PyTorch
            elsewhere and under `torch.func`; "triton" insists; "reference" has one exponential for each term. The
            kernels can be differentiated once.

    Returns:
        (..., L), real, of the precision of v, under `torch.autocast`, too.

    Raises:
        ValueError: shapes or devices that don't fit, an L that is no positive integer, an unknown backend.
        TypeError: not complex tensors of one dtype.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Gu and others, arXiv 2206.11893.
    """
    check_waves(v, x)
    L = _checks.integer("L", L, least=1)
    chosen = choose_backend(backend, v, (torch.complex64,))
    if chosen == "triton":
        *rows, N = v.shape
        return _forward(*(t.reshape(math.prod(rows), N) for t in (v, x)), L).view(*rows, L)
    return (vandermonde_reference if backend == "reference" else vandermonde_factored)(v, x, L)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(H: int, N: int, L: int, *, backward: bool = False) -> Cost:
    """Return the least bytes and flops in complex64: v and x read, K written; the products of the two-level sum.

    Backward: v, x and the gradient of K read, two gradients written, and twice the products.
    """
    small = 16 * H * N
    return Cost(small * (2 if backward else 1) + 4 * H * L, 4 * H * N * L * (2 if backward else 1))
