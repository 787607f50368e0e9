"""Whether modules differ in nothing but the values of their parameters and buffers, as one forward for all supposes."""

from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = set(vars(nn.Module()))


def check_same_architecture(models: Sequence[nn.Module]) -> None:
    """Raise for the first way in which a model is not like the first one.

    Compared are the submodules, their modes and what a reader can set on them (numbers, names, functions, tensors that
    are no buffers); shapes, dtypes and devices of parameters and buffers; which parameters are frozen; and which of
    them are one and the same tensor.

    Raises:
        ValueError: with the name of what differs; for a module that has not seen its first input and still lacks its
            shapes; for two models with a trained parameter or a buffer in common.
        TypeError: something that is not a module.
    """
    if not models:
        raise ValueError("models must be at least one network, got an empty list")
    for k, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be torch modules, got {type(model).__name__} as models[{k}]")
        for name, tensor in model.named_parameters():
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"models must have seen their first input, got models[{k}] with {name!r} still lazy")
    _check_apart(models)
    first = _description(models[0])
    for k, model in enumerate(models[1:], start=1):
        other = _description(model)
        for what in (*first, *(extra for extra in other if extra not in first)):
            mine, its = first.get(what, "missing"), other.get(what, "missing")
            if _differ(mine, its):
                raise ValueError(
                    "models must differ in nothing but the values of their parameters and buffers, got "
                    f"{what} = {_short(mine)} in models[0] and {_short(its)} in models[{k}]"
                )


def _check_apart(models: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for k, model in enumerate(models):
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        for name, tensor in (*trained, *model.named_buffers()):
            if owner.setdefault(id(tensor), k) != k:
                raise ValueError(
                    "models must have parameters and buffers of their own, got one tensor as "
                    f"{name!r} of models[{owner[id(tensor)]}] and of models[{k}]"
                )


def _description(model: nn.Module) -> dict[str, Any]:
    """What is compared, by a name that an error can show."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        found[f"type({path or 'model'})"] = type(module).__qualname__
        found[f"{dot}training"] = module.training
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                found[f"{dot}{name}"] = value
    places: dict[int, str] = {}
    for name, tensor in _tensors(model):
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        frozen = "" if kind == "buffer" or tensor.requires_grad else "frozen "
        shape = "x".join(map(str, tensor.shape)) or "one number"
        shared = f", the same as {places[id(tensor)]}" if id(tensor) in places else ""
        found[f"tensor {name}"] = f"{frozen}{kind}, {shape}, {tensor.dtype}, on {tensor.device}{shared}"
        places.setdefault(id(tensor), name)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _differ(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two values are certainly different; what can't be compared counts as equal."""
    if a is b or depth == 0:
        return False
    if type(a) is not type(b):
        return True
    if isinstance(a, nn.Parameter):
        return False
    if isinstance(a, Tensor):
        return a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b)
    if isinstance(a, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return a != b and not (a != a and b != b)
    if isinstance(a, (tuple, list)):
        return len(a) != len(b) or any(_differ(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(_differ(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, FunctionType):
        return a.__code__ != b.__code__ or _differ(_bound(a), _bound(b), depth - 1)
    if isinstance(a, partial):
        return _differ((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), depth - 1)
    return False


def _bound(function: FunctionType) -> tuple:
    """The values that a function carries besides its code."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return tuple(cells), function.__defaults__, function.__kwdefaults__


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
