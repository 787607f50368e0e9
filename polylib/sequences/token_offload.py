"""Keep a layer's activations in host memory, some tokens whole, of the others only what the rest follows from.

P. Zhao and others, "MEMO", SIGMOD 2025 (arXiv 2407.12117), section 4.1: the input of the layer and the output of its
attention go to the host whole. Of every other tensor that the backward pass needs, the first tokens do, and the rows of
the other tokens are computed again, token by token. So no attention is computed twice.
"""

from typing import Any

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import transformed
from polylib.sequences.gpt_layer import TokenwiseLayer
from polylib.sequences.kept_rows import KeptRows, alone


class TokenwiseOffload(nn.Module):
    """A layer whose saved tensors are swapped to the host for a fraction of the tokens, and recomputed for the others.

    Outputs and gradients are those of the layer. What was recomputed comes from the same operations on fewer rows, and
    may differ in the rounding of a matrix product; with a fraction of 0 or 1 not even in that.

    Copies run in the order of the layer's own work: they free memory, but nothing hides them. Parameters and buffers
    must not change between forward and backward: a change in place raises there, as it does for the layer alone. Under
    `torch.no_grad()` nothing is kept, as usual, and under `torch.func` nothing is swapped; `torch.compile` leaves the
    layer as it is, and compiles what is around it.

    Args:
        layer: of the kind that `TokenwiseLayer` describes, such as `GPTLayer`; input `(batch, tokens, width)`.
        fraction: of the tokens, from 0 to 1, that are swapped whole; the number of tokens is rounded.
        host: the device that receives them. If it is the one that computes, a CPU, it is a second pool of memory.
        pin_memory: use page-locked host memory if the layer runs on a GPU.

    Attributes:
        host_bytes: what the last forward pass sent to the host.
        device_bytes: what it left on the device: the small tensors that are not rows of tokens.
    """

    def __init__(self, layer: nn.Module, fraction: float, host: str = "cpu", pin_memory: bool = True) -> None:
        super().__init__()
        if not isinstance(layer, TokenwiseLayer):
            raise TypeError(f"layer must have before, attend and after, got {type(layer).__name__}")
        random = [name for name, part in layer.named_modules() if getattr(part, "p", 0) and "Dropout" in str(part)]
        if random:
            raise ValueError(f"layer must draw no random numbers, got dropout in {random}")
        self.layer, self.pin_memory = layer, bool(pin_memory)
        self.fraction = _checks.number("fraction", fraction, least=0, most=1)
        self.host = str(torch.device(host))
        self.host_bytes = self.device_bytes = 0

    def extra_repr(self) -> str:
        return f"fraction={self.fraction:g}, host={self.host!r}"

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if x.dim() != 3:
            raise ValueError(f"x must have shape (batch, tokens, width), got {tuple(x.shape)}")
        if not torch.is_grad_enabled() or x.is_meta or x.numel() == 0 or transformed():
            return layer.after(x, layer.attend(*layer.before(x)))
        return self._swapped(layer, alone(x))

    @torch.compiler.disable
    def _swapped(self, layer: Any, x: Tensor) -> Tensor:
        kept = KeptRows(layer, x, round(self.fraction * x.shape[1]), torch.device(self.host), self.pin_memory)
        with kept.saving("before"):
            inputs = layer.before(x)
        for number, tensor in enumerate(inputs):
            kept.add(tensor, "inputs", number)
        with kept.saving("attend"):
            attended = alone(layer.attend(*inputs))
        kept.add(attended, "attended", 0)
        with kept.saving("after"):
            y = layer.after(x, attended)
        kept.send(attended)
        self.host_bytes, self.device_bytes = kept.host_bytes, kept.device_bytes
        return y
