"""One switch for the size of every experiment: `POLYLIB_SCALE=ci|laptop|gpu`."""

import os
from typing import TypeVar

from polylib import _checks

Value = TypeVar("Value")
SCALES = ("ci", "laptop", "gpu")


def scale() -> str:
    """The scale in force: the value of the environment variable `POLYLIB_SCALE`, or `"ci"` where it is not set.

    `ci` makes every chapter finish in about half a minute on two cores, `laptop` in some minutes, and `gpu` uses sizes
    that fill a GPU.

    Raises:
        ValueError: the variable holds another word.
    """
    name = os.environ.get("POLYLIB_SCALE", "ci")
    _checks.choice("POLYLIB_SCALE", name, SCALES)
    return name


def at_scale(ci: Value, laptop: Value | None = None, gpu: Value | None = None) -> Value:
    """The value for the scale in force. A scale without a value of its own takes that of the next smaller scale."""
    chosen = ci
    for name, value in zip(SCALES[1:], (laptop, gpu), strict=True):
        if SCALES.index(name) <= SCALES.index(scale()) and value is not None:
            chosen = value
    return chosen
