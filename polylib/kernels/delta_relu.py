r"""ReLU, rounding to multiples of a step, and what changes from frame to frame, in one pass.

Source: Yousefzadeh, Sifalakis, "Training for temporal sparsity in deep neural networks, application in video
processing", arXiv 2107.07305.

Shapes: x (B, T, ...), T frames of a clip, steps q > 0 of a shape that is broadcast to that of x, y as x, total and
count ().

$$a=\max(x,0),\quad k=\mathrm{round}(a/q),\quad y=qk,\quad
  \text{total}=\sum_{b,\,t\ge1}\lvert y_{bt}-y_{b,t-1}\rvert,\quad
  \text{count}=\#\{(b,\,t\ge1):y_{bt}\ne y_{b,t-1}\},$$

sums over all entries of the frames, halves rounded to even. y is rounded to the dtype of x; the differences are those
before this rounding, in float32. The first frame is no change.

The gradients are those that train steps. Rounding passes gradients on to a; q gets $-\sum gk$ of the gradient g of qk,
the opposite sign of the product rule, so that the gradient of the total by q is never positive, and descent raises q
wherever codes still change. With $\sigma_t$ the sign of $y_t-y_{t-1}$, zero for t = 0 and beyond the end,

$$g_t=\bar y_t+\overline{\text{total}}\,(\sigma_t-\sigma_{t+1}),\qquad
  \bar x_t=g_t\,1[x_t>0],\qquad \bar q=-\sum g_tk_t.$$

In eager PyTorch these are about ten passes over memory. Here a program walks through the frames of some entries, with
the frame before, and backward also the one behind, in registers: x is read and y written, and backward x and the
gradient of y are read and that of x is written. Saved are x and q; codes are computed again. Sums are partial ones, one
a program, added up in a fixed order.

Kernels: float32, bfloat16 or float16, with one step, or one for each index of the leading axes of a frame. Reference:
any floating dtype; half precisions in float32.
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
    round_half_even,
    store,
    tl,
    triton,
    unit,
    widened,
)
from polylib.kernels._cost import Cost

_PROGRAMS = 1056  # of a pass: eight for each multiprocessor of a large GPU

# --- the definition ---------------------------------------------------------------------------------------------------


def delta_relu_reference(x: Tensor, q: Tensor, relu: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, total, count) in plain PyTorch."""
    y, total, count, _ = _Definition.apply(x.relu() if relu else x, q)
    return y, total, count


def changes(y: Tensor) -> Tensor:
    """Differences of neighbouring frames, (B, T - 1, ...): zero where the values are equal."""
    return y[:, 1:] - y[:, :-1]


def summed_as(entries: Tensor, like: Tensor) -> Tensor:
    """Return the sums of the entries that share one of `like`, in its shape and dtype."""
    extra = entries.dim() - like.dim()
    shared = [extra + k for k, size in enumerate(like.shape) if size == 1]
    axes = [*range(extra), *shared]
    total = entries.sum(axes, keepdim=True) if axes else entries
    return total.reshape(like.shape).to(like.dtype)


class _Definition(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step = widened(q)
        code = (widened(a) / step).round_()
        y = code * step
        change = changes(y)
        count = (change != 0).sum()
        return y.to(a.dtype), change.abs_().sum(), count, code

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1], output[3])
        ctx.mark_non_differentiable(*output[2:])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_sum: Tensor, *_: Any) -> Any:
        q, code = ctx.saved_tensors
        slope = g_sum * changes(code * widened(q)).sign()  # of the total by the later frame of each pair
        none = torch.zeros_like(slope[:, :1])
        each = widened(g) + torch.cat([none, slope], 1) - torch.cat([slope, none], 1)
        by_step = -summed_as(each * code, q) if ctx.needs_input_grad[1] else None
        return each.to(ctx.dtype), by_step


# --- the kernels ------------------------------------------------------------------------------------------------------
# A frame is a row of N = UNIT * n entries. Entry i has the step i // (N / S) of S.


@triton.jit
def _entries(n, S, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The places in a frame of this program's entries, which exist, and the numbers of their steps."""
    N = n * UNIT
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return N, at, at < N, at // (N // S)


@triton.jit
def _quantized(x, step, RELU: tl.constexpr):
    """The code of x and its value."""
    if RELU:
        x = tl.where(x <= 0, 0.0, x)  # a NaN stays
    code = round_half_even(tl.div_rn(x, step))
    return code, code * step


@triton.jit(do_not_specialize=["B"])
def _forward_kernel(
    x, q, y, totals, counts, B, T, n, S, clips, UNIT: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    N, at, ok, which = _entries(n, S, UNIT, BLOCK)
    step = tl.load(q + which, mask=ok, other=1.0)
    total, count = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for clip in range(clips):
        b = tl.program_id(0).to(tl.int64) * clips + clip
        exists = ok & (b < B)
        # excerpt: begin
        _, before = _quantized(load(x + b * T * N + at, exists), step, RELU)
        store(y + b * T * N + at, before, exists)
        for t in range(1, T):
            _, value = _quantized(load(x + (b * T + t) * N + at, exists), step, RELU)
            store(y + (b * T + t) * N + at, value, exists)
            total += tl.abs(value - before)
            count += (value != before).to(tl.int32)
            before = value
        # excerpt: end
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(totals + part, tl.sum(total, axis=0))
    tl.store(counts + part, tl.sum(count, axis=0))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit(do_not_specialize=["B"])
def _backward_kernel(
    grad, by_total, x, q, by_x, by_q, B, T, n, S, clips,
    UNIT: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N, at, ok, which = _entries(n, S, UNIT, BLOCK)
    step, weight = tl.load(q + which, mask=ok, other=1.0), tl.load(by_total)
    total = tl.zeros((BLOCK,), tl.float32)
    for clip in range(clips):
        b = tl.program_id(0).to(tl.int64) * clips + clip
        exists = ok & (b < B)
        here = load(x + b * T * N + at, exists)
        code, value = _quantized(here, step, RELU)
        rise = tl.zeros((BLOCK,), tl.float32)
        for t in range(T):
            place = (b * T + t) * N
            behind = load(x + place + N + at, exists & (t + 1 < T))
            next_code, next_value = _quantized(behind, step, RELU)
            next_rise = tl.where(t + 1 < T, _sign(next_value - value), 0.0)
            each = load(grad + place + at, exists) + weight * (rise - next_rise)
            total += tl.where(exists, each * code, 0.0)
            if RELU:
                each = tl.where(here <= 0, 0.0, each)
            store(by_x + place + at, each, exists)
            here, code, value, rise = behind, next_code, next_value, next_rise
    tl.store(by_q + tl.program_id(0).to(tl.int64) * N + at, -total, mask=ok)


# --- registration -----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, x: Tensor, q: Tensor, relu: bool, *tensors: Tensor, grid: tuple[int, int], clips: int) -> None:
    B, T, N = x.shape
    with on_device(x):
        kernel[grid](*tensors, B, T, N // unit(N), len(q), clips, UNIT=unit(N), RELU=relu, BLOCK=_block(N), num_warps=4)


def _block(N: int) -> int:
    return min(max(triton.next_power_of_2(N), 128), 1024)


def _grid(x: Tensor) -> tuple[tuple[int, int], int]:
    """Return the grid of programs and the clips of each."""
    B, _, N = x.shape
    tiles = triton.cdiv(N, _block(N))
    clips = max(1, triton.cdiv(B * tiles, _PROGRAMS))
    return (triton.cdiv(B, clips), tiles), clips


@torch.library.custom_op("polylib::delta_relu", mutates_args=())
def _forward(x: Tensor, q: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, total, count); x (B, T, N), q (S,) float32, where S divides N."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y, q.new_zeros(()), torch.zeros((), dtype=torch.int64, device=x.device)
    grid, clips = _grid(x)
    totals = q.new_empty(grid)
    counts = torch.empty(grid, dtype=torch.int32, device=x.device)
    _launch(_forward_kernel, x, q, relu, x, q.contiguous(), y, totals, counts, grid=grid, clips=clips)
    return y, totals.sum(), counts.sum()


@_forward.register_fake
def _(x, q, relu):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, q.new_empty(()), torch.empty((), dtype=torch.int64, device=x.device)


@torch.library.custom_op("polylib::delta_relu_backward", mutates_args=())
def _backward(grad: Tensor, by_total: Tensor, x: Tensor, q: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and q."""
    x, by_x = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return by_x, torch.zeros_like(q)
    grid, clips = _grid(x)
    by_q = q.new_empty(grid[0], x.shape[2])
    tensors = grad.contiguous(), by_total.float(), x, q.contiguous(), by_x, by_q
    _launch(_backward_kernel, x, q, relu, *tensors, grid=grid, clips=clips)
    return by_x, by_q.view(grid[0], len(q), -1).sum((0, 2))


@_backward.register_fake
def _(grad, by_total, x, q, relu):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(q)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.relu = inputs[2]
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad: Tensor, by_total: Tensor, _by_count: Any) -> tuple:
    return *_backward(grad, by_total, *ctx.saved_tensors, ctx.relu), None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("delta_relu"))


# --- the public function ----------------------------------------------------------------------------------------------


def delta_relu(
    x: Tensor, q: Tensor, relu: bool = True, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return x rounded to multiples of q, and how much of it changes from frame to frame.

    Args:
        x: (batch, frames, ...), at least two frames.
        q: positive, of a shape that is broadcast to that of x. Its values are not looked at.
        relu: whether negative entries are set to zero first.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16 with steps that don't
            differ between clips or frames, and the reference elsewhere and under `torch.func`; "triton" and
            "reference" insist. The kernels can be differentiated once.

    Returns:
        The rounded values, as x; the sum of the absolute differences of neighbouring frames, (), at least float32; how
        many of these differences are not zero, (), int64, without a gradient.

    Raises:
        ValueError: fewer than two frames, a q of another shape or device, an unknown backend, or the kernels asked for
            steps of single clips or frames.
        TypeError: tensors that are not floating-point; a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2107.07305.
    """
    check_tensors({"x": x})
    check_tensors({"q": q})
    if q.device != x.device:
        raise ValueError(f"q must be on the device of x, {x.device}, got {q.device}")
    _checks.shape("x", x, "(batch, frames, ...) with at least two frames", x.dim() >= 2 and x.shape[1] >= 2)
    check_steps(x, q)
    chosen = choose_backend(backend, x)
    of_frames = q.dim() <= x.dim() - 2 or all(size == 1 for size in q.shape[: q.dim() - x.dim() + 2])
    if backend == "triton" and not of_frames:
        raise ValueError(f'q must be the same for all clips and frames for backend="triton", got {tuple(q.shape)}')
    if chosen == "triton" and of_frames:
        frame = x.shape[2:]
        flat = x.reshape(*x.shape[:2], frame.numel())
        y, total, count = _forward(flat, _steps(q, frame), relu)
        return y.view(x.shape), total, count
    return delta_relu_reference(x, q, relu)


def check_steps(x: Tensor, q: Tensor) -> None:
    """Raise ValueError unless q has a shape that is broadcast to that of x."""
    fits = q.dim() <= x.dim() and all(n in (1, m) for n, m in zip(q.shape[::-1], x.shape[::-1], strict=False))
    _checks.shape("q", q, f"that is broadcast to {tuple(x.shape)}", fits)


def _steps(q: Tensor, frame: torch.Size) -> Tensor:
    """Return q in float32 as one axis: one step for each index of as few leading axes of a frame as differ."""
    q = q.float().reshape(q.shape[max(q.dim() - len(frame), 0) :])
    q = q.reshape((1,) * (len(frame) - q.dim()) + q.shape)
    leading = max([0, *(axis + 1 for axis, size in enumerate(q.shape) if size != 1)])
    return q.reshape(q.shape[:leading]).expand(frame[:leading]).reshape(-1)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(entries: int, steps: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Return the least bytes and flops for all entries of all frames: x read and y written.

    Backward, x and the gradient of y are read and that of x is written, and the steps' gradients are written.
    """
    passes = 3 if backward else 2
    return Cost(passes * entries * dtype.itemsize + 4 * steps * (1 + backward), (9 if backward else 6) * entries)
