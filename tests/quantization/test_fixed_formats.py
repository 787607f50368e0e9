import math
from fractions import Fraction

import pytest
import torch

from polylib.quantization import FixedFormat, fixed_add_format, fixed_dot_format, fixed_mul_format, integer_cast

FORMATS = [FixedFormat(4, 2), FixedFormat(5, -1), FixedFormat(3, 6), FixedFormat(4, 1, False), FixedFormat(1, 0, False)]
ROUNDED = {
    "trn": math.floor,
    "trn_zero": math.trunc,
    "rnd": lambda v: math.floor(v + Fraction(1, 2)),
    "rnd_conv": round,  # of a Fraction: exact, ties to the even one
}


def ends(form):
    return [Fraction(r) * Fraction(form.lsb) for r in form.raw_range]


def holds(form, value):
    low, high = ends(form)
    return low <= value <= high and (value / Fraction(form.lsb)).denominator == 1


def cast_by_fractions(value, form, rounding, overflow):
    raw, (low, high) = ROUNDED[rounding](value / Fraction(form.lsb)), form.raw_range
    return min(max(raw, low), high) if overflow == "sat" else (raw - low) % 2**form.width + low


def test_a_format_by_hand():
    form = FixedFormat(4, 2)
    assert (form.fraction_bits, form.lsb, form.raw_range, form.range) == (2, 0.25, (-8, 7), (-2.0, 1.75))
    wide = FixedFormat(3, 5, signed=False)
    assert (wide.fraction_bits, wide.lsb, wide.raw_range, wide.range) == (-2, 4.0, (0, 7), (0.0, 28.0))


@pytest.mark.parametrize("a", FORMATS)
@pytest.mark.parametrize("b", FORMATS)
def test_sums_and_products_fit_and_one_bit_less_is_too_few_for_sums(a, b):
    added, product = fixed_add_format(a, b), fixed_mul_format(a, b)
    both = [(x, y) for x in ends(a) for y in ends(b)]
    assert all(holds(added, x + y) for x, y in both)
    assert all(holds(product, x * y) for x, y in both)
    assert holds(added, Fraction(a.lsb)) or a.signed < added.signed
    if a.signed == b.signed and a.fraction_bits == b.fraction_bits and a.width == b.width:
        short = FixedFormat(added.width - 1, added.int_bits - 1, added.signed)
        assert not all(holds(short, x + y) for x, y in both)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 1024])
def test_dot_products_fit(n):
    a, b = FixedFormat(8, 3), FixedFormat(8, 1)
    form = fixed_dot_format(a, b, n)
    assert form.width == 16 + math.ceil(math.log2(n))
    assert holds(form, n * ends(a)[0] * ends(b)[0]) and holds(form, n * ends(a)[0] * ends(b)[1])


def test_float32_holds_sums_of_26_bits_and_no_more():
    form, big = FixedFormat(8, 8), torch.full((2048,), -128)
    assert [fixed_dot_format(form, form, n).width for n in (1024, 2048)] == [26, 27]
    odd = big.clone()
    odd[0] = 1
    for n in (1024, 2048):  # 27 bits: an odd sum above 2**24
        exact = (odd[:n] * odd[:n]).sum()
        in_float32 = (odd[:n].float() @ odd[:n].float()).long()
        assert (exact == in_float32) == (n == 1024)
        assert (odd[:n].double() @ odd[:n].double()).long() == exact


@pytest.mark.parametrize("overflow", ["sat", "wrap"])
@pytest.mark.parametrize("rounding", list(ROUNDED))
def test_the_integer_cast_against_fractions(rounding, overflow):
    source = FixedFormat(8, 3)
    raw = torch.arange(*source.raw_range)
    for target in (*FORMATS, FixedFormat(12, 4), FixedFormat(4, 70), FixedFormat(40, 2)):
        found = integer_cast(raw, source, target, rounding, overflow)
        values = [Fraction(r) * Fraction(source.lsb) for r in raw.tolist()]
        assert found.tolist() == [cast_by_fractions(value, target, rounding, overflow) for value in values]


def test_bad_formats_and_casts_are_refused():
    form, raw = FixedFormat(4, 2), torch.arange(3)
    with pytest.raises(ValueError, match=r"a.width must be an integer of at least 2, got 1"):
        fixed_add_format(FixedFormat(1, 0), form)
    with pytest.raises(ValueError, match=r"b.int_bits must be an integer, got 0.5"):
        fixed_mul_format(form, FixedFormat(4, 0.5))
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        fixed_dot_format(form, form, 0)
    with pytest.raises(ValueError, match="rounding must be one of"):
        integer_cast(raw, form, form, "nearest")
    with pytest.raises(ValueError, match="overflow must be one of"):
        integer_cast(raw, form, form, overflow="clip")
    with pytest.raises(ValueError, match="63 bits"):
        integer_cast(raw, form, FixedFormat(4, -70))
    with pytest.raises(TypeError, match="int64"):
        integer_cast(raw.float(), form, form)
