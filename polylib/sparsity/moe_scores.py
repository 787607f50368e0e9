r"""The log-density of Gaussian mixtures of experts, and its gradient for each sample, for many parameters at once.

With the share $r_i$ of expert i in the density of a sample and its weight $\pi_i$ in the gate, the gradient of the
log-density is $r_i-\pi_i$ in the logit of i, $r_i(y-\mu_i)/\nu_i$ in its mean, and $r_i((y-\mu_i)^2/\nu_i-1)/2$ in the
logarithm of its variance. The model is that of H. Nguyen, P. Akbarian and N. Ho, ICML 2024 (arXiv 2401.13875).

In all functions `model` gives sizes, activation, and whether the bias is inside, and its own parameters are not read;
`theta` is `(R, p)`, rows as of `GaussianMoE.vector`; x is `(R, n, d)` and y `(R, n)`. Nothing is checked.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from polylib.sparsity.gaussian_moe import GaussianMoE, Parts


def log_density(model: GaussianMoE, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The log-densities `(R, n)`."""
    parts, inputs = model.split(theta), x.mT
    above = _above(model, parts, model.function(parts.beta1 @ inputs))
    return _joint(model, parts, above, inputs, y)[0].logsumexp(1)


def scores(model: GaussianMoE, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The log-densities `(R, n)`, and their gradients `(R, p, n)` in the rows of `theta`, by the formulas above."""
    parts, inputs = model.split(theta), x.mT
    z = parts.beta1 @ inputs  # samples are the last axis of all that follows
    activated, slope = _with_slope(model.function, z)
    above, tau = _above(model, parts, activated), parts.tau[..., None]
    joint, log_weights, error, precision = _joint(model, parts, above, inputs, y)
    log_share = joint.log_softmax(1)
    density = joint[:, 0] - log_share[:, 0]
    share = log_share.exp()
    by_logit = (share - log_weights.exp())[:, :-1]
    by_mean = share * error * precision
    gradients = [
        _times(by_logit * slope / tau, inputs),
        by_logit / tau if model.bias_inside else by_logit,
        -(by_logit * above).sum(1, keepdim=True) / tau.square(),
        _times(by_mean, inputs),
        by_mean,
        0.5 * (by_mean * error - share),
    ]
    return density, torch.cat(gradients, 1)


def _with_slope(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """A function of each entry for itself, and its derivative."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = function(z)
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def _above(model: GaussianMoE, parts: Parts, activated: Tensor) -> Tensor:
    """What the temperature divides."""
    return activated + parts.beta0[..., None] if model.bias_inside else activated


def _joint(
    model: GaussianMoE, parts: Parts, above: Tensor, inputs: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-densities of expert and output, those of the expert, the errors, and the precisions."""
    logits = above / parts.tau[..., None]
    if not model.bias_inside:
        logits = logits + parts.beta0[..., None]
    log_weights = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).log_softmax(1)
    log_nu = parts.log_nu[..., None]
    precision, error = (-log_nu).exp(), y[:, None] - parts.a @ inputs - parts.b[..., None]
    joint = log_weights - 0.5 * (error.square() * precision + log_nu + math.log(2 * math.pi))
    return joint, log_weights, error, precision


def _times(gradient: Tensor, inputs: Tensor) -> Tensor:
    """`(R, i, n)` times `(R, d, n)`, every pair of i and d: `(R, i d, n)`."""
    return (gradient[:, :, None] * inputs[:, None]).flatten(1, 2)
