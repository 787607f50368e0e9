"""The losses: zero at the truth, by hand, against closed forms, over many rows, and bad input."""

import math

import pytest
import torch

from polylib.sparsity import GaussianMoE, hellinger, voronoi_loss

TRUE = torch.tensor([3.0, -0.5, 0.3, -1.5, 1.5, 0.5, -0.5, math.log(0.1), math.log(0.1)], dtype=torch.float64)
X = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
Y = torch.linspace(-9, 9, 400, dtype=torch.float64)
EVEN = torch.full((9,), 1 / 9, dtype=torch.float64)


def mixture(theta, experts=2, **options):
    return GaussianMoE(1, experts, **options).double().load_vector(torch.as_tensor(theta, dtype=torch.float64))


def doubled(extra=0):
    """The truth with the first of its experts twice, each with half of its weight."""
    bias = -0.5 + 0.3 * math.log(0.5)
    b, nu = [0.5 + extra, 0.5 - extra, -0.5], [math.log(0.1)] * 3
    return mixture([3.0, 3.0, bias, bias, 0.3, -1.5, -1.5, 1.5, *b, *nu], 3)


def test_the_truth_has_no_loss():
    true = mixture(TRUE)
    assert voronoi_loss(true, true) == 0
    assert hellinger(true, true, X, Y, EVEN) == 0
    assert voronoi_loss(doubled(), true) < 1e-12
    assert hellinger(doubled(), true, X, Y, EVEN) < 1e-7


def test_one_expert_a_cell_counts_first_powers():
    true, theta = mixture(TRUE), TRUE.clone()
    theta[0] += 0.1
    theta[3] -= 0.05
    weight = math.exp(-0.5 / 0.3)
    assert voronoi_loss(mixture(theta), true).item() == pytest.approx(weight * 0.15)
    theta = TRUE.clone()
    theta[6] += 0.02  # of the reference, whose weight is 1
    assert voronoi_loss(mixture(theta), true).item() == pytest.approx(0.02)


def test_two_experts_in_a_cell_count_higher_powers():
    loss = voronoi_loss(doubled(0.1), mixture(TRUE))
    assert loss.item() == pytest.approx(math.exp(-0.5 / 0.3) * 0.1**4)


def test_many_rows_at_once():
    true, big = mixture(TRUE), doubled()
    rows = big.vector().detach() + 0.02 * torch.randn(2, 3, big.size, dtype=torch.float64)
    losses, distances = voronoi_loss(big, true, rows), hellinger(big, true, X, Y, EVEN, rows)
    assert losses.shape == distances.shape == (2, 3)
    one = mixture(rows[1, 2], 3)
    torch.testing.assert_close(voronoi_loss(one, true), losses[1, 2])
    torch.testing.assert_close(hellinger(one, true, X, Y, EVEN), distances[1, 2])


def test_the_hellinger_distance_of_two_gaussians():
    """Equal experts make a mixture one Gaussian, whose distance has a closed form."""
    one = mixture([1.0, 0.2, 1.0, 0.0, 0.0, 0.3, 0.3, math.log(0.5), math.log(0.5)])
    other = mixture([1.0, 0.2, 1.0, 0.0, 0.0, -0.4, -0.4, math.log(1.5), math.log(1.5)])
    overlap = math.sqrt(2 * math.sqrt(0.5 * 1.5) / 2) * math.exp(-(0.7**2) / (4 * 2))
    assert hellinger(one, other, X, Y, EVEN).item() == pytest.approx(math.sqrt(1 - overlap), abs=1e-6)


def test_losses_of_scaled_gates():
    """A gate that is scaled has the same density, and another place."""
    true, theta = mixture(TRUE), TRUE.clone()
    theta[:3] *= 1.5
    scaled = mixture(theta)
    assert hellinger(scaled, true, X, Y, EVEN) < 1e-7
    assert voronoi_loss(scaled, true).item() == pytest.approx(math.exp(-0.5 / 0.3) * (1.5 + 0.15) + 0.15)


def test_bad_input():
    true, big = mixture(TRUE), doubled()
    with pytest.raises(ValueError, match="fitted must have at least 3 experts"):
        voronoi_loss(true, big)
    with pytest.raises(ValueError, match="inputs of length 1"):
        voronoi_loss(GaussianMoE(2, 3), true)
    with pytest.raises(ValueError, match="at most 3 experts, got 4"):
        theta = torch.cat([torch.full((4,), 3.0), torch.zeros(4), torch.tensor([1.0]), torch.full((4,), -1.5)])
        theta = torch.cat([theta, torch.tensor([1.5]), torch.full((4,), 0.5), torch.tensor([-0.5]), torch.zeros(5)])
        voronoi_loss(mixture(theta, 5), true)
    with pytest.raises(ValueError, match="temperature in theta"):
        voronoi_loss(true, true, -TRUE)
    with pytest.raises(ValueError, match="equal steps"):
        hellinger(true, true, X, Y.square(), EVEN)
    with pytest.raises(ValueError, match="weights must have shape"):
        hellinger(true, true, X, Y, EVEN[:3])
