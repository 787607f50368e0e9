"""Routing of hidden dimensions: gates by hand and by a loop, balance, gradients, recording, and bad input."""

import pytest
import torch
from torch import nn

from polylib.lab import Stack
from polylib.sparsity import HiddenDimensionRouter, balance_loss, recorded_routing


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def router(*arguments, seed=0):
    torch.manual_seed(seed)
    return HiddenDimensionRouter(*arguments).double()


def test_gates_token_by_token():
    made, u = router(24, 8, 5, 2), tokens(40, 24)
    gate, _ = made(u)
    for token, row in zip(u, gate, strict=True):
        scores = torch.softmax(made.centroids @ token, 0)
        best = sorted(range(6), key=lambda i, s=scores: -s[i])[:3]
        expected = torch.tensor([1.0, 1.0] + [0.0] * 6, dtype=token.dtype)
        for i in best:
            expected[2 + i] = 3 * scores[i] / scores[best].sum()
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize(("active", "shared"), [(1, 0), (4, 0), (8, 6), (8, 8), (16, 6)])
def test_how_many_groups_are_active(active, shared):
    gate, _ = router(32, 16, active, shared)(tokens(3, 50, 32))
    assert ((gate > 0).sum(-1) == active).all()
    torch.testing.assert_close(gate[..., :shared], torch.ones_like(gate[..., :shared]))
    torch.testing.assert_close(gate.sum(-1), torch.full_like(gate[..., 0], active))


@pytest.mark.parametrize(("active", "shared"), [(16, 6), (16, 16), (5, 5)])
def test_nothing_to_choose(active, shared):
    made = router(32, 16, active, shared)
    gate, balance = made(tokens(2, 32))
    assert list(made.parameters()) == [] and balance == 0
    assert gate.tolist() == [[1.0] * active + [0.0] * (16 - active)] * 2


def test_centroids_have_the_variance_of_a_unit_score():
    made = router(512, 16, 8, 0)
    assert made.centroids.shape == (16, 512)
    assert made.centroids.std().item() == pytest.approx(512**-0.5, rel=0.05)


def test_balance_of_even_scores_and_of_one_choice():
    even = torch.full((60, 6), 1 / 6)
    assert balance_loss(even, torch.eye(6).repeat(10, 1)).item() == pytest.approx(1)
    same = torch.zeros(60, 6)
    same[:, :2] = 0.5
    assert balance_loss(same, (same > 0).float()).item() == pytest.approx(6 / 2)


def test_balance_of_a_router():
    made, u = router(24, 8, 5, 2), tokens(4, 10, 24)
    gate, balance = made(u)
    scores = torch.softmax(u @ made.centroids.T, -1).flatten(0, 1)
    shares = (gate[..., 2:] > 0).double().flatten(0, 1).mean(0) / 3
    torch.testing.assert_close(balance, 6 * (shares * scores.mean(0)).sum())
    (slope,) = torch.autograd.grad(balance, made.centroids)
    expected = torch.autograd.functional.jacobian(
        lambda c: 6 * (shares * torch.softmax(u @ c.T, -1).mean((0, 1))).sum(), made.centroids.detach()
    )
    torch.testing.assert_close(slope, expected)


def test_gradient_of_the_gate():
    made, u = router(12, 6, 4, 1), tokens(5, 12)
    assert torch.autograd.gradcheck(lambda x: made(x).gate, (u.requires_grad_(),))
    one = router(12, 6, 2, 1)
    (slope,) = torch.autograd.grad(one(u).gate.square().sum(), one.centroids)
    assert slope.abs().max() < 1e-12  # one chosen group has the weight 1, whatever its score


def test_an_empty_batch_has_no_balance_loss():
    made = router(12, 6, 4, 1)
    gate, balance = made(tokens(0, 12))
    assert gate.shape == (0, 6) and balance == 0


def test_scores_in_float32_under_autocast():
    made = HiddenDimensionRouter(64, 16, 8, 2)
    u = tokens(100, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made(u).gate
    torch.testing.assert_close(inside, made(u).gate)


def test_recorded_in_a_stack():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = HiddenDimensionRouter(12, 6, 4, 1), HiddenDimensionRouter(12, 4, 2, 0)

        def forward(self, x):
            return self.first(x).gate.sum() + self.second(x).gate.sum()

    models, u = [Model().double() for _ in range(2)], tokens(9, 12)

    def loss(model, x):
        with recorded_routing(model) as routing:
            model(x)
        return routing["first"].balance + routing["second"].balance

    expected = torch.stack([model.first(u).balance + model.second(u).balance for model in models])
    torch.testing.assert_close(Stack(models, 0.1).step(loss, u, shared=True), expected.detach())
    with recorded_routing(models[0]) as routing:
        pass
    models[0](u)
    assert routing == {}  # nothing stays hooked


def test_bad_input():
    with pytest.raises(ValueError, match="n_groups must be a divisor of d_model = 30, got 16"):
        HiddenDimensionRouter(30)
    with pytest.raises(ValueError, match="active must be an integer from 1 to 16, got 17"):
        HiddenDimensionRouter(32, 16, 17)
    with pytest.raises(ValueError, match="shared must be an integer from 0 to 4, got 6"):
        HiddenDimensionRouter(32, 16, 4)
    with pytest.raises(ValueError, match=r"u must have shape \(\.\.\., 32\), got \(3, 31\)"):
        HiddenDimensionRouter(32)(torch.ones(3, 31))
    with (
        pytest.raises(ValueError, match="model must hold a HiddenDimensionRouter, got Linear"),
        recorded_routing(nn.Linear(2, 2)),
    ):
        pass
