"""quadratic_linear: the Triton path against the definition in float64, its registration, its checks, its cost."""

import json
import subprocess
import sys
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from polylib.kernels import quadratic_linear, quadratic_linear_reference

NAMES = ("x", "weight_r", "bias_r", "weight_g", "bias_g", "weight_b", "bias_b")
# Relative to the sum of the absolute values of all terms, entry by entry, so that cancellation needs no slack. float32:
# sixteen roundings of 2^-24, for sums of up to some hundred terms. float16 and bfloat16: a gradient passes three
# roundings (a factor, its product with G, the result), of 2^-11 and, as the interpreter truncates to bfloat16, 2^-7.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-7}


def make(*lead, k=5, n=7, dtype=torch.float32, device="cpu", seed=0, integers=False):
    """Inputs of the op: x (*lead, k), weights (n, k), biases (n,); small integers make every sum exact."""
    gen = torch.Generator().manual_seed(seed)

    def new(*shape):
        if integers:
            t = torch.randint(-2, 3, shape, generator=gen).double()
        else:
            t = torch.randn(shape, generator=gen, dtype=torch.float64) / (k**0.5 if shape == (n, k) else 1)
        return t.to(device, dtype).requires_grad_()

    x = new(*lead, k)
    return [x] + [new(n, k) if i % 2 == 0 else new(n) for i in range(6)]


def triton_op(*args):
    return quadratic_linear(*args, backend="triton")


def random_gradient(y):
    return torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(function, args, gradient=random_gradient):
    """The result and the gradient of every tensor."""
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y, [t for t in args if t is not None], gradient(y))]


def assert_near(actual, args, view=lambda x: x):
    """Compare a result and its gradients with the reference in float64."""

    def reference(x, *parameters):
        return quadratic_linear_reference(view(x), *parameters)

    wide = [None if t is None else t.detach().double() for t in args]
    expected = run(reference, [None if t is None else t.requires_grad_() for t in wide])
    # All terms of the result and of the gradients are products: with absolute values they add up to their magnitude.
    magnitudes = [None if t is None else t.detach().abs().requires_grad_() for t in wide]
    scales = run(reference, magnitudes, lambda y: random_gradient(y).abs())
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert a.shape == e.shape
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * scale).all()


SHAPES = [
    pytest.param((1,), 5, 7, id="one-row"),
    pytest.param((3,), 1, 1, id="K=N=1"),
    pytest.param((65,), 33, 1, id="one-column"),
    pytest.param((17,), 70, 67, id="odd"),
    pytest.param((64,), 32, 64, id="exact-tiles"),
    pytest.param((), 5, 7, id="no-batch"),
    pytest.param((2, 1, 9), 6, 10, id="leading-dims"),
    pytest.param((700,), 9, 5, id="several-splits"),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("lead", "k", "n"), SHAPES)
def test_triton_equals_float64_reference(lead, k, n, dtype, device):
    args = make(*lead, k=k, n=n, dtype=dtype, device=device)
    actual = run(triton_op, args)
    assert all(t.dtype == dtype for t in actual)
    assert_near(actual, args)


@pytest.mark.parametrize("missing", [("bias_r",), ("bias_g",), ("bias_b",), ("bias_r", "bias_g", "bias_b")])
def test_missing_biases(missing, device):
    args = [None if name in missing else t for name, t in zip(NAMES, make(4, device=device), strict=True)]
    assert_near(run(triton_op, args), args)
    assert_near(run(quadratic_linear, args), args)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, 3:8],
        lambda x: x[:, 2:14:3].t()[:, :5],
        lambda x: x[0, :5].expand(6, 5),
        lambda x: x[:, :10].reshape(12, 2, 5).transpose(0, 1),
    ],
    ids=["sliced", "transposed", "expanded", "permuted-batch"],
)
def test_strided_x(view, device):
    args = [make(12, k=16, device=device)[0], *make(1, k=5, device=device)[1:]]
    assert_near(run(lambda x, *parameters: triton_op(view(x), *parameters), args), args, view)


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_no_rows(lead, backend, device):
    args = make(*lead, device=device)
    y, *grads = run(lambda *a: quadratic_linear(*a, backend=backend), args)
    assert y.shape == (*lead, 7)
    assert [g.shape for g in grads] == [t.shape for t in args]
    assert not any(g.any() for g in grads)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values_propagate_as_in_the_reference(value, dtype, device):
    args = make(9, dtype=dtype, device=device)
    with torch.no_grad():
        args[0][4, 2] = value
    for a, e in zip(run(triton_op, args), run(quadratic_linear_reference, args), strict=True):
        a, e = a.double(), e.double()
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.isinf(), e.isinf())
        scale = e[e.isfinite()].abs().max() if e.isfinite().any() else 1
        torch.testing.assert_close(a, e, rtol=0, atol=float(2 * TOLERANCE[dtype] * scale), equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float16_overflow_is_not_hidden(device):
    args = [torch.full_like(t, 1e4).detach() for t in make(3, dtype=torch.float16, device=device)]
    assert triton_op(*args).isposinf().all()


@pytest.mark.parametrize("rows", [40, 300, 1100])
def test_number_of_splits_does_not_change_exact_sums(rows, device):
    args = make(rows, k=3, n=2, device=device, integers=True)
    for a, e in zip(run(triton_op, args), run(quadratic_linear_reference, args), strict=True):
        assert torch.equal(a, e)


def test_gradients_are_the_same_bits_every_time(device):
    args = make(600, k=8, n=6, device=device)
    assert all(torch.equal(a, b) for a, b in zip(run(triton_op, args), run(triton_op, args), strict=True))


def test_only_the_gradients_asked_for(device):
    args = make(6, device=device)
    expected = run(quadratic_linear_reference, args)[1:]
    for wanted in range(7):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(args)]
        y = triton_op(*inputs)
        y.backward(random_gradient(y))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(7)]
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted])


def test_relinear_start_is_a_linear_layer_with_live_gradients(device):
    x, w_r, b_r, *rest = make(20, device=device)
    rest = [torch.zeros_like(t) for t in rest]
    rest[1].fill_(1)  # bias_g
    assert torch.equal(quadratic_linear(x, w_r, b_r, *rest, backend="reference"), F.linear(x, w_r, b_r))
    torch.testing.assert_close(triton_op(x, w_r, b_r, *rest), F.linear(x, w_r, b_r), rtol=2e-6, atol=2e-6)
    exact = [*make(20, device=device, integers=True)[:3], *rest]
    assert torch.equal(triton_op(*exact), F.linear(*exact[:3]))
    grads = run(triton_op, [x, w_r, b_r, *(t.detach().requires_grad_() for t in rest)])[1:]
    assert all(g.abs().max() > 0 for g in grads)


def test_reference_derivatives():
    args = make(3, k=2, n=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(quadratic_linear_reference, args)
    assert torch.autograd.gradgradcheck(quadratic_linear_reference, args)


def test_double_backward_through_triton_says_what_to_do(device):
    args = make(3, device=device)
    (grad_x,) = torch.autograd.grad(triton_op(*args).square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad_x.sum().backward()


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck_forward(save, biases, device):
    args = [t.detach().requires_grad_(save) for t in make(3, device=device)]
    if not biases:
        args[2] = args[4] = args[6] = None
    torch.library.opcheck(torch.ops.polylib.quadratic_linear.default, (*args, save))


@pytest.mark.parametrize(("need_x", "need_parameters"), [(True, True), (True, False), (False, True)])
def test_opcheck_backward(need_x, need_parameters, device):
    x, w_r, _, w_g, _, w_b, _ = (t.detach() for t in make(3, device=device))
    grad, r, g = (torch.randn(3, 7, device=device) for _ in range(3))
    args = (grad, x, w_r, w_g, w_b, r, g, need_x, need_parameters)
    torch.library.opcheck(torch.ops.polylib.quadratic_linear_backward.default, args)


def test_factors_are_stored_only_for_a_backward_pass(device):
    args = make(6, device=device)
    with torch.no_grad():
        inference = torch.ops.polylib.quadratic_linear(*args, False)
    training = torch.ops.polylib.quadratic_linear(*args, True)
    assert [t.numel() for t in inference] == [42, 0, 0]
    assert [t.numel() for t in training] == [42, 42, 42]
    assert torch.equal(inference[0], training[0])


PER_SAMPLE = (0,) + (None,) * 6


@pytest.mark.parametrize("in_dims", [PER_SAMPLE, (0,) * 7, (None, -1, -1, None, 0, None, None)])
def test_vmap(in_dims, device):
    args = make(2, 4, device=device)
    stacked = [t if d is None else torch.stack([t, 2 * t, -t], d) for t, d in zip(args, in_dims, strict=True)]
    expected = run(torch.vmap(quadratic_linear_reference, in_dims), stacked)
    torch.testing.assert_close(run(torch.vmap(quadratic_linear, in_dims), stacked), expected, rtol=1e-5, atol=1e-5)


def test_torch_func_derivatives(device):
    args = [t.detach() for t in make(4, device=device)]
    every = tuple(range(7))

    def loss(f):
        return lambda *a: f(*a).square().sum()

    for transform in (
        lambda f: torch.func.jacrev(f, every),
        lambda f: torch.func.grad(loss(f), every),
        lambda f: torch.func.hessian(loss(f)),
        lambda f: torch.vmap(torch.func.grad(loss(f), every), PER_SAMPLE),
    ):
        torch.testing.assert_close(transform(quadratic_linear)(*args), transform(quadratic_linear_reference)(*args))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.func.grad(loss(triton_op))(*args)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    compiled = torch.compile(lambda *a: quadratic_linear(*a, backend=backend), fullgraph=True, dynamic=True)
    for rows in (3, 5):
        args = make(2, rows, device=device)
        for a, e in zip(run(compiled, args), run(quadratic_linear_reference, args), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_export(device):
    class Model(torch.nn.Module):
        def forward(self, *args):
            return triton_op(*args)

    args = tuple(t.detach() for t in make(2, 3, device=device))
    with torch.no_grad():
        program = torch.export.export(Model(), args)
    assert "polylib.quadratic_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(*args), quadratic_linear_reference(*args))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast(backend, device):
    args = make(6, device=device)
    args[0] = args[0].detach().bfloat16().requires_grad_()  # the layer before ran under autocast too
    with torch.autocast(device.type, torch.bfloat16):
        y = quadratic_linear(*args, backend=backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert [t.grad.dtype for t in args] == [t.dtype for t in args]
    expected = quadratic_linear_reference(*(t.detach().bfloat16() for t in args))
    torch.testing.assert_close(y, expected, rtol=0, atol=float(expected.abs().max() * TOLERANCE[torch.bfloat16]))


def test_cost_counts_by_hand():
    op_file = import_module("polylib.kernels.quadratic_linear")
    # M=2, K=3, N=5: x 6, parameters 3 * (15 + 5) = 60, y 10, r and g 20; products 3 * 2 * 30.
    inference = op_file.cost(2, 3, 5, torch.bfloat16, "inference")
    assert (inference.bytes, inference.flops) == (2 * (6 + 60 + 10), 180)
    forward = op_file.cost(2, 3, 5, torch.float32)
    assert (forward.bytes, forward.flops) == (4 * (6 + 60 + 10 + 20), 180)
    # Backward reads grad, r, g 30, x 6, weights 45; writes the gradients of x 6 and of all parameters 60.
    backward = op_file.cost(2, 3, 5, torch.float32, "backward")
    assert (backward.bytes, backward.flops) == (4 * (30 + 6 + 45 + 6 + 60), 360)
    assert (forward + backward).flops == 540
    assert forward.floor(96.0, 1e9) == 4.0  # 384 bytes at 96 a second
    assert forward.floor(1e9, 90.0) == 2.0
    with pytest.raises(ValueError, match="direction"):
        op_file.cost(2, 3, 5, torch.float32, "sideways")
    with pytest.raises(ValueError, match="positive"):
        forward.floor(0, 1)


def changed(**new):
    return [new.get(name, t) for name, t in zip(NAMES, make(4), strict=True)]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (changed(x=torch.zeros(4, 6)), ValueError, r"x must have shape .*K = 5.*\(4, 6\)"),
        (changed(x=torch.tensor(1.0)), ValueError, r"x must have shape"),
        (changed(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (changed(x=torch.zeros(4, 5, dtype=torch.int64)), TypeError, "x must have a real floating-point dtype"),
        (changed(x=torch.zeros(4, 5, dtype=torch.complex64)), TypeError, "x must have a real floating-point dtype"),
        (changed(weight_g=None), TypeError, "weight_g must be a torch.Tensor"),
        (changed(weight_g=torch.zeros(7, 5).half()), TypeError, "weight_g must have the dtype of x, torch.float32"),
        (changed(bias_b=torch.zeros(7).double()), TypeError, "bias_b must have the dtype of x"),
        (changed(weight_b=torch.zeros(7, 5, device="meta")), ValueError, "weight_b must be on the device of x, cpu"),
        (changed(weight_r=torch.zeros(7)), ValueError, "weight_r must have shape"),
        (changed(weight_b=torch.zeros(5, 7)), ValueError, r"weight_b must have shape \(N, K\) = \(7, 5\)"),
        (changed(bias_g=torch.zeros(1)), ValueError, r"bias_g must have shape \(N,\) = \(7,\), got \(1,\)"),
        (make(4, k=0), ValueError, "N, K >= 1"),
        (make(4, n=0), ValueError, "N, K >= 1"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(args, error, message, backend):
    with pytest.raises(error, match=message):
        quadratic_linear(*args, backend=backend)


def test_bad_backend(device):
    with pytest.raises(ValueError, match='"auto", "triton" or "reference", got \'cuda\''):
        quadratic_linear(*make(4), backend="cuda")
    with pytest.raises(TypeError, match=r'backend="triton" supports .*torch.float16, got torch.float64'):
        triton_op(*make(4, dtype=torch.float64, device=device))


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={"OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )


CALL = "import torch; from polylib.kernels import quadratic_linear as f; x, w = torch.ones(2, 3), torch.ones(4, 3); "


def test_without_triton():
    code = f"import sys; sys.modules['triton'] = None; {CALL}"
    result = python(code + "print(f(x, w, None, w, None, w, None).sum().item())")
    assert result.stdout.strip() == "96.0", result.stderr
    result = python(code + "f(x, w, None, w, None, w, None, backend='triton')")
    assert 'backend="triton" needs the triton package' in result.stderr


def test_triton_on_a_cpu_needs_the_interpreter():
    pytest.importorskip("triton")
    result = python(CALL + "f(x, w, None, w, None, w, None, backend='triton')")
    assert "set TRITON_INTERPRET=1 before" in result.stderr


def test_bench(tmp_path, capsys, monkeypatch):
    from benchmarks import run as bench

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # seconds instead of half a minute

    bench.main(["quadratic_linear", "--quick", "--json", str(tmp_path / "new" / "bench.json")])
    assert "forward+backward" in capsys.readouterr().out
    record = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    rows = [row for row in record["rows"] if row["contestant"] == "ours"]
    assert {row["direction"] for row in rows} == {"inference", "forward+backward"}
    assert all(row["seconds"] > 0 and row["share_of_ceiling"] > 0 and row["vs_best_peer"] > 0 for row in rows)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["bench.json"]


def test_bench_unknown_op(capsys):
    from benchmarks import run as bench

    with pytest.raises(SystemExit):
        bench.main(["no_such_op"])
    assert "unknown op no_such_op; the ops are " in capsys.readouterr().err
