import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from polylib.regimes import ReluRNN, empirical_ntk, kernel_alignment, representation_alignment


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_by_autograd(model, x, names):
    """The Jacobian one row at a time, as backward passes of each output."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for output in model(x).flatten():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, retain_graph=True)]))
    return torch.stack(rows)


torch.manual_seed(0)
FEED = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).double()
RNN = ReluRNN(4, 7, 3, leak=0.6).double()


class TokenMean(nn.Module):
    """A linear layer that is applied to all positions of a sequence at once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.layer(x).tanh().sum(1)


CASES = [
    (FEED, draw(6, 5), ["0.weight", "0.bias", "2.weight", "4.weight", "4.bias"]),
    (FEED, draw(6, 5), ["2.weight"]),
    (FEED, draw(1, 5), ["0.bias"]),
    (RNN, draw(5, 6, 4), ["recurrent.weight"]),
    (RNN, draw(5, 6, 4), ["input.weight", "recurrent.weight", "readout.weight"]),
    (RNN, draw(5, 1, 4), ["input.weight", "recurrent.weight"]),  # one step: the recurrent matrix is never used
    (TokenMean(), draw(3, 5, 4), ["layer.weight", "layer.bias"]),
]


@pytest.mark.parametrize(("model", "x", "names"), CASES)
def test_both_methods_are_the_product_of_explicit_rows(model, x, names):
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = empirical_ntk(model, params, x, wrt=names, method="jacobian")
    gram = empirical_ntk(model, params, x, wrt=names)
    torch.testing.assert_close(gram, jacobian, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram, gram.mT, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9 * gram.norm()
    if x.shape[1] > 1:
        rows = rows_by_autograd(model, x, names)
        torch.testing.assert_close(gram, rows @ rows.mT, rtol=1e-10, atol=1e-10)


def test_a_stack_of_networks_under_vmap():
    models = [ReluRNN(4, 7, 3).double() for _ in range(3)]
    stacked = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    x = draw(4, 5, 4)
    kernels = vmap(lambda p: empirical_ntk(models[0], p, x, wrt=["recurrent.weight"]))(stacked)
    for model, kernel in zip(models, kernels, strict=True):
        own = {name: p.detach() for name, p in model.named_parameters()}
        torch.testing.assert_close(kernel, empirical_ntk(model, own, x, wrt=["recurrent.weight"], method="jacobian"))


def test_any_function_and_outputs_of_any_shape():
    params = {"w": draw(4, 6)}
    x = draw(3, 4)
    kernel = empirical_ntk(lambda p, x: (x @ p["w"]).view(3, 2, 3), params, x, method="jacobian")
    expected = torch.kron(x @ x.mT, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(kernel, expected)


def test_gradients_of_the_module_are_untouched():
    params = {name: p.detach() for name, p in FEED.named_parameters()}
    empirical_ntk(FEED, params, draw(2, 5))
    assert all(p.grad is None for p in FEED.parameters())
    assert not any(module._forward_hooks for module in FEED.modules())


def test_ntk_errors():
    params = {name: p.detach() for name, p in FEED.named_parameters()}
    x = draw(2, 5)
    with pytest.raises(ValueError, match="method must be one of 'gram', 'jacobian', got 'trace'"):
        empirical_ntk(FEED, params, x, method="trace")
    with pytest.raises(ValueError, match=r"wrt must name parameters, \['0\.bias',.*, got '9\.weight'"):
        empirical_ntk(FEED, params, x, wrt=["9.weight"])
    with pytest.raises(ValueError, match=r"model must be a module.*, got a function"):
        empirical_ntk(lambda p, x: x, params, x)
    with pytest.raises(ValueError, match="a row for each sample"):
        empirical_ntk(lambda p, x: (x @ p["0.weight"].mT).sum(0), params, x, wrt=["0.weight"], method="jacobian")
    convolution = nn.Conv1d(1, 1, 1)
    with pytest.raises(ValueError, match="of a Conv1d"):
        empirical_ntk(convolution, dict(convolution.named_parameters()), torch.ones(1, 1, 1))


def kernel(seed, rank=5):
    factor = draw(8, rank, seed=seed)
    return factor @ factor.mT


def test_alignment_is_a_cosine():
    k0, k1 = kernel(0), kernel(1)
    value = kernel_alignment(k0, k1)
    assert 0 < value < 1
    assert value.item() == pytest.approx(((k0 * k1).sum() / (k0.norm() * k1.norm())).item())
    torch.testing.assert_close(kernel_alignment(3 * k0, 0.1 * k1), value)
    torch.testing.assert_close(kernel_alignment(k1, k0), value)
    assert kernel_alignment(k0, k0).item() == pytest.approx(1)
    pairs = kernel_alignment(torch.stack([k0, k1]), torch.stack([k1, k1]))
    torch.testing.assert_close(pairs, torch.stack([value, torch.ones_like(value)]))


def test_alignment_is_not_centred_unless_asked():
    k0, k1 = kernel(0) + 5, kernel(1) + 5
    middle = torch.eye(8, dtype=torch.float64) - 1 / 8
    expected = kernel_alignment(middle @ k0 @ middle, middle @ k1 @ middle)
    torch.testing.assert_close(kernel_alignment(k0, k1, center=True), expected)
    assert kernel_alignment(k0, k1) > expected + 0.1


def test_representations_up_to_rotation_and_scale():
    h0, h1 = draw(9, 4), draw(9, 6, seed=1)
    rotation = torch.linalg.qr(draw(6, 6, seed=2)).Q
    value = representation_alignment(h0, h1)
    torch.testing.assert_close(representation_alignment(h0, 2 * h1 @ rotation), value)
    torch.testing.assert_close(value, kernel_alignment(h0 @ h0.mT, h1 @ h1.mT))


def test_alignment_errors():
    with pytest.raises(ValueError, match=r"k0 and k1 must have shape \(\.\.\., m, m\), got \(2, 2\) and \(3, 3\)"):
        kernel_alignment(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"k0 and k1 must have shape \(\.\.\., m, m\), got \(2, 3\) and \(2, 3\)"):
        kernel_alignment(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="k1 must have an entry that is not zero, got a kernel of norm zero"):
        kernel_alignment(torch.eye(2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"k0 and k1 must have shape \(\.\.\., m, m\), got \(2, 2\) and \(4, 4\)"):
        representation_alignment(torch.ones(2, 3), torch.ones(4, 3))


def test_states_are_the_recurrence():
    x, h = draw(2, 3, 4), torch.zeros(2, 7, dtype=torch.float64)
    for t in range(3):
        pushed = x[:, t] @ RNN.input.weight.mT + h @ RNN.recurrent.weight.mT
        h = ((1 - 0.6) * h + 0.6 * pushed).relu()
        torch.testing.assert_close(RNN.states(x)[:, t], h)
    torch.testing.assert_close(functional_call(RNN, {}, (x,)), h @ RNN.readout.weight.mT)
