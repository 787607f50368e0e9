"""ibp_linear: both paths against corners of the box and numpy in float64, gradients, strides, checks, cost."""

import itertools
from importlib import import_module

import numpy as np
import pytest
import torch

from polylib.kernels import ibp_linear

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}
SHAPES = [((5, 7), 3), ((1, 1), 1), ((2, 33, 40), 65), ((70, 130), 34)]


def drawn(shape, N, dtype=torch.float32, device="cpu", seed=0):
    gen = torch.Generator().manual_seed(seed)
    K = shape[-1]
    center, radius = torch.randn(shape, generator=gen), torch.rand(shape, generator=gen)
    weight, bias = torch.randn(N, K, generator=gen), torch.randn(N, generator=gen)
    weight[0, 0] = 0.0  # where the size has no slope
    return [t.to(device, dtype) for t in (center, radius, weight, bias)]


def by_numpy(center, radius, weight, bias, g, h):
    """Both results and the four gradients in float64."""
    flat = [t.detach().double().cpu().numpy().reshape(-1, t.shape[-1]) for t in (center, radius, g, h)]
    c, r, g, h = flat
    W, b = (t.detach().double().cpu().numpy() for t in (weight, bias))
    size = np.abs(W)
    by_w = g.T @ c + np.sign(W) * (h.T @ r)
    return c @ W.T + b, r @ size.T, g @ W, h @ size, by_w, g.sum(0)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_values_and_gradients(backend, dtype, sizes, device):
    tensors = [t.requires_grad_() for t in drawn(*sizes, dtype, device)]
    y, z = ibp_linear(*tensors, backend=backend)
    g, h = (torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(y) for k in (1, 2))
    found = [y, z, *torch.autograd.grad([y, z], tensors, [g, h])]
    for value, wanted in zip(found, by_numpy(*tensors, g, h), strict=True):
        assert value.dtype == dtype
        own = value.detach().double().cpu().numpy().reshape(wanted.shape)
        assert np.abs(own - wanted).max() <= ROUNDING[dtype] * max(1.0, np.abs(wanted).max())


@BACKENDS
def test_the_box_is_that_of_the_corners(backend, device):
    center, radius, weight, bias = drawn((1, 4), 3, device=device)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), device=device)
    images = (center + signs * radius) @ weight.T + bias
    y, z = ibp_linear(center, radius, weight, bias, backend=backend)
    torch.testing.assert_close(y - z, images.amin(0, keepdim=True))
    torch.testing.assert_close(y + z, images.amax(0, keepdim=True))


@BACKENDS
def test_single_gradients_and_no_bias(backend, device):
    tensors = drawn((3, 5), 4, device=device)[:3]
    every = [t.clone().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(sum(t.sum() for t in ibp_linear(*every, backend=backend)), every)
    for k in range(3):
        own = [t.clone().requires_grad_(k == i) for i, t in enumerate(tensors)]
        sum(t.sum() for t in ibp_linear(*own, backend=backend)).backward()
        torch.testing.assert_close(own[k].grad, wanted[k])
        assert all(t.grad is None for i, t in enumerate(own) if i != k)
    y, _ = ibp_linear(*every, backend=backend)
    (by_center,) = torch.autograd.grad(y.sum(), every[0])  # the radius has no part in it
    torch.testing.assert_close(by_center, tensors[2].sum(0).expand(3, 5))


@BACKENDS
def test_strides_and_no_rows(backend, device):
    center, radius, weight, bias = drawn((6, 5), 4, device=device)
    turned = [center.T.contiguous().T, radius[:1].expand(6, 5), weight.T.contiguous().T, bias.repeat(2)[::2]]
    wanted = ibp_linear(center, radius[:1].repeat(6, 1), weight, bias.repeat(2)[::2].contiguous())
    for found, value in zip(ibp_linear(*turned, backend=backend), wanted, strict=True):
        torch.testing.assert_close(found, value)
    weight.requires_grad_()
    y, z = ibp_linear(center[:0], radius[:0], weight, bias, backend=backend)
    (y.sum() + z.sum()).backward()
    assert y.shape == z.shape == (0, 4) and not weight.grad.any()


def test_vmap_compile_and_once(device):
    tensors = drawn((4, 6), 3, device=device)
    wanted = ibp_linear(*tensors)
    found = torch.func.vmap(lambda c, r: ibp_linear(c, r, *tensors[2:]))(*tensors[:2])
    torch.testing.assert_close(found, wanted)
    tensors = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.polylib.ibp_linear.default, tuple(tensors))
    torch.library.opcheck(torch.ops.polylib.ibp_linear.default, (*tensors[:3], None))
    compiled = torch.compile(lambda *t: ibp_linear(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), wanted)
    y, z = ibp_linear(*tensors, backend="triton")
    (by_center,) = torch.autograd.grad(y.square().sum() + z.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_center.sum().backward()


def test_second_derivatives_of_the_reference():
    tensors = [t.double().requires_grad_() for t in drawn((2, 3), 2)]
    tensors[2].data[0, 0] = 0.7
    assert torch.autograd.gradgradcheck(lambda *t: [p**2 for p in ibp_linear(*t)], tensors)


@BACKENDS
def test_autocast(backend, device):
    tensors = drawn((3, 5), 4, device=device)
    with torch.autocast(device.type if hasattr(device, "type") else str(device).split(":")[0], dtype=torch.bfloat16):
        y, z = ibp_linear(*tensors, backend=backend)
    assert y.dtype == z.dtype == torch.bfloat16


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.ibp_linear").cost
    forward, backward = cost(2, 3, 5, torch.float32), cost(2, 3, 5, torch.float32, backward=True)
    assert forward.bytes == 4 * (2 * 6 + 2 * 10 + 15 + 5) and forward.flops == 4 * 30
    assert backward.bytes == 4 * (2 * 10 + 4 * 6 + 2 * 15 + 5) and backward.flops == 8 * 30


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"center": [1.0]}, TypeError, "center must be a torch.Tensor, got list"),
        ({"radius": torch.zeros(2, 3).double()}, TypeError, "radius must have the dtype of center"),
        ({"weight": torch.zeros(4, 3).long()}, TypeError, "weight must have a real floating-point dtype"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight must have shape \(N, K\) with N, K >= 1"),
        ({"center": torch.zeros(2, 4)}, ValueError, r"center must have shape \(\.\.\., 3\), as weight"),
        ({"radius": torch.zeros(1, 3)}, ValueError, r"radius must have shape \(2, 3\), as center"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(N,\) = \(4,\)"),
        ({"weight": torch.zeros(4, 3, device="meta")}, ValueError, "weight must be on the device of center"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    good = {"center": torch.zeros(2, 3), "radius": torch.ones(2, 3), "weight": torch.zeros(4, 3)}
    with pytest.raises(error, match=message):
        ibp_linear(**good | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.ibp_linear").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for value in found.values():
            torch.testing.assert_close(value, found["reference"], rtol=1e-4, atol=1e-3)
