import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from polylib.quantization import (
    BinaryQuantizer,
    FixedPointQuantizer,
    LSQQuantizer,
    StatsQuantizer,
    UniformQuantizer,
)

PER_TENSOR = {
    "uniform": UniformQuantizer,
    "asymmetric": partial(UniformQuantizer, symmetric=False),
    "fixed-point": FixedPointQuantizer,
    "StatsQ": partial(StatsQuantizer, per_channel=False),
    "LSQ": LSQQuantizer,
    "binary": lambda bits: BinaryQuantizer(per_channel=False),
}
PER_CHANNEL = {
    "uniform": partial(UniformQuantizer, per_channel=True),
    "asymmetric": partial(UniformQuantizer, symmetric=False, per_channel=True),
    "fixed-point": partial(FixedPointQuantizer, per_channel=True),
    "StatsQ": StatsQuantizer,
    "LSQ": partial(LSQQuantizer, axis=0),
    "binary": lambda bits: BinaryQuantizer(),
}
ALL = [(name, make) for table in (PER_TENSOR, PER_CHANNEL) for name, make in table.items()]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(6, 20), (4, 3, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("name", "make"), ALL)
def test_the_result_is_the_step_times_code_minus_zero(name, make, shape, bits):
    quantizer, w = make(bits), weights(*shape)
    y = quantizer(w)
    codes, step, zero = quantizer.integers(w)
    assert y.shape == codes.shape == w.shape
    torch.testing.assert_close(y, step * (codes - zero))
    assert torch.equal(codes, codes.round())
    bits = quantizer.bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if quantizer.signed else (0, 2**bits - 1)
    assert codes.min() >= low and codes.max() <= high
    assert step.numel() == (shape[0] if make in PER_CHANNEL.values() else 1)


@pytest.mark.parametrize(("name", "make"), ALL)
def test_the_straight_through_gradient(name, make):
    quantizer, w = make(4), weights(6, 20)
    cotangent = torch.randn(6, 20)
    (gradient,) = torch.autograd.grad(quantizer(w), w, cotangent)
    if name == "LSQ":  # entries beyond the last level get none
        _, step, _ = quantizer.integers(w)
        v = w.detach() / step
        torch.testing.assert_close(gradient, torch.where((v >= -8) & (v <= 7), cotangent, 0))
    else:
        assert torch.equal(gradient, cotangent)


@pytest.mark.parametrize(("name", "make"), ALL)
def test_as_a_parametrisation_and_stacked(name, make):
    x, y = torch.randn(9, 7), torch.randn(9, 5)
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers.append(nn.Sequential(nn.Linear(7, 5)))
        parametrize.register_parametrization(layers[-1][0], "weight", make(3))
    parameters, buffers = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")

    def loss(p, b):
        return F.mse_loss(torch.func.functional_call(skeleton, (p, b), (x,)), y)

    together = torch.vmap(torch.func.grad(loss))(parameters, buffers)
    for k, layer in enumerate(layers):
        F.mse_loss(layer(x), y).backward()
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(together[key][k], parameter.grad)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_uniform_is_the_published_formula(bits, per_channel):
    w, n = weights(6, 20).detach(), 2 ** (bits - 1) - 1
    largest = w.abs().amax(1, keepdim=True) if per_channel else w.abs().max()
    quantizer = UniformQuantizer(bits, per_channel=per_channel)
    codes, step, zero = quantizer.integers(w)
    assert torch.equal(codes, torch.clamp(torch.round(w / (largest / n)), -n - 1, n)) and not zero.any()
    assert ((quantizer(w) - w).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(quantizer(-w), -quantizer(w))
    torch.testing.assert_close(quantizer(quantizer(w)), quantizer(w))


def test_uniform_asymmetric_keeps_zero_and_uses_all_levels():
    x = F.relu(weights(50, 20)).detach()
    quantizer = UniformQuantizer(3, symmetric=False)
    codes, _, zero = quantizer.integers(x)
    assert (zero == 0).all() and codes.min() == 0 and codes.max() == 7
    assert not quantizer(x)[x == 0].any()
    shifted = quantizer.integers(x - 0.3)
    assert shifted[2].item() == torch.round(0.3 / shifted[1]).item()
    assert UniformQuantizer(1, symmetric=False)(x).unique().numel() == 2


@pytest.mark.parametrize(("name", "make"), ALL)
def test_a_tensor_of_zeros_gives_zeros(name, make):
    zeros = torch.zeros(3, 5)
    y = make(4)(zeros)
    if name == "LSQ":  # its step is a parameter, which starts at its floor
        assert y.abs().max() <= 1e-4
    else:
        assert not y.any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_fixed_point_steps_are_powers_of_two_that_cover_the_range(bits):
    w = weights(6, 20).detach()
    quantizer = FixedPointQuantizer(bits, per_channel=True)
    _, step, _ = quantizer.integers(w)
    assert torch.equal(step.log2(), step.log2().round())
    largest = w.abs().amax(1, keepdim=True)
    assert (largest <= step * 2 ** (bits - 1)).all() and (largest > step * 2 ** (bits - 2)).all()
    assert ((quantizer(w) - w).abs() <= step).all()


def test_binary_is_the_best_multiple_of_the_sign():
    w = weights(6, 20).detach()
    y = BinaryQuantizer()(w)
    scale = y[:, :1].abs()
    torch.testing.assert_close(y, w.sign() * w.abs().mean(1, keepdim=True))
    for factor in (0.9, 1.1):
        assert ((factor * scale * w.sign() - w).square().sum(1) > (y - w).square().sum(1)).all()
    torch.testing.assert_close(StatsQuantizer(1)(w), y)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lsq_initial_step_and_its_gradient(bits, unsigned):
    w = weights(6, 20)
    quantizer = LSQQuantizer(bits, axis=0, unsigned=unsigned)
    y = quantizer(w)
    low, high = (0, 2**bits - 1) if unsigned else (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    factor = 4 if unsigned else 1 if bits == 1 else 2
    torch.testing.assert_close(quantizer.scale, factor * w.detach().abs().mean(1) / high**0.5)
    cotangent = torch.randn(6, 20)
    y.backward(cotangent)
    v = w.detach() / quantizer.scale.detach()[:, None]
    level = torch.where(v < 0, -1.0, 1.0) if bits == 1 and not unsigned else v.round().clamp(low, high)
    slope = torch.where((v >= low) & (v <= high), level - v, level)
    torch.testing.assert_close(quantizer.scale.grad, (cotangent * slope).sum(1) / (high * 20) ** 0.5)


def test_lsq_per_token_and_the_floor():
    x = weights(8, 5, 3)
    quantizer = LSQQuantizer(3, axis=-2)
    quantizer(x)
    assert quantizer.scale.shape == (5,)
    torch.testing.assert_close(quantizer.scale, 2 * x.detach().abs().mean((0, 2)) / 3**0.5)
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    y = quantizer(x)
    assert y.abs().max() <= 4 * 1.001e-5  # the floor is in the forward pass only
    y.sum().backward()
    assert quantizer.scale.grad.abs().max() > 0


def test_lsq_steps_are_in_an_optimizer_that_was_built_first():
    quantizer = LSQQuantizer(3)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    x = weights(50)
    before = None
    for _ in range(2):
        loss = (quantizer(x.detach()) - x.detach()).square().mean()
        before = quantizer.scale.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert quantizer.scale.item() != before


def test_lsq_state_is_saved_and_loaded():
    saved = LSQQuantizer(3, axis=0)
    saved(weights(4, 9))
    loaded = LSQQuantizer(3, axis=0)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.scale, saved.scale)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UniformQuantizer(1), "bits must be an integer from 2 to 16, got 1"),
        (lambda: UniformQuantizer(17), "bits must be an integer from 2 to 16, got 17"),
        (lambda: UniformQuantizer(0, symmetric=False), "bits must be an integer from 1 to 16, got 0"),
        (lambda: FixedPointQuantizer(1), "bits must be an integer from 2 to 16, got 1"),
        (lambda: StatsQuantizer(0), "bits must be an integer from 1 to 16, got 0"),
        (lambda: LSQQuantizer(2.5), r"bits must be an integer from 1 to 16, got 2\.5"),
        (lambda: UniformQuantizer(2)(torch.zeros(0, 3)), r"x must have entries, got shape \(0, 3\)"),
        (lambda: StatsQuantizer(2)(torch.zeros(3, 0)), r"x must have entries, got shape \(3, 0\)"),
        (
            lambda: LSQQuantizer(2)(torch.zeros(0)),
            r"the first tensor must have entries, for the step, got shape \(0,\)",
        ),
        (
            lambda: LSQQuantizer(2)(torch.tensor([1.0, float("inf")])),
            "the first tensor must be finite, for the step, got entries that are not",
        ),
        (
            lambda: [quantizer := LSQQuantizer(2, axis=-2), *map(quantizer, (torch.ones(5, 3), torch.ones(4, 3)))],
            r"x must have 5 entries along axis -2, one for each step, as the first tensor had, got shape \(4, 3\)",
        ),
        (lambda: LSQQuantizer(2, axis=-2)(torch.ones(3)), r"x must have an axis -2, got shape \(3,\)"),
        (
            lambda: UniformQuantizer(2).integers(torch.tensor([1.0, float("nan")])),
            "x must be finite, got entries that are not",
        ),
        (
            lambda: StatsQuantizer(2).integers(torch.tensor([[1.0, float("inf")]])),
            "x must be finite, got entries that are not",
        ),
    ],
)
def test_bad_input_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8, 12])
@pytest.mark.parametrize(("name", "make"), ALL)
def test_half_precision_has_the_codes_of_float32(name, make, bits, dtype):
    w = (3 * weights(6, 50)).to(dtype).detach()
    quantizer = make(bits)
    y = quantizer(w)
    found, wide = quantizer.integers(w), quantizer.integers(w.float())
    for mine, its in zip(found, wide, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, its)
    codes, step, zero = wide
    assert y.dtype == dtype
    torch.testing.assert_close(y, (step * (codes - zero)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "make"), ALL)
def test_zeros_and_tiny_numbers_give_no_nan(name, make, dtype):
    for w in (torch.zeros(3, 5), torch.full((3, 5), 1e-7), torch.tensor([[0.0, 0.0], [1.0, -1.0]])):
        quantizer, w = make(4), w.to(dtype)
        y = quantizer(w)
        codes, step, zero = quantizer.integers(w)
        assert y.isfinite().all() and codes.isfinite().all()
        torch.testing.assert_close(y, (step * (codes - zero)).to(dtype))


def test_bits_may_be_integers_of_numpy():
    for make in (UniformQuantizer, FixedPointQuantizer, StatsQuantizer, LSQQuantizer):
        quantizer = make(np.int64(4))
        assert type(quantizer.bits) is int and torch.equal(quantizer(weights(9)[None]), make(4)(weights(9)[None]))


def test_lsq_before_its_first_tensor(tmp_path):
    quantizer = nn.Sequential(nn.Linear(3, 3), LSQQuantizer(3))
    assert sum(p.numel() for p in quantizer.parameters()) == 12
    torch.save(quantizer.state_dict(), tmp_path / "state")
    other = nn.Sequential(nn.Linear(3, 3), LSQQuantizer(3))
    other.load_state_dict(torch.load(tmp_path / "state"))
    quantizer.share_memory()
    assert torch.equal(copy.deepcopy(quantizer)(torch.ones(1, 3)), other(torch.ones(1, 3)))
    assert pickle.loads(pickle.dumps(quantizer))[1].scale.shape == (0,)
    with pytest.raises(ValueError, match="must have seen a first tensor"):
        torch.vmap(LSQQuantizer(3))(torch.ones(2, 3))
    with pytest.raises(ValueError, match="scale must have a value, got none"):
        LSQQuantizer(3).integers(torch.ones(3))


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_lsq_first_seen_under_autocast_keeps_its_step_in_float32(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), LSQQuantizer(4))
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype):
        inside = model(x)
    assert model[1].scale.dtype == torch.float32
    torch.testing.assert_close(model(x), inside.float(), rtol=0.02, atol=2 * model[1].scale.item())
    with torch.autocast("cpu", dtype):
        model(x).float().square().mean().backward()
    assert model[1].scale.grad.dtype == torch.float32 and model[1].scale.grad != 0


def test_lsq_steps_have_the_widest_dtype_that_they_met():
    for x, expected in ((torch.ones(3).double(), torch.float64), (torch.ones(3).bfloat16(), torch.float32)):
        quantizer = LSQQuantizer(3)
        assert quantizer(x).dtype == x.dtype and quantizer.scale.dtype == expected
    whole = LSQQuantizer(3).bfloat16()
    assert whole(torch.ones(3).bfloat16()).dtype == torch.bfloat16 and whole.scale.dtype == torch.bfloat16
    assert whole(torch.ones(3)).dtype == torch.float32


@pytest.mark.parametrize("bits", [1, 4])
def test_zeros_tell_lsq_nothing(bits):
    w, quantizer = nn.Parameter(torch.zeros(3, 4)), LSQQuantizer(bits, axis=0)
    y = quantizer(w)
    y.backward(torch.ones(3, 4))
    assert not y.any() and torch.equal(w.grad, torch.ones(3, 4)) and quantizer.scale.numel() == 0
    codes, step, zero = quantizer.integers(w)
    assert not (step * (codes - zero)).any() and codes.isfinite().all()
    x = weights(3, 4).detach()
    x[1] = 0
    quantizer(x)
    expected = LSQQuantizer(bits, axis=0)
    expected(x[[0, 2]])
    torch.testing.assert_close(quantizer.scale[[0, 2]], expected.scale)
    torch.testing.assert_close(quantizer.scale[1], expected.scale.mean())


def test_lsq_first_seen_in_inference_mode_can_be_trained():
    quantizer, x = LSQQuantizer(3, axis=0), weights(4, 6)
    with torch.inference_mode():
        quantizer(x)
    quantizer(x).square().sum().backward()
    assert quantizer.scale.grad.abs().sum() > 0


def test_integer_tensors_are_refused():
    for quantizer in (UniformQuantizer(4), StatsQuantizer(4), LSQQuantizer(4)):
        with pytest.raises(TypeError, match="floating-point"):
            quantizer(torch.ones(2, 3, dtype=torch.int64))
