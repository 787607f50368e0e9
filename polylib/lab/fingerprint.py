"""A name for what a function computes: a stored result is found again, and never found when it would be wrong."""

import hashlib
import inspect
import sys
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import joblib
import numpy as np
import torch

import polylib


def fingerprint(function: Any) -> str:
    """A digest of a function and of all that its result depends on, equal in every process.

    It covers the bytecode, defaults and closure of the function, the values of the globals that it names, the same of
    every function that it calls from the notebook, the source of polylib, and the versions of torch and numpy.
    Functions of other libraries count by their names.
    """
    digest = hashlib.sha256(f"{_library()} {torch.__version__} {np.__version__}".encode())
    _feed(digest, function, set())
    return digest.hexdigest()[:32]


def content(value: Any) -> str | None:
    """A digest of a value of any kind and of its type, equal in every process; None where it can't be read."""
    digest = hashlib.sha256()
    try:
        _feed(digest, value, set())
    except TypeError:
        return None
    return digest.hexdigest()[:32]


@cache
def _library() -> str:
    """A digest of polylib's own source."""
    root = Path(polylib.__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(b"\0".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()


def _feed(digest: Any, value: Any, seen: set[int]) -> None:
    """Add `value` to the digest. Objects that were seen before are skipped, which ends recursion."""
    digest.update(type(value).__qualname__.encode())
    if isinstance(value, FunctionType | type | CodeType | ModuleType | partial) or inspect.ismethod(value):
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, CodeType):
        digest.update(value.co_code)
        digest.update(" ".join(value.co_names + value.co_varnames).encode())
        for constant in value.co_consts:
            _feed(digest, constant, seen)
    elif isinstance(value, partial):
        _feed(digest, [value.func, value.args, value.keywords], seen)
    elif inspect.ismethod(value):
        _feed(digest, [value.__func__, value.__self__], seen)
    elif isinstance(value, FunctionType) and _is_local(value):
        _feed(digest, [value.__code__, value.__defaults__, value.__kwdefaults__], seen)
        _feed(digest, [cell.cell_contents for cell in value.__closure__ or ()], seen)
        for name in _names(value.__code__):
            if name in value.__globals__:
                _feed(digest, value.__globals__[name], seen)
    elif isinstance(value, type) and _is_local(value):
        for name, member in sorted(vars(value).items()):
            if isinstance(member, staticmethod | classmethod):
                member = member.__func__
            if isinstance(member, FunctionType) or not name.startswith("__"):
                _feed(digest, member, seen)
    elif isinstance(value, ModuleType):
        digest.update(value.__name__.encode())
    elif isinstance(value, FunctionType | type) or inspect.isbuiltin(value):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif isinstance(value, torch.Tensor):
        _feed(digest, value.detach().cpu().numpy(), seen)
    elif isinstance(value, dict):
        _feed(digest, list(value.items()), seen)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item, seen)
    elif isinstance(value, set | frozenset):
        digest.update(" ".join(sorted(map(repr, value))).encode())
    else:
        try:
            digest.update(joblib.hash(value).encode())
        except Exception as error:
            kind = type(value).__qualname__
            raise TypeError(f"run depends on a {kind}, which has no stable content; expected data ({error})") from error


def _is_local(value: Any) -> bool:
    """Whether the reader wrote this: it comes from the notebook or from a file outside the installed packages."""
    if value.__module__ == "__main__":
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    if file is None:
        return True
    return "site-packages" not in file and not file.startswith((str(Path(polylib.__file__).parent), sys.base_prefix))


def _names(code: CodeType) -> list[str]:
    """The names that this code, or code nested in it, looks up as globals or attributes."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(_names(constant))
    return sorted(names)
