"""What the two polynomial activations share: the checks of their arguments, and sums that are reduced together."""

from __future__ import annotations

from torch import Tensor

from polylib.kernels._common import IN_INTERPRETER, check_shape, check_tensors, choose_backend, tl, triton

ORDER = 3  # of the polynomials that the kernels compute


def check_polynomial(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise unless x is a floating tensor, and weight (order,) and bias (1,) are floating tensors on its device.

    Weight and bias share one dtype, which may differ from that of x: float32 coefficients go with bfloat16 activations.
    """
    check_tensors({"x": x})
    check_tensors({"weight": weight, "bias": bias})
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    if weight.dim() != 1 or len(weight) < 1:
        raise ValueError(f"weight must have shape (order,) with order >= 1, got {tuple(weight.shape)}")
    check_shape("bias", bias, (1,), "(1,)")


def polynomial_backend(backend: str, x: Tensor, weight: Tensor) -> str:
    """Choose as `choose_backend` does; a polynomial whose order is not three has the reference only."""
    chosen = choose_backend(backend, x)
    if chosen == "triton" and len(weight) != ORDER:
        if backend == "triton":
            raise ValueError(f'backend="triton" needs weight of shape ({ORDER},), got {tuple(weight.shape)}')
        return "reference"
    return chosen


@triton.jit
def sum_of_four(a, b, c, d):
    """Sum four (ROWS, COLUMNS) blocks over their columns in one reduction, with one barrier instead of four."""
    if IN_INTERPRETER:  # numpy adds pairs of pairs along the last axis only, as a GPU does along any
        a, b, c, d = tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)
    else:
        ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=1))
        a, b = tl.split(ab)
        c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def sum_of_eight(a, b, c, d, e, f, g, h):
    """Sum eight (ROWS, COLUMNS) blocks over their columns in one reduction."""
    if IN_INTERPRETER:
        a, b, c, d = sum_of_four(a, b, c, d)
        e, f, g, h = sum_of_four(e, f, g, h)
    else:
        first = tl.join(tl.join(a, b), tl.join(c, d))
        second = tl.join(tl.join(e, f), tl.join(g, h))
        first, second = tl.split(tl.sum(tl.join(first, second), axis=1))
        ab, cd = tl.split(first)
        ef, gh = tl.split(second)
        a, b = tl.split(ab)
        c, d = tl.split(cd)
        e, f = tl.split(ef)
        g, h = tl.split(gh)
    return a, b, c, d, e, f, g, h
