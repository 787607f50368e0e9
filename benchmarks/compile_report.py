"""Compile the kernels without a GPU, count their traffic, and keep what was seen.

`python -m benchmarks.compile_report` does it for every op, `python -m benchmarks.compile_report op ...` for some; an op
takes a few minutes. The results are kept in
`results/compile/<op>.json`; tests read them, and the page "The kernels" of the book shows them. They belong to the code
whose digest they carry: comments and docstrings aside, any change of an op asks for a new report of it.

On sm_90 every tile that may be chosen is compiled, elsewhere the default. gfx942 is AMD's; nothing ran there either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import benchmarks.ops
from polylib.lab.closure import code_only

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "compile"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
EVERY_TILE = "sm_90"
OPS = sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__))


def digest(op: str) -> str:
    """Return a number that changes with the code of an op's kernels and launches, or of what is compiled of them."""
    kernels = ROOT / "polylib" / "kernels"
    source = (kernels / f"{op}.py").read_text(encoding="utf-8")
    start, end = source.index("# --- the kernels"), source.index("# --- the public function")
    text = [code_only(source[start:end])]
    shared = ["_common.py", "_polynomials.py", *(["_attention.py"] if "._attention import" in source else [])]
    for file in (kernels / name for name in shared):
        text.append(code_only(file.read_text(encoding="utf-8")))
    launches = code_only((ROOT / "benchmarks" / "ops" / f"{op}.py").read_text(encoding="utf-8"))
    text.append(launches[launches.index("def launches") :])
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def run_module(module: str, *arguments: str) -> list[dict]:
    """Run a module in a process of its own, since Triton decides at import whether it interprets, and read its JSON."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def merged(records: Iterable[dict]) -> list[dict]:
    """Put together what differs in nothing but the case, and drop the op's name."""
    found: dict[str, dict] = {}
    for record in records:
        rest = {key: value for key, value in record.items() if key not in ("op", "case")}
        kept = found.setdefault(json.dumps(rest, sort_keys=True), {"cases": []} | rest)
        if record["case"] not in kept["cases"]:
            kept["cases"].append(record["case"])
    return list(found.values())


def report(op: str) -> dict:
    """Return all that can be known of an op's kernels without a GPU."""
    kernels = []
    for target in TARGETS:
        kernels += run_module("benchmarks.offline", target, op, *([] if target == EVERY_TILE else ["--default"]))
    traffic = [{k: v for k, v in record.items() if k != "op"} for record in run_module("benchmarks.traffic", op)]
    return {"digest": digest(op), "triton": version("triton"), "kernels": merged(kernels), "traffic": traffic}


def load(op: str) -> dict:
    """Return the kept report of an op."""
    return json.loads((RESULTS / f"{op}.json").read_text(encoding="utf-8"))


def save(op: str, found: dict) -> None:
    """Write a report, one record a line."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = [f' "digest": {json.dumps(found["digest"])}', f' "triton": {json.dumps(found["triton"])}']
    for key in ("kernels", "traffic"):
        records = ",\n".join(f"  {json.dumps(record)}" for record in found[key])
        lines.append(f' "{key}": [\n{records}\n ]')
    (RESULTS / f"{op}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"all by default: {', '.join(OPS)}")
    args = parser.parse_args(arguments)
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        parser.error(f"op must be one of {', '.join(OPS)}, got {', '.join(unknown)}")

    def work(op: str) -> None:
        save(op, report(op))
        print(f"{op}: {RESULTS / op}.json", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, args.ops or OPS))


if __name__ == "__main__":
    main()
