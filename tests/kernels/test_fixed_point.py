"""fixed_point: both paths against exact arithmetic, the gradients, registration, checks, cost."""

from fractions import Fraction
from importlib import import_module
from itertools import product
from math import floor, log, trunc

import pytest
import torch

from polylib.kernels import fixed_point, fixed_point_codes, fixed_point_reference, raw_range

# The values are exact. Of the gradient of int_bits, relative to the sum of the magnitudes of its terms: sixteen
# roundings of 2^-24.
SUM = 2**-20
ROUNDINGS = {"trn": floor, "trn_zero": trunc, "rnd": lambda v: floor(v + Fraction(1, 2)), "rnd_conv": round}
OVERFLOWS = ("sat", "wrap")
FORMATS = list(product((True, False), ROUNDINGS, OVERFLOWS))


def triton_op(*args, **settings):
    return fixed_point(*args, **settings, backend="triton")


BOTH = pytest.mark.parametrize("function", [triton_op, fixed_point], ids=["triton", "reference"])


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def make(*shape, int_bits=2.2, dtype=torch.float32, device="cpu", spread=1.5, seed=0):
    """x, some of it beyond the range, some of it halfway between two words of up to six bits; and the binary point."""
    x = spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    flat = x.view(-1)
    flat[::3] = (flat[::3] * 32).round() / 32
    return [x.to(device, dtype).requires_grad_(), torch.tensor(int_bits, device=device, requires_grad=True)]


def run(function, args, *rest, **settings):
    y = function(*args, *rest, **settings)
    return [y.detach(), *torch.autograd.grad(y, args, random_gradient(y))]


def word(value, exponent, width, signed, rounding, overflow):
    """The raw integer of a float, in exact arithmetic, and v."""
    v, (low, high) = Fraction(value) / Fraction(2) ** exponent, raw_range(width, signed)
    raw = ROUNDINGS[rounding](v)
    return (min(max(raw, low), high) if overflow == "sat" else (raw - low) % 2**width + low), v


def by_hand(args, width, signed=True, rounding="rnd", overflow="sat"):
    """The result and both gradients from exact arithmetic, and the sum of the magnitudes of the terms of the second."""
    x, int_bits = (t.detach().double().cpu() for t in args)
    exponent = round(int_bits.item()) - width
    words = [word(value, exponent, width, signed, rounding, overflow) for value in x.flatten().tolist()]
    low, high = raw_range(width, signed)
    slopes = [float(q if overflow == "sat" and not low <= v <= high else q - v) for q, v in words]
    inside = [float(overflow == "wrap" or low <= v <= high) for _, v in words]
    code, slope, inside = (
        torch.tensor(t, dtype=torch.float64).view(x.shape) for t in ([float(q) for q, _ in words], slopes, inside)
    )
    grad = random_gradient(x)
    terms = grad * slope * 2.0**exponent * log(2)
    return code * 2.0**exponent, inside * grad, terms.sum(), terms.abs().sum()


def assert_right(actual, args, *format, **named):
    y, grad_x, grad_point, size = by_hand(args, *format, **named)
    assert actual[0].shape == args[0].shape and [t.dtype for t in actual] == [args[0].dtype] * 2 + [args[1].dtype]
    assert torch.equal(actual[0].double().cpu(), y)
    assert torch.equal(actual[1].double().cpu(), grad_x)
    assert abs(actual[2].item() - grad_point) <= SUM * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 7, 5), (1024,), (2, 1500)], ids=str)
@BOTH
def test_equals_exact_arithmetic(function, shape, dtype, device):
    args = make(*shape, dtype=dtype, device=device)
    assert_right(run(function, args, 6), args, 6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@BOTH
def test_every_format(function, format, device):
    args = make(11, 30, device=device)
    signed, rounding, overflow = format
    for width in (2, 5):
        actual = run(function, args, width, signed=signed, rounding=rounding, overflow=overflow)
        assert_right(actual, args, width, *format)


NEAR_A_HALF = [0.5, 0.5 - 2**-25, 0.5 + 2**-24, 1.5, 2.5, 1.5 - 2**-23, 2.0**-30, 8388607.5, 8388609.0, 16777213.0]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@BOTH
def test_what_is_next_to_a_border(function, format, device):
    """With x + 1/2 in float32, the largest number below a half would become 1, and 8388609 another whole number."""
    signed, rounding, overflow = format
    x = torch.tensor([sign * value for value in NEAR_A_HALF for sign in (1, -1)], device=device, requires_grad=True)
    args = [x, torch.tensor(24.0, device=device, requires_grad=True)]
    actual = run(function, args, 24, signed=signed, rounding=rounding, overflow=overflow)
    assert_right(actual, args, 24, *format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@BOTH
def test_the_widest_words_are_exact(function, overflow, signed, dtype, device):
    digits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    if function is triton_op and dtype == torch.float64:
        function = fixed_point  # the kernels have no float64
    low, high = raw_range(digits + signed, signed)
    ends = [low, low + 1, low + 2, -1, 0, 1, high // 2 + 1, high - 1, high, high + 1, 2 * low - 2, 3 * high + 3]
    x = torch.tensor(ends, dtype=torch.float64, device=device).to(dtype)
    point = torch.tensor(float(digits + signed), device=device)
    y = function(x, point, digits + signed, signed=signed, overflow=overflow)
    expected = [word(v, 0, digits + signed, signed, "rnd", overflow)[0] for v in x.tolist()]
    assert y.double().tolist() == expected
    message = f"width must be an integer from {1 + signed} to {digits + signed}, got {digits + signed + 1}"
    with pytest.raises(ValueError, match=message):
        fixed_point(x, point, digits + signed + 1, signed=signed)


@BOTH
def test_words_of_all_sizes(function, device):
    """A binary point far to the left or right; and halves to the even I."""
    x = make(200, device=device)[0].detach()
    for int_bits, width in ((-100, 8), (100, 8), (-117, 9), (127, 25), (2, 25)):
        args = [(x * 2.0 ** (int_bits - 2)).requires_grad_(), torch.tensor(float(int_bits), device=device)]
        args[1].requires_grad_()
        assert_right(run(function, args, width), args, width)
    for real, whole in ((2.5, 2.0), (3.5, 4.0), (-1.5, -2.0), (1.4, 1.0)):
        both = [function(x, torch.tensor(i, device=device), 6) for i in (real, whole)]
        assert torch.equal(*both)


@pytest.mark.parametrize("int_bits", [128.0, -119.0, 1e20, float("inf"), float("nan")])
@BOTH
def test_a_format_that_float32_lacks_gives_no_number(function, int_bits, device):
    args = make(50, int_bits=int_bits, device=device)
    y, grad_x, grad_point = run(function, args, 8)
    assert y.isnan().all() and not grad_x.any() and grad_point.isnan()


@BOTH
def test_properties(function, device):
    x = make(500, device=device)[0].detach().sort().values
    point = torch.tensor(2.0, device=device)
    for rounding, overflow in product(ROUNDINGS, OVERFLOWS):
        settings = {"rounding": rounding, "overflow": overflow}
        y = function(x, point, 5, **settings)
        assert torch.equal(function(y, point, 5, **settings), y)
        assert torch.equal(function(2 * x, point + 1, 5, **settings), 2 * y)
        if overflow == "sat":
            assert (y.diff() >= 0).all()
        codes, lsb = fixed_point_codes(x, point, 5, **settings)
        assert torch.equal(codes * lsb, y) and lsb == 2**-3 and codes.unique().numel() == 32
    wide = function(x, torch.tensor(4.0, device=device), 25)
    assert (wide - x).abs().max() <= 2**-22


@BOTH
def test_the_binary_point_moves_where_the_error_falls(function, device):
    """To the left of where it is when the words are too coarse, to the right when their range is too small."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).to(device)
    for start, sign in ((-1.0, -1), (6.0, 1)):
        point = torch.tensor(start, device=device, requires_grad=True)
        (function(x, point, 5) - x).square().mean().backward()
        assert point.grad.sign() == sign


def test_the_gradient_is_that_of_a_line_within_one_word():
    """Without the jumps, y is l (x / l + constant), or l times the end of the range: its numerical derivative."""
    x, point, width = make(300, dtype=torch.float64)[0].detach(), 2.0, 5
    for overflow in OVERFLOWS:
        args = [x.requires_grad_(), torch.tensor(point, dtype=torch.float64, requires_grad=True)]
        _, _, grad = run(fixed_point, args, width, overflow=overflow)
        v = x.detach() * 2.0 ** (width - point)
        code, _ = fixed_point_codes(x, args[1], width, overflow=overflow)
        inside = (v >= -16) & (v <= 15) | (overflow == "wrap")

        def line(i, code=code, v=v, inside=inside):
            lsb = 2.0 ** (i - width)
            return (random_gradient(x) * torch.where(inside, x.detach() + lsb * (code - v), lsb * code)).sum()

        numerical = (line(point + 1e-5) - line(point - 1e-5)) / 2e-5
        torch.testing.assert_close(grad, numerical, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, 3:8],
        lambda x: x[:, 2:14].t(),
        lambda x: x[:1].expand(6, 16),
        lambda x: x[:, :10].reshape(12, 2, 5).transpose(0, 1),
    ],
    ids=["sliced", "transposed", "expanded", "permuted"],
)
def test_strided_x(view, device):
    x, point = make(12, 16, device=device)
    args = [view(x.detach()).requires_grad_(), point]
    assert_right(run(triton_op, args, 4), args, 4)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_empty(backend, device):
    y, grad_x, grad_point = run(fixed_point, make(3, 0, device=device), 4, backend=backend)
    assert y.shape == grad_x.shape == (3, 0) and grad_point == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e30, -1e30, -0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_extreme_values_propagate_as_in_the_reference(overflow, value, device):
    args = make(40, device=device)
    with torch.no_grad():
        args[0][4] = value
    actual, expected = (run(f, args, 6, overflow=overflow) for f in (triton_op, fixed_point_reference))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5, equal_nan=True)
    bad = value != value or (overflow == "wrap" and abs(value) == float("inf"))
    assert actual[0].isfinite().sum() == 40 - bad and actual[2].isnan() == bad


def test_gradients_are_the_same_bits_every_time(device):
    args = make(4100, device=device)
    first, second = (run(triton_op, args, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("overflow", OVERFLOWS)
@BOTH
def test_only_the_gradients_asked_for(function, overflow, device):
    expected = run(fixed_point_reference, make(6, 5, device=device), 3, overflow=overflow)[1:]
    for wanted in range(2):
        args = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(make(6, 5, device=device))]
        y = function(*args, 3, overflow=overflow)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in args] == [i == wanted for i in range(2)]
        torch.testing.assert_close(args[wanted].grad, expected[wanted], rtol=1e-5, atol=1e-5)


def test_a_binary_point_in_the_dtype_of_x(device):
    x, point = make(6, 50, dtype=torch.bfloat16, int_bits=2.25, device=device)
    for function in (triton_op, fixed_point):
        args = [x, point.detach().bfloat16().requires_grad_()]
        y, _, grad = run(function, args, 6)
        assert grad.dtype == torch.bfloat16 and torch.equal(y, run(function, [x, point], 6)[0])


def test_double_backward_through_triton_says_what_to_do(device):
    args = make(3, 4, device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*args, 3).square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_opcheck(overflow, device):
    x, point = make(3, 5, device=device)
    settings = (4, True, "rnd", overflow)
    torch.library.opcheck(torch.ops.polylib.fixed_point.default, (x, point, *settings))
    x, point = x.detach(), point.detach()
    for needed in ((True, True), (True, False), (False, True)):
        args = (torch.randn_like(x), x, point, *settings, *needed)
        torch.library.opcheck(torch.ops.polylib.fixed_point_backward.default, args)


def test_torch_func(device):
    x, point = (t.detach() for t in make(4, 5, device=device))

    def loss(f):
        return lambda x, p: f(x, p, 3).square().sum()

    for transform in (
        lambda f: lambda x, p: torch.func.grad(loss(f), (0, 1))(x, p[0]),
        lambda f: torch.vmap(lambda x, p: f(x, p, 3)),
        lambda f: torch.vmap(torch.func.grad(loss(f), (0, 1))),
    ):
        points = point + torch.arange(4.0, device=device) / 3
        torch.testing.assert_close(transform(fixed_point)(x, points), transform(fixed_point_reference)(x, points))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(x, point)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(
        lambda *a: fixed_point(*a, 3, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        args = make(rows, 4, device=device)
        for a, e in zip(run(compiled, args), run(fixed_point_reference, args, 3), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_changes_nothing(backend, device):
    x, point = (t.detach() for t in make(6, 5, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        y = fixed_point(x, point, 12, backend=backend)
    assert torch.equal(y, fixed_point(x, point, 12, backend=backend))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.fixed_point").cost
    assert (cost(100, torch.bfloat16).bytes, cost(100, torch.bfloat16).flops) == (2 * 200, 800)
    backward = cost(100, torch.float32, "backward")  # x, G, grad x
    assert (backward.bytes, backward.flops) == (4 * 300, 1200)
    with pytest.raises(ValueError, match="direction"):
        cost(100, torch.float32, "sideways")


GOOD = {"x": torch.zeros(2, 5), "int_bits": torch.ones(()), "width": 4}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"int_bits": 1.0}, TypeError, "int_bits must be a torch.Tensor, got float"),
        ({"int_bits": torch.ones(()).double()}, TypeError, "int_bits must have the dtype of x, torch.float32, or"),
        ({"int_bits": torch.ones((), device="meta")}, ValueError, "int_bits must be on the device of x, cpu"),
        ({"int_bits": torch.ones(1)}, ValueError, r"int_bits must have shape \(\), got \(1,\)"),
        ({"width": 1}, ValueError, "width must be an integer from 2 to 25, got 1; x is signed and in torch.float32"),
        ({"width": 2.5}, ValueError, "width must be an integer from 2 to 25, got 2.5"),
        ({"signed": None}, ValueError, "signed must be one of True, False, got None"),
        ({"rounding": "up"}, ValueError, "rounding must be one of 'trn', 'trn_zero', 'rnd', 'rnd_conv', got 'up'"),
        ({"overflow": "clip"}, ValueError, "overflow must be one of 'sat', 'wrap', got 'clip'"),
        ({"backend": "cuda"}, ValueError, '"auto", "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        fixed_point(**GOOD | changed)


def test_raw_range():
    assert [raw_range(4), raw_range(4, signed=False)] == [(-8, 7), (0, 15)]
    for width, signed in ((1, True), (0, False)):
        with pytest.raises(ValueError, match="width must be an integer of at least"):
            raw_range(width, signed)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.fixed_point")
    for _, dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        results = [function(*tensors) for function, tensors in contestants.values()]
        assert all(r.dtype == dtype and torch.equal(r, results[0]) for r in results)  # no half is drawn
        assert costs[1].bytes > costs[0].bytes > 0
