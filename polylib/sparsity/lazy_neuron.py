"""How many hidden units are not zero: firing rates of the units behind each ReLU.

Z. Li and others, "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers", ICLR 2023 (arXiv
2210.06313). The percentage of nonzeros of an activation map is the mean over samples, tokens and units of [a > 0].
Zeros are exact: after GELU and the like there are none, and the number says nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.lab.stacked_call import evaluating
from polylib.sparsity.topk_mlp import TopK


def firing_rates(
    module: nn.Module, x: Any, layers: Sequence[str] | None = None, *, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The share of samples and tokens on which each hidden unit is positive, for each layer.

    The module runs once, in evaluation mode and without gradients; its mode and its hooks are then as before. It may
    run under `torch.func.vmap`, such as in `Stack.evaluate`. A unit with the rate 0 is dead on these inputs: that is
    another thing than a unit which is zero on most of them.

    Args:
        module: has ReLUs that are modules; the function `torch.relu` is not seen.
        x: its input, or a tuple of its inputs.
        layers: names of submodules, as `named_modules` has them, of which the outputs are counted. By default every
            `nn.ReLU`, and every `TopK`, behind which the units that it has dropped don't fire.
        mask: bool, of the shape of the outputs without their last axis; False marks what is not counted, such as
            padding.

    Returns:
        By name of the layer, `(units,)`: the last axis of the output counts units. All outputs of a layer that runs
        several times count.

    Raises:
        ValueError: no ReLU is found, a name is unknown, a layer does not run, or a mask of another shape.
        TypeError: no module, or a layer whose output is not a tensor.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    chosen = _chosen(module, layers)
    inputs = x if isinstance(x, tuple) else (x,)
    counts: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), evaluating(module), _counting(chosen, counts, mask):
        module(*inputs)
    if missing := [name for name in chosen if name not in counts]:
        raise ValueError(f"layers must run when module is called, got {missing[0]!r}, which did not")
    return {name: fired / seen for name, (fired, seen) in ((name, counts[name]) for name in chosen)}


def activation_sparsity(
    module: nn.Module, x: Any, layers: Sequence[str] | None = None, *, mask: Tensor | None = None
) -> dict[str, float]:
    """The fraction of hidden units that are positive, for each layer: the mean of `firing_rates`.

    About 0.5 in an untrained network. Arguments and errors as there.
    """
    return {name: rate.mean().item() for name, rate in firing_rates(module, x, layers, mask=mask).items()}


def _chosen(module: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    present = dict(module.named_modules())
    if layers is None:
        found: dict[str, nn.Module] = {n: part for n, part in present.items() if isinstance(part, nn.ReLU | TopK)}
        if not found:
            raise ValueError("module must have a ReLU that is a module, or layers must be given, got neither")
        return found
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers must be a list of names, got {layers!r}")
    return {name: present[_checks.choice("layers", name, present)] for name in layers}


@contextmanager
def _counting(
    layers: dict[str, nn.Module], counts: dict[str, tuple[Tensor, Tensor]], mask: Tensor | None
) -> Iterator[None]:
    """In this context each layer adds to `counts` how often its units fired, and how often they could have."""

    def count(name: str, output: Any) -> None:
        if not torch.is_tensor(output) or output.dim() == 0:
            raise TypeError(f"layers must have tensors with an axis of units as outputs, {name!r} has not")
        fired = output > 0
        seen = torch.ones_like(fired[..., 0], dtype=torch.bool)
        if mask is not None:
            _checks.shape(
                "mask", mask, f"{tuple(seen.shape)}, that of {name!r} without units", mask.shape == seen.shape
            )
            seen = mask.to(seen.device).bool()
            fired = fired & seen[..., None]
        own = fired.reshape(-1, fired.shape[-1]).sum(0), seen.sum()
        before = counts.get(name)
        counts[name] = own if before is None else (before[0] + own[0], before[1] + own[1])

    with ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda _, __, output, name=name: count(name, output))
            hooks.callback(handle.remove)
        yield
