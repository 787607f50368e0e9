import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.func import functional_call, hessian, vmap

from polylib.optimization import (
    flat_matvec,
    ggn_vector_product,
    hessian_matvec,
    hessian_vector_product,
    lanczos,
    spectral_density,
)

F64 = torch.float64


def symmetric(size, seed=0, dtype=F64):
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (a + a.T) / 2


@pytest.fixture
def problem():
    """A small tanh network in float64: its loss, its outputs, its parameters, and the loss of given outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(p):
        return functional_call(model, p, (x,))

    return lambda p: F.cross_entropy(outputs(p), y), outputs, params, lambda z: F.cross_entropy(z, y)


def flat_hessian(function, params):
    """The dense Hessian by parameters in one flat vector, from torch's own."""
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

    def of_vector(w):
        parts = zip(params, w.split(sizes), shapes, strict=True)
        return function({name: part.view(shape) for name, part, shape in parts})

    return hessian(of_vector)(torch.cat([p.flatten() for p in params.values()]))


def test_products_are_those_of_the_dense_hessian_also_under_vmap(problem):
    loss, _, params, _ = problem
    dense, product = flat_hessian(loss, params), hessian_matvec(loss, params)
    v = torch.randn(3, len(dense), dtype=F64)
    torch.testing.assert_close(product(v[0]), dense @ v[0])
    torch.testing.assert_close(vmap(product)(v), v @ dense)
    a, b = v[:2]
    torch.testing.assert_close(a @ product(b), b @ product(a))


def test_a_product_keeps_the_structure_of_the_parameters(problem):
    loss, _, params, _ = problem
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    product = hessian_vector_product(loss, params, direction)
    assert {name: p.shape for name, p in product.items()} == {name: p.shape for name, p in params.items()}
    w = torch.randn(6, dtype=F64)
    matrix = symmetric(6)
    torch.testing.assert_close(hessian_vector_product(lambda w: 0.5 * w @ matrix @ w, w, w), matrix @ w)


def test_gauss_newton_is_the_hessian_of_the_linearised_model(problem):
    _, outputs, params, of_outputs = problem

    def linearised(p):
        change = {name: p[name] - params[name] for name in params}
        z, dz = torch.func.jvp(outputs, (params,), (change,))
        return of_outputs(z + dz)

    dense = flat_hessian(linearised, params)
    v = {name: torch.randn_like(p) for name, p in params.items()}
    product = ggn_vector_product(outputs, of_outputs, params, v)
    flat = [torch.cat([part[name].flatten() for name in params]) for part in (product, v)]
    torch.testing.assert_close(flat[0], dense @ flat[1])
    matvec = flat_matvec(lambda v: ggn_vector_product(outputs, of_outputs, params, v), params)
    torch.testing.assert_close(vmap(matvec)(torch.stack([flat[1], -flat[1]])), torch.stack([flat[0], -flat[0]]))
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12


def test_extreme_ritz_values_are_scipys_eigenvalues(problem):
    loss, _, params, _ = problem
    product = hessian_matvec(loss, params)
    size = sum(p.numel() for p in params.values())
    operator = LinearOperator((size, size), matvec=lambda v: product(torch.tensor(v).view(-1)).numpy(), dtype=float)
    low, high = (eigsh(operator, k=1, which=end, return_eigenvectors=False)[0] for end in ("SA", "LA"))
    ritz = lanczos(product, torch.ones(size, dtype=F64), 30).ritz
    assert ritz[-1].item() == pytest.approx(high, rel=1e-6) and ritz[0].item() == pytest.approx(low, rel=1e-4)


def test_all_steps_recover_the_whole_spectrum():
    a = symmetric(12)
    result = lanczos(lambda v: a @ v, torch.randn(12, dtype=F64), 12)
    torch.testing.assert_close(result.ritz, torch.linalg.eigvalsh(a))
    torch.testing.assert_close(result.basis @ result.basis.T, torch.eye(12, dtype=F64), atol=1e-12, rtol=0)
    tridiagonal = result.alpha.diag() + result.beta.diag(1) + result.beta.diag(-1)
    torch.testing.assert_close(result.basis @ a @ result.basis.T, tridiagonal)


@pytest.mark.parametrize("steps", [2, 5])
def test_the_quadrature_is_exact_for_low_degrees(steps):
    a, v = symmetric(30), torch.randn(30, dtype=F64)
    result = lanczos(lambda v: a @ v, v, steps)
    v = v / v.norm()
    torch.testing.assert_close(result.weights.sum(), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(result.weights @ result.ritz, v @ a @ v)
    torch.testing.assert_close(result.weights @ result.ritz**2, (a @ v).square().sum())


def test_ritz_values_of_consecutive_steps_interlace():
    a, v = symmetric(30), torch.randn(30, dtype=F64)
    few, more = (lanczos(lambda v: a @ v, v, m).ritz for m in (7, 8))
    assert (more[:-1] < few).all() and (few < more[1:]).all()


def test_no_ghosts_with_reorthogonalisation_in_float32():
    spectrum = torch.cat([torch.linspace(0, 1, 190), torch.linspace(20, 200, 10)])
    start = torch.randn(200, generator=torch.Generator().manual_seed(1))

    def duplicates(reorth):
        ritz = lanczos(lambda v: spectrum * v, start, 60, reorth=reorth).ritz
        return int((ritz[ritz > 10].diff() < 1).sum())

    assert duplicates(True) == 0
    assert duplicates(False) > 0


def test_an_invariant_subspace_gives_a_short_exact_result():
    a = torch.diag(torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 7.0]))
    result = lanczos(lambda v: a @ v, torch.ones(6), 6)
    torch.testing.assert_close(result.ritz, torch.tensor([1.0, 3.0, 7.0]))
    torch.testing.assert_close(result.weights, torch.tensor([2.0, 3.0, 1.0]) / 6)
    assert result.basis.shape == (3, 6) and result.beta.shape == (2,)
    zero = lanczos(torch.zeros_like, torch.ones(6), 4)
    assert zero.ritz.tolist() == [0.0] and zero.weights.tolist() == [1.0]


def test_the_iteration_does_not_depend_on_the_scale_of_the_matrix():
    a, v = symmetric(20), torch.randn(20, dtype=F64)
    large, small = (lanczos(lambda v, s=s: s * (a @ v), v, 10).ritz for s in (1.0, 1e-12))
    torch.testing.assert_close(small, 1e-12 * large, atol=0, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 3, 1])
def test_probes_in_one_pass_are_those_one_by_one(problem, chunk_size):
    loss, _, params, _ = problem
    product, size = hessian_matvec(loss, params), sum(p.numel() for p in params.values())

    def estimate(chunk_size):
        generator = torch.Generator().manual_seed(3)
        return spectral_density(product, size, 8, 7, generator=generator, chunk_size=chunk_size, dtype=F64)

    for one, other in zip(estimate(chunk_size), estimate(1), strict=True):
        torch.testing.assert_close(one, other)


def test_density_has_the_moments_of_the_spectrum():
    a = symmetric(150)
    estimate = spectral_density(lambda v: a @ v, 150, 20, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    moment = (estimate.weights * estimate.ritz.square()).sum(-1)
    assert moment.mean().item() == pytest.approx((a @ a).trace().item() / 150, rel=0.03)
    area = torch.trapezoid(estimate.density, estimate.grid)
    assert area.item() == pytest.approx(1, abs=1e-3)
    inside = estimate.grid.abs() < torch.linalg.eigvalsh(a)[-1] / 2
    exact = (torch.linalg.eigvalsh(a).abs() < torch.linalg.eigvalsh(a)[-1] / 2).double().mean()
    assert torch.trapezoid(estimate.density[inside], estimate.grid[inside]).item() == pytest.approx(
        exact.item(), abs=0.03
    )


def test_probes_that_break_down_leave_the_others_exact():
    eigenvalues = torch.tensor([2.0] * 5 + [-1.0] * 3)
    estimate = spectral_density(lambda v: eigenvalues * v, 8, 6, 4, grid=torch.linspace(-3, 4, 50), bandwidth=0.1)
    torch.testing.assert_close((estimate.weights * estimate.ritz).sum(-1), torch.full((4,), 7 / 8))
    torch.testing.assert_close(estimate.weights.sum(-1), torch.ones(4))
    assert estimate.density.shape == (50,)


def test_bad_input_raises(problem):
    loss, _, params, _ = problem
    with pytest.raises(ValueError, match="v0 must be a direction, got one that is zero or not finite"):
        lanczos(lambda v: v, torch.zeros(3), 2)
    with pytest.raises(ValueError, match="not finite"):
        lanczos(lambda v: v, torch.tensor([1.0, float("nan")]), 2)
    with pytest.raises(ValueError, match=r"v0 must be a vector, got shape \(2, 2\)"):
        lanczos(lambda v: v, torch.ones(2, 2), 2)
    for steps in (0, 4):
        with pytest.raises(ValueError, match=f"num_steps must be an integer from 1 to 3, got {steps}"):
            lanczos(lambda v: v, torch.ones(3), steps)
    with pytest.raises(ValueError, match="matvec returned a value that is not finite at step 1"):
        lanczos(lambda v: v / 0, torch.ones(3), 2)
    with pytest.raises(ValueError, match="num_probes must be an integer of at least 1, got 0"):
        spectral_density(lambda v: v, 3, 2, 0)
    with pytest.raises(ValueError, match="bandwidth must be a finite number above 0, got 0"):
        spectral_density(lambda v: v, 3, 2, 1, bandwidth=0)
    with pytest.raises(ValueError, match=r"v must have the names.*, got \['0\.weight'\]"):
        hessian_vector_product(loss, params, {"0.weight": params["0.weight"]})
    wrong = {**params, "2.bias": torch.ones(4, dtype=F64)}
    with pytest.raises(ValueError, match=r"v\['2\.bias'\] must be \(3,\) torch\.float64,.*, got \(4,\) torch\.float64"):
        hessian_vector_product(loss, params, wrong)
