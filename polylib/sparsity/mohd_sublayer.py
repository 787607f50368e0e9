r"""A sub-layer of a Transformer of which each token uses a part of the hidden dimensions, and their fusion.

Y. Chen and others, "Mixture of Hidden-Dimensions: Not All Hidden-States' Dimensions are Needed in Transformer", ICML
2025 (arXiv 2412.05644). The abstract names activation scaling and group fusion, which is known to be a Monarch matrix;
the forms here, the scale and the start included, are choices of this implementation.
"""

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels.monarch_multiply import monarch_multiply
from polylib.sparsity.hidden_router import HiddenDimensionRouter


class GroupFusion(nn.Module):
    r"""Adds to y its product with a Monarch matrix, so that every dimension hears of every other: y + M y.

    With N groups of g dimensions, M mixes inside each group, then the N numbers at one place of all groups. It has
    d (g + N) parameters in place of $d^2$, fewest for $g=N=\sqrt d$. The first factor starts at zero, so that nothing
    is added at first.

    Attributes:
        w1, w2: `(N, g, g)` and `(g, N, N)`, the factors, as `polylib.kernels.monarch_multiply` takes them.

    Raises:
        ValueError: `n_groups` that do not divide `d_model`, or an input that is not `(..., d_model)`.
    """

    def __init__(self, d_model: int, n_groups: int = 16) -> None:
        super().__init__()
        self.d_model = _checks.integer("d_model", d_model, least=1)
        n = _checks.divisor("n_groups", n_groups, "d_model", self.d_model)
        g = self.d_model // n
        self.w1 = nn.Parameter(torch.zeros(n, g, g))
        self.w2 = nn.Parameter(torch.empty(g, n, n).uniform_(-(n**-0.5), n**-0.5))

    def forward(self, y: Tensor) -> Tensor:
        """`(..., d_model)` to the same."""
        _checks.shape("y", y, f"(..., {self.d_model})", y.dim() > 0 and y.shape[-1] == self.d_model)
        return y + monarch_multiply(y, self.w1, self.w2)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_groups={self.w1.shape[0]}"


class MoHDSublayer(nn.Module):
    r"""Attention or an MLP on the active groups of each token, to be added to the residual stream by the caller.

    With the weights $\gamma$ of the groups, spread over their dimensions, and $\alpha=\sqrt{N/N_a}$ for `active` = N_a
    of N groups,

    $$\tilde u=\alpha\,\gamma\odot u,\qquad y=\alpha\,[\gamma>0]\odot\mathrm{inner}(\tilde u),\qquad
    \hat y=y+\mathcal My.$$

    As a product with zero need not be computed, only the columns of the first weight of `inner` in active groups are
    used, and only the rows of its last; here both are whole, and masked (`from_groups` and `to_groups` are products
    that skip). With `active` = N it is `inner` itself, up to the fusion.

    Args:
        inner: keeps the shape `(..., d_model)`; what it does first and last is linear.
        d_model, n_groups, active, shared: as in `HiddenDimensionRouter`.
        scale: whether to multiply by $\alpha$.
        fusion: whether to have a `GroupFusion`; with `active` = `n_groups`, too.

    Raises:
        ValueError: as `HiddenDimensionRouter`.
        TypeError: `inner` is not a module.
    """

    def __init__(
        self,
        inner: nn.Module,
        d_model: int,
        n_groups: int = 16,
        active: int = 8,
        shared: int = 6,
        *,
        scale: bool = True,
        fusion: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(inner, nn.Module):
            raise TypeError(f"inner must be a torch.nn.Module, got {type(inner).__name__}")
        self.router = HiddenDimensionRouter(d_model, n_groups, active, shared)
        self.inner = inner
        self.fusion = GroupFusion(d_model, n_groups) if fusion else None
        self.alpha = (self.router.n_groups / self.router.active) ** 0.5 if scale else 1.0

    def forward(self, u: Tensor) -> Tensor:
        """Of normalised tokens `(..., d_model)` the same shape; `recorded_routing` has what the router said."""
        gate = self.alpha * self.router(u).gate
        kept = self.alpha * (gate > 0).to(u.dtype)
        y = _by_group(kept, self.inner(_by_group(gate, u)))
        return y if self.fusion is None else self.fusion(y)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:.3g}"


def _by_group(weights: Tensor, x: Tensor) -> Tensor:
    """x `(..., d)` times weights `(..., N)`, one for each of N groups of neighbours."""
    return (weights[..., None] * x.unflatten(-1, (weights.shape[-1], -1))).flatten(-2)


def activated_parameters(module: nn.Module) -> int:
    """How many of the parameters of a module one token uses, each shared one counted once.

    Of the matrices inside a `MoHDSublayer` these are the active share, since a token uses so much of one side of each.
    Everything else counts in full: vectors, routers, fusions, and what is outside, such as norms, embeddings and heads.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    counts = {id(p): p.numel() for p in module.parameters()}
    for layer in module.modules():
        if isinstance(layer, MoHDSublayer):
            for p in layer.inner.parameters():
                if p.dim() > 1:
                    counts[id(p)] = p.numel() * layer.router.active // layer.router.n_groups
    return sum(counts.values())
