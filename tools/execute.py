"""Execute chapters and labs once; their outputs serve the checks and the site.

A notebook that ran without an error lies in .executed/ under the name of its .md file, with the digest of all that
its outputs depend on in its metadata. A change of prose alone keeps the outputs. A failed run leaves nothing there.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("book", "labs")
EXECUTED = ROOT / ".executed"  # nbmake skips every path with a folder called _build
RUNNING = EXECUTED / "running"

TIMEOUT = 300  # seconds a cell may take
SLOW = 60  # seconds after which a notebook is reported as slow
HIDDEN = {"__pycache__", ".ipynb_checkpoints"}
EXECUTION_TAGS = {"raises-exception", "skip-execution"}
PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+it \[")


# The notebooks -------------------------------------------------------------------------------------------------------


def is_notebook(path: Path) -> bool:
    """True for a Markdown file that has jupytext's header."""
    head = path.read_text(encoding="utf-8").split("\n---", 1)[0]
    return head.startswith("---") and "\njupytext:" in head


def markdown_files() -> list[Path]:
    """Every page of the book and every lab. Hidden folders, such as JupyterLab's checkpoints, don't count."""
    found = (path for folder in SOURCES for path in (ROOT / folder).rglob("*.md"))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def read_source(path: Path) -> NotebookNode:
    """The notebook of one .md file, with cell names that don't change from call to call."""
    notebook = jupytext.read(path, fmt="md:myst")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources() -> dict[Path, NotebookNode]:
    """Every chapter and lab with code cells, by its path from the root."""
    notebooks = {path.relative_to(ROOT): read_source(path) for path in markdown_files() if is_notebook(path)}
    return {path: notebook for path, notebook in notebooks.items() if code_cells(notebook)}


# What the outputs depend on ------------------------------------------------------------------------------------------


@functools.cache
def surroundings() -> str:
    """Digest of what every notebook depends on: the library, the installed set and the scale."""
    digest = hashlib.sha256(os.environ.get("POLYLIB_SCALE", "").encode())
    files = (path for path in (ROOT / "polylib").rglob("*") if path.is_file() and not HIDDEN.intersection(path.parts))
    for path in [ROOT / "constraints.txt", *sorted(files)]:
        digest.update(f"\0{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def digest_of(notebook: NotebookNode) -> str:
    cells = [
        [cell.source, sorted(EXECUTION_TAGS.intersection(cell.metadata.get("tags", [])))]
        for cell in code_cells(notebook)
    ]
    return hashlib.sha256(json.dumps([surroundings(), cells]).encode()).hexdigest()


def executed_path(source: Path) -> Path:
    return EXECUTED / source.with_suffix(".ipynb")


def stored(source: Path) -> NotebookNode | None:
    """The executed notebook of a source, if there is a whole one."""
    try:
        notebook = nbformat.read(executed_path(source), as_version=4)
    except (OSError, ValueError):
        return None
    return notebook if "polylib" in notebook.metadata else None


def is_stale(source: Path, notebook: NotebookNode) -> bool:
    old = stored(source)
    return old is None or old.metadata.polylib.digest != digest_of(notebook)


# Execution -----------------------------------------------------------------------------------------------------------


def write_atomic(notebook: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    nbformat.write(notebook, part)
    part.replace(path)


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The current text around the outputs of an earlier run of the same code."""
    for cell, done in zip(code_cells(notebook), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    for key in {"language_info", "polylib", "widgets"} & executed.metadata.keys():
        notebook.metadata[key] = executed.metadata[key]
    return notebook


def complaints(notebook: NotebookNode) -> Iterator[str]:
    """What a cell wrote to standard error, apart from progress bars, which are dropped from the outputs."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        kept = []
        for output in cell.outputs:
            if output.output_type != "stream" or output.name != "stderr":
                kept.append(output)
                continue
            lines = [
                line for line in re.split(r"[\r\n]", output.text) if line.strip() and not PROGRESS_BAR.search(line)
            ]
            if lines:
                yield f"code cell {number} wrote to standard error:\n    " + "\n    ".join(lines[:20])
        cell.outputs = kept


class Keep:
    """A pytest plugin: keeps each notebook as soon as it has passed, and notes how long it took."""

    def __init__(self, stale: dict[Path, NotebookNode]) -> None:
        self.stale = stale
        self.digests = {path: digest_of(notebook) for path, notebook in stale.items()}
        self.seconds: dict[Path, float] = {}
        self.problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        running = ROOT / report.nodeid.split("::")[0]
        source = running.parent.relative_to(RUNNING).with_suffix(".md")
        self.seconds[source] = report.duration
        if report.failed:
            self.problems.append(f"{source}: failed, see above")
            return
        executed = nbformat.read(running, as_version=4)
        executed.metadata.polylib = {"digest": self.digests[source], "seconds": round(report.duration, 1)}
        found = [f"{source}: {complaint}" for complaint in complaints(executed)]
        litter = [path.name for path in running.parent.iterdir() if path.suffix != ".ipynb"]
        if litter:
            found.append(f"{source}: left files behind: {', '.join(sorted(litter))}")
        self.problems += found
        if not found:
            write_atomic(with_outputs(self.stale[source], executed), executed_path(source))


def execute() -> bool:
    """Run what is stale; refresh the text of the rest. True if every notebook is executed and clean."""
    notebooks = sources()
    stale = {path: notebook for path, notebook in notebooks.items() if is_stale(path, notebook)}
    for path, notebook in notebooks.items():
        if path not in stale and (old := stored(path)) is not None:
            fresh = with_outputs(notebook, old)
            if fresh != old:
                write_atomic(fresh, executed_path(path))
    for path in EXECUTED.glob("*/**/*.ipynb"):
        if RUNNING not in path.parents and path.relative_to(EXECUTED).with_suffix(".md") not in notebooks:
            path.unlink()  # its source is gone
    print(f"Notebooks: {len(notebooks) - len(stale)} up to date, {len(stale)} to execute", flush=True)
    if not stale:
        return True

    shutil.rmtree(RUNNING, ignore_errors=True)
    for path, notebook in stale.items():
        # A folder for each notebook, so that one that leaves files behind is found out.
        write_atomic(notebook, RUNNING / path.with_suffix("") / path.with_suffix(".ipynb").name)
    keep = Keep(stale)
    status = run_nbmake(keep)
    print(f"\n{'seconds':>8}  notebook")
    for path, seconds in sorted(keep.seconds.items(), key=lambda item: -item[1]):
        print(f"{seconds:8.1f}  {path}" + (f"  slow: more than {SLOW} s" if seconds > SLOW else ""))
    for problem in keep.problems:
        print(f"\n{problem}", file=sys.stderr)
    shutil.rmtree(RUNNING, ignore_errors=True)
    return status == pytest.ExitCode.OK and not keep.problems


def run_nbmake(keep: Keep) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    options = ["--nbmake", "--overwrite", f"--nbmake-timeout={TIMEOUT}", "--nbmake-kernel=python3", "-n", "2"]
    quiet = ["-p", "no:cacheprovider", "-q", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    files = [str(path) for path in sorted(RUNNING.rglob("*.ipynb"))]
    return pytest.main([*options, *quiet, *files], plugins=[keep])
