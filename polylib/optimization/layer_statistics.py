"""What a layer sees in one batch, as two vectors: the mean of its inputs, and of the gradients by its outputs.

A linear layer takes rows: all axes but the last are one batch. A convolution takes patches, and the mean over its
positions stands for a sample.
"""

from dataclasses import dataclass, field
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib.optimization.factor_arena import FactorArena

Layer = nn.Linear | nn.Conv2d


@dataclass
class LayerState:
    """A layer with the inverse factors of its weight, `left` `(o, o)` and `right` `(i, i)`, where i counts the bias.

    The statistics of several calls are averaged: those of a module that is used twice in a network, or of batches
    whose gradients are added up.
    """

    module: Layer
    left: Tensor
    right: Tensor
    collected: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def bias(self) -> Tensor | None:
        """The bias, if it is trained."""
        bias = self.module.bias
        return bias if bias is not None and bias.requires_grad else None

    def gradient(self) -> Tensor:
        """The gradient of weight and bias as one matrix, `(o, i)`."""
        grad = _gradient(self.module.weight).flatten(1)
        return grad if self.bias is None else torch.cat([grad, _gradient(self.bias)[:, None]], 1)

    def set_gradient(self, value: Tensor) -> None:
        """Write a matrix `(o, i)` into the gradients."""
        weight = self.module.weight
        if self.bias is not None:
            _gradient(self.bias).copy_(value[:, -1])
            value = value[:, :-1]
        _gradient(weight).copy_(value.reshape(weight.shape))

    def collect(self, inputs: Tensor, grad: Tensor) -> None:
        """Keep what a call has seen: `mean_input`, and the gradient of the mean loss by the outputs."""
        self.collected.append((inputs, summed_gradient(self.module, grad.detach())))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The vectors for the two factors, `(o,)` and `(i,)`."""
        inputs, grads = zip(*self.collected, strict=True)
        return torch.stack(grads).mean(0), torch.stack(inputs).mean(0)


def supported(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a module has a real weight that is trained, and whose gradient is one matrix of outputs by inputs."""
    if not isinstance(module, nn.Linear | nn.Conv2d) or (isinstance(module, nn.Conv2d) and module.groups != 1):
        return False
    weight = module.weight  # a parametrised one is computed, and has no gradient of its own
    return isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.requires_grad


def layer_states(
    model: nn.Module, exclude: set[str], dtype: torch.dtype
) -> tuple[dict[str, LayerState], FactorArena | None]:
    """A state for each layer that is supported and not excluded, by name, with the identity in both factors.

    The factors lie together, in the arena that is handed out too, unless the layers are on several devices.

    Raises:
        ValueError: there is none, `exclude` names something else, or two of them share a weight.
    """
    found = {name: module for name, module in model.named_modules() if supported(module)}
    if not exclude <= set(found):
        names = ", ".join(sorted(exclude - set(found)))
        raise ValueError(f"exclude must name layers of {', '.join(found) or 'the model'}, got {names}")
    found = {name: module for name, module in found.items() if name not in exclude}
    if not found:
        raise ValueError("model must have a Linear or Conv2d layer that is trained and not excluded, got none")
    owners: dict[int, str] = {}
    sizes: list[int] = []
    for name, module in found.items():
        other = owners.setdefault(id(module.weight), name)
        if other != name:
            raise ValueError(f"model must not share a weight between layers, got {other} and {name}; exclude one")
        outputs, inputs = module.weight.flatten(1).shape
        sizes += [outputs, inputs + (module.bias is not None and module.bias.requires_grad)]
    devices = [module.weight.device for module in found.values() for _ in range(2)]
    arena = FactorArena(sizes, dtype, devices[0]) if len(set(devices)) == 1 else None
    eyes = [torch.eye(d, dtype=dtype, device=device) for d, device in zip(sizes, devices, strict=True)]
    factors = iter(arena.factors if arena else eyes)
    return {name: LayerState(module, next(factors), next(factors)) for name, module in found.items()}, arena


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a layer must have gradients of its weight and of its bias, got one of them alone")
    return parameter.grad


def mean_input(module: Layer, x: Tensor) -> Tensor:
    """The mean of the rows or patches that a layer multiplies by its weight, with a 1 for the bias: `(i,)`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(module, nn.Conv2d):
        x = x[None] if x.dim() == 3 else x
        mean = x.mean(0, keepdim=True, dtype=wide)  # the mean of the patches is the patches of the mean
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        mean = F.pad(mean, _padding(module), mode=mode)
        mean = F.unfold(mean, module.kernel_size, module.dilation, stride=module.stride)[0].mean(1)
    else:
        mean = x.reshape(-1, x.shape[-1]).mean(0, dtype=wide)
    trained = module.bias is not None and module.bias.requires_grad
    return torch.cat([mean, mean.new_ones(1)]) if trained else mean


def summed_gradient(module: Layer, grad: Tensor) -> Tensor:
    """The mean over samples of the gradient of *their* loss, `(o,)`, from the gradient of the mean loss.

    The mean loss of b samples divides the gradient of each by b, so that their mean is the plain sum.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    if isinstance(module, nn.Conv2d):
        grad = grad[None] if grad.dim() == 3 else grad
        return grad.sum(0, dtype=wide).mean((-2, -1))
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide)


def _padding(module: nn.Conv2d) -> list[int]:
    """What `F.pad` adds on the left, on the right, above and below."""
    sides: list[int] = []
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if module.padding == "valid" else [int(module.padding[axis])] * 2
    return sides
