"""The layer with its saved tensors on the host: the same gradients, the bytes that the formula says, less memory."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from polylib.sequences import GPTLayer, TokenwiseOffload, record_allocations

WIDTH, TOKENS = 16, 24
FRACTIONS = [0.0, 0.25, 0.5, 0.8, 1.0]


def network(depth=3, fraction=None, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [GPTLayer(WIDTH, 2) for _ in range(depth)]
    if fraction is not None:
        layers = [TokenwiseOffload(layer, fraction) for layer in layers]
    return nn.Sequential(*layers).to(dtype)


def inputs(batch=2, tokens=TOKENS, dtype=torch.float64):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def test_the_layer_written_out():
    layer, x = network(1)[0], inputs()
    h = F.layer_norm(x, (WIDTH,), layer.norm1.weight, layer.norm1.bias)
    q, k, v = (h @ layer.inputs.weight.T + layer.inputs.bias).chunk(3, -1)
    out = []
    for own in range(2):
        part = slice(own * WIDTH // 2, (own + 1) * WIDTH // 2)
        scores = q[..., part] @ k[..., part].mT / (WIDTH / 2) ** 0.5
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
        out.append(scores.softmax(-1) @ v[..., part])
    r = x + layer.output(torch.cat(out, -1))
    inner = F.layer_norm(r, (WIDTH,), layer.norm2.weight, layer.norm2.bias) @ layer.up.weight.T + layer.up.bias
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    torch.testing.assert_close(layer(x), r + layer.down(inner))


@pytest.mark.parametrize("expansion", [2, 4])
def test_what_a_layer_saves_is_what_it_says(expansion):
    layer, x = GPTLayer(WIDTH, 2, expansion), inputs(dtype=torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_())
    sizes = [storage.nbytes() // x.nbytes for storage in found.values()]
    assert sum(sizes) == sum(layer.skeletal.values()) == 8 + 2 * expansion
    assert y.shape == x.shape


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_gradients_are_those_of_the_layer(fraction, batch):
    x = inputs(batch)
    wanted = gradients(network(), x)
    for found, own in zip(gradients(network(fraction=fraction), x), wanted, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_shape(tokens, batch):
    x = inputs(batch, tokens)
    wanted = gradients(network(), x)
    for fraction in (0.0, 0.4, 1.0):
        for found, own in zip(gradients(network(fraction=fraction), x), wanted, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_host_bytes_are_as_the_formula_says(fraction):
    x, module = inputs(), network(1, fraction)
    module(x.requires_grad_())
    rows = round(fraction * TOKENS)
    numbers = x.shape[0] * (2 * TOKENS * WIDTH + rows * (14 * WIDTH + 4))  # and mean and deviation of both norms
    assert module[0].host_bytes == 8 * numbers
    assert module[0].device_bytes == 8 * x.shape[0] * TOKENS * 2  # one logarithm for each head


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.attentions, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "attention" in name and "backward" not in name:
            self.attentions += 1
        if "addmm" in name:
            self.products.append((args[1].shape, args[2].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_no_attention_is_computed_twice_and_no_product_that_is_not_needed(fraction):
    x, module = inputs(1), network(1, fraction)
    with Count() as count:
        gradients(module, x)
    assert count.attentions == 1
    rows = TOKENS - round(fraction * TOKENS)
    again = [shapes for shapes in count.products if shapes[0][0] == rows] if 0 < rows < TOKENS else count.products[4:]
    assert [weight[1] // WIDTH for _, weight in again] == ([3, 1, 4] if rows else [])


def test_less_is_live_at_one_time():
    x, peaks = inputs(1, 64), {}
    for fraction in (None, *FRACTIONS):
        module = network(8, fraction)
        gradients(module, x)  # leaves gradients, to which the next ones are added
        peaks[fraction] = record_allocations(lambda module=module: gradients(module, x))[1].lower_bound
    assert max(peaks[fraction] for fraction in FRACTIONS) < 0.5 * peaks[None]


def test_backward_twice_and_in_parts():
    x, plain, module = inputs(), network(), network(fraction=0.5)
    wanted = gradients(plain, x)
    x = x.requires_grad_()
    loss = module(x).square().mean()
    for _ in range(2):
        torch.autograd.grad(loss, x, retain_graph=True)
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    torch.testing.assert_close(list(found), wanted[2:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted[1], rtol=1e-10, atol=1e-12)


def test_two_passes_before_one_backward():
    plain, module = network(), network(fraction=0.3)
    one, two = inputs(), 2 * inputs(3, 9)
    for own in (plain, module):
        (own(one).square().mean() + own(two).mean()).backward()
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_frozen_weights_and_an_input_without_gradient():
    plain, module = network(), network(fraction=0.3)
    for own in (plain, module):
        for name, p in own.named_parameters():
            p.requires_grad_("up" in name or "norm1" in name)
        own(inputs()).square().mean().backward()
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", ["up.weight", "norm1.weight"])
def test_a_weight_that_changes_before_backward_is_an_error(fraction, name):
    module = network(1, fraction)
    y = module(inputs().requires_grad_())
    with torch.no_grad():
        module[0].layer.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="must not change between forward and backward"):
        y.sum().backward()


def test_weights_may_be_updated_as_soon_as_their_gradients_are_there():
    plain, module = network(), network(fraction=0.5)
    for own in (plain, module):
        for p in own.parameters():
            p.register_post_accumulate_grad_hook(lambda p: torch.no_grad()(p.sub_)(p.grad))
        own(inputs()).square().mean().backward()
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_under_func_the_layer_is_as_it_is():
    x, plain, module = inputs(), network(1), network(1, 0.5)
    found = torch.func.grad(lambda x: module(x).square().mean())(x)
    torch.testing.assert_close(found, gradients(plain, x)[1])


def test_without_gradients_nothing_is_kept():
    module = network(1, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs()), network(1)(inputs()))
    assert module[0].host_bytes == 0


def test_compiled_in_parts():
    x = inputs()
    module = network(fraction=0.4)
    compiled = torch.compile(module, backend="eager")
    for found, own in zip(gradients(compiled, x), gradients(network(), x), strict=True):
        torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)
    assert module[0].host_bytes > 0


class Own(nn.Module):
    """Another layer of this kind, without a norm or a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, 2 * WIDTH)

    def before(self, x):
        a, b = self.mix(x).chunk(2, -1)
        return a.sigmoid() * b, x.exp()

    def attend(self, a, b):
        return (a * b).cumsum(1)

    def after(self, x, attended):
        return x + attended.tanh() * x.sin()

    def forward(self, x):
        return self.after(x, self.attend(*self.before(x)))


def test_another_layer():
    torch.manual_seed(0)
    layer, x = Own().double(), 0.3 * inputs()
    wanted = gradients(copy.deepcopy(layer), x)
    for fraction in FRACTIONS:
        found = gradients(TokenwiseOffload(copy.deepcopy(layer), fraction), x)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


class Turned(Own):
    """It saves a tensor whose storage does not run over tokens: that one stays on the device."""

    def before(self, x):
        a, b = self.mix(x).mT.contiguous().sigmoid().chunk(2, 1)
        return a.mT, b.mT


def test_what_has_other_rows_stays_on_the_device():
    torch.manual_seed(0)
    layer, x = Turned().double(), 0.3 * inputs()
    wanted = gradients(copy.deepcopy(layer), x)
    for fraction in FRACTIONS:
        module = TokenwiseOffload(copy.deepcopy(layer), fraction)
        torch.testing.assert_close(gradients(module, x), wanted, rtol=1e-10, atol=1e-12)
        assert module.device_bytes >= 2 * x.nbytes


def test_bad_input():
    layer = GPTLayer(WIDTH, 2)
    for fraction in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="fraction"):
            TokenwiseOffload(layer, fraction)
    with pytest.raises(TypeError, match="layer must have before"):
        TokenwiseOffload(nn.Linear(3, 3), 0.5)
    layer.up = nn.Sequential(layer.up, nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"dropout in \['up.1'\]"):
        TokenwiseOffload(layer, 0.5)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, tokens, width\), got \(5, 16\)"):
        TokenwiseOffload(GPTLayer(WIDTH, 2), 0.5)(torch.randn(5, WIDTH))
    for arguments in ((WIDTH, 3), (WIDTH, 2, 0)):
        with pytest.raises(ValueError, match=r"heads|expansion"):
            GPTLayer(*arguments)


def test_recording_finds_what_the_profiler_finds():
    """Of operations without scratch space: the largest sum of what lives, by torch's own account of its allocator."""
    first, second = torch.randn(2, 300, 300)

    def work():
        a = first + 1
        b = (a * second).relu()
        del a
        c = b.exp()
        return c[:10].clone() + second[:10]

    _, requests = record_allocations(work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(itertools.accumulate(changes)) == requests.lower_bound
    assert sorted(change for change in changes if change > 8) == sorted(requests.sizes.tolist())


def test_recording_leaves_out_what_was_there():
    weights, outside = torch.randn(5, 5), torch.from_numpy(torch.ones(5, 5).numpy().copy())

    def work():
        outside.copy_(weights)
        return weights.view(25), weights @ outside

    result, requests = record_allocations(work)
    assert requests.sizes.tolist() == [100] and requests.ends.tolist() == [1]
    torch.testing.assert_close(result[1], weights @ weights)
    with pytest.raises(TypeError, match="function"):
        record_allocations(3)
