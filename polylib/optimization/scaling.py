"""What small runs say about others: the rate between the rates that were tried, the value at a size that was not.

M. Wortsman, P. J. Liu, L. Xiao et al., "Small-scale proxies for large-scale Transformer training instabilities", ICLR
2024 (arXiv 2309.14322), foretell the attention logits of a large model by a parabola in the logarithms of both axes.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from polylib import _checks


def optimal_learning_rate(rates: Sequence[float], losses: Tensor) -> float:
    """The vertex of a parabola, over log rate, through the smallest loss and its two neighbours.

    Where the smallest loss lies at an end of the grid, that rate is returned: the optimum may lie beyond.

    Args:
        rates: K learning rates in ascending order.
        losses: `(K,)`, one for each rate. A loss that is not finite counts as larger than all others.

    Raises:
        ValueError: fewer than three rates, rates that do not ascend from above zero, another number of losses, or no
            finite loss.
    """
    x, y = _checked("rates", rates), losses.detach().double().cpu().numpy()
    if y.shape != x.shape:
        raise ValueError(f"losses must have one entry for each of {len(x)} rates, got the shape {tuple(losses.shape)}")
    if not np.isfinite(y).any():
        raise ValueError("losses must have a finite entry, got none")
    best = int(np.where(np.isfinite(y), y, np.inf).argmin())
    around = slice(best - 1, best + 2)
    if best in (0, len(x) - 1) or not np.isfinite(y[around]).all():
        return float(np.exp(x[best]))
    curvature, slope, _ = np.polyfit(x[around] - x[best], y[around], 2)
    return float(np.exp(x[best] - slope / (2 * curvature))) if curvature > 0 else float(np.exp(x[best]))


def extrapolate(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    """The value at another size, by the parabola of least squares through log value over log size.

    Args:
        sizes: at least three, in ascending order: widths, or numbers of parameters.
        values: positive, one for each size.
        size: where the parabola is read off.

    Raises:
        ValueError: fewer than three sizes, sizes or values that are not as above, or a `size` that is not positive.
    """
    x, y = _checked("sizes", sizes), np.asarray(values, dtype=float)
    if y.shape != x.shape or not (np.isfinite(y) & (y > 0)).all():
        raise ValueError(f"values must be {len(x)} positive numbers, one for each size, got {list(values)}")
    place = np.log(_checks.number("size", size, above=0))
    return float(np.exp(np.polyval(np.polyfit(x, np.log(y), 2), place)))


def _checked(name: str, values: Sequence[float]) -> np.ndarray:
    """The logarithms of at least three positive numbers that ascend."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) < 3 or not (array[0] > 0 and (np.diff(array) > 0).all()):
        raise ValueError(f"{name} must be at least three positive numbers that ascend, got {list(values)}")
    return np.log(array)
