"""group_rational: the Triton path against the definition in float64, its registration, its checks, its cost."""

import json
from functools import partial
from importlib import import_module

import pytest
import torch

from polylib.kernels import group_rational, group_rational_reference

NAMES = ("x", "numerator", "denominator")
# Relative to the sum of the absolute values of all terms, entry by entry, so that cancellation needs no slack. A term
# is a chain of at most some thirty roundings of 2^-24 (P, its derivative, Q, the power, the sum over rows); halves are
# rounded once more, at the end, by 2^-11 and, as the interpreter truncates to bfloat16, 2^-7.
TOLERANCE = {torch.float32: 2**-19, torch.float16: 2**-11 + 2**-19, torch.bfloat16: 2**-7 + 2**-19}


def make(*lead, width=5, groups=2, rows=1, dtype=torch.float32, device="cpu", seed=0, order=(5, 4)):
    """x (*lead, groups * width), numerator (rows, 6), denominator (groups, 4)."""
    gen = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype).requires_grad_()

    return [new(*lead, groups * width), new(rows, order[0] + 1), new(groups, order[1])]


def triton_op(*args):
    return group_rational(*args, backend="triton")


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(function, args, *settings):
    """The result and the gradient of every tensor."""
    y = function(*args, *settings)
    return [y.detach(), *torch.autograd.grad(y, args, random_gradient(y))]


def scales(x, a, b, variant):
    """Sums of the absolute values of all terms: of the result, and of the gradients of x, numerator and denominator."""
    groups = len(b)
    z, a, b_abs = (t.detach().abs().requires_grad_() for t in (x, a, b))
    one = torch.zeros_like(a).index_fill(1, torch.tensor(0, device=a.device), 1.0)
    p = group_rational_reference(z, a, torch.zeros_like(b), groups)
    q_abs = 1 / group_rational_reference(z, one, b_abs, groups)
    q = 1 / group_rational_reference(x, one, b, groups, variant)
    loss = (q_abs / q).detach()  # of accuracy, where the inner sum of variant B cancels; 1 in variant A
    g = random_gradient(x).abs() * loss
    grads = [
        torch.autograd.grad(p * q_abs, z, g / q**2, retain_graph=True)[0],
        torch.autograd.grad(p, a, g / q, retain_graph=True)[0],
        torch.autograd.grad(q_abs, b_abs, g * p / q**2)[0],
    ]
    return [loss * p / q, *grads]


def assert_near(actual, args, variant="A"):
    """Compare a result and its gradients with the reference in float64."""
    wide = [t.detach().double().requires_grad_() for t in args]
    expected = run(group_rational_reference, wide, len(args[2]), variant)
    for got, want, scale in zip(actual, expected, scales(*(t.detach() for t in wide), variant), strict=True):
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= TOLERANCE[got.dtype] * scale).all()


SHAPES = [
    pytest.param((1,), 5, 2, id="one-row"),
    pytest.param((3,), 1, 1, id="one-channel"),
    pytest.param((65,), 1, 2, id="width-1"),
    pytest.param((11,), 24, 3, id="width-24"),
    pytest.param((9,), 48, 2, id="width-48"),
    pytest.param((12,), 96, 2, id="width-96"),
    pytest.param((32,), 32, 1, id="exact-tile"),
    pytest.param((), 6, 2, id="no-batch"),
    pytest.param((2, 1, 3), 7, 2, id="leading-dims"),
    pytest.param((700,), 3, 2, id="several-strips"),
    pytest.param((1,), 1056, 1, id="several-tiles-a-strip"),
]
# Both variants widen and round in the same lines.
KINDS = [(torch.float32, "A"), (torch.float32, "B"), (torch.float16, "A"), (torch.bfloat16, "B")]


@pytest.mark.parametrize(("dtype", "variant"), KINDS, ids=str)
@pytest.mark.parametrize(("lead", "width", "groups"), SHAPES)
def test_triton_equals_float64_reference(lead, width, groups, dtype, variant, device):
    args = make(*lead, width=width, groups=groups, rows=groups, dtype=dtype, device=device)
    actual = run(triton_op, args, groups, variant)
    assert all(t.dtype == dtype for t in actual)
    assert_near(actual, args, variant)


def test_half_inputs_with_float32_coefficients(device):
    x, a, b = make(20, device=device)
    args = [x.detach().bfloat16().requires_grad_(), a, b]
    actual = run(triton_op, args, 2)
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert_near(actual, args)
    torch.testing.assert_close(run(group_rational, args, 2), actual, rtol=2**-7, atol=1e-4)


def test_float16_does_not_overflow_inside(device):
    """The fifth power of 20 is beyond float16, the function of it is not."""
    x, a, b = (t.detach() for t in make(1, dtype=torch.float16, device=device))
    x.fill_(20.0)
    for backend in ("triton", "reference"):
        y = group_rational(x, a.abs(), b.abs() + 1, 2, backend=backend)
        assert y.isfinite().all()


@pytest.mark.parametrize("variant", ["A", "B"])
def test_a_shared_numerator_gets_the_sum_of_the_gradients(variant, device):
    x, a, b = make(20, width=6, groups=3, device=device)
    own = a.detach().expand(3, -1).clone().requires_grad_()
    shared, separate = run(triton_op, [x, a, b], 3, variant), run(triton_op, [x, own, b], 3, variant)
    assert torch.equal(shared[0], separate[0]) and torch.equal(shared[1], separate[1])
    torch.testing.assert_close(shared[2], separate[2].sum(0, keepdim=True))
    assert torch.equal(shared[3], separate[3])
    assert_near(shared, [x, a, b], variant)


def test_a_shared_denominator(device):
    x, a, b = make(50, width=6, groups=3, rows=3, device=device)
    args = [x, a, b.detach()[:1].clone().requires_grad_()]
    for got, want in zip(run(triton_op, args, 3), run(group_rational_reference, args, 3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_a_denominator_of_zeros_does_not_freeze(variant, backend, device):
    x, a, b = make(40, device=device)
    args = [x, a, torch.zeros_like(b).requires_grad_()]
    grad = run(lambda *t: group_rational(*t, 2, variant, backend=backend), args)[3]
    z, g = x.detach().unflatten(-1, (2, -1)), random_gradient(x).unflatten(-1, (2, -1))
    p = sum(a.detach()[0, i] * z**i for i in range(6))
    u = z.abs() if variant == "A" else z
    expected = torch.stack([-(g * p * u**j).sum((0, 2)) for j in range(1, 5)], -1)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-3)
    assert (grad != 0).all()


@pytest.mark.parametrize("variant", ["A", "B"])
def test_the_sign_of_zero_is_plus_one_for_both_backends(variant, device):
    x, a, b = (t.detach() for t in make(4, device=device))
    x[1], x[2] = 0.0, -0.0
    b[0, 1], b[1, 0] = 0.0, -0.0
    args = [t.requires_grad_() for t in (x, a, b)]
    got = run(triton_op, args, 2, variant)
    torch.testing.assert_close(got, run(group_rational_reference, args, 2, variant), rtol=1e-5, atol=1e-5)
    assert_near(got, args, variant)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, 3:9],
        lambda x: x[:, 2:8].t()[:, :6],
        lambda x: x[0, :6].expand(7, 6),
        lambda x: x[:, :12].reshape(12, 2, 6).transpose(0, 1),
    ],
    ids=["sliced", "transposed", "expanded", "permuted-batch"],
)
def test_strided_x(view, device):
    _, a, b = make(12, width=3, device=device)
    big = make(12, width=8, device=device, seed=2)[0]
    y, *grads = run(lambda x, a, b: triton_op(view(x), a, b, 2), [big, a, b])
    small = view(big).detach().clone().requires_grad_()
    assert_near([y, *run(triton_op, [small, a, b], 2)[1:]], [small, a, b])
    expected = run(lambda x, a, b: group_rational_reference(view(x), a, b, 2), [big, a, b])
    torch.testing.assert_close([y, *grads], expected, rtol=1e-5, atol=1e-4)


def test_strided_gradient_and_coefficients(device):
    x, a, b = (t.detach() for t in make(6, rows=2, device=device))
    views = [x, torch.stack([a, a], -1)[..., 0], torch.stack([b, b], -1)[..., 0]]
    grad = torch.randn(10, 6, device=device).t()
    results = []
    for args in ((x, a, b), views):
        args = [t.requires_grad_() for t in args]
        results.append(torch.autograd.grad(triton_op(*args, 2), args, grad))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_no_rows(lead, backend, device):
    args = make(*lead, device=device)
    y, *grads = run(lambda *t: group_rational(*t, 2, backend=backend), args)
    assert y.shape == (*lead, 10)
    assert [g.shape for g in grads] == [t.shape for t in args]
    assert not any(g.any() for g in grads)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -1e4, -0.0, float("-inf"), float("nan")])
@pytest.mark.parametrize(("dtype", "variant"), KINDS[::3] + KINDS[1:2], ids=str)
def test_extreme_values_propagate_as_in_the_reference(value, dtype, variant, device):
    args = make(9, dtype=dtype, device=device)
    with torch.no_grad():
        args[0][4, 2] = value
    actual, expected = run(triton_op, args, 2, variant), run(group_rational_reference, args, 2, variant)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        good = want.isfinite()
        slack = 4 * TOLERANCE[dtype] * (want[good].double().abs().max() if good.any() else 1)
        torch.testing.assert_close(got[good].double(), want[good].double(), rtol=0, atol=float(slack))


def test_gradients_are_the_same_bits_every_time(device):
    args = make(700, width=3, device=device)
    assert all(torch.equal(p, q) for p, q in zip(run(triton_op, args, 2), run(triton_op, args, 2), strict=True))


def test_only_the_gradients_asked_for(device):
    args = make(6, device=device)
    expected = run(group_rational_reference, args, 2)[1:]
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(args)]
        y = triton_op(*inputs, 2)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(5, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_reference_derivatives(order, variant):
    args = make(3, width=2, dtype=torch.float64, order=order)
    assert torch.autograd.gradcheck(lambda *t: group_rational_reference(*t, 2, variant), args)
    assert torch.autograd.gradgradcheck(lambda *t: group_rational_reference(*t, 2, variant), args)


def test_double_backward_through_triton_says_what_to_do(device):
    args = make(3, device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*args, 2).square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


@pytest.mark.parametrize(("variant_b", "rows"), [(False, 1), (True, 2)])
def test_opcheck_forward(variant_b, rows, device):
    args = make(3, rows=rows, device=device)
    torch.library.opcheck(torch.ops.polylib.group_rational.default, (*args, 2, variant_b))


@pytest.mark.parametrize(("need_x", "need_coefficients"), [(True, True), (True, False), (False, True)])
def test_opcheck_backward(need_x, need_coefficients, device):
    x, a, b = (t.detach() for t in make(3, device=device))
    args = (torch.randn_like(x), x, a, b, 2, False, need_x, need_coefficients)
    torch.library.opcheck(torch.ops.polylib.group_rational_backward.default, args)


def test_torch_func(device):
    args = [t.detach() for t in make(4, device=device)]

    def loss(f):
        return lambda *t: f(*t, 2).square().sum()

    for transform in (
        lambda f: torch.func.grad(loss(f), (0, 1, 2)),
        lambda f: torch.func.hessian(loss(f)),
        lambda f: torch.vmap(torch.func.grad(loss(f), (0, 1, 2)), (0, None, None)),
    ):
        torch.testing.assert_close(transform(group_rational)(*args), transform(group_rational_reference)(*args))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(*args)


FULLGRAPH = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}  # no C++ compiler: the graph is the question


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(lambda *t: group_rational(*t, 2, backend=backend), **FULLGRAPH)
    for rows in (3, 5):
        args = make(2, rows, device=device)
        for got, want in zip(run(compiled, args), run(group_rational_reference, args, 2), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_keeps_the_dtype_of_x(backend, device):
    args = make(6, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = group_rational(*args, 2, backend=backend)
    torch.testing.assert_close(y, group_rational_reference(*args, 2))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.group_rational").cost
    # 3 rows of 16 channels: 48 elements read and written; 2 groups of ten float32 coefficients, 80 bytes.
    forward = cost(3, 16, 2, torch.bfloat16)
    assert (forward.bytes, forward.flops) == (2 * 48 * 2 + 80, 48 * 19)
    # Backward reads grad and x and writes the gradient of x, and the coefficients likewise.
    backward = cost(3, 16, 2, torch.bfloat16, "backward")
    assert (backward.bytes, backward.flops) == (3 * 48 * 2 + 160, 48 * 60)
    with pytest.raises(ValueError, match="direction"):
        cost(3, 16, 2, torch.float32, "sideways")


def changed(**new):
    return [new.get(name, t) for name, t in zip(NAMES, make(4), strict=True)]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ([*changed(x=torch.zeros(4, 9)), 2], ValueError, r"x must have shape .*groups = 2, got \(4, 9\)"),
        ([*changed(x=torch.tensor(1.0)), 2], ValueError, "x must have shape"),
        ([*changed(x=torch.zeros(4, 0)), 2], ValueError, "x must have shape"),
        ([*changed(x=[1.0]), 2], TypeError, "x must be a torch.Tensor, got list"),
        ([*changed(x=torch.zeros(4, 10, dtype=torch.int64)), 2], TypeError, "x must have a real floating-point"),
        (
            [*changed(numerator=torch.zeros(1, 6).double()), 2],
            TypeError,
            "denominator must have the dtype of numerator",
        ),
        (
            [torch.zeros(4, 10), torch.zeros(1, 6).double(), torch.zeros(2, 4).double(), 2],
            TypeError,
            "numerator must have the dtype of x, torch.float32",
        ),
        ([*changed(x=torch.zeros(4, 10, device="meta")), 2], ValueError, "numerator must be on the device of x, meta"),
        ([*changed(numerator=torch.zeros(3, 6)), 2], ValueError, r"numerator must have shape \(2, m \+ 1\) or"),
        ([*changed(denominator=torch.zeros(4)), 2], ValueError, r"denominator must have shape \(2, n\) or"),
        ([*changed(denominator=torch.zeros(2, 0)), 2], ValueError, r"denominator must have shape"),
        ([*make(4), 0], ValueError, "groups must be an integer of at least 1, got 0"),
        ([*make(4), 2.0], ValueError, "groups must be an integer"),
        ([*make(4), 2, "C"], ValueError, 'variant must be "A" or "B", got \'C\''),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(args, error, message, backend):
    with pytest.raises(error, match=message):
        group_rational(*args, backend=backend)


def test_bad_backend(device):
    with pytest.raises(ValueError, match='"auto", "triton" or "reference", got \'cuda\''):
        group_rational(*make(4), 2, backend="cuda")
    with pytest.raises(ValueError, match=r"order \(m, n\) = \(5, 4\) only, got \(3, 2\)"):
        triton_op(*make(4, order=(3, 2), device=device), 2)
    with pytest.raises(TypeError, match=r'backend="triton" supports .*torch.float16, got torch.float64'):
        triton_op(*make(4, dtype=torch.float64, device=device), 2)


def test_bench(tmp_path, capsys, monkeypatch):
    from benchmarks import run as bench

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # seconds instead of half a minute
    bench.main(["group_rational", "--quick", "--json", str(tmp_path / "bench.json")])
    assert "forward+backward" in capsys.readouterr().out
    rows = [r for r in json.loads((tmp_path / "bench.json").read_text())["rows"] if r["contestant"] == "ours"]
    assert len(rows) == 2 and all(row["seconds"] > 0 for row in rows)
