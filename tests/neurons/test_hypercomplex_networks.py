import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.kernels import kronecker_weight
from polylib.neurons import PHConv1d, PHConv2d, PHConv3d, PHMLinear, algebra_angle, algebra_matrices

DOUBLE = {"dtype": torch.float64}
CONVOLUTIONS = [(PHConv1d, F.conv1d), (PHConv2d, F.conv2d), (PHConv3d, F.conv3d)]


def hamilton(p, q):
    """The product of quaternions, written out; the components are the first axis."""
    a, b, c, d = p
    e, f, g, h = q
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def test_quaternion_layer_is_the_hamilton_product():
    layer = PHMLinear(4, 4, 4, bias=False, algebra="quaternion", **DOUBLE)
    x = torch.randn(10, 4, **DOUBLE)
    torch.testing.assert_close(layer(x), hamilton(layer.S.flatten()[:, None], x.T).T)
    wide = PHMLinear(8, 12, 4, bias=False, algebra="quaternion", **DOUBLE)  # blocks: a matrix of quaternions
    x = torch.randn(5, 8, **DOUBLE)
    blocks = x.unflatten(1, (4, 2))
    product = sum(hamilton(wide.S[:, :, j][:, None], blocks[:, :, j].T[..., None]) for j in range(2))
    torch.testing.assert_close(wide(x), product.transpose(0, 1).flatten(1))


def test_a_unit_of_quaternions_multiplies_norms():
    layer = PHMLinear(4, 4, 4, bias=False, algebra="quaternion", **DOUBLE)
    x = torch.randn(10, 4, **DOUBLE)
    torch.testing.assert_close(layer(x).norm(dim=1), layer.S.norm() * x.norm(dim=1))


def test_complex_layer_is_complex_multiplication():
    layer = PHMLinear(6, 4, 2, bias=False, algebra="complex", **DOUBLE)
    x = torch.randn(5, 6, **DOUBLE)
    product = torch.complex(x[:, :3], x[:, 3:]) @ torch.complex(layer.S[0], layer.S[1]).T
    torch.testing.assert_close(layer(x), torch.cat([product.real, product.imag], 1))


def test_n_of_one_is_the_real_layer():
    layer = PHMLinear(6, 4, 1)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.A[0] * layer.S[0], layer.bias))


def test_components_are_blocks_of_neighbours():
    layer = PHMLinear(6, 4, 2, **DOUBLE)
    expected = sum(torch.kron(a, s) for a, s in zip(layer.A, layer.S, strict=True))
    torch.testing.assert_close(layer.weight(), expected)
    interleaved = sum(torch.kron(s, a) for a, s in zip(layer.A, layer.S, strict=True))
    assert not torch.allclose(layer.weight(), interleaved)


def test_mixing_the_algebra_and_undoing_it_changes_nothing():
    layer, M = PHMLinear(9, 6, 3, **DOUBLE), torch.randn(3, 3, **DOUBLE)
    A = torch.einsum("kl,lab->kab", M, layer.A)
    S = torch.einsum("kl,lij->kij", torch.linalg.inv(M).T, layer.S)
    torch.testing.assert_close(kronecker_weight(A, S), layer.weight())
    assert algebra_angle(A, layer.A) < 1e-10


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_number_of_parameters(n):
    assert sum(p.numel() for p in PHMLinear(16, 24, n).parameters()) == n**3 + 16 * 24 // n + 24
    assert sum(p.numel() for p in PHConv2d(16, 24, 3, n).parameters()) == n**3 + 16 * 24 * 9 // n + 24


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dimensions", "make", "convolve"), [(i, *pair) for i, pair in enumerate(CONVOLUTIONS, 1)])
def test_convolutions_use_the_kronecker_weight_and_the_bias(dimensions, make, convolve, bias):
    layer = make(4, 6, 3, 2, stride=2, padding=1, bias=bias, **DOUBLE)
    x = torch.randn(2, 4, *[7, 6, 5][:dimensions], **DOUBLE)
    weight = torch.empty(6, 4, *[3] * dimensions, **DOUBLE)
    for place in torch.cartesian_prod(*[torch.arange(3)] * dimensions).view(-1, dimensions).tolist():
        pixel = (..., *place)
        weight[pixel] = sum(torch.kron(a, f) for a, f in zip(layer.A, layer.S[pixel], strict=True))
    torch.testing.assert_close(layer(x), convolve(x, weight, layer.bias, 2, 1))


def test_a_convolution_of_one_pixel_is_the_linear_layer():
    convolution, linear = PHConv2d(6, 4, 1, 2, **DOUBLE), PHMLinear(6, 4, 2, **DOUBLE)
    linear.load_state_dict({k: v[..., 0, 0] if k == "S" else v for k, v in convolution.state_dict().items()})
    x = torch.randn(2, 6, 3, 5, **DOUBLE)
    torch.testing.assert_close(convolution(x), linear(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("algebra", [None, "quaternion"])
def test_initial_variance_is_one_over_the_fan_in(algebra):
    torch.manual_seed(0)
    weights = torch.cat([PHMLinear(256, 256, 4, algebra=algebra).weight().flatten() for _ in range(20)])
    assert 0.8 < 256 * weights.var() < 1.2
    pixels = torch.cat([PHConv2d(64, 64, 3, 4, algebra=algebra).weight().flatten() for _ in range(20)])
    assert 0.8 < 64 * 9 * pixels.var() < 1.2


def test_a_frozen_algebra_stays():
    layer = PHMLinear(8, 8, 4, algebra="quaternion", learn_algebra=False)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.A.grad is None and layer.S.grad is not None
    assert torch.equal(layer.A, algebra_matrices("quaternion"))


def test_units_of_the_algebras():
    one, i, j, k = algebra_matrices("quaternion")
    assert torch.equal(one, torch.eye(4))
    for unit in (i, j, k):
        assert torch.equal(unit @ unit, -one)
    assert torch.equal(i @ j, k) and torch.equal(j @ i, -k)
    one, i = algebra_matrices("complex")
    assert torch.equal(i @ i, -one)
    assert algebra_matrices("real").tolist() == [[[1.0]]]


def test_algebra_angle():
    a = algebra_matrices("quaternion")
    assert algebra_angle(a, a) < 1e-7
    turned = a.clone()
    turned[3] = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))  # orthogonal to all four
    assert abs(algebra_angle(a, turned) - torch.pi / 2) < 1e-6
    half = a.clone()
    half[3] = a[3] + turned[3]  # of equal norms: 45 degrees
    assert abs(algebra_angle(a, half) - torch.pi / 4) < 1e-6
    assert abs(algebra_angle(a, a + 1e-6 * turned) - algebra_angle(a + 1e-6 * turned, a)) < 1e-8


def test_state_dict_round_trip_and_a_changed_parameter_count_at_once():
    layer = PHMLinear(8, 4, 2).eval()
    twin, x = PHMLinear(8, 4, 2).eval(), torch.randn(3, 8)
    before = twin(x)
    twin.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(twin(x), layer(x)) and not torch.equal(twin(x), before)
    with torch.no_grad():
        layer.A.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (twin(x) - twin.bias))


def test_gradients():
    layer = PHMLinear(4, 4, 2, **DOUBLE)
    parameters = tuple(p.detach().requires_grad_() for p in layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def apply(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(apply, (torch.randn(3, 4, requires_grad=True, **DOUBLE), *parameters))


def test_the_right_algebra_finds_the_map_from_fewer_examples_than_unknowns():
    torch.manual_seed(0)
    known = {"bias": False, "algebra": "quaternion", "learn_algebra": False}
    teacher = PHMLinear(8, 8, 4, **known)
    x, fresh = torch.randn(7, 8), torch.randn(200, 8)  # seven equations for eight unknowns in each row
    errors = []
    for student in (PHMLinear(8, 8, 4, **known), nn.Linear(8, 8, bias=False)):
        optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            F.mse_loss(student(x), teacher(x).detach()).backward()
            optimizer.step()
        errors.append((F.mse_loss(student(fresh), teacher(fresh)) / teacher(fresh).var()).item())
    assert errors[0] < 1e-3 < 0.02 < errors[1]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PHMLinear(8, 6, 4), ValueError, "out_features must be a multiple of n = 4, got 6"),
        (lambda: PHMLinear(6, 8, 4), ValueError, "in_features must be a multiple of n = 4, got 6"),
        (lambda: PHMLinear(8, 8, 0), ValueError, "n must be an integer of at least 1, got 0"),
        (lambda: PHMLinear(0, 8, 1), ValueError, "in_features must be an integer of at least 1, got 0"),
        (
            lambda: PHMLinear(8, 8, 2, algebra="quaternion"),
            ValueError,
            r"algebra must be one of.*, got 'quaternion', of dimension 4",
        ),
        (
            lambda: PHMLinear(8, 8, 8, algebra="octonion"),
            ValueError,
            "algebra must be one of 'real', 'complex', 'quaternion', got 'octonion'",
        ),
        (
            lambda: PHMLinear(8, 8, 2, dtype=torch.int64),
            TypeError,
            r"dtype must be a floating-point dtype, got torch\.int64",
        ),
        (lambda: PHMLinear(8, 8, 2)(torch.randn(3, 6)), ValueError, r"x must have shape \(..., I\) with I = 8"),
        (lambda: PHConv2d(8, 8, 0, 2), ValueError, "kernel_size must be an integer of at least 1, got 0"),
        (lambda: PHConv2d(8, 8, (3, 3, 3), 2), ValueError, r"kernel_size must be 2 integers or one, got \(3, 3, 3\)"),
        (lambda: PHConv1d(8, 6, 3, 4), ValueError, "out_channels must be a multiple of n = 4, got 6"),
        (
            lambda: PHConv2d(8, 8, 3, 2)(torch.randn(1, 4, 5, 5)),
            ValueError,
            r"x must have shape \(batch, 8, size, size\), got \(1, 4, 5, 5\)",
        ),
        (
            lambda: algebra_matrices("dual"),
            ValueError,
            "algebra must be one of 'real', 'complex', 'quaternion', got 'dual'",
        ),
        (
            lambda: algebra_angle(torch.ones(2, 2, 2), torch.ones(3, 3, 3)),
            ValueError,
            r"b must have shape \(n, n, n\), the same for both, got \(3, 3, 3\)",
        ),
    ],
)
def test_bad_input_raises(make, error, words):
    with pytest.raises(error, match=words):
        make()
