"""Settings that must be in place before torch and Triton are imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores among themselves

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
