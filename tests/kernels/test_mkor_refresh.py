"""mkor_refresh: both paths against inverses of averaged covariances, the Triton path against float64, checks, cost."""

from importlib import import_module

import pytest
import torch

from polylib.kernels import factor_arena, factors_of, mkor_refresh_, mkor_refresh_reference

# Of the largest entry, after STEPS refreshes: each rounds every entry of the factor once, and the sums on the way in
# float32, which are of some hundred terms.
TOLERANCE = {torch.float32: 2**-17, torch.float16: 2**-8, torch.bfloat16: 2**-5}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
STEPS = 3


class Factors:
    """An arena, and statistics for a few refreshes of it."""

    def __init__(self, *sizes, dtype=torch.float32, device="cpu", vectors=None):
        self.sizes = list(sizes)
        gen = torch.Generator().manual_seed(len(sizes))
        wide = torch.randn(STEPS, sum(sizes), generator=gen, dtype=torch.float64)
        self.vectors = wide.to(device, vectors or dtype)
        self.arena, self.views = factor_arena(sizes, dtype=dtype, device=device)
        self.largest = torch.ones(len(sizes), device=device)

    def run(self, backend, **options):
        for v in self.vectors:
            mkor_refresh_(self.arena, v, self.largest, self.sizes, **{"gamma": 0.8} | options, backend=backend)
        return self.views

    def widened(self):
        """The same values in float64."""
        other = Factors(*self.sizes, dtype=torch.float64, device=self.arena.device)
        other.arena.copy_(self.arena)
        other.largest.copy_(self.largest)
        other.vectors = self.vectors.double()
        return other


def close(found, expected, dtype):
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=TOLERANCE[dtype] * e.abs().max().item())


@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_the_reference_inverts_the_averaged_covariance(gamma):
    f = Factors(1, 6, 13, dtype=torch.float64)
    f.run("reference", gamma=gamma)
    for J, vectors in zip(f.views, f.vectors.split(f.sizes, 1), strict=True):
        A = torch.eye(len(J), dtype=torch.float64)
        for v in vectors:
            A = gamma * A + (1 - gamma) * v.outer(v)
        torch.testing.assert_close(J, torch.linalg.inv(A), rtol=1e-10, atol=1e-10)


def test_the_reference_stabilises_by_the_inverse_of_what_was_blended():
    f = Factors(7, dtype=torch.float64)
    J, v = f.views[0], f.vectors[0]
    identity = torch.eye(7, dtype=torch.float64)
    J.copy_(5 * identity + 1)
    f.largest.fill_(6.0)
    A = torch.linalg.inv(0.9 * J + 0.1 * identity)
    mkor_refresh_(f.arena, v, f.largest, f.sizes, gamma=0.7, threshold=5.9, zeta=0.9)
    torch.testing.assert_close(J, torch.linalg.inv(0.7 * A + 0.3 * v.outer(v)), rtol=1e-10, atol=1e-10)
    assert f.largest.item() == pytest.approx(J.abs().max().item(), rel=1e-6)


@DTYPES
@pytest.mark.parametrize("sizes", [(1,), (64,), (65,), (3, 130, 17, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"threshold": 1.2, "zeta": 0.7}], ids=["plain", "stabilised"])
def test_triton_equals_float64_reference(dtype, sizes, options, device):
    f = Factors(*sizes, dtype=dtype, device=device)
    wide = f.widened()
    close(f.run("triton", **options), wide.run("reference", **options), dtype)
    for J, largest in zip(f.views, f.largest, strict=True):
        assert largest == J.abs().max() and torch.equal(J, J.mT)


@pytest.mark.parametrize("vectors", [torch.float32, torch.float64])
def test_statistics_may_be_wider_than_the_factors(vectors, device):
    f = Factors(5, 70, dtype=torch.float16, device=device, vectors=vectors)
    wide = f.widened()
    close(f.run("triton"), wide.run("reference"), torch.float16)


@BACKENDS
def test_factors_are_refreshed_apart(backend, device):
    """Each as if it were alone, whatever lies beside it, and what lies between the rows stays zero."""
    both, alone = Factors(20, 70, device=device), Factors(70, device=device)
    alone.vectors = both.vectors[:, 20:].contiguous()
    both.vectors[:, :20] = float("nan")
    both.run(backend)
    alone.run(backend)
    torch.testing.assert_close(both.views[1], alone.views[0], rtol=0, atol=0)
    assert both.views[0].isnan().any() and not alone.views[0].isnan().any()
    assert alone.arena.view(70, 80)[:, 70:].count_nonzero() == 0


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, from the interpreter
def test_a_factor_that_is_lost_says_so(backend, device):
    f = Factors(9, 9, device=device)
    f.vectors[0, 3] = float("nan")
    f.vectors[:, 9:] = 0
    f.run(backend)
    assert f.largest[0].isnan() and f.largest[1].item() == pytest.approx(0.8**-STEPS, rel=1e-6)


@BACKENDS
def test_without_statistics_a_factor_grows_until_it_is_stabilised(backend, device):
    grown, held = Factors(33, device=device), Factors(33, device=device)
    for f in (grown, held):
        f.vectors = torch.zeros(12, 33, device=device)
    grown.run(backend)
    held.run(backend, threshold=2.0, zeta=0.5)
    assert grown.largest.item() == pytest.approx(0.8**-12, rel=1e-4)
    assert held.largest.item() < 2.0 / 0.8 + 1e-4


@BACKENDS
def test_only_arena_and_largest_change_and_nothing_is_recorded(backend, device):
    f = Factors(5, 17, device=device)
    f.vectors.requires_grad_()
    kept = f.vectors.detach().clone()
    f.run(backend)
    assert torch.equal(f.vectors, kept) and not f.arena.requires_grad


@BACKENDS
def test_no_factors(backend, device):
    arena, views = factor_arena([], device=device)
    none = torch.zeros(0, device=device)
    mkor_refresh_(arena, none, none.clone(), [], backend=backend)
    assert views == [] and arena.numel() == 0


def test_opcheck(device):
    f = Factors(5, 70, device=device)
    args = (f.arena, f.vectors[0], f.largest, f.sizes, 0.9, 1.1, 0.8)
    torch.library.opcheck(torch.ops.polylib.mkor_refresh.default, args)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compile_fullgraph(backend, device):
    a, b = Factors(5, 70, device=device), Factors(5, 70, device=device)
    compiled = torch.compile(mkor_refresh_, fullgraph=True, backend="aot_eager")
    for v in a.vectors:
        compiled(a.arena, v, a.largest, a.sizes, gamma=0.8, backend=backend)
    b.run("reference")
    torch.testing.assert_close(a.arena, b.arena, rtol=1e-5, atol=1e-5)


def test_an_arena_holds_identities_that_are_views_of_it():
    arena, views = factor_arena([3, 16, 17], dtype=torch.float64)
    assert arena.shape == (3 * 16 + 16 * 16 + 17 * 32,)
    assert all(torch.equal(J, torch.eye(d, dtype=torch.float64)) for J, d in zip(views, (3, 16, 17), strict=True))
    views[2][4, 5] = 7.0
    assert factors_of(arena, [3, 16, 17])[2][4, 5] == 7.0 and (arena == 7).sum() == 1


def test_cost_counts_by_hand():
    cost = import_module("polylib.kernels.mkor_refresh").cost
    # A triangle of 10 and a square of 16 entries, two bytes each; 4 numbers of v and one maximum, in and out.
    assert cost([4], torch.bfloat16).bytes == 2 * 26 + 16 + 8
    assert cost([4, 4], torch.bfloat16).bytes == 2 * cost([4], torch.bfloat16).bytes
    assert cost([4], torch.float32).flops == 80


GOOD = {"arena": torch.zeros(48), "vectors": torch.zeros(3), "largest": torch.ones(1), "sizes": [3]}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"arena": [1.0]}, TypeError, "arena must be a torch.Tensor, got list"),
        ({"arena": torch.zeros(9)}, ValueError, r"arena must have shape .* = \(48,\), got \(9,\)"),
        ({"arena": torch.zeros(96)[::2]}, ValueError, "arena must be contiguous"),
        ({"vectors": torch.zeros(4)}, ValueError, r"vectors must have shape \(sum of sizes,\) = \(3,\), got \(4,\)"),
        ({"vectors": torch.zeros(3, dtype=torch.int64)}, TypeError, "vectors must have a real floating-point dtype"),
        ({"vectors": torch.zeros(3, device="meta")}, ValueError, "vectors must be on the device of arena, cpu"),
        ({"largest": torch.ones(2)}, ValueError, r"largest must have shape \(K,\) = \(1,\), got \(2,\)"),
        ({"largest": torch.ones(1).double()}, TypeError, "largest must have dtype torch.float32, got torch.float64"),
        ({"sizes": [0]}, ValueError, r"sizes\[0\] must be an integer of at least 1, got 0"),
        ({"gamma": 1.0}, ValueError, "gamma must be a finite number above 0, below 1, got 1.0"),
        ({"zeta": 1.5}, ValueError, "zeta must be a finite number from 0 to 1, got 1.5"),
        ({"threshold": 0.0}, ValueError, "threshold must be above 0, got 0.0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be above 0, got nan"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        mkor_refresh_(**GOOD | changed)


def test_bench_cases_run():
    for _, _, costs, contestants in import_module("benchmarks.ops.mkor_refresh").cases(torch.device("cpu"), True):
        after = {who: function(*tensors) for who, (function, tensors) in contestants.items()}
        assert costs[0].bytes > 0 and costs[1] is None
        for found in after.values():
            torch.testing.assert_close(found, after["reference"])


def test_reference_is_public_and_takes_what_the_op_takes():
    f = Factors(4, dtype=torch.float64)
    mkor_refresh_reference(f.arena, f.vectors[0], f.largest, f.sizes, 0.9, float("inf"), 0.9)
    assert f.largest.item() == pytest.approx(f.views[0].abs().max().item(), rel=1e-6)
