"""The inferred tensors and the attention written out, caches, what later tokens change, the regularizer, bad input."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from polylib.sequences import (
    MetricLearner,
    PLDRDecoder,
    PowerLawGraphAttention,
    SwiGLU,
    bilinear_attention,
    dag_regularizer,
    rotate_by_position,
)


def attention(seed=0, **options):
    torch.manual_seed(seed)
    return PowerLawGraphAttention(12, 3, n_res_units=2, n_dense=2, d_metric=5, **options).double()


def decoder(seed=0):
    torch.manual_seed(seed)
    return PLDRDecoder(11, 12, 2, 3, n_res_units=1, n_dense=1, d_metric=5).double().eval()


def words(*shape, seed=1):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def heads(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rotation_is_a_product_of_complex_numbers():
    x = heads(2, 5, 6)
    pairs = torch.view_as_complex(x.reshape(2, 5, 3, 2))
    rates = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = pairs * torch.exp(1j * torch.arange(4, 9, dtype=torch.float64)[:, None] * rates)
    torch.testing.assert_close(rotate_by_position(x, 4), torch.view_as_real(turned).flatten(-2))


def test_products_of_rotated_vectors_know_the_distance_alone():
    q, k = heads(2, 1, 8)
    near = rotate_by_position(q, 9) @ rotate_by_position(k, 3).T
    torch.testing.assert_close(rotate_by_position(q, 106) @ rotate_by_position(k, 100).T, near)
    assert (near - q @ k.T).abs() > 0.01


def test_the_tensors_written_out():
    torch.manual_seed(0)
    made = MetricLearner(3, 4, n_res_units=2, n_dense=2, d_metric=5).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    q = heads(2, 3, 7, 4)
    found = made(q)
    number = {name: value.detach().numpy() for name, value in made.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * number[f"{name}.weight"] + number[f"{name}.bias"]

    def linear(x, name):
        return x @ number[f"{name}.weight"].T + number[f"{name}.bias"]

    def dense(x, name):
        gate = linear(x, f"{name}.gate")
        return linear(gate / (1 + np.exp(-gate)) * linear(x, f"{name}.value"), f"{name}.output")

    for batch in range(2):
        for head in range(3):
            rows = q[batch, head].numpy()
            A = norm(sum(np.outer(row, row) for row in rows), "norm")
            for unit in range(2):
                A = norm(A + dense(dense(A, f"units.{unit}.0"), f"units.{unit}.1"), f"norms.{unit}")
            x = number["W"][head] @ A + number["b"][head]
            A_LM = x**2 / (1 + np.exp(-x)) + 1e-9
            A_P = A_LM ** number["p"][head]
            G = number["a"][head] @ A_P + number["b_a"][head]
            for given, expected in zip(found, (A, A_LM, A_P, G), strict=True):
                np.testing.assert_allclose(given[batch, head].detach(), expected, rtol=1e-9)


def test_initial_values():
    torch.manual_seed(0)
    made = PowerLawGraphAttention(64, 2, 1, 2, 40)
    metric, bound = made.metric, math.sqrt(6 / 128)
    for layer in (made.query, made.key, made.output):
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert (layer.bias == 0).all()
    assert 0.9 / 8 < made.value.weight.abs().max() <= 1 / 8
    assert made.value.bias.abs().max() > 0.05
    for value in (metric.W, metric.p, metric.a):
        assert value.std().item() == pytest.approx(math.sqrt(2 / (32 * 32 + 2 * 32)), rel=0.1)
    assert (metric.b == 0).all()
    assert (metric.b_a == 0).all()
    assert made.metric.units[0][0].gate.weight.abs().max() <= math.sqrt(6 / 72)


def test_metric_is_positive_and_gradients_are_finite_at_zero():
    torch.manual_seed(0)
    made = MetricLearner(2, 4, 1, 1, 5)
    with torch.no_grad():
        made.W.zero_()  # then A_LM is 1e-9 everywhere
    found = made(torch.randn(1, 2, 3, 4))
    torch.testing.assert_close(found.A_LM, torch.full_like(found.A_LM, 1e-9))
    found.G_LM.sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_the_identity_is_ordinary_attention(causal):
    q, k, v = heads(3, 2, 3, 5, 4)
    y = bilinear_attention(q, k, v, torch.eye(4).double().expand(3, 4, 4), causal)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def test_a_form_acts_on_the_queries_from_the_right():
    q, k, v = heads(3, 2, 3, 5, 4)
    G = heads(2, 3, 4, 4, seed=3)
    y = bilinear_attention(q, k, v, G)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q @ G, k, v, is_causal=True))
    assert (y - bilinear_attention(q, k, v, G.mT)).abs().max() > 0.01
    torch.testing.assert_close(bilinear_attention(q, k, v, G[0])[0], y[0])


def test_queries_are_the_last_positions():
    q, k, v = heads(3, 2, 3, 6, 4)
    G = heads(3, 4, 4, seed=3)
    torch.testing.assert_close(bilinear_attention(q[:, :, 4:], k, v, G), bilinear_attention(q, k, v, G)[:, :, 4:])


def test_gradients_of_bilinear_attention():
    inputs = [heads(1, 2, 3, 2, seed=s).requires_grad_() for s in range(3)]
    assert torch.autograd.gradcheck(bilinear_attention, (*inputs, heads(2, 2, 2, seed=9).requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_attend(dtype):
    q, k, v, G = (t.to(dtype) for t in (*heads(3, 2, 3, 5, 4), heads(3, 4, 4)))
    found = bilinear_attention(q, k, v, G)
    assert found.dtype == dtype
    exact = bilinear_attention(*(t.double() for t in (q, k, v, G)))
    torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=0.1)


def test_no_score_is_too_large_for_the_mask():
    q, k, v = heads(3, 1, 2, 5, 4)
    k = k.clone()
    k[:, :, -1] = 1e12 * q[:, :, 0]
    eye = torch.eye(4).double().expand(2, 4, 4)
    torch.testing.assert_close(
        bilinear_attention(q, k, v, eye)[:, :, :-1], bilinear_attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], eye)
    )


def test_layer_written_out():
    made, x = attention(), heads(2, 5, 12)
    q, k, v = (f(x).view(2, 5, 3, 4).transpose(1, 2) for f in (made.query, made.key, made.value))
    q, k = rotate_by_position(q), rotate_by_position(k)
    y = F.scaled_dot_product_attention(q @ made.metric(q).G_LM, k, v, is_causal=True)
    torch.testing.assert_close(made(x)[0], made.output(y.transpose(1, 2).reshape(2, 5, 12)))


def test_without_a_mask_the_first_token_sees_the_last():
    x = heads(1, 5, 12)
    G = heads(3, 4, 4, seed=3)
    moved = x.clone()
    moved[:, -1] += 1
    for causal, sees in ((True, False), (False, True)):
        layer = attention(causal=causal)
        change = (layer(moved, g_cache=G)[0] - layer(x, g_cache=G)[0])[:, :-1].abs().max()
        assert (change > 1e-3) == sees
        assert sees or change < 1e-12


def test_an_inferred_form_leaks_what_comes():
    made, x = attention(), heads(1, 5, 12)
    moved = x.clone()
    moved[:, -1] += 1
    assert (made(moved)[0] - made(x)[0])[:, :-1].abs().max() > 1e-4


def test_the_chain_of_tensors_ignores_keys_and_values():
    made, x = attention(), heads(1, 5, 12)
    G = made(x)[2].G_LM
    with torch.no_grad():
        made.key.weight.mul_(2)
        made.value.weight.mul_(2)
    torch.testing.assert_close(made(x)[2].G_LM, G)


def test_decoder_leaks_until_its_form_is_frozen():
    made, text = decoder(), words(2, 9)
    other = text.clone()
    other[:, -1] = (text[:, -1] + 1) % 11
    change = (made(text) - made(other))[:, :-1].abs().max()
    assert change > 1e-6
    made.freeze_metric(words(6, seed=5))
    assert (made(text) - made(other))[:, :-1].abs().max() < 1e-12
    made.unfreeze_metric()
    torch.testing.assert_close((made(text) - made(other))[:, :-1].abs().max(), change)


def test_frozen_form_is_that_of_the_prompt_and_not_in_the_state():
    made, prompt = decoder(), words(6, seed=5)
    keys = set(made.state_dict())
    made.freeze_metric(prompt)
    torch.testing.assert_close(made(prompt[None]), decoder()(prompt[None]))
    assert made.frozen.shape == (2, 3, 4, 4)
    assert set(made.state_dict()) == keys


def test_one_token_at_a_time_with_the_caches():
    made, text = decoder(), words(2, 9)
    forms = made.infer_metric(text[:, :4])
    whole = made(text, forms)
    for keep in (True, False):
        logits, caches, found = made.run(text[:, :4])
        parts = [logits]
        for t in range(4, 9):
            given = torch.stack([own.G_LM for own in found]) if keep else None
            logits, caches, found = made.run(text[:, t : t + 1], caches, given)
            assert all((own.A_LM is None) == keep for own in found)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert (whole - made(text)).abs().max() > 1e-6  # of the whole text another form is inferred


def test_caches_generate_the_same_tokens():
    made, prompt = decoder(), words(3, 4)
    texts = [made.generate(prompt, 12, cache) for cache in ("kv", "kvg")]
    assert torch.equal(*texts)
    assert torch.equal(texts[0][:, :4], prompt)
    forms = made.infer_metric(prompt)
    text = prompt
    for _ in range(12):
        text = torch.cat([text, made(text, forms)[:, -1:].argmax(-1)], 1)
    assert torch.equal(texts[0], text)
    assert torch.equal(made.generate(prompt, 0), prompt)


def test_generation_without_caches_infers_anew():
    made, prompt = decoder(), words(3, 4)
    text = prompt
    for _ in range(5):
        text = torch.cat([text, made(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.generate(prompt, 5, "none"), text)
    made.freeze_metric(prompt[0])
    assert torch.equal(made.generate(prompt, 5, "none"), made.generate(prompt, 5))


def test_unused_network_gets_no_gradient_with_a_given_form():
    made = decoder()
    made(words(2, 5), heads(2, 3, 4, 4)).sum().backward()
    assert all(p.grad is None for p in made.blocks[0].attention.metric.parameters())
    assert made.blocks[0].attention.query.weight.grad.abs().max() > 0


def test_regularizer_is_that_of_its_definition():
    M = heads(2, 3, 4, 4, seed=3)
    each = [abs(math.log(np.trace(scipy.linalg.expm((m * m).numpy())) / 4)) for m in M.flatten(0, 1)]
    assert dag_regularizer(M).item() == pytest.approx(np.mean(each))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regularizer_of_half_precisions_is_computed_in_float32(dtype):
    M = (0.3 * torch.eye(5)).to(dtype)
    torch.testing.assert_close(dag_regularizer(M), dag_regularizer(M.float()))


def test_regularizer_is_zero_without_cycles_alone():
    acyclic = heads(5, 5).triu(1)[torch.randperm(5)]
    order = torch.randperm(5)
    acyclic = heads(5, 5).triu(1)[order][:, order]
    assert dag_regularizer(acyclic).item() == pytest.approx(0, abs=1e-12)
    acyclic[order.argsort()[3], order.argsort()[1]] = 1.0  # closes a cycle
    assert dag_regularizer(acyclic) > 1e-3


def test_bad_input_is_refused():
    for options, name in (((12, 5), "d_model"), ((9, 3), "d_model / n_heads"), ((12, 0), "n_heads")):
        with pytest.raises(ValueError, match=name):
            PowerLawGraphAttention(*options, 1, 1, 4)
    with pytest.raises(ValueError, match="n_res_units"):
        MetricLearner(2, 4, -1, 1, 4)
    with pytest.raises(ValueError, match="d_hidden"):
        SwiGLU(2, 0, 2)
    with pytest.raises(ValueError, match="d, d"):
        dag_regularizer(torch.randn(3, 4))
    with pytest.raises(TypeError, match="floating"):
        dag_regularizer(torch.ones(3, 3).long())
    with pytest.raises(ValueError, match="even d"):
        rotate_by_position(torch.randn(4, 3))
    with pytest.raises(TypeError, match="dtype of x must be"):
        rotate_by_position(torch.ones(4, 2).long())
    q = torch.randn(1, 2, 4, 4)
    eye = torch.eye(4).expand(2, 4, 4)
    with pytest.raises(ValueError, match="at least n"):
        bilinear_attention(q, q[:, :, :3], q[:, :, :3], eye)
    with pytest.raises(ValueError, match="G must"):
        bilinear_attention(q, q, q, eye[0])
    with pytest.raises(ValueError, match="v must"):
        bilinear_attention(q, q, q[:, :, :3], eye)
    for at, name in enumerate("qkvG"):
        given = [q, q, q, eye]
        given[at] = given[at].long()
        with pytest.raises(TypeError, match=f"dtype of {name} must be"):
            bilinear_attention(*given)
    with pytest.raises(ValueError, match="x must"):
        attention()(heads(2, 5, 11))


def test_bad_input_of_a_decoder_is_refused():
    made, text = decoder(), words(2, 5)
    with pytest.raises(ValueError, match="tokens"):
        made(text[0])
    with pytest.raises(ValueError, match="g_cache"):
        made(text, heads(3, 3, 4, 4))
    with pytest.raises(ValueError, match="prompt"):
        made.freeze_metric(text)
    with pytest.raises(ValueError, match="cache must be"):
        made.generate(text, 2, "g")
    with pytest.raises(ValueError, match="steps"):
        made.generate(text, -1)
    with pytest.raises(TypeError, match=r"tokens must be of dtype .* got torch.uint8"):
        made.generate(text.byte(), 2)
    with pytest.raises(ValueError, match=r"kv_cache.k must have shape \(1, 3, n, 4\), as x, got \(2, 3, 5, 4\)"):
        made.run(text[:1, :1], made.run(text)[1])
    caches = made.run(text, g_cache=heads(2, 3, 4, 4))[1]
    with pytest.raises(ValueError, match="g_cache must be given"):
        made.run(text, caches)
