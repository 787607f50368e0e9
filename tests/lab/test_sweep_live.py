"""The live face, driven as a front end would: by changing slider values, waiting for what the figure shows."""

import threading
import time

import numpy as np
import plotly.graph_objects as go
import pytest

from polylib.lab import Sweep, progress

widgets = pytest.importorskip("ipywidgets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYLIB_CACHE", str(tmp_path / "cache"))


def draw(result, point):
    return go.Figure(go.Scatter(y=result["y"]))


def parts(box):
    kinds = {type(child).__name__: child for child in box.children}
    return kinds["SelectionSlider"], kinds["FigureWidget"], kinds["HTML"], kinds["FloatProgress"]


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the widget did not get there"
        threading.Event().wait(0.01)


def shows(figure, value):
    return len(figure.data) == 1 and figure.data[0].y is not None and figure.data[0].y[0] == value


def test_moving_a_slider_changes_the_figure():
    slider, figure, _, _ = parts(Sweep(lambda k: {"y": np.full(4, k)}, {"k": [1, 2, 3]}, draw, start={"k": 1}).widget())
    wait_for(lambda: shows(figure, 1))
    slider.value = 3
    wait_for(lambda: shows(figure, 3))


def test_a_newer_drag_supersedes_the_run_before():
    started, finished = [], []
    gate = threading.Event()

    def run(k):
        started.append(k)
        for step in progress(range(2000)):
            if k == 2 and step == 0:
                gate.wait(10)
            time.sleep(0.001 if k == 2 else 0)
        finished.append(k)
        return {"y": np.full(4, k)}

    slider, figure, _, bar = parts(Sweep(run, {"k": [1, 2, 3]}, draw, start={"k": 1}).widget())
    wait_for(lambda: shows(figure, 1))
    slider.value = 2
    wait_for(lambda: 2 in started)
    slider.value = 3
    gate.set()
    wait_for(lambda: shows(figure, 3))
    wait_for(lambda: bar.layout.visibility == "hidden")
    assert finished == [1, 3]


def test_an_error_is_shown_and_the_next_drag_works():
    def run(k):
        if k == 2:
            raise ValueError("the rate is <too> high")
        return {"y": np.full(4, k)}

    slider, figure, message, _ = parts(Sweep(run, {"k": [1, 2, 3]}, draw, start={"k": 1}).widget())
    wait_for(lambda: shows(figure, 1))
    slider.value = 2
    wait_for(lambda: "the rate is &lt;too&gt; high" in message.value)
    slider.value = 3
    wait_for(lambda: shows(figure, 3) and message.value == "")


def test_figures_with_other_traces_replace_each_other():
    def view(result, point):
        kind = go.Scatter if result["y"][0] < 2 else go.Bar
        return go.Figure([kind(y=result["y"])] * int(result["y"][0]))

    slider, figure, _, _ = parts(Sweep(lambda k: {"y": np.full(4, k)}, {"k": [1, 2, 3]}, view, start={"k": 1}).widget())
    wait_for(lambda: [trace.type for trace in figure.data] == ["scatter"])
    slider.value = 3
    wait_for(lambda: [trace.type for trace in figure.data] == ["bar"] * 3)


def test_the_live_sweep_and_a_cell_do_not_run_at_the_same_time():
    inside, overlap, runs = threading.Event(), threading.Event(), []

    def run(k):
        (overlap if inside.is_set() else inside).set()
        runs.append(k)
        overlap.wait(0.2)
        inside.clear()
        return {"y": np.full(4, k)}

    sweep = Sweep(run, {"k": [1, 2]}, draw, start={"k": 1})
    _, figure, _, _ = parts(sweep.widget())
    wait_for(inside.is_set)
    assert sweep.result(k=2)["y"][0] == 2
    assert sweep.result(k=1)["y"][0] == 1
    wait_for(lambda: shows(figure, 1))
    assert not overlap.is_set() and sorted(runs) == [1, 2]
