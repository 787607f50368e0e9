import pytest
import torch

from polylib.regimes import (
    LinearizedModel,
    PolynomialTwoLayer,
    lifted_moment,
    linearized_descent,
    moment_descent,
    moment_kernel,
    moment_output,
    quadratic_test_loss,
)

F64 = torch.float64
RATE, RECORD = 2.0, [0, 1, 10, 60]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(count=12, dim=5, width=9, seed=0):
    """The inputs, the targets and the weights of a start."""
    x, beta = draw(count, dim, seed=seed) / dim**0.5, draw(dim, seed=seed + 1)
    return x, (x @ beta).square() / 2, draw(width, dim, seed=seed + 2)


def by_autograd(model, parameter, x, y, alpha, width):
    """The weights after the steps of RECORD, by torch's own gradients."""
    kept = []
    for step in range(RECORD[-1] + 1):
        if step in RECORD:
            kept.append((parameter.detach().clone(), model(x).detach().clone()))
        loss = (model(x) - y).square().mean() / (2 * alpha**2)
        (gradient,) = torch.autograd.grad(loss, parameter)
        parameter.data -= RATE * width * gradient
    return kept


@pytest.mark.parametrize(("alpha", "epsilon", "width"), [(1.0, 0.5, 9), (3.0, 0.3, 2), (0.8, 0.6, 9)])
def test_the_moments_follow_the_weights(alpha, epsilon, width):
    x, y, weight = problem(width=width)
    model = PolynomialTwoLayer(5, width, alpha, epsilon).double()
    model.weight.data.copy_(weight)
    moments = moment_descent(lifted_moment(weight), x, y, alpha, epsilon, rate=RATE, record=RECORD)
    for moment, (weights, output) in zip(moments, by_autograd(model, model.weight, x, y, alpha, width), strict=True):
        torch.testing.assert_close(moment, lifted_moment(weights), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moment_output(moment, x, alpha, epsilon), output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [12, 40])
def test_the_closed_form_is_the_trained_twin(count):
    """With 40 samples there are more of them than the 5 + 15 features of polynomials: the kernel has no full rank."""
    alpha, epsilon = 1.5, 0.4
    x, y, weight = problem(count)
    model = PolynomialTwoLayer(5, 9, alpha, epsilon).double()
    model.weight.data.copy_(weight)
    twin = LinearizedModel(model)
    moments = linearized_descent(lifted_moment(weight), x, y, alpha, epsilon, rate=RATE, record=RECORD)
    new = draw(30, 5, seed=9)
    for moment, (v, output) in zip(moments, by_autograd(twin, twin.moving.weight, x, y, alpha, 9), strict=True):
        torch.testing.assert_close(moment_output(moment, x, alpha, epsilon), output, rtol=1e-8, atol=1e-8)
        slope = 1 + epsilon * new @ weight.T
        start = model.alpha * (new @ weight.T + epsilon / 2 * (new @ weight.T) ** 2).mean(-1)
        expected = start + alpha * (slope * (new @ (v - weight).T)).mean(-1)
        torch.testing.assert_close(moment_output(moment, new, alpha, epsilon), expected, rtol=1e-8, atol=1e-8)


def test_the_first_step_is_that_of_the_kernel():
    x, y, weight = problem()
    moment = lifted_moment(weight)
    residual = moment_output(moment, x, 1.0, 0.5) - y
    expected = -1e-4 / 12 * moment_kernel(moment, x, 0.5) @ residual
    for method in (moment_descent, linearized_descent):
        ends = method(moment, x, y, 1.0, 0.5, rate=1e-4, record=[0, 1])
        change = moment_output(ends[1], x, 1.0, 0.5) - moment_output(ends[0], x, 1.0, 0.5)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-9)


def test_the_loss_of_the_twin_is_that_of_many_samples():
    x, y, weight = problem(seed=20)
    beta = draw(5, seed=21)
    moment = linearized_descent(lifted_moment(weight), x, y, 1.0, 0.5, rate=RATE, record=[30])[0]
    new = draw(100_000, 5, seed=7) / 5**0.5
    squares = (moment_output(moment, new, 1.0, 0.5) - (new @ beta).square() / 2).square()
    assert abs(squares.mean() - quadratic_test_loss(moment, beta, 1.0, 0.5).total) < 4 * squares.std() / 100_000**0.5


def test_alpha_and_epsilon_are_a_clock_a_strength_and_a_size():
    """Weights scaled by sqrt(alpha epsilon) with alpha / epsilon and rate epsilon / alpha kept are the same network."""
    x, y, weight = problem()
    first = moment_descent(lifted_moment(weight), x, y, 2.0, 0.5, rate=RATE, record=RECORD)
    other = moment_descent(lifted_moment(weight / 2), x, y, 4.0, 1.0, rate=RATE, record=RECORD)
    torch.testing.assert_close(moment_output(first, x, 2.0, 0.5), moment_output(other, x, 4.0, 1.0))


def test_batches_broadcast_and_stop():
    problems = [problem(seed=seed) for seed in (0, 10, 20)]
    x, y = (torch.stack([p[k] for p in problems])[:, None] for k in (0, 1))
    moment = torch.stack([lifted_moment(p[2]) for p in problems])[:, None]
    alpha, epsilon = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([1.0, 0.3], dtype=F64)
    for method in (moment_descent, linearized_descent):
        together = method(moment, x, y, alpha, epsilon, rate=RATE, record=RECORD)
        assert together.shape == (4, 3, 2, 6, 6)
        alone = method(moment[1, 0], x[1, 0], y[1, 0], 2.0, 0.3, rate=RATE, record=RECORD)
        torch.testing.assert_close(together[:, 1, 1], alone)
    short = moment_descent(
        moment, x, y, alpha, epsilon, rate=RATE, record=RECORD, stop=lambda now: bool((now != moment).any())
    )
    assert len(short) == 2


@pytest.mark.parametrize("method", [moment_descent, linearized_descent])
def test_bad_input_is_refused(method):
    x, y, weight = problem()
    moment = lifted_moment(weight)
    with pytest.raises(ValueError, match=r"y must have shape \(\.\.\., 12\), a target for each sample, got \(11,\)"):
        method(moment, x, y[:11], 1.0, 0.5, rate=1.0, record=[1])
    with pytest.raises(ValueError, match=r"rate must be a finite number above 0, got 0"):
        method(moment, x, y, 1.0, 0.5, rate=0, record=[1])
    with pytest.raises(ValueError, match=r"epsilon must be above 0 and finite, got -0\.5"):
        method(moment, x, y, 1.0, -0.5, rate=1.0, record=[1])
    for record in ([], [-1, 2], [3, 3], [4, 2]):
        with pytest.raises(ValueError, match="record must be ascending numbers of steps"):
            method(moment, x, y, 1.0, 0.5, rate=1.0, record=record)
