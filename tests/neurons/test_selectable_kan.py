import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.neurons import SelectableKANLinear, train_skan
from polylib.neurons.basis_functions import FAMILIES, basis


def test_the_layer_is_its_formula():
    torch.manual_seed(0)
    layer = SelectableKANLinear(3, 2).double()
    layer.mask = (torch.rand(3, 5) > 0.4).double()
    with torch.no_grad():
        layer.select.normal_()
    x = 2 * torch.rand(4, 6, 3, dtype=torch.float64) - 1
    expected = F.silu(x) @ layer.weight.T
    for k, name in enumerate(layer.pool):
        scale = layer.mask[:, k] * layer.select[:, k]
        expected = expected + torch.einsum("...ib,oib,i->...o", basis(x, name), layer.coefficients[k], scale)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_one_family_left_is_the_layer_of_that_family(name):
    layer, k = SelectableKANLinear(3, 2).double(), list(FAMILIES).index(name)
    with torch.no_grad():
        layer.select.normal_()
    layer.mask = torch.zeros(3, 5).double()
    layer.mask[:, k] = 1
    single = SelectableKANLinear(3, 2, pool=(name,)).double()
    with torch.no_grad():
        single.weight.copy_(layer.weight)
        single.coefficients[0] = layer.coefficients[k] * layer.select[:, k, None]
    x = 2 * torch.rand(20, 3, dtype=torch.float64) - 1
    torch.testing.assert_close(layer(x), single(x))


def test_a_family_with_zero_coefficients_has_score_zero_and_can_go():
    torch.manual_seed(0)
    layer = SelectableKANLinear(2, 1)
    with torch.no_grad():
        layer.coefficients[1] = 0
    x = 2 * torch.rand(50, 2) - 1
    before = layer(x).detach()  # the target, so that every family that contributes costs something when it is masked
    scores = layer.scores(lambda: F.mse_loss(layer(x), before))
    assert (layer.mask == 1).all()
    assert (scores[:, 1] == 0).all() and (scores[:, [0, 2, 3, 4]] > 0).all()
    layer.prune(scores, keep=4)
    assert torch.equal(layer(x), before)
    assert layer.families() == [("bspline", "chebyshev", "fourier", "mexican_hat")] * 2


def test_what_is_masked_stays_masked():
    layer = SelectableKANLinear(2, 1)
    layer.mask[0, 3] = 0
    x = 2 * torch.rand(30, 2) - 1
    scores = layer.scores(lambda: layer(x).square().mean())
    assert scores[0, 3] == float("-inf")
    layer.prune(scores, keep=5)
    assert layer.mask[0, 3] == 0 and layer.mask.sum() == 9


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_pruned_layer_is_the_same_function_with_fewer_parameters(keep):
    torch.manual_seed(1)
    layer = SelectableKANLinear(6, 4).double()
    with torch.no_grad():
        layer.select.normal_()
    layer.prune(torch.rand(6, 5), keep)
    small = layer.pruned()
    x = 2 * torch.rand(20, 6, dtype=torch.float64) - 1
    torch.testing.assert_close(small(x), layer(x))
    assert sum(p.numel() for p in small.parameters()) == 6 * 4 * (1 + 8 * keep)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def data(functions, samples=300):
    torch.manual_seed(0)
    x = 2 * torch.rand(len(functions), samples, 2) - 1
    y = torch.stack([f(a[:, 0], a[:, 1]) for f, a in zip(functions, x, strict=True)])
    return x, ((y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True)).unsqueeze(-1)


def test_training_finds_a_sine_for_the_node_that_needs_it():
    x, y = data([lambda a, b: torch.sin(3 * math.pi * a), lambda a, b: torch.sin(3 * math.pi * b)])
    torch.manual_seed(0)
    models = [SelectableKANLinear(2, 1) for _ in range(2)]
    result = train_skan(models, x, y, steps=200)
    assert result["loss"].shape == (2, 200) and result["scores"][""].shape == (2, 2, 5)
    assert models[0].families()[0] == ("fourier",) and models[1].families()[1] == ("fourier",)
    assert (result["loss"][:, -1] < 0.01).all()
    assert [int(m.mask.sum()) for m in models] == [2, 2]


def test_models_train_as_they_would_alone():
    x, y = data([lambda a, b: a * a + b, lambda a, b: torch.exp(a) - b**3])
    together, apart = ([SelectableKANLinear(2, 1) for _ in range(2)] for _ in range(2))
    for one, other in zip(together, apart, strict=True):
        other.load_state_dict(one.state_dict())
    train_skan(together, x, y, steps=40, keep=2)
    for t in range(2):
        train_skan(apart[t : t + 1], x[t : t + 1], y[t : t + 1], steps=40, keep=2)
        assert together[t].families() == apart[t].families()
        torch.testing.assert_close(together[t](x[t]), apart[t](x[t]), rtol=1e-3, atol=1e-3)


def test_deeper_models_are_pruned_in_every_layer():
    x, y = data([lambda a, b: a * b])
    model = nn.Sequential(SelectableKANLinear(2, 3), nn.Tanh(), SelectableKANLinear(3, 1))
    result = train_skan([model], x, y, steps=20, keep=2)
    assert {name: s.shape for name, s in result["scores"].items()} == {"0": (1, 2, 5), "2": (1, 3, 5)}
    assert model[0].mask.sum(1).tolist() == [2, 2] and model[2].mask.sum(1).tolist() == [2, 2, 2]


class Twice(nn.Module):
    """A network that uses one layer, and its mask, in two places."""

    def __init__(self):
        super().__init__()
        self.first = SelectableKANLinear(2, 2)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_a_layer_used_twice_is_trained_and_pruned_once():
    x, y = data([lambda a, b: a * b, lambda a, b: a + b])
    models = [Twice(), Twice()]
    result = train_skan(models, x, y.expand(-1, -1, 2), steps=20)
    assert {name: s.shape for name, s in result["scores"].items()} == {"first": (2, 2, 5)}
    for model in models:
        assert model.second is model.first and model.first.mask.sum(1).tolist() == [1, 1]


def test_keeping_the_whole_pool_prunes_nothing():
    x, y = data([lambda a, b: a + b])
    model = SelectableKANLinear(2, 1)
    train_skan([model], x, y, steps=10, keep=5)
    assert (model.mask == 1).all()


def test_a_warning_outside_the_grid():
    layer = SelectableKANLinear(2, 1)
    with pytest.warns(UserWarning, match="beyond the grid"):
        layer(torch.full((3, 2), 2.0))


X, Y = torch.zeros(1, 4, 2), torch.zeros(1, 4, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SelectableKANLinear(0, 1), "in_features must be an integer of at least 1, got 0"),
        (lambda: SelectableKANLinear(2, 1, pool=()), r"pool must be different names.*, got \(\)"),
        (lambda: SelectableKANLinear(2, 1, pool=("sine",)), r"pool must be different names.*, got \('sine',\)"),
        (
            lambda: SelectableKANLinear(2, 1, pool=("rbf", "rbf")),
            r"pool must be different names.*, got \('rbf', 'rbf'\)",
        ),
        (lambda: SelectableKANLinear(2, 1, n_basis=3), r"n_basis must be an integer.*, got 3"),
        (
            lambda: SelectableKANLinear(2, 1, grid_range=(1.0, 1.0)),
            r"grid_range must be two increasing numbers, got \(1\.0, 1\.0\)",
        ),
        (lambda: SelectableKANLinear(2, 1)(torch.zeros(3, 4)), r"x must have shape \(\.\.\., 2\), got \(3, 4\)"),
        (
            lambda: SelectableKANLinear(2, 1)(torch.tensor([[0.0, float("nan")]])),
            "x must be finite, got values that are not",
        ),
        (lambda: SelectableKANLinear(2, 1).prune(torch.zeros(2, 5), 0), "keep must be an integer from 1 to 5, got 0"),
        (lambda: SelectableKANLinear(2, 1).prune(torch.zeros(2, 5), 6), "from 1 to 5"),
        (lambda: SelectableKANLinear(2, 1).prune(torch.zeros(3, 5), 1), r"scores must have shape \(2, 5\)"),
        (lambda: train_skan([], X, Y, steps=10), "models must be at least one"),
        (lambda: train_skan([nn.Linear(2, 1)], X, Y, steps=10), "at least one SelectableKANLinear"),
        (
            lambda: train_skan([SelectableKANLinear(2, 1)], X, Y, steps=10, keep=6),
            "keep must be an integer from 1 to 5, got 6",
        ),
        (
            lambda: train_skan([SelectableKANLinear(2, 1)], X, Y, steps=10, stages=(0.5, 0.5, 0.5)),
            "stages must be three shares",
        ),
    ],
)
def test_bad_input_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()
