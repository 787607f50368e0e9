"""Opposing signals: groups by their loss changes, gradients of groups, and the linear network with one hidden unit."""

import math

import pytest
import torch
from torch import nn
from torch.func import hessian

from polylib.optimization import (
    descend_product,
    group_gradients,
    loss_change_groups,
    moments,
    opposing_data,
    product_hessian,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_groups_are_those_of_the_largest_changes():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    after = before + torch.tensor([0.1, -0.5, 0.7, 0.0, -0.2])
    up, down = loss_change_groups(before, after, 2)
    assert up.tolist() == [2, 0]
    assert down.tolist() == [1, 4]
    up, down = loss_change_groups(before.expand(3, 5), torch.stack([after, after.flip(0), after]), 1)
    assert up.shape == down.shape == (3, 1)


@pytest.mark.parametrize(
    ("before", "after", "k", "message"),
    [
        (torch.zeros(5), torch.zeros(4), 1, "loss_after must have shape"),
        (torch.zeros(()), torch.zeros(()), 1, "loss_before must have shape"),
        (torch.zeros(5), torch.zeros(5), 3, "k must be an integer from 1 to 2"),
        (torch.zeros(5), torch.zeros(5), 0, "k must be an integer from 1 to 2"),
        (torch.zeros(5), torch.tensor([0, math.nan, 0, 0, 0]), 1, "losses must be finite"),
    ],
)
def test_groups_bad_input(before, after, k, message):
    with pytest.raises(ValueError, match=message):
        loss_change_groups(before, after, k)


def test_group_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))

    def loss(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    groups = [torch.tensor([0, 3]), torch.tensor([7])]
    found = group_gradients(model, loss, x, y, groups)
    for row, group in zip(found, groups, strict=True):
        value = nn.functional.cross_entropy(model(x[group]), y[group])
        expected = torch.autograd.grad(value, list(model.parameters()))
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in expected]))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="groups must each hold an example"):
        group_gradients(model, loss, x, y, [torch.tensor([0]), torch.tensor([], dtype=torch.long)])
    with pytest.raises(ValueError, match="loss must have shape"):
        group_gradients(model, lambda o, t: loss(o, t).mean(), x, y, groups)


def test_data_are_as_described():
    x, y, group = opposing_data(4000, signals=3, outliers=5, fraction=0.1, power=7, norm=3, generator=generator())
    assert [int((group == sign).sum()) for sign in (1, -1, 0)] == [200, 200, 3600]
    assert x[:, 3:].square().sum(1).mean().item() == pytest.approx(7)
    assert not x[group == 0, 3:].any()
    torch.testing.assert_close(x[group == 1, 3:].mean(0), -x[group == -1, 3:].mean(0))
    beta = torch.linalg.lstsq(x[group == 0, :3], y[group == 0]).solution
    assert beta.norm().item() == pytest.approx(3)
    feature = 0.5 * math.sqrt(7 / 0.1)
    torch.testing.assert_close(y - x[:, :3] @ beta, feature * group.abs())
    again = opposing_data(4000, signals=3, outliers=5, fraction=0.1, power=7, norm=3, generator=generator())
    assert torch.equal(again.x, x)


def test_data_keep_their_power_when_the_fraction_is_rounded():
    x, _, group = opposing_data(150, fraction=0.05, power=20, generator=generator())
    assert int(group.abs().sum()) == 8
    assert x[:, 10:].square().sum(1).mean().item() == pytest.approx(20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"n": 10, "fraction": 0.02}, "fraction must give two groups"),
        ({"n": 10, "fraction": 0}, "fraction must be"),
        ({"n": 10, "fraction": 0.5, "power": -1}, "power must be"),
        ({"n": 10, "fraction": 0.5, "signals": 0}, "signals must be"),
    ],
)
def test_data_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        opposing_data(**options)


@pytest.fixture
def start():
    data = opposing_data(300, signals=3, outliers=2, fraction=0.1, generator=generator())
    b = 0.3 * torch.randn(5, generator=generator(1), dtype=torch.float64)
    return data, b, torch.tensor(0.4, dtype=torch.float64)


def loss_of(data, b, c):
    return (c * (data.x @ b) - data.y).square().mean() / 2


def test_loss_and_hessian_from_moments(start):
    data, b, c = start
    known = moments(data.x, data.y)
    torch.testing.assert_close(known.loss(c * b), loss_of(data, b, c))

    def flat(theta):
        return loss_of(data, theta[:5], theta[5])

    whole = hessian(flat)(torch.cat([b, c[None]]))
    torch.testing.assert_close(product_hessian(known, b, c), whole)
    both = product_hessian(known, torch.stack([b, 2 * b]), torch.stack([c, c]))
    assert both.shape == (2, 6, 6)
    torch.testing.assert_close(both[0], whole)


def test_descent_is_that_of_autograd(start):
    data, b, c = start
    bs, cs = descend_product(moments(data.x, data.y), b, c, 0.01, 20)
    assert bs.shape == (21, 5)
    b, c = b.clone().requires_grad_(), c.clone().requires_grad_()
    optimizer = torch.optim.SGD([b, c], lr=0.01)
    for step in range(21):
        torch.testing.assert_close(bs[step], b.detach())
        torch.testing.assert_close(cs[step], c.detach())
        optimizer.zero_grad()
        loss_of(data, b, c).backward()
        optimizer.step()


def test_runs_side_by_side_are_those_alone(start):
    data, b, c = start
    known = moments(data.x, data.y)
    rates = torch.tensor([0.001, 0.01, 0.02], dtype=torch.float64)
    bs, cs = descend_product(known, b, c, rates, 10)
    assert bs.shape == (11, 3, 5)
    for i, rate in enumerate(rates.tolist()):
        alone = descend_product(known, b, c, rate, 10)
        torch.testing.assert_close(bs[:, i], alone[0])
        torch.testing.assert_close(cs[:, i], alone[1])


def test_at_the_balanced_optimum_the_sharpness_is_the_larger_of_two_products():
    x, y, _ = opposing_data(200_000, power=20, norm=2, generator=generator())
    known = moments(x, y)
    beta = known.cross[:10]  # up to sampling
    b = torch.cat([beta, beta.new_zeros(10)]) / beta.norm().sqrt()
    top = torch.linalg.eigvalsh(product_hessian(known, b, beta.norm().sqrt()))[-1].item()
    assert top == pytest.approx(20 * 2, rel=0.01)
    # Population: -beta . x_s explains the signals alone, so the rest of y is what the feature gives.
    rest = known.loss(torch.cat([beta, beta.new_zeros(10)])).item()
    assert rest == pytest.approx(20 * 0.5**2 / 2, rel=0.05)


def test_beyond_the_edge_the_feature_alternates_and_the_product_shrinks():
    data = opposing_data(2000, generator=generator())
    b = 0.1 / 20**0.5 * torch.randn(20, generator=generator(1), dtype=torch.float64)
    bs, cs = descend_product(moments(data.x, data.y), b, torch.tensor(0.1, dtype=torch.float64), 0.06, 600)
    u = (cs[:, None] * bs)[:, 10:].sum(1) / 10**0.5
    peak = int(u.abs()[50:].argmax()) + 50
    assert u.abs()[peak] > 10 * u.abs()[50]
    assert (u[peak - 9 : peak + 1] * u[peak - 10 : peak] < 0).all()
    assert 20 * cs[-1].square() < 2 / 0.06 < 20 * cs.abs().max().square()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0"),
        ({"rate": torch.tensor([0.1, -1.0])}, "rate must be above 0"),
        ({"steps": -1}, "steps must be"),
        ({"b": torch.zeros(4)}, "b must have shape"),
    ],
)
def test_descent_bad_input(start, change, message):
    data, b, c = start
    arguments = {"data": moments(data.x, data.y), "b": b, "c": c, "rate": 0.1, "steps": 1}
    with pytest.raises(ValueError, match=message):
        descend_product(**(arguments | change))


def test_moments_bad_input():
    with pytest.raises(ValueError, match="x must have shape"):
        moments(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(ValueError, match="y must have shape"):
        moments(torch.zeros(4, 3), torch.zeros(3))
