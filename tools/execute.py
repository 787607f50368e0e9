"""Execute chapters and labs once; their outputs serve the checks and the site.

What ran without an error is kept in the user's cache folder, under the digest of all that its outputs depend on: the
cells, the modules of polylib that they reach, the installed set, the processor and the scale. Another clone on the same
machine finds it there. `.executed/` holds the current text of each notebook around those outputs. `FRESH=1` ignores
what is kept. A failed run leaves nothing.
"""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import nbformat
import pytest
from nbformat import NotebookNode

from tools import pace
from tools.sources import ROOT, code_cells, digest_of, sources

EXECUTED = ROOT / ".executed"  # nbmake skips every path with a folder called _build
CELL_SECONDS = {"ci": 600, "laptop": 3600}  # a cell that takes longer has hung
DAYS = 60  # what no run has asked for so long is removed from the cache
PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+it \[")
LIMIT = 60  # t that a notebook may take at scale ci


class Run(NamedTuple):
    """What became of one notebook: seconds and t that it took, whether it was restored, and what is wrong."""

    seconds: float
    t: float
    restored: bool
    problems: list[str]


# What is kept --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where executed notebooks are kept: `notebooks` in polylib's cache folder, which may be deleted at will."""
    base = os.environ.get("POLYLIB_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "polylib"
    )
    return Path(base, "notebooks")


def executed_path(source: Path) -> Path:
    return EXECUTED / source.with_suffix(".ipynb")


def read_executed(path: Path) -> NotebookNode | None:
    """The executed notebook in a file, if there is a whole one."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError):
        return None
    return notebook if "polylib" in notebook.metadata else None


def kept(digest: str) -> NotebookNode | None:
    """The executed notebook of a digest. A file that is broken counts as nothing, and `FRESH=1` ignores all."""
    if os.environ.get("FRESH", "") not in ("", "0"):
        return None
    path = cache_folder() / f"{digest}.ipynb"
    notebook = read_executed(path)
    if notebook is None or notebook.metadata.polylib.get("digest") != digest:
        return None
    with contextlib.suppress(OSError):  # a cache that may be read and not written
        path.touch()
    return notebook


def keep(notebook: NotebookNode) -> None:
    """Store an executed notebook, and remove what has not been asked for since long."""
    folder = cache_folder()
    try:
        write_atomic(notebook, folder / f"{notebook.metadata.polylib.digest}.ipynb")
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > DAYS * 86400:
                path.unlink(missing_ok=True)
    except OSError as error:
        print(f"The outputs can't be kept in {folder}: {error}", file=sys.stderr)


def write_atomic(notebook: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    nbformat.write(notebook, part)
    part.replace(path)


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The current text around the outputs of an earlier run of the same code."""
    for cell, done in zip(code_cells(notebook), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    for key in {"language_info", "polylib", "widgets"} & executed.metadata.keys():
        notebook.metadata[key] = executed.metadata[key]
    return notebook


# Execution -----------------------------------------------------------------------------------------------------------


def complaints(notebook: NotebookNode) -> Iterator[str]:
    """What a cell wrote to standard error, apart from progress bars, which are dropped from the outputs."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        others = []
        for output in cell.outputs:
            if output.output_type != "stream" or output.name != "stderr":
                others.append(output)
                continue
            lines = [
                line for line in re.split(r"[\r\n]", output.text) if line.strip() and not PROGRESS_BAR.search(line)
            ]
            if lines:
                yield f"code cell {number} wrote to standard error:\n    " + "\n    ".join(lines[:20])
        cell.outputs = others


class Collect:
    """A pytest plugin: takes each notebook as soon as it has run, so that a killed run loses only what was running."""

    def __init__(
        self, folder: Path, notebooks: dict[Path, NotebookNode], t: float, store: bool, variant: str = ""
    ) -> None:
        self.folder, self.notebooks, self.t, self.store, self.variant = folder, notebooks, t, store, variant
        self.digests = {path: digest_of(notebook) + variant for path, notebook in notebooks.items()}
        self.runs: dict[Path, Run] = {}
        self.executed: dict[Path, NotebookNode] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        file = ROOT / report.nodeid.split("::")[0]
        source = file.parent.relative_to(self.folder).with_suffix(".md")
        took = Run(report.duration, report.duration / self.t, False, [])
        self.runs[source] = took
        if report.failed:
            took.problems.append(f"{source}: failed, see above")
            return
        executed = nbformat.read(file, as_version=4)
        executed.metadata.polylib = {
            "digest": self.digests[source],
            "seconds": round(took.seconds, 1),
            "t": round(took.t, 1),
        }
        took.problems.extend(f"{source}: {complaint}" for complaint in complaints(executed))
        litter = [path.name for path in file.parent.iterdir() if path.suffix not in (".ipynb", ".toml")]
        if litter:
            took.problems.append(f"{source}: left files behind: {', '.join(sorted(litter))}")
        if not took.problems:
            self.executed[source] = with_outputs(self.notebooks[source], executed)
            if self.store:
                keep(executed)
                if not self.variant:
                    write_atomic(self.executed[source], executed_path(source))


def run(
    notebooks: dict[Path, NotebookNode], folder: Path, *, workers: int = 0, store: bool = False, variant: str = ""
) -> Collect:
    """Execute notebooks in a folder of their own, and hand back what came out.

    Args:
        notebooks: each notebook, by its path from the root.
        folder: a folder inside the project, emptied before and removed after.
        workers: how many run at once; as many as there are cores by default.
        store: whether what ran is kept.
        variant: what is added to the digests: outputs under it are kept beside the ordinary ones.
    """
    shutil.rmtree(folder, ignore_errors=True)
    workers = min(workers or pace.cores(), len(notebooks))
    t = pace.measure(workers)
    collect = Collect(folder, notebooks, t, store, variant)
    # A folder for each notebook, so that one that leaves files behind is found out. What took longest starts first.
    last = {path: (read_executed(executed_path(path)) or {}).get("metadata", {}) for path in notebooks}
    order = sorted(notebooks, key=lambda path: -last[path].get("polylib", {}).get("seconds", 1e9))
    files = [folder / path.with_suffix("") / path.with_suffix(".ipynb").name for path in order]
    for path, file in zip(order, files, strict=True):
        write_atomic(notebooks[path], file)
        claims = ROOT / path.with_suffix(".claims.toml")
        if claims.exists():
            shutil.copy(claims, file.parent)
    try:
        status = run_nbmake(collect, files, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for path in notebooks:
        if path not in collect.runs:
            collect.runs[path] = Run(0.0, 0.0, False, [f"{path}: did not run (pytest's status {status})"])
    t = max(t, pace.measure(workers))
    collect.runs = {path: took._replace(t=took.seconds / t) for path, took in collect.runs.items()}
    for path, notebook in collect.executed.items() if store else ():
        notebook.metadata.polylib.t = round(collect.runs[path].t, 1)  # by the slower of the two paces
        keep(notebook)
        write_atomic(notebook, executed_path(path))
    return collect


def run_nbmake(collect: Collect, files: list[Path], workers: int) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    # Notebooks side by side share the cores: none starts more processes for its sweeps than its part of them.
    share = {"LOKY_MAX_CPU_COUNT": str(max(1, pace.cores() // workers))}
    patience = CELL_SECONDS.get(os.environ.get("POLYLIB_SCALE") or "ci", 3600)
    options = ["--nbmake", "--overwrite", f"--nbmake-timeout={patience}", "--nbmake-kernel=python3"]
    spread = ["-n", str(workers), "--maxschedchunk=1"] if workers > 1 else ["-p", "no:xdist"]
    quiet = ["-p", "no:cacheprovider", "-q", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with patch.dict(os.environ, share):
        return int(pytest.main([*options, *spread, *quiet, *map(str, files)], plugins=[collect]))


def execute(wanted: dict[Path, NotebookNode] | None = None) -> dict[Path, Run]:
    """Bring `.executed/` up to date: restore what is kept, run the rest. The runs, by the path of the source."""
    everything = sources()
    notebooks = everything if wanted is None else wanted
    for path in EXECUTED.glob("*/**/*.ipynb"):
        if path.relative_to(EXECUTED).with_suffix(".md") not in everything:
            path.unlink()  # its source is gone
    runs, stale = {}, {}
    for path, notebook in notebooks.items():
        old = kept(digest_of(notebook))
        if old is None:
            stale[path] = notebook
            executed_path(path).unlink(missing_ok=True)
            continue
        runs[path] = Run(old.metadata.polylib.seconds, old.metadata.polylib.t, True, [])
        current = with_outputs(notebook, old)
        if current != read_executed(executed_path(path)):
            write_atomic(current, executed_path(path))
    print(f"Notebooks: {len(runs)} restored, {len(stale)} to execute", flush=True)
    if stale:
        runs |= run(stale, EXECUTED / "running", store=True).runs
    if late := {path: stale[path] for path in _late(runs) if path in stale and len(stale) > 1}:
        print(f"{len(late)} took long beside others, and run once more alone", flush=True)
        runs |= run(late, EXECUTED / "running", workers=1, store=True).runs
    return {path: runs[path] for path in notebooks}


def _late(runs: dict[Path, Run]) -> list[Path]:
    """The notebooks that are far beyond the limit, which is that of the usual scale."""
    if os.environ.get("POLYLIB_SCALE"):
        return []
    return [path for path, took in runs.items() if took.t > LIMIT * pace.BROKEN]


def report(runs: dict[Path, Run]) -> list[str]:
    """Print what each notebook took, and return what is wrong: errors, and those far beyond the limit."""
    print(f"\n{'seconds':>8} {'t':>6}  notebook (at most {LIMIT} t)")
    for path, took in sorted(runs.items(), key=lambda item: -item[1].t):
        late = f"  more than {LIMIT} t" if took.t > LIMIT else ""
        print(f"{took.seconds:8.1f} {took.t:6.1f}  {path}{'  (restored)' if took.restored else ''}{late}")
    problems = [problem for took in runs.values() for problem in took.problems]
    problems += [f"{path}: {runs[path].t:.0f} t, where {LIMIT} is the limit" for path in _late(runs)]
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    return problems
