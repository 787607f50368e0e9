"""The runner of tests: what passed with the same code is not run again, and what failed is."""

from pathlib import Path

import pytest

from polylib.lab import closure
from tools import pace, sources, tests


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of two modules, each with a test file; `run` notes which files it was given."""
    for part in ("red", "blue"):
        (tmp_path / "polylib" / part).mkdir(parents=True)
        (tmp_path / "polylib" / part / "__init__.py").write_text("")
        (tmp_path / "polylib" / part / "thing.py").write_text("VALUE = 1\n")
        (tmp_path / "tests" / part).mkdir(parents=True)
        (tmp_path / "tests" / part / "test_thing.py").write_text(f"from polylib.{part}.thing import VALUE\n")
    (tmp_path / "polylib" / "__init__.py").write_text("")
    (tmp_path / "polylib" / "_lazy.py").write_text("")
    for name in tests.SHARED:
        (tmp_path / name).write_text("")
    for module in (tests, sources):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(tests, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(closure, "ROOT", tmp_path / "polylib")
    monkeypatch.setattr(pace, "measure", lambda busy=1: 1.0)
    monkeypatch.setenv("POLYLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FRESH", raising=False)
    return tmp_path


class Runs:
    """A stand-in for pytest in which the named parts fail or take long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.failing: set[str] = set()
        self.slow: set[str] = set()
        self.slow_beside_others: set[str] = set()
        monkeypatch.setattr(tests, "_run", self.run)

    def run(self, files: list[Path], workers: int) -> tuple[dict, dict, int]:
        names = {file.relative_to(tests.ROOT).as_posix(): file.parent.name for file in files}
        self.ran = sorted(names.values())
        counts = {name: [2, 1, 0] if part in self.failing else [3, 0, 0] for name, part in names.items()}
        slow = self.slow | (self.slow_beside_others if len(files) > 1 else set())
        seconds = {name: 100.0 if part in slow else 1.0 for name, part in names.items()}
        return counts, seconds, int(bool(self.failing))

    def __call__(self) -> tuple[int, int, str]:
        self.ran = []
        return tests.run_library()


@pytest.fixture
def library(project: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def test_what_passed_is_run_again_only_when_its_code_changes(project: Path, library: Runs) -> None:
    assert library()[:2] == (6, 0) and library.ran == ["blue", "red"]
    assert library()[1] == 0 and library.ran == []
    (project / "polylib" / "red" / "thing.py").write_text("VALUE = 2\n")
    assert library()[1] == 0 and library.ran == ["red"]
    (project / "tests" / "blue" / "test_thing.py").write_text("from polylib.red.thing import VALUE\n")
    assert library()[1] == 0 and library.ran == ["blue"]
    (project / "polylib" / "red" / "thing.py").write_text("VALUE = 3\n")
    assert library()[1] == 0 and library.ran == ["blue", "red"]


def test_what_failed_is_run_again_and_named(library: Runs) -> None:
    library.failing = {"red"}
    passed, failed, look = library()
    assert (passed, failed) == (5, 1) and look == "tests/red/test_thing.py"
    library.failing = set()
    assert library()[1] == 0 and library.ran == ["red"]


def test_fresh_runs_everything(library: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    monkeypatch.setenv("FRESH", "1")
    library()
    assert library.ran == ["blue", "red"]


def test_tests_that_take_too_long_fail(library: Runs) -> None:
    library.slow = {"blue"}
    _, failed, look = library()
    assert failed == 1 and "tests/blue/test_thing.py takes 100 t" in look


def test_tests_that_take_long_beside_others_run_once_more_alone(library: Runs) -> None:
    library.slow_beside_others = {"blue"}
    assert library()[1] == 0 and library.ran == ["blue"]  # the second time
    assert library()[1] == 0 and library.ran == []


def test_imports_in_the_strings_of_a_test_count(project: Path, library: Runs) -> None:
    file = project / "tests" / "blue" / "test_thing.py"
    file.write_text('CODE = """\nfrom polylib.red.thing import VALUE\n"""\n')
    before = tests.digest_of(file)
    (project / "polylib" / "red" / "thing.py").write_text("VALUE = 2\n")
    assert tests.digest_of(file) != before


def test_files_that_depend_on_everything_are_told_apart(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests, "_everything", lambda: [project / name for name in tests.SHARED])
    assert tests.digest_of(tests.TESTS / "test_tools.py") != tests.digest_of(tests.TESTS / "site" / "test_pages.py")
