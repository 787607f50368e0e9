"""Compressors: what they keep, how much they lose, what they send, and bad input."""

import math

import numpy as np
import pytest
import torch

from polylib.optimization import BlockTopK, NaturalRounding, TopK, decode_

D = 23
ALL = [
    TopK(0.01),
    TopK(0.3),
    TopK(1.0),
    BlockTopK(1, 8),
    BlockTopK(3, 5),
    BlockTopK(8, 8),
    BlockTopK(2),
    NaturalRounding(),
    NaturalRounding(TopK(0.2)),
    NaturalRounding(BlockTopK(2, 8)),
]


def vectors(dtype=torch.float64):
    """Random, constant and one-hot rows, a row of ties, one of zeros, and one over many powers of two."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(4, D, generator=draw, dtype=torch.float64), torch.ones(1, D), -torch.eye(D)[[0, D - 1]]]
    rows += [torch.tensor([[1.0, -1.0]]).repeat(1, D)[:, :D], torch.zeros(1, D), 1.5 * 2.0 ** torch.arange(D)[None]]
    return torch.cat([row.to(dtype) for row in rows])


@pytest.mark.parametrize("compressor", ALL)
def test_contractive(compressor):
    x = vectors()
    lost = (compressor(x) - x).square().sum(-1)
    alpha = compressor.alpha(D)
    assert 0 < alpha <= 1
    assert (lost <= (1 - alpha) * x.square().sum(-1) * (1 + 1e-12)).all()


def test_contractions_are_attained():
    ones = torch.ones(24, dtype=torch.float64)
    for compressor in (TopK(0.25), BlockTopK(2, 8)):
        assert (compressor(ones) - ones).square().sum() == 24 * (1 - compressor.alpha(24))
    rounding = NaturalRounding()
    lost = (rounding(1.5 * ones) - 1.5 * ones).square().sum().item()
    assert lost == pytest.approx((1 - rounding.alpha(24)) * 1.5**2 * 24)


@pytest.mark.parametrize("compressor", [c for c in ALL if not isinstance(c, NaturalRounding)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_largest_are_kept_and_of_equal_ones_the_first(compressor, dtype):
    x = vectors(dtype)
    block = getattr(compressor, "block", D)
    for row, found in zip(x.double().numpy(), compressor(x).double().numpy(), strict=True):
        want = np.zeros(D)
        for start in range(0, D, block):
            part = row[start : start + block]
            count = compressor.k if isinstance(compressor, BlockTopK) else compressor.kept(D)
            chosen = np.argsort(-np.abs(part), kind="stable")[:count]
            want[start + chosen] = part[chosen]
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("compressor", [c for c in ALL if not isinstance(c, NaturalRounding)])
def test_what_is_sent_is_what_is_kept(compressor):
    x = vectors()
    values, indices = compressor.encode(x)
    assert values.shape == indices.shape
    assert values[0].numel() == compressor.kept(D)
    assert indices.dtype == torch.int32
    total = decode_(torch.ones_like(x), values.flatten(1), indices.flatten(1))
    torch.testing.assert_close(total, 1 + compressor(x))
    empty = indices == -1
    assert (values[empty] == 0).all()
    for row in indices.flatten(1):
        real = row[row >= 0]
        assert len(real.unique()) == len(real)
        assert (real < D).all()


def test_a_short_last_block_is_padded():
    values, indices = BlockTopK(3, 4).encode(torch.tensor([1.0, -2.0, 3.0, 4.0, 0.0, 5.0]))
    assert values.tolist() == [[-2.0, 3.0, 4.0], [0.0, 5.0, 0.0]]
    assert indices.tolist() == [[1, 2, 3], [4, 5, -1]]


def test_what_is_not_finite_is_sent():
    x = torch.tensor([1.0, torch.nan, -3.0, torch.inf, 5.0])
    for k in (2, 3, 4):
        values, indices = TopK(k / 5).encode(x)
        assert {1, 3} <= set(indices.tolist())
        assert values.isnan().sum() == 1


@pytest.mark.parametrize("compressor", ALL)
def test_homogeneous_or_not(compressor):
    x = vectors()
    scaled = [torch.allclose(compressor(t * x), t * compressor(x), rtol=1e-12, atol=0) for t in (1e-3, 0.7, 1.4, 30.0)]
    assert all(scaled) == compressor.homogeneous


def test_one_row_at_a_time():
    x = vectors()[:4].view(2, 2, D)
    for compressor in ALL:
        together = compressor(x)
        assert together.shape == x.shape
        for i in range(2):
            for j in range(2):
                assert torch.equal(together[i, j], compressor(x[i, j]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_nearest_power_of_two(dtype):
    x = torch.tensor([0.0, 1.0, -1.4, 1.6, 2.9, 3.1, -6.5, 0.011, 1e-4], dtype=dtype)
    for value, found in zip(x.tolist(), NaturalRounding()(x).tolist(), strict=True):
        if value == 0:
            assert found == 0
            continue
        powers = [math.copysign(2.0**e, value) for e in range(-20, 20)]
        assert found == min(powers, key=lambda power, value=value: abs(power - value))
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    torch.testing.assert_close(NaturalRounding()(odd), odd, equal_nan=True)


def test_gradients_of_no_size_are_sent_without_fuss():
    for compressor in ALL:
        assert (compressor(torch.zeros(3, D)) == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TopK(0.0), ValueError, "ratio must be"),
        (lambda: TopK(1.1), ValueError, "ratio must be"),
        (lambda: BlockTopK(0, 8), ValueError, "k must be"),
        (lambda: BlockTopK(9, 8), ValueError, "k must be"),
        (lambda: BlockTopK(1, 0), ValueError, "block must be"),
        (lambda: NaturalRounding(NaturalRounding()), TypeError, "after must be"),
        (lambda: TopK(0.5).alpha(0), ValueError, "d must be"),
        (lambda: TopK(0.5)(torch.tensor(1.0)), ValueError, "x must have shape"),
        (lambda: BlockTopK(1, 8)(torch.zeros(3, 0)), ValueError, "x must have shape"),
        (lambda: NaturalRounding()(torch.arange(3)), TypeError, "x must be of a floating-point dtype"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
