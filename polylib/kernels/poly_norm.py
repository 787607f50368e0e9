r"""PolyNorm: $y_j = \sum_{p=1}^{r} a_p r_p x_j^p + a_0$ with $r_p = (\frac1H \sum_k x_k^{2p} + \epsilon)^{-1/2}$.

Source: Zhuo, Wang, Zeng, Li, Zhou, Ma, "Polynomial Composition Activations", arXiv 2411.03884. The paper writes the
norm of a power; this is the root mean square that its published code uses, larger by the factor $\sqrt H$ in $r_p$.

Shapes: x and y (..., H); weight (r,), highest power first: $(a_r, \dots, a_1)$; bias (1,), which is $a_0$.
Kernels: r = 3; x in float32, bfloat16 or float16, weight and bias in the same or another of these; arithmetic in
float32. Reference: any r and any floating dtype, half precisions computed in float32.

With $g = \partial L/\partial y$, and for each row $S_p = \sum_k g_k x_k^p$ and $t_p = r_p S_p / H$, the gradients are

$$\nabla x_j = \sum_p p\, a_p r_p x_j^{p-1} (g_j - t_p\, r_p x_j^p), \quad
  \nabla a_p = \sum_{\rm rows} r_p S_p, \quad \nabla a_0 = \sum g.$$

Grouped in this way every factor is of moderate size: $r_p^3$ alone would fall below the least float32 at x = 1e5.

What is saved for backward: x alone. The sums that give $r_p$ are taken again, since x is read anyway. Forward reads x
and writes y, two passes through memory, where PyTorch's operations one after the other take 33; backward reads x and g
and writes the gradient of x, three passes.

- All sums of a row, three forward and seven backward, are reduced together, so there is one barrier for all.
- A row that fits in a block is held in registers. A longer one is walked over twice, block by block, and read from the
  cache the second time: registers do not grow with H, so there is no width at which they spill.
- The number of rows is a run-time value: a new number of tokens compiles nothing.
- Each row stores its four sums for the coefficients (16 bytes), and one addition in a fixed order follows: no atomics,
  the same bits always.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import autotune, no_double_backward, on_device, row_bucket, tl, triton, widened
from polylib.kernels._cost import Cost
from polylib.kernels._polynomials import ORDER, check_polynomial, polynomial_backend, sum_of_eight, sum_of_four

EPS = 1e-6

# --- the definition ---------------------------------------------------------------------------------------------------


def poly_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Return the sum of the normalised powers of x in plain PyTorch, in the dtype of x.

    x (..., H), weight (order,) with the highest power first, bias (1,). Any floating dtype and device; differentiable
    any number of times; works under `torch.func`. PyTorch itself checks the arguments.
    """
    wide = widened(x)
    y, power = bias, wide
    for coefficient in weight.flip(0):
        y = y + coefficient * (power * torch.rsqrt(power.square().mean(-1, keepdim=True) + eps))
        power = power * wide
    return y.to(x.dtype)


# --- the kernels ------------------------------------------------------------------------------------------------------
# (block sizes, warps, pipeline stages). Where COLUMNS >= H a row stays in registers. ROWS > 1 serves short rows, whose
# reductions would otherwise leave most of a program idle.

_TILES = [
    ({"ROWS": 4, "COLUMNS": 512}, 4, 2),
    ({"ROWS": 1, "COLUMNS": 1024}, 4, 2),
    ({"ROWS": 2, "COLUMNS": 2048}, 8, 2),
    ({"ROWS": 1, "COLUMNS": 4096}, 8, 2),
    ({"ROWS": 1, "COLUMNS": 8192}, 16, 2),
]
_KEY = ["H", "m_bucket"]


@triton.jit
def _row_scales(s2, s4, s6, H: tl.constexpr, eps):
    """The factors r_1, r_2, r_3 of each row, (ROWS, 1), from the sums of its second, fourth and sixth powers."""
    r1, r2, r3 = tl.rsqrt(s2 / H + eps), tl.rsqrt(s4 / H + eps), tl.rsqrt(s6 / H + eps)
    return r1[:, None], r2[:, None], r3[:, None]


@triton.jit
def _value(v, r1, r2, r3, a1, a2, a3, a0):
    vv = v * v
    return a3 * (vv * v * r3) + a2 * (vv * r2) + a1 * (v * r1) + a0


@triton.jit
def _slope(v, g, r1, r2, r3, t1, t2, t3, a1, a2, a3):
    """The gradient of x. The t of this function are already multiplied by r."""
    vv = v * v
    linear, square, cubic = g - t1 * v, g - t2 * vv, g - t3 * (vv * v)
    return a1 * r1 * linear + 2 * a2 * (r2 * v) * square + 3 * a3 * (r3 * vv) * cubic


@triton.jit
def _load(x, at, ok):
    return tl.load(x + at, mask=ok, other=0.0).to(tl.float32)


@autotune(_TILES, key=_KEY)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _forward_kernel(
    x, weight, bias, y, M, stride_m, stride_h, eps, m_bucket,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    a3, a2, a1 = tl.load(weight).to(tl.float32), tl.load(weight + 1).to(tl.float32), tl.load(weight + 2).to(tl.float32)
    a0 = tl.load(bias).to(tl.float32)
    into, out = rows * stride_m + cols * stride_h, rows * H + cols
    if H <= COLUMNS:
        ok = (rows < M) & (cols < H)
        v = _load(x, into, ok)
        vv = v * v
        s2, s4, s6, _ = sum_of_four(vv, vv * vv, vv * vv * vv, tl.zeros_like(v))
        r1, r2, r3 = _row_scales(s2, s4, s6, H, eps)
        tl.store(y + out, _value(v, r1, r2, r3, a1, a2, a3, a0).to(y.dtype.element_ty), mask=ok)
    else:
        step = tl.cast(stride_h, tl.int64) * COLUMNS
        p2 = tl.zeros((ROWS, COLUMNS), tl.float32)
        p4, p6 = tl.zeros_like(p2), tl.zeros_like(p2)
        at = into
        for start in range(0, H, COLUMNS):
            v = _load(x, at, (rows < M) & (cols < H - start))
            vv = v * v
            p2 += vv
            p4 += vv * vv
            p6 += vv * vv * vv
            at += step
        s2, s4, s6, _ = sum_of_four(p2, p4, p6, tl.zeros_like(p2))
        r1, r2, r3 = _row_scales(s2, s4, s6, H, eps)
        for start in range(0, H, COLUMNS):
            ok = (rows < M) & (cols < H - start)
            v = _load(x, into, ok)
            tl.store(y + out, _value(v, r1, r2, r3, a1, a2, a3, a0).to(y.dtype.element_ty), mask=ok)
            into += step
            out += COLUMNS


@triton.jit
def _row_terms(p2, p4, p6, q1, q2, q3, q0, sums, M, rows, H: tl.constexpr, eps):
    """Reduce the seven blocks to one sum a row each, store what the row adds to the gradients of the coefficients, and
    return the factors r and r t of the row."""
    s2, s4, s6, S1, S2, S3, s0, _ = sum_of_eight(p2, p4, p6, q1, q2, q3, q0, tl.zeros_like(q0))
    r1, r2, r3 = _row_scales(s2, s4, s6, H, eps)
    S1, S2, S3, s0 = r1 * S1[:, None], r2 * S2[:, None], r3 * S3[:, None], s0[:, None]
    size = tl.cast(M, tl.int64)
    tl.store(sums + rows, S3, mask=rows < M)
    tl.store(sums + size + rows, S2, mask=rows < M)
    tl.store(sums + 2 * size + rows, S1, mask=rows < M)
    tl.store(sums + 3 * size + rows, s0, mask=rows < M)
    return r1, r2, r3, S1 / H * r1, S2 / H * r2, S3 / H * r3


@autotune(_TILES, key=_KEY)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _backward_kernel(
    grad, x, weight, grad_x, sums, M, stride_m, stride_h, eps, m_bucket,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    a3, a2, a1 = tl.load(weight).to(tl.float32), tl.load(weight + 1).to(tl.float32), tl.load(weight + 2).to(tl.float32)
    into, out = rows * stride_m + cols * stride_h, rows * H + cols
    if H <= COLUMNS:
        ok = (rows < M) & (cols < H)
        v, g = _load(x, into, ok), _load(grad, out, ok)
        vv = v * v
        r1, r2, r3, t1, t2, t3 = _row_terms(
            vv, vv * vv, vv * vv * vv, g * v, g * vv, g * vv * v, g, sums, M, rows, H, eps
        )
        slope = _slope(v, g, r1, r2, r3, t1, t2, t3, a1, a2, a3)
        tl.store(grad_x + out, slope.to(grad_x.dtype.element_ty), mask=ok)
    else:
        step = tl.cast(stride_h, tl.int64) * COLUMNS
        p2 = tl.zeros((ROWS, COLUMNS), tl.float32)
        p4, p6, q1, q2, q3, q0 = p2, p2, p2, p2, p2, p2
        x_at, g_at = into, out
        for start in range(0, H, COLUMNS):
            ok = (rows < M) & (cols < H - start)
            v, g = _load(x, x_at, ok), _load(grad, g_at, ok)
            vv = v * v
            p2 += vv
            p4 += vv * vv
            p6 += vv * vv * vv
            q1 += g * v
            q2 += g * vv
            q3 += g * vv * v
            q0 += g
            x_at += step
            g_at += COLUMNS
        r1, r2, r3, t1, t2, t3 = _row_terms(p2, p4, p6, q1, q2, q3, q0, sums, M, rows, H, eps)
        for start in range(0, H, COLUMNS):
            ok = (rows < M) & (cols < H - start)
            v, g = _load(x, into, ok), _load(grad, out, ok)
            slope = _slope(v, g, r1, r2, r3, t1, t2, t3, a1, a2, a3)
            tl.store(grad_x + out, slope.to(grad_x.dtype.element_ty), mask=ok)
            into += step
            out += COLUMNS


# --- registration -----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], eps: float) -> None:
    """Run one of the kernels, with a program for every few rows of x (M, H)."""
    M, H = x.shape
    if M > 0:
        with on_device(x):
            kernel[lambda meta: (triton.cdiv(M, meta["ROWS"]),)](
                *tensors, M, x.stride(0), x.stride(1), eps, row_bucket(M), H=H
            )


@torch.library.custom_op("polylib::poly_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return y, contiguous; x is (M, H) with any strides."""
    y = x.new_empty(x.shape)
    _launch(_forward_kernel, x, (x, weight.contiguous(), bias.contiguous(), y), eps)
    return y


@_forward.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("polylib::poly_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, and of weight and bias in one tensor."""
    grad_x, sums = x.new_empty(x.shape), x.new_empty(ORDER + 1, x.shape[0], dtype=torch.float32)
    _launch(_backward_kernel, x, (grad.contiguous(), x, weight.contiguous(), grad_x, sums), eps)
    return grad_x, sums.sum(1).to(weight.dtype)


@_backward.register_fake
def _(grad, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(ORDER + 1)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.eps = inputs[3]
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    grad_x, coefficients = _backward(grad, *ctx.saved_tensors, ctx.eps)
    return grad_x, *coefficients.split((ORDER, 1)), None


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(no_double_backward("poly_norm"))


# --- the public function ----------------------------------------------------------------------------------------------


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS, *, backend: str = "auto") -> Tensor:
    """Return `sum_p a_p * x**p / rms(x**p) + a_0`, with the root mean squares taken over the last dimension.

    Args:
        x: (..., H), any strides; a view that can be seen as one matrix is read where it is, without a copy.
        weight: (order,), highest power first: weight[0] multiplies the highest power, weight[-1] the linear term.
        bias: (1,), the constant a_0.
        eps: added to each mean square, inside the root.
        backend: "auto" runs the Triton kernels for order 3 on CUDA tensors of float32, bfloat16 or float16 and the
            reference elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be
            differentiated once.

    Returns:
        The shape and dtype of x; half precisions are computed in float32 and rounded once.

    Raises:
        ValueError: H of zero, a weight or bias of another shape, `eps` not above 0, tensors on different devices, an
            unknown backend, or the "triton" backend with an order other than 3.
        TypeError: not a floating-point tensor, or weight and bias of different dtypes.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Zhuo, Wang, Zeng, Li, Zhou, Ma, "Polynomial Composition Activations", arXiv 2411.03884.
    """
    check_polynomial(x, weight, bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., H) with H >= 1, got {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if polynomial_backend(backend, x, weight) == "reference":
        return poly_norm_reference(x, weight, bias, eps)
    return _forward(x.reshape(-1, x.shape[-1]), weight, bias, eps).view(x.shape)


# --- cost and benchmark -----------------------------------------------------------------------------------------------


def cost(rows: int, width: int, dtype: torch.dtype, direction: str = "forward") -> Cost:
    """Return the least bytes and flops: x read once and y written once; backward x and g read, grad x written.

    direction: "forward" or "backward" (every gradient). Powers and sums count once and
    polynomials by Horner's rule; what is done once a row does not count. Raises ValueError for another direction.
    """
    size = rows * width
    counts = {"forward": (2 * size, 12 * size), "backward": (3 * size, 24 * size)}
    if direction not in counts:
        raise ValueError(f'direction must be "forward" or "backward", got {direction!r}')
    elements, flops = counts[direction]
    return Cost(elements * dtype.itemsize, flops)


def bench_cases(device: torch.device, quick: bool) -> Iterator[tuple]:
    """Yield (label, dtype, (cost of inference, cost of forward and backward), {contestant: (function, its tensors)}).

    Liger-Kernel's PolyNorm is a contestant on a GPU where the package `liger-kernel` is installed.
    """
    sizes, dtypes = [(256, 1024), (512, 4096)], [torch.float32]
    peers = {}
    if device.type == "cuda":
        sizes, dtypes = [(16384, 2048), (16384, 5632), (16384, 8192), (2048, 32768)], [torch.bfloat16, torch.float32]
        try:
            from liger_kernel.ops.poly_norm import LigerPolyNormFunction
        except ImportError:
            pass
        else:
            peers["liger"] = lambda x, weight, bias: LigerPolyNormFunction.apply(x, weight, bias, EPS, False)
    for dtype in dtypes:
        for rows, width in [(8, 64)] if quick else sizes:
            x = torch.randn(rows, width, device=device, dtype=dtype)
            args = (x, torch.full((ORDER,), 1 / 3, device=device, dtype=dtype), x.new_zeros(1))
            functions = {"reference": poly_norm_reference, **peers, "ours": poly_norm}
            forward = cost(rows, width, dtype)
            contestants = {name: (function, args) for name, function in functions.items()}
            yield f"{rows}x{width}", dtype, (forward, forward + cost(rows, width, dtype, "backward")), contestants
