"""Time the ops against their peers: `python -m benchmarks.run [op ...] [--json FILE] [--quick]`.

For every op and size: the reference in eager PyTorch ("reference"), the reference under `torch.compile` ("compiled"),
the peers that `ops/<op>.py` names, and the public function as a user calls it ("ours"), in inference and in forward
plus backward. On a CPU "ours" is the CPU path. A new op needs no entry here, only a file with a function `cases`:

    cases(device, quick) yields (label, dtype, (cost of inference, cost of forward and backward),
                                 {contestant: (function, its tensors)})

On a GPU the kernels are checked first, each against its definition in float64; an op that fails is not timed.

Times are medians. GB/s, TFLOP/s and the share of the ceiling use the least bytes and flops of the op's `cost`, and the
bandwidth and matrix-product rate measured on this machine first; "vs best" is the best peer's time over ours.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pkgutil
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import benchmarks.ops
from polylib.kernels._common import HAS_TRITON
from polylib.kernels._cost import Cost


def op_names() -> list[str]:
    """Return the names of the op files."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__))


def is_right(op: str) -> bool:
    """Run the tests of an op on this device, and tell whether they pass."""
    test = Path(__file__).parents[1] / "tests" / "kernels" / f"test_{op}.py"
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=test.parents[2])
    if result.returncode:
        print(f"{op}: the tests fail on this device; it is not timed", file=sys.stderr)
    return result.returncode == 0


def measure(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median time of one call in seconds, spending about `seconds` on it after a warm-up."""
    function()
    if device.type == "cuda" and HAS_TRITON:
        from triton.testing import do_bench  # CUDA events, and the L2 cache cleared before each call

        return do_bench(function, warmup=int(250 * seconds), rep=int(1000 * seconds), return_mode="median") / 1e3
    from torch.utils.benchmark import Timer

    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    once = max(timer.timeit(1).median, 1e-7)
    calls = max(1, int(seconds / 20 / once))  # about twenty samples, each long enough to time
    return statistics.median(timer.timeit(calls).median for _ in range(max(5, min(20, int(seconds / once)))))


def ceiling(device: torch.device, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """Measure the bandwidth of a large copy in bytes/s and the rate of a large matrix product in flop/s."""
    on_gpu, seconds = device.type == "cuda", 0.02 if quick else 0.4
    source = torch.zeros(2**28 if on_gpu else 2**22 if quick else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 256 if quick else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    # The best of five: a ceiling measured in a slow spell would be exceeded.
    copy = min(measure(lambda: target.copy_(source), device, seconds) for _ in range(5))
    product = min(measure(lambda: a @ b, device, seconds) for _ in range(5))
    return 2 * source.numel() / copy, 2 * side**3 / product


def contestant(function: Callable, tensors: tuple, training: bool) -> Callable[[], object]:
    """Return a call of `function` without gradients, or with the gradients of every tensor."""
    if not training:

        def inference() -> object:
            with torch.no_grad():
                return function(*tensors)

        return inference
    tensors = tuple(t.detach().requires_grad_() for t in tensors)
    with torch.no_grad():
        grad = torch.randn_like(function(*tensors))
    return lambda: torch.autograd.grad(function(*tensors), tensors, grad)


def bench(ops: Iterable[str], device: torch.device, quick: bool) -> tuple[list[dict], dict[str, dict[str, float]]]:
    """Return one row for every op, size, direction and contestant, and the measured ceiling of every dtype."""
    rows, ceilings = [], {}
    jobs = [(op, case) for op in ops for case in importlib.import_module(f"benchmarks.ops.{op}").cases(device, quick)]
    # A case without a cost of training has no gradient to time.
    both = [(job, training) for job in jobs for training in (False, True) if job[1][2][training] is not None]
    for (op, case), training in progress(both):
        label, dtype, costs, functions = case
        name = str(dtype).removeprefix("torch.")
        if name not in ceilings:
            rates = ceiling(device, dtype, quick)
            ceilings[name] = {"bytes_per_second": rates[0], "flops_per_second": rates[1]}
        torch.compiler.reset()  # or the limit on recompilations would quietly turn the compiled peers into eager ones
        reference, tensors = functions["reference"]
        compiled = torch.compile(reference, dynamic=False)
        functions = {"reference": (reference, tensors), "compiled": (compiled, tensors), **functions}
        direction = "forward+backward" if training else "inference"
        calls, samples, errors = {}, {}, {}
        for who, (function, inputs) in functions.items():
            try:
                calls[who] = contestant(function, inputs, training)
                calls[who]()
            except Exception as error:  # a peer that can't run here (no compiler, say) must not end the table
                calls.pop(who, None)
                errors[who] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        for _ in range(3):  # in turns, so that a slow spell of the machine meets everyone
            for who, call in calls.items():
                samples.setdefault(who, []).append(measure(call, device, 0.02 if quick else 0.4))
        times = {who: statistics.median(of_who) for who, of_who in samples.items()}
        for who in functions:
            row = {"op": op, "case": label, "dtype": name, "direction": direction, "contestant": who}
            if who in errors:
                row["error"] = errors[who]
            else:
                row |= figures(times[who], costs[training], **ceilings[name])
                if who == "ours" and len(times) > 1:
                    row["vs_best_peer"] = min(t for peer, t in times.items() if peer != "ours") / times[who]
            rows.append(row)
    return rows, ceilings


def figures(seconds: float, cost: Cost, bytes_per_second: float, flops_per_second: float) -> dict[str, float]:
    """Return what a time means for an op of this cost on a machine with these rates."""
    return {
        "seconds": seconds,
        "gb_per_second": cost.bytes / seconds / 1e9,
        "tflops_per_second": cost.flops / seconds / 1e12,
        "share_of_ceiling": cost.floor(bytes_per_second, flops_per_second) / seconds,
    }


def progress(jobs: list) -> Iterable:
    """Show on stderr how far the run is."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i, job in enumerate(jobs):
            print(f"case {i + 1} of {len(jobs)}", file=sys.stderr)
            yield job
    else:
        yield from tqdm(jobs, desc="bench", unit="case", file=sys.stderr)


def table(rows: list[dict]) -> str:
    """Return the rows as aligned plain text."""
    line = "{:<17} {:<16} {:<9} {:<17} {:<10} {:>10} {:>8} {:>8} {:>8} {:>8}".format
    out = [line("op", "case", "dtype", "direction", "who", "ms", "GB/s", "TFLOP/s", "ceiling", "vs best")]
    for row in rows:
        head = [row[key] for key in ("op", "case", "dtype", "direction", "contestant")]
        if "error" in row:
            out.append(line(*head, "failed", "", "", "", "") + "  " + row["error"])
            continue
        ratio = f"{row['vs_best_peer']:.2f}x" if "vs_best_peer" in row else ""
        rates = (f"{row['gb_per_second']:.2f}", f"{row['tflops_per_second']:.4g}", f"{row['share_of_ceiling']:.0%}")
        out.append(line(*head, f"{row['seconds'] * 1e3:.3f}", *rates, ratio))
    return "\n".join(out)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the CPU model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def save(path: Path, record: dict) -> None:
    """Write JSON so that a reader, or a kill in the middle, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Time the ops and their peers.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"all by default: {', '.join(op_names())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows with device, versions and date")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and short runs, to see that it works")
    args = parser.parse_args(arguments)
    unknown = [op for op in args.ops if op not in op_names()]
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; the ops are {', '.join(op_names())}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = args.ops or op_names()
    if device.type == "cuda":
        ops = [op for op in ops if is_right(op)]
    rows, ceilings = bench(ops, device, args.quick)
    print(table(rows))
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        if HAS_TRITON:
            versions["triton"] = importlib.import_module("triton").__version__
        record = {"device": device_name(device), "threads": torch.get_num_threads(), "versions": versions}
        record |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "quick": args.quick}
        save(args.json, record | {"ceiling": ceilings, "rows": rows})


if __name__ == "__main__":
    main()
