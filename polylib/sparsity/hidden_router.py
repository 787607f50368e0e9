r"""Which groups of hidden dimensions a token uses: some shared by all tokens, some chosen by a router.

Y. Chen and others, "Mixture of Hidden-Dimensions: Not All Hidden-States' Dimensions are Needed in Transformer", ICML
2025 (arXiv 2412.05644). The paper's abstract has shared and routed sub-dimensions, and of its equations none was at
hand: centroids, their start, the weights of the chosen groups and the balance loss are choices of this implementation,
the last as in W. Fedus, B. Zoph and N. Shazeer, "Switch Transformers", JMLR 2022.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks


class Routing(NamedTuple):
    """The weight of each group for each token, `(..., n_groups)`, and the balance loss, `()`."""

    gate: Tensor
    balance: Tensor


class HiddenDimensionRouter(nn.Module):
    r"""Weights of `n_groups` groups of hidden dimensions for each token, `active` of which are not zero.

    The first `shared` groups have the weight 1. Of the n others the K = `active` - `shared` with the largest scores
    $s=\mathrm{softmax}(uC^\top)$ have the weights $K s_i/\sum_{t\text{ chosen}}s_t$, which are 1 on average. With K = 1
    the weight is 1 whatever the score, and then no gradient but that of the balance loss reaches the router. With
    `active` = `shared` or `active` = `n_groups` there is nothing to choose, and no parameter. The balance loss
    $n\sum_if_ip_i$ has the shares $f_i$ of all choices that fell on group i, without gradient, and the mean scores
    $p_i$: 1 if these are even, n / K if all tokens give all of their scores to the same K groups, 0 if there is no
    choice. Scores are computed in float32 at least, also under autocast.

    Args:
        d_model: width of the tokens, a multiple of `n_groups`.
        n_groups: of neighbouring dimensions, of d_model / n_groups each.
        active: groups that a token uses, 1 to `n_groups`.
        shared: those among them that every token uses, 0 to `active`.

    Attributes:
        centroids: `(n_groups - shared, d_model)`, Gaussian at first, with the variance 1 / d_model; None where there is
            nothing to choose.

    Raises:
        ValueError: numbers out of their range, or `n_groups` that do not divide `d_model`.
    """

    def __init__(self, d_model: int, n_groups: int = 16, active: int = 8, shared: int = 6) -> None:
        super().__init__()
        self.d_model = _checks.integer("d_model", d_model, least=1)
        self.n_groups = _checks.divisor("n_groups", n_groups, "d_model", self.d_model)
        self.active = _checks.integer("active", active, 1, self.n_groups)
        self.shared = _checks.integer("shared", shared, 0, self.active)
        self.centroids: nn.Parameter | None = None
        if self.shared < self.active < self.n_groups:
            drawn = torch.randn(self.n_groups - self.shared, self.d_model)
            self.centroids = nn.Parameter(drawn / self.d_model**0.5)

    def forward(self, u: Tensor) -> Routing:
        """The routing of tokens `(..., d_model)`, which should be normalised: scores grow with their size.

        Raises:
            ValueError: another shape.
        """
        fits = u.dim() > 0 and u.shape[-1] == self.d_model
        _checks.shape("u", u, f"(..., {self.d_model})", fits)
        if self.centroids is None:
            gate = u.new_ones(self.active).expand(*u.shape[:-1], -1)
            return Routing(F.pad(gate, (0, self.n_groups - self.active)), u.new_zeros(()))
        device = "cpu" if u.is_meta else u.device.type  # autocast doesn't know the meta device
        with torch.autocast(device, enabled=False):
            wide = torch.promote_types(u.dtype, torch.float32)
            scores = F.linear(u.to(wide), self.centroids.to(wide)).softmax(-1)
            chosen, places = scores.topk(self.active - self.shared, -1)
            weights = chosen * (chosen.shape[-1] / chosen.sum(-1, keepdim=True))
            routed = torch.zeros_like(scores).scatter(-1, places, weights)
            gate = torch.cat([torch.ones_like(scores[..., :1]).expand(*u.shape[:-1], self.shared), routed], -1)
            balance = balance_loss(scores, torch.zeros_like(scores).scatter(-1, places, 1.0))
        return Routing(gate.to(u.dtype), balance)

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, n_groups={self.n_groups}"
        return f"{sizes}, active={self.active}, shared={self.shared}"


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    r"""$n\sum_if_ip_i$, `()`, for scores `(..., n)` whose rows sum to 1, and the choices `(..., n)` as zeros and ones.

    $f_i$ is the share of all choices that fell on group i, and $p_i$ the mean of its scores. Without tokens it is 0.
    """
    n = scores.shape[-1]
    counts = chosen.detach().reshape(-1, n).sum(0)
    shares = counts / counts.sum().clamp(min=1)
    tokens = max(scores[..., 0].numel(), 1)
    return n * (shares * scores.reshape(-1, n).sum(0)).sum() / tokens


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """In this context, what each router of the model has returned last, by its name in `named_modules`.

    It may be entered inside of a loss, under `torch.func.vmap` and in a `Stack` too.

    Raises:
        ValueError: the model has no `HiddenDimensionRouter`.
    """
    routers = {n: part for n, part in model.named_modules() if isinstance(part, HiddenDimensionRouter)}
    if not routers:
        raise ValueError(f"model must hold a HiddenDimensionRouter, got {type(model).__name__}")
    found: dict[str, Routing] = {}

    def hook(name: str) -> "torch.utils.hooks.RemovableHandle":
        return routers[name].register_forward_hook(lambda _, __, output: found.__setitem__(name, output))

    handles = [hook(name) for name in routers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
