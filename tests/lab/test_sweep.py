import base64
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings

import joblib
import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from polylib.lab import Sweep
from polylib.lab.store import cache_folder
from polylib.lab.surroundings import settings

KNOBS = {"slope": [0.5, 1.0, 2.0], "offset": [0, 1]}


def line(slope, offset):
    x = np.linspace(0, 1, 20)
    return {"x": x, "y": slope * x + offset}


def draw(result, point):
    return go.Figure(go.Scatter(x=result["x"], y=result["y"]))


def content(page):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1].replace("<\\/", "</"))


def test_html_holds_every_figure_of_the_grid_in_the_order_of_the_points():
    sweep = Sweep(line, KNOBS, draw)
    packed = content(sweep.html())
    assert [knob["label"] for knob in packed["knobs"]] == ["slope", "offset"]
    assert [knob["values"] for knob in packed["knobs"]] == [["0.5", "1", "2"], ["0", "1"]]
    assert len(packed["figures"]) == 6 and len(packed["skeletons"]) == 1
    for point, (_, *arrays) in zip(sweep.points(), packed["figures"], strict=True):
        x, y = (np.frombuffer(base64.b64decode(packed["arrays"][i]), "<f4") for i in arrays)
        np.testing.assert_allclose(x, line(**point)["x"], rtol=1e-6)
        np.testing.assert_allclose(y, line(**point)["y"], rtol=1e-6)


def test_three_hundred_points_stay_under_one_megabyte():
    def run(a, b):
        rng = np.random.default_rng([a, b])
        return {"curves": rng.standard_normal((4, 100))}

    def view(result, point):
        figure = go.Figure()
        for curve in result["curves"]:
            figure.add_scatter(x=np.arange(100), y=curve)
        return figure

    page = Sweep(run, {"a": list(range(30)), "b": list(range(10))}, view).html()
    assert 300 * 4 * 100 * 4 < len(page) < 1_000_000  # not under the entropy of the data, so nothing was lost


def test_a_batched_knob_needs_one_run_for_all_its_values():
    calls = []

    def run(slope, offset):
        calls.append(offset)
        assert slope == KNOBS["slope"]
        results = [line(s, offset) for s in slope]
        return {name: np.stack([r[name] for r in results]) for name in ("x", "y")}

    batched = Sweep(run, KNOBS, draw, batch="slope")
    plain = Sweep(line, KNOBS, draw)
    for point in plain.points():
        np.testing.assert_array_equal(batched.result(**point)["y"], plain.result(**point)["y"])
    assert calls == [0, 1]


def test_what_all_values_of_the_batched_knob_share_is_returned_once():
    def run(slope, offset):
        each = {"y": np.stack([line(s, offset)["y"] for s in slope])}
        return each, {"ends": [s + offset for s in slope], "offset": offset}

    def view(result, point):
        return go.Figure(go.Scatter(x=[point["slope"]], y=[result["ends"][KNOBS["slope"].index(point["slope"])]]))

    for sweep in (Sweep(run, KNOBS, view, batch="slope"), Sweep(run, KNOBS, view, batch="slope")):  # computed, recalled
        for point in sweep.points():
            result = sweep.result(**point)
            np.testing.assert_array_equal(result["y"], line(**point)["y"])
            assert result["ends"].tolist() == [slope + point["offset"] for slope in KNOBS["slope"]]
            assert int(result["offset"]) == point["offset"]
            assert sweep.figure(**point).data[0].y == (point["slope"] + point["offset"],)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (({"y": [1, 2]}, {"y": [1, 2]}), ValueError, "each name once, got 'y' in both"),
        (({"y": 1}, {}), ValueError, r"'y' with a first axis of 2.* second dict.*got shape \(\)"),
        (({}, {}), TypeError, "at least one entry"),
        (({"y": [1, 2]}, 3), TypeError, "a pair of dicts, got a tuple"),
    ],
)
def test_a_pair_that_does_not_fit_raises(returned, error, words):
    with pytest.raises(error, match=words):
        Sweep(lambda slope: returned, {"slope": [1, 2]}, draw, batch="slope").result(slope=1)


def test_a_pair_needs_a_batched_knob():
    with pytest.raises(ValueError, match="one dict where no knob is batched, got a pair"):
        Sweep(lambda slope: ({"y": 1}, {"z": 2}), {"slope": [1, 2]}, draw).result(slope=1)


def test_values_of_any_kind_stand_under_labels():
    knobs = {
        "weights": {"ones": np.ones(3), "ramp": [1, 2, 3], "both": {"a": 1}},
        "function": {"abs": abs, "neg": lambda x: -x},
    }

    def run(weights, function):
        values = list(weights.values()) if isinstance(weights, dict) else weights
        return {"y": [function(-value) for value in values]}

    sweep = Sweep(run, knobs, draw_titled, start={"weights": "ramp"})
    assert [knob["values"] for knob in content(sweep.html())["knobs"]] == [["ones", "ramp", "both"], ["abs", "neg"]]
    assert sweep.result(weights="ramp", function="abs")["y"].tolist() == [1, 2, 3]
    assert sweep.result(weights=[1, 2, 3], function=abs)["y"].tolist() == [1, 2, 3]
    assert [sweep.figure(**point).layout.title.text for point in sweep.points()][:2] == ["ndarray", "ndarray"]
    assert sweep.start["weights"] == [1, 2, 3]


def draw_titled(result, point):
    return go.Figure(go.Scatter(y=result["y"]), layout={"title": type(point["weights"]).__name__})


def test_labels_that_name_another_value_are_refused():
    with pytest.raises(ValueError, match="labels that name no other value, got 'b'"):
        Sweep(lambda k: {"y": 1}, {"k": {"b": "a", "a": "c"} | {"c": "b"}}, draw)
    with pytest.raises(TypeError, match="text as its labels, got 1"):
        Sweep(lambda k: {"y": 1}, {"k": {1: "a"}}, draw)


def test_a_short_grid_runs_in_this_process_and_a_long_one_does_not(monkeypatch):
    def run(slope, offset):
        time.sleep(pause)
        return {"process": os.getpid()}

    def processes():
        sweep = Sweep(run, KNOBS, draw)
        sweep.compute()
        return {int(sweep.result(**point)["process"]) for point in sweep.points()}

    pause = 0.0
    assert processes() == {os.getpid()}
    monkeypatch.setattr("polylib.lab.grid.SHORT", 0.5)
    pause = 0.4
    assert os.getpid() in processes() and len(processes()) > 1


def in_two_processes():
    return joblib.parallel_config("loky", n_jobs=2)


def test_other_processes_have_the_settings_of_the_notebook():
    def run(x):
        with np.errstate(**({"over": "ignore"} if x == 0 else {})):
            return {"y": torch.tensor(1.0) / 3, "over": np.geterr()["over"], "process": os.getpid()}

    torch.set_default_dtype(torch.float64)
    try:
        with np.errstate(over="raise"), in_two_processes():
            sweep = Sweep(run, {"x": [0, 1, 2]}, draw)
            sweep.compute()
            found = [sweep.result(x=x) for x in (0, 1, 2)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [one["y"].dtype for one in found] == [np.float64] * 3
    assert [str(one["over"]) for one in found] == ["ignore", "raise", "raise"]
    assert os.getpid() not in {int(one["process"]) for one in found}


def test_a_module_that_was_edited_counts_in_other_processes_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "edited_helper.py"
    for factor in (2, 300):
        file.write_text(f"def scaled(x): return {factor} * x\n")
        importlib.invalidate_caches()
        helper = importlib.import_module("edited_helper")
        importlib.reload(helper)

        def run(x, helper=helper):
            return {"y": helper.scaled(x)}

        with in_two_processes():
            sweep = Sweep(run, {"x": [1, 2, 3]}, draw)
            sweep.compute()
        for shown in (sweep, Sweep(run, {"x": [1, 2, 3]}, draw)):
            assert [int(shown.result(x=x)["y"]) for x in (1, 2, 3)] == [factor, 2 * factor, 3 * factor]


def test_what_other_processes_can_not_have_runs_here(monkeypatch):
    lock, only_here = threading.Lock(), types.ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    exec("def same(x): return x", vars(only_here))

    def locked(x):
        with lock:
            return {"y": x, "process": os.getpid()}

    for run in (locked, lambda x, same=only_here.same: {"y": same(x), "process": os.getpid()}):
        sweep = Sweep(run, {"x": [1, 2, 3]}, draw)
        with in_two_processes(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not kept
            sweep.compute()
            assert [int(sweep.result(x=x)["y"]) for x in (1, 2, 3)] == [1, 2, 3]
            assert {int(sweep.result(x=x)["process"]) for x in (1, 2, 3)} == {os.getpid()}


def test_threads_do_not_share_random_state():
    def run(x):
        return {"y": torch.stack([torch.rand(()) for _ in range(100)])}

    with joblib.parallel_config("threading", n_jobs=3):
        sweep = Sweep(run, {"x": [1, 2, 3]}, draw)
        sweep.compute()
    for x in (2, 3):
        np.testing.assert_array_equal(sweep.result(x=x)["y"], sweep.result(x=1)["y"])


def test_a_run_that_changes_a_global_in_another_process_is_not_kept():
    count = [0]

    def run(x):
        count[0] += 1
        return {"y": x + count[0]}

    with in_two_processes(), pytest.warns(UserWarning, match="not kept on disk: run changes count"):
        Sweep(run, {"x": [10, 20, 30]}, draw).compute()
    assert not list(cache_folder().rglob("output.pkl"))


def test_a_warning_of_runs_in_other_processes_is_told_once():
    def run(x):
        warnings.warn("a steep rate", stacklevel=1)
        return {"y": x}

    with warnings.catch_warnings(record=True) as told, in_two_processes():
        warnings.simplefilter("default")
        Sweep(run, {"x": [1, 2, 3, 4]}, draw).compute()
    assert [str(one.message) for one in told] == ["a steep rate"]


def test_state_is_as_before_after_a_run_and_a_view():
    def changing(x=0, result=None, point=None):
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        np.seterr(all="ignore")
        warnings.simplefilter("error")
        drawn = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return go.Figure(go.Scatter(y=drawn[1])) if point else {"t": drawn[0], "n": drawn[1], "p": drawn[2]}

    def state():
        numbers = np.random.get_state()[1].tolist()  # noqa: NPY002
        return settings(), warnings.filters[:], torch.get_rng_state().tolist(), numbers, random.getstate()

    sweep = Sweep(lambda x: changing(x), {"x": [1, 2]}, lambda result, point: changing(result=result, point=point))
    before = state()
    for use in (sweep.compute, lambda: sweep.result(x=1), lambda: sweep.figure(x=1), sweep.html):
        use()
        assert state() == before
    assert sweep.figure(x=1) == sweep.figure(x=1) and sweep.figure(x=1).data[0].y[0] == sweep.result(x=1)["n"][0]


def test_finished_points_are_found_again_and_changed_code_is_not():
    calls = []

    def counted(slope, offset):
        calls.append((slope, offset))
        return line(slope, offset)

    def shown(run):
        return Sweep(run, KNOBS, draw).result(slope=1.0, offset=1)["y"]

    first = shown(counted)
    count = len(calls)
    np.testing.assert_array_equal(shown(counted), first)

    def doubled(slope, offset):
        return {name: 2 * value for name, value in line(slope, offset).items()}

    np.testing.assert_array_equal(shown(doubled), 2 * first)
    assert count == 1


def test_a_changed_global_or_helper_changes_the_key():
    def made(factor, helper):
        def run(slope, offset):
            return {name: float(factor) * value for name, value in helper(slope, offset).items()}

        return Sweep(run, KNOBS, draw).result(slope=1.0, offset=1)["y"]

    def other(slope, offset):
        return line(-slope, offset)

    results = [made(1.0, line), made(3.0, line), made(1.0, other), made(torch.tensor(2.0), line)]
    assert len({tuple(result) for result in results}) == 4


def test_kill_in_the_middle_of_a_grid_loses_no_finished_point(tmp_path):
    script = tmp_path / "grid.py"
    script.write_text(
        textwrap.dedent("""
        import pathlib, sys, time
        import numpy as np
        import plotly.graph_objects as go
        from polylib.lab import Sweep

        log = pathlib.Path(sys.argv[1])

        def run(point):
            with log.open("a") as file:
                file.write(f"{point}\\n")
            if point >= 4 and len(sys.argv) > 2:
                time.sleep(60)
            return {"y": np.full(5, point)}

        Sweep(run, {"point": list(range(8))}, lambda r, p: go.Figure(go.Scatter(y=r["y"]))).compute()
        """)
    )
    log = tmp_path / "log"
    environment = {**os.environ, "LOKY_MAX_CPU_COUNT": "1"}
    first = subprocess.Popen([sys.executable, script, log, "slow"], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while (not log.exists() or "4" not in log.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert log.read_text().split() == list("01234")
    log.unlink()
    # the second run has another argument list, so its code and data must be the same for its key to be
    subprocess.run([sys.executable, script, log], env=environment, check=True, timeout=60)
    assert sorted(log.read_text().split()) == list("4567")


def test_a_dask_cluster_gives_the_same_results():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        there = Sweep(line, KNOBS, draw)
        there.compute()
    here = Sweep(lambda slope, offset: line(slope, offset), KNOBS, draw)
    for point in here.points():
        np.testing.assert_array_equal(there.result(**point)["y"], here.result(**point)["y"])


def test_an_error_names_itself_and_keeps_the_finished_points():
    def run(slope, offset):
        if slope == 2.0:
            raise FloatingPointError("too steep")
        return line(slope, offset)

    sweep = Sweep(run, KNOBS, draw)
    with pytest.raises(FloatingPointError, match="too steep"), joblib.parallel_config(n_jobs=1):
        sweep.compute()
    assert sweep.result(slope=0.5, offset=0)["y"][0] == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"knobs": {}}, ValueError, "knobs must be a dict with at least one knob"),
        ({"knobs": {"slope": [], "offset": [1]}}, ValueError, r"knobs\['slope'\] must have at least one value"),
        ({"knobs": {"slope": [1, 1], "offset": [1]}}, ValueError, "different values, got 1 twice"),
        ({"knobs": {"slope": [1]}}, ValueError, "offset"),
        ({"knobs": {**KNOBS, "width": [1]}}, ValueError, "width"),
        ({"batch": "width"}, ValueError, "batch"),
        ({"start": {"slope": 7}}, ValueError, r"start\['slope'\] must be one of .*, got 7"),
        ({"run": 3}, TypeError, "run must be a function, got 3"),
        ({"view": lambda result: go.Figure()}, ValueError, "view must take result, point"),
        ({"labels": {"slop": "slope"}}, ValueError, "labels must name knobs"),
        ({"labels": ["slope"]}, TypeError, "labels must be a dict of texts, got .'slope'."),
        ({"start": 3}, TypeError, "start must be a dict of values, got 3"),
        ({"knobs": {1: [1]}}, TypeError, "knobs must have the names of arguments as its keys, got 1"),
        ({"knobs": {"slope": "relu", "offset": [1]}}, TypeError, "must be a list of values or a dict"),
        ({"knobs": {"slope": [lambda x: x], "offset": [1]}}, TypeError, "a function without a name"),
        ({"knobs": {"slope": [[8], [8, 16]], "offset": [1]}}, TypeError, "values like list"),
    ],
)
def test_bad_arguments_raise_before_any_work(arguments, error, words):
    with pytest.raises(error, match=words):
        Sweep(**{"run": line, "knobs": KNOBS, "view": draw, **arguments})


def test_bad_results_raise():
    with pytest.raises(TypeError, match="dict of arrays"):
        Sweep(lambda slope: 3, {"slope": [1]}, draw).result(slope=1)
    with pytest.raises(ValueError, match="first axis of 3"):
        Sweep(lambda slope: {"y": [1, 2]}, {"slope": [1, 2, 3]}, draw, batch="slope").result(slope=1)
    with pytest.raises(ValueError, match=r"slope must be one of .*, got 9"):
        Sweep(line, KNOBS, draw).result(slope=9, offset=0)


def test_a_knob_may_have_any_name():
    for name in ("self", "point", "run", "a b"):
        sweep = Sweep(lambda **knobs: {"x": [0], "y": list(knobs.values())}, {name: [1, 2]}, draw)
        assert sweep.result(**{name: 1})["y"].tolist() == [1] and sweep.figure(**{name: 2}).data[0].y.tolist() == [2]


def test_a_value_of_a_tensor_or_an_array_is_found():
    values = torch.linspace(0, 1, 3)
    sweep = Sweep(lambda x: {"y": x}, {"x": values}, draw)
    assert [float(sweep.result(x=value)["y"]) for value in (values[1], values.numpy()[1], np.array(0.5))] == [0.5] * 3


def test_a_figure_with_frames_is_refused():
    def view(result, point):
        return go.Figure(go.Scatter(y=[1]), frames=[go.Frame(data=[go.Scatter(y=[2])])])

    with pytest.raises(ValueError, match="view must return a figure without frames, got one with 1"):
        Sweep(lambda x: {"y": x}, {"x": [1]}, view).figure(x=1)


def test_a_run_that_depends_on_a_lock_is_shown_and_not_kept():
    lock = threading.Lock()

    def run(slope, offset):
        with lock:
            return line(slope, offset)

    for _ in range(2):
        with pytest.warns(UserWarning, match="not kept on disk: run depends on lock, a lock, which can't be read"):
            assert Sweep(run, KNOBS, draw).result(slope=1.0, offset=1)["y"][0] == 1
    assert not list(cache_folder().rglob("output.pkl"))


def test_plain_text_names_knobs_and_values():
    assert "slope: 0.5, 1, 2" in Sweep(line, KNOBS, draw)._repr_mimebundle_()["text/plain"]
