import pytest
import torch
from torch import nn

from polylib.neurons import EvoNorm2d

S, B = ("S0", "S1", "S2"), ("B0", "B1", "B2")


def layer(variant, channels=6, **options):
    """A layer in float64 whose parameters are away from their initial values."""
    made = EvoNorm2d(channels, variant, **{"groups": 3} | options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(channels, generator=generator, dtype=torch.float64))
    return made


def inputs(n=4, channels=6, seed=0):
    return torch.randn(n, channels, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def one_channel(made, c, batch, own, group):
    """The formulas of the paper for the pixels of one channel of one image, without the affine part."""

    def std(t):
        return t.var(correction=0).add(made.eps).sqrt()

    def rms(t):
        return t.square().mean().add(made.eps).sqrt()

    match made.variant:
        case "B0":
            return own / torch.maximum(std(batch), made.v[c] * own + std(own))
        case "B1":
            return own / torch.maximum(std(batch), (own + 1) * rms(own))
        case "B2":
            return own / torch.maximum(std(batch), rms(own) - own)
        case "S0":
            return own * torch.sigmoid(made.v[c] * own) / std(group)
        case "S1":
            return own * torch.sigmoid(own) / std(group)
        case "S2":
            return own * torch.sigmoid(own) / rms(group)


def by_loops(made, x):
    y = torch.empty_like(x)
    size = made.num_features // made.groups
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            first = c // size * size
            f = one_channel(made, c, x[:, c], x[n, c], x[n, first : first + size])
            y[n, c] = f * made.weight[c] + made.bias[c]
    return y


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("variant", B + S)
def test_each_layer_is_its_formula(variant, eps):
    made, x = layer(variant, eps=eps), inputs()
    torch.testing.assert_close(made(x), by_loops(made, x))


@pytest.mark.parametrize("variant", B + S)
def test_gradients_flow_through_all_statistics(variant):
    made = layer(variant)
    x = inputs(2)[:, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(made, x)
    made(x).square().sum().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in made.parameters())


@pytest.mark.parametrize("variant", B + S)
def test_initial_values_and_parameters(variant):
    made = EvoNorm2d(32, variant)
    expected = {"weight": 1.0, "bias": 0.0} | ({"v": 1.0} if variant[1] == "0" else {})
    assert {name: parameter.unique().item() for name, parameter in made.named_parameters()} == expected
    assert {name: b.unique().item() for name, b in made.named_buffers()} == (
        {"running_var": 1.0} if variant[0] == "B" else {}
    )


@pytest.mark.parametrize("variant", S)
def test_s_layers_know_no_batch_and_no_mode(variant):
    made, x = layer(variant), inputs()
    torch.testing.assert_close(made(x)[:1], made(x[:1]), rtol=1e-12, atol=1e-12)
    trained = made(x)
    assert torch.equal(made.eval()(x), trained)


@pytest.mark.parametrize("variant", B)
def test_b_layers_mix_the_batch_in_training_and_not_in_evaluation(variant):
    made, x = layer(variant), inputs()
    assert not torch.allclose(made(x)[:1], made(x[:1]))
    made.eval()
    torch.testing.assert_close(made(x)[:1], made(x[:1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("unbiased", "correction"), [(False, 0), (True, 1)])
def test_running_variance(unbiased, correction):
    made, kept = layer("B0", momentum=0.2, unbiased=unbiased), torch.ones(6, dtype=torch.float64)
    for seed in range(3):
        x = inputs(seed=seed)
        made(x)
        kept = 0.8 * kept + 0.2 * x.var((0, 2, 3), correction=correction)
    torch.testing.assert_close(made.running_var, kept)
    made.eval()
    before = made.running_var.clone()
    y = made(x)
    assert torch.equal(made.running_var, before)
    instance = (x.var((2, 3), correction=0, keepdim=True) + made.eps).sqrt()
    batch = (kept + made.eps).sqrt().view(-1, 1, 1)
    right = made.v.view(-1, 1, 1) * x + instance  # the instance term comes from the input at hand
    expected = x / torch.maximum(batch, right) * made.weight.view(-1, 1, 1) + made.bias.view(-1, 1, 1)
    torch.testing.assert_close(y, expected)


def test_s0_with_a_steep_gate_is_relu_over_the_deviation():
    made, x = EvoNorm2d(6, groups=3).double(), inputs()
    with torch.no_grad():
        made.v.fill_(1e6)
    std = (x.unflatten(1, (3, 2)).var((2, 3, 4), correction=0) + made.eps).sqrt().repeat_interleave(2, 1)
    torch.testing.assert_close(made(x), x.relu() / std[..., None, None], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        made.v.zero_()
    torch.testing.assert_close(made(x), x / (2 * std[..., None, None]))


def test_s1_is_s0_with_v_one_and_s2_where_groups_have_mean_zero():
    x = inputs()
    x = (x.unflatten(1, (3, 2)) - x.unflatten(1, (3, 2)).mean((2, 3, 4), keepdim=True)).flatten(1, 2)
    s0, s1, s2 = (EvoNorm2d(6, variant, groups=3).double()(x) for variant in S)
    torch.testing.assert_close(s0, s1)
    torch.testing.assert_close(s1, s2)


def test_b0_does_not_see_the_scale_of_its_input_and_s0_does():
    x = inputs()
    b0, s0 = (layer(variant, eps=1e-12) for variant in ("B0", "S0"))
    torch.testing.assert_close(b0(7 * x), b0(x))
    assert not torch.allclose(s0(7 * x), s0(x), rtol=0.1)


@pytest.mark.parametrize("variant", B)
def test_the_denominator_of_a_b_layer_keeps_the_sign(variant):
    made = EvoNorm2d(6, variant).double()
    x = inputs()
    x[0] *= 30  # one sample far from the rest: its terms are negative in many places
    y = made(x)
    assert torch.equal(y.sign(), x.sign())


def test_without_activation_it_is_scale_and_shift():
    made, x = layer("B0", apply_act=False), inputs()
    assert {name for name, _ in made.named_parameters()} == {"weight", "bias"} and made.running_var is None
    torch.testing.assert_close(made(x), x * made.weight.view(-1, 1, 1) + made.bias.view(-1, 1, 1))


@pytest.mark.parametrize("variant", B + S)
def test_constant_input_gives_finite_values_and_gradients(variant):
    made, x = EvoNorm2d(6, variant, groups=3), torch.full((2, 6, 3, 3), 2.0, requires_grad=True)
    made(x).sum().backward()
    assert x.grad.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_it_learns_what_a_linear_network_can_not():
    torch.manual_seed(0)
    x = torch.randn(256, 1, 4, 4)
    labels = (x[:, 0, 0, 0] * x[:, 0, 3, 3] > 0).float()
    accuracy = {}
    for name, norm in {"S0": EvoNorm2d(16, groups=8), "B0": EvoNorm2d(16, "B0"), "none": nn.Identity()}.items():
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), norm, nn.Flatten(), nn.Linear(256, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], labels).backward()
            optimizer.step()
        accuracy[name] = ((model(x)[:, 0] > 0) == labels.bool()).float().mean().item()
    assert accuracy["none"] < 0.75 < 0.95 < min(accuracy["S0"], accuracy["B0"])


def test_state_dict_compile_and_channels_last():
    made, x = layer("S0"), inputs()
    twin = EvoNorm2d(6, groups=3).double()
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin(x), made(x))
    y = made(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, made(x))
    compiled = torch.compile(layer("B0"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer("B0")(x))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: EvoNorm2d(6, "S3"), ValueError, "variant must be one of 'B0', 'B1', 'B2', 'S0', 'S1', 'S2', got 'S3'"),
        (lambda: EvoNorm2d(0), ValueError, "num_features must be an integer of at least 1, got 0"),
        (lambda: EvoNorm2d(6, groups=4), ValueError, "groups must be a divisor of num_features = 6, got 4"),
        (lambda: EvoNorm2d(6), ValueError, "groups must be a divisor of num_features = 6, got 32"),
        (lambda: EvoNorm2d(6, groups=3, eps=0), ValueError, "eps must be a finite number above 0, got 0"),
        (lambda: EvoNorm2d(6, "B0", momentum=2), ValueError, "momentum must be a finite number from 0 to 1, got 2"),
        (
            lambda: EvoNorm2d(6, groups=3)(torch.zeros(6, 5, 5)),
            ValueError,
            r"x must have shape \(N, 6, H, W\), got \(6, 5, 5\)",
        ),
        (
            lambda: EvoNorm2d(6, groups=3)(torch.zeros(1, 5, 5, 5)),
            ValueError,
            r"x must have shape \(N, 6, H, W\), got \(1, 5, 5, 5\)",
        ),
        (lambda: EvoNorm2d(6, "B0")(torch.zeros(1, 6, 1, 1)), ValueError, "more than one value a channel"),
        (
            lambda: EvoNorm2d(6, "B0")(torch.zeros(1, 6, 5, 5).double()),
            TypeError,
            r"x must be torch\.float32, as the parameters, got torch\.float64",
        ),
    ],
)
def test_bad_input_raises(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("variant", S + B)
def test_half_precision_is_computed_in_float32(variant):
    torch.manual_seed(0)
    x = (300 * torch.randn(4, 8, 6, 6)).half()
    layer, half = EvoNorm2d(8, variant, groups=4), EvoNorm2d(8, variant, groups=4).half()
    expected = layer(x.float())
    torch.testing.assert_close(half(x).float(), expected, rtol=2e-3, atol=2e-3)
    if layer.running_var is not None:
        assert half.running_var.dtype is torch.float32 and half.weight.dtype is torch.float16
        torch.testing.assert_close(half.running_var, layer.running_var)
        torch.testing.assert_close(half.eval()(x).float(), layer.eval()(x.float()), rtol=2e-3, atol=2e-3)
        assert half.double().running_var.dtype is torch.float64


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", S + B)
def test_an_empty_batch_gives_an_empty_batch_and_leaves_the_statistics(variant):
    layer = EvoNorm2d(8, variant, groups=4)
    out = layer(torch.randn(0, 8, 6, 6))
    assert out.shape == (0, 8, 6, 6)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    if layer.running_var is not None:
        assert torch.equal(layer.running_var, torch.ones(8))
