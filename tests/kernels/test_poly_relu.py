"""poly_relu: the Triton path against the definition in float64, its registration, its checks, its cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import poly_relu, poly_relu_reference

# Relative to the sum of the absolute values of all terms. float32: sixteen roundings of 2^-24. float16 and bfloat16:
# the result is rounded once, by 2^-11 and, as the interpreter truncates to bfloat16, 2^-7; half as much again is slack.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 1.5 * 2**-11, torch.bfloat16: 1.5 * 2**-7}


def make(*shape, dtype=torch.float32, coefficients=None, device="cpu", order=3, seed=0):
    """Inputs of the op: x of the given shape, weight (order,), bias (1,)."""
    gen = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=gen, dtype=torch.float64) for size in (shape, (order,), (1,)))
    kinds = (dtype, coefficients or dtype, coefficients or dtype)
    return [t.to(device, d).requires_grad_() for t, d in zip((x, weight, bias), kinds, strict=True)]


def triton_op(*args):
    return poly_relu(*args, backend="triton")


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(function, args, gradient=random_gradient):
    """The result and the gradient of every tensor."""
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y, args, gradient(y))]


def assert_near(actual, args, view=lambda x: x):
    """Compare a result and its gradients with the reference in float64."""
    wide = [t.detach().double().requires_grad_() for t in args]
    expected = run(lambda x, *rest: poly_relu_reference(view(x), *rest), wide)
    x, weight, bias = wide
    # With absolute coefficients and gradients all terms add up to their magnitude; relu keeps the sign of x.
    magnitudes = [x.detach().requires_grad_(), *(t.detach().abs().requires_grad_() for t in (weight, bias))]
    scales = run(lambda x, *rest: poly_relu_reference(view(x), *rest), magnitudes, lambda y: random_gradient(y).abs())
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert a.shape == e.shape
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * scale + 2**-24).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 1), (3, 5, 9), (4096,), (3, 4099)], ids=str)
def test_triton_equals_float64_reference(shape, dtype, device):
    args = make(*shape, dtype=dtype, device=device)
    actual = run(triton_op, args)
    assert all(t.dtype == dtype for t in actual)
    assert_near(actual, args)


def test_coefficients_may_have_their_own_dtype(device):
    args = make(6, 50, dtype=torch.bfloat16, coefficients=torch.float32, device=device)
    y, grad_x, *grads = run(triton_op, args)
    assert y.dtype == grad_x.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    assert_near([y, grad_x, *grads], args)


@pytest.mark.parametrize("view", [lambda x: x[::2, 3:8], lambda x: x.t(), lambda x: x[:1].expand(6, 16)])
def test_strided_x(view, device):
    args = make(12, 16, device=device)
    assert_near(run(lambda x, *rest: triton_op(view(x), *rest), args), args, view)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_no_entries(backend, device):
    args = make(0, 7, device=device)
    y, *grads = run(lambda *a: poly_relu(*a, backend=backend), args)
    assert y.shape == (0, 7) and [g.shape for g in grads] == [t.shape for t in args]
    assert not any(g.any() for g in grads)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -1e4, -0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values_propagate_as_in_the_reference(value, dtype, device):
    args = make(9, 5, dtype=dtype, device=device)
    with torch.no_grad():
        args[0][4, 2] = value
        for coefficient in args[1:]:
            coefficient.abs_()  # or inf - inf would depend on the order of the sum
    gradient = torch.ones_like
    for a, e in zip(run(triton_op, args, gradient), run(poly_relu_reference, args, gradient), strict=True):
        torch.testing.assert_close(a, e, rtol=2 * TOLERANCE[dtype], atol=0, equal_nan=True)


def test_gradients_are_the_same_bits_every_time(device):
    args = make(5, 4000, device=device)
    assert all(torch.equal(a, b) for a, b in zip(run(triton_op, args), run(triton_op, args), strict=True))


def test_only_the_gradients_asked_for(device):
    args = make(6, 5, device=device)
    expected = run(poly_relu_reference, args)[1:]
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(args)]
        y = triton_op(*inputs)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_reference_derivatives(order):
    args = make(3, 2, dtype=torch.float64, order=order)
    assert torch.autograd.gradcheck(poly_relu_reference, args)
    assert torch.autograd.gradgradcheck(poly_relu_reference, args)


def test_double_backward_through_triton_says_what_to_do(device):
    args = make(3, device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*args).square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


def test_opcheck(device):
    args = make(3, 5, device=device)
    torch.library.opcheck(torch.ops.polylib.poly_relu.default, args)
    x, weight, _ = (t.detach() for t in args)
    torch.library.opcheck(torch.ops.polylib.poly_relu_backward.default, (torch.randn_like(x), x, weight))


def test_torch_func(device):
    args = [t.detach() for t in make(4, 5, device=device)]

    def loss(f):
        return lambda *a: f(*a).square().sum()

    for transform in (lambda f: torch.func.grad(loss(f), (0, 1, 2)), lambda f: torch.vmap(f, (0, None, None))):
        torch.testing.assert_close(transform(poly_relu)(*args), transform(poly_relu_reference)(*args))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(*args)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_size(backend, device):
    compiled = torch.compile(
        lambda *a: poly_relu(*a, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        args = make(rows, 4, device=device)
        for a, e in zip(run(compiled, args), run(poly_relu_reference, args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.poly_relu").cost
    # 100 entries: x and y; three multiplications, three additions, one maximum each.
    assert (cost(100, torch.bfloat16).bytes, cost(100, torch.bfloat16).flops) == (2 * 200, 700)
    assert cost(100, torch.float32, "backward").bytes == 4 * 300  # x, g, grad x
    with pytest.raises(ValueError, match="direction"):
        cost(100, torch.float32, "sideways")


GOOD = {"x": torch.zeros(2, 5), "weight": torch.zeros(3), "bias": torch.zeros(1)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"weight": torch.zeros(3).double()}, TypeError, "bias must have the dtype of weight, torch.float64"),
        ({"weight": torch.zeros(3, 1)}, ValueError, r"weight must have shape \(order,\) with order >= 1, got \(3, 1\)"),
        ({"weight": torch.zeros(0)}, ValueError, r"weight must have shape \(order,\) with order >= 1, got \(0,\)"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \(1,\) = \(1,\), got \(2,\)"),
        ({"x": torch.zeros(2, device="meta")}, ValueError, "weight must be on the device of x, meta, got cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(changed, error, message, backend):
    with pytest.raises(error, match=message):
        poly_relu(**GOOD | changed, backend=backend)


def test_other_orders_have_the_reference_only(device):
    args = make(3, 5, device=device, order=2)
    torch.testing.assert_close(poly_relu(*args), poly_relu_reference(*args))
    with pytest.raises(ValueError, match=r'backend="triton" needs weight of shape \(3,\), got \(2,\)'):
        triton_op(*args)


@pytest.mark.parametrize("op", ["poly_relu", "poly_norm"])
def test_bench_cases_run(op):
    op_file = import_module(f"benchmarks.ops.{op}")
    for _, dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        results = [function(*tensors) for function, tensors in contestants.values()]
        assert all(r.dtype == dtype and torch.equal(r, results[0]) for r in results)
        assert costs[1].bytes > costs[0].bytes > 0
