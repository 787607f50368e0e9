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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import no_double_backward, on_device, tl, triton, widened
from polylib.kernels._cost import Cost
from polylib.kernels._polynomials import ORDER, check_polynomial, polynomial_backend, sum_of_four

# --- the definition ---------------------------------------------------------------------------------------------------


def poly_relu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the polynomial of relu(x) in plain PyTorch, in the dtype of x.

    x (...), weight (order,) with the highest power first, bias (1,). Any floating dtype and device; differentiable any
    number of times; works under `torch.func`. PyTorch itself checks the arguments.
    """
    u = widened(x).relu()
    y = torch.zeros_like(u)
    for coefficient in weight:
        y = (y + coefficient) * u  # Horner's rule, from the highest power down
    return (y + bias[0]).to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------

_BLOCK = 4096  # entries a program: sixteen for each thread of eight warps


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(x, weight, bias, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = _relu(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32))
    a3, a2, a1 = tl.load(weight), tl.load(weight + 1), tl.load(weight + 2)
    value = ((a3.to(tl.float32) * u + a2.to(tl.float32)) * u + a1.to(tl.float32)) * u + tl.load(bias).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(grad, x, weight, grad_x, sums, size, BLOCK: tl.constexpr):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]  # one row, for the sums
    wide = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    u = _relu(wide)
    a3, a2, a1 = tl.load(weight).to(tl.float32), tl.load(weight + 1).to(tl.float32), tl.load(weight + 2).to(tl.float32)
    slope = (3 * a3 * u + 2 * a2) * u + a1
    tl.store(grad_x + at, tl.where(wide <= 0, 0.0, g * slope).to(grad_x.dtype.element_ty), mask=at < size)
    gu = g * u
    guu = gu * u
    s3, s2, s1, s0 = sum_of_four(guu * u, guu, gu, g)
    here = sums + pid + tl.arange(0, 1)
    tl.store(here, s3)
    tl.store(here + programs, s2)
    tl.store(here + 2 * programs, s1)
    tl.store(here + 3 * programs, s0)


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # unlike a maximum, keeps what is not a number


# --- registration -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("polylib::poly_relu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return y, contiguous; x has any shape and strides."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            _forward_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
                x, weight.contiguous(), bias.contiguous(), y, x.numel(), BLOCK=_BLOCK, num_warps=8
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
            _backward_kernel[(programs,)](grad, x, weight, grad_x, sums, x.numel(), BLOCK=_BLOCK, num_warps=8)
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


# --- cost and benchmark -----------------------------------------------------------------------------------------------


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


def bench_cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, of forward and backward), {contestant: (function, its tensors)})."""
    sizes, dtypes = [(256, 1024), (512, 4096)], [torch.float32]
    if device.type == "cuda":
        sizes, dtypes = [(16384, 2048), (16384, 8192), (4096, 32768)], [torch.bfloat16, torch.float32]
    for dtype in dtypes:
        for rows, width in [(8, 64)] if quick else sizes:
            x = torch.randn(rows, width, device=device, dtype=dtype)
            args = (x, torch.full((ORDER,), 1 / 3, device=device, dtype=dtype), x.new_zeros(1))
            forward = cost(x.numel(), dtype)
            contestants = {"reference": (poly_relu_reference, args), "ours": (poly_relu, args)}
            yield f"{rows}x{width}", dtype, (forward, forward + cost(x.numel(), dtype, "backward")), contestants
