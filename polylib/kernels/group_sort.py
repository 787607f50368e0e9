r"""The entries of each small group in ascending order; in pairs this is MaxMin, with one bit a pair for the way back.

Source: Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019 (arXiv 1811.05381).

Shapes: x (..., n), y as x; g, the size of a group, divides n.

$$y_{kg},\dots,y_{kg+g-1}=\mathrm{sort}(x_{kg},\dots,x_{kg+g-1}),\qquad
  (y_{2k},y_{2k+1})=(\min,\max)(x_{2k},x_{2k+1})\ \text{ for } g=2 .$$

Equal entries stay in their order, and NaN counts as the largest, as in `torch.sort`. The function permutes entries, so
its Jacobian is a permutation: it is orthogonal, and the function keeps distances from growing.

In eager PyTorch minimum, maximum and stacking are about six passes over memory, and both operands are kept for the
backward pass. Here x is read and y is written once. What is kept is one bit a pair, whether it was swapped, in words of
32: a sixty-fourth of x in float32. A swap is its own inverse, so backward swaps the gradients again, and so does
its own derivative: the kernels can be differentiated any number of times.

Kernels: pairs, in float32, bfloat16 or float16. Reference: groups of any size, any floating dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, choose_backend, on_device, tl, triton, unit, wide
from polylib.kernels._cost import Cost

_WORDS = 16  # of a program, each with 32 pairs: 1,024 entries

# --- the definition ---------------------------------------------------------------------------------------------------


def group_sort_reference(x: Tensor, group_size: int = 2) -> Tensor:
    """Return y in plain PyTorch."""
    return x.unflatten(-1, (x.shape[-1] // group_size, group_size)).sort(stable=True, dim=-1).values.flatten(-2)


# --- the kernels ------------------------------------------------------------------------------------------------------
# Of N = UNIT * n entries in all, a program has 64 WORDS; lane l of word w is the pair 32 w + l.


@triton.jit
def _pairs(at, ok, WORDS: tl.constexpr):
    """The first and the second entry of each pair, (WORDS, 32), in their own dtype: nothing is computed with them."""
    entries = tl.load(at, mask=ok, other=0.0)
    return tl.split(tl.reshape(entries, (WORDS, 32, 2)))


@triton.jit
def _store_pairs(at, first, second, ok, WORDS: tl.constexpr):
    tl.store(at, tl.reshape(tl.join(first, second), (64 * WORDS,)), mask=ok)


@triton.jit
def _sort_kernel(x, y, words, n, UNIT: tl.constexpr, WORDS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (64 * WORDS) + tl.arange(0, 64 * WORDS)
    ok = at < n.to(tl.int64) * UNIT
    # excerpt: begin
    a, b = _pairs(x + at, ok, WORDS)
    left, right = wide(a), wide(b)
    swap = (left > right) | ((left != left) & (right == right))  # a NaN is the largest
    _store_pairs(y + at, tl.where(swap, b, a), tl.where(swap, a, b), ok, WORDS)
    lane = tl.arange(0, 32)[None, :]
    word = tl.sum(swap.to(tl.int32) << lane, axis=1)
    # excerpt: end
    which = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    tl.store(words + which, word)


@triton.jit
def _swap_kernel(x, y, words, n, UNIT: tl.constexpr, WORDS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (64 * WORDS) + tl.arange(0, 64 * WORDS)
    ok = at < n.to(tl.int64) * UNIT
    a, b = _pairs(x + at, ok, WORDS)
    word = tl.load(words + tl.program_id(0) * WORDS + tl.arange(0, WORDS))
    swap = ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
    _store_pairs(y + at, tl.where(swap, b, a), tl.where(swap, a, b), ok, WORDS)


# --- registration -----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, x: Tensor, words: Tensor) -> Tensor:
    """Return what the kernel makes of x, contiguous; `words` is written or read."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    N = x.numel()
    if N:
        with on_device(x):
            kernel[(triton.cdiv(N, 64 * _WORDS),)](
                x, y, words, N // unit(N), UNIT=unit(N), WORDS=_WORDS, num_warps=4
            )  # fmt: skip
    return y


def _words(x: Tensor) -> Tensor:
    """Return room for a bit a pair, in whole programs."""
    return torch.empty(-(-x.numel() // (64 * _WORDS)) * _WORDS, dtype=torch.int32, device=x.device)


@torch.library.custom_op("polylib::group_sort", mutates_args=())
def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y, words): neighbours sorted, and a bit for each pair, whether it was swapped."""
    words = _words(x)
    return _launch(_sort_kernel, x, words), words


@_forward.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _words(x)


@torch.library.custom_op("polylib::group_sort_swap", mutates_args=())
def _swap(x: Tensor, words: Tensor) -> Tensor:
    """Return x with the pairs swapped that `words` tells."""
    return _launch(_swap_kernel, x, words)


@_swap.register_fake
def _(x, words):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _save_words(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


_forward.register_autograd(lambda ctx, grad, _: _swap(grad, *ctx.saved_tensors), setup_context=_save)
_swap.register_autograd(lambda ctx, grad: (_swap(grad, *ctx.saved_tensors), None), setup_context=_save_words)


# --- the public function ----------------------------------------------------------------------------------------------


def group_sort(x: Tensor, group_size: int = 2, *, backend: str = "auto") -> Tensor:
    """Return x with the entries of each group of neighbours in ascending order.

    Args:
        x: (..., n).
        group_size: entries of a group, a divisor of n. With 2 this is MaxMin, the smaller entry first.
        backend: "auto" runs the Triton kernels for pairs of CUDA tensors of float32, bfloat16 or float16, and the
            reference elsewhere and under `torch.func`; "triton" and "reference" insist.

    Raises:
        ValueError: a group size that is no positive divisor of n, an unknown backend, or the kernels asked for groups
            that are no pairs.
        TypeError: a tensor that is not floating-point; a dtype that the asked backend lacks.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: arXiv 1811.05381.
    """
    check_tensors({"x": x})
    _checks.shape("x", x, "(..., n)", x.dim() >= 1)
    group_size = _checks.integer("group_size", group_size, least=1)
    if x.shape[-1] % group_size:
        raise ValueError(f"group_size must divide the last axis of x, {x.shape[-1]}, got {group_size}")
    chosen = choose_backend(backend, x)
    if backend == "triton" and group_size != 2:
        raise ValueError(f'group_size must be 2 for backend="triton", got {group_size}')
    return _forward(x)[0] if chosen == "triton" and group_size == 2 else group_sort_reference(x, group_size)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(entries: int, dtype: torch.dtype) -> Cost:
    """Return the least bytes and flops for pairs, the same in both passes: x read, y written, and a bit for each pair.

    A flop is a comparison; backward has none.
    """
    return Cost(2 * entries * dtype.itemsize + entries // 16, entries // 2)
