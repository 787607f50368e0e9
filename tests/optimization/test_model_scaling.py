"""Scaling: the factors, the rounding, and published networks by the published counts."""

import math

import pytest
import torch
from torch import nn

from polylib.optimization import (
    EFFICIENTNET_B0,
    Residual,
    ScaledConvNet,
    SqueezeExcite,
    Stages,
    compound_strategy,
    conv_complexity,
    efficientnet,
    regnet,
    regnet_stages,
    scale_stages,
    scaled_network,
    scaled_width,
    scaling_factors,
)

# Flops, parameters and activations at 224 pixels, as the authors' repository pycls counts them.
OFFICIAL = {
    "RegNetY-400MF": (401_849_056, 4_344_144, 3_892_496),
    "EfficientNet-B0": (385_825_092, 5_288_548, 6_748_036),
    "RegNetY-4.0GF": (3_973_301_344, 20_646_656, 12_287_200),
}
# log(ratio of activations) / log(ratio of flops) at s = 16, with the authors' scaler.
EXPONENTS = {
    "RegNetY-400MF": {"w": 0.506, "dWr": 0.548, "dwr": 0.782, "r": 1.000},
    "EfficientNet-B0": {"w": 0.518, "dWr": 0.613, "dw": 0.697, "r": 1.001},
    "RegNetY-4.0GF": {"w": 0.579, "dWr": 0.579, "r": 1.000},
}


def count(name, strategy="", s=1):
    with torch.device("meta"):
        model, side = scaled_network(name, strategy, s)
    return conv_complexity(model, (3, side, side))


@pytest.mark.parametrize("strategy", ["d", "w", "r", "dw", "dwr", "dWr", "dwrg", "d1_w2", "d0.5_w3_r1e-1"])
@pytest.mark.parametrize("s", [0.25, 2, 16])
def test_factors_multiply_the_flops_by_s(strategy, s):
    d, w, _, r = scaling_factors(strategy, s)
    assert d * w**2 * r**2 == pytest.approx(s)


def test_names_of_strategies():
    assert scaling_factors("dWr", 16) == scaling_factors("d1_w8_g8_r1", 16)
    assert scaling_factors("w", 9) == scaling_factors("d0_w1_r0", 9) == (1, 3, 1, 1)
    assert scaling_factors("d", 9) == (9, 1, 1, 1)
    assert scaling_factors("r", 9) == (1, 1, 1, 3)
    assert scaling_factors("wg", 9) == (1, 3, 3, 1)
    assert scaling_factors("g", 9) == (1, 1, 9, 1)
    assert scaling_factors("dwr", 64) == pytest.approx((4, 2, 1, 2))
    assert scaling_factors("", 1) == scaling_factors("d0_w0", 1) == (1, 1, 1, 1)


def test_compound_strategies():
    assert scaling_factors(compound_strategy(0.8), 16) == pytest.approx(scaling_factors("dWr", 16))
    assert scaling_factors(compound_strategy(1 / 3), 16) == pytest.approx(scaling_factors("dwrg", 16))
    assert scaling_factors(compound_strategy(1), 16) == pytest.approx(scaling_factors("wg", 16))
    d, w, _, r = scaling_factors(compound_strategy(0.6), 16)
    assert d * w * r**2 == pytest.approx(16 ** (1 - 0.6 / 2))
    with pytest.raises(ValueError, match="alpha must be a finite number from 0 to 1"):
        compound_strategy(1.5)


@pytest.mark.parametrize(
    ("strategy", "s", "message"),
    [
        ("dwx", 2, "strategy must name each of d, w, g and r at most once"),
        ("dWrg", 2, "strategy must name each of d, w, g and r at most once"),
        ("dd", 2, "strategy must name each of d, w, g and r at most once"),
        ("d1_d2", 2, "strategy must name each of d, w, g and r at most once"),
        ("d1_w", 2, "strategy must have a number behind each letter"),
        ("d1_w-1", 2, "weights in strategy must be a finite number at least 0"),
        ("dw", 0, "s must be a finite number above 0"),
        ("dw", math.nan, "s must be a finite number above 0"),
        ("", 2, "strategy must have a weight above 0"),
        ("d0_w0_r0", 2, "strategy must have a weight above 0"),
    ],
)
def test_bad_strategies(strategy, s, message):
    with pytest.raises(ValueError, match=message):
        scaling_factors(strategy, s)


def test_a_factor_of_one_changes_nothing():
    base = Stages([1, 3], [48, 104], 224, [8, 8], [1, 1])
    for strategy in ("w", "dWr", "dwr", "d", "r"):
        assert scale_stages(base, strategy, 1) == base


def test_rounding():
    base = Stages((1, 3, 6, 6), (48, 104, 208, 440), 224, (8,) * 4)
    # Group widths become 16 and 24, and widths multiples of them.
    assert scale_stages(base, "dWr", 4)[:4] == ([1, 3, 7, 7], [80, 192, 352, 768], 240, [16] * 4)
    assert scale_stages(base, "dWr", 16)[:4] == ([1, 4, 8, 8], [144, 312, 624, 1344], 256, [24] * 4)
    # Halves to even: 2.5 to 2, 3.5 to 4; the side 30 * 5^(1/6) = 39.2 to 40.
    assert scale_stages(Stages((5, 7), (8, 8), 32), "d", 0.5).depths == [2, 4]
    found = scale_stages(Stages((3, 5), (20, 36), 30, (3, 6), (0.25, 6)), "dwrg", 5)
    assert found[:4] == ([5, 9], [32, 48], 40, [4, 8])
    # A group can't be wider than the channels inside of the bottleneck; nothing vanishes.
    assert scale_stages(Stages((1,), (16,), 8, (64,), (0.5,)), "w", 1).group_widths == [8]
    assert scale_stages(Stages((1,), (8,), 4), "dwr", 1e-6)[:3] == ([1], [8], 4)
    assert scaled_width(12, 1) == 16  # 1.5 to even
    assert scaled_width(20, 1) == 16  # 2.5 to even


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Stages((), (), 8), "widths must have one entry for each of 0 depths"),
        (Stages((1, 2), (8,), 8), "widths must have one entry for each of 2 depths, at least one, got 1"),
        (Stages((1,), (8,), 8, (1, 1)), "group_widths must have one entry"),
        (Stages((1,), (8,), 8, (), (1, 1)), "bottlenecks must have one entry"),
        (Stages((0,), (8,), 8), "depths must be an integer of at least 1, got 0"),
        (Stages((1,), (8.5,), 8), "widths must be an integer"),
        (Stages((1,), (8,), 0), "resolution must be an integer"),
        (Stages((1,), (8,), 8, (), (1.5,)), "bottlenecks must be below 1, or integers, got 1.5"),
        (Stages((1,), (8,), 8, (), (0,)), "bottlenecks must be a finite number above 0"),
    ],
)
def test_bad_stages(base, message):
    with pytest.raises(ValueError, match=message):
        scale_stages(base, "w", 2)


def test_widths_of_regnets():
    stages = regnet_stages(16, 48, 27.89, 2.09, 8)
    assert stages[:4] == ([1, 3, 6, 6], [48, 104, 208, 440], 224, [8] * 4)
    assert regnet_stages(22, 96, 31.41, 2.24, 64)[:2] == ([2, 6, 12, 2], [128, 192, 512, 1088])
    assert regnet_stages(3, 16, 0, 2, 8)[:2] == ([3], [16])
    with pytest.raises(ValueError, match="w_0 must be a multiple of"):
        regnet_stages(16, 50, 27.89, 2.09, 8)
    with pytest.raises(ValueError, match="w_m must be a finite number above 1"):
        regnet_stages(16, 48, 27.89, 1, 8)


@pytest.mark.parametrize("name", OFFICIAL)
def test_published_networks_have_the_published_counts(name):
    assert count(name) == OFFICIAL[name]


@pytest.mark.parametrize("name", EXPONENTS)
def test_activations_grow_as_with_the_authors_scaler(name):
    base = count(name)
    for strategy, expected in EXPONENTS[name].items():
        found = count(name, strategy, 16)
        exponent = math.log(found.acts / base.acts) / math.log(found.flops / base.flops)
        assert exponent == pytest.approx(expected, abs=6e-4)


def test_published_networks_run():
    torch.manual_seed(0)
    for name in ("RegNetY-400MF", "EfficientNet-B0"):
        model, side = scaled_network(name, "w", 1 / 16, resolution=32)
        assert side == 32
        assert model(torch.randn(2, 3, side, side)).shape == (2, 1000)
    with pytest.raises(ValueError, match="name must be one of 'RegNetY-400MF'"):
        scaled_network("ResNet", "w", 2)
    with pytest.raises(ValueError, match="stages must be 7"):
        efficientnet(Stages((1,), (8,), 32, (), (1,)))
    with pytest.raises(ValueError, match="group_widths must be a divisor"):
        regnet(Stages((1,), (8,), 32, (3,), (1,)))
    assert len(regnet(Stages((1,), (8,), 32, (8,), (1,)), squeeze=0)) == 5
    assert EFFICIENTNET_B0.widths[0] == 16


def test_blocks_are_as_described():
    torch.manual_seed(0)
    layer, x = SqueezeExcite(6, 2), torch.randn(3, 6, 4, 5)
    first, second = layer.gate[1], layer.gate[3]
    hidden = (x.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias).relu()
    gate = (hidden @ second.weight[:, :, 0, 0].T + second.bias).sigmoid()
    torch.testing.assert_close(layer(x), x * gate[..., None, None])
    conv = nn.Conv2d(6, 6, 1)
    torch.testing.assert_close(Residual(conv)(x), x + conv(x))
    torch.testing.assert_close(Residual(conv, conv, nn.ReLU)(x), (2 * conv(x)).relu())


def test_the_small_network_is_scaled_as_a_whole():
    base = Stages((1, 1, 1), (24, 48, 96), 64)
    one = conv_complexity(ScaledConvNet(base), (3, 64, 64))
    for strategy, expected in (("r", 1.0), ("w", 0.5)):
        stages = scale_stages(base, strategy, 16)
        with torch.device("meta"):
            found = conv_complexity(ScaledConvNet(stages), (3, stages.resolution, stages.resolution))
        exponent = math.log(found.acts / one.acts) / math.log(found.flops / one.flops)
        assert exponent == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("residual", [True, False])
def test_the_small_network_learns(residual):
    torch.manual_seed(0)
    model = ScaledConvNet(Stages((1, 2), (8, 16), 12), in_channels=1, classes=2, residual=residual)
    x = torch.randn(32, 1, 12, 12)
    x[:16, :, :6] += 2
    y = (torch.arange(32) < 16).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    with pytest.raises(ValueError, match="widths must have one entry"):
        ScaledConvNet(Stages((1, 2), (8,), 12))
    with pytest.raises(ValueError, match="depths must be an integer"):
        ScaledConvNet(Stages((0,), (8,), 12))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("s", [2, 4, 16])
def test_what_is_scaled_can_be_built_at_any_ratio(ratio, s):
    for width in (8, 16, 24):
        stages = scale_stages(Stages([1], [width], 32, [8], [ratio]), "dWr", s)
        assert round(stages.widths[0] * ratio) % stages.group_widths[0] == 0
