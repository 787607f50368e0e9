"""sparse_down: both paths against the dense product in float64, gradients, zeros, repeated and unknown units, cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import sparse_down

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SIZES = [(1, 1, 1, 1), (3, 5, 9, 37), (2, 40, 50, 300)]  # tokens, units of each, all units, width
NAN, INF = float("nan"), float("inf")


def drawn(B, k, m, d, dtype=torch.float32, device="cpu", seed=0):
    """A third of the values are zeros, and units come more than once."""
    gen = torch.Generator().manual_seed(seed)
    values, weight_t, bias = (torch.randn(shape, generator=gen) for shape in ((B, k), (m, d), (d,)))
    values = torch.where(torch.rand(B, k, generator=gen) < 1 / 3, 0.0, values)
    indices = torch.randint(m, (B, k), generator=gen)
    return values.to(device, dtype), indices.to(device), weight_t.to(device, dtype), bias.to(device, dtype)


def dense(values, indices, weight_t, bias):
    """All activations of a token, most of them zero, times all rows."""
    all_units = torch.zeros(len(values), len(weight_t), dtype=values.dtype, device=values.device)
    return all_units.scatter_add(1, indices, values) @ weight_t + bias


@BACKENDS
@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_the_dense_product(backend, dtype, sizes, device):
    values, indices, *rest = drawn(*sizes, dtype=dtype, device=device)
    tensors = [t.requires_grad_() for t in (values, *rest)]
    y = sparse_down(tensors[0], indices, *tensors[1:], backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = dense(wide[0], indices, *wide[1:])
    pairs = zip(
        (y, *torch.autograd.grad(y, tensors, grad)),
        (expected, *torch.autograd.grad(expected, wide, grad.double())),
        strict=True,
    )
    for found, wanted in pairs:
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= ROUNDING[dtype] * max(wanted.abs().max().item(), 1)


@BACKENDS
def test_by_hand(backend, device):
    weight_t = torch.tensor([[1.0, 10], [2, 20], [3, 30]], device=device)
    values = torch.tensor([[1.0, 2, 0], [1, 1, 1]], device=device)
    indices = torch.tensor([[2, 0, 1], [1, 1, 1]], device=device)
    assert sparse_down(values, indices, weight_t, backend=backend).tolist() == [[5, 50], [6, 60]]
    bias = torch.tensor([0.5, -1.0], device=device)
    assert sparse_down(values, indices.int(), weight_t, bias, backend=backend).tolist() == [[5.5, 49], [6.5, 59]]


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_a_silent_unit_counts_for_nothing(backend, device):
    weight_t = torch.tensor([[1.0, 2], [INF, 4], [NAN, NAN]], device=device)
    values = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1]], device=device, requires_grad=True)
    indices = torch.tensor([[0, 1, 2]] * 3, device=device)
    y = sparse_down(values, indices, weight_t, backend=backend)
    assert y[:2].tolist() == [[1, 2], [INF, 6]] and y[2].isnan().all()
    (grad,) = torch.autograd.grad(y.sum(), values)
    assert grad[0].tolist() == [3, 4, 0] and grad[1].tolist() == [3, INF, 0]


def test_gradients_of_the_definition():
    values, indices, weight_t, bias = (t.double() if t.is_floating_point() else t for t in drawn(2, 4, 5, 3))
    tensors = [t.requires_grad_() for t in (values, weight_t, bias)]
    assert (values == 0).any()
    assert torch.autograd.gradcheck(lambda v, w, b: sparse_down(v, indices, w, b), tensors)
    assert torch.autograd.gradgradcheck(lambda v, w, b: sparse_down(v, indices, w, b), tensors)


def test_the_kernels_are_differentiable_once(device):
    values, indices, weight_t, _ = drawn(2, 3, 4, 5, device=device)
    y = sparse_down(values.requires_grad_(), indices, weight_t, backend="triton").square().sum()
    (by_values,) = torch.autograd.grad(y, values, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_values.sum().backward()


def test_many_tokens_that_name_one_unit_add_up_the_same_each_time(device):
    values, _, weight_t, _ = drawn(70, 3, 4, 5, device=device)
    indices = torch.full((70, 3), 2, device=device)
    weight_t.requires_grad_()
    grads = [
        torch.autograd.grad(sparse_down(values, indices, weight_t, backend="triton").square().sum(), weight_t)[0]
        for _ in range(2)
    ]
    assert torch.equal(*grads) and not grads[0][[0, 1, 3]].any()
    wide = weight_t.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(sparse_down(values.double(), indices, wide).square().sum(), wide)
    torch.testing.assert_close(grads[0].double(), expected, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_any_shape_and_strides(backend, device):
    values, indices, weight_t, bias = drawn(6, 4, 5, 8, device=device)
    expected = dense(values, indices, weight_t, bias)
    strided = values.view(2, 3, 4).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = sparse_down(strided, indices.view(2, 3, 4), weight_t.mT.contiguous().mT, bias, backend=backend)
    torch.testing.assert_close(found, expected.view(2, 3, 8))
    torch.testing.assert_close(sparse_down(values[0], indices[0], weight_t, bias, backend=backend), expected[0])


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_no_tokens_or_no_units(backend, shape, device):
    values, indices, weight_t, bias = drawn(*shape, 4, 5, device=device)
    y = sparse_down(values, indices, weight_t.requires_grad_(), bias, backend=backend)
    torch.testing.assert_close(y, bias.expand(shape[0], 5))
    assert not torch.autograd.grad(y.sum(), weight_t)[0].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_on_a_gpu_an_unknown_unit_makes_its_token_nan(device):
    values, indices, weight_t, _ = drawn(2, 3, 4, 5, device=device)
    values, indices[1, 1] = torch.ones_like(values), 4
    y = torch.ops.polylib.sparse_down(values, indices, weight_t)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_autocast_vmap_and_compile(device):
    values, indices, weight_t, bias = drawn(4, 3, 5, 8, device=device)
    with torch.autocast(values.device.type, torch.bfloat16):
        assert sparse_down(values, indices, weight_t).dtype == torch.bfloat16
    own = torch.func.vmap(sparse_down, (0, 0, None, None))(values, indices, weight_t, bias)
    torch.testing.assert_close(own, sparse_down(values, indices, weight_t, bias))
    inputs = (values.requires_grad_(), indices, weight_t.requires_grad_())
    torch.library.opcheck(torch.ops.polylib.sparse_down.default, inputs)
    compiled = torch.compile(lambda *t: sparse_down(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, bias), sparse_down(*inputs, bias, backend="triton"))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.sparse_down").cost
    forward = cost(2, 10, 100, torch.bfloat16)
    assert (forward.bytes, forward.flops) == (2 * (20 * 101 + 200) + 8 * 20, 2 * 20 * 100)
    assert cost(2, 10, 100, torch.float32, m=50, backward=True).bytes == 4 * (20 * 102 + 200 + 5000) + 8 * 20


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor, got list"),
        ({"values": torch.tensor(1.0)}, ValueError, r"values must have shape \(\.\.\., k\), got a number"),
        ({"indices": torch.zeros(2, 3)}, TypeError, "indices must be a tensor of int32 or int64, got torch.float32"),
        ({"indices": [0]}, TypeError, "indices must be a tensor of int32 or int64, got list"),
        ({"indices": torch.zeros(2, 2).long()}, ValueError, r"indices must have shape that of values = \(2, 3\)"),
        ({"indices": torch.full((2, 3), 4)}, ValueError, "indices must be from 0 to m - 1 = 3, got 4"),
        ({"indices": torch.full((2, 3), -1)}, ValueError, "indices must be from 0 to m - 1 = 3, got -1"),
        ({"indices": torch.zeros(2, 3, device="meta").long()}, ValueError, "indices must be on the device of values"),
        ({"weight_t": torch.zeros(4)}, ValueError, r"weight_t must have shape \(m, d\), got \(4,\)"),
        ({"weight_t": torch.zeros(4, 5).half()}, TypeError, "weight_t must have the dtype of values"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(d,\) = \(5,\), got \(4,\)"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    given = {"values": torch.zeros(2, 3), "indices": torch.zeros(2, 3).long(), "weight_t": torch.zeros(4, 5)}
    with pytest.raises(error, match=message):
        sparse_down(**given | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.sparse_down").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for y in found.values():
            torch.testing.assert_close(y, found["reference"])
