import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.neurons import QuadraticConv2d, QuadraticLinear, relinear_param_groups, relinear_shrink_


def networks(seed=0, layer=QuadraticLinear, **options):
    """A conventional network and its quadratic twin, drawn from one seed."""
    twins = []
    for make in (nn.Linear, lambda a, b: layer(a, b, **options)):
        torch.manual_seed(seed)
        twins.append(nn.Sequential(make(6, 16), nn.ReLU(), make(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    conventional, quadratic = twins
    for ours, twin in zip(quadratic, conventional, strict=True):
        if isinstance(ours, layer):
            twin.load_state_dict({"weight": ours.weight_r, "bias": ours.bias_r})
    quadratic[-1].load_state_dict(conventional[-1].state_dict())
    return conventional, quadratic


def steps(model, optimizer, count=40):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(count):
        x = torch.randn(32, 6, generator=generator)
        loss = F.cross_entropy(model(x), (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("compact", [False, True])
def test_a_new_layer_is_the_conventional_layer(compact):
    layer = QuadraticLinear(7, 5, compact=compact)
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight_r, layer.bias_r))


def test_a_new_convolution_is_the_conventional_convolution():
    layer = QuadraticConv2d(3, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight_r, layer.bias_r, 2, 1))


@pytest.mark.parametrize("compact", [False, True])
def test_a_convolution_of_one_pixel_is_the_linear_layer(compact):
    convolution = QuadraticConv2d(6, 4, 1, init="random", compact=compact).double()
    linear = QuadraticLinear(6, 4, init="random", compact=compact).double()
    linear.load_state_dict({k: v.flatten(1) if v.dim() > 1 else v for k, v in convolution.state_dict().items()})
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(convolution(x), linear(x.movedim(1, -1)).movedim(-1, 1))


def test_the_weights_of_the_conventional_part_are_drawn_first():
    torch.manual_seed(3)
    relinear = QuadraticLinear(4, 3)
    torch.manual_seed(3)
    random = QuadraticLinear(4, 3, init="random")
    torch.manual_seed(3)
    weight = nn.init.kaiming_normal_(torch.empty(3, 4), nonlinearity="relu")
    assert torch.equal(relinear.weight_r, weight) and torch.equal(random.weight_r, weight)
    assert torch.equal(relinear.bias_r, random.bias_r)


def test_with_gamma_zero_training_is_the_conventional_one_bit_for_bit():
    conventional, quadratic = networks()
    plain = steps(conventional, torch.optim.SGD(conventional.parameters(), lr=0.1, momentum=0.9))
    held = steps(quadratic, torch.optim.SGD(relinear_param_groups(quadratic, 0.1, 0.0, 0.0), momentum=0.9))
    assert plain == held
    assert torch.equal(quadratic[0].weight_r, conventional[0].weight)


def test_with_gamma_above_zero_the_quadratic_parts_learn():
    conventional, quadratic = networks()
    plain = steps(conventional, torch.optim.SGD(conventional.parameters(), lr=0.1), 300)
    ours = steps(quadratic, torch.optim.SGD(relinear_param_groups(quadratic, 0.1, 0.1, 0.1)), 300)
    assert sum(ours[-20:]) < 0.8 * sum(plain[-20:])  # the classes need a product of two inputs


def test_both_quadratic_parts_receive_gradients_at_the_start():
    layer = QuadraticLinear(6, 5)
    layer(torch.randn(8, 6)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_one_neuron_is_a_quadratic_form():
    layer = QuadraticLinear(2, 1)
    with torch.no_grad():
        layer.weight_r.copy_(torch.tensor([[1.0, 0.0]]))
        layer.weight_g.copy_(torch.tensor([[0.0, 1.0]]))
        for parameter in (layer.bias_r, layer.bias_g):
            parameter.zero_()
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert layer(x).squeeze().tolist() == [1, -1, -1, 1]  # exclusive or, by the sign of x1 x2


@pytest.mark.parametrize(
    ("widths", "quadratic", "squared"),
    [((2, 2, 1), 12, 6), ((3, 2, 1), 20, 8), ((2, 3, 1), 15, 6), ((3, 3, 3), 48, 21), ((2, 2, 2, 1), 18, 10)],
)
def test_the_dimension_of_the_function_family(widths, quadratic, squared):
    """The rank of the Jacobian of outputs by parameters at a generic point; the numbers were counted independently."""

    def dimension(layer, activation):
        torch.manual_seed(0)
        layers = [layer(a, b).double() for a, b in pairwise(widths)]
        model = nn.Sequential(*[part for each in layers for part in (each, activation)][:-1])
        x = torch.randn(80, widths[0], dtype=torch.float64)
        parameters = dict(model.named_parameters())
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(parameters)
        singular = torch.linalg.svdvals(torch.cat([j.flatten(1) for j in jacobian.values()], 1))
        return int((singular > 1e-9 * singular[0]).sum())

    class Square(nn.Module):
        def forward(self, x):
            return x * x

    assert dimension(lambda a, b: QuadraticLinear(a, b, init="random"), nn.Identity()) == quadratic
    assert dimension(nn.Linear, Square()) == squared


def test_random_initialisation_explodes_with_depth_and_relinear_does_not():
    def size(depth, **options):
        torch.manual_seed(0)
        x = torch.randn(100, 32)
        for _ in range(depth):
            x = F.relu(QuadraticLinear(32, 32, **options)(x))
        return x.detach().pow(2).mean().sqrt()

    assert 0.1 < size(6) < 3
    assert size(5, init="random") > 1e6 * size(5)


def test_param_groups_hold_every_parameter_once_with_its_rate_and_decay():
    model = nn.Sequential(QuadraticLinear(3, 3), nn.LayerNorm(3), QuadraticLinear(3, 2, compact=True, bias=False))
    groups = relinear_param_groups(model, lr=1.0, gamma_g=0.1, gamma_b=0.01, weight_decay=0.5)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters())) == len(rate)
    expected = {"weight_g": (0.1, 0.5), "bias_g": (0.1, 0.0), "weight_b": (0.01, 0.5), "bias_b": (0.01, 0.5)}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == expected.get(name.split(".")[1], (1.0, 0.5)), name
    torch.optim.AdamW(groups)


def test_shrinking_goes_towards_the_conventional_neuron():
    layer = QuadraticLinear(3, 2, init="random")
    before = copy.deepcopy(layer)
    relinear_shrink_(layer, 0.5, 1.0)
    torch.testing.assert_close(layer.bias_g, 1 + 0.5 * (before.bias_g - 1))
    torch.testing.assert_close(layer.weight_g, 0.5 * before.weight_g)
    assert torch.equal(layer.weight_b, before.weight_b) and torch.equal(layer.weight_r, before.weight_r)
    relinear_shrink_(layer, 0.0, 0.0)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight_r, layer.bias_r))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: QuadraticLinear(0, 3), ValueError, "in_features must be an integer of at least 1, got 0"),
        (lambda: QuadraticLinear(3, -1), ValueError, "out_features must be an integer of at least 1, got -1"),
        (
            lambda: QuadraticLinear(3, 3, init="zeros"),
            ValueError,
            "init must be one of 'relinear', 'random', got 'zeros'",
        ),
        (
            lambda: QuadraticLinear(3, 3, dtype=torch.int64),
            TypeError,
            r"dtype must be a floating-point dtype, got torch\.int64",
        ),
        (lambda: QuadraticLinear(3, 3)(torch.randn(2, 4)), ValueError, "x"),
        (
            lambda: QuadraticLinear(3, 3, compact=True)(torch.randn(2, 4)),
            ValueError,
            "x must have in_features = 3 features, got 4",
        ),
        (lambda: QuadraticLinear(3, 3)(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x"),
        (lambda: QuadraticLinear(3, 3, compact=True)(torch.ones(2, 3, dtype=torch.int64)), TypeError, "x"),
        (lambda: QuadraticLinear(3, 3)(torch.randn(2, 3, device="meta")), ValueError, "x|device"),
        (lambda: QuadraticConv2d(3, 3, 0), ValueError, "kernel_height must be an integer of at least 1, got 0"),
        (
            lambda: QuadraticConv2d(3, 3, 3)(torch.randn(1, 4, 8, 8)),
            ValueError,
            r"x must have shape \(batch, 3, height, width\), got \(1, 4, 8, 8\)",
        ),
        (
            lambda: QuadraticConv2d(3, 3, 3)(torch.ones(1, 3, 8, 8, dtype=torch.int64)),
            TypeError,
            r"x must be torch\.float32, as the weights, got torch\.int64",
        ),
        (
            lambda: relinear_param_groups(nn.Linear(2, 2), 0.1, 0.1, 0.1),
            ValueError,
            "module must have at least one quadratic layer, got a Linear without",
        ),
        (
            lambda: relinear_param_groups(QuadraticLinear(2, 2), 0.1, -0.1, 0.1),
            ValueError,
            r"gamma_g must be a finite number at least 0, got -0\.1",
        ),
        (
            lambda: relinear_shrink_(QuadraticLinear(2, 2), 0.1, 1.1),
            ValueError,
            r"alpha_b must be a finite number from 0 to 1, got 1\.1",
        ),
    ],
)
def test_bad_input_raises(make, error, words):
    with pytest.raises(error, match=words):
        make()
