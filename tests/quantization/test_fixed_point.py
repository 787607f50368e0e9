import math
from fractions import Fraction

import pytest
import torch

from polylib.quantization import FixedFormat, FixedPoint, FixedPointQuantizer


def draw(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off_the_borders(module, x):
    """Entries that are not within a thousandth of a step of a tie or of an end of the range."""
    v = x.detach().double() / module.lsb
    half = (v * 2 - (v * 2).round()).abs() > 2e-3
    low, high = module.format.raw_range
    return x[half & ((v - low).abs() > 1e-3) & ((v - high).abs() > 1e-3)]


@pytest.mark.parametrize(("width", "int_bits"), [(2, 1), (4, 2), (6, -2), (5, 8), (8, 3), (16, 4)])
@pytest.mark.parametrize("overflow", ["sat", "wrap"])
@pytest.mark.parametrize("rounding", ["trn", "trn_zero", "rnd_conv"])
@pytest.mark.parametrize("signed", [True, False])
def test_the_cast_against_fxpmath(width, int_bits, overflow, rounding, signed):
    from fxpmath import Fxp

    module = FixedPoint(width, int_bits, signed=signed, rounding=rounding, overflow=overflow)
    x = draw(200, size=1.3 * 2.0 ** (int_bits - 1))
    theirs = Fxp(
        x.double().numpy(),
        signed=signed,
        n_word=width,
        n_frac=width - int_bits,
        rounding={"trn": "floor", "trn_zero": "fix", "rnd_conv": "around"}[rounding],
        overflow={"sat": "saturate", "wrap": "wrap"}[overflow],
    )
    assert module.raw(x).tolist() == theirs.val.astype(int).tolist()
    assert module(x).tolist() == theirs().tolist()


@pytest.mark.parametrize("signed", [True, False])
def test_ties_go_up_as_fractions_say(signed):
    module = FixedPoint(6, 3, signed=signed)
    low, high = module.format.raw_range
    x = torch.arange(-80, 81) / 16  # halves and quarters of a step
    raw = [math.floor(Fraction(v) / Fraction(module.lsb) + Fraction(1, 2)) for v in x.tolist()]
    assert module.raw(x).tolist() == [min(max(r, low), high) for r in raw]
    assert module.raw(torch.tensor([0.5, 1.5, -0.5]) * module.lsb).tolist() == [1, 2, 0]


def test_what_a_cast_leaves_alone_and_what_order_it_keeps():
    module, x = FixedPoint(5, 2), draw(300, size=2.0)
    y = module(x)
    assert torch.equal(module(y), y)
    assert (module(x.sort().values).diff() >= 0).all()
    assert torch.equal(FixedPoint(5, 3)(2 * x), 2 * y)
    fine = FixedPoint(25, 4)
    torch.testing.assert_close(fine(x), x, rtol=0, atol=fine.lsb / 2)
    assert y.min() >= module.range[0] and y.max() <= module.range[1]
    assert module(torch.tensor([math.nan])).isnan().all()
    torch.testing.assert_close(module.lsb * module.raw(x), y)


def test_it_is_the_power_of_two_quantiser_after_calibration():
    module = FixedPoint(4)
    x = draw(50, 7)
    module.calibrate(x)
    kept = off_the_borders(module, x)
    assert module(kept).shape[0] > 300
    old = FixedPointQuantizer(4)(x)
    torch.testing.assert_close(module(x)[module(x) == old].numel() / x.numel(), 1.0, atol=0.02, rtol=0)


@pytest.mark.parametrize("rounding", ["rnd", "trn"])
def test_the_gradients_by_their_closed_form(rounding):
    module = FixedPoint(4, 1.3, rounding=rounding)
    x = off_the_borders(module, draw(400, size=1.5)).requires_grad_()
    pull = draw(len(x), seed=1)
    module(x).backward(pull)
    v = x.detach().double() / module.lsb
    code = module.raw(x).double()
    inside = (v >= -8) & (v <= 7)
    assert 0 < inside.sum() < len(x)
    assert torch.equal(x.grad, torch.where(inside, pull, 0))
    slope = module.lsb * math.log(2) * torch.where(inside, code - v, code)
    torch.testing.assert_close(module.int_bits.grad.double(), (pull * slope).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("int_bits", "direction"), [(-1.0, 1), (6.0, -1)])
def test_the_binary_point_moves_to_where_the_error_is_less(int_bits, direction):
    module, x = FixedPoint(4, int_bits), draw(2000)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    errors = []
    for _ in range(60):
        error = (module(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert direction * (module.int_bits.item() - int_bits) > 1.5
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize(("largest", "int_bits"), [(0.9, 1), (1.0, 1), (1.01, 2), (0.24, -1), (100.0, 8)])
def test_calibration_by_range(largest, int_bits):
    module = FixedPoint(8)
    module.calibrate(torch.tensor([0.1 * largest, -largest]))
    assert module.format == FixedFormat(8, int_bits)
    unsigned = FixedPoint(8, signed=False)
    unsigned.calibrate(torch.tensor([largest]))
    assert unsigned.format == FixedFormat(8, int_bits - 1, False)


def test_calibration_by_error_is_the_best_of_all_points():
    x = draw(5000)
    module = FixedPoint(3)
    module.calibrate(x, by="error")
    errors = {point: (FixedPoint(3, point)(x) - x).square().sum().item() for point in range(-6, 9)}
    best = min(errors, key=errors.get)
    assert module.format.int_bits == best
    module.calibrate(x)
    assert module.format.int_bits > best
    for nothing in (torch.zeros(4), torch.empty(0)):
        module.calibrate(nothing)
        assert module.format.int_bits > best


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 1}, "width must be an integer from 2 to 25, got 1"),
        ({"width": 0, "signed": False}, "width must be an integer from 1 to 24, got 0"),
        ({"width": 4, "int_bits": math.nan}, "int_bits must be a finite number"),
        ({"width": 4, "rounding": "nearest"}, "rounding must be one of"),
        ({"width": 4, "overflow": "clip"}, "overflow must be one of"),
    ],
)
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        FixedPoint(**arguments)


def test_what_has_no_integer_is_refused():
    module = FixedPoint(4)
    with pytest.raises(ValueError, match="without NaN"):
        module.raw(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="finite"):
        module.calibrate(torch.tensor([math.inf]))
    with pytest.raises(ValueError, match="by must be one of"):
        module.calibrate(torch.ones(2), by="entropy")
    assert not FixedPoint(4, learn=False).int_bits.requires_grad
