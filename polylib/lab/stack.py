"""Many networks of one architecture, trained as one: parameters stacked along a first axis, losses mapped over it."""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from polylib._checks import choice, integer, number
from polylib.lab.progress_bar import progress
from polylib.lab.same_architecture import check_same_architecture
from polylib.lab.schedules import Schedule, constant
from polylib.lab.stack_settings import Groups, per_network, settings_of
from polylib.lab.stack_updates import OPTIMIZERS, Block, Optimizer
from polylib.lab.stacked_call import Shared, StackedCall, each_tensor, evaluating, shape_of

Loss = Callable[[nn.Module, Any], Any]


class Stack:
    """K networks of one architecture that train in one pass, each as it would alone with torch's optimizers.

    A loss is any function of a model and a batch: it calls the model, or parts of it, as often and in whatever way it
    likes, and may differentiate it by `torch.func`. It runs under `torch.func.vmap`, so that it sees one network and
    can't branch on values; random numbers differ from network to network. A network that diverges does not disturb the
    others. Frozen parameters stay as they are, parameters that had no part in the loss are not moved, and buffers
    follow the forward passes, all as alone. What else a forward sets on a model, such as a counter, is not given back.

    Args:
        models: K modules that differ in nothing but the values of their parameters and buffers. They keep their values
            until `write_back`. Their mode, training or not, is that of the steps.
        groups: for each model its parameter groups, as torch's optimizers take them: `params`, `lr` and, if wanted,
            `weight_decay`, `momentum`, `betas`, `eps`. Or learning rates alone, one for each model or one for all.
        optimizer: "sgd", "adam" or "adamw", by the rules of `torch.optim.SGD`, `Adam` and `AdamW`; or a function
            `(block, gradient, factor, scale)` that changes `block.value`, `(K, entries)`, in place: see
            `polylib.lab.stack_updates`.
        clip: the largest norm of the gradient of each network, as in `torch.nn.utils.clip_grad_norm_`; K or one.
        momentum, betas, epsilon, weight_decay: for groups that do not say it; each K numbers, or one for all.

    Attributes:
        parameters: all parameters by name, each `(K, ...)`, as they stand. Not to be changed.
        buffers: all buffers by name, each `(K, ...)`.

    Raises:
        ValueError: no models, models of different architecture or mode, or that share what is trained; an unknown
            optimizer; groups that are not one for each model, leave out a parameter that requires a gradient, hold it
            twice, or hold one of another model; a setting out of its range.
        TypeError: something that is not a module.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        groups: Groups,
        *,
        optimizer: str | Optimizer = "sgd",
        clip: float | Sequence[float] | Tensor | None = None,
        momentum: float | Sequence[float] | Tensor = 0.0,
        betas: Sequence[float | Sequence[float] | Tensor] = (0.9, 0.999),
        epsilon: float | Sequence[float] | Tensor = 1e-8,
        weight_decay: float | Sequence[float] | Tensor = 0.0,
    ) -> None:
        check_same_architecture(models)
        self.models = list(models)
        usual = {"weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": epsilon}
        settings = settings_of(models, groups, usual)
        self._update = optimizer if callable(optimizer) else OPTIMIZERS[choice("optimizer", optimizer, OPTIMIZERS)]
        self._clip = None
        if clip is not None:
            self._clip = torch.tensor([number("clip", own, least=0) for own in per_network("clip", clip, len(models))])
        self._call = StackedCall(models[0])
        seen = [dict(model.named_parameters()) for model in models]
        held = {name: torch.stack([own[name].detach() for own in seen]) for name in seen[0]}
        states = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([own[name].detach() for own in states]) for name in states[0]}
        self._shapes = {name: value.shape[1:] for name, value in held.items()}
        self._frozen = {name: value for name, value in held.items() if name not in settings}
        alike: dict[tuple, list[str]] = {}
        for name, own in settings.items():
            alike.setdefault((held[name].dtype, held[name].device, *own), []).append(name)
        self._blocks = []
        for names in alike.values():
            widths = [held[name][0].numel() for name in names]
            self._blocks.append(Block(names, widths, _side_by_side([held[n] for n in names]), settings[names[0]]))
        self._refresh()

    def __len__(self) -> int:
        return len(self.models)

    def step(
        self,
        loss: Loss,
        batch: Any = None,
        *,
        shared: Shared = False,
        factor: float | Tensor = 1.0,
    ) -> Any:
        """Take one step of the optimizer in every network.

        Args:
            loss: from a model and a batch, one number; or a pair of it and more tensors, which are returned beside.
            batch: tensors, in tuples, lists or dicts: `(K, ...)`, of which each network gets its own row.
            shared: all networks get the batch as it is; or for each entry of a tuple whether they do.
            factor: on the learning rates, one or K.

        Returns:
            The losses, `(K,)`, before the step; with the pair, a pair.

        Raises:
            ValueError: tensors of the batch without a row for each network, or a loss that is not one number or
                depends on no parameter.
        """
        trained = {name: self.parameters[name].detach().requires_grad_() for b in self._blocks for name in b.names}

        def scored(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
            result = loss(model, batch)
            value, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
            if not torch.is_tensor(value) or value.numel() != 1 or value.is_complex():
                raise ValueError(f"loss must be one number for each network, got {shape_of(value)}")
            return value.reshape(()), extra

        if not torch.is_tensor(factor) or factor.shape not in ((), (1,), (len(self),)):
            factor = number("factor", factor)
        with torch.enable_grad():
            (values, extra), self.buffers = self._call.map(scored, self._frozen | trained | self.buffers, batch, shared)
            if not values.requires_grad:
                raise ValueError("loss must depend on a parameter that requires a gradient, got one that does not")
            gradients = torch.autograd.grad(values.sum(), list(trained.values()), allow_unused=True)
        self._move(dict(zip(trained, gradients, strict=True)), factor)
        values = values.detach()
        return (values, each_tensor(torch.Tensor.detach, extra)) if extra != () else values

    def fit(
        self,
        loss: Loss,
        batches: Iterable[Any],
        *,
        steps: int | None = None,
        shared: Shared = False,
        schedule: Schedule = constant,
        watch: Callable[[dict[str, Tensor]], Tensor] | None = None,
        watch_every: int = 1,
    ) -> dict[str, Tensor]:
        """Take a step with each batch.

        Args:
            loss, shared: as in `step`; here the loss is one number.
            batches: what `step` takes, one a step.
            steps: how many batches there are, if `len(batches)` does not say it.
            schedule: from the fraction of the steps that are over, the factor on the learning rates.
            watch: what to measure along training: from `parameters` a tensor `(K, ...)`. It is called before the first
                step and after each `watch_every` steps, and must not change them.

        Returns:
            `loss`, `(K, steps)`; with `watch`, `watched`, `(K, 1 + steps // watch_every, ...)`.

        Raises:
            ValueError: as `step`; `steps` that is missing or less than the batches.
        """
        watch_every = integer("watch_every", watch_every, 1)
        if steps is None and not isinstance(batches, Sized):
            raise ValueError(f"steps must be given for batches without a length, got {type(batches).__name__}")
        total = len(batches) if steps is None else integer("steps", steps, 0)  # type: ignore[arg-type]
        losses, watched = [], [watch(self.parameters).clone()] if watch else []  # not a view of what will change
        for step, batch in enumerate(progress(batches, f"training {len(self)} networks", total)):
            if step == total:
                raise ValueError(f"steps must be the number of batches, got {total} and one batch more")
            value = self.step(loss, batch, shared=shared, factor=schedule(step / total))
            if not torch.is_tensor(value):
                raise ValueError("loss must be one number for each network here, got a pair, which `step` takes")
            losses.append(value)
            if watch and (step + 1) % watch_every == 0:
                watched.append(watch(self.parameters).clone())
        curve = torch.stack(losses, 1) if losses else self._blocks[0].rate.new_zeros(len(self), 0)
        return {"loss": curve} | ({"watched": torch.stack(watched, 1)} if watch else {})

    @torch.no_grad()
    def evaluate(self, function: Callable[[nn.Module, Any], Any], batch: Any = None, *, shared: Shared = False) -> Any:
        """`function(model, batch)` of every network in evaluation mode: its tensors, `(K, ...)`. Nothing is changed.

        `batch` and `shared` as in `step`.
        """
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        with evaluating(self._call):
            return self._call.map(function, self.parameters | buffers, batch, shared)[0]

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the models their parameters and buffers as they stand."""
        for k, model in enumerate(self.models):
            for name, parameter in model.named_parameters():
                if name not in self._frozen:
                    parameter.copy_(self.parameters[name][k])
            present = dict(model.named_buffers())
            for name, value in self.buffers.items():
                if name in present and present[name].shape == value.shape[1:]:
                    present[name].copy_(value[k])
                else:  # a forward has made it, or given it another shape
                    path, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(path), leaf, value[k].clone())

    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Go on with these networks alone, in this order; the others have been written back.

        Args:
            rows: their places, or a mask `(K,)`.

        Raises:
            ValueError: none of them, one twice, or one that is not there.
        """
        given = torch.as_tensor(rows, device="cpu")
        try:
            rows = torch.arange(len(self))[given].tolist()
        except IndexError:
            rows = []
        if not rows or len(set(rows)) < len(rows):
            raise ValueError(f"rows must be places of {len(self)} networks, each once, or a mask, got {given.tolist()}")
        self.write_back()
        self.models = [self.models[k] for k in rows]
        self.buffers = {name: value[rows] for name, value in self.buffers.items()}
        self._frozen = {name: value[rows] for name, value in self._frozen.items()}
        self._clip = None if self._clip is None else self._clip[rows]
        self._blocks = [block.rows(rows) for block in self._blocks]
        self._refresh()

    @torch.no_grad()
    def _move(self, gradients: dict[str, Tensor | None], factor: float | Tensor) -> None:
        """Update every parameter that has a gradient."""
        for block in list(self._blocks):
            used = [name for name in block.names if gradients[name] is not None]
            if used and len(used) < len(block.names):  # the others keep their state and their count of steps
                self._blocks.remove(block)
                self._blocks += [block.part(used), block.part([name for name in block.names if name not in used])]
                self._refresh()
        moved = [block for block in self._blocks if gradients[block.names[0]] is not None]
        flat = [_side_by_side([gradients[name] for name in block.names]) for block in moved]
        scale = None
        if self._clip is not None:
            norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in flat])
            norm = torch.linalg.vector_norm(norms, dim=0)
            scale = (self._clip.to(norm) / (norm + 1e-6)).clamp(max=1.0)
        for block, gradient in zip(moved, flat, strict=True):
            self._update(block, gradient, factor, scale)

    def _refresh(self) -> None:
        views = {name: view for block in self._blocks for name, view in block.views(self._shapes).items()}
        every = self._frozen | views
        self.parameters: dict[str, Tensor] = {name: every[name] for name in self._shapes}


def _side_by_side(tensors: Sequence[Tensor | None]) -> Tensor:
    """Stacked tensors, each `(K, ...)`, as `(K, entries)`."""
    return torch.cat([tensor.unsqueeze(-1).flatten(1) for tensor in tensors if tensor is not None], 1)
