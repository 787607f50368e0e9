"""Where a result is infinite or not a number, it is so in the Triton path and in the reference alike, in all ops.

Each of these values is put into each input in turn, and y and every gradient are compared; what is finite is compared
elsewhere. `DIFFERENT` lists what hangs on the order of products and sums: at an infinity, which of the values that are
not finite are NaN; next to the largest float32, which values overflow.
"""

import pytest
import torch

from polylib import kernels
from polylib.kernels.phm_linear import phm_linear_factored

INFINITIES = [float("inf"), float("-inf")]
VALUES = [-0.0, 1e-45, 1e-38, 1e20, -1e30, 1e37, 3e38, *INFINITIES, float("nan")]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter


def kind(t):
    """0 for finite, 1 and 2 for the infinities, 3 for what is not a number."""
    return torch.where(t.isnan(), 3, torch.where(t == torch.inf, 1, torch.where(t == -torch.inf, 2, 0)))


def gradients(function, inputs, backend):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rational(variant):
    return lambda x, a, b, backend: kernels.group_rational(x, a, b, 1, variant, backend=backend)


def quantize(x, scale, backend):
    return kernels.fake_quantize(x, scale, 4, axis=0, backend=backend)


def point(overflow):
    return lambda x, p, backend: kernels.fixed_point(x, p, 4, overflow=overflow, backend=backend)


def sine(hard):
    return lambda w, backend: kernels.sine_binarize(w, 3.0, hard, backend=backend)


def quadratic(*tensors, backend):
    return kernels.quadratic_linear(*tensors, backend=backend)


def masked(x, delta, backend):
    return kernels.masked_gemm_reduce(x, delta, MASK, backend=backend)


def masked_adjoint(x, r, backend):
    return kernels.masked_gemm_adjoint(x, r, MASK, 5, backend=backend)


def evonorm(x, weight, bias, v, backend):
    return kernels.evonorm_s0(x, weight, bias, v, 2, backend=backend)


IMAGES = random(1, 4, 3, 3)
LASTS = IMAGES.contiguous(memory_format=torch.channels_last)
WIDE = random(1, 4, 4, 4)  # rows of memory that are a multiple of 16 bytes: a third kernel
PARAMETERS = [random(4, seed=seed) for seed in (1, 2, 3)]
QUADRATIC = [random(*shape, seed=seed) for seed, shape in enumerate([(4, 5), (4,)] * 3, 1)]
MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 0, 1]]).bool()
PHM = [random(3, 4), random(2, 2, 2, seed=1), random(2, 2, 2, seed=2), random(4, seed=3)]
CASES = {
    "poly_relu": (kernels.poly_relu, [random(4, 8), random(3, seed=1), random(1, seed=2)]),
    "poly_norm": (kernels.poly_norm, [random(4, 8), random(3, seed=1), random(1, seed=2)]),
    "group_rational A": (rational("A"), [random(4, 8), random(1, 6, seed=1), random(1, 4, seed=2)]),
    "group_rational B": (rational("B"), [random(4, 8), random(1, 6, seed=1), random(1, 4, seed=2)]),
    "fake_quantize": (quantize, [random(4, 8), torch.tensor([0.3, 0.2, 0.7, 1.0])]),
    "evonorm_s0": (evonorm, [IMAGES, *PARAMETERS]),
    "evonorm_s0 channels_last": (evonorm, [LASTS, *PARAMETERS]),
    "evonorm_s0 wide": (evonorm, [WIDE, *PARAMETERS]),
    "masked_gemm_reduce": (masked, [random(3, 4), random(4, 5, seed=1)]),
    "masked_gemm_adjoint": (masked_adjoint, [random(3, 4), random(3, seed=1)]),
    "quadratic_linear": (quadratic, [random(3, 5), *QUADRATIC]),
    "fixed_point": (point("sat"), [random(4, 8), torch.tensor(1.3)]),
    "fixed_point wrap": (point("wrap"), [random(4, 8), torch.tensor(1.3)]),
    "sine_binarize": (sine(False), [random(4, 8)]),
    "sine_binarize hard": (sine(True), [random(4, 8)]),
    "stats_quantize": (lambda w, backend: kernels.stats_quantize(w, 3, backend=backend), [random(3, 8)]),
}


def differences(function, inputs, of=kind):
    """The numbers of the results, y first and then each gradient, of which the two paths differ in `of`."""
    both = [gradients(function, inputs, backend) for backend in ("triton", "reference")]
    return [number for number, (a, b) in enumerate(zip(*both, strict=True)) if not torch.equal(of(a), of(b))]


def with_value(inputs, position, value):
    inputs = [t.clone() for t in inputs]
    t = inputs[position]
    where = (0, 1, 1, 1) if t.dim() == 4 else tuple(size // 2 for size in t.shape)
    t[where] = value
    return inputs


DIFFERENT = {
    # The kernel multiplies the derivative of A by F once, the formula each of its terms: inf - inf. To follow it would
    # cost backward three products more an entry.
    ("group_rational B", 1): [3e38, *INFINITIES],
    ("poly_norm", 1): [3e38],
    ("group_rational A", 1): [3e38],
    ("group_rational A", 2): [3e38],
    ("group_rational B", 2): [3e38],
    ("evonorm_s0 wide", 1): [3e38],
    # The reference adds a row of the mask times delta before it multiplies with x, the kernel multiplies first; and the
    # gradient by x is a product with r in one, a product of the mask with r in the other.
    ("masked_gemm_reduce", 0): [3e38, *INFINITIES],
    ("masked_gemm_adjoint", 1): INFINITIES,
    ("quadratic_linear", 0): [3e38],
    ("quadratic_linear", 2): [3e38],
    ("quadratic_linear", 4): [3e38],
}


@pytest.mark.parametrize(("name", "position"), [(name, i) for name in CASES for i in range(len(CASES[name][1]))])
def test_where_results_are_not_finite(name, position, device):
    function, inputs = CASES[name]
    values = [abs(v) for v in VALUES] if (name, position) == ("fake_quantize", 1) else VALUES
    for value in values:
        changed = with_value(inputs, position, value)
        if value not in DIFFERENT.get((name, position), []):
            assert differences(function, changed) == [], value
        elif value in INFINITIES:
            assert differences(function, changed, torch.isfinite) == [], value


@pytest.mark.parametrize("position", range(4))
def test_phm_linear_and_the_factored_product(position, device):
    for value in VALUES:
        with torch.no_grad():
            changed = with_value(PHM, position, value)
            results = [kernels.phm_linear(*changed, backend="triton"), phm_linear_factored(*changed)]
        assert torch.equal(*map(kind, results)), value


@pytest.mark.parametrize("value", [*INFINITIES, float("nan")])
@pytest.mark.parametrize("position", range(4))
def test_phm_linear_and_the_built_weight(position, value, device):
    """The same results are not finite. Which of them are NaN hangs on the order of the sums, as the docstring says."""
    inputs = with_value(PHM, position, value)
    with torch.no_grad():
        results = [kernels.phm_linear(*inputs, backend=backend) for backend in ("triton", "reference")]
    assert torch.equal(*(t.isfinite() for t in results))
    assert not results[0].isfinite().all()


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("kind_of_step", ["sgd", "adam"])
def test_sweep_step(kind_of_step, position, device):
    def step(state, backend):
        w, g, m, s = (t.clone() for t in state)
        rate, decay = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.0])
        if kind_of_step == "sgd":
            kernels.sweep_sgd_step(w, g, rate, velocity=m, momentum=0.9, decay=decay, backend=backend)
        else:
            kernels.sweep_adam_step(w, g, m, s, rate, step=3, decay=decay, backend=backend)
        return torch.stack([w, m, s])

    for value in VALUES:
        state = with_value(
            [random(2, 5), random(2, 5, seed=1), random(2, 5, seed=2), torch.ones(2, 5)], position, value
        )
        results = [step(state, backend) for backend in ("triton", "reference")]
        assert torch.equal(*map(kind, results)), value


@pytest.mark.parametrize("features", [5, 40])
def test_pack_signs(features, device):
    for value in VALUES:
        x = with_value([random(3, features)], 0, value)[0]
        assert torch.equal(*(kernels.pack_signs(x, backend=backend) for backend in ("triton", "reference"))), value
