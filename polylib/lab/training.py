"""Training loops for small networks: one at a time, written to be read, and many at once, for sweeps."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from polylib.kernels import sweep_adam_step, sweep_sgd_step
from polylib.lab.data import Split
from polylib.lab.progress_bar import progress

Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Callable[[float], float]


def constant(_: float) -> float:
    """The schedule that leaves the learning rate alone."""
    return 1.0


def one_cycle(fraction: float, warmup: float = 0.3) -> float:
    """The one-cycle schedule: from 1/25 of the peak up to it in the first `warmup` of training, then to zero.

    Both halves are half periods of a cosine (Smith and Topin, 2017; the defaults of
    `torch.optim.lr_scheduler.OneCycleLR`).

    Args:
        fraction: of the training that is over, from 0 to 1.
    """
    if fraction < warmup:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * fraction / warmup))
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def batches(samples: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """The indices of each mini-batch: every epoch is a new shuffle, and the last, incomplete batch of it is dropped."""
    if not 1 <= batch_size <= samples:
        raise ValueError(f"batch_size is {batch_size}; expected 1 to {samples}, the number of training samples")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(samples, generator=generator)[: samples - samples % batch_size].split(batch_size)


def train(
    model: nn.Module,
    data: Split,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    schedule: Schedule = constant,
    loss: Loss = F.cross_entropy,
) -> dict[str, Tensor]:
    """Train one network in place.

    Args:
        model: maps inputs `(batch, features)` to logits `(batch, classes)`.
        optimizer: any torch optimizer over the parameters of `model`; each group's learning rate is multiplied by
            `schedule(fraction of the training that is over)`.
        seed: of the order of the mini-batches.

    Returns:
        `loss`, `(steps,)`: the loss of each mini-batch; `accuracy`, scalar: on the test part, at the end.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * (len(data.x_train) // batch_size)
    losses = []
    for step, index in enumerate(progress(batches(len(data.x_train), batch_size, epochs, seed), "training", steps)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step / steps)
        value = loss(model(data.x_train[index]), data.y_train[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak
    mode = model.training
    model.eval()
    with torch.no_grad():
        accuracy = (model(data.x_test).argmax(-1) == data.y_test).float().mean()
    model.train(mode)
    return {"loss": torch.stack(losses), "accuracy": accuracy}


def train_many(
    models: Sequence[nn.Module],
    groups: Sequence[Sequence[dict[str, Any]]],
    data: Split,
    *,
    epochs: int,
    batch_size: int,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    clip: float | None = None,
    seeds: Sequence[int] | int = 0,
    schedule: Schedule = constant,
    loss: Loss = F.cross_entropy,
    watch: Callable[[dict[str, Tensor]], Tensor] | None = None,
    watch_every: int = 1,
) -> dict[str, Tensor]:
    """Train K networks of one architecture in one batched pass, in place: `train`, K times, but several times faster.

    The parameters are stacked along a new first axis and the loss is mapped over it with `torch.func.vmap`, so that one
    tensor operation serves all networks. A network that diverges does not disturb the others. Buffers, such as running
    statistics, are updated as in `train`; both test in evaluation mode.

    Args:
        models: K modules that differ in nothing but the values of their parameters.
        groups: for each model its parameter groups, as torch's optimizers take them: `params`, `lr` and, if wanted,
            `weight_decay`. Rates may differ between models and between groups.
        optimizer: `"sgd"`, with `momentum` and decay added to the gradient as in `torch.optim.SGD`, or `"adamw"`, with
            `betas`, `epsilon` and decoupled decay as in `torch.optim.AdamW`.
        clip: the largest norm of the gradient of each model, as in `torch.nn.utils.clip_grad_norm_`.
        seeds: of the order of the mini-batches, one for each model or one for all.
        watch: what to measure along training: from the stacked parameters, each `(K, ...)`, a tensor `(K, ...)`. It
            is called before the first step and after each `watch_every` steps, and must not change them.

    Returns:
        `loss`, `(K, steps)`: the loss of each mini-batch; `test_loss` and `accuracy`, `(K,)`: on the test part, at the
        end; with `watch`, `watched`, `(K, 1 + steps // watch_every, ...)`: what it measured.

    Raises:
        ValueError: no models, an unknown optimizer, groups or seeds that are not one for each model, or a trainable
            parameter that is in no group.
    """
    if not models:
        raise ValueError("models is empty; expected at least one")
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f"optimizer is {optimizer!r}; expected 'sgd' or 'adamw'")
    seeds = [seeds] * len(models) if isinstance(seeds, int) else list(seeds)
    for name, value in (("groups", groups), ("seeds", seeds)):
        if len(value) != len(models):
            raise ValueError(f"{name} has {len(value)} entries; expected one for each of the {len(models)} models")
    if watch_every < 1:
        raise ValueError(f"watch_every is {watch_every}; expected at least 1")
    rates, decays = _per_parameter(models, groups)
    skeleton = copy.deepcopy(models[0])  # not on "meta", which would part the weights that two layers share
    parameters, buffers = stack_module_state(list(models))
    parameters, blocks = _in_blocks(parameters, rates, decays)
    update = _update(optimizer, momentum, betas, epsilon)
    tied = len(list(skeleton.named_parameters(remove_duplicate=False))) > len(parameters)

    def value(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(skeleton, (parameters, buffers), (x,), tie_weights=tied), y)

    shared = 0 if len(set(seeds)) > 1 else None  # one order for all models: the inputs need no copy for each of them
    gradient = vmap(grad_and_value(value), in_dims=(0, 0, shared, shared), randomness="different")
    orders = [batches(len(data.x_train), batch_size, epochs, seed) for seed in (seeds if shared == 0 else seeds[:1])]
    steps = epochs * (len(data.x_train) // batch_size)
    losses, watched = [], [watch(parameters)] if watch else []
    for step, index in enumerate(progress(zip(*orders, strict=True), f"training {len(models)} networks", steps)):
        index = torch.stack(index) if shared == 0 else index[0]
        gradients, values = gradient(parameters, buffers, data.x_train[index], data.y_train[index])
        flat = [_side_by_side(gradients, names) for names, *_ in blocks]
        scale = None
        if clip is not None:
            norm = sum(part.square().sum(1) for part in flat).sqrt()
            scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        factor = schedule(step / steps)
        for k, (_, block, rate, decay) in enumerate(blocks):
            update(k, block, flat[k], factor * rate, decay=decay, scale=scale)
        losses.append(values)
        if watch and (step + 1) % watch_every == 0:
            watched.append(watch(parameters))
    skeleton.eval()
    with torch.no_grad():
        for k, model in enumerate(models):
            for name, value_of in (*model.named_parameters(), *model.named_buffers()):
                value_of.copy_((parameters | buffers)[name][k])
        logits = vmap(lambda p, b: functional_call(skeleton, (p, b), (data.x_test,)))(parameters, buffers)
        test_loss = torch.stack([loss(each, data.y_test) for each in logits])
        right = (logits.argmax(-1) == data.y_test).float().flatten(1)
    result = {"loss": torch.stack(losses, 1), "test_loss": test_loss, "accuracy": right.mean(1)}
    return result | ({"watched": torch.stack(watched, 1)} if watch else {})


def _in_blocks(
    parameters: dict[str, Tensor], rates: dict[str, Tensor], decays: dict[str, Tensor | None]
) -> tuple[dict[str, Tensor], list[tuple[list[str], Tensor, Tensor, Tensor | None]]]:
    """Lay the parameters that share rates and decays side by side, so that one update serves all of them.

    Returns:
        The parameters, `(K, ...)`, now views, and for each block the names in it, the block `(K, entries)`, its rates
        and its decays.
    """
    alike: dict[tuple, list[str]] = {}
    for name, value in parameters.items():
        decay = decays[name]
        key = (value.dtype, value.device, *rates[name].tolist(), *(() if decay is None else decay.tolist()))
        alike.setdefault(key, []).append(name)
    views, blocks = dict.fromkeys(parameters), []
    for names in alike.values():
        block = _side_by_side(parameters, names)
        widths = [parameters[name][0].numel() for name in names]
        for name, part in zip(names, block.split(widths, 1), strict=True):
            views[name] = part.view(parameters[name].shape)
        blocks.append((names, block, rates[names[0]], decays[names[0]]))
    return views, blocks


def _side_by_side(stacked: dict[str, Tensor], names: list[str]) -> Tensor:
    """The entries of each model in one row, `(K, entries)`; a tensor with one number for a model is a column."""
    return torch.cat([stacked[name].detach().unsqueeze(-1).flatten(1) for name in names], 1)


def _update(optimizer: str, momentum: float, betas: tuple[float, float], epsilon: float) -> Callable[..., None]:
    """What takes one step of one block of parameters, and keeps the state that the optimizer needs for it."""
    state: dict[int, list[Tensor]] = {}
    steps: dict[int, int] = {}

    def sgd(block: int, parameter: Tensor, gradient: Tensor, rate: Tensor, **beside: Tensor | None) -> None:
        if momentum and block not in state:
            state[block] = [torch.zeros_like(parameter)]
        velocity = state[block][0] if momentum else None
        sweep_sgd_step(parameter, gradient, rate, velocity=velocity, momentum=momentum, **beside)

    def adamw(block: int, parameter: Tensor, gradient: Tensor, rate: Tensor, **beside: Tensor | None) -> None:
        if block not in state:
            state[block], steps[block] = [torch.zeros_like(parameter), torch.zeros_like(parameter)], 0
        steps[block] += 1
        own = {"step": steps[block], "betas": betas, "epsilon": epsilon}
        sweep_adam_step(parameter, gradient, *state[block], rate, **own, **beside)

    return sgd if optimizer == "sgd" else adamw


def _per_parameter(
    models: Sequence[nn.Module], groups: Sequence[Sequence[dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Learning rate and weight decay of every parameter, one for each model; no decay where it is zero for all."""
    rates: dict[str, list[float]] = {name: [] for name, _ in models[0].named_parameters()}
    decays: dict[str, list[float]] = {name: [] for name in rates}
    for k, (model, own) in enumerate(zip(models, groups, strict=True)):
        group_of = {id(parameter): group for group in own for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            group = group_of.get(id(parameter))
            if group is None:
                raise ValueError(f"groups[{k}] lacks the parameter {name!r} of models[{k}]")
            rates[name].append(group["lr"])
            decays[name].append(group.get("weight_decay", 0.0))
    like = {name: parameter.detach() for name, parameter in models[0].named_parameters()}
    rate = {name: like[name].new_tensor(values) for name, values in rates.items()}
    decay = {name: like[name].new_tensor(values) if any(values) else None for name, values in decays.items()}
    return rate, decay
