"""The mixers written out, what they can see, their kernels, groups, training, and bad input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from polylib.sequences import (
    BlockDiagonalGLU,
    ImplicitFilter,
    LongConvolution,
    MonarchMixer,
    ShortConvolution,
    monarch_mixer_groups,
    two_sided_convolution,
)


def mixer(causal=True, seed=0, **options):
    torch.manual_seed(seed)
    return MonarchMixer(4, 9, causal, **options).double()


@pytest.mark.parametrize("L", [1, 2, 7])
def test_two_sided_convolution(L):
    torch.manual_seed(0)
    u, K, back = torch.randn(2, 3, L).double(), torch.randn(3, L).double(), torch.randn(3, L).double()
    y = two_sided_convolution(u, K, back)
    for b in range(2):
        for h in range(3):
            whole = np.concatenate([back[h].flip(0), K[h]])  # the lags -L, ..., L - 1
            np.testing.assert_allclose(y[b, h], np.convolve(u[b, h], whole)[L : 2 * L], atol=1e-12)


def test_the_kernels_written_out():
    torch.manual_seed(0)
    made = ImplicitFilter(3, 6, order=5).double()
    found = made(6)
    for step in range(6):
        t, w = step / 5, 2 * math.pi * step / 6
        waves = [np.exp(-1j * f * w) for f in (1e-4, 1.0)]
        x = np.array([t, *(z.real for z in waves), *(z.imag for z in waves)])
        for layer in made.layers:
            x = np.sin(10 * (layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()))
        x = made.output.weight.detach().numpy() @ x
        rates = np.log(100) / np.array([1.5, 0.3])
        decay = np.exp(-t * np.linspace(rates[0], rates[1], 3))
        np.testing.assert_allclose(found[:, step].detach(), x * decay, rtol=1e-4, atol=1e-5)


def test_kernels_do_not_depend_on_how_many_are_asked_for():
    made = ImplicitFilter(3, 50)
    torch.testing.assert_close(made(20), made(50)[:, :20])
    free = ImplicitFilter(3, 50, decay=0.0)
    assert (free.decay == 0).all()
    assert {name for name, _ in made.named_parameters() if "layers" not in name} == {
        "positions",
        "frequency",
        "output.weight",
    }


@pytest.mark.parametrize("size", [1, 3, 5])
def test_short_convolution(size):
    torch.manual_seed(0)
    layer = ShortConvolution(4, size).double()
    x = torch.randn(2, 6, 4).double()
    wanted = F.conv1d(x.mT, layer.weight[:, None], layer.bias, padding=size - 1, groups=4)[..., :6].mT
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[:, :2]), wanted[:, :2])


@pytest.mark.parametrize("options", [{}, {"residual_conv": False}, {"short_conv": 0}, {"short_conv": 1, "decay": 0.5}])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mixer_written_out(causal, options):
    layer = mixer(causal, **options)
    u = torch.randn(2, 7, 4).double()

    def long(part, x):
        k, rows = part.filter(7), []
        back = torch.zeros_like(k) if causal else part.filter_back(7)
        for t in range(7):
            past = sum(k[:, lag] * x[:, t - lag] for lag in range(t + 1))
            future = [back[:, lag] * x[:, t + 1 + lag] for lag in range(6 - t)]
            rows.append(past + sum(future) + part.beta * x[:, t])
        return torch.stack(rows, 1)

    z = F.linear(u, layer.inputs.weight, layer.inputs.bias)
    if options.get("short_conv") != 0:
        weight, size = layer.short.weight[:, None], layer.short.weight.shape[1]
        z = F.conv1d(z.mT, weight, layer.short.bias, padding=size - 1, groups=12)[..., :7].mT
    x1, x2, v = z[..., :4], z[..., 4:8], z[..., 8:]
    y = x2 * long(layer.long, x1 * v)
    if options.get("residual_conv", True):
        y = y + long(layer.residual, u)
    torch.testing.assert_close(layer(u), F.linear(y, layer.output.weight, layer.output.bias))


@pytest.mark.parametrize("causal", [True, False])
def test_what_an_output_sees(causal):
    layer = mixer(causal)
    u = torch.randn(1, 9, 4).double()
    J = torch.func.jacrev(layer)(u)[0, :, :, 0].abs().amax((1, 3))  # (output time, input time)
    assert (J.tril() + torch.ones(9, 9).triu(1) > 1e-6).all()
    ahead = J[torch.ones(9, 9).triu(1) > 0]
    assert ahead.max() < 1e-12 if causal else ahead.min() > 1e-6


def test_the_channel_mixer_written_out():
    torch.manual_seed(0)
    layer = BlockDiagonalGLU(8, expansion=2, nblocks=4).double()
    x = torch.randn(3, 8).double()
    g, h = (x @ torch.block_diag(*layer.inputs.weight).T).split(16, -1)
    hidden = 0.5 * g * (1 + torch.erf(g / math.sqrt(2))) * h
    torch.testing.assert_close(layer(x), hidden @ torch.block_diag(*layer.output.weight).T + layer.output.bias)
    assert layer.inputs.bias is None
    J = torch.func.jacrev(layer)(x[0]).abs() > 1e-9  # outputs of block 0 see the blocks 0 and 2
    assert J[:2].any(0).tolist() == [True, True, False, False, True, True, False, False]


def test_groups():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), MonarchMixer(4, 9, causal=False))
    model[0].bias.requires_grad_(False)
    rest, filters, places = monarch_mixer_groups(model, 0.02, weight_decay=0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{names[id(p)] for p in group["params"]} for group in (rest, filters, places)]
    assert len(found[2]) == 4
    assert all(name.endswith("positions") for name in found[2])
    assert all(".filter" in name for name in found[1])
    assert sum(map(len, found)) == sum(p.requires_grad for p in model.parameters())
    assert not any(".filter" in name for name in found[0])
    assert [group["lr"] for group in (rest, filters, places)] == [0.02, 1e-3, 1e-5]
    assert [group["weight_decay"] for group in (rest, filters, places)] == [0.3, 0.1, 0.0]
    assert len(monarch_mixer_groups(torch.nn.Linear(2, 2), 0.1)) == 1


def test_it_learns_to_average():
    torch.manual_seed(0)
    layer = MonarchMixer(4, 16, causal=True)
    optimizer = torch.optim.AdamW(monarch_mixer_groups(layer, 0.02, filter_rate=0.01))
    losses = []
    for _ in range(100):
        u = torch.randn(16, 16, 4)
        wanted = sum(0.5 * 0.7**lag * F.pad(u, (0, 0, lag, 0))[:, :16] for lag in range(16))
        loss = (layer(u) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_bad_input():
    for options, words in (({"d_model": 0}, "d_model"), ({"l_max": 2.5}, "l_max"), ({"filter_order": 0}, "order")):
        with pytest.raises(ValueError, match=f"{words} must be an integer"):
            MonarchMixer(**{"d_model": 4, "l_max": 9, "causal": True, **options})
    for options, words in (({"short_conv": -1}, "short_conv"), ({"decay": -1.0}, "decay")):
        with pytest.raises(ValueError, match=f"{words} must be"):
            MonarchMixer(4, 9, True, **options)
    for shape in ((2, 10, 4), (2, 0, 4), (2, 9, 5), (9, 4)):
        with pytest.raises(ValueError, match="u must have shape"):
            MonarchMixer(4, 9, True)(torch.zeros(shape))
    with pytest.raises(ValueError, match="embedding must be odd"):
        ImplicitFilter(4, 9, embedding=4)
    with pytest.raises(ValueError, match="L must be an integer from 1 to 9"):
        ImplicitFilter(4, 9)(10)
    with pytest.raises(ValueError, match="expansion must be"):
        BlockDiagonalGLU(4, 0)
    with pytest.raises(ValueError, match="size must be"):
        ShortConvolution(4, 0)
    with pytest.raises(ValueError, match="L must be"):
        LongConvolution(4, 9, True)(torch.zeros(2, 10, 4))
    for shape in ((2, 9, 1), (2, 9, 5), (4,)):  # one channel would be broadcast
        with pytest.raises(ValueError, match=r"u must have shape \(\.\.\., N, 4\)"):
            LongConvolution(4, 9, True)(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., N, 4\)"):
            ShortConvolution(4)(torch.zeros(shape))
    with pytest.raises(ValueError, match="K_back must have shape"):
        two_sided_convolution(torch.zeros(4), torch.zeros(4), torch.zeros(3))
    with pytest.raises(TypeError, match="dtype of u must be"):
        two_sided_convolution(torch.zeros(4, dtype=torch.long), torch.zeros(4), torch.zeros(4))
