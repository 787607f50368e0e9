"""Initial weights of a given rank and size, and the effective rank of a matrix.

Y. H. Liu, A. Baratin, J. Cornford, S. Mihalas, E. Shea-Brown and G. Lajoie, "How connectivity structure shapes rich and
lazy learning in neural circuits", ICLR 2024 (arXiv 2310.08513). Weights are drawn once; each rank keeps their leading
singular directions and is scaled back to the size of the draw, so that ranks are compared at one norm.
"""

import torch
from torch import Tensor

from polylib import _checks

_NORMS = ("fro", "spectral", None)


def low_rank_init(weight: Tensor, rank: int, *, norm: str | None = "fro") -> Tensor:
    """The best approximation of `weight` by a matrix of rank `rank`, scaled to the norm of `weight`.

    At full rank this is `weight` itself. At equal Frobenius norm the largest singular value grows as the rank falls.

    Args:
        weight: `(N, M)`, floating point.
        rank: 1 to min(N, M).
        norm: what is kept: `"fro"`, the Frobenius norm, `"spectral"`, the largest singular value, or `None`, neither.

    Returns:
        A new tensor `(N, M)`, of the dtype and device of `weight`, without gradient.

    Raises:
        ValueError: a weight that is not a finite matrix, a rank out of range, an unknown norm, or a zero matrix.
    """
    _check(weight, norm)
    _checks.integer("rank", rank, least=1, most=min(weight.shape))
    if rank == min(weight.shape):
        return weight.detach().clone()
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    return _scaled((left[:, :rank] * values[:rank]) @ right[:rank], weight.detach(), norm)


def aligned_init(weight: Tensor, directions: Tensor, *, norm: str | None = "fro") -> Tensor:
    """`weight` seen through some directions of its input only, scaled to the norm of `weight`.

    Each row is projected onto the span of `directions`: W P, with P the orthogonal projector. The rank is at most the
    number of directions. Where they are those that the task needs, the start is low-rank and aligned.

    Args:
        weight: `(N, M)`, floating point.
        directions: `(r, M)`, linearly independent, r at most M; their lengths don't matter.
        norm: as in `low_rank_init`.

    Raises:
        ValueError: as `low_rank_init`; directions of another shape, dependent ones, or a projection that is zero.
    """
    _check(weight, norm)
    if directions.dim() != 2 or directions.shape[1] != weight.shape[1] or not 1 <= len(directions) <= weight.shape[1]:
        raise ValueError(
            f"directions must have shape (r, {weight.shape[1]}), r from 1 to that number, got {tuple(directions.shape)}"
        )
    directions = directions.detach().to(weight)
    if torch.linalg.matrix_rank(directions) < len(directions):
        raise ValueError(f"directions must be independent vectors, got {len(directions)} that depend on each other")
    basis = torch.linalg.qr(directions.mT).Q
    return _scaled(weight.detach() @ basis @ basis.mT, weight.detach(), norm)


def effective_rank(weight: Tensor, kind: str = "entropy") -> Tensor:
    """How many singular directions a matrix uses, as a real number from 1 to min(N, M).

    Args:
        weight: `(..., N, M)`, floating point.
        kind: of the singular values s: `"entropy"`, exp(-sum p log p) with p = s / sum s (Roy and Vetterli, 2007);
            `"participation"`, (sum s^2)^2 / sum s^4; `"stable"`, sum s^2 / max s^2.

    Returns:
        `(...)`; not a number for a matrix of zeros.

    Raises:
        ValueError: an unknown kind, or fewer than two dimensions.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight must be a matrix or a stack of them, got shape {tuple(weight.shape)}")
    values = torch.linalg.svdvals(weight)
    square = values.square()
    if kind == "entropy":
        share = values / values.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp()
    if kind == "participation":
        return square.sum(-1).square() / square.square().sum(-1)
    if kind == "stable":
        return square.sum(-1) / square.amax(-1)
    raise ValueError(f"kind must be 'entropy', 'participation' or 'stable', got {kind!r}")


def _check(weight: Tensor, norm: str | None) -> None:
    if weight.dim() != 2 or not weight.isfinite().all():
        raise ValueError(f"weight must be a matrix of finite numbers, got shape {tuple(weight.shape)}")
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {_NORMS}, got {norm!r}")
    if not weight.any():
        raise ValueError("weight must be a matrix with at least one direction, got one that is zero")


def _scaled(matrix: Tensor, like: Tensor, norm: str | None) -> Tensor:
    if norm is None:
        return matrix
    order = "fro" if norm == "fro" else 2
    size = torch.linalg.matrix_norm(matrix, order)
    target = torch.linalg.matrix_norm(like, order)
    if size <= 1e-6 * target:
        raise ValueError("directions must leave something of weight, got some that all its rows are orthogonal to")
    return matrix * (target / size)
