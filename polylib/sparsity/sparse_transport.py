"""Optimal transport whose plan has at most k nonzeros in each column.

T. Liu, J. Puigcerver and M. Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023 (arXiv 2209.15466). To be
found is a plan T >= 0 of shape (m, n) with row sums a and column sums b that minimises

    sum of T C + gamma / 2 (sum of T^2)   with at most k nonzeros in each column.

The constraint is not convex, but the dual problem and the semi-dual one are concave, and each needs no more of a column
than its k largest entries. They are what is solved here.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.function import once_differentiable

from polylib import _checks
from polylib.sparsity.topk_simplex import project_columns


@dataclass(frozen=True)
class SparseOTResult:
    """What `sparse_ot` finds.

    The value of the dual is a lower bound on the least cost of a plan with the constraint. Where the sums are right
    (`converged`), the bound is attained, and the plan is a best one. Where they are not, the k largest of some columns
    are not unique: the dual function has a kink there, and in general no single choice has the right row sums.

    Attributes:
        plan: `(m, n)`, at most k nonzeros in each column; without gradient.
        alpha: `(m,)`, the dual variables of the rows, up to a constant that `beta` takes back.
        beta: `(n,)`, those of the columns.
        value: of the dual, a scalar, differentiable once in a, b and C.
        row_error: how far the plan's row sums are from a, added up.
        column_error: how far its column sums are from b, added up: with the semi-dual no more than rounding.
        iterations: of L-BFGS.
        converged: whether no sum is wrong by more than `tol`.
        ties: `(n,)`; if not converged, the columns whose k-th entry is in use and, within `tie`, equal to the next one.
        has_ties: whether there is such a column.
    """

    plan: Tensor
    alpha: Tensor
    beta: Tensor
    value: Tensor
    row_error: float
    column_error: float
    iterations: int
    converged: bool
    ties: Tensor

    @property
    def has_ties(self) -> bool:
        return bool(self.ties.any())


def sparse_ot(
    a: Tensor,
    b: Tensor,
    C: Tensor,
    k: int,
    gamma: float,
    *,
    formulation: Literal["semi_dual", "dual"] = "semi_dual",
    tol: float = 1e-6,
    max_iter: int = 2000,
    tie: float = 1e-4,
) -> SparseOTResult:
    """Transport a to b at cost C with at most k sources for each target: L-BFGS on a dual problem, in float64.

    Args:
        a: `(m,)`, the mass of each source, positive.
        b: `(n,)`, the mass of each target, positive, of the same sum.
        C: `(m, n)`, the cost of a unit of mass. It is computed where `C` is.
        k: nonzeros of a column, at most; more than m means no bound.
        gamma: the weight of the quadratic term, above 0.
        formulation: `"semi_dual"` is maximised over alpha, and its columns have the right sums at any alpha; `"dual"`
            over alpha and beta.
        tol: stop when no sum is wrong by more.
        max_iter: iterations at most.
        tie: two entries of alpha + beta - C count as equal if they differ by no more than `tie` times the range of C.
            It is not very small, as L-BFGS may stop beside a kink.

    Raises:
        TypeError: a C that is not floating.
        ValueError: shapes that don't fit, masses that are not positive and finite or have different sums, a C that is
            not finite, or k n below m: then a source would have no target, and there is no plan.
    """
    k, gamma = _checks.integer("k", k, least=1), _checks.number("gamma", gamma, above=0)
    _checks.choice("formulation", formulation, ("semi_dual", "dual"))
    tol, tie = _checks.number("tol", tol, above=0), _checks.number("tie", tie, least=0)
    max_iter = _checks.integer("max_iter", max_iter, least=1)
    _check_problem(a, b, C, k)
    if not (C.detach().double().abs().max() / gamma).isfinite():
        raise ValueError(f"gamma must not be so small that C / gamma overflows, got {gamma:g}")
    rows, columns, costs = (x.detach().to(C.device, torch.float64) for x in (a, b, C))
    columns = columns * (rows.sum() / columns.sum())  # equal up to the rounding of what was given
    parts = [len(rows)] if formulation == "semi_dual" else [len(rows), len(columns)]

    def at(x: np.ndarray) -> tuple[Tensor, ...]:
        variables = torch.as_tensor(x, device=C.device).split(parts)
        evaluate = semi_dual if formulation == "semi_dual" else dual
        return evaluate(rows, columns, costs, *variables, k=k, gamma=gamma)

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, plan, *_ = at(x)
        wrong = [plan.sum(1) - rows, plan.sum(0) - columns][: len(parts)]
        return -value.item(), torch.cat(wrong).cpu().numpy()

    options = {"gtol": tol, "ftol": 0.0, "maxiter": max_iter, "maxfun": 10 * max_iter}
    found = minimize(negative, np.zeros(sum(parts)), jac=True, method="L-BFGS-B", options=options)
    value, plan, alpha, beta = at(found.x)
    wrong = [(plan.sum(1) - rows).abs(), (plan.sum(0) - columns).abs()]
    converged = max(x.max().item() for x in wrong) <= tol
    ties = _ties(alpha[:, None] + beta - costs, k, tie * (costs.max() - costs.min()).item())
    plan, alpha, beta = (x.to(C.dtype) for x in (plan, alpha, beta))
    return SparseOTResult(
        plan=plan,
        alpha=alpha,
        beta=beta,
        value=_Envelope.apply(a, b, C, value.to(C.dtype), plan, alpha, beta),
        row_error=wrong[0].sum().item(),
        column_error=wrong[1].sum().item(),
        iterations=int(found.nit),
        converged=converged,
        ties=ties & (not converged),
    )


def semi_dual(
    a: Tensor, b: Tensor, C: Tensor, alpha: Tensor, *, k: int, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The semi-dual function at alpha, its plan, alpha, and the beta that is best for it.

    The gradient in alpha is a minus the row sums of the plan; column sums are b. Arguments as for `sparse_ot`.
    """
    s = alpha[:, None] - C
    plan = project_columns(s / gamma, k, b, 0)
    gain = (plan * s).sum(0)
    square = plan.square().sum(0)
    value = alpha @ a - (gain - gamma / 2 * square).sum()
    return value, plan, alpha, (gamma * square - gain) / b


def dual(
    a: Tensor, b: Tensor, C: Tensor, alpha: Tensor, beta: Tensor, *, k: int, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The dual function at alpha and beta, its plan, and the two.

    The gradient is a minus the row sums and b minus the column sums of the plan. Arguments as for `sparse_ot`.
    """
    largest, places = (alpha[:, None] + beta - C).topk(min(k, len(a)), 0)
    entries = largest.clamp(min=0) / gamma
    plan = torch.zeros_like(C).scatter(0, places, entries)
    return alpha @ a + beta @ b - gamma / 2 * entries.square().sum(), plan, alpha, beta


class _Envelope(torch.autograd.Function):
    """The value, with the gradient that the envelope theorem gives: how the best plan changes does not count."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, C: Tensor, value: Tensor, *found: Tensor) -> Tensor:
        ctx.save_for_backward(*found)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, alpha, beta = ctx.saved_tensors
        return grad * alpha, grad * beta, grad * plan, None, None, None, None


def _ties(scores: Tensor, k: int, near: float) -> Tensor:
    if k >= len(scores):
        return torch.zeros_like(scores[0], dtype=torch.bool)
    last, after = scores.topk(k + 1, 0).values[-2:]
    return (last - after <= near) & (last > near)


def _check_problem(a: Tensor, b: Tensor, C: Tensor, k: int) -> None:
    _checks.floating("dtype of C", C.dtype)
    _checks.shape("C", C, "(m, n) with at least one entry", C.dim() == 2 and C.numel() > 0)
    for name, mass, length in (("a", a, C.shape[0]), ("b", b, C.shape[1])):
        _checks.shape(name, mass, f"({length},), as C has it", mass.shape == (length,))
        if not (mass.isfinite() & (mass > 0)).all():
            raise ValueError(f"{name} must be positive and finite, got {mass.tolist()}")
    sums = a.sum().item(), b.sum().item()
    if not abs(sums[0] - sums[1]) <= 1e-5 * sums[0]:
        raise ValueError(f"a and b must have the same sum, got {sums[0]:g} and {sums[1]:g}")
    if not C.isfinite().all():
        raise ValueError("C must be finite, got an entry that is not")
    if k * C.shape[1] < C.shape[0]:
        raise ValueError(f"k must be at least m / n = {C.shape[0] / C.shape[1]:g}, got {k}")
