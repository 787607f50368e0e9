"""A real JupyterLab: each lab, and the quickest chapter of each part, opens as a notebook, runs from top to bottom, and
its live sliders redraw the figure."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT


def seconds(chapter: Path) -> float:
    """How long a chapter took when it was executed for the site; for ever if it was not."""
    executed = ROOT / ".executed" / chapter.relative_to(ROOT).with_suffix(".ipynb")
    try:
        return json.loads(executed.read_text(encoding="utf-8"))["metadata"]["polylib"]["seconds"]
    except (OSError, KeyError, ValueError):
        return float("inf")


def quickest_chapters() -> list[Path]:
    """One chapter of each part, with a sweep."""
    chapters = sorted((ROOT / "book").glob("*/*.md"), key=seconds, reverse=True)
    return sorted({path.parent: path for path in chapters if "Sweep(" in path.read_text(encoding="utf-8")}.values())


NOTEBOOKS = [
    path.relative_to(ROOT).as_posix() for path in [*sorted((ROOT / "labs").glob("*.md")), *quickest_chapters()]
]
BUSY = 240  # seconds that a whole notebook may take to run
SLIDER = ".noUi-handle, .widget-slider [role=slider]"
PATIENCE = 30  # seconds that a figure may take to follow a slider, on a machine that does other things, too


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that knows nothing of the user's settings and cached sweeps. It serves copies."""
    if not (Path(sys.prefix) / "share" / "jupyter" / "lab" / "settings" / "overrides.json").exists():
        pytest.skip("JupyterLab's settings are not in this environment: they come with make lab or make test")
    folder = tmp_path_factory.mktemp("jupyterlab")
    for name in ("labs", "book"):
        shutil.copytree(ROOT / name, folder / "root" / name, ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "pyproject.toml", folder / "root")
    own = {f"JUPYTER_{kind}": str(folder / kind.lower()) for kind in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(folder / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    own |= {"POLYLIB_CACHE": str(folder / "cache")}
    token = secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--port", "0", "--ServerApp.ip=127.0.0.1"]
    options = [
        "--ServerApp.port_retries=50",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}/root",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    log = folder / "log"
    with log.open("w") as file:
        server = subprocess.Popen([*command, *options], env={**os.environ, **own}, stdout=file, stderr=file)
    try:
        yield wait_for(server, log, token)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(server: subprocess.Popen, log: Path, token: str) -> str:
    """The address, with places for the workspace and the path, as soon as the server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        if match := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text()):
            address = f"http://127.0.0.1:{match[1]}"
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
            except OSError:
                time.sleep(0.3)
                continue
            return f"{address}/lab/workspaces/%s/tree/%s?token={token}"
        time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_and_its_sliders_are_live(
    browser, jupyterlab: str, screenshots: Path | None, notebook: str
) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1150})
    name = Path(notebook).stem
    try:
        run_and_move(page, jupyterlab % (name, notebook))
        if notebook.startswith("book"):
            assert page.locator(".polylib-claim", has_text="The paper").count(), "the claims' file was not found"
    finally:
        if screenshots:
            page.wait_for_timeout(1000)
            page.screenshot(path=screenshots / f"jupyterlab-{name}.png")
        # The kernel of a closed page would go on, and take time from the next lab.
        base, token = re.match(r"(.*)/lab/workspaces/.*(\?token=.*)", jupyterlab).groups()
        for session in page.request.get(f"{base}/api/sessions{token}").json():
            page.request.delete(f"{base}/api/sessions/{session['id']}{token}")
        page.close()


def run_and_move(page, address: str) -> None:
    page.goto(address)
    # The default viewer of .md is the notebook: the same route as a double click.
    notebook = page.locator(".jp-NotebookPanel")
    notebook.wait_for(timeout=60_000)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    assert page.locator(".jp-Dialog").count() == 0, "JupyterLab asks something at the start"
    assert page.locator(".jp-toast, .Toastify__toast").count() == 0, "JupyterLab shows news at the start"

    wait_for_kernel(page, address)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wait_until_run(page)
    errors = page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error'], .jp-RenderedText [class*='ansi-red']"
    )
    assert errors.count() == 0, errors.first.inner_text()

    look_through(page)
    areas = page.locator(".jp-Notebook .jp-OutputArea-output").filter(has=page.locator(SLIDER))
    assert areas.count() >= 1, "a notebook has a live sweep"
    for number in range(areas.count()):
        sliders, figure = areas.nth(number).locator(SLIDER), areas.nth(number).locator(".js-plotly-plot").first
        sliders.first.scroll_into_view_if_needed()
        figure.wait_for(timeout=30_000)
        page.wait_for_function("e => e.data && e.data.length", arg=figure.element_handle())
        for knob in range(sliders.count()):
            move(page, sliders.nth(knob), figure)
    assert page.locator(".jp-Notebook .widget-html strong").count() == 0, "a run of a live sweep ended in an error"
    areas.first.scroll_into_view_if_needed()


def move(page, slider, figure) -> None:
    """Press an arrow key, and wait until the figure has changed; where a slider stands at its end, press the other."""
    slider.scroll_into_view_if_needed()
    for key in ("ArrowRight", "ArrowLeft"):
        before, value = figure_data(figure), slider.get_attribute("aria-valuenow")
        slider.focus()
        slider.press(key)
        if slider.get_attribute("aria-valuenow") == value:
            continue  # it stood at that end
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            page.wait_for_timeout(50)
            if figure_data(figure) != before:
                return
    pytest.fail(f"an arrow key on a live slider did not change the figure within {PATIENCE} s")


def figure_data(figure) -> str:
    return figure.evaluate("e => JSON.stringify([e.data, e.layout.shapes])")


def wait_for_kernel(page, address: str) -> None:
    """Before its kernel is there, a notebook answers Run with a question about the kernel."""
    sessions = re.sub(r"/lab/workspaces/.*(\?token=)", r"/api/sessions\1", address)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        kernels = [session["kernel"] or {} for session in page.request.get(sessions).json()]
        if any(kernel.get("execution_state") == "idle" and kernel.get("connections") for kernel in kernels):
            page.locator(".jp-NotebookPanel-toolbar [data-status='idle']").wait_for(timeout=10_000)
            page.wait_for_timeout(500)
            return
        page.wait_for_timeout(200)
    pytest.fail("the kernel did not start within 60 s")


def wait_until_run(page) -> None:
    """Wait until no code cell waits or runs. A notebook shows `[*]` beside a cell that does."""
    page.wait_for_timeout(1500)
    deadline = time.monotonic() + BUSY
    while time.monotonic() < deadline:
        waiting = page.locator(".jp-Notebook .jp-InputPrompt", has_text="[*]").count()
        idle = page.locator(".jp-NotebookPanel-toolbar [data-status='idle']").count()
        if waiting == 0 and idle:
            return
        page.wait_for_timeout(500)
    pytest.fail(f"the notebook still runs after {BUSY} s")


def look_through(page) -> None:
    """JupyterLab draws cells as they come into view: go through the whole notebook."""
    cells = page.locator(".jp-Notebook .jp-Cell")
    for number in range(cells.count()):
        cells.nth(number).scroll_into_view_if_needed()
        page.wait_for_timeout(150)
