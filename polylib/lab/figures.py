"""The look of the book's figures, and the few verbs that many of them use.

Importing this module registers two plotly templates, `polylib_light` and `polylib_dark`, and makes the light one the
default. Colours are those of Okabe and Ito, which readers with any common form of colour blindness tell apart.
In a notebook a figure is stored twice: as plotly's own MIME type, which JupyterLab draws, and as HTML, which the built
site draws with the reader's theme (`assets/polylib.js`).
"""

import html
import json
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer
from plotly.subplots import make_subplots

from polylib import _checks
from polylib.lab.packing import embed, pack
from polylib.lab.wording import written

PALETTE = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#6B6B6B"),
    "dark": ("#56B4E9", "#FF9A52", "#2CC79A", "#E39CC6", "#F0E442", "#9AD0F5", "#B5B5B5"),
}
# What a colour says, the same in every chapter.
ROLES = {"method": 0, "baseline": 1, "ablation": 2, "second": 3, "third": 4, "reference": 6}
_INK = {"light": "#24292f", "dark": "#d8dee4"}
_GRID = {"light": "#e3e6ea", "dark": "#3a4048"}


def template(theme: str) -> go.layout.Template:
    """The plotly template for `"light"` or `"dark"` pages. Its background is transparent."""
    _checks.choice("theme", theme, PALETTE)
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


def colour(role: str) -> str:
    """The colour of a role: `"method"` (the paper's), `"baseline"`, `"ablation"`, `"second"` and `"third"` for further
    variants, `"reference"` for what is only there to compare with."""
    return PALETTE["light"][ROLES[_checks.choice("role", role, ROLES)]]


def with_spread(
    figure: go.Figure,
    x: Any,
    values: Any,
    role: str = "method",
    *,
    centre: Literal["mean", "median", "geometric"] = "mean",
    panel: int | None = None,
    **options: Any,
) -> go.Figure:
    """Add a line through the centres of several seeds, with bars from the smallest to the largest of them.

    Args:
        figure: is changed, and returned.
        x: of shape (points,).
        values: of shape (points, seeds).
        role: as for `colour`.
        centre: of the seeds: their mean, median or geometric mean.
        panel: the number of the panel, from 1.
        options: passed on to `add_scatter`, such as `name`.
    """
    _checks.choice("centre", centre, ("mean", "median", "geometric"))
    seeds = np.asarray(values)
    _checks.shape(
        "values", seeds, f"({len(x)}, seeds), as x", bool(seeds.ndim == 2 and len(seeds) == len(x) and seeds.size)
    )
    with np.errstate(all="ignore"):  # a run that diverged leaves a gap
        if centre == "geometric":
            middle = np.exp(np.log(seeds).mean(1))
        else:
            middle = np.median(seeds, 1) if centre == "median" else seeds.mean(1)
        bars = {"array": seeds.max(1) - middle, "arrayminus": middle - seeds.min(1)}
    style = {"mode": "lines+markers", "line_color": colour(role), **options}
    return figure.add_scatter(x=x, y=middle, error_y=bars, **style, **_place(panel))


def ring(figure: go.Figure, x: Any, y: Any, role: str = "baseline", panel: int | None = None) -> go.Figure:
    """Add a ring around one point: where the slider stands. Arguments as in `with_spread`."""
    marker = {"symbol": "circle-open", "size": 18, "color": colour(role), "line": {"width": 3}}
    place = {"x": [x], "y": [y], "showlegend": False, "hoverinfo": "skip"}
    return figure.add_scatter(**place, mode="markers", marker=marker, **_place(panel))


def power_axis(
    figure: go.Figure,
    axis: Literal["x", "y"],
    title: str | None = None,
    range: Sequence[float] | None = None,
    panel: int | None = None,
) -> go.Figure:
    """Make an axis logarithmic, with a tick at each power of ten; `range` holds the exponents of its ends."""
    _checks.choice("axis", axis, ("x", "y"))
    options = {"type": "log", "dtick": 1, "exponentformat": "power", "title": title, "range": range}
    return _update(figure, axis, panel, options)


def knob_axis(
    figure: go.Figure,
    axis: Literal["x", "y"],
    values: Sequence[Any],
    title: str | None = None,
    panel: int | None = None,
) -> go.Figure:
    """Give each value of a knob one place on an axis, 0, 1, 2, ..., with its text as the tick."""
    _checks.choice("axis", axis, ("x", "y"))
    ticks = {"tickvals": list(range(len(values))), "ticktext": written(values), "range": [-0.5, len(values) - 0.5]}
    return _update(figure, axis, panel, {**ticks, "title": title})


def _update(figure: go.Figure, axis: str, panel: int | None, options: dict[str, Any]) -> go.Figure:
    given = {name: value for name, value in options.items() if value is not None}
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    return update(**given, **_place(panel))


def _place(panel: int | None) -> dict[str, int]:
    return {} if panel is None else {"row": 1, "col": _checks.integer("panel", panel, least=1)}


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
