"""S4D: kernels against scipy's discretisation and filters, convolution against recurrence, limits, and training."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

from polylib.kernels import s4d_scan
from polylib.sequences import S4D, S4DKernel, causal_convolution, s4d_groups

KINDS = ["legs", "inv", "lin", "quadratic", "real", "random"]


def kernel(seed=0, **options):
    torch.manual_seed(seed)
    return S4DKernel(3, **{"d_state": 8, **options}).double()


def numbers(made):
    """A, B, C (H, N / 2) and Delta (H,) in numpy, read off the parameters."""
    raw = made.decay.detach().numpy()
    size = {"exp": np.exp(raw), "softplus": np.log1p(np.exp(raw)), "relu": np.maximum(raw, 0)}[made.transform]
    A = -size + 1j * made.frequency.detach().numpy()
    B, C = (part.detach().numpy() @ [1, 1j] for part in (made.B, made.C))
    return A, B, C, np.exp(made.log_dt.detach().numpy())


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("transform", ["exp", "softplus", "relu"])
def test_kernels_are_impulse_responses_of_scipy(disc, transform):
    made = kernel(disc=disc, transform=transform, train_B=True, dt_max=0.5)
    torch.nn.init.normal_(made.B)
    found = made(40).detach().numpy()
    A, B, C, dt = numbers(made)
    for h in range(3):
        system = (np.diag(A[h]), B[h][:, None], C[h][None], np.zeros((1, 1)))
        A_bar, B_bar, *_ = scipy.signal.cont2discrete(system, dt[h], method=disc)
        wanted = [2 * (C[h] @ np.linalg.matrix_power(A_bar, k) @ B_bar[:, 0]).real for k in range(40)]
        np.testing.assert_allclose(found[h], wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("init", KINDS)
def test_convolution_recurrence_and_a_filter_agree(init):
    made = kernel(init=init)
    u = torch.randn(2, 50, 3, dtype=torch.float64)
    y = causal_convolution(u.mT, made(50)).mT
    by_steps, _ = made.recur(u)
    torch.testing.assert_close(by_steps, y, rtol=1e-10, atol=1e-11)
    A, _, C, dt = numbers(made)
    for h in range(3):
        wanted = sum(
            2
            * scipy.signal.lfilter([c * (np.exp(a * dt[h]) - 1) / a], [1, -np.exp(a * dt[h])], u[:, :, h].numpy()).real
            for a, c in zip(A[h], C[h], strict=True)
        )
        np.testing.assert_allclose(y[:, :, h].detach(), wanted, rtol=1e-9, atol=1e-11)


def test_one_wave_by_hand():
    """A = i / 2 and C B = 1 for a step: 2, 0, -1/2, 0, 1/8."""
    made = S4DKernel(1, 2).double()
    with torch.no_grad():
        made.log_dt.zero_()
        made.decay.fill_(math.log(math.log(2)))
        made.frequency.fill_(math.pi / 2)
        weight = 1 / made.discretized()[1]
        made.C.copy_(torch.stack([weight.real, weight.imag], -1))
    np.testing.assert_allclose(made(5).detach()[0], [2, 0, -0.5, 0, 0.125], atol=1e-12)
    y, _ = made.recur(torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64))
    np.testing.assert_allclose(y.detach()[:, 0], [2, 2, -0.5], atol=1e-12)


def test_a_real_wave_is_an_exponential_average():
    made = S4DKernel(1, 2, init="real", dt_min=0.1).double()
    with torch.no_grad():
        made.C.copy_(torch.tensor([[[1.0, 0.0]]]))
    u, (average, dt) = torch.randn(30, dtype=torch.float64), (0.0, 0.1)
    y, _ = made.recur(u[:, None])
    for now, found in zip(u, y[:, 0], strict=True):
        average = math.exp(-dt) * average + (1 - math.exp(-dt)) * now
        assert found.item() == pytest.approx(2 * average.item(), abs=1e-6)


def test_the_two_rules_agree_for_small_steps():
    """They differ by about z^3 / 12 in the logarithm of A, z = Delta A, and by z^2 in B / Delta."""
    for dt in (1e-1, 1e-3, 1e-5):
        pair = [kernel(disc=disc, dt_min=dt, dt_max=dt) for disc in ("zoh", "bilinear")]
        (A, B), (other, B_other) = (made.discretized() for made in pair)
        third = (dt * pair[0].A().abs()) ** 3
        assert ((A - other).abs() <= third / 10 + 1e-15).all()
        assert ((B - B_other).abs() <= dt * (dt * pair[0].A().abs()) ** 2).all()


def test_nothing_is_lost_near_a_zero_of_A():
    """B of a step tends to Delta B, where (e^z - 1) / A is 0 / 0; its gradient stays right, too."""
    made = S4DKernel(1, 12, transform="relu", dt_min=1.0, dt_max=1.0)
    size = torch.tensor([0.0, 1e-7, 1e-3, 0.09, 0.11, 1.0])
    with torch.no_grad():
        made.decay.copy_(size)
        made.frequency.zero_()
    B = made.discretized()[1].real[0]
    exact = size.double()
    wanted = torch.where(exact == 0, 1, -torch.expm1(-exact) / exact.clamp(min=1e-300))
    torch.testing.assert_close(B.double(), wanted, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(B.sum(), made.decay)
    bent = ((1 + exact) * (-exact).exp() - 1) / exact.clamp(min=1e-300).square()  # of (1 - e^-a) / a
    wanted = torch.where(exact < 1e-2, -0.5 + exact / 3, bent)
    wanted[0] = 0  # relu's own slope at 0
    torch.testing.assert_close(slope[0].double(), wanted, rtol=1e-4, atol=0)


def test_a_step_that_forgets_everything_at_once():
    """The bilinear rule at Delta A = -2 multiplies the state by 0."""
    made = S4DKernel(1, 2, init="real", disc="bilinear", dt_min=2.0, dt_max=2.0)
    with torch.no_grad():
        made.log_dt.fill_(math.log(2.0))
    K = made(6)
    assert K[0, 1:].abs().max() < 1e-2 * K[0, 0].abs()
    K.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize(("L", "M"), [(7, 7), (7, 3), (3, 7), (1, 1)])
def test_causal_convolution(L, M):
    u, K = torch.randn(2, 3, L, dtype=torch.float64), torch.randn(3, M, dtype=torch.float64)
    y = causal_convolution(u, K)
    for b in range(2):
        for h in range(3):
            np.testing.assert_allclose(y[b, h], np.convolve(u[b, h], K[h])[:L], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"disc": "bilinear", "train_B": True, "transform": "softplus"}])
def test_gradients(options):
    made = kernel(d_state=4, **options)
    names, values = zip(*made.named_parameters(), strict=True)
    assert ("B" in names) is ("train_B" in options)

    def of(*values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (6,))

    assert torch.autograd.gradcheck(of, values)


def test_the_layer_sees_the_past_only_and_can_be_run_in_pieces():
    torch.manual_seed(0)
    layer = S4D(4, d_state=8).double().eval()
    u = torch.randn(2, 20, 4, dtype=torch.float64)
    y = layer(u)
    later = u.clone()
    later[:, 12:] += 1
    torch.testing.assert_close(layer(later)[:, :12], y[:, :12])
    assert (layer(later)[:, 12:] - y[:, 12:]).abs().max() > 0.01
    first, state = layer.recur(u[:, :9])
    second, state = layer.recur(u[:, 9:-1], state)
    last, _ = layer.step(u[:, -1], state)
    torch.testing.assert_close(torch.cat([first, second, last[:, None]], 1), y)


def test_its_waves_are_what_the_scan_of_a_gpu_takes():
    torch.manual_seed(0)
    kernel, u = S4DKernel(3, d_state=8), torch.randn(2, 3, 70)
    torch.testing.assert_close(s4d_scan(u, *kernel.waves(), backend="triton"), causal_convolution(u, kernel(70)))


def test_the_layer_written_out():
    torch.manual_seed(0)
    layer = S4D(4, d_state=8).double()
    u = torch.randn(2, 10, 4, dtype=torch.float64)
    K, D = layer.kernel(10), layer.D
    y = torch.stack([sum(K[:, k] * u[:, t - k] for k in range(t + 1)) + D * u[:, t] for t in range(10)], 1)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    a, b = (y @ layer.mix.weight.T + layer.mix.bias).split(4, -1)
    torch.testing.assert_close(layer(u), a * torch.sigmoid(b))


def test_initial_values():
    torch.manual_seed(0)
    made = S4DKernel(400, 64, dt_min=0.01, dt_max=0.1)
    steps = made.log_dt.exp()
    assert 0.01 <= steps.min() < 0.011
    assert 0.09 < steps.max() <= 0.1
    assert made.log_dt.mean().item() == pytest.approx(math.log(0.01 * 0.1) / 2, abs=0.1)
    torch.testing.assert_close(made.A()[7].imag, math.pi * torch.arange(32))
    torch.testing.assert_close(made.A().real, torch.full((400, 32), -0.5))
    assert made.C.square().sum(-1).mean().item() == pytest.approx(1, abs=0.05)
    for transform in ("softplus", "relu"):
        torch.testing.assert_close(S4DKernel(2, 8, "real", transform=transform).A()[1].real, -torch.arange(1.0, 5))
    random = S4DKernel(2, 8, "random")
    assert not torch.equal(random.frequency[0], random.frequency[1])


def test_half_precision_is_computed_in_float32():
    layer = S4D(4, d_state=8)
    u = torch.randn(2, 10, 4)
    expected = layer(u)
    for dtype, distance in ((torch.bfloat16, 0.1), (torch.float16, 0.01)):
        found = S4D(4, d_state=8)
        found.load_state_dict(layer.state_dict())
        found = found.to(dtype)
        y = found(u.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=distance)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in found.parameters())


def test_groups():
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), S4D(4, d_state=8, train_B=True), S4D(4, d_state=8))
    model[0].bias.requires_grad_(False)
    rest, dynamics = s4d_groups(model, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in dynamics["params"]}
    assert found == {f"{k}.kernel.{name}" for k in (1, 2) for name in ("log_dt", "decay", "frequency")} | {"1.kernel.B"}
    every = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)] for p in rest["params"]} == every - found
    assert (dynamics["lr"], dynamics["weight_decay"], rest["lr"], rest["weight_decay"]) == (1e-3, 0, 0.01, 0.01)
    assert len(s4d_groups(torch.nn.Linear(2, 2), 0.1)) == 1


def test_it_learns_to_sum_with_the_groups_of_the_paper():
    torch.manual_seed(0)
    made = S4DKernel(1, 16, dt_min=0.02, dt_max=0.1)
    optimizer = torch.optim.AdamW(s4d_groups(made, 0.02, dynamics_rate=5e-3))
    u = torch.randn(16, 1, 32)
    wanted = u.cumsum(-1) / 32**0.5
    losses = []
    for _ in range(150):
        loss = (causal_convolution(u, made(32)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_bad_input():
    bad = [
        ({"d_state": 7}, "d_state must be"),
        ({"init": "fourier"}, "init must be one of"),
        ({"dt_min": 0.0}, "dt_min must be"),
        ({"dt_max": 1e-4}, "dt_max must be"),
        ({"disc": "euler"}, "disc must be one of"),
        ({"transform": "abs"}, "transform must be one of"),
    ]
    for options, words in bad:
        with pytest.raises(ValueError, match=words):
            S4DKernel(2, **options)
    with pytest.raises(ValueError, match="d_model must be"):
        S4DKernel(0)
    with pytest.raises(ValueError, match="dropout must be"):
        S4D(2, dropout=1.5)
    layer = S4D(2, d_state=4)
    for shape in ((3, 5), (1, 5, 3), (1, 0, 2)):
        with pytest.raises(ValueError, match="u must have shape"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="state must have shape"):
        layer.step(torch.zeros(3, 2), torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="u must have shape"):
        layer.step(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="L must be"):
        layer.kernel(0)
    with pytest.raises(ValueError, match="K must have shape"):
        causal_convolution(torch.zeros(3), torch.zeros(0))


def test_integers_are_refused_and_not_cut():
    with pytest.raises(TypeError, match="dtype of u must be a floating-point dtype"):
        causal_convolution(torch.tensor([1, 2, 3]), torch.tensor([0.4, 0.3, 0.2]))
    with pytest.raises(TypeError, match="dtype of u must be a floating-point dtype"):
        S4DKernel(3, 8).recur(torch.ones(1, 4, 3, dtype=torch.long))


def test_softplus_starts_at_a_large_decay():
    torch.manual_seed(0)
    kernel = S4DKernel(1, 1500, "real", transform="softplus").double()
    torch.testing.assert_close(-kernel.A().real[0], torch.arange(1, 751).double(), rtol=1e-5, atol=1e-5)
