"""The sweeps of the built site in a real browser: one page a part has its sliders moved, by keyboard and by time.

Every point of every sweep is looked at in `test_pages.py`, without layout.
"""

from pathlib import Path
from statistics import median

import pytest

from .conftest import opened, pages, read

WITH_SWEEPS = [page for page in pages() if "polylib-sweep" in read(page)]
ONE_A_PART = list({Path(page).parent: page for page in reversed(WITH_SWEEPS)}.values())

# Sends the slider's own event, as a key does, for each value, and times how long the figure takes to follow.
MOVE = """async ([sweep, knob, values]) => {
    const place = document.querySelectorAll(".polylib-sweep")[sweep];
    const input = place.querySelectorAll("input[type=range]")[knob];
    const times = [];
    for (const value of values) {
        const start = performance.now();
        const drawn = new Promise(done => place.querySelector(".js-plotly-plot").once("plotly_afterplot", done));
        input.value = value;
        input.dispatchEvent(new Event("input", {bubbles: true}));
        await drawn;
        times.push(performance.now() - start);
    }
    return times;
}"""
# How long plotly takes to redraw a plain figure of three panels on this machine, from nothing but new data.
PLAIN = """async () => {
    const place = document.body.appendChild(document.createElement("div"));
    const trace = (panel, turn) => ({x: [...Array(20).keys()], y: [...Array(20).keys()].map(k => Math.sin(k + turn)),
        mode: "lines+markers", xaxis: `x${panel}`, yaxis: `y${panel}`});
    const traces = turn => [1, 2, 3].map(panel => trace(panel, turn));
    const layout = {width: 700, height: 380, grid: {rows: 1, columns: 3, pattern: "independent"}};
    await Plotly.newPlot(place, traces(0), layout);
    const times = [];
    for (let turn = 1; turn < 16; turn++) {
        const start = performance.now();
        await Plotly.react(place, traces(turn), layout);
        times.push(performance.now() - start);
    }
    place.remove();
    return times.sort((a, b) => a - b)[7];
}"""
DATA = """sweep => JSON.stringify(
    document.querySelectorAll(".polylib-sweep")[sweep].querySelector(".js-plotly-plot").data)"""


def move_every_slider(page) -> None:
    """By keyboard, and fast: each slider is labelled, and an arrow key redraws the figure in less than 50 ms, or on a
    slow machine in less than twice the time of a plain figure."""
    plain, times = page.evaluate(PLAIN), {}
    for sweep in range(page.locator(".polylib-sweep").count()):
        sliders = page.locator(".polylib-sweep").nth(sweep).locator("input[type=range]")
        assert sliders.count() > 0, "a sweep without sliders"
        times[sweep] = []
        for knob in range(sliders.count()):
            slider = sliders.nth(knob)
            assert slider.evaluate("e => e.labels.length == 1 && e.labels[0].textContent.trim()"), (
                "a slider without a label"
            )
            slider.focus()
            seen = {page.evaluate(DATA, sweep)}
            for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):
                page.keyboard.press(key)
                page.wait_for_timeout(60)
                seen.add(page.evaluate(DATA, sweep))
            assert len(seen) > 1, f"arrow keys on slider {knob} of sweep {sweep} change nothing"
            last = int(slider.get_attribute("max"))
            there_and_back = [*range(last + 1), *range(last - 1, -1, -1)]
            times[sweep] += page.evaluate(MOVE, [sweep, knob, there_and_back[:10]])
    limit = max(50, 2 * max(plain, page.evaluate(PLAIN)))  # before and after, since a machine's pace changes
    for sweep, taken in times.items():
        print(f"sweep {sweep}: median {median(taken):.0f} ms, worst {max(taken):.0f} ms, limit {limit:.0f} ms")
        assert median(taken) < limit, f"sweep {sweep} takes {median(taken):.0f} ms to answer; the limit is {limit:.0f}"


@pytest.mark.skipif(not WITH_SWEEPS, reason="the site is not built: make book")
@pytest.mark.parametrize("page_name", ONE_A_PART)
def test_sweeps_move(browser, site: Path, page_name: str) -> None:
    """From a folder on disk, where a page may ask for less than from a server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        with opened(context, site.as_uri(), page_name) as page:
            move_every_slider(page)
    finally:
        context.close()
