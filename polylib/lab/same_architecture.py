"""Whether modules differ in nothing but the values of their parameters and buffers, as one forward for all supposes."""

from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from polylib.lab.data_reading import hooks
from polylib.lab.reading import Reader

_OF_EVERY_MODULE = set(vars(nn.Module()))
_MISSING = ("", "missing")


def check_same_architecture(models: Sequence[nn.Module]) -> None:
    """Raise for the first way in which a model is not like the first one.

    Compared are the submodules, their classes, modes and hooks, and by its content all that a reader can set on them
    (numbers, functions, objects of any class, tensors that are no buffers); shapes, dtypes and devices of parameters
    and buffers; which parameters are frozen; and which of them are one and the same tensor.

    Raises:
        ValueError: with the name of what differs; for a module that has not seen its first input and still lacks its
            shapes; for two models with a trained parameter or a buffer in common; for complex parameters, hooks on
            parameters, and functions through which a model reaches itself: these would act on the wrong tensors.
        TypeError: something that is not a sequence of modules.
    """
    if not isinstance(models, Sequence | nn.ModuleList):
        raise TypeError(f"models must be a list of torch modules, got {type(models).__name__}")
    if not models:
        raise ValueError("models must be at least one network, got an empty list")
    for k, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be torch modules, got {type(model).__name__} as models[{k}]")
        for name, tensor in model.named_parameters():
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"models must have seen their first input, got models[{k}] with {name!r} still lazy")
            if tensor.requires_grad and tensor.is_complex():
                raise ValueError(f"models must have real parameters, got {name!r} of {tensor.dtype} in models[{k}]")
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                raise ValueError(f"models must have no hooks on parameters, got one on {name!r} of models[{k}]")
    _check_apart(models)
    reader = _Reader(models)
    first = _description(models[0], reader)
    for k, model in enumerate(models[1:], start=1):
        other = _description(model, reader)
        for what in (*first, *(extra for extra in other if extra not in first)):
            (mine, shown), (its, shown_its) = first.get(what, _MISSING), other.get(what, _MISSING)
            if mine != its:
                words = shown, shown_its if shown_its != shown else f"something else that is written {shown_its}"
                raise ValueError(
                    "models must differ in nothing but the values of their parameters and buffers, got "
                    f"{what} = {words[0]} in models[0] and {words[1]} in models[{k}]"
                )


class _Reader(Reader):
    """Reads what modules hold. A part of a model counts by its name in it."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self._parts: dict[int, str] = {}
        self._in_functions = 0
        for model in models:
            for name, part in (*model.named_modules(), *_tensors(model)):
                self._parts.setdefault(id(part), name or "the model")

    def digest(self, value: Any, name: str | None = None) -> str:
        part = self._parts.get(id(value))
        if part is None:
            return super().digest(value, name)
        if self._in_functions:
            raise ValueError(
                "models must not hold functions that reach a model by a name, since in a stack all networks would use "
                f"the tensors of that one, got a function that reaches {part!r}"
            )
        return self.join("part", part)

    def _read(self, value: Any) -> str:
        self._in_functions += isinstance(value, FunctionType)
        try:
            return super()._read(value)
        finally:
            self._in_functions -= isinstance(value, FunctionType)


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


def _description(model: nn.Module, reader: _Reader) -> dict[str, tuple[str, str]]:
    """What is compared, by a name that an error can show: a digest, and a short text."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        found[f"type({path or 'model'})"] = type_before_parametrizations(module)
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        of_calls = {name: items for name, items in hooks(vars(module)).items() if "ward" in name and items}
        for name, value in ({"training": module.training} | own | of_calls).items():
            found[f"{dot}{name}"] = value
    places: dict[int, str] = {}
    for name, tensor in _tensors(model):
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        frozen = "" if kind == "buffer" or tensor.requires_grad else "frozen "
        shape = "x".join(map(str, tensor.shape)) or "one number"
        shared = f", the same as {places[id(tensor)]}" if id(tensor) in places else ""
        found[f"tensor {name}"] = f"{frozen}{kind}, {shape}, {tensor.dtype}, on {tensor.device}{shared}"
        places.setdefault(id(tensor), name)
    return {what: (reader.digest(value), _short(value)) for what, value in found.items()}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else value.__qualname__ if isinstance(value, type) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
