"""A name for what a function computes: a stored result is found again, and never found when it would be wrong."""

import platform
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from polylib.lab import closure
from polylib.lab.reading import Reader
from polylib.lab.scales import scale
from polylib.lab.surroundings import settings


class Fingerprint(NamedTuple):
    """What a function is known by.

    Attributes:
        digest: of the function, all that it reaches, settings of torch and numpy, and the machine. The same in every
            process where `unread` is None, and otherwise good within this process only.
        unread: the first thing that it reaches and that can't be read for certain, in words; None if there is none.
        code: likewise, without the machine.
        parts: the digest of each global and each closed-over value that the function itself names.
    """

    digest: str
    unread: str | None
    code: str
    parts: dict[str, str]


def fingerprint(function: Any) -> Fingerprint:
    """Read a function, and all code and data that its result depends on, as far as Python can see.

    It counts the bytecode, defaults, closure and attributes of the function and of each function that it reaches: by
    global names, by modules of the reader, imported above or inside the function, by methods, inherited ones too, by
    properties and other descriptors, by partial and cached functions, by callable objects and networks. Data counts
    by content and type. Code of polylib counts by the files that it imports, other packages by name and version.

    Not seen are files and environment variables that the function reads, and data that a user puts into the modules
    of other packages. Results that depend on those must take them as a knob.
    """
    reader = Reader()
    digest = reader.digest(function)
    modules = closure.of_modules(sorted(reader.of_polylib))
    surroundings = f"{settings()} {scale()}"
    code = reader.join("run", digest, reader.sharing(), surroundings, closure.digest(modules), *sorted(reader.versions))
    return Fingerprint(reader.join("on", code, _machine()), reader.unread, code, reader.parts)


def content(value: Any) -> str | None:
    """A digest of a value of any kind and of its type, equal in every process; None where it can't be read."""
    reader = Reader()
    digest = reader.digest(value)
    if reader.unread is not None:
        return None
    return reader.join("value", digest, reader.sharing(), closure.digest(closure.of_modules(sorted(reader.of_polylib))))


@cache
def _machine() -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{python} {torch.__version__} {np.__version__} {torch.backends.cpu.get_cpu_capability()}"
