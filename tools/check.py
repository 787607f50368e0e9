"""python -m tools.check [--changed]: every check, then one table of what came out.

A stage that fails does not keep the others from running, unless they need what it makes. Tests that passed before, with
the same code, are not run again; `FRESH=1` runs everything. `--changed` stops short of the site: style, types, the
library's tests and the notebooks, each as far as something changed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tools import pace


class Outcome(NamedTuple):
    """What a stage found: counts, and where to look."""

    passed: int
    failed: int
    look: str = ""


class Row(NamedTuple):
    stage: str
    seconds: float
    t: float
    outcome: Outcome


def style() -> Outcome:
    from tools import lint

    return Outcome(0, 1, "make format, and the lines above") if lint.main([]) else Outcome(1, 0)


def types() -> Outcome:
    from tools import tests

    return Outcome(*tests.run_types())


def library() -> Outcome:
    from tools import tests

    return Outcome(*tests.run_library())


def notebooks() -> Outcome:
    from tools import execute

    runs = execute.execute()
    problems = execute.report(runs)
    failed = {problem.split(":")[0] for problem in problems}
    restored = sum(took.restored for took in runs.values())
    return Outcome(len(runs) - len(failed), len(failed), ", ".join(sorted(failed)) or f"{restored} restored")


def claims() -> Outcome:
    from tools import verdicts
    from tools.sources import sources

    agree, wrong = verdicts.check(sources())
    print(f"{agree} claims as expected", *wrong, sep="\n")
    return Outcome(agree, len(wrong), "the lines of stage 'the claims'" if wrong else "")


def site() -> Outcome:
    from tools import book

    return Outcome(1, 0) if book.build(executed=True) else Outcome(0, 1, "the warnings of the site above")


def pages() -> Outcome:
    from tools import book, tests

    return Outcome(*tests.run_site()) if book.is_built() else Outcome(0, 1, "not run: there is no site")


STAGES: dict[str, Callable[[], Outcome]] = {
    "style of code and cells": style,
    "types": types,
    "the library": library,
    "chapters and labs": notebooks,
    "the claims": claims,
    "the site": site,
    "the pages in a browser": pages,
}


def run(stages: dict[str, Callable[[], Outcome]]) -> list[Row]:
    rows = []
    for number, (name, stage) in enumerate(stages.items(), start=1):
        print(f"\n== {number}/{len(stages)} {name}", flush=True)
        t, start = pace.measure(), time.perf_counter()
        try:
            outcome = stage()
        except Exception as error:  # the table comes whatever a stage does
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            outcome = Outcome(0, 1, f"{type(error).__name__}: {error}"[:80])
        seconds = time.perf_counter() - start
        rows.append(Row(name, seconds, seconds / max(t, pace.measure()), outcome))
    return rows


def table(rows: list[Row]) -> str:
    head = f"{'stage':<26}{'seconds':>9}{'t':>8}{'passed':>8}{'failed':>8}  look at"
    lines = [
        f"{row.stage:<26}{row.seconds:9.0f}{row.t:8.0f}{row.outcome.passed:8}{row.outcome.failed:8}  {row.outcome.look}"
        for row in rows
    ]
    total = f"{'all':<26}{sum(row.seconds for row in rows):9.0f}{sum(row.t for row in rows):8.0f}"
    return "\n".join([head, *lines, total])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changed", action="store_true", help="stop short of the site")
    changed = parser.parse_args().changed
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    skipped = ("the site", "the pages in a browser") if changed else ()
    rows = run({name: stage for name, stage in STAGES.items() if name not in skipped})
    print("\n" + table(rows))
    return 1 if any(row.outcome.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
