import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.lab import Split, train_many
from polylib.neurons import GRKANLinear, GroupRational, rational_gain
from polylib.neurons.kolmogorov_arnold_transformer import START


@pytest.mark.parametrize("variant", ["A", "B"])
def test_the_identity_start_is_the_identity(variant):
    x = 3 * torch.randn(5, 4, 16)
    assert torch.equal(GroupRational(16, 4, init="identity", variant=variant)(x), x)


@pytest.mark.parametrize(
    ("init", "variant", "function", "tolerance"),
    [
        ("swish", "A", F.silu, 2e-6),
        ("swish", "B", F.silu, 2e-4),
        ("gelu", "A", F.gelu, 3e-3),
        ("gelu", "B", F.gelu, 3e-3),
        ("relu", "A", F.relu, 3.1e-2),
    ],
)
def test_the_starts_are_the_functions_they_are_named_after(init, variant, function, tolerance):
    x = torch.linspace(-3, 3, 601, dtype=torch.float64).unsqueeze(-1)
    error = GroupRational(1, 1, init=init, variant=variant, dtype=torch.float64)(x) - function(x)
    assert error.abs().max() < tolerance


def test_a_fit_for_one_variant_is_another_function_under_the_other():
    """The authors' GELU coefficients fit B and are evaluated as A: about 1.5 at x = 3 where GELU is almost 3."""
    layer = GroupRational(1, 1, init="gelu", variant="B")
    x = torch.tensor([[3.0]])
    assert layer(x).item() == pytest.approx(2.999, abs=1e-3)
    layer.variant = "A"
    assert layer(x).item() == pytest.approx(1.531, abs=1e-3)


def test_a_new_layer_is_a_swish_layer():
    layer = GRKANLinear(32, 20)
    x = torch.randn(64, 32).clamp(-3, 3)  # where the coefficients were fitted
    torch.testing.assert_close(layer(x), F.linear(F.silu(x), layer.weight, layer.bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("init", "gain"), [("identity", 1.0), ("relu", 2.0), ("swish", 2.8046), ("gelu", 2.3463)])
def test_gain_is_the_exact_one(init, gain):
    """Exact values from integrals over the functions themselves; the fits depart from them beyond |x| = 3."""
    assert GroupRational(8, 2, init=init).gain().tolist() == pytest.approx([gain, gain], rel=3e-3)


def test_gain_has_one_value_for_each_group():
    numerator = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    gain = rational_gain(numerator, torch.zeros(2, 1))
    torch.testing.assert_close(gain, torch.tensor([1.0, 0.25], dtype=torch.float64))
    assert rational_gain(numerator[:1], torch.zeros(2, 1)).shape == (2,)


@pytest.mark.parametrize("init", ["identity", "swish", "gelu", "relu"])
def test_weights_have_the_variance_that_keeps_the_scale(init):
    torch.manual_seed(0)
    layer = GRKANLinear(512, 512, init=init)
    assert layer.weight.var().item() == pytest.approx(layer.activation.gain()[0].item() / 512, rel=0.02)
    x = torch.randn(400, 512)
    assert layer(x).var().item() == pytest.approx(1, rel=0.06)
    assert not layer.bias.any()


def test_variance_survives_depth():
    torch.manual_seed(0)
    x = small = torch.randn(500, 256)
    for _ in range(12):
        layer = GRKANLinear(256, 256)
        x = layer(x).detach()
        nn.init.trunc_normal_(layer.weight, std=0.02)
        small = layer(small).detach()
    assert 0.25 < x.var() < 4
    assert small.var() < 1e-10


@pytest.mark.parametrize("variant", ["A", "B"])
def test_denominators_that_start_at_zero_learn(variant):
    torch.manual_seed(0)
    layer = GroupRational(8, 2, init="identity", variant=variant)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 8)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - torch.tanh(x)).square().mean().backward()
        optimizer.step()
    assert (layer.denominator != 0).all()
    layer.denominator.data.zero_()
    layer.reset_parameters("identity")
    (layer(x) - torch.tanh(x)).square().mean().backward()
    assert (layer.denominator.grad != 0).all()


def test_channels_of_a_group_share_their_function_and_groups_do_not():
    layer = GroupRational(6, 2)
    with torch.no_grad():
        layer.denominator[1] = torch.tensor([0.5, 1.0, 0.2, 0.3])
    x = torch.randn(7, 6)
    order = torch.tensor([2, 0, 1, 4, 5, 3])  # within the groups
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))
    same = torch.full((1, 6), 0.7)
    first, second = layer(same)[0].view(2, 3)
    assert (first == first[0]).all() and (second == second[0]).all() and first[0] != second[0]


def test_share_numerator_decides_the_number_of_parameters():
    def count(**options):
        return sum(p.numel() for p in GRKANLinear(64, 32, **options).parameters())

    plain = 64 * 32 + 32
    assert count() == plain + 6 + 8 * 4
    assert count(share_numerator=False, groups=4) == plain + 4 * (6 + 4)
    assert count(bias=False) == plain - 32 + 6 + 8 * 4


def test_a_larger_order_starts_as_the_same_function():
    x = torch.randn(4, 8)
    torch.testing.assert_close(GroupRational(8, 2, order=(7, 6))(x), GroupRational(8, 2)(x))
    assert torch.equal(GroupRational(8, 2, init="identity", order=(1, 1))(x), x)


def test_resetting_brings_the_start_back():
    layer = GRKANLinear(8, 4, groups=2, init="gelu")
    start = copy.deepcopy(layer.activation.state_dict())
    with torch.no_grad():
        layer.activation.numerator.normal_()
    layer.reset_parameters("gelu")
    assert all(torch.equal(value, start[name]) for name, value in layer.activation.state_dict().items())


def test_trains_as_a_stack():
    torch.manual_seed(0)
    x = torch.randn(80, 8)
    y = (x[:, 0].abs() > 0.7).long()
    data = Split(x[:64], y[:64], x[64:], y[64:])
    models = [nn.Sequential(GRKANLinear(8, 16, init="identity"), GRKANLinear(16, 2)) for _ in range(2)]
    groups = [[{"params": list(m.parameters()), "lr": 0.02}] for m in models]
    loss = train_many(models, groups, data, epochs=40, batch_size=32, optimizer="adamw")["loss"]
    assert (loss[:, -2:].mean(1) < 0.3 * loss[:, 0]).all()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GroupRational(10, 4), ValueError, "groups must be a divisor of dim = 10, got 4"),
        (lambda: GroupRational(0), ValueError, "dim must be an integer of at least 1, got 0"),
        (
            lambda: GroupRational(8, init="sine"),
            ValueError,
            "init must be one of 'identity', 'swish', 'gelu', 'relu', got 'sine'",
        ),
        (lambda: GroupRational(8, variant="C"), ValueError, "variant must be one of 'A', 'B', got 'C'"),
        (
            lambda: GroupRational(8, init="relu", variant="B"),
            ValueError,
            "init must have a fit for variant 'B', got 'relu'",
        ),
        (
            lambda: GroupRational(8, order=(3, 2)),
            ValueError,
            r"order must be at least \(5, 4\) for init 'swish', got \(3, 2\)",
        ),
        (lambda: GroupRational(8)(torch.randn(2, 16)), ValueError, r"x must have shape \(\.\.\., 8\), got \(2, 16\)"),
        (lambda: GroupRational(8)(torch.ones(2, 8, dtype=torch.int64)), TypeError, "x must have a real"),
        (lambda: GRKANLinear(8, 0), ValueError, "out_features must be an integer of at least 1, got 0"),
        (
            lambda: rational_gain(torch.ones(1, 2), torch.ones(1, 1), "a"),
            ValueError,
            "variant must be one of 'A', 'B', got 'a'",
        ),
        (lambda: rational_gain(torch.ones(2), torch.ones(1, 1)), ValueError, r"expected \(groups, m \+ 1\)"),
    ],
)
def test_bad_input_raises(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_every_start_has_a_fit_for_variant_a():
    assert all("A" in fits for fits in START.values())
