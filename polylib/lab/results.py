"""What a run returns, taken over as arrays that nobody can change afterwards."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Result = dict[str, np.ndarray]
Point = dict[str, Any]
Outcome = tuple[Result, Result]  # what each value of the batched knob has, and what all of them share

ACCEPTED = "numbers, truth values, text or dates: a numpy array, a torch tensor, a list of them, or one alone"
KINDS = "biufcUSM"

# One run at a time in a process: random state is shared by its threads, and so are torch's forward derivatives.
one_run = threading.RLock()


def computed(run: Callable[..., Any], call: Point) -> Outcome:
    """Run once, in random state of its own, and take over what comes back.

    Raises:
        TypeError: `run` returned something else than a dict of arrays, or a pair of such dicts.
    """
    with one_run, own_random_state():
        return taken_over(run(**call))


@contextmanager
def own_random_state(seed: int = 0) -> Iterator[None]:
    """Within this context Python, numpy and torch draw from generators that start at `seed`; afterwards they go on
    from where they were before."""
    python, tensors = random.getstate(), torch.get_rng_state()
    numbers = np.random.get_state()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(tensors)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def taken_over(returned: Any) -> Outcome:
    """The two dicts of a run, as read-only copies. A run that shares nothing returns one dict."""
    pair = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not all(isinstance(part, Mapping) for part in pair) or not any(pair):
        given = f"a {type(returned).__name__}" if not isinstance(returned, Mapping) else "an empty one"
        raise TypeError(f"run must return a dict of arrays, with at least one entry, or a pair of dicts, got {given}")
    each, shared = ({_key(name): _array(name, value) for name, value in part.items()} for part in pair)
    if both := sorted(each.keys() & shared.keys()):
        raise ValueError(f"run must return each name once, got {both[0]!r} in both dicts")
    return each, shared


def check_lengths(outcome: Outcome, knob: str | None, count: int) -> None:
    """Raise ValueError unless each array has one entry for each of the `count` values of the batched knob."""
    each, shared = outcome
    if knob is None:
        if shared:
            raise ValueError("run must return one dict where no knob is batched, got a pair")
        return
    for name, array in each.items():
        if array.ndim == 0 or len(array) != count:
            raise ValueError(
                f"run must return {name!r} with a first axis of {count}, one entry for each value of {knob!r}, or in"
                f" the second dict of a pair, for what all values share; got shape {array.shape}"
            )


def at(outcome: Outcome, index: int | None) -> Result:
    """The result at one value of the batched knob, by its place; None where no knob is batched."""
    each, shared = outcome
    if index is None:
        return dict(each)
    return {name: frozen(array[index]) for name, array in each.items()} | shared


def frozen(value: Any) -> np.ndarray:
    """An array that can't be written to."""
    array = np.asarray(value)
    array.flags.writeable = False
    return array


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"run must return a dict with text as its keys, got the key {name!r}")
    return name


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.array(_plain(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"run must return {name!r} as {ACCEPTED}, got a {type(value).__name__} ({error})") from error
    if array.dtype.kind not in KINDS:
        raise TypeError(f"run must return {name!r} as {ACCEPTED}, got a {type(value).__name__}")
    return frozen(array)


def _plain(value: Any) -> Any:
    """Tensors, and tensors in lists, as numpy arrays. What numpy has no type for, such as bfloat16, becomes float32."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.float()
        return tensor.numpy()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
