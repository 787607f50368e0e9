"""Positive random features, whose products are unbiased estimates of the exponential kernel of softmax attention.

K. Choromanski and others, "Rethinking Attention with Performers", ICLR 2021 (arXiv 2009.14794); with the inputs
normalised as in S. Luo and others, "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
NeurIPS 2021 (arXiv 2106.12566).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import widened


def orthogonal_projections(num_features: int, dim: int, orthogonal: bool = True) -> Tensor:
    """Draw the rows w of random features, (num_features, dim), each standard normal.

    Rows are orthogonal within each block of `dim`, with lengths drawn as those of normal vectors; each alone is still
    normal, and the products of features vary less. Uses torch's generator.

    Args:
        orthogonal: without, all rows are independent.

    Raises:
        ValueError: sizes that are no positive integers.
    """
    m = _checks.integer("num_features", num_features, least=1)
    dim = _checks.integer("dim", dim, least=1)
    rows = torch.randn(m, dim)
    if not orthogonal:
        return rows
    square, triangle = torch.linalg.qr(torch.randn(-(-m // dim), dim, dim))
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()  # so that the directions are uniform
    return (square * signs[:, None]).mT.flatten(0, 1)[:m] * rows.norm(dim=1, keepdim=True)


def log_features(x: Tensor, proj: Tensor, normalize: bool) -> Tensor:
    """Return the logarithms of the features, (..., n, m), but for - log(m) / 2; in at least float32."""
    x = widened(x)
    if normalize:
        x = F.normalize(x, dim=-1)
    return x @ proj.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2


def positive_random_features(x: Tensor, proj: Tensor, normalize: bool = True) -> Tensor:
    """Return phi(x) = exp(W x - x . x / 2) / sqrt(m); the mean of phi(x) . phi(y) over draws of W is exp(x . y).

    The relative variance of one product is (exp(s) - 1) / m, where s is the squared length of x + y.

    Args:
        x: (..., n, d), queries or keys.
        proj: W, (m, d), rows drawn from a standard normal; see `orthogonal_projections`.
        normalize: divide each x by its length first.

    Returns:
        (..., n, m), in at least float32. Large x overflow, or vanish all at once; normalised, x may have lengths from
        10^-12 to 10^19: shorter ones stay shorter than 1, longer ones count as 0.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes that don't fit.

    Source: arXiv 2106.12566.
    """
    for name, value in (("x", x), ("proj", proj)):
        _checks.floating(f"dtype of {name}", value.dtype)
    _checks.shape("proj", proj, "(m, d) with m of at least 1", proj.dim() == 2 and len(proj) > 0)
    fits = x.dim() >= 2 and x.shape[-1] == proj.shape[1]
    _checks.shape("x", x, f"(..., n, {proj.shape[1]}), as proj has it", fits)
    return log_features(x, proj, normalize).exp() * len(proj) ** -0.5
