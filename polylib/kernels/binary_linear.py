r"""A product of signs, packed 32 to a word: $y_{mn} = \sum_k \mathrm{sign}(x_{mk})\,\mathrm{sign}(w_{nk})$, exactly.

Sources: Courbariaux, Hubara, Soudry, El-Yaniv, Bengio, "Binarized Neural Networks", arXiv 1602.02830; Rastegari,
Ordonez, Redmon, Farhadi, "XNOR-Net", ECCV 2016.

`pack_signs` turns x (..., K) into words (..., L) of int32 with $L = \lceil K/32\rceil$: bit b of word j, counted from
the lowest, is 1 where $x_{32j+b} \ge 0$, and zero counts as positive. Two signs have the product -1 where their bits
differ, so that

$$y_{mn} = K - 2\sum_{j=1}^{L} \mathrm{popcount}(x_{mj} \oplus w_{nj}).$$

The bits beyond K are 0 in every word: they never differ, and cancel. x_words (..., L), w_words (N, L), y (..., N), all
int32; y is exact, in any order of the sum.

There is no gradient: a layer trains with the real-valued product of its signs, whose derivative is chosen where the
signs are made (`sine_binarize` for weights, a window around zero for activations). Once trained, its weights are packed
and this product takes its place, with the same values.

A word holds what 32 numbers hold in 64 bytes of bfloat16 or 128 of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, choose_backend

WORD = 32

# --- the definition ---------------------------------------------------------------------------------------------------


def pack_signs_reference(x: Tensor) -> Tensor:
    """Return the signs of x (..., K) as int32 words (..., ceil(K / 32)) in plain PyTorch; bit 1 for x >= 0."""
    bits = torch.nn.functional.pad((x >= 0).to(torch.int32), (0, -x.shape[-1] % WORD))
    places = torch.arange(WORD, device=x.device, dtype=torch.int32)
    return (bits.unflatten(-1, (-1, WORD)) << places).sum(-1, dtype=torch.int32)  # no two have a bit in common


def unpack_signs(words: Tensor, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the signs, -1 and 1, of shape (..., features), that `pack_signs` made the words (..., L) of."""
    places = torch.arange(WORD, device=words.device, dtype=torch.int32)
    bits = ((words.unsqueeze(-1) >> places) & 1).flatten(-2)
    return (2 * bits[..., :features] - 1).to(dtype)


def binary_linear_reference(x_words: Tensor, w_words: Tensor, features: int) -> Tensor:
    """Return the products of signs as int32 in plain PyTorch: a floating-point product of whole numbers, exact.

    x_words (..., L), w_words (N, L), both from `pack_signs`; features is K. PyTorch itself checks the arguments.
    """
    dtype = torch.float32 if features <= 2**24 else torch.float64
    x, w = (unpack_signs(words, features, dtype) for words in (x_words, w_words))
    return (x @ w.mT).to(torch.int32)


# --- the public functions ---------------------------------------------------------------------------------------------


def pack_signs(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the signs of x, 32 in each word of int32, for `binary_linear`. It has no gradient.

    Args:
        x: (..., K) with K >= 1, any strides. Zero counts as positive, also -0.0, and what is not a number as negative.
        backend: "auto" runs the Triton kernel on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist.

    Returns:
        (..., ceil(K / 32)) of int32. The last word is filled up with bits of 0.

    Raises:
        ValueError: x without a last dimension of at least 1, an unknown backend.
        TypeError: not a floating-point tensor.
        RuntimeError: the "triton" backend was asked for and can't run here.
    """
    check_tensors({"x": x})
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., K) with K >= 1, got {tuple(x.shape)}")
    choose_backend(backend, x)
    return pack_signs_reference(x.detach())


def binary_linear(x_words: Tensor, w_words: Tensor, features: int, *, backend: str = "auto") -> Tensor:
    """Return the sums over K products of signs, each -1 or 1, as whole numbers. It has no gradient.

    Args:
        x_words: (..., L) of int32 from `pack_signs`, any strides.
        w_words: (N, L) of int32 from `pack_signs`, a row an output.
        features: K, the number of signs that were packed; L is ceil(K / 32).
        backend: "auto" runs the Triton kernels on CUDA tensors and the reference elsewhere and under `torch.func`;
            "triton" and "reference" insist.

    Returns:
        (..., N) of int32, from -K to K.

    Raises:
        ValueError: words of another shape, tensors on different devices, an unknown backend.
        TypeError: words that are not a tensor of int32.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Courbariaux and others, "Binarized Neural Networks", arXiv 1602.02830.
    """
    features = _checks.integer("features", features, least=1, most=2**31 - 1)
    length = -(-features // WORD)
    for name, words in (("x_words", x_words), ("w_words", w_words)):
        if not isinstance(words, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(words).__name__}")
        if words.dtype != torch.int32:
            raise TypeError(f"{name} must have dtype torch.int32, from pack_signs, got {words.dtype}")
    if x_words.dim() == 0 or x_words.shape[-1] != length:
        raise ValueError(
            f"x_words must have shape (..., L) with L = {length} for {features} features, got {tuple(x_words.shape)}"
        )
    if w_words.dim() != 2 or w_words.shape[-1] != length:
        raise ValueError(
            f"w_words must have shape (N, L) with L = {length} for {features} features, got {tuple(w_words.shape)}"
        )
    if w_words.device != x_words.device:
        raise ValueError(f"w_words must be on the device of x_words, {x_words.device}, got {w_words.device}")
    choose_backend(backend, x_words, (torch.int32,))
    return binary_linear_reference(x_words, w_words, features)
