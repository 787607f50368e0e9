"""The convex program of a two-layer ReLU network by a general solver, and its form for data that may be perturbed.

Bai, Gautam and Sojoudi (arXiv 2201.01965); see `convex_relu`. It needs cvxpy, which is in the extra "notebooks".
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polylib import _checks


class ExactSolution(NamedTuple):
    """`v`, `w`, `(d, P)` in float64; the value of the program, and of the loss alone."""

    v: Tensor
    w: Tensor
    objective: float
    loss: float


def solve_convex_relu(
    x: Tensor, y: Tensor, patterns: Tensor, beta: float, *, loss: str = "squared", radius: float = 0.0
) -> ExactSolution:
    """Solve the convex program to the accuracy of an interior-point method (Clarabel).

    With a `radius` above zero the inputs may be moved by as much in every feature, by an adversary. The cones are made
    narrower, so that no move leaves the pattern, and the loss is that of the worst move. The value of the program is
    then at least the loss of the network on the worst inputs.

    Args:
        x, y: samples `(n, d)` and targets `(n,)`; -1 or 1 for the hinge loss. With a radius the last column of x is
            taken as the constant of a bias, which no one moves.
        patterns: `(n, P)` of booleans, P at least 1.
        beta: of the weight decay, at least 0.
        loss: "squared", the sum of (f - y)^2 / 2, or "hinge", the sum of max(0, 1 - y f).
        radius: at least 0; above 0 with the hinge loss only.

    Raises:
        ValueError: shapes that don't fit, values that are not finite, an unknown loss, a number out of its range.
        ImportError: cvxpy is not there.
        RuntimeError: the solver gave up.
    """
    _checks.choice("loss", loss, ("squared", "hinge"))
    beta, radius = _checks.number("beta", beta, least=0), _checks.number("radius", radius, least=0)
    if radius and loss == "squared":
        raise ValueError(f'radius must be 0 with loss="squared", got {radius}')
    _checks.shape("x", x, "(n, d) with at least one sample", x.dim() == 2 and x.numel() > 0)
    _checks.shape("y", y, f"({len(x)},), one for each sample", y.shape == (len(x),))
    fits = patterns.dim() == 2 and len(patterns) == len(x) and patterns.shape[1] > 0
    _checks.shape("patterns", patterns, f"({len(x)}, P) with P of at least 1", fits)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, got values that are not")
    if loss == "hinge" and not (y.abs() == 1).all():
        raise ValueError("y must be -1 or 1 with the hinge loss, got other values")
    try:
        import cvxpy as cp
    except ImportError as error:
        raise ImportError('solve_convex_relu needs cvxpy: pip install "polylib[notebooks]"') from error

    data, target = (part.detach().cpu().double().numpy() for part in (x, y))
    mask = patterns.cpu().numpy().astype(float)
    signs, shape = 2 * mask - 1, (x.shape[1], patterns.shape[1])
    v, w = cp.Variable(shape), cp.Variable(shape)
    f = cp.sum(cp.multiply(mask, data @ (v - w)), axis=1)
    room: list = [0.0, 0.0]
    if radius:
        ones = np.ones((len(data), 1))
        room = [radius * (ones @ cp.sum(cp.abs(part[:-1]), axis=0, keepdims=True)) for part in (v, w)]
    if loss == "squared":
        cost = cp.sum_squares(f - target) / 2
    else:
        sensitivity = radius * cp.sum(cp.abs((v - w)[:-1] @ mask.T), axis=0) if radius else 0.0
        cost = cp.sum(cp.pos(1 - cp.multiply(target, f) + sensitivity))
    penalty = cp.sum(cp.norm(v, 2, axis=0)) + cp.sum(cp.norm(w, 2, axis=0))
    cones = [cp.multiply(signs, data @ part) >= own for part, own in zip((v, w), room, strict=True)]
    problem = cp.Problem(cp.Minimize(cost + beta * penalty), cones)
    problem.solve(solver=cp.CLARABEL)
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise RuntimeError(f"the solver gave up: {problem.status}")
    return ExactSolution(torch.tensor(v.value), torch.tensor(w.value), float(problem.value), float(cost.value))
