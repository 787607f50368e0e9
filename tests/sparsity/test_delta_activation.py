"""Delta activations: values, the gradients of the steps by hand, what is counted, and bad input."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from polylib.kernels import delta_relu
from polylib.lab import Stack
from polylib.sparsity import (
    DeltaActivation,
    FrameNetwork,
    SparseActivation,
    activity_penalty,
    delta_quantize,
    mac_density,
    recorded,
)


def off_borders(shape, q, seed=0, dtype=torch.float64):
    """Numbers of both signs whose multiple of q is not near a half."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(-4, 9, shape)
    return torch.tensor((codes + draw.uniform(-0.4, 0.4, shape)) * q, dtype=dtype)


def test_values_are_the_nearest_multiples():
    x = off_borders((3, 4, 5, 2), 0.3)
    expected = np.rint(np.maximum(x.numpy(), 0) / 0.3) * 0.3
    q = torch.full((5, 1), 0.3, dtype=x.dtype)
    torch.testing.assert_close(delta_quantize(x.relu(), q).numpy(), expected)
    y, total, count = delta_relu(x, q)
    torch.testing.assert_close(y.numpy(), expected)
    change = np.diff(expected, axis=1)
    assert total.item() == pytest.approx(np.abs(change).sum())
    assert count.item() == (np.abs(change) > 0.15).sum() and count.dtype == torch.int64


def test_a_small_step_changes_nothing():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    layer = DeltaActivation(4, threshold=1e-5).double()
    torch.testing.assert_close(layer(x), x.relu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (5, 1), (5, 2), (1, 1)])
def test_gradients_of_values(shape):
    # By definition: g for a, and minus the sum of g k for each step.
    a = off_borders((3, 4, 5, 2), 0.3).requires_grad_()
    q = torch.full(shape, 0.3, dtype=a.dtype, requires_grad=True)
    g = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(1))
    by_a, by_q = torch.autograd.grad(delta_quantize(a, q), (a, q), g)
    product = -g * torch.tensor(np.rint(a.detach().numpy() / 0.3))
    expected = {(): product.sum(), (5, 1): product.sum((0, 1, 3))[:, None], (5, 2): product.sum((0, 1))}
    torch.testing.assert_close(by_a, g)
    torch.testing.assert_close(by_q, expected.get(shape, product.sum().view(1, 1)))


@pytest.mark.parametrize("relu", [True, False])
def test_one_backward_is_that_of_the_parts(relu):
    x = off_borders((2, 5, 3), 0.2)
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (True, False):
        x, q = x.detach().requires_grad_(), torch.full((3,), 0.2, dtype=x.dtype, requires_grad=True)
        if fused:
            y, total, _ = delta_relu(x, q, relu)
        else:
            y = delta_quantize(x.relu() if relu else x, q)
            # Codes, so that what does not change is zero and not nearly zero.
            code = (y / q).round()
            sign = (code[:, 1:] - code[:, :-1]).sign().detach()
            total = (sign * (y[:, 1:] - y[:, :-1])).sum()
        found.append(torch.autograd.grad((g * y).sum() + 0.7 * total, (x, q)))
    torch.testing.assert_close(found[0], found[1])


def test_the_penalty_only_ever_raises_the_step():
    x = off_borders((4, 6, 3), 0.25)
    for size in (0.25, -0.25):  # the parameter may be negative
        layer = DeltaActivation(3, threshold=0.25).double()
        layer.threshold.data.fill_(size)
        with recorded(layer) as seen:
            layer(x)
        seen[0].l1.backward()
        codes = np.rint(np.maximum(x.numpy(), 0) / 0.25)
        expected = -np.abs(np.diff(codes, axis=1)).sum((0, 1)) / (4 * 5 * 3) * np.sign(size)
        torch.testing.assert_close(layer.threshold.grad.numpy(), expected)
        assert (layer.threshold.grad * np.sign(size) < 0).all()


def test_a_clip_that_stands_still_sends_nothing():
    x = torch.rand(3, 1, 4, 5, 5).expand(-1, 6, -1, -1, -1)
    layer = DeltaActivation(4, 2, emit="delta")
    with recorded(layer) as seen:
        y = layer(x)
    assert not y[:, 1:].any() and y[:, 0].any()
    assert seen[0].density.item() == 0 and seen[0].l1.item() == 0 and seen[0].neurons == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_codes_differ_by_exactly_nothing_in_half_precision(dtype):
    x = off_borders((2, 2, 500), 0.1, dtype=torch.float32)
    x[:, 1] = x[:, 0] + 0.003
    y, total, count = delta_relu(x.to(dtype), torch.full((), 0.1), relu=False)
    codes = (x.to(dtype).float() / 0.1).round()
    assert y.dtype == dtype and count.item() == (codes[:, 1] != codes[:, 0]).sum()
    assert ((y[:, 1] != y[:, 0]) == (codes[:, 1] != codes[:, 0])).all()
    assert total.dtype == torch.float32


def test_changes_add_up_to_values():
    x = off_borders((2, 6, 3, 4), 0.1)
    sent = DeltaActivation(3, 1, emit="delta", activation="identity").double()
    torch.testing.assert_close(sent(x).cumsum(1), DeltaActivation(3, 1, activation="identity").double()(x))
    # A layer that sums what comes in sees the values again.
    inner = DeltaActivation(3, 1, sigma=True).double()
    back = torch.cat([x[:, :1], x.diff(dim=1)], 1)
    torch.testing.assert_close(inner(back), DeltaActivation(3, 1).double()(x))


def test_a_whole_network_on_changes():
    torch.manual_seed(0)
    maps = [nn.Conv1d(2, 3, 3, bias=False), nn.Linear(12, 5, bias=False)]
    nets = []
    for emit, sigma in (("value", False), ("delta", True)):
        layers = [
            DeltaActivation(2, 1, activation="identity", emit=emit),
            maps[0],
            DeltaActivation(3, 1, bias=True, emit=emit, sigma=sigma),
            nn.Flatten(),
            maps[1],
        ]
        layers[2].bias.data[:] = torch.tensor([[0.3], [-0.1], [0.2]])
        nets.append(FrameNetwork(*layers).double())
    clip = torch.randn(3, 7, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(nets[1](clip).cumsum(1), nets[0](clip), rtol=0, atol=1e-12)


def test_granularity_and_softmax():
    x = torch.randn(2, 3, 4, 5)
    for granularity, shape in (("channel", (4, 1)), ("neuron", (4, 5)), ("layer", (1, 1))):
        layer = DeltaActivation(4, (5,), granularity=granularity, activation="softmax")
        assert layer.threshold.shape == shape
        torch.testing.assert_close(layer(x), delta_quantize(x.softmax(2), torch.tensor(0.1)))


def test_records_of_a_network():
    net = FrameNetwork(
        DeltaActivation(2, fan_out=3.0, activation="identity"), nn.Linear(2, 3), SparseActivation(fan_out=5.0)
    )
    clip = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [1.0, 3.0]]])
    with recorded(net) as seen:
        y = net(clip)
    first, second = seen
    assert first.density.item() == 0.5 and first.l1.item() == pytest.approx(0.75)
    assert second.density.item() == pytest.approx((y > 0).float().mean().item())
    assert second.l1.item() == pytest.approx(y.mean().item())
    assert activity_penalty(seen).item() == pytest.approx(3 * 0.75 + 5 * y.mean().item())
    assert mac_density(seen).item() == pytest.approx((2 * 3 * 0.5 + 3 * 5 * second.density.item()) / 21)
    with recorded(net[2]) as again:
        net(clip)
    assert len(again) == 1 and len(seen) == 2


def test_the_record_ends_with_its_context_and_leaves_a_module_that_can_be_copied():
    layer = DeltaActivation(3)
    with pytest.raises(RuntimeError, match="on purpose"), recorded(layer) as seen:
        layer(torch.randn(2, 3, 3))
        raise RuntimeError("on purpose")
    layer(torch.randn(2, 1, 3))
    assert len(seen) == 1
    copy.deepcopy(layer)


def test_another_rule_of_rounding():
    def ordinary(a, q):
        code = (a / q).round().detach()
        return (q * code).detach() + (a - a.detach()) + (code - (a / q).detach()) * (q - q.detach())

    x = off_borders((2, 4, 3), 0.1)
    layers = [DeltaActivation(3, quantize=rule).double() for rule in (ordinary, delta_quantize)]
    seen = []
    for layer in layers:
        with recorded(layer) as own:
            seen.append((layer(x), own[0].density))
    torch.testing.assert_close(seen[0], seen[1])
    grads = [torch.autograd.grad(layer(x).sum(), layer.threshold)[0] for layer in layers]
    v = x.relu() / torch.tensor(0.1).double()
    torch.testing.assert_close(grads[0], (v.round() - v).sum((0, 1)))
    torch.testing.assert_close(grads[1], -v.round().sum((0, 1)))


def test_a_threshold_at_zero_can_come_back():
    layer = DeltaActivation(1, threshold=1.0)
    layer.threshold.data.fill_(1e-7)
    assert layer.step().item() == pytest.approx(1e-5)
    y = layer(torch.rand(2, 3, 1))
    assert y.isfinite().all()
    y.sum().backward()
    assert layer.threshold.grad.abs().item() > 0


def test_penalised_networks_train_in_a_stack_as_alone():
    def make(seed):
        torch.manual_seed(seed)
        layers = [DeltaActivation(4, fan_out=6.0), nn.Linear(4, 6), DeltaActivation(6, fan_out=2.0), nn.Linear(6, 2)]
        return FrameNetwork(*layers).double()

    def loss(model, x):
        with recorded(model) as seen:
            y = model(x)
        return y.square().mean() + 0.1 * activity_penalty(seen)

    alone = [make(0), make(1)]
    together = Stack(copy.deepcopy(alone), 0.05)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    for _ in range(2):
        values = together.step(loss, x, shared=True)
        for model, value in zip(alone, values, strict=True):
            own = loss(model, x)
            torch.testing.assert_close(own.detach(), value)
            for parameter, slope in zip(
                model.parameters(), torch.autograd.grad(own, list(model.parameters())), strict=True
            ):
                parameter.data -= 0.05 * slope
    together.write_back()
    for model, own in zip(together.models, alone, strict=True):
        torch.testing.assert_close(model.state_dict(), own.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"threshold": 0.0}, "threshold must be a finite number above 0, got 0.0"),
        ({"granularity": "pixel"}, "granularity must be one of"),
        ({"granularity": "neuron", "spatial": 2}, "spatial must be sizes for a threshold of each neuron, got 2"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"emit": "spike"}, "emit must be one of"),
        ({"fan_out": -1}, "fan_out must be a finite number above 0, got -1"),
        ({"spatial": -1}, "spatial must be an integer of at least 0, got -1"),
        ({"spatial": (4, 0)}, "spatial must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        DeltaActivation(**({"channels": 3} | options))


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, frames, 3\) with 3 axes, got \(2, 3\)"):
        DeltaActivation(3)(torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"x must have shape \(batch, frames, 3, ...\) with 5 axes, got \(2, 4, 5, 6, 6"
    ):
        DeltaActivation(3, 2)(torch.zeros(2, 4, 5, 6, 6))
    with pytest.raises(ValueError, match=r"\(batch, frames, 3, 4\) with 4 axes, got \(2, 4, 3, 5\)"):
        DeltaActivation(3, (4,))(torch.zeros(2, 4, 3, 5))
    layer = DeltaActivation(3)
    assert layer(torch.zeros(2, 1, 3)).shape == (2, 1, 3)
    with (
        recorded(layer),
        pytest.raises(ValueError, match=r"x must have shape \(batch, frames, ...\) with at least two"),
    ):
        layer(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="model must hold a DeltaActivation or a SparseActivation, got Linear"):
        recorded(nn.Linear(2, 2)).__enter__()


def test_a_step_that_differs_between_frames_has_the_slope_of_values_and_not_of_codes():
    x = torch.tensor([[[1.0], [1.1]]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[[0.2], [0.6]]], dtype=torch.float64)  # codes fall from 5 to 2, values rise from 1.0 to 1.2
    delta_relu(x, q)[1].backward()
    assert x.grad.flatten().tolist() == [-1, 1]


def test_gradients_of_the_penalty_alone_clip_by_clip():
    x, q = torch.rand(6, 2, 5, 3), torch.tensor(0.2)
    each = torch.func.grad(lambda x, q: delta_relu(x, q)[1], (0, 1))
    by_x, by_q = torch.vmap(each, (0, None))(x, q)
    for k in range(6):
        torch.testing.assert_close((by_x[k], by_q[k]), each(x[k], q))


def test_sums_of_half_precision_do_not_overflow():
    large = torch.full((1, 2, 40000), 2.0).half()
    large[:, 1] = 4.0
    for layer, l1 in (
        (SparseActivation(), 3.0),
        (DeltaActivation(40000, threshold=1.0, quantize=lambda a, q: q * (a / q).round()), 2.0),
    ):
        with recorded(layer) as seen:
            layer.half()(large)
        assert seen[0].l1 == l1


def test_what_is_not_floating_or_not_broadcast_is_refused():
    with pytest.raises(TypeError, match=r"dtype of the values must be a floating-point dtype, got torch\.int64"):
        delta_quantize(torch.tensor([1, 2]), torch.tensor(0.7))
    with pytest.raises(ValueError, match=r"q must have shape that is broadcast to \(3,\), got \(2, 3\)"):
        delta_quantize(torch.rand(3), torch.rand(2, 3))
