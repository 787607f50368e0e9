"""Causal Monarch: convolutions in learned polynomial bases that never look ahead, by bounds on their degrees.

D. Fu and others, "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023 (arXiv 2310.12109). The
paper reads Monarch matrices as polynomials in several variables; the formulas here are derived from that idea. With b
the root of N, the basis polynomial j = j1 + b j0 is

    q_j(Z) = l_j1(Z) r_(j1, j0)(Z^b),   l_j1(Z) = sum over a >= j1 of lam[j1, a] Z^a,
    r_(j1, j0)(W) = sum over c >= j0 of rho[j1, j0, c] W^c,   lam[j1, j1] = rho[j1, j0, j0] = 1,

and M[i, j] = q_j(z_i) at the N-th roots of one, z_i = exp(-2 pi i i / N), is a Monarch matrix. Inputs that fill the
first half of the coefficients only, and polynomials for them with degrees below N / 2, make M^-1 (M u * M k) causal: no
power reaches Z^N, where it would wrap around to the first outputs, and q_i q_j has no power below i + j. With lam and
rho identities M is the Fourier transform.
"""

import math

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels.monarch_multiply import monarch_multiply
from polylib.sequences.monarch_factors import dft_factors, shuffled


def causal_monarch_factors(lam: Tensor, rho: Tensor, cap: bool = True) -> tuple[Tensor, Tensor]:
    """Return the Monarch factors of M, for coefficients in the order of `shuffled`.

    Args:
        lam: (b, b), real, b even. What is not above the diagonal is taken to be the identity.
        rho: (b, b, b), real: for each j1 a matrix as lam.
        cap: leave out the powers from b / 2 on of each r whose j0 is below b / 2, so that the first half of the
            polynomials has degrees below N / 2. Without, the convolution is not causal.

    Returns:
        w1 and w2, (b, b, b), complex.

    Raises:
        TypeError: tensors that are not floating or have different dtypes.
        ValueError: other shapes, or an odd b.
    """
    b = lam.shape[-1] if lam.dim() else 0
    for name, value, shape in (("lam", lam, (b, b)), ("rho", rho, (b, b, b))):
        fits = value.shape == shape and b > 0 and b % 2 == 0
        _checks.shape(name, value, "(b, b)" if name == "lam" else f"({b}, {b}, {b}), as lam has it, b even", fits)
        _checks.floating(f"dtype of {name}", value.dtype)
    if lam.dtype not in (torch.float32, torch.float64) or rho.dtype != lam.dtype:
        raise TypeError(f"lam and rho must both be float32 or float64, got {lam.dtype} and {rho.dtype}")
    one = torch.eye(b, dtype=lam.dtype, device=lam.device)
    kept = torch.ones_like(one)
    if cap:
        kept[: b // 2, b // 2 :] = 0
    dtype = torch.complex64 if lam.dtype == torch.float32 else torch.complex128
    first, second = (w.to(lam.device) for w in dft_factors(b * b, b, dtype))
    # The transform's first factor has the powers of Z^b at the points, its second those of Z: mix them.
    w1 = torch.einsum("jic,jdc->jid", first, (rho.triu(1) * kept + one).to(dtype))
    w2 = torch.einsum("lsa,ja->lsj", second, (lam.triu(1) + one).to(dtype))
    return w1, w2


def causal_monarch_convolution(u: Tensor, k: Tensor, lam: Tensor, rho: Tensor, cap: bool = True) -> Tensor:
    """Return the first n entries of M^-1 (M u * M k), (..., n), for u and k that are filled up with zeros.

    With lam and rho identities this is the causal convolution of u and k.

    Args:
        u: (..., n), n up to b^2 / 2, of the dtype of lam.
        k: (..., n), as u; leading dimensions broadcast.
        lam, rho, cap: as in `causal_monarch_factors`, with b^2 at least 2 n.

    Raises:
        TypeError: different dtypes.
        ValueError: shapes that don't fit.
    """
    w1, w2 = causal_monarch_factors(lam, rho, cap)
    b = len(lam)
    n = u.shape[-1] if u.dim() else 0
    for name, value in (("u", u), ("k", k)):
        fits = value.dim() > 0 and value.shape[-1] == n and 0 < n <= b * b // 2
        _checks.shape(name, value, f"(..., n), n from 1 to b^2 / 2 = {b * b // 2} and one for both", fits)
        if value.dtype != lam.dtype:
            raise TypeError(f"{name} must have the dtype of lam, {lam.dtype}, got {value.dtype}")
    values = [monarch_multiply(_filled(x, b).to(w1.dtype), w1, w2) for x in (u, k)]
    return _coefficients(values[0] * values[1], w1, w2)[..., :n].real


def _filled(x: Tensor, b: int) -> Tensor:
    return shuffled(torch.nn.functional.pad(x, (0, b * b - x.shape[-1])), b)


def _coefficients(values: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The coefficients (..., N) of the polynomial with the given values: M^-1, block by block from the last factor."""
    b = math.isqrt(values.shape[-1])
    point = values.unflatten(-1, (b, b)).transpose(-2, -1)  # (..., i0, i1)
    middle = torch.linalg.solve(w2, point[..., None])[..., 0]  # (..., i0, j1)
    found = torch.linalg.solve(w1, middle.transpose(-2, -1)[..., None])[..., 0]  # (..., j1, j0)
    return shuffled(found.flatten(-2), b)
