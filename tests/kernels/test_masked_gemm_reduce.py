"""masked_gemm_reduce and its adjoint: both paths against the formulas in float64, registration, checks, cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import (
    masked_gemm_adjoint,
    masked_gemm_adjoint_reference,
    masked_gemm_reduce,
    masked_gemm_reduce_reference,
    pack_mask,
)

# Relative to the sum of the absolute values of all terms, entry by entry. float32: sixteen roundings of 2^-24, for sums
# of up to some thousand terms; float16 and bfloat16: three roundings, of 2^-11 and 2^-8.
TOLERANCE = {torch.float32: 2**-20, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


def make(n, d, P, dtype=torch.float32, device="cpu", seed=0, integers=False):
    """x (n, d), delta (d, P), r (n,) and a mask (n, P); small integers make every sum exact."""
    gen = torch.Generator().manual_seed(seed)

    def new(*shape):
        t = torch.randint(-2, 3, shape, generator=gen) if integers else torch.randn(shape, generator=gen)
        return t.to(device, dtype).requires_grad_()

    return new(n, d), new(d, P), new(n), (torch.rand(n, P, generator=gen) < 0.5).to(device)


def by_hand(x, delta, r, mask):
    """f and its gradient by delta, with r; the adjoint and its gradient by r, with delta: two results, each twice."""
    f, adjoint = (mask * (x @ delta)).sum(1), x.mT @ (mask * r[:, None])
    return [f, adjoint, adjoint, f]


def run(x, delta, r, mask, backend):
    f = masked_gemm_reduce(x, delta, mask, backend=backend)
    adjoint = masked_gemm_adjoint(x, r, mask, delta.shape[1], backend=backend)
    gradients = [*torch.autograd.grad(f, delta, r.detach()), *torch.autograd.grad(adjoint, r, delta.detach())]
    return [f.detach(), gradients[0], adjoint.detach(), gradients[1]]


def assert_near(actual, args):
    *wide, mask = args
    expected = by_hand(*(t.detach().double() for t in wide), mask)
    sizes = by_hand(*(t.detach().double().abs() for t in wide), mask)
    for a, e, size in zip(actual, expected, sizes, strict=True):
        assert a.shape == e.shape and a.dtype == wide[0].dtype
        assert ((a.double() - e).abs() <= TOLERANCE[a.dtype] * size).all()


SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(3, 5, 31, id="less than a word"),
    pytest.param(64, 16, 64, id="one tile"),
    pytest.param(130, 17, 97, id="odd"),
    pytest.param(20, 70, 33, id="several tiles of a row"),
    pytest.param(5, 40, 700, id="columns in parts"),
    pytest.param(600, 3, 40, id="rows in parts"),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "d", "P"), SHAPES)
@BACKENDS
def test_equals_the_formulas_in_float64(backend, n, d, P, dtype, device):
    args = make(n, d, P, dtype, device)
    assert_near(run(*args[:3], pack_mask(args[3]), backend), args)


@BACKENDS
def test_a_mask_of_booleans(backend, device):
    args = make(40, 6, 70, device=device)
    for a, b in zip(run(*args, backend), run(*args[:3], pack_mask(args[3]), backend), strict=True):
        assert torch.equal(a, b)


def test_a_mask_of_numbers_in_the_reference():
    x, delta, r, mask = make(40, 6, 70, torch.float64)
    f, adjoint = by_hand(x, delta, r, mask)[:2]
    torch.testing.assert_close(masked_gemm_reduce_reference(x, delta, mask.double()), f)
    torch.testing.assert_close(masked_gemm_adjoint_reference(x, r, mask.double(), 70), adjoint)


@pytest.mark.parametrize(
    ("n", "d", "P", "precision"), [(270, 4, 40, "highest"), (20, 70, 300, "highest"), (270, 20, 40, "high")]
)
def test_parts_do_not_change_exact_sums(n, d, P, precision, device):
    args = make(n, d, P, device=device, integers=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        actual = run(*args[:3], pack_mask(args[3]), "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for a, e in zip(actual, by_hand(*args), strict=True):
        assert torch.equal(a, e)


@BACKENDS
def test_each_is_the_adjoint_of_the_other(backend, device):
    x, delta, r, mask = make(50, 7, 90, device=device, integers=True)
    f = masked_gemm_reduce(x, delta, mask, backend=backend)
    assert r @ f == (masked_gemm_adjoint(x, r, mask, 90, backend=backend) * delta).sum()


@BACKENDS
def test_a_gated_network(backend, device):
    """With the patterns of the weights themselves, f is the sum of a layer of ReLUs."""
    x, delta, _, _ = make(60, 5, 80, device=device)
    mask = pack_mask(x @ delta >= 0)
    torch.testing.assert_close(masked_gemm_reduce(x, delta, mask, backend=backend), (x @ delta).relu().sum(1))


@BACKENDS
def test_words(backend, device):
    for P in (1, 32, 45):
        mask = make(9, 2, P, device=device)[3]
        words = pack_mask(mask, backend=backend)
        assert words.dtype == torch.int32 and words.shape == (9, -(-P // 32))
        for row, given in zip(mask.tolist(), words.tolist(), strict=True):
            bits = [given[i // 32] >> (i % 32) & 1 for i in range(32 * len(given))]
            assert bits == [*map(int, row), *[0] * (-P % 32)]


@BACKENDS
def test_bits_beyond_the_last_column_count_for_nothing(backend, device):
    *args, mask = make(9, 4, 40, device=device)
    words = pack_mask(mask)
    garbage = words.clone()
    garbage[:, 1] |= -256  # all bits but the lowest 8
    for a, b in zip(run(*args, garbage, backend), run(*args, words, backend), strict=True):
        assert torch.equal(a, b)


@BACKENDS
def test_strides(backend, device):
    x, delta, r, mask = make(30, 8, 80, device=device)
    views = (x[::2, 1:5], delta[:4, ::2], r[1::2], mask[::2, ::2])
    assert_near(run(*views[:3], pack_mask(views[3]), backend), views)
    turned = [x.mT.contiguous().mT, delta.mT.contiguous().mT, r[:1].expand(30)]
    words = pack_mask(mask).mT.contiguous().mT
    assert_near(run(*turned, words, backend), (*turned, mask))


@BACKENDS
def test_empty(backend, device):
    for n, d, P in ((0, 3, 5), (4, 0, 5), (4, 3, 0)):
        x, delta, r, mask = make(n, d, P, device=device)
        for given in (mask, pack_mask(mask, backend=backend)):
            f, by_delta, adjoint, by_r = run(x, delta, r, given, backend)
            assert f.shape == by_r.shape == (n,) and adjoint.shape == by_delta.shape == (d, P)
            assert not any(t.any() for t in (f, by_delta, adjoint, by_r))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
@pytest.mark.parametrize("value", [1e4, -0.0, float("inf"), float("nan")])
@BACKENDS
def test_extreme_values_spoil_what_they_do_in_the_formula(backend, value, device):
    for position in range(3):
        args = [t.detach().clone() for t in make(6, 4, 40, device=device)]
        args[position].view(-1)[2] = value
        args = [*(t.requires_grad_() for t in args[:3]), args[3]]
        for a, e in zip(run(*args, backend), by_hand(*args), strict=True):
            assert torch.equal(a.isfinite(), e.isfinite())
            torch.testing.assert_close(a[a.isfinite()], e[a.isfinite()], rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time(device):
    for n, P in ((3, 260), (260, 3)):
        args = make(n, 3, P, device=device)
        assert all(torch.equal(a, b) for a, b in zip(run(*args, "triton"), run(*args, "triton"), strict=True))


def test_reference_derivatives():
    x, delta, r, mask = make(4, 3, 35, torch.float64)
    words = pack_mask(mask)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, delta: masked_gemm_reduce_reference(x, delta, words), (x, delta))
        assert check(lambda x, r: masked_gemm_adjoint_reference(x, r, words, 35), (x, r))


def test_gradients_of_every_input_and_of_the_gradients(device):
    x, delta, r, mask = make(6, 4, 40, device=device)

    def derivatives(backend):
        results = []
        for y, t in (
            (masked_gemm_reduce(x, delta, mask, backend=backend), delta),
            (masked_gemm_adjoint(x, r, mask, 40, backend=backend), r),
        ):
            first = torch.autograd.grad(y.square().sum(), (x, t), create_graph=True)
            results += [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, t))]
        return results

    for a, e in zip(derivatives("triton"), derivatives("reference"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck(wanted, device):
    x, delta, r, mask = make(3, 4, 40, device=device)
    words, x = pack_mask(mask), x.detach().requires_grad_(wanted[0])
    delta, r = (t.detach().requires_grad_(wanted[1]) for t in (delta, r))
    torch.library.opcheck(torch.ops.polylib.masked_gemm_reduce.default, (x, delta, words))
    torch.library.opcheck(torch.ops.polylib.masked_gemm_adjoint.default, (x, r, words, 40))


def test_torch_func(device):
    x, delta, r, mask = (t.detach() for t in make(6, 4, 40, device=device))
    words, many = pack_mask(mask), torch.stack([delta, 2 * delta])
    f = masked_gemm_reduce(x, delta, words)
    torch.testing.assert_close(torch.vmap(lambda t: masked_gemm_reduce(x, t, words))(many), torch.stack([f, 2 * f]))
    adjoint = torch.func.grad(lambda t: r @ masked_gemm_reduce(x, t, words))(delta)
    torch.testing.assert_close(adjoint, masked_gemm_adjoint(x, r, words, 40))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.vmap(lambda t: masked_gemm_reduce(x, t, words, backend="triton"))(many)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    def function(x, delta, r, words):
        f = masked_gemm_reduce(x, delta, words, backend=backend)
        return masked_gemm_adjoint(x, f * r, words, delta.shape[1], backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 12):
        x, delta, r, mask = make(n, 4, 40, device=device)
        args = (x, delta, r, pack_mask(mask))
        results = [[y, *torch.autograd.grad(y.sum(), args[:3])] for y in (compiled(*args), function(*args))]
        torch.testing.assert_close(*results)


@BACKENDS
def test_autocast(backend, device):
    x, delta, r, mask = make(9, 4, 40, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        f = masked_gemm_reduce(x, delta, mask, backend=backend)
        adjoint = masked_gemm_adjoint(x, r, mask, 40, backend=backend)
    assert adjoint.dtype == torch.bfloat16
    low = [t.detach().bfloat16().double() for t in (x, delta, r)]
    for a, e, size in zip((f, adjoint), by_hand(*low, mask), by_hand(*(t.abs() for t in low), mask), strict=False):
        assert ((a.double() - e).abs() <= TOLERANCE[torch.bfloat16] * size).all()


def test_cost_counts_by_hand():
    module = import_module("polylib.kernels.masked_gemm_reduce")
    cost = module.cost(3, 5, 70, torch.bfloat16)  # 3 rows of 5, 5 rows of 70, 3 sums; 3 rows of 3 words
    assert (cost.bytes, cost.flops) == (2 * (15 + 350 + 3) + 4 * 9, 2 * 3 * 5 * 70)


X, DELTA, R, MASK = (t.detach() for t in make(4, 3, 40))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must have shape \(n, d\), got \(3,\)"),
        ({"delta": DELTA.double()}, TypeError, "delta must have the dtype of x, torch.float32, got torch.float64"),
        ({"delta": DELTA[:2]}, ValueError, r"delta must have shape \(d, P\) with d = 3 as in x, got \(2, 40\)"),
        (
            {"mask": [True]},
            TypeError,
            "mask must be a tensor of torch.bool, or of torch.int32 from pack_mask, got list",
        ),
        ({"mask": MASK.float()}, TypeError, "mask must be a tensor of torch.bool, or .* got torch.float32"),
        ({"mask": MASK[:, 1:]}, ValueError, r"mask must have shape \(n, P\) = \(4, 40\), got \(4, 39\)"),
        ({"mask": pack_mask(MASK)[:, :1]}, ValueError, r"mask must have shape \(n, ceil\(P / 32\)\) = \(4, 2\), got"),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on the device of x, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, '"auto", "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        masked_gemm_reduce(**{"x": X, "delta": DELTA, "mask": MASK} | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"r": R[:3]}, ValueError, r"r must have shape \(n,\) = \(4,\), got \(3,\)"),
        ({"r": R.double()}, TypeError, "r must have the dtype of x"),
        ({"columns": 40.0}, ValueError, "columns must be an integer of at least 0, got 40.0"),
        (
            {"columns": 65, "mask": pack_mask(MASK)},
            ValueError,
            r"mask must have shape \(n, ceil\(P / 32\)\) = \(4, 3\)",
        ),
        ({"x": X[0]}, ValueError, r"x must have shape \(n, d\)"),
    ],
)
def test_bad_arguments_of_the_adjoint(changed, error, message):
    with pytest.raises(error, match=message):
        masked_gemm_adjoint(**{"x": X, "r": R, "mask": MASK, "columns": 40} | changed)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], TypeError, "mask must be a tensor of torch.bool, got list"),
        (MASK.int(), TypeError, "mask must be a tensor of torch.bool, got torch.int32"),
        (MASK[0], ValueError, r"mask must have shape \(n, P\), got \(40,\)"),
    ],
)
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=message):
        pack_mask(mask)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.masked_gemm_reduce")
    for _, _, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        del contestants["eager compiled"]  # tens of seconds
        results = [function(*tensors) for function, tensors in contestants.values()]
        for result in results:
            torch.testing.assert_close(result, results[0])
        assert costs[0].bytes > 0 and costs[1] is None
