"""Convolutions as long as the sequence, by fast Fourier transforms."""

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import widened


def causal_convolution(u: Tensor, K: Tensor) -> Tensor:
    """Return y_t = sum over l <= t of K_l u_(t - l), (..., L), by a transform long enough that nothing wraps around.

    Args:
        u: (..., L), real.
        K: (..., M), real; its leading dimensions broadcast with those of u.

    Returns:
        In the dtype of u; computed in at least float32.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: an axis of time without entries.
    """
    for name, value in (("u", u), ("K", K)):
        fits = value.dim() > 0 and value.shape[-1] > 0
        _checks.shape(name, value, "(..., time) with at least one time", fits)
        _checks.floating(f"dtype of {name}", value.dtype)
    length = u.shape[-1]
    if u.numel() == 0:  # an empty batch, which some libraries of transforms refuse
        return (u * K[..., :1]).to(u.dtype)
    n = 2 * max(length, K.shape[-1])
    product = torch.fft.rfft(widened(u), n=n) * torch.fft.rfft(widened(K), n=n)
    return torch.fft.irfft(product, n=n)[..., :length].to(u.dtype)


def two_sided_convolution(u: Tensor, K: Tensor, K_back: Tensor) -> Tensor:
    """Return y_t = sum over l >= 0 of K_l u_(t - l) + K_back_l u_(t + 1 + l), (..., L): a kernel for each direction.

    Args:
        u: (..., L), real.
        K: (..., L), real, the lags 0, 1, 2, ...; its leading dimensions broadcast with those of u.
        K_back: (..., L), as K, the lags -1, -2, -3, ...

    Returns:
        In the dtype of u; computed in at least float32.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: an axis of time without entries, or of different lengths.
    """
    length = u.shape[-1] if u.dim() else 0
    for name, value in (("u", u), ("K", K), ("K_back", K_back)):
        fits = value.dim() > 0 and value.shape[-1] == length > 0
        _checks.shape(name, value, "(..., time), with at least one time and as many for all", fits)
        _checks.floating(f"dtype of {name}", value.dtype)
    if u.numel() == 0:  # an empty batch, which some libraries of transforms refuse
        return (u * (K + K_back)).to(u.dtype)
    both = torch.cat([widened(K), widened(K_back).flip(-1)], -1)  # a negative lag comes in from the end
    product = torch.fft.rfft(widened(u), n=2 * length) * torch.fft.rfft(both)
    return torch.fft.irfft(product, n=2 * length)[..., :length].to(u.dtype)
