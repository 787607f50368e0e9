"""Inference on changes: the same outputs, and products counted one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from polylib.sparsity import DeltaActivation, FrameNetwork, SparseActivation, delta_inference, mac_density, recorded


def convolutional(bias):
    torch.manual_seed(0)
    return FrameNetwork(
        DeltaActivation(2, 2, threshold=0.3, activation="identity"),
        nn.Conv2d(2, 4, 3, 2, 1, groups=2, bias=bias),
        DeltaActivation(4, 2, threshold=0.2),
        nn.Flatten(),
        nn.Linear(36, 5, bias=bias),
        DeltaActivation(5, threshold=0.2, bias=True),
        nn.Linear(5, 3, bias=bias),
    ).double()


def clip():
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(3, 1, 2, 6, 6, generator=draw, dtype=torch.float64)
    return start + 0.15 * torch.randn(3, 8, 2, 6, 6, generator=draw, dtype=torch.float64).cumsum(1)


@pytest.mark.parametrize("bias", [False, True])
def test_the_outputs_are_those_of_the_network(bias):
    net, frames = convolutional(bias), clip()
    found = delta_inference(net, frames)
    torch.testing.assert_close(found.output, net(frames), rtol=0, atol=1e-12)
    assert found.macs.shape == (3, 8) and (found.macs[:, 1:].sum(0) < found.macs[:, 0].sum()).all()


def test_a_bias_in_the_map_is_not_a_change():
    # What happens if the map is applied to the changes as it is.
    net, frames = convolutional(True), clip()
    values = net[0](frames)
    sent = torch.cat([values[:, :1], values.diff(dim=1)], 1)
    wrong = net[1](sent.flatten(0, 1)).unflatten(0, sent.shape[:2]).cumsum(1)
    right = net[1](values.flatten(0, 1)).unflatten(0, sent.shape[:2])
    torch.testing.assert_close(wrong[:, 0], right[:, 0])
    assert (wrong[:, 1:] - right[:, 1:]).abs().amin() > 1e-3


def test_products_counted_one_by_one():
    layer = nn.Conv1d(1, 2, 3, stride=2, padding=1, bias=False)
    net = FrameNetwork(DeltaActivation(1, 1, threshold=1.0, activation="identity"), layer)
    frames = torch.tensor([[[[0.0, 1, 0, 2, 0, 0]], [[0.0, 1, 3, 0, 0, 0]], [[0.0, 1, 3, 0, 0, 0]]]])
    expected = []
    before = np.zeros(6)
    for frame in frames[0, :, 0].numpy():
        sent = frame - before
        places = [o + k - 1 for o in (0, 2, 4) for k in range(3)]
        expected.append(2 * sum(0 <= i < 6 and sent[i] != 0 for i in places))
        before = frame
    found = delta_inference(net, frames)
    assert found.macs.tolist() == [expected] and expected[2] == 0
    assert found.dense.tolist() == [2 * 8]  # the first window hangs over the border


def test_the_count_is_the_density_where_there_is_no_border():
    torch.manual_seed(0)
    layers = [DeltaActivation(9, threshold=0.3, fan_out=4.0), nn.Linear(9, 4)]
    layers += [DeltaActivation(4, threshold=0.1, fan_out=2.0), nn.Linear(4, 2)]
    net, frames = FrameNetwork(*layers), torch.randn(5, 6, 9)
    with recorded(net) as seen:
        net(frames)
    found = delta_inference(net, frames)
    share = found.macs[:, 1:].sum() / (5 * found.dense.sum())
    assert share.item() == pytest.approx(mac_density(seen).item())


def test_a_still_clip_costs_one_frame():
    net = convolutional(True)
    found = delta_inference(net, clip()[:, :1].expand(-1, 4, -1, -1, -1))
    assert not found.macs[:, 1:].any() and found.macs[:, 0].all()
    torch.testing.assert_close(found.output[:, 0], found.output[:, 3])


def test_a_clip_of_one_frame():
    net = convolutional(True)
    torch.testing.assert_close(delta_inference(net, clip()[:, :1]).output, net(clip()[:, :1]))


@pytest.mark.parametrize(
    ("layers", "kind", "words"),
    [
        ([nn.Linear(4, 2)], ValueError, "layer 0 of model must get its input from a DeltaActivation, got Linear"),
        ([DeltaActivation(4), nn.Linear(4, 4), nn.Linear(4, 2)], ValueError, "layer 2 of model must get its input"),
        ([DeltaActivation(4), nn.ReLU(), nn.Linear(4, 2)], TypeError, "layer 1 of model must be one of .*, got ReLU"),
        ([SparseActivation(), nn.Linear(4, 2)], TypeError, "layer 0 of model must be one of .*, got SparseActivation"),
        ([DeltaActivation(4, emit="delta"), nn.Linear(4, 2)], ValueError, "layer 0 of model must send values"),
        ([DeltaActivation(4)], ValueError, "model must hold a linear map, got none"),
    ],
)
def test_models_that_it_cannot_run(layers, kind, words):
    with pytest.raises(kind, match=words):
        delta_inference(FrameNetwork(*layers), torch.randn(2, 3, 4))


def test_other_padding_and_clips():
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="layer 1 of model must have zero padding"):
        delta_inference(FrameNetwork(DeltaActivation(1, 1), layer), torch.randn(2, 3, 1, 5))
    net = FrameNetwork(DeltaActivation(4), nn.Linear(4, 2))
    for shape in ((3, 4), (2, 0, 4)):
        with pytest.raises(ValueError, match=r"clip must have shape \(batch, frames, ...\) with at least one frame"):
            delta_inference(net, torch.zeros(shape))


@pytest.mark.parametrize("end", [[], [nn.Flatten()]])
def test_a_network_that_ends_in_an_activation_gives_its_values_and_not_their_changes(end):
    torch.manual_seed(0)
    layers = [DeltaActivation(2, activation="identity"), nn.Linear(2, 3), DeltaActivation(3), *end]
    network, clip = FrameNetwork(*layers).double(), 3 * torch.rand(2, 4, 2).double()
    torch.testing.assert_close(delta_inference(network, clip).output, network(clip))
