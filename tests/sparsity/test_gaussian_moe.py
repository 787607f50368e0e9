"""The mixture: its density by another library, its gate's limits, the identities of the paper, rows, and bad input."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from polylib.sparsity import GaussianMoE, dense_to_sparse_gate

GATES = ["linear", "relu", "sigmoid", "tanh", "gelu"]


def model(activation="linear", in_dim=2, experts=3, seed=0, **options):
    torch.manual_seed(seed)
    made = GaussianMoE(in_dim, experts, activation=activation, **options).double()
    return made.load_vector(made.vector().detach() + 0.5 * torch.rand(made.size, dtype=torch.float64))


def inputs(n, d=2, seed=1):
    return 2 * torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


@pytest.mark.parametrize("bias_inside", [True, False])
@pytest.mark.parametrize("activation", GATES)
def test_the_density_is_that_of_torch_distributions(activation, bias_inside):
    moe, x = model(activation, bias_inside=bias_inside), inputs(20)
    y = inputs(20, 1, seed=2)[:, 0]
    parts = moe.split(moe.vector())
    scores = {"linear": lambda z: z, "gelu": torch.nn.functional.gelu}.get(activation, getattr(torch, activation, None))
    above = scores(x @ parts.beta1.T)
    logits = (above + parts.beta0) / parts.tau if bias_inside else above / parts.tau + parts.beta0
    logits = torch.cat([logits, torch.zeros(20, 1).double()], 1)
    experts = Normal(x @ parts.a.T + parts.b, parts.log_nu.exp().sqrt())
    mixture = MixtureSameFamily(Categorical(logits=logits), experts)
    torch.testing.assert_close(moe.log_prob(x, y), mixture.log_prob(y))
    torch.testing.assert_close(moe(x), mixture.mean)


def test_the_density_integrates_to_one():
    y = torch.linspace(-30, 30, 3001, dtype=torch.float64)
    x = inputs(4)
    density = model("tanh").log_prob(x[:, None].expand(-1, len(y), -1), y.expand(4, -1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, y), torch.ones(4, dtype=torch.float64))


def test_the_gate_gets_hard_and_even():
    scores, bias = inputs(10, 4), torch.zeros(4, dtype=torch.float64)
    hard = dense_to_sparse_gate(scores, bias, 1e-6).exp()
    torch.testing.assert_close(hard, torch.nn.functional.one_hot(scores.argmax(1), 4).double())
    even = dense_to_sparse_gate(scores, bias, 1e9).exp()
    torch.testing.assert_close(even, torch.full_like(even, 0.25))
    assert dense_to_sparse_gate(scores, bias, 1e-300, "tanh").max() <= 0  # logarithms: no zero is taken the log of


def test_the_bias_outside_is_not_divided():
    scores, bias = inputs(10, 3), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    inside = dense_to_sparse_gate(scores, bias, 0.2, "sigmoid")
    outside = dense_to_sparse_gate(scores, bias / 0.2, torch.tensor(0.2), "sigmoid", bias_inside=False)
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("activation", GATES)
def test_scaling_the_gate(activation):
    moe, x, y = model(activation), inputs(50), inputs(50, 1, seed=2)[:, 0]
    before = moe.log_prob(x, y)
    parts = moe.split(moe.vector().detach())
    for c in (0.1, 7.0):
        gate = [c * parts.beta1.flatten(), c * parts.beta0, c * parts.tau]
        moe.load_vector(torch.cat([*gate, parts.a.flatten(), parts.b, parts.log_nu]))
        change = (moe.log_prob(x, y) - before).abs().max()
        assert change < 1e-12 if activation in ("linear", "relu") else change > 1e-3


def test_a_homogeneous_function_of_degree_two():
    moe, x, y = model(torch.square), inputs(50), inputs(50, 1, seed=2)[:, 0]
    before = moe.log_prob(x, y)
    parts = moe.split(moe.vector().detach())
    gate = [2 * parts.beta1.flatten(), 4 * parts.beta0, 4 * parts.tau]
    moe.load_vector(torch.cat([*gate, parts.a.flatten(), parts.b, parts.log_nu]))
    torch.testing.assert_close(moe.log_prob(x, y), before)


def test_the_equation_between_temperature_and_slope():
    """u = exp(beta1 x / tau) N(y | a x + b, nu) has du/dtau = -beta1 du/dbeta1 / tau, and d2u/db2 = 2 du/dnu."""

    def u(beta1, tau, b, nu):
        return (beta1 @ x / tau).exp() * (-0.5 * (y - a @ x - b) ** 2 / nu).exp() / (2 * math.pi * nu).sqrt()

    x, a, beta1 = inputs(3)
    y, tau, b, nu = (torch.tensor(v, dtype=torch.float64) for v in (0.4, 0.7, 0.2, 0.5))
    by_beta1, by_tau, by_nu = torch.func.grad(u, (0, 1, 3))(beta1, tau, b, nu)
    assert abs(by_tau) > 1e-3
    torch.testing.assert_close(by_tau, -beta1 @ by_beta1 / tau, rtol=1e-12, atol=1e-14)
    twice = torch.func.grad(lambda b: torch.func.grad(u, 2)(beta1, tau, b, nu))(b)
    torch.testing.assert_close(twice, 2 * by_nu, rtol=1e-12, atol=1e-14)


def test_samples_have_the_mixture_s_moments():
    moe, x = model("tanh", experts=4), inputs(1)
    y = moe.sample(x.expand(200_000, -1), torch.Generator().manual_seed(0))
    weights = dense_to_sparse_gate(moe.gate_logits(x)[0], torch.zeros(4).double(), 1.0).exp()
    means = x[0] @ moe.weight.T + moe.bias
    square = (weights * (means.square() + moe.log_variance.exp())).sum()
    assert abs(y.mean() - moe(x)[0]) < 0.02
    assert abs(y.square().mean() / square - 1) < 0.02
    assert moe.sample(inputs(6).view(2, 3, 2)).shape == (2, 3)


def test_a_row_there_and_back():
    moe, other = model(), model(seed=3)
    torch.testing.assert_close(other.load_vector(moe.vector()).vector(), moe.vector())
    assert moe.vector().shape == (moe.size,)
    assert moe.vector()[6] == moe.log_temperature.exp()


def test_bad_input():
    scores, bias = inputs(5, 3), torch.zeros(3)
    for tau in (0.0, -1.0, torch.tensor(-0.5)):
        with pytest.raises(ValueError, match="tau must be a finite number above 0"):
            dense_to_sparse_gate(scores, bias, tau)
    with pytest.raises(ValueError, match="activation must be one of"):
        dense_to_sparse_gate(scores, bias, 1.0, "softsign")
    with pytest.raises(TypeError, match="activation must be a function"):
        GaussianMoE(2, 3, activation=3)
    with pytest.raises(ValueError, match="bias must have shape"):
        dense_to_sparse_gate(scores, bias[:2], 1.0)
    with pytest.raises(TypeError, match="floating"):
        dense_to_sparse_gate(torch.ones(2, 3, dtype=torch.long), bias, 1.0)
    with pytest.raises(ValueError, match="experts must be an integer of at least 2"):
        GaussianMoE(2, 1)
    moe = model()
    cold = moe.vector().detach()
    cold[6] = -0.1
    with pytest.raises(ValueError, match=r"temperature in theta must be positive, got -0\.1"):
        moe.load_vector(cold)
    with pytest.raises(ValueError, match="theta must be finite"):
        moe.load_vector(cold * math.nan)
    with pytest.raises(ValueError, match="theta must have shape"):
        moe.load_vector(cold[1:])
    with pytest.raises(ValueError, match="x must have shape"):
        moe(inputs(5, 3))
    with pytest.raises(ValueError, match="y must have shape"):
        moe.log_prob(inputs(5), inputs(5))
