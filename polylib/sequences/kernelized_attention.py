"""Attention from positive random features with a relative positional bias, exactly, without its n x n matrix.

S. Luo, S. Li, T. Cai, D. He, D. Peng, S. Zheng, G. Ke, L. Wang and T.-Y. Liu, "Stable, Fast and Accurate: Kernelized
Attention with Relative Positional Encoding", NeurIPS 2021 (arXiv 2106.12566).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import widened
from polylib.kernels.kernel_attention_rpe import kernel_attention_rpe
from polylib.sequences.random_features import log_features, orthogonal_projections
from polylib.sequences.toeplitz import toeplitz_matmul

METHODS = ("auto", "fft", "dense", "kernel")
_AT_ONCE = 2**18  # numbers that are transformed together: more leave the caches


def kernelized_attention_rpe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    proj: Tensor,
    causal: bool = False,
    method: Literal["auto", "fft", "dense", "kernel"] = "auto",
    *,
    normalize: bool = True,
    epsilon: float = 0.0,
) -> Tensor:
    """Return z_i = sum_j exp(b_(j - i)) (phi(q_i) . phi(k_j)) v_j, divided by the same sum without v_j.

    phi are `positive_random_features`. With `normalize`, of q and k divided by their lengths; without, of q and k as
    they are, so that what softmax attention divides by the root of d is the caller's to divide.

    Args:
        q, k: (B, H, n, d).
        v: (B, H, n, dv).
        bias: b, (H, 2n - 1), for the lags j - i from -(n - 1) to n - 1. A constant added to it changes nothing.
        proj: (m, d), see `orthogonal_projections`; of all heads.
        causal: whether a query sees only keys at its own place and before it.
        epsilon: is added to each feature, after the largest of a query, and the largest of all keys of a head, were
            made 1. Without normalisation some vanish in float32, and an early query may be left with 0 / 0.
        method: "dense" forms the n x n weights, "fft" takes n log n steps, "kernel" is
            the op `kernel_attention_rpe`. "auto" is the kernel for CUDA tensors, and elsewhere what takes less
            time at this length. The FFT's rounding errors are as large for a query whose weights are small as for
            others. So with `causal` it runs in float64, which serves while exp(b) spans less than some 10^11; "dense"
            has no such limit.

    Returns:
        (B, H, n, dv), in the dtype of v. A query whose weights are all 0 gives NaN, or with "fft" what rounding leaves.

    Raises:
        TypeError: tensors that are not floating.
        ValueError: shapes that don't fit, an `epsilon` below 0, no places at all, or an unknown method.

    Source: arXiv 2106.12566.
    """
    _check(q, k, v, bias, proj)
    method = _checks.choice("method", method, METHODS)
    epsilon = _checks.number("epsilon", epsilon, least=0)
    n, width, m = q.shape[-2], v.shape[-1], len(proj)
    if method == "auto":
        method = "kernel" if q.is_cuda else "fft" if _fft_is_faster(n, width, m, causal) else "dense"
    with _without_autocast(q):
        shift = not normalize or epsilon > 0 or v.dtype == torch.float16  # which ends at 65,504
        features = _features(q, k, proj, normalize, epsilon, shift)
        bias = widened(bias).to(features[0].dtype)
        bias = bias - bias[:, : n if causal else None].amax(-1, keepdim=True).detach()  # which cancels
        if method == "fft":
            return _by_fft(*features, v, bias, causal).to(v.dtype)
        if method == "dense":
            return kernel_attention_rpe(*features, v.to(bias.dtype), bias, causal, backend="reference").to(v.dtype)
    of_q, of_k = (feature.to(v.dtype) for feature in features)
    return kernel_attention_rpe(of_q, of_k, v, bias, causal)


def _features(
    q: Tensor, k: Tensor, proj: Tensor, normalize: bool, epsilon: float, shift: bool
) -> tuple[Tensor, Tensor]:
    """Return features of queries and keys, each up to a factor for a query and one for all keys, which cancel.

    With `shift` the largest feature of a query is 1, and so is that of all keys of a head.
    """
    of_q, of_k = log_features(q, proj, normalize), log_features(k, proj, normalize)
    if shift:
        of_q = of_q - of_q.amax(-1, keepdim=True).detach()
        of_k = of_k - of_k.amax((-2, -1), keepdim=True).detach()
    return of_q.exp() + epsilon, of_k.exp() + epsilon


def _by_fft(of_q: Tensor, of_k: Tensor, v: Tensor, bias: Tensor, causal: bool) -> Tensor:
    n = v.shape[-2]
    if causal:
        bias = bias.masked_fill(torch.arange(2 * n - 1, device=bias.device) >= n, float("-inf"))
        of_q, of_k, v, bias = of_q.double(), of_k.double(), v.double(), bias.double()
    lags = bias.exp()[:, None]
    with_one = torch.cat([v.to(of_k.dtype), torch.ones_like(of_k[..., :1])], -1).mT[..., None, :, :]
    some = max(1, _AT_ONCE // max(1, with_one.numel()))
    both = torch.zeros_like(with_one[..., 0, :, :])
    for of_q_, of_k_ in zip(of_q.mT.split(some, -2), of_k.mT.split(some, -2), strict=True):
        outer = of_k_[..., None, :] * with_one  # (B, H, some, dv + 1, n)
        both = both + (of_q_[..., None, :] * toeplitz_matmul(lags, outer.mT).mT).sum(-3)
    return (both[..., :-1, :] / both[..., -1:, :]).mT


def _fft_is_faster(n: int, width: int, m: int, causal: bool) -> bool:
    """Guess from counts of steps, weighted by what they took on CPUs. In float64 transforms take longer."""
    dearer = 23 if causal else 13
    return n * (m + width + 32) > dearer * m * (width + 1) * math.log2(2 * n)


def _without_autocast(x: Tensor) -> torch.autocast:
    device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    return torch.autocast(device, enabled=False)  # exponentials of what bfloat16 holds are off by per cents


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, proj: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v), ("bias", bias), ("proj", proj)):
        _checks.floating(f"dtype of {name}", value.dtype)
    _checks.shape("q", q, "(B, H, n, d) with n of at least 1", q.dim() == 4 and q.shape[2] > 0)
    _checks.shape("k", k, f"{tuple(q.shape)}, as q", k.shape == q.shape)
    batch, heads, n, d = q.shape
    _checks.shape("v", v, f"({batch}, {heads}, {n}, dv), as q", v.dim() == 4 and v.shape[:3] == q.shape[:3])
    _checks.shape("bias", bias, f"(H, 2n - 1) = ({heads}, {2 * n - 1})", tuple(bias.shape) == (heads, 2 * n - 1))
    fits = proj.dim() == 2 and len(proj) > 0 and proj.shape[1] == d
    _checks.shape("proj", proj, f"(m, {d}), as q, with m of at least 1", fits)


class KernelizedSelfAttention(nn.Module):
    """Multi-head self-attention from random features, (batch, n, d_model) to the same.

    Attributes:
        bias: (heads, 2 max_len - 1), zero at the start, or None; sequences of n places use the 2n - 1 in its middle.
        projections: (num_features, d_model / heads), drawn once and not trained; None for softmax attention.

    Args:
        d_model: channels.
        n_heads: heads, which divide them.
        max_len: the longest sequence.
        num_features: m, for each head. None is softmax attention itself, with the same parameters, by
            `scaled_dot_product_attention`: the baseline.
        causal: whether an output sees no later input.
        rpe: whether there is a relative positional bias.
        normalize: divide queries and keys by their lengths; without, by the fourth root of d, as softmax attention
            does, and 10^-6 is added to each feature, as the authors of the features do.
        orthogonal: whether the projections are orthogonal.
        method: see `kernelized_attention_rpe`.

    Raises:
        ValueError: sizes that are no positive integers, heads that don't divide the channels, an unknown method.

    Source: arXiv 2106.12566.
    """

    projections: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        max_len: int,
        num_features: int | None = 16,
        causal: bool = False,
        *,
        rpe: bool = True,
        normalize: bool = True,
        orthogonal: bool = True,
        method: Literal["auto", "fft", "dense", "kernel"] = "auto",
    ) -> None:
        super().__init__()
        self.d_model = _checks.multiple("d_model", d_model, "n_heads", n_heads)
        self.n_heads = _checks.integer("n_heads", n_heads, least=1)
        self.max_len = _checks.integer("max_len", max_len, least=1)
        self.causal, self.normalize = causal, normalize
        self.method = _checks.choice("method", method, METHODS)
        self.inputs = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)
        self.bias = nn.Parameter(torch.zeros(self.n_heads, 2 * self.max_len - 1)) if rpe else None
        proj = None
        if num_features is not None:
            proj = orthogonal_projections(num_features, self.d_model // self.n_heads, orthogonal)
        self.register_buffer("projections", proj)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, n, d_model) of the same.

        Raises:
            ValueError: another shape, or an n that is not from 1 to `max_len`.
        """
        fits = x.dim() == 3 and 0 < x.shape[1] <= self.max_len and x.shape[2] == self.d_model
        _checks.shape("x", x, f"(batch, n, {self.d_model}) with n from 1 to max_len = {self.max_len}", fits)
        n = x.shape[1]
        q, k, v = self.inputs(x).unflatten(-1, (3, self.n_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        if self.bias is None:
            bias = q.new_zeros(self.n_heads, 2 * n - 1)
        else:
            bias = self.bias[:, self.max_len - n : self.max_len + n - 1]
        z = self._softmax(q, k, v, bias) if self.projections is None else self._kernelized(q, k, v, bias)
        return self.output(z.transpose(-3, -2).flatten(-2))

    def _kernelized(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        assert self.projections is not None
        if not self.normalize:
            q, k = q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25
        return kernelized_attention_rpe(
            q,
            k,
            v,
            bias,
            self.projections,
            self.causal,
            self.method,
            normalize=self.normalize,
            epsilon=0.0 if self.normalize else 1e-6,
        )

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        n = q.shape[-2]
        scale = None
        if self.normalize:
            q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0
        if self.causal:
            bias = bias.masked_fill(torch.arange(2 * n - 1, device=bias.device) >= n, float("-inf"))
        logits = bias.to(q.dtype).unfold(-1, n, 1).flip(-2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=logits, scale=scale)
