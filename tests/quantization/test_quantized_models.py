from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from polylib.quantization import (
    LSQQuantizer,
    StatsQuantizer,
    UniformQuantizer,
    pack_codes,
    quantizable,
    quantize_model,
    size_in_bytes,
    unpack_codes,
    weight_quantizers,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 8), nn.Linear(8, 3)
    )


def test_quantize_model_by_name():
    model, plain = network(), network()
    assert list(quantizable(model)) == ["0", "4", "5"]
    assert quantize_model(model, {"0": 2, "4": 4}) is model
    for name, bits in (("0", 2), ("4", 4)):
        layer, original = model.get_submodule(name), plain.get_submodule(name).weight
        assert torch.equal(layer.weight, UniformQuantizer(bits)(original))
        assert torch.equal(layer.parametrizations.weight.original, original)
    assert torch.equal(model[5].weight, plain[5].weight)
    assert torch.equal(model[3].weight, plain[3].weight)
    assert set(weight_quantizers(model)) == {"0", "4"}


def test_quantising_again_starts_from_the_latent_weights():
    model, plain = network(), network()
    quantize_model(model, 2)
    quantize_model(model, 8, StatsQuantizer)
    assert torch.equal(model[4].weight, StatsQuantizer(8)(plain[4].weight))
    quantize_model(model, 32)
    assert not weight_quantizers(model)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(model(x), plain(x))


def test_a_quantised_network_learns():
    model = quantize_model(network(), 2, partial(LSQQuantizer, axis=0))
    x, y = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    assert len(model[5].weight[0].unique()) <= 4


def test_size_in_bytes():
    model = network()
    others = 4 + 2 * 144 + 8 + 3  # biases and the norm
    weights = {"0": 36, "4": 1152, "5": 24}
    assert size_in_bytes(model) == 4 * (others + sum(weights.values()))
    quantize_model(model, {"0": 3, "4": 2})  # 108 bits and 2304 bits; two steps
    assert size_in_bytes(model) == 14 + 288 + 2 * 4 + 4 * (others + 24)
    quantize_model(model, {"0": 32, "4": 2}, partial(LSQQuantizer, axis=0))
    assert size_in_bytes(model) == 288 + 8 * 4 + 4 * (others + 36 + 24)
    quantize_model(model, {"4": 2}, partial(UniformQuantizer, symmetric=False))
    assert size_in_bytes(model) == 288 + 2 * 4 + 4 * (others + 36 + 24)


def test_size_counts_shared_weights_once():
    plain, tied = (nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert size_in_bytes(tied) == 4 * 64
    for model, copies in ((plain, 2), (tied, 1)):
        assert size_in_bytes(quantize_model(model, 4)) == copies * (32 + 4)
    linear = nn.Linear(8, 8, bias=False)
    assert size_in_bytes(quantize_model(nn.Sequential(linear, linear), 4)) == 32 + 4


WRAPPERS = {"spectral": spectral_norm, "orthogonal": orthogonal, "weight norm": weight_norm}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:a parametrised weight is rounded")
def test_parametrisations_that_were_there_stay_and_their_result_is_rounded(wrapper):
    torch.manual_seed(0)
    model = nn.Sequential(WRAPPERS[wrapper](nn.Linear(8, 8)), nn.Linear(8, 2)).eval()
    weight, others = model[0].weight.detach().clone(), set(dict(model[0].named_parameters()))
    for bits in (16, 4, 8):
        quantize_model(model, bits)
        torch.testing.assert_close(model[0].weight, UniformQuantizer(bits)(weight))
        quantizer, latent = weight_quantizers(model)["0"]
        assert quantizer.bits == bits
        torch.testing.assert_close(latent, weight)
    assert size_in_bytes(model) == 64 + 16 + 8 + 4 * 10
    model(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in model[0].parameters())
    quantize_model(model, 32)
    torch.testing.assert_close(model[0].weight, weight)
    assert set(dict(model[0].named_parameters())) == others and not weight_quantizers(model)
    quantize_model(model, 3, partial(LSQQuantizer, axis=0))
    quantize_model(model, 2, partial(LSQQuantizer, axis=0))  # the new step has seen the weight
    assert weight_quantizers(model)["0"][0].scale.shape == (8,)


@pytest.mark.parametrize(("wrapper", "words"), [("spectral", "spectral norm 1"), ("orthogonal", "orthogonal")])
def test_a_constraint_that_rounding_undoes_is_said(wrapper, words):
    model = nn.Sequential(WRAPPERS[wrapper](nn.Linear(4, 4)))
    with pytest.warns(UserWarning, match=f"is rounded: it is (of )?{words} before, and no longer after"):
        quantize_model(model, 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_refused(hook):
    model = nn.Sequential(hook(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"parametrised \(.*got a weight of '0' that a hook computes"):
        quantize_model(model, 4)
    assert not weight_quantizers(model)


@pytest.mark.parametrize("bits", [np.int64(4), {"0": np.int32(4)}, {"0": 4}])
def test_bits_of_any_integer_type(bits):
    model = quantize_model(network(), bits)
    assert torch.equal(model[0].weight, UniformQuantizer(4)(network()[0].weight))


def test_nothing_is_quantised_if_one_number_of_bits_is_wrong():
    model = network()
    for bits in ({"0": 4, "4": 99}, {"0": 4, "4": 17}, {"0": 4, "9": 4}, 2.5, True):
        with pytest.raises(ValueError, match="bits must"):
            quantize_model(model, bits)
        assert not weight_quantizers(model)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("signed", [True, False])
def test_packing_is_exact(bits, count, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (count,))
    if count > 1:
        codes[:2] = torch.tensor([low, low + 2**bits - 1])
    packed = pack_codes(codes, bits, signed=signed)
    assert packed.dtype == torch.uint8 and len(packed) == -(-bits * count // 8)
    assert torch.equal(unpack_codes(packed, bits, count, signed=signed), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_stored_weight_comes_back(bits):
    w = torch.randn(5, 13)
    quantizer = StatsQuantizer(bits)
    codes, step, zero = quantizer.integers(w)
    stored = unpack_codes(pack_codes(codes, bits), bits, w.numel()).view(w.shape)
    torch.testing.assert_close(step * (stored - zero), quantizer(w))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: quantize_model(nn.ReLU(), 2), "model must have a linear or convolutional layer, got a ReLU without"),
        (
            lambda: quantize_model(network(), {"3": 2}),
            "bits must name linear or convolutional layers, 0, 4, 5, got '3'",
        ),
        (lambda: pack_codes(torch.tensor([2]), 2), "codes must be whole numbers from -2 to 1 for 2 bits"),
        (lambda: pack_codes(torch.tensor([0.5]), 2), "codes must be whole numbers"),
        (lambda: pack_codes(torch.tensor([0]), 9), "bits must be an integer from 1 to 8, got 9"),
        (lambda: unpack_codes(torch.zeros(1, dtype=torch.uint8), 3, 3), "count is 3; 1 bytes hold 2 codes of 3 bits"),
    ],
)
def test_bad_input_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()
