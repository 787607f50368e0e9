"""Settings that must be in place before torch and Triton are imported, and the device of the kernels' tests."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores among themselves

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # then the kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the Triton path runs here; skips where it can't run at all."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    kernels = sys.modules.get("polylib.kernels._common")  # an import would make every test depend on the kernels
    assert kernels is None or kernels.INTERPRETED, "polylib.kernels was imported before TRITON_INTERPRET=1 was set"
    return torch.device("cpu")
