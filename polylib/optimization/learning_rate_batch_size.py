"""How the curvature of a mini-batch, and with it the largest usable learning rate, depends on the batch size.

D. Granziol, S. Zohren and S. Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to
Neural Network Training", JMLR 2022 (arXiv 2006.09092). The Hessian of a batch is that of all data plus noise, and noise
pushes the extreme eigenvalues of a symmetric matrix outwards. `batch_top_eigenvalue` is the formula, `hessian_noise`
its one input that must be measured, `max_learning_rate` reads the largest usable rate off a sweep, and `SpectralSGD`
is the learner that chooses its learning rate and momentum from a few Lanczos steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from polylib import _checks
from polylib.optimization.curvature import hessian_matvec, lanczos

RULES = ("median", "minimum")
FLAT = 1e-8


def batch_top_eigenvalue(
    lam1: float,
    noise: float,
    batch_size: int,
    dataset_size: int | None = None,
    model: str = "hessian",
    dim: int | None = None,
) -> float:
    """The largest eigenvalue that the curvature matrix of a batch is expected to have.

    With 1/b = 1/batch_size - 1/dataset_size, for drawing without replacement:

    - `"hessian"`, additive noise of a Wigner matrix: lam1 + s^2 / lam1 if lam1 > s, else 2 s, with s^2 = noise / b;
    - `"ggn"`, the sample covariance of a spike lam1 over a bulk of variance v = noise / dim, with q = dim / b:
      lam1 (1 + q v / (lam1 - v)) if lam1 > v (1 + sqrt(q)), else v (1 + sqrt(q))^2.

    For the most negative eigenvalue, negate it before and after.

    Args:
        lam1: the largest eigenvalue over all data, above 0.
        noise: for `"hessian"` the mean square of what one sample adds to the matrix's product with the top eigenvector
            (see `hessian_noise`), which for independent entries is their variance times the number of parameters. For
            `"ggn"` the trace of the bulk, `dim` times v.
        dataset_size: how many samples there are; None for infinitely many.
        dim: the number of parameters, for `"ggn"`.

    Raises:
        ValueError: `lam1` not above 0, a negative `noise`, a batch larger than the data, an unknown model, or `"ggn"`
            without `dim`.
    """
    _checks.number("lam1", lam1, above=0)
    _checks.number("noise", noise, least=0)
    if not 1 <= batch_size <= (dataset_size or math.inf):
        raise ValueError(
            f"batch_size must be from 1 to {dataset_size or 'any number'}, the data's size, got {batch_size}"
        )
    share = 1 / batch_size - (1 / dataset_size if dataset_size else 0)
    if model == "hessian":
        square = noise * share
        return lam1 + square / lam1 if lam1 * lam1 > square else 2 * math.sqrt(square)
    _checks.choice("model", model, ("hessian", "ggn"))
    if dim is None or dim < 1:
        raise ValueError(f"dim must be the number of parameters, at least 1, got {dim}")
    variance, ratio = noise / dim, dim * share
    if lam1 > variance * (1 + math.sqrt(ratio)):
        return lam1 * (1 + ratio * variance / (lam1 - variance))
    return variance * (1 + math.sqrt(ratio)) ** 2


def hessian_noise(
    loss_fn: Callable[..., Tensor],
    params: dict[str, Tensor],
    direction: Tensor,
    *data: Tensor,
    chunk_size: int | None = None,
) -> float:
    """How much the Hessian of one sample differs from the mean one along a direction: ``E ||(H_i - H) u||^2``.

    With the top eigenvector for `direction` this is the noise of `batch_top_eigenvalue`; a random direction on the
    sphere gives the isotropic noise, which is the same for independent entries only.

    Args:
        loss_fn: `loss_fn(params, *batch)`, the mean loss of a batch.
        direction: `(P,)`, normalised here.
        data: tensors whose first axis counts the samples.
        chunk_size: samples at once, as in `torch.func.vmap`; each needs memory for a few gradients.

    Raises:
        ValueError: a direction that is zero or not finite.
    """
    length = torch.linalg.vector_norm(direction)
    if not (length > 0 and length.isfinite()):
        raise ValueError("direction must be finite and not zero, got one that is not")
    u = direction / length

    def product(*sample: Tensor) -> Tensor:
        batch = [part[None] for part in sample]
        return hessian_matvec(lambda p: loss_fn(p, *batch), params)(u)

    products = vmap(product, chunk_size=chunk_size)(*data)
    return (products - products.mean(0)).square().sum(1).mean().item()


def max_learning_rate(rates: Sequence[float], losses: Tensor, threshold: float) -> float:
    """The largest usable learning rate of a sweep: where the loss rises through `threshold` for good.

    Interpolates log(loss) linearly in log(rate), between the largest rate whose loss is below the threshold and the
    next one. A loss that is not finite counts as huge.

    Args:
        rates: ascending.
        losses: `(len(rates),)`, positive.

    Returns:
        NaN if no loss is below the threshold, the last rate if that one's is.

    Raises:
        ValueError: rates that do not ascend, or losses of another number.
    """
    if any(a >= b for a, b in pairwise(rates)) or len(rates) != len(losses):
        raise ValueError(f"rates must ascend, one for each of the {len(losses)} losses, got {len(rates)} rates")
    losses = losses.double().nan_to_num(1e9, 1e9).clamp(max=1e9)
    below = (losses < threshold).nonzero()
    if not len(below):
        return math.nan
    k = int(below[-1])
    if k == len(rates) - 1:
        return rates[-1]
    low, high = losses[k].log().item(), losses[k + 1].log().item()
    part = (math.log(threshold) - low) / (high - low)
    return rates[k] * (rates[k + 1] / rates[k]) ** part


def lr_momentum_from_spectrum(
    ritz: Tensor, weights: Tensor, rule: str = "median", *, momentum: bool = True
) -> tuple[float, float]:
    """Learning rate and momentum that are optimal for a quadratic with the curvatures mu to L (Polyak, 1964).

    rate = (2 / (sqrt(L) + sqrt(mu)))^2 and momentum = ((sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)))^2 for the update
    v <- momentum v + g, w <- w - rate v of `torch.optim.SGD`; without momentum the rate is 2 / (L + mu).

    Args:
        ritz, weights: `(m,)`, from `lanczos`. L is the largest magnitude among the Ritz values.
        rule: how mu is chosen. `"median"`: the median magnitude. `"minimum"`: the smallest magnitude, when Ritz values
            of a weight above 1/2, the spike of the spectrum at zero, are left out.
        momentum: whether momentum is used; without, the second number is 0.

    Raises:
        ValueError: an unknown rule, an empty or non-finite spectrum, or one that is flat: L below 1e-8.
    """
    return _polyak(*_edges(ritz, weights, rule), momentum)


def _edges(ritz: Tensor, weights: Tensor, rule: str) -> tuple[float, float]:
    """The largest curvature L and the smallest that counts, mu."""
    _checks.choice("rule", rule, RULES)
    if not len(ritz) or not ritz.isfinite().all():
        raise ValueError("ritz must be finite, with at least one value, got one that is not")
    sizes = ritz.abs()
    kept = sizes[weights <= 0.5]
    small = sizes.quantile(0.5) if rule == "median" else (kept if len(kept) else sizes).min()
    return sizes.max().item(), small.item()


def _polyak(large: float, small: float, momentum: bool = True) -> tuple[float, float]:
    if large < FLAT:
        raise ValueError(
            f"the largest curvature must be at least {FLAT}, since no rate follows from a flat loss, got {large}"
        )
    if not momentum:
        return 2 / (large + small), 0.0
    top, bottom = math.sqrt(large), math.sqrt(small)
    return (2 / (top + bottom)) ** 2, ((top - bottom) / (top + bottom)) ** 2


class SpectralSGD(torch.optim.SGD):
    """SGD with momentum whose learning rate and momentum come from the curvature, measured now and then by `refresh`.

    Measure on batches as large as those of the training: a larger batch has less curvature, and the rate that it
    suggests is larger. The method is meant for large batches. Small ones differ so much in their curvature that a rate
    at the edge for some of them is beyond the edge for others.

    Args:
        params, lr, momentum, weight_decay: as in `torch.optim.SGD`; rate and momentum are in force until the first
            `refresh`. Weight decay is not part of the curvature.
        num_steps: of Lanczos' iteration, for each batch.
        rule: see `lr_momentum_from_spectrum`.
        generator: draws the start vectors.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        num_steps: int = 15,
        rule: str = "median",
        generator: torch.Generator | None = None,
    ) -> None:
        _checks.choice("rule", rule, RULES)
        _checks.integer("num_steps", num_steps, least=1)
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.num_steps, self.rule, self.generator = num_steps, rule, generator

    def refresh(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """Measure the curvature of each loss, and set the learning rate and the momentum of all groups.

        L is the largest over the losses, mu the median. Both settings stay as they are where the curvature says
        nothing: L below 1e-8, as for a network that is saturated, or a loss or gradient that is not finite.

        Args:
            losses: functions without arguments, each of which computes the loss of one batch. None calls backward.

        Returns:
            The learning rate and the momentum now in force.
        """
        if not losses:
            raise ValueError("losses must have at least one function, got none")
        edges = [self._edges_of(loss) for loss in losses]
        known = [edge for edge in edges if edge is not None]
        large = max((edge[0] for edge in known), default=0.0)
        if len(known) == len(edges) and large >= FLAT:
            small = torch.tensor([edge[1] for edge in known]).quantile(0.5).item()
            rate, momentum = _polyak(large, small)
            for group in self.param_groups:
                group["lr"], group["momentum"] = rate, momentum
        return self.param_groups[0]["lr"], self.param_groups[0]["momentum"]

    def _edges_of(self, loss: Callable[[], Tensor]) -> tuple[float, float] | None:
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            value = loss()
            parts = torch.autograd.grad(value, params, create_graph=True, materialize_grads=True)
            gradient = torch.cat([part.flatten() for part in parts])
        if not (gradient.requires_grad and value.isfinite() and gradient.isfinite().all()):
            return None

        def matvec(v: Tensor) -> Tensor:
            product = torch.autograd.grad(gradient, params, v, retain_graph=True, materialize_grads=True)
            return torch.cat([part.flatten() for part in product])

        source = None if self.generator is None else self.generator.device
        start = torch.randn(len(gradient), generator=self.generator, device=source, dtype=gradient.dtype)
        result = lanczos(matvec, start.to(gradient.device), min(self.num_steps, len(gradient)))
        return _edges(result.ritz, result.weights, self.rule)
