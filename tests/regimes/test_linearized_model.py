import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from polylib.lab import Stack
from polylib.regimes import LinearizedModel


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def shifted(model, size, seed=1):
    """The parameters of a model, moved by random numbers."""
    return {
        name: p.detach() + size * draw(*p.shape, seed=seed + k) for k, (name, p) in enumerate(model.named_parameters())
    }


def test_it_is_the_jacobian_times_the_step():
    model, x = network(), draw(5, 4)
    params0, params = dict(model.named_parameters()), shifted(model, 0.3)
    twin = LinearizedModel(model)
    for name, value in params.items():
        twin.moving.get_parameter(name).data.copy_(value)
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(params0)
    expected = model(x) + sum(
        torch.einsum("nk...,...->nk", jacobian[name], params[name] - params0[name]) for name in params
    )
    torch.testing.assert_close(twin(x), expected)


def test_at_the_start_it_has_the_value_and_the_gradient_of_the_network():
    model, x = network(), draw(5, 4)
    twin = LinearizedModel(model)
    torch.testing.assert_close(twin(x), model(x))
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(twin.moving.get_parameter(name).grad, p.grad)
    assert all(p.grad is None for p in twin.start.parameters())


def test_the_error_is_of_second_order():
    model, x = network(), draw(50, 4)
    errors = []
    for size in (1e-2, 1e-3):
        params = shifted(model, size)
        twin = LinearizedModel(model)
        for name, value in params.items():
            twin.moving.get_parameter(name).data.copy_(value)
        errors.append((twin(x) - functional_call(model, params, (x,))).norm())
    assert 80 < errors[0] / errors[1] < 125


def test_expanded_around_other_parameters_it_is_the_tangent_there():
    model, x = network(), draw(5, 4)
    params0 = shifted(model, 0.1)
    twin = LinearizedModel(model, params0)
    for name, value in params0.items():
        twin.moving.get_parameter(name).data.copy_(value)
    torch.testing.assert_close(twin(x), functional_call(model, params0, (x,)))


def test_training_it_leaves_the_network_alone():
    model, x = network(), draw(5, 4)
    before = [p.detach().clone() for p in model.parameters()]
    twin = LinearizedModel(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = twin(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=0)


def test_a_stack_of_twins_trains_as_each_alone():
    x, y = draw(5, 4), draw(5, 2, seed=3)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    twins = [LinearizedModel(network(seed)) for seed in (0, 1)]
    stack = Stack(twins, 0.1)
    for _ in range(3):
        together = stack.step(loss, (x, y), shared=True)
    for k, seed in enumerate((0, 1)):
        alone = Stack([LinearizedModel(network(seed))], 0.1)
        for _ in range(3):
            value = alone.step(loss, (x, y), shared=True)
        torch.testing.assert_close(together[k], value[0])


def test_other_parameters_are_refused():
    model = network()
    good = {name: p.detach() for name, p in model.named_parameters()}
    renamed = {("first" if name == "0.weight" else name): value for name, value in good.items()}
    with pytest.raises(ValueError, match=r"params0 must have the names \['0\.bias', .*, got .*'first'"):
        LinearizedModel(model, renamed)
    with pytest.raises(ValueError, match=r"params0\['2\.bias'\] must have shape \(2,\), got \(3,\)"):
        LinearizedModel(model, good | {"2.bias": torch.zeros(3)})
