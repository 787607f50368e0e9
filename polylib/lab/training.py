"""Training loops for small networks: one at a time, written to be read, and many at once, for sweeps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib._checks import integer
from polylib.lab.data import Split
from polylib.lab.progress_bar import progress
from polylib.lab.schedules import Schedule, constant
from polylib.lab.stack import Stack
from polylib.lab.stack_settings import Groups
from polylib.lab.stacked_call import evaluating

Loss = Callable[[Tensor, Tensor], Tensor]


def batches(samples: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """The indices of each mini-batch: every epoch is a new shuffle, and the last, incomplete batch of it is dropped.

    Raises:
        ValueError: at the call, for `batch_size` outside 1 to `samples` or `epochs` below 0.
    """
    batch_size = integer("batch_size", batch_size, 1, samples)
    epochs = integer("epochs", epochs, 0)
    generator = torch.Generator().manual_seed(integer("seed", seed))
    whole = samples - samples % batch_size

    def draw() -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from torch.randperm(samples, generator=generator)[:whole].split(batch_size)

    return draw()


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
            `schedule(fraction of the training that is over)`. An interrupted call, too, leaves the rates and the mode
            of the model as it found them.
        epochs: passes over the training part; after none the network is tested as it stands.
        seed: of the order of the mini-batches.

    Returns:
        `loss`, `(steps,)`: the loss of each mini-batch; `test_loss`, scalar: on the test part, at the end, in
        evaluation mode; `accuracy`, scalar, likewise, where the targets are class numbers.

    Raises:
        ValueError: `epochs` or `batch_size` out of range, not as many targets as inputs, or a loss that is not one
            number.
    """
    _check_pairs(data)
    order = batches(len(data.x_train), batch_size, epochs, seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * (len(data.x_train) // batch_size)
    losses = []
    try:
        for step, index in enumerate(progress(order, "training", steps)):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step / steps)
            with torch.enable_grad():
                value = _one_number(loss(model(data.x_train[index]), data.y_train[index]))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        with torch.no_grad(), evaluating(model):
            test = scores(model(data.x_test), data.y_test, loss)
    finally:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
    return {"loss": torch.stack(losses) if losses else test["test_loss"].new_zeros(0)} | test


def scores(outputs: Tensor, targets: Tensor, loss: Loss) -> dict[str, Tensor]:
    """`test_loss`, and `accuracy` if targets are the numbers of classes: integers, one for each row of two or more."""
    result = {"test_loss": _one_number(loss(outputs, targets))}
    classes = not targets.is_floating_point() and targets.dtype is not torch.bool
    if classes and outputs.shape[:-1] == targets.shape and outputs.shape[-1] > 1:
        result["accuracy"] = (outputs.argmax(-1) == targets).float().mean()
    return result


def _one_number(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"loss must be one number, got shape {tuple(value.shape)}")
    return value.reshape(())


def _check_pairs(data: Split) -> None:
    for part, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        if len(x) != len(y):
            raise ValueError(f"data must have a target for each input, got {len(y)} for {len(x)} in the {part} part")


def train_many(
    models: Sequence[nn.Module],
    groups: Groups,
    data: Split,
    *,
    epochs: int,
    batch_size: int,
    seeds: Sequence[int] | int = 0,
    schedule: Schedule = constant,
    loss: Loss = F.cross_entropy,
    watch: Callable[[dict[str, Tensor]], Tensor] | None = None,
    watch_every: int = 1,
    **options: Any,
) -> dict[str, Tensor]:
    """Train K networks of one architecture in one batched pass, in place: `train`, K times, but several times faster.

    Args:
        models, groups: as in `Stack`.
        seeds: of the order of the mini-batches, one for each model or one for all.
        watch, watch_every: as in `Stack.fit`.
        options: `optimizer`, `clip` and its other settings, as in `Stack`.

    Returns:
        `loss`, `(K, steps)`: the loss of each mini-batch; `test_loss` and `accuracy`, `(K,)`: on the test part, at the
        end, as in `train`; with `watch`, `watched`, `(K, 1 + steps // watch_every, ...)`: what it measured.

    Raises:
        ValueError: what `Stack` refuses; `epochs`, `batch_size` or `watch_every` out of range; seeds that are not one
            for each model; not as many targets as inputs.
    """
    _check_pairs(data)
    stack = Stack(models, groups, **options)
    orders = seeds_of(seeds, len(models))
    if len(orders) != len(models):
        raise ValueError(f"seeds must be one for each of the {len(models)} models or one for all, got {len(orders)}")
    alike = len(set(orders)) == 1  # one order for all models: the inputs need no copy for each of them
    drawn = [batches(len(data.x_train), batch_size, epochs, seed) for seed in (orders[:1] if alike else orders)]
    indices = (each[0] if alike else torch.stack(each) for each in zip(*drawn, strict=True))
    try:
        result = stack.fit(
            lambda model, batch: loss(model(batch[0]), batch[1]),
            ((data.x_train[index], data.y_train[index]) for index in indices),
            steps=epochs * (len(data.x_train) // batch_size),
            shared=alike,
            schedule=schedule,
            watch=watch,
            watch_every=watch_every,
        )
        test = stack.evaluate(lambda model, x: model(x), data.x_test, shared=True)
    finally:  # an interrupted call leaves the models where they got to, as `train` does
        stack.write_back()
    each = [scores(outputs, data.y_test, loss) for outputs in test]
    return result | {name: torch.stack([one[name] for one in each]) for name in each[0]}


def seeds_of(seeds: Iterable[int] | int, count: int = 1) -> list[int]:
    """Seeds as Python's integers, from several of any integer type, or `count` times one."""
    if isinstance(seeds, Iterable) and getattr(seeds, "ndim", 1) > 0:  # a tensor without axes is one number
        return [integer("seeds", seed) for seed in seeds]
    return [integer("seeds", seeds)] * count
