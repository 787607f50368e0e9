"""Weight oscillation in quantisation-aware training: a meter that counts it, and a last stage that calms it.

Sources: Liu, Liu, Cheng, "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023. The meter extends
that of Nagel, Fournarakis, Bondarenko, Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.quantization.quantized_models import weight_quantizers
from polylib.quantization.quantizers import StatsQuantizer, stored_range


@dataclass
class _State:
    """One weight as the last update left it."""

    latent: Tensor
    codes: Tensor
    step: Tensor
    direction: Tensor  # of the last change of each code: -1, 1, or 0 before any
    frequency: Tensor  # of the reversals of each code, as a moving average


class OscillationMeter:
    """Counts how the codes of a network's quantised weights move from one optimizer step to the next.

    Call `update` after every step. A code *flips* if it changes; a *reversal* is a flip against the direction of the
    last one, the mark of an oscillation. A *scale flip* is a flip that would have happened if the latent weights had
    stood still and only the steps had moved. The *energy* is the power that reversals inject, the sum of the squared
    level distances of all reversed weights over the sum of all squared weights. The *jitter* is the mean relative
    change of the steps.

    Args:
        model: with weights quantised by `quantize_model`; their present state is what the first update compares with.
        layers: the names of the layers to look at; by default every layer with a quantised weight.
        momentum: of the moving average of each weight's reversals, `frequency(name)`.

    Raises:
        ValueError: a model without quantised weights, or a layer that has none.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] | None = None, momentum: float = 0.01) -> None:
        quantised = weight_quantizers(model)
        self.layers = list(quantised if layers is None else layers)
        if not self.layers or not set(self.layers) <= set(quantised):
            raise ValueError(f"layers must be some of the quantised layers {list(quantised)}, got {self.layers}")
        self.model, self.momentum = model, momentum
        self.updates = 0
        self._totals = dict.fromkeys(("flip", "reversal", "scale_flip", "energy", "jitter"), 0.0)
        self._states = {}
        for name in self.layers:
            quantizer, latent = quantised[name]
            codes, step, _ = quantizer.integers(latent)
            zeros = torch.zeros_like(codes)
            self._states[name] = _State(latent.detach().clone(), codes, step, zeros, zeros.clone())

    @torch.no_grad()
    def update(self) -> None:
        """Compare the weights with those of the last call."""
        counts = dict.fromkeys(("flip", "reversal", "scale_flip", "noise", "power", "jitter", "weights", "steps"), 0.0)
        quantised = weight_quantizers(self.model)
        for name, state in self._states.items():
            quantizer, latent = quantised[name]
            codes, step, zero = quantizer.integers(latent)
            flipped, direction = codes != state.codes, (codes - state.codes).sign()
            reversed_ = flipped & (direction == -state.direction)
            low, high = stored_range(quantizer.bits, quantizer.signed)
            still = (state.latent / step + zero).round().clamp(low, high)  # only the steps have moved
            counts["flip"] += flipped.sum().item()
            counts["reversal"] += reversed_.sum().item()
            counts["scale_flip"] += (still != state.codes).sum().item()
            counts["noise"] += (step.square() * reversed_).sum().item()
            counts["power"] += latent.square().sum().item()
            counts["jitter"] += ((step - state.step) / state.step).abs().sum().item()
            counts["weights"] += codes.numel()
            counts["steps"] += step.numel()
            direction = torch.where(flipped, direction, state.direction)
            frequency = state.frequency.lerp(reversed_.to(state.frequency), self.momentum)
            self._states[name] = _State(latent.clone(), codes, step, direction, frequency)
        self.updates += 1
        for key in ("flip", "reversal", "scale_flip"):
            self._totals[key] += counts[key] / counts["weights"]
        self._totals["energy"] += counts["noise"] / counts["power"]
        self._totals["jitter"] += counts["jitter"] / counts["steps"]

    def summary(self) -> dict[str, float]:
        """The averages over all updates: flip, reversal, scale_flip (shares of the weights), energy and jitter."""
        if self.updates == 0:
            raise ValueError("no update was made; call update() after every optimizer step")
        return {key: total / self.updates for key, total in self._totals.items()}

    def frequency(self, name: str) -> Tensor:
        """The moving average of the reversals of each entry of one weight, by the name of its layer."""
        return self._states[name].frequency


def confidence_mask(weight: Tensor, bits: int, boundary_range: float, *, per_channel: bool = True) -> Tensor:
    """Which entries of a latent weight lie so near to a threshold of StatsQ that annealing still updates them.

    With n = 2**(bits - 1) and the scale s = 2 mean ``|w|`` of a row, u = n clamp(w / s, -1, 1) - 0.5 is the weight in
    units of levels. An entry is chosen if u is at most `boundary_range` from a threshold j + 0.5 between two codes that
    occur in the weight.

    Args:
        weight: (out, ...), each index of the first axis with its own scale if `per_channel`.
        boundary_range: above 0, to 0.5, at which every entry between two levels is chosen.

    Returns:
        A bool tensor of the shape of `weight`.

    Raises:
        ValueError: `bits` or `boundary_range` out of range, or an empty weight.
    """
    _checks.number("boundary_range", boundary_range, above=0, most=0.5)
    codes, step, zero = StatsQuantizer(bits, per_channel=per_channel).integers(weight)
    n = 2 ** (bits - 1)
    u = weight.detach().div(step).clamp(-n, n) + zero
    below = u.floor()
    between = (below >= codes.min()) & (below < codes.max())
    return between & ((u - below - 0.5).abs() <= boundary_range)


@contextmanager
def confidence_guided(
    optimizer: torch.optim.Optimizer, model: nn.Module, boundary_range: float = 0.005
) -> Iterator[None]:
    """While the context lasts, each `optimizer.step()` moves only the weights that are near a threshold.

    This is confidence-guided annealing, the last stage of training. Before each step the mask of every StatsQ weight of
    `model` is computed and the gradients of the other entries are set to zero; after it these entries are written back,
    bit for bit, because momentum and weight decay would have moved them. Other parameters learn as usual.

    Raises:
        ValueError: a model without StatsQ weights, or with one whose latent weight other parametrisations compute;
            `boundary_range` out of range.
    """
    _checks.number("boundary_range", boundary_range, above=0, most=0.5)
    chosen = [(q, w) for q, w in weight_quantizers(model).values() if isinstance(q, StatsQuantizer)]
    if not chosen:
        raise ValueError(f"model ({type(model).__name__}) has no weight quantised by StatsQuantizer")
    if not all(latent.is_leaf for _, latent in chosen):
        raise ValueError("model must have latent weights that are parameters, got one with parametrisations of its own")
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def freeze(*_: Any) -> None:
        for quantizer, latent in chosen:
            mask = confidence_mask(latent, quantizer.bits, boundary_range, per_channel=quantizer.per_channel)
            if latent.grad is not None:
                latent.grad.mul_(mask)
            kept.append((latent, latent.clone(), mask))

    @torch.no_grad()
    def write_back(*_: Any) -> None:
        for latent, before, mask in kept:
            latent.copy_(torch.where(mask, latent, before))
        kept.clear()

    hooks = [optimizer.register_step_pre_hook(freeze), optimizer.register_step_post_hook(write_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
