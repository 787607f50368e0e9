"""fake_quantize: the Triton path against the formula in float64, its registration, its checks, its cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import code_range, fake_quantize, fake_quantize_reference

# Relative to the sum of the absolute values of all terms. Codes are exact: all dtypes are divided in float32. float32:
# sixteen roundings of 2^-24, for sums of up to some thousand terms. float16, bfloat16: the result is rounded once, by
# 2^-11 and, as the interpreter truncates to bfloat16, 2^-7.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-6}


def triton_op(*args, **settings):
    return fake_quantize(*args, **settings, backend="triton")


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def make(*shape, axis=None, dtype=torch.float32, device="cpu", seed=0):
    """x of the given shape and a step for each index along the axis, both with gradients."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen)
    scale = 0.1 + torch.rand(() if axis is None else shape[axis], generator=gen)
    return [x.to(device, dtype).requires_grad_(), scale.to(device).requires_grad_()]


def run(function, args, **settings):
    y = function(*args, **settings)
    return [y.detach(), *torch.autograd.grad(y, args, random_gradient(y))]


def by_hand(x, scale, bits, axis=None, signed=True, zero_point=None, clip=True):
    """The result, both gradients, and the sum of the magnitudes of the terms of the second, in float64."""
    low, high = code_range(bits, signed)
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = -1
    others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    x, s = x.detach().float(), scale.detach().float().view(shape)
    z = 0 if zero_point is None else zero_point.detach().float().view(shape)
    v = torch.where(s == 0, 0, x / s)
    inside = (v >= low - z) & (v <= high - z)
    code = torch.where(v < 0, -1.0, 1.0) if signed and bits == 1 else v.round().clamp(low - z, high - z)
    x, s, v, code, g = (t.double() for t in (x, s, v, code, random_gradient(v)))
    terms = g * torch.where(inside, code - v, code)
    sums = [(t.sum(others) if others else t).view(scale.shape) for t in (terms, terms.abs())]
    return s * code, torch.where(inside & (s != 0), g, 0) if clip else g, *sums


def assert_near(actual, args, bits, **settings):
    y, grad_x, grad_scale, size = by_hand(*args, bits, **settings)
    for a, e, scale in zip(actual, (y, grad_x, grad_scale), (y.abs(), grad_x.abs(), size), strict=True):
        assert a.shape == e.shape
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * scale).all()


# The tile is 2,048 entries: one row of 2,048 columns, 2,048 rows of one, or anything between.
CASES = [
    pytest.param((1,), None, id="one"),
    pytest.param((3000,), None, id="several-blocks"),
    pytest.param((3, 7, 5), None, id="per-tensor"),
    pytest.param((17, 33), 0, id="rows"),
    pytest.param((17, 33), -1, id="columns"),
    pytest.param((5, 9, 6), 1, id="tokens"),
    pytest.param((6, 3, 5, 5), 0, id="convolution"),
    pytest.param((1, 2048), 0, id="exact-tile"),
    pytest.param((2, 2100), 0, id="rows-of-several-blocks"),
    pytest.param((70, 40), 1, id="several-programs"),
    pytest.param((7,), 0, id="vector"),
]


# The codes are found in float32 whatever the dtype, so that one number of bits will do for halves.
KINDS = [(1, torch.float32), (2, torch.float32), (8, torch.float32), (3, torch.float16), (3, torch.bfloat16)]


@pytest.mark.parametrize(("bits", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_triton_equals_the_formula_in_float64(shape, axis, bits, dtype, device):
    args = make(*shape, axis=axis, dtype=dtype, device=device)
    actual = run(triton_op, [*args], bits=bits, axis=axis)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32]
    assert_near(actual, args, bits, axis=axis)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("function", [triton_op, fake_quantize], ids=["triton", "reference"])
def test_every_setting(bits, clip, signed, function, device):
    args = make(6, 40, axis=0, device=device)
    settings = {"axis": 0, "signed": signed, "clip": clip}
    assert_near(run(function, args, bits=bits, **settings), args, bits, **settings)
    if bits > 1 or not signed:
        zero = torch.arange(6.0, device=device) % 2**bits - (2 ** (bits - 1) if signed else 0)
        settings["zero_point"] = zero
        assert_near(run(function, args, bits=bits, **settings), args, bits, **settings)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("function", [triton_op, fake_quantize], ids=["triton", "reference"])
def test_levels(bits, signed, function, device):
    low, high = code_range(bits, signed)
    x = torch.linspace(-1.5 * 2**bits, 1.5 * 2**bits, 3001, device=device)
    codes = function(x, torch.tensor(1.0, device=device), bits, signed=signed)
    assert torch.equal(
        codes.unique(), torch.arange(low, high + 1, device=device)[:: 2 if (low, high) == (-1, 1) else 1]
    )
    assert codes.unique().numel() == 2**bits
    step = torch.tensor(0.3, device=device)  # what is on a level stays there
    y = function(x, step, bits, signed=signed)
    assert torch.equal(function(y, step, bits, signed=signed), y)


def test_halves_round_to_even_and_one_bit_is_the_sign(device):
    x = torch.tensor([-2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5], device=device)
    one = torch.ones((), device=device)
    for function in (triton_op, fake_quantize):
        assert function(x, one, 4).tolist() == [-2, -2, 0, 0, 0, 0, 2, 2]
        assert function(x, 2 * one, 1).tolist() == [-2, -2, -2, 2, 2, 2, 2, 2]


def test_the_codes_are_those_of_torch(device):
    x, _ = make(50, 60, device=device)
    x = x.detach()
    for bits in (2, 4, 8):
        low, high = code_range(bits)
        steps, zeros = torch.full((50,), 0.25, device=device), torch.zeros(50, device=device)
        one = torch.fake_quantize_per_tensor_affine(x, steps[0], zeros[0].int(), low, high)
        assert torch.equal(triton_op(x, steps[0], bits), one)
        many = torch.fake_quantize_per_channel_affine(x, steps, zeros.int(), 0, low, high)
        assert torch.equal(triton_op(x, steps, bits, axis=0), many)


def test_the_step_gradient_points_where_the_error_falls(device):
    """A step that is far too small or too large moves towards the best one."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).to(device)
    for start, sign in ((0.05, -1), (3.0, 1)):
        scale = torch.tensor(start, device=device, requires_grad=True)
        (triton_op(x, scale, 3) - x).square().mean().backward()
        assert scale.grad.sign() == sign


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
    x = view(make(12, 16, device=device)[0].detach()).requires_grad_()
    args = [x, torch.rand(x.shape[0], device=device).add(0.1).requires_grad_()]
    assert_near(run(triton_op, args, bits=3, axis=0), args, 3, axis=0)


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((0, 7), 0), ((3, 0), 0), ((2, 0, 3), 1), ((0, 4), 1)])
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_empty(shape, axis, backend, device):
    args = make(*shape, axis=axis, device=device)
    y, grad_x, grad_scale = run(lambda *a: fake_quantize(*a, 4, axis=axis, backend=backend), args)
    assert y.shape == grad_x.shape == shape and grad_scale.shape == args[1].shape
    assert not grad_scale.any()


@pytest.mark.parametrize("bits", [1, 4])
def test_a_step_of_zero_gives_zeros_and_no_gradient(bits, device):
    x = make(3, 5, device=device)[0]
    for function in (triton_op, fake_quantize):
        args = [x, torch.tensor([0.0, 1.0, 0.0], device=device, requires_grad=True)]
        y, grad_x, grad_scale = run(function, args, bits=bits, axis=0)
        assert not y[::2].any() and not grad_x[::2].any()
        assert y[1].any() and grad_x[1].any() and grad_scale.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e30, -0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("bits", "dtype"), [(1, torch.float32), (4, torch.float32), (4, torch.bfloat16)], ids=str)
def test_extreme_values_propagate_as_in_the_reference(value, dtype, bits, device):
    args = make(9, 5, axis=0, dtype=dtype, device=device)
    with torch.no_grad():
        args[0][4, 2] = value
    y, grad_x, grad_scale = run(triton_op, args, bits=bits, axis=0)
    expected, grad, sums = run(fake_quantize_reference, args, bits=bits, axis=0)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=0, equal_nan=True)
    torch.testing.assert_close(grad_x, grad, rtol=TOLERANCE[dtype], atol=0)
    finite = sums.isfinite()  # infinity has a slope in the kernel, and none in the reference: zero times infinity
    torch.testing.assert_close(grad_scale[finite], sums[finite], rtol=1e-4, atol=1e-4)
    if value == value:
        assert grad_scale.isfinite().all()


def test_gradients_are_the_same_bits_every_time(device):
    args = make(2, 4100, device=device)
    first, second = (run(triton_op, args, bits=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("clip", [True, False])
def test_only_the_gradients_asked_for(clip, device):
    expected = run(fake_quantize_reference, make(6, 5, device=device), bits=3, clip=clip)[1:]
    for wanted in range(2):
        args = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(make(6, 5, device=device))]
        y = triton_op(*args, 3, clip=clip)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in args] == [i == wanted for i in range(2)]
        torch.testing.assert_close(args[wanted].grad, expected[wanted], rtol=1e-5, atol=1e-5)


def test_without_clipping_the_gradient_is_the_cotangent(device):
    x, scale = make(6, 50, device=device)
    for function in (triton_op, fake_quantize):
        y = function(x, scale.detach(), 2, clip=False)
        cotangent = torch.randn(6, 50, device=device)
        assert torch.equal(torch.autograd.grad(y, x, cotangent)[0], cotangent)
        assert torch.equal(y, function(x, scale.detach(), 2))


def test_double_backward_through_triton_says_what_to_do(device):
    args = make(3, 4, device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*args, 3).square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


@pytest.mark.parametrize(("axis", "zero"), [(None, False), (0, False), (1, True)])
def test_opcheck(axis, zero, device):
    x, scale = make(3, 5, axis=axis, device=device)
    z = torch.ones_like(scale).detach() if zero else None
    settings = (3, axis, True, True)
    torch.library.opcheck(torch.ops.polylib.fake_quantize.default, (x, scale, z, *settings))
    x, scale = x.detach(), scale.detach()
    for needed in ((True, True), (True, False), (False, True)):
        args = (torch.randn_like(x), x, scale, z, *settings, *needed)
        torch.library.opcheck(torch.ops.polylib.fake_quantize_backward.default, args)


def test_torch_func(device):
    x, scale = (t.detach() for t in make(4, 5, axis=0, device=device))

    def loss(f):
        return lambda x, s: f(x, s, 3, axis=0).square().sum()

    for transform in (
        lambda f: torch.func.grad(loss(f), (0, 1)),
        lambda f: torch.vmap(lambda x, s: f(x, s, 3)),
        lambda f: torch.vmap(torch.func.grad(lambda x, s: f(x, s, 2, clip=False).sum(), (0, 1))),
    ):
        result = transform(fake_quantize)(x, scale)
        torch.testing.assert_close(result, transform(fake_quantize_reference)(x, scale))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(x, scale)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(
        lambda *a: fake_quantize(*a, 3, axis=1, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5):
        args = make(rows, 4, 6, axis=1, device=device)
        for a, e in zip(run(compiled, args), run(fake_quantize_reference, args, bits=3, axis=1), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_changes_nothing(backend, device):
    x, scale = (t.detach() for t in make(6, 5, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        y = fake_quantize(x, scale, 4, backend=backend)
    assert torch.equal(y, fake_quantize(x, scale, 4, backend=backend))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.fake_quantize").cost
    forward = cost(100, 4, torch.bfloat16)  # 100 entries in and out, 4 steps in
    assert (forward.bytes, forward.flops) == (2 * 200 + 16, 600)
    backward = cost(100, 4, torch.float32, "backward")  # x, G, grad x; steps in, their gradients out
    assert (backward.bytes, backward.flops) == (4 * 300 + 32, 1000)
    with pytest.raises(ValueError, match="direction"):
        cost(100, 4, torch.float32, "sideways")


GOOD = {"x": torch.zeros(2, 5), "scale": torch.ones(()), "bits": 4}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, dtype=torch.int64)}, TypeError, "x must have a real floating-point dtype"),
        ({"scale": 1.0}, TypeError, "scale must be a torch.Tensor, got float"),
        ({"scale": torch.ones(()).double()}, TypeError, "scale must have the dtype of x, torch.float32, or"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be on the device of x, cpu"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \(\) or \(1,\), got \(2,\)"),
        ({"axis": 0}, ValueError, r"scale must have shape \(2,\), got \(\)"),
        ({"axis": 2}, ValueError, r"axis must be an axis of x, whose shape is \(2, 5\), got 2"),
        ({"zero_point": torch.zeros(2)}, ValueError, r"zero_point must have shape \(\) or \(1,\)"),
        ({"zero_point": torch.zeros(()), "bits": 1}, ValueError, "zero_point must be None for one signed bit"),
        ({"bits": 0}, ValueError, "bits must be an integer from 1 to 16, got 0"),
        ({"bits": 17}, ValueError, "bits must be an integer from 1 to 16, got 17"),
        ({"bits": 2.0}, ValueError, "bits must be an integer from 1 to 16, got 2.0"),
        ({"backend": "cuda"}, ValueError, '"auto", "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        fake_quantize(**GOOD | changed)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.fake_quantize")
    for _, dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        results = [function(*tensors) for function, tensors in contestants.values()]
        # PyTorch multiplies by the reciprocal of the step, so that a tie may fall to the other side.
        assert all(r.dtype == dtype and (r != results[0]).sum() <= 1 for r in results)
        assert costs[1].bytes > costs[0].bytes > 0
