"""topk_residual: both paths against a sorted list in numpy, what error feedback asks of them, checks, cost."""

from importlib import import_module

import numpy as np
import pytest
import torch

from polylib.kernels import topk_decompress_, topk_residual_

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
SHAPES = pytest.mark.parametrize(
    ("N", "block", "k"), [(1, 64, 1), (64, 64, 64), (200, 64, 3), (130, 128, 5), (2500, 1024, 30), (2100, 2048, 60)]
)


def vectors(N, dtype=torch.float32, device="cpu", seed=0):
    """A gradient and a state whose difference has many equal magnitudes, and zeros."""
    gen = torch.Generator().manual_seed(seed)
    gradient, state = (torch.randint(-8, 9, (N,), generator=gen).to(device, dtype) / 4 for _ in range(2))
    return gradient, state


def by_numpy(gradient, state, k, block):
    """Indices and values of each block, the largest magnitude first and of equal ones the first."""
    difference = gradient.double().cpu().numpy() - state.double().cpu().numpy()
    indices, values = [], []
    for start in range(0, len(difference), block):
        part = difference[start : start + block]
        chosen = np.sort(np.lexsort((np.arange(len(part)), -np.abs(part)))[:k])
        missing = k - len(chosen)
        indices.append(np.concatenate([chosen + start, np.full(missing, -1)]))
        values.append(np.concatenate([part[chosen], np.zeros(missing)]))
    return np.array(values), np.array(indices)


@BACKENDS
@DTYPES
@SHAPES
def test_the_largest_of_each_block_and_the_state(backend, dtype, N, block, k, device):
    gradient, state = vectors(N, dtype, device)
    expected_values, expected_indices = by_numpy(gradient, state, k, block)
    expected_state = state.double()
    for value, index in zip(expected_values.ravel(), expected_indices.ravel(), strict=True):
        if index >= 0:
            expected_state[index] += value
    values, indices = topk_residual_(gradient, state, k, block, backend=backend)
    assert (values.dtype, indices.dtype) == (dtype, torch.int32)
    # Quarters below 4: exact in every dtype.
    assert np.array_equal(indices.cpu().numpy(), expected_indices)
    assert np.array_equal(values.double().cpu().numpy(), expected_values)
    assert torch.equal(state.double(), expected_state)


@BACKENDS
@SHAPES
def test_what_is_left_is_a_contraction(backend, N, block, k, device):
    """The error is at most 1 - k / block of what it was, in each block that is whole."""
    gen = torch.Generator().manual_seed(1)
    gradient, state = (torch.randn(N, generator=gen).to(device) for _ in range(2))
    before = (gradient - state).square()
    topk_residual_(gradient, state, k, block, backend=backend)
    after = (gradient - state).square()
    for start in range(0, N, block):
        share = 1 - min(k / min(block, N - start), 1)
        part = slice(start, start + block)
        assert after[part].sum() <= share * before[part].sum() + 1e-6


@BACKENDS
def test_all_of_a_block_is_sent(backend, device):
    gradient, state = vectors(200, device=device)
    topk_residual_(gradient, state, 64, 64, backend=backend)
    assert torch.equal(state, gradient)


@BACKENDS
def test_both_sides_add_what_was_rounded(backend, device):
    gen = torch.Generator().manual_seed(2)
    gradient, state = torch.randn(300, generator=gen).to(device), torch.zeros(300, device=device)
    receiver = state.clone()
    for _ in range(3):
        values, indices = topk_residual_(gradient, state, 20, 128, dtype=torch.bfloat16, backend=backend)
        assert values.dtype == torch.bfloat16
        topk_decompress_(receiver, values[None], indices[None], block=128, backend=backend)
    torch.testing.assert_close(receiver, state, rtol=0, atol=0)
    assert 0 < (gradient - state).norm() < gradient.norm()


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_what_is_not_finite_is_sent_first(backend, device):
    gradient, state = vectors(128, device=device)
    gradient[7], gradient[40], gradient[100] = float("inf"), float("nan"), float("-inf")
    values, indices = topk_residual_(gradient, state, 3, 128, backend=backend)
    assert indices.tolist() == [[7, 40, 100]]
    assert values[0, 0] == float("inf") and values[0, 1].isnan() and values[0, 2] == float("-inf")
    gradient, state = vectors(128, device=device)
    gradient[20:] = float("nan")
    assert topk_residual_(gradient, state, 4, 128, backend=backend)[1].tolist() == [[20, 21, 22, 23]]


@BACKENDS
@pytest.mark.parametrize("size", [1e-40, 1e-3, 1e30])
def test_magnitudes_near_each_other_are_told_apart(backend, size, device):
    gradient = size * (1 + torch.arange(64, device=device) / 64)[torch.randperm(64)]
    state = torch.zeros(64, device=device)
    values, _ = topk_residual_(gradient, state, 5, 64, backend=backend)
    assert torch.equal(values[0].sort().values, gradient.sort().values[-5:])


@BACKENDS
def test_no_difference_sends_zeros(backend, device):
    gradient, _ = vectors(100, device=device)
    values, indices = topk_residual_(gradient, gradient.clone(), 2, 64, backend=backend)
    assert values.count_nonzero() == 0 and indices.tolist() == [[0, 1], [64, 65]]


@BACKENDS
def test_a_strided_gradient(backend, device):
    gradient, state = vectors(300, device=device)
    other = state[::2].clone()
    expected = topk_residual_(gradient[::2].clone(), state[::2].clone(), 4, 64, backend="reference")
    found = topk_residual_(gradient[::2], other, 4, 64, backend=backend)
    assert all(map(torch.equal, found, expected))


@BACKENDS
def test_no_entries(backend, device):
    none = torch.zeros(0, device=device)
    values, indices = topk_residual_(none, none.clone(), 4, 64, backend=backend)
    assert values.shape == indices.shape == (0, 4)
    topk_decompress_(none, values[None], indices[None], block=64, backend=backend)
    total = torch.ones(3, device=device)
    topk_decompress_(total, total.new_zeros(0, 1, 2), total.new_zeros(0, 1, 2).int(), block=64, backend=backend)
    assert total.tolist() == [1, 1, 1]


@BACKENDS
@DTYPES
def test_the_sum_of_messages(backend, dtype, device):
    """Several ranks name the same entries; all that is added is exact in every dtype."""
    N, block, k, ranks = 300, 128, 9, 4
    gen = torch.Generator().manual_seed(3)
    total = torch.randint(-4, 5, (N,), generator=gen).to(device, dtype)
    values = torch.randint(-4, 5, (ranks, 3, k), generator=gen).to(device, dtype)
    chosen = torch.stack([torch.randperm(40, generator=gen)[:k] for _ in range(3 * ranks)]).view(ranks, 3, k)
    indices = (chosen + block * torch.arange(3)[:, None]).int().to(device)
    indices[:, 2, 5:] = -1
    weights = torch.tensor([0.5, 0.25, 0.25, 1.0], device=device)
    expected = total.double()
    for rank in range(ranks):
        for value, index in zip(values[rank].flatten().tolist(), indices[rank].flatten().tolist(), strict=True):
            if index >= 0:
                expected[index] += weights[rank].double() * value
    topk_decompress_(total, values, indices, weights, block, backend=backend)
    assert torch.equal(total.double(), expected)


@BACKENDS
def test_the_mean_is_the_default_and_ranks_come_in_their_order(backend, device):
    """1e8 + 1 - 1e8 is 0 in float32, and 1e8 - 1e8 + 1 is 1."""
    values = torch.tensor([4e8, 4.0, -4e8, 4.0], device=device).view(4, 1, 1)
    indices = torch.zeros(4, 1, 1, dtype=torch.int32, device=device)
    total = torch.zeros(5, device=device)
    topk_decompress_(total, values, indices, block=64, backend=backend)
    assert total.tolist() == [1, 0, 0, 0, 0]


@BACKENDS
def test_what_lies_outside_of_its_block_adds_nothing(backend, device):
    total = torch.zeros(100, device=device)
    values = torch.ones(1, 2, 3, device=device)
    indices = torch.tensor([[[0, 64, -7], [63, 99, 100]]], dtype=torch.int32, device=device)
    topk_decompress_(total, values, indices, block=64, backend=backend)
    assert total.nonzero().flatten().tolist() == [0, 99]


@DTYPES
def test_error_feedback_over_rounds_is_the_same_on_both_paths(dtype, device):
    """What two clients send, what the server adds up, and what both know, over five rounds."""
    found = []
    for backend in ("triton", "reference"):
        states = [torch.zeros(200, device=device, dtype=dtype) for _ in range(2)]
        total = torch.zeros(200, device=device)
        for round_ in range(5):
            gradients = [vectors(200, dtype, device, seed=10 * round_ + client)[0] for client in range(2)]
            messages = [topk_residual_(g, s, 6, 64, backend=backend) for g, s in zip(gradients, states, strict=True)]
            values, indices = (torch.stack(parts) for parts in zip(*messages, strict=True))
            topk_decompress_(total, values, indices, block=64, backend=backend)
        torch.testing.assert_close(total, (states[0].float() + states[1].float()) / 2, rtol=1e-6, atol=1e-6)
        found += [torch.stack(states), total]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_opcheck(device):
    gradient, state = vectors(200, device=device)
    torch.library.opcheck(torch.ops.polylib.topk_residual.default, (gradient, state, 3, 64, torch.float32))
    values, indices = topk_residual_(gradient, state, 3, 64)
    args = (state, values[None], indices[None], torch.ones(1, device=device), 64)
    torch.library.opcheck(torch.ops.polylib.topk_decompress.default, args)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph(backend, device):
    def round_(gradient, state, total):
        values, indices = topk_residual_(gradient, state, 3, 64, backend=backend)
        topk_decompress_(total, values[None], indices[None], block=64, backend=backend)
        return values, indices

    # The reference asks which slots are filled, and so has a shape that hangs on values: it breaks the graph.
    fullgraph = backend == "triton" or torch.cuda.is_available()
    compiled = torch.compile(round_, fullgraph=fullgraph, backend="aot_eager")
    (gradient, state), total = vectors(200, device=device), torch.zeros(200, device=device)
    expected = [t.clone() for t in (state, total)]
    sent = round_(gradient, *expected)
    assert all(map(torch.equal, compiled(gradient, state, total), sent))
    assert torch.equal(state, expected[0]) and torch.equal(total, expected[1])


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.topk_residual").cost
    # 200 entries in four blocks of 64; 12 are sent: each a value and an index, and an entry of the state.
    assert cost(200, 3, 64, torch.bfloat16).bytes == 2 * (2 * 200 + 2 * 12) + 4 * 12
    # Two messages of 12: each a value, an index, an entry of the sum in and out; and a weight.
    assert cost(200, 3, 64, torch.float32, ranks=2).bytes == 2 * (12 * (4 + 4 + 8) + 4)
    # The last block has one entry, and sends no more.
    assert cost(65, 3, 64, torch.float32).bytes == 4 * (2 * 65 + 2 * 4) + 4 * 4


ONE = torch.zeros(100)
GOOD = {"gradient": ONE, "state": ONE.clone(), "k": 2, "block": 64}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"gradient": [1.0]}, TypeError, "gradient must be a torch.Tensor, got list"),
        ({"gradient": torch.zeros(2, 3)}, ValueError, r"gradient must have shape \(N,\), got \(2, 3\)"),
        ({"state": torch.zeros(99)}, ValueError, r"state must have shape that of gradient = \(100,\), got \(99,\)"),
        ({"state": torch.zeros(200)[::2]}, ValueError, "state must be contiguous, since it is changed in place"),
        ({"state": torch.zeros(100, device="meta")}, ValueError, "state must be on the device of gradient, cpu"),
        ({"state": torch.zeros(100).long()}, TypeError, "state must have a real floating-point dtype"),
        ({"k": 0}, ValueError, "k must be an integer from 1 to 64, got 0"),
        ({"k": 65}, ValueError, "k must be an integer from 1 to 64, got 65"),
        ({"block": 0}, ValueError, "block must be an integer of at least 1, got 0"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a real floating-point dtype, got torch.int8"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        topk_residual_(**GOOD | changed)


MESSAGE = {
    "total": ONE,
    "values": torch.zeros(3, 2, 5),
    "indices": torch.zeros(3, 2, 5, dtype=torch.int32),
    "weights": torch.ones(3),
    "block": 64,
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"total": torch.zeros(200)[::2]}, ValueError, "total must be contiguous"),
        ({"values": torch.zeros(3, 1, 5)}, ValueError, r"values must have shape \(R, 2, k\), k from 1 to 64, got"),
        ({"values": torch.zeros(2, 5)}, ValueError, r"values must have shape \(R, 2, k\)"),
        ({"indices": torch.zeros(3, 2, 5).long()}, TypeError, "indices must be a tensor of torch.int32, got"),
        ({"indices": torch.zeros(3, 2, 4).int()}, ValueError, "indices must have shape that of values"),
        ({"weights": torch.ones(2)}, ValueError, r"weights must have shape \(R,\) = \(3,\), got \(2,\)"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights must be on the device of total, cpu"),
        ({"block": 100}, ValueError, r"values must have shape \(R, 1, k\)"),
    ],
)
def test_bad_messages(changed, error, message):
    with pytest.raises(error, match=message):
        topk_decompress_(**MESSAGE | changed)


def test_a_block_that_the_kernels_do_not_have(device):
    gradient, state = vectors(200, device=device)
    with pytest.raises(ValueError, match=r"block must be one of \(64, .* got 100"):
        topk_residual_(gradient, state, 3, 100, backend="triton")
    assert topk_residual_(gradient, state, 3, 100)[0].shape == (2, 3)


def test_bench_cases_run():
    for label, _, costs, contestants in import_module("benchmarks.ops.topk_residual").cases(torch.device("cpu"), True):
        after = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0 and costs[1] is None
        if label.startswith("sum"):
            assert all(torch.allclose(found, after["reference"]) for found in after.values())
        else:
            same = torch.equal(after["torch.topk a block"][1].sort().values, after["reference"][1])
            assert same and torch.equal(after["ours"][1], after["reference"][1])
