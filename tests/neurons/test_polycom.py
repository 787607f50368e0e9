import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.neurons import PolyNorm, PolyReLU

DOUBLE = {"dtype": torch.float64}


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("make", [PolyReLU, PolyNorm])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_initial_coefficients(make, order):
    layer = make(order)
    assert torch.equal(layer.weight, torch.full((order,), 1 / order))
    assert layer.bias.tolist() == [0.0]
    layer = make(3, init=[0.5, 0.25, 2.0])
    assert layer.weight.tolist() == [0.5, 0.25, 2.0]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polyrelu_is_its_formula(order):
    layer = PolyReLU(order, init=range(1, order + 1), **DOUBLE)
    nn.init.constant_(layer.bias, 0.7)
    x = randoms(4, 9)
    u = x.clamp(min=0)
    expected = 0.7 + sum((order - power + 1) * u**power for power in range(1, order + 1))  # weight[0]: highest power
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynorm_is_its_formula(order):
    layer = PolyNorm(order, init=range(1, order + 1), **DOUBLE)
    nn.init.constant_(layer.bias, 0.7)
    x = randoms(4, 9)
    expected = 0.7 + sum(
        (order - power + 1) * x**power / ((x ** (2 * power)).mean(-1, keepdim=True) + 1e-6).sqrt()
        for power in range(1, order + 1)
    )
    torch.testing.assert_close(layer(x), expected)


def test_polyrelu_contains_relu_and_its_square():
    x = randoms(50)
    assert torch.equal(PolyReLU(init=(0, 0, 1), **DOUBLE)(x), x.relu())
    torch.testing.assert_close(PolyReLU(init=(0, 1, 0), **DOUBLE)(x), x.relu().square())


def test_polynorm_contains_rms_normalisation():
    x = 0.01 * randoms(4, 6)  # small, so that eps matters
    torch.testing.assert_close(PolyNorm(init=(0, 0, 1), **DOUBLE)(x), F.rms_norm(x, (6,), eps=1e-6))


def test_polynorm_does_not_see_the_scale_of_its_input():
    layer, x = PolyNorm(eps=1e-30, **DOUBLE), randoms(4, 6)
    torch.testing.assert_close(layer(100 * x), layer(x))
    assert not torch.allclose(PolyReLU(**DOUBLE)(100 * x), PolyReLU(**DOUBLE)(x))


@pytest.mark.parametrize(("coefficients", "sign"), [((1, 0, 0), -1), ((0, 1, 0), 1), ((0, 0, 1), -1)])
def test_polynorm_branches_are_even_or_odd(coefficients, sign):
    layer, x = PolyNorm(init=coefficients, **DOUBLE), randoms(3, 5)
    torch.testing.assert_close(layer(-x), sign * layer(x))


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_polynorm_of_a_constant_row(value):
    layer = PolyNorm(init=(0.5, 0.2, 0.1), eps=1e-30, **DOUBLE)
    expected = (0.5 + 0.1) * (1 if value > 0 else -1) + 0.2
    torch.testing.assert_close(layer(torch.full((1, 7), value, **DOUBLE)), torch.full((1, 7), expected, **DOUBLE))


@pytest.mark.parametrize("make", [PolyReLU, PolyNorm])
def test_a_row_of_zeros_gives_the_constant_and_finite_gradients(make):
    layer, x = make(), torch.zeros(2, 5, requires_grad=True)
    nn.init.constant_(layer.bias, 0.3)
    y = layer(x)
    assert torch.equal(y, torch.full((2, 5), 0.3))
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, layer.weight, layer.bias))
    assert layer.bias.grad.item() == 10


def test_eps_silences_the_cubic_branch_below_a_tenth():
    layer = PolyNorm(init=(1, 0, 0), **DOUBLE)
    sizes = [layer(torch.full((1, 8), value, **DOUBLE)).mean().item() for value in (0.01, 0.1, 1.0)]
    assert sizes[0] < 2e-3 and 0.6 < sizes[1] < 0.8 and sizes[2] > 0.999


def test_polynorm_along_another_dimension():
    x, layer = randoms(2, 5, 3, 4), PolyNorm(dim=1, **DOUBLE)
    torch.testing.assert_close(layer(x), PolyNorm(**DOUBLE)(x.movedim(1, -1)).movedim(-1, 1))


def test_the_constant_of_polyrelu_learns_from_negative_inputs():
    layer = PolyReLU()
    layer(-torch.ones(6)).sum().backward()
    assert layer.bias.grad.item() == 6 and not layer.weight.grad.any()


def test_four_squared_units_multiply_exactly():
    x, y = randoms(2, 100)
    u = PolyReLU(2, init=(1, 0), **DOUBLE)
    product = (u(x + y) + u(-x - y) - u(x - y) - u(y - x)) / 4
    torch.testing.assert_close(product, x * y)


@pytest.mark.parametrize("make", [PolyReLU, PolyNorm])
def test_state_dict_has_the_published_names_and_shapes(make):
    layer = make()
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {"weight": (3,), "bias": (1,)}
    twin = copy.deepcopy(layer)
    nn.init.normal_(layer.weight)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("make", [PolyReLU, PolyNorm])
def test_half_precision_does_not_overflow_inside(make):
    layer = make(init=(1e-3, 0, 0))
    x = torch.tensor([[60.0, 1.0]])
    torch.testing.assert_close(layer(x.half()).float(), layer(x), rtol=1e-3, atol=1e-3)
    assert layer(x.half()).dtype == torch.float16
    assert (60 * torch.tensor(60.0).half() ** 2).isinf()  # where the plain cube in float16 does


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PolyReLU(0), ValueError, "order must be an integer of at least 1, got 0"),
        (lambda: PolyNorm(1.5), ValueError, r"order must be an integer of at least 1, got 1\.5"),
        (lambda: PolyNorm(3, init=(1, 2)), ValueError, "init must have order = 3 values, highest power first, got 2"),
        (lambda: PolyNorm(eps=0), ValueError, "eps must be a finite number above 0, got 0"),
        (lambda: PolyReLU(dtype=torch.int64), TypeError, r"dtype must be a floating-point dtype, got torch\.int64"),
        (lambda: PolyReLU()(torch.ones(3, dtype=torch.int64)), TypeError, "x must have a real floating-point dtype"),
        (lambda: PolyNorm()(torch.ones(3, dtype=torch.int64)), TypeError, "x must have a real floating-point dtype"),
        (lambda: PolyNorm()(torch.ones(2, 0)), ValueError, r"x must have shape \(..., H\) with H >= 1"),
        (lambda: PolyNorm(dim=2)(torch.ones(2, 3)), ValueError, "x must have the dimension dim = 2, got 2 dimensions"),
        (lambda: PolyNorm()(torch.ones(2, 3, device="meta")), ValueError, "weight must be on the device of x, meta"),
    ],
)
def test_bad_input_raises(make, error, words):
    with pytest.raises(error, match=words):
        make()
