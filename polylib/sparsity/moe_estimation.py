r"""Maximum likelihood for Gaussian mixtures of experts, many fits at once, and the Fisher information.

H. Nguyen, P. Akbarian and N. Ho, ICML 2024 (arXiv 2401.13875), for the model; the solver is of this implementation. A
step from $\theta$ is $(F+\lambda mI)^{-1}g$, with the mean score $g$, the empirical Fisher information $F=\frac1n\sum_j
s_js_j^\top$ of the scores $s_j$ of n samples, and the mean $m$ of its diagonal: the method of Berndt, Hall, Hall and
Hausman (1974), damped as in Levenberg and Marquardt's. Only steps that do not lower the likelihood are taken.

Along a direction in which the likelihood is flat all scores are zero, and so is that part of the step: unlike Newton's
method it needs no inverse of a singular matrix, and it does not wander.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polylib import _checks
from polylib.lab.progress_bar import progress
from polylib.sparsity.gaussian_moe import GaussianMoE, check_vectors
from polylib.sparsity.moe_scores import scores

_SAMPLES = 2**15  # of a piece of work; its scores stay in a processor's cache
_Evaluation = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MoEFit:
    """What `fit_mle` finds; R fits, each of p parameters.

    Attributes:
        theta: `(R, p)`, rows as of `GaussianMoE.vector`.
        log_likelihood: `(R,)`, the mean over the samples.
        gradient: `(R,)`, the largest entry of its gradient in the parameters that are free.
        iterations: `(R,)`, steps tried.
        converged: `(R,)`, whether the gradient is within the tolerance.
    """

    theta: Tensor
    log_likelihood: Tensor
    gradient: Tensor
    iterations: Tensor
    converged: Tensor


def fisher_information(model: GaussianMoE, x: Tensor, y: Tensor) -> Tensor:
    """The empirical Fisher information `(p, p)` at the model's parameters, in the order of its `vector`.

    It is the mean of the outer products of the scores of n samples; at the parameters that the samples come from it
    tends to the Fisher information. Use float64: a singular matrix is not told from others in float32.

    Args:
        model: the mixture.
        x: `(n, d)`, inputs.
        y: `(n,)`, outputs.

    Raises:
        TypeError: samples that are not floating.
        ValueError: shapes that do not fit, or samples that are not finite.
    """
    _check_samples(model, x, y)
    _checks.shape("x", x, f"(n, {model.in_dim})", x.dim() == 2)
    theta = model.vector().detach().to(x)[None]
    total = torch.zeros(model.size, model.size, dtype=x.dtype, device=x.device)
    for inputs, outputs in zip(x.split(_SAMPLES), y.split(_SAMPLES), strict=True):
        gradients = scores(model, theta, inputs[None], outputs[None])[1][0]
        total += gradients @ gradients.T
    return total / len(x)


def fit_mle(
    model: GaussianMoE,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    *,
    tol: float = 1e-7,
    max_iter: int = 200,
) -> MoEFit:
    """Maximise the mean log-density from one or many starting points, on the same samples or each on its own.

    It finds a local maximum. What is done, in float64: see the head of this file.

    Args:
        model: says which mixture it is, and by `requires_grad` which parameters are free. It is not changed; its
            `load_vector` takes a row of the result.
        x: `(n, d)` for all, or `(R, n, d)`.
        y: `(n,)` for all, or `(R, n)`.
        start: `(R, p)`, rows as of `vector`; by default the model's own, for each set of samples.
        tol: a fit has converged when no entry of its gradient is larger.
        max_iter: steps tried, at most.

    Raises:
        TypeError: samples that are not floating.
        ValueError: shapes that do not fit, samples that are not finite, a start that is not finite or whose temperature
            is not positive, one at which the likelihood or its gradient is not finite, or no free parameters.
    """
    tol, max_iter = _checks.number("tol", tol, above=0), _checks.integer("max_iter", max_iter, least=0)
    _check_samples(model, x, y)
    if start is None:
        start = model.vector().detach().expand(len(x) if x.dim() == 3 else 1, -1)
    _checks.shape("start", start, f"(R, {model.size})", start.dim() == 2 and start.shape[1] == model.size)
    if x.dim() == 3:
        _checks.shape("x", x, f"({len(start)}, n, {model.in_dim}), as start has it", len(x) == len(start))
    check_vectors("start", start, model)
    theta = start.detach().to(x.device, torch.float64, copy=True)
    x, y = (s.detach().double().expand(len(theta), *s.shape[1 if x.dim() == 3 else 0 :]) for s in (x, y))
    free = _free(model).to(theta.device)
    if not len(free):
        raise ValueError("model must have a parameter with requires_grad, got none")
    everything = torch.arange(len(theta), device=theta.device)
    value, gradient, fisher = _evaluate(model, theta, x, y, free, everything)
    if not (value.isfinite().all() and gradient.isfinite().all()):
        raise ValueError(f"start must have a finite likelihood and gradient, got {value.tolist()}")
    damping = torch.full_like(value, 1e-2)
    iterations = torch.zeros_like(everything)
    unit = torch.eye(len(free), dtype=theta.dtype, device=theta.device)

    def unfinished() -> Iterator[Tensor]:  # which ends by itself: a loop that is left would leave its bar behind
        for _ in range(max_iter):
            live = everything[(gradient.abs().amax(1) > tol) & (damping < 1e10)]
            if not len(live):
                return
            yield live

    for live in progress(unfinished(), "fits", max_iter):
        iterations[live] += 1
        g, f = gradient[live], fisher[live]
        size = f.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        step = torch.linalg.solve(f + (damping[live] * size)[:, None, None] * unit, g)
        tried = theta[live]
        tried[:, free] += step
        new_value, new_gradient, new_fisher = _evaluate(model, tried, x, y, free, live)
        gain = new_value - value[live]
        rounding = 1e-15 * (1 + value[live].abs())
        sound = new_value.isfinite() & new_gradient.isfinite().all(1) & (model.split(tried).tau[:, 0] > 0)
        taken = sound & (gain >= -rounding)
        at = live[taken]
        theta[at], value[at] = tried[taken], new_value[taken]
        gradient[at], fisher[at] = new_gradient[taken], new_fisher[taken]
        expected = (step * g).sum(1) - 0.5 * (step * (f @ step[..., None])[..., 0]).sum(1)
        ratio = torch.where(taken, gain / expected, -1)
        change = torch.where(ratio > 0.75, 0.2, torch.where(ratio > 0.25, 1, torch.where(taken, 3, 8)))
        damping[live] = (damping[live] * change).clamp(min=1e-9)
    largest = gradient.abs().amax(1)
    return MoEFit(theta, value, largest, iterations, largest <= tol)


def _evaluate(model: GaussianMoE, theta: Tensor, x: Tensor, y: Tensor, free: Tensor, which: Tensor) -> _Evaluation:
    """Value, gradient and Fisher information of fits `which`, whose parameters are the rows of `theta`."""
    n = x.shape[1]
    found = []
    pieces = max(1, _SAMPLES // n)
    for rows, parameters in zip(which.split(pieces), theta.split(pieces), strict=True):
        sums: list[Tensor] = []
        for begin in range(0, n, _SAMPLES):
            samples = slice(begin, begin + _SAMPLES)
            density, gradients = scores(model, parameters, x[rows, samples], y[rows, samples])
            part = [density.sum(1), gradients.sum(2), gradients @ gradients.mT]
            sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else part
        found.append(sums)
    value, gradient, fisher = (torch.cat(each) / n for each in zip(*found, strict=True))
    return value, gradient[:, free], fisher[:, free[:, None], free]


def _free(model: GaussianMoE) -> Tensor:
    """The places in a row of the parameters that are to be fitted."""
    return torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()]).nonzero()[:, 0]


def _check_samples(model: GaussianMoE, x: Tensor, y: Tensor) -> None:
    for name, values in (("x", x), ("y", y)):
        _checks.floating(f"dtype of {name}", values.dtype)
    fits = x.dim() in (2, 3) and x.shape[-1] == model.in_dim and x.shape[:-1].numel() > 0
    _checks.shape("x", x, f"(n, {model.in_dim}) or (R, n, {model.in_dim}), not empty", fits)
    _checks.shape("y", y, f"{tuple(x.shape[:-1])}, as x has it", y.shape == x.shape[:-1])
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, got a number that is not")
