import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from polylib.optimization import (
    SpectralSGD,
    batch_top_eigenvalue,
    hessian_noise,
    lanczos,
    lr_momentum_from_spectrum,
    max_learning_rate,
)


def top_of_wigner_plus_spike(size, noise, spike=1.0):
    """The largest eigenvalue of a rank-one matrix plus a Wigner matrix whose element variance is noise / size."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = (a + a.T) / math.sqrt(2) * math.sqrt(noise / size)
    matrix[0, 0] = spike  # without noise of its own, the spike fluctuates less
    return torch.linalg.eigvalsh(matrix)[-1].item()


@pytest.mark.parametrize("noise", [0.04, 0.25, 0.81, 1.0, 4.0])
def test_the_hessian_formula_holds_for_a_spiked_wigner_matrix(noise):
    predicted = batch_top_eigenvalue(1.0, noise, 1)
    assert predicted == pytest.approx(top_of_wigner_plus_spike(500, noise), rel=0.05)


@pytest.mark.parametrize(("batch_size", "spike"), [(100, 30.0), (400, 5.0), (200, 1.5)])
def test_the_ggn_formula_holds_for_a_sample_covariance(batch_size, spike):
    size = 400
    x = torch.randn(batch_size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] *= math.sqrt(spike * batch_size) / x[:, 0].norm()  # the spike without its own fluctuation
    top = torch.linalg.matrix_norm(x, 2).square().item() / batch_size
    predicted = batch_top_eigenvalue(spike, float(size), batch_size, model="ggn", dim=size)
    assert predicted == pytest.approx(top, rel=0.05)


@pytest.mark.parametrize("model", ["hessian", "ggn"])
def test_limits_continuity_and_monotony(model):
    def top(lam1, batch_size, dataset_size=None):
        return batch_top_eigenvalue(lam1, 3.0, batch_size, dataset_size, model, dim=50)

    assert top(0.7, 1000, 1000) == pytest.approx(0.7)
    assert top(0.7, 10**12) == pytest.approx(0.7)
    edge = math.sqrt(3.0 / 8) if model == "hessian" else 3 / 50 * (1 + math.sqrt(50 / 8))
    assert top(edge * (1 - 1e-9), 8) == pytest.approx(top(edge * (1 + 1e-9), 8), rel=1e-6)
    values = [top(0.7, b, 1024) for b in (1, 2, 8, 64, 512, 1024)]
    assert values == sorted(values, reverse=True)


def test_noise_of_an_empirical_hessian_is_the_mean_square():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, 6, generator=generator, dtype=torch.float64)
    a = a + a.mT
    u = torch.randn(6, generator=generator, dtype=torch.float64)

    def loss(params, matrices):
        return 0.5 * torch.einsum("p,npq,q->n", params["w"], matrices, params["w"]).mean()

    expected = ((a - a.mean(0)) @ (u / u.norm())).square().sum(-1).mean()
    params = {"w": torch.ones(6, dtype=torch.float64)}
    for chunk_size in (None, 7):
        assert hessian_noise(loss, params, 3 * u, a, chunk_size=chunk_size) == pytest.approx(expected.item())


def test_the_edge_of_a_sweep_is_interpolated_in_logarithms():
    rates = [1.0, 2.0, 4.0, 8.0]
    losses = torch.tensor([0.1, 5.0, 0.5, 8.0])  # a bump below the edge does not count
    assert max_learning_rate(rates, losses, 2.0) == pytest.approx(4 * 2 ** (math.log(4) / math.log(16)))
    assert max_learning_rate(rates, torch.tensor([0.1, 0.1, 0.1, float("nan")]), 2.0) < 4.5
    assert max_learning_rate(rates, torch.zeros(4) + 0.1, 2.0) == 8.0
    assert math.isnan(max_learning_rate(rates, torch.full((4,), float("inf")), 2.0))


def test_polyaks_pair_is_the_fastest_for_a_quadratic():
    curvatures = torch.linspace(0.04, 1.0, 30, dtype=torch.float64)

    def after(rate, momentum, steps=120):
        w, v = torch.ones_like(curvatures), torch.zeros_like(curvatures)
        for _ in range(steps):
            v = momentum * v + curvatures * w
            w = w - rate * v
        return w.norm().item()

    weights = torch.full_like(curvatures, 1 / 30)
    best = lr_momentum_from_spectrum(curvatures, weights, "minimum")
    assert best == pytest.approx(((2 / 1.2) ** 2, (0.8 / 1.2) ** 2))
    rivals = [(best[0] * f, best[1] + d) for f, d in ((0.8, 0.0), (1.2, 0.0), (1.0, -0.1), (1.0, 0.1))]
    assert after(*best) < min(after(*rival) for rival in rivals)
    rate, none = lr_momentum_from_spectrum(curvatures, weights, "minimum", momentum=False)
    assert rate == pytest.approx(2 / 1.04) and none == 0


def test_the_two_rules():
    ritz, weights = torch.tensor([-2.0, 1e-6, 0.5, 4.0]), torch.tensor([0.1, 0.7, 0.1, 0.1])
    rate, _ = lr_momentum_from_spectrum(ritz, weights, "minimum", momentum=False)
    assert rate == pytest.approx(2 / (4 + 0.5))
    rate, _ = lr_momentum_from_spectrum(ritz, weights, "median", momentum=False)
    assert rate == pytest.approx(2 / (4 + 1.25))
    lone = lr_momentum_from_spectrum(torch.tensor([3.0]), torch.tensor([1.0]), "minimum")
    assert lone == pytest.approx((1 / 3, 0.0))


def model_and_data():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(60, 4), torch.randint(3, (60,))


def test_the_learner_sets_what_the_dense_spectrum_says():
    model, x, y = model_and_data()
    size = sum(p.numel() for p in model.parameters())
    optimizer = SpectralSGD(model.parameters(), num_steps=size, rule="minimum")
    rate, momentum = optimizer.refresh([lambda: F.cross_entropy(model(x), y)])
    assert optimizer.param_groups[0]["lr"] == rate and optimizer.param_groups[0]["momentum"] == momentum
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.hessian(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(params)
    dense = torch.cat([torch.cat([blocks[a][b].reshape(params[a].numel(), -1) for b in params], 1) for a in params], 0)
    large = torch.linalg.eigvalsh(dense).abs().max().item()
    root = 2 / math.sqrt(rate)  # sqrt(L) + sqrt(mu)
    assert root * (1 + math.sqrt(momentum)) / 2 == pytest.approx(math.sqrt(large), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_the_learner_trains():
    model, x, _ = model_and_data()
    y = x[:, :3].argmax(1)
    optimizer = SpectralSGD(model.parameters(), generator=torch.Generator().manual_seed(0))

    def loss():
        return F.cross_entropy(model(x), y)

    before = loss().item()
    for step in range(60):
        if step % 10 == 0:
            optimizer.refresh([loss])
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.3 * before


@pytest.mark.parametrize("scale", [0.0, 1e-12, float("nan"), float("inf")])
def test_a_curvature_that_says_nothing_leaves_the_settings_alone(scale):
    w = nn.Parameter(torch.ones(5))
    optimizer = SpectralSGD([w], lr=0.3, momentum=0.7)
    assert optimizer.refresh([lambda: scale * w.square().sum()]) == (0.3, 0.7)
    assert optimizer.refresh([lambda: w.sum()]) == (0.3, 0.7)


def test_bad_input_raises():
    with pytest.raises(ValueError, match="lam1 must be a finite number above 0, got 0"):
        batch_top_eigenvalue(0, 1, 4)
    with pytest.raises(ValueError, match="noise must be a finite number at least 0, got -1"):
        batch_top_eigenvalue(1, -1, 4)
    with pytest.raises(ValueError, match="batch_size must be from 1 to 10, the data's size, got 11"):
        batch_top_eigenvalue(1, 1, 11, 10)
    with pytest.raises(ValueError, match="model must be one of 'hessian', 'ggn', got 'wishart'"):
        batch_top_eigenvalue(1, 1, 4, model="wishart")
    with pytest.raises(ValueError, match="dim must be the number of parameters, at least 1, got None"):
        batch_top_eigenvalue(1, 1, 4, model="ggn")
    with pytest.raises(ValueError, match="direction must be finite and not zero, got one that is not"):
        hessian_noise(lambda p, x: (p["w"] * x).sum(), {"w": torch.ones(2)}, torch.zeros(2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="rates must ascend, one for each of the 3 losses, got 2 rates"):
        max_learning_rate([1.0, 2.0], torch.ones(3), 1)
    ritz = lanczos(lambda v: v, torch.ones(3), 1)
    with pytest.raises(ValueError, match="rule must be one of 'median', 'minimum', got 'mean'"):
        lr_momentum_from_spectrum(ritz.ritz, ritz.weights, "mean")
    with pytest.raises(ValueError, match="no rate follows from a flat loss"):
        lr_momentum_from_spectrum(torch.zeros(3), torch.ones(3) / 3)
    with pytest.raises(ValueError, match="ritz must be finite, with at least one value, got one that is not"):
        lr_momentum_from_spectrum(torch.tensor([]), torch.tensor([]))
    with pytest.raises(ValueError, match="num_steps must be an integer of at least 1, got 0"):
        SpectralSGD([nn.Parameter(torch.ones(2))], num_steps=0)
    with pytest.raises(ValueError, match="losses must have at least one function, got none"):
        SpectralSGD([nn.Parameter(torch.ones(2))]).refresh([])
