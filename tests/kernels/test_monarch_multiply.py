"""monarch_multiply: both paths against permutation and block-diagonal matrices in float64, gradients, checks, cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import monarch_multiply

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# k, q, p, l, s, r: the classic one, factors of other sizes, ones that leave the ends of all tiles empty.
SIZES = [(4, 4, 4, 4, 4, 4), (3, 5, 7, 5, 2, 3), (17, 18, 33, 18, 20, 17)]


def matrices(rows, k, q, p, lanes, s, r, dtype=torch.float32, device="cpu", seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = [(rows, k * p), (k, q, p), (lanes, s, r)]
    return [(torch.randn(shape, generator=gen) / shape[-1] ** 0.5).to(device, dtype) for shape in shapes]


def dense(w1, w2):
    """The matrix whose product with a column is that of the op, from its three factors and the last permutation."""
    (k, q, _), (lanes, s, r) = w1.shape, w2.shape
    middle = torch.zeros(lanes * r, k * q, dtype=torch.float64)
    last = torch.zeros(lanes * s, lanes * s, dtype=torch.float64)
    for place in range(k * q):  # entry r l + l' goes to place r of block l'
        middle[place % lanes * r + place // lanes, place] = 1
    for place in range(lanes * s):
        last[place % s * lanes + place // s, place] = 1
    return last @ torch.block_diag(*w2.double().cpu()) @ middle @ torch.block_diag(*w1.double().cpu())


@BACKENDS
@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_dense_matrix(backend, dtype, sizes, device):
    x, w1, w2 = matrices(5, *sizes, dtype=dtype, device=device)
    y = monarch_multiply(x, w1, w2, backend=backend)
    expected = x.double().cpu() @ dense(w1, w2).T
    torch.testing.assert_close(y.double().cpu(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert y.dtype == dtype


def test_the_order_of_the_output_by_hand(device):
    """Two blocks of two each way: 1 and 2 enter the first block, 3 and 4 the second; each block adds, or subtracts."""
    x = torch.tensor([1.0, 2, 3, 4], device=device)
    w1 = torch.tensor([[1.0, 1], [1, -1]], device=device).expand(2, 2, 2)
    w2 = torch.tensor([[[1.0, 0], [0, 1]], [[10, 0], [0, 10]]], device=device)
    # The sums 3 and 7 meet in the first block of w2, the differences -1 and -1 in the second; outputs take turns.
    for backend in ("triton", "reference"):
        assert monarch_multiply(x, w1, w2, backend=backend).tolist() == [3, -10, 7, -10]


@pytest.mark.parametrize("sizes", [(2, 6, 3, 4, 5, 3), (4, 2, 3, 8, 2, 1), (6, 5, 1, 3, 2, 10)], ids=str)
def test_other_middles_than_a_transposition(sizes, device):
    x, w1, w2 = matrices(3, *sizes, device=device)
    torch.testing.assert_close(
        monarch_multiply(x, w1, w2).double().cpu(), x.double().cpu() @ dense(w1, w2).T, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match='backend="triton" needs q = l, and k and l of at most 64'):
        monarch_multiply(x, w1, w2, backend="triton")


def test_complex_factors_give_the_fourier_transform():
    b = 4
    i = torch.arange(b, dtype=torch.float64)
    full = torch.arange(b * b, dtype=torch.float64)
    w1 = torch.exp(-2j * torch.pi * i[:, None] * i / b).expand(b, b, b)
    twiddle = torch.exp(-2j * torch.pi * i[:, None] * i / b**2)  # block, place
    w2 = torch.exp(-2j * torch.pi * i[:, None] * i / b) * twiddle[:, None, :]
    x = torch.randn(3, b * b, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    turned = x.view(3, b, b).mT.reshape(3, b * b)
    assert full.numel() == b * b
    torch.testing.assert_close(monarch_multiply(turned, w1, w2), torch.fft.fft(x))


@BACKENDS
@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_against_float64(backend, dtype, sizes, device):
    tensors = [t.requires_grad_() for t in matrices(20, *sizes, dtype=dtype, device=device)]
    y = monarch_multiply(*tensors, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    found = torch.autograd.grad(y, tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(monarch_multiply(*wide, backend="reference"), wide, grad.double())
    for g, wanted in zip(found, expected, strict=True):
        assert g.dtype == dtype
        assert (g.double() - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()


def test_sums_over_many_rows_are_shared_out_and_the_same_each_time(device):
    tensors = [t.requires_grad_() for t in matrices(70, 3, 2, 4, 2, 5, 3, device=device)]
    first, second = (
        torch.autograd.grad(monarch_multiply(*tensors, backend="triton").square().sum(), tensors) for _ in range(2)
    )
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(monarch_multiply(*wide).square().sum(), wide)
    for g, again, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(g, again)
        torch.testing.assert_close(g.double(), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_definition():
    tensors = [t.double().requires_grad_() for t in matrices(2, 2, 3, 2, 3, 2, 2)]
    assert torch.autograd.gradcheck(monarch_multiply, tensors)
    assert torch.autograd.gradgradcheck(monarch_multiply, tensors)


def test_the_kernels_are_differentiable_once(device):
    tensors = [t.requires_grad_() for t in matrices(2, 2, 2, 2, 2, 2, 2, device=device)]
    y = monarch_multiply(*tensors, backend="triton").square().sum()
    (by_x,) = torch.autograd.grad(y, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        by_x.sum().backward()


@BACKENDS
def test_any_shape_and_strides(backend, device):
    x, w1, w2 = matrices(12, 3, 5, 4, 5, 2, 3, device=device)
    expected = monarch_multiply(x, w1, w2, backend="reference").view(3, 2, 2, 10)
    strided = x.view(3, 2, 2, 12).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    found = monarch_multiply(strided, w1.mT.contiguous().mT, w2.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(monarch_multiply(strided, w1, w2, backend=backend), expected)
    assert monarch_multiply(x[0], w1, w2, backend=backend).shape == (10,)


@BACKENDS
def test_no_rows(backend, device):
    tensors = [t.requires_grad_() for t in matrices(0, 3, 5, 4, 5, 2, 3, device=device)]
    y = monarch_multiply(*tensors, backend=backend)
    assert y.shape == (0, 10)
    grads = torch.autograd.grad(y.sum(), tensors)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors, strict=True))


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_what_is_not_finite_spoils_its_own_row(backend, device):
    x, w1, w2 = matrices(3, 4, 4, 4, 4, 4, 4, device=device)
    x[1, 5] = float("nan")
    y = monarch_multiply(x, w1, w2, backend=backend)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_autocast_vmap_and_compile(device):
    x, w1, w2 = matrices(6, 3, 5, 4, 5, 2, 3, device=device)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert monarch_multiply(x, w1, w2).dtype == torch.bfloat16
    own = torch.func.vmap(monarch_multiply, (0, None, None))(x, w1, w2)
    torch.testing.assert_close(own, monarch_multiply(x, w1, w2))
    torch.library.opcheck(torch.ops.polylib.monarch_multiply.default, [t.requires_grad_() for t in (x, w1, w2)])
    compiled = torch.compile(lambda *t: monarch_multiply(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w1, w2), monarch_multiply(x, w1, w2, backend="triton"))


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.monarch_multiply").cost
    n, b = 4096, 64
    forward = cost(10, b, b, b, b, b, b, torch.bfloat16)
    assert forward.flops == 10 * 4 * n**1.5 and forward.bytes == 2 * (10 * 2 * n + 2 * n**1.5)
    backward = cost(10, 2, 3, 5, 3, 7, 2, torch.float32, backward=True)
    assert backward.bytes == 4 * (10 * (2 * 10 + 21) + 2 * (30 + 42))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 4).long()}, TypeError, "x must have a real floating-point dtype"),
        ({"w1": torch.zeros(2, 2, 2).double()}, TypeError, "w1 must have the dtype of x, torch.float32"),
        ({"w1": torch.zeros(2, 2)}, ValueError, r"w1 must have shape \(k, q, p\) with sizes of at least 1"),
        ({"w2": torch.zeros(2, 0, 2)}, ValueError, r"w2 must have shape \(l, s, r\) with sizes of at least 1"),
        ({"w2": torch.zeros(2, 2, 3)}, ValueError, r"w2 must have shape \(l, s, r\) with l r = k q = 4"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must have shape \(\.\.\., k p\) with k p = 4 as in w1"),
        ({"w2": torch.zeros(2, 2, 2, device="meta")}, ValueError, "w2 must be on the device of x, cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({k: torch.zeros(s) + 0j for k, s in [("x", (1, 4)), ("w1", (2, 2, 2)), ("w2", (2, 2, 2))]}
         | {"backend": "triton"}, TypeError, 'backend="triton" supports'),
    ],
)  # fmt: skip
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        monarch_multiply(**{"x": torch.zeros(2, 4), "w1": torch.zeros(2, 2, 2), "w2": torch.zeros(2, 2, 2)} | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.monarch_multiply").cases(torch.device("cpu"), True):
        found = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0
        for y in found.values():
            torch.testing.assert_close(y, found["reference"])
