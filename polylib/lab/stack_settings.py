"""The settings of a `Stack`: learning rate, weight decay and the like of each parameter in each network."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polylib._checks import number

Groups = Sequence[Sequence[dict[str, Any]]] | Sequence[float] | Tensor | float

# Settings of torch's optimizers that would change the training and are not offered here.
_NOT_OFFERED = ("nesterov", "dampening", "maximize", "amsgrad", "decoupled_weight_decay")


class Settings(NamedTuple):
    """What one parameter of one network is trained with, under the names of torch's optimizers."""

    lr: float
    weight_decay: float
    momentum: float
    betas: tuple[float, float]
    eps: float


def settings_of(models: Sequence[nn.Module], groups: Groups, defaults: dict[str, Any]) -> dict[str, list[Settings]]:
    """The settings of each trained parameter, one for each model; what a group does not say is in `defaults`.

    Raises:
        ValueError: see `Stack`.
    """
    count = len(models)
    lists, rates = _as_lists(models, groups)
    _check_pair(defaults["betas"])
    betas = zip(*(per_network("betas", beta, count) for beta in defaults["betas"]), strict=True)
    columns = {name: per_network(name, value, count) for name, value in defaults.items() if name != "betas"}
    usual = [dict(zip(("betas", *columns), row, strict=True)) for row in zip(betas, *columns.values(), strict=True)]
    settings: dict[str, list[Settings]] = {}
    for k, model in enumerate(models):
        group_of = _groups_by_parameter(k, model, lists[k])
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) not in group_of:
                wanted = f"every parameter of models[{k}] that requires a gradient"
                raise ValueError(f"groups[{k}] must hold {wanted}, got none for {name!r}")
            own = usual[k] | ({} if rates is None else {"lr": rates[k]}) | group_of[id(parameter)]
            if "lr" not in own:
                raise ValueError(f"groups must say 'lr', got none in groups[{k}] for {name!r}")
            settings.setdefault(name, []).append(_settings(own, k))
    if not settings:
        raise ValueError("models must have a parameter that requires a gradient, got none")
    return settings


def _groups_by_parameter(k: int, model: nn.Module, groups: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The group that each parameter of models[k] is in, by its id."""
    found: dict[int, dict[str, Any]] = {}
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f"groups[{k}] must hold dicts with 'params' and 'lr', got {type(group).__name__}")
        for parameter in _listed(group["params"]):
            if id(parameter) in found:
                raise ValueError(f"groups must hold a parameter once, got one twice in groups[{k}]")
            found[id(parameter)] = group
    if not found.keys() <= {id(parameter) for parameter in model.parameters()}:
        raise ValueError(f"groups[{k}] must hold parameters of models[{k}], got a tensor that is none of them")
    return found


def _settings(own: dict[str, Any], k: int) -> Settings:
    for option in _NOT_OFFERED:
        if own.get(option):
            raise ValueError(f"groups must not set {option!r}, got {own[option]!r} in groups[{k}]")
    _check_pair(own["betas"])
    first, second = (number("betas", beta, least=0, below=1) for beta in own["betas"])
    return Settings(
        number("lr", own["lr"], least=0),
        number("weight_decay", own["weight_decay"], least=0),
        number("momentum", own["momentum"], least=0, below=1),
        (first, second),
        number("eps", own["eps"], least=0),
    )


def _as_lists(models: Sequence[nn.Module], groups: Groups) -> tuple[list, list[float] | None]:
    """The groups of each model, and the rates if `groups` is nothing but rates."""
    count = len(models)
    if isinstance(groups, (list, tuple)) and all(isinstance(own, (list, tuple)) for own in groups):
        if len(groups) != count:
            raise ValueError(f"groups must be one list for each of the {count} models, got {len(groups)}")
        return [list(own) for own in groups], None
    every = [[{"params": [p for p in model.parameters() if p.requires_grad]}] for model in models]
    return every, per_network("groups", groups, count)


def _listed(params: Any) -> list[Tensor]:
    """Parameters as torch's optimizers take them: one, several, or pairs of a name and one."""
    every = [params] if torch.is_tensor(params) else list(params)
    return [item[1] if isinstance(item, tuple) else item for item in every]


def per_network(name: str, value: Any, count: int) -> list[float]:
    """One number for each network, from one for all or from `count` of them."""
    wanted = f"{name} must be one number or one for each of the {count} models"
    try:
        many = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{wanted}, got {value!s:.60}") from None
    if len(many) not in (1, count):
        raise ValueError(f"{wanted}, got {len(many)}")
    return many * count if len(many) == 1 else many


def _check_pair(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two, got {betas!r}")
