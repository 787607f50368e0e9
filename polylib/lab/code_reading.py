"""How functions, classes and modules are read: by what they are made of, and by all that they name."""

import builtins
import dis
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property, lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polylib.lab import origin

if TYPE_CHECKING:
    from polylib.lab.reading import Reader

MISSING = object()
# What reaches code and data by names that only the run knows.
BLIND = (eval, exec, compile, globals, __import__, importlib.import_module, importlib.reload, sys._getframe)
BLIND += (inspect.currentframe, inspect.stack, sys.modules)
# Names that Python and torch give to classes, and that say nothing about what these do.
UNNAMED = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__annotate__", "__annotate_func__"}
UNNAMED |= {"__firstlineno__", "__static_attributes__", "__annotations_cache__", "__slotnames__", "_abc_impl"}
UNNAMED |= {"_backward_cls", "_autograd_function_id", "__conditional_annotations__"}


def function(reader: "Reader", value: FunctionType) -> str:
    """A function: its code, defaults, closure, attributes and annotations, and what it names."""
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        return reader.all("compiled", [compiled])
    if hasattr(value, "registry") and hasattr(value, "dispatch"):  # of functools.singledispatch
        return reader.all("dispatch", [dict(value.registry)])
    home, name = value.__globals__.get("__name__"), value.__code__.co_qualname
    own = origin.is_own(home)
    if not own and is_installed(value):
        return reader.foreign(str(value.__module__), value.__qualname__)
    first = reader.is_first_function()
    cells = [cell.cell_contents if is_full(cell) else MISSING for cell in value.__closure__ or ()]
    parts = [
        code(value.__code__) if own else reader.foreign(home, name),
        reader.all("defaults", [value.__defaults__, value.__kwdefaults__]),
        reader.named("closure", zip(value.__code__.co_freevars, cells, strict=True), first),
        reader.named("attributes", sorted(vars(value).items())),
        words(value),
        reader.named("globals", reached(value.__code__, value.__globals__), first) if own else "",
    ]
    return reader.join("function", *parts)


def words(value: FunctionType | type) -> str:
    """The name, text and annotations of a function or a class, which code may look up."""
    try:
        annotations = repr(value.__annotations__)
    except Exception:  # one that names what is not there
        annotations = ""
    text = value.__doc__ if isinstance(value.__doc__, str) else ""  # of a data class it has the defaults
    return re.sub(r" at 0x[0-9a-f]+", "", repr((value.__name__, text, annotations)))


def is_installed(value: FunctionType) -> bool:
    """Whether a function of an installed package is found there, so that its name says what it is. Torch replaces
    some of its own functions when `torch.compile` is first used."""
    module, name = value.__module__, value.__qualname__
    if origin.is_own(module):
        return False
    return any(origin.found(place, name) is value for place in (module, module.partition(".")[0]))


def is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4096)
def code(value: CodeType) -> str:
    """The bytecode and the constants of a function, and of those inside it."""
    from polylib.lab.reading import Reader

    reader = Reader()
    constants = (code(item) if isinstance(item, CodeType) else reader.digest(item) for item in value.co_consts)
    names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
    counts = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
    handlers = getattr(value, "co_exceptiontable", b"")
    return reader.join("code", value.co_code.hex(), handlers.hex(), repr(names), repr(counts), *constants)


def reached(value: CodeType, namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What code names: each global, or what it takes from a global module, and each module that it imports."""
    for kind, name, chain in _named(value):
        if kind == "import":
            yield from _imported(name, chain, namespace)
            continue
        known = namespace.get("__builtins__", builtins)
        known = known if isinstance(known, dict) else vars(known)
        found = namespace.get(name, known.get(name, MISSING))
        for attribute in chain:
            if not isinstance(found, ModuleType):
                break
            if not origin.is_own(found.__name__):
                found = _of_package(found, attribute)
            else:
                found = getattr(found, attribute, MISSING)
            name = f"{name}.{attribute}"
        yield name, found


def _of_package(module: ModuleType, name: str) -> Any:
    """What an installed module holds under a name. Its data count by the name, not by what happens to be in them."""
    found = getattr(module, name, MISSING)
    if isinstance(found, ModuleType | type) or any(found is item for item in BLIND):
        return found
    if isinstance(found, FunctionType) and origin.is_own(found.__globals__.get("__name__")):
        return found  # put there by the reader
    return found if isinstance(found, int | float | str | None) else ByName(module.__name__, name)


class ByName(NamedTuple):
    """Something in an installed module that counts by its name."""

    module: str
    name: str


def _imported(name: str, names: tuple[str, ...], namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    level = len(name) - len(name.lstrip("."))
    package = namespace.get("__package__") or namespace.get("__name__", "").rpartition(".")[0]
    try:
        full = importlib.util.resolve_name(name, package) if level else name
        spec = None if full in sys.modules else importlib.util.find_spec(full)
        if full not in sys.modules and spec is not None and spec.origin and origin.is_installed(spec.origin):
            yield name, ByName(full, "")  # installed, and not imported before the run needs it
            return
        module = importlib.import_module(full)
    except ImportError:
        yield name, MISSING
        return
    if not names:
        yield name, module
    for item in names:
        if item == "*":
            yield name, module
        elif origin.is_own(full):
            yield f"{name}.{item}", getattr(module, item, sys.modules.get(f"{full}.{item}", MISSING))
        else:
            yield f"{name}.{item}", _of_package(module, item)


@lru_cache(maxsize=4096)
def _named(value: CodeType) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Each global with the attributes that are taken from it, and each import with the names that it takes."""
    found: dict[tuple[str, str, tuple[str, ...]], None] = {}
    steps = [step for step in dis.get_instructions(value) if step.opname not in ("EXTENDED_ARG", "PUSH_NULL")]
    for place, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            chain = []
            for later in steps[place + 1 :]:
                if later.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                chain.append(str(later.argval))
            found["global", str(step.argval), tuple(chain)] = None
        elif step.opname == "IMPORT_NAME":
            level, names = steps[place - 2].argval, steps[place - 1].argval
            dots = "." * level if isinstance(level, int) else ""
            found["import", dots + str(step.argval), tuple(names or ())] = None
    for constant in value.co_consts:
        if isinstance(constant, CodeType):
            found.update(dict.fromkeys(_named(constant)))
    return tuple(found)


def class_(reader: "Reader", value: type) -> str:
    """A class: its members, and the classes that it inherits from."""
    if not origin.is_own(value.__module__) and origin.found(value.__module__, value.__qualname__) is value:
        name = reader.foreign(value.__module__, value.__qualname__)
        patches = [item for base in value.__mro__ for item in vars(base).items() if _is_patch(item[1])]
        return reader.join("patched", name, reader.named("patches", patches)) if patches else name
    members = {name: item for name, item in vars(value).items() if name not in UNNAMED}
    return reader.join(
        "class",
        words(value),
        reader.digest(type(value)),
        reader.all("bases", value.__mro__[1:]),
        reader.named("members", sorted(members.items())),
    )


def _is_patch(value: Any) -> bool:
    """Whether a function that stands in a class is the reader's. Functions that packages make up name no module."""
    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    home = value.__globals__.get("__name__") if isinstance(value, FunctionType) else None
    return home in sys.modules and origin.is_own(home)


def descriptor(reader: "Reader", value: Any) -> str | None:
    """A method of another kind than a plain function, or a property; None for other objects."""
    if isinstance(value, staticmethod | classmethod):
        return reader.all(type(value).__name__, [value.__func__])
    if isinstance(value, property):
        return reader.all("property", [type(value), value.fget, value.fset, value.fdel])
    if isinstance(value, cached_property):
        return reader.all("property", [type(value), value.func, value.attrname])
    return None


def module(reader: "Reader", value: ModuleType) -> str:
    """A module that is handed on as a whole: its name, or all that stands in it if the reader wrote it."""
    if not origin.is_own(value.__name__):
        return reader.foreign(value.__name__, "")
    return reader.named("module", sorted((k, v) for k, v in vars(value).items() if not k.startswith("__")))


def built_in(reader: "Reader", value: Any) -> str:
    """A function written in C, with what it is bound to."""
    bound = getattr(value, "__self__", None)
    if bound is None or isinstance(bound, ModuleType | type) or is_global_generator(bound):
        home = getattr(value, "__module__", None) or getattr(value, "__objclass__", type(bound)).__module__
        return reader.foreign(str(home), value.__qualname__)
    return reader.join("bound", value.__qualname__, reader.digest(bound))


def is_global_generator(value: Any) -> bool:
    """Whether it is one of the generators that start anew with each run."""
    import random

    import numpy as np

    return value is random._inst or value is np.random.mtrand._rand or value is torch.default_generator
