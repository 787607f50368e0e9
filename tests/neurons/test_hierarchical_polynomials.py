import math
import pickle

import pytest
import torch

from polylib.neurons import (
    HierarchicalPolynomial,
    ThreeLayerResidualNet,
    fit_layerwise,
    gaussian_mean_derivative,
    hermite_link,
    largest_eigenvalue,
    least_squares,
    pair_product_feature,
)
from polylib.neurons.hierarchical_polynomials import poly2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(seed=0, d=4, n=200, **options):
    """A small network in float64 and two samples of the standard target."""
    draw = generator(seed)
    net = ThreeLayerResidualNet(d, m1=12, m2=30, generator=draw, **options)
    target = HierarchicalPolynomial()
    (x1, y1, _), (x2, y2, _) = target.sample(n, d, draw), target.sample(n, d, draw)
    return net, (x1, y1, x2, y2)


def test_the_pair_feature_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 5.0, -1.0, 2.0]])
    torch.testing.assert_close(pair_product_feature(x), math.sqrt(0.5) * torch.tensor([14.0, -2.0]))


def test_the_links_are_orthonormal_and_the_first_ones_known(double):
    z = torch.linspace(-2, 2, 9)
    first = [z, (z**2 - 1) / math.sqrt(2), (z**3 - 3 * z) / math.sqrt(6), (z**4 - 6 * z**2 + 3) / math.sqrt(24)]
    units = [hermite_link([float(j == k) for j in range(4)]) for k in range(4)]
    for unit, expected in zip(units, first, strict=True):
        torch.testing.assert_close(unit(z), expected)
    torch.testing.assert_close(hermite_link([0.5, -2.0])(z), 0.5 * first[0] - 2 * first[1])
    assert torch.equal(pickle.loads(pickle.dumps(units[3]))(z), units[3](z))


def test_the_target_has_mean_zero_and_variance_one():
    x, y, z = HierarchicalPolynomial().sample(200000, 32, generator())
    assert x.shape == (200000, 32) and y.shape == z.shape == (200000,)
    for values, tolerance in ((z, 0.03), (y, 0.1)):  # y has heavier tails, and p is not exactly normal
        assert abs(values.mean()) < 0.01 and abs(values.var() - 1) < tolerance


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (hermite_link([0.3, 0.7]), 0.3),
        (hermite_link([0.0, 1.0]), 0.0),
        (torch.sin, math.exp(-0.5)),
        (lambda z: z**3, 3.0),
        (torch.relu, 0.5),
    ],
)
def test_the_mean_derivative(link, expected):
    assert gaussian_mean_derivative(link) == pytest.approx(expected, abs=0.01 if link is torch.relu else 1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_part_of_the_target_along_the_feature_is_the_mean_derivative(alpha):
    d, link = 16, hermite_link([alpha, math.sqrt(1 - alpha**2)])
    _, y, z = HierarchicalPolynomial(g=link).sample(200000, d, generator())
    assert abs((y * z).mean() - gaussian_mean_derivative(link)) < d**-0.5 / 4


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_descent_with_enough_steps_is_ridge_regression(seed, double):
    net, data = small(seed)
    fit_layerwise(net, *data, 0.01, 0.01)
    closed = net.u.clone(), net.c.clone()
    fit_layerwise(net, *data, 0.01, 0.01, method="gd", steps=4000)
    for weights, expected in zip((net.u, net.c), closed, strict=True):
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_each_stage_is_its_normal_equation(double):
    net, (x1, y1, x2, y2) = small()
    fit_layerwise(net, x1, y1, x2, y2, 0.1, 0.01)
    phi = net.bottleneck(x2).detach()
    stages = ((net.features(x1), y1, net.u, 0.1), (net.link_features(phi), y2 - phi, net.c, 0.01))
    for features, targets, weights, fraction in stages:
        features = features.detach()
        decay = fraction * largest_eigenvalue(features.T @ features / len(targets), steps=50)
        gradient = features.T @ (features @ weights - targets) / len(targets) + decay * weights
        assert gradient.abs().max() < 1e-10
    assert net.features(x1).mean(0).abs().max() < 1e-12
    torch.testing.assert_close(net.tau, phi.std())
    torch.testing.assert_close(net(x2), phi + net.link_features(phi) @ net.c)


def test_least_squares_for_several_ridges_targets_and_chunks(double):
    net, (x, y, *_) = small()
    targets = torch.stack([y, -2 * y], 1)
    whole = least_squares(net.features, x, targets, [1e-3, 1e-1])
    assert whole.shape == (2, 30, 2)
    torch.testing.assert_close(least_squares(net.features, x, targets, [1e-3, 1e-1], chunk=7), whole)
    torch.testing.assert_close(whole[:, :, 1], -2 * whole[:, :, 0])
    torch.testing.assert_close(least_squares(net.features, x, y, [1e-1])[0], whole[1, :, 0])


def test_the_largest_eigenvalue(double):
    a = torch.randn(20, 6, generator=generator())
    assert largest_eigenvalue(a.T @ a, steps=500) == pytest.approx(torch.linalg.eigvalsh(a.T @ a)[-1].item())
    assert largest_eigenvalue(torch.zeros(3, 3)) == 0.0


def test_the_features_of_poly2_span_the_quadratics_and_no_more(double):
    d = 4
    net = ThreeLayerResidualNet(d, m2=40, generator=generator())
    x = torch.randn(300, d, generator=generator(1))
    fit_layerwise(net, x, x[:, 0], x, x[:, 0], 0.1, 0.1)
    singular = torch.linalg.svdvals(net.features(x))
    assert int((singular > 1e-9 * singular[0]).sum()) == d * (d + 1) // 2 + d
    relu = torch.linalg.svdvals(torch.relu(x @ net.v.T + net.s))
    assert int((relu > 1e-9 * relu[0]).sum()) == 40


def test_initial_values():
    net = ThreeLayerResidualNet(8, m1=4000, m2=4000, generator=generator())
    torch.testing.assert_close(net.v.norm(dim=1), torch.ones(4000))
    assert abs(net.s.var() - 0.5) < 0.05 and set(net.a.tolist()) == {-1.0, 1.0}
    assert -3 <= net.b.min() < -2.9 and 2.9 < net.b.max() <= 3
    assert not net(torch.randn(5, 8)).any()
    assert {name for name, _ in net.named_parameters()} == {"u", "c"}


@pytest.mark.parametrize("d", [16, 32])
def test_with_plenty_of_data_the_correlation_reaches_its_bound_and_not_more(d):
    draw = generator(d)
    net = ThreeLayerResidualNet(d, m2=200 if d == 16 else 600, generator=draw)
    x, y, _ = HierarchicalPolynomial().sample(50 * d * d, d, draw)
    fit_layerwise(net, x, y, x[:1000], y[:1000], 1e-5, 1e-3)
    x, _, z = HierarchicalPolynomial().sample(20000, d, draw)
    correlation = torch.corrcoef(torch.stack([net.bottleneck(x).detach(), z]))[0, 1].item()
    bound = (1 + 4 / d) ** -0.5
    assert bound - 0.03 < correlation < bound + 0.01


def test_it_beats_every_quadratic_where_the_mean_derivative_is_not_zero_and_fails_where_it_is():
    error = {}
    for alpha in (math.sqrt(0.5), 0.0):
        target, draw = HierarchicalPolynomial(g=hermite_link([alpha, math.sqrt(1 - alpha**2)])), generator(3)
        net = ThreeLayerResidualNet(16, m2=300, generator=draw)
        x, y, _ = target.sample(8000, 16, draw)
        fit_layerwise(net, x[:4000], y[:4000], x[4000:], y[4000:], 1e-3, 1e-5)
        x, y, _ = target.sample(4000, 16, draw)
        error[alpha] = ((net(x) - y).square().mean() / y.var()).item()
    assert error[math.sqrt(0.5)] < 0.35 and error[0.0] > 0.7


def test_a_callable_activation_and_state_dict(double):
    net, data = small(sigma2=torch.relu)
    fit_layerwise(net, *data, 0.1, 0.1)
    other, _ = small(seed=1, sigma2=torch.relu)
    other.load_state_dict(net.state_dict())
    x = torch.randn(5, 4, generator=generator())
    assert torch.equal(other(x), net(x))
    assert poly2(torch.tensor(2.0)).item() == pytest.approx(3 / math.sqrt(2) + 2)


def test_an_unstable_rate_warns(double):
    net, data = small()
    with pytest.warns(UserWarning, match="gradient descent is stable below"):
        fit_layerwise(net, *data, 0.01, 0.01, method="gd", lr=1e3, steps=2)


X = torch.zeros(4, 4)
Y = torch.zeros(4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pair_product_feature(torch.zeros(2, 3)), "x must have an even number of features, got 3"),
        (lambda: hermite_link([]), "coefficients must have at least one entry, got none"),
        (lambda: HierarchicalPolynomial().sample(0, 4), "n must be an integer of at least 1, got 0"),
        (lambda: ThreeLayerResidualNet(0), "d must be an integer of at least 1, got 0"),
        (lambda: ThreeLayerResidualNet(4, m2=0), "m2 must be an integer of at least 1, got 0"),
        (lambda: ThreeLayerResidualNet(4, sigma2="relu"), "sigma2 must be 'poly2' or a function, got 'relu'"),
        (lambda: ThreeLayerResidualNet(4).features(torch.zeros(2, 5)), r"x must have shape \(n, 4\), got \(2, 5\)"),
        (
            lambda: fit_layerwise(ThreeLayerResidualNet(4), X, Y, X, Y, -1.0, 0.1),
            r"xi1 must be a finite number at least 0, got -1\.0",
        ),
        (
            lambda: fit_layerwise(ThreeLayerResidualNet(4), X, Y, X, Y, 0.1, -1.0),
            r"xi2 must be a finite number at least 0, got -1\.0",
        ),
        (
            lambda: fit_layerwise(ThreeLayerResidualNet(4), X, Y, X, Y, 0.1, 0.1, method="adam"),
            "method must be one of 'ridge', 'gd', got 'adam'",
        ),
        (
            lambda: fit_layerwise(ThreeLayerResidualNet(4), X, Y, X[:1], Y[:1], 0.1, 0.1),
            "x2 must have at least 2 samples, got 1",
        ),
    ],
)
def test_bad_input_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()
