"""The calibration error: against a loop over bins, by hand, stacks, borders, and bad input."""

import pytest
import torch

from polylib.sparsity import expected_calibration_error


def by_bins(probabilities, labels, bins):
    confidence, choice = probabilities.max(1)
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = (choice[inside] == labels[inside]).double().mean() - confidence[inside].mean()
            total += inside.double().mean() * gap.abs()
    return total


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_bin_by_bin(bins):
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(3, 200, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    labels = torch.randint(4, (200,), generator=generator)
    wanted = torch.stack([by_bins(each, labels, bins) for each in p])
    torch.testing.assert_close(expected_calibration_error(p, labels, bins), wanted)


def test_by_hand():
    # Two answers with confidence 0.9, one of them right; one with 0.6, right.
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    error = expected_calibration_error(p, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(error, torch.tensor((2 * 0.4 + 0.4) / 3))


def test_a_border_belongs_to_the_lower_bin():
    # With confidences 0.5 and 0.75 in different bins of 4 the gaps add up, in one they would cancel out.
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    torch.testing.assert_close(expected_calibration_error(p, torch.tensor([0, 1]), 4), torch.tensor(0.625))
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0


def test_a_sure_and_right_network_has_none_a_sure_and_wrong_one_has_all():
    p = torch.eye(5)
    assert expected_calibration_error(p, torch.arange(5)) == 0
    assert expected_calibration_error(p, torch.arange(5).roll(1)) == 1


def test_bad_input():
    p, labels = torch.full((3, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        expected_calibration_error(p, labels[:2])
    with pytest.raises(ValueError, match="probabilities must have shape"):
        expected_calibration_error(p[0], labels)
    with pytest.raises(ValueError, match="probabilities must have shape"):
        expected_calibration_error(p[:0], labels[:0])
    with pytest.raises(ValueError, match="probabilities must be from 0 to 1"):
        expected_calibration_error(4 * p, labels)
    with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
        expected_calibration_error(p, labels, 0)
    with pytest.raises(TypeError, match="floating"):
        expected_calibration_error(labels[:, None], labels)
    with pytest.raises(TypeError, match="labels must be integers"):
        expected_calibration_error(p, p[:, 0])
