"""Two-layer ReLU networks trained to their global optimum: the convex program, and its solution by ADMM.

Y. Bai, T. Gautam and S. Sojoudi, "Efficient Global Optimization of Two-layer ReLU Networks: Quadratic-time Algorithms
and Adversarial Training" (arXiv 2201.01965), after M. Pilanci and T. Ergen, ICML 2020. A layer of ReLUs cuts the
samples into those that a neuron lets through and those it does not: an activation pattern. With the patterns fixed the
network is linear in its weights, and the penalty of weight decay becomes a sum of norms.

The step of ADMM is derived here from the program. Since a pattern's signs square to one, the matrix to invert is that
of a ridge regression but for a term of the rank of the samples, so that an iteration costs as much as a product with
the data, and grows linearly with the number of patterns.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels.masked_gemm_reduce import masked_gemm_adjoint, masked_gemm_reduce, pack_mask
from polylib.optimization.activation_patterns import check_samples


class ConvexSolution(NamedTuple):
    """A solution of the convex program.

    `v`, `w`, `(d, P)`: weights of neurons that count positively and negatively, zero for most patterns. `objective`:
    its value, which means something only up to `violation`, the largest amount by which a cone constraint is missed.
    `history`, `(checks, 2)`: both along the iterations, `every` apart.
    """

    v: Tensor
    w: Tensor
    objective: float
    violation: float
    history: Tensor


def admm_relu(
    x: Tensor,
    y: Tensor,
    patterns: Tensor,
    beta: float,
    *,
    rho: float = 0.3,
    max_iter: int = 2000,
    tol: float = 1e-5,
    every: int = 10,
) -> ConvexSolution:
    """Minimise (f - y)^2 / 2 + beta sum_i (norm v_i + norm w_i), f = sum_i D_i x (v_i - w_i), over the cones of the
    patterns, (2 D_i - I) x v_i >= 0 and the same for w_i, by the alternating direction method of multipliers.

    Two matrices are factored once, of n x n and d x d; an iteration costs O(n d P + n^2).

    Args:
        x, y: samples `(n, d)` and targets `(n,)`, in float64 or float32.
        patterns: `(n, P)` of booleans; those of `sample_activation_patterns`.
        beta: of the weight decay, above 0: that of all weights of both layers, as beta / 2 times their squares.
        rho: the penalty for what is split. The solution does not depend on it, the number of iterations does.
        max_iter, tol: ends when both residuals, relative to what they are differences of, are below `tol`.
        every: how many iterations lie between two checks.

    Raises:
        ValueError: shapes that don't fit, values that are not finite, a number out of its range.
    """
    check_samples(x)
    _checks.shape("y", y, f"({len(x)},), one for each sample", y.shape == (len(x),))
    _checks.shape("patterns", patterns, f"({len(x)}, P)", patterns.dim() == 2 and len(patterns) == len(x))
    if patterns.dtype != torch.bool or not y.isfinite().all():
        what = f"patterns of {patterns.dtype}" if patterns.dtype != torch.bool else "targets that are not finite"
        raise ValueError(f"patterns must be booleans and y finite, got {what}")
    beta, rho = (_checks.number(name, value, above=0) for name, value in (("beta", beta), ("rho", rho)))
    tol, max_iter = _checks.number("tol", tol, above=0), _checks.integer("max_iter", max_iter, least=1)
    every = _checks.integer("every", every, least=1)

    mask = patterns.to(x)
    signs, (n, d), count = 2 * mask - 1, x.shape, mask.shape[1]
    small = torch.linalg.cholesky(torch.eye(d).to(x) + x.mT @ x)
    kernel = 2 * (x @ torch.cholesky_solve(x.mT, small)) * (mask @ mask.mT)
    large = torch.linalg.cholesky(rho * torch.eye(n).to(x) + kernel)

    words = pack_mask(patterns) if x.is_cuda else None  # on a GPU the n x P products are never written

    def output(u: Tensor) -> Tensor:
        delta = u[0] - u[1]
        return (x * (mask @ delta.mT)).sum(1) if words is None else masked_gemm_reduce(x, delta, words)

    def adjoint(residual: Tensor) -> Tensor:
        if words is not None:
            part = masked_gemm_adjoint(x, residual, words, count)
            return torch.stack([part, -part])
        part = x.mT @ (mask * residual[:, None])
        return torch.stack([part, -part])

    def solve(b: Tensor) -> Tensor:
        """(I + G^T G + F^T F / rho)^-1 b, where G^T G is x^T x for each pattern: Woodbury's formula."""
        z = _divide(b, small)
        inner = torch.cholesky_solve(output(z)[:, None], large)[:, 0]
        return z - _divide(adjoint(inner), small)

    pull = adjoint(y) / rho
    t = x.new_zeros(2, d, count)
    dual, reach = torch.zeros_like(t), x.new_zeros(2, n, count)  # reach: the cone constraints and their dual, added
    history = []
    for step in range(1, max_iter + 1):
        u = solve(pull + t - dual + x.mT @ (signs * reach.abs()))
        before, slack = t, reach.clamp(min=0)
        t = _shrink(u + dual, beta / rho)
        inside = signs * (x @ u)
        reach = inside + reach.clamp(max=0)
        dual = dual + u - t
        if step % every == 0 or step == max_iter:
            history.append((_objective(output(t), y, t, beta), _violation(x, signs, t)))
            moved = reach.clamp(min=0) - slack
            primal = _size(u - t, inside - reach.clamp(min=0)) / max(_size(u, inside), _size(t, reach), 1e-30)
            back = _size(t - before + x.mT @ (signs * moved))
            multiplier = _size(dual + x.mT @ (signs * reach.clamp(max=0)))
            if max(primal, back / max(multiplier, 1e-30)) < tol:
                break
    objective, violation = history[-1]
    return ConvexSolution(t[0], t[1], objective, violation, torch.tensor(history, dtype=torch.float64))


def recover_network(v: Tensor, w: Tensor, *, least: float = 1e-7) -> nn.Sequential:
    """The network x -> (x @ u)_+ @ a of a solution: weights of both layers of equal size, none for columns of norm up
    to `least`. It has the solution's outputs, and the same objective, where the cone constraints are kept.

    Returns:
        A linear layer without bias, a ReLU and a linear layer without bias, in the dtype of `v`.

    Raises:
        ValueError: `v` and `w` of different shape, or a negative `least`.
    """
    _checks.shape("w", w, f"{tuple(v.shape)}, as v", v.dim() == 2 and v.shape == w.shape)
    least = _checks.number("least", least, least=0)
    columns = torch.cat([v, w], 1)
    norms = columns.norm(dim=0)
    sign = torch.cat([torch.ones(v.shape[1]), -torch.ones(w.shape[1])]).to(v)
    kept = norms > least
    root = norms[kept].sqrt()
    count = int(kept.sum())
    first = nn.utils.skip_init(nn.Linear, len(v), count, bias=False, dtype=v.dtype, device=v.device)
    last = nn.utils.skip_init(nn.Linear, count, 1, bias=False, dtype=v.dtype, device=v.device)
    with torch.no_grad():
        first.weight.copy_((columns[:, kept] / root).mT)
        last.weight.copy_((sign[kept] * root)[None])
    return nn.Sequential(first, nn.ReLU(), last)


def network_objective(net: nn.Module, x: Tensor, y: Tensor, beta: float) -> Tensor:
    """Half the squared length of net(x) - y, and beta / 2 times the sum of all squared parameters, a scalar."""
    decay = sum(parameter.square().sum() for parameter in net.parameters())
    return (net(x)[:, 0] - y).square().sum() / 2 + beta / 2 * decay


def _divide(b: Tensor, factor: Tensor) -> Tensor:
    """M^-1 b for b (2, d, P), from the Cholesky factor of M."""
    flat = torch.cholesky_solve(torch.cat(list(b), 1), factor)
    return torch.stack(flat.split(b.shape[2], 1))


def _shrink(u: Tensor, by: float) -> Tensor:
    """The proximal step of the norms of the columns: each `by` shorter, or zero."""
    return u * (1 - by / u.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(min=0)


def _objective(f: Tensor, y: Tensor, t: Tensor, beta: float) -> float:
    return ((f - y).square().sum() / 2 + beta * t.norm(dim=1).sum()).item()


def _violation(x: Tensor, signs: Tensor, t: Tensor) -> float:
    return max((-signs * (x @ t)).max().item(), 0.0) if t.numel() else 0.0


def _size(*parts: Tensor) -> float:
    return sum(part.square().sum() for part in parts).sqrt().item()  # type: ignore[union-attr]
