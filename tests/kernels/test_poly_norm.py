"""poly_norm: the Triton path against the definition in float64, its registration, its checks, its cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import poly_norm, poly_norm_reference

# Relative to the sum of the absolute values of all terms. float32: sixteen roundings of 2^-24. float16 and bfloat16:
# the result is rounded once, by 2^-11 and, as the interpreter truncates to bfloat16, 2^-7; half as much again is slack.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 1.5 * 2**-11, torch.bfloat16: 1.5 * 2**-7}
EPS = 1e-6


def make(*shape, dtype=torch.float32, coefficients=None, device="cpu", order=3, seed=0):
    """Inputs of the op: x of the given shape, weight (order,), bias (1,)."""
    gen = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=gen, dtype=torch.float64) for size in (shape, (order,), (1,)))
    kinds = (dtype, coefficients or dtype, coefficients or dtype)
    return [t.to(device, d).requires_grad_() for t, d in zip((x, weight, bias), kinds, strict=True)]


def triton_op(*args):
    return poly_norm(*args, backend="triton")


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(function, args, gradient=random_gradient):
    """The result and the gradient of every tensor."""
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y, args, gradient(y))]


def by_hand(x, weight, bias, g, absolute=False):
    """The result and every gradient from the paper's formula; `absolute` adds up the sizes of all terms instead."""
    rms = {p: ((x ** (2 * p)).mean(-1, keepdim=True) + EPS).sqrt() for p in (1, 2, 3)}
    sign = -1
    if absolute:
        x, weight, bias, g, sign = x.abs(), weight.abs(), bias.abs(), g.abs(), 1
    a = {3: weight[0], 2: weight[1], 1: weight[2]}
    dots = {p: (g * x**p).sum(-1, keepdim=True) for p in rms}
    y = bias + sum(a[p] * x**p / r for p, r in rms.items())
    grad_x = sum(
        p * a[p] * (x ** (p - 1) * g / r + sign * dots[p] * x ** (2 * p - 1) / (r**3 * x.shape[-1]))
        for p, r in rms.items()
    )
    return y, grad_x, torch.stack([(dots[p] / rms[p]).sum() for p in (3, 2, 1)]), g.sum().view(1)


def assert_near(actual, args):
    """Compare a result and its gradients with the formula in float64."""
    wide = [t.detach().double() for t in args]
    gradient = random_gradient(wide[0])
    for a, e, scale in zip(actual, by_hand(*wide, gradient), by_hand(*wide, gradient, absolute=True), strict=True):
        assert a.shape == e.shape
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * scale + 2**-24).all()


# The first tile of the kernels, the only one under the interpreter, is 4 rows by 512 columns.
SHAPES = [(1,), (1, 1), (3, 1), (5, 33), (4, 512), (2, 1, 9, 70), (9, 513), (3, 1500), (2, 5632)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_formula_in_float64(shape, dtype, device):
    args = make(*shape, dtype=dtype, device=device)
    actual = run(triton_op, args)
    assert all(t.dtype == dtype for t in actual)
    assert_near(actual, args)


def test_the_widest_row(device):
    args = make(1, 65536, device=device)
    assert_near(run(triton_op, args), args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_equals_the_formula(shape):
    args = make(*shape, dtype=torch.float64)
    expected = by_hand(*(t.detach() for t in args), random_gradient(args[0]))
    torch.testing.assert_close(run(poly_norm_reference, args), list(expected))


@pytest.mark.parametrize("width", [300, 1300])
def test_bfloat16_is_the_float32_result_rounded(width, device):
    x, weight, bias = (t.detach() for t in make(6, width, dtype=torch.bfloat16, device=device))
    exact = poly_norm_reference(x.float(), weight.float(), bias.float())
    actual = triton_op(x, weight, bias).float()
    assert ((actual - exact).abs() <= 2**-7 * exact.abs() + 2**-20).all()  # one unit in the last of its eight places


def test_coefficients_may_have_their_own_dtype(device):
    args = make(6, 50, dtype=torch.bfloat16, coefficients=torch.float32, device=device)
    y, grad_x, *grads = run(triton_op, args)
    assert y.dtype == grad_x.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    assert_near([y, grad_x, *grads], args)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, 3:8],
        lambda x: x[:, :12].t(),
        lambda x: x[:1].expand(6, 1400),
        lambda x: x[:, :10].reshape(12, 2, 5).transpose(0, 1),
        lambda x: x[:, 1::2],
    ],
    ids=["sliced", "transposed", "expanded", "permuted-batch", "every-other"],
)
def test_strided_x(view, device):
    x, *coefficients = make(12, 1400, device=device)
    strided = view(x.detach()).requires_grad_()
    args = [strided, *coefficients]
    assert_near(run(triton_op, args), args)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 3)])
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_no_rows(shape, backend, device):
    args = make(*shape, device=device)
    y, *grads = run(lambda *a: poly_norm(*a, backend=backend), args)
    assert y.shape == shape and [g.shape for g in grads] == [t.shape for t in args]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("value", [0.0, 1e-4, 1e4, 1e5])
@pytest.mark.parametrize("width", [40, 700])
def test_rows_of_extreme_size(value, width, device):
    x, *coefficients = make(3, width, device=device)
    args = [(value * x.detach()).requires_grad_(), *coefficients]
    assert_near(run(triton_op, args), args)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [-0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values_propagate_as_in_the_reference(value, dtype, device):
    args = make(9, 5, dtype=dtype, device=device)
    with torch.no_grad():
        args[0][4, 2] = value
    for a, e in zip(run(triton_op, args), run(poly_norm_reference, args), strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        torch.testing.assert_close(a, e, rtol=0, atol=40 * TOLERANCE[dtype], equal_nan=True)


def test_gradients_are_the_same_bits_every_time(device):
    args = make(7, 600, device=device)
    assert all(torch.equal(a, b) for a, b in zip(run(triton_op, args), run(triton_op, args), strict=True))


def test_only_the_gradients_asked_for(device):
    args = make(6, 5, device=device)
    expected = run(poly_norm_reference, args)[1:]
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(args)]
        y = triton_op(*inputs)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_reference_derivatives(order):
    args = make(2, 3, dtype=torch.float64, order=order)
    assert torch.autograd.gradcheck(poly_norm_reference, args)
    assert torch.autograd.gradgradcheck(poly_norm_reference, args)


def test_double_backward_through_triton_says_what_to_do(device):
    args = make(3, 4, device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*args).square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


def test_opcheck(device):
    args = make(3, 5, device=device)
    torch.library.opcheck(torch.ops.polylib.poly_norm.default, (*args, EPS))
    x, weight, _ = (t.detach() for t in args)
    torch.library.opcheck(torch.ops.polylib.poly_norm_backward.default, (torch.randn_like(x), x, weight, EPS))


def test_torch_func(device):
    args = [t.detach() for t in make(4, 5, device=device)]

    def loss(f):
        return lambda *a: f(*a).square().sum()

    for transform in (lambda f: torch.func.grad(loss(f), (0, 1, 2)), lambda f: torch.vmap(f, (0, None, None))):
        torch.testing.assert_close(transform(poly_norm)(*args), transform(poly_norm_reference)(*args))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(*args)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(
        lambda *a: poly_norm(*a, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        args = make(2, rows, 4, device=device)
        for a, e in zip(run(compiled, args), run(poly_norm_reference, args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_leaves_the_coefficients_alone(backend, device):
    x, *coefficients = make(6, 5, device=device)
    x = x.detach().bfloat16()  # what a linear layer hands on under autocast
    with torch.autocast(device.type, torch.bfloat16):
        y = poly_norm(x, *coefficients, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, poly_norm_reference(x, *coefficients), rtol=2**-7, atol=0)


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.poly_norm").cost
    # 4 rows of 25: x and y. Three even powers, three sums; a cubic by Horner's rule.
    assert (cost(4, 25, torch.bfloat16).bytes, cost(4, 25, torch.bfloat16).flops) == (2 * 200, 100 * (6 + 6))
    # x, g, grad x. The same powers and sums; three products with g, four sums; two Horner chains of 5 and a difference.
    backward = cost(4, 25, torch.float32, "backward")
    assert (backward.bytes, backward.flops) == (4 * 300, 100 * (6 + 7 + 11))
    with pytest.raises(ValueError, match="direction"):
        cost(4, 25, torch.float32, "sideways")


GOOD = {"x": torch.zeros(2, 5), "weight": torch.zeros(3), "bias": torch.zeros(1)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(..., H\) with H >= 1, got \(\)"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x must have shape \(..., H\) with H >= 1, got \(2, 0\)"),
        ({"weight": torch.zeros(3).double()}, TypeError, "bias must have the dtype of weight, torch.float64"),
        ({"weight": torch.zeros(0)}, ValueError, r"weight must have shape \(order,\) with order >= 1, got \(0,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \(1,\) = \(1,\), got \(2,\)"),
        ({"x": torch.zeros(2, device="meta")}, ValueError, "weight must be on the device of x, meta, got cpu"),
        ({"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be above 0, got nan"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(changed, error, message, backend):
    with pytest.raises(error, match=message):
        poly_norm(**GOOD | changed, backend=backend)


def test_other_orders_have_the_reference_only(device):
    args = make(3, 5, device=device, order=2)
    torch.testing.assert_close(poly_norm(*args), poly_norm_reference(*args))
    with pytest.raises(ValueError, match=r'backend="triton" needs weight of shape \(3,\), got \(2,\)'):
        triton_op(*args)
