import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from polylib.regimes import MIPHyperNet, encode_constant_norm

F64 = torch.float64
SHAPES = {"first.weight": (6, 5), "first.bias": (6,), "last.weight": (3, 6), "last.bias": (3,)}


def draw(*shape, seed=0, uniform=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if uniform else torch.randn)(*shape, generator=generator, dtype=F64)


def hypernetwork(inputs=None, seed=0, **options):
    torch.manual_seed(seed)
    return MIPHyperNet(inputs or {"gamma": (2,)}, SHAPES, [7, 8], **options).double()


class Primary(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def test_the_code_is_all_cosines_and_then_all_sines():
    z = torch.tensor([0.0, 1 / 3, 1.0], dtype=F64)
    half = math.sqrt(3) / 2
    expected = torch.tensor([1, half, 0, 0, 0.5, 1], dtype=F64)
    torch.testing.assert_close(encode_constant_norm(z), expected, atol=1e-15, rtol=0)


def test_the_codes_have_the_norms_that_are_promised():
    z = draw(50, 4, uniform=True)
    two = torch.full((50,), 2.0, dtype=F64)
    torch.testing.assert_close(encode_constant_norm(z).norm(dim=-1), two)
    wide = 1e6 * draw(50, 4, seed=1)
    torch.testing.assert_close(encode_constant_norm(wide, "sphere").norm(dim=-1), two)
    torch.testing.assert_close(encode_constant_norm(z, "complement"), torch.cat([z, 1 - z], -1))
    norms = encode_constant_norm(torch.linspace(0, 1, 11, dtype=F64)[:, None], "complement").norm(dim=-1)
    torch.testing.assert_close(norms.max() / norms.min(), torch.tensor(2.0, dtype=F64).sqrt())


def test_the_sphere_has_a_floor_and_finite_gradients():
    zero = torch.zeros(3, dtype=F64, requires_grad=True)
    code = encode_constant_norm(zero, "sphere")
    code.sum().backward()
    assert (code == 0).all() and zero.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["cos_sin", "complement"])
def test_inputs_outside_the_unit_interval_warn_or_raise(mode):
    with pytest.warns(UserWarning, match="must lie between"):
        encode_constant_norm(torch.tensor([0.5, 2.0]), mode)
    with pytest.raises(ValueError, match="got -1 to"):
        encode_constant_norm(torch.tensor([0.5, -1.0]), mode, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_constant_norm(torch.tensor([-3.0, 5.0]), "sphere", strict=True)
        encode_constant_norm(torch.tensor([0.0, 1.0]), mode, strict=True)


@pytest.mark.parametrize(
    ("z", "mode", "error", "words"),
    [
        (torch.rand(3), "interleaved", ValueError, "mode must be one of"),
        (torch.rand(3, 0), "cos_sin", ValueError, "z must have shape"),
        (torch.tensor(0.5), "cos_sin", ValueError, "z must have shape"),
        (torch.tensor([0.5, math.nan]), "cos_sin", ValueError, "z must be finite"),
        (torch.tensor([1, 0]), "cos_sin", TypeError, "floating-point"),
    ],
)
def test_the_encoding_refuses_bad_input(z, mode, error, words):
    with pytest.raises(error, match=words):
        encode_constant_norm(z, mode)


@pytest.mark.parametrize("activation", ["LeakyReLU", "ReLU"])
def test_an_ordinary_hypernetwork_is_homogeneous(activation):
    net = hypernetwork(encoding="none", residual=False, activation=activation)
    gamma = draw(6, 2, uniform=True)
    once = net(gamma=gamma)
    for factor in (0.0, 0.3, 7.0):
        for name, value in net(gamma=factor * gamma).items():
            torch.testing.assert_close(value, factor * once[name])
    assert once["first.weight"].abs().max() > 0 and (once["first.bias"] == 0).all()


def test_the_predicted_changes_start_small_and_hardly_vary_in_size():
    torch.manual_seed(0)
    net = MIPHyperNet({"gamma": (1,)}, {"0.weight": (32, 64), "0.bias": (32,)}, [16, 128])
    weights = net(gamma=torch.linspace(0, 1, 5)[:, None])["0.weight"]
    base = net.base_weights()["0.weight"]
    torch.testing.assert_close(base.std().item(), math.sqrt(2 / 1.0001 / 64), rtol=0.1, atol=0)
    changes = (weights - base).flatten(1).norm(dim=1)
    assert changes.max() < 0.4 * base.norm() and changes.min() > 0.02 * base.norm()
    norms = weights.flatten(1).norm(dim=1)
    assert norms.max() < 1.2 * norms.min()


def test_each_predicted_tensor_has_rows_of_its_own_size():
    torch.manual_seed(0)
    shapes = {"big.weight": (40, 50), "small.weight": (10, 10), "big.bias": (40,), "weight": (4, 50), "scale": (30,)}
    net = MIPHyperNet({"gamma": (1,)}, shapes, [16, 128])
    rows = dict(zip(shapes, net.output.weight.split([2000, 100, 40, 200, 30]), strict=True))
    for name, count in (("big.weight", 2000), ("small.weight", 100), ("weight", 200), ("scale", 30)):
        torch.testing.assert_close(rows[name].std().item(), math.sqrt(2 / 1.0001 / count), rtol=0.1, atol=0)
    assert (rows["big.bias"] == 0).all()
    base = net.base_weights()
    assert (base["big.bias"] == 0).all() and (base["scale"] == 0).all()
    torch.testing.assert_close(base["weight"].std().item(), math.sqrt(2 / 50), rtol=0.2, atol=0)


def test_without_changes_the_primary_network_is_the_module_it_was_made_from():
    module, x = Primary().double(), draw(4, 5)
    net = MIPHyperNet.from_module(module, {"gamma": (2,)}, [8]).double()
    nn.init.zeros_(net.output.weight)
    for gamma in draw(3, 2, uniform=True):
        out = functional_call(module, net(gamma=gamma), (x,))
        assert (out == module(x)).all()  # the same operations on the same numbers
    some = MIPHyperNet.from_module(module, {"gamma": (2,)}, [8], names=["last.weight"])
    assert set(some(gamma=torch.rand(2))) == {"last.weight"}


def test_base_weights_are_read_and_set():
    net = hypernetwork()
    wanted = {name: draw(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    net.set_base_weights(dict(reversed(wanted.items())))
    for name, value in net.base_weights().items():
        torch.testing.assert_close(value, wanted[name])
    net.base_weights()["first.weight"].zero_()
    torch.testing.assert_close(net.base_weights()["first.weight"], wanted["first.weight"])


def test_the_base_weights_get_the_sum_of_the_gradients():
    net, gamma = hypernetwork(), draw(5, 2, uniform=True)
    weights = net(gamma=gamma)
    pull = {name: draw(5, *shape, seed=9) for name, shape in SHAPES.items()}
    sum((weights[name] * pull[name]).sum() for name in SHAPES).backward()
    expected = torch.cat([pull[name].sum(0).flatten() for name in SHAPES])
    torch.testing.assert_close(net.output.bias.grad, expected)


def test_a_batch_is_its_samples_and_inputs_go_by_the_order_of_their_names():
    net = hypernetwork({"b": (2, 2), "a": (1,)})
    inputs = {"b": draw(3, 2, 2, uniform=True), "a": draw(3, 1, seed=1, uniform=True)}
    many = net(**inputs)
    for k in range(3):
        one = net(a=inputs["a"][k], b=inputs["b"][k])
        for name, shape in SHAPES.items():
            assert one[name].shape == shape
            torch.testing.assert_close(one[name], many[name][k])
    single = net(a=inputs["a"][:1], b=inputs["b"][:1])
    assert single["first.bias"].shape == (1, 6)
    flat = torch.cat([inputs["a"], inputs["b"].flatten(1)], 1)
    torch.testing.assert_close(net.code(**inputs), encode_constant_norm(flat))


def test_gradients_through_encoding_prediction_and_use():
    net, x = hypernetwork(activation="Tanh"), draw(4, 5)

    def apply(gamma, first, last):
        weights = functional_call(net, {"hidden.0.weight": first, "output.weight": last}, (), {"gamma": gamma})
        h = torch.tanh(x @ weights["first.weight"].mT + weights["first.bias"][:, None])
        return h @ weights["last.weight"].mT

    gamma = 0.1 + 0.8 * draw(2, 2, uniform=True)
    parts = (gamma, net.hidden[0].weight.detach(), net.output.weight.detach())
    assert torch.autograd.gradcheck(apply, [part.requires_grad_() for part in parts])


def test_it_works_under_vmap():
    net, gamma = hypernetwork(), draw(4, 3, 2, uniform=True)
    mapped = vmap(lambda one: net(gamma=one))(gamma)
    for name, value in mapped.items():
        torch.testing.assert_close(value[1], net(gamma=gamma[1])[name])


def test_layer_norm_takes_the_magnitude_out_but_not_at_zero():
    net = hypernetwork({"gamma": (1,)}, encoding="none", residual=False, layer_norm=True)
    predicted = net(gamma=torch.tensor([[0.0], [0.5], [1.0]], dtype=F64))["first.weight"].flatten(1).norm(dim=1)
    assert predicted[0] == 0
    torch.testing.assert_close(predicted[1], predicted[2], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), [("cos_sin", "cos|sin"), ("complement", "z|1-z"), ("none", None)])
def test_the_authors_package_predicts_the_same(ours, theirs):
    hyperlight = pytest.importorskip("hyperlight")
    inputs = {"b": (2,), "a": (1,)}
    net = hypernetwork(inputs, encoding=ours)
    other = hyperlight.HyperNet(inputs, SHAPES, [7, 8], encoding=theirs).double()
    with torch.no_grad():
        for own, their in zip(net.parameters(), other.parameters(), strict=True):
            their.copy_(own + 0.1)
            own += 0.1
    given = {"a": draw(4, 1, uniform=True), "b": draw(4, 2, seed=1, uniform=True)}
    expected = other(**given)
    for name, value in net(**given).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    for name, value in net.base_weights().items():
        torch.testing.assert_close(value, other.get_independent_weights()[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_shapes": {}}, "input_shapes must be at least one"),
        ({"output_shapes": {"w": (0, 2)}}, "output_shapes"),
        ({"hidden_sizes": []}, "hidden_sizes must be at least one"),
        ({"hidden_sizes": [4, 0]}, "hidden_sizes must be an integer"),
        ({"encoding": "sin_cos"}, "encoding must be one of"),
        ({"activation": "Sine"}, "activation must be one of"),
    ],
)
def test_bad_settings_are_refused(change, words):
    settings = {"input_shapes": {"gamma": (1,)}, "output_shapes": SHAPES, "hidden_sizes": [4], **change}
    with pytest.raises(ValueError, match=words):
        MIPHyperNet(**settings)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "inputs must be a, b, got none"),
        ({"a": torch.rand(1), "b": torch.rand(2), "c": torch.rand(1)}, "inputs must be a, b"),
        ({"a": torch.rand(1), "b": torch.rand(3)}, "b must have shape"),
        ({"a": torch.rand(2, 3, 1), "b": torch.rand(2)}, "a must have shape"),
        ({"a": torch.rand(3, 1), "b": torch.rand(2, 2)}, "one batch size"),
        ({"a": torch.rand(1), "b": torch.rand(1, 2)}, "one batch size"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        hypernetwork({"a": (1,), "b": (2,)}).float()(**inputs)


def test_weights_that_do_not_fit_are_refused():
    net, module = hypernetwork(), Primary()
    with pytest.raises(ValueError, match="weights must be first"):
        net.set_base_weights({"first.weight": torch.ones(6, 5)})
    with pytest.raises(ValueError, match="bias must have shape"):
        net.set_base_weights(net.base_weights() | {"last.bias": torch.ones(4)})
    with pytest.raises(ValueError, match="names must be one of"):
        MIPHyperNet.from_module(module, {"gamma": (1,)}, [4], names=["middle.weight"])
    with pytest.raises(ValueError, match="residual must be True"):
        MIPHyperNet.from_module(module, {"gamma": (1,)}, [4], residual=False)
