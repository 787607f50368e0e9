"""Who wrote a piece of code: the reader, or a package that counts by its name and version."""

import os
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import polylib

_LIBRARY = Path(polylib.__file__).resolve().parent


@cache
def _roots() -> tuple[Path, ...]:
    """Where the standard library and installed packages lie."""
    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    known += [*site.getsitepackages(), site.getusersitepackages(), os.path.dirname(os.__file__)]
    return tuple(Path(path).resolve() for path in known if path)


@cache
def is_installed(file: str) -> bool:
    """Whether a file belongs to the standard library, to an installed package or to polylib."""
    path = Path(file).resolve()
    return any(path.is_relative_to(root) for root in (*_roots(), _LIBRARY)) or bool(
        {"site-packages", "dist-packages"}.intersection(path.parts)
    )


def is_own(module: Any) -> bool:
    """Whether the reader wrote a module, given by its name. A module that can't be found counts as the reader's."""
    if not isinstance(module, str) or module == "__main__":
        return True
    loaded = sys.modules.get(module)
    if loaded is None:
        return module not in sys.builtin_module_names
    file = getattr(loaded, "__file__", None)
    if file is None:
        spec = getattr(loaded, "__spec__", None)
        above = module.rpartition(".")[0]
        built_in = module in sys.builtin_module_names or getattr(spec, "origin", None) in ("built-in", "frozen")
        return not built_in and (not above or is_own(above))
    return not is_installed(file)


def found(module: Any, qualname: str) -> Any:
    """What stands in a module under a dotted name; None if there is nothing."""
    value = sys.modules.get(module) if isinstance(module, str) else None
    for name in qualname.split("."):
        value = getattr(value, name, None)
    return value


def package(module: str) -> str:
    """The package of a module, with its version where it says one."""
    top = module.partition(".")[0]
    version = getattr(sys.modules.get(top), "__version__", "")
    return f"{top} {version}" if isinstance(version, str) else top
