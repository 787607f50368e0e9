"""The live face of a `Sweep`: sliders that answer at once, over a figure that follows as soon as its run is done."""

import html
import threading
import traceback
from typing import TYPE_CHECKING

import ipywidgets as widgets
import plotly.graph_objects as go

from polylib.lab.progress_bar import Superseded, listening

if TYPE_CHECKING:
    from polylib.lab.sweep import Sweep


def live(sweep: "Sweep") -> widgets.Widget:
    """Widgets for `sweep`: one slider a knob, the figure, a progress bar and a place for messages."""
    return _Live(sweep).box


class _Live:
    """Runs happen on one thread of their own, so that sliders and kernel stay free. Only the newest request counts."""

    def __init__(self, sweep: "Sweep") -> None:
        self.sweep = sweep
        self.wanted: tuple[int, ...] | None = None  # the newest point that was asked for and not taken up yet
        self.changed = threading.Condition()
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
        self.message = widgets.HTML()
        self.box = widgets.VBox([*self.sliders.values(), self.bar, self.message, self.figure])
        for slider in self.sliders.values():
            slider.observe(lambda _: self.ask(), names="index")  # 1 and True are equal values
        threading.Thread(target=self.work, name="polylib sweep", daemon=True).start()
        self.ask()

    def ask(self) -> None:
        with self.changed:
            self.wanted = tuple(slider.index for slider in self.sliders.values())
            self.changed.notify()

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted is not None)
                places, self.wanted = self.wanted, None
            try:
                with listening(self.report):
                    figure = self.sweep.drawn(places)  # type: ignore[arg-type]
                self.show(figure)
                self.message.value = ""
            except Superseded:
                continue
            except Exception as error:  # shown to the reader, who moves on with the next drag
                self.message.value = _explained(error)
            self.bar.layout.visibility = "hidden"

    def report(self, fraction: float) -> None:
        if self.wanted is not None:
            raise Superseded
        self.bar.value = fraction
        self.bar.layout.visibility = "visible"

    def show(self, new: go.Figure) -> None:
        """Change the figure on the page in place, so that it does not flicker."""
        old = self.figure
        with old.batch_update():
            if [trace.type for trace in old.data] != [trace.type for trace in new.data]:
                old.data = []
                old.add_traces(new.data)
            else:
                for before, after in zip(old.data, new.data, strict=True):
                    before.update(after.to_plotly_json(), overwrite=True)
            old.update_layout(new.layout.to_plotly_json(), overwrite=True)


def _explained(error: Exception) -> str:
    trace = "".join(traceback.format_exception(error))
    return (
        f'<div style="color:#c62828"><strong>{type(error).__name__}:</strong> {html.escape(str(error))}'
        f"<details><summary>where it happened</summary><pre>{html.escape(trace)}</pre></details></div>"
    )
