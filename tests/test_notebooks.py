"""The executor: what is run again, what is kept and for whom, what is refused."""

from pathlib import Path

import jupytext
import nbformat
import pytest

from polylib.lab import closure
from tools import execute, lint, pace, sources, verdicts
from tools.execute import Collect

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
MODULES = ("_lazy", "red/__init__", "red/rose", "blue/__init__", "blue/sky")


def set_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the executor work on the clone in a folder."""
    for module in (execute, sources, verdicts):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(execute, "EXECUTED", root / ".executed")
    monkeypatch.setattr(closure, "ROOT", root / "polylib")


def make_clone(root: Path) -> Path:
    """A book with a library of two parts."""
    for module in ("__init__", *MODULES):
        path = root / "polylib" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""A module."""\n\nVALUE = 1\n')
    for folder in ("book", "labs"):
        (root / folder).mkdir()
    return root


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYLIB_CACHE", str(tmp_path / "cache"))
    for name in ("POLYLIB_SCALE", "FRESH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pace, "measure", lambda busy=1: 1.0)
    clone = make_clone(tmp_path / "clone")
    set_root(clone, monkeypatch)
    return clone


def write(book: Path, prose: str = "Prose.", code: str = "print(1)", name: str = "one") -> None:
    (book / "book" / f"{name}.md").write_text(HEADER + prose + "\n\n" + CELL.format(code))


def report_on(file: Path, outcome: str = "passed", seconds: float = 1.0) -> pytest.TestReport:
    name = f"{file.relative_to(execute.ROOT).as_posix()}::"
    return pytest.TestReport(name, ("", 0, ""), {}, outcome, None, "call", duration=seconds)


class Ran:
    """Execute with a stand-in for nbmake that stores `outputs` in every cell, and notes what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.problems: list[str] = []
        self.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
        self.stop_after = 100
        self.seconds = 1.0
        monkeypatch.setattr(execute, "run_nbmake", self.nbmake)

    def nbmake(self, collect: Collect, files: list[Path], workers: int) -> int:
        for path in files:
            if len(self.names) == self.stop_after:
                raise KeyboardInterrupt
            self.names.append(path.stem)
            notebook = nbformat.read(path, as_version=4)
            for cell in execute.code_cells(notebook):
                cell.outputs = self.outputs
            nbformat.write(notebook, path)
            collect.pytest_runtest_logreport(report_on(path, seconds=self.seconds))
        return 0

    def __call__(self) -> list[str]:
        self.names = []
        try:
            self.problems = execute.report(execute.execute())
        except KeyboardInterrupt:
            self.problems = ["interrupted"]
        return sorted(self.names)


@pytest.fixture
def run(book: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(monkeypatch)


def test_only_what_changed_runs_again(book: Path, run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book, name="one")
    write(book, name="two")
    assert run() == ["one", "two"]
    assert run() == []
    write(book, name="one", code="print(2)")
    assert run() == ["one"]
    monkeypatch.setenv("POLYLIB_SCALE", "laptop")
    assert run() == ["one", "two"]
    monkeypatch.setattr(sources, "machine", lambda: ("another processor",))
    assert run() == ["one", "two"]


def test_a_change_runs_exactly_what_reaches_it(book: Path, run: Ran) -> None:
    write(book, name="red", code="from polylib.red.rose import VALUE")
    write(book, name="blue", code="import polylib.blue.sky as sky\nsky.VALUE")
    write(book, name="none", code="print(1)")
    assert run() == ["blue", "none", "red"]
    (book / "polylib" / "blue" / "sky.py").write_text('"""A better docstring."""\n\nVALUE = 1\n')
    assert run() == ["blue"]
    (book / "polylib" / "red" / "rose.py").write_text('"""A module."""\n\nVALUE = 2\n')
    assert run() == ["red"]
    (book / "polylib" / "red" / "rose.py").write_text("from polylib.blue import sky\n\nVALUE = 2\n")
    assert run() == ["red"]
    (book / "polylib" / "blue" / "sky.py").write_text("VALUE = 3\n")
    assert run() == ["blue", "red"]
    (book / "polylib" / "red" / "style.css").write_text("a {}")
    assert run() == []


def test_another_clone_restores_and_fresh_does_not(
    book: Path, run: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(book)
    assert run() == ["one"]
    other = make_clone(tmp_path / "other")
    set_root(other, monkeypatch)
    write(other, prose="The same code under other words.")
    assert run() == []
    notebook = execute.read_executed(execute.executed_path(Path("book/one.md")))
    assert notebook.cells[0].source == "The same code under other words."
    assert notebook.cells[1].outputs[0].text == "1\n"
    monkeypatch.setenv("FRESH", "1")
    assert run() == ["one"]


def test_a_killed_run_keeps_what_had_finished(book: Path, run: Ran) -> None:
    for name in ("one", "two", "three"):
        write(book, name=name, code=f"print({name!r})")
    run.stop_after = 2
    finished = run()
    assert run.problems == ["interrupted"] and len(finished) == 2
    run.stop_after = 100
    assert sorted([*finished, *run()]) == ["one", "three", "two"]
    assert not (book / ".executed" / "running").exists()


def test_new_prose_gets_the_stored_outputs(book: Path, run: Ran) -> None:
    write(book)
    run()
    write(book, prose="Better prose.\n\n+++\n\nA new cell of text.")
    assert run() == []
    notebook = execute.read_executed(execute.executed_path(Path("book/one.md")))
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "markdown", "code"]
    assert notebook.cells[0].source == "Better prose."
    assert notebook.cells[2].outputs[0].text == "1\n"


def test_a_notebook_without_source_is_removed(book: Path, run: Ran) -> None:
    write(book)
    run()
    (book / "book" / "one.md").unlink()
    run()
    assert not list((book / ".executed").rglob("*.ipynb"))


def test_a_warning_is_refused_and_a_progress_bar_is_not(book: Path, run: Ran) -> None:
    write(book)
    bar = nbformat.v4.new_output("stream", name="stderr", text="\r  0%|   | 0/3\rsweep: 100%|████| 3/3 [00:01<00:00]\n")
    run.outputs = [bar]
    assert run() == ["one"]
    assert not run.problems
    assert execute.read_executed(execute.executed_path(Path("book/one.md"))).cells[-1].outputs == []
    write(book, code="print(3)")
    run.outputs = [nbformat.v4.new_output("stream", name="stderr", text="x.py:1: UserWarning: careful\n")]
    assert run() == ["one"]
    assert "careful" in run.problems[0]
    assert run() == ["one"]


def test_a_failure_is_not_kept(book: Path) -> None:
    write(book, code="1 / 0")
    folder = book / ".executed" / "running"
    collect = Collect(folder, sources.sources(), 1.0, True)
    collect.pytest_runtest_logreport(report_on(folder / "book" / "one" / "one.ipynb", "failed"))
    assert collect.runs[Path("book/one.md")].problems == ["book/one.md: failed, see above"]
    assert not (book / ".executed" / "book").exists() and not execute.cache_folder().exists()


def test_a_notebook_that_did_not_run_is_a_problem(book: Path, run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    write(book)
    monkeypatch.setattr(execute, "run_nbmake", lambda *_: 3)
    run()
    assert "did not run" in run.problems[0]


def test_a_notebook_beyond_the_limit_is_a_problem_also_when_it_is_restored(book: Path, run: Ran) -> None:
    write(book)
    run.seconds = execute.LIMIT * pace.BROKEN + 1
    assert run() == ["one"] and "is the limit" in run.problems[0]
    assert run() == [] and "is the limit" in run.problems[0]


def test_a_notebook_that_is_late_beside_others_runs_once_more_alone(book: Path, run: Ran, monkeypatch) -> None:
    write(book, name="one")
    write(book, name="two")
    usual = run.nbmake

    def nbmake(collect: Collect, files: list[Path], workers: int) -> int:
        run.seconds = 1.0 if workers == 1 else execute.LIMIT * pace.BROKEN + 1
        return usual(collect, files, workers)

    monkeypatch.setattr(execute, "run_nbmake", nbmake)
    monkeypatch.setattr(pace, "cores", lambda: 2)
    assert run() == ["one", "one", "two", "two"] and not run.problems
    assert run() == [] and not run.problems


def test_checkpoints_of_jupyterlab_are_no_chapters(book: Path) -> None:
    (book / "book" / ".ipynb_checkpoints").mkdir()
    write(book, name=".ipynb_checkpoints/one-checkpoint")
    assert sources.sources() == {}


def test_half_a_file_in_the_cache_counts_as_nothing(book: Path, run: Ran) -> None:
    write(book)
    run()
    (path,) = execute.cache_folder().iterdir()
    path.write_text(path.read_text()[:100])
    assert run() == ["one"]


def test_a_cache_that_cannot_be_written_costs_no_result(book: Path, run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = book / "a file"
    blocked.write_text("")
    monkeypatch.setenv("POLYLIB_CACHE", str(blocked))
    write(book)
    assert run() == ["one"] and not run.problems
    assert execute.read_executed(execute.executed_path(Path("book/one.md"))).cells[-1].outputs


def test_an_unknown_name_is_answered_with_those_there_are(book: Path) -> None:
    write(book)
    assert list(sources.find(["one"])) == [Path("book/one.md")]
    with pytest.raises(SystemExit, match=r"'two'.*one"):
        sources.find(["two"])


def test_lint_finds_the_cells_that_jupytext_finds() -> None:
    texts = [path.read_text() for path in sources.markdown_files() if sources.is_notebook(path)]
    options = "```{code-cell} ipython3\n:tags: [hide-input]\n\na = 1\n\nb = 2\n```\n"
    block = "````{code-cell} ipython3\n---\ntags: [x]\n---\nc = 3\n````\n"
    for text in [*texts, HEADER + options + "\nText\n\n" + block]:
        lines = text.splitlines()
        found = ["\n".join(lines[start:end]) for start, end in lint.cells(lines)]
        assert found == [cell.source for cell in sources.code_cells(jupytext.reads(text, fmt="md:myst"))]
