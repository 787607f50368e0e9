"""Top-k activations: what is kept, gradients, limits, the gathered second product, and bad input."""

import pytest
import torch
from torch import nn

from polylib.kernels import sparse_down
from polylib.sparsity import TopK, TopKMLP


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_sorting(x, k):
    """Entries of each row from the k-th largest on, which is the definition where no two are equal."""
    return torch.where(x >= x.sort(-1, descending=True).values[..., k - 1 : k], x, 0)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_largest_are_kept(k):
    x = draw(4, 5, 7)
    torch.testing.assert_close(TopK(k)(x), by_sorting(x, k))
    torch.testing.assert_close(TopK(min(k, 5), dim=1)(x), by_sorting(x.mT, min(k, 5)).mT)


def test_as_many_as_there_are_or_more_change_nothing():
    x = draw(3, 7)
    for k in (7, 8, 10**9):
        assert torch.equal(TopK(k)(x), x)


def test_before_relu_or_after_it_is_the_same():
    x = draw(40, 9) - 0.1
    assert ((x > 0).sum(1) < 4).any() and ((x > 0).sum(1) > 4).any()
    after = TopK(4)(x.relu())
    torch.testing.assert_close(TopK(4)(x).relu(), after)
    torch.testing.assert_close((after > 0).sum(1), (x > 0).sum(1).clamp(max=4))


def test_of_equal_entries_exactly_k_stay():
    for k in (1, 2, 3):
        assert (TopK(k)(torch.ones(5, 6)) != 0).sum(1).tolist() == [k] * 5


def test_gradient_goes_through_what_is_kept():
    x = draw(5, 8).requires_grad_()
    weight = draw(5, 8, seed=1)
    (TopK(3)(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.where(by_sorting(x.detach(), 3) != 0, weight, 0))
    torch.autograd.gradcheck(TopK(3), (x,))
    torch.autograd.gradgradcheck(lambda x: TopK(3)(x).square(), (x,))


def test_in_training_and_afterwards():
    layer, x = TopK(2), draw(4, 6)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_mlp_by_its_formula(activation):
    layer, x = TopKMLP(5, 16, 4, activation).double(), draw(3, 2, 5)
    hidden = getattr(nn.functional, activation)(x @ layer.up.weight.T + layer.up.bias)
    wanted = by_sorting(hidden, 4) @ layer.down.weight.T + layer.down.bias
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.gathered(x), wanted)


def test_with_all_units_it_is_dense():
    layer, x = TopKMLP(5, 16, 16).double(), draw(7, 5)
    dense = nn.Sequential(layer.up, nn.ReLU(), layer.down)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.gathered(x), dense(x))


def test_gathered_has_the_same_gradients():
    layer, x = TopKMLP(5, 16, 4).double(), draw(7, 5)
    trained = list(layer.parameters())
    one = torch.autograd.grad(layer(x).square().sum(), trained)
    torch.testing.assert_close(torch.autograd.grad(layer.gathered(x).square().sum(), trained), one)


def test_rows_of_a_hidden_unit_are_contiguous_and_start_as_those_of_linear():
    torch.manual_seed(0)
    layer = TopKMLP(5, 16, 4)
    torch.manual_seed(0)
    up, down = nn.Linear(5, 16), nn.Linear(16, 5)
    torch.testing.assert_close((layer.up.weight, layer.down.weight), (up.weight, down.weight))
    layer.load_state_dict(layer.state_dict())
    assert layer.down.weight.T.is_contiguous()


def test_rows_of_a_weight_are_summed():
    weight, values = draw(6, 3), draw(2, 4, seed=1)
    indices = torch.tensor([[0, 5, 5, 2], [1, 1, 1, 1]])  # some occur twice and more
    full = torch.zeros(2, 6, dtype=torch.float64).scatter_add(1, indices, values)
    torch.testing.assert_close(sparse_down(values, indices, weight), full @ weight)
    bias = draw(3, seed=2)
    torch.testing.assert_close(sparse_down(values[:, :0], indices[:, :0], weight, bias), bias.expand(2, 3))


def test_bad_input():
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        TopK(0)
    with pytest.raises(ValueError, match="x must have shape with dimension 1"):
        TopK(2, dim=1)(draw(3))
    with pytest.raises(ValueError, match="x must have shape with dimension -1"):
        TopK(2)(torch.tensor(1.0))
    with pytest.raises(ValueError, match="activation must be one of 'relu', 'gelu'"):
        TopKMLP(4, 8, 2, "tanh")
    with pytest.raises(ValueError, match="m must be an integer of at least 1"):
        TopKMLP(4, 0, 2)
    for run in (TopKMLP(4, 8, 2), TopKMLP(4, 8, 2).gathered):
        with pytest.raises(ValueError, match=r"x must have shape \(..., 4\), got \(3, 5\)"):
            run(torch.zeros(3, 5))
    with pytest.raises((ValueError, IndexError)):
        sparse_down(torch.ones(1, 1), torch.tensor([[8]]), torch.ones(8, 4))
