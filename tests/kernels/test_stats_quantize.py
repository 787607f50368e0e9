"""stats_quantize: the Triton path against the formula, its registration, its checks, its cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import stats_codes, stats_quantize, stats_quantize_reference

# The scale is a sum in float32, in another order than PyTorch's: sixteen roundings of 2^-24. Half precisions round the
# result once, by 2^-11 and, as the interpreter truncates to bfloat16, 2^-7.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-6}
BITS = list(range(1, 9))


def triton_op(w, bits):
    return stats_quantize(w, bits, backend="triton")


def make(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def by_hand(w, bits):
    """The paper's formula in float64, and how far each entry is from the nearest threshold, in levels."""
    w, n = w.detach().double(), 2 ** (bits - 1)
    s = 2 * w.abs().mean(-1, keepdim=True)
    k = (n * (w / s).clamp(-1, 1 - 1e-6) - 0.5).round().clamp(-n, n - 1)
    u = n * w / s
    return s * (k + 0.5) / n, (u - u.round()).abs()


def assert_near(y, w, bits):
    expected, distance = by_hand(w, bits)
    assert y.shape == w.shape and y.dtype == w.dtype
    # Nearer to a threshold, the rounding of the scale may decide; for one entry, always on a threshold, there is none.
    sure = (distance > 2**-18 * 2**bits) | (w.shape[-1] == 1)
    assert sure.float().mean() > 0.95
    assert ((y.double() - expected).abs() <= TOLERANCE[y.dtype] * expected.abs())[sure].all()


SHAPES = [(1,), (3, 1), (17, 33), (4, 512), (130, 20), (2, 3, 9, 7), (2, 5000), (2, 16384), (3, 16400), (1, 40000)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_formula(shape, bits, dtype, device):
    w = make(*shape, dtype=dtype, device=device)
    assert_near(triton_op(w, bits), w, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("function", [triton_op, stats_quantize], ids=["triton", "reference"])
def test_properties(bits, function, device):
    w = make(20, 64, device=device).detach()
    y, (codes, scale), n = function(w, bits), stats_codes(w, bits), 2 ** (bits - 1)
    assert codes.min() >= -n and codes.max() <= n - 1 and scale.shape == (20, 1)
    torch.testing.assert_close(y, scale * (codes + 0.5) / n, rtol=1e-6, atol=0)
    assert torch.equal(function(4 * w, bits), 4 * y)  # positively homogeneous; a power of two is exact
    assert torch.equal(function(-w, bits), -y)  # odd: no entry is on a threshold here
    within = w.abs() <= scale
    assert ((y - w).abs() <= scale / (2 * n) * (1 + 1e-5))[within].all()
    assert len(y[0].unique()) <= 2**bits


def test_two_bits_and_one_bit(device):
    w = make(6, 50, device=device).detach()
    scale = 2 * w.abs().mean(-1, keepdim=True)
    for function in (triton_op, stats_quantize):
        levels = (function(w, 2) / scale).abs()
        assert torch.isclose(levels, torch.tensor(0.25)).logical_or(torch.isclose(levels, torch.tensor(0.75))).all()
        torch.testing.assert_close(function(w, 1), w.sign() * scale / 2)


@pytest.mark.parametrize("bits", BITS)
def test_the_ends_of_the_range(bits, device):
    """One large entry is beyond the last level on its side; in half precision, too, it keeps the last code."""
    for dtype in TOLERANCE:
        w = torch.full((2, 8), 0.5, dtype=dtype, device=device)
        w[0, 0], w[1, 0] = 8.0, -8.0
        for function in (triton_op, stats_quantize):
            y, scale, n = function(w, bits).float(), 2 * w.float().abs().mean(-1), 2 ** (bits - 1)
            top = scale * (n - 0.5) / n
            torch.testing.assert_close(y[:, 0], torch.stack([top[0], -top[1]]), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [5, 20000])
def test_a_row_of_zeros_gives_zeros(bits, width, device):
    w = make(3, width, device=device).detach()
    w[1] = 0
    for function in (triton_op, stats_quantize):
        y = function(w, bits)
        assert not y[1].any() and y[0].all() and y.isfinite().all()


@pytest.mark.parametrize("function", [triton_op, stats_quantize], ids=["triton", "reference"])
def test_the_gradient_is_the_cotangent(function, device):
    w = make(7, 30, device=device)
    cotangent = torch.randn(7, 30, device=device)
    (gradient,) = torch.autograd.grad(function(100 * w - 99 * w.detach(), 2), w, cotangent)
    assert torch.equal(gradient, 100 * cotangent)  # no entry is clipped, nothing flows through the scale


@pytest.mark.parametrize(
    "view",
    [lambda w: w[::2, 3:8], lambda w: w[:, 2:14].t(), lambda w: w[:, :10].reshape(12, 2, 5).transpose(0, 1)],
    ids=["sliced", "transposed", "permuted"],
)
def test_strided(view, device):
    w = view(make(12, 16, device=device).detach())
    assert_near(triton_op(w, 3), w, 3)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_no_rows(backend, device):
    w = make(2, 0, 3, device=device)
    y = stats_quantize(w, 3, backend=backend)
    y.sum().backward()
    assert y.shape == w.grad.shape == (2, 0, 3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, 1e30, -0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("width", [6, 20000])
def test_extreme_values_propagate_as_in_the_reference(value, width, device):
    w = make(3, width, device=device).detach()
    w[1, 4] = value
    y, expected = triton_op(w, 3), stats_quantize_reference(w, 3)
    assert y[::2].isfinite().all()
    assert torch.equal(y[1].isnan(), expected[1].isnan()) or value == float("inf")
    torch.testing.assert_close(y[:, :4], expected[:, :4], rtol=1e-5, atol=0, equal_nan=True)


def test_opcheck(device):
    for width in (5, 20000):
        torch.library.opcheck(torch.ops.polylib.stats_quantize.default, (make(3, width, device=device), 2))


def test_torch_func(device):
    w = make(4, 3, 5, device=device).detach()

    def loss(f):
        return lambda w: f(w, 3).square().sum()

    for transform in (lambda f: torch.vmap(lambda w: f(w, 2)), lambda f: torch.vmap(torch.func.grad(loss(f)))):
        torch.testing.assert_close(transform(stats_quantize)(w), transform(stats_quantize_reference)(w))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(w)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(
        lambda w: stats_quantize(w, 3, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        w = make(rows, 7, device=device)
        torch.testing.assert_close(compiled(w), stats_quantize_reference(w, 3))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.stats_quantize").cost
    assert (cost(4, 25, torch.bfloat16).bytes, cost(4, 25, torch.bfloat16).flops) == (2 * 200, 1100)
    assert cost(4, 25, torch.float32, "backward").bytes == 0
    with pytest.raises(ValueError, match="direction"):
        cost(4, 25, torch.float32, "sideways")


@pytest.mark.parametrize(
    ("w", "bits", "error", "message"),
    [
        ([1.0], 2, TypeError, "w must be a torch.Tensor, got list"),
        (torch.zeros(2, dtype=torch.int64), 2, TypeError, "w must have a real floating-point dtype"),
        (torch.tensor(1.0), 2, ValueError, r"w must have shape \(..., I\) with I >= 1, got \(\)"),
        (torch.zeros(2, 0), 2, ValueError, r"w must have shape \(..., I\) with I >= 1, got \(2, 0\)"),
        (torch.zeros(2), 0, ValueError, "bits must be an integer from 1 to 16, got 0"),
        (torch.zeros(2), True, ValueError, "bits must be an integer from 1 to 16, got True"),
    ],
)
def test_bad_arguments(w, bits, error, message):
    with pytest.raises(error, match=message):
        stats_quantize(w, bits)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.stats_quantize")
    for _, dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        results = {name: function(*tensors) for name, (function, tensors) in contestants.items()}
        assert all(r.dtype == dtype for r in results.values())
        assert torch.equal(results["ours"], results["reference"])
        assert costs[0].bytes > 0
