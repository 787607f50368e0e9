"""Projection on the vectors with at most k nonzeros that are nonnegative and have a given sum.

T. Liu, J. Puigcerver and M. Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023 (arXiv 2209.15466), where it
gives a column of the transport plan; A. Kyrillidis, S. Becker, V. Cevher and C. Koch, "Sparse projections onto the
simplex", ICML 2013. The set is not convex, and yet the projection is simple: keep the k largest entries and project
those on the simplex.
"""

import torch
from torch import Tensor

from polylib import _checks, kernels
from polylib.kernels._common import widened


def topk_simplex_projection(s: Tensor, k: int, mass: float | Tensor = 1.0, dim: int = 0) -> Tensor:
    r"""The nearest vectors t >= 0 with at most k nonzeros and the sum `mass`, along one dimension.

    With u the k largest entries of s in descending order, the largest r such that
    $u_r > \theta_r = (u_1 + \dots + u_r - \text{mass}) / r$ says how many are kept: the first r become
    $u_i - \theta_r$, all others zero. Of equal entries at the border the first ones are kept; there the projection is
    not unique, and jumps. Elsewhere it is continuous, and its gradient is that of the entries kept, centred.

    Args:
        s: any floating dtype; float16 and bfloat16 are computed in float32. An entry of -inf stays zero.
        k: at least 1; more than there are entries means no bound.
        mass: above 0, a number or a tensor of the shape of `s` without `dim`.
        dim: along which the vectors lie: 0 for the columns of a matrix.

    Returns:
        The projections, of the shape and dtype of `s`. Differentiable in `s` and `mass`: any number of times on
        a CPU, once by the kernel that does it on a GPU.

    Raises:
        TypeError: an `s` that is not floating.
        ValueError: k below 1, a mass that is not above 0 and finite, NaN or +inf in `s`, or a vector without any
            finite entry.
    """
    k = _checks.integer("k", k, least=1)
    _checks.floating("dtype of s", s.dtype)
    fits = -s.dim() <= dim < s.dim() and s.shape[dim] > 0
    _checks.shape("s", s, f"with at least one entry along dimension {dim}", fits)
    if isinstance(mass, Tensor) and mass.dim() > 0:
        want = s.shape[: dim % s.dim()] + s.shape[dim % s.dim() + 1 :]
        _checks.shape("mass", mass, f"{tuple(want)}, that of s without dimension {dim}", mass.shape == want)
        mass = mass.to(widened(s).dtype)
        if not (mass.isfinite() & (mass > 0)).all():
            raise ValueError(f"mass must be above 0 and finite, got {mass.tolist()}")
    else:
        _checks.number("mass", mass.detach() if isinstance(mass, Tensor) else mass, above=0)
        mass = torch.as_tensor(mass, dtype=widened(s).dtype, device=s.device).expand(s.select(dim, 0).shape)
    if not s.amax(dim).isfinite().all():  # the largest of a vector with a NaN is NaN
        raise ValueError("s must have a finite largest entry along dim and no NaN, got one that has not")
    return project_columns(s, k, mass, dim)


def project_columns(s: Tensor, k: int, mass: Tensor, dim: int) -> Tensor:
    """`topk_simplex_projection` without a look at the values, for loops that call it often: a NaN gives NaN.

    `mass` has one entry a vector.
    """
    return kernels.topk_simplex(s.movedim(dim, -1), k, mass).movedim(-1, dim)
