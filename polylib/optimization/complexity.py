"""What a network costs for one example: multiply-adds, parameters and activations, by the conventions of pycls.

P. Dollar, M. Singh and R. Girshick, "Fast and Accurate Model Scaling", CVPR 2021 (arXiv 2103.06877). A convolution of
kernel k x k with groups g from w_in to w_out channels and an output of h x w costs k^2 w_in w_out h w / g flops, which
are multiply-adds, and has w_out h w activations: the numbers that it writes. A bias adds one flop for each of them.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from polylib import _checks

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
# They keep the shape, and are slow on meta tensors: while layers are counted they pass their input on.
_ELEMENTWISE = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh}


class Complexity(NamedTuple):
    """Multiply-adds for one example, parameters, and the sizes of all outputs of convolutions and linear layers."""

    flops: int
    params: int
    acts: int


def conv_complexity(model: nn.Module, input_shape: Sequence[int]) -> Complexity:
    """Count what one example costs a convolutional network in evaluation mode.

    Convolutions and linear layers have flops, parameters and activations; pooling with a window has activations;
    normalisation has parameters. Activation functions, sums, products and global pooling are not counted. A layer that
    is called twice costs twice, and its parameters count once. Nothing is computed: the forward runs on meta tensors.

    Args:
        model: may be on any device, meta included; it is left as it was.
        input_shape: of one example, without the batch, such as `(3, 224, 224)`.

    Raises:
        ValueError: a layer with parameters whose cost is not known here, or that the forward does not call, so that
            it is not counted; a forward that moves other axes into the batch, whose parts would count as one; a shape
            that is not one of positive integers.
    """
    shape = tuple(_checks.integer("input_shape", size, least=1) for size in input_shape)
    for name, module in model.named_modules():
        own = any(parameter is not None for parameter in module._parameters.values())
        if own and not isinstance(module, _WEIGHTED + _NORMS):
            raise ValueError(
                "model must have its parameters in convolutions, linear layers and normalisation, got "
                f"{type(module).__name__} at {name or 'its root'!r}"
            )
    weighted = {name: module for name, module in model.named_modules() if isinstance(module, _WEIGHTED)}
    costs: dict[nn.Module, list[tuple[int, int]]] = {module: [] for module in weighted.values()}
    pooled: list[int] = []

    def weigh(module: nn.Module, inputs: Any, output: Tensor) -> None:
        name = f"the output of {type(module).__name__}"
        _checks.shape(name, output, "(1, ...) for a batch of one", output.dim() > 1 and len(output) == 1)
        costs[module].append(_cost(module, output[0]))

    def pool(module: nn.Module, inputs: Any, output: Tensor) -> None:
        pooled.append(output[0].numel())

    hooks: dict[nn.Module, Any] = dict.fromkeys(costs, weigh)
    hooks |= {module: pool for module in model.modules() if isinstance(module, _POOLS)}
    _run_on_meta(model, shape, hooks)
    unused = [name for name, module in weighted.items() if not costs[module]]
    if unused:
        raise ValueError(f"model must call every layer in its forward, got {unused[0]!r} that is not called")
    each = [cost for calls in costs.values() for cost in calls]
    flops, acts = (sum(column) for column in zip(*each, strict=True)) if each else (0, 0)
    return Complexity(flops, sum(p.numel() for p in model.parameters()), acts + sum(pooled))


def _cost(module: nn.Module, output: Tensor) -> tuple[int, int]:
    """Flops and activations of a convolution, `(w_out, ...)`, or of a linear layer, `(..., w_out)`."""
    places = prod(output.shape[:-1] if isinstance(module, nn.Linear) else output.shape[1:])
    flops = module.weight.numel() * places  # type: ignore[operator]
    return flops + (output.numel() if module.bias is not None else 0), output.numel()


def _run_on_meta(model: nn.Module, shape: tuple[int, ...], hooks: dict[nn.Module, Any]) -> None:
    """A forward of one example in evaluation mode, with hooks, and with meta tensors in place of the model's own."""
    modes = {module: module.training for module in model.modules()}
    passing = [module for module in modes if type(module) in _ELEMENTWISE and "forward" not in vars(module)]
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: torch.empty_like(value, device="meta") for name, value in held.items() if not value.is_meta}
    x = torch.empty(1, *shape, device="meta", dtype=next((p.dtype for p in model.parameters()), None))
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        model.eval()
        for module in passing:
            vars(module)["forward"] = partial(_as_it_is, getattr(module, "num_features", None))
        with torch.no_grad():
            functional_call(model, held, (x,)) if held else model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module in passing:
            del vars(module)["forward"]
        for module, mode in modes.items():
            module.training = mode


def _as_it_is(channels: int | None, x: Tensor) -> Tensor:
    """The input, which has as many channels as a batch norm, where it is one."""
    if channels is not None:
        _checks.shape("the input of batch norm", x, f"(N, {channels}, ...)", x.dim() > 1 and x.shape[1] == channels)
    return x
