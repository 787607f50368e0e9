"""What the compiler makes of every kernel, as committed, and whether it still belongs to the code."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import compile_report
from benchmarks.hardware import GPUS, occupancy
from polylib.kernels import excerpt

NVIDIA = [target for target in compile_report.TARGETS if target.startswith("sm_")]
# Tensors of a few hundred entries, whose loads are no traffic; values of which a launch reads one a row or a group.
SMALL = {"weight", "bias", "v", "numerator", "denominator", "A", "sums", "partial", "b_r", "b_g", "b_b", "grad_b"}
# In the names of cases whose rows are no multiple of 16 bytes.
ODD = ("x1001", "x1041", "->1041", "x4099", "17003", "17x17", "999x34")
A_ROW = {"rate", "decay", "means", "rstds", "mean_out", "rstd_out", "int_bits"}


def kernels(op, *targets):
    records = [k for k in compile_report.load(op)["kernels"] if k["target"] in targets]
    assert records
    return records


@pytest.mark.parametrize("op", compile_report.OPS)
def test_the_report_belongs_to_the_code(op):
    assert compile_report.load(op)["digest"] == compile_report.digest(op), (
        f"the kernels of {op} have changed; run python -m benchmarks.compile_report {op}"
    )


def cannot_be_launched(op, record):
    return not record["launchable"]


def spills(op, record):
    """A value is kept in memory, or not even one block fits on a multiprocessor."""
    return record["spills"] > 0 or record["occupancy"] < record["warps"]


def is_narrow(op, record):
    """A tensor whose rows are a multiple of 16 bytes is read or written in smaller pieces.

    What is narrow beside is the masked end of a row or a tensor: no more than one block.
    """
    if all(any(odd in case for odd in ODD) for case in record["cases"]):
        return False
    small = SMALL | A_ROW | ({"x", "y", "scale"} if op == "phm_linear" else {"scale"})
    if op == "binary_linear":  # packed, a thirty-second of what is read; and one row, with a number for each row of w
        small |= {"x", "y"} if record["kernel"] == "few_rows_kernel" else {"words"}
    if op == "group_sort":  # a bit for two entries
        small |= {"words"}
    if op == "interval_affine_relu":  # a number for each channel
        small |= {"shift"}
    if op == "masked_gemm_reduce":  # a number for each row, and a word for 32 entries of it
        small |= {"r", "words"}
    if op == "mkor_refresh":  # numbers of a tile and of its rows, and of these one sum for each tile beside it
        small |= {"table", "vectors", "y", "dots", "before_max", "largest"}
    if op == "vandermonde":  # pairs of numbers, of each wave one
        small |= {"v", "x", "by_v", "by_x"}
    if op == "s4d_scan":  # numbers of a wave; and tiles of few rows, 64 bits a thread, of which a warp has whole lines
        tiles = {"u", "grad", "y", "states", "back"}
        small |= {"factor", "by_factor"}
        small |= {
            name
            for name in tiles
            if not {"16", "32"} & {*record["loads"].get(name, {}), *record["stores"].get(name, {})}
        }
    if op == "topk_simplex":  # a number for each row
        small |= {"mass", "by_mass"}
    if op == "sparse_down":  # numbers of a token and of its units, of which each stands for a row
        small |= {"values", "indices", "by_values", "order", "ends", "out", "grad"}
    if op == "delta_relu":  # sums of a program, and steps, of which many entries share one
        small |= {"q", "totals", "counts", "by_total", "by_q"}
    if op == "monarch_multiply" and record["kernel"] == "weight_kernel":  # of a tile, four numbers a thread at most
        small |= {"grad"}
    if op in ("kernel_attention_rpe", "combiner_attention"):  # numbers of a place or a block, of which each is one row
        small |= {"most", "total", "dots", "within", "key_summary", "value_summary"}
        small |= {"key_summary_grad", "value_summary_grad", "parts"}  # the last written once, after many tiles
        if all("x16x48" in case for case in record["cases"]):  # 16 numbers in two bytes: 64 bits for each thread
            small |= {"queries", "keys", "dqueries", "dkeys", "dq", "dk"}
    if op == "topk_residual":  # what is sent is read again and written, entry by entry, wherever it lies in a block
        wide = [record["loads"].get(name, {"128": 1}) for name in ("gradient", "state")]
        return not all("128" in bits for bits in wide)
    for way in ("loads", "stores"):
        for name in record[way].keys() - small:
            bits = {int(width): number for width, number in record[way][name].items()}
            if sum(width * number for width, number in bits.items() if width < 128) > 128 * bits.get(128, 0):
                return True
    return False


def reads_a_value_of_a_row_for_every_entry(op, record):
    names = ("scale", "rate", "decay") if op in ("fake_quantize", "sweep_step") else ()
    return any(sum(record["loads"].get(name, {}).values()) > 1 for name in names)


FAULTS = [cannot_be_launched, spills, is_narrow, reads_a_value_of_a_row_for_every_entry]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", compile_report.OPS)
def test_no_tile_that_may_be_chosen_has_a_fault(op, fault):
    for record in kernels(op, *NVIDIA):
        assert not fault(op, record), record


@pytest.mark.parametrize("op", compile_report.OPS)
def test_every_kernel_has_the_shared_memory_that_it_asks_for(op):
    for record in kernels(op, *NVIDIA):
        assert record["shared"] <= GPUS[record["target"]].shared_a_block, record
    assert not any(cannot_be_launched(op, record) for record in kernels(op, "gfx942"))


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        (cannot_be_launched, {"launchable": False}),
        (spills, {"spills": 2}),
        (spills, {"occupancy": 0}),
        (is_narrow, {"loads": {"x": {"16": 8}}}),
        (is_narrow, {"stores": {"y": {"128": 1, "64": 3}}}),
        (reads_a_value_of_a_row_for_every_entry, {"loads": {"scale": {"32": 8}}}),
    ],
)
def test_a_fault_is_seen(fault, change):
    record = kernels("fake_quantize", "sm_90")[0]
    assert fault("fake_quantize", record | change)


def test_occupancy_by_hand():
    # 80 registers are 2,560 a warp: 25 warps, but blocks of 8 warps come whole. No shared memory, no other limit.
    assert occupancy(GPUS["sm_90"], registers=80, shared=0, warps=8) == 24
    # 99 KB of shared memory leave room for two blocks.
    assert occupancy(GPUS["sm_90"], registers=32, shared=99 * 1024, warps=8) == 16


def test_traffic_is_near_the_least():
    for op in compile_report.OPS:
        for record in compile_report.load(op)["traffic"]:
            assert record["distinct"] >= 0.99 * record["least"], record
            assert record["eager"] > record["least"], record


def test_compiled_again_the_default_tile_is_the_same(tmp_path):
    pytest.importorskip("triton")
    if compile_report.version("triton") != compile_report.load("poly_relu")["triton"]:
        pytest.skip("the report was made with another version of Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    case = "backward 16384x8192"
    command = [sys.executable, "-m", "benchmarks.offline", "sm_80", "poly_relu", "--default", "--only", case]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=compile_report.ROOT)
    assert found.returncode == 0, found.stderr
    kept = [record | {"cases": [case]} for record in kernels("poly_relu", "sm_80") if case in record["cases"]]
    assert compile_report.merged(json.loads(found.stdout)) == kept


@pytest.mark.parametrize("op", compile_report.OPS)
def test_every_op_has_an_excerpt_that_is_short(op):
    lines = excerpt(op).splitlines()
    assert 3 <= len(lines) <= 20
    assert lines[0] and not lines[0].startswith(" ")


def test_excerpt_of_no_op():
    with pytest.raises(ValueError, match=r"op_name must be one of binary_linear, .* got 'no_such_op'"):
        excerpt("no_such_op")
