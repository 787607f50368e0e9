import base64
import json

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from polylib.lab import colour, knob_axis, panels, power_axis, ring, with_spread
from polylib.lab.figures import PALETTE, pack, template


def unpack(packed, number):
    """What assets/polylib.js does, in Python."""
    skeleton, *arrays = packed["figures"][number]
    rest = iter(arrays)

    def fill(value):
        if isinstance(value, dict) and "$" in value:
            stored = packed["arrays"][next(rest)]
            kind, data = ("f4", stored) if isinstance(stored, str) else (stored["dtype"], stored["bdata"])
            data = np.frombuffer(base64.b64decode(data), f"<{kind}")
            return data.reshape(value["$"]).tolist()
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    return fill(packed["skeletons"][skeleton])


def test_unpacking_gives_the_figures_back_and_equal_parts_are_stored_once():
    x = np.arange(50)
    figures = [go.Figure([go.Scatter(x=x, y=x * k, name="line"), go.Heatmap(z=np.ones((3, 4)) * k)]) for k in (1, 2, 3)]
    figures.append(go.Figure(go.Bar(x=["a", "b"], y=[1.5, np.nan, 2, 3, 4])))
    packed = json.loads(json.dumps(pack(figures), allow_nan=False))
    assert len(packed["skeletons"]) == 2 and len(packed["arrays"]) == 1 + 3 + 2 + 1  # x * 1 is x
    for number, figure in enumerate(figures):
        again = go.Figure(unpack(packed, number))
        for trace, expected in zip(again.data, figure.data, strict=True):
            assert (trace.type, trace.name) == (expected.type, expected.name)
            for name in ("x", "y", "z"):
                if name in expected and expected[name] is not None and not isinstance(expected[name][0], str):
                    np.testing.assert_allclose(np.array(trace[name], float), np.array(expected[name], float))


def test_each_panel_has_its_title_and_axes():
    figure = panels("loss", "accuracy")
    figure.add_scatter(y=[1, 2], row=1, col=2)
    assert [a.text for a in figure.layout.annotations] == ["loss", "accuracy"]
    assert figure.data[0].xaxis == "x2" and figure.layout.annotations[1].xref == "x2 domain"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize(("theme", "page"), [("light", "#ffffff"), ("dark", "#121212")])
def test_text_and_lines_stand_out_from_the_page(theme, page):
    def contrast(colour):
        a, b = sorted((luminance(colour) + 0.05, luminance(page) + 0.05))
        return b / a

    assert contrast(template(theme).layout.font.color) > 7
    assert min(contrast(colour) for colour in PALETTE[theme]) > 2.3


def test_an_unknown_theme_raises():
    with pytest.raises(ValueError, match="sepia"):
        template("sepia")


def test_values_that_float32_would_change_keep_their_type():
    values = [20000001, 20000002], [1e39, 1.0], [1e-50, 1.0], [1.00000001, 1.00000002], [16777217.0]
    for given in values:
        packed = json.loads(json.dumps(pack([go.Figure(go.Scatter(y=np.array(given)))]), allow_nan=False))
        assert go.Figure(unpack(packed, 0)).data[0].y == pytest.approx(given, rel=1e-15)
    small = pack([go.Figure(go.Scatter(y=np.linspace(0, 1, 50)))])["arrays"]
    assert [len(base64.b64decode(array)) for array in small] == [200]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_becomes_a_gap(bad):
    figure = go.Figure(
        go.Bar(x=["a", "b"], y=[bad, 1.0]), layout={"title": f"loss {bad}", "yaxis": {"range": [0, bad]}}
    )
    figure.add_hline(y=bad)
    figure.add_scatter(x=[1], y=[bad], text=[bad])
    again = unpack(json.loads(json.dumps(pack([figure]), allow_nan=False)), 0)
    assert again["layout"]["yaxis"]["range"] == [0, None] and again["layout"]["shapes"][0]["y0"] is None
    assert again["data"][0]["y"][1] == 1.0 and not np.isfinite(again["data"][0]["y"][0])


def test_dates_and_ranges_stay_what_they_are():
    days = np.array(["2024-01-01", "2024-02-01"], "datetime64[D]")
    figure = go.Figure([go.Scatter(x=days, y=[1, 2]), go.Pie(values=[1, 2], domain={"x": [0, 0.5]})])
    figure.update_xaxes(range=[0, 1], domain=[0.1, 0.4])
    again = unpack(json.loads(json.dumps(pack([figure]))), 0)
    assert again["data"][0]["x"] == ["2024-01-01", "2024-02-01"]
    packed = pack([figure])["skeletons"][0]
    assert packed["layout"]["xaxis"]["domain"] == [0.1, 0.4] and packed["data"][1]["domain"]["x"] == [0, 0.5]


def test_a_marker_is_one_point():
    figures = [ring(go.Figure(), k, k / 3) for k in range(1, 4)]
    packed = pack(figures)
    assert len(packed["skeletons"]) == 1
    for k, row in enumerate(packed["figures"], start=1):
        x, y = unpack(packed, k - 1)["data"][0]["x"], unpack(packed, k - 1)["data"][0]["y"]
        assert len(row) == 3 and x == [k] and y == pytest.approx([k / 3], rel=1e-7)


def test_a_line_has_bars_from_the_smallest_to_the_largest_seed():
    values = torch.tensor([[1.0, 4.0, 1.0], [2.0, 2.0, 8.0]])
    centres = {"mean": [2, 4], "median": [1, 2], "geometric": [4 ** (1 / 3), 32 ** (1 / 3)]}
    for centre, expected in centres.items():
        line = with_spread(panels("a", "b"), [1, 2], values, "baseline", centre=centre, panel=2, name="SGD").data[0]
        assert line.y == pytest.approx(expected) and line.xaxis == "x2" and line.name == "SGD"
        assert line.y + line.error_y.array == pytest.approx([4, 8])
        assert line.y - line.error_y.arrayminus == pytest.approx([1, 2])
        assert line.line.color == colour("baseline")
    with pytest.raises(ValueError, match=r"values must have shape \(3, seeds\), as x, got \(2, 3\)"):
        with_spread(go.Figure(), [1, 2, 3], values)
    with pytest.raises(ValueError, match=r"role must be one of 'method', .*, got 'ours'"):
        with_spread(go.Figure(), [1, 2], values, "ours")
    with pytest.raises(ValueError, match="panel must be an integer of at least 1, got 0"):
        ring(panels("a"), 1, 1, panel=0)


def test_axes_of_powers_and_of_the_values_of_a_knob():
    figure = panels("a", "b")
    power_axis(knob_axis(figure, "x", [0.9, 0.99, 0.9999], title="beta", panel=1), "y", range=[-3, 0], panel=2)
    assert figure.layout.xaxis.ticktext == ("0.9", "0.99", "0.9999") and figure.layout.xaxis.tickvals == (0, 1, 2)
    assert figure.layout.xaxis.title.text == "beta" and figure.layout.yaxis2.type == "log"
    assert figure.layout.yaxis2.range == (-3, 0) and figure.layout.yaxis.type is None
    with pytest.raises(ValueError, match="axis must be one of 'x', 'y', got 'z'"):
        power_axis(figure, "z")
