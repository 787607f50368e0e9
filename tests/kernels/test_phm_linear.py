"""phm_linear: the Triton path against the definition in float64, its registration, its checks, its cost."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from polylib.kernels import kronecker_weight, phm_linear, phm_linear_reference
from polylib.kernels.phm_linear import phm_linear_factored

# Relative to the sum of the absolute values of all terms, entry by entry. float32: sixteen roundings of 2^-24. float16
# and bfloat16: the mixed inputs, or the built weight and its gradient, are rounded, then the result: three roundings of
# 2^-11 and, as the interpreter truncates to bfloat16, 2^-7.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-7}


def make(*lead, n=2, o=6, i=10, dtype=torch.float32, device="cpu", seed=0):
    """Inputs of the op: x (*lead, i), A (n, n, n), S (n, o / n, i / n), bias (o,)."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (*lead, i), (n, n, n), (n, o // n, i // n), (o,)
    tensors = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes)
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def triton_op(*args):
    return phm_linear(*args, backend="triton")


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(function, args, gradient=random_gradient):
    """The result and the gradient of every tensor."""
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y, [t for t in args if t is not None], gradient(y))]


def assert_near(actual, args):
    """Compare a result and its gradients with the reference in float64."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in args]
    expected = run(phm_linear_reference, wide)
    # All terms are products: with absolute values they add up to their magnitude.
    magnitudes = [None if t is None else t.detach().abs().requires_grad_() for t in wide]
    scales = run(phm_linear_reference, magnitudes, lambda y: random_gradient(y).abs())
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert a.shape == e.shape
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * scale + 2**-24).all()


def test_kronecker_weight_is_the_sum_of_kronecker_products():
    _, A, S, _ = (t.detach() for t in make(1, n=3, o=6, i=9, dtype=torch.float64))
    torch.testing.assert_close(kronecker_weight(A, S), sum(torch.kron(a, s) for a, s in zip(A, S, strict=True)))
    kernel = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    weight = kronecker_weight(A, kernel)
    assert weight.shape == (6, 9, 5, 4)
    torch.testing.assert_close(weight[..., 2, 1], kronecker_weight(A, kernel[..., 2, 1]))


SHAPES = [
    pytest.param((1,), 1, 5, 7, id="n=1"),
    pytest.param((1,), 4, 4, 4, id="one-entry-blocks"),
    pytest.param((3,), 2, 6, 10, id="small"),
    pytest.param((), 2, 6, 10, id="no-batch"),
    pytest.param((2, 1, 5), 3, 9, 6, id="leading-dims"),
    pytest.param((32,), 4, 136, 4 * 70, id="most-rows-several-tiles"),
    pytest.param((7,), 8, 8 * 33, 8 * 65, id="n=8"),
    pytest.param((5,), 5, 10, 15, id="n=5"),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("lead", "n", "o", "i"), SHAPES)
def test_triton_equals_float64_reference(lead, n, o, i, dtype, device):
    args = make(*lead, n=n, o=o, i=i, dtype=dtype, device=device)
    actual = run(triton_op, args)
    assert all(t.dtype == dtype for t in actual)
    assert_near(actual, args)


@pytest.mark.parametrize(("lead", "n", "o", "i"), SHAPES)
def test_factored_equals_float64_reference(lead, n, o, i):
    args = make(*lead, n=n, o=o, i=i)
    assert_near(run(phm_linear_factored, args), args)


@pytest.mark.parametrize("function", [triton_op, phm_linear])
def test_no_bias(function, device):
    args = [*make(4, device=device)[:3], None]
    assert_near(run(function, args), args)


@pytest.mark.parametrize("view", [lambda x: x[::2, 3:13], lambda x: x.t()[:, :10], lambda x: x[:1, :10].expand(6, 10)])
def test_strided_x(view, device):
    x = view(make(20, i=20, device=device)[0].detach()).requires_grad_()
    args = [x, *make(1, device=device)[1:]]
    assert_near(run(triton_op, args), args)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_no_rows(backend, device):
    args = make(0, device=device)
    y, *grads = run(lambda *a: phm_linear(*a, backend=backend), args)
    assert y.shape == (0, 6) and [g.shape for g in grads] == [t.shape for t in args]
    assert not any(g.any() for g in grads)


def test_the_weight_is_built_beyond_32_rows_only(monkeypatch, device):
    op_file, built = import_module("polylib.kernels.phm_linear"), []

    def record(*args):
        built.append(args)
        return kronecker_weight(*args)

    monkeypatch.setattr(op_file, "kronecker_weight", record)
    with torch.no_grad():
        for rows, expected in ((1, 0), (32, 0), (33, 1)):
            built.clear()
            phm_linear(*make(rows, device=device))
            assert len(built) == expected
            torch.testing.assert_close(phm_linear(*make(rows)), phm_linear_reference(*make(rows)), rtol=1e-5, atol=1e-5)
        triton_op(*make(32, device=device))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -0.0, float("nan")])
def test_extreme_values_propagate_as_in_the_reference(value, device):
    args = make(9, device=device)
    with torch.no_grad():
        args[0][4, 2] = value
    y, expected = triton_op(*args), phm_linear_reference(*args)
    scale = expected[expected.isfinite()].abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * scale, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_infinite_input_is_not_hidden(device):
    """Which of its outputs are infinite and which not a number depends on where the sum over k is taken."""
    args = make(3, device=device)
    with torch.no_grad():
        args[0][1, 2] = float("inf")
    y = triton_op(*args)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_results_are_the_same_bits_every_time(device):
    args = make(9, n=4, o=8, i=400, device=device)
    assert torch.equal(triton_op(*args), triton_op(*args))


def test_only_the_gradients_asked_for(device):
    args = make(6, device=device)
    expected = run(phm_linear_reference, args)[1:]
    for wanted in range(4):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(args)]
        y = triton_op(*inputs)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(4)]
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [phm_linear_reference, phm_linear_factored])
def test_reference_derivatives(function):
    args = make(2, n=2, o=4, i=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_opcheck(device):
    for args in (make(3, device=device), [*make(3, device=device)[:3], None]):
        torch.library.opcheck(torch.ops.polylib.phm_linear.default, args)


def test_torch_func(device):
    args = [t.detach() for t in make(4, device=device)]

    def loss(f):
        return lambda *a: f(*a).square().sum()

    for transform in (
        lambda f: torch.func.grad(loss(f), (0, 1, 2, 3)),
        lambda f: torch.vmap(f, (0, None, None, None)),
    ):
        expected = transform(phm_linear_reference)(*args)
        torch.testing.assert_close(transform(phm_linear)(*args), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(*args)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(
        lambda *a: phm_linear(*a, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        args = make(rows, device=device)
        for a, e in zip(run(compiled, args), run(phm_linear_reference, args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
def test_autocast(backend, device):
    args = make(6, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = phm_linear(*args, backend=backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert [t.grad.dtype for t in args] == [t.dtype for t in args]
    torch.testing.assert_close(y.float(), phm_linear_reference(*args), rtol=0, atol=0.5)


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.phm_linear").cost
    # M=3, I=8, O=12, n=4: x 24, A 64, S 4 * 3 * 2 = 24, bias 12, y 36. Products 3 * 96, mixing 16 * 24.
    least = cost(3, 8, 12, 4, torch.bfloat16)
    assert (least.bytes, least.flops) == (2 * (24 + 64 + 24 + 12 + 36), 2 * (288 + 384))
    built = cost(3, 8, 12, 4, torch.bfloat16, built=True)  # the weight, 96, written and read; 4 * 96 to build it
    assert (built.bytes - least.bytes, built.flops) == (2 * 192, 2 * (288 + 384))
    with pytest.raises(ValueError, match="n must divide"):
        cost(3, 8, 12, 3, torch.bfloat16)


GOOD = dict(zip(("x", "A", "S", "bias"), (t.detach() for t in make(4)), strict=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(4, 10, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"x": torch.zeros(4, 9)}, ValueError, r"x must have shape \(..., I\) with I = 10 as in S, got \(4, 9\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape"),
        ({"A": torch.zeros(2, 2)}, ValueError, r"A must have shape \(n, n, n\) = \(2, 2, 2\), got \(2, 2\)"),
        ({"S": torch.zeros(2, 3)}, ValueError, r"S must have shape \(n, O/n, I/n\)"),
        ({"S": torch.zeros(2, 0, 5)}, ValueError, r"S must have shape \(n, O/n, I/n\) with sizes of at least 1"),
        ({"S": torch.zeros(2, 3, 5).double()}, TypeError, "S must have the dtype of x, torch.float32"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(O,\) = \(6,\), got \(3,\)"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must be on the device of x, cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(changed, error, message, backend):
    with pytest.raises(error, match=message):
        phm_linear(**GOOD | changed, backend=backend)


def test_what_the_kernel_can_not_do(device):
    with pytest.raises(ValueError, match=r"at most 32 rows and n up to 8, got 33 and n = 2"):
        triton_op(*make(33, device=device))
    with pytest.raises(ValueError, match=r"at most 32 rows and n up to 8, got 1 and n = 9"):
        triton_op(*make(1, n=9, o=9, i=9, device=device))
    args = make(1, n=9, o=9, i=9, device=device)
    torch.testing.assert_close(phm_linear(*args), phm_linear_reference(*args), rtol=1e-5, atol=1e-5)


def test_n_of_one_is_the_linear_layer(device):
    x, A, S, bias = make(5, n=1, o=4, i=7, device=device)
    torch.testing.assert_close(triton_op(x, A, S, bias), F.linear(x, A[0] * S[0], bias), rtol=1e-5, atol=1e-5)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.phm_linear")
    for _, dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        results = [function(*tensors) for function, tensors in contestants.values()]
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
        assert result.dtype == dtype and costs[1].bytes > costs[0].bytes > 0
