import copy

import pytest
import torch

from polylib.quantization import (
    ActivationQuantizer,
    LSQQuantizer,
    QKReparamAttention,
    QuantizedAttention,
    StatsQuantizer,
    activation_quantizer,
    confidence_mask,
)


def twins(bits, seed=0):
    """Both attentions with the same latent weights."""
    torch.manual_seed(seed)
    plain, reparametrised = QuantizedAttention(8, 2, bits), QKReparamAttention(8, 2, bits)
    with torch.no_grad():
        reparametrised.query_weight.copy_(plain.query.weight)
        reparametrised.key_weight.copy_(plain.key.weight)
    for name in ("value", "output"):
        getattr(reparametrised, name).load_state_dict(getattr(plain, name).state_dict())
    return plain, reparametrised


def by_hand(attention, x):
    """Ordinary attention with two heads of width four."""
    q, k = x @ attention.query.weight.T, x @ attention.key.weight.T
    v, out = attention.value(x), []
    for part in (slice(0, 4), slice(4, 8)):
        p = (q[..., part] @ k[..., part].transpose(-2, -1) / 2).softmax(-1)
        out.append(p @ v[..., part])
    return attention.output(torch.cat(out, -1))


def test_in_full_precision_both_are_ordinary_attention():
    plain, reparametrised = twins(32)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(plain(x), by_hand(plain, x))
    torch.testing.assert_close(reparametrised(x), by_hand(plain, x), rtol=1e-5, atol=1e-5)


def test_at_many_bits_quantised_attention_is_near_and_at_few_it_is_not():
    x = torch.randn(3, 5, 8)
    for kind in range(2):
        exact = twins(32)[kind](x)
        errors = [(twins(bits)[kind](x) - exact).norm() / exact.norm() for bits in (2, 4, 8, 12)]
        assert errors[0] > errors[1] > errors[2] > errors[3]
        assert errors[0] > 0.1 and errors[3] < 0.03


def whole_numbers(attention):
    """The same layer with small whole weights: their products are exact, whichever way they are summed."""
    with torch.no_grad():
        for weight in (attention.query_weight, attention.key_weight):
            weight.copy_((weight * (4 / weight.abs().max())).round())
    return attention


def test_the_product_is_quantised_by_rows_and_gradients_reach_both_weights():
    attention = whole_numbers(twins(2)[1])
    q, k = attention.query_weight, attention.key_weight
    latent = torch.cat([q[:4].T @ k[:4], q[4:].T @ k[4:]])
    assert torch.equal(attention.product(), StatsQuantizer(2)(latent))
    cotangent = torch.randn(16, 8)
    gradients = torch.autograd.grad(attention.product(), (q, k), cotangent)
    expected = torch.autograd.grad(latent, (q, k), cotangent)
    torch.testing.assert_close(gradients, expected)


def test_the_boundary_range_gates_the_gradient_and_not_the_value():
    attention = whole_numbers(twins(2)[1])
    free = attention.product()
    attention.boundary_range = 0.1
    gated = attention.product()
    assert torch.equal(free, gated)
    q, k = attention.query_weight, attention.key_weight
    latent = torch.cat([q[:4].T @ k[:4], q[4:].T @ k[4:]])
    mask = confidence_mask(latent, 2, 0.1)
    cotangent = torch.randn(16, 8)
    expected = torch.autograd.grad(latent, q, mask * cotangent)
    torch.testing.assert_close(torch.autograd.grad(gated, q, cotangent), expected)


def test_steps_of_the_activations():
    attention = twins(3)[1]
    attention(torch.randn(4, 5, 8))
    sizes = {name: part.scale.numel() for name, part in attention.named_modules() if isinstance(part, LSQQuantizer)}
    assert sizes == {
        "input.quantizer": 5,
        "value_levels.quantizer": 8,  # one a channel
        "probability_levels": 5,
        "output_input.quantizer": 5,
        "product_levels": 10,  # one a token and head
    }


def test_shifts_start_at_zero_and_move_the_levels():
    x = torch.randn(4, 5, 6)
    quantizer = ActivationQuantizer(2, 6)
    y = quantizer(x)
    assert torch.equal(y, quantizer.quantizer(x))
    with torch.no_grad():
        quantizer.shift_out += 10
    assert torch.equal(quantizer(x), y + 10)
    quantizer(x).sum().backward()
    assert all(p.grad is not None for p in quantizer.parameters())
    assert isinstance(activation_quantizer(32, 6), torch.nn.Identity)


@pytest.mark.parametrize("kind", [0, 1])
def test_stacked(kind):
    x = torch.randn(3, 5, 8)
    models = [twins(3, seed)[kind] for seed in range(2)]
    for model in models:
        model(x)  # the steps take their first values
    parameters, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def loss(p, b):
        return torch.func.functional_call(skeleton, (p, b), (x,)).square().mean()

    together = torch.vmap(torch.func.grad(loss))(parameters, buffers)
    for k, model in enumerate(models):
        model(x).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][k], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [QuantizedAttention, QKReparamAttention])
def test_before_the_first_input(kind, tmp_path):
    attention, other = kind(8, 2, 4), kind(8, 2, 4)
    count = sum(p.numel() for p in attention.parameters())
    attention.share_memory()
    torch.save(attention.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state"))
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(attention(x), other(x))
    assert sum(p.numel() for p in attention.parameters()) > count
    fresh = kind(8, 2, 4)
    fresh.load_state_dict(attention.state_dict())
    torch.testing.assert_close(fresh(x), attention(x))


@pytest.mark.parametrize("kind", [QuantizedAttention, QKReparamAttention])
@pytest.mark.parametrize("first", [True, False])
def test_under_autocast(kind, first):
    torch.manual_seed(0)
    attention, x = kind(8, 2, 8), torch.randn(3, 5, 8)
    if not first:
        attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
        y.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in attention.parameters())
    torch.testing.assert_close(y.float(), attention(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", [QuantizedAttention, QKReparamAttention])
def test_another_length_or_width_is_refused_by_name(kind):
    attention = kind(8, 2, 4)
    attention(torch.randn(3, 5, 8))
    attention(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match=r"x must have 5 tokens, as the first input had.*got shape \(3, 6, 8\)"):
        attention(torch.randn(3, 6, 8))
    with pytest.raises(ValueError, match=r"x must have shape \(..., tokens, 8\), got \(3, 5, 7\)"):
        attention(torch.randn(3, 5, 7))
    exact = kind(8, 2, 32)
    assert exact(torch.randn(3, 5, 8)).shape == (3, 5, 8) and exact(torch.randn(3, 6, 8)).shape == (3, 6, 8)


def test_bad_input_raises():
    with pytest.raises(ValueError, match="dim must be a multiple of heads = 3, got 8"):
        QKReparamAttention(8, 3, 2)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 16, got 0"):
        QuantizedAttention(8, 2, 0)
