"""s4d_scan: against the recurrence in numpy, the Triton path against float64, gradients, causality, checks, cost."""

from importlib import import_module

import numpy as np
import pytest
import torch

from polylib.kernels import s4d_scan, s4d_scan_reference, vandermonde

BACKENDS = pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest entry


def inputs(B, H, N, L, dtype=torch.float32, device="cpu", decay=0.05):
    """A batch of noise, and waves that decay."""
    gen = torch.Generator().manual_seed(0)
    u = torch.randn(B, H, L, generator=gen, dtype=torch.float64)
    v = torch.randn(H, N, generator=gen, dtype=torch.complex128)
    size, spin = (torch.randn(H, N, generator=gen, dtype=torch.float64) for _ in range(2))
    numbers = torch.complex128 if dtype == torch.float64 else torch.complex64
    x = torch.complex(-decay * size.abs(), 3 * spin)
    return [u.to(device, dtype).requires_grad_(), *(t.to(device, numbers).requires_grad_() for t in (v, x))]


def results(tensors, backend, seen):
    """y and all gradients of its product with `seen`."""
    y = s4d_scan(*tensors, backend=backend)
    return [y.detach(), *torch.autograd.grad((y * seen.to(y.dtype)).sum(), tensors)]


def widened(tensors):
    return [t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in tensors]


@BACKENDS
@pytest.mark.parametrize("length", [1, 64, 150])
def test_it_is_the_recurrence(backend, length, device):
    u, v, x = (t.detach() for t in inputs(2, 3, 5, length, device=device))
    state, y = np.zeros((2, 3, 5), complex), []
    a, weight, now = np.exp(x.cpu().numpy()), v.cpu().numpy(), u.cpu().numpy()
    for t in range(length):
        state = a * state + now[..., t, None]
        y.append(2 * (weight * state).sum(-1).real)
    expected = np.stack(y, -1)
    found = s4d_scan(u, v, x, backend=backend).cpu().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 5, 1), (1, 2, 20, 64), (3, 2, 5, 200), (18, 1, 40, 70)], ids=str)
def test_values_and_gradients(backend, dtype, shape, device):
    tensors = inputs(*shape, dtype=dtype, device=device)
    B, H, _, L = shape
    seen = torch.randn(B, H, L, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = results(widened(tensors), "reference", seen)
    for tensor, a, e in zip([tensors[0], *tensors], results(tensors, backend, seen), expected, strict=True):
        assert a.dtype == tensor.dtype and a.shape == e.shape
        assert (a - e).abs().max() <= TOLERANCE[dtype] * e.abs().max() + 1e-9


def test_it_convolves_with_the_sums_of_waves():
    u, v, x = (t.detach() for t in inputs(2, 2, 4, 30, dtype=torch.float64))
    K = vandermonde(v, x, 30)
    lags = torch.arange(30)[:, None] - torch.arange(30)
    toeplitz = torch.where(lags >= 0, K[:, lags.clamp(min=0)], 0)
    torch.testing.assert_close(s4d_scan(u, v, x), torch.einsum("hts,bhs->bht", toeplitz, u))


def test_the_future_does_not_matter(device):
    """Bit by bit: chunks are gone through one after the other, and within one the places ahead have weights of 0."""
    u, v, x = (t.detach() for t in inputs(2, 2, 5, 150, device=device))
    later = u.clone()
    later[..., 100:] = 7
    before, after = (s4d_scan(each, v, x, backend="triton")[..., :100] for each in (u, later))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_a_value_that_is_not_finite_stays_in_its_row(device):
    u, v, x = (t.detach() for t in inputs(3, 2, 5, 150, device=device))
    wild = u.clone()
    wild[1, 0, 80] = float("inf")
    found, expected = (s4d_scan(each, v, x, backend="triton") for each in (wild, u))
    assert not found[1, 0, 80:].isfinite().any()
    torch.testing.assert_close(found[1, 0, :64], expected[1, 0, :64])  # the chunks before it
    found[1, 0] = expected[1, 0]
    torch.testing.assert_close(found, expected)


@BACKENDS
def test_nothing_decays(backend, device):
    """After thousands of radians every phase still has its digits."""
    u, v, x = (t.detach() for t in inputs(1, 1, 4, 1000, device=device, decay=0.0))
    found = s4d_scan(u, v, x, backend=backend)
    expected = s4d_scan(*widened((u, v, x)), backend="reference")
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5)], ids=str)
def test_nothing_to_add(backend, shape, device):
    tensors = inputs(*shape, device=device)
    B, H, _, L = shape
    found = results(tensors, backend, torch.ones(B, H, L, device=device))
    assert found[0].shape == (B, H, L) and not found[0].any()
    assert all(a.shape == t.shape and not a.abs().any() for a, t in zip(found[1:], tensors, strict=True))


@BACKENDS
def test_strides_do_not_matter(backend, device):
    u, v, x = (t.detach() for t in inputs(3, 4, 6, 70, device=device))
    expected = s4d_scan(u, v, x, backend=backend)
    turned = u.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    torch.testing.assert_close(s4d_scan(turned, v.T.contiguous().T, x, backend=backend), expected)
    conjugate = s4d_scan(u, v.conj(), x.conj(), backend=backend)  # views with a bit set; the same sum
    torch.testing.assert_close(conjugate, expected, rtol=1e-4, atol=1e-4)
    expanded = s4d_scan(u[:1].expand(3, -1, -1), v, x, backend=backend)
    torch.testing.assert_close(expanded, expected[:1].expand(3, -1, -1))


def test_many_waves_go_by_transforms(device):
    u, v, x = (t.detach() for t in inputs(1, 2, 70, 20, device=device))
    torch.testing.assert_close(s4d_scan(u, v, x), s4d_scan(u, v, x, backend="reference"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at most 64 waves in complex64, got 70"):
        s4d_scan(u, v, x, backend="triton")


def test_gradcheck():
    tensors = inputs(2, 2, 3, 7, dtype=torch.float64)
    torch.autograd.gradcheck(s4d_scan_reference, tensors)
    torch.autograd.gradgradcheck(s4d_scan_reference, [t[..., :1].detach().requires_grad_() for t in tensors])


def test_the_kernels_are_differentiable_once(device):
    u, v, x = inputs(1, 1, 3, 20, device=device)
    (by_u,) = torch.autograd.grad(s4d_scan(u, v, x, backend="triton").square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(by_u.square().sum(), u)


def test_opcheck(device):
    op = import_module("polylib.kernels.s4d_scan")
    u, v, x = inputs(2, 2, 3, 20, device=device)
    matrices = [t.detach().requires_grad_() for t in op._chunk_matrices(v, x, 32, 16)]
    torch.library.opcheck(torch.ops.polylib.s4d_scan.default, (u, *matrices))
    grad = torch.ones_like(u.detach())
    tensors = (grad, u.detach(), *(t.detach() for t in matrices))
    torch.library.opcheck(torch.ops.polylib.s4d_scan_backward.default, tensors)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph(backend, device):
    tensors = [t.detach() for t in inputs(2, 2, 3, 20, device=device)]
    compiled = torch.compile(s4d_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, backend=backend), s4d_scan(*tensors, backend=backend))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.s4d_scan").cost
    # 2 x 3 x 100 entries of 4 bytes, read and written; 12 waves of two numbers. 128 products within, 8 a wave.
    assert cost(2, 3, 4, 100, torch.float32).bytes == 2 * 600 * 4 + 12 * 16
    assert cost(2, 3, 4, 100, torch.float32).flops == 600 * (128 + 32)
    assert cost(2, 3, 4, 100, torch.float32, backward=True).bytes == 3 * 600 * 4 + 2 * 12 * 16


U, V = torch.zeros(2, 3, 5), torch.zeros(3, 4, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"u": [1.0]}, TypeError, "u must be a torch.Tensor, got list"),
        ({"u": U.long()}, TypeError, "dtype of u must be"),
        ({"u": U[0]}, ValueError, r"u must have shape \(B, H, L\) with L of at least 1, got \(3, 5\)"),
        ({"u": U[..., :0]}, ValueError, r"u must have shape \(B, H, L\) with L of at least 1, got \(2, 3, 0\)"),
        ({"v": V.real}, TypeError, "v must have dtype torch.complex64 or torch.complex128, got torch.float32"),
        ({"v": V[:2], "x": V[:2]}, ValueError, r"v must have shape \(H, N\) with H = 3, got \(2, 4\)"),
        ({"x": V[:, :2]}, ValueError, r"x must have shape that of v, \(3, 4\), got \(3, 2\)"),
        ({"x": V.to(torch.complex128)}, TypeError, "x must have the dtype of v, torch.complex64, got"),
        ({"x": V.to("meta")}, ValueError, "x must be on the device of v, cpu, got meta"),
        ({"v": V.to("meta"), "x": V.to("meta")}, ValueError, "v must be on the device of u, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        s4d_scan(**{"u": U, "v": V, "x": V} | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.s4d_scan").cases(torch.device("cpu"), True):
        plain = {who: pair for who, pair in contestants.items() if "compiled" not in who}
        after = {who: function(*tensors) for who, (function, tensors) in plain.items()}
        for found in after.values():
            torch.testing.assert_close(found, after["reference"], rtol=1e-4, atol=1e-4)
        assert costs[0].bytes < costs[1].bytes
