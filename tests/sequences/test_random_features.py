"""Random features: their means and variances, projections, and bad input."""

import math

import pytest
import scipy.stats
import torch

from polylib.sequences import orthogonal_projections, positive_random_features


@pytest.mark.parametrize("orthogonal", [True, False])
def test_products_have_the_exponential_as_their_mean(orthogonal):
    torch.manual_seed(0)
    x, y = 0.8 * torch.nn.functional.normalize(torch.randn(2, 1, 8), dim=-1)
    W = orthogonal_projections(200_000, 8, orthogonal)
    products = positive_random_features(x, W, False) * positive_random_features(y, W, False) * len(W)
    exact = math.exp((x * y).sum())
    assert abs(products.mean() / exact - 1) < 0.02
    relative = products.var() / exact**2
    assert relative == pytest.approx(math.exp((x + y).square().sum()) - 1, rel=0.1)


def test_normalised_features():
    torch.manual_seed(0)
    x, W = torch.randn(3, 5, 8).double(), orthogonal_projections(6, 8).double()
    found = positive_random_features(x, W)
    assert found.shape == (3, 5, 6)
    unit = x / x.norm(dim=-1, keepdim=True)
    for r in range(6):
        torch.testing.assert_close(found[..., r], torch.exp(unit @ W[r] - 0.5) / 6**0.5)
    torch.testing.assert_close(positive_random_features(50 * x, W), found)
    torch.testing.assert_close(positive_random_features(unit, W, normalize=False), found)
    assert positive_random_features(0 * x, W).isfinite().all()


def test_projections():
    torch.manual_seed(0)
    W = orthogonal_projections(20, 8)
    assert W.shape == (20, 8)
    for block in W.split(8):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-4
    free = orthogonal_projections(20, 8, orthogonal=False)
    assert (free[:8] @ free[:8].T).triu(1).abs().max() > 0.1


def test_orthogonal_rows_are_standard_normal_each():
    torch.manual_seed(0)
    W = orthogonal_projections(8000, 8)
    for entries in (W[:, 0], W[::8].flatten(), W[3::8, -1]):
        assert scipy.stats.kstest(entries.numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(W.norm(dim=1).numpy(), scipy.stats.chi(8).cdf).pvalue > 1e-3


def test_orthogonal_rows_estimate_better():
    torch.manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(2, 64, 16), dim=-1)
    exact, errors = (x @ y.T).exp(), []
    for orthogonal in (True, False):
        own = []
        for _ in range(40):
            W = orthogonal_projections(16, 16, orthogonal)
            own.append((positive_random_features(x, W) @ positive_random_features(y, W).T - exact).square().mean())
        errors.append(torch.stack(own).mean())
    assert errors[0] < 0.95 * errors[1]


def test_gradients():
    torch.manual_seed(0)
    x, W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), orthogonal_projections(5, 3).double()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(positive_random_features, (x, W, normalize))


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., n, 3\), as proj has it, got \(2, 4\)"):
        positive_random_features(torch.zeros(2, 4), torch.zeros(5, 3))
    for shape in ((0, 3), (3,)):
        with pytest.raises(ValueError, match="proj must have shape"):
            positive_random_features(torch.zeros(2, 3), torch.zeros(shape))
    with pytest.raises(TypeError, match="dtype of x must be"):
        positive_random_features(torch.zeros(2, 3).long(), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="num_features must be an integer of at least 1"):
        orthogonal_projections(0, 4)
    with pytest.raises(ValueError, match="dim must be an integer of at least 1"):
        orthogonal_projections(4, 1.5)
