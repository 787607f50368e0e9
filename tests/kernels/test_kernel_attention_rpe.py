"""kernel_attention_rpe: both paths against sums written out pair by pair, gradients, limits, checks, cost."""

import itertools
from importlib import import_module

import pytest
import torch
from torch import nn

from polylib.kernels import kernel_attention_rpe

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CAUSAL = pytest.mark.parametrize("causal", [False, True])
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# B, H, n, m, d: one place; widths that leave the ends of tiles empty; more than one tile of queries and of keys.
SIZES = [(1, 1, 1, 1, 1), (2, 2, 5, 2, 3), (1, 1, 33, 17, 20), (1, 1, 70, 5, 7)]


def inputs(batch, heads, n, m, d, dtype=torch.float32, device="cpu", seed=0, width=1.0):
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.rand(batch, heads, n, m, generator=gen) + 0.1 for _ in range(2))
    v = torch.randn(batch, heads, n, d, generator=gen)
    bias = width * torch.randn(heads, 2 * n - 1, generator=gen)
    return [t.to(device, dtype) for t in (q, k, v, bias)]


def pair_by_pair(q, k, v, bias, causal):
    q, k, v, bias = (t.detach().double().cpu() for t in (q, k, v, bias))
    batch, heads, n, _ = q.shape
    out = torch.zeros_like(v)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        seen = range(i + 1) if causal else range(n)
        weights = torch.stack([q[b, h, i] @ k[b, h, j] * bias[h, j - i + n - 1].exp() for j in seen])
        out[b, h, i] = weights @ v[b, h, list(seen)] / weights.sum()
    return out


@BACKENDS
@DTYPES
@CAUSAL
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pair_by_pair(backend, dtype, causal, sizes, device):
    tensors = inputs(*sizes, dtype=dtype, device=device)
    z = kernel_attention_rpe(*tensors, causal, backend=backend)
    assert z.dtype == dtype
    expected = pair_by_pair(*tensors, causal)
    torch.testing.assert_close(z.double().cpu(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_by_hand(device):
    """Two places, of which the second weighs twice as much in each query by its distance, or not at all."""
    ones = torch.ones(1, 1, 2, 1, device=device)
    v = torch.tensor([0.0, 3.0], device=device).view(1, 1, 2, 1)
    bias = torch.tensor([[0.0, 0.0, 2.0]], device=device).log1p()  # one place behind: weight 3
    for backend in ("triton", "reference"):
        z = kernel_attention_rpe(ones, ones, v, bias, backend=backend).flatten()
        torch.testing.assert_close(z.cpu(), torch.tensor([9 / 4, 3 / 2]))
        z = kernel_attention_rpe(ones, ones, v, bias, causal=True, backend=backend).flatten()
        torch.testing.assert_close(z.cpu(), torch.tensor([0.0, 3 / 2]))


@BACKENDS
@CAUSAL
def test_exponentials_of_products_give_softmax(backend, causal, device):
    """With a feature for each key that is the exponential of a score, the weights are those of softmax with a bias."""
    gen = torch.Generator().manual_seed(0)
    scores, v = torch.randn(2, 2, 9, 9, generator=gen).to(device), torch.randn(2, 2, 9, 4, generator=gen).to(device)
    bias = torch.randn(2, 17, generator=gen).to(device)
    keys = torch.eye(9, device=device).expand(2, 2, 9, 9)
    by_lag = bias[:, torch.arange(9) - torch.arange(9)[:, None] + 8]
    if causal:
        by_lag = by_lag.masked_fill(torch.ones(9, 9, dtype=torch.bool, device=device).triu(1), float("-inf"))
    expected = nn.functional.scaled_dot_product_attention(scores, keys, v, attn_mask=by_lag, scale=1.0)
    found = kernel_attention_rpe(scores.exp(), keys, v, bias, causal, backend=backend)
    torch.testing.assert_close(found, expected)


@BACKENDS
@DTYPES
@CAUSAL
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_gradients_against_float64(backend, dtype, causal, sizes, device):
    tensors = [t.requires_grad_() for t in inputs(*sizes, dtype=dtype, device=device)]
    z = kernel_attention_rpe(*tensors, causal, backend=backend)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    found = torch.autograd.grad(z, tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(kernel_attention_rpe(*wide, causal, backend="reference"), wide, grad.double())
    for g, wanted in zip(found, expected, strict=True):
        assert g.dtype == dtype
        assert (g.double() - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()


def test_the_gradients_are_the_same_each_time(device):
    tensors = [t.requires_grad_() for t in inputs(2, 1, 40, 4, 4, device=device)]
    first, second = (
        torch.autograd.grad(kernel_attention_rpe(*tensors, backend="triton").square().sum(), tensors) for _ in range(2)
    )
    assert all(torch.equal(g, again) for g, again in zip(first, second, strict=True))


@CAUSAL
def test_gradients_of_the_definition(causal):
    tensors = [t.double().requires_grad_() for t in inputs(1, 2, 4, 2, 2)]
    assert torch.autograd.gradcheck(lambda *t: kernel_attention_rpe(*t, causal), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: kernel_attention_rpe(*t, causal), tensors)


def test_the_kernels_are_differentiable_once(device):
    tensors = [t.requires_grad_() for t in inputs(1, 1, 3, 2, 2, device=device)]
    z = kernel_attention_rpe(*tensors, backend="triton").square().sum()
    (by_q,) = torch.autograd.grad(z, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_q.sum().backward()


@BACKENDS
@CAUSAL
def test_a_wide_bias_neither_overflows_nor_swallows_early_places(backend, causal, device):
    """Biases over 400 nats: exp(400) is no float32, and against the largest the others would all be zero."""
    q, k, v, bias = inputs(1, 2, 40, 3, 4, device=device, width=100.0)
    shifted = kernel_attention_rpe(q, k, v, bias + 1000, causal, backend=backend)
    expected = pair_by_pair(q, k, v, bias.double() - bias.double().amax(), causal)
    assert shifted.isfinite().all()
    found = kernel_attention_rpe(q, k, v, bias, causal, backend=backend)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifted, found, rtol=1e-3, atol=1e-3)  # 1000 leaves fewer digits


@BACKENDS
def test_causal_means_that_no_later_place_is_seen(backend, device):
    q, k, v, bias = inputs(1, 1, 50, 3, 4, device=device)
    before = kernel_attention_rpe(q, k, v, bias, True, backend=backend)
    k[:, :, 30:], v[:, :, 30:] = 7.0, -5.0
    bias[:, 50:] = 9.0
    after = kernel_attention_rpe(q, k, v, bias, True, backend=backend)
    torch.testing.assert_close(after[:, :, :30], before[:, :, :30])
    assert (after[:, :, 30:] - before[:, :, 30:]).abs().max() > 0.1


@BACKENDS
def test_keys_of_zeros_are_left_out_and_infinite_biases_are_masks(backend, device):
    q, k, v, bias = inputs(1, 1, 6, 3, 2, device=device)
    k[:, :, 4:] = 0
    expected = kernel_attention_rpe(q[:, :, :4], k[:, :, :4], v[:, :, :4], bias[:, 2:-2])
    torch.testing.assert_close(kernel_attention_rpe(q, k, v, bias, backend=backend)[:, :, :4], expected)
    bias[:, 5 + 2 :] = float("-inf")  # no more than one place behind
    z = kernel_attention_rpe(q, k, v, bias, backend=backend)
    torch.testing.assert_close(z[0, 0, 0], pair_by_pair(q[:, :, :2], k[:, :, :2], v[:, :, :2], bias[:, 4:7], False)
                               [0, 0, 0].to(z))  # fmt: skip
    k[:] = 0
    assert kernel_attention_rpe(q, k, v, bias, backend=backend).isnan().all()


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_what_is_not_finite_spoils_the_rows_that_meet_it(backend, device):
    q, k, v, bias = inputs(2, 1, 20, 3, 2, device=device)
    q[0, 0, 3, 1], k[1, 0, 10, 0] = float("nan"), float("nan")
    z = kernel_attention_rpe(q, k, v, bias, True, backend=backend)
    spoiled = z.isnan().all(-1).squeeze(1)
    assert spoiled[0].nonzero().flatten().tolist() == [3]
    assert spoiled[1].nonzero().flatten().tolist() == list(range(10, 20))
    assert z[~spoiled[:, None]].isfinite().all()


@BACKENDS
def test_any_strides(backend, device):
    q, k, v, bias = inputs(2, 3, 7, 4, 5, device=device)
    expected = kernel_attention_rpe(q, k, v, bias, backend="reference")
    by_place = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    for tensors in (by_place, turned):
        found = kernel_attention_rpe(*tensors, bias.T.contiguous().T, backend=backend)
        torch.testing.assert_close(found, expected)
    same = k[:1].expand_as(k)
    torch.testing.assert_close(
        kernel_attention_rpe(q, same, v, bias, backend=backend), kernel_attention_rpe(q, same.contiguous(), v, bias)
    )


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 2), (2, 2, 3, 2, 0)], ids=str)
def test_nothing_to_attend_from(backend, shape, device):
    tensors = [t.requires_grad_() for t in inputs(*shape, device=device)]
    z = kernel_attention_rpe(*tensors, backend=backend)
    assert z.shape == (*shape[:3], shape[4])
    assert all(not g.any() for g in torch.autograd.grad(z.sum(), tensors))
    q, v = torch.zeros(2, 1, 0, 3, device=device), torch.zeros(2, 1, 0, 4, device=device)
    assert kernel_attention_rpe(q, q, v, torch.zeros(1, 0, device=device), backend=backend).shape == (2, 1, 0, 4)


def test_autocast_vmap_and_compile(device):
    tensors = inputs(1, 2, 5, 3, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert kernel_attention_rpe(*tensors).dtype == torch.bfloat16
    half = [t.bfloat16() for t in tensors[:3]]
    for backend in ("triton", "reference"):  # a bias of more digits than the features keeps them
        bias = (tensors[3] + 100).requires_grad_()
        found = kernel_attention_rpe(*half, bias, backend=backend)
        lower = kernel_attention_rpe(*half, bias - 100, backend=backend)
        torch.testing.assert_close(found, lower, rtol=0.02, atol=0.02)
        assert torch.autograd.grad(found.float().square().sum(), bias)[0].dtype == torch.float32
    many = [torch.stack([t, 2 * t]) for t in tensors]
    found = torch.func.vmap(kernel_attention_rpe)(*many)
    torch.testing.assert_close(found[1], kernel_attention_rpe(*(2 * t for t in tensors)))
    torch.library.opcheck(
        torch.ops.polylib.kernel_attention_rpe.default, (*(t.requires_grad_() for t in tensors), True)
    )
    compiled = torch.compile(lambda *t: kernel_attention_rpe(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), kernel_attention_rpe(*tensors, backend="triton"))


def test_wider_than_the_kernels(device):
    tensors = inputs(1, 1, 3, 129, 2, device=device)
    torch.testing.assert_close(
        kernel_attention_rpe(*tensors).double().cpu(), pair_by_pair(*tensors, False), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match='backend="triton" needs m and d of at most 128, got 129 and 2'):
        kernel_attention_rpe(*tensors, backend="triton")


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.kernel_attention_rpe").cost
    forward = cost(2, 3, 10, 4, 5, torch.float32)
    assert forward.flops == 2 * 3 * 100 * 2 * (4 + 5)
    assert forward.bytes == 4 * (2 * 3 * 10 * (4 + 4 + 5 + 5 + 1) + 3 * 19)
    causal = cost(1, 1, 10, 4, 5, torch.bfloat16, causal=True, backward=True)
    assert causal.flops == 55 * 8 * 9
    assert causal.bytes == 2 * (2 * (10 * 13 + 19) + 10 * 5 * 2) + 4 * 10


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query_features": [1.0]}, TypeError, "query_features must be a torch.Tensor, got list"),
        ({"value": torch.zeros(1, 2, 3, 4).double()}, TypeError, "value must have the dtype of query_features"),
        (
            {"query_features": torch.zeros(2, 3, 4)},
            ValueError,
            r"query_features must have shape \(B, H, n, m\), m >= 1",
        ),
        ({"key_features": torch.zeros(1, 2, 4, 4)}, ValueError, r"key_features must have shape \(B, H, n, m\) = "),
        ({"value": torch.zeros(1, 1, 3, 4)}, ValueError, r"value must have shape \(B, H, n, d\) = \(1, 2, 3, 4\)"),
        ({"value": torch.tensor(1.0)}, ValueError, "value must have shape"),
        ({"bias": torch.zeros(2, 3)}, ValueError, r"bias must have shape \(H, 2n - 1\) = \(2, 5\), got \(2, 3\)"),
        ({"bias": torch.zeros(2, 5).long()}, TypeError, "bias must have a real floating-point dtype"),
        ({"bias": torch.zeros(2, 5, device="meta")}, ValueError, "bias must be on the device of query_features, cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    good = {name: torch.zeros(1, 2, 3, 4) for name in ("query_features", "key_features", "value")}
    with pytest.raises(error, match=message):
        kernel_attention_rpe(**good | {"bias": torch.zeros(2, 5)} | changed)


def test_bench_cases_run():
    ops = import_module("benchmarks.ops.kernel_attention_rpe")
    for _, _, costs, contestants in ops.cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for z in found.values():
            torch.testing.assert_close(z, found["reference"], rtol=1e-4, atol=1e-5)
