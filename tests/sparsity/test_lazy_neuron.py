"""Firing rates: against a count by hand, several calls, masks, modes and hooks, stacks, and bad input."""

import pytest
import torch
from torch import nn

from polylib.lab import Stack
from polylib.sparsity import TopK, TopKMLP, activation_sparsity, firing_rates


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(dropout), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 2))


def inputs(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_by_hand():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
    model[0].weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, -1.0], [-1.0, -1.0]]))
    x = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [3.0, -4.0], [0.0, 0.0]])
    # The units see 1, -1, -2; -1, 0, 1; 3, 4, 1; 0, 0, 0. A zero does not count.
    assert firing_rates(model, x)["1"].tolist() == [0.5, 0.25, 0.5]
    assert activation_sparsity(model, x) == pytest.approx({"1": 5 / 12})


def test_of_a_network():
    model, x = network(), inputs(30, 4, 6)
    found = firing_rates(model, x)
    hidden = model[:2](x)
    assert set(found) == {"1", "4"} and found["4"].shape == (9,)
    torch.testing.assert_close(found["1"], (hidden != 0).float().mean((0, 1)))
    assert activation_sparsity(model, x)["4"] == pytest.approx((model[:5](x) != 0).float().mean().item())
    assert set(firing_rates(model, x, ["4", "0"])) == {"4", "0"}
    torch.testing.assert_close(firing_rates(model, x, ["0"])["0"], found["1"])  # positive before ReLU, and after it


def test_one_sample_and_none():
    model = network()
    x = inputs(6)
    torch.testing.assert_close(firing_rates(model, x)["1"], (model[:2](x) > 0).float())
    assert firing_rates(model, x[None][:0])["1"].isnan().all()


def test_all_calls_of_a_layer_count():
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Linear(6, 6), relu)
    x = inputs(50, 6)
    both = torch.cat([x, model[1](x.relu())])
    torch.testing.assert_close(firing_rates(model, x)["0"], (both > 0).float().mean(0))


def test_evaluation_mode_and_hooks_are_as_before():
    model, x = network(dropout=0.9), inputs(40, 6)
    model[0].eval()
    modes = [part.training for part in model.modules()]
    found = activation_sparsity(model, x)
    assert found == activation_sparsity(model, x)
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks for part in model.modules())
    with pytest.raises(RuntimeError):
        activation_sparsity(model, inputs(4, 5))
    assert not any(part._forward_hooks for part in model.modules())
    assert [part.training for part in model.modules()] == modes


def test_padding_does_not_count():
    model, x = network(), inputs(8, 5, 6)
    mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    torch.testing.assert_close(firing_rates(model, x, mask=mask)["1"], firing_rates(model, x[mask])["1"])


def test_behind_top_k():
    model = TopKMLP(6, 20, 3)
    found = activation_sparsity(model, inputs(200, 6))
    assert found["topk"] == pytest.approx(3 / 20, abs=0.01) and found["activation"] > 0.3
    assert set(activation_sparsity(nn.Sequential(TopK(2)), inputs(3, 6))) == {"0"}


def test_in_a_stack_of_networks():
    models = [TopKMLP(6, 20, 3) for _ in range(3)]
    x = inputs(30, 6)
    found = Stack(models, 0.1).evaluate(firing_rates, x, shared=True)
    for i, model in enumerate(models):
        for name, rates in firing_rates(model, x).items():
            torch.testing.assert_close(found[name][i], rates)


def test_bad_input():
    x = inputs(3, 6)
    with pytest.raises(ValueError, match="ReLU that is a module"):
        firing_rates(nn.Sequential(nn.Linear(6, 6), nn.GELU()), x)
    with pytest.raises(ValueError, match=r"layers must be one of .*, got 'relu'"):
        firing_rates(network(), x, ["relu"])
    for layers in ("1", []):
        with pytest.raises(ValueError, match="layers must be a list of names"):
            firing_rates(network(), x, layers)
    with pytest.raises(ValueError, match=r"mask must have shape \(3,\), that of '1'"):
        firing_rates(network(), x, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match="got builtin_function"):
        firing_rates(torch.relu, x)
    with pytest.raises(TypeError, match="layers must have tensors"):
        firing_rates(nn.GRU(6, 4), x, [""])
    part = nn.Module()
    part.used, part.idle = nn.Linear(6, 2), nn.ReLU()
    part.forward = lambda x: part.used(x)
    with pytest.raises(ValueError, match="layers must run when module is called, got 'idle'"):
        firing_rates(part, x)
