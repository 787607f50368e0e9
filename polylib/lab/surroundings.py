"""What changes the numbers of any function besides its code and data: random state, and settings of torch and numpy.

Some settings belong to one thread, others to one process, and none travels with a function that another one runs.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


# By name, what reads a setting and what sets it.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "device": (
        lambda: str(torch.get_default_device()),
        lambda name: torch.set_default_device(None if name == "cpu" else name),
    ),
    "precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (
        _deterministic,
        lambda modes: torch.use_deterministic_algorithms(modes[0], warn_only=modes[1]),
    ),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "errors": (lambda: tuple(sorted(np.geterr().items())), lambda items: np.seterr(**dict(items))),
}
for _device in ("cpu", "cuda"):
    SETTINGS[f"autocast on {_device}"] = (
        lambda device=_device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        lambda found, device=_device: (
            torch.set_autocast_enabled(device, found[0]),
            torch.set_autocast_dtype(device, found[1]),
        ),
    )


def settings() -> dict[str, Any]:
    """The settings of this thread, by name."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


@contextmanager
def held(values: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Within this context `values` are the settings; afterwards all are as they were before, whatever was changed."""
    before = settings()
    _set(values or {})
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        read, write = SETTINGS[name]
        if read() != value:  # some of them cost time, once they were set
            write(value)


@contextmanager
def own_state(seed: int = 0) -> Iterator[None]:
    """Within this context Python, numpy and torch draw from generators that start at `seed`; afterwards they go on
    from where they were before, and settings are as they were."""
    python, tensors = random.getstate(), torch.get_rng_state()
    numbers = np.random.get_state()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # where torch would remember each call for a GPU that it has not started
        torch.default_generator.manual_seed(seed)
    try:
        with held():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(tensors)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
