"""Activations that send changes: quantise what a frame gives, and count and penalise how much of it changes.

Clips have the shape `(batch, frames, channels, ...)`. The first frame is the background: it is sent whole, and takes no
part in counts and penalties.

Source: Yousefzadeh, Sifalakis, "Training for temporal sparsity in deep neural networks, application in video
processing", arXiv 2107.07305.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import widened
from polylib.kernels.delta_relu import changes, check_steps, delta_relu, summed_as

FLOOR = 1e-5  # the least step: a threshold may cross zero, a division by it may not


class Activity(NamedTuple):
    """What one layer sends in a frame, in the mean of clips and frames.

    `l1`, (): the mean of the absolute value of an entry. `density`, (): the share of entries that are not zero; no
    gradient. `neurons`: entries of a frame. `fan_out`: products that each of them enters.
    """

    l1: Tensor
    density: Tensor
    neurons: int
    fan_out: float


def delta_quantize(a: Tensor, q: Tensor) -> Tensor:
    """The nearest multiple of q: `q * round(a / q)`, halves to even, with the gradients that train thresholds.

    With k = round(a / q) and the gradient g of the result, a gets g as it is, and q gets the sum of -g k. The sign of
    the second is the opposite of that of the product rule, on purpose: the gradient of the absolute differences of
    frames is then never positive, so that descent raises q wherever codes still change.

    Args:
        a: `(..., *shape)`, floating. Half precisions are computed in float32.
        q: positive, of a shape that is broadcast to that of a.

    Returns:
        As a in shape and dtype.

    Raises:
        TypeError: an a that is not floating.
        ValueError: a q of another shape.
    """
    _checks.floating("dtype of the values", a.dtype)
    check_steps(a, q)
    return _Quantize.apply(a, q)


class DeltaActivation(nn.Module):
    """An activation rounded to multiples of a trained step, so that most of it stays from frame to frame.

    In training it sends values: the network is then an ordinary quantised one. For inference it sends changes, and the
    next layer adds them up (`sigma`); see `delta_inference`. `recorded` gives the changes to a penalty.

    The step is `abs(threshold)`, at least 1e-5. A bias that follows a linear map belongs here, since inside the map it
    would be added again with every change.

    Args:
        channels: C of `(batch, frames, C, ...)`.
        spatial: how many axes follow the channels, or their sizes, which `"neuron"` needs.
        threshold: the initial step, above 0.
        granularity: one step for each `"channel"`, each `"neuron"` or the whole `"layer"`.
        activation: `"relu"`, `"softmax"` over the channels, or `"identity"`.
        bias: a trained bias for each channel, added first; it starts at zero.
        sigma: what comes in are changes, and is summed over the frames first.
        emit: `"value"`, or `"delta"`: the first frame and the changes that follow.
        fan_out: products that each output enters, the weight of this layer in `activity_penalty` and `mac_density`.
        quantize: `quantize(a, q)` with another gradient, which must give equal codes equal values.

    Raises:
        ValueError: a setting out of its range; an input of another shape; fewer than two frames while `recorded`.
    """

    def __init__(
        self,
        channels: int,
        spatial: int | Sequence[int] = 0,
        *,
        threshold: float = 0.1,
        granularity: str = "channel",
        activation: str = "relu",
        bias: bool = False,
        sigma: bool = False,
        emit: str = "value",
        fan_out: float = 1.0,
        quantize: Callable[[Tensor, Tensor], Tensor] = delta_quantize,
    ) -> None:
        super().__init__()
        self.channels = _checks.integer("channels", channels, 1)
        sizes = None if isinstance(spatial, int) else tuple(_checks.integer("spatial", size, 1) for size in spatial)
        self.spatial = _checks.integer("spatial", spatial if sizes is None else len(sizes), 0)
        self.granularity = _checks.choice("granularity", granularity, ("channel", "neuron", "layer"))
        if granularity == "neuron" and sizes is None and self.spatial:
            raise ValueError(f"spatial must be sizes for a threshold of each neuron, got {spatial!r}")
        self.sizes = sizes
        self.activation = _checks.choice("activation", activation, ("relu", "softmax", "identity"))
        self.emit = _checks.choice("emit", emit, ("value", "delta"))
        self.sigma, self.fan_out = bool(sigma), _checks.number("fan_out", fan_out, above=0)
        self.quantize = _checks.function("quantize", quantize)
        start = _checks.number("threshold", threshold, above=0)
        wide = (1,) * self.spatial
        shape = {"channel": (channels, *wide), "neuron": (channels, *(sizes or ())), "layer": (1, *wide)}
        self.threshold = nn.Parameter(torch.full(shape[granularity], start))
        self.bias = nn.Parameter(torch.zeros(channels, *wide)) if bias else None
        self._records: list[Activity] | None = None

    def step(self) -> Tensor:
        """The step of rounding in use, broadcast over the channels and what follows."""
        size = self.threshold.abs()
        return size + (FLOOR - size).clamp(min=0).detach()  # the gradient reaches a threshold below the floor, too

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, frames, channels, ...)`, to the same shape."""
        fits = x.dim() == 3 + self.spatial and x.shape[2] == self.channels
        fits = fits and self.sizes in (None, tuple(x.shape[3:]))
        axes = "".join(f", {size}" for size in self.sizes) if self.sizes else ", ..." * bool(self.spatial)
        _checks.shape("x", x, f"(batch, frames, {self.channels}{axes}) with {3 + self.spatial} axes", fits)
        if self.sigma:
            x = x.cumsum(1)
        if self.bias is not None:
            x = x + self.bias
        if self.activation == "softmax":
            x = x.softmax(2)
        relu = self.activation == "relu"
        if self._records is None:
            y = self.quantize(x.relu() if relu else x, self.step())
        elif self.quantize is delta_quantize:
            y, total, count = delta_relu(x, self.step(), relu)
            self._record(y, total, count)
        else:
            y = self.quantize(x.relu() if relu else x, self.step())
            change = changes(y)
            self._record(y, widened(change).abs().sum(), (change != 0).sum())
        return y if self.emit == "value" else torch.cat([y[:, :1], changes(y)], 1)

    def _record(self, y: Tensor, total: Tensor, count: Tensor) -> None:
        sent = max(1, y[:, 1:].numel())
        neurons = y.shape[2:].numel()
        self._records.append(Activity(total / sent, count / sent, neurons, self.fan_out))  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"{self.channels}, spatial={self.sizes or self.spatial}, granularity={self.granularity!r}"


class SparseActivation(nn.Module):
    """ReLU whose values are recorded as `DeltaActivation` records its changes: for spatial sparsity, frame by frame.

    Args:
        fan_out: products that each output enters.
    """

    def __init__(self, fan_out: float = 1.0) -> None:
        super().__init__()
        self.fan_out = _checks.number("fan_out", fan_out, above=0)
        self._records: list[Activity] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, frames, channels, ...)`, to the same shape."""
        y = x.relu()
        if self._records is not None:
            sent, neurons = max(1, y.numel()), y.shape[2:].numel()
            self._records.append(Activity(widened(y).sum() / sent, (y != 0).sum() / sent, neurons, self.fan_out))
        return y


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Activity]]:
    """In this context, the `Activity` of each layer of the model that keeps account, in the order of their calls.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = [part for part in model.modules() if isinstance(part, DeltaActivation | SparseActivation)]
    if not layers:
        raise ValueError(f"model must hold a DeltaActivation or a SparseActivation, got {type(model).__name__}")
    before: list[Any] = [layer._records for layer in layers]
    records: list[Activity] = []
    for layer in layers:
        layer._records = records
    try:
        yield records
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer._records = old


def activity_penalty(layers: Sequence[Activity]) -> Tensor:
    """The sum over the layers of fan-out times mean absolute value, (): what is added to the loss, times a weight."""
    return torch.stack([layer.fan_out * layer.l1 for layer in layers]).sum()


def mac_density(layers: Sequence[Activity]) -> Tensor:
    """The share of all products whose activation is not zero, (): those of the layers, weighted by their numbers."""
    weights = [layer.neurons * layer.fan_out for layer in layers]
    return torch.stack([w * layer.density for w, layer in zip(weights, layers, strict=True)]).sum() / sum(weights)


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, q: Tensor) -> Tensor:
        step = widened(q)
        return (torch.round(widened(a) / step) * step).to(a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, q = ctx.saved_tensors
        by_step = None
        if ctx.needs_input_grad[1]:
            by_step = -summed_as(widened(g) * torch.round(widened(a) / widened(q)), q)
        return g, by_step
