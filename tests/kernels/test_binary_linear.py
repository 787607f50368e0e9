"""binary_linear and pack_signs: both paths against sums of whole numbers, bit by bit; registration, checks, cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import binary_linear, binary_linear_reference, pack_signs, pack_signs_reference, unpack_signs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


def make(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Random numbers, a tenth of them zeros of both signs."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen)
    return torch.where(torch.rand(shape, generator=gen) < 0.1, 0 * x, x).to(device, dtype)


def signs(x):
    return torch.where(x >= 0, 1, -1)


def words_by_hand(x):
    """Each word from a text of zeros and ones, the highest bit first, as a number with a sign."""
    rows = []
    for row in (x.reshape(-1, x.shape[-1]) >= 0).tolist():
        row = row + [False] * (-len(row) % 32)
        texts = ["".join("01"[bit] for bit in reversed(row[i : i + 32])) for i in range(0, len(row), 32)]
        rows.append([int(text, 2) - (2**32 if text[0] == "1" else 0) for text in texts])
    return torch.tensor(rows, dtype=torch.int32, device=x.device).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (32,), (3, 33), (70, 5), (2, 3, 64), (2, 4100)], ids=str)
@BACKENDS
def test_words(backend, shape, dtype, device):
    x = make(*shape, dtype=dtype, device=device)
    words = pack_signs(x, backend=backend)
    assert words.dtype == torch.int32
    assert torch.equal(words, words_by_hand(x))
    assert torch.equal(unpack_signs(words, shape[-1]), signs(x).float())


# Up to eight rows a program holds one of them, of 128 words at a time; beyond, tiles of 32 by 32, 8 words at a time.
SIZES = [(1, 1, 1), (1, 4200, 30), (3, 70, 70), (8, 100, 2100), (9, 33, 40), (70, 300, 65), (32, 256, 32), (40, 520, 3)]


@pytest.mark.parametrize(("rows", "features", "outputs"), SIZES)
@BACKENDS
def test_equals_the_product_of_signs_in_integers(backend, rows, features, outputs, device):
    x, w = make(rows, features, device=device), make(outputs, features, device=device, seed=1)
    y = binary_linear(pack_signs(x), pack_signs(w), features, backend=backend)
    expected = (signs(x).cpu().long() @ signs(w).cpu().long().T).to(device)
    assert y.dtype == torch.int32 and torch.equal(y.long(), expected)


@pytest.mark.parametrize("rows", [2, 20])
@BACKENDS
def test_all_alike_and_all_opposed(backend, rows, device):
    for features in (1, 31, 32, 33, 1000):
        w = pack_signs(torch.tensor([[1.0], [-1.0]], device=device).expand(2, features))
        y = binary_linear(pack_signs(torch.ones(rows, features, device=device)), w, features, backend=backend)
        assert torch.equal(y, torch.tensor([[features, -features]] * rows, device=device, dtype=torch.int32))


@BACKENDS
def test_the_product_of_a_layer_that_was_trained_with_numbers(backend, device):
    """A convolution of signs as windows and a product: equal to that of the numbers, with windows of ones around."""
    x, w = make(2, 5, 20, device=device), make(4, 5, 3, device=device, seed=1)
    padded = torch.nn.functional.pad(signs(x).float(), (1, 1), value=1.0)
    expected = torch.nn.functional.conv1d(padded, signs(w).float())
    windows = padded.unfold(2, 3, 1).permute(0, 2, 1, 3).flatten(2)
    packed = pack_signs(windows, backend=backend), pack_signs(w.flatten(1), backend=backend)
    y = binary_linear(*packed, 15, backend=backend)
    assert torch.equal(y.mT.float(), expected)


@BACKENDS
def test_leading_dimensions_and_strides(backend, device):
    x, w = make(4, 6, 70, device=device), make(10, 70, device=device, seed=1)
    for view in (x.transpose(0, 1), x[::2, 1:4], x[:1].expand(3, 6, 70), x[..., ::2].repeat(1, 1, 2)):
        assert torch.equal(pack_signs(view, backend=backend), words_by_hand(view))
    a, b = pack_signs(x).transpose(0, 1), pack_signs(w)
    y = binary_linear(a, b.t().contiguous().t()[::2], 70, backend=backend)
    assert torch.equal(y, binary_linear(a.contiguous(), b, 70, backend=backend)[..., ::2])


@BACKENDS
def test_empty(backend, device):
    words = pack_signs(torch.zeros(0, 3, 40, device=device), backend=backend)
    assert words.shape == (0, 3, 2)
    assert binary_linear(words, words.new_zeros(5, 2), 40, backend=backend).shape == (0, 3, 5)
    assert binary_linear(words.new_zeros(3, 2), words.new_zeros(0, 2), 40, backend=backend).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BACKENDS
def test_signs_of_extreme_values(backend, dtype, device):
    nan, inf = float("nan"), float("inf")
    tiny = torch.finfo(dtype).tiny / 2
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -nan, tiny, -tiny], device=device).to(dtype)
    assert pack_signs(x, backend=backend).tolist() == [0b01000111]


@BACKENDS
def test_autocast_changes_nothing(backend, device):
    """A sum of 601 is none of bfloat16's numbers."""
    words = pack_signs(torch.ones(1, 601, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        assert binary_linear(words, words, 601, backend=backend) == 601


def test_no_gradient(device):
    x = make(3, 40, device=device).requires_grad_()
    for backend in ("triton", "reference"):
        words = pack_signs(x, backend=backend)
        assert not words.requires_grad and not binary_linear(words, words, 40, backend=backend).requires_grad


def test_opcheck(device):
    x, w = make(3, 40, device=device), make(5, 40, device=device)
    torch.library.opcheck(torch.ops.polylib.pack_signs.default, (x,))
    for rows in (3, 9):
        words = pack_signs(x).expand(3, 2) if rows == 3 else pack_signs(make(9, 40, device=device))
        torch.library.opcheck(torch.ops.polylib.binary_linear.default, (words, pack_signs(w), 40))


def test_torch_func(device):
    x, w = make(4, 6, 40, device=device), make(5, 40, device=device)
    words = torch.vmap(pack_signs)(x)
    assert torch.equal(words, pack_signs_reference(x))
    y = torch.vmap(lambda a: binary_linear(a, pack_signs(w), 40))(words)
    assert torch.equal(y, binary_linear_reference(words, pack_signs(w), 40))
    with pytest.raises(RuntimeError, match='"auto" takes the reference there'):
        torch.vmap(lambda x: pack_signs(x, backend="triton"))(x)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph_with_changing_row_count(backend, device):
    w = pack_signs(make(5, 40, device=device))

    def layer(x):
        return binary_linear(pack_signs(x, backend=backend), w, 40, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 12):
        x = make(rows, 40, device=device)
        assert torch.equal(compiled(x), layer(x))


def test_cost_counts_by_hand():
    module = import_module("polylib.kernels.binary_linear")
    product = module.cost(3, 70, 5)  # 3 and 5 rows of 3 words, 15 sums
    assert (product.bytes, product.flops) == (4 * (9 + 15 + 15), 2 * 3 * 5 * 70)
    packing = module.cost_of_packing(3, 70, torch.bfloat16)
    assert (packing.bytes, packing.flops) == (2 * 210 + 4 * 9, 630)


GOOD = {"x_words": torch.zeros(2, 3, dtype=torch.int32), "w_words": torch.zeros(4, 3, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x_words": [1]}, TypeError, "x_words must be a torch.Tensor, got list"),
        ({"w_words": torch.zeros(4, 3)}, TypeError, "w_words must have dtype torch.int32, from pack_signs, got"),
        ({"features": 64}, ValueError, r"x_words must have shape \(..., L\) with L = 2 for 64 features, got \(2, 3\)"),
        ({"x_words": torch.tensor(1, dtype=torch.int32)}, ValueError, r"x_words must have shape \(..., L\) with L = 3"),
        ({"w_words": torch.zeros(4, 2, dtype=torch.int32)}, ValueError, r"w_words must have shape \(N, L\) with L = 3"),
        ({"w_words": torch.zeros(3, dtype=torch.int32)}, ValueError, r"w_words must have shape \(N, L\) with L = 3"),
        (
            {"w_words": torch.zeros(4, 3, dtype=torch.int32, device="meta")},
            ValueError,
            "w_words must be on the device of x_words, cpu, got meta",
        ),
        ({"features": 0}, ValueError, "features must be an integer from 1 to 536870912, got 0"),
        ({"features": 70.0}, ValueError, "features must be an integer from 1 to 536870912, got 70.0"),
        ({"backend": "cuda"}, ValueError, '"auto", "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        binary_linear(**{"features": 70} | GOOD | changed)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "x must have a real floating-point dtype"),
        (torch.tensor(1.0), ValueError, r"x must have shape \(..., K\) with K >= 1, got \(\)"),
        (torch.zeros(2, 0), ValueError, r"x must have shape \(..., K\) with K >= 1, got \(2, 0\)"),
    ],
)
def test_bad_signs(x, error, message):
    with pytest.raises(error, match=message):
        pack_signs(x)


def test_bench_cases_run():
    op_file = import_module("benchmarks.ops.binary_linear")
    for _, _dtype, costs, contestants in op_file.cases(torch.device("cpu"), quick=True):
        int8 = contestants.pop("int8")
        results = [function(*tensors) for function, tensors in contestants.values()]
        assert all(torch.equal(r.int(), results[0]) for r in results)
        if int8[1][0].shape[0] > 16:  # fewer rows PyTorch refuses
            assert torch.equal(int8[0](*int8[1]), results[0])
        assert costs[0].bytes > 0 and costs[1] is None
