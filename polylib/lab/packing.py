"""Figures in the form in which the built site holds them: small, exact, and of one kind for all browsers."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.utils import PlotlyJSONEncoder

SEEN = 1e-6  # of the span of an array: what rounding may change, far less than a pixel
# What plotly takes as an array of any length. Other short lists, such as a range, must stay lists.
ARRAYS = {"x", "y", "z", "r", "theta", "base", "open", "high", "low", "close", "values", "customdata"}
ARRAYS |= {"array", "arrayminus", "size", "color", "opacity"}
LAYOUT = 5  # a list of a layout with at most four numbers may be a range or a domain


def pack(figures: Sequence[go.Figure]) -> dict[str, Any]:
    """Pack the figures of a sweep into one small JSON-ready object.

    Numeric arrays are stored once each, as base64 of float32 where that shows the same, and else with their type, as
    `{"dtype": "f8", "bdata": ...}`. What is left of a figure, its skeleton, is stored once as well, however many
    figures share it. `figures[i]` lists the number of its skeleton and then of its arrays, in the order in which they
    stand in it. The template is left out, since the page supplies one for its theme. NaN and infinities become gaps.
    """
    arrays: dict[tuple[str, str], int] = {}
    skeletons: dict[str, int] = {}
    rows = []
    for figure in figures:
        used: list[int] = []

        def lift(value: Any, least: int, used: list[int] = used) -> Any:
            """`value` with its arrays of at least so many numbers taken out."""
            if isinstance(value, dict) and "bdata" not in value:
                return {key: lift(item, _least(key, least)) for key, item in value.items()}
            array = _numeric(value)
            if array is not None and array.size >= (1 if isinstance(value, dict) else least):
                used.append(arrays.setdefault(_encoded(array), len(arrays)))
                return {"$": list(array.shape)}
            if isinstance(value, np.ndarray) and value.dtype.kind == "M":
                return value.astype(str).tolist()  # plotly reads dates as text
            if isinstance(value, list | tuple | np.ndarray):
                return [lift(item, least) for item in value]
            return _scalar(value)

        whole = figure.to_plotly_json()
        layout = {key: value for key, value in whole["layout"].items() if key != "template"}
        lifted = {"data": [lift(trace, 4) for trace in whole["data"]], "layout": lift(layout, LAYOUT)}
        skeleton = json.dumps(lifted, separators=(",", ":"), cls=PlotlyJSONEncoder)
        rows.append([skeletons.setdefault(skeleton, len(skeletons)), *used])
    packed = [data if kind == "f4" else {"dtype": kind, "bdata": data} for kind, data in arrays]
    return {"arrays": packed, "skeletons": [json.loads(text) for text in skeletons], "figures": rows}


def embed(kind: str, content: dict[str, Any], fallback: str) -> str:
    """HTML that `assets/polylib.js` turns into something to see; `fallback` is shown where that script does not run."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<div class="polylib-{kind}"><script type="application/json">{text}</script>{fallback}</div>'


def _least(key: str, least: int) -> int:
    """How many numbers a list needs, under this key, to be taken out as an array."""
    if least == LAYOUT or key == "domain":
        return LAYOUT
    return 1 if key in ARRAYS else 4


def _encoded(array: np.ndarray) -> tuple[str, str]:
    """The dtype that keeps what can be seen of an array, and base64 of the array in it."""
    with np.errstate(over="ignore"):
        small = array.astype("<f4")
    kind = "f4" if _looks_the_same(array.astype("f8"), small.astype("f8")) else "f8"
    return kind, base64.b64encode((small if kind == "f4" else array.astype("<f8")).tobytes()).decode()


def _looks_the_same(exact: np.ndarray, rounded: np.ndarray) -> bool:
    finite = np.isfinite(exact)
    exact, rounded = exact[finite], rounded[finite]
    changed = exact != rounded
    if not changed.any():
        return True
    if not np.isfinite(rounded).all() or (exact[changed] == np.round(exact[changed])).any():
        return False  # too large, or a whole number, which readers compare by its digits
    close = np.abs(exact - rounded) <= SEEN * (exact.max() - exact.min())
    return bool(close.all() and (np.abs(exact - rounded) <= SEEN * np.abs(exact)).all())


def _numeric(value: Any) -> np.ndarray | None:
    """`value` as an array if it is a regular one of numbers, or plotly's base64 of one; else None."""
    if isinstance(value, dict):
        array = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]).newbyteorder("<"))
        return array.reshape([int(size) for size in str(value.get("shape", array.size)).split(",")])
    if not isinstance(value, list | tuple | np.ndarray) or len(value) == 0:
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return None
    return array if array.dtype.kind in "iuf" and array.size and array.ndim <= 2 else None


def _scalar(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
