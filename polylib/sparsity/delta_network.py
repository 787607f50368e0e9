"""A network that is shown frames, and computes only what the changes between them ask for."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.sparsity.delta_activation import DeltaActivation, SparseActivation

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
LINEAR = (nn.Linear, *CONVOLUTIONS)


class DeltaInference(NamedTuple):
    """What `delta_inference` returns.

    `output`, `(batch, frames, ...)`: of the last layer, frame by frame. `macs`, `(linear layers, frames)`, int64: the
    products with an input that is not zero, of all clips; in the first frame the inputs are values, then changes.
    `dense`, `(linear layers,)`, int64: the products of a frame of all clips, zeros included.
    """

    output: Tensor
    macs: Tensor
    dense: Tensor


class FrameNetwork(nn.Sequential):
    """Layers one after the other, for clips `(batch, frames, channels, ...)`.

    A `DeltaActivation` or a `SparseActivation` sees the clip, any other layer all frames as one batch.
    """

    def forward(self, clip: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, DeltaActivation | SparseActivation):
                clip = layer(clip)
            else:
                frames = layer(clip.flatten(0, 1))
                clip = frames.reshape(*clip.shape[:2], *frames.shape[1:])
        return clip


@torch.no_grad()
def delta_inference(model: nn.Sequential, clip: Tensor) -> DeltaInference:
    """Run a network on changes: each linear map gets what its input has changed, and adds the result to what it had.

    The outputs are those of `model(clip)` up to rounding, since W (y + d) = W y + W d. Rounding adds up with the
    frames; in float32 an entry may then be rounded to the next multiple where the network would not.

    Args:
        model: a `FrameNetwork` of `nn.Linear`, `nn.Conv1d`, `2d` or `3d` with zero padding, `nn.Flatten` and
            `DeltaActivation` that send values. Each linear map must get its input from a `DeltaActivation`, with none
            or `nn.Flatten` between. A bias of a map is added once, to the first frame.
        clip: `(batch, frames, channels, ...)`, at least one frame.

    Raises:
        TypeError: a layer of another kind.
        ValueError: a linear map whose input is not sent by a `DeltaActivation`; one with other padding; a
            `DeltaActivation` with `sigma` or that sends changes; a clip without frames.
    """
    _check(model)
    _checks.shape("clip", clip, "(batch, frames, ...) with at least one frame", clip.dim() > 2 and clip.shape[1] > 0)
    state: dict[int, Tensor] = {}
    outputs, macs = [], []
    dense: list[Tensor] = []
    for frame in clip.unbind(1):
        counts, dense, value, whole = [], [], frame, frame  # what is sent, and what it stands for
        for place, layer in enumerate(model):
            if isinstance(layer, DeltaActivation):
                whole = layer(whole[:, None])[:, 0]
                value = whole - state[place] if place in state else whole
                state[place] = whole
            elif isinstance(layer, nn.Flatten):
                value, whole = layer(value), layer(whole)
            else:
                weight: Tensor = layer.weight  # type: ignore[assignment]
                ones = torch.ones_like(weight, dtype=torch.float64)
                counts.append(_map(layer, (value != 0).double(), ones).sum().long())
                dense.append(_map(layer, torch.ones_like(value, dtype=torch.float64), ones).sum().long())
                if place in state:
                    state[place] = state[place] + _map(layer, value, weight)
                else:
                    state[place] = layer(value)
                value = whole = state[place]
        outputs.append(whole)
        macs.append(torch.stack(counts))
    return DeltaInference(torch.stack(outputs, 1), torch.stack(macs, 1), torch.stack(dense))


def _map(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The linear map of a layer with other weights and without its bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    convolve = CONVOLUTIONS[type(layer)]
    return convolve(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _check(model: nn.Sequential) -> None:
    sent = False
    for place, layer in enumerate(model):
        if isinstance(layer, DeltaActivation):
            if layer.sigma or layer.emit != "value":
                raise ValueError(f"layer {place} of model must send values and not sum changes, got {layer}")
            sent = True
        elif type(layer) in LINEAR:
            if not sent:
                raise ValueError(f"layer {place} of model must get its input from a DeltaActivation, got {layer}")
            if getattr(layer, "padding_mode", "zeros") != "zeros":
                raise ValueError(f"layer {place} of model must have zero padding, got {layer}")
            sent = False
        elif type(layer) is not nn.Flatten:
            kinds = ", ".join(kind.__name__ for kind in (DeltaActivation, *LINEAR, nn.Flatten))
            raise TypeError(f"layer {place} of model must be one of {kinds}, got {type(layer).__name__}")
    if not any(type(layer) in LINEAR for layer in model):
        raise ValueError("model must hold a linear map, got none")
