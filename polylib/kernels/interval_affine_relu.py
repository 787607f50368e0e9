r"""Intervals through a scale and a shift for each channel, as batch normalisation has them, and ReLU, in one pass.

Source: Shi, Wang, Zhang, Yi, Hsieh, "Fast certified robust training with short warmup", arXiv 2103.17268, where batch
normalisation follows every layer, with the statistics of the clean batch.

Shapes: centre c and radius r (B, C, ...), scale k and shift t (C,), results as c.

$$m=kc+t,\quad d=\lvert k\rvert r,\quad l=\max(m-d,0),\quad u=\max(m+d,0),\qquad
  c'=\tfrac12(l+u),\quad r'=\tfrac12(u-l).$$

m and d, the bounds before ReLU, are written too if they are asked for: regularisers need them. With the gradients $g$
of $c'$ and $h$ of $r'$, and those of m and d,

$$\bar m=\tfrac12(g-h)\,1[l>0]+\tfrac12(g+h)\,1[u>0]+g_m,\qquad
  \bar d=\tfrac12(g+h)\,1[u>0]-\tfrac12(g-h)\,1[l>0]+g_d,$$

$$\nabla c=k\bar m,\quad \nabla r=\lvert k\rvert\bar d,\quad
  \nabla k=\sum c\,\bar m+\mathrm{sign}(k)\sum r\,\bar d,\quad \nabla t=\sum\bar m .$$

In eager PyTorch this is about ten passes that read and ten that write. Here c and r are read and two results written,
or four; backward reads c, r and the gradients of what was written, and writes two. Saved are c, r, k and t: the masks
are formed again. A program has some entries of a sample, whose scales it reads once, and walks through samples; its
sums for k and t are partial ones, added up in a fixed order.

Kernels: float32, bfloat16 or float16, computed in float32. Reference: any floating dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import (
    check_tensors,
    choose_backend,
    load,
    no_double_backward,
    on_device,
    store,
    tl,
    triton,
    unit,
    widened,
)
from polylib.kernels._cost import Cost

_PROGRAMS = 1056  # of a pass: eight for each multiprocessor of a large GPU

# --- the definition ---------------------------------------------------------------------------------------------------


def interval_affine_relu_reference(
    center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor, bounds: bool = False
) -> tuple[Tensor, ...]:
    """Return (c', r'), and with `bounds` (c', r', m, d), in plain PyTorch."""
    shape = (len(scale),) + (1,) * (center.dim() - 2)
    k, t = widened(scale).view(shape), widened(shift).view(shape)
    m, d = widened(center) * k + t, widened(radius) * k.abs()
    low, high = (m - d).relu(), (m + d).relu()
    found = ((low + high) / 2, (high - low) / 2, m, d)
    return tuple(part.to(center.dtype) for part in (found if bounds else found[:2]))


# --- the kernels ------------------------------------------------------------------------------------------------------
# A sample is a row of N = UNIT * n entries, C channels of N / C neighbours each.


@triton.jit
def _entries(scale, n, C, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: places in a sample, which exist, their channels, and the scales of these."""
    N = n * UNIT
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = at // (N // C)
    return N, at, at < N, channel, load(scale + channel, at < N)


@triton.jit(do_not_specialize=["B"])
def _forward_kernel(
    center, radius, scale, shift, c_out, r_out, m_out, d_out, B, n, C, samples,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N, at, ok, channel, k = _entries(scale, n, C, UNIT, BLOCK)
    t = load(shift + channel, ok)
    for sample in range(samples):
        b = tl.program_id(0).to(tl.int64) * samples + sample
        exists = ok & (b < B)
        # excerpt: begin
        m = load(center + b * N + at, exists) * k + t
        d = load(radius + b * N + at, exists) * tl.abs(k)
        low, high = m - d, m + d
        low, high = tl.where(low <= 0, 0.0, low), tl.where(high <= 0, 0.0, high)  # a NaN stays
        store(c_out + b * N + at, 0.5 * (low + high), exists)
        store(r_out + b * N + at, 0.5 * (high - low), exists)
        # excerpt: end
        if m_out is not None:
            store(m_out + b * N + at, m, exists)
            store(d_out + b * N + at, d, exists)


@triton.jit(do_not_specialize=["B"])
def _backward_kernel(
    g, h, g_m, g_d, center, radius, scale, shift, by_c, by_r, by_k, by_t, B, n, C, samples,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N, at, ok, channel, k = _entries(scale, n, C, UNIT, BLOCK)
    t = load(shift + channel, ok)
    sign = tl.where(k > 0, 1.0, tl.where(k < 0, -1.0, k))
    sum_k, sum_t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for sample in range(samples):
        b = tl.program_id(0).to(tl.int64) * samples + sample
        exists = ok & (b < B)
        c, r = load(center + b * N + at, exists), load(radius + b * N + at, exists)
        m, d = c * k + t, r * tl.abs(k)
        by_center, by_radius = load(g + b * N + at, exists), load(h + b * N + at, exists)
        low = tl.where(m - d <= 0, 0.0, 0.5 * (by_center - by_radius))
        high = tl.where(m + d <= 0, 0.0, 0.5 * (by_center + by_radius))
        by_m, by_d = low + high, high - low
        if g_m is not None:
            by_m += load(g_m + b * N + at, exists)
            by_d += load(g_d + b * N + at, exists)
        store(by_c + b * N + at, k * by_m, exists)
        store(by_r + b * N + at, tl.abs(k) * by_d, exists)
        sum_k += tl.where(exists, c * by_m + sign * r * by_d, 0.0)
        sum_t += tl.where(exists, by_m, 0.0)
    part = tl.program_id(0).to(tl.int64) * N + at
    tl.store(by_k + part, sum_k, mask=ok)
    tl.store(by_t + part, sum_t, mask=ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _block(N: int) -> int:
    return min(max(triton.next_power_of_2(N), 128), 1024)


def _grid(B: int, N: int) -> tuple[tuple[int, int], int]:
    """Return the grid of programs and the samples of each."""
    tiles = triton.cdiv(N, _block(N))
    samples = max(1, triton.cdiv(B * tiles, _PROGRAMS))
    return (triton.cdiv(B, samples), tiles), samples


def _launch(kernel: Any, *tensors: Tensor | None, like: Tensor, channels: int) -> None:
    (B, N), (grid, samples) = like.shape, _grid(*like.shape)
    with on_device(like):
        kernel[grid](*tensors, B, N // unit(N), channels, samples, UNIT=unit(N), BLOCK=_block(N), num_warps=4)


@torch.library.custom_op("polylib::interval_affine_relu", mutates_args=())
def _forward(
    center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor, bounds: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (c', r', m, d); centre and radius (B, N), scale and shift (C,) where C divides N. m, d empty or wanted."""
    c, r = center.contiguous(), radius.contiguous()
    out = [torch.empty_like(c) for _ in range(2)]
    pre = [torch.empty_like(c) if bounds else c.new_empty(0) for _ in range(2)]
    if c.numel():
        written = pre if bounds else [None, None]
        parameters = scale.contiguous(), shift.contiguous()
        _launch(_forward_kernel, c, r, *parameters, *out, *written, like=c, channels=len(scale))
    return out[0], out[1], pre[0], pre[1]


@_forward.register_fake
def _(center, radius, scale, shift, bounds):
    shapes = [center.shape] * 2 + [center.shape if bounds else (0,)] * 2
    return tuple(center.new_empty(shape) for shape in shapes)


@torch.library.custom_op("polylib::interval_affine_relu_backward", mutates_args=())
def _backward(
    g: Tensor, h: Tensor, g_m: Tensor | None, g_d: Tensor | None,
    center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the centre, the radius, the scale and the shift."""
    c, r = center.contiguous(), radius.contiguous()
    by_c, by_r = torch.empty_like(c), torch.empty_like(c)
    if not c.numel():
        return by_c, by_r, torch.zeros_like(scale), torch.zeros_like(shift)
    grads = [t if t is None else t.contiguous() for t in (g, h, g_m, g_d)]
    parts = c.new_empty(2, _grid(*c.shape)[0][0], c.shape[1], dtype=torch.float32)
    parameters = scale.contiguous(), shift.contiguous()
    _launch(_backward_kernel, *grads, c, r, *parameters, by_c, by_r, *parts, like=c, channels=len(scale))
    by_k, by_t = (part.view(len(part), len(scale), -1).sum((0, 2)) for part in parts)
    return by_c, by_r, by_k.to(scale.dtype), by_t.to(shift.dtype)


@_backward.register_fake
def _(g, h, g_m, g_d, center, radius, scale, shift):
    shape = center.shape
    return center.new_empty(shape), center.new_empty(shape), torch.empty_like(scale), torch.empty_like(shift)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.bounds = inputs[4]
    if not ctx.bounds:
        ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, g: Tensor, h: Tensor, g_m: Tensor, g_d: Tensor) -> tuple:
    pre = (g_m, g_d) if ctx.bounds else (None, None)
    return *_backward(g, h, *pre, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("interval_affine_relu"))


# --- the public function ----------------------------------------------------------------------------------------------


def interval_affine_relu(
    center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor, bounds: bool = False, *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Return the box of max(scale z + shift, 0) for z in the box of the given centre and radius.

    Args:
        center: (batch, channels, ...).
        radius: as center, half the width of each interval. That it is not negative is not looked at.
        scale, shift: (channels,), floating-point, of any dtype. Batch normalisation has the scale weight /
            sqrt(variance + eps) and the shift bias - mean scale.
        bounds: whether to return the box before ReLU as well.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16, and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        Centre and radius after ReLU, and with `bounds` those before it; all as center.

    Raises:
        ValueError: a shape that does not fit, tensors on different devices, an unknown backend.
        TypeError: tensors that are not floating-point, a radius of another dtype, a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2103.17268.
    """
    check_tensors({"center": center, "radius": radius})
    _checks.shape("center", center, "(batch, channels, ...)", center.dim() >= 2)
    _checks.shape("radius", radius, f"{tuple(center.shape)}, as center", radius.shape == center.shape)
    for name, own in (("scale", scale), ("shift", shift)):
        check_tensors({name: own})
        _checks.shape(
            name, own, f"({center.shape[1]},), one for each channel of center", own.shape == center.shape[1:2]
        )
        if own.device != center.device:
            raise ValueError(f"{name} must be on the device of center, {center.device}, got {own.device}")
    if choose_backend(backend, center) == "reference":
        return interval_affine_relu_reference(center, radius, scale, shift, bounds)
    size = center[:1].numel() if len(center) else 0
    flat = (t.reshape(len(center), size) for t in (center, radius))
    found = _forward(*flat, scale, shift, bounds)
    return tuple(part.view(center.shape) for part in (found if bounds else found[:2]))


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(entries: int, channels: int, dtype: torch.dtype, *, bounds: bool = False, backward: bool = False) -> Cost:
    """Return the least bytes and flops: everything read once and written once, with scales in float32."""
    passes = (4 if bounds else 2) + (4 if backward else 2)
    return Cost(
        passes * entries * dtype.itemsize + (16 if backward else 8) * channels, (17 if backward else 9) * entries
    )
