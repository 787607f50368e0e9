"""The notebooks of the book, read from their Markdown files, and what their outputs depend on."""

import functools
import hashlib
import json
import os
import platform
import re
from importlib.metadata import distributions
from pathlib import Path

import jupytext
import torch
from nbformat import NotebookNode

from polylib.lab import closure

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("book", "labs")
EXECUTION_TAGS = {"raises-exception", "skip-execution"}


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


def find(names: list[str]) -> dict[Path, NotebookNode]:
    """The notebooks with the given names, such as `neurons/polycom` or `labs/init-rank`; all for none.

    Raises:
        SystemExit: a name that is no notebook; the message lists those there are.
    """
    notebooks = sources()
    if not names:
        return notebooks
    known = {path.with_suffix("").as_posix().removeprefix("book/"): path for path in notebooks}
    wanted = [name.removesuffix(".md").removeprefix("book/").strip("/") for name in names]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"No notebook is called {unknown[0]!r}. There are: {', '.join(known)}")
    return {known[name]: notebooks[known[name]] for name in wanted}


@functools.cache
def machine() -> tuple[str, ...]:
    """What outputs depend on beside the code: the installed set, Python and the processor's capability."""
    installed = sorted(f"{item.name}=={item.version}" for item in distributions() if item.name != "polylib")
    return (platform.python_version(), torch.backends.cpu.get_cpu_capability(), *installed)


def code_of(notebook: NotebookNode) -> str:
    """The code of a notebook as one text. Lines that IPython alone understands make it unreadable, and are left out."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*[%!]", line))


def digest_of(notebook: NotebookNode) -> str:
    """Digest of all that the outputs depend on: the cells, the modules that they reach, scale, machine."""
    cells = [
        [cell.source, sorted(EXECUTION_TAGS.intersection(cell.metadata.get("tags", [])))]
        for cell in code_cells(notebook)
    ]
    code = code_of(notebook)
    parts = [cells, closure.digest(closure.of_source(code)), os.environ.get("POLYLIB_SCALE", ""), machine()]
    if "benchmarks" in code:  # results and timing stand outside the package
        files = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.json")])
        parts += [[str(path.relative_to(ROOT)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
