import itertools

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from polylib.regimes import (
    PolynomialTwoLayer,
    empirical_ntk,
    lifted_moment,
    moment_kernel,
    moment_output,
    quadratic_test_loss,
)

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(dim=5, width=7, alpha=1.5, epsilon=0.4, seed=0):
    torch.manual_seed(seed)
    return PolynomialTwoLayer(dim, width, alpha, epsilon).double()


def target(x, beta):
    return (x @ beta).square() / 2


def test_the_network_is_its_formula():
    model, x = network(), draw(6, 5)
    values = []
    for sample in x:
        total = 0.0
        for w in model.weight:
            h = (w @ sample).item()
            total += h + 0.4 / 2 * h * h
        values.append(1.5 / 7 * total)
    torch.testing.assert_close(model(x).detach(), torch.tensor(values, dtype=F64))
    torch.testing.assert_close(model(x.view(2, 3, 5)), model(x).view(2, 3))


def test_the_moment_gives_the_function_of_the_network():
    model, x = network(), draw(6, 5)
    moment = lifted_moment(model.weight.detach())
    assert moment[0, 0] == 1
    torch.testing.assert_close(moment[0, 1:], model.weight.detach().mean(0))
    torch.testing.assert_close(moment_output(moment, x, 1.5, 0.4), model(x).detach())


def test_the_kernel_is_that_of_the_gradients():
    model, x = network(), draw(6, 5)
    weight = {"weight": model.weight.detach()}
    rows = jacrev(lambda w: functional_call(model, {"weight": w}, (x,)))(weight["weight"]).flatten(1)
    kernel = moment_kernel(lifted_moment(weight["weight"]), x, 0.4)
    torch.testing.assert_close(kernel, 7 / 1.5**2 * rows @ rows.T)
    torch.testing.assert_close(kernel, 7 / 1.5**2 * empirical_ntk(model, weight, x, method="jacobian"))


@pytest.mark.parametrize(("alpha", "epsilon"), [(1.0, 0.5), (3.0, 0.2), (0.5, 1.5)])
def test_the_loss_is_that_of_exact_quadrature(alpha, epsilon):
    """A polynomial of degree eight in each of four coordinates, which nine nodes integrate exactly."""
    model, beta = network(4, 3, alpha, epsilon, seed=1), 2 * draw(4, seed=2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    x = torch.tensor(list(itertools.product(nodes, repeat=4)), dtype=F64) / 4**0.5
    mass = torch.tensor([np.prod(w) for w in itertools.product(weights / weights.sum(), repeat=4)], dtype=F64)
    expected = mass @ (model(x).detach() - target(x, beta)).square()
    loss = quadratic_test_loss(lifted_moment(model.weight.detach()), beta, alpha, epsilon)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.linear + loss.trace + loss.misalignment, loss.total)


def test_the_loss_is_that_of_many_samples():
    model, beta = network(8, 20, seed=3), draw(8, seed=4)
    x = draw(100_000, 8, seed=5) / 8**0.5
    squares = (model(x).detach() - target(x, beta)).square()
    loss = quadratic_test_loss(lifted_moment(model.weight.detach()), beta, 1.5, 0.4).total
    assert abs(squares.mean() - loss) < 4 * squares.std() / 100_000**0.5


def test_the_three_parts_are_zero_where_they_should_be():
    """By hand, D = 1 and two units: w = (1, -1) with alpha 2 and epsilon 0.5 is x^2 / 2; w = (2, 0) is 2 x + x^2."""
    beta = torch.ones(1, dtype=F64)
    perfect = quadratic_test_loss(lifted_moment(torch.tensor([[1.0], [-1.0]], dtype=F64)), beta, 2.0, 0.5)
    assert perfect.total.item() == 0
    other = quadratic_test_loss(lifted_moment(torch.tensor([[2.0], [0.0]], dtype=F64)), beta, 2.0, 0.5)
    assert [part.item() for part in other] == [4.75, 4.0, 0.25, 0.5]


def test_leading_dimensions_broadcast():
    weight, beta, x = draw(3, 1, 7, 5), draw(3, 1, 5, seed=1), draw(3, 1, 6, 5, seed=2)
    alpha, epsilon = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([1.0, 0.3], dtype=F64)
    moment = lifted_moment(weight)
    output = moment_output(moment, x, alpha, epsilon)
    kernel = moment_kernel(moment, x, epsilon)
    loss = quadratic_test_loss(moment, beta, alpha, epsilon)
    for i, j in itertools.product(range(3), range(2)):
        own = moment[i, 0], x[i, 0]
        a, e = alpha[j].item(), epsilon[j].item()
        torch.testing.assert_close(output[i, j], moment_output(*own, a, e))
        torch.testing.assert_close(kernel[i, j], moment_kernel(*own, e))
        alone = quadratic_test_loss(own[0], beta[i, 0], a, e)
        torch.testing.assert_close(tuple(part[i, j] for part in loss), tuple(alone))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"alpha must be a finite number above 0, got 0"):
        PolynomialTwoLayer(3, 4, 0, 0.5)
    with pytest.raises(ValueError, match=r"epsilon must be a finite number above 0, got -1"):
        PolynomialTwoLayer(3, 4, 1, -1)
    with pytest.raises(ValueError, match=r"width must be an integer of at least 1, got 0"):
        PolynomialTwoLayer(3, 0, 1, 1)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 3\), got \(2, 4\)"):
        PolynomialTwoLayer(3, 4, 1, 1)(torch.ones(2, 4))
    moment = lifted_moment(draw(4, 3))
    with pytest.raises(ValueError, match=r"moment must have shape \(\.\.\., 3, 3\), for inputs of 2, got \(4, 4\)"):
        moment_output(moment, draw(5, 2), 1.0, 0.5)
    with pytest.raises(ValueError, match=r"alpha must be above 0 and finite, got \[1.0, 0.0\]"):
        quadratic_test_loss(moment, draw(3), torch.tensor([1.0, 0.0]), 0.5)
    with pytest.raises(ValueError, match=r"epsilon must be above 0 and finite, got nan"):
        moment_kernel(moment, draw(5, 3), float("nan"))
    with pytest.raises(ValueError, match=r"weight must have shape \(\.\.\., N, D\)"):
        lifted_moment(torch.ones(3))
