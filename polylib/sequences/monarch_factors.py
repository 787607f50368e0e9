"""Monarch factors of given matrices: the nearest ones of a dense matrix, and exact ones of the Fourier transform.

D. Fu, S. Arora, J. Grogan, I. Johnson, S. Eyuboglu, A. Thomas, B. Spector, M. Poli, A. Rudra and C. Re, "Monarch Mixer:
A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023 (arXiv 2310.12109). The product with two factors, with its
order of indices, is `polylib.kernels.monarch_multiply`.
"""

import math

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels.monarch_multiply import monarch_multiply


def monarch_dense(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the matrix (l s, k p) that `monarch_multiply(x, w1, w2)` multiplies x with.

    Args:
        w1: (k, q, p).
        w2: (l, s, r) with l r = k q.
    """
    _checks.shape("w1", w1, "(k, q, p)", w1.dim() == 3)
    identity = torch.eye(w1.shape[0] * w1.shape[2], dtype=w1.dtype, device=w1.device)
    return monarch_multiply(identity, w1, w2).T


def project_to_monarch(dense: Tensor, sizes: tuple[int, int] | None = None, rank: int = 1) -> tuple[Tensor, Tensor]:
    """Return the factors of the Monarch matrix that is nearest to a dense one, in the Frobenius norm.

    The entries that run through block k of the first factor and block l of the second, dense[s l_max + l, k p_max + p]
    for all s and p, are a matrix of its own for each k and l. A Monarch matrix has one of the given rank there, and the
    nearest of that rank is a truncated singular value decomposition.

    Args:
        dense: (n, n), floating or complex.
        sizes: the numbers of blocks k and l, both divisors of n; by default the largest divisor of n up to its root,
            and n over that.
        rank: of each of these matrices.

    Returns:
        w1 (k, rank l, n / k) and w2 (l, n / l, rank k), each with the root of a singular value.

    Raises:
        TypeError: integers.
        ValueError: a matrix that is not square or not finite, sizes that don't divide n, a rank that is not from 1 to
            the smaller of n / k and n / l.
    """
    if not (dense.is_floating_point() or dense.is_complex()):
        raise TypeError(f"dense must have a floating-point or complex dtype, got {dense.dtype}")
    _checks.shape(
        "dense", dense, "(n, n) with n of at least 1", dense.dim() == 2 and 0 < dense.shape[0] == dense.shape[1]
    )
    n = len(dense)
    if not dense.isfinite().all():
        raise ValueError("dense must be finite, got an entry that is not")
    if sizes is None:
        root = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        sizes = root, n // root
    if len(sizes) != 2:
        raise ValueError(f"sizes must be two numbers of blocks, got {sizes!r}")
    k, l = (_checks.divisor(f"sizes[{i}]", size, "n", n) for i, size in enumerate(sizes))  # noqa: E741
    rank = _checks.integer("rank", rank, least=1, most=min(n // k, n // l))
    slices = dense.reshape(n // l, l, k, n // k).permute(2, 1, 0, 3)  # (k, l, s, p)
    u, size, vh = torch.linalg.svd(slices, full_matrices=False)
    root_size = size[..., :rank].sqrt()
    # Number j of the rank goes through entry j l_max + l of block k of the first factor, k rank + j of the second.
    w1 = (root_size[..., None] * vh[..., :rank, :]).transpose(1, 2).reshape(k, rank * l, n // k)
    w2 = (u[..., :rank] * root_size[..., None, :]).permute(1, 2, 0, 3).reshape(l, n // l, k * rank)
    return w1.contiguous(), w2.contiguous()


def dft_factors(n: int, blocks: int | None = None, dtype: torch.dtype = torch.complex128) -> tuple[Tensor, Tensor]:
    """Return Monarch factors of the discrete Fourier transform of n numbers, for inputs in the order of `shuffled`.

    With n = K P, x at p K + k goes to block k: w1 (K, P, P) holds K transforms of length P, w2 (P, K, K) those of
    length K, times the powers of exp(-2 pi i / n) that join them.

    Args:
        n: at least 1.
        blocks: K, a divisor of n; by default the largest up to the root of n.
        dtype: complex64 or complex128.

    Raises:
        ValueError: an n that is not a positive integer, blocks that don't divide it, another dtype.
    """
    n = _checks.integer("n", n, least=1)
    if blocks is None:
        blocks = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    K = _checks.divisor("blocks", blocks, "n", n)
    _checks.choice("dtype", dtype, (torch.complex64, torch.complex128))
    P = n // K
    k, p = torch.arange(K), torch.arange(P)
    first = _root_of_one(torch.outer(p, p), P).expand(K, P, P)
    second = _root_of_one(P * torch.outer(k, k) + p[:, None, None] * k, n)
    return first.to(dtype).contiguous(), second.to(dtype)


def shuffled(x: Tensor, blocks: int) -> Tensor:
    """Return x (..., n) in the order of `dft_factors`: block k has x at k, k + blocks, k + 2 blocks, ...

    Raises:
        ValueError: blocks that don't divide n.
    """
    _checks.shape("x", x, "(..., n)", x.dim() > 0)
    blocks = _checks.divisor("blocks", blocks, "n", x.shape[-1])
    return x.unflatten(-1, (-1, blocks)).transpose(-2, -1).flatten(-2)


def _root_of_one(power: Tensor, n: int) -> Tensor:
    """exp(-2 pi i power / n) in complex128, from whole turns taken off."""
    angle = (power % n).double() * (-2 * math.pi / n)
    return torch.complex(angle.cos(), angle.sin())
