"""The built site in a real browser that stays open: every page once, light, dark, and on a phone."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DRAWN, opened, pages, read

FIRST = "index.html"  # forwards the reader to the intro
PAGES = [page for page in pages() if page != FIRST]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: make book")

# Every formula of the page, and those that MathJax has not set.
MATH = """() => {
    const all = [...document.querySelectorAll("span.math, div.math")];
    const unset = all.filter(e => !e.querySelector("mjx-container") || /\\\\[([]/.test(e.innerText));
    return {unset: unset.map(e => e.textContent), errors: document.querySelectorAll("mjx-merror").length};
}"""
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


# Every point of every figure, as the page's own script unpacks it: points without content, and arrays cut short.
POINTS = """() => {
    const sizes = {f4: 4, f8: 8, i4: 4, i8: 8, i2: 2, i1: 1, u1: 1, u2: 2, u4: 4};
    const found = [];
    const arrays = value => {
        if (value === null || typeof value !== "object") return;
        if (value.bdata === undefined) return Object.values(value).forEach(arrays);
        const items = atob(value.bdata).length / sizes[value.dtype];
        const expected = value.shape ? value.shape.split(",").reduce((a, b) => a * Number(b), 1) : items;
        if (!Number.isInteger(items) || items !== expected || !items)
            found.push(`${items} of ${expected} numbers`);
    };
    for (const element of document.querySelectorAll(".polylib-figure, .polylib-sweep")) {
        for (let number = 0; number < element.polylib.figures; number++) {
            const figure = element.polylib.unpack(number);
            const shown = figure.data.length + (figure.layout.annotations || []).length;
            if (!shown) found.push(`point ${number} is empty`);
            arrays(figure.data);
        }
    }
    return found.slice(0, 5);
}"""


# Code of cells and set formulas that are wider than the column, and so cut at its edge.
CUT = """() => [...document.querySelectorAll("div.cell .highlight pre, mjx-container[display=true]")]
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    .map(e => `${e.scrollWidth} wide in a column of ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`)
    .slice(0, 5)"""


# Figures that are taller than their places, so that the text below hides their lower ends.
CLIPPED = """() => [...document.querySelectorAll(".polylib-plot")]
    .map(e => [e.clientHeight, e.querySelector("svg.main-svg").clientHeight])
    .filter(([place, figure]) => figure > place).map(([place, figure]) => `${figure} pixels in a place of ${place}`)"""


@pytest.fixture(scope="module")
def context(browser) -> Iterator:
    context = browser.new_context(viewport=DESK)
    yield context
    context.close()


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


def take_screenshots(page, folder: Path | None, name: str) -> None:
    """The top of a page with figures or claims, and each figure with what stands around it."""
    figures = page.locator(".polylib-figure, .polylib-sweep").all()
    if folder is None or not (figures or name.startswith(("ledger", "intro"))):
        return
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=folder / f"{name}.png")
    for number, figure in enumerate(figures, start=1):
        figure.scroll_into_view_if_needed()
        figure.evaluate("e => window.scrollTo(0, e.getBoundingClientRect().top + window.scrollY - 120)")
        page.wait_for_timeout(50)
        page.screenshot(path=folder / f"{name}-figure{number}.png")


@pytest.mark.parametrize("page_name", PAGES)
def test_page(context, address: str, screenshots: Path | None, page_name: str) -> None:
    """No error, no other host; every formula set; every figure drawn at every point, and whole when the window changes;
    texts in their places and legible in both themes; code and formulas as wide as the column; on a phone no sideways
    scroll."""
    with opened(context, address, page_name) as page:
        math = page.evaluate(MATH)
        assert not math["unset"], f"formulas that were not set: {math['unset'][:5]}"
        assert math["errors"] == 0, "MathJax reports errors in formulas"
        assert not (cut := page.evaluate(CUT)), "\n".join(cut)
        figures = page.evaluate(FIGURES)
        assert figures["empty"] == 0, f"{figures['empty']} of {figures['all']} figures are empty"
        assert not (wrong := page.evaluate(POINTS)), "\n".join(wrong)
        take_screenshots(page, screenshots, f"{name_of(page_name)}-light")
        assert not (crowded := page.evaluate(CROWDED)), "\n".join(crowded)

        page.set_viewport_size(PHONE)
        page.reload(wait_until="load")
        page.wait_for_function(DRAWN)
        page.wait_for_timeout(500 if figures["all"] else 50)
        take_screenshots(page, screenshots, f"{name_of(page_name)}-phone")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{page_name} is {width} pixels wide on a screen of {PHONE['width']}"
        assert not (crowded := page.evaluate(CROWDED)), "\n".join(crowded)

        page.set_viewport_size(DESK)
        use_dark_theme(page)
        assert not (clipped := page.evaluate(CLIPPED)), "\n".join(clipped)
        worst = page.evaluate(CONTRAST)
        take_screenshots(page, screenshots, f"{name_of(page_name)}-dark")
        assert worst is None or worst["ratio"] >= 4.5, f"contrast {worst['ratio']:.1f} of {worst['text']!r}"


def test_on_paper_a_dark_page_and_its_figures_are_light(context, address: str) -> None:
    ink = "getComputedStyle(document.querySelector('.js-plotly-plot .xtick text')).fill"
    with opened(context, address, "book/intro.html") as page:
        light = page.evaluate(ink)
        use_dark_theme(page)
        assert page.evaluate(ink) != light
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        assert page.evaluate(ink) == light
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate(ink) != light


def test_the_first_page_leads_to_the_intro() -> None:
    assert "book/intro.html" in read(FIRST)


def test_nothing_in_the_site_names_another_host() -> None:
    """Links may lead elsewhere; what a page loads may not."""
    loads = re.compile(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="(?:https?:)?//', re.IGNORECASE)
    for page_name in PAGES:
        found = loads.search(read(page_name))
        assert found is None, f"{page_name}: {found[0]}"
