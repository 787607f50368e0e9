"""What `launches` of an op file yields: something to compile, and to count the traffic of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polylib.kernels._cost import Cost

BOTH = (torch.bfloat16, torch.float32)


class Launch(NamedTuple):
    """One call of a registered op.

    label: shape and direction; run: the call, on CPU tensors; elements: what traffic is divided by; least: the cost by
    the op's own count; eager: prepares the same work in plain PyTorch, and returns a function that does it.
    """

    label: str
    dtype: torch.dtype
    run: Callable[[], object]
    elements: int
    least: Cost
    eager: Callable[[], Callable[[], object]]


def formula(function: Callable[..., Tensor], tensors: tuple, backward: bool) -> Callable[[], Callable[[], object]]:
    """Prepare `function(*tensors)`, or its gradients by every floating tensor."""

    def prepare() -> Callable[[], object]:
        if not backward:
            return lambda: function(*tensors)
        inputs = [t.detach().requires_grad_() for t in tensors]
        y = function(*inputs)
        return lambda: torch.autograd.grad(y, inputs, torch.ones_like(y))

    return prepare
