import copy

import numpy as np
import pytest
import torch
from torch import nn

from polylib.lab import Split, one_cycle, train, train_many
from polylib.neurons import QuadraticLinear, relinear_param_groups


@pytest.fixture
def blobs():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=generator) + 5 * nn.functional.one_hot(y, 5)
    return Split(x[:60], y[:60], x[60:], y[60:])


def network(seed, layer=nn.Linear):
    torch.manual_seed(seed)
    return nn.Sequential(layer(5, 8), nn.Tanh(), nn.Linear(8, 3))


def test_training_learns_separable_blobs_and_leaves_the_rates_as_they_were(blobs):
    model = network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = train(model, blobs, optimizer, epochs=20, batch_size=16, schedule=one_cycle)
    assert history["loss"].shape == (20 * 3,)
    assert history["loss"][-3:].mean() < 0.2 * history["loss"][:3].mean()
    assert history["accuracy"] > 0.9
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("seeds", [7, [3, 4, 5]])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_many_at_once_equal_one_by_one(blobs, seeds, optimizer):
    rates = [0.01, 0.1, 0.3] if optimizer == "sgd" else [0.001, 0.003, 0.01]
    many, one_by_one = ([network(k, QuadraticLinear).double() for k in range(3)] for _ in range(2))
    data = Split(blobs.x_train.double(), blobs.y_train, blobs.x_test.double(), blobs.y_test)
    settings = {"epochs": 4, "batch_size": 16, "schedule": one_cycle}
    own = theirs = {"momentum": 0.9}
    if optimizer == "adamw":
        own, theirs = {"betas": (0.8, 0.95), "epsilon": 1e-3}, {"betas": (0.8, 0.95), "eps": 1e-3}
    torch_optimizer = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW

    def groups(model, rate):
        return relinear_param_groups(model, rate, gamma_g=0.1, gamma_b=0.5, weight_decay=0.01)

    held = [groups(model, rate) for model, rate in zip(many, rates, strict=True)]
    together = train_many(many, held, data, optimizer=optimizer, seeds=seeds, **own, **settings)
    for k, (model, rate) in enumerate(zip(one_by_one, rates, strict=True)):
        each = torch_optimizer(groups(model, rate), **theirs)
        alone = train(model, data, each, seed=seeds if isinstance(seeds, int) else seeds[k], **settings)
        torch.testing.assert_close(together["loss"][k], alone["loss"])
        assert together["accuracy"][k] == alone["accuracy"]
        test_loss = nn.functional.cross_entropy(model(data.x_test), data.y_test)
        torch.testing.assert_close(together["test_loss"][k], test_loss.detach())
        for after, expected in zip(many[k].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(after, expected)


def test_clipping_limits_the_gradient_of_each_model(blobs):
    clipped, plain = [network(0), network(1)], [network(0), network(1)]
    for models, clip in ((clipped, 0.01), (plain, None)):
        before = [[p.clone() for p in m.parameters()] for m in models]
        groups = [[{"params": list(m.parameters()), "lr": 1.0}] for m in models]
        train_many(models, groups, blobs, epochs=1, batch_size=60, clip=clip)
        moved = [
            torch.cat([(a - b).flatten() for a, b in zip(m.parameters(), old, strict=True)]).norm().item()
            for m, old in zip(models, before, strict=True)
        ]
        assert all((norm == pytest.approx(0.01, rel=1e-3)) == (clip is not None) for norm in moved)


def test_what_is_watched_along_training(blobs):
    models = [network(0), network(1)]
    start = torch.stack([m[0].weight.detach().clone() for m in models])
    groups = [[{"params": list(m.parameters()), "lr": 0.1}] for m in models]
    watch = {"watch": lambda parameters: parameters["0.weight"].clone(), "watch_every": 2}
    watched = train_many(models, groups, blobs, epochs=2, batch_size=20, **watch)["watched"]
    assert watched.shape == (2, 1 + 6 // 2, 8, 5)
    assert torch.equal(watched[:, 0], start)
    assert torch.equal(watched[:, -1], torch.stack([m[0].weight for m in models]))
    assert "watched" not in train_many(models, groups, blobs, epochs=1, batch_size=20)


def test_running_statistics_are_those_of_single_training_and_used_in_the_test(blobs):
    def normalised(seed):
        torch.manual_seed(seed)
        features = blobs.x_train.shape[1]
        return nn.Sequential(nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    together, alone = [normalised(seed) for seed in (0, 1)], [normalised(seed) for seed in (0, 1)]
    groups = [[{"params": list(m.parameters()), "lr": 0.1}] for m in together]
    history = train_many(together, groups, blobs, epochs=2, batch_size=16)
    for k, model in enumerate(alone):
        single = train(model, blobs, torch.optim.SGD(model.parameters(), 0.1), epochs=2, batch_size=16)
        assert model.training and together[k].training
        for a, b in zip(together[k].state_dict().values(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)
        right = model.eval()(blobs.x_test).argmax(1) == blobs.y_test
        assert history["accuracy"][k] == single["accuracy"] == right.float().mean()


class Tied(nn.Module):
    """One weight used twice, and a single number."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight, self.gain = self.first.weight, nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.out(self.gain * self.second(self.first(x).tanh()))


def test_a_shared_weight_and_a_single_number_learn_as_they_do_alone(blobs):
    torch.manual_seed(0)
    many = [Tied() for _ in range(2)]
    alone = copy.deepcopy(many)
    together = train_many(
        many, [[{"params": list(m.parameters()), "lr": 0.1}] for m in many], blobs, epochs=2, batch_size=16
    )
    for k, model in enumerate(alone):
        history = train(model, blobs, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, batch_size=16)
        torch.testing.assert_close(together["loss"][k], history["loss"])
        assert not torch.equal(model.gain, torch.tensor(1.5))
        for after, expected in zip(many[k].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(after, expected)


def test_one_diverging_network_does_not_disturb_the_others(blobs):
    models = [network(0), network(0)]
    groups = [[{"params": list(m.parameters()), "lr": lr}] for m, lr in zip(models, (0.1, 1e30), strict=True)]
    history = train_many(models, groups, blobs, epochs=2, batch_size=16)
    assert torch.isfinite(history["loss"][0]).all()
    assert not torch.isfinite(models[1][0].weight).all() or models[1][0].weight.abs().max() > 1e20


def test_the_one_cycle_schedule_is_torchs():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=1001, cycle_momentum=False)
    for step in range(1000):
        assert one_cycle(step / 1000) == pytest.approx(optimizer.param_groups[0]["lr"], abs=6e-3)
        optimizer.step()
        scheduler.step()


def test_bad_input_raises(blobs):
    models = [network(0)]
    groups = [[{"params": list(models[0].parameters()), "lr": 0.1}]]
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 60, got 61"):
        train_many(models, groups, blobs, epochs=1, batch_size=61)
    with pytest.raises(ValueError, match="groups must be one list for each of the 1 models, got 2"):
        train_many(models, groups * 2, blobs, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match=r"requires a gradient, got none for '2.weight'"):
        train_many(models, [[{"params": list(models[0][0].parameters()), "lr": 0.1}]], blobs, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="got 'lion'"):
        train_many(models, groups, blobs, epochs=1, batch_size=10, optimizer="lion")
    with pytest.raises(ValueError, match="watch_every must be an integer of at least 1, got 0"):
        train_many(models, groups, blobs, epochs=1, batch_size=10, watch_every=0)
    with pytest.raises(ValueError, match="models must be at least one network"):
        train_many([], [], blobs, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 0, got -1"):
        train_many(models, groups, blobs, epochs=-1, batch_size=10)
    with pytest.raises(ValueError, match="seeds must be one for each of the 1 models"):
        train_many(models, groups, blobs, epochs=1, batch_size=10, seeds=[0, 1])
    optimizer = torch.optim.SGD(models[0].parameters(), 0.1)
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 60, got 0"):
        train(models[0], blobs, optimizer, epochs=1, batch_size=0)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 0, got -1"):
        train(models[0], blobs, optimizer, epochs=-1, batch_size=10)


@pytest.mark.parametrize("part", ["x_train", "y_train", "x_test", "y_test"])
def test_inputs_without_a_target_are_refused(blobs, part):
    short, model = blobs._replace(**{part: getattr(blobs, part)[:20]}), network(0)
    settings = {"epochs": 1, "batch_size": 10}
    with pytest.raises(ValueError, match=r"data must have a target for each input, got .* in the t[a-z]* part"):
        train(model, short, torch.optim.SGD(model.parameters(), 0.1), **settings)
    with pytest.raises(ValueError, match="data must have a target for each input"):
        train_many([model], 0.1, short, **settings)


def test_a_loss_of_one_entry_is_a_number_and_one_of_more_is_none(blobs):
    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets).reshape(1)

    models, settings = [network(0), network(0)], {"epochs": 1, "batch_size": 20, "loss": loss}
    with torch.no_grad():  # of the caller, who does not want to train anything else
        alone = train(models[0], blobs, torch.optim.SGD(models[0].parameters(), 0.1), **settings)
    together = train_many(models[1:], 0.1, blobs, **settings)
    assert alone["loss"].shape == (3,) and alone["test_loss"].shape == ()
    for name, value in alone.items():
        torch.testing.assert_close(together[name][0], value)
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \(20,\)"):
        train(
            models[0], blobs, torch.optim.SGD(models[0].parameters(), 0.1), **settings | {"loss": lambda a, b: a[:, 0]}
        )


def test_no_epochs_test_the_networks_as_they_stand(blobs):
    models = [network(0), network(1)]
    together = train_many(models, 0.1, blobs, epochs=0, batch_size=10)
    for k in range(2):
        single = train(network(k), blobs, torch.optim.SGD(models[k].parameters(), 0.1), epochs=0, batch_size=10)
        assert single["loss"].shape == (0,) and together["loss"].shape == (2, 0)
        assert together["accuracy"][k] == single["accuracy"]
        torch.testing.assert_close(together["test_loss"][k], single["test_loss"])


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3)])
def test_seeds_of_any_integer_type(blobs, seed):
    losses = []
    for own in (3, seed, [seed, seed]):
        losses.append(train_many([network(0), network(1)], 0.1, blobs, epochs=1, batch_size=20, seeds=own)["loss"])
        model = network(0)
        alone = train(model, blobs, torch.optim.SGD(model.parameters(), 0.1), epochs=1, batch_size=20, seed=seed)
        torch.testing.assert_close(losses[-1][0], alone["loss"])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("targets", ["numbers", "yes or no", "one number for two"])
def test_there_is_no_accuracy_without_classes(blobs, targets):
    y = {"numbers": blobs.x_train[:, :1], "yes or no": (blobs.y_train == 0).float()[:, None]}
    y = y.get(targets, blobs.y_train[:, None].double().float())
    data = Split(blobs.x_train, y, blobs.x_train, y.long() if targets == "one number for two" else y)
    loss = {"loss": lambda out, y: nn.functional.mse_loss(out, y.float()), "epochs": 1, "batch_size": 20}
    model = nn.Linear(5, 1)
    assert set(train(model, data, torch.optim.SGD(model.parameters(), 0.01), **loss)) == {"loss", "test_loss"}
    assert set(train_many([model], 0.01, data, **loss)) == {"loss", "test_loss"}


def test_an_interrupted_call_gives_back_rates_and_modes(blobs):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []

    def loss(outputs, targets):
        calls.append(outputs.shape)
        if len(calls) == 3 or len(outputs) == 30:  # within the steps, then in the test at the end
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(model, blobs, optimizer, epochs=2, batch_size=20, schedule=one_cycle, loss=loss)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert [part.training for part in model] == [True, False, True] and model.training
    assert len(calls) > 6
    start = network(0)
    models, calls[:] = [network(0), network(1)], []
    with pytest.raises(KeyboardInterrupt):
        train_many(models, 0.1, blobs, epochs=2, batch_size=20, loss=loss)
    assert not torch.equal(models[0][0].weight, start[0].weight)  # where it got to
