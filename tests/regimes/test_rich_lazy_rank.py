import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.regimes import ReluRNN, kernel_alignment, linear_rank_theory, train_to_loss


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descend(d, rank, sigma, cos2, step, hidden=12):
    """A two-layer linear network trained by small steps from the start of the theory; before and after."""
    right = torch.linalg.qr(draw(d, d)).Q
    beta = math.sqrt(cos2) * right[:, 0] + (math.sqrt(1 - cos2) * right[:, -1] if cos2 < 1 else 0)
    left = torch.linalg.qr(draw(hidden, rank, seed=1)).Q
    w1 = sigma / rank**0.5 * left @ right[:, :rank].mT
    w2 = torch.zeros(hidden, dtype=torch.float64)
    start = (w1.clone(), w2.clone())
    for _ in range(round(60 / step)):
        error = beta - w1.mT @ w2
        w1, w2 = w1 + step * torch.outer(w2, error), w2 + step * w1 @ error
        if error.norm() < 1e-9:
            break
    return start, (w1, w2)


@pytest.mark.parametrize(("rank", "cos2"), [(1, 0.3), (1, 1.0), (3, 0.5), (6, 1.0)])
def test_linear_theory_is_what_small_steps_do(rank, cos2):
    d, sigma = 6, 1.5
    (u1, u2), (w1, w2) = descend(d, rank, sigma, cos2, 0.002)
    theory = linear_rank_theory(d, rank, sigma, cos2=cos2)
    kernels = [a.mT @ a + b @ b * torch.eye(d, dtype=torch.float64) for a, b in ((u1, u2), (w1, w2))]
    assert kernel_alignment(*kernels).item() == pytest.approx(theory.ka, abs=2e-3)
    assert (w1 - u1).square().sum().item() == pytest.approx(theory.dw1_sq, abs=5e-3)
    assert w2.square().sum().item() == pytest.approx(theory.dw2_sq, abs=2e-3)


def test_conservation_law_drifts_with_the_step():
    def drift(step):
        (u1, u2), (w1, w2) = descend(6, 2, 1.5, 0.5, step)
        return (w1 @ w1.mT - torch.outer(w2, w2) - u1 @ u1.mT + torch.outer(u2, u2)).norm().item()

    coarse, fine = drift(0.01), drift(0.005)
    assert coarse / fine == pytest.approx(2, rel=0.05)


def test_theory_values_and_errors():
    ka = [linear_rank_theory(20, rank, 2.0).ka for rank in (1, 2, 4, 8, 16, 20)]
    assert ka == pytest.approx([0.098, 0.528, 0.665, 0.756, 0.913, 0.986], abs=6e-4)
    aligned = linear_rank_theory(20, 1, 2.0, cos2=1.0)
    assert aligned.ka == pytest.approx(0.975, abs=6e-4)
    assert aligned.dw1_sq == pytest.approx(0.0034, abs=6e-5)
    assert linear_rank_theory(20, 20, 2.0).dw1_sq == pytest.approx(0.365, abs=6e-4)
    ends = [linear_rank_theory(20, 4, 2.0, cos2=c).ka for c in (0.0, 0.5, 1.0)]
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2)  # linear in cos2
    for arguments in ((5, 0, 1.0), (5, 6, 1.0), (5, 2, 0.0), (5, 2, 1.0, -1.0), (5, 2, 1.0, 1.0, 1.5)):
        with pytest.raises(ValueError, match=r"must be .*, got "):
            linear_rank_theory(*arguments)


def task():
    x = draw(90, 3, 4).float()
    return x, (x.sum((1, 2)) > 0).long()


def networks(count):
    torch.manual_seed(0)
    return [ReluRNN(4, 9, 2) for _ in range(count)]


def test_each_network_trains_as_alone():
    x, y = task()
    together, alone = networks(3), networks(3)
    seeds = [5, 6, 5]
    out = train_to_loss(together, x, y, rate=0.05, target=0.45, max_steps=120, batch_size=16, seeds=seeds)
    assert out["reached"].all()
    assert len(set(out["steps"].tolist())) > 1  # they stop at different times
    for k, model in enumerate(alone):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        generator, running = torch.Generator().manual_seed(seeds[k]), None
        for step in range(120):
            index = torch.randint(len(x), (16,), generator=generator)
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert out["loss"][k, step].item() == pytest.approx(loss.item(), rel=1e-4)
            running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
            if running < 0.45:
                break
        assert out["steps"][k] == step + 1
        assert out["loss"][k, step + 1 :].isnan().all()
        for mine, other in zip(together[k].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """A network whose two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(self.second(self.first(x.flatten(1)).tanh()))


def test_a_shared_weight_learns_as_it_does_alone():
    x, y = task()
    torch.manual_seed(0)
    models = [Tied(), Tied()]
    alone = copy.deepcopy(models[1])
    train_to_loss(models, x, y, rate=0.05, target=0.0, max_steps=20, batch_size=16, seeds=[1, 1])
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        index = torch.randint(len(x), (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(alone(x[index]), y[index]).backward()
        optimizer.step()
    for mine, other in zip(models[1].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_watch_sees_a_stopped_network_as_it_stands():
    x, y = task()
    models = networks(2)
    models[1].load_state_dict({name: 0.2 * p for name, p in models[1].state_dict().items()})
    before = torch.stack([model.readout.weight.detach().clone() for model in models])
    out = train_to_loss(
        models,
        x,
        y,
        rate=0.05,
        target=0.45,
        max_steps=100,
        watch=lambda p: p["readout.weight"] + 0,
        watch_at=[0, 50, 100],
    )
    assert out["watched"].shape == (2, 3, 2, 9)
    torch.testing.assert_close(out["watched"][:, 0], before)
    torch.testing.assert_close(out["watched"][:, 2], torch.stack([model.readout.weight.detach() for model in models]))


def test_a_network_that_diverges_stops_alone():
    x, y = task()
    models, single = networks(2), networks(1)
    with torch.no_grad():
        models[1].readout.weight.fill_(torch.inf)
    out = train_to_loss(models, x, y, rate=0.05, target=0.3, max_steps=30)
    reference = train_to_loss(single, x, y, rate=0.05, target=0.3, max_steps=30)
    assert out["steps"].tolist() == [30, 1]
    assert out["reached"].tolist() == [False, False]
    torch.testing.assert_close(out["loss"][0], reference["loss"][0])


def test_training_errors():
    x, y = task()
    settings = {"rate": 0.1, "target": 0.3, "max_steps": 10}
    with pytest.raises(ValueError, match="models must be at least one"):
        train_to_loss([], x, y, **settings)
    with pytest.raises(ValueError, match="seeds must be one for each of the 2 models"):
        train_to_loss(networks(2), x, y, seeds=[0], **settings)
    with pytest.raises(ValueError, match="momentum"):
        train_to_loss(networks(1), x, y, momentum=1.0, **settings)
    with pytest.raises(ValueError, match="watch_at"):
        train_to_loss(networks(1), x, y, watch_at=[3, 11], **settings)
    with pytest.raises(ValueError, match="leak must be a finite number above 0, at most 1, got 0"):
        ReluRNN(2, 2, 2, leak=0)
    models = networks(1)
    other = copy.deepcopy(models[0])
    train_to_loss(models, x, y, rate=0.1, target=math.inf, max_steps=10)
    assert not torch.equal(models[0].input.weight, other.input.weight)  # one step, and the target is met
    assert isinstance(models[0], nn.Module)
