"""sine_binarize: both paths against float64 and the angle in exact arithmetic, registration, checks, cost."""

from fractions import Fraction
from importlib import import_module
from math import pi

import pytest
import torch

from polylib.kernels import sine_binarize, sine_binarize_reference

# Of a sine of the rounded phase: three roundings of 2^-24, and those of the result, 2^-11 and 2^-8.
TOLERANCE = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SIDES = [True, False]


def triton_op(*args):
    return sine_binarize(*args, backend="triton")


BOTH = pytest.mark.parametrize("function", [triton_op, sine_binarize], ids=["triton", "reference"])


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def make(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Weights of a few turns."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def run(function, w, *rest):
    y = function(w, *rest)
    return [y.detach(), *torch.autograd.grad(y, w, random_gradient(y))]


def by_hand(w, freq):
    """The sine and freq times the cosine, in float64, of the phase rounded to float32."""
    phase = (torch.tensor(freq, device=w.device) * w.detach().float()).double()
    return phase.sin(), freq * phase.cos()


def assert_near(actual, w, freq, hard):
    sine, slope = by_hand(w, freq)
    y, grad_w = actual
    assert y.shape == grad_w.shape == w.shape and y.dtype == grad_w.dtype == w.dtype
    if hard:
        sure = sine.abs() > 2**-20
        assert torch.equal(y.double()[sure], sine.sign()[sure]) and torch.equal(y.abs(), torch.ones_like(y))
    else:
        assert ((y.double() - sine).abs() <= TOLERANCE[w.dtype]).all()
    grad = random_gradient(y)
    assert ((grad_w.double() - grad * slope).abs() <= 3 * freq * TOLERANCE[w.dtype]).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("hard", SIDES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 7, 5), (1024,), (2, 1500)], ids=str)
@BOTH
def test_equals_the_sine_in_float64(function, shape, hard, dtype, device):
    w = make(*shape, dtype=dtype, device=device)
    for freq in (20.0, 0.3):
        assert_near(run(function, w, freq, hard), w, freq, hard)


# 2 pi to 400 binary digits after the point, from Machin's formula.
def _turn(digits=400):
    one = 1 << digits

    def arctan_of_inverse(n):
        term, total, k = one // n, 0, 1
        while term:
            total += term // k if k % 4 == 1 else -(term // k)
            term, k = term // n**2, k + 2
        return total

    return Fraction(8 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239)), one)


TURN = _turn()


@BOTH
def test_phases_of_every_size(function, device):
    """Reduced by whole turns in exact arithmetic; the largest float32 is 2^125 turns and more."""
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(800, generator=gen) * 10.0 ** torch.linspace(-3, 37, 800)
    w = torch.cat([w, torch.tensor([8192.0, -8192.0, 8192.001, -8193.0, 3.4e38])]).to(device).requires_grad_()
    phase = torch.tensor([float(Fraction(v) % TURN) for v in w.tolist()], dtype=torch.float64)
    y, slope = function(w, 1.0, False), torch.autograd.grad(function(w, 1.0, True).sum(), w)[0]
    for actual, expected in ((y, phase.sin()), (slope, phase.cos())):
        assert ((actual.double().cpu() - expected).abs() <= TOLERANCE[torch.float32]).all()
    assert torch.equal(function(w, 1.0, True).double().cpu(), phase.sin().sign())


@BOTH
def test_the_phase_in_float32_nearest_to_a_multiple_of_a_right_angle(function, device):
    """Its sine is 1.6e-9, and its sign must be right: 16367173 * 2**72 is 2**-29 from a multiple of pi / 2."""
    w = torch.tensor([16367173.0 * 2.0**72, -16367173.0 * 2.0**72], device=device, requires_grad=True)
    angle = float((Fraction(16367173 * 2**72) + TURN / 8) % (TURN / 4) - TURN / 8)
    assert abs(angle) < 2e-9
    quarter = round((Fraction(16367173 * 2**72) - Fraction(angle)) / (TURN / 4)) % 4
    sine = {0: angle, 1: 1.0, 2: -angle, 3: -1.0}[quarter]
    cosine = {0: 1.0, 1: -angle, 2: -1.0, 3: angle}[quarter]
    y, slope = function(w, 1.0, False), torch.autograd.grad(function(w, 1.0, False).sum(), w)[0]
    assert y.tolist() == pytest.approx([sine, -sine], rel=1e-2)
    assert slope.tolist() == pytest.approx([cosine, cosine], rel=1e-2)
    assert function(w, 1.0, True).tolist() == [1.0 if s > 0 else -1.0 for s in (sine, -sine)]


@BOTH
def test_zero_is_positive_and_the_sine_is_small_where_its_phase_is(function, device):
    w = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30], device=device)
    assert function(w, 1.0, True).tolist() == [1.0, 1.0, 1.0, -1.0, 1.0]
    assert torch.equal(function(w, 1.0, False), w)
    small = make(300, device=device).detach()
    torch.testing.assert_close(function(small, 1e-5, False) / 1e-5, small, rtol=1e-6, atol=0)


@BOTH
def test_periods(function, device):
    """A turn changes nothing, half a turn the sign, away from where the sine is zero."""
    w, freq = make(500, device=device).detach(), 8.0
    w = w[(freq * w).sin().abs() > 1e-3]
    for hard in SIDES:
        y = function(w, freq, hard)
        torch.testing.assert_close(function(w + 2 * pi / freq, freq, hard), y, rtol=0, atol=1e-5)
        torch.testing.assert_close(function(w + pi / freq, freq, hard), -y, rtol=0, atol=1e-5)


@BOTH
def test_both_sides_have_the_gradient_of_the_sine(function, device):
    w = make(40, device=device)
    gradients = [torch.autograd.grad(function(w, 3.0, hard), w, random_gradient(w))[0] for hard in SIDES]
    assert torch.equal(*gradients)


def test_gradcheck():
    w = make(20, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: sine_binarize(w, 2.5, False), w)
    assert torch.autograd.gradgradcheck(lambda w: sine_binarize(w, 2.5, False), w)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[::2, 3:8],
        lambda w: w[:, 2:14].t(),
        lambda w: w[:1].expand(6, 16),
        lambda w: w[:, :10].reshape(12, 2, 5).transpose(0, 1),
    ],
    ids=["sliced", "transposed", "expanded", "permuted"],
)
def test_strided(view, device):
    w = view(make(12, 16, device=device).detach()).requires_grad_()
    assert_near(run(triton_op, w, 5.0, False), w, 5.0, False)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_empty(backend, device):
    w = make(3, 0, device=device)
    y = sine_binarize(w, 1.0, True, backend=backend)
    y.sum().backward()
    assert y.shape == w.grad.shape == (3, 0)


@pytest.mark.parametrize("value", [1e30, -0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("hard", SIDES)
def test_extreme_values_propagate_as_in_the_reference(hard, value, device):
    w = make(40, device=device)
    with torch.no_grad():
        w[4] = value
    actual, expected = (run(f, w, 5.0, hard) for f in (triton_op, sine_binarize_reference))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert actual[0].isfinite().sum() == 40 - (abs(value) == float("inf") or value != value)


def test_double_backward_through_triton_says_what_to_do(device):
    w = make(3, 4, device=device)
    (grad,) = torch.autograd.grad(triton_op(w, 2.0, False).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()


def test_opcheck(device):
    w = make(3, 5, device=device)
    torch.library.opcheck(torch.ops.polylib.sine_binarize.default, (w, 2.0, True))
    w = w.detach()
    torch.library.opcheck(torch.ops.polylib.sine_binarize_backward.default, (torch.randn_like(w), w, 2.0))


def test_torch_func(device):
    w = make(4, 5, device=device).detach()

    def loss(f):
        return lambda w: f(w, 2.0, True).mul(torch.arange(5.0, device=device)).square().sum()

    for transform in (lambda f: torch.func.grad(loss(f)), lambda f: torch.vmap(torch.func.grad(loss(f)))):
        torch.testing.assert_close(transform(sine_binarize)(w), transform(sine_binarize_reference)(w))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(w)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(
        lambda w: sine_binarize(w, 2.0, True, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        w = make(rows, 4, device=device)
        for a, e in zip(run(compiled, w), run(sine_binarize_reference, w, 2.0, True), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.sine_binarize").cost
    assert (cost(100, torch.bfloat16).bytes, cost(100, torch.bfloat16).flops) == (2 * 200, 3100)
    backward = cost(100, torch.float32, "backward")  # w, G, grad w
    assert (backward.bytes, backward.flops) == (4 * 300, 3300)
    with pytest.raises(ValueError, match="direction"):
        cost(100, torch.float32, "sideways")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"w": [1.0]}, TypeError, "w must be a torch.Tensor, got list"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, TypeError, "w must have a real floating-point dtype"),
        ({"freq": 0.0}, ValueError, "freq must be a finite number above 0, got 0.0"),
        ({"freq": float("inf")}, ValueError, "freq must be a finite number above 0, got inf"),
        ({"freq": "20"}, ValueError, "freq must be a finite number above 0, got '20'"),
        ({"hard": 1}, ValueError, "hard must be one of True, False, got 1"),
        ({"backend": "cuda"}, ValueError, '"auto", "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        sine_binarize(**{"w": torch.zeros(2, 5), "freq": 1.0, "hard": True} | changed)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.sine_binarize")
    for _, dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        results = {name: function(*tensors) for name, (function, tensors) in contestants.items()}
        assert all(r.dtype == dtype for r in results.values())
        torch.testing.assert_close(results["ours"], results["reference"])
        assert costs[1].bytes > costs[0].bytes > 0
