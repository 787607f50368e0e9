"""A network with quantised weights: which layers, how they are stored, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

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
    weight. So the same call serves quantisation after training, and before fine-tuning.

    Args:
        bits: for all layers, or for each by its name in `model.named_modules()`; layers that are not named are left as
            they are. 32 means full precision.
        quantizer: makes the quantiser of one weight from a number of bits.

    Returns:
        `model`.

    Raises:
        ValueError: a name that is not a linear or convolutional layer, or no such layer at all.
    """
    layers = quantizable(model)
    if not layers:
        raise ValueError(f"model must have a linear or convolutional layer, got a {type(model).__name__} without")
    chosen = dict.fromkeys(layers, bits) if isinstance(bits, int) else dict(bits)
    for name in chosen:
        if name not in layers:
            raise ValueError(f"bits must name linear or convolutional layers, {', '.join(layers)}, got {name!r}")
    for name, count in chosen.items():
        layer = layers[name]
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        if count != 32:
            parametrize.register_parametrization(layer, "weight", quantizer(count))
    return model


def weight_quantizers(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """For each quantised weight, by the name of its layer: its quantiser and its latent weight."""
    found = {}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            part = layer.parametrizations["weight"]
            if hasattr(part[0], "integers"):
                found[name] = (part[0], part.original)
    return found


def size_in_bytes(model: nn.Module) -> int:
    """What the network takes in storage: packed codes, and 4 bytes for a step, a zero point or any other parameter.

    Zero points count where they differ between tensors, that is, for asymmetric quantisers.
    """
    own, size = set(), 0
    for quantizer, latent in weight_quantizers(model).values():
        codes, step, _ = quantizer.integers(latent.detach())
        size += math.ceil(codes.numel() * quantizer.bits / 8) + 4 * step.numel() * (1 if quantizer.signed else 2)
        own |= {id(p) for p in (latent, *quantizer.parameters())}
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
