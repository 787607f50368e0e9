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
A_ROW = {"rate", "decay", "means", "rstds", "mean_out", "rstd_out"}


def kernels(op, *targets):
    records = [k for k in compile_report.load(op)["kernels"] if k["target"] in targets]
    assert records
    return records


@pytest.mark.parametrize("op", compile_report.OPS)
def test_the_report_belongs_to_the_code(op):
    assert compile_report.load(op)["digest"] == compile_report.digest(op), (
        f"the kernels of {op} have changed; run python -m benchmarks.compile_report {op}"
    )


@pytest.mark.parametrize("op", compile_report.OPS)
def test_every_kernel_can_be_launched_on_every_target(op):
    for record in kernels(op, *compile_report.TARGETS):
        assert record["launchable"], record


# Not mended yet: kernels that keep values in memory on one of the targets, and by how many instructions at most.
SPILLS = {
    ("evonorm_s0", "sm_120", "backward_kernel"): 2,
    ("group_rational", "sm_100", "backward_kernel"): 2,
    ("phm_linear", "sm_90", "product_kernel"): 6,
    ("phm_linear", "sm_120", "product_kernel"): 24,
}


@pytest.mark.parametrize("op", compile_report.OPS)
def test_no_other_tile_that_may_be_chosen_spills(op):
    for record in kernels(op, *NVIDIA):
        assert record["spills"] <= SPILLS.get((op, record["target"], record["kernel"]), 0), record
        assert record["occupancy"] >= record["warps"], record


def is_wide(case: str, dtype: str) -> bool:
    """Whether each row of the case's tensors is a multiple of 16 bytes."""
    return not any(odd in case for odd in ("x1001", "x4099", "17003", "17x17"))


@pytest.mark.parametrize("op", compile_report.OPS)
def test_tensors_are_read_and_written_16_bytes_at_a_time(op):
    for record in kernels(op, *NVIDIA):
        if not any(is_wide(case, record["dtype"]) for case in record["cases"]):
            continue
        small = SMALL | A_ROW | ({"x", "y", "scale"} if op == "phm_linear" else {"scale"})
        for way in ("loads", "stores"):
            for name, widths in record[way].items():
                if name in small:
                    continue
                bits = {int(width): number for width, number in widths.items()}
                narrow = sum(width * number for width, number in bits.items() if width < 128)
                # What is narrow beside is the masked end of a row or a tensor: no more than one block.
                assert narrow <= 128 * bits.get(128, 0), (record["cases"], record["kernel"], way, name, widths)


@pytest.mark.parametrize("op", ["fake_quantize", "sweep_step"])
def test_a_value_of_a_row_is_not_read_for_every_entry(op):
    for record in kernels(op, *NVIDIA):
        for name in ("scale", "rate", "decay"):
            assert sum(record["loads"].get(name, {}).values()) <= 1, record


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


@pytest.mark.parametrize("op", ["poly_relu", "fake_quantize"])
def test_compiled_again_the_default_tile_is_the_same(op, tmp_path):
    pytest.importorskip("triton")
    if compile_report.version("triton") != compile_report.load(op)["triton"]:
        pytest.skip("the report was made with another version of Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.offline", "sm_80", op, "--default"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=compile_report.ROOT)
    assert found.returncode == 0, found.stderr
    assert compile_report.merged(json.loads(found.stdout)) == kernels(op, "sm_80")


@pytest.mark.parametrize("op", compile_report.OPS)
def test_every_op_has_an_excerpt_that_is_short(op):
    lines = excerpt(op).splitlines()
    assert 3 <= len(lines) <= 20
    assert lines[0] and not lines[0].startswith(" ")


def test_excerpt_of_no_op():
    with pytest.raises(ValueError, match=r"op_name must be one of evonorm_s0, .* got 'no_such_op'"):
        excerpt("no_such_op")
