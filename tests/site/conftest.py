"""A real browser for the built site and for JupyterLab, with every other host out of reach."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SITE = ROOT / "site"
SCREENSHOTS = ROOT / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# True when every figure has been drawn.
DRAWN = """() => [...document.querySelectorAll(".polylib-figure, .polylib-sweep")]
    .every(e => e.querySelector(".main-svg"))"""


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true")


def missing(what: str) -> None:
    """A check that can't run: an error in continuous integration, a skip with advice elsewhere."""
    if in_ci():
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing(
            "no Chromium or Chrome was found. Install one (Debian, Ubuntu: apt install chromium), or set CHROMIUM=path"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site() -> Path:
    if not (SITE / "index.html").exists():
        missing("the site is not built: make book")
    return SITE


@pytest.fixture(scope="session")
def screenshots() -> Path | None:
    """Where pictures for the eye go; nowhere in continuous integration, where nobody looks."""
    if in_ci():
        return None
    SCREENSHOTS.mkdir(exist_ok=True)
    return SCREENSHOTS


def pages() -> list[str]:
    """The pages of the built site, by their paths in it."""
    found = (path.relative_to(SITE) for path in SITE.rglob("*.html"))
    return sorted(str(path) for path in found if not {"_static", "_sources"}.intersection(path.parts))


def read(page_name: str) -> str:
    return (SITE / page_name).read_text(encoding="utf-8")


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/favicon.ico":  # the browser's own wish on the first page, which only forwards the reader
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def opened(context, address: str, page_name: str) -> Iterator:
    """A page of the site, drawn and set. Whatever goes wrong in it while it is open fails the test.

    Pages of one context share what the browser has cached, as they do for a reader; what a page stored for the next
    one, such as the theme, is cleared.
    """
    page = context.new_page()
    problems: list[str] = []

    def check_host(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            problems.append(f"asked another host: {request.url}")

    page.on("request", check_host)
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
        try:
            yield page
        finally:  # also after a failure, which would hand its theme to the next page
            page.evaluate("localStorage.clear()")
    finally:
        page.close()
    assert not problems, "\n".join(problems)
