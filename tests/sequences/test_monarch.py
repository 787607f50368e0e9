"""Block-diagonal and Monarch layers against matrices that are put together block by block, and what they start as."""

import math

import pytest
import torch

from polylib.kernels import monarch_multiply, monarch_multiply_reference
from polylib.kernels.monarch_multiply import cost
from polylib.sequences import BlockDiagonalLinear, MonarchLinear, monarch_dense


def by_blocks(w1, w2):
    """The Monarch matrix as a product: block-diagonal, a transposition, block-diagonal, a transposition."""
    (k, q, _), (l, s, r) = w1.shape, w2.shape  # noqa: E741 - the paper's letters
    first, second = torch.block_diag(*w1), torch.block_diag(*w2)
    gather = torch.arange(k * q).view(r, l).T.flatten()  # h in the order (l, r)
    scatter = torch.arange(l * s).view(l, s).T.flatten()  # y in the order (s, l)
    return (second @ first[gather])[scatter]


SHAPES = [((2, 2, 2), (2, 2, 2)), ((3, 4, 5), (2, 7, 6)), ((1, 6, 4), (3, 1, 2)), ((4, 1, 1), (1, 3, 4))]


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_the_product_is_two_block_diagonal_ones(first, second):
    torch.manual_seed(0)
    w1, w2 = torch.randn(first).double(), torch.randn(second).double()
    x = torch.randn(2, 3, first[0] * first[2]).double()
    matrix = by_blocks(w1, w2)
    torch.testing.assert_close(monarch_dense(w1, w2), matrix)
    torch.testing.assert_close(monarch_multiply(x, w1, w2), x @ matrix.T)
    torch.testing.assert_close(
        monarch_multiply_reference(x + 1j * x, w1 + 0j, w2 - 1j), (x + 1j * x) @ by_blocks(w1 + 0j, w2 - 1j).T
    )


def test_the_order_of_the_outputs_by_hand():
    """The second factor of 2 blocks with outputs (s): its block 0 gives the outputs 0, 2, 4."""
    w1, w2 = torch.ones(2, 2, 1), torch.zeros(2, 3, 2)
    w2[0] = 1.0
    assert monarch_multiply(torch.tensor([1.0, 10.0]), w1, w2).tolist() == [11, 0, 11, 0, 11, 0]


def test_gradients_of_the_product():
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 6), (2, 4, 3), (4, 2, 2))]
    assert torch.autograd.gradcheck(monarch_multiply_reference, inputs)


def test_cost_of_roots():
    n, b = 4096, 64
    found = cost(16384, b, b, b, b, b, b, torch.bfloat16)
    assert found.flops == 4 * 16384 * n * b
    assert found.bytes == 2 * (2 * 16384 * n + 2 * n * b)
    assert cost(1, b, b, b, b, b, b, torch.bfloat16, backward=True).flops == 2.5 * found.flops / 16384


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs", "blocks"), [(8, 8, 4), (8, 12, 2), (7, 5, 3), (2, 9, 4), (5, 1, 1)])
@pytest.mark.parametrize("kind", [BlockDiagonalLinear, MonarchLinear])
def test_dense_weight(kind, inputs, outputs, blocks, bias):
    torch.manual_seed(0)
    layer = kind(inputs, outputs, blocks, bias=bias).double()
    x = torch.randn(3, 2, inputs, dtype=torch.float64)
    weight = torch.block_diag(*layer.weight) if kind is BlockDiagonalLinear else by_blocks(layer.w1, layer.w2)
    weight = weight[:outputs, :inputs]
    torch.testing.assert_close(layer.to_dense(), weight)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_one_block_is_a_dense_layer():
    torch.manual_seed(0)
    layer = BlockDiagonalLinear(6, 4, 1)
    dense = torch.nn.Linear(6, 4)
    with torch.no_grad():
        dense.weight.copy_(layer.weight[0])
        dense.bias.copy_(layer.bias)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), dense(x))


def test_weights_and_where_they_start():
    torch.manual_seed(0)
    n, b = 400, 20
    layer = MonarchLinear(n, n, b)
    assert layer.w1.numel() + layer.w2.numel() == 2 * n * b
    assert BlockDiagonalLinear(n, 2 * n, 4).weight.numel() == n * n / 2
    for weight, bound in ((layer.w1, b**-0.5), (layer.bias, n**-0.5), (BlockDiagonalLinear(n, 8, 4).weight, 0.1)):
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    y = layer(torch.randn(200, n)) - layer.bias  # each factor leaves a third of the variance
    assert y.var().item() == pytest.approx(1 / 9, rel=0.1)


def test_bad_input():
    for kind in (BlockDiagonalLinear, MonarchLinear):
        for arguments, words in (((0, 4), "in_features"), ((4, 1.5), "out_features"), ((4, 4, 0), "nblocks")):
            with pytest.raises(ValueError, match=f"{words} must be an integer"):
                kind(*arguments)
        for shape in ((3, 5), ()):
            with pytest.raises(ValueError, match=r"x must have shape \(..., 4\)"):
                kind(4, 4)(torch.zeros(shape))
    with pytest.raises(ValueError, match="w1 must have shape"):
        monarch_dense(torch.zeros(2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError):
        monarch_multiply(torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, 2))
    with pytest.raises(ValueError):
        monarch_multiply(torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(2, 2, 3))
