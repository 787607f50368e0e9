"""Products with Toeplitz matrices, whose entries depend on the distance from the diagonal alone, by FFT."""

import torch.nn.functional as F
from torch import Tensor

from polylib import _checks
from polylib.sequences.long_convolution import two_sided_convolution


def toeplitz_matmul(lags: Tensor, x: Tensor) -> Tensor:
    """Return T x for the matrix with T_ij = c_(j - i), in n log n steps.

    Rounding errors are about as large in all rows: rows of results that are much smaller than the largest drown.

    Args:
        lags: c, (..., 2n - 1), from the lag -(n - 1) to n - 1; leading dimensions broadcast with those of x.
        x: (..., n, f).

    Returns:
        (..., n, f), in the dtype of x; computed in at least float32.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: no rows, or lags that are not 2n - 1.
    """
    _checks.shape("x", x, "(..., n, f) with n of at least 1", x.dim() >= 2 and x.shape[-2] > 0)
    n = x.shape[-2]
    fits = lags.dim() > 0 and lags.shape[-1] == 2 * n - 1
    _checks.shape("lags", lags, f"(..., 2n - 1) with 2n - 1 = {2 * n - 1}", fits)
    _checks.floating("dtype of lags", lags.dtype)
    past, future = lags[..., :n].flip(-1), F.pad(lags[..., n:], (0, 1))
    return two_sided_convolution(x.mT, past[..., None, :], future[..., None, :]).mT
