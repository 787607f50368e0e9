"""Error feedback (EF21): distributed gradient descent that stays right when clients send compressed gradients.

P. Richtarik, I. Sokolov and I. Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
Feedback", NeurIPS 2021 (arXiv 2106.05203); P. Richtarik, E. Gasanov and K. Burlachenko, "Error Feedback Reloaded: From
Quadratic to Arithmetic Mean of Smoothness Constants", ICLR 2024 (arXiv 2402.10774). Every client keeps an estimate of
its own gradient, which the server knows too, and sends the compressed difference between the two.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import widened


def ef21_xi(alpha: float) -> float:
    """What compression adds to the smoothness: sqrt(1 - alpha) / (1 - sqrt(1 - alpha)), 0 for alpha = 1.

    Computed as (1 + sqrt(1 - alpha)) / alpha - 1, which is the same and does not cancel for a small alpha.

    Args:
        alpha: the contraction of the compressor, above 0 and at most 1.
    """
    alpha = _checks.number("alpha", alpha, above=0, most=1)
    return (1 + (1 - alpha) ** 0.5) / alpha - 1


def ef21_stepsize(
    smoothness: float | Tensor,
    clients: Tensor,
    alpha: float,
    mean: Literal["arithmetic", "quadratic"] = "arithmetic",
) -> Tensor:
    """The largest step for which the theory of EF21 gives a rate: 1 / (L + mean(L_i) xi(alpha)).

    Args:
        smoothness: L, the Lipschitz constant of the gradient of the mean loss, or several of shape `(...)`.
        clients: L_i, those of the clients' losses, `(..., n)`.
        alpha: the contraction of the compressor.
        mean: of the L_i: `"quadratic"` is the step of 2021, `"arithmetic"` the larger one of 2024.

    Returns:
        The step, `(...)`.

    Raises:
        TypeError: clients that are not floating.
        ValueError: constants that are not positive and finite, or an L above all L_i, which no mean of losses has.
    """
    _checks.choice("mean", mean, ("arithmetic", "quadratic"))
    _checks.shape("clients", clients, "(..., n) with at least one client", clients.dim() > 0 and clients.shape[-1] > 0)
    _checks.floating("dtype of clients", clients.dtype)
    whole = torch.as_tensor(smoothness, dtype=clients.dtype, device=clients.device)
    for name, values in (("smoothness", whole), ("clients", clients)):
        if not (values.isfinite() & (values > 0)).all():
            raise ValueError(f"{name} must be positive and finite, got {values.tolist()}")
    if not (whole <= clients.amax(-1) * (1 + 1e-4)).all():
        raise ValueError(
            f"smoothness must be at most the largest of clients, got {whole.tolist()} and {clients.amax(-1).tolist()}"
        )
    scale = 2.0 ** widened(clients).amax(-1).log2().floor()  # a power of two, so that nothing overflows or rounds
    parts = widened(clients) / scale[..., None]
    average = parts.mean(-1) if mean == "arithmetic" else parts.square().mean(-1).sqrt()
    return (1 / (widened(whole) / scale + average * ef21_xi(alpha)) / scale).to(clients.dtype)


class EF21Simulator:
    """The rounds of EF21 for n clients on one machine, all of them at once, and for any number of runs side by side.

    A round: x <- x - stepsize g; each client sends c_i = C(gradient_i(x) - g_i) and adds it to its g_i; the server adds
    the mean of the c_i to g. With weights w_i (EF21-W) clients compress gradient_i(x) / (n w_i) - g_i, and the server
    adds the sum of w_i c_i. The first g_i are the compressed gradients at the start.

    Attributes:
        x: where the run stands, `(..., d)`.
        clients: the g_i, `(..., n, d)`.
        server: g, `(..., d)`, the weighted sum of the g_i.
        square_norm: the squared length of the gradient of the mean loss at `x`, `(...)`.

    Args:
        gradients: from points `(..., d)` the gradients of the clients' losses, `(..., n, d)`.
        x: the start, `(..., d)`.
        stepsize: above 0, a number or a tensor that broadcasts with the leading dimensions of `x`.
        compressor: a function of `(..., n, d)` that works along the last dimension, such as `TopK`.
        weights: w_i, `(..., n)`, positive and with the sum 1; by default EF21 without weights. Equal weights are none.
        feedback: False sends the compressed gradients themselves, which in general does not converge.
        participation: the probability with which a client takes part in a round. One that does not keeps its g_i.
        generator: draws who takes part.

    Raises:
        ValueError: shapes that don't fit, a step or weight not above 0, weights whose sum is not 1, or fewer
            participants without feedback, where an absent client has nothing to stand for it.
    """

    def __init__(
        self,
        gradients: Callable[[Tensor], Tensor],
        x: Tensor,
        stepsize: float | Tensor,
        compressor: Callable[[Tensor], Tensor],
        *,
        weights: Tensor | None = None,
        feedback: bool = True,
        participation: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        _checks.shape("x", x, "(..., d)", x.dim() > 0)
        self._stepsize = torch.as_tensor(stepsize, dtype=x.dtype, device=x.device)[..., None]
        if not (self._stepsize > 0).all():
            raise ValueError(f"stepsize must be above 0, got {self._stepsize.min().item():g}")
        self._participation = _checks.number("participation", participation, above=0, most=1)
        if participation < 1 and not feedback:
            raise ValueError(f"participation must be 1 without feedback, got {participation}")
        self._gradients, self._compressor = _checks.function("gradients", gradients), compressor
        self._feedback, self._generator = feedback, generator
        own = gradients(x)
        want = f"{(*x.shape[:-1], 'n', x.shape[-1])}"
        fits = own.dim() == x.dim() + 1 and own.shape[:-2] == x.shape[:-1] and own.shape[-1] == x.shape[-1]
        _checks.shape("gradients(x)", own, want, fits)
        n = own.shape[-2]
        if weights is None:
            self._scale = self._share = None
        else:
            _checks.shape("weights", weights, f"(..., {n}), one for each client", weights.shape[-1:] == (n,))
            if not (weights > 0).all() or not ((weights.sum(-1) - 1).abs() < 1e-5).all():
                raise ValueError(f"weights must be positive with the sum 1, got {weights.tolist()}")
            self._scale, self._share = 1 / (n * weights[..., None]), weights[..., None]
        self.x, self.square_norm = x, own.mean(-2).square().sum(-1)
        self.clients = compressor(self._weighted(own))
        self.server = self._mean(self.clients)

    def step(self) -> Tensor:
        """One round. Returns the new `square_norm`."""
        self.x = self.x - self._stepsize * self.server
        own = self._gradients(self.x)
        if self._feedback:
            sent = self._compressor(self._weighted(own) - self.clients)
            if self._participation < 1:
                chance = torch.rand(own.shape[:-1], generator=self._generator, dtype=own.dtype).to(own.device)
                sent = sent * (chance < self._participation)[..., None]
            self.clients = self.clients + sent
            self.server = self.server + self._mean(sent)
        else:
            self.clients = self._compressor(self._weighted(own))
            self.server = self._mean(self.clients)
        self.square_norm = own.mean(-2).square().sum(-1)
        return self.square_norm

    def run(self, rounds: int) -> Tensor:
        """So many rounds more. Returns `square_norm` before them and after each, `(1 + rounds, ...)`."""
        rounds = _checks.integer("rounds", rounds, least=0)
        return torch.stack([self.square_norm, *(self.step() for _ in range(rounds))])

    def _weighted(self, own: Tensor) -> Tensor:
        return own if self._scale is None else own * self._scale

    def _mean(self, each: Tensor) -> Tensor:
        return each.mean(-2) if self._share is None else (each * self._share).sum(-2)
