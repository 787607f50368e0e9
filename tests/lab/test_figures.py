import base64
import json

import numpy as np
import plotly.graph_objects as go
import pytest

from polylib.lab import panels
from polylib.lab.figures import PALETTE, pack, template


def unpack(packed, number):
    """What assets/polylib.js does, in Python."""
    skeleton, *arrays = packed["figures"][number]
    rest = iter(arrays)

    def fill(value):
        if isinstance(value, dict) and "$" in value:
            data = np.frombuffer(base64.b64decode(packed["arrays"][next(rest)]), "<f4")
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
