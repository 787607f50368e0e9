from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from polylib.quantization import (
    StatsQuantizer,
    UniformQuantizer,
    activation_trace,
    hutchinson_trace,
    quantization_sensitivity,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(matrix):
    """The loss w^T A w / 2 of a parameter `a` of 2 x 2 and a parameter `b` of the other entries."""

    def loss(p):
        w = torch.cat([p["a"].flatten(), p["b"]])
        return 0.5 * w @ matrix @ w

    return loss, {"a": torch.randn(2, 2, dtype=F64), "b": torch.randn(len(matrix) - 4, dtype=F64)}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(12, 4, dtype=F64), torch.randint(3, (12,))


def test_one_probe_is_exact_for_a_diagonal_hessian():
    loss, params = quadratic(torch.arange(1.0, 8.0, dtype=F64).diag())
    for per_block in (False, True):
        trace, stderr = hutchinson_trace(loss, params, 1, per_block=per_block)
        torch.testing.assert_close(trace, torch.tensor([10.0, 18.0], dtype=F64))
        assert stderr.isnan().all()
    torch.testing.assert_close(hutchinson_trace(loss, params, 5).stderr, torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("per_block", [False, True])
def test_the_mean_and_the_standard_error_are_those_of_the_theory(per_block):
    half = torch.randn(7, 7, generator=seeded(), dtype=F64)
    matrix, probes = half + half.T, 4000
    loss, params = quadratic(matrix)
    trace, stderr = hutchinson_trace(loss, params, probes, per_block=per_block, generator=seeded())
    for k, rows in enumerate((slice(0, 4), slice(4, 7))):
        own = matrix[rows, rows]
        assert abs(trace[k] - own.trace()) < 4 * stderr[k]
        inside = 2 * (own.square().sum() - own.diag().square().sum())
        outside = matrix[rows].square().sum() - own.square().sum()
        variance = inside if per_block else inside + outside
        torch.testing.assert_close(stderr[k], (variance / probes).sqrt(), rtol=0.1, atol=0)


@pytest.mark.parametrize("per_block", [False, True])
def test_a_network_against_the_dense_hessian(per_block):
    model, x, y = network()
    params = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    trace, stderr = hutchinson_trace(
        lambda p: F.cross_entropy(functional_call(model, p, (x,)), y),
        params,
        600,
        per_block=per_block,
        generator=seeded(),
    )
    for k, (name, weight) in enumerate(params.items()):
        dense = hessian(lambda w, name=name: F.cross_entropy(functional_call(model, {name: w}, (x,)), y))(weight)
        exact = dense.detach().view(weight.numel(), -1).trace()
        assert abs(trace[k] - exact) < 4 * stderr[k]
    assert not trace.requires_grad


def test_no_gradient_is_left_and_none_is_changed():
    model, x, y = network()
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hutchinson_trace(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y), dict(model.named_parameters()), 2)
    activation_trace(model, lambda z: F.cross_entropy(z, y), x, ["1"], 2)
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 3.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model[1]._forward_hooks


def test_chunks_and_generators_decide_nothing_but_speed_and_draw():
    model, x, y = network()
    params = dict(model.named_parameters())
    estimate = partial(hutchinson_trace, lambda p: F.cross_entropy(functional_call(model, p, (x,)), y), params, 12)
    first = estimate(generator=seeded(1))
    for chunk in (1, 5, 12, 100):
        torch.testing.assert_close(estimate(generator=seeded(1), chunk_size=chunk), first)
    assert not torch.equal(estimate(generator=seeded(2)).trace, first.trace)


def test_activations_against_the_dense_hessian_of_each_sample():
    model, x, y = network()
    layers = ["1", "0"]  # the order asked for, not that of the network
    trace, stderr = activation_trace(
        model, lambda z: F.cross_entropy(z, y), x, layers, 800, generator=seeded(), chunk_size=100
    )
    outputs = {"0": model[0](x), "1": model[1](model[0](x))}
    after = {"0": model[1:], "1": model[2:]}
    for k, name in enumerate(layers):
        each = [
            hessian(lambda a, n=n, name=name: F.cross_entropy(after[name](a), y[n]))(outputs[name][n]).trace()
            for n in range(len(x))
        ]
        assert abs(trace[k] - torch.stack(each).mean()) < 4 * stderr[k]


def test_sensitivity_is_the_trace_times_the_squared_distance():
    weights = {"a": torch.randn(6, 4), "b": torch.randn(3, 2, 3, 3)}
    bits = [2, 3, 4, 8]
    for quantizer in (UniformQuantizer, partial(UniformQuantizer, per_channel=True), StatsQuantizer):
        omega, distance = quantization_sensitivity(weights, [0.5, 2.0], bits, quantizer)
        for i, w in enumerate(weights.values()):
            for j, b in enumerate(bits):
                expected = (quantizer(b)(w) - w).square().sum().item()
                assert distance[i, j].item() == pytest.approx(expected, rel=1e-5)
                assert omega[i, j].item() == pytest.approx([0.5, 2.0][i] * expected, rel=1e-5)
    omega, _ = quantization_sensitivity(list(weights.values()), torch.tensor([0.5, 2.0]), bits)
    assert (omega.diff(dim=1) < 0).all()  # more bits, less error


def test_a_negative_trace_counts_as_zero_and_says_so():
    weights = [torch.randn(5, 5), torch.randn(5, 5)]
    with pytest.warns(UserWarning, match="negative"):
        omega, distance = quantization_sensitivity(weights, [-1.0, 1.0], [2, 4])
    assert (omega[0] == 0).all() and torch.equal(omega[1], distance[1])


def test_bad_input():
    loss, params = quadratic(torch.eye(7, dtype=F64))
    with pytest.raises(ValueError, match="num_probes must be an integer of at least 1, got 0"):
        hutchinson_trace(loss, params, 0)
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1, got 0"):
        hutchinson_trace(loss, params, chunk_size=0)
    with pytest.raises(ValueError, match="params"):
        hutchinson_trace(loss, {})
    with pytest.raises(ValueError, match="params"):
        hutchinson_trace(loss, {"a": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(3,\)"):
        hutchinson_trace(lambda p: p["b"].square(), params)
    model, x, y = network()
    for layers in ([], ["7"]):
        with pytest.raises(ValueError, match="layers"):
            activation_trace(model, lambda z: F.cross_entropy(z, y), x, layers)
    model[1].unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"1\.unused.*does not call"):
        activation_trace(model, lambda z: F.cross_entropy(z, y), x, ["1.unused"])
    for traces in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="average_traces"):
            quantization_sensitivity([torch.ones(3), torch.ones(2)], traces, [2])
    with pytest.raises(ValueError, match=r"average_traces must be 0 finite numbers, one a weight, got \[\]"):
        quantization_sensitivity([], [], [2])
