"""Run mypy, and the tests by file. What passed with the same code behind it is not run again; `FRESH=1` runs all.

What a test file depends on: itself, the helpers of its folder, the modules of polylib that all of these reach, and the
installed set. The tests of the tools and of the site depend on everything.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from polylib.lab import closure
from tools import pace
from tools.execute import cache_folder
from tools.sources import ROOT, machine

TESTS = ROOT / "tests"
LIMIT = 12  # t that the tests of one chapter's code may take
UNLIMITED = {"kernels", "lab", "site", "fuzz"}
SHARED = ("constraints.txt", "pyproject.toml")


def _digest(files: Iterable[Path], text: str = "") -> str:
    total = hashlib.sha256(text.encode())
    for file in sorted(files):
        total.update(f"\0{file.relative_to(ROOT)}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def _everything() -> list[Path]:
    """Every file of the project that git knows or would take up."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def _code(files: Iterable[Path]) -> str:
    """The code of files, with the text of strings that hold imports: tests start other processes by such strings."""
    sources = [file.read_text(encoding="utf-8") for file in files]
    inner = [
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value
    ]
    readable = []
    for text in inner:
        try:
            ast.parse(text)
            readable.append(text)
        except SyntaxError:
            readable.append("from polylib import (" if "import polylib" in text or "from polylib" in text else "")
    if "from polylib import (" in readable:
        return "from polylib import ("  # a string with an import that can't be read: everything counts
    return "\n".join([*sources, *readable])


def digest_of(file: Path) -> str:
    """Digest of all that the result of a test file depends on."""
    stable = {**{name: os.environ.get(name, "") for name in ("ATEN_CPU_CAPABILITY", "POLYLIB_FUZZ")}}
    where = json.dumps([machine(), stable])
    if file.parent == TESTS or file.parent.name == "site":
        return _digest(_everything(), f"{file.relative_to(ROOT)} {where}")
    helpers = [path for folder in (TESTS, file.parent) for path in folder.glob("*.py") if "test_" not in path.name]
    code = _code([file, *helpers])
    files = [file, *helpers, *(ROOT / name for name in SHARED)]
    if "benchmarks" in code:
        files += [path for path in (ROOT / "benchmarks").rglob("*") if path.suffix in (".py", ".json")]
    return _digest(files, where + closure.digest(closure.of_source(code)))


def _passed_folder() -> Path:
    return cache_folder().parent / "tests"


def _is_fresh() -> bool:
    return os.environ.get("FRESH", "") not in ("", "0")


def _passed_before(digest: str) -> bool:
    return not _is_fresh() and (_passed_folder() / digest).exists()


def _keep_passed(digest: str) -> None:
    try:
        _passed_folder().mkdir(parents=True, exist_ok=True)
        (_passed_folder() / digest).touch()
    except OSError as error:
        print(f"What passed can't be kept in {_passed_folder()}: {error}", file=sys.stderr)


def run_types() -> tuple[int, int, str]:
    """mypy over the package, unless it passed over the same files."""
    files = [path for path in (ROOT / "polylib").rglob("*") if path.suffix in (".py", ".pyi")]
    digest = _digest([*files, *(ROOT / name for name in SHARED)], f"mypy {json.dumps(machine())}")
    if _passed_before(digest):
        return 1, 0, "unchanged"
    if subprocess.call([sys.executable, "-m", "mypy", "polylib"], cwd=ROOT):
        return 0, 1, "the lines of mypy above"
    _keep_passed(digest)
    return 1, 0, ""


def _run(files: list[Path], workers: int) -> tuple[dict[str, list[int]], dict[str, float], int]:
    """Run test files in one pytest. Passed, failed and skipped by file, seconds by file, and pytest's status."""
    report = ROOT / ".pytest_cache" / f"report-{os.getpid()}.xml"
    spread = ["-n", str(workers), "--dist=worksteal"] if workers > 1 else []
    command = [sys.executable, "-m", "pytest", *map(str, files), *spread, "-q", f"--junitxml={report}"]
    status = subprocess.call(command, cwd=ROOT)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    seconds: dict[str, float] = defaultdict(float)
    if report.exists():
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            parts = case.get("classname", "").split(".")
            name = next((n for n in range(len(parts), 0, -1) if Path(ROOT, *parts[:n]).with_suffix(".py").exists()), 0)
            file = Path(*parts[:name]).with_suffix(".py").as_posix() if name else case.get("classname", "")
            bad = case.find("failure") is not None or case.find("error") is not None
            counts[file][2 if case.find("skipped") is not None else int(bad)] += 1
            seconds[file] += float(case.get("time", 0))
        report.unlink()
    return counts, seconds, status


def _checked(files: list[Path], workers: int) -> tuple[int, int, str]:
    """Run what has not passed with the same code. Passed, failed, and where to look."""
    digests = {file: digest_of(file) for file in files}
    stale = [file for file in files if not _passed_before(digests[file])]
    print(f"Test files: {len(files) - len(stale)} passed before and unchanged, {len(stale)} to run", flush=True)
    if not stale:
        return len(files), 0, "all unchanged"
    t, start = pace.measure(workers), time.perf_counter()
    counts, seconds, status = _run(stale, workers)
    t = max(t, pace.measure(workers))
    print(f"\n{'seconds':>8} {'t':>6}  test file (at most {LIMIT} t for the code of one chapter)")
    for name, took in sorted(seconds.items(), key=lambda item: -item[1])[:15]:
        print(f"{took:8.1f} {took / t:6.1f}  {name}")
    print(f"{time.perf_counter() - start:8.1f} s in all")
    by_chapter = [name for name in seconds if name.count("/") == 2 and name.split("/")[1] not in UNLIMITED]
    slow = {name: seconds[name] / t for name in by_chapter if seconds[name] / t > LIMIT * pace.BROKEN}
    if slow and len(stale) > 1:  # beside others: what counts is the time alone
        t, (_, alone, _) = pace.measure(), _run([ROOT / name for name in slow], 1)
        slow = {name: alone[name] / t for name in slow if alone[name] / t > LIMIT * pace.BROKEN}
    bad = [name for name, (_, failed, _) in counts.items() if failed]
    # A browser that is missing skips its tests: nothing is known then.
    unsure = [name for name, (passed, _, skipped) in counts.items() if not passed or ("/site/" in name and skipped)]
    for file in stale:
        name = file.relative_to(ROOT).as_posix()
        if status in (0, 1) and name in counts and name not in {*bad, *slow, *unsure}:
            _keep_passed(digests[file])
    failed = sum(failed for _, failed, _ in counts.values()) + len(slow) + (status not in (0, 1))
    late = [f"{name} takes {took:.0f} t" for name, took in slow.items()]
    return sum(passed for passed, _, _ in counts.values()), failed, ", ".join([*bad, *late])


def run_library() -> tuple[int, int, str]:
    """Every test but those of the site."""
    return _checked([f for f in sorted(TESTS.rglob("test_*.py")) if f.parent.name != "site"], pace.cores())


def run_site() -> tuple[int, int, str]:
    """The tests in a browser: each page once; then, alone on the machine, those that wait for a figure to follow."""
    return _checked(sorted((TESTS / "site").glob("test_*.py")), 1)
