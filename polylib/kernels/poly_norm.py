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

from typing import Any

import torch
from torch import Tensor

from polylib.kernels._common import (
    autotune,
    load,
    no_double_backward,
    on_device,
    row_bucket,
    store,
    tl,
    triton,
    unit,
    wide,
    widened,
)
from polylib.kernels._cost import Cost
from polylib.kernels._polynomials import ORDER, check_polynomial, polynomial_backend, sum_of_eight, sum_of_four

EPS = 1e-6

# --- the definition ---------------------------------------------------------------------------------------------------


def poly_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    """Return the sum of the normalised powers of x in plain PyTorch, in the dtype of x.

    x (..., H), weight (order,) with the highest power first, bias (1,). Any floating dtype and device; differentiable
    any number of times; works under `torch.func`. PyTorch itself checks the arguments.

    On a CPU it moves 172 bytes an entry of float32, and 392 for the gradients. The least is what one loop would
    move, 8 and 12 while a row stays in the cache; `torch.compile` fuses most of the steps.
    """
    u = widened(x)
    inverse = _inverse_scale(u.detach())
    u = u * inverse
    y, power = bias, u
    for order, coefficient in enumerate(weight.flip(0), 1):
        mean_square = power.square().mean(-1, keepdim=True) + eps * inverse ** (2 * order)
        y = torch.addcmul(y, coefficient * torch.rsqrt(mean_square), power)
        if order < len(weight):
            power = power * u
    return y.to(x.dtype)


def _inverse_scale(x: Tensor) -> Tensor:
    """Return (..., 1), one over the largest power of two not above the largest |x| of each row; 1 for rows below 2.

    The normalised powers of a row don't change with its scale but for eps, and the sixth power of 1e7 is not a float32.
    """
    largest = x.abs().amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(largest)
    return torch.where((largest >= 2) & largest.isfinite(), 2 * mantissa / largest, 1.0)


# --- the kernels ------------------------------------------------------------------------------------------------------
# (block sizes, warps, pipeline stages). Where COLUMNS >= H a row stays in registers, and so is read once; that tile
# comes first. Longer rows are walked in blocks of 1,024, since backward keeps seven sums for each entry of a block.
# Short rows share a program, of which a reduction would otherwise leave most idle.

_TILES = [
    ({"ROWS": 4, "COLUMNS": 512}, 4, 2),
    ({"ROWS": 1, "COLUMNS": 8192}, 16, 2),
    ({"ROWS": 1, "COLUMNS": 4096}, 8, 2),
    ({"ROWS": 1, "COLUMNS": 2048}, 8, 2),
    ({"ROWS": 1, "COLUMNS": 1024}, 4, 2),
]
_KEY = ["H", "m_bucket"]


def _suits(tile: dict[str, int], arguments: dict[str, Any]) -> bool:
    """Tell whether a tile is the smallest that holds a row, or walks it."""
    columns, width = tile["COLUMNS"], arguments["H"]
    return columns >= width > columns // 2 or width <= columns == 512 or columns == 1024 < width


@triton.jit
def _scale(largest):
    """One over the largest power of two that is not above `largest`, from 1 to 2^-126: a product with it is exact."""
    power = largest.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(power, 0x3F800000), 0x7E800000)
    return (0x7F000000 - power).to(tl.float32, bitcast=True)


@triton.jit
def _row_scales(s2, s4, s6, inverse, H: tl.constexpr, eps):
    """The factors r_1, r_2, r_3 of each row, (ROWS, 1), from the sums of its second, fourth and sixth powers, where the
    row was multiplied by `inverse` before."""
    square = inverse * inverse
    r1 = tl.rsqrt(s2[:, None] / H + eps * square)
    r2 = tl.rsqrt(s4[:, None] / H + eps * square * square)
    return r1, r2, tl.rsqrt(s6[:, None] / H + eps * square * square * square)


@triton.jit
def _value(v, c1, c2, c3, a0):
    """The result, with c = a r: the products are formed, and added, in the order of the definition."""
    vv = v * v
    return a0 + c1 * v + c2 * vv + c3 * (vv * v)


@triton.jit
def _slope(v, g, c1, c2, c3, t1, t2, t3):
    """The gradient of the row that was multiplied, with c = a r, and the t already multiplied by r.

    The two terms are formed apart, as the definition's derivative has them: both are infinite where a coefficient is.
    c t is formed ahead but for the third power, where it could fall below the least float32.
    """
    vv = v * v
    cubic = c3 * vv
    along = v * (c1 * t1 + (2 * c2 * t2) * vv) + cubic * ((3 * t3) * (vv * v))
    return g * (c1 + 2 * (c2 * v) + 3 * cubic) - along


@triton.jit
def _coefficients(weight):
    return wide(tl.load(weight)), wide(tl.load(weight + 1)), wide(tl.load(weight + 2))


@triton.jit
def _place(M, stride_m, stride_h, H: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of the first block, and where it lies in x and in a contiguous tensor."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    return rows, cols, rows * (stride_m * UNIT) + cols * stride_h, rows * H + cols


# The rows are walked with their values as they are. Only if a sum leaves float32, which takes values beyond a million,
# are they walked again: for the largest value, and with all of them divided by it. (That is, by a power of two.)


@triton.jit
def _largest(x, at, step, rows, cols, M, H: tl.constexpr, COLUMNS: tl.constexpr):
    most = tl.zeros_like(cols + rows).to(tl.float32)
    for start in range(0, H, COLUMNS):
        most = tl.maximum(most, tl.abs(load(x + at, (rows < M) & (cols < H - start))))
        at += step
    return _scale(tl.max(most, axis=1)[:, None])


@triton.jit
def _powers(x, at, step, inverse, rows, cols, M, H: tl.constexpr, COLUMNS: tl.constexpr):
    p2 = tl.zeros_like(cols + rows).to(tl.float32)
    p4, p6 = p2, p2
    for start in range(0, H, COLUMNS):
        v = load(x + at, (rows < M) & (cols < H - start)) * inverse
        vv = v * v
        p2 += vv
        p4 += vv * vv
        p6 += vv * vv * vv
        at += step
    return sum_of_four(p2, p4, p6, tl.zeros_like(p2))


@triton.jit
def _finite(s):
    return tl.abs(s) < float("inf")


@autotune(_TILES, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _forward_kernel(
    x, weight, bias, y, M, stride_m, stride_h, eps, m_bucket,
    H: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    a3, a2, a1 = _coefficients(weight)
    a0 = wide(tl.load(bias))
    rows, cols, into, out = _place(M, stride_m, stride_h, H, UNIT, ROWS, COLUMNS)
    if H <= COLUMNS:
        # excerpt: begin
        ok = (rows < M) & (cols < H)
        v = load(x + into, ok)
        inverse = _scale(tl.max(tl.abs(v), axis=1)[:, None])
        v *= inverse
        vv = v * v
        s2, s4, s6, _ = sum_of_four(vv, vv * vv, vv * vv * vv, tl.zeros_like(v))
        r1, r2, r3 = _row_scales(s2, s4, s6, inverse, H, eps)
        store(y + out, _value(v, a1 * r1, a2 * r2, a3 * r3, a0), ok)
        # excerpt: end
    else:
        step = tl.cast(stride_h, tl.int64) * COLUMNS
        inverse = tl.full((ROWS, 1), 1.0, tl.float32)
        s2, s4, s6, _ = _powers(x, into, step, inverse, rows, cols, M, H, COLUMNS)
        if tl.min(_finite(s6).to(tl.int32), axis=0) == 0:
            inverse = _largest(x, into, step, rows, cols, M, H, COLUMNS)
            s2, s4, s6, _ = _powers(x, into, step, inverse, rows, cols, M, H, COLUMNS)
        r1, r2, r3 = _row_scales(s2, s4, s6, inverse, H, eps)
        for start in range(0, H, COLUMNS):
            ok = (rows < M) & (cols < H - start)
            v = load(x + into, ok) * inverse
            store(y + out, _value(v, a1 * r1, a2 * r2, a3 * r3, a0), ok)
            into += step
            out += COLUMNS


@triton.jit
def _moments(x, grad, x_at, g_at, step, inverse, rows, cols, M, H: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of the second, fourth and sixth powers of each row, and of g times its powers from 1 to 3 and 0."""
    p2 = tl.zeros_like(cols + rows).to(tl.float32)
    p4, p6, q1, q2, q3, q0 = p2, p2, p2, p2, p2, p2
    for start in range(0, H, COLUMNS):
        ok = (rows < M) & (cols < H - start)
        v, g = load(x + x_at, ok) * inverse, load(grad + g_at, ok)
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
    return sum_of_eight(p2, p4, p6, q1, q2, q3, q0, tl.zeros_like(p2))


@triton.jit
def _row_terms(s2, s4, s6, S1, S2, S3, s0, inverse, sums, M, rows, H: tl.constexpr, eps):
    """Store what each row adds to the gradients of the coefficients, and return its factors r and r t."""
    r1, r2, r3 = _row_scales(s2, s4, s6, inverse, H, eps)
    S1, S2, S3, s0 = r1 * S1[:, None], r2 * S2[:, None], r3 * S3[:, None], s0[:, None]
    size = tl.cast(M, tl.int64)
    tl.store(sums + rows, S3, mask=rows < M)
    tl.store(sums + size + rows, S2, mask=rows < M)
    tl.store(sums + 2 * size + rows, S1, mask=rows < M)
    tl.store(sums + 3 * size + rows, s0, mask=rows < M)
    return r1, r2, r3, S1 / H * r1, S2 / H * r2, S3 / H * r3


@autotune(_TILES, key=_KEY, keep=_suits)
@triton.jit(do_not_specialize=["M", "m_bucket"])
def _backward_kernel(
    grad, x, weight, grad_x, sums, M, stride_m, stride_h, eps, m_bucket,
    H: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    a3, a2, a1 = _coefficients(weight)
    rows, cols, into, out = _place(M, stride_m, stride_h, H, UNIT, ROWS, COLUMNS)
    if H <= COLUMNS:
        ok = (rows < M) & (cols < H)
        v, g = load(x + into, ok), load(grad + out, ok)
        inverse = _scale(tl.max(tl.abs(v), axis=1)[:, None])
        v *= inverse
        vv = v * v
        s2, s4, s6, S1, S2, S3, s0, _ = sum_of_eight(
            vv, vv * vv, vv * vv * vv, g * v, g * vv, g * vv * v, g, tl.zeros_like(g)
        )
        r1, r2, r3, t1, t2, t3 = _row_terms(s2, s4, s6, S1, S2, S3, s0, inverse, sums, M, rows, H, eps)
        store(grad_x + out, _slope(v, g, a1 * r1, a2 * r2, a3 * r3, t1, t2, t3) * inverse, ok)
    else:
        step = tl.cast(stride_h, tl.int64) * COLUMNS
        inverse = tl.full((ROWS, 1), 1.0, tl.float32)
        s2, s4, s6, S1, S2, S3, s0, _ = _moments(x, grad, into, out, step, inverse, rows, cols, M, H, COLUMNS)
        fine = _finite(s6) & _finite(S1) & _finite(S2) & _finite(S3)
        if tl.min(fine.to(tl.int32), axis=0) == 0:
            inverse = _largest(x, into, step, rows, cols, M, H, COLUMNS)
            s2, s4, s6, S1, S2, S3, s0, _ = _moments(x, grad, into, out, step, inverse, rows, cols, M, H, COLUMNS)
        r1, r2, r3, t1, t2, t3 = _row_terms(s2, s4, s6, S1, S2, S3, s0, inverse, sums, M, rows, H, eps)
        for start in range(0, H, COLUMNS):
            ok = (rows < M) & (cols < H - start)
            v, g = load(x + into, ok) * inverse, load(grad + out, ok)
            store(grad_x + out, _slope(v, g, a1 * r1, a2 * r2, a3 * r3, t1, t2, t3) * inverse, ok)
            into += step
            out += COLUMNS


# --- registration -----------------------------------------------------------------------------------------------------


def _launch(kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], eps: float) -> None:
    """Run one of the kernels, with a program for every few rows of x (M, H)."""
    M, H = x.shape
    if M > 0:
        with on_device(x):
            kernel[lambda meta: (triton.cdiv(M, meta["ROWS"]),)](
                *tensors, M, x.stride(0) // unit(x.stride(0)), x.stride(1), eps, row_bucket(M),
                H=H, UNIT=unit(x.stride(0)),
            )  # fmt: skip


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


# --- cost -------------------------------------------------------------------------------------------------------------


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
