"""How far the confidence of a classifier is from its accuracy.

M. P. Naeini, G. F. Cooper and M. Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI
2015; used in arXiv 2210.06313.
"""

import torch
from torch import Tensor

from polylib import _checks


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> Tensor:
    r"""Samples are put into bins of equal width by their confidence, the largest probability:
    $\sum_b\frac{n_b}{n}\lvert\text{acc}_b-\text{conf}_b\rvert$.

    Args:
        probabilities: `(..., samples, classes)`, floating, from 0 to 1.
        labels: `(..., samples)`, int64, or of a shape that is broadcast to this one.
        bins: of equal width. A confidence at the border of two belongs to the lower one.

    Returns:
        `(...)`.

    Raises:
        TypeError: probabilities that are not floating, labels that are not integers.
        ValueError: shapes that don't fit, no samples, or probabilities out of range.
    """
    bins = _checks.integer("bins", bins, least=1)
    _checks.floating("dtype of probabilities", probabilities.dtype)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    fits = probabilities.dim() >= 2 and probabilities.numel() > 0
    _checks.shape("probabilities", probabilities, "(..., samples, classes), not empty", fits)
    rows = probabilities.shape[:-1]
    try:
        labels = labels.expand(rows)
    except RuntimeError:
        _checks.shape("labels", labels, f"{tuple(rows)}, as probabilities has it", False)
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all():
        raise ValueError("probabilities must be from 0 to 1, got one that is not")
    confidence, choice = probabilities.max(-1)
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = (choice == labels).to(confidence.dtype) - confidence
    sums = torch.zeros(*rows[:-1], bins, dtype=gap.dtype, device=gap.device).scatter_add(-1, place, gap)
    return sums.abs().sum(-1) / rows[-1]
