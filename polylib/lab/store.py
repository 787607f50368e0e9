"""Where finished points are kept: one file a run, under a key made of its code and its arguments."""

import hashlib
import os
import pickle
import tempfile
import warnings
from functools import cache
from pathlib import Path

from polylib.lab.results import Outcome, frozen


def cache_folder() -> Path:
    """`$POLYLIB_CACHE`, or `polylib` in the user's cache folder. Delete it at will."""
    own = os.environ.get("POLYLIB_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "polylib"


def load(key: str, name: str) -> Outcome | None:
    """The outcome of a run, if there is a whole file of it. A damaged file counts as none."""
    try:
        data = _path(key, name).read_bytes()
        digest, content = data[:32], data[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        each, shared = pickle.loads(content)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
    ):
        return None  # RuntimeError: a user without a home
    return tuple({name: frozen(array) for name, array in part.items()} for part in (each, shared))  # type: ignore


def save(key: str, name: str, outcome: Outcome) -> None:
    """Keep the outcome of a run. Where it can't be written, one warning says so and the work goes on."""
    content = pickle.dumps(outcome, protocol=5)
    folder, part = None, None
    try:
        folder, path = cache_folder(), _path(key, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            part = Path(file.name)
            file.write(hashlib.sha256(content).digest() + content)
        part.replace(path)  # whole or not at all, also where two processes write the same
    except (OSError, RuntimeError) as error:
        _tell(str(folder or "a cache folder"), getattr(error, "strerror", None) or str(error))
    finally:
        if part is not None:
            part.unlink(missing_ok=True)  # still there if something went wrong, an interrupt too


@cache
def _tell(folder: str, why: str) -> None:
    warnings.warn(f"results can't be kept in {folder} ({why}); they are computed each time", stacklevel=3)


def _path(key: str, name: str) -> Path:
    return cache_folder() / key / name / "output.pkl"
