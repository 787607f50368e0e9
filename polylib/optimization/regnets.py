"""RegNet: networks whose widths follow a quantised line.

I. Radosavovic, R. P. Kosaraju, R. Girshick, K. He and P. Dollar, "Designing Network Design Spaces", CVPR 2020
(arXiv 2003.13678). RegNetY is RegNetX with squeeze-and-excitation.
"""

from collections import Counter
from math import log

from torch import nn

from polylib import _checks
from polylib.optimization.conv_blocks import Residual, SqueezeExcite, conv_norm, projection
from polylib.optimization.model_scaling import Stages, scale_stages

# Depth, w_0, w_a, w_m and group width of two published networks.
_REGNETS = {"RegNetY-400MF": (16, 48, 27.89, 2.09, 8), "RegNetY-4.0GF": (22, 96, 31.41, 2.24, 64)}


def regnet_stages(depth: int, w_0: int, w_a: float, w_m: float, group_width: int, resolution: int = 224) -> Stages:
    """The stages of a RegNet: block j has width w_0 w_m^k, rounded to a multiple of 8, with k the integer next to
    log(1 + j w_a / w_0) / log(w_m). Blocks of equal width form a stage.

    Raises:
        ValueError: a depth below 1, a width w_0 that is no multiple of 8, w_a below 0, or w_m not above 1.
    """
    depth = _checks.integer("depth", depth, least=1)
    w_0 = _checks.multiple("w_0", w_0, "the step of widths", 8)
    w_a, w_m = _checks.number("w_a", w_a, least=0), _checks.number("w_m", w_m, above=1)
    powers = [round(log(1 + j * w_a / w_0) / log(w_m)) for j in range(depth)]
    blocks = Counter(8 * round(w_0 * w_m**power / 8) for power in powers)
    widths = sorted(blocks)
    return scale_stages(Stages([blocks[w] for w in widths], widths, resolution, [group_width] * len(widths)), "", 1)


def regnet(stages: Stages, *, squeeze: float = 0.25, stem: int = 32, classes: int = 1000) -> nn.Sequential:
    """A RegNet for images of three channels: a stem, stages that halve the resolution, and a linear classifier.

    A block is 1 x 1, 3 x 3 in groups, squeeze-and-excitation, 1 x 1, beside a shortcut.

    Args:
        stages: group widths divide the widths inside of the bottlenecks, as those of `scale_stages` do.
        squeeze: the width of the squeeze as a share of the block's input; 0 for none, which is RegNetX.
        stem: channels of the first convolution, which the scaling leaves as it is.

    Raises:
        ValueError: a group width that does not divide.
    """
    layers: list[nn.Module] = [conv_norm(3, stem, 3, 2)]
    w_in = stem
    for depth, width, group, ratio in zip(
        stages.depths, stages.widths, stages.group_widths, stages.bottlenecks, strict=True
    ):
        for block in range(depth):
            layers.append(_block(w_in, width, 2 if block == 0 else 1, ratio, group, squeeze))
            w_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w_in, classes))


def regnet_y(name: str) -> Stages:
    """The stages of a published RegNetY: `"RegNetY-400MF"` or `"RegNetY-4.0GF"`.

    Raises:
        ValueError: another name.
    """
    return regnet_stages(*_REGNETS[_checks.choice("name", name, _REGNETS)])


def _block(w_in: int, w_out: int, stride: int, ratio: float, group: int, squeeze: float) -> Residual:
    inner = round(w_out * ratio)
    _checks.divisor("group_widths", group, "the width inside of the bottleneck", inner)
    squeezed = round(w_in * squeeze)
    body = nn.Sequential(
        conv_norm(w_in, inner, 1),
        conv_norm(inner, inner, 3, stride, inner // group),
        SqueezeExcite(inner, squeezed) if squeezed else nn.Identity(),
        conv_norm(inner, w_out, 1, activation=None),
    )
    return Residual(body, projection(w_in, w_out, stride), nn.ReLU)
