"""group_sort: both paths against numpy's sort, gradients of every order, bits on the edges, checks, cost."""

from importlib import import_module

import numpy as np
import pytest
import torch

from polylib.kernels import group_sort

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SHAPES = [(2,), (3, 6), (2, 3, 64), (5, 130), (33, 62), (1, 2050)]


def drawn(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def in_order(x, size):
    """By numpy: the sorted groups, and where each entry of the result came from."""
    groups = x.detach().double().cpu().numpy().reshape(*x.shape[:-1], -1, size)
    order = np.argsort(groups, -1, kind="stable")
    return np.take_along_axis(groups, order, -1).reshape(x.shape), order


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, dtype, shape, device):
    x = drawn(shape, dtype, device).requires_grad_()
    grad = drawn(shape, dtype, device, seed=1)
    y = group_sort(x, backend=backend)
    (found,) = torch.autograd.grad(y, x, grad)
    expected, order = in_order(x, 2)
    back = np.zeros(grad.shape).reshape(*shape[:-1], -1, 2)
    np.put_along_axis(back, order, grad.double().cpu().numpy().reshape(back.shape), -1)
    assert y.dtype == found.dtype == dtype
    np.testing.assert_array_equal(y.detach().double().cpu(), expected)  # entries move, none is computed
    np.testing.assert_array_equal(found.double().cpu(), back.reshape(shape))


@pytest.mark.parametrize("size", [1, 3, 4, 12])
def test_groups_of_other_sizes(size, device):
    x = drawn((5, 24), device=device)
    np.testing.assert_array_equal(group_sort(x, size).cpu(), in_order(x, size)[0])
    with pytest.raises(ValueError, match='group_size must be 2 for backend="triton"'):
        group_sort(x, size, backend="triton")


@BACKENDS
def test_every_bit_of_a_word_is_its_own_pair(backend, device):
    """Of 40 pairs one is swapped: the gradient is swapped there and nowhere else."""
    for pair in (0, 1, 30, 31, 32, 39):
        x = torch.arange(80.0, device=device)
        x[2 * pair : 2 * pair + 2] = x[2 * pair : 2 * pair + 2].flip(0)
        x.requires_grad_()
        y = group_sort(x, backend=backend)
        (found,) = torch.autograd.grad(y, x, torch.arange(80.0, device=device))
        assert y.tolist() == list(range(80))
        torch.testing.assert_close(found, x.detach(), rtol=0, atol=0)


@BACKENDS
def test_what_is_equal_or_not_finite(backend, device):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, 1.0, 1.0, nan, inf, -inf, nan, inf, 2.0, 2.0], device=device, requires_grad=True)
    y = group_sort(x, backend=backend)
    expected = torch.tensor([1.0, nan, 1.0, nan, -inf, inf, inf, nan, 2.0, 2.0], device=device)
    torch.testing.assert_close(y.detach(), expected, equal_nan=True, rtol=0, atol=0)
    (found,) = torch.autograd.grad(y, x, torch.arange(10.0, device=device))
    assert found.tolist() == [1, 0, 2, 3, 5, 4, 7, 6, 8, 9]


@BACKENDS
def test_second_derivative_swaps_again(backend, device):
    x = drawn((3, 8), device=device).requires_grad_()
    (first,) = torch.autograd.grad(group_sort(x, backend=backend).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first.detach(), 3 * x.detach() ** 2)
    torch.testing.assert_close(second, 6 * x.detach())


@BACKENDS
def test_strides_and_nothing(backend, device):
    x = drawn((6, 5), device=device)
    found, wanted = group_sort(x.T, backend=backend), group_sort(x.T.contiguous())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    one = x[0, :1].expand(4, 6)
    torch.testing.assert_close(group_sort(one, backend=backend), one.contiguous(), rtol=0, atol=0)
    for shape in ((0, 4), (3, 0)):
        empty = x.new_empty(shape).requires_grad_()
        y = group_sort(empty, backend=backend)
        y.sum().backward()
        assert y.shape == shape == empty.grad.shape


def test_vmap_and_compile(device):
    x = drawn((4, 6), device=device)
    wanted = group_sort(x)
    torch.testing.assert_close(torch.func.vmap(group_sort)(x), wanted)
    torch.library.opcheck(torch.ops.polylib.group_sort.default, (x.clone().requires_grad_(),))
    words = torch.zeros(16, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.polylib.group_sort_swap.default, (x.clone().requires_grad_(), words))
    compiled = torch.compile(lambda x: group_sort(x, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=0)


@BACKENDS
def test_distances_do_not_grow(backend, device):
    a, b = drawn((200, 32), device=device), drawn((200, 32), device=device, seed=1)
    apart = (group_sort(a, backend=backend) - group_sort(b, backend=backend)).norm(dim=1)
    assert (apart <= (a - b).norm(dim=1) * (1 + 1e-6)).all()


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.group_sort").cost
    assert cost(64, torch.float32).bytes == 2 * 64 * 4 + 4  # 32 pairs: one word


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(4).long()}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(\.\.\., n\)"),
        ({"x": torch.zeros(2, 5)}, ValueError, "group_size must divide the last axis of x, 5, got 2"),
        ({"group_size": 0}, ValueError, "group_size must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        group_sort(**{"x": torch.zeros(2, 4)} | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.group_sort").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for value in found.values():
            torch.testing.assert_close(value, found["reference"])
