"""Selectable Kolmogorov-Arnold networks: a pool of function families, of which each input of a layer keeps the best.

Z. Yang, J. Zhang, X. Luo, Z. Lu and L. Shen, "Activation Space Selectable Kolmogorov-Arnold Networks", 2024 (arXiv
2408.08338). The pool, the selection for each input node and the three stages of training are the paper's. It was not
available to us in full: the number of functions, the penalties, the score that decides what is pruned and the lengths
of the stages are choices made here.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.lab.same_architecture import check_same_architecture
from polylib.lab.stack import Stack
from polylib.neurons.basis_functions import FAMILIES, check_grid


class SelectableKANLinear(nn.Module):
    """A layer of learned functions, `(..., in_features)` to `(..., out_features)`, from a pool of K families:

        y_o = sum_i (w_oi base(x_i) + sum_k mask_ik select_ik sum_b c_koib basis_kb(x_i)).

    `select` (in_features, K) is learned, `mask` (in_features, K) says which families an input still has.

    Args:
        in_features, out_features: at least 1.
        pool: names from `FAMILIES`; with one name this is an ordinary Kolmogorov-Arnold layer of that family.
        n_basis: B, the number of functions of each family, at least 4.
        grid_range: where inputs are expected. Outside B-splines fall to zero, and a warning says so.
        base: the fixed function beside the learned ones.

    Raises:
        ValueError: a size below 1, an empty pool, an unknown or repeated name in it, a bad grid, an input of another
            size or one that is not finite. Inside `torch.func` and `torch.compile` values are not looked at.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pool: Sequence[str] = tuple(FAMILIES),
        n_basis: int = 8,
        grid_range: tuple[float, float] = (-1.2, 1.2),
        base: Callable[[Tensor], Tensor] = F.silu,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            _checks.integer(name, value, least=1)
        if not pool or set(pool) - set(FAMILIES) or len(set(pool)) < len(pool):
            raise ValueError(f"pool must be different names from {', '.join(map(repr, FAMILIES))}, got {pool!r}")
        check_grid(n_basis, grid_range)
        self.in_features, self.out_features, self.pool = in_features, out_features, tuple(pool)
        self.n_basis, self.grid_range, self.base = n_basis, grid_range, base
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **made))
        self.coefficients = nn.Parameter(torch.empty(len(pool), out_features, in_features, n_basis, **made))
        self.select = nn.Parameter(torch.empty(in_features, len(pool), **made))
        self.register_buffer("mask", torch.ones(in_features, len(pool), **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new values, and give every input all families again."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.normal_(self.coefficients, std=0.1 * self.in_features**-0.5)
        nn.init.ones_(self.select)
        nn.init.ones_(self.mask)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_features, self.grid_range)
        scale = (self.mask * self.select).T[:, None, :, None]  # (K, 1, in, 1)
        edges = (self.coefficients * scale).permute(1, 2, 0, 3).flatten(1)  # (out, in K B)
        values = [FAMILIES[name](x, self.n_basis, *self.grid_range) for name in self.pool]
        return F.linear(self.base(x), self.weight) + F.linear(torch.stack(values, -2).flatten(-3), edges)

    @torch.no_grad()
    def scores(self, loss_fn: Callable[[], Tensor]) -> Tensor:
        """By how much `loss_fn()`, the loss of the model that this layer is in, rises when one family of one input is
        masked: (in_features, K), minus infinity where it is masked already."""
        original = self.mask

        def loss(mask: Tensor) -> Tensor:
            self.mask = mask
            return loss_fn()

        try:
            return _scores(original, loss)
        finally:
            self.mask = original

    @torch.no_grad()
    def prune(self, scores: Tensor, keep: int = 1) -> None:
        """Keep for each input the `keep` families of the highest score, and mask the others.

        Raises:
            ValueError: `keep` is not between 1 and the size of the pool, or `scores` has another shape than `mask`.
        """
        _check_keep(keep, len(self.pool))
        if scores.shape != self.mask.shape:
            raise ValueError(f"scores must have shape {tuple(self.mask.shape)}, as mask, got {tuple(scores.shape)}")
        self.mask = _best(scores, keep).to(self.mask)

    def families(self) -> list[tuple[str, ...]]:
        """The names of the families that each input still has."""
        return [tuple(name for name, on in zip(self.pool, row, strict=True) if on) for row in self.mask.tolist()]

    def pruned(self) -> "PrunedKANLinear":
        """The same function with only the coefficients, and the work, of the families that are not masked."""
        return PrunedKANLinear(self)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, pool={self.pool}, n_basis={self.n_basis}"


class PrunedKANLinear(nn.Module):
    """What is left of a `SelectableKANLinear` after pruning: each family is evaluated at the inputs that have it.

    The selection weights are multiplied into the coefficients.
    """

    def __init__(self, layer: SelectableKANLinear) -> None:
        super().__init__()
        self.in_features, self.n_basis, self.grid_range = layer.in_features, layer.n_basis, layer.grid_range
        self.base = layer.base
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.coefficients = nn.ParameterDict()
        for k, name in enumerate(layer.pool):
            nodes = layer.mask[:, k].nonzero().flatten()
            if len(nodes):
                edges = layer.coefficients[k][:, nodes] * (layer.mask * layer.select)[nodes, k, None]
                self.coefficients[name] = nn.Parameter(edges.detach().clone())  # (out, nodes, B)
                self.register_buffer(f"nodes_{name}", nodes)

    def forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.in_features, self.grid_range)
        y = F.linear(self.base(x), self.weight)
        for name, edges in self.coefficients.items():
            nodes = getattr(self, f"nodes_{name}")
            chosen = x if len(nodes) == self.in_features else x[..., nodes]
            y = y + F.linear(FAMILIES[name](chosen, self.n_basis, *self.grid_range).flatten(-2), edges.flatten(1))
        return y


def train_skan(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    stages: tuple[float, float, float] = (0.35, 0.25, 0.4),
    lr: float = 0.03,
    l1: float = 1e-3,
    ridge: float = 1e-5,
    keep: int = 1,
) -> dict[str, Any]:
    """Train T networks of one architecture in the three stages, in place and in one pass: all families; all families
    with a penalty on the selection weights; after pruning, those that were kept, with a fresh learning rate.

    Every step is one of Adam on the mean square error of all samples; the rate falls as a cosine, once over the first
    two stages and once over the third. Whether a family is kept is decided by how much the error rises without it.
    With `keep` equal to the size of the pool nothing is pruned.

    Args:
        models: modules that differ in the values of their parameters only and contain `SelectableKANLinear` layers.
        x, y: (T, samples, features) and (T, samples, outputs), the data of each model.
        stages: the shares of the steps.
        l1: the weight of the sum of absolute selection weights in the second stage.
        ridge: the weight of the squared coefficients in all stages, so that families do not cancel each other.
        keep: how many families each input keeps.

    Returns:
        `loss`, (T, steps), the mean square error, and `scores`, for each layer by name (T, in_features, K).

    Raises:
        ValueError: no models, a model without such a layer, `keep` out of range, or stages that do not add up to 1.
    """
    check_same_architecture(models)
    layers = {name: part for name, part in models[0].named_modules() if isinstance(part, SelectableKANLinear)}
    if not layers:
        raise ValueError(
            f"models[0] must have at least one SelectableKANLinear, got a {type(models[0]).__name__} without"
        )
    _check_keep(keep, min(len(layer.pool) for layer in layers.values()))
    if abs(sum(stages) - 1) > 1e-6 or min(stages) < 0:
        raise ValueError(f"stages must be three shares that add up to 1, got {stages}")
    prefixes = [f"{name}." if name else "" for name in layers]
    shrink = int(stages[0] * steps)
    prune = int((stages[0] + stages[1]) * steps)

    def objective(l1: float, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mse = F.mse_loss(model(batch[0]), batch[1])
        parts = [part for part in model.modules() if isinstance(part, SelectableKANLinear)]
        penalty = sum(ridge * part.coefficients.square().sum() + l1 * part.select.abs().sum() for part in parts)
        return mse + penalty, mse

    losses, scores = [], {}
    for first, last in ((0, prune), (prune, steps)):
        stack = Stack(models, lr, optimizer="adam")
        for step in range(first, last):
            factor = 0.5 * (1 + math.cos(math.pi * (step - first) / (last - first)))
            stage = partial(objective, l1 if shrink <= step < prune else 0.0)
            losses.append(stack.step(stage, (x, y), factor=factor)[1])
        if first == 0:
            masks = dict(stack.buffers)
            scores = {
                layer: _scores(masks[f"{prefix}mask"], partial(_errors, stack, (x, y), f"{prefix}mask"))
                for layer, prefix in zip(layers, prefixes, strict=True)
            }
            chosen = {f"{p}mask": _best(scores[layer], keep).to(x) for layer, p in zip(layers, prefixes, strict=True)}
            stack.buffers = masks | chosen
        stack.write_back()
    return {"loss": torch.stack(losses, 1), "scores": scores}


def _errors(stack: Stack, batch: tuple[Tensor, Tensor], key: str, mask: Tensor) -> Tensor:
    """The mean square error of every network with another mask in the place of one of its own."""
    own = stack.buffers
    stack.buffers = own | {key: mask}
    try:
        return stack.evaluate(lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), batch)
    finally:
        stack.buffers = own


def _scores(mask: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The rise of the loss when one entry of the last two axes of the mask is set to zero, for each of them."""
    whole = loss(mask)
    rise = torch.full_like(mask, float("-inf"))
    for i in range(mask.shape[-2]):
        for k in range(mask.shape[-1]):
            without = mask.clone()
            without[..., i, k] = 0
            rise[..., i, k] = torch.where(mask[..., i, k] > 0, loss(without) - whole, rise[..., i, k])
    return rise


def _best(scores: Tensor, keep: int) -> Tensor:
    """A mask of the `keep` highest scores along the last axis, without those that are minus infinity."""
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(keep, -1).indices, 1.0)
    return chosen * scores.isfinite()


def _check_keep(keep: int, families: int) -> None:
    _checks.integer("keep", keep, least=1, most=families)


def _check_input(x: Tensor, in_features: int, grid_range: tuple[float, float]) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    # Values can't be looked at inside a transformation, and torch has no public name for this question.
    if x.numel() == 0 or x.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    low, high = (bound.item() for bound in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("x must be finite, got values that are not")
    if low < grid_range[0] or high > grid_range[1]:
        warnings.warn(f"x reaches from {low:.3g} to {high:.3g}, beyond the grid {grid_range}", stacklevel=3)
