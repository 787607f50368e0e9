"""MKOR: gradients preconditioned by inverse Kronecker factors, which rank-one formulas keep fresh at quadratic cost.

M. Mozaffari, S. Li, Z. Zhang and M. Mehri Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
Rank-1 Updates", NeurIPS 2023 (arXiv 2306.01685). The covariances of a layer's inputs a and of the gradients g by its
outputs are taken as those of one vector a batch, their means. `inverse_factors` has the formulas, and says how that
which the authors print differs from the exact one, the default here.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.optimization.inverse_factors import REFRESHES, kronecker_precondition, rescaled, stabilise_
from polylib.optimization.layer_statistics import Layer, LayerState, layer_states, mean_input

SYMMETRISE = 100  # refreshes after which rounding is taken out of the symmetry


class MKOR:
    """Put L^-1 G R^-1 in the place of each gradient G, then let a torch optimizer take its step.

    It works on `Linear` and `Conv2d` layers (without groups) whose weight is trained, the bias as one more column; all
    other parameters are left to the optimizer as they are. On refresh steps hooks take two vectors from each layer, in
    training mode and with gradients on; on other steps they do nothing, and the factors are those of the last refresh.

    The loss must be a mean over rows, as torch's losses are. With one that is multiplied by a number, by a gradient
    scaler or since batches are added up, give that number to `step`. On a refresh, a batch that overflows raises, so
    that a `GradScaler`, which expects such batches, needs a check of the gradients before, and `skip` in the place of
    `step` where they are not finite; bfloat16 needs no scaler. Weight decay belongs to the optimizer, after the
    preconditioning; if its rate has a schedule, that is the optimizer's too.

    Args:
        model: with one of these layers at least. Hooks are put on it; `remove_hooks` takes them away.
        optimizer: over the parameters of `model`.
        gamma: the weight of the past in the covariances, above 0 and below 1.
        update_freq: steps from one refresh to the next.
        variant: of the refresh. `"exact"`: the inverse of the average. `"package"`: as the authors' package has it.
            `"printed"`: as they print it, which amplifies where it should damp; to compare.
        stabilizer: before a refresh, a factor with a larger entry than this is blended with the identity; None: never.
        zeta: the weight of the factor in that.
        rescale: give each layer's direction the length of its gradient.
        exclude: names of layers that are left alone.
        factor_dtype: of the factors; they are computed in float32 at least.
        warmup: first steps, all of which refresh.
        process_group: of `torch.distributed`, over which the vectors are averaged; the factors of all processes then
            stay the same. None: no exchange.

    Attributes:
        layers: by name, each with its inverse factors `left` and `right`.
        active: set it to False, and gradients pass as they are. What the optimizer has gathered stays.
        steps: taken so far.

    Raises:
        ValueError: a setting out of its range, a model without such layers, layers that share a weight, or names in
            `exclude` that are no such layers.
        TypeError: a `factor_dtype` that is not a floating-point one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 0.95,
        update_freq: int = 10,
        variant: str = "exact",
        stabilizer: float | None = 2.0,
        zeta: float = 0.95,
        rescale: bool = True,
        exclude: Iterable[str] = (),
        factor_dtype: torch.dtype = torch.float32,
        warmup: int = 0,
        process_group: Any = None,
    ) -> None:
        self.gamma = _checks.number("gamma", gamma, above=0, below=1)
        self.update_freq = _checks.integer("update_freq", update_freq, least=1)
        self.variant = _checks.choice("variant", variant, REFRESHES)
        self.stabilizer = None if stabilizer is None else _checks.number("stabilizer", stabilizer, above=0)
        self.zeta = _checks.number("zeta", zeta, least=0, most=1)
        self.warmup = _checks.integer("warmup", warmup, least=0)
        _checks.floating("factor_dtype", factor_dtype)
        self.optimizer, self.rescale, self.process_group = optimizer, rescale, process_group
        self.active, self.steps, self.refreshes = True, 0, 0
        self.layers, self._arena = layer_states(model, set(exclude), factor_dtype or torch.float32)
        self._hooks = [
            layer.module.register_forward_hook(partial(self._watch, layer), with_kwargs=True)
            for layer in self.layers.values()
        ]

    @property
    def due(self) -> bool:
        """Whether the coming step refreshes the factors."""
        return self.active and (self.steps < self.warmup or self.steps % self.update_freq == 0)

    def _watch(
        self, layer: LayerState, module: Layer, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], out: Tensor
    ) -> None:
        if self.due and module.training and out.requires_grad and torch.is_grad_enabled():
            inputs = mean_input(module, (args[0] if args else kwargs["input"]).detach())
            # On the tensor and not on the module: what follows may change the output in place.
            out.register_hook(partial(layer.collect, inputs))

    @torch.no_grad()
    def precondition(self, loss_scale: float = 1.0) -> None:
        """Refresh the factors, if that is due, and put the directions into the gradients: `step` without its end.

        Args:
            loss_scale: what the loss of a row was multiplied by. It is divided out of the statistics; the gradients
                are left with the scale that they have.

        Raises:
            RuntimeError: the factors are to be refreshed, but a layer with a gradient was not seen in training mode; a
                layer whose bias was frozen or set free since; or factors that are no longer finite, which happens where
                no stabiliser bounds them.
            ValueError: statistics that are not finite, or whose squares are not; factors and gradients are as before.
                Or a scale not above 0.
        """
        loss_scale = _checks.number("loss_scale", loss_scale, above=0)
        used = {name: layer for name, layer in self.layers.items() if layer.module.weight.grad is not None}
        for name, layer in used.items():
            expected = (len(layer.left), len(layer.right))
            if tuple(layer.gradient().shape) != expected:
                got = tuple(layer.gradient().shape)
                raise RuntimeError(f"layer {name!r} must have a gradient of {expected} with its bias, got {got}")
        if self.due:
            unseen = [name for name, layer in used.items() if not layer.collected]
            if unseen or not used:
                layers = f"of {', '.join(unseen)}" if unseen else "of any layer"
                raise RuntimeError(f"a refresh needs a forward and a backward pass in training mode, got none {layers}")
            try:
                self._refresh(used, loss_scale)
            finally:
                self._forget()
        if self.active:
            for layer in used.values():
                grad = layer.gradient()
                moved = kronecker_precondition(grad, layer.left, layer.right)
                layer.set_gradient(rescaled(moved, grad) if self.rescale else moved)
        self._forget()
        self.steps += 1

    def step(self, loss_scale: float = 1.0) -> None:
        """`precondition`, then the step of the optimizer."""
        self.precondition(loss_scale)
        self.optimizer.step()

    def skip(self) -> None:
        """Drop what a batch has left behind: instead of `step`, if the optimizer is to take none."""
        self._forget()

    def _refresh(self, used: dict[str, LayerState], loss_scale: float) -> None:
        vectors: list[Tensor] = []
        for layer in used.values():
            grad, inputs = layer.statistics()
            vectors += [grad / loss_scale, inputs]
        if self.process_group is not None:
            vectors = _averaged(vectors, self.process_group)
        factors = [factor for layer in used.values() for factor in (layer.left, layer.right)]
        pairs = zip(vectors, factors, strict=True)
        sizes = [v.to(torch.promote_types(f.dtype, torch.float32)).square().sum().double() for v, f in pairs]
        if not torch.stack(sizes).isfinite().all():
            raise ValueError("statistics and their squares must be finite, got inputs or gradients that are not")
        arena = self._arena if self.variant == "exact" else None
        if arena is not None and arena.on_gpu and arena.holds(factors):
            arena.refresh_(vectors, self.gamma, self.stabilizer, self.zeta)
        else:
            for factor, v in zip(factors, vectors, strict=True):
                if self.stabilizer is not None:
                    stabilise_(factor, self.stabilizer, self.zeta)
                REFRESHES[self.variant](factor, v, self.gamma)
        traces = torch.stack([factor.diagonal().sum().double() for factor in factors]).isfinite().view(-1, 2).all(1)
        broken = [name for name, fine in zip(used, traces.tolist(), strict=True) if not fine]
        if broken:
            raise RuntimeError(
                f"the factors of {', '.join(broken)} are no longer finite: a direction without statistics grows until "
                "rounding breaks the factor; a stabilizer, with zeta at most gamma, keeps it small for long"
            )
        self.refreshes += 1
        if self.refreshes % SYMMETRISE == 0:
            for factor in factors:
                factor.copy_((factor + factor.mT) / 2)

    def _forget(self) -> None:
        for layer in self.layers.values():
            layer.collected.clear()

    def remove_hooks(self) -> None:
        """Leave the model as it was. Refreshes are no longer possible."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, the factors, and the counts; not the settings."""
        factors = {name: {"left": layer.left, "right": layer.right} for name, layer in self.layers.items()}
        counts = {"steps": self.steps, "refreshes": self.refreshes, "active": self.active}
        return {"optimizer": self.optimizer.state_dict(), "factors": factors, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of the same model.

        Raises:
            ValueError: factors of other layers or shapes; nothing is changed.
        """
        factors = state["factors"]
        if set(factors) != set(self.layers):
            wanted, got = ", ".join(self.layers), ", ".join(factors)
            raise ValueError(f"state must have factors of {wanted}, got {got}")
        pairs = [(f"{n}.{s}", getattr(o, s), factors[n][s]) for n, o in self.layers.items() for s in ("left", "right")]
        for name, own, given in pairs:
            _checks.shape(name, given, str(tuple(own.shape)), given.shape == own.shape)
        counts = [state[name] for name in ("steps", "refreshes", "active")]
        self.optimizer.load_state_dict(state["optimizer"])
        for _, own, given in pairs:
            own.copy_(given)
        self.steps, self.refreshes, self.active = counts


def _averaged(vectors: list[Tensor], group: Any) -> list[Tensor]:
    """The means over all processes, by one exchange: as many numbers as the layers have inputs and outputs."""
    flat = torch.cat(vectors)
    torch.distributed.all_reduce(flat, group=group)
    return list((flat / torch.distributed.get_world_size(group)).split([len(v) for v in vectors]))
