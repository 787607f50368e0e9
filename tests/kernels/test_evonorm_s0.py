"""evonorm_s0: the Triton path against the definition in float64, its registration, its checks, its cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import evonorm_s0, evonorm_s0_reference

NAMES = ("x", "weight", "bias", "v")
# Relative to the magnitude of the terms, entry by entry (see `magnitudes`). float32: sixteen roundings of 2^-24 for
# sums of up to some thousand terms, added by halves. float16 and bfloat16: the inputs are exact and the arithmetic is
# float32, so that only the result is rounded, by 2^-11 and, as the interpreter truncates to bfloat16, 2^-7.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 1.1 * 2**-11, torch.bfloat16: 1.1 * 2**-7}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make(n=2, c=6, h=5, w=7, dtype=torch.float32, device="cpu", seed=0, memory_format=torch.contiguous_format):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=gen, dtype=torch.float64) + 0.5
    parameters = torch.randn(3, c, generator=gen, dtype=torch.float64).unbind()
    tensors = [x.to(memory_format=memory_format), *parameters]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def triton_op(*args):
    return evonorm_s0(*args, backend="triton")


def random_gradient(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(function, tensors, groups, gradient=random_gradient):
    """The result and the gradient of every tensor."""
    y = function(*tensors, groups)
    return [y.detach(), *torch.autograd.grad(y, tensors, gradient(y))]


def magnitudes(x, weight, bias, v, groups, grad, eps=1e-5):
    """The sums of the absolute values of the terms of the result and of each gradient, from the formulas."""
    x, weight, bias, v, grad = (t.detach().double() for t in (x, weight, bias, v, grad))
    weight, bias, v = (t.view(-1, 1, 1) for t in (weight, bias, v))

    def of_group(t, reduce):
        grouped = t.unflatten(1, (groups, -1))
        return reduce(grouped).expand_as(grouped).flatten(1, 2)

    def mean(t):
        return of_group(t, lambda t: t.mean((2, 3, 4), keepdim=True))

    std = of_group(x, lambda t: (t.var((2, 3, 4), correction=0, keepdim=True) + eps).sqrt())
    # The deviation inherits the rounding of x - mean: relative to it, |x| / s roundings.
    spread = 1 + mean(x.abs()) / std
    # The logistic function passes the rounding of v x on, times |v x|; 1 - gate adds a rounding of 1 where it is small.
    gate, carried = torch.sigmoid(v * x), 1 + (v * x).abs()
    slope = gate * (1 - gate) * carried + gate / 16
    gate = gate * carried
    result = (weight * x * gate / std).abs() * spread + bias.abs()
    q = (grad * weight).abs() / std
    pull = mean(q * x.abs() * gate) / std**2
    grad_x = (q * (gate + (v * x).abs() * slope) + (x.abs() + mean(x.abs())) * pull) * spread
    sums = [(grad * x * gate / std).abs() * spread, grad.abs(), q * x * x * slope * spread]
    return [result, grad_x, *(t.sum((0, 2, 3)) for t in sums)]


def assert_near(actual, tensors, groups, view=lambda x: x):
    """Compare a result and its gradients with the reference in float64."""

    def reference(x, *rest):
        return evonorm_s0_reference(view(x), *rest)

    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = actual[0]
    expected = run(reference, wide, groups, lambda _: random_gradient(y).double())
    scales = magnitudes(view(tensors[0]), *tensors[1:], groups, random_gradient(y))
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert a.shape == e.shape
        if scale.shape != a.shape:  # x was seen through a view: its scale is that of the largest entry
            scale = scale.max()
        smallest = torch.finfo(a.dtype).tiny * torch.finfo(a.dtype).eps  # float16 has few numbers below 2^-14
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * scale + smallest).all()


SHAPES = [
    pytest.param((2, 4, 5, 7), 2, id="odd"),
    pytest.param((1, 6, 5, 7), 1, id="one-group"),
    pytest.param((1, 3, 3, 3), 3, id="one-channel-groups"),
    pytest.param((2, 8, 1, 1), 2, id="one-pixel"),
    pytest.param((1, 4, 8, 8), 2, id="exact-tiles"),
    pytest.param((1, 2, 70, 70), 2, id="many-pixels"),
    pytest.param((1, 80, 9, 11), 1, id="many-channels"),
    pytest.param((1, 4200, 1, 2), 1, id="more-channels-than-a-tile"),
]


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_triton_equals_float64_reference(shape, groups, dtype, memory_format, device):
    tensors = make(*shape, dtype=dtype, device=device, memory_format=memory_format)
    actual = run(triton_op, tensors, groups)
    assert all(t.dtype == dtype for t in actual)
    assert actual[0].stride() == actual[1].stride() == tensors[0].stride()
    assert_near(actual, tensors, groups)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[::2, 2:, 1:, :4], lambda x: x.transpose(2, 3), lambda x: x[:1].expand(3, -1, -1, -1)],
    ids=["sliced", "transposed", "expanded"],
)
def test_strided_x(view, device):
    tensors = make(device=device)
    channels = view(tensors[0]).shape[1]
    tensors = [tensors[0], *(t[:channels].detach().requires_grad_() for t in tensors[1:])]
    assert_near(run(lambda x, *rest: triton_op(view(x), *rest), tensors, 2), tensors, 2, view)


def test_the_gradient_may_have_another_memory_format(device):
    tensors = make(device=device)
    expected = run(triton_op, tensors, 3)
    actual = run(triton_op, tensors, 3, lambda y: random_gradient(y).to(memory_format=torch.channels_last))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_large_mean_costs_no_digits(device):
    x, weight, bias, v = (t.detach() for t in make(1, 2, 70, 70, device=device))
    x = x + 1000  # in float32 the squares of 1000 hold no trace of a variance of 1
    tensors = [t.requires_grad_() for t in (x, weight, bias, v / 1000)]
    actual = run(triton_op, tensors, 1)
    expected = run(evonorm_s0_reference, [t.detach().double().requires_grad_() for t in tensors], 1)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_groups(value, device):
    x, *parameters = make(device=device)
    tensors = [torch.full_like(x, value).requires_grad_(), *parameters]
    actual, expected = (run(f, tensors, 2) for f in (triton_op, evonorm_s0_reference))
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("shape", [(0, 6, 5, 7), (2, 6, 0, 7)])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_no_values(shape, backend, device):
    tensors = make(*shape, device=device)
    y, *grads = run(lambda *a: evonorm_s0(*a, backend=backend), tensors, 3)
    assert y.shape == shape
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads[1:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -0.0, float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values_propagate_as_in_the_reference(value, dtype, device):
    tensors = make(2, 4, 3, 5, dtype=dtype, device=device)
    with torch.no_grad():
        tensors[0][1, 2, 1, 4] = value
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for a, e in zip(run(triton_op, tensors, 2), run(evonorm_s0_reference, wide, 2), strict=True):
        a, e = a.double(), e.double()
        assert torch.equal(a.isfinite(), e.isfinite())
        scale = e[e.isfinite()].abs().max()
        close = (a - e)[e.isfinite()].abs() <= 4 * TOLERANCE[dtype] * scale
        assert close.all()


def test_gradients_are_the_same_bits_every_time(device):
    tensors = make(2, 4, 20, 20, device=device)
    assert all(torch.equal(a, b) for a, b in zip(*(run(triton_op, tensors, 2) for _ in range(2)), strict=True))


def test_only_the_gradients_asked_for(device):
    tensors = make(1, device=device)
    expected = run(evonorm_s0_reference, tensors, 3)[1:]
    for wanted in range(4):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        y = triton_op(*inputs, 3)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(4)]
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted], rtol=1e-5, atol=1e-5)


def test_reference_derivatives():
    tensors = make(2, 4, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: evonorm_s0_reference(*a, 2), tensors)
    assert torch.autograd.gradgradcheck(lambda *a: evonorm_s0_reference(*a, 2), tensors)


def test_double_backward_through_triton_says_what_to_do(device):
    tensors = make(device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*tensors, 3).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_opcheck_forward(memory_format, device):
    tensors = make(1, 2, 3, 3, device=device, memory_format=memory_format)
    torch.library.opcheck(torch.ops.polylib.evonorm_s0.default, (*tensors, 1, 1e-5))


@pytest.mark.parametrize(("memory_format", "need_x"), [(torch.contiguous_format, False), (torch.channels_last, True)])
def test_opcheck_backward(memory_format, need_x, device):
    x, weight, _, v = (t.detach() for t in make(1, 2, 3, 3, device=device, memory_format=memory_format))
    _, mean, rstd = torch.ops.polylib.evonorm_s0(x, weight, weight, v, 1, 1e-5)
    torch.library.opcheck(
        torch.ops.polylib.evonorm_s0_backward.default, (random_gradient(x), x, weight, v, mean, rstd, need_x)
    )


def test_torch_func_takes_the_reference(device):
    tensors = [t.detach() for t in make(device=device)]

    def per_sample(f):
        return torch.vmap(torch.func.grad(lambda x, *rest: f(x[None], *rest, 3).square().sum()), (0, None, None, None))

    torch.testing.assert_close(per_sample(evonorm_s0)(*tensors), per_sample(evonorm_s0_reference)(*tensors))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        per_sample(triton_op)(*tensors)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_batch(backend, device):
    compiled = torch.compile(lambda *a: evonorm_s0(*a, backend=backend), fullgraph=True, dynamic=True, backend="eager")
    for n in (2, 3):
        tensors = make(n, device=device)
        for a, e in zip(run(compiled, tensors, 3), run(evonorm_s0_reference, tensors, 3), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_compile_fullgraph_with_inductor(device):
    compiled = torch.compile(lambda x, *rest: triton_op(x + 1, *rest), fullgraph=True)
    tensors = make(device=device, memory_format=torch.channels_last)
    for a, e in zip(
        run(compiled, tensors, 3),
        run(lambda x, *rest: evonorm_s0_reference(x + 1, *rest), tensors, 3),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast(backend, device):
    tensors = make(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = evonorm_s0(*tensors, 3, backend=backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
    expected = evonorm_s0_reference(*(t.detach().bfloat16().float() for t in tensors), 3)
    # The reference rounds the product, the gate, the deviation and two more results: five roundings.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=5 * 2**-7 * expected.abs().max().item())


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.evonorm_s0").cost
    # 2 x 6 x 5 x 7 = 420 values in 6 groups; mean and deviation of each group are 8 bytes.
    forward = cost(2, 6, 5, 7, 3, torch.bfloat16)
    assert (forward.bytes, forward.flops) == (2 * (420 + 420 + 18) + 48, 11 * 420)
    backward = cost(2, 6, 5, 7, 3, torch.float32, "backward")
    assert (backward.bytes, backward.flops) == (4 * (3 * 420 + 12 + 18) + 48, 26 * 420)
    assert (forward + backward).flops == 37 * 420
    with pytest.raises(ValueError, match='direction must be "forward" or "backward"'):
        cost(2, 6, 5, 7, 3, torch.float32, "sideways")


def changed(**new):
    return [new.get(name, t) for name, t in zip(NAMES, make(), strict=True)]


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (changed(x=torch.zeros(4, 6)), {}, ValueError, r"x must have shape \(N, C, H, W\).*\(4, 6\)"),
        (make(c=0), {}, ValueError, "C >= 1"),
        (changed(x=[1.0]), {}, TypeError, "x must be a torch.Tensor, got list"),
        (changed(x=torch.zeros(2, 6, 5, 7).long()), {}, TypeError, "x must have a real floating-point dtype"),
        (changed(v=None), {}, TypeError, "v must be a torch.Tensor"),
        (changed(v=torch.zeros(6).half()), {}, TypeError, "v must have the dtype of x, torch.float32"),
        (changed(bias=torch.zeros(6, device="meta")), {}, ValueError, "bias must be on the device of x"),
        (changed(weight=torch.zeros(5)), {}, ValueError, r"weight must have shape \(C,\) = \(6,\), got \(5,\)"),
        (make(), {"groups": 4}, ValueError, "groups must divide the C = 6 channels of x, got 4"),
        (make(), {"groups": 0}, ValueError, "groups must divide"),
        (make(), {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        (make(), {"backend": "cuda"}, ValueError, 'backend must be "auto", "triton" or "reference"'),
    ],
)
def test_bad_arguments(tensors, options, error, message):
    with pytest.raises(error, match=message):
        evonorm_s0(*tensors, **{"groups": 3} | options)


def test_float64_has_no_kernel(device):
    with pytest.raises(TypeError, match=r'backend="triton" supports .*, got torch.float64'):
        triton_op(*make(dtype=torch.float64, device=device), 3)


def test_bench_cases_run_and_agree():
    op_file = import_module("benchmarks.ops.evonorm_s0")
    cases = list(op_file.cases(torch.device("cpu"), quick=True))
    assert [label for label, *_ in cases][:2] == ["2x8x4x4", "2x8x4x4 channels_last"]
    for _, _, costs, contestants in cases:
        assert 0 < costs[0].bytes < costs[1].bytes
        results = {name: function(*tensors) for name, (function, tensors) in contestants.items()}
        torch.testing.assert_close(results["ours"], results["reference"])
        assert results["group_norm+silu"].shape == results["ours"].shape
