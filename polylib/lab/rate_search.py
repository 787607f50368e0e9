"""Every learning rate with every seed in one pass, and the best rate chosen on data that is not the test set."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib.lab.data import Split
from polylib.lab.stacked_call import evaluating
from polylib.lab.training import scores, seeds_of, train_many


class Found(NamedTuple):
    """What `search` found.

    `table`, (rates, seeds): the validation accuracy, or the validation loss where the targets are not classes, of each
    network at its end. `best`: the chosen rate. `at_edge`: whether it is the first or the last of several, so that a
    better one may lie beyond. `result`: of the networks at that rate, one for each seed, what `train_many` returns:
    the loss of each step, `test_loss` and `accuracy` on the test part, all (seeds, ...). `models`: these networks.
    """

    table: Tensor
    best: Any
    at_edge: bool
    result: dict[str, Tensor]
    models: list[nn.Module]


def search(
    make: Callable[[int], nn.Module],
    learning_rates: Sequence[Any],
    seeds: Sequence[int] | int,
    data: Split,
    *,
    validation: float | tuple[Tensor, Tensor] | Split = 0.2,
    validation_seeds: Sequence[int] | None = None,
    groups: Callable[[nn.Module, Any], list[dict[str, Any]]] | None = None,
    weight_decay: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    **settings: Any,
) -> Found:
    """Train one network for every rate and every seed, and test the seeds at the rate that is best on average.

    The test part of `data` plays no part in the choice.

    Args:
        make: from a seed a new network. torch's generator is seeded with it before the call.
        learning_rates: what is tried. With `groups` each may be more than a number, such as a pair of rate and
            momentum.
        seeds: of the networks and of the order of their batches.
        data: the training part teaches, the test part tests.
        validation: what the choice is made on. A fraction: so much of the training part, drawn once, is held out from
            all networks. Two tensors: these inputs and targets. A `Split`: another draw of the data, with a training
            part of its own; the networks at the chosen rate are then trained afresh, on `data`.
        validation_seeds: for a `Split`, the seeds that it is tried with; by default `seeds`.
        groups: from a network and a rate its parameter groups; by default all parameters at that rate.
        weight_decay: where a group does not say it.
        settings: `epochs`, `batch_size` and what else `train_many` takes.

    Raises:
        ValueError: no rates, no seeds, a fraction that leaves one of the parts empty, `validation_seeds` without a
            `Split`, or no rate at which all networks end with a finite loss where the loss decides.
    """
    rates = list(learning_rates)
    seeds = seeds_of(seeds)
    if not rates or not seeds:
        name = "learning_rates" if not rates else "seeds"
        raise ValueError(f"{name} must be at least one, got an empty list")
    if validation_seeds is not None and not isinstance(validation, Split):
        raise ValueError("validation_seeds must come with another draw of the data as validation, got none")

    def attempt(rates: Sequence[Any], seeds: Sequence[int], data: Split) -> tuple[list[nn.Module], dict[str, Tensor]]:
        models, own = [], []
        for rate in rates:
            for seed in seeds:
                torch.manual_seed(seed)
                models.append(make(seed))
                own.append(groups(models[-1], rate) if groups else [{"params": models[-1].parameters(), "lr": rate}])
        orders = list(seeds) * len(rates)
        result = train_many(models, own, data, seeds=orders, loss=loss, weight_decay=weight_decay, **settings)
        return models, result

    tuning = validation if isinstance(validation, Split) else _with_validation(data, validation)
    trial = seeds if validation_seeds is None else seeds_of(validation_seeds)
    models, result = attempt(rates, trial, tuning)
    by_loss = "accuracy" not in result
    table = result["test_loss" if by_loss else "accuracy"].view(len(rates), len(trial))
    best = _choose(table, by_loss)
    if isinstance(validation, Split):
        models, result = attempt([rates[best]], seeds, data)
    else:
        chosen = slice(best * len(seeds), (best + 1) * len(seeds))
        models, result = models[chosen], {name: value[chosen] for name, value in result.items()}
        with torch.no_grad(), evaluating(*models):
            each = [scores(model(data.x_test), data.y_test, loss) for model in models]
        result |= {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return Found(table, rates[best], len(rates) > 1 and best in (0, len(rates) - 1), result, models)


def _with_validation(data: Split, validation: float | tuple[Tensor, Tensor]) -> Split:
    """The data with what validates in the place of the test part."""
    if isinstance(validation, tuple):
        return Split(data.x_train, data.y_train, *validation)
    count = round(len(data.x_train) * float(validation))
    if not 0 < count < len(data.x_train):
        raise ValueError(
            f"validation must be a fraction that leaves some of the {len(data.x_train)} training samples on both "
            f"sides, or data, got {validation}"
        )
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    held, taught = order[:count], order[count:]
    return Split(data.x_train[taught], data.y_train[taught], data.x_train[held], data.y_train[held])


def _choose(table: Tensor, by_loss: bool) -> int:
    if not by_loss:
        return int(table.mean(1).argmax())
    means = table.mean(1).nan_to_num(torch.inf, torch.inf)
    if not means.isfinite().any():
        raise ValueError("learning_rates must hold one at which the validation loss is finite, got none")
    return int(means.argmin())
