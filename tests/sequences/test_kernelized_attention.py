"""Kernelized attention with a relative bias: each way against the definition, limits, precision, and the layer."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from polylib.kernels.kernel_attention_rpe import kernel_attention_rpe, kernel_attention_rpe_reference
from polylib.lab import Stack
from polylib.sequences import (
    KernelizedSelfAttention,
    kernelized_attention,
    kernelized_attention_rpe,
    orthogonal_projections,
    positive_random_features,
    toeplitz_matmul,
)

WAYS = ("fft", "dense", "kernel", "auto")


def inputs(n=7, heads=2, d=4, width=3, m=5, batch=2):
    torch.manual_seed(0)
    q, k = torch.randn(2, batch, heads, n, d).double()
    v, bias = torch.randn(batch, heads, n, width).double(), torch.randn(heads, 2 * n - 1).double()
    return q, k, v, bias, orthogonal_projections(m, d).double()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_definition(n, normalize, causal):
    q, k, v, bias, proj = inputs(n)
    of_q, of_k = (positive_random_features(x, proj, normalize) for x in (q, k))
    wanted = torch.zeros_like(v)
    for b in range(2):
        for h in range(2):
            for i in range(n):
                top, bottom = 0, 0
                for j in range(i + 1 if causal else n):
                    weight = torch.exp(bias[h, j - i + n - 1]) * (of_q[b, h, i] @ of_k[b, h, j])
                    top, bottom = top + weight * v[b, h, j], bottom + weight
                wanted[b, h, i] = top / bottom
    for way in WAYS:
        torch.testing.assert_close(
            kernelized_attention_rpe(q, k, v, bias, proj, causal, way, normalize=normalize), wanted
        )
    torch.testing.assert_close(kernel_attention_rpe(of_q, of_k, v, bias, causal), wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("way", ["fft", "dense"])
def test_gradients(way, causal):
    q, k, v, bias, proj = inputs(4, heads=2, d=2, width=2, m=3, batch=1)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    for normalize in (True, False):

        def attention(*leaves, normalize=normalize):
            return kernelized_attention_rpe(*leaves, proj, causal, way, normalize=normalize)

        assert torch.autograd.gradcheck(attention, leaves)


def test_the_reference_twice_differentiable_and_under_func():
    q, k, v, bias, proj = inputs(3, heads=1, d=2, width=1, m=2, batch=1)
    of_q, of_k = (positive_random_features(x, proj) for x in (q, k))
    leaves = [x.requires_grad_() for x in (of_q, of_k, v, bias)]
    for causal in (True, False):
        options = (*leaves, causal)
        assert torch.autograd.gradgradcheck(lambda *x: kernel_attention_rpe_reference(*x), options)
    one = torch.func.vmap(kernel_attention_rpe, (0, 0, 0, None))
    stacked = [x.detach().expand(2, *x.shape) for x in leaves[:3]]
    torch.testing.assert_close(one(*stacked, bias.detach())[1], kernel_attention_rpe(*leaves).detach())


def test_many_blocks_of_features():
    q, k, v, bias, proj = inputs(300, d=8, width=31, m=70, batch=1)  # several transforms of 2 ** 18 numbers at most
    found = kernelized_attention_rpe(q, k, v, bias, proj, method="fft")
    torch.testing.assert_close(found, kernelized_attention_rpe(q, k, v, bias, proj, method="dense"))


@pytest.mark.parametrize("way", ["fft", "dense"])
def test_without_bias_it_is_linear_attention(way):
    q, k, v, bias, proj = inputs()
    of_q, of_k = (positive_random_features(x, proj) for x in (q, k))
    states = (of_k[..., :, None] * v[..., None, :]).cumsum(2), of_k.cumsum(2)
    wanted = torch.einsum("bhnm,bhnme->bhne", of_q, states[0]) / (of_q * states[1]).sum(-1, keepdim=True)
    torch.testing.assert_close(kernelized_attention_rpe(q, k, v, 0 * bias, proj, True, way), wanted)


def test_many_features_tend_to_softmax():
    q, k, v, bias, _ = inputs()
    unit = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    lag = torch.arange(7) - torch.arange(7)[:, None]
    weights = (unit[0] @ unit[1].mT + bias[:, lag + 6]).softmax(-1)
    errors = []
    for m in (100, 10_000):
        proj = orthogonal_projections(m, 4).double()
        errors.append((kernelized_attention_rpe(q, k, v, bias, proj) - weights @ v).abs().max())
    assert errors[1] < 0.05
    assert errors[1] < 0.4 * errors[0]


def test_a_constant_in_the_bias_changes_nothing():
    q, k, v, bias, proj = inputs()
    for way in ("fft", "dense"):
        wanted = kernelized_attention_rpe(q, k, v, bias, proj, method=way)
        for constant in (3.0, 1000.0, -1000.0):  # which exp would not survive
            moved = kernelized_attention_rpe(q, k, v, bias + constant, proj, method=way)
            torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-9)
    future = torch.arange(13) > 6
    wanted = kernelized_attention_rpe(q, k, v, bias, proj, True)
    torch.testing.assert_close(kernelized_attention_rpe(q, k, v, bias.masked_fill(future, 1e5), proj, True), wanted)


def test_large_queries_and_keys_without_normalisation():
    q, k, v, bias, proj = inputs()
    for way in ("fft", "dense"):
        found = kernelized_attention_rpe(30 * q, 30 * k, v, bias, proj, method=way, normalize=False)
        assert found.isfinite().all()
    long = [30 * q, 30 * k, v, bias, proj, True, "dense"]
    long = [part.float() if torch.is_tensor(part) else part for part in long]
    assert kernelized_attention_rpe(*long, normalize=False).isnan().any()  # early queries, whose keys all vanish
    assert kernelized_attention_rpe(*long, normalize=False, epsilon=1e-6).isfinite().all()


def test_why_causal_transforms_run_in_float64():
    """A bias that favours distant keys by 15 nats: the first queries' sums drown in the rounding of float32."""
    n, width = 512, 16
    q, k, v, _, proj = inputs(n, 1, 16, width, 16, 1)
    bias = torch.linspace(15, 0, n).double()
    bias = F.pad(bias, (0, n - 1))[None]
    exact = kernelized_attention_rpe(q, k, v, bias, proj, True, "dense")
    single = [x.float() for x in (q, k, v, bias, proj)]

    def error(found):
        return (found.double() - exact).abs().max()

    assert error(kernelized_attention_rpe(*single, True, "dense")) < 1e-4
    assert error(kernelized_attention_rpe(*single, True, "fft")) < 1e-4
    of_q, of_k = (positive_random_features(x, single[4]) for x in single[:2])
    outer = of_k[..., :, None] * F.pad(single[2], (0, 1), value=1.0)[..., None, :]
    lags = single[3].exp() * (torch.arange(2 * n - 1) < n)
    summed = toeplitz_matmul(lags, outer.flatten(-2)).unflatten(-1, (16, width + 1))
    both = torch.einsum("bhnm,bhnme->bhne", of_q, summed)
    assert error(both[..., :-1] / both[..., -1:]) > 0.05


def test_a_query_that_sees_nothing_gives_nan():
    features = torch.zeros(1, 1, 2, 3)
    assert kernel_attention_rpe(features, features, torch.ones(1, 1, 2, 1), torch.zeros(1, 3)).isnan().all()


@pytest.mark.parametrize("rpe", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["kernel", "not normalised", "softmax", "softmax, normalised"])
def test_the_layer_written_out(kind, causal, rpe):
    torch.manual_seed(0)
    options = {"num_features": None if "softmax" in kind else 5, "normalize": kind in ("kernel", "softmax, normalised")}
    layer = KernelizedSelfAttention(8, 2, 9, causal=causal, rpe=rpe, **options).double()
    if rpe:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 6, 8).double()
    q, k, v = F.linear(x, layer.inputs.weight, layer.inputs.bias).chunk(3, -1)
    wanted = torch.zeros(3, 6, 8).double()
    for h in range(2):
        own = [part[..., 4 * h : 4 * h + 4] for part in (q, k, v)]
        if options["normalize"]:
            own[:2] = (part / part.norm(dim=-1, keepdim=True) for part in own[:2])
        else:
            own[:2] = (part / 4**0.25 for part in own[:2])
        if "softmax" in kind:
            weights = (own[0] @ own[1].mT).exp()
        else:
            of_q, of_k = (positive_random_features(part, layer.projections, False) for part in own[:2])
            of_q, of_k = of_q / of_q.amax(-1, keepdim=True), of_k / of_k.amax((-2, -1), keepdim=True)
            epsilon = 0 if kind == "kernel" else 1e-6
            weights = (of_q + epsilon) @ (of_k + epsilon).mT
        if rpe:
            lag = torch.arange(6) - torch.arange(6)[:, None]
            weights = weights * layer.bias[h, lag + 8].exp()
        weights = weights.tril() if causal else weights
        wanted[..., 4 * h : 4 * h + 4] = weights @ own[2] / weights.sum(-1, keepdim=True)
    wanted = F.linear(wanted, layer.output.weight, layer.output.bias)
    torch.testing.assert_close(layer(x), wanted)
    if "softmax" not in kind:
        layer.method = "fft"
        torch.testing.assert_close(layer(x), wanted)


def test_the_layer_has_the_same_parameters_with_and_without_features():
    own = [dict(KernelizedSelfAttention(8, 2, 9, m).named_parameters()) for m in (16, None)]
    assert [p.shape for p in own[0].values()] == [p.shape for p in own[1].values()]
    assert (own[0]["bias"] == 0).all()
    assert KernelizedSelfAttention(8, 2, 9, rpe=False).bias is None


@pytest.mark.parametrize("features", [8, None])
def test_a_stack_of_layers_learns_to_shift(features):
    torch.manual_seed(0)
    layers = [KernelizedSelfAttention(8, 2, 12, features, causal=True) for _ in range(2)]
    stack = Stack(layers, 0.03, optimizer="adam")
    losses = []
    for _ in range(80):
        x = torch.randn(16, 12, 8)
        losses.append(stack.step(lambda m, x: (m(x)[:, 1:] - x[:, :-1]).square().mean(), x, shared=True))
    assert (losses[-1] < 0.5).all()  # which takes the bias: without positions the mean is the best guess
    stack.write_back()
    assert (layers[0].bias[:, 10] > layers[0].bias[:, :10].amax(-1)).all()


def test_automatic_choice(monkeypatch):
    ways = []

    def found(way):
        return lambda *_, **__: ways.append(way) or torch.zeros(1)

    monkeypatch.setattr(kernelized_attention, "_by_fft", found("fft"))
    monkeypatch.setattr(kernelized_attention, "kernel_attention_rpe", found("dense"))
    for n in (8, 5000):
        kernelized_attention_rpe(*inputs(n, 1, 4, 4, 4, 1))
    assert ways == ["dense", "fft"]


def test_bad_input():
    q, k, v, bias, proj = inputs()
    for name, given in {
        "q": {"q": q[0]},
        "k": {"k": k[:, :, 1:]},
        "v": {"v": v[:, :1]},
        "bias": {"bias": bias[:, 1:]},
        "proj": {"proj": proj[:, 1:]},
    }.items():
        arguments = {"q": q, "k": k, "v": v, "bias": bias, "proj": proj, **given}
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            kernelized_attention_rpe(**arguments)
    with pytest.raises(ValueError, match=r"proj must have shape .* with m of at least 1"):
        kernelized_attention_rpe(q, k, v, bias, proj[:0])
    with pytest.raises(ValueError, match=r"q must have shape .* n of at least 1"):
        kernelized_attention_rpe(q[:, :, :0], k[:, :, :0], v[:, :, :0], bias[:, :0], proj)
    with pytest.raises(ValueError, match="epsilon must be a finite number"):
        kernelized_attention_rpe(q, k, v, bias, proj, epsilon=-1.0)
    with pytest.raises(ValueError, match="method must be one of"):
        kernelized_attention_rpe(q, k, v, bias, proj, method="flash")
    with pytest.raises(TypeError, match="dtype of v must be"):
        kernelized_attention_rpe(q, k, v.long(), bias, proj)
    with pytest.raises(ValueError, match="d_model must be a multiple of n_heads"):
        KernelizedSelfAttention(8, 3, 9)
    with pytest.raises(ValueError, match="num_features must be an integer"):
        KernelizedSelfAttention(8, 2, 9, 0)
    for options, words in (({"max_len": 0}, "max_len"), ({"method": "x"}, "method")):
        with pytest.raises(ValueError, match=f"{words} must be"):
            KernelizedSelfAttention(**{"d_model": 8, "n_heads": 2, "max_len": 9, **options})
    for shape in ((2, 10, 8), (2, 0, 8), (2, 9, 7), (9, 8)):
        with pytest.raises(ValueError, match="x must have shape"):
            KernelizedSelfAttention(8, 2, 9)(torch.zeros(shape))


def test_half_precision():
    q, k, v, bias, proj = inputs()
    wanted = kernelized_attention_rpe(q, k, v, bias, proj)
    half = [x.bfloat16() for x in (q, k, v)]
    for way in ("fft", "dense"):
        found = kernelized_attention_rpe(*half, bias.float(), proj.float(), method=way)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03)
    found = kernelized_attention_rpe(*half, bias.float(), proj.float(), method="kernel")
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.03)
    layer, x = KernelizedSelfAttention(8, 2, 9, 64), torch.randn(2, 9, 8)
    with torch.autocast("cpu"):
        found = layer(x)
    torch.testing.assert_close(found.float(), layer(x), rtol=0.05, atol=math.sqrt(0.001))


def test_float16_features_do_not_overflow():
    """Aligned with a long w, a feature is e^11: the product of two is beyond 65,504."""
    w = torch.zeros(1, 128)
    w[0, 0] = 11.5
    q = torch.randn(1, 1, 5, 128) * 0.01 + w / 11.5
    v, bias = torch.randn(1, 1, 5, 3), torch.randn(1, 9)
    wanted = kernelized_attention_rpe(q, q, v, bias, w)
    seen = []

    def spy(of_q, of_k, *rest):
        seen.append((of_q @ of_k.mT).amax())
        return kernel_attention_rpe(of_q, of_k, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernelized_attention, "kernel_attention_rpe", spy)
        found = kernelized_attention_rpe(q.half(), q.half(), v.half(), bias, w, method="kernel")
    assert seen[0] < 2
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_on_the_kernel(monkeypatch, device, causal):
    """On the GPU by itself, and elsewhere through the interpreter: the same as the n x n form, with gradients."""
    monkeypatch.setattr(kernelized_attention, "kernel_attention_rpe", partial(kernel_attention_rpe, backend="triton"))
    torch.manual_seed(0)
    layer = KernelizedSelfAttention(8, 2, 19, 5, causal).to(device)
    torch.nn.init.normal_(layer.bias)
    x, g = torch.randn(2, 2, 17, 8, device=device)
    grads, found = {}, {}
    for way in ("kernel", "fft"):
        layer.method = way
        found[way] = layer(x)
        grads[way] = torch.autograd.grad(found[way], list(layer.parameters()), g)
    torch.testing.assert_close(found["kernel"], found["fft"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads["kernel"], grads["fft"], rtol=1e-3, atol=1e-4)
