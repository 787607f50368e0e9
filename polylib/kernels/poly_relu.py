r"""PolyReLU: $y = \sum_{p=1}^{r} a_p u^p + a_0$ with $u = \max(x, 0)$, entry by entry.

Source: Zhuo, Wang, Zeng, Li, Zhou, Ma, "Polynomial Composition Activations", arXiv 2411.03884.

Shapes: x and y (...); weight (r,), highest power first: $(a_r, \dots, a_1)$; bias (1,), which is $a_0$.
Kernels: r = 3; x in float32, bfloat16 or float16, weight and bias in the same or another of these; arithmetic in
float32. Reference: any r and any floating dtype, half precisions computed in float32.

With $g = \partial L/\partial y$ the gradients are

$$\nabla x = \mathbb 1[x > 0]\, g\, (a_1 + 2 a_2 u + 3 a_3 u^2), \quad
  \nabla a_p = \sum g\, u^p, \quad \nabla a_0 = \sum g,$$

where the last sum runs over *all* entries, also those with $x \le 0$.

What is saved for backward: x alone. Forward reads x and writes y, two passes through memory; PyTorch's operations one
after the other take about a dozen. Backward reads x and g and writes the gradient of x, three passes. Each program
stores its four sums for the coefficients, and one addition in a fixed order follows: no atomics, the same bits always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import load, no_double_backward, on_device, store, tl, triton, wide, widened
from polylib.kernels._cost import Cost
from polylib.kernels._polynomials import ORDER, check_polynomial, polynomial_backend, sum_of_four

# --- the definition ---------------------------------------------------------------------------------------------------


def poly_relu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the polynomial of relu(x) in plain PyTorch, in the dtype of x.

    x (...), weight (order,) with the highest power first, bias (1,). Any floating dtype and device; differentiable any
    number of times; works under `torch.func`. PyTorch itself checks the arguments.

    On a CPU it moves 64 bytes an entry of float32, and 128 for the gradients. The least is what one loop would
    move, 8 and 12; `torch.compile` fuses most of the steps.
    """
    u = widened(x).relu()
    kind = widened(weight).dtype if weight.dtype != x.dtype else u.dtype
    weight, bias = weight.to(kind), bias.to(kind)
    y = weight[0] * u
    for coefficient in weight[1:]:
        y = (y + coefficient) * u  # Horner's rule, from the highest power down; not in place, for forward mode
    return (y + bias[0]).to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 1024  # entries a program: eight for each thread of four warps


@triton.jit
def _coefficients(weight):
    return wide(tl.load(weight)), wide(tl.load(weight + 1)), wide(tl.load(weight + 2))


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # unlike a maximum, keeps what is not a number


# excerpt: begin
@triton.jit
def _forward_block(x, a3, a2, a1, a0, y, at, ok):
    u = _relu(load(x + at, ok))
    store(y + at, ((a3 * u + a2) * u + a1) * u + a0, ok)


# excerpt: end


# The number of entries is unknown to the compiler, so that a new batch size compiles nothing. Blocks that are full need
# no mask, and their loads are 16 bytes wide whatever the number is; only the last block is masked.
@triton.jit(do_not_specialize=["size"])
def _forward_kernel(x, weight, bias, y, size, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    a3, a2, a1 = _coefficients(weight)
    a0 = wide(tl.load(bias))
    if start + BLOCK <= size:
        _forward_block(x, a3, a2, a1, a0, y, at, None)
    else:
        _forward_block(x, a3, a2, a1, a0, y, at, at < size)


@triton.jit
def _backward_block(grad, x, a3, a2, a1, grad_x, sums, at, ok):
    v, g = load(x + at, ok), load(grad + at, ok)
    u = _relu(v)
    inner = a3 * u + a2  # value and derivative by one Horner scheme: 2 a_2 alone could overflow
    slope = (a3 * u + inner) * u + (inner * u + a1)
    store(grad_x + at, tl.where(v <= 0, 0.0, g * slope), ok)
    gu = g * u
    guu = gu * u
    s3, s2, s1, s0 = sum_of_four(guu * u, guu, gu, g)
    programs = tl.num_programs(0)
    here = sums + tl.program_id(0) + tl.arange(0, 1)
    tl.store(here, s3)
    tl.store(here + programs, s2)
    tl.store(here + 2 * programs, s1)
    tl.store(here + 3 * programs, s0)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(grad, x, weight, grad_x, sums, size, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)[None, :]  # one row, for the sums
    a3, a2, a1 = _coefficients(weight)
    if start + BLOCK <= size:
        _backward_block(grad, x, a3, a2, a1, grad_x, sums, at, None)
    else:
        _backward_block(grad, x, a3, a2, a1, grad_x, sums, at, at < size)


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::poly_relu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return y, contiguous; x has any shape and strides."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            _forward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
                x, weight.contiguous(), bias.contiguous(), y, x.numel(), BLOCK=_BLOCK
            )
    return y


@_forward.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("polylib::poly_relu_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, and of weight and bias in one tensor."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x, programs = torch.empty_like(x), triton.cdiv(x.numel(), _BLOCK)
    sums = x.new_empty(ORDER + 1, programs, dtype=torch.float32)
    if programs > 0:
        with on_device(x):
            _backward_kernel[(programs,)](grad, x, weight, grad_x, sums, x.numel(), BLOCK=_BLOCK)
    return grad_x, sums.sum(1).to(weight.dtype)


@_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(ORDER + 1)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    grad_x, coefficients = _backward(grad, *ctx.saved_tensors)
    return grad_x, *coefficients.split((ORDER, 1))


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("poly_relu"))


# --- the public function ----------------------------------------------------------------------------------------------


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Return `sum_p a_p * relu(x)**p + a_0`, entry by entry.

    Args:
        x: any shape and strides.
        weight: (order,), highest power first: weight[0] multiplies the highest power, weight[-1] the linear term.
        bias: (1,), the constant a_0.
        backend: "auto" runs the Triton kernels for order 3 on CUDA tensors of float32, bfloat16 or float16 and the
            reference elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be
            differentiated once.

    Returns:
        The shape and dtype of x; half precisions are computed in float32 and rounded once.

    Raises:
        ValueError: a weight or bias of another shape, tensors on different devices, an unknown backend, or the "triton"
            backend with an order other than 3.
        TypeError: not a floating-point tensor, or weight and bias of different dtypes.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Zhuo, Wang, Zeng, Li, Zhou, Ma, "Polynomial Composition Activations", arXiv 2411.03884.
    """
    check_polynomial(x, weight, bias)
    if polynomial_backend(backend, x, weight) == "reference":
        return poly_relu_reference(x, weight, bias)
    return _forward(x, weight, bias)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(size: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops for `size` entries: x read once, y (or x, g and grad x) moved once.

    direction: "forward" or "backward" (every gradient). Coefficients are not counted. Raises ValueError for another
    direction.
    """
    counts = {"forward": (2 * size, 7 * size), "backward": (3 * size, 14 * size)}
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize, flops)
