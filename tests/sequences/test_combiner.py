"""Combiner against loops over its formulas, exact limits, causality, gradients, masks, layers, and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from polylib.kernels import combiner_attention
from polylib.sequences import (
    CombinerSelfAttention,
    SparseSelfAttention,
    combiner_logsparse_attention,
    combiner_weights,
    sparse_attention_mask,
)


def drawn(L, d=5, dv=4, seed=0):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, 3, L, size, dtype=torch.float64) for size in (d, d, dv))
    return q, k, v


def regions(i, L, pattern, span, causal=True):
    """What query i reads: the tokens near it, and the regions."""
    if pattern == "fixed":
        own = i // span
        near = [j for j in range(own * span, own * span + span) if j <= i or not causal]
        blocks = range(own if causal else L // span)
        return near, [range(r * span, r * span + span) for r in blocks if r != own]
    found, end = [], i
    while end > 0:  # take off the lowest bit
        start = end & (end - 1)
        found.append(range(start, end))
        end = start
    return [i], found


def written_out(q, k, pattern, span=None, causal=True):
    """The effective weights of one head, (L, L), by the formulas."""
    L, d = q.shape
    weights = torch.zeros(L, L, dtype=q.dtype)
    for i in range(L):
        near, far = regions(i, L, pattern, span, causal)
        assert sorted([*near, *(j for region in far for j in region)]) == list(range(i + 1 if causal else L))
        scores = [(q[i] @ k[j] / math.sqrt(d)).exp() for j in near]
        scores += [(q[i] @ k[list(region)].max(0).values / math.sqrt(d)).exp() for region in far]
        total = sum(scores)
        for j, score in zip(near, scores, strict=False):
            weights[i, j] = score / total
        for region, score in zip(far, scores[len(near) :], strict=True):
            own = q[list(region)].max(0).values
            inside = torch.stack([own @ k[j] / math.sqrt(d) for j in region]).softmax(0)
            weights[i, list(region)] = score / total * inside
    return weights


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", [1, 3, 4, 12])
def test_fixed_written_out(span, causal):
    q, k, v = drawn(12)
    wanted = torch.stack([written_out(a, b, "fixed", span, causal) for a, b in zip(q[0], k[0], strict=True)])
    torch.testing.assert_close(combiner_attention(q, k, v, span, causal)[0], wanted @ v[0])
    if causal:
        torch.testing.assert_close(combiner_weights(q, k, "fixed", span)[0], wanted)
        torch.testing.assert_close(combiner_weights(q[0, 0], k[0, 0], "fixed", span), wanted[0])


@pytest.mark.parametrize("L", [1, 2, 3, 7, 8, 9, 21])
def test_logsparse_written_out(L):
    q, k, v = drawn(L)
    wanted = torch.stack([written_out(a, b, "logsparse") for a, b in zip(q[0], k[0], strict=True)])
    torch.testing.assert_close(combiner_logsparse_attention(q, k, v)[0], wanted @ v[0])
    torch.testing.assert_close(combiner_weights(q, k, "logsparse")[0], wanted)
    torch.testing.assert_close(combiner_logsparse_attention(q[0, 0], k[0, 0], v[0, 0]), wanted[0] @ v[0, 0])


def test_limits_are_exact_attention():
    q, k, v = drawn(12)
    for span in (1, 12):
        for causal in (True, False):
            wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            torch.testing.assert_close(combiner_attention(q, k, v, span, causal), wanted)
    short = [x[..., :2, :] for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*short, is_causal=True)
    torch.testing.assert_close(combiner_logsparse_attention(*short), wanted)


@pytest.mark.parametrize(("pattern", "span", "L"), [("fixed", 6, 24), ("logsparse", None, 24), ("logsparse", None, 13)])
def test_weights_are_distributions_with_full_support(pattern, span, L):
    q, k, _ = drawn(L)
    weights = combiner_weights(q, k, pattern, span)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, L, dtype=torch.float64))
    assert ((weights > 0) == torch.ones(L, L).tril().bool()).all()


def test_a_past_block_has_rank_one_and_the_own_block_has_not():
    q, k, _ = drawn(24)
    weights = combiner_weights(q, k, "fixed", 6)[0, 0]
    assert torch.linalg.matrix_rank(weights[12:18, 6:12], rtol=1e-10) == 1
    assert torch.linalg.matrix_rank(weights[12:18, 12:18], rtol=1e-10) == 6


@pytest.mark.parametrize("L", [12, 16])
@pytest.mark.parametrize("pattern", ["fixed", "logsparse"])
def test_the_future_does_not_count(pattern, L):
    q, k, v = drawn(L)

    def attend(q, k, v):
        return combiner_attention(q, k, v, 4) if pattern == "fixed" else combiner_logsparse_attention(q, k, v)

    before = attend(q, k, v)
    for t in range(1, L):
        changed = [torch.cat([x[..., :t, :], 10 + x[..., t:, :]], -2) for x in (q, k, v)]
        torch.testing.assert_close(attend(*changed)[..., :t, :], before[..., :t, :])
        assert (attend(*changed)[..., t, :] - before[..., t, :]).abs().min() > 1e-3


def test_not_causal_a_block_is_no_region_of_its_own():
    q, k, v = drawn(12)
    far = torch.zeros_like(v)
    far[..., 4:8, :] = 1  # the share of block 1, read by its own queries token by token
    share = combiner_attention(q, k, far, 4, causal=False)[..., 4:8, 0]
    scores = (q[..., 4:8, :] @ k.mT / math.sqrt(5)).exp()
    own = scores[..., 4:8].sum(-1)
    others = [k[..., s : s + 4, :].amax(-2, keepdim=True) for s in (0, 8)]
    rest = (q[..., 4:8, :] @ torch.cat(others, -2).mT / math.sqrt(5)).exp().sum(-1)
    torch.testing.assert_close(share, own / (own + rest))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_fixed(causal):
    q, k, v = (x[:1, :1, :6].requires_grad_() for x in drawn(6, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: combiner_attention(*x, 3, causal), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: combiner_attention(*x, 3, causal), (q, k, v))


@pytest.mark.parametrize("L", [5, 8])
def test_gradients_of_logsparse(L):
    q, k, v = (x[0, 0].requires_grad_() for x in drawn(L, 2, 2))
    assert torch.autograd.gradcheck(combiner_logsparse_attention, (q, k, v))
    assert torch.autograd.gradgradcheck(combiner_logsparse_attention, (q, k, v))


def test_mapped_over_networks():
    q, k, v = (torch.stack([x, 2 * x]) for x in drawn(8))
    for attend in (combiner_logsparse_attention, lambda *x: combiner_attention(*x, 4)):
        wanted = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
        torch.testing.assert_close(torch.func.vmap(attend)(q, k, v), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    q, k, v = (x.to(dtype) for x in drawn(8))
    for attend in (combiner_logsparse_attention, lambda *x: combiner_attention(*x, 4)):
        found = attend(q, k, v)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), attend(q.double(), k.double(), v.double()), rtol=0.02, atol=0.01)


def test_masks():
    rows = {
        ("full", 1, 1): [0, 1, 2, 3, 4, 5, 6],
        ("window", 3, 1): [4, 5, 6],
        ("fixed", 4, 1): [3, 4, 5, 6],
        ("fixed", 4, 2): [2, 3, 4, 5, 6],
        ("fixed", 2, 5): [0, 1, 2, 3, 4, 5, 6],
        ("logsparse", 1, 1): [3, 5, 6],  # 6 = 110: the regions 4, 5 and 0 to 3
        ("logsparse", 1, 2): [2, 3, 4, 5, 6],
        ("logsparse", 1, 9): [0, 1, 2, 3, 4, 5, 6],
    }
    for (pattern, span, columns), row in rows.items():
        mask = sparse_attention_mask(8, pattern, span, columns)
        assert mask[6].nonzero().flatten().tolist() == row
        assert mask.diagonal().all()
        assert not mask.triu(1).any()
    for pattern in ("full", "window", "fixed", "logsparse"):
        assert sparse_attention_mask(0, pattern).shape == (0, 0)


@pytest.mark.parametrize("L", [9, 64])
def test_masks_read_as_many_tokens_as_combiner_has_terms(L):
    for pattern, span in (("fixed", 8), ("logsparse", 1)):
        terms = [sum(map(len, (regions(i, L, pattern, span)))) for i in range(L)]
        assert sparse_attention_mask(L, pattern, span).sum(1).tolist() == terms


@pytest.mark.parametrize("L", [1, 6, 7, 16])
@pytest.mark.parametrize(("pattern", "span"), [("fixed", None), ("fixed", 4), ("fixed", 20), ("logsparse", None)])
def test_the_layer_written_out(pattern, span, L):
    torch.manual_seed(0)
    layer = CombinerSelfAttention(6, 2, pattern, span).double()
    x = torch.randn(3, L, 6, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in F.linear(x, layer.inputs.weight).split(6, -1))
    size = span or math.ceil(math.sqrt(L))
    padded = L if pattern == "logsparse" else -(-L // size) * size
    rows = []
    for b in range(3):
        heads = []
        for h in range(2):
            ends = [F.pad(part[b, h], (0, 0, 0, padded - L)) for part in (q, k)]
            weights = written_out(*ends, pattern, size)[:L, :L]
            heads.append(weights @ v[b, h])
        rows.append(torch.cat(heads, -1))
    torch.testing.assert_close(layer(x), torch.stack(rows) @ layer.output.weight.T)


def test_layers_share_their_form():
    """With one region of one token each, and with all pairs kept, both are full attention."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6)
    layer, sparse = CombinerSelfAttention(6, 2, "fixed", 1), SparseSelfAttention(6, 2, "full")
    sparse.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), sparse(x))
    q, k, v = sparse.inputs(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    for pattern in ("window", "fixed", "logsparse"):
        sparse.pattern, sparse.span, sparse.columns = pattern, 4, 2
        mask = sparse_attention_mask(8, pattern, 4, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(sparse(x), sparse.output(y.transpose(1, 2).flatten(2)))


def test_not_causal_layer():
    layer = CombinerSelfAttention(6, 2, "fixed", 4, causal=False).double()
    J = torch.func.jacrev(layer)(torch.randn(1, 8, 6).double())[0, :, :, 0].abs().amax((1, 3))
    assert (J > 1e-9).all()
    with pytest.raises(ValueError, match="span must be at least 1 and divide L = 7, got 4"):
        layer(torch.zeros(1, 7, 6).double())


def test_bad_input():
    q, k, v = drawn(12)
    with pytest.raises(ValueError, match="span must be at least 1 and divide L = 12, got 5"):
        combiner_attention(q, k, v, 5)
    with pytest.raises(ValueError, match="span must be at least 1"):
        combiner_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="query must have shape"):
        combiner_attention(q[0], k[0], v[0], 4)
    for attend, names in (
        (lambda *x: combiner_attention(*x, 4), ("key", "value")),
        (combiner_logsparse_attention, "kv"),
    ):
        with pytest.raises(ValueError, match=f"{names[0]} must have shape"):
            attend(q, k[..., :4], v)
        with pytest.raises(ValueError, match=f"{names[1]} must have shape"):
            attend(q, k, v[..., :4, :])
        with pytest.raises(TypeError, match=f"{names[1]} must have the dtype"):
            attend(q, k, v.float())
    with pytest.raises(ValueError, match="q must have shape"):
        combiner_logsparse_attention(*(x[0, 0, 0] for x in (q, k, v)))
    with pytest.raises(ValueError, match="pattern must be one of 'fixed', 'logsparse', got 'axial'"):
        combiner_weights(q, k, "axial", 4)
    with pytest.raises(ValueError, match="span must be given for the pattern 'fixed' alone, got None"):
        combiner_weights(q, k, "fixed")
    with pytest.raises(ValueError, match="span must be given for the pattern 'fixed' alone, got 4"):
        combiner_weights(q, k, "logsparse", 4)
    with pytest.raises(ValueError, match="k must have shape"):
        combiner_weights(q, k[..., :4], "logsparse")
    with pytest.raises(ValueError, match="q must have shape"):
        combiner_weights(q[None], k[None], "logsparse")
    for make in (CombinerSelfAttention, SparseSelfAttention):
        with pytest.raises(ValueError, match="d_model must be a multiple of n_heads = 4, got 6"):
            make(6, 4)
        with pytest.raises(ValueError, match="pattern must be one of"):
            make(6, 2, "axial")
        with pytest.raises(ValueError, match="span must be an integer"):
            make(6, 2, "fixed", 0)
    with pytest.raises(ValueError, match="pattern with a span"):
        CombinerSelfAttention(6, 2, "logsparse", 4)
    with pytest.raises(ValueError, match="span must be given without causal"):
        CombinerSelfAttention(6, 2, "logsparse", causal=False)
    with pytest.raises(ValueError, match="columns must be an integer"):
        sparse_attention_mask(8, "fixed", 4, 0)
    with pytest.raises(ValueError, match="length must be an integer"):
        sparse_attention_mask(-1, "fixed", 4)
