"""The largest eigenvalue of a Hessian, against the whole Hessian and scipy's solver."""

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.func import functional_call, hessian

from polylib.optimization import flat_matvec, hessian_matvec, hessian_top_eigenvalue


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)

    def loss(params):
        return (functional_call(model, params, (x,)) - y).square().mean()

    return loss, {name: value.detach() for name, value in model.named_parameters()}


def test_against_scipy_and_the_whole_hessian(problem):
    loss, params = problem
    matvec = hessian_matvec(loss, params)
    size = sum(value.numel() for value in params.values())
    operator = LinearOperator((size, size), dtype=float, matvec=lambda v: matvec(torch.tensor(v)).numpy())
    exact = eigsh(operator, 1, which="LA")[0][0]
    value, vector = hessian_top_eigenvalue(loss, params, num_steps=size)
    assert value.item() == pytest.approx(exact, rel=1e-8)
    torch.testing.assert_close(matvec(vector), value * vector, rtol=0, atol=1e-8 * exact)
    assert vector.norm().item() == pytest.approx(1)

    flat = torch.cat([p.flatten() for p in params.values()])
    parts = dict(zip(params, flat.split([p.numel() for p in params.values()]), strict=True))
    whole = hessian(lambda f: loss(dict(zip(params, _parts(f, params), strict=True))))(flat)
    assert parts.keys() == params.keys()
    assert value.item() == pytest.approx(torch.linalg.eigvalsh(whole)[-1].item(), rel=1e-8)


def _parts(flat, params):
    pieces = flat.split([p.numel() for p in params.values()])
    return [piece.view_as(p) for piece, p in zip(pieces, params.values(), strict=True)]


def test_the_largest_is_not_the_one_of_largest_size():
    scale = torch.tensor([-9.0, 2.0, 1.0], dtype=torch.float64)
    value, vector = hessian_top_eigenvalue(lambda p: (scale * p["w"] ** 2).sum() / 2, {"w": torch.zeros(3).double()})
    assert value.item() == pytest.approx(2)
    assert vector.abs().tolist() == pytest.approx([0, 1, 0], abs=1e-10)


def test_a_warm_start_needs_few_steps(problem):
    loss, params = problem
    _, vector = hessian_top_eigenvalue(loss, params, num_steps=40)
    moved = {name: p + 1e-3 for name, p in params.items()}
    exact = hessian_top_eigenvalue(loss, moved, num_steps=40)[0].item()
    warm = hessian_top_eigenvalue(loss, moved, num_steps=3, v0=vector)[0].item()
    assert warm == pytest.approx(exact, rel=1e-4)
    assert warm <= exact * (1 + 1e-12)
    cold = hessian_top_eigenvalue(loss, moved, num_steps=3)[0].item()
    assert exact - cold > 10 * (exact - warm)


def test_single_precision_and_order_of_the_parameters(problem):
    loss, params = problem
    value, vector = hessian_top_eigenvalue(loss, params, num_steps=40)
    single = {name: p.float() for name, p in params.items()}
    rough, _ = hessian_top_eigenvalue(lambda p: loss({n: v.double() for n, v in p.items()}), single, num_steps=40)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(value.item(), rel=1e-4)
    same = flat_matvec(lambda v: v, params)
    torch.testing.assert_close(same(vector), vector)


def test_bad_input(problem):
    loss, params = problem
    with pytest.raises(ValueError, match="num_steps must be"):
        hessian_top_eigenvalue(loss, params, num_steps=0)
    with pytest.raises(ValueError, match="v0 must be a direction"):
        hessian_top_eigenvalue(loss, params, v0=torch.zeros(51).double())
    with pytest.raises(ValueError, match="not finite"):
        hessian_top_eigenvalue(lambda p: loss(p) * torch.inf, params)
