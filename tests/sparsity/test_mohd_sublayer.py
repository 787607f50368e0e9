"""The sub-layer: limits, masks, scale, fusion, gradients, counts, and products that skip."""

import pytest
import torch
from torch import nn

from polylib.lab.transformer import Attention
from polylib.sequences import monarch_dense
from polylib.sparsity import (
    GroupFusion,
    HiddenDimensionRouter,
    MoHDSublayer,
    activated_parameters,
    from_groups,
    to_groups,
)


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(d=32, hidden=24, bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(d, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, d, bias=bias)).double()


@pytest.mark.parametrize("inner", [mlp(), Attention(32, 2, causal=True).double()])
@pytest.mark.parametrize("shared", [6, 16])
def test_all_groups_are_the_dense_sublayer(inner, shared):
    u = tokens(3, 7, 32)
    torch.testing.assert_close(MoHDSublayer(inner, 32, 16, 16, shared).double()(u), inner(u))


def test_from_its_equations():
    layer, u = MoHDSublayer(mlp(), 32, 8, 4, 2).double(), tokens(9, 32)
    nn.init.normal_(layer.fusion.w1)
    gate = layer.router(u).gate
    expected = []
    for token, own in zip(u, gate, strict=True):
        scaled = torch.cat([2**0.5 * w * part for w, part in zip(own, token.split(4), strict=True)])
        y = layer.inner(scaled)
        y = torch.cat([2**0.5 * (w > 0) * part for w, part in zip(own, y.split(4), strict=True)])
        expected.append(y + monarch_dense(layer.fusion.w1, layer.fusion.w2) @ y)
    torch.testing.assert_close(layer(u), torch.stack(expected))


def test_inactive_groups_are_neither_read_nor_written():
    layer, u = MoHDSublayer(mlp(), 32, 8, 4, 2, fusion=False).double(), tokens(20, 32)
    off = (layer.router(u).gate == 0).repeat_interleave(4, 1)
    y = layer(u)
    assert (y[off] == 0).all() and (y[~off] != 0).all()
    routing = layer.router(u)
    layer.router.forward = lambda _: routing  # the router reads all dimensions, the sub-layer does not
    torch.testing.assert_close(layer(torch.where(off, 100.0, u)), y)


def test_no_gradient_where_no_token_goes():
    layer, u = MoHDSublayer(mlp(), 32, 8, 4, 2).double(), tokens(3, 32)
    layer(u).square().sum().backward()
    unused = (layer.router(u).gate == 0).all(0).repeat_interleave(4)
    assert unused.any()
    assert (layer.inner[0].weight.grad[:, unused] == 0).all() and (layer.inner[2].weight.grad[unused] == 0).all()
    assert (layer.inner[0].weight.grad[:, ~unused] != 0).all()
    assert layer.router.centroids.grad.abs().max() > 0


@pytest.mark.parametrize(("scale", "expected"), [(True, 1.0), (False, 0.5)])
def test_the_scale_keeps_the_variance_of_what_enters(scale, expected):
    torch.manual_seed(0)
    first, u = nn.Linear(64, 200, bias=False), tokens(4000, 64, dtype=torch.float32)
    seen = []
    layer = MoHDSublayer(nn.Sequential(first, nn.Linear(200, 64)), 64, scale=scale)
    handle = first.register_forward_hook(lambda _, __, output: seen.append(output.var().item()))
    layer(u)
    handle.remove()
    assert seen == [pytest.approx(expected * first(u).var().item(), rel=0.1)]


def test_fusion_is_the_identity_at_first_and_reaches_every_dimension():
    torch.manual_seed(0)
    fusion, y = GroupFusion(32, 8).double(), tokens(5, 32)
    torch.testing.assert_close(fusion(y), y)
    fusion(y).square().sum().backward()
    assert fusion.w1.grad.abs().min() > 0
    nn.init.normal_(fusion.w1)
    matrix = torch.eye(32, dtype=torch.float64) + monarch_dense(fusion.w1, fusion.w2)
    torch.testing.assert_close(fusion(y), y @ matrix.T)
    assert (matrix.detach() != 0).all()
    assert sum(p.numel() for p in fusion.parameters()) == 32 * (4 + 8)


def test_activated_parameters():
    layer = MoHDSublayer(mlp(), 32, 8, 4, 2)
    inside = 24 * 32 * 2 // 2 + 24 + 32
    assert activated_parameters(layer) == inside + 6 * 32 + 32 * (4 + 8)
    whole = nn.Sequential(nn.Embedding(10, 32), layer, nn.Linear(32, 10))
    assert activated_parameters(whole) == activated_parameters(layer) + 320 + 330
    full = MoHDSublayer(mlp(), 32, 8, 8, 2, fusion=False)
    assert activated_parameters(full) == sum(p.numel() for p in full.parameters())


def test_products_that_skip_are_the_masked_ones():
    u = tokens(70, 32)
    gate = HiddenDimensionRouter(32, 16, 8, 6).double()(u).gate
    weights, used = gate.repeat_interleave(2, 1), gate > 0
    first, last = tokens(24, 32, seed=1), tokens(32, 24, seed=2)
    h = (weights * u) @ first.T
    torch.testing.assert_close(from_groups(weights * u, first, used), h)
    torch.testing.assert_close(to_groups(h, last, used), (weights > 0) * (h @ last.T))


def test_products_of_groups_that_nobody_or_everybody_uses():
    used = torch.tensor([[True, False, True], [True, False, False]])
    x, weight = tokens(2, 6), tokens(4, 6, seed=1)
    masked = x * used.repeat_interleave(2, 1)
    torch.testing.assert_close(from_groups(x, weight, used), masked @ weight.T)
    none, all_of_them = torch.zeros_like(used), torch.ones_like(used)
    assert (from_groups(x, weight, none) == 0).all() and (to_groups(x[:, :4], weight.T, none) == 0).all()
    torch.testing.assert_close(from_groups(x, weight, all_of_them), x @ weight.T)
    assert from_groups(x[:0], weight, used[:0]).shape == (0, 4)


def test_bad_input():
    with pytest.raises(TypeError, match=r"inner must be a torch\.nn\.Module, got builtin_function"):
        MoHDSublayer(abs, 32)
    with pytest.raises(ValueError, match="n_groups must be a divisor of d_model = 30, got 16"):
        GroupFusion(30)
    with pytest.raises(ValueError, match=r"y must have shape \(\.\.\., 32\)"):
        GroupFusion(32)(torch.ones(3))
    with pytest.raises(TypeError, match="module must be"):
        activated_parameters(3)
    x, weight, used = torch.ones(5, 6), torch.ones(4, 6), torch.ones(5, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"used must have dtype torch\.bool, got torch\.float32"):
        from_groups(x, weight, used.float())
    with pytest.raises(ValueError, match="groups of used must be a divisor of d = 6, got 4"):
        from_groups(x, weight, torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"used must have shape \(5, groups\), got \(4, 3\)"):
        from_groups(x, weight, used[:4])
    with pytest.raises(ValueError, match="h must have shape"):
        to_groups(x[:, :5], torch.ones(6, 4), used)
