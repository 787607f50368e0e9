"""delta_relu: both paths against loops over frames in float64, gradients by their rule, checks, cost."""

from importlib import import_module

import numpy as np
import pytest
import torch

from polylib.kernels import delta_relu

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Shapes of clips, and of their steps: one for each channel, for each neuron, of the whole layer, for each column.
CLIPS = [
    ((2, 3, 4, 2, 3), (4, 1, 1)),
    ((1, 2, 3, 5), (3, 5)),
    ((3, 4, 7), (1,)),
    ((2, 2, 3, 4), (4,)),
    ((2, 5), ()),
    ((2, 2, 150, 1, 9), (1, 150, 1, 1)),
]


def drawn(shape, steps, dtype=torch.float32, device="cpu", seed=0):
    """Values away from the borders between codes in every dtype; steps are powers of two."""
    gen = torch.Generator().manual_seed(seed)
    q = 2.0 ** torch.randint(-2, 2, steps, generator=gen)
    code = torch.randint(-3, 4, shape, generator=gen)
    off = torch.rand(shape, generator=gen) * 0.6 - 0.3
    return ((code + off) * q).to(device, dtype), q.to(device)


def by_loops(x, q, relu, grad, weight):
    """Values, total, count and both gradients, in float64, frame by frame."""
    x, q, grad = (t.detach().double().cpu().numpy() for t in (x, q, grad))
    steps = np.broadcast_to(q, x.shape)
    a = np.maximum(x, 0) if relu else x
    code = np.round(a / steps)
    y = code * steps
    g, total, count = grad.copy(), 0.0, 0
    for t in range(1, x.shape[1]):
        change = y[:, t] - y[:, t - 1]
        total, count = total + np.abs(change).sum(), count + np.count_nonzero(change)
        g[:, t] += weight * np.sign(change)
        g[:, t - 1] -= weight * np.sign(change)
    by_q = np.zeros_like(q)
    for place in np.ndindex(x.shape):
        own = tuple(0 if size == 1 else i for size, i in zip(q.shape, place[x.ndim - q.ndim :], strict=True))
        by_q[own] -= g[place] * code[place]
    return y, total, count, np.where(x > 0, g, 0) if relu else g, by_q


@BACKENDS
@DTYPES
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("clips", CLIPS, ids=str)
def test_against_loops(backend, dtype, relu, clips, device):
    x, q = drawn(*clips, dtype=dtype, device=device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    x, q = x.requires_grad_(), q.requires_grad_()
    y, total, count = delta_relu(x, q, relu, backend=backend)
    found = torch.autograd.grad([y, total], [x, q], [grad, total.new_tensor(0.7)])
    expected = by_loops(x, q, relu, grad, 0.7)
    assert y.dtype == found[0].dtype == dtype and total.dtype == found[1].dtype == torch.float32
    assert count.item() == expected[2] and not count.requires_grad
    for tensor, wanted in zip((y, total, *found), (*expected[:2], *expected[3:]), strict=True):
        wide = tensor.detach().double().cpu().numpy()
        np.testing.assert_allclose(wide, wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * max(1, x.numel() ** 0.5))


@BACKENDS
def test_by_hand(backend, device):
    """Steps of one half: 0.8 is 1, -1 is 0, 1.2 is 1, 1.3 is 1.5, and 0.25 and 0.75 are half-way."""
    x = torch.tensor([[[0.8, -1.0, 0.25], [1.2, -2.0, 0.75], [1.3, 0.6, 0.75]]], device=device, requires_grad=True)
    q = torch.tensor(0.5, device=device, requires_grad=True)
    y, total, count = delta_relu(x, q, backend=backend)
    assert y.tolist() == [[[1, 0, 0], [1, 0, 1], [1.5, 0.5, 1]]]
    assert total.item() == 2 and count.item() == 3
    by_x, by_q = torch.autograd.grad(total, (x, q))
    assert by_x.tolist() == [[[0, 0, -1], [-1, 0, 1], [1, 1, 0]]]
    assert by_q.item() == -(-1 * 2 + 1 * 2 + 1 * 3 + 1 * 1)  # the total of the first column rises with its last code


@BACKENDS
def test_equal_frames_change_nothing(backend, device):
    x = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)).expand(2, 4, 5).to(device).bfloat16()
    _, total, count = delta_relu(x, torch.full((5,), 0.1, device=device), backend=backend)
    assert total.item() == 0 and count.item() == 0


@BACKENDS
def test_many_clips_share_a_program(backend, device, monkeypatch):
    monkeypatch.setattr(import_module("polylib.kernels.delta_relu"), "_PROGRAMS", 3)  # a thousand clips take a minute
    x, q = drawn((10, 2, 3), (3,), device=device)
    x, q = x.requires_grad_(), q.requires_grad_()
    grad = torch.ones_like(x)
    y, total, count = delta_relu(x, q, backend=backend)
    by_x, by_q = torch.autograd.grad([y, total], [x, q], [grad, total.new_tensor(1.0)])
    expected = by_loops(x, q, True, grad, 1.0)
    assert count.item() == expected[2]
    np.testing.assert_allclose(total.item(), expected[1], rtol=1e-5)
    np.testing.assert_allclose(by_x.cpu(), expected[3], atol=1e-5)
    np.testing.assert_allclose(by_q.cpu(), expected[4], rtol=1e-5)


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_what_is_not_finite(backend, device):
    x = torch.tensor([[[float("nan"), 1.0, float("inf")], [1.0, 1.0, float("inf")]]], device=device)
    y, total, _ = delta_relu(x, torch.tensor(1.0, device=device), backend=backend)
    assert y[0, 0, 0].isnan() and y[0, 0, 1:].tolist() == [1, float("inf")]
    assert total.isnan()


def test_steps_of_single_clips_have_no_kernel(device):
    x, q = drawn((3, 2, 4), (3, 1, 1), device=device)
    expected = torch.stack([delta_relu(x[i : i + 1], q[i, 0])[1] for i in range(3)]).sum()
    torch.testing.assert_close(delta_relu(x, q)[1], expected)
    with pytest.raises(ValueError, match="q must be the same for all clips and frames"):
        delta_relu(x, q, backend="triton")


def test_the_kernels_are_differentiable_once(device):
    x, q = drawn((2, 3, 4), (4,), device=device)
    y, total, _ = delta_relu(x.requires_grad_(), q, backend="triton")
    (by_x,) = torch.autograd.grad(total + y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_x.sum().backward()


@BACKENDS
def test_strides_and_no_clips(backend, device):
    x, q = drawn((2, 3, 4, 5), (4, 1), device=device)
    strided = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for found, wanted in zip(delta_relu(strided, q, backend=backend), delta_relu(x, q), strict=True):
        torch.testing.assert_close(found, wanted)
    y, total, count = delta_relu(x[:0], q.requires_grad_(), backend=backend)
    assert y.shape == (0, 3, 4, 5) and total.item() == 0 and count.item() == 0


def test_vmap_and_compile(device):
    x, q = drawn((4, 3, 5), (5,), device=device)
    y, total, count = torch.func.vmap(lambda own: delta_relu(own[None], q))(x)
    for found, wanted in zip((y[:, 0], total.sum(), count.sum()), delta_relu(x, q), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.library.opcheck(torch.ops.polylib.delta_relu.default, (x.requires_grad_(), q.requires_grad_(), True))
    compiled = torch.compile(lambda x, q: delta_relu(x, q, backend="triton"), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(x, q), delta_relu(x, q, backend="triton"), strict=True):
        torch.testing.assert_close(found, wanted)


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.delta_relu").cost
    assert cost(100, 4, torch.bfloat16).bytes == 2 * 100 * 2 + 16
    assert cost(100, 4, torch.float32, backward=True).bytes == 3 * 100 * 4 + 32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 2, 3).long()}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.zeros(2, 1, 3)}, ValueError, r"x must have shape \(batch, frames, \.\.\.\) with at least two"),
        ({"q": 0.1}, TypeError, "q must be a torch.Tensor, got float"),
        ({"q": torch.ones(4)}, ValueError, r"q must have shape that is broadcast to \(2, 2, 3\), got \(4,\)"),
        ({"q": torch.ones(3, device="meta")}, ValueError, "q must be on the device of x, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        delta_relu(**{"x": torch.zeros(2, 2, 3), "q": torch.ones(3)} | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.delta_relu").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for value in found.values():
            torch.testing.assert_close(value, found["reference"])
