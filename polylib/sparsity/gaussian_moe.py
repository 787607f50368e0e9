r"""A Gaussian mixture of experts whose gate has a temperature.

H. Nguyen, P. Akbarian and N. Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", ICML 2024
(arXiv 2401.13875). Given x in R^d, the density of y is

$$g(y|x)=\sum_{i=1}^k\pi_i(x)\,\mathcal N(y\,|\,a_i^\top x+b_i,\nu_i),\qquad
\pi(x)=\mathrm{softmax}_i\big((\sigma(\beta_{1i}^\top x)+\beta_{0i})/\tau\big)$$

with variances $\nu_i$. With the identity as $\sigma$ this is the "dense-to-sparse" gate, with another function the
"activation dense-to-sparse" gate. A softmax does not change with a constant added to all of its logits; so the last
expert is the reference, and its logit is zero.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks


def identity(z: Tensor) -> Tensor:
    return z


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": identity,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


def dense_to_sparse_gate(
    scores: Tensor,
    bias: Tensor,
    tau: float | Tensor,
    activation: str | Callable[[Tensor], Tensor] = "linear",
    *,
    bias_inside: bool = True,
) -> Tensor:
    """The logarithms of the weights of k experts, `(..., k)`.

    Args:
        scores: `(..., k)`, the linear scores of the experts, floating.
        bias: `(k,)`, added after the activation.
        tau: the temperature, one positive number: near 0 the best expert has all the weight, for a large one all have
            the same.
        activation: `"linear"`, `"relu"`, `"sigmoid"`, `"tanh"`, `"gelu"`, or a function of each entry for itself.
        bias_inside: whether the temperature also divides the bias.

    Raises:
        TypeError: scores that are not floating, or an activation that is neither a name nor a function.
        ValueError: a shape that does not fit, or a temperature that is not positive and finite.
    """
    _checks.floating("dtype of scores", scores.dtype)
    _checks.shape("scores", scores, "(..., k) with k of at least 1", scores.dim() >= 1 and scores.shape[-1] > 0)
    _checks.shape("bias", bias, f"({scores.shape[-1]},), as scores have it", bias.shape == scores.shape[-1:])
    if isinstance(tau, Tensor):
        _checks.shape("tau", tau, "()", tau.dim() == 0)
    _checks.number("tau", tau, above=0)
    return _logits(_function(activation)(scores), bias, tau, bias_inside).log_softmax(-1)


class Parts(NamedTuple):
    """The parameters of one or more mixtures, by the paper's names, with any leading axes."""

    beta1: Tensor  # (..., k - 1, d)
    beta0: Tensor  # (..., k - 1)
    tau: Tensor  # (..., 1)
    a: Tensor  # (..., k, d)
    b: Tensor  # (..., k)
    log_nu: Tensor  # (..., k)


class GaussianMoE(nn.Module):
    """A mixture of k experts, each of which is a linear function of the input with Gaussian noise.

    Temperature and variances are kept as logarithms, and so are positive whatever an optimizer does. `vector` and
    `load_vector` have the parameters in one row of p = (k - 1)(d + 1) + 1 + k(d + 2) numbers: the slopes and the biases
    of the gate without those of the last expert, the temperature itself, slopes, intercepts and the logarithms of the
    variances of the experts. The functions for estimation work on such rows.

    Args:
        in_dim: d, the length of an input.
        experts: k, at least 2.
        activation: of the gate, as in `dense_to_sparse_gate`. A function must not change from call to call.
        bias_inside: whether the temperature also divides the gate's bias.
    """

    def __init__(
        self,
        in_dim: int,
        experts: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "linear",
        bias_inside: bool = True,
    ) -> None:
        super().__init__()
        self.in_dim = _checks.integer("in_dim", in_dim, least=1)
        self.experts = _checks.integer("experts", experts, least=2)
        self.activation = activation
        self.function = _function(activation)
        self.bias_inside = bool(bias_inside)
        self.gate_weight = nn.Parameter(torch.empty(self.experts - 1, self.in_dim))
        self.gate_bias = nn.Parameter(torch.empty(self.experts - 1))
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(self.experts, self.in_dim))
        self.bias = nn.Parameter(torch.empty(self.experts))
        self.log_variance = nn.Parameter(torch.empty(self.experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal slopes and intercepts, so that no two experts are alike; no biases; temperature and variances 1."""
        for normal in (self.gate_weight, self.weight, self.bias):
            nn.init.normal_(normal)
        for zero in (self.gate_bias, self.log_temperature, self.log_variance):
            nn.init.zeros_(zero)

    @property
    def size(self) -> int:
        """p, the number of parameters."""
        return (self.experts - 1) * (self.in_dim + 1) + 1 + self.experts * (self.in_dim + 2)

    def vector(self) -> Tensor:
        """All parameters as one row `(p,)`, differentiable; the temperature stands in it as itself."""
        gate = [self.gate_weight.flatten(), self.gate_bias, self.log_temperature.exp()[None]]
        return torch.cat([*gate, self.weight.flatten(), self.bias, self.log_variance])

    @torch.no_grad()
    def load_vector(self, theta: Tensor) -> "GaussianMoE":
        """Take the parameters from a row `(p,)`; returns the module.

        Raises:
            ValueError: another shape, a number that is not finite, or a temperature that is not positive.
        """
        _checks.shape("theta", theta, f"({self.size},)", theta.shape == (self.size,))
        check_vectors("theta", theta, self)
        parts = self.split(theta)
        values = (parts.beta1, parts.beta0, parts.tau.log().squeeze(-1), parts.a, parts.b, parts.log_nu)
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)
        return self

    def split(self, theta: Tensor) -> Parts:
        """Rows `(..., p)` by their parts."""
        k, d, front = self.experts, self.in_dim, theta.shape[:-1]
        beta1, beta0, tau, a, b, log_nu = theta.split([(k - 1) * d, k - 1, 1, k * d, k, k], -1)
        return Parts(beta1.reshape(*front, k - 1, d), beta0, tau, a.reshape(*front, k, d), b, log_nu)

    def gate_logits(self, x: Tensor) -> Tensor:
        """The logits `(..., k)` of the experts for inputs `(..., d)`; the last one is zero."""
        _checks.shape("x", x, f"(..., {self.in_dim})", x.dim() >= 1 and x.shape[-1] == self.in_dim)
        scores = self.function(F.linear(x, self.gate_weight))
        return F.pad(_logits(scores, self.gate_bias, self.log_temperature.exp(), self.bias_inside), (0, 1))

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-density `(...)` of outputs `(...)` given inputs `(..., d)`."""
        log_weights = self.gate_logits(x).log_softmax(-1)
        _checks.shape("y", y, f"{tuple(x.shape[:-1])}, as x has it", y.shape == x.shape[:-1])
        squares = (y[..., None] - F.linear(x, self.weight, self.bias)).square() / self.log_variance.exp()
        return (log_weights - 0.5 * (squares + self.log_variance + math.log(2 * math.pi))).logsumexp(-1)

    def forward(self, x: Tensor) -> Tensor:
        """The mean `(...)` of the output, given inputs `(..., d)`."""
        return (self.gate_logits(x).softmax(-1) * F.linear(x, self.weight, self.bias)).sum(-1)

    @torch.no_grad()
    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One output `(...)` for each input `(..., d)`."""
        level = torch.rand((*x.shape[:-1], 1), generator=generator, dtype=x.dtype, device=x.device)
        below = self.gate_logits(x).softmax(-1).cumsum(-1)[..., :-1]
        expert = (level > below).sum(-1, keepdim=True)
        mean = F.linear(x, self.weight, self.bias).gather(-1, expert)[..., 0]
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + noise * (0.5 * self.log_variance[expert[..., 0]]).exp()

    def extra_repr(self) -> str:
        name = self.activation if isinstance(self.activation, str) else getattr(self.activation, "__name__", "function")
        return f"{self.in_dim}, experts={self.experts}, activation={name}, bias_inside={self.bias_inside}"


def check_vectors(name: str, theta: Tensor, model: GaussianMoE) -> None:
    """Nothing, if rows `(..., p)` of parameters are finite with positive temperatures.

    Raises:
        ValueError: another last axis, a number that is not finite, or a temperature that is not positive.
    """
    fits = theta.dim() >= 1 and theta.shape[-1] == model.size
    _checks.shape(name, theta, f"(..., {model.size})", fits)
    if not theta.isfinite().all():
        raise ValueError(f"{name} must be finite, got {theta.isfinite().logical_not().sum()} numbers that are not")
    coldest = model.split(theta).tau
    if not (coldest > 0).all():
        raise ValueError(f"the temperature in {name} must be positive, got {coldest.min().item():g}")


def _function(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, str):
        return ACTIVATIONS[_checks.choice("activation", activation, ACTIVATIONS)]
    return _checks.function("activation", activation)


def _logits(scores: Tensor, bias: Tensor, tau: float | Tensor, bias_inside: bool) -> Tensor:
    return (scores + bias) / tau if bias_inside else scores / tau + bias
