"""python -m tools.record chapter ...: run chapters at scale `laptop` and keep what came out.

Writes `<chapter>.laptop.json` beside the chapter: each claim's verdict, measured value and margin, with the seconds,
the date, the processor, the versions, and the digest of the code that made it. Only a run writes such a file.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from nbformat import NotebookNode

from polylib.lab import closure
from polylib.lab.claims import records_of
from tools.execute import EXECUTED, run
from tools.sources import ROOT, code_cells, code_of, find


def record_path(source: Path) -> Path:
    return ROOT / source.with_suffix(".laptop.json")


def code_digest(notebook: NotebookNode) -> str:
    """Digest of the cells and of what they reach in polylib: what must be as it was for a record to be current.

    Comments and docstrings of polylib are left out: no number depends on them.
    """
    cells = "\0".join(cell.source for cell in code_cells(notebook))
    return closure.digest(closure.of_source(code_of(notebook)), cells, comments=False)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_record(source: Path) -> dict | None:
    """The record of a chapter, if there is one."""
    path = record_path(source)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def record(names: list[str]) -> bool:
    os.environ["POLYLIB_SCALE"] = "laptop"
    notebooks = {path: notebook for path, notebook in find(names).items() if path.name != "index.md"}
    done = run(notebooks, EXECUTED / f"record-{os.getpid()}")
    for path, notebook in done.executed.items():
        claims = {claim.pop("id"): claim for claim in map(dict, records_of(notebook))}
        content = {
            "scale": "laptop",
            "date": datetime.date.today().isoformat(),
            "seconds": round(done.runs[path].seconds),
            "processor": processor(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "code": code_digest(notebooks[path]),
            "claims": claims,
        }
        record_path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{record_path(path).relative_to(ROOT)}: {len(claims)} claims, {content['seconds']} s")
    problems = [problem for took in done.runs.values() for problem in took.problems]
    print(*problems, sep="\n", file=sys.stderr)
    return not problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="+", help="such as neurons/polycom")
    return 0 if record(parser.parse_args().chapters) else 1


if __name__ == "__main__":
    sys.exit(main())
