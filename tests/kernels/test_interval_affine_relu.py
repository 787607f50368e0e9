"""interval_affine_relu: both paths against the ends of intervals in float64, gradients, strides, checks, cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import interval_affine_relu

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}
SHAPES = [(5, 7), (1, 1), (3, 4, 3, 5), (40, 2, 2), (2, 3, 700)]


def drawn(shape, dtype=torch.float32, device="cpu", seed=0):
    """Values of which no bound is near the corner of ReLU."""
    gen = torch.Generator().manual_seed(seed)
    center, radius = torch.randn(shape, generator=gen), torch.rand(shape, generator=gen)
    center = torch.where((center.abs() - radius).abs() < 0.1, center * 3, center)
    scale = 2.0 ** torch.randint(-1, 2, shape[1:2], generator=gen) * (-1) ** torch.randint(2, shape[1:2], generator=gen)
    return [t.to(device, dtype) for t in (center, radius)] + [scale.to(device), torch.zeros(shape[1], device=device)]


def by_ends(center, radius, scale, shift):
    """(c', r', m, d) from the images of both ends of each interval, in float64."""
    shape = (1, -1) + (1,) * (center.dim() - 2)
    k, t = scale.view(shape), shift.view(shape)
    ends = torch.stack([(center - radius) * k + t, (center + radius) * k + t])
    low, high = ends.amin(0), ends.amax(0)
    return [(low.relu() + high.relu()) / 2, (high.relu() - low.relu()) / 2, (low + high) / 2, (high - low) / 2]


@BACKENDS
@DTYPES
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, dtype, bounds, shape, device):
    tensors = [t.requires_grad_() for t in drawn(shape, dtype, device)]
    found = interval_affine_relu(*tensors, bounds, backend=backend)
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(found[0]) for k in range(len(found))]
    gradients = torch.autograd.grad(found, tensors, weights)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wanted = by_ends(*wide)[: len(found)]
    wanted = [*wanted, *torch.autograd.grad(wanted, wide, [w.double() for w in weights])]
    for value, exact in zip((*found, *gradients), wanted, strict=True):
        apart = (value.double() - exact).abs().max().item()
        assert apart <= ROUNDING[dtype] * max(1.0, exact.abs().max().item())
    assert all(value.dtype == dtype for value in (*found, *gradients[:2]))
    assert all(value.dtype == torch.float32 for value in gradients[2:])


@BACKENDS
def test_batch_normalisation_and_relu_of_points(backend, device):
    """A box without width is a point, and the centre what the layers make of it."""
    x = drawn((6, 4, 3), device=device)[0]
    norm = torch.nn.BatchNorm1d(4).to(device)
    norm(3 * x + 1)  # statistics
    norm.eval()
    torch.nn.init.normal_(norm.weight)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    center, radius = interval_affine_relu(x, torch.zeros_like(x), scale, shift, backend=backend)
    torch.testing.assert_close(center, norm(x).relu())
    assert not radius.any()


@BACKENDS
def test_what_is_not_finite(backend, device):
    nan, inf = float("nan"), float("inf")
    center = torch.tensor([[nan, 1.0, inf, 0.0]], device=device)
    radius = torch.tensor([[1.0, nan, 1.0, inf]], device=device)
    found = interval_affine_relu(center, radius, torch.ones(4, device=device), torch.zeros(4, device=device), True)
    other = interval_affine_relu(
        center, radius, torch.ones(4, device=device), torch.zeros(4, device=device), True, backend=backend
    )
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, rtol=0, atol=0)
    assert found[0][0, 0].isnan() and found[0][0, 1].isnan() and found[0][0, 3] == inf


@BACKENDS
def test_many_samples_share_a_program(backend, device, monkeypatch):
    monkeypatch.setattr(import_module("polylib.kernels.interval_affine_relu"), "_PROGRAMS", 3)
    tensors = [t.requires_grad_() for t in drawn((10, 3), device=device)]
    center, radius = interval_affine_relu(*tensors, backend=backend)
    found = torch.autograd.grad(center.sum() + 2 * radius.sum(), tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    center, radius = by_ends(*wide)[:2]
    for one, two in zip(found, torch.autograd.grad(center.sum() + 2 * radius.sum(), wide), strict=True):
        torch.testing.assert_close(one.double(), two)


@BACKENDS
def test_strides_and_no_samples(backend, device):
    center, radius, scale, shift = drawn((4, 5, 6), device=device)
    wanted = interval_affine_relu(center, radius[:1].repeat(4, 1, 1), scale, shift)
    turned = center.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    found = interval_affine_relu(turned, radius[:1].expand(4, 5, 6), scale.repeat(2)[:5], shift, backend=backend)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)
    for empty in (center[:0], center[:, :, :0]):
        scale.grad = None
        found = interval_affine_relu(empty, empty.abs(), scale.requires_grad_(), shift, True, backend=backend)
        sum(part.sum() for part in found).backward()
        assert all(part.shape == empty.shape for part in found) and not scale.grad.any()


def test_vmap_compile_and_once(device):
    tensors = drawn((4, 3, 5), device=device)
    wanted = interval_affine_relu(*tensors)
    own = torch.func.vmap(lambda c, r: interval_affine_relu(c[None], r[None], *tensors[2:]))(*tensors[:2])
    torch.testing.assert_close(tuple(part[:, 0] for part in own), wanted)
    flat = [t.reshape(4, 15).requires_grad_() for t in tensors[:2]] + [t.requires_grad_() for t in tensors[2:]]
    for bounds in (False, True):
        torch.library.opcheck(torch.ops.polylib.interval_affine_relu.default, (*flat, bounds))
    compiled = torch.compile(lambda *t: interval_affine_relu(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), wanted)
    center, radius = interval_affine_relu(tensors[0].requires_grad_(), *tensors[1:], backend="triton")
    (by_center,) = torch.autograd.grad(center.square().sum() + radius.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_center.sum().backward()


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.interval_affine_relu").cost
    assert cost(100, 4, torch.bfloat16).bytes == 4 * 100 * 2 + 32
    assert cost(100, 4, torch.float32, bounds=True).bytes == 6 * 100 * 4 + 32
    assert cost(100, 4, torch.float32, bounds=True, backward=True).bytes == 8 * 100 * 4 + 64


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"center": [1.0]}, TypeError, "center must be a torch.Tensor, got list"),
        ({"center": torch.zeros(3)}, ValueError, r"center must have shape \(batch, channels, \.\.\.\)"),
        ({"radius": torch.zeros(2, 4)}, ValueError, r"radius must have shape \(2, 3\), as center"),
        ({"radius": torch.zeros(2, 3).double()}, TypeError, "radius must have the dtype of center"),
        ({"scale": torch.zeros(2)}, ValueError, r"scale must have shape \(3,\), one for each channel"),
        ({"shift": torch.zeros(3).long()}, TypeError, "shift must have a real floating-point dtype"),
        ({"shift": torch.zeros(3, device="meta")}, ValueError, "shift must be on the device of center, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    good = {"center": torch.zeros(2, 3), "radius": torch.ones(2, 3), "scale": torch.ones(3), "shift": torch.ones(3)}
    with pytest.raises(error, match=message):
        interval_affine_relu(**good | changed)


def test_bench_cases_run():
    module = import_module("benchmarks.ops.interval_affine_relu")
    for _, _, costs, contestants in module.cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for value in found.values():
            torch.testing.assert_close(value, found["reference"])
