"""The book's interactive figure: one experiment, swept over a grid of settings.

One `Sweep` has three faces, chosen by the front end from one MIME bundle: live widgets in JupyterLab (`sweep_live.py`),
sliders over the precomputed grid in the built site (`assets/polylib.js`), and a table in plain text.
"""

import html
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import plotly.graph_objects as go

from polylib import _checks
from polylib.lab import knobs as knobs_of
from polylib.lab.figures import embed, pack
from polylib.lab.fingerprint import fingerprint
from polylib.lab.grid import run_all
from polylib.lab.keeping import Kept, Places
from polylib.lab.printed import warning_anew
from polylib.lab.progress_bar import is_live
from polylib.lab.results import Point, Result, at, computed, one_run
from polylib.lab.surroundings import own_state


class Sweep:
    """An experiment over a grid of settings, shown as a figure with one slider a setting.

    Args:
        run: `run(**point)` returns a dict of arrays: numpy arrays, torch tensors, lists or numbers. It must depend on
            nothing but the point, and on values that do not change. Each run and each view starts from the same random
            state; settings of torch and numpy that it changes are as before afterwards.
        knobs: for each argument of `run` the values that it can take, at least one, in the order of the slider: a
            list of numbers, words or named functions, or `{label: value}` for values of any kind.
        view: `view(result, point)` draws a plotly figure. `result` is the dict that `run` returned, as read-only
            arrays; `point` holds the value of each knob.
        batch: the name of a knob along which `run` computes all values in one pass. `run` then gets the list of its
            values, and each array that it returns has a first axis of that length. What all values share is returned
            once, in a second dict: `return {"loss": losses}, {"accuracy": over_all_values}`; `view` finds it as it
            is, beside the rest. Points along this knob cost nothing once one was computed.
        start: the values at which the sliders stand at first; by default the middle one of each list.
        labels: what to write beside the sliders instead of the knobs' names.

    Results are kept on disk, one file a run, under a key made of the code and the arguments: an interrupted or killed
    grid resumes where it was. A grid that takes a few seconds runs in this process. A larger one runs in parallel
    through joblib, on this machine or wherever `joblib.parallel_config` says.

    Raises:
        ValueError: an empty grid, a repeated value, an unknown `batch` or `start`, or knobs that `run` does not take.
        TypeError: `run` or `view` can't be called, a value that needs a label, `run` returned something that is not a
            dict of arrays, or `view` something that is not a figure.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        knobs: Mapping[str, Any],
        view: Callable[[Result, Point], go.Figure],
        *,
        batch: str | None = None,
        start: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.run, self.view, self.batch = _checks.function("run", run), _checks.function("view", view), batch
        self.grid = knobs_of.read(knobs, labels)
        if batch is not None:
            _checks.choice("batch", batch, self.grid)
        self._check_signatures()
        if start is not None and not isinstance(start, Mapping):
            raise TypeError(f"start must be a dict of values, got {start!r}")
        for name in start or {}:
            _checks.choice("start", name, self.grid)
        self.start_places = {
            name: knob.index((start or {})[name], f"start[{name!r}]")
            if name in (start or {})
            else len(knob.values) // 2
            for name, knob in self.grid.items()
        }
        self._kept = Kept(run, self.grid, batch)

    def _check_signatures(self) -> None:
        for name, function, arguments in (("run", self.run, self.grid), ("view", self.view, ("result", "point"))):
            try:
                signature = inspect.signature(function)
            except ValueError:  # some functions that are written in C have none
                continue
            try:
                signature.bind(*arguments) if name == "view" else signature.bind(**dict.fromkeys(arguments))
            except TypeError as error:
                raise ValueError(f"{name} must take {', '.join(arguments)}, got {signature} ({error})") from None

    @property
    def knobs(self) -> dict[str, list[Any]]:
        """The values of each knob."""
        return {name: list(knob.values) for name, knob in self.grid.items()}

    @property
    def labels(self) -> dict[str, str]:
        """What stands beside each slider."""
        return {name: knob.label for name, knob in self.grid.items()}

    @property
    def start(self) -> Point:
        """Where the sliders stand at first."""
        return self._point(tuple(self.start_places.values()))

    # One point

    def points(self) -> list[Point]:
        """All points of the grid; the last knob varies fastest."""
        return [self._point(places) for places in self._all_places()]

    def result(self, /, **point: Any) -> Result:
        """The result at one point, as read-only arrays: from memory, from disk, or computed now."""
        if set(point) != set(self.grid):
            raise ValueError(f"point must have {', '.join(self.grid)}, got {', '.join(point) or 'nothing'}")
        places = self._places(point)
        self._kept.refresh()
        return self._result(places)

    def figure(self, /, **point: Any) -> go.Figure:
        """The figure at one point; knobs that are not named stand at their start."""
        return self.drawn(self._places(point), anew=True)

    def _places(self, point: Point) -> Places:
        for name in point:
            _checks.choice("point", name, self.grid)
        return tuple(
            knob.index(point[name], name) if name in point else self.start_places[name]
            for name, knob in self.grid.items()
        )

    def _all_places(self) -> Iterable[Places]:
        return itertools.product(*(range(len(knob.values)) for knob in self.grid.values()))

    def _point(self, places: Places) -> Point:
        return {name: knob.value(place) for (name, knob), place in zip(self.grid.items(), places, strict=True)}

    def _run_of(self, places: Places) -> Places:
        """The run that holds a point: all points along the batched knob have the same."""
        return tuple(0 if name == self.batch else place for name, place in zip(self.grid, places, strict=True))

    def _call(self, run: Places) -> Point:
        """The arguments of a run."""
        point = self._point(run)
        if self.batch is not None:
            knob = self.grid[self.batch]
            point[self.batch] = [knob.value(place) for place in range(len(knob.values))]
        return point

    def _result(self, places: Places) -> Result:
        run = self._run_of(places)
        outcome = self._kept.get(run)
        if outcome is None:
            with one_run, warning_anew():
                code = self._kept.refresh()
                outcome = self._kept.get(run)  # while this thread waited, another one may have computed the same
                if outcome is None:
                    outcome = computed(self.run, self._call(run))
                    self._kept.put(run, outcome, code, fingerprint(self.run))
        return at(outcome, None if self.batch is None else places[list(self.grid).index(self.batch)])

    def drawn(self, places: Places, *, anew: bool = False) -> go.Figure:
        """The figure at a point that is given by the place of each knob's value in its list.

        `anew` looks first whether the code or the data behind the results has changed.
        """
        if anew:
            self._kept.refresh()
        result = self._result(places)
        with one_run, own_state(), warning_anew() if anew else nullcontext():
            figure = self.view(result, self._point(places))
        if not isinstance(figure, go.Figure):
            raise TypeError(f"view must return a plotly figure, got {figure!r:.60} ({type(figure).__name__})")
        if figure.frames:
            raise ValueError(f"view must return a figure without frames, got one with {len(figure.frames)}")
        return figure

    # The whole grid

    def compute(self) -> None:
        """Compute what is missing of the grid, in parallel where it takes long. Interrupted, it keeps what is done."""
        code = self._kept.refresh()
        runs = dict.fromkeys(map(self._run_of, self._all_places()))
        missing = [run for run in runs if self._kept.get(run) is None]
        with warnings.catch_warnings():  # a run may change what is told, for itself
            for done in run_all(self.run, [self._call(run) for run in missing], code):
                self._kept.put(missing[done.number], done.outcome, done.before, done.after)

    # Three faces

    def table(self) -> str:
        """The grid as text: one line a knob."""
        lines = [f"Sweep of {getattr(self.run, '__name__', 'run')}: {len(list(self._all_places()))} points"]
        return "\n".join(lines + [f"  {knob.label}: {', '.join(knob.texts)}" for knob in self.grid.values()])

    def html(self) -> str:
        """The face for pages without a kernel: the whole grid, computed and packed, with sliders."""
        self.compute()
        knobs = [
            {"label": knob.label, "values": knob.texts, "start": self.start_places[name]}
            for name, knob in self.grid.items()
        ]
        with warnings.catch_warnings():  # one for all, so that what each figure warns of is told once
            figures = [self.drawn(places) for places in self._all_places()]
        content = {"knobs": knobs, **pack(figures)}
        return embed("sweep", content, f"<pre>{html.escape(self.table())}</pre>")

    def widget(self) -> Any:
        """The live face: ipywidgets that compute a point when a slider asks for it."""
        from polylib.lab.sweep_live import live

        return live(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        if is_live():
            return {**self.widget()._repr_mimebundle_(), "text/plain": self.table()}
        return {"text/html": self.html(), "text/plain": self.table()}
