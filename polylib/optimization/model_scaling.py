"""Scale a convolutional network by depth, width and resolution to a multiple of its flops.

P. Dollar, M. Singh and R. Girshick, "Fast and Accurate Model Scaling", CVPR 2021 (arXiv 2103.06877). Flops grow as
d w^2 r^2, activations as d w r^2, parameters as d w^2. A strategy shares out a factor s on the flops: with exponents
e_d + e_w + e_r = 1 depth grows by s^e_d, width by s^(e_w / 2), resolution by s^(e_r / 2), and so activations by
s^(1 - e_w / 2). Rounding is that of the authors' scaler in facebookresearch/pycls.
"""

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

from polylib import _checks


class Factors(NamedTuple):
    """By what depth, width, group width and resolution are multiplied."""

    depth: float
    width: float
    group: float
    resolution: float


class Stages(NamedTuple):
    """The stages of a network, one entry each: blocks, channels, channels in a group, and the bottleneck's multiplier.

    `group_widths` and `bottlenecks` may be left empty: ones. `resolution` is the side of the images.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    resolution: int
    group_widths: Sequence[int] = ()
    bottlenecks: Sequence[float] = ()


def scaling_factors(strategy: str, s: float) -> Factors:
    """The factors by which a strategy multiplies the flops by s.

    Args:
        strategy: weights of depth, width, group width and resolution, as `"d1_w8_g8_r1"`; or letters alone, of weight
            1 each, as `"dw"`; or `"dWr"`, the fast compound scaling, which is `"d1_w8_g8_r1"`. What is not named has
            weight 0. The weights of d, w and r share out the flops; that of g is given as if it were of the width.
        s: the factor on the flops, above 0.

    Raises:
        ValueError: an unknown or repeated letter, a weight that is not a number of at least 0, `s` not above 0, or
            only weights of 0 where `s` is not 1.
    """
    s = _checks.number("s", s, above=0)
    weights = _weights("d1_w8_g8_r1" if strategy == "dWr" else strategy)
    total = weights["d"] + weights["w"] + weights["r"] or weights["g"] / 2
    if total == 0:
        if s != 1:
            raise ValueError(f"strategy must have a weight above 0 to scale by {s:g}, got {strategy!r}")
        total = 1.0
    powers = {"d": 1.0, "w": 0.5, "g": 0.5, "r": 0.5}
    return Factors(*(s ** (power * weights[letter] / total) for letter, power in powers.items()))


def compound_strategy(alpha: float) -> str:
    """The strategy that gives the share `alpha` of the exponent to the width, and half of the rest each to d and r.

    Activations grow as s^(1 - alpha / 2). 1/3 is uniform compound scaling, 0.8 the fast one, 1 is width alone.

    Raises:
        ValueError: `alpha` is not from 0 to 1.
    """
    alpha = _checks.number("alpha", alpha, least=0, most=1)
    rest = (1 - alpha) / 2
    return f"d{rest!r}_w{alpha!r}_g{alpha!r}_r{rest!r}"


def scale_stages(base: Stages, strategy: str, s: float) -> Stages:
    """The stages of a network scaled to s times the flops, rounded to what can be built.

    Depths are rounded to integers of at least 1, widths to multiples of 8, the resolution to a multiple of 4. Group
    widths above 2 become 4 up to 5, and else a multiple of 8; they are at most the width inside of the bottleneck,
    which is then rounded to a multiple of them. Halves are rounded to even. So the flops are only about s times.

    Args:
        base: bottlenecks below 1, or integers.
        strategy, s: as in `scaling_factors`.

    Raises:
        ValueError: as `scaling_factors`; entries that are not one for each stage, or out of their range.
    """
    factors = scaling_factors(strategy, s)
    count = len(base.depths)
    groups, bottlenecks = base.group_widths or [1] * count, base.bottlenecks or [1] * count
    for name, entries in (("widths", base.widths), ("group_widths", groups), ("bottlenecks", bottlenecks)):
        if len(entries) != count or count == 0:
            raise ValueError(f"{name} must have one entry for each of {count} depths, at least one, got {len(entries)}")
    for name, sizes in (("depths", base.depths), ("widths", base.widths), ("group_widths", groups)):
        for size in sizes:
            _checks.integer(name, size, least=1)
    resolution = _checks.integer("resolution", base.resolution, least=1)
    depths = [max(1, round(depth * factors.depth)) for depth in base.depths]
    fitted = [
        _compatible(scaled_width(width, factors.width), _group_width(group * factors.group), bottleneck)
        for width, group, bottleneck in zip(base.widths, groups, bottlenecks, strict=True)
    ]
    side = max(4, round(resolution * factors.resolution / 4) * 4)
    return Stages(depths, [w for w, _ in fitted], side, [g for _, g in fitted], list(bottlenecks))


def scaled_width(width: int, factor: float) -> int:
    """A width times a factor, rounded to a multiple of 8, at least 8."""
    return max(1, round(width * factor / 8)) * 8


def _weights(strategy: str) -> dict[str, float]:
    parts = list(strategy) if strategy.isalpha() else strategy.split("_") if strategy else []
    weights = dict.fromkeys("dwgr", 0.0)
    named = [part[:1] for part in parts]
    if len(set(named)) < len(named) or not set(named) <= set(weights):
        raise ValueError(f"strategy must name each of d, w, g and r at most once, and nothing else, got {strategy!r}")
    for letter, part in zip(named, parts, strict=True):
        try:
            value = float(part[1:]) if not strategy.isalpha() else 1.0
        except ValueError:
            raise ValueError(f"strategy must have a number behind each letter, got {strategy!r}") from None
        weights[letter] = _checks.number("weights in strategy", value, least=0)
    return weights


def _group_width(group: float) -> int:
    whole = max(1, round(group))
    return whole if whole <= 2 else 4 if whole <= 5 else round(whole / 8) * 8


def _compatible(width: int, group: int, bottleneck: float) -> tuple[int, int]:
    """Width and group width such that the width inside of the bottleneck is a multiple of the group width."""
    ratio = _checks.number("bottlenecks", bottleneck, above=0)
    if ratio >= 1 and ratio % 1:
        raise ValueError(f"bottlenecks must be below 1, or integers, got {bottleneck}")
    inner = int(max(1, width * ratio))
    group = min(group, inner)
    step = lcm(group, int(ratio)) if ratio > 1 else group
    inner = max(step, round(inner / step) * step)
    return round(inner / ratio), group
