"""What a sweep keeps is what the run returned, whatever is done to it afterwards; and where it can't be kept, the
reader still sees it."""

import datetime
import json
import multiprocessing
import os
import re
import resource
import warnings
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from polylib.lab import Sweep, store
from polylib.lab.results import frozen
from polylib.lab.wording import written


def draw(result, point):
    return go.Figure(go.Scatter(y=np.ravel(result["y"])))


def sweep(run, **knobs):
    return Sweep(run, knobs or {"x": [1, 2, 3]}, draw)


# Under the reader's hands


def test_a_view_that_changes_its_argument_changes_nothing_that_is_kept():
    def view(result, point):
        copy = result["y"] * 100
        with pytest.raises(ValueError, match="read-only"):
            result["y"] *= 100
        result["y"] = copy  # the dict is the view's own
        return draw(result, point)

    shown = Sweep(lambda x: {"y": np.full(3, 0.1 * x)}, {"x": [1, 2]}, view)
    assert [shown.figure(x=1).data[0].y[0] for _ in range(3)] == [pytest.approx(10)] * 3


@pytest.mark.parametrize("batch", [None, "x"])
def test_a_result_can_not_be_changed_from_outside(batch):
    def run(x):
        return {"y": np.ones((len(x), 4)) if batch else np.ones(4)}

    kept = Sweep(run, {"x": [1, 2]}, draw, batch=batch)
    for change in (lambda r: r["y"].__isub__(1), lambda r: r["y"].sort(), lambda r: r["y"][:2].fill(7)):
        with pytest.raises(ValueError, match="read-only"):
            change(kept.result(x=1))
    kept.result(x=1)["y"] = 3
    assert kept.result(x=1)["y"].tolist() == [1] * 4
    assert kept.result(x=2)["y"].tolist() == [1] * 4


def test_a_buffer_that_each_run_fills_anew_gives_each_point_its_own():
    buffer, tensor = np.zeros(2), torch.zeros(2)
    layer = torch.nn.Linear(1, 1, bias=False)

    def run(x):
        buffer[:] = x
        tensor.fill_(x)
        layer.weight.data.fill_(x)
        return {"y": buffer, "view": buffer[:1], "tensor": tensor, "weight": layer.weight, "list": [tensor, tensor]}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run changes what it depends on, and says so
        kept = sweep(run)
        kept.compute()
        for x in (1, 2, 3):
            assert all((array == x).all() for array in kept.result(x=x).values())


def test_knobs_that_a_run_changes_stay_as_they_were():
    calls = []

    def run(x, weights):
        calls.append(sorted(x) == x)
        x.sort(reverse=True)
        weights["a"].append(1)
        return {"y": [len(weights["a"])] * 3}

    given = {"x": [1, 2, 3], "weights": {"one": {"a": []}, "two": {"a": [1]}}}
    kept = Sweep(run, given, draw, batch="x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [int(kept.result(x=1, weights=name)["y"]) for name in ("one", "two", "one")] == [1, 2, 1]
    assert calls == [True, True]
    assert kept.knobs["x"] == [1, 2, 3] and kept.knobs["weights"] == [{"a": []}, {"a": [1]}]
    assert given["weights"] == {"one": {"a": []}, "two": {"a": [1]}}


def test_knobs_of_a_caller_who_changes_the_list_stay_as_they_were():
    values = [1, 2, 3]
    kept = Sweep(lambda x: {"y": x}, {"x": values}, draw)
    values.clear()
    kept.knobs["x"].clear()
    assert kept.knobs["x"] == [1, 2, 3]


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, True, False],
        [1, 1.0],
        [1, True],
        [0.0, -0.0],
        [1.0, np.float32(1)],
        ["1", 1],
        [None, "None"],
        [2, 2 + 0j],
    ],
)
def test_equal_values_of_different_types_are_different_points(values):
    kept = Sweep(lambda x: {"y": repr(x)}, {"x": values}, draw)
    assert [str(kept.result(x=value)["y"]) for value in values] == list(map(repr, values))
    assert len(set(kept.grid["x"].texts)) == len(values)
    again = Sweep(lambda x: {"y": repr(x)}, {"x": values[::-1]}, draw)  # from disk
    assert [str(again.result(x=value)["y"]) for value in values] == list(map(repr, values))


def test_nan_is_one_value():
    with pytest.raises(ValueError, match="different values, got nan twice"):
        Sweep(lambda x: {"y": x}, {"x": [float("nan"), np.nan]}, draw)
    assert np.isnan(Sweep(lambda x: {"y": x}, {"x": [float("nan"), 1]}, draw).result(x=float("nan"))["y"])


# What a run may return


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.5, 2], dtype=torch.bfloat16), [1.5, 2]),
        (torch.tensor([1.5, 2], dtype=torch.float8_e5m2), [1.5, 2]),
        ([torch.ones(2, requires_grad=True), torch.zeros(2)], [[1, 1], [0, 0]]),
        ([torch.tensor(1.0, requires_grad=True) * 2, 3], [2, 3]),
        (torch.tensor([1 + 2j]).conj(), [1 - 2j]),
        ((1, 2), [1, 2]),
        (True, True),
        ("text", "text"),
        (["a", "bc"], ["a", "bc"]),
        (np.float32(2), 2),
        (np.array(["2024-01-01"], "datetime64[D]"), [datetime.date(2024, 1, 1)]),
        ([], []),
        (torch.nn.Parameter(torch.ones(1)), [1]),
        (np.ma.masked_array([1.0, 2.0], [False, False]), [1, 2]),
        ([2**53 + 1, 3], [2**53 + 1, 3]),
        ([2.0**60, 3], [2**60, 3]),
        ([np.array("a"), "bc"], ["a", "bc"]),
    ],
)
def test_what_can_be_shown_comes_back_as_an_array(value, expected):
    for _ in range(2):  # computed, and from disk
        assert sweep(lambda x: {"y": value}).result(x=1)["y"].tolist() == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, None],
        [[1, 2], [3]],
        {"a": 1},
        {1, 2},
        object(),
        datetime.date(2024, 1, 1),
        lambda: 3,
        np.array([None]),
        [1, "a"],
        [[1.5, 2.5], [float("nan"), "a"]],
        ["a", b"b"],
        [2**53 + 1, 0.5],
        np.ma.masked_array([1.0, 2.0], [True, False]),
        [1.0, np.ma.masked],
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
)
def test_what_can_not_be_shown_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"run must return 'loss' as numbers, .*, got a "):
        sweep(lambda x: {"loss": value}).result(x=1)


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="text as its keys, got the key 1"):
        sweep(lambda x: {1: 2}).result(x=1)


def test_a_run_that_diverges_still_gives_its_page():
    def run(x):
        with np.errstate(over="ignore", invalid="ignore"):
            growth = np.float32(10.0**x) ** np.arange(30, dtype=np.float32)
            return {"y": growth, "last": growth[-1], "difference": growth[-1] - growth[-1]}

    def view(result, point):
        figure = go.Figure(go.Scatter(y=result["y"]), layout={"title": f"loss {result['last']:.3g}"})
        figure.add_hline(y=float(result["difference"]))
        figure.add_annotation(x=1, y=float(result["last"]), text=f"{result['difference']}")
        figure.add_bar(x=["a", "b"], y=[float(result["last"]), float(result["difference"])])
        return figure.update_yaxes(range=[0, float(result["last"])])

    page = Sweep(run, {"x": [0, 1, 2, 3]}, view).html()
    packed = json.loads(re.search(r'"application/json">(.*?)</script>', page, re.S)[1], parse_constant=pytest.fail)
    assert len(packed["figures"]) == 4


# On disk


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", [b"", b"\x80\x05", b"x" * 1000, None])
def test_a_damaged_file_is_computed_again(damage):
    def run(x):
        return {"y": np.full(100, x)}

    sweep(run).compute()
    kept = files(store.cache_folder())
    assert len(kept) == 3
    for path in kept:
        path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    for _ in range(2):
        assert sweep(run).result(x=2)["y"].tolist() == [2] * 100
    assert sorted(path.stat().st_size for path in files(store.cache_folder()))[-1] > 800


def test_a_folder_where_nothing_can_be_written_costs_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning) as told:
        for _ in range(2):
            shown = sweep(lambda x: {"y": 2 * x})
            shown.compute()
            assert [int(shown.result(x=x)["y"]) for x in (1, 2, 3)] == [2, 4, 6]
    assert [str(one.message).startswith(f"results can't be kept in {tmp_path}/file/cache (") for one in told] == [True]


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.warns(UserWarning, match="results can't be kept in .*File too large.* computed each time") as told:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as on a disk with room for 100 bytes
        try:
            shown = sweep(lambda x: {"y": np.full(5000, x)})
            shown.compute()
            assert [shown.result(x=x)["y"][0] for x in (1, 2, 3)] == [1, 2, 3]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(told) == 1 and not files(store.cache_folder())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_processes_that_write_the_same_point_never_show_half_of_it():
    def write(number):
        for turn in range(100):
            store.save("key", "name", ({"y": np.full(3000, number), "turn": np.array(turn)}, {}))

    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = store.load("key", "name")
        assert found is None or len(set(found[0]["y"].tolist())) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert int(store.load("key", "name")[0]["turn"]) == 99 and len(files(store.cache_folder())) == 1


@pytest.mark.parametrize("name", ["POLYLIB_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_setting_counts_as_unset(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("POLYLIB_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    usual = store.cache_folder()
    monkeypatch.setenv(name, "")
    assert store.cache_folder() == usual == tmp_path / "home" / ".cache" / "polylib"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert store.cache_folder() == tmp_path / "home" / "elsewhere" / "polylib"
    sweep(lambda x: {"y": x}).result(x=1)
    assert os.listdir(tmp_path) == ["home"]


# In words


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.9999, 0.99999], ["0.9999", "0.99999"]),
        ([0.9, 0.99, 0.999], ["0.9", "0.99", "0.999"]),
        ([1000.0, 1001.0, 1e6, 1e-7], ["1000", "1001", "1e+06", "1e-07"]),
        ([1 / 3, 1 / 3 + 1e-9], ["0.333333333", "0.333333334"]),
        ([0.1, 0.1 + 2**-56], None),
        ([1, True, 1.0, "1"], None),
        (["a", "a "], ["a", "a "]),
        ([(1, 2.0), (1, 2)], None),
        ([torch.float32, torch.bfloat16], ["torch.float32", "torch.bfloat16"]),
    ],
)
def test_values_that_differ_read_differently(values, texts):
    found = written(values)
    assert len(set(found)) == len(values)
    if texts is not None:
        assert found == texts


def test_text_in_labels_and_values_is_escaped_on_every_face():
    nasty = '</pre></script><b title="x">&amp;'
    shown = Sweep(lambda x: {"y": 1}, {"x": [nasty, "b"]}, draw, labels={"x": nasty})
    page = shown.html()
    head, _, tail = page.partition("</script>")  # the end of the data, and of no label
    assert "</pre" not in head and "<b" not in head
    packed = json.loads(re.search(r'"application/json">(.*)', head, re.S)[1])
    assert packed["knobs"][0]["label"] == nasty and packed["knobs"][0]["values"][0] == nasty
    assert "<b" not in tail and tail.count("</pre>") == 1 and "&lt;/pre&gt;&lt;/script&gt;&lt;b title=" in tail
    slider = shown.widget().children[0]
    assert slider.description == nasty and not slider.description_allow_html
    assert shown.table().count(nasty) == 2  # plain text needs no escape


@pytest.mark.parametrize(
    ("given", "kept"), [("f2", "f4"), (">f8", "f8"), (">i4", "i4"), ("g", "f8"), ("u8", "u8"), ("c8", "c8")]
)
def test_arrays_have_a_type_that_browsers_know(given, kept):
    found = sweep(lambda x: {"y": np.array([1.5, 2, 3], given)}).result(x=1)["y"]
    assert found.dtype == np.dtype(kept) and found.tolist() == np.array([1.5, 2, 3], given).tolist()


def test_frozen_keeps_the_shape():
    assert frozen(np.ones((2, 0))).shape == (2, 0) and not frozen(3).flags.writeable
