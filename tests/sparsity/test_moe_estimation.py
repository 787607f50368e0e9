"""Scores against autograd, the Fisher information's null vector, and the solver against torch's L-BFGS."""

import pytest
import torch

from polylib.sparsity import GaussianMoE, fisher_information, fit_mle
from polylib.sparsity.moe_scores import log_density, scores

GATES = ["linear", "relu", "sigmoid", "tanh", "gelu"]
TRUE = torch.tensor([3.0, -0.5, 0.3, -1.5, 1.5, 0.5, -0.5, -2.3, -2.3], dtype=torch.float64)


def model(activation="linear", in_dim=2, experts=3, seed=0, **options):
    torch.manual_seed(seed)
    made = GaussianMoE(in_dim, experts, activation=activation, **options).double()
    return made.load_vector(made.vector().detach() + 0.5 * torch.rand(made.size, dtype=torch.float64))


def problem(activation, n, repetitions=1, seed=0):
    """The mixture of the chapter, samples, and starts beside the truth."""
    moe = GaussianMoE(1, 2, activation=activation).double().load_vector(TRUE)
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(repetitions, n, 1, generator=generator, dtype=torch.float64) - 1
    spread = torch.tensor([0.6, 0.1, 0.06, *[0.1] * 6], dtype=torch.float64)
    start = TRUE + spread * torch.randn(repetitions, 9, generator=generator, dtype=torch.float64)
    start[:, 2].clamp_(min=0.1)
    return moe, x, moe.sample(x, generator), start


@pytest.mark.parametrize("bias_inside", [True, False])
@pytest.mark.parametrize("activation", GATES)
def test_scores_are_those_of_autograd(activation, bias_inside):
    moe = model(activation, bias_inside=bias_inside)
    x, y = torch.randn(2, 7, 2, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    theta = moe.vector().detach().repeat(2, 1)
    theta[1] *= 1.1

    def one(row, x, y):
        return log_density(moe, row[None], x[None, None], y[None, None])[0, 0]

    every = torch.func.vmap(torch.func.grad(one), (None, 0, 0))
    density, gradients = scores(moe, theta, x, y)
    torch.testing.assert_close(density[0], moe.log_prob(x[0], y[0]))
    for r in range(2):
        torch.testing.assert_close(gradients[r], every(theta[r], x[r], y[r]).T)


@pytest.mark.parametrize("activation", GATES)
def test_the_fisher_information(activation):
    moe, x, y, _ = problem(activation, 5000)
    matrix = fisher_information(moe, x[0], y[0])
    torch.testing.assert_close(matrix, matrix.T)
    values, vectors = torch.linalg.eigh(matrix)
    if activation in ("linear", "relu"):
        null = torch.zeros_like(TRUE)
        null[:3] = TRUE[:3] / TRUE[:3].norm()
        assert abs(values[0]) < 1e-12
        torch.testing.assert_close(abs(vectors[:, 0] @ null).item(), 1.0)
    else:
        assert values[0] > 1e-5
    assert values[1] > 0.01


def test_the_null_vector_with_the_bias_outside():
    moe = model("linear", bias_inside=False, in_dim=3)
    x = torch.randn(2000, 3, dtype=torch.float64)
    null = moe.vector().detach()
    null[moe.gate_weight.numel() : moe.gate_weight.numel() + moe.gate_bias.numel()] = 0
    null[moe.gate_weight.numel() + moe.gate_bias.numel() + 1 :] = 0
    matrix = fisher_information(moe, x, moe.sample(x))
    assert (matrix @ null).norm() < 1e-12 * matrix.norm() * null.norm() < 1


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_the_same_optimum_as_lbfgs(activation):
    moe, x, y, start = problem(activation, 1000, 2)
    found = fit_mle(moe, x, y, start)
    assert found.converged.all() and (found.gradient <= 1e-7).all()
    for r in range(2):
        theta = start[r].clone().requires_grad_()
        options = {"max_iter": 200, "history_size": 20, "line_search_fn": "strong_wolfe"}
        solver = torch.optim.LBFGS([theta], **options, tolerance_grad=1e-8, tolerance_change=1e-14)

        def loss(theta=theta, r=r, solver=solver):
            solver.zero_grad()
            value = -log_density(moe, theta[None], x[r : r + 1], y[r : r + 1]).mean()
            value.backward()
            return value

        solver.step(loss)
        torch.testing.assert_close(found.log_likelihood[r], -loss().detach(), rtol=0, atol=1e-11)
        theta, other = theta.detach(), found.theta[r]
        torch.testing.assert_close(other[3:], theta[3:], rtol=0, atol=1e-4)
        torch.testing.assert_close(other[:2] / other[2], theta[:2] / theta[2], rtol=1e-4, atol=1e-4)
        if activation == "tanh":
            torch.testing.assert_close(other, theta, rtol=1e-3, atol=1e-3)


def test_the_fit_keeps_the_scale_of_its_start():
    moe, x, y, start = problem("linear", 2000)
    starts = torch.cat([start, start])
    starts[1, :3] *= 3
    found = fit_mle(moe, x[0], y[0], starts)
    assert found.converged.all()
    torch.testing.assert_close(found.log_likelihood[0], found.log_likelihood[1])
    torch.testing.assert_close(found.theta[:, :3].norm(dim=1), starts[:, :3].norm(dim=1), rtol=0.05, atol=0)
    theta = fit_mle(problem("tanh", 2000)[0], x[0], y[0], starts).theta
    torch.testing.assert_close(theta[0], theta[1], rtol=1e-3, atol=1e-3)


def test_fits_do_not_see_each_other():
    moe, x, y, start = problem("sigmoid", 500, 3)
    together = fit_mle(moe, x, y, start)
    for r in range(3):
        alone = fit_mle(moe, x[r], y[r], start[r : r + 1])
        torch.testing.assert_close(alone.theta[0], together.theta[r], rtol=1e-4, atol=1e-4)


def test_pieces_of_samples_add_up(monkeypatch):
    moe, x, y, start = problem("tanh", 300, 3)
    whole, matrix = fit_mle(moe, x, y, start), fisher_information(moe, x[0], y[0])
    monkeypatch.setattr("polylib.sparsity.moe_estimation._SAMPLES", 70)
    torch.testing.assert_close(fit_mle(moe, x, y, start).theta, whole.theta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fisher_information(moe, x[0], y[0]), matrix)


def test_frozen_parameters_stay_and_the_model_too():
    moe, x, y, start = problem("linear", 500, 2)
    before = moe.vector().detach()
    moe.log_temperature.requires_grad_(False)
    found = fit_mle(moe, x, y, start)
    torch.testing.assert_close(found.theta[:, 2], start[:, 2], rtol=0, atol=0)
    assert found.converged.all() and (found.theta != start).sum() == 16
    torch.testing.assert_close(moe.vector().detach(), before, rtol=0, atol=0)
    assert fit_mle(moe, x, y).theta.shape == (2, 9)
    assert (fit_mle(moe, x, y, start, max_iter=0).theta == start).all()


def test_bad_input():
    moe, x, y, start = problem("linear", 50, 2)
    with pytest.raises(ValueError, match="temperature in start must be positive"):
        fit_mle(moe, x, y, -start)
    with pytest.raises(ValueError, match="start must have shape"):
        fit_mle(moe, x, y, start[0])
    with pytest.raises(ValueError, match="x must have shape"):
        fit_mle(moe, x[:1], y[:1], start)
    with pytest.raises(ValueError, match="y must have shape"):
        fit_mle(moe, x, y[:, :4], start)
    with pytest.raises(ValueError, match="finite, got a number"):
        fisher_information(moe, x[0] / 0, y[0])
    with pytest.raises(ValueError, match="not empty"):
        fisher_information(moe, x[0, :0], y[0, :0])
    with pytest.raises(TypeError, match="floating"):
        fisher_information(moe, x[0].long(), y[0])
    with pytest.raises(ValueError, match="tol must be"):
        fit_mle(moe, x, y, start, tol=0.0)
    far = start.clone()
    far[:, -2:] = -2000
    with pytest.raises(ValueError, match="start must have a finite likelihood"):
        fit_mle(moe, x, y, far)
    for parameter in moe.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        fit_mle(moe, x, y, start)
