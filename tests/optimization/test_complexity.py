"""Counting flops, parameters and activations: by hand, by what ones add up to, and the model left as it was."""

import pytest
import torch
from torch import nn

from polylib.optimization import Complexity, conv_complexity


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 12, (5, 1), groups=4, dilation=(2, 1)),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 7),
    )


def test_by_hand():
    found = conv_complexity(network(), (3, 40, 36))
    places = (20 * 18, (10 - 8) * 9)  # 20 x 18, after pooling 10 x 9, after the second convolution 2 x 9
    weights = (3 * 8 * 9, 8 * 12 * 5 // 4, 48 * 7)
    flops = weights[0] * places[0] + (weights[1] + 12) * places[1] + weights[2] + 7
    acts = 8 * places[0] + 8 * 10 * 9 + 12 * places[1] + 7
    assert found == Complexity(flops, sum(weights) + 16 + 12 + 7, acts)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False), (4, 17)),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=(1, 2), bias=False), (6, 9, 7)),
        (nn.Conv3d(2, 4, (1, 3, 2), bias=False), (2, 4, 5, 6)),
        (nn.Linear(5, 3, bias=False), (4, 5)),
    ],
)
def test_multiply_adds_are_as_many_as_ones_add_up_to(layer, shape):
    nn.init.ones_(layer.weight)
    output = layer(torch.ones(1, *shape))
    found = conv_complexity(layer, shape)
    assert found == Complexity(int(output.sum()), layer.weight.numel(), output.numel())


def test_a_shared_layer_costs_twice_and_has_its_parameters_once():
    layer = nn.Conv2d(4, 4, 1)
    once, twice = conv_complexity(layer, (4, 5, 5)), conv_complexity(nn.Sequential(layer, layer), (4, 5, 5))
    assert twice == Complexity(2 * once.flops, once.params, 2 * once.acts)


def test_the_model_is_left_as_it_was():
    model = network()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    conv_complexity(model, (3, 40, 36))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model[2](torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


def test_a_failed_count_leaves_the_model_as_it_was_too():
    model = network()
    with pytest.raises(RuntimeError):
        conv_complexity(model, (5, 40, 36))
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model[2](torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


def test_device_dtype_and_size_do_not_matter():
    expected = conv_complexity(network(), (3, 40, 36))
    assert conv_complexity(network().double(), (3, 40, 36)) == expected
    assert conv_complexity(network().to("meta"), [3, 40, 36]) == expected
    with torch.device("meta"):
        large = nn.Conv2d(1000, 1000, 3, padding=1, bias=False)
    assert conv_complexity(large, (1000, 4000, 4000)).flops == 9 * 1000**2 * 4000**2


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return nn.functional.conv2d(x, self.conv.weight)


def test_what_would_not_be_counted_raises():
    with pytest.raises(ValueError, match=r"got ConvTranspose2d at '1'"):
        conv_complexity(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1)), (3, 4, 4))
    with pytest.raises(ValueError, match=r"got PReLU at 'its root'"):
        conv_complexity(nn.PReLU(), (3, 4, 4))
    with pytest.raises(ValueError, match="model must call every layer in its forward, got 'conv'"):
        conv_complexity(Bypassing(), (3, 4, 4))
    with pytest.raises(ValueError, match=r"the output of Linear must have shape \(1, ...\) for a batch"):
        conv_complexity(nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), (4, 3))
    with pytest.raises(ValueError, match="the input of batch norm must have shape"):
        conv_complexity(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)), (3, 4, 4))
    with pytest.raises(ValueError, match="input_shape must be an integer of at least 1, got 0"):
        conv_complexity(nn.Conv2d(3, 4, 1), (3, 0, 4))


def test_no_layers_cost_nothing():
    assert conv_complexity(nn.ReLU(), (3, 4, 4)) == Complexity(0, 0, 0)
