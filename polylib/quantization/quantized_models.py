"""A network with quantised weights: which layers, how they are stored, and what that takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from polylib import _checks
from polylib.quantization.quantizers import UniformQuantizer, stored_range

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolutional layers of a network, by their names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


def quantize_model(
    model: nn.Module, bits: int | Mapping[str, int], quantizer: Callable[[int], nn.Module] = UniformQuantizer
) -> nn.Module:
    """Quantise the weights of linear and convolutional layers, in place; biases and norms keep full precision.

    Each weight becomes a parametrisation: `layer.weight` is on its levels, and what is trained is the latent weight,
    `layer.parametrizations.weight.original`. A layer that was quantised before gets the new quantiser on its latent
    weight. So the same call serves quantisation after training, and before fine-tuning. Parametrisations that a layer
    has, such as `weight_norm`, stay, and their result is what is rounded.

    Args:
        bits: for all layers, or for each by its name in `model.named_modules()`; layers that are not named are left as
            they are. 32 means full precision.
        quantizer: makes the quantiser of one weight, a module with `integers`, from a number of bits.

    Returns:
        `model`.

    Raises:
        ValueError: a name that is not a linear or convolutional layer, or no such layer at all; a weight that is
            computed by a hook, as by `torch.nn.utils.weight_norm`, in place of a parametrisation.

    Warns:
        UserWarning: a weight that is made orthogonal or of norm 1 by a parametrisation, which rounding undoes.
    """
    layers = quantizable(model)
    if not layers:
        raise ValueError(f"model must have a linear or convolutional layer, got a {type(model).__name__} without")
    chosen = dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    for name in chosen:
        if name not in layers:
            raise ValueError(f"bits must name linear or convolutional layers, {', '.join(layers)}, got {name!r}")
        if "weight" not in layers[name]._parameters and not parametrize.is_parametrized(layers[name], "weight"):
            raise ValueError(
                f"model must have weights that are parameters or parametrised (torch.nn.utils.parametrizations), got"
                f" a weight of {name!r} that a hook computes"
            )
        chosen[name] = _checks.integer("bits", chosen[name], 1, 32)
    made = {name: None if count == 32 else quantizer(count) for name, count in chosen.items()}
    undone: set[str] = set()
    for name, rounding in made.items():
        _quantize(layers[name], rounding)
        if rounding is not None:
            undone.update(type(part).__name__ for part in layers[name].parametrizations.weight)
    for kind in sorted(undone & set(CONSTRAINTS)):
        text = f"a parametrised weight is rounded: it is {CONSTRAINTS[kind]} before, and no longer after"
        warnings.warn(text, stacklevel=2)
    return model


# Parametrisations whose promise rounding breaks.
CONSTRAINTS = {"_SpectralNorm": "of spectral norm 1", "_Orthogonal": "orthogonal"}


def _place(chain: nn.Module) -> int | None:
    """Where in the parametrisations of a weight the quantiser stands."""
    return next((k for k, part in enumerate(chain) if hasattr(part, "integers")), None)


def _quantize(layer: nn.Module, quantizer: nn.Module | None) -> None:
    """Set the quantiser of a layer's weight, or take it away."""
    chain = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else []
    place = _place(chain)
    if place is not None and len(chain) == 1:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    elif place is not None and quantizer is not None:
        chain[place] = quantizer
        with torch.no_grad():
            _ = layer.weight  # shows it a tensor
        return
    elif place is not None:
        del chain[place]
    if quantizer is not None:
        parametrize.register_parametrization(layer, "weight", quantizer)


def weight_quantizers(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """For each quantised weight, by the name of its layer: its quantiser and its latent weight.

    Where other parametrisations come before the quantiser, the latent weight is what they make of theirs.
    """
    found = {}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            chain = layer.parametrizations["weight"]
            place = _place(chain)
            if place is not None:
                found[name] = (chain[place], _latent(chain, place))
    return found


def _latent(chain: Any, place: int) -> Tensor:
    if place == 0:
        return chain.original
    originals = [chain.original] if chain.is_tensor else [getattr(chain, f"original{k}") for k in range(chain.ntensors)]
    latent = chain[0](*originals)
    for part in list(chain)[1:place]:
        latent = part(latent)
    return latent


def size_in_bytes(model: nn.Module) -> int:
    """What the network takes in storage: packed codes, and 4 bytes for a step, a zero point or any other parameter.

    Zero points count where they differ between tensors, that is, for asymmetric quantisers. Shared weights count once.
    """
    own, size, seen = set(), 0, set()
    for name, (quantizer, latent) in weight_quantizers(model).items():
        parts = list(model.get_submodule(name).parametrizations["weight"].parameters())
        own |= {id(p) for p in parts}
        same = (*sorted({id(p) for p in parts}), repr(quantizer))
        if same not in seen:
            seen.add(same)
            codes, step, _ = quantizer.integers(latent.detach())
            size += math.ceil(codes.numel() * quantizer.bits / 8) + 4 * step.numel() * (1 if quantizer.signed else 2)
    return size + sum(4 * p.numel() for p in model.parameters() if id(p) not in own)


def pack_codes(codes: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Store whole numbers of `bits` bits each, one after the other, in `(ceil(bits * count / 8),)` bytes, uint8.

    Args:
        codes: of any shape and dtype, from -2**(bits - 1) to 2**(bits - 1) - 1, or from 0 to 2**bits - 1 if unsigned.
        bits: 1 to 8.

    Raises:
        ValueError: bits out of range, or a code that is not a whole number in the range.
    """
    low, high = _packed_range(bits, signed)
    codes = codes.flatten()
    if codes.numel() and not (bool((codes == codes.round()).all()) and low <= codes.min() and codes.max() <= high):
        raise ValueError(f"codes must be whole numbers from {low} to {high} for {bits} bits")
    places = torch.arange(bits, device=codes.device)
    stream = ((codes.long() - low)[:, None] >> places & 1).flatten()
    stream = nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int, *, signed: bool = True) -> Tensor:
    """The first `count` codes that `pack_codes` stored, `(count,)`, int64.

    Raises:
        ValueError: bits out of range, or fewer bytes than `count` codes take.
    """
    low, _ = _packed_range(bits, signed)
    if count < 0 or len(packed) < math.ceil(bits * count / 8):
        raise ValueError(f"count is {count}; {len(packed)} bytes hold {8 * len(packed) // bits} codes of {bits} bits")
    stream = (packed.long()[:, None] >> torch.arange(8, device=packed.device) & 1).flatten()[: bits * count]
    return (stream.view(count, bits) << torch.arange(bits, device=packed.device)).sum(1) + low


def _packed_range(bits: int, signed: bool) -> tuple[int, int]:
    _checks.integer("bits", bits, least=1, most=8)
    return stored_range(bits, signed)
