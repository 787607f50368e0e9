"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are first imported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the Triton path runs here; skips where it can't run at all."""
    pytest.importorskip("triton")
    from polylib.kernels import _common

    if torch.cuda.is_available():
        return torch.device("cuda")
    assert _common.INTERPRETED, "polylib.kernels was imported before TRITON_INTERPRET=1 was set: see tests/conftest.py"
    return torch.device("cpu")


@pytest.fixture
def compile_for_gpu(tmp_path: Path) -> Callable[[str], list[str]]:
    """Return a function that compiles for a Hopper GPU what some code launches, and names the kernels."""
    pytest.importorskip("triton")
    here = Path(__file__).parent

    def compile_code(code: str) -> list[str]:
        environment = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
        command = [sys.executable, here / "compile_for_gpu.py", code, "90"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    return compile_code
