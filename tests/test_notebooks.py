"""The executor: what is run again, what is kept, what is refused."""

from pathlib import Path

import jupytext
import nbformat
import pytest

from tools import execute, lint

HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
CELL = "```{{code-cell}} ipython3\n{}\n```\n"


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty book, with a library of one file."""
    for name in ("book", "labs", "polylib"):
        (tmp_path / name).mkdir()
    (tmp_path / "polylib" / "__init__.py").write_text("")
    (tmp_path / "constraints.txt").write_text("")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "EXECUTED", tmp_path / ".executed")
    monkeypatch.setattr(execute, "RUNNING", tmp_path / ".executed" / "running")
    monkeypatch.delenv("POLYLIB_SCALE", raising=False)
    execute.surroundings.cache_clear()
    yield tmp_path
    execute.surroundings.cache_clear()


def write(book: Path, prose: str = "Prose.", code: str = "print(1)", name: str = "one") -> None:
    (book / "book" / f"{name}.md").write_text(HEADER + prose + "\n\n" + CELL.format(code))


def run(book: Path, monkeypatch: pytest.MonkeyPatch, outputs: list[nbformat.NotebookNode] | None = None) -> list[str]:
    """Execute with a stand-in for nbmake that stores `outputs` in every cell. Returns what it ran."""
    ran = []

    def nbmake(keep: execute.Keep) -> int:
        for path in sorted(execute.RUNNING.rglob("*.ipynb")):
            ran.append(path.stem)
            notebook = nbformat.read(path, as_version=4)
            for cell in execute.code_cells(notebook):
                cell.outputs = outputs or [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
            nbformat.write(notebook, path)
            report = pytest.TestReport(
                nodeid=f"{path.relative_to(execute.ROOT)}::",
                location=("", 0, ""),
                keywords={},
                outcome="passed",
                longrepr=None,
                when="call",
                duration=1.0,
            )
            keep.pytest_runtest_logreport(report)
        return 0

    monkeypatch.setattr(execute, "run_nbmake", nbmake)
    execute.surroundings.cache_clear()
    run.clean = execute.execute()
    return ran


def test_only_what_changed_runs_again(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book, name="one")
    write(book, name="two")
    assert run(book, monkeypatch) == ["one", "two"]
    assert run(book, monkeypatch) == []
    write(book, name="one", code="print(2)")
    assert run(book, monkeypatch) == ["one"]
    (book / "polylib" / "__init__.py").write_text("x = 1")
    assert run(book, monkeypatch) == ["one", "two"]
    (book / "constraints.txt").write_text("numpy==2")
    assert run(book, monkeypatch) == ["one", "two"]
    monkeypatch.setenv("POLYLIB_SCALE", "gpu")
    assert run(book, monkeypatch) == ["one", "two"]


def test_new_prose_gets_the_stored_outputs(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book)
    run(book, monkeypatch)
    write(book, prose="Better prose.\n\n+++\n\nA new cell of text.")
    assert run(book, monkeypatch) == []
    notebook = execute.stored(Path("book/one.md"))
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "markdown", "code"]
    assert notebook.cells[0].source == "Better prose."
    assert notebook.cells[2].outputs[0].text == "1\n"


def test_a_notebook_without_source_is_removed(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book)
    run(book, monkeypatch)
    (book / "book" / "one.md").unlink()
    run(book, monkeypatch)
    assert not list(execute.EXECUTED.rglob("*.ipynb"))


def test_a_warning_is_refused_and_a_progress_bar_is_not(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book)
    bar = nbformat.v4.new_output("stream", name="stderr", text="\r  0%|   | 0/3\rsweep: 100%|████| 3/3 [00:01<00:00]\n")
    assert run(book, monkeypatch, [bar]) == ["one"]
    assert run.clean
    assert execute.stored(Path("book/one.md")).cells[-1].outputs == []
    write(book, code="print(3)")
    warning = nbformat.v4.new_output("stream", name="stderr", text="x.py:1: UserWarning: careful\n")
    assert run(book, monkeypatch, [warning]) == ["one"]
    assert not run.clean
    assert run(book, monkeypatch) == ["one"]


def test_a_failure_is_not_kept(book: Path) -> None:
    write(book, code="1 / 0")
    keep = execute.Keep(execute.sources())
    report = pytest.TestReport(
        nodeid=".executed/running/book/one/one.ipynb::",
        location=("", 0, ""),
        keywords={},
        outcome="failed",
        longrepr=None,
        when="call",
    )
    keep.pytest_runtest_logreport(report)
    assert keep.problems == ["book/one.md: failed, see above"]
    assert execute.stored(Path("book/one.md")) is None


def test_checkpoints_of_jupyterlab_are_no_chapters(book: Path) -> None:
    (book / "book" / ".ipynb_checkpoints").mkdir()
    write(book, name=".ipynb_checkpoints/one-checkpoint")
    assert execute.sources() == {}


def test_half_a_file_counts_as_nothing(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book)
    run(book, monkeypatch)
    path = execute.executed_path(Path("book/one.md"))
    path.write_text(path.read_text()[:100])
    assert run(book, monkeypatch) == ["one"]


def test_lint_finds_the_cells_that_jupytext_finds() -> None:
    texts = [path.read_text() for path in execute.markdown_files() if execute.is_notebook(path)]
    options = "```{code-cell} ipython3\n:tags: [hide-input]\n\na = 1\n\nb = 2\n```\n"
    block = "````{code-cell} ipython3\n---\ntags: [x]\n---\nc = 3\n````\n"
    for text in [*texts, HEADER + options + "\nText\n\n" + block]:
        lines = text.splitlines()
        found = ["\n".join(lines[start:end]) for start, end in lint.cells(lines)]
        assert found == [cell.source for cell in execute.code_cells(jupytext.reads(text, fmt="md:myst"))]
