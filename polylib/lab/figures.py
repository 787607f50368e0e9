"""The look of the book's figures, and their packed form for pages without a kernel.

Importing this module registers two plotly templates, `polylib_light` and `polylib_dark`, and makes the light one the
default. Colours are those of Okabe and Ito, which readers with any common form of colour blindness tell apart.
In a notebook a figure is stored twice: as plotly's own MIME type, which JupyterLab draws, and as HTML, which the built
site draws with the reader's theme (`assets/polylib.js`).
"""

import base64
import html
import json
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer
from plotly.subplots import make_subplots

PALETTE = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#6B6B6B"),
    "dark": ("#56B4E9", "#FF9A52", "#2CC79A", "#E39CC6", "#F0E442", "#9AD0F5", "#B5B5B5"),
}
_INK = {"light": "#24292f", "dark": "#d8dee4"}
_GRID = {"light": "#e3e6ea", "dark": "#3a4048"}


def template(theme: str) -> go.layout.Template:
    """The plotly template for `"light"` or `"dark"` pages. Its background is transparent."""
    if theme not in PALETTE:
        raise ValueError(f"theme is {theme!r}; expected 'light' or 'dark'")
    axis = {
        "gridcolor": _GRID[theme],
        "linecolor": _INK[theme],
        "zerolinecolor": _GRID[theme],
        "ticks": "outside",
        "tickcolor": _INK[theme],
        "showline": True,
        "automargin": True,
        "title": {"standoff": 8},
    }
    clear = "rgba(0,0,0,0)"
    return go.layout.Template(
        layout={
            "colorway": PALETTE[theme],
            "font": {
                "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
                "size": 14,
                "color": _INK[theme],
            },
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
            "xaxis": axis,
            "yaxis": axis,
            "colorscale": {"sequential": "Viridis"},
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.12, "x": 0, "bgcolor": clear},
            "margin": {"l": 60, "r": 20, "t": 80, "b": 50},
            "height": 380,
            "hoverlabel": {"font": {"size": 13}},
        }
    )


for _theme in PALETTE:
    pio.templates[f"polylib_{_theme}"] = template(_theme)
pio.templates.default = "polylib_light"


def panels(*titles: str, **options: Any) -> go.Figure:
    """A figure with one panel for each title, side by side; on a narrow page they are stacked.

    Args:
        titles: what each panel shows, set above it.
        options: passed on to `plotly.subplots.make_subplots`.
    """
    count = len(titles)
    figure = make_subplots(rows=1, cols=count, horizontal_spacing=0.22 / count if count > 1 else 0, **options)
    for number, title in enumerate(titles, start=1):
        suffix = "" if number == 1 else str(number)
        figure.add_annotation(  # in the coordinates of the panel, so that the title follows where the panel goes
            text=title,
            xref=f"x{suffix} domain",
            yref=f"y{suffix} domain",
            x=0,
            y=1.02,
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            font={"size": 15},
        )
    return figure


def pack(figures: Sequence[go.Figure]) -> dict[str, Any]:
    """Pack the figures of a sweep into one small JSON-ready object.

    Numeric arrays are stored once each, as base64 of float32 (7 digits); what is left of a figure, its skeleton, is
    stored once as well, however many figures share it. `figures[i]` lists the number of its skeleton and then of its
    arrays, in the order in which they stand in it. The template is left out, since the page supplies one for its theme.
    """
    arrays: dict[str, int] = {}
    skeletons: dict[str, int] = {}
    rows = []
    for figure in figures:
        used: list[int] = []

        def lift(value: Any, used: list[int] = used) -> Any:
            if isinstance(value, dict) and "bdata" not in value:
                return {key: lift(item) for key, item in value.items()}
            array = _numeric(value)
            if array is not None:
                data = base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()
                used.append(arrays.setdefault(data, len(arrays)))
                return {"$": list(array.shape)}
            if isinstance(value, list | tuple | np.ndarray):
                return [lift(item) for item in value]
            return value.item() if isinstance(value, np.generic) else value

        whole = figure.to_plotly_json()
        layout = {key: value for key, value in whole["layout"].items() if key != "template"}
        skeleton = json.dumps(lift({"data": list(whole["data"]), "layout": layout}), separators=(",", ":"))
        rows.append([skeletons.setdefault(skeleton, len(skeletons)), *used])
    return {"arrays": list(arrays), "skeletons": [json.loads(text) for text in skeletons], "figures": rows}


def _numeric(value: Any) -> np.ndarray | None:
    """`value` as an array if it is a regular one of at least four numbers, or plotly's base64 of one; else None."""
    if isinstance(value, dict):
        array = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]).newbyteorder("<"))
        return array.reshape([int(size) for size in str(value.get("shape", array.size)).split(",")])
    if not isinstance(value, list | tuple | np.ndarray) or len(value) == 0:
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return None
    return array if array.dtype.kind in "iuf" and array.size >= 4 and array.ndim <= 2 else None


def embed(kind: str, content: dict[str, Any], fallback: str) -> str:
    """HTML that `assets/polylib.js` turns into something to see; `fallback` is shown where that script does not run."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return f'<div class="polylib-{kind}"><script type="application/json">{text}</script>{fallback}</div>'


def asset(name: str) -> str:
    """The text of a file from `polylib/lab/assets`."""
    return (resources.files("polylib.lab") / "assets" / name).read_text(encoding="utf-8")


class _BookRenderer(MimetypeRenderer):
    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        figure = go.Figure(fig_dict)
        title = figure.layout.title.text or "Figure"
        fallback = f"<p><em>{html.escape(title)} (drawn by plotly)</em></p>"
        return {
            "application/vnd.plotly.v1+json": json.loads(figure.to_json()),
            "text/html": embed("figure", pack([figure]), fallback),
        }


if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
    pio.renderers["polylib"] = _BookRenderer()
    pio.renderers.default = "polylib"
