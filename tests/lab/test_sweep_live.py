"""The live face, driven as a front end would: by changing slider values, waiting for what the figure shows."""

import json
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import joblib
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from plotly.utils import PlotlyJSONEncoder

from polylib.lab import Sweep, interrupts, progress

widgets = pytest.importorskip("ipywidgets")
sweep_live = pytest.importorskip("polylib.lab.sweep_live")


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
        overlap.wait(0.1)
        inside.clear()
        return {"y": np.full(4, k)}

    sweep = Sweep(run, {"k": [1, 2, 3]}, draw, start={"k": 1})
    slider, figure, _, _ = parts(sweep.widget())
    slider.value = 2
    wait_for(inside.is_set)
    assert sweep.result(k=3)["y"][0] == 3
    wait_for(lambda: shows(figure, 2))
    assert not overlap.is_set() and sorted(runs) == [1, 2, 3]


def test_what_a_run_draws_does_not_depend_on_the_cell_that_runs_meanwhile():
    def run(k):
        torch.manual_seed(k)
        return {"y": torch.stack([torch.rand(()) for _ in range(200)])}

    sweep = Sweep(run, {"k": [1, 2]}, draw, start={"k": 1})
    slider, figure, _, _ = parts(sweep.widget())
    torch.manual_seed(2)
    alone = torch.stack([torch.rand(()) for _ in range(200)])
    sweep_live._turns.start()  # a cell begins
    slider.value = 2
    for _ in range(2000):
        torch.rand(3)
    sweep_live._turns.end()
    wait_for(lambda: shows(figure, alone[0].item()))
    np.testing.assert_array_equal(np.asarray(figure.data[0].y, np.float32), alone.numpy())


def test_a_cell_inside_a_cell_and_threads_of_a_cell_stop_nothing():
    sweep = Sweep(lambda k: {"y": np.full(4, k)}, {"k": [1, 2, 3, 4]}, draw, start={"k": 1})
    slider, figure, _, _ = parts(sweep.widget())
    sweep_live._turns.start()
    sweep_live._turns.start()  # as %%capture does
    sweep_live._turns.end()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(sweep.result, k=3).result(timeout=10)["y"][0] == 3
    with joblib.parallel_config("threading", n_jobs=2):
        sweep.compute()
    sweep_live._turns.end()
    sweep_live._turns.end()  # of a cell that began before there was a sweep
    slider.value = 4
    wait_for(lambda: shows(figure, 4))


def test_a_live_run_has_the_settings_of_the_cells():
    def run(k):
        return {"y": [k, torch.is_grad_enabled(), np.geterr()["over"] == "ignore", torch.empty(1).is_meta]}

    with torch.no_grad(), np.errstate(over="ignore"), torch.device("cpu"):
        sweep = Sweep(run, {"k": [1, 2]}, draw, start={"k": 1})
        slider, figure, _, _ = parts(sweep.widget())
        slider.value = 2
        wait_for(lambda: shows(figure, 2))
        assert list(figure.data[0].y) == list(sweep.figure(k=2).data[0].y) == [2, 0, 1, 0]
    slider.value = 1
    wait_for(lambda: shows(figure, 1))
    assert list(figure.data[0].y) == list(sweep.figure(k=1).data[0].y) == [1, 1, 0, 0]


def test_what_was_edited_while_a_run_was_going_is_not_stale():
    inside, gate, scale = threading.Event(), threading.Event(), {"factor": 1}

    def run(k):
        factor = scale["factor"]
        if k == 2:
            inside.set()
            gate.wait(10)
        return {"y": np.full(4, k * factor)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run depends on locks, and is not kept
        sweep = Sweep(run, {"k": [1, 2]}, draw, start={"k": 1})
        slider, figure, _, _ = parts(sweep.widget())
        slider.value = 2
        wait_for(inside.is_set)
        scale["factor"] = 10
        gate.set()
        wait_for(lambda: shows(figure, 2) or shows(figure, 20))
        assert sweep.figure(k=2).data[0].y[0] == 20


def test_the_first_figure_is_there_at_once_and_no_thread_stays():
    before = threading.active_count()
    for _ in range(5):
        slider, figure, _, _ = parts(
            Sweep(lambda k: {"y": np.full(4, k)}, {"k": [1, 2]}, draw, start={"k": 1}).widget()
        )
        assert shows(figure, 1)
        slider.value = 2
        wait_for(lambda figure=figure: shows(figure, 2))
    wait_for(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_leaving_a_run_is_said_and_the_sliders_live_on(error):
    def run(k):
        if k == 2:
            raise error
        return {"y": np.full(4, k)}

    slider, figure, message, _ = parts(Sweep(run, {"k": [1, 2, 3]}, draw, start={"k": 1}).widget())
    slider.value = 2
    wait_for(lambda: "SystemExit" in message.value or "Interrupted" in message.value)
    slider.value = 3
    wait_for(lambda: shows(figure, 3) and message.value == "")


def printed(box):
    return [(piece["name"], piece["text"]) for piece in box.children[-1].outputs]


@pytest.mark.filterwarnings("default")
def test_what_a_run_prints_stands_once_under_the_figure(capsys):
    def run(k):
        for _ in range(3):
            print("rate", k)
            warnings.warn("a steep rate", stacklevel=1)
        print("<b>end</b>", file=sys.stderr)
        return {"y": np.full(4, k)}

    before = sys.stdout, sys.stderr
    box = Sweep(run, {"k": [1, 2]}, draw, start={"k": 1}).widget()
    slider, figure, _, _ = parts(box)
    for k in (1, 2):
        slider.value = k
        wait_for(lambda k=k: shows(figure, k) and bool(printed(box)) and f"rate {k}" in printed(box)[0][1])
        texts = {name: "".join(text for n, text in printed(box) if n == name) for name in ("stdout", "stderr")}
        assert texts["stdout"] == f"rate {k}\n" * 3
        assert texts["stderr"].count("UserWarning: a steep rate") == 1
        assert texts["stderr"].endswith("<b>end</b>\n")
    slider.value = 1  # kept: nothing runs
    wait_for(lambda: shows(figure, 1) and not printed(box))
    wait_for(lambda: (sys.stdout, sys.stderr) == before)
    assert capsys.readouterr() == ("", "")


def test_what_the_cell_prints_meanwhile_stays_with_the_cell(capsys):
    inside, gate = threading.Event(), threading.Event()

    def run(k):
        if k == 2:
            inside.set()
            gate.wait(10)
        print("run", k)
        return {"y": np.full(4, k)}

    box = Sweep(run, {"k": [1, 2]}, draw, start={"k": 1}).widget()
    slider, figure, _, _ = parts(box)
    slider.value = 2
    wait_for(inside.is_set)
    print("cell")
    gate.set()
    wait_for(lambda: shows(figure, 2) and ("stdout", "run 2\n") in printed(box))
    assert capsys.readouterr().out == "cell\n"


def test_of_a_long_text_the_end_is_shown():
    def run(k):
        for line in range(20_000):
            print(line)
        return {"y": k}

    ((_, text),) = printed(Sweep(run, {"k": [1]}, lambda r, p: go.Figure()).widget())
    assert text.endswith("19998\n19999\n") and len(text) < 50_000


def test_an_interrupt_stops_the_run_and_the_next_drag_works():
    started = threading.Event()

    def run(k):
        for _ in range(3000 if k == 2 else 0):  # without `progress`, which would ask whether to go on
            started.set()
            time.sleep(0.01)
        return {"y": np.full(4, k)}

    slider, figure, message, _ = parts(Sweep(run, {"k": [1, 2, 3]}, draw, start={"k": 1}).widget())
    slider.value = 2
    wait_for(started.is_set)
    interrupts.stop_all()
    wait_for(lambda: "Interrupted" in message.value)
    interrupts.stop_all()  # nothing is at work
    slider.value = 3
    wait_for(lambda: shows(figure, 3) and message.value == "")


CELLS = [
    """
import time
import plotly.graph_objects as go
from polylib.lab import Sweep
def run(k):
    for _ in range(6000 if k == 2 else 0):
        time.sleep(0.01)
    return {"y": k}
box = Sweep(run, {"k": [1, 2]}, lambda r, p: go.Figure(), start={"k": 1}).widget()
""",
    "box.children[0].index = 1",
    "while 'Interrupted' not in box.children[2].value: time.sleep(0.01)",
]


def test_interrupting_an_idle_kernel_stops_the_run():
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    try:
        for cell in CELLS[:2]:
            assert client.execute_interactive(cell, timeout=60, output_hook=print)["content"]["status"] == "ok"
        kernel.interrupt_kernel()
        assert client.execute_interactive(CELLS[2], timeout=30, output_hook=print)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_an_edited_function_is_drawn_anew():
    scale = {"factor": 1}
    sweep = Sweep(lambda k: {"y": np.full(4, k * scale["factor"])}, {"k": [1, 2]}, draw, start={"k": 1})
    slider, figure, _, _ = parts(sweep.widget())
    slider.value = 2
    wait_for(lambda: shows(figure, 2))
    scale["factor"] = 10
    slider.value = 1
    wait_for(lambda: shows(figure, 10))


# Features of a figure, each of which must come and go with its point.
FEATURES = [
    lambda f: f.update_layout(title="a title"),
    lambda f: f.update_layout(height=600, showlegend=False),
    lambda f: f.add_hline(y=0.5),
    lambda f: f.add_annotation(text="here", x=1, y=1),
    lambda f: f.update_xaxes(type="log", range=[0, 2]),
    lambda f: f.update_xaxes(title="rate"),
    lambda f: f.update_yaxes(range=[0, 3], tickvals=[0, 1]),
    lambda f: f.update_traces(marker_color="red", marker_size=9),
    lambda f: f.update_traces(text=["a", "b", "c"], fill="tozeroy"),
    lambda f: f.add_scatter(y=[3, 2, 1], name="another"),
    lambda f: f.add_bar(y=[1, 1, 2]),
    lambda f: f.update_traces(line_dash="dot", selector={"type": "scatter"}),
]


def bare(figure):
    """What a figure says, without the names and sizes that a widget gives."""
    content = figure.to_plotly_json()
    layout = {
        k: v for k, v in content["layout"].items() if k not in ("autosize", "template") and v not in (None, [], {})
    }
    data = [{k: v for k, v in trace.items() if k != "uid"} for trace in content["data"]]
    return json.loads(json.dumps([data, layout], cls=PlotlyJSONEncoder))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.lists(st.sets(st.integers(0, len(FEATURES) - 1)), min_size=2, max_size=4))
def test_after_any_move_the_live_figure_is_the_plain_one(points):
    def view(result, point):
        figure = go.Figure(go.Scatter(y=[1, 2, point["k"]]))
        for number in sorted(points[point["k"]]):
            FEATURES[number](figure)
        return figure

    sweep = Sweep(lambda k: {"y": k}, {"k": list(range(len(points)))}, view, start={"k": 0})
    shown = sweep_live._Live(sweep)
    for place in [*range(len(points)), *reversed(range(len(points)))]:
        shown.draw((place,))
        assert shown.message.value == ""
        assert bare(shown.figure) == bare(sweep.figure(k=place))
