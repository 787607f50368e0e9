"""Compile what an op launches for a GPU that is not there, and read the machine code.

`python -m benchmarks.offline ARCHITECTURE [--default] [op ...]` prints JSON: one record a kernel, tile, dtype and case.
A stand-in driver names the target; launches on CPU tensors then end in machine code and not in a run. The interpreter
accepts kernels that the compiler rejects, and can't see registers, spills or how wide a load is.

Widths are those of the loads and stores of each operand in PTX, found by following each address back to the pointer
it starts from; registers, spills and instructions are read from the final machine code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read by Triton when it is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.autotuner import Autotuner

from benchmarks.hardware import GPUS, occupancy


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def target_of(architecture: str) -> GPUTarget:
    """Return Triton's name for "sm_90" or "gfx942"."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


def compile_launches(launch: Callable[[], object], every_tile: bool) -> list[dict[str, Any]]:
    """Run `launch` with every kernel compiled in place of launched, and return a record of each."""
    records: list[dict[str, Any]] = []
    run, tune = JITFunction.run, Autotuner.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        if driver.active.get_current_target().backend != "cuda":
            kwargs.pop("maxnreg", None)  # as `polylib.kernels._common.registers` leaves it out there
            if kwargs.get("PRECISION") == "tf32x3":
                kwargs["PRECISION"] = "bf16x6"  # as `polylib.kernels.vandermonde` has it there
        kernel = run(self, *args, **kwargs | {"warmup": True})
        if not any(r["hash"] == kernel.hash for r in records):  # one kernel launched twice is one record
            records.append(describe(kernel, self, every_tile) | {"hash": kernel.hash})

    def walk_tiles(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for number, config in enumerate(self.prune_configs(kwargs)):
            if number == 0 or every_tile:
                before = len(records)
                self.fn.run(*args, **kwargs | config.all_kwargs())
                for record in records[before:]:
                    record["default"] = number == 0
                    record["tile"] = config.kwargs | {"stages": config.num_stages}

    JITFunction.run, Autotuner.run = compile_only, walk_tiles
    try:
        launch()
    finally:
        JITFunction.run, Autotuner.run = run, tune
    for record in records:
        del record["hash"]
    return records


def describe(kernel: Any, function: JITFunction, count: bool) -> dict[str, Any]:
    """Return what is worth knowing of a compiled kernel."""
    record = {"kernel": function.fn.__name__.strip("_"), "warps": kernel.metadata.num_warps, "default": True}
    record["shared"] = kernel.metadata.shared
    constants = {name: value for name, value in named_constants(kernel, function).items() if name.isupper()}
    record["constants"] = constants
    if "cubin" in kernel.asm:
        names = kernel.src.signature.items()
        pointers = [name if str(kind).startswith("*") else "" for name, kind in names if kind != "constexpr"]
        record |= nvidia_code(kernel.asm["cubin"], count) | widths(kernel.asm["ptx"], pointers)
        record["tensor_cores"] = tensor_cores(kernel.asm["ptx"])
        gpu = GPUS[f"sm_{kernel.metadata.target.arch}"]
        record["launchable"] = record["shared"] <= gpu.shared_a_block and record["warps"] <= 32
        record["occupancy"] = occupancy(gpu, record["registers"], record["shared"], record["warps"])
    else:
        record |= amd_code(kernel.asm["amdgcn"])
        record["launchable"] = record["shared"] <= 65536
    return record


def named_constants(kernel: Any, function: JITFunction) -> dict[str, Any]:
    """The compile-time constants by name: tiles and switches."""
    return {
        function.arg_names[path[0]]: value
        for path, value in kernel.src.constants.items()
        if len(path) == 1 and isinstance(value, (int, str, bool))
    }


CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def nvidia_code(cubin: bytes, count: bool) -> dict[str, Any]:
    """Registers a thread and spills (loads and stores of local memory) of a cubin; its instructions if `count`."""

    def listing(option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

    usage = listing("-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    record = {"registers": int(match[1]), "spills": 0}
    if count or int(match[2]):
        code = listing("-sass")
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", code)
        record["spills"] = sum(name.split(".")[0] in ("LDL", "STL") for name in names)
        if count:
            record["instructions"] = sum(name != "NOP" for name in names)
    return record


def tensor_cores(ptx: str) -> str:
    """The kind of matrix instruction, or "" if there is none."""
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name
    return ""


ACCESS = re.compile(r"\b(ld|st)\.global((?:\.[\w:]+)*)\s+([^;]*);")
COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global(?:\.[\w:]+)*\s+\[[^\]]*\],\s*\[\s*(%\w+)[^\]]*\],\s*(\w+)")


def widths(ptx: str, names: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Return {"loads": {operand: {bits: instructions}}, "stores": ...} of the accesses to global memory in PTX."""
    sources = defaultdict(set)  # of each 64-bit register: the registers and parameters that it is computed from
    for line in ptx.splitlines():
        if match := re.match(r"\s*(?:@!?%\w+\s+)?(\w[\w.]*)\s+(%rd\d+),\s*(.*);", line):
            sources[match[2]] |= set(re.findall(r"%rd\d+|_param_\d+", match[3]))
    found: dict[str, dict[str, dict[str, int]]] = {"loads": {}, "stores": {}}

    def note(way: str, register: str, bits: int) -> None:
        for name in sorted(origins(register, sources, names)):
            counts = found[way].setdefault(name, {})
            counts[str(bits)] = counts.get(str(bits), 0) + 1

    for way, options, operands in ACCESS.findall(ptx):
        address = re.search(r"\[\s*(%\w+)", operands)
        lanes, size = re.search(r"\.v(\d)", options), re.search(r"\.[bfsu](\d+)(?!.*\.[bfsu]\d)", options)
        assert address and size, (options, operands)
        note("loads" if way == "ld" else "stores", address[1], int(size[1]) * int(lanes[1] if lanes else 1))
    for register, size in COPY.findall(ptx):
        note("loads", register, 8 * int(size, 0))
    return found


def origins(register: str, sources: dict[str, set[str]], names: list[str]) -> set[str]:
    """The pointers among the kernel's parameters that an address is computed from."""
    seen, todo, found = set(), [register], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.startswith("_param_"):
            number = int(current.removeprefix("_param_"))
            if number < len(names) and names[number]:
                found.add(names[number])
        todo += sources.get(current, ())
    return found


def amd_code(assembly: str) -> dict[str, Any]:
    """Vector registers, spills and the widest load and store, in bits, of AMD assembly."""
    count = {key: re.search(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count")}
    sizes = {
        "dwordx4": 128,
        "dwordx3": 96,
        "dwordx2": 64,
        "dword": 32,
        "ushort": 16,
        "short": 16,
        "ubyte": 8,
        "byte": 8,
    }
    widest = {}
    for way in ("load", "store"):
        kinds = re.findall(rf"(?:global|buffer|flat)_{way}_(dwordx\d|dword|u?short|u?byte)", assembly)
        widest[f"widest_{way}"] = max((sizes[kind] for kind in kinds), default=0)
    registers, spills = (int(match[1]) if match else 0 for match in count.values())
    return {"registers": registers, "spills": spills, **widest, "tensor_cores": "mfma" if "v_mfma" in assembly else ""}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline")
    parser.add_argument("architecture")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--default", action="store_true", help="the default tile of each kernel only")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains this")
    args = parser.parse_intermixed_args(arguments)
    driver.set_active(Driver(target_of(args.architecture)))
    records = []
    for op in args.ops:
        for launch in importlib.import_module(f"benchmarks.ops.{op}").launches():
            if args.only not in launch.label:
                continue
            head = {
                "op": op,
                "case": launch.label,
                "dtype": str(launch.dtype).removeprefix("torch."),
                "target": args.architecture,
            }
            records += [head | record for record in compile_launches(launch.run, not args.default)]
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    with torch.no_grad():
        main()
