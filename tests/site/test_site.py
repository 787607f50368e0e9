"""The built site in a real browser, with every other host blocked."""

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from .conftest import SITE

PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts and "_sources" not in path.parts
)
WITH_SWEEPS = [page for page in PAGES if "polylib-sweep" in (SITE / page).read_text(encoding="utf-8")]
WITH_FIGURES = [
    page for page in PAGES if re.search('class="polylib-(figure|sweep)"', (SITE / page).read_text(encoding="utf-8"))
]
pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: make book")

# Every formula of the page, and those that MathJax has not set.
MATH = """() => {
    const all = [...document.querySelectorAll("span.math, div.math")];
    const unset = all.filter(e => !e.querySelector("mjx-container") || /\\\\[([]/.test(e.innerText));
    return {unset: unset.map(e => e.textContent), errors: document.querySelectorAll("mjx-merror").length};
}"""
DRAWN = """() => [...document.querySelectorAll(".polylib-figure, .polylib-sweep")]
    .every(e => e.querySelector(".main-svg"))"""
FIGURES = """() => {
    const all = [...document.querySelectorAll(".polylib-figure, .polylib-sweep")];
    const drawn = e => e.querySelector(".js-plotly-plot .main-svg .trace, .js-plotly-plot .main-svg .plot > *, "
        + ".js-plotly-plot .main-svg .hm");
    return {all: all.length, empty: all.filter(e => !drawn(e)).length};
}"""
# Texts that reach beyond their figure, and titles, legends and annotations that lie on one another.
CROWDED = """() => {
    const found = [];
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
        const frame = plot.querySelector(".main-svg").getBoundingClientRect();
        if (!frame.width) continue;
        const box = e => e.getBoundingClientRect();
        const texts = [...plot.querySelectorAll("text")].filter(e => e.textContent.trim() && box(e).width);
        for (const e of texts) {
            const b = box(e);
            const over = Math.max(
                frame.left - b.left, b.right - frame.right, frame.top - b.top, b.bottom - frame.bottom);
            if (over > 2) found.push(`clipped by ${over.toFixed(0)} px: ${e.textContent}`);
        }
        const labels = texts.filter(e => e.matches(".gtitle, .xtitle, .ytitle, .legendtext, .annotation-text"));
        labels.forEach((e, i) => labels.slice(i + 1).forEach(f => {
            const [a, b] = [box(e), box(f)];
            const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (wide > 3 && high > 3) found.push(`overlap: ${e.textContent} / ${f.textContent}`);
        }));
    }
    return found;
}"""
# Sends the slider's own event, as a key does, and waits until the figure's data has changed.
MOVE = """([sweep, knob, value]) => new Promise(done => {
    const place = document.querySelectorAll(".polylib-sweep")[sweep];
    const input = place.querySelectorAll("input[type=range]")[knob];
    const plot = () => JSON.stringify(place.querySelector(".js-plotly-plot").data);
    const before = plot();
    const graph = place.querySelector(".js-plotly-plot");
    const start = performance.now();
    const finish = () => done({milliseconds: performance.now() - start, changed: plot() !== before});
    graph.once("plotly_afterplot", finish);
    input.value = value;
    input.dispatchEvent(new Event("input", {bubbles: true}));
})"""
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
# Contrast by WCAG of the text of every figure and paragraph against what is painted below it; the worst of all.
CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const painted = colours => {  // the colours of the layers, the lowest first, as the browser mixes them
        for (const colour of colours) {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
        }
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = rgb => {
        const [r, g, b] = rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const layers = element => {
        const found = [];
        for (let e = element; e; e = e.parentElement) found.unshift(getComputedStyle(e).backgroundColor);
        return ["rgb(255, 255, 255)", ...found];
    };
    const texts = [...document.querySelectorAll(
        ".js-plotly-plot .xtick text, .js-plotly-plot .ytick text, .js-plotly-plot .xtitle, .js-plotly-plot .ytitle, "
        + ".polylib-controls label, article p")];
    return texts.map(e => {
        const style = getComputedStyle(e);
        const below = layers(e);
        const b = light(painted(below));
        const a = light(painted([...below, e instanceof SVGElement ? style.fill : style.color]));
        return {text: e.textContent.slice(0, 40), ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)};
    }).sort((a, b) => a.ratio - b.ratio)[0];
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def opened(browser, address: str, page_name: str, **options: object) -> Iterator:
    """A page with all other hosts blocked. Whatever goes wrong in it while it is open fails the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []

    def guard(route) -> None:
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            problems.append(f"asked another host: {url}")
            route.abort()

    page.route("**/*", guard)
    page.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"script: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"request failed: {request.url}"))
    page.on("response", lambda answer: answer.status >= 400 and problems.append(f"{answer.status}: {answer.url}"))
    try:
        page.goto(f"{address}/{page_name}", wait_until="load")
        page.wait_for_function(
            "() => !window.MathJax?.startup?.promise || window.MathJax.startup.promise.then(() => true)"
        )
        page.wait_for_function(DRAWN)
        page.evaluate("document.fonts.ready")
        page.wait_for_timeout(200)
        yield page
    finally:
        context.close()
    assert not problems, "\n".join(problems)


def name_of(page_name: str) -> str:
    return Path(page_name).stem


def use_dark_theme(page) -> None:
    """Press the theme switch until it says dark."""
    for _ in range(3):
        if page.evaluate("document.documentElement.dataset.theme") == "dark":
            break
        page.locator("button.theme-switch-button").first.evaluate("button => button.click()")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.wait_for_timeout(300)


def take_screenshots(page, folder: Path, name: str) -> None:
    """The top of the page, and each figure with what stands around it."""
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=folder / f"{name}.png")
    for number, figure in enumerate(page.locator(".polylib-figure, .polylib-sweep").all(), start=1):
        figure.scroll_into_view_if_needed()
        figure.evaluate("e => window.scrollTo(0, e.getBoundingClientRect().top + window.scrollY - 120)")
        page.wait_for_timeout(50)
        page.screenshot(path=folder / f"{name}-figure{number}.png")


@pytest.mark.parametrize("page_name", PAGES)
def test_page_fits_a_phone(browser, address: str, screenshots: Path, page_name: str) -> None:
    """No sideways scroll, and figures whose texts have room."""
    with opened(browser, address, page_name, viewport={"width": 390, "height": 844}, device_scale_factor=2) as page:
        if page_name in WITH_FIGURES or "ledger" in page_name or "intro" in page_name:
            take_screenshots(page, screenshots, f"{name_of(page_name)}-phone")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{page_name} is {width} pixels wide on a screen of 390"
        assert not (crowded := page.evaluate(CROWDED)), "\n".join(crowded)


@pytest.mark.parametrize("page_name", PAGES)
def test_page_is_whole(browser, address: str, screenshots: Path, page_name: str) -> None:
    """No error, no other host, every formula set, every figure drawn and its texts in their places."""
    with opened(browser, address, page_name, viewport={"width": 1280, "height": 900}) as page:
        math = page.evaluate(MATH)
        assert not math["unset"], f"formulas that were not set: {math['unset'][:5]}"
        assert math["errors"] == 0, "MathJax reports errors in formulas"
        figures = page.evaluate(FIGURES)
        assert figures["empty"] == 0, f"{figures['empty']} of {figures['all']} figures are empty"
        if page_name in WITH_FIGURES or "ledger" in page_name or "intro" in page_name:
            take_screenshots(page, screenshots, f"{name_of(page_name)}-light")
        assert not (crowded := page.evaluate(CROWDED)), "\n".join(crowded)


@pytest.mark.parametrize("page_name", PAGES)
def test_dark_theme_is_legible(browser, address: str, screenshots: Path, page_name: str) -> None:
    with opened(browser, address, page_name, viewport={"width": 1280, "height": 900}) as page:
        if page.locator("button.theme-switch-button").count() == 0:
            return  # the first page only forwards the reader
        use_dark_theme(page)
        worst = page.evaluate(CONTRAST)
        if page_name in WITH_FIGURES or "ledger" in page_name:
            take_screenshots(page, screenshots, f"{name_of(page_name)}-dark")
        assert worst is None or worst["ratio"] >= 4.5, f"contrast {worst['ratio']:.1f} of {worst['text']!r}"


def move_every_slider(page) -> None:
    """By keyboard, and fast: each slider is labelled, and an arrow key redraws the figure in less than 50 ms, or on a
    slow machine in less than twice the time of a plain figure."""
    for sweep in range(page.locator(".polylib-sweep").count()):
        sliders = page.locator(".polylib-sweep").nth(sweep).locator("input[type=range]")
        assert sliders.count() > 0, "a sweep without sliders"
        times, plain = [], page.evaluate(PLAIN)
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
            for value in [*range(last + 1), *range(last - 1, -1, -1)][:12]:
                times.append(page.evaluate(MOVE, [sweep, knob, value])["milliseconds"])
        limit = max(50, 2 * max(plain, page.evaluate(PLAIN)))  # before and after, since a machine's pace changes
        print(f"sweep {sweep}: median {median(times):.0f} ms, worst {max(times):.0f} ms, limit {limit:.0f} ms")
        assert median(times) < limit, f"sweep {sweep} takes {median(times):.0f} ms to answer; the limit is {limit:.0f}"


@pytest.mark.parametrize("page_name", WITH_SWEEPS)
@pytest.mark.parametrize("place", ["http", "file"])
def test_sweeps_move(browser, site: Path, request: pytest.FixtureRequest, place: str, page_name: str) -> None:
    """From a server, and from a folder on disk."""
    address = site.as_uri() if place == "file" else request.getfixturevalue("address")
    with opened(browser, address, page_name, viewport={"width": 1280, "height": 900}) as page:
        move_every_slider(page)


def test_nothing_in_the_site_names_another_host() -> None:
    """Links may lead elsewhere; what a page loads may not."""
    loads = re.compile(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="(?:https?:)?//', re.IGNORECASE)
    for page_name in PAGES:
        found = loads.search((SITE / page_name).read_text(encoding="utf-8"))
        assert found is None, f"{page_name}: {found[0]}"
