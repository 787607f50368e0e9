"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are first imported."""

import os

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
