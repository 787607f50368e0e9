"""What a run returns, taken over as arrays that nobody can change afterwards."""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from polylib.lab.surroundings import own_state

Result = dict[str, np.ndarray]
Point = dict[str, Any]
Outcome = tuple[Result, Result]  # what each value of the batched knob has, and what all of them share

ACCEPTED = "numbers, truth values, text or dates: a numpy array, a torch tensor, a list of them, or one alone"
KINDS = "biufcUSM"

# One run at a time in a process: random state is shared by its threads, and so are torch's forward derivatives.
one_run = threading.RLock()


def computed(run: Callable[..., Any], call: Point) -> Outcome:
    """Run once, in random state of its own, and take over what comes back. Settings are as before, afterwards.

    Raises:
        TypeError: `run` returned something else than a dict of arrays, or a pair of such dicts.
    """
    with one_run, own_state():
        return taken_over(run(**call))


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
    if isinstance(value, list | tuple) and not _all_kept(value, array):
        raise TypeError(f"run must return {name!r} as {ACCEPTED}, got a list of values that have no type in common")
    return frozen(array.astype(_shown(array.dtype), copy=False))


def _plain(value: Any) -> Any:
    """Tensors, and tensors in lists, as numpy arrays. What numpy has no type for, such as bfloat16, becomes float32."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.float()
        return tensor.numpy()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray) and np.any(getattr(value, "mask", False)):  # np.ma would first be imported
        raise ValueError("it has masked entries, which `filled` would give a value")
    return value


def _all_kept(value: Any, array: np.ndarray) -> bool:
    """Whether numpy found a type for a list that changes none of its values: not text for numbers, nor floats for
    large integers."""
    if array.dtype.kind in "US":
        text = str if array.dtype.kind == "U" else bytes
        return all(isinstance(item, text) or _is_array(item, array.dtype.kind) for item in _leaves(value))
    with np.errstate(invalid="ignore"):
        if array.dtype.kind not in "fc" or not (np.abs(array) >= 2**53).any():
            return True
    return all(int(float(item)) == item for item in _leaves(value) if isinstance(item, int))


def _is_array(value: Any, kind: str) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == kind


def _leaves(value: Any) -> Iterator[Any]:
    for item in value:
        if isinstance(item, list | tuple):
            yield from _leaves(item)
        else:
            yield item


def _shown(dtype: np.dtype) -> np.dtype:
    """A type that browsers have, and that holds the same values, but for `longdouble`."""
    sizes = {"f": {2: "f4", 16: "f8"}, "c": {32: "c16"}}
    return np.dtype(sizes.get(dtype.kind, {}).get(dtype.itemsize, dtype.newbyteorder("=")))
