"""topk_simplex: both paths against every possible support, bisection in float64, limits, gradients, checks, cost."""

from importlib import import_module
from itertools import combinations

import pytest
import torch

from polylib.kernels import topk_simplex

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
NAN, INF = float("nan"), float("inf")


def scores(R, m, seed=0, dtype=torch.float32, device="cpu"):
    """All entries of a row different, by more than rounding: the order is the same in every dtype."""
    gen = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(m, generator=gen) for _ in range(R)])
    return (rows / 8 - m / 16).to(device, dtype)


def simplex(u, mass):
    """The projection of all entries of a vector, by bisection for its threshold in float64."""
    low, high = u.min() - mass, u.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (u - middle).clamp(min=0).sum() > mass else (low, middle)
    return (u - high).clamp(min=0)


def projected(s, k, mass):
    """Row by row: the k largest entries, and the projection of these."""
    plan = torch.zeros_like(s, dtype=torch.float64)
    for out, row, b in zip(plan, s.double(), mass.double(), strict=True):
        chosen = row.sort(descending=True, stable=True).indices[:k]
        out[chosen] = simplex(row[chosen], b)
    return plan


@BACKENDS
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_of_all_supports_it_is_the_best(backend, k, device):
    s = torch.randn(4, 6, generator=torch.Generator().manual_seed(k)).to(device)
    found = topk_simplex(s, k, 0.7, backend=backend)
    for row, plan in zip(s.double().cpu(), found.double().cpu(), strict=True):
        best = -INF
        for support in combinations(range(6), k):
            t = torch.zeros(6, dtype=torch.float64)
            t[list(support)] = simplex(row[list(support)], 0.7)
            best = max(best, float(row @ t - t @ t / 2))
        assert float(row @ plan - plan @ plan / 2) == pytest.approx(best, abs=1e-5)
        assert (plan >= 0).all() and plan.count_nonzero() <= k and plan.sum() == pytest.approx(0.7, abs=1e-5)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("R", "m", "k"), [(1, 1, 1), (5, 16, 3), (3, 37, 9), (70, 20, 20), (2, 1100, 40)])
def test_it_is_the_projection_of_the_largest(backend, dtype, R, m, k, device):
    s = scores(R, m, dtype=dtype, device=device)
    mass = torch.linspace(0.5, 3, R, device=device)
    found = topk_simplex(s, k, mass, backend=backend)
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), projected(s, k, mass), rtol=rounding, atol=rounding)
    assert found.dtype == dtype and (found != 0).sum(1).max() <= k


@BACKENDS
def test_of_equal_entries_the_first_are_taken(backend, device):
    s = torch.tensor([[0.0, 1, 1, 1], [2, 2, 2, 2], [-0.0, 0.0, -0.0, -5]], device=device)
    assert topk_simplex(s, 2, backend=backend).tolist() == [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]
    wide = torch.zeros(2, 300, device=device)
    wide[1, 100:] = 1
    found = topk_simplex(wide, 7, backend=backend)
    assert found[0].nonzero().flatten().tolist() == list(range(7))
    assert found[1].nonzero().flatten().tolist() == list(range(100, 107))


@BACKENDS
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("far", [-1e30, -INF])
def test_far_below_and_far_from_zero(backend, shift, far, device):
    s = torch.tensor([[0.25, 0.5, 0.0, far]], device=device) + shift
    expected = torch.tensor([[1 / 3, 1 / 3 + 0.25, 1 / 3 - 0.25, 0]], device=device)
    torch.testing.assert_close(topk_simplex(s, 4, 1.25 - 0.25, backend=backend), expected - 0, rtol=0, atol=1e-3)


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_what_is_not_finite(backend, device):
    s = torch.tensor([[1, -INF, 2, 0], [NAN, 1, 2, 3], [INF, 0, 0, 0], [-INF] * 4, [1, 2, 3, 4]], device=device)
    mass = torch.tensor([1.0, 1, 1, 1, NAN], device=device)
    found = topk_simplex(s, 2, mass, backend=backend)
    assert found[0].tolist() == [0, 0, 1, 0]
    assert found[1:].isnan().all()
    assert topk_simplex(s[4:], 2, torch.zeros(1, device=device), backend=backend).tolist() == [[0, 0, 0, 0]]


@BACKENDS
@DTYPES
def test_gradients_are_those_of_a_fixed_support(backend, dtype, device):
    s, mass = (
        scores(6, 20, 1, dtype, device).requires_grad_(),
        torch.linspace(0.3, 4, 6, device=device).requires_grad_(),
    )
    grad = scores(6, 20, 2, dtype, device)
    plan = topk_simplex(s, 7, mass, backend=backend)
    by_s, by_mass = torch.autograd.grad(plan, (s, mass), grad)
    for row in range(6):
        inside = plan[row] != 0
        mean = grad[row][inside].double().mean()
        expected = torch.where(inside, grad[row].double() - mean, 0.0)
        torch.testing.assert_close(
            by_s[row].double(), expected, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5
        )
        torch.testing.assert_close(by_mass[row].double(), mean, rtol=1e-2, atol=1e-2)


def test_gradients_against_differences():
    s = scores(3, 9, 3, torch.float64).requires_grad_()
    mass = torch.tensor([0.6, 1.1, 2.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, b: topk_simplex(s, 4, b), (s, mass))
    assert torch.autograd.gradgradcheck(lambda s, b: topk_simplex(s, 4, b), (s, mass))


def test_the_kernels_are_differentiable_once(device):
    s = scores(2, 8, device=device).requires_grad_()
    (by_s,) = torch.autograd.grad(topk_simplex(s, 3, backend="triton").square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_s.sum().backward()


@BACKENDS
def test_any_shape_and_strides(backend, device):
    s = scores(30, 12, 4, device=device).view(2, 3, 5, 12).permute(3, 1, 0, 2)
    expected = topk_simplex(s.contiguous(), 2, backend="reference")
    torch.testing.assert_close(topk_simplex(s, 2, backend=backend), expected)
    assert topk_simplex(s.new_zeros(0, 4), 2, backend=backend).shape == (0, 4)
    torch.testing.assert_close(topk_simplex(s[0, 0, 0], 99, backend=backend).sum(), s.new_tensor(1.0))


def test_vmap_takes_the_reference(device):
    s = scores(6, 8, device=device).view(2, 3, 8)
    torch.testing.assert_close(torch.func.vmap(lambda own: topk_simplex(own, 2))(s), topk_simplex(s, 2))


def test_opcheck_and_compile(device):
    s, mass = scores(5, 40, device=device).requires_grad_(), torch.ones(5, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.polylib.topk_simplex.default, (s, mass, 4))
    compiled = torch.compile(lambda s, b: topk_simplex(s, 4, b, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, mass), topk_simplex(s, 4, mass, backend="triton"))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.topk_simplex").cost
    assert cost(10, 100, torch.bfloat16).bytes == 2 * 2 * 1000 + 4 * 10
    assert cost(10, 100, torch.float32, backward=True).bytes == 3 * 4 * 1000 + 4 * 10


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": [1.0]}, TypeError, "scores must be a torch.Tensor, got list"),
        ({"scores": torch.zeros(2, 3).long()}, TypeError, "scores must have a real floating-point dtype"),
        ({"scores": torch.zeros(2, 0)}, ValueError, r"scores must have shape \(\.\.\., m\), m at least 1"),
        ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
        ({"k": 1.5}, (TypeError, ValueError), "k must be an integer"),
        ({"mass": 0.0}, ValueError, "mass must be"),
        ({"mass": NAN}, ValueError, "mass must be"),
        ({"mass": torch.ones(3)}, ValueError, r"mass must have shape that of the rows of scores = \(2,\), got \(3,\)"),
        ({"mass": torch.ones(2, device="meta")}, ValueError, "mass must be on the device of scores, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({"scores": torch.zeros(2, 8193), "backend": "triton"}, ValueError, "rows of at most 8192 entries"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        topk_simplex(**{"scores": torch.zeros(2, 3), "k": 2} | changed)


def test_rows_that_are_too_long_for_the_kernels(device):
    assert topk_simplex(scores(1, 9000, device=device), 3).sum() == pytest.approx(1, abs=1e-5)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.topk_simplex").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        assert all(torch.allclose(plan, found["reference"], atol=1e-6) for plan in found.values())
