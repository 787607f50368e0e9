"""Reads any Python object, code included, into a digest of its content.

The digest of an object is made of the digests of its parts, so that equal content has the same digest wherever it
lies in memory; which parts are one and the same object counts, too. An object whose content can't be read for certain
is noted by its name (`Reader.unread`) and counts by its identity, which no other process repeats.
"""

import hashlib
import types
import weakref
from collections.abc import Iterable
from functools import _lru_cache_wrapper, partial
from typing import Any

from polylib.lab import code_reading, data_reading, origin

ATOMS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented))
BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
)

_code_before: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()  # of functions that cache results


class Reader:
    """One reading. `parts` are the digests of what the function that was read first names itself."""

    def __init__(self) -> None:
        self.unread: str | None = None
        self.parts: dict[str, str] = {}
        self.of_polylib: set[str] = set()
        self.versions: set[str] = set()
        self._done: dict[int, str] = {}
        self._inside: list[int] = []  # what is being read, from the first to the present object
        self._names: list[str] = []
        self._kept: list[Any] = []  # so that no id is used twice
        self._functions = 0
        self._numbers: dict[Any, int] = {}  # of what can be changed, by where it lies in memory
        self._met: list[int] = []
        self.unordered = 0  # how many sets are being read

    def join(self, kind: str, *parts: str) -> str:
        """The digest of some texts, told apart by their lengths."""
        whole = "".join([f"{len(part)}:{part}" for part in (kind, *parts)])
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def bytes(self, kind: str, content: Any) -> str:
        """The digest of what lies in a buffer."""
        return self.join(kind, hashlib.sha256(content).hexdigest())

    def digest(self, value: Any, name: str | None = None) -> str:
        """The digest of an object; `name` is what the code calls it."""
        if type(value) in ATOMS:
            return self.join(type(value).__name__, value.hex() if type(value) is float else repr(value))
        if not self.unordered and (place := data_reading.place(value)) is not None:
            self._met.append(self._numbers.setdefault(place, len(self._numbers)))
        known = self._done.get(id(value))
        if known is not None:
            return known
        if id(value) in self._inside:
            return f"level {len(self._inside) - self._inside.index(id(value))}"
        self._inside.append(id(value))
        self._names += [name] if name else []
        self._kept.append(value)
        try:
            found = self._read(value)
        except RecursionError:
            found = self.unknown(value, "is nested too deeply to be read")
        finally:
            self._inside.pop()
            if name:
                self._names.pop()
        self._done[id(value)] = found
        return found

    def all(self, kind: str, values: Iterable[Any]) -> str:
        """The digest of some objects in their order."""
        return self.join(kind, *[self.digest(value) for value in values])

    def named(self, kind: str, members: Iterable[tuple[str, Any]], are_parts: bool = False) -> str:
        """The digest of objects by their names."""
        found = []
        for name, value in members:
            found += [name, self.digest(value, name)]
            if are_parts:
                self.parts[name] = found[-1]
        return self.join(kind, *found)

    def sharing(self) -> str:
        """Which of the objects that were met are the same one: two equal lists, or one list under two names."""
        return self.join("sharing", *map(str, self._met)) if len(self._numbers) < len(self._met) else ""

    def foreign(self, module: str, name: str) -> str:
        """The digest of something in an installed package or in polylib, which counts by its name."""
        if module.partition(".")[0] == "polylib":
            self.of_polylib.add(module)
        else:
            self.versions.add(origin.package(module))
        return self.join("foreign", module, name)

    def unknown(self, value: Any, why: str = "can't be read") -> str:
        """Note that an object could not be read, and the digest of its identity."""
        if self.unread is None:
            kind = type(value).__name__
            kind = f"{'an' if kind[:1] in 'aeiouAEIOU' else 'a'} {kind}"
            self.unread = f"{self._names[-1]}, {kind}, which {why}" if self._names else f"{kind}, which {why}"
        return self.join("unknown", str(id(value)))

    def is_first_function(self) -> bool:
        """Whether no other function was read before."""
        self._functions += 1
        return self._functions == 1

    def _read(self, value: Any) -> str:
        if value is code_reading.MISSING:
            return self.join("missing")
        if isinstance(value, code_reading.ByName):
            return self.foreign(*value)
        if any(value is item for item in code_reading.BLIND):
            return self.unknown(value, "reaches code or data that can't be seen before it runs")
        if isinstance(value, types.FunctionType):
            return code_reading.function(self, value)
        if isinstance(value, BUILT_IN):
            return code_reading.built_in(self, value)
        if isinstance(value, types.MethodType):
            return self.all("method", (value.__func__, value.__self__))
        if isinstance(value, types.CodeType):
            return code_reading.code(value)
        if isinstance(value, types.ModuleType):
            return code_reading.module(self, value)
        if isinstance(value, type):
            return code_reading.class_(self, value)
        if isinstance(value, partial):
            return self.all("partial", (type(value), value.func, value.args, value.keywords, vars(value)))
        if isinstance(value, _lru_cache_wrapper):
            return self._cached(value)
        if isinstance(value, types.CellType):
            return self.all("cell", [value.cell_contents] if code_reading.is_full(value) else [])
        found = code_reading.descriptor(self, value) or data_reading.data(self, value)
        return found or data_reading.instance(self, value)

    def _cached(self, value: Any) -> str:
        """A function that keeps its results. What it keeps is from older code if the code has changed since."""
        found = self.all("cached", (value.__wrapped__, value.cache_parameters()))
        if value.cache_info().currsize == 0:
            _code_before[value] = found
        if _code_before.setdefault(value, found) != found:
            return self.unknown(value, f"keeps results of older code (call {value.__name__}.cache_clear())")
        return found
