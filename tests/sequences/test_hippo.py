"""HiPPO-LegS against its Legendre polynomials, and the spectra against numbers worked out elsewhere."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from polylib.sequences import hippo_legs, s4d_spectrum


def test_legs_by_hand():
    A, B, P = hippo_legs(3)
    r = math.sqrt
    wanted = [[-1, 0, 0], [-r(3), -2, 0], [-r(5), -r(15), -3]]
    np.testing.assert_allclose(A, wanted, rtol=1e-15)
    np.testing.assert_allclose(B, [1, r(3), r(5)], rtol=1e-15)
    np.testing.assert_allclose(P, [r(0.5), r(1.5), r(2.5)], rtol=1e-15)


@pytest.mark.parametrize("N", [1, 2, 9])
def test_without_its_low_rank_part_legs_is_skew_but_for_half(N):
    A, _, P = hippo_legs(N)
    rest = A + torch.outer(P, P) + torch.eye(N) / 2
    torch.testing.assert_close(rest, -rest.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [0.05, 0.7, 3.0])
def test_the_impulse_response_is_made_of_legendre_polynomials(t):
    A, B, _ = hippo_legs(8)
    found = scipy.linalg.expm(t * A.numpy()) @ B.numpy()
    shrunk = math.exp(-t)
    wanted = [math.sqrt(2 * n + 1) * shrunk * np.polynomial.Legendre.basis(n)(2 * shrunk - 1) for n in range(8)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_known_frequencies():
    legs, inv = s4d_spectrum("legs", 8), s4d_spectrum("inv", 8)
    np.testing.assert_allclose(legs.imag, [19.8574, 5.3542, 1.9578, 0.4275], atol=5e-5)
    np.testing.assert_allclose(inv.imag, [17.83, 4.24, 1.53, 0.364], atol=5e-3)
    np.testing.assert_allclose(s4d_spectrum("lin", 6).imag, [0, math.pi, 2 * math.pi])
    np.testing.assert_allclose(s4d_spectrum("quadratic", 6).imag, np.array([1, 9, 25]) / math.pi)
    assert s4d_spectrum("real", 6).tolist() == [-1, -2, -3]
    for kind in ("legs", "inv", "lin", "quadratic", "random"):
        A = s4d_spectrum(kind, 6)
        assert A.dtype == torch.complex128
        assert A.real.tolist() == [-0.5] * 3


def test_the_legs_spectrum_is_that_of_the_matrix():
    A, _, P = hippo_legs(20)
    values = np.linalg.eigvals((A + torch.outer(P, P)).numpy())
    wanted = np.sort(values.imag[values.imag > 0])[::-1]
    np.testing.assert_allclose(s4d_spectrum("legs", 20).imag, wanted, rtol=1e-9)


def test_inv_approximates_legs():
    """Both have the first frequency N^2 / pi in the limit."""
    for N, share in ((8, 0.3103), (32, 0.3178), (128, 0.3183)):
        assert s4d_spectrum("legs", N).imag[0].item() / N**2 == pytest.approx(share, abs=5e-5)
    assert s4d_spectrum("inv", 128).imag[0].item() / 128**2 == pytest.approx(1 / math.pi, rel=0.01)


def test_random_frequencies_are_drawn():
    draws = [s4d_spectrum("random", 2000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    logs = draws[0].imag.log()
    assert abs(logs.mean()) < 0.15
    assert abs(logs.std() - 1) < 0.1


def test_bad_input():
    with pytest.raises(ValueError, match="N must be an integer of at least 1, got 0"):
        hippo_legs(0)
    with pytest.raises(ValueError, match=r"kind must be one of 'legs'.*got 'fourier'"):
        s4d_spectrum("fourier", 4)
    for N in (3, 0, 2.0):
        with pytest.raises(ValueError, match="N must be"):
            s4d_spectrum("lin", N)
