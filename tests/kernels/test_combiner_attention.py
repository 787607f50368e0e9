"""combiner_attention: both paths against the formulas query by query, gradients, limits, checks, cost."""

import itertools
import math
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from polylib.kernels import combiner_attention

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
CAUSAL = pytest.mark.parametrize("causal", [False, True])
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# B, H, L, d, e, span: one place; blocks shorter than a tile and longer, across borders of tiles; many of both.
SIZES = [(1, 1, 1, 1, 1, 1), (2, 2, 6, 2, 3, 2), (1, 1, 35, 17, 20, 5), (1, 1, 72, 5, 7, 24)]


def inputs(batch, heads, length, d, e, dtype=torch.float32, device="cpu", seed=0, size=1.0):
    gen = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(batch, heads, length, width, generator=gen)).to(device, dtype) for width in (d, d, e)]


def query_by_query(q, k, v, span, causal):
    """The paper's formulas: p(j | region), then one softmax over own block and regions."""
    q, k, v = (t.detach().double().cpu() for t in (q, k, v))
    scale, out = 1 / math.sqrt(q.shape[-1]), torch.zeros_like(v)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        keys, values = [], []
        for start in range(0, q.shape[2], span):
            region = slice(start, start + span)
            top = q[b, h, region].max(0).values
            keys.append(k[b, h, region].max(0).values)
            values.append((k[b, h, region] @ top * scale).softmax(0) @ v[b, h, region])
        for i in range(q.shape[2]):
            own = i // span
            near = list(range(own * span, i + 1 if causal else (own + 1) * span))
            far = [r for r in range(len(keys)) if (r < own if causal else r != own)]
            all_keys = torch.stack([k[b, h, j] for j in near] + [keys[r] for r in far])
            all_values = torch.stack([v[b, h, j] for j in near] + [values[r] for r in far])
            out[b, h, i] = (all_keys @ q[b, h, i] * scale).softmax(0) @ all_values
    return out


@BACKENDS
@DTYPES
@CAUSAL
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_query_by_query(backend, dtype, causal, sizes, device):
    *shape, span = sizes
    tensors = inputs(*shape, dtype=dtype, device=device)
    out = combiner_attention(*tensors, span, causal, backend=backend)
    assert out.dtype == dtype
    expected = query_by_query(*tensors, span, causal)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@BACKENDS
@CAUSAL
@pytest.mark.parametrize("span", [1, 40])
def test_one_place_a_block_or_one_block_is_full_attention(backend, causal, span, device):
    tensors = inputs(1, 1, 40, 8, 6, device=device)
    expected = nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
    torch.testing.assert_close(combiner_attention(*tensors, span, causal, backend=backend), expected)


@BACKENDS
@DTYPES
@CAUSAL
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_gradients_against_float64(backend, dtype, causal, sizes, device):
    *shape, span = sizes
    tensors = [t.requires_grad_() for t in inputs(*shape, dtype=dtype, device=device)]
    out = combiner_attention(*tensors, span, causal, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(combiner_attention(*wide, span, causal, backend="reference"), wide, grad.double())
    for g, wanted in zip(found, expected, strict=True):
        assert g.dtype == dtype
        assert (g.double() - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()


@BACKENDS
def test_equal_maxima_share_their_gradient(backend, device):
    """All places of the first block are the same: each gets the same part of what comes through its summary."""
    q, k, v = inputs(1, 1, 6, 2, 2, device=device)
    for t in (q, k, v):
        t[:, :, :3] = t[:, :, :1].clone()
        t.requires_grad_()
    out = combiner_attention(q, k, v, 3, backend=backend)
    for g in torch.autograd.grad(out[:, :, 3:].square().sum(), (q, k, v)):
        torch.testing.assert_close(g[0, 0, :3], g[0, 0, :1].expand(3, 2))


@CAUSAL
def test_gradients_of_the_definition(causal):
    tensors = [t.double().requires_grad_() for t in inputs(1, 1, 6, 2, 2)]
    assert torch.autograd.gradcheck(lambda *t: combiner_attention(*t, 2, causal), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: combiner_attention(*t, 2, causal), tensors)


def test_the_kernels_are_differentiable_once_and_the_same_each_time(device):
    tensors = [t.requires_grad_() for t in inputs(1, 1, 40, 4, 4, device=device)]
    first, second = (
        torch.autograd.grad(combiner_attention(*tensors, 8, backend="triton").square().sum(), tensors, create_graph=c)
        for c in (False, True)
    )
    assert all(torch.equal(g, again) for g, again in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="differentiable once"):
        second[0].sum().backward()


@BACKENDS
def test_causal_means_that_no_later_place_is_seen(backend, device):
    """Neither directly nor through the summary of a block that has one of them."""
    q, k, v = inputs(1, 1, 40, 3, 4, device=device)
    before = combiner_attention(q, k, v, 8, backend=backend)
    for t in (q, k, v):
        t[:, :, 21:] = 9.0
    after = combiner_attention(q, k, v, 8, backend=backend)
    torch.testing.assert_close(after[:, :, :21], before[:, :, :21])
    assert (after[:, :, 21:] - before[:, :, 21:]).abs().max() > 0.1


@BACKENDS
def test_large_scores_and_a_constant_on_all_keys(backend, device):
    tensors = inputs(1, 1, 24, 4, 3, device=device, size=30.0)
    out = combiner_attention(*tensors, 6, backend=backend)
    torch.testing.assert_close(out.double().cpu(), query_by_query(*tensors, 6, True), rtol=1e-3, atol=1e-2)
    q, k, v = inputs(1, 1, 24, 4, 3, device=device)
    moved = combiner_attention(q, k + torch.tensor([3.0, 0, -2, 1], device=device), v, 6, backend=backend)
    torch.testing.assert_close(moved, combiner_attention(q, k, v, 6), rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_spoils_the_rows_that_meet_it(backend, which, device):
    tensors = inputs(1, 1, 16, 3, 2, device=device)
    tensors[which][0, 0, 6] = float("nan")
    spoiled = combiner_attention(*tensors, 4, backend=backend).isnan().all(-1).flatten()
    assert spoiled[8:].all() and spoiled[6]
    if which:
        assert spoiled[7]


@BACKENDS
def test_any_strides(backend, device):
    q, k, v = inputs(2, 3, 12, 4, 5, device=device)
    expected = combiner_attention(q, k, v, 3, backend="reference")
    by_place = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    turned = [t.mT.contiguous().mT for t in (q, k, v)]
    for tensors in (by_place, turned):
        torch.testing.assert_close(combiner_attention(*tensors, 3, backend=backend), expected)
    same = k[:1].expand_as(k)
    torch.testing.assert_close(
        combiner_attention(q, same, v, 3, backend=backend), combiner_attention(q, same.contiguous(), v, 3)
    )


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 2, 6, 2, 2), (2, 2, 6, 2, 0), (2, 1, 0, 2, 2)], ids=str)
def test_nothing_to_attend_from(backend, shape, device):
    tensors = [t.requires_grad_() for t in inputs(*shape, device=device)]
    out = combiner_attention(*tensors, 3, backend=backend)
    assert out.shape == (*shape[:3], shape[4])
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), tensors))


def test_autocast_vmap_and_compile(device):
    tensors = inputs(1, 2, 6, 3, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert combiner_attention(*tensors, 3).dtype == torch.bfloat16
    many = [torch.stack([t, 2 * t]) for t in tensors]
    found = torch.func.vmap(lambda *t: combiner_attention(*t, 3))(*many)
    torch.testing.assert_close(found[1], combiner_attention(*(2 * t for t in tensors), 3))
    torch.library.opcheck(
        torch.ops.polylib.combiner_attention.default, (*(t.requires_grad_() for t in tensors), 3, True)
    )
    compiled = torch.compile(
        lambda *t: combiner_attention(*t, 3, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*tensors), combiner_attention(*tensors, 3, backend="triton"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_rounds_the_inputs_and_not_the_scores(backend, device):
    q, k, v = inputs(1, 2, 24, 16, 4, device=device)
    rounded = [t.bfloat16() for t in (8 * q, k, v)]
    with torch.autocast(device.type, torch.bfloat16):
        found = combiner_attention(8 * q, k, v, 4, backend=backend)
    torch.testing.assert_close(found, combiner_attention(*rounded, 4, backend=backend), rtol=0, atol=0)


def test_an_integer_of_numpy_is_one():
    tensors = inputs(1, 1, 6, 2, 2)
    torch.testing.assert_close(combiner_attention(*tensors, np.int64(3)), combiner_attention(*tensors, 3))


def test_wider_than_the_kernels(device):
    tensors = inputs(1, 1, 4, 129, 2, device=device)
    torch.testing.assert_close(
        combiner_attention(*tensors, 2).double().cpu(), query_by_query(*tensors, 2, True), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match='backend="triton" needs d and e of at most 128, got 129 and 2'):
        combiner_attention(*tensors, 2, backend="triton")


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.combiner_attention").cost
    # 12 places in 3 blocks of 4: 10 scores in each block, and none, 4 and 8 of summaries.
    forward = cost(2, 3, 12, 5, 7, 4, torch.bfloat16)
    assert forward.flops == 6 * (2 * 42 * 12 + 2 * 12 * 12)
    assert forward.bytes == 6 * (2 * (2 * 12 * 17 + 12 * 7 + 2 * 3 * 12) + 4 * 15)
    assert cost(1, 1, 12, 5, 7, 4, torch.float32, causal=False).flops == 2 * (12 * 6) * 12 + 2 * 12 * 12
    assert cost(1, 1, 12, 5, 7, 4, torch.float32, backward=True).flops == 2 * 42 * (4 * 5 + 3 * 7) + 8 * 12 * 12


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"value": torch.zeros(1, 2, 6, 4).double()}, TypeError, "value must have the dtype of query"),
        ({"query": torch.zeros(2, 6, 4)}, ValueError, r"query must have shape \(B, H, L, d\), d at least 1"),
        ({"key": torch.zeros(1, 2, 5, 4)}, ValueError, r"key must have shape \(B, H, L, d\) = \(1, 2, 6, 4\)"),
        ({"value": torch.zeros(1, 1, 6, 4)}, ValueError, r"value must have shape \(B, H, L, e\) = \(1, 2, 6, 4\)"),
        ({"value": torch.tensor(1.0)}, ValueError, "value must have shape"),
        ({"key": torch.zeros(1, 2, 6, 4, device="meta")}, ValueError, "key must be on the device of query, cpu"),
        ({"span": 4}, ValueError, "span must be at least 1 and divide L = 6, got 4"),
        ({"span": 0}, ValueError, "span must be at least 1 and divide L = 6, got 0"),
        ({"span": 2.0}, TypeError, "span must be an integer, got float"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    good = {name: torch.zeros(1, 2, 6, 4) for name in ("query", "key", "value")} | {"span": 3}
    with pytest.raises(error, match=message):
        combiner_attention(**good | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.combiner_attention").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for out in found.values():
            torch.testing.assert_close(out, found["reference"], rtol=1e-4, atol=1e-5)
