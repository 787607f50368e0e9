"""The book's interactive figure: one experiment, swept over a grid of settings.

One `Sweep` has three faces, chosen by the front end from one MIME bundle: live widgets in JupyterLab (`sweep_live.py`),
sliders over the precomputed grid in the built site (`assets/polylib.js`), and a table in plain text.
"""

import inspect
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from joblib import Memory, Parallel, cpu_count, delayed
from joblib.parallel import get_active_backend
from torch import Tensor

from polylib.lab.figures import embed, pack
from polylib.lab.fingerprint import fingerprint
from polylib.lab.progress_bar import is_live, listening, progress

Result = dict[str, np.ndarray]
Point = dict[str, Any]

_one_run = threading.RLock()  # a live sweep has its own thread, and torch's forward derivatives can't serve two threads


def cache_folder() -> Path:
    """Where finished points are kept: `$POLYLIB_CACHE`, or `polylib` in the user's cache folder. Delete it at will."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "polylib"
    return Path(os.environ.get("POLYLIB_CACHE", default))


class Sweep:
    """An experiment over a grid of settings, shown as a figure with one slider a setting.

    Args:
        run: `run(**point)` returns a dict of arrays (numpy, torch or numbers). It must depend on nothing but the
            point, and on values that do not change.
        knobs: for each argument of `run` the values that it can take, at least one, in the order of the slider.
        view: `view(result)` draws the dict that `run` returned, as a plotly figure.
        batch: the name of a knob along which `run` computes all values in one pass. `run` then gets the list of its
            values, and each array that it returns has a first axis of that length. Points along it cost nothing once
            one was computed.
        start: the values at which the sliders stand at first; by default the middle one of each list.
        labels: what to write beside the sliders instead of the knobs' names.

    Results are kept on disk, one file a run, under a key made of the code and the arguments: an interrupted or killed
    grid resumes where it was. The grid runs in parallel through joblib, on this machine or wherever
    `joblib.parallel_config` says.

    Raises:
        ValueError: an empty grid, a repeated value, an unknown `batch` or `start`, or knobs that `run` does not take.
        TypeError: `run` or `view` can't be called, or `run` returned something that is not a dict of arrays.
    """

    def __init__(
        self,
        run: Callable[..., Mapping[str, Any]],
        knobs: Mapping[str, Sequence[Any]],
        view: Callable[[Result], go.Figure],
        *,
        batch: str | None = None,
        start: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        for name, function in (("run", run), ("view", view)):
            if not callable(function):
                raise TypeError(f"{name} is {function!r}; expected a function")
        self.run, self.view, self.batch = run, view, batch
        self.knobs = {name: list(values) for name, values in knobs.items()}
        _check_knobs(run, self.knobs, batch)
        self.start = {name: values[len(values) // 2] for name, values in self.knobs.items()}
        for name, value in (start or {}).items():
            if value not in self.knobs.get(name, []):
                raise ValueError(
                    f"start[{name!r}] is {value!r}; expected one of {self.knobs.get(name, 'no such knob')}"
                )
            self.start[name] = value
        self.labels = {name: (labels or {}).get(name, name.replace("_", " ")) for name in self.knobs}
        self._key: str | None = None
        self._known: dict[tuple[Any, ...], Result] = {}
        self._disk = Memory(cache_folder(), verbose=0).cache(_recall, ignore=["compute"])

    # One point

    def points(self) -> list[Point]:
        """All points of the grid; the last knob varies fastest."""
        return [dict(zip(self.knobs, values, strict=True)) for values in itertools.product(*self.knobs.values())]

    def result(self, **point: Any) -> Result:
        """The result at one point: from memory, from disk, or computed now."""
        if set(point) != set(self.knobs):
            raise ValueError(f"point has {sorted(point)}; expected {sorted(self.knobs)}")
        for name, value in point.items():
            if value not in self.knobs[name]:
                raise ValueError(f"{name} is {value!r}; expected one of {self.knobs[name]}")
        call = self._call(point)
        return self._slice(self._recalled(call) or self._computed(call), point)

    def figure(self, **point: Any) -> go.Figure:
        """The figure at one point; knobs that are not named stand at their start."""
        return self.view(self.result(**{**self.start, **point}))

    def _call(self, point: Point) -> Point:
        """The arguments of the run that holds this point."""
        return {**point, self.batch: self.knobs[self.batch]} if self.batch else point

    def _slice(self, whole: Result, point: Point) -> Result:
        if self.batch is None:
            return whole
        index = self.knobs[self.batch].index(point[self.batch])
        return {name: array[index] for name, array in whole.items()}

    def _computed(self, call: Point) -> Result:
        with _one_run:  # while this thread waited, another one may have computed the same
            return self._recalled(call) or self._keep(call, self.run(**call))

    # What is kept

    def _recalled(self, call: Point) -> Result | None:
        name = _identity(call)
        if name not in self._known:
            self._key = self._key or fingerprint(self.run)
            if not self._disk.check_call_in_cache(None, self._key, name):
                return None
            self._known[name] = self._disk(None, self._key, name)
        return self._known[name]

    def _keep(self, call: Point, outcome: Mapping[str, Any]) -> Result:
        result = _as_arrays(outcome)
        if self.batch is not None:
            for name, array in result.items():
                if array.ndim == 0 or len(array) != len(self.knobs[self.batch]):
                    raise ValueError(
                        f"run returned {name!r} with shape {array.shape}; expected a first axis of"
                        f" {len(self.knobs[self.batch])}, one entry for each value of {self.batch!r}"
                    )
        self._key = self._key or fingerprint(self.run)
        name = _identity(call)
        self._known[name] = self._disk(lambda: result, self._key, name)
        return result

    # The whole grid

    def compute(self) -> None:
        """Compute what is missing of the grid, in parallel. Interrupted, it keeps what is finished."""
        calls = {_identity(self._call(point)): self._call(point) for point in self.points()}
        missing = [call for call in calls.values() if self._recalled(call) is None]
        backend, jobs = get_active_backend()
        elsewhere = type(backend).__name__ != "LokyBackend"
        if not missing:
            return
        if not elsewhere and jobs in (None, 1):  # nothing was configured: use this machine, if there is work for it
            jobs = min(cpu_count(), len(missing))
        streams = getattr(backend, "supports_return_generator", False)
        # Where results don't stream, as in Ray's backend, few are asked for at a time: what is finished is kept.
        part = len(missing) if streams else 2 * max(1, backend.effective_n_jobs(jobs if jobs is not None else -1))
        parallel = Parallel(n_jobs=jobs, return_as="generator_unordered" if streams else "list", batch_size=1)
        parts = (
            parallel(delayed(_numbered)(self.run, number, missing[number]) for number in numbers[:part])
            for numbers in (range(start, len(missing)) for start in range(0, len(missing), part))
        )
        outcomes = itertools.chain.from_iterable(parts)
        for number, outcome in progress(outcomes, "sweep", total=len(missing)):
            self._keep(missing[number], outcome)

    # Three faces

    def table(self) -> str:
        """The grid as text: one line a knob."""
        lines = [f"Sweep of {getattr(self.run, '__name__', 'run')}: {len(self.points())} points"]
        lines += [f"  {self.labels[name]}: {', '.join(map(_written, values))}" for name, values in self.knobs.items()]
        return "\n".join(lines)

    def html(self) -> str:
        """The face for pages without a kernel: the whole grid, computed and packed, with sliders."""
        self.compute()
        knobs = [
            {
                "label": self.labels[name],
                "values": [_written(value) for value in values],
                "start": values.index(self.start[name]),
            }
            for name, values in self.knobs.items()
        ]
        content = {"knobs": knobs, **pack([self.figure(**point) for point in self.points()])}
        return embed("sweep", content, f"<pre>{self.table()}</pre>")

    def widget(self) -> Any:
        """The live face: ipywidgets that compute a point when a slider asks for it."""
        from polylib.lab.sweep_live import live

        return live(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        if is_live():
            return {**self.widget()._repr_mimebundle_(), "text/plain": self.table()}
        return {"text/html": self.html(), "text/plain": self.table()}


def _check_knobs(run: Callable[..., Any], knobs: dict[str, list[Any]], batch: str | None) -> None:
    if not knobs:
        raise ValueError("knobs is empty; expected at least one")
    for name, values in knobs.items():
        if not values:
            raise ValueError(f"knobs[{name!r}] is empty; expected at least one value")
        if len({repr(value) for value in values}) < len(values):
            raise ValueError(f"knobs[{name!r}] repeats a value: {values}")
    if batch is not None and batch not in knobs:
        raise ValueError(f"batch is {batch!r}; expected one of the knobs {sorted(knobs)}")
    try:
        inspect.signature(run).bind(**dict.fromkeys(knobs))
    except TypeError as error:
        raise ValueError(f"run can't be called with the knobs {sorted(knobs)}: {error}") from None


def _numbered(run: Callable[..., Mapping[str, Any]], number: int, call: Point) -> tuple[int, Result]:
    with listening(lambda fraction: None):  # the bar over the grid is enough
        return number, _as_arrays(run(**call))


def _recall(compute: Callable[[], Result], key: str, name: tuple[Any, ...]) -> Result:
    """What joblib's Memory wraps: it runs only for results that are not on disk yet, and they are kept."""
    return compute()


def _identity(call: Point) -> tuple[Any, ...]:
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(call.items()))


def _as_arrays(outcome: Any) -> Result:
    if not isinstance(outcome, Mapping) or not outcome:
        raise TypeError(f"run returned {type(outcome).__name__}; expected a dict of arrays, with at least one entry")
    result = {}
    for name, value in outcome.items():
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype == object:
            raise TypeError(f"run returned {name!r} as {type(value).__name__}; expected an array")
        result[name] = array
    return result


def _written(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
