"""vandermonde: against sums written out in numpy, the Triton path against complex128, gradients, checks, cost."""

from importlib import import_module

import numpy as np
import pytest
import torch

from polylib.kernels import vandermonde, vandermonde_reference

BACKENDS = pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
# Rounding of the exponentials, 2^-23 each in size and angle, and of a sum; relative to the sum of all magnitudes.
TOLERANCE = 2**-20


def waves(*shape, dtype=torch.complex64, device="cpu", decay=0.05, spin=3.0, seed=0):
    """Weights of order one, and logarithms that decay."""
    gen = torch.Generator().manual_seed(seed)
    real = {"generator": gen, "dtype": torch.float64}
    v = torch.randn(*shape, generator=gen, dtype=torch.complex128)
    x = torch.complex(-decay * torch.rand(*shape, **real), spin * torch.randn(*shape, **real))
    return [t.to(device, dtype).requires_grad_() for t in (v, x)]


def results(v, x, L, backend, seen):
    """K and both gradients of its product with `seen`."""
    K = vandermonde(v, x, L, backend=backend)
    return [K.detach(), *torch.autograd.grad((K * seen).sum(), (v, x))]


def sizes(v, x, L, seen):
    """What K and the gradients could be at most: the sums of the magnitudes of their terms."""
    with torch.no_grad():
        terms = (x.real[..., None] * torch.arange(L, device=x.device)).exp()
        by_v = 2 * (terms * seen.abs()[..., None, :]).sum(-1)
        later = 2 * v.abs() * (terms * seen.abs()[..., None, :] * torch.arange(L, device=x.device)).sum(-1)
        return [2 * (v.abs()[..., None] * terms).sum(-2), by_v, later + by_v]


def test_the_reference_by_hand():
    """Two waves: one halves, i times the other turns by a quarter."""
    v, x = torch.tensor([[1.0, 1j]]), torch.tensor([[0.5, 1j]]).log()
    assert vandermonde_reference(v, x, 5).tolist()[0] == pytest.approx([2, -1, 0.5, 2.25, 0.125], abs=1e-6)


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 2, 17)], ids=str)
@pytest.mark.parametrize("L", [1, 2, 16, 100, 257, 1100])
def test_values_and_gradients(backend, shape, L, device):
    v, x = waves(*shape, device=device)
    seen = torch.randn(*shape[:-1], L, generator=torch.Generator().manual_seed(1)).to(device)
    found = results(v, x, L, backend, seen)
    wide = [t.detach().to(torch.complex128).requires_grad_() for t in (v, x)]
    expected = results(*wide, L, "reference", seen.double())
    for a, e, size in zip(found, expected, sizes(*wide, L, seen.double()), strict=True):
        assert a.dtype == (torch.complex64 if a.is_complex() else torch.float32)
        assert ((a - e).abs() <= TOLERANCE * size + 1e-7).all(), ((a - e).abs() / size).max()


@BACKENDS
def test_against_numpy(backend, device):
    v, x = (t.detach() for t in waves(2, 7, device=device))
    terms = v.cpu().numpy()[..., None] * np.exp(x.cpu().numpy().astype(complex)[..., None] * np.arange(300))
    found = vandermonde(v, x, 300, backend=backend).cpu().numpy()
    np.testing.assert_allclose(found, 2 * terms.sum(1).real, rtol=0, atol=2e-5)


@BACKENDS
def test_autocast_takes_no_digits(backend, device):
    v, x = (t.detach() for t in waves(2, 7, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        found = vandermonde(v, x, 50, backend=backend)
    torch.testing.assert_close(found, vandermonde(v, x, 50, backend=backend), rtol=0, atol=0)


@BACKENDS
def test_many_turns_keep_their_phase(backend, device):
    """Without decay, after some ten thousand radians: float32 would be off by a thousandth of a turn."""
    v, x = waves(1, 4, device=device, decay=0.0, spin=10.0)
    v, x = v.detach(), x.detach()
    expected = vandermonde(v.to(torch.complex128), x.to(torch.complex128), 2000, backend="reference")
    found = vandermonde(v, x, 2000, backend=backend)
    assert (found - expected).abs().max() < 1e-5


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_a_wave_that_grows(backend, device):
    """What lies beyond the end of a tile would overflow, and counts for nothing."""
    v = torch.ones(1, 1, dtype=torch.complex64, device=device)
    x = torch.full((1, 1), 0.3, dtype=torch.complex64, device=device).requires_grad_()
    K = vandermonde(v, x, 257, backend=backend)
    torch.testing.assert_close(K[0, -1].item(), 2 * float(np.exp(0.3 * 256)), rtol=1e-4, atol=0)
    (by_x,) = torch.autograd.grad(K[0, -1], x)
    torch.testing.assert_close(by_x.item(), complex(512 * np.exp(0.3 * 256)), rtol=1e-4, atol=0)


@BACKENDS
@pytest.mark.parametrize("value", [complex("inf"), complex("nan"), complex(0, float("inf"))])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_a_row_that_is_not_finite_leaves_the_others_alone(backend, value, device):
    calm, wild = ([t.detach() for t in waves(3, 5, device=device)] for _ in range(2))
    wild[1][1, 2] = value
    expected, found = (vandermonde(*pair, 40, backend=backend) for pair in (calm, wild))
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
    assert not found[1].isfinite().all()


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_nothing_to_add(backend, shape, device):
    v, x = waves(*shape, device=device)
    found = results(v, x, 5, backend, torch.ones(shape[0], 5, device=device))
    assert found[0].shape == (shape[0], 5) and not found[0].any()
    assert found[1].shape == found[2].shape == shape


@BACKENDS
def test_strides_do_not_matter(backend, device):
    v, x = (t.detach() for t in waves(4, 6, device=device))
    expected = vandermonde(v, x, 50, backend=backend)
    torch.testing.assert_close(vandermonde(v.T.contiguous().T, x.T.contiguous().T, 50, backend=backend), expected)
    conjugate = vandermonde(v.conj(), x.conj(), 50, backend=backend)  # a view with a bit set; the same sum
    torch.testing.assert_close(conjugate, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend):
    v, x = waves(2, 3, dtype=torch.complex128)
    torch.autograd.gradcheck(lambda v, x: vandermonde(v, x, 9, backend=backend), (v, x))
    torch.autograd.gradgradcheck(lambda v, x: vandermonde(v, x, 4, backend=backend), (v, x))


def test_under_func_transforms():
    v, x = (t.detach() for t in waves(3, 4, dtype=torch.complex128))
    each = torch.func.vmap(lambda v, x: vandermonde(v, x, 20))(v, x)
    torch.testing.assert_close(each, vandermonde(v, x, 20))
    slope = torch.func.grad(lambda v: vandermonde(v, x, 20).square().sum())(v)
    v.requires_grad_()
    (expected,) = torch.autograd.grad(vandermonde(v, x, 20).square().sum(), v)
    torch.testing.assert_close(slope, expected)


def test_the_kernels_are_differentiable_once(device):
    v, x = waves(1, 3, device=device)
    (by_v,) = torch.autograd.grad(vandermonde(v, x, 20, backend="triton").square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(by_v.abs().sum(), v)


def test_opcheck(device):
    v, x = waves(2, 3, device=device)
    torch.library.opcheck(torch.ops.polylib.vandermonde.default, (v, x, 20))
    grad = torch.ones(2, 20, device=device)
    torch.library.opcheck(torch.ops.polylib.vandermonde_backward.default, (grad, v.detach(), x.detach()))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph(backend, device):
    v, x = (t.detach() for t in waves(2, 3, device=device))
    compiled = torch.compile(vandermonde, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, x, 20, backend=backend), vandermonde(v, x, 20, backend=backend))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.vandermonde").cost
    # Six waves, two numbers of 8 bytes each; twenty numbers written. Backward reads them, and writes two for each wave.
    assert cost(2, 3, 10).bytes == 6 * 16 + 80
    assert cost(2, 3, 10, backward=True).bytes == 2 * 6 * 16 + 80
    assert (cost(2, 3, 10).flops, cost(2, 3, 10, backward=True).flops) == (240, 480)


ONE = torch.zeros(2, 3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"v": [1j]}, TypeError, "v must be a torch.Tensor, got list"),
        (
            {"x": torch.zeros(2, 3)},
            TypeError,
            "x must have dtype torch.complex64 or torch.complex128, got",
        ),
        ({"x": ONE.to(torch.complex128)}, TypeError, "x must have the dtype of v, torch.complex64, got"),
        ({"x": ONE[:1]}, ValueError, r"x must have shape that of v, \(2, 3\), got \(1, 3\)"),
        ({"v": ONE[0, 0], "x": ONE[0, 0]}, ValueError, r"v must have shape \(..., N\), got \(\)"),
        ({"x": ONE.to("meta")}, ValueError, "x must be on the device of v, cpu, got meta"),
        ({"L": 0}, ValueError, "L must be an integer of at least 1, got 0"),
        ({"L": 2.5}, ValueError, "L must be an integer of at least 1, got 2.5"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        vandermonde(**{"v": ONE, "x": ONE, "L": 5} | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.vandermonde").cases(torch.device("cpu"), True):
        plain = {who: pair for who, pair in contestants.items() if "compiled" not in who}
        after = {who: function(*tensors) for who, (function, tensors) in plain.items()}
        for found in after.values():
            torch.testing.assert_close(found, after["reference"], rtol=1e-4, atol=1e-4)
        assert costs[0].bytes < costs[1].bytes
