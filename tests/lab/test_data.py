import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from polylib.lab import at_scale, digits, mnist1d, scale, shells, text, text_windows


@pytest.mark.parametrize(
    ("make", "features", "classes"), [(digits, 64, 10), (shells, 8, 4), (lambda: mnist1d(500), 40, 10)]
)
def test_sets_are_standardised_and_repeatable(make, features, classes):
    data = make()
    assert data.features == features and data.classes == classes
    assert data.x_train.dtype == torch.float32 and data.y_train.dtype == torch.int64
    torch.testing.assert_close(data.x_train.mean(0), torch.zeros(features), atol=1e-5, rtol=0)
    assert data.x_train.std(correction=0) == pytest.approx(1, abs=1e-4)
    for one, other in zip(data, make(), strict=True):
        assert torch.equal(one, other)


def test_digits_splits_all_images_without_overlap():
    data = digits(train=1000, seed=3)
    assert len(data.x_train) == 1000 and len(data.x_test) == 797
    assert not torch.equal(data.x_train[:10], digits(train=1000, seed=4).x_train[:10])


def test_the_mnist1d_generator_leaves_the_global_generators_alone():
    def draw():
        return random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        random.seed(1), np.random.seed(1)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    mnist1d(300)
    assert draw() == expected


def test_only_the_radius_tells_the_shells_apart():
    data = shells()
    radius = data.x_train.norm(dim=1)
    order = [radius[data.y_train == k].mean() for k in range(4)]
    assert all(a < b for a, b in pairwise(order))
    assert data.x_train[data.y_train == 3].mean(0).abs().max() < 0.2


def test_text_is_a_fair_amount_of_english():
    assert len(text()) > 300_000 and "expression" in text()


def test_scale_picks_the_largest_value_not_above_it(monkeypatch):
    monkeypatch.delenv("POLYLIB_SCALE", raising=False)
    assert scale() == "ci" and at_scale(1, 2, 3) == 1
    monkeypatch.setenv("POLYLIB_SCALE", "gpu")
    assert at_scale(1, 2, 3) == 3 and at_scale(1, 2) == 2 and at_scale(1) == 1
    monkeypatch.setenv("POLYLIB_SCALE", "laptop")
    assert at_scale(1, gpu=3) == 1
    monkeypatch.setenv("POLYLIB_SCALE", "huge")
    with pytest.raises(ValueError, match="huge"):
        scale()


def test_bad_sizes_raise():
    with pytest.raises(ValueError, match="train must be an integer from 1 to 1796, got 1797"):
        digits(train=1797)
    with pytest.raises(ValueError, match="classes must be an integer of at least 1, got 0"):
        shells(classes=0)
    with pytest.raises(ValueError, match="length must be an integer of at least 1, got 0"):
        text_windows(0)


def test_sizes_may_be_integers_of_numpy():
    assert len(digits(np.int64(4)).x_train) == 4 and len(digits(np.int64(4), np.int64(1)).x_test) == 1793
    with pytest.raises(ValueError, match="train must be an integer from 1 to 1796, got True"):
        digits(True)


def test_windows_of_text_are_shifted_by_one_and_the_test_part_was_not_seen():
    data = text_windows(16, train=500, test=20)
    assert data.x_train.dtype == data.y_test.dtype == torch.int64
    assert data.x_train.shape == (500, 16) and data.y_test.shape == (20, 16) and data.classes == 60
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert torch.equal(x[:, 1:], y[:, :-1])
    seen = {tuple(row.tolist()) for row in data.x_train.unfold(1, 12, 1).flatten(0, 1)}
    parts = [tuple(row[:12].tolist()) for row in data.x_test]
    assert sum(part in seen for part in parts) < 5  # phrases do recur
    assert not torch.equal(data.x_train, text_windows(16, train=500, test=20, seed=1).x_train)
