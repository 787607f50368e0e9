"""HiPPO-LegS, the state space that remembers a whole past, and the spectra of diagonal state spaces made after it.

A. Gu, A. Gupta, K. Goel and C. Re, "On the Parameterization and Initialization of Diagonal State Space Models", NeurIPS
2022 (arXiv 2206.11893). A state of N numbers follows x' = A x + B u. With the matrices of HiPPO-LegS its answer to an
impulse, e^(tA) B, is made of the first N Legendre polynomials of e^-t. A is a skew matrix S, minus half the identity,
minus P P^T; without the last it can be diagonalised, and this gives the first of the spectra.
"""

import math

import torch
from torch import Tensor

from polylib import _checks

SPECTRA = ("legs", "inv", "lin", "quadratic", "real", "random")


def hippo_legs(N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (N, N), B (N,) and P (N,) of HiPPO-LegS, in float64.

    A[n, k] is -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k and 0 above; B[n] = sqrt(2n + 1), and
    P = B / sqrt(2). A + P P^T + I / 2 is skew-symmetric.

    Raises:
        ValueError: an N that is no positive integer.
    """
    N = _checks.integer("N", N, least=1)
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    B = (2 * n + 1).sqrt()
    A = -torch.outer(B, B).tril(-1) - torch.diag(n + 1)
    return A, B, B / math.sqrt(2)


def s4d_spectrum(kind: str, N: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the diagonal of A at the start, (N / 2,) in complex128: one of each pair of conjugate numbers.

    Args:
        kind: -1/2 + i w_n, n = 0, ..., N/2 - 1, with
            "legs": the positive eigenvalues of the skew part of HiPPO-LegS, divided by i, from the largest;
            "inv": w_n = N / pi (N / (2n + 1) - 1), which approximates them;
            "lin": w_n = pi n, as in a Fourier series;
            "quadratic": w_n = (2n + 1)^2 / pi;
            "random": w_n the exponentials of standard normal numbers; and
            "real": -(n + 1), the diagonal of HiPPO-LegS itself.
        N: the size of the state, even.
        generator: for "random".

    Raises:
        ValueError: an unknown kind, or an N that is not a positive even number.
    """
    _checks.choice("kind", kind, SPECTRA)
    N = _checks.multiple("N", N, "the size of a conjugate pair", 2)
    n = torch.arange(N // 2, dtype=torch.float64, device="cpu")
    if kind == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if kind == "legs":
        A, _, P = hippo_legs(N)
        skew = A + torch.outer(P, P)
        frequency = torch.linalg.eigvalsh(-1j * (skew - skew.T) / 2).flip(0)[: N // 2]
    elif kind == "inv":
        frequency = N / math.pi * (N / (2 * n + 1) - 1)
    elif kind == "lin":
        frequency = math.pi * n
    elif kind == "quadratic":
        frequency = (2 * n + 1).square() / math.pi
    else:
        frequency = torch.randn(N // 2, generator=generator, dtype=torch.float64, device="cpu").exp()
    return torch.complex(torch.full_like(n, -0.5), frequency)
