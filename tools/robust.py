"""python -m tools.robust [chapter ...]: the verdicts under the vector instructions of other processors.

Each notebook, all by default, is executed three times: with PyTorch's, MKL's and oneDNN's plain instructions, with
AVX2, and with the machine's own. The ordinary outputs serve for the last and are not touched; those of the other two
are kept beside them, so that a run that was stopped goes on (`FRESH=1` ignores them all). The table has the claims
whose verdicts differ first. `--library` runs the library's tests in the same three ways.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from polylib.lab.claims import by_number, records_of
from tools import pace
from tools.execute import EXECUTED, kept, run
from tools.sources import ROOT, digest_of, find

WAYS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "own": {},
}


def switch(settings: dict[str, str]) -> None:
    """Set the switches for the processes that are started from now on."""
    for name in WAYS["default"]:
        os.environ.pop(name, None)
    os.environ.update(settings)


def table(found: dict[str, dict[tuple[str, str], dict[str, str]]]) -> tuple[list[str], int]:
    """Lines for each claim with its verdict in each way, those that differ first; and how many differ."""
    names = sorted({key for records in found.values() for key in records}, key=lambda key: (key[0], by_number(key[1])))
    same, differ = [], []
    for chapter, id in names:
        records = [found[way].get((chapter, id)) for way in WAYS]
        verdicts = [record["verdict"] if record else "no verdict" for record in records]
        lines = [f"{chapter:<45} {id:<5} " + " | ".join(verdicts)]
        if len(set(verdicts)) > 1:
            lines += [
                f"      {way:<8} {record['measured']}  [{record['margin']}]"
                for way, record in zip(WAYS, records, strict=True)
                if record
            ]
            differ += lines
        else:
            same += lines
    return [*differ, "", *same], sum(not line.startswith(" ") for line in differ)


def verdicts(names: Iterable[str], workers: int) -> bool:
    notebooks = find(list(names))
    digests = {path: digest_of(notebook) for path, notebook in notebooks.items()}  # before torch sees other switches
    found: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    failed = []
    for way, settings in WAYS.items():
        print(f"\n== {way}: {len(notebooks)} notebooks", flush=True)
        switch(settings)
        variant = f"-{way}" if settings else ""
        executed = {path: done for path in notebooks if (done := kept(digests[path] + variant))}
        if stale := {path: notebook for path, notebook in notebooks.items() if path not in executed}:
            folder = EXECUTED / f"robust-{os.getpid()}"
            done = run(stale, folder, workers=workers, store=bool(variant), variant=variant)
            failed += [f"{way}: {problem}" for took in done.runs.values() for problem in took.problems]
            executed |= done.executed
        found[way] = {
            (Path(path).with_suffix("").as_posix(), record["id"]): record
            for path, notebook in executed.items()
            for record in records_of(notebook)
        }
    switch({})
    lines, differ = table(found)
    print("\nclaim: " + " | ".join(WAYS), *lines, sep="\n")
    print(f"\n{len(lines) and differ} claims differ", *failed, sep="\n")
    return not differ and not failed


def library() -> bool:
    good = True
    for way, settings in WAYS.items():
        print(f"\n== {way}: the library's tests", flush=True)
        switch(settings)
        # Inductor keeps compiled code without the instructions it was made for: one cache for each.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"polylib-inductor-{way}")}
        command = [sys.executable, "-m", "pytest", "tests", "--ignore=tests/site", "-n", str(pace.cores()), "-q"]
        good &= subprocess.call(command, cwd=ROOT, env=os.environ | cache) == 0
    switch({})
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", help="such as neurons/polycom; all by default")
    parser.add_argument("--library", action="store_true", help="the library's tests in place of chapters")
    parser.add_argument("--workers", type=int, default=0, help="how many notebooks run at once; default: the cores")
    arguments = parser.parse_args()
    good = library() if arguments.library else verdicts(arguments.chapters, arguments.workers)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
