"""Random shapes, dtypes, strides and values: the reference against float64, and the Triton path against the reference.

`POLYLIB_FUZZ` is the number of examples of each test against float64 (4 by default); the Triton path, which is slow in
the interpreter, gets a twentieth, and 2 at least.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polylib.kernels as kernels
from polylib.kernels.phm_linear import phm_linear_factored

EXAMPLES = int(os.environ.get("POLYLIB_FUZZ", "4"))
COMMON = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
REFERENCE = settings(max_examples=EXAMPLES, **COMMON)
TRITON = settings(max_examples=max(2, EXAMPLES // 20), **COMMON)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a result, relative to the largest entry that it could have: roundings of the arithmetic, and of the result.
ROUNDING = {torch.float64: 2**-40, torch.float32: 2**-18, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@st.composite
def tensors(draw, *shape: int, dtype: torch.dtype, low: float = -3.0, high: float = 3.0) -> torch.Tensor:
    """A tensor of random values, some of them zeros, with random strides."""
    seed = draw(st.integers(0, 2**32 - 1))
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=gen, dtype=torch.float64) * (high - low) + low
    x = torch.where(torch.rand(shape, generator=gen) < 0.1, 0.0, x).to(dtype)
    way = draw(st.sampled_from(["contiguous", "sliced", "transposed"]))
    if way == "sliced" and x.dim():
        wide = torch.zeros(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.mT.contiguous().mT if way == "transposed" and x.dim() >= 2 else x


def steps(low: float = 0.05, high: float = 1.0):
    return st.floats(low, high, width=32)


sizes = st.integers(1, 40)
dtypes = st.sampled_from(DTYPES)


@st.composite
def poly_relu(draw):
    dtype = draw(dtypes)
    x = draw(tensors(draw(sizes), draw(sizes), dtype=dtype))
    return kernels.poly_relu, [x, draw(tensors(3, dtype=dtype)), draw(tensors(1, dtype=dtype))], {}


@st.composite
def poly_norm(draw):
    dtype = draw(dtypes)
    x = draw(tensors(draw(sizes), draw(sizes), dtype=dtype)) * draw(st.sampled_from([1.0, 100.0]))
    return kernels.poly_norm, [x, draw(tensors(3, dtype=dtype)), draw(tensors(1, dtype=dtype))], {}


@st.composite
def group_rational(draw):
    dtype, groups = draw(dtypes), draw(st.integers(1, 4))
    x = draw(tensors(draw(sizes), groups * draw(st.integers(1, 12)), dtype=dtype))
    shared = 1 if draw(st.booleans()) else groups
    coefficients = [draw(tensors(shared, order, dtype=torch.float32)) for order in (6, 4)]
    return kernels.group_rational, [x, *coefficients], {"groups": groups, "variant": draw(st.sampled_from("AB"))}


@st.composite
def evonorm_s0(draw):
    dtype, groups = draw(dtypes), draw(st.integers(1, 4))
    channels = groups * draw(st.integers(1, 5))
    shape = (draw(st.integers(1, 3)), channels, draw(st.integers(2, 7)), draw(st.integers(2, 7)))
    x = draw(tensors(*shape, dtype=dtype))
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return kernels.evonorm_s0, [x, *(draw(tensors(channels, dtype=dtype)) for _ in range(3))], {"groups": groups}


@st.composite
def phm_linear(draw):
    dtype, n = draw(dtypes), draw(st.integers(1, 8))
    o, i = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    x, A = draw(tensors(draw(st.integers(1, 32)), n * i, dtype=dtype)), draw(tensors(n, n, n, dtype=dtype))
    return kernels.phm_linear, [x, A, draw(tensors(n, o, i, dtype=dtype)), draw(tensors(n * o, dtype=dtype))], {}


@st.composite
def quadratic_linear(draw):
    dtype, K, N = draw(dtypes), draw(sizes), draw(sizes)
    parameters = [draw(tensors(*shape, dtype=dtype)) for shape in ((N, K), (N,)) * 3]
    return kernels.quadratic_linear, [draw(tensors(draw(sizes), K, dtype=dtype)), *parameters], {}


@st.composite
def monarch_multiply(draw):
    dtype, (k, p, lanes, s) = draw(dtypes), (draw(st.integers(1, 20)) for _ in range(4))
    shapes = (draw(st.integers(1, 40)), k * p), (k, lanes, p), (lanes, s, k)
    return kernels.monarch_multiply, [draw(tensors(*shape, dtype=dtype)) for shape in shapes], {}


@st.composite
def sparse_down(draw):
    dtype, (B, k, m, d) = draw(dtypes), (draw(sizes) for _ in range(4))
    indices = (draw(tensors(B, k, dtype=torch.float64, low=0, high=m))).long().clamp(max=m - 1)
    values, weight_t, bias = (draw(tensors(*shape, dtype=dtype)) for shape in ((B, k), (m, d), (d,)))

    def function(values, weight_t, bias, **options):
        return kernels.sparse_down(values, indices, weight_t, bias, **options)

    return function, [values, weight_t, bias], {}


@st.composite
def kernel_attention_rpe(draw):
    dtype, (heads, n, m, d) = draw(dtypes), (draw(st.integers(1, top)) for top in (2, 40, 20, 20))
    q, k = (draw(tensors(1, heads, n, m, dtype=dtype, low=0.0)) + 0.25 for _ in range(2))
    v, bias = draw(tensors(1, heads, n, d, dtype=dtype)), draw(tensors(heads, 2 * n - 1, dtype=dtype))
    return kernels.kernel_attention_rpe, [q, k, v, bias], {"causal": draw(st.booleans())}


@st.composite
def combiner_attention(draw):
    dtype, (regions, span, d, e) = draw(dtypes), (draw(st.integers(1, top)) for top in (6, 9, 20, 20))
    heads = draw(st.integers(1, 2))
    args = [draw(tensors(1, heads, regions * span, width, dtype=dtype)) for width in (d, d, e)]
    return kernels.combiner_attention, args, {"span": span, "causal": draw(st.booleans())}


def scan(u, *parts, backend="auto"):
    """Of the real and imaginary parts of waves, which decay, so that gradients have room in float16, and turn."""
    v_re, v_im, decay, turn = (t if t.dtype == torch.float64 else t.float() for t in parts)
    x = torch.complex(-0.05 - decay.square() / 9, turn)
    return kernels.s4d_scan(u, torch.complex(v_re, v_im) / 9, x, backend=backend)


@st.composite
def s4d_scan(draw):
    dtype, (batch, H, N, L) = draw(dtypes), (draw(st.integers(1, top)) for top in (20, 2, 40, 150))
    return scan, [draw(tensors(batch, H, L, dtype=dtype)), *(draw(tensors(H, N, dtype=dtype)) for _ in range(4))], {}


def scale_of(tensor: torch.Tensor) -> float:
    return max(tensor.abs().max().item(), 1.0) if tensor.numel() else 1.0


def gradients(function, args, options):
    args = [t.detach().requires_grad_() for t in args]
    y = function(*args, **options)
    return [y.detach(), *torch.autograd.grad(y, args, torch.ones_like(y))]


def magnitude(args: list[torch.Tensor], expected: torch.Tensor) -> float:
    """What the roundings of a result are taken relative to: the largest entry, and more where many are added."""
    size = max(t.numel() for t in args)
    return scale_of(expected) * max(1.0, size**0.5)


def compare(actual, expected, args, dtype, sizes=None) -> None:
    """`sizes` are the sums of the magnitudes of all terms, entry by entry, where they are known."""
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        error = (a.double() - e.double()).abs()
        if sizes is None:
            worst = error.max().item() if a.numel() else 0.0
            assert worst <= ROUNDING[dtype] * magnitude(args, e.double()), (worst, scale_of(e.double()), a.shape)
        else:
            allowed = ROUNDING[dtype] * sizes[number] + 8 * torch.finfo(dtype).tiny * torch.finfo(dtype).eps
            assert (error <= allowed).all(), (number, (error / allowed).max().item(), a.shape)


def poly_norm_sizes(x, weight, bias) -> list[torch.Tensor]:
    """The magnitudes of the terms, by the formulas at the head of the module; all arguments are positive."""
    result, slope, sums = bias.expand(x.shape), torch.zeros_like(x), []
    for p, a in enumerate(weight.flip(0), 1):
        power = x**p
        r = (power.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        result = result + a * r * power
        slope = slope + p * a * r * x ** (p - 1) * (1 + r**2 * power * power.mean(-1, keepdim=True))
        sums.insert(0, (r * power).sum())
    return [result, slope, torch.stack(sums), torch.full_like(bias, x.numel())]


def sizes_of(function, args, options) -> list[torch.Tensor] | None:
    """The sums of the magnitudes of the terms of the result and of each gradient, of the functions that may cancel."""
    args = [t.double().abs() for t in args]
    if function is kernels.poly_norm:
        return poly_norm_sizes(*args)
    multilinear = (kernels.phm_linear, kernels.quadratic_linear, kernels.monarch_multiply)
    return gradients(function, args, options) if function in multilinear or function.__name__ == "function" else None


def compare_with_float64(drawn, backend: str) -> None:
    """The result and all gradients."""
    function, args, options = drawn
    expected = gradients(function, [t.double() for t in args], options)
    actual = gradients(function, args, options | {"backend": backend})
    compare(actual, expected, args, args[0].dtype, sizes_of(function, args, options))


SMOOTH = [
    *(poly_relu, poly_norm, group_rational, evonorm_s0, phm_linear, quadratic_linear),
    *(monarch_multiply, sparse_down, kernel_attention_rpe, combiner_attention, s4d_scan),
]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda f: f.__name__)
def test_reference_equals_float64(case):
    @REFERENCE
    @given(case())
    def check(drawn):
        compare_with_float64(drawn, "reference")

    check()


@pytest.mark.parametrize("case", SMOOTH, ids=lambda f: f.__name__)
def test_triton_equals_the_reference(case, device):
    @TRITON
    @given(case())
    def check(drawn):
        compare_with_float64(drawn, "triton")

    check()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_whose_terms_cancel(backend, device):
    """Found by the tests above: that of A is a hundredth of its terms here, that of a row of one entry nearly zero."""
    gen = torch.Generator().manual_seed(659)
    args = [torch.randn(*shape, generator=gen).bfloat16() for shape in ((24, 2), (1, 1, 1), (1, 4, 2), (4,))]
    compare_with_float64((kernels.phm_linear, args, {}), backend)
    args = [torch.tensor(t) for t in ([[0.1912]], [0.5149, -2.6913, 2.8837], [0.0])]
    compare_with_float64((kernels.poly_norm, args, {}), backend)


def away_from_borders(draw, dtype: torch.dtype, codes: int, step: float, *shape: int) -> torch.Tensor:
    """Values whose codes are sure: whole numbers of steps, and up to a third of one more or less."""
    whole = draw(tensors(*shape, dtype=torch.float64, low=-codes, high=codes)).round()
    return ((whole + draw(tensors(*shape, dtype=torch.float64, low=-0.3, high=0.3))) * step).to(dtype)


@st.composite
def fake_quantize(draw):
    dtype, bits, axis = draw(dtypes), draw(st.integers(2, 6)), draw(st.sampled_from([None, 0, 1, 2]))
    shape = [draw(st.integers(1, 12)) for _ in range(3)]
    step = 2.0 ** draw(st.integers(-4, 2))
    x = away_from_borders(draw, dtype, 2**bits, step, *shape)
    scale = torch.full((1 if axis is None else shape[axis],), step)
    options = {"bits": bits, "axis": axis, "signed": draw(st.booleans()), "clip": draw(st.booleans())}
    if draw(st.booleans()):
        options["zero_point"] = torch.full_like(scale, draw(st.integers(-3, 3)))
    return x, scale, options


def quantized(x, scale, options, backend):
    x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = kernels.fake_quantize(x, scale, **options, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, (x, scale), torch.ones_like(y))]


def exactly(x, scale, options):
    """The definition, by numpy's rounding, in float64."""
    axis, signed, bits = options["axis"], options["signed"], options["bits"]
    shape = [1] * 3
    if axis is not None:
        shape[axis] = -1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    v, s = x.double() / scale.double().view(shape), scale.double().view(shape)
    z = options.get("zero_point", torch.zeros_like(scale)).double().view(shape)
    code = torch.from_numpy(v.numpy().round()).clamp(low - z, high - z)
    inside = (v >= low - z) & (v <= high - z)
    grad_x = inside.double() if options["clip"] else torch.ones_like(v)
    return [code * s, grad_x, torch.where(inside, code - v, code).sum_to_size(s.shape).view(scale.shape)]


def check_quantized(drawn, backend):
    x, scale, options = drawn
    compare(quantized(x, scale, options, backend), exactly(x, scale, options), [x], x.dtype)


@REFERENCE
@given(fake_quantize())
def test_fake_quantize_reference(drawn):
    check_quantized(drawn, "reference")


@TRITON
@given(fake_quantize())
def test_fake_quantize_triton(device, drawn):
    check_quantized(drawn, "triton")


@st.composite
def fixed_point(draw):
    dtype, signed = draw(dtypes), draw(st.booleans())
    options = {
        "width": draw(st.integers(1 + signed, 8)),
        "signed": signed,
        "rounding": draw(st.sampled_from(["trn", "trn_zero", "rnd", "rnd_conv"])),
        "overflow": draw(st.sampled_from(["sat", "wrap"])),
    }
    int_bits = draw(st.floats(-12.0, 12.0, width=32))
    spread = 2.0 ** (round(int_bits) - draw(st.integers(-1, 5)))
    x = draw(tensors(draw(sizes), draw(sizes), dtype=torch.float32, low=-spread, high=spread)).to(dtype)
    return x, torch.tensor(int_bits), options


def check_fixed_point(drawn, backend):
    """numpy's rounding and integers of 64 bits; float64 holds every v and every result of these dtypes exactly."""
    x, int_bits, options = drawn
    signed, width, overflow = options["signed"], options["width"], options["overflow"]
    args = [x.detach().requires_grad_(), int_bits.requires_grad_()]
    y = kernels.fixed_point(*args, **options, backend=backend)
    actual = [y.detach(), *torch.autograd.grad(y, args, torch.ones_like(y))]
    lsb = 2.0 ** (round(int_bits.item()) - width)
    v = x.detach().double().numpy() / lsb
    raw = {"trn": np.floor, "trn_zero": np.trunc, "rnd": lambda v: np.floor(v + 0.5), "rnd_conv": np.round}
    raw = raw[options["rounding"]](v).astype(np.int64)
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    inside = (v >= low) & (v <= high) | (overflow == "wrap")
    code = np.clip(raw, low, high) if overflow == "sat" else (raw - low) % 2**width + low
    slope = np.where(inside, code - v, code) * lsb * np.log(2)
    y, grad_x = (torch.from_numpy(t).to(x.dtype) for t in (code * lsb, inside.astype(float)))
    assert torch.equal(actual[0], y) and torch.equal(actual[1], grad_x)
    assert abs(actual[2].item() - slope.sum()) <= ROUNDING[torch.float32] * np.abs(slope).sum()


@REFERENCE
@given(fixed_point())
def test_fixed_point_reference(drawn):
    check_fixed_point(drawn, "reference")


@TRITON
@given(fixed_point())
def test_fixed_point_triton(device, drawn):
    check_fixed_point(drawn, "triton")


@st.composite
def sine_weights(draw):
    dtype, freq, size = draw(dtypes), draw(st.floats(0.0625, 64.0, width=32)), 10.0 ** draw(st.integers(-3, 4))
    w = draw(tensors(draw(sizes), draw(sizes), dtype=torch.float32)) * size
    return w.to(dtype), freq, draw(st.booleans())


def check_sine(drawn, backend):
    """The sine in float64 of the phase in float32; the square wave where the sine is not nearly zero."""
    w, freq, hard = drawn
    w = w.detach().requires_grad_()
    y = kernels.sine_binarize(w, freq, hard, backend=backend)
    (grad,) = torch.autograd.grad(y, w, torch.ones_like(y))
    phase = (freq * w.detach().float()).double()
    expected = torch.where(phase.sin() < 0, -1.0, 1.0).double() if hard else phase.sin()
    off = (y.detach() - expected).abs() > ROUNDING[w.dtype]
    assert not (off & ((phase.sin().abs() > 1e-6) | (phase == 0))).any()
    assert ((grad - freq * phase.cos()).abs() <= ROUNDING[w.dtype] * freq).all()


@REFERENCE
@given(sine_weights())
def test_sine_binarize_reference(drawn):
    check_sine(drawn, "reference")


@TRITON
@given(sine_weights())
def test_sine_binarize_triton(device, drawn):
    check_sine(drawn, "triton")


@st.composite
def packed(draw):
    rows, outputs, features = draw(sizes), draw(sizes), draw(st.integers(1, 200))
    return [draw(tensors(n, features, dtype=draw(dtypes))) for n in (rows, outputs)]


def check_signs(drawn, backend):
    words = [kernels.pack_signs(t, backend=backend) for t in drawn]
    signs = [np.where(t.float().numpy() >= 0, 1, -1) for t in drawn]
    y = kernels.binary_linear(*words, drawn[0].shape[1], backend=backend)
    assert np.array_equal(y.numpy(), signs[0] @ signs[1].T)


@REFERENCE
@given(packed())
def test_binary_linear_reference(drawn):
    check_signs(drawn, "reference")


@TRITON
@given(packed())
def test_binary_linear_triton(device, drawn):
    check_signs(drawn, "triton")


@st.composite
def masked_products(draw):
    dtype, n, d, P = draw(dtypes), draw(sizes), draw(st.integers(1, 80)), draw(st.integers(1, 200))
    x, delta, r = (draw(tensors(*shape, dtype=dtype)) for shape in ((n, d), (d, P), (n,)))
    mask = draw(tensors(n, P, dtype=torch.float32)) > 0
    return x, delta, r, kernels.pack_mask(mask) if draw(st.booleans()) else mask, mask.numpy()


def check_masked(drawn, backend):
    """Each of the two and its gradient, which is the other, by numpy."""
    x, delta, r, given, mask = drawn
    delta, r = delta.detach().requires_grad_(), r.detach().requires_grad_()
    f = kernels.masked_gemm_reduce(x, delta, given, backend=backend)
    adjoint = kernels.masked_gemm_adjoint(x, r, given, delta.shape[1], backend=backend)
    gradients = [*torch.autograd.grad(f, delta, r.detach()), *torch.autograd.grad(adjoint, r, delta.detach())]

    def by_numpy(x, delta, r):
        f, adjoint = (mask * (x @ delta)).sum(1), x.T @ (mask * r[:, None])
        return [torch.from_numpy(t) for t in (f, adjoint, adjoint, f)]

    wide = [t.detach().double().numpy() for t in (x, delta, r)]
    sizes = by_numpy(*(np.abs(t) for t in wide))
    compare([f, gradients[0], adjoint, gradients[1]], by_numpy(*wide), [x], x.dtype, sizes)


@REFERENCE
@given(masked_products())
def test_masked_gemm_reduce_reference(drawn):
    check_masked(drawn, "reference")


@TRITON
@given(masked_products())
def test_masked_gemm_reduce_triton(device, drawn):
    check_masked(drawn, "triton")


@st.composite
def refreshes(draw):
    sizes_ = draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    gamma, zeta, threshold = draw(st.floats(0.3, 0.98)), draw(st.floats(0.0, 1.0)), draw(st.sampled_from([0.9, 1.1]))
    return sizes_, draw(tensors(2, sum(sizes_), dtype=draw(dtypes))).contiguous(), gamma, zeta, threshold


def check_refresh(drawn, backend):
    """Two refreshes, by inverses of what is averaged, in numpy."""
    sizes_, vectors, gamma, zeta, threshold = drawn
    arena, factors = kernels.factor_arena(sizes_)
    largest = torch.ones(len(sizes_))
    for v in vectors:
        before = [J.double().numpy().copy() for J in factors]
        options = {"gamma": gamma, "zeta": zeta, "threshold": threshold}
        stabilised = (largest > threshold).tolist()
        kernels.mkor_refresh_(arena, v, largest, sizes_, **options, backend=backend)
        for J, old, part, blend in zip(factors, before, v.double().split(sizes_), stabilised, strict=True):
            old = zeta * old + (1 - zeta) * np.eye(len(old)) if blend else old
            A = gamma * np.linalg.inv(old) + (1 - gamma) * np.outer(part, part)
            expected = torch.from_numpy(np.linalg.inv(A))
            size = expected.abs().max().item()
            torch.testing.assert_close(J.double(), expected, rtol=0, atol=2**-16 * size)
        assert all(m == J.abs().max() for m, J in zip(largest, factors, strict=True))


@REFERENCE
@given(refreshes())
def test_mkor_refresh_reference(drawn):
    check_refresh(drawn, "reference")


@TRITON
@given(refreshes())
def test_mkor_refresh_triton(device, drawn):
    check_refresh(drawn, "triton")


@st.composite
def messages(draw):
    dtype, block = draw(dtypes), draw(st.sampled_from([64, 128, 256]))
    n, k = draw(st.integers(1, 400)), draw(st.integers(1, 64))
    gradient = draw(tensors(n, dtype=dtype))
    # Rounded, so that many magnitudes are equal.
    return (gradient.round() if draw(st.booleans()) else gradient), draw(tensors(n, dtype=dtype)).contiguous(), k, block


def check_message(drawn, backend):
    """What is sent is at least as large as what is not, comes in order, and is what the state gained."""
    gradient, before, k, block = drawn
    state = before.clone()
    values, indices = kernels.topk_residual_(gradient, state, k, block, backend=backend)
    difference = (gradient.float() - before.float()).numpy()
    for b, start in enumerate(range(0, len(difference), block)):
        part = difference[start : start + block]
        sent = indices[b][indices[b] >= 0].numpy() - start
        order = np.lexsort((np.arange(len(part)), -np.abs(part)))
        assert sent.tolist() == sorted(order[:k].tolist())
        assert torch.equal(values[b, : len(sent)], torch.from_numpy(part[sent]).to(values.dtype))
        assert values[b, len(sent) :].count_nonzero() == 0
    total = before.clone()
    one = torch.ones(1)
    kernels.topk_decompress_(total, values[None], indices[None], one, block, backend=backend)
    assert torch.equal(total, state)


@REFERENCE
@given(messages())
def test_topk_residual_reference(drawn):
    check_message(drawn, "reference")


@TRITON
@given(messages())
def test_topk_residual_triton(device, drawn):
    check_message(drawn, "triton")


@st.composite
def clips(draw):
    """Values away from the borders between codes, and steps of each channel, each neuron or the whole layer."""
    dtype, relu = draw(dtypes), draw(st.booleans())
    B, T, C, P = draw(st.integers(1, 4)), draw(st.integers(2, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    step = 2.0 ** draw(st.integers(-3, 2))
    x = away_from_borders(draw, dtype, 4, step, B, T, C, P)
    return x, torch.full(draw(st.sampled_from([(C, 1), (C, P), (1,), (P,)])), step), relu


def check_clips(drawn, backend):
    """Codes by numpy; the gradient of y + total by x from the signs of the changes."""
    x, q, relu = drawn
    x, q = x.detach().requires_grad_(), q.requires_grad_()
    y, total, count = kernels.delta_relu(x, q, relu, backend=backend)
    grads = torch.autograd.grad([y, total], [x, q], [torch.ones_like(y), torch.ones_like(total)])
    a = x.detach().double().numpy()
    steps = np.broadcast_to(q.detach().double().numpy(), a.shape)
    code = np.round((np.maximum(a, 0) if relu else a) / steps)
    change = np.diff(code * steps, axis=1)
    none = np.zeros_like(change[:, :1])
    each = 1 + np.concatenate([none, np.sign(change)], 1) - np.concatenate([np.sign(change), none], 1)
    assert count.item() == np.count_nonzero(change)
    by_q = torch.from_numpy(-each * code)
    while by_q.dim() > q.dim():
        by_q = by_q.sum(0)
    by_q = by_q.sum([i for i, size in enumerate(q.shape) if size == 1], keepdim=True) if 1 in q.shape else by_q
    expected = [code * steps, np.abs(change).sum(), np.where(a > 0, each, 0) if relu else each]
    expected = [*map(torch.as_tensor, expected), by_q]
    for found, wanted in zip((y, total, *grads), expected, strict=True):
        assert (found.double() - wanted).abs().max() <= ROUNDING[x.dtype] * max(1.0, wanted.abs().max())


@REFERENCE
@given(clips())
def test_delta_relu_reference(drawn):
    check_clips(drawn, "reference")


@TRITON
@given(clips())
def test_delta_relu_triton(device, drawn):
    check_clips(drawn, "triton")


@st.composite
def groups(draw, pairs):
    size = 2 if pairs else draw(st.integers(1, 6))
    return draw(tensors(draw(sizes), size * draw(sizes), dtype=draw(dtypes))), size


def check_groups(drawn, backend):
    """By numpy's stable sort; the gradient of an entry is that of the place where it went."""
    x, size = drawn
    x = x.detach().requires_grad_()
    y = kernels.group_sort(x, size, backend=backend)
    weights = torch.arange(x.numel(), dtype=torch.float64).view(x.shape) % 128
    (found,) = torch.autograd.grad(y, x, weights.to(x.dtype))
    own = x.detach().double().numpy().reshape(len(x), -1, size)
    order = np.argsort(own, -1, kind="stable")
    back = np.zeros_like(own)
    np.put_along_axis(back, order, weights.numpy().reshape(own.shape), -1)
    np.testing.assert_array_equal(y.detach().double().reshape(own.shape), np.take_along_axis(own, order, -1))
    np.testing.assert_array_equal(found.double().reshape(own.shape), back)


@REFERENCE
@given(groups(False))
def test_group_sort_reference(drawn):
    check_groups(drawn, "reference")


@TRITON
@given(groups(True))
def test_group_sort_triton(device, drawn):
    check_groups(drawn, "triton")


@st.composite
def boxes(draw):
    M, K, N, dtype = draw(sizes), draw(sizes), draw(sizes), draw(dtypes)
    radius = draw(tensors(M, K, dtype=dtype, low=0.0))
    return draw(tensors(M, K, dtype=dtype)), radius, draw(tensors(N, K, dtype=dtype)), draw(tensors(N, dtype=dtype))


def check_boxes(drawn, backend):
    """The ends of the box by numpy: positive weights keep an end, negative ones take the other."""
    y, z = kernels.ibp_linear(*drawn, backend=backend)
    c, r, W, b = (t.double().numpy() for t in drawn)
    positive, negative = W.clip(min=0), W.clip(max=0)
    low = (c - r) @ positive.T + (c + r) @ negative.T + b
    high = (c + r) @ positive.T + (c - r) @ negative.T + b
    most = (np.abs(c) + r) @ np.abs(W).T + np.abs(b)
    for found, wanted in ((y, (low + high) / 2), (z, (high - low) / 2)):
        assert np.abs(found.double().numpy() - wanted).max() <= ROUNDING[y.dtype] * most.max()


@REFERENCE
@given(boxes())
def test_ibp_linear_reference(drawn):
    check_boxes(drawn, "reference")


@TRITON
@given(boxes())
def test_ibp_linear_triton(device, drawn):
    check_boxes(drawn, "triton")


@st.composite
def normalised(draw):
    B, C, S, dtype = draw(sizes), draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(dtypes)
    radius = draw(tensors(B, C, S, dtype=dtype, low=0.0))
    parameters = (draw(tensors(C, dtype=torch.float32)) for _ in range(2))
    return draw(tensors(B, C, S, dtype=dtype)), radius, *parameters


def check_normalised(drawn, backend):
    """Both ends of each interval by numpy."""
    found = kernels.interval_affine_relu(*drawn, True, backend=backend)
    c, r, k, t = (own.double().numpy() for own in drawn)
    ends = [(c + sign * r) * k[:, None] + t[:, None] for sign in (-1, 1)]
    low, high = np.minimum(*ends), np.maximum(*ends)
    over = [np.maximum(end, 0) for end in (low, high)]
    wanted = [(over[0] + over[1]) / 2, (over[1] - over[0]) / 2, (low + high) / 2, (high - low) / 2]
    for own, exact in zip(found, wanted, strict=True):
        assert np.abs(own.double().numpy() - exact).max() <= ROUNDING[own.dtype] * 21  # 6 times 3, and 3


@REFERENCE
@given(normalised())
def test_interval_affine_relu_reference(drawn):
    check_normalised(drawn, "reference")


@TRITON
@given(normalised())
def test_interval_affine_relu_triton(device, drawn):
    check_normalised(drawn, "triton")


@st.composite
def stats_rows(draw):
    return draw(tensors(draw(sizes), draw(sizes), dtype=torch.float32)), draw(st.integers(1, 6))


def check_levels(drawn, backend):
    """Each result is a level of its row, and no other level is nearer by more than rounding."""
    w, bits = drawn
    y, n = kernels.stats_quantize(w, bits, backend=backend).double(), 2 ** (bits - 1)
    scale = 2 * w.double().abs().mean(-1, keepdim=True)
    levels = scale.unsqueeze(-1) * ((torch.arange(-n, n) + 0.5) / n)
    nearest = (levels - w.double().unsqueeze(-1)).abs().min(-1).values
    assert ((y - w.double()).abs() <= nearest + 1e-5 * (1 + scale)).all()
    assert ((levels - y.unsqueeze(-1)).abs().min(-1).values <= 1e-5 * (1 + scale)).all()


@REFERENCE
@given(stats_rows())
def test_stats_quantize_reference(drawn):
    check_levels(drawn, "reference")


@TRITON
@given(stats_rows())
def test_stats_quantize_triton(device, drawn):
    check_levels(drawn, "triton")


@st.composite
def optimizer_steps(draw):
    dtype, rows, columns = draw(dtypes), draw(st.integers(1, 5)), draw(st.integers(1, 60))
    w, g = (draw(tensors(rows, columns, dtype=dtype)).contiguous() for _ in range(2))
    m = draw(tensors(rows, columns, dtype=torch.float32)).contiguous()
    s = draw(tensors(rows, columns, dtype=torch.float32, low=0.5)).contiguous().abs() + 0.1
    rate, decay, scale = (draw(tensors(rows, dtype=torch.float32, low=0.0, high=0.5)).contiguous() for _ in range(3))
    optional = {name: value for name, value in (("decay", decay), ("scale", scale)) if draw(st.booleans())}
    return [w, g, m, s], rate, optional, draw(st.integers(1, 1000)), draw(st.sampled_from([0.0, 0.9]))


def after(drawn, kind, backend, dtype=None):
    state, rate, optional, number, momentum = drawn
    w, g, m, s = (t.clone() if dtype is None else t.to(dtype, copy=True) for t in state)
    if kind == "sgd":
        kernels.sweep_sgd_step(w, g, rate, velocity=m, momentum=momentum, backend=backend, **optional)
        return [w, m]
    kernels.sweep_adam_step(w, g, m, s, rate, step=number, betas=(momentum, 0.99), backend=backend, **optional)
    return [w, m, s]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_sweep_step_reference(kind):
    @REFERENCE
    @given(optimizer_steps())
    def check(drawn):
        state = drawn[0]
        compare(after(drawn, kind, "reference"), after(drawn, kind, "reference", torch.float64), state, state[0].dtype)

    check()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_sweep_step_triton(kind, device):
    @TRITON
    @given(optimizer_steps())
    def check(drawn):
        state = drawn[0]
        compare(after(drawn, kind, "triton"), after(drawn, kind, "reference", torch.float64), state, state[0].dtype)

    check()


@REFERENCE
@given(phm_linear())
def test_factored_product_equals_the_built_weight(drawn):
    _, args, _ = drawn
    expected = [kernels.phm_linear_reference(*(t.double() for t in args))]
    compare([phm_linear_factored(*args)], expected, args, args[0].dtype)
