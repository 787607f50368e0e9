"""The live face of a `Sweep`: sliders that answer at once, over a figure that follows as soon as its run is done.

A run and a cell of the notebook would draw from the same global random numbers. So a run waits while a cell is executed
and a cell waits for a run: what a run returns does not depend on what the notebook does meanwhile. Settings that belong
to a thread, such as torch's default device, are those of the cells.
"""

import html
import threading
import traceback
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython import get_ipython
from plotly.basedatatypes import BaseTraceType

from polylib.lab.interrupts import stop_all, stop_all_when_interrupted, stoppable
from polylib.lab.printed import Printed, captured
from polylib.lab.progress_bar import Superseded, listening
from polylib.lab.surroundings import held, settings

if TYPE_CHECKING:
    from polylib.lab.sweep import Sweep


LISTS = {"annotations", "images", "selections", "shapes", "sliders", "updatemenus"}  # of a layout; emptied, not unset


def live(sweep: "Sweep") -> widgets.Widget:
    """Widgets for `sweep`: one slider a knob, a progress bar, messages, the figure, and what the run printed.

    The first figure is there when this returns; later ones are drawn when a slider asks for them.
    """
    _take_turns_with_cells()
    return _Live(sweep).box


class _Turns:
    """Cells and figures that follow a slider take turns. IPython calls `start` and `end` on its main thread.

    The lock is another one than that of runs, since a cell may itself wait for runs on threads that it has started.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cells = 0  # that have begun, each inside the one before, as under %%capture
        self.settings = settings()

    def start(self, *_: object) -> None:
        try:
            self.lock.acquire()
        except KeyboardInterrupt:  # of a reader whose cell waits for a run
            stop_all()
            self.lock.acquire()
        self.cells += 1

    def end(self, *_: object) -> None:
        self.take_settings()
        if self.cells:  # not for the cell that made the first sweep
            self.cells -= 1
            self.lock.release()

    def take_settings(self) -> None:
        """Note the settings of the thread of cells, for the threads of sweeps."""
        self.settings = settings()


_turns = _Turns()


def _take_turns_with_cells() -> None:
    shell = get_ipython()
    if shell is not None and _turns.start not in shell.events.callbacks["pre_run_cell"]:
        shell.events.register("pre_run_cell", _turns.start)
        shell.events.register("post_run_cell", _turns.end)
        if getattr(shell, "kernel", None) is not None:
            stop_all_when_interrupted(shell.kernel)


class _Live:
    """Runs happen on a thread of their own, so that sliders and kernel stay free. Only the newest request counts, and
    the thread ends when there is none."""

    def __init__(self, sweep: "Sweep") -> None:
        self.sweep = sweep
        self.wanted: tuple[int, ...] | None = None  # the newest point that was asked for and not taken up yet
        self.lock = threading.Lock()
        self.busy = False  # whether a thread is at work
        width = f"{max(map(len, sweep.labels.values())) * 0.6 + 1}em"  # one for all, so that sliders stand in a column
        self.sliders = {
            name: widgets.SelectionSlider(
                options=list(zip(knob.texts, knob.values, strict=True)),
                index=sweep.start_places[name],
                equals=knob.same,
                description=knob.label,
                style={"description_width": width},
                layout={"width": "min(34em, 98%)"},
            )
            for name, knob in sweep.grid.items()
        }
        self.figure = go.FigureWidget(layout={"autosize": True})
        self.bar = widgets.FloatProgress(
            min=0, max=1, layout={"width": "min(34em, 98%)", "height": "6px", "visibility": "hidden"}
        )
        self.message, self.output = widgets.HTML(), widgets.Output()
        self.box = widgets.VBox([*self.sliders.values(), self.bar, self.message, self.figure, self.output])
        for slider in self.sliders.values():
            slider.observe(lambda _: self.ask(), names="index")  # 1 and True are equal values
        _turns.take_settings()
        self.draw(tuple(sweep.start_places.values()))

    def ask(self) -> None:
        _turns.take_settings()
        with self.lock:
            self.wanted = tuple(slider.index for slider in self.sliders.values())
            if not self.busy:
                self.busy = True
                threading.Thread(target=self.work, name="polylib sweep", daemon=True).start()

    def work(self) -> None:
        while True:
            with self.lock:
                places, self.wanted = self.wanted, None
                if places is None:
                    self.busy = False
                    return
            with listening(self.report):
                self.draw(places)

    def draw(self, places: tuple[int, ...]) -> None:
        message = ""
        with _turns.lock, captured() as printed:
            try:
                with stoppable(), held(_turns.settings):
                    figure = self.sweep.drawn(places, anew=True)
                self.show(figure)
            except Superseded:
                return
            except KeyboardInterrupt:
                message = _note("Interrupted. Move a slider to go on.")
            except BaseException as error:  # also SystemExit: shown to the reader, who moves on with the next drag
                message = _explained(error)
        self.message.value, self.output.outputs = message, _outputs(printed)
        self.bar.layout.visibility = "hidden"

    def report(self, fraction: float) -> None:
        if self.wanted is not None:
            raise Superseded
        self.bar.value = fraction
        self.bar.layout.visibility = "visible"

    def show(self, new: go.Figure) -> None:
        """Make the figure on the page equal to a new one, in place where it can be, so that it does not flicker."""
        old = self.figure
        layout = {"autosize": True, **new.layout.to_plotly_json()}
        gone: dict[str, Any] = {
            name: [] if name in LISTS else None for name in old.layout.to_plotly_json() if name not in layout
        }
        with old.batch_update():
            if list(map(_form, old.data)) != list(map(_form, new.data)):
                old.data = []
                old.add_traces(new.data)
            else:
                for before, after in zip(old.data, new.data, strict=True):
                    before.update(after.to_plotly_json(), overwrite=True)
            old.update_layout(gone | layout, overwrite=True)


def _form(trace: BaseTraceType) -> tuple[str, ...]:
    """The kind of a trace and the properties that it has. One with fewer of them would keep the others on the page."""
    return (trace.type, *sorted(trace.to_plotly_json()))


def _outputs(printed: Printed) -> tuple[dict[str, str], ...]:
    """What was printed, in the form of a cell's output."""
    return tuple({"output_type": "stream", "name": name, "text": text} for name, text in printed.pieces())


def _note(text: str) -> str:
    return f'<div style="color:#9a6700">{html.escape(text)}</div>'


def _explained(error: BaseException) -> str:
    trace = "".join(traceback.format_exception(error))
    return (
        f'<div style="color:#c62828"><strong>{type(error).__name__}:</strong> {html.escape(str(error))}'
        f"<details><summary>where it happened</summary><pre>{html.escape(trace)}</pre></details></div>"
    )
