import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import nn

from polylib.quantization import (
    BiPerConv1d,
    BiPerConv2d,
    BiPerLinear,
    PackedBinary,
    laplace_binarization_error,
    periodic_penalty,
    set_stage,
    sign_bireal,
)

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(stage=1, freq=20.0, inputs=24, outputs=5):
    torch.manual_seed(0)
    return BiPerLinear(inputs, outputs, freq, stage).double()


def conv1d(stage=1, **options):
    torch.manual_seed(0)
    return BiPerConv1d(3, 5, 3, 20.0, stage, **options).double()


def conv2d(stage=1, **options):
    torch.manual_seed(0)
    return BiPerConv2d(3, 5, 3, 20.0, stage, **options).double()


LAYERS = {
    "linear": (linear, (4, 24)),
    "tokens": (linear, (2, 3, 24)),
    "1d": (lambda stage=1: conv1d(stage, padding=1), (4, 3, 9)),
    "strided 1d": (lambda stage=1: conv1d(stage, stride=2), (4, 3, 9)),
    "2d": (lambda stage=1: conv2d(stage, padding=1), (4, 3, 7, 6)),
    "wide border": (lambda stage=1: conv2d(stage, stride=2, padding=2), (4, 3, 6, 7)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def test_the_sign_has_the_gradient_of_a_triangle():
    a = torch.tensor([-3.0, -1.0, -0.25, -0.0, 0.0, 0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    y = sign_bireal(a)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    (gradient,) = torch.autograd.grad(y.sum(), a)
    torch.testing.assert_close(gradient, (2 - 2 * a.detach().abs()).clamp(min=0))
    odd = sign_bireal(torch.tensor([math.nan, math.inf, -math.inf]))
    assert odd[0].isnan() and odd[1:].tolist() == [1, -1]
    with pytest.raises(TypeError, match="a must be a floating-point tensor"):
        sign_bireal(torch.tensor([1, 2]))


def by_hand(layer, x, stage, training):
    """The layer in numpy's manner: one sample, one output and one tap after the other; gradients by hand."""
    w = layer.weight.detach()
    sine = torch.sin(20.0 * w)
    levels = sine if stage == 1 else torch.where(sine < 0, -1.0, 1.0).to(F64)
    signs = torch.where(x < 0, -1.0, 1.0).to(F64)
    size = x.std(1, keepdim=True) if training else torch.ones(len(x), 1, dtype=F64)
    window = (2 - 2 * (x / size).abs()).clamp(min=0)
    return levels, signs, size, window


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradients_of_both_stages(stage):
    layer, x, pull = linear(stage), draw(4, 24, seed=1), draw(4, 5, seed=2)
    levels, signs, _, _ = by_hand(layer, x, stage, training=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.scale * (signs @ levels.T))
    gradients = torch.autograd.grad(y, [layer.weight, layer.scale], pull)
    expected = (pull * layer.scale.detach()).T @ signs * 20.0 * torch.cos(20.0 * layer.weight.detach())
    torch.testing.assert_close(gradients[0], expected)
    torch.testing.assert_close(gradients[1], (pull * (signs @ levels.T)).sum(0))


def test_the_window_of_an_input_is_that_of_its_deviation_in_training_alone():
    layer, pull = linear(2), draw(4, 5, seed=2)
    x = (3 * draw(4, 24, seed=1) + 1).requires_grad_()
    layer.eval()
    (gradient,) = torch.autograd.grad(layer(x), x, pull)
    levels, _, _, window = by_hand(layer, x.detach(), 2, training=False)
    own = (pull * layer.scale.detach()) @ levels
    torch.testing.assert_close(gradient, own * window)
    layer.train()
    y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x))
    (gradient,) = torch.autograd.grad(y, x, pull)
    variance = ((x - x.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / 23
    a = x / (variance + 1e-5) ** 0.5  # the deviation is differentiated, too
    (expected,) = torch.autograd.grad(a, x, own * (2 - 2 * a.detach().abs()).clamp(min=0))
    torch.testing.assert_close(gradient, expected)


def test_a_convolution_takes_the_deviation_over_channels_and_positions():
    layer, x, pull = conv1d(padding=1), 3 * draw(4, 3, 9), draw(4, 5, 9, seed=1)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x), x, pull)
    a = x / (x.flatten(1).var(1)[:, None, None] + 1e-5) ** 0.5
    own = F.conv_transpose1d(pull * layer.scale.detach()[:, None], torch.sin(20 * layer.weight.detach()), padding=1)
    (expected,) = torch.autograd.grad(a, x, own * (2 - 2 * a.detach().abs()).clamp(min=0))
    torch.testing.assert_close(gradient, expected)


@each_layer
@pytest.mark.parametrize("stage", [1, 2])
def test_a_period_changes_nothing_and_half_a_period_the_sign(name, stage):
    make, shape = LAYERS[name]
    layer, x = make(stage).eval(), draw(*shape, seed=3)
    y = layer(x)
    for shift, sign in ((2 * math.pi / 20, 1), (math.pi / 20, -1)):
        other = copy.deepcopy(layer)
        other.weight.data += shift
        torch.testing.assert_close(other(x), sign * y)


@each_layer
def test_the_product_is_torchs_own(name):
    make, shape = LAYERS[name]
    layer, x = make(2).eval(), draw(*shape, seed=3)
    signs = torch.where(x < 0, -1.0, 1.0).to(F64)
    levels = torch.where(torch.sin(20 * layer.weight) < 0, -1.0, 1.0).to(F64)
    if layer.dimensions == 0:
        expected = F.linear(signs, levels) * layer.scale
    else:
        convolve, ones = (F.conv1d, [1]) if layer.dimensions == 1 else (F.conv2d, [1, 1])
        y = convolve(signs, levels, stride=layer.stride, padding=layer.padding)
        expected = y * layer.scale.view(-1, *ones)
    torch.testing.assert_close(layer(x), expected)


@each_layer
def test_packed_signs_give_the_same_whole_numbers(name):
    make, shape = LAYERS[name]
    layer, x = make(2).eval(), draw(*shape, seed=3)
    packed = PackedBinary(layer)
    torch.testing.assert_close(packed(x), layer(x))
    assert packed.words.dtype == torch.int32
    layer.scale.data[:] = packed.scale.data[:] = 1.0
    assert torch.equal(packed(x), layer(x))  # whole numbers, whatever their order
    assert torch.equal(packed(torch.zeros(shape, dtype=F64)), layer(torch.zeros(shape, dtype=F64)))


def test_a_slow_sine_is_the_weight():
    layer, x = linear(freq=1e-4).eval(), draw(4, 24)
    plain = F.linear(torch.where(x < 0, -1.0, 1.0).to(F64), layer.weight) * layer.scale
    torch.testing.assert_close(layer(x) / 1e-4, plain)


def test_frequency_and_size_of_the_weights_are_one_setting():
    """Twice the frequency, half the weights and a quarter of their rate: the same training."""
    x, target = draw(16, 24), draw(16, 5, seed=1)
    outputs = []
    for factor in (1.0, 2.0):
        layer = linear(2, freq=20 * factor)
        layer.weight.data /= factor
        groups = [{"params": [layer.weight], "lr": 1e-3 / factor**2}, {"params": [layer.scale], "lr": 1e-3}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        outputs.append((layer.weight.detach() * factor, layer.scale.detach()))
    torch.testing.assert_close(*outputs)


def test_initial_values():
    torch.manual_seed(0)
    layer = BiPerConv2d(32, 64, 3, 20.0)
    torch.testing.assert_close(layer.weight.std().item(), math.sqrt(2 / 288), rtol=0.03, atol=0)
    scale = BiPerLinear(2, 20000, 20.0).scale
    assert scale.min() >= 0 and scale.max() < 1
    torch.testing.assert_close(scale.mean().item(), 0.5, rtol=0.02, atol=0)
    torch.testing.assert_close(scale.var().item(), 1 / 12, rtol=0.03, atol=0)


def test_the_stage_of_a_model_changes_nothing_else():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), BiPerLinear(6, 6, 20.0), BiPerLinear(6, 6, 20.0))
    model(torch.randn(10, 6))
    before = copy.deepcopy(model.state_dict())
    set_stage(model, 2)
    assert [model[k].stage for k in (2, 3)] == [2, 2]
    assert set(model[2].binary_weight().unique().tolist()) == {-1.0, 1.0}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    set_stage(model, 1)
    assert model[3].stage == 1
    with pytest.raises(ValueError, match="stage must be one of 1, 2"):
        set_stage(model, 3)
    with pytest.raises(ValueError, match="model must hold a periodic layer"):
        set_stage(nn.Linear(2, 2), 2)


def test_the_penalty_is_that_of_the_double_angle_and_pulls_away_from_the_signs():
    model = nn.Sequential(linear(), conv1d())
    cosines = sum((1 - torch.cos(40 * layer.weight)).mean() / 2 for layer in model)
    torch.testing.assert_close(periodic_penalty(model, 0.3), 0.3 * cosines)
    for tau, sign in ((0.1, 1), (-0.1, -1)):
        layer = linear()
        before = layer.quantization_error()
        periodic_penalty(layer, tau).backward()
        layer.weight.data -= 0.01 * layer.weight.grad
        assert sign * (layer.quantization_error() - before) > 0
    with pytest.raises(ValueError, match="model must hold a periodic layer"):
        periodic_penalty(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="tau must be a finite number"):
        periodic_penalty(linear(), math.nan)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_quantization_error_is_a_mean_distance(stage):
    layer = linear(stage)
    sine = torch.sin(20 * layer.weight.detach())
    torch.testing.assert_close(layer.quantization_error(), (sine - sine.sign()).abs().mean())


@pytest.mark.parametrize("v", [0.1, 0.25, 0.5, 1.0, 2.0])
def test_the_errors_of_laplace_weights(v):
    """Against the integral, over half a period at a time."""
    edges = [k * math.pi for k in range(int(60 * v / math.pi) + 2)]

    def mean(function):
        parts = itertools.pairwise(edges)
        return sum(quad(lambda t: function(math.sin(t)) * math.exp(-t / v) / v, *part)[0] for part in parts)

    scale = mean(abs)
    torch.testing.assert_close(laplace_binarization_error(v), mean(lambda s: 1 - abs(s)), rtol=1e-6, atol=1e-6)
    squared = mean(lambda s: (abs(s) - scale) ** 2)
    torch.testing.assert_close(laplace_binarization_error(v, "squared"), squared, rtol=1e-6, atol=1e-6)


def test_the_limits_of_the_errors():
    torch.testing.assert_close(laplace_binarization_error(1e6), 1 - 2 / math.pi, rtol=1e-6, atol=0)
    torch.testing.assert_close(laplace_binarization_error(1e6, "squared"), 0.5 - 4 / math.pi**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(laplace_binarization_error(1e-4), 1 - 1e-4, rtol=1e-6, atol=0)
    spreads = [0.05 * 1.1**k for k in range(60)]
    absolute = [laplace_binarization_error(v) for v in spreads]
    assert all(after < before for before, after in itertools.pairwise(absolute))
    squared = [laplace_binarization_error(v, "squared") for v in spreads]
    best = spreads[squared.index(max(squared))]
    assert 0.85 < best < 1.06  # the squared error has its maximum in the middle
    with pytest.raises(ValueError, match="kind must be one of"):
        laplace_binarization_error(1.0, "relative")
    with pytest.raises(ValueError, match="spread must be a finite number above 0"):
        laplace_binarization_error(0.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BiPerLinear(0, 3, 20.0), "in_features must be an integer"),
        (lambda: BiPerLinear(3, 3, 0.0), "freq must be a finite number above 0"),
        (lambda: BiPerLinear(3, 3, -1.0), "freq must be a finite number above 0"),
        (lambda: BiPerLinear(3, 3, 20.0, stage=0), "stage must be one of"),
        (lambda: BiPerConv1d(3, 3, 0, 20.0), "kernel_size must be an integer"),
        (lambda: BiPerConv2d(3, 3, 3, 20.0, padding=-1), "padding must be an integer"),
        (lambda: linear()(draw(4, 23)), "x must have shape"),
        (lambda: conv1d()(draw(3, 9)), "x must have shape"),
        (lambda: conv2d()(draw(4, 2, 9, 9)), "x must have shape"),
        (lambda: PackedBinary(linear(1)), "layer must be in stage 2"),
        (lambda: PackedBinary(linear(2))(draw(4, 23)), "x must have shape"),
        (lambda: PackedBinary(conv1d(2))(draw(4, 2, 9)), "x must have shape"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_only_periodic_layers_are_packed():
    with pytest.raises(TypeError, match="layer must be a BiPerLinear"):
        PackedBinary(nn.Linear(3, 3))
