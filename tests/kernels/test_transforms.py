"""The definitions under torch.func: forward mode, vmap and second derivatives, as chapters take them of layers."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from polylib import kernels


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(function):
    return lambda *tensors: function(*tensors).square().sum()


def quantize(x, scale):
    return kernels.fake_quantize(x, scale, 3, axis=0)


def quantize_shifted(x, scale):
    return kernels.fake_quantize(x, scale, 3, axis=0, signed=False, zero_point=torch.full_like(scale.detach(), 2.0))


def signs(x, scale):
    return kernels.fake_quantize(x, scale, 1, axis=0, clip=False)


def point(x, int_bits):
    return kernels.fixed_point(x, int_bits, 4)


def point_wrapped(x, int_bits):
    return kernels.fixed_point(x, int_bits, 4, overflow="wrap")


# Codes away from the borders between them, some beyond the last level.
QUANTIZED = [0.5 * torch.tensor([[0.3, -0.7, 1.2], [2.3, -6.4, 0.2]]).double(), torch.tensor([0.5, 0.5]).double()]
POINTED = [QUANTIZED[0], torch.tensor(2.2).double()]  # 1.25 times this is another format
POLYNOMIAL = [normal(2, 4), normal(3, seed=1), normal(1, seed=2)]
MASK = kernels.pack_mask(torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]).bool())
IMAGES = [normal(2, 4, 2, 2), *(normal(4, seed=seed) for seed in (1, 2, 3))]
SMOOTH = {
    "poly_relu": (kernels.poly_relu, POLYNOMIAL),
    "poly_norm": (kernels.poly_norm, POLYNOMIAL),
    "group_rational": (
        lambda x, a, b: kernels.group_rational(x, a, b, 2), [normal(2, 4), normal(2, 6, seed=1), normal(2, 4, seed=2)]
    ),
    "evonorm_s0": (lambda *tensors: kernels.evonorm_s0(*tensors, 2), IMAGES),
    "sine": (lambda w: kernels.sine_binarize(w, 2.5, False), [normal(2, 4)]),
    "masked_gemm_reduce": (
        lambda x, delta: kernels.masked_gemm_reduce(x, delta, MASK), [normal(2, 3), normal(3, 4, seed=1)]
    ),
    "masked_gemm_adjoint": (
        lambda x, r: kernels.masked_gemm_adjoint(x, r, MASK, 4), [normal(2, 3), normal(2, seed=1)]
    ),
    "phm_linear": (kernels.phm_linear, [normal(2, 4), normal(2, 2, 2, seed=1), normal(2, 2, 2, seed=2)]),
    "monarch_multiply": (kernels.monarch_multiply, [normal(2, 4), normal(2, 2, 2, seed=1), normal(2, 2, 2, seed=2)]),
    "kernel_attention_rpe": (
        lambda q, k, v, b: kernels.kernel_attention_rpe(q.exp(), k.exp(), v, b, True),
        [normal(1, 2, 3, 2), normal(1, 2, 3, 2, seed=1), normal(1, 2, 3, 2, seed=2), normal(2, 5, seed=3)],
    ),
    "combiner_attention": (
        lambda *tensors: kernels.combiner_attention(*tensors, 2), [normal(1, 1, 4, 2, seed=seed) for seed in (0, 1, 2)]
    ),
    "s4d_scan": (
        lambda u, v, x: kernels.s4d_scan(u, torch.complex(v, -v), torch.complex(-x.exp(), x)),
        [normal(2, 2, 5), normal(2, 3, seed=1), normal(2, 3, seed=2)],
    ),
    "group_sort": (lambda x: kernels.group_sort(x, 3), [normal(2, 6)]),
    "ibp_linear": (
        lambda c, r, w: torch.cat(kernels.ibp_linear(c, r, w), -1),
        [normal(2, 3), normal(2, 3, seed=1).abs(), normal(2, 3, seed=2)],
    ),
    "interval_affine_relu": (
        lambda c, r, k, t: torch.cat(kernels.interval_affine_relu(c, r, k, t, True)),
        [normal(2, 3), normal(2, 3, seed=1).abs(), normal(3, seed=2), normal(3, seed=3)],
    ),
    "sparse_down": (
        lambda v, w: kernels.sparse_down(v, torch.tensor([[0, 2], [1, 1]]), w), [normal(2, 2), normal(3, 4, seed=1)]
    ),
}  # fmt: skip
STEPPED = {
    "quantize": (quantize, QUANTIZED),
    "quantize_shifted": (quantize_shifted, QUANTIZED),
    "signs": (signs, QUANTIZED),
    "fixed_point": (point, POINTED),
    "fixed_point_wrapped": (point_wrapped, POINTED),
    "square_wave": (lambda w: kernels.sine_binarize(w, 2.5, True), [normal(2, 4)]),
    "stats_quantize": (lambda w: kernels.stats_quantize(w, 3), [normal(2, 4)]),
}
CASES = SMOOTH | STEPPED


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_reverse_mode(name):
    function, tensors = CASES[name]
    every = tuple(range(len(tensors)))
    torch.testing.assert_close(jacfwd(function, every)(*tensors), jacrev(function, every)(*tensors))


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_the_same_in_every_order(name):
    function, tensors = CASES[name]
    every, loss = tuple(range(len(tensors))), squares(function)
    expected = jacrev(jacrev(loss, every), every)(*tensors)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(loss, every), every)(*tensors), expected)
    for i in every:
        for j in every:
            mixed = expected[i][j].reshape(tensors[i].numel(), -1)
            torch.testing.assert_close(mixed, expected[j][i].reshape(tensors[j].numel(), -1).T)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", ["poly_relu", "poly_norm"])
def test_forward_mode_twice_in_one_input(name, position):
    function, tensors = SMOOTH[name]

    def loss(t):
        return squares(function)(*tensors[:position], t, *tensors[position + 1 :])

    t = tensors[position]
    torch.testing.assert_close(jacfwd(jacfwd(loss))(t), jacrev(jacrev(loss))(t))


@pytest.mark.parametrize("name", CASES)
def test_many_at_once_are_the_ones_of_a_loop(name):
    function, tensors = CASES[name]
    every = tuple(range(len(tensors)))
    stacked = [torch.stack([t, 1.25 * t]) for t in tensors]
    gradients = vmap(grad(squares(function), every))(*stacked)
    values, tangents = vmap(lambda *t: jvp(function, t, t))(*stacked)
    for i in range(2):
        each = tuple(t[i] for t in stacked)
        torch.testing.assert_close(tuple(g[i] for g in gradients), grad(squares(function), every)(*each))
        value, tangent = jvp(function, each, each)
        torch.testing.assert_close((values[i], tangents[i]), (value, tangent))


@pytest.mark.parametrize("name", CASES)
def test_autograd_outside_of_vmap(name):
    function, tensors = CASES[name]
    stacked = [torch.stack([t, 1.25 * t]).requires_grad_() for t in tensors]
    found = torch.autograd.grad(vmap(function)(*stacked).square().sum(), stacked)
    for i in range(2):
        each = [t[i].detach().requires_grad_() for t in stacked]
        torch.testing.assert_close([g[i] for g in found], [*torch.autograd.grad(squares(function)(*each), each)])


@pytest.mark.parametrize("name", ["quantize", "quantize_shifted", "fixed_point", "fixed_point_wrapped"])
def test_straight_through_is_a_line_in_input_and_step(name):
    function, tensors = STEPPED[name]
    second = jacrev(jacrev(lambda *t: function(*t).sum(), (0, 1)), (0, 1))(*tensors)
    for row in second:
        for block in row:
            assert not block.any()
