"""How much to swap: the largest fraction of tokens whose copies are hidden and find room, and the time of a layer.

P. Zhao and others, "MEMO", SIGMOD 2025 (arXiv 2407.12117), section 4.1. Sizes are in bytes, times in seconds, both of
one device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from polylib import _checks


def optimal_swap_fraction(
    s_in: float,
    s_attn: float,
    s_other: float,
    bandwidth: float,
    layer_time: float,
    host_bytes: float,
    n_layers: int,
) -> float:
    """The largest fraction in [0, 1] with (s_in + s_attn + fraction s_other) at most what a layer's time can copy, and,
    for all layers but the last two, which are not swapped, at most what the host has: a linear program in one variable.

    Args:
        s_in: the input of a layer.
        s_attn: the output of its attention. Both are always copied.
        s_other: the rest of what a layer keeps.
        bandwidth: of the copies, in bytes a second.
        layer_time: the forward pass of one layer.
        host_bytes: the host memory of one device.
        n_layers: how many layers there are.

    Raises:
        ValueError: a negative number, or no fraction: not even the input and the output of the attention can be copied
            in time, or kept.
    """
    given = {"s_in": s_in, "s_attn": s_attn, "s_other": s_other, "layer_time": layer_time, "host_bytes": host_bytes}
    sizes = {name: _checks.number(name, value, least=0) for name, value in given.items()}
    bandwidth = _checks.number("bandwidth", bandwidth, above=0)
    swapped = _checks.integer("n_layers", n_layers, least=1) - 2
    always = sizes["s_in"] + sizes["s_attn"]
    room = {"layer_time": bandwidth * sizes["layer_time"]}
    if swapped > 0:
        room["host_bytes"] = sizes["host_bytes"] / swapped
    for name, most in room.items():
        if most < always:
            least = always / bandwidth if name == "layer_time" else always * swapped
            raise ValueError(f"{name} must be at least {least:g}, or nothing can be swapped, got {sizes[name]:g}")
    left = min(room.values()) - always
    return 1.0 if left >= sizes["s_other"] else left / sizes["s_other"]


class LayerTime(NamedTuple):
    """The forward time of a GPT layer: 24 s h^2 flops in matrix products, 2 s^2 h in causal attention, at two rates."""

    matmul_rate: float
    attention_rate: float

    def seconds(self, tokens: float, width: float) -> float:
        """For one sequence."""
        matmul, attention = layer_flops(tokens, width)
        return matmul / self.matmul_rate + attention / self.attention_rate


def layer_flops(tokens: float, width: float) -> tuple[float, float]:
    """Flops of the forward pass for one sequence: matrix products with an expansion of 4, and causal attention."""
    return 24.0 * tokens * width**2, 2.0 * tokens**2 * width


def fit_layer_time(tokens: Sequence[int], seconds: Sequence[float], width: int) -> LayerTime:
    """The two rates that fit measured times best, in squares of relative errors; a rate may come out infinite.

    Raises:
        ValueError: fewer than two times, other lengths, or a time that is not above 0.
    """
    times = [_checks.number("seconds", value, above=0) for value in seconds]
    lengths = [_checks.integer("tokens", value, least=1) for value in tokens]
    if len(times) < 2 or len(times) != len(lengths):
        raise ValueError(f"seconds must be two or more, one for each of tokens, got {len(times)} for {len(lengths)}")
    width = _checks.integer("width", width, least=1)
    rows = np.array([layer_flops(length, width) for length in lengths]) / np.array(times)[:, None]
    scale = rows.max(0)
    inverse = nnls(rows / scale, np.ones(len(times)))[0] / scale
    return LayerTime(*(float(1 / own) if own > 0 else float("inf") for own in inverse))


class SwapTimeline(NamedTuple):
    """When the three streams work in a training step; each row of a stream is a start and an end.

    `compute`, `(2 n, 2)`: n forward passes, then the backward passes from the last layer to the first. `offload`,
    `(n - 2, 2)`: from the first layer. `prefetch`, `(n - 2, 2)`: from the last layer that was swapped. `total` is the
    end, `stall` how long computing waited.
    """

    compute: Tensor
    offload: Tensor
    prefetch: Tensor
    total: float
    stall: float


def swap_timeline(n_layers: int, forward_time: float, backward_time: float, copy_time: float) -> SwapTimeline:
    """Two buffers that the layers use in turn, and a stream each for computing, copies out and copies in.

    Layer i + 2 waits until the buffer of layer i has been copied out. The copy in for layer i starts when the backward
    pass of layer i + 2 has left the buffer. The last two layers stay in the buffers.

    Args:
        n_layers: at least 2.
        forward_time: of a layer.
        backward_time: of a layer, with what it recomputes.
        copy_time: of what a layer swaps, in one direction.
    """
    n = _checks.integer("n_layers", n_layers, least=2)
    forward = _checks.number("forward_time", forward_time, least=0)
    backward = _checks.number("backward_time", backward_time, least=0)
    copy = _checks.number("copy_time", copy_time, least=0)
    compute: list[tuple[float, float]] = []
    offload: list[tuple[float, float]] = []
    prefetch: list[tuple[float, float]] = []
    now = out = 0.0
    for i in range(n):
        start = max(now, offload[i - 2][1]) if i >= 2 else now
        now = start + forward
        compute.append((start, now))
        if i < n - 2:
            out = max(now, out) + copy
            offload.append((out - copy, out))
    back: dict[int, float] = {}  # when each layer's numbers are in a buffer
    ends: dict[int, float] = {}
    arrived = out
    for i in reversed(range(n)):
        if i < n - 2:
            arrived = max(arrived, ends[i + 2]) + copy
            prefetch.append((arrived - copy, arrived))
            back[i] = arrived
        start = max(now, back.get(i, 0.0))
        now = ends[i] = start + backward
        compute.append((start, now))
    streams = [torch.tensor(own, dtype=torch.float64).reshape(-1, 2) for own in (compute, offload, prefetch)]
    return SwapTimeline(streams[0], streams[1], streams[2], now, max(now - n * (forward + backward), 0.0))
