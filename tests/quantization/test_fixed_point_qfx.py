import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.quantization import (
    FixedPoint,
    FixedPointResidualBlock,
    export_integers,
    k_hot,
)


def draw(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(width, blocks=2, features=12, seed=0, steps=5, **options):
    """A few blocks, calibrated and trained for some steps, in evaluation mode."""
    torch.manual_seed(seed)
    modes = {name: options[name] for name in ("rounding", "overflow") if name in options}
    parts = [FixedPointResidualBlock(features, width, **options) for _ in range(blocks)]
    model = nn.Sequential(FixedPoint(width, **modes), *parts)
    x, target = draw(200, features), draw(200, features, seed=1)
    for part in parts:  # some scales are negative
        part.gamma.data = draw(features, seed=2) + 0.5
    model[0].calibrate(x)
    h = model[0](x)
    for part in parts:
        h = part.calibrate(h)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    return model.eval()


def bits_of(number):
    return bin(abs(number)).count("1")


def test_k_hot_against_the_binary_digits_in_text():
    raw = torch.arange(-130, 131)
    for k in (1, 2, 3, 9):
        expected = []
        for number in raw.tolist():
            digits, kept = bin(abs(number))[2:], ""
            for digit in digits:
                kept += digit if kept.count("1") < k else "0"
            expected.append(int(kept, 2) * (-1 if number < 0 else 1))
        assert k_hot(raw, k).tolist() == expected
        for dtype in (torch.int16, torch.int32):
            assert k_hot(raw.to(dtype), k).tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_hot_keeps_all_but_a_small_part(k):
    raw = torch.arange(1, 4097)
    kept = k_hot(raw, k)
    assert ((raw - kept) / raw < 2.0**-k).all() and (kept <= raw).all()
    near = k_hot(raw, k, rounding="rnd")
    assert max(bits_of(number) for number in (*kept.tolist(), *near.tolist())) <= k
    assert ((near - raw).abs() * (2 ** (k + 1) - 1) <= raw).all()
    assert (near - raw).abs().sum() < (kept - raw).abs().sum()


def test_one_hot_to_the_nearest_power_of_two():
    raw = torch.tensor([1, 2, 3, 5, 6, 7, -11, -12, 0])
    assert k_hot(raw, 1, rounding="rnd").tolist() == [1, 2, 4, 4, 8, 8, -8, -16, 0]


@pytest.mark.parametrize(
    ("raw", "k", "error", "words"),
    [
        (torch.arange(3), 0, ValueError, "k must be an integer of at least 1, got 0"),
        (torch.rand(3), 1, TypeError, "signed integers"),
        (torch.ones(3, dtype=torch.uint8), 1, TypeError, "signed integers"),
    ],
)
def test_k_hot_refuses(raw, k, error, words):
    with pytest.raises(error, match=words):
        k_hot(raw, k)
    with pytest.raises(ValueError, match="rounding must be one of"):
        k_hot(torch.arange(3), 1, rounding="up")


@pytest.mark.parametrize("width", [2, 3, 5, 8, 12])
@pytest.mark.parametrize(("k", "k_weight"), [(None, None), (1, None), (2, 2), (None, 1)])
def test_the_integers_are_the_network(width, k, k_weight):
    model, x = network(width, k=k, k_weight=k_weight), draw(300, 12, seed=7)
    integers = export_integers(model)
    raw = integers(model[0].raw(x))
    assert raw.unique().numel() >= min(3, 2 ** (width - 1))
    assert torch.equal(raw, (model(x).double() / integers.output.lsb).long())
    assert torch.equal(raw * integers.output.lsb, model(x).double())
    for block in integers.blocks:
        assert k is None or max(map(bits_of, block.scale.tolist())) <= k
        assert k_weight is None or max(map(bits_of, block.weight.flatten().tolist())) <= k_weight


@pytest.mark.parametrize("overflow", ["sat", "wrap"])
@pytest.mark.parametrize("rounding", ["trn", "trn_zero", "rnd", "rnd_conv"])
def test_the_integers_are_the_network_in_every_mode(rounding, overflow):
    model = network(5, rounding=rounding, overflow=overflow, steps=2)
    integers, x = export_integers(model), draw(200, 12, seed=7)
    assert torch.equal(integers(model[0].raw(x)) * integers.output.lsb, model(x).double())


def test_far_apart_formats_are_exact_or_refused():
    model, x = network(8), draw(100, 12, seed=7)
    model[1].casts["shift"].int_bits.data -= 20  # more bits than float32 holds
    integers = export_integers(model)
    assert torch.equal(integers(model[0].raw(x)) * integers.output.lsb, model(x).double())
    model[1].casts["shift"].int_bits.data -= 30
    with pytest.raises(ValueError, match="at most 52 bits"):
        export_integers(model)


def test_the_block_by_its_formula():
    block = network(6, blocks=1)[1]
    x = FixedPoint(6, 3)(draw(50, 12, seed=3))
    cast = block.casts
    a = cast["product"](x @ cast["weight"](block.weight).T)
    scale = block.gamma.double() / (block.running_var.double() + block.eps).sqrt()
    shift = block.beta.double() - block.running_mean.double() * scale
    normalised = cast["normalised"](cast["scale"](scale) * a.double() + cast["shift"](shift))
    expected = cast["sum"](normalised + x.double()).relu()
    torch.testing.assert_close(block(x).double(), expected, rtol=0, atol=0)


def test_many_bits_are_a_float_block_with_batch_norm():
    torch.manual_seed(0)
    block = FixedPointResidualBlock(12, 20)
    for name, point in block.casts.items():
        point.int_bits.data.fill_(6.0 if name != "weight" else 2.0)
    norm, x = nn.BatchNorm1d(12), draw(100, 12)
    for _ in range(3):
        expected = (norm(x @ block.weight.T) + x).relu()
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-2)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(block, name), getattr(norm, name), rtol=0, atol=1e-3)
    torch.testing.assert_close(block.eval()(x), (norm.eval()(x @ block.weight.T) + x).relu(), rtol=0, atol=1e-2)


def test_training_moves_weights_and_points():
    model = network(4, steps=0).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x, target, losses = draw(200, 12), draw(200, 12, seed=1).relu(), []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


def test_one_hot_scales_pass_the_gradient():
    plain, few = network(8, blocks=1, steps=0).train(), network(8, blocks=1, steps=0, k=1).train()
    x = draw(100, 12)
    for model in (plain, few):
        model(x).square().sum().backward()
    assert not torch.equal(plain(x), few(x))
    assert few[1].gamma.grad.abs().min() > 0 and few[1].casts["scale"].int_bits.grad.isfinite()


def test_what_does_not_fit_is_refused():
    block = FixedPointResidualBlock(4, 5)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 4\)"):
        block(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="more than one sample"):
        block(torch.zeros(1, 4))
    assert block.eval()(torch.zeros(1, 4)).shape == (1, 4)
    for settings in ({"features": 0}, {"width": 1}, {"k": 0}, {"k_weight": 1.5}, {"rounding": "up"}, {"eps": 0}):
        with pytest.raises(ValueError, match="must be"):
            FixedPointResidualBlock(**{"features": 4, "width": 5, **settings})
    for model in (block, nn.Sequential(block), nn.Sequential(FixedPoint(4), nn.ReLU())):
        with pytest.raises(TypeError, match="model must be a Sequential"):
            export_integers(model)
