r"""The projection of each row on the vectors that are not negative, have a given sum, and at most k entries.

Source: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466, where each
evaluation of the semi-dual is one such projection for every column of the plan.

Shapes: scores s (R, m), mass b (R,), plan t (R, m). With T the k largest entries of a row, of equal ones the first,

$$t = \arg\max_{t\ge0,\ \sum_i t_i=b,\ \|t\|_0\le k}\ s^\top t-\tfrac12\|t\|^2,\qquad
  t_i=\begin{cases}[s_i-\theta]_+ & i\in T\\ 0 & \text{else,}\end{cases}\qquad
  \sum_{i\in T}[s_i-\theta]_+=b.$$

An entry of minus infinity is never chosen. A row with a NaN, with plus infinity or with nothing else than minus
infinity is NaN, as is one whose mass is no finite number; a mass of zero or less gives zeros. Kernels: scores and plan
in float32, bfloat16 or float16, rows of up to 8,192 entries, arithmetic in float32. Reference: any floating dtype and
length, half precisions computed in float32.

Eager PyTorch sorts a row or selects from it, gathers, sums up, compares, and scatters, in eight passes and more. Here
a program has its rows in registers and sorts nothing. The k-th largest entry is found bit by bit, as that of an
integer that has the order of the numbers: at most 32 counts, which cost no memory, fewer as soon as exactly k are left.
The threshold $\theta$ is then found by Newton's method: from all of T, it is that at which the entries inside would
have the sum b; those below it leave, until none does. Both loops are short, and each of their steps waits for all warps
of the program, which for long rows may take more time than the memory.

The gradient needs the plan alone. On its support, of n entries, $\bar s_i=\bar t_i-\frac1n\sum_j\bar t_j$, and
$\bar b=\frac1n\sum_j\bar t_j$; which entries are chosen does not change with a small step. So the plan is all that is
saved, and one pass reads it with its gradient. The support is that of the plan as it was rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import (
    check_shape,
    check_tensors,
    choose_backend,
    load,
    no_double_backward,
    on_device,
    store,
    tl,
    triton,
    widened,
)
from polylib.kernels._cost import Cost

_LONGEST = 8192

# --- the definition ---------------------------------------------------------------------------------------------------


def topk_simplex_reference(scores: Tensor, mass: Tensor, k: int) -> Tensor:
    """Return the plan (R, m) in plain PyTorch; 1 <= k <= m."""
    s, mass = widened(scores), mass.to(widened(scores).dtype)[:, None]
    bad = (s.isnan() | (s == torch.inf)).any(1, keepdim=True) | (s == -torch.inf).all(1, keepdim=True)
    bad |= ~(mass < torch.inf)
    s = torch.where(bad, 0.0, s)
    s = s - s.detach().amax(1, keepdim=True)  # what is far below the largest must not cost it its digits
    with torch.no_grad():
        inside = _support(s, mass, k)
    theta = (torch.where(inside, s, 0.0).sum(1, keepdim=True) - mass) / inside.sum(1, keepdim=True)
    plan = torch.where(inside, (s - theta).clamp(min=0), 0.0)
    return torch.where(bad, torch.nan, plan).to(scores.dtype)


def _support(s: Tensor, mass: Tensor, k: int) -> Tensor:
    """Which entries of each row are not zero in the plan; one at least."""
    u = s.topk(k, dim=1).values
    rank = torch.arange(1, k + 1, device=s.device)
    # u falls, the threshold at which the first r have the right sum rises: they cross once.
    count = (rank * u - u.cumsum(1) + mass > 0).sum(1, keepdim=True).clamp(min=1)
    last = u.gather(1, count - 1)
    above, equal = s > last, s == last
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(R, m, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first row of this program, the places of its entries from there on, and which rows and entries exist."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)  # in 32 bits: addresses take fewer registers
    exists = first + row < R
    return first, row[:, None] * m + column[None, :], exists, exists[:, None] & (column < m)[None, :]


@triton.jit
def _largest(s, k):
    """Which entries are among the k largest of their row."""
    s += 0.0  # minus zero is zero
    bits = s.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    count = tl.sum((key >= 0).to(tl.int32), axis=1)
    kth = tl.where(count >= k, 0, -2147483648)
    count = tl.where(count >= k, count, k + 1)
    place = 1 << 30
    while (place > 0) & (tl.max(tl.abs(count - k), axis=0) > 0):
        trial = kth + place
        above = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        kth = tl.where(above >= k, trial, kth)
        count = tl.where(above >= k, above, count)
        place = place // 2
    chosen = key >= kth[:, None]
    if tl.max(count, axis=0) > k:  # equal entries in some row: the first of them
        above = key > kth[:, None]
        wanting = k - tl.sum(above.to(tl.int32), axis=1)
        equal = key == kth[:, None]
        column = tl.arange(0, s.shape[1])[None, :]
        end, place = tl.zeros_like(kth), s.shape[1]
        while place > 0:
            trial = end + place
            before = tl.sum((equal & (column < trial[:, None])).to(tl.int32), axis=1)
            end = tl.where(before <= wanting, trial, end)
            place = place // 2
        chosen = above | (equal & (column < end[:, None]))
    return chosen


@triton.jit(do_not_specialize=["R", "k"])
def _project_kernel(scores, mass, plan, R, m, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, at, exists, ok = _tile(R, m, ROWS, BLOCK)
    s = tl.where(ok, load(scores + first * m + at, ok), float("-inf"))
    b = tl.load(mass + first + tl.arange(0, ROWS), mask=exists, other=0.0)
    missing = tl.max(((s != s) | (s == float("inf"))).to(tl.int32), axis=1) > 0
    top = tl.max(s, axis=1)
    missing = missing | (top == float("-inf")) | ~(b < float("inf"))
    if k < m:
        s = tl.where(_largest(s, k), s, float("-inf"))
    # excerpt: begin
    s = s - tl.where(missing, 0.0, top)[:, None]  # what is far below the largest must not cost it its digits
    theta = tl.full((ROWS,), float("-inf"), tl.float32)
    count = tl.sum((s > theta[:, None]).to(tl.int32), axis=1)
    leaving = 1
    while leaving > 0:  # from any row
        total = tl.sum(tl.where(s > theta[:, None], s, 0.0), axis=1)
        theta = tl.maximum(theta, (total - b) / tl.maximum(count, 1).to(tl.float32))  # rounding can't turn it back
        inside = tl.sum((s > theta[:, None]).to(tl.int32), axis=1)
        leaving = tl.max(count - inside, axis=0)
        count = inside
    t = tl.maximum(s - theta[:, None], 0.0)
    # excerpt: end
    store(plan + first * m + at, tl.where(missing[:, None], float("nan"), t), ok)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(grad, plan, by_scores, by_mass, R, m, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first, at, exists, ok = _tile(R, m, ROWS, BLOCK)
    inside = load(plan + first * m + at, ok) != 0
    g = tl.where(inside, load(grad + first * m + at, ok), 0.0)
    count = tl.sum(inside.to(tl.int32), axis=1)
    mean = tl.sum(g, axis=1) / tl.maximum(count, 1).to(tl.float32)
    store(by_scores + first * m + at, tl.where(inside, g - mean[:, None], 0.0), ok)
    tl.store(by_mass + first + tl.arange(0, ROWS), mean, mask=exists)


# --- registration -----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, *tensors: Tensor, numbers: tuple[int, ...] = ()) -> None:
    """Launch over the rows of the first tensor (R, m), with several short rows a program."""
    R, m = tensors[0].shape
    block = max(triton.next_power_of_2(m), 16)
    rows = max(1024 // block, 1)
    warps = min(max(rows * block // 512, 1), 16)
    with on_device(tensors[0]):
        kernel[(triton.cdiv(R, rows),)](*tensors, R, m, *numbers, ROWS=rows, BLOCK=block, num_warps=warps)


@torch.library.custom_op("polylib::topk_simplex", mutates_args=())
def _forward(scores: Tensor, mass: Tensor, k: int) -> Tensor:
    """Return the plan; scores (R, m), mass (R,) float32, 1 <= k <= m."""
    scores = scores.contiguous()
    plan = torch.empty_like(scores)
    if len(scores):
        _launch(_project_kernel, scores, mass.contiguous(), plan, numbers=(k,))
    return plan


@_forward.register_fake
def _(scores, mass, k):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op("polylib::topk_simplex_backward", mutates_args=())
def _backward(grad: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of scores and mass."""
    by_scores, by_mass = torch.empty_like(plan), plan.new_empty(len(plan), dtype=torch.float32)
    if len(plan):
        _launch(_backward_kernel, grad.contiguous(), plan, by_scores, by_mass)
    return by_scores, by_mass


@_backward.register_fake
def _(grad, plan):
    return torch.empty_like(plan), plan.new_empty(len(plan), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("topk_simplex"))


# --- the public function ----------------------------------------------------------------------------------------------


def topk_simplex(scores: Tensor, k: int, mass: float | Tensor = 1.0, *, backend: str = "auto") -> Tensor:
    """Return the point nearest to each row of `scores` that is not negative, sums to `mass` and has at most k entries.

    Args:
        scores: (..., m), any strides.
        k: entries that may differ from zero, 1 or more; more than m are m.
        mass: a number above 0, or (...,), as the rows of scores, of which the values are not looked at.
        backend: "auto" runs the Triton kernels for CUDA tensors of float32, bfloat16 or float16 and rows of up to
            8,192 entries, and the reference elsewhere and under `torch.func`; "triton" and "reference" insist. The
            kernels can be differentiated once.

    Returns:
        (..., m), in the dtype of scores. It can be differentiated by scores and mass.

    Raises:
        ValueError: shapes or devices that don't fit, rows without entries, k or a number `mass` outside its range, an
            unknown backend, or the kernels asked for a row that is too long for them.
        TypeError: not floating-point tensors.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 2209.15466.
    """
    check_tensors({"scores": scores})
    _checks.shape("scores", scores, "(..., m), m at least 1", scores.dim() > 0 and scores.shape[-1] > 0)
    *rows, m = scores.shape
    k = min(_checks.integer("k", k, least=1), m)
    if isinstance(mass, Tensor):
        check_tensors({"mass": mass})
        check_shape("mass", mass, tuple(rows), "that of the rows of scores")
        if mass.device != scores.device:
            raise ValueError(f"mass must be on the device of scores, {scores.device}, got {mass.device}")
    else:
        number = _checks.number("mass", mass, above=0)
        mass = torch.full(rows, number, dtype=widened(scores).dtype, device=scores.device)
    chosen = choose_backend(backend, scores)
    if backend == "triton" and m > _LONGEST:
        raise ValueError(f'scores must have rows of at most {_LONGEST} entries for backend="triton", got {m}')
    flat, mass = scores.reshape(-1, m), mass.reshape(-1)
    if chosen == "triton" and m <= _LONGEST:
        return _forward(flat, mass.float(), k).view(scores.shape)
    return topk_simplex_reference(flat, mass, k).view(scores.shape)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(R: int, m: int, dtype: torch.dtype, *, backward: bool = False) -> Cost:
    """Return the least bytes and flops: scores read and a plan written, or, backward, two read and one written.

    Flops: a subtraction and a comparison an entry, or three operations backward; the counts are of integers.
    """
    passes = 3 if backward else 2
    return Cost(passes * R * m * dtype.itemsize + 4 * R, passes * R * m)
