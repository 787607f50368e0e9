"""Checks of arguments at the public doors of polylib, and one way to word what is wrong.

Every message names the argument, what was expected and what was given: "order must be an integer of at least 1, got
2.5". A check returns the value in the type that the code behind it works with, so that numpy's numbers and Python's
are the same from there on.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int. Integers of numpy pass; booleans, floats and text don't.

    Raises:
        ValueError: it is not an integer from `least` to `most`, both included.
    """
    try:
        whole = None if isinstance(value, bool) or type(value).__name__ == "bool" else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or (least is not None and whole < least) or (most is not None and whole > most):
        raise ValueError(f"{name} must be an integer{_between(least, most)}, got {value!r}")
    return whole


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """`value` as a float: a finite number inside the limits. `above` and `below` are excluded, the others included.

    Raises:
        ValueError: it is not such a number.
    """
    try:
        real = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        real = math.nan
    inside = (above is None or real > above) and (below is None or real < below)
    inside = inside and (least is None or real >= least) and (most is None or real <= most)
    if not math.isfinite(real) or not inside:
        words = [f"above {above:g}"] if above is not None else []
        words += [f"below {below:g}"] if below is not None else []
        if least is not None and most is not None:
            words.append(f"from {least:g} to {most:g}")
        else:
            words += [f"at least {least:g}"] if least is not None else []
            words += [f"at most {most:g}"] if most is not None else []
        raise ValueError(f"{name} must be a finite number{' ' * bool(words)}{', '.join(words)}, got {value!r}")
    return real


def choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """`value`, if it is one of `choices`.

    Raises:
        ValueError: it is none of them.
    """
    known = list(choices)
    if not any(type(value) is type(item) and value == item for item in known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def multiple(name: str, value: Any, divisor_name: str, divisor: int) -> int:
    """`value` as an int, if it is a positive multiple of `divisor`.

    Raises:
        ValueError: it is not.
    """
    whole, divisor = integer(name, value, least=1), integer(divisor_name, divisor, least=1)
    if whole % divisor:
        raise ValueError(f"{name} must be a multiple of {divisor_name} = {divisor}, got {whole}")
    return whole


def divisor(name: str, value: Any, whole_name: str, whole: int) -> int:
    """`value` as an int, if it divides `whole`.

    Raises:
        ValueError: it does not.
    """
    try:
        part = integer(name, value, least=1)
    except ValueError:
        part = 0
    if part == 0 or whole % part:
        raise ValueError(f"{name} must be a divisor of {whole_name} = {whole}, got {value!r}")
    return part


def floating(name: str, dtype: Any) -> Any:
    """A torch dtype, if it is None or a floating-point one.

    Raises:
        TypeError: it is another one, or no dtype.
    """
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}")
    return dtype


def shape(name: str, value: Any, expected: str, fits: bool) -> None:
    """Nothing, if an array fits; `expected` says in words or letters which shapes do.

    Raises:
        ValueError: it does not fit.
    """
    if not fits:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def function(name: str, value: Any) -> Any:
    """`value`, if it can be called.

    Raises:
        TypeError: it can't.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")
    return value


def _between(least: int | None, most: int | None) -> str:
    if least is None:
        return "" if most is None else f" of at most {most}"
    return f" of at least {least}" if most is None else f" from {least} to {most}"
