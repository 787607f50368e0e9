import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.quantization import (
    LSQQuantizer,
    OscillationMeter,
    StatsQuantizer,
    UniformQuantizer,
    confidence_guided,
    confidence_mask,
    quantize_model,
    weight_quantizers,
)


def layer(weight, quantizer=StatsQuantizer, bits=2):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return quantize_model(model, bits, quantizer)


def latent(model):
    return weight_quantizers(model)["0"][1]


def test_flips_and_reversals_of_a_weight_that_jumps_to_and_fro():
    model = layer(torch.tensor([[0.1, 1.0, -1.0, 0.9]]), LSQQuantizer, bits=4)
    model[0].parametrizations["weight"][0].scale.data.fill_(0.25)
    meter = OscillationMeter(model)
    for value in (0.2, 0.1, 0.2, 0.2):  # codes 0 -> 1 -> 0 -> 1 -> 1
        with torch.no_grad():
            latent(model)[0, 0] = value
        meter.update()
    found = meter.summary()
    assert found["flip"] == pytest.approx(3 / 16) and found["reversal"] == pytest.approx(2 / 16)
    assert found["scale_flip"] == 0 and found["jitter"] == 0
    power = [value**2 + 2 + 0.81 for value in (0.1, 0.2)]
    assert found["energy"] == pytest.approx(0.25**2 * (1 / power[0] + 1 / power[1]) / 4, rel=1e-5)
    frequency = meter.frequency("0")
    assert frequency[0, 0] > 0 and not frequency[0, 1:].any()


def test_a_scale_flip_happens_although_no_weight_moves():
    model = layer(torch.tensor([[0.1, 1.0, -1.0, 0.8]]), LSQQuantizer, bits=4)
    scale = model[0].parametrizations["weight"][0].scale
    scale.data.fill_(0.21)
    meter = OscillationMeter(model)
    for value in (0.19, 0.21):  # 0.1 lies between half of the one and half of the other
        scale.data.fill_(value)
        meter.update()
    found = meter.summary()
    assert found["flip"] == found["scale_flip"] == pytest.approx(2 / 8)
    assert found["jitter"] == pytest.approx((0.02 / 0.21 + 0.02 / 0.19) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "quantizer", [UniformQuantizer, StatsQuantizer, LSQQuantizer, partial(UniformQuantizer, symmetric=False)]
)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_nothing_is_counted_where_nothing_moves(quantizer, bits):
    torch.manual_seed(0)
    meter = OscillationMeter(layer(torch.randn(8, 30), quantizer, bits))
    meter.update()
    assert not any(meter.summary().values())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_mask_is_the_set_of_weights_near_a_threshold(bits):
    torch.manual_seed(0)
    w = torch.randn(20, 50)
    s, n = 2 * w.abs().mean(1, keepdim=True), 2 ** (bits - 1)
    thresholds = torch.arange(-n + 1, n) / n
    distance = (w[..., None] / s[..., None] - thresholds).abs().amin(-1) * n  # in levels
    for boundary_range in (0.01, 0.1):
        mask = confidence_mask(w, bits, boundary_range)
        assert torch.equal(mask, distance <= boundary_range)
        assert 0.2 * boundary_range < mask.float().mean() < 4 * boundary_range
    inside = ((w / s) * n).abs() < n - 1
    assert confidence_mask(w, bits, 0.5)[inside].all()


def test_a_threshold_between_codes_that_do_not_occur_does_not_count():
    w = torch.tensor([[1.0, 1.0, 1.0, 0.9, 0.5002]])  # all codes are 0 or 1: scale 1.76
    codes = StatsQuantizer(2).integers(w)[0]
    assert codes.min() == 0
    near_zero = torch.cat([w, torch.tensor([[0.0001]])], 1)
    assert not confidence_mask(near_zero, 2, 0.005)[0, -1]


def train(model, steps, optimizer, meter=None):
    gen = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 30, generator=gen)
        loss = F.mse_loss(model(x), x[:, :8].sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if meter:
            meter.update()


def test_frozen_weights_are_bit_identical_after_steps_with_momentum_and_decay():
    torch.manual_seed(0)
    model = layer(torch.randn(8, 30))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, 5, optimizer)
    before = latent(model).detach().clone()
    with confidence_guided(optimizer, model, 0.02):
        mask = confidence_mask(before, 2, 0.02)
        train(model, 1, optimizer)
        after = latent(model).detach().clone()
    assert 0 < mask.sum() < 40
    assert torch.equal(after[~mask], before[~mask]) and not torch.equal(after[mask], before[mask])
    train(model, 1, optimizer)  # the hooks are gone
    assert (latent(model) != after).float().mean() > 0.9


def test_annealing_calms_the_flips():
    torch.manual_seed(0)
    model = layer(torch.randn(8, 30) * 0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, 300, optimizer)
    twin = copy.deepcopy(model)
    meters = [OscillationMeter(model), OscillationMeter(twin)]
    train(model, 100, optimizer, meters[0])
    other = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    with confidence_guided(other, twin):
        train(twin, 100, other, meters[1])
    free, guided = (meter.summary() for meter in meters)
    assert guided["flip"] < 0.5 * free["flip"] and guided["energy"] < 0.5 * free["energy"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OscillationMeter(nn.Linear(2, 2)), r"layers must be some of the quantised layers \[\], got \[\]"),
        (
            lambda: OscillationMeter(layer(torch.ones(2, 2)), ["1"]),
            r"layers must be some of the quantised layers \['0'\], got \['1'\]",
        ),
        (lambda: OscillationMeter(layer(torch.ones(2, 2))).summary(), "no update was made"),
        (
            lambda: confidence_mask(torch.ones(2, 2), 2, 0.0),
            r"boundary_range must be a finite number above 0, at most 0\.5, got 0\.0",
        ),
        (lambda: confidence_mask(torch.ones(2, 2), 0, 0.1), "bits must be an integer from 1 to 16, got 0"),
        (lambda: confidence_guided(None, nn.Linear(2, 2)).__enter__(), "no weight quantised by StatsQuantizer"),
        (
            lambda: confidence_guided(None, layer(torch.ones(2, 2)), 0.6).__enter__(),
            r"boundary_range must be a finite number above 0, at most 0\.5, got 0\.6",
        ),
    ],
)
def test_bad_input_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()
