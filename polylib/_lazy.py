"""Packages that import their names when these are first used.

A package's `__init__.pyi` lists its names, one `from .module import name as name` each; editors and type checkers
read it, and so does `lazy`. The list stands in one place, and a part whose solver is not installed costs only the
functions that need it.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def names_of(stub: Path) -> dict[str, str]:
    """The names that a stub imports, each with the module of its package that holds it."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }


def lazy(package: str, extra: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use.

    Args:
        package: the package's `__name__`.
        extra: what to install if a module that a name needs is missing, such as `"notebooks"`.

    Raises:
        AttributeError: from `__getattr__`, for a name that the package does not list.
        ImportError: from `__getattr__`, when a module outside polylib is missing; the message names the extra.
    """
    homes = names_of(Path(str(sys.modules[package].__file__)).with_suffix(".pyi"))

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "polylib":
                raise
            raise ImportError(f"{package}.{name} needs {error.name}: pip install 'polylib[{extra}]'") from error
        # `from . import module` lists a module itself.
        return module if homes[name] == name and not hasattr(module, name) else getattr(module, name)

    names = sorted(homes)
    return get, lambda: names, names
