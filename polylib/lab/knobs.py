"""What a `Sweep` can be set to: the values of its knobs, how each is named on the page, and which one is meant."""

import copy
import enum
from collections.abc import Mapping
from datetime import date
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from polylib.lab.fingerprint import content
from polylib.lab.wording import NAMED, written

# What a plain list may hold, since it can be written beside a slider. Everything else needs {label: value}.
PLAIN = (bool, int, float, complex, str, np.generic, enum.Enum, torch.dtype, torch.device, date, PurePath)


class Knob:
    """The values that one argument of an experiment can take, in the order of its slider.

    Args:
        name: of the argument.
        given: a list of values that can be written (numbers, words, named functions, tuples of them), or
            `{label: value}` for values of any kind.
        label: what stands beside the slider.

    Raises:
        TypeError: `given` is neither, or holds a value that needs a label.
        ValueError: it is empty, or names a value twice.
    """

    def __init__(self, name: str, given: Any, label: str) -> None:
        self.name, self.label = name, label
        if isinstance(given, Mapping):
            self.names: list[str] | None = list(given)
            self.values = [_own(value) for value in given.values()]
        else:
            self.names, self.values = None, _listed(name, given)
        if not self.values:
            raise ValueError(f"knobs[{name!r}] must have at least one value, got an empty {type(given).__name__}")
        self._contents = [content(value) for value in self.values]
        self._check_different()
        self.texts = self.names or written(self.values)

    def _check_different(self) -> None:
        known: list[str | None] = [item for item in self._contents if item is not None]
        repeated = [value for value, item in zip(self.values, self._contents, strict=True) if known.count(item) > 1]
        if repeated:
            raise ValueError(f"knobs[{self.name!r}] must have different values, got {repeated[0]!r} twice")
        for place, name in enumerate(self.names or []):
            if not isinstance(name, str):
                raise TypeError(f"knobs[{self.name!r}] must have text as its labels, got {name!r}")
            if any(isinstance(v, str) and v == name for k, v in enumerate(self.values) if k != place):
                raise ValueError(f"knobs[{self.name!r}] must have labels that name no other value, got {name!r}")

    def index(self, value: Any, argument: str) -> int:
        """The place of a value, which may be named by its label. 1, 1.0 and True differ where several are listed.

        Raises:
            ValueError: it is none of the values; the message calls it `argument`.
        """
        if self.names and isinstance(value, str) and value in self.names:
            return self.names.index(value)
        for place, own in enumerate(self.values):
            if own is value:
                return place
        wanted = content(value)
        if wanted is not None and wanted in self._contents:
            return self._contents.index(wanted)
        value = value.item() if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0 else value
        equal = [k for k, own in enumerate(self.values) if _equal_numbers(own, value)]
        if len(equal) == 1:
            return equal[0]
        raise ValueError(f"{argument} must be one of {self.names or self.values}, got {value!r}")

    def content(self, place: int) -> str | None:
        """The digest of a value; None where it can't be read."""
        return self._contents[place]

    def same(self, one: Any, other: Any) -> bool:
        """Whether two values are the same one of this knob."""
        try:
            return self.index(one, self.name) == self.index(other, self.name)
        except ValueError:
            return False

    def value(self, place: int) -> Any:
        """A value, as a copy where it could be changed and would still be known."""
        return self.values[place] if self._contents[place] is None else _own(self.values[place])


def read(knobs: Any, labels: Mapping[str, str] | None) -> dict[str, Knob]:
    """The knobs by name, from what `Sweep` was given.

    Raises:
        TypeError, ValueError: as `Knob`, and for labels of unknown knobs.
    """
    if not isinstance(knobs, Mapping) or not knobs:
        raise ValueError(f"knobs must be a dict with at least one knob, got {knobs!r}")
    for name in knobs:
        if not isinstance(name, str):
            raise TypeError(f"knobs must have the names of arguments as its keys, got {name!r}")
    if labels is not None and not isinstance(labels, Mapping):
        raise TypeError(f"labels must be a dict of texts, got {labels!r}")
    for name, label in (labels or {}).items():
        if name not in knobs:
            raise ValueError(f"labels must name knobs, {', '.join(map(str, knobs))}, got {name!r}")
        if not isinstance(label, str):
            raise TypeError(f"labels[{name!r}] must be text, got {label!r}")
    return {name: Knob(name, given, (labels or {}).get(name, name.replace("_", " "))) for name, given in knobs.items()}


def _listed(name: str, given: Any) -> list[Any]:
    if isinstance(given, torch.Tensor):
        given = given.tolist()
    if isinstance(given, str | bytes | set | frozenset) or not hasattr(given, "__iter__"):
        raise TypeError(f"knobs[{name!r}] must be a list of values or a dict {{label: value}}, got {given!r}")
    values = list(given)
    for value in values:
        if not _is_plain(value):
            kind = "a function without a name" if callable(value) else type(value).__name__
            raise TypeError(f"knobs[{name!r}] must be a dict {{label: value}} for values like {kind}, got {given!r}")
    return values


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, NAMED):
        return value.__name__ != "<lambda>"
    return value is None or isinstance(value, PLAIN)


def _own(value: Any) -> Any:
    """A copy of a value that could be changed; the value itself where none can be made."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _equal_numbers(own: Any, value: Any) -> bool:
    numbers = int | float | np.integer | np.floating
    if not isinstance(own, numbers) or not isinstance(value, numbers):
        return False
    return isinstance(own, bool) == isinstance(value, bool) and bool(own == value)
