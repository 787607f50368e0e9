"""Short texts for the values of a knob, beside a slider or on an axis."""

from collections import Counter
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

NAMED = (FunctionType, BuiltinFunctionType, type)


def written(values: Sequence[Any]) -> list[str]:
    """Each value as short text; values that differ read differently."""
    texts = [_short(value) for value in values]
    for digits in range(4, 18):
        for place in _alike(texts):
            if isinstance(values[place], float | np.floating):
                texts[place] = _digits(values[place], digits)
    for place in _alike(texts):
        texts[place] = repr(values[place])
    for place in _alike(texts):
        texts[place] += f" ({type(values[place]).__name__})"
    for place in _alike(texts):
        texts[place] += f", value {place + 1}"
    return texts


def _alike(texts: list[str]) -> list[int]:
    counts = Counter(texts)
    return [place for place, text in enumerate(texts) if counts[text] > 1]


def _short(value: Any) -> str:
    if isinstance(value, float | np.floating):
        for digits in range(3, 7):  # 0.9999 is short enough to be written as it is
            if float(f"{value:.{digits}g}") == value:
                return _digits(value, digits)
        return _digits(value, 3)
    if isinstance(value, NAMED):
        return value.__name__
    return f"({', '.join(map(_short, value))})" if isinstance(value, tuple) else str(value)


def _digits(value: Any, digits: int) -> str:
    """A number with so many digits: 1000 and not 1e+03."""
    text = f"{value:.{digits}g}"
    return f"{float(text):.6g}" if "e+0" in text and abs(float(text)) < 1e6 else text
