r"""Periodic binarisation: $y = \sin(\omega w)$, or its sign, with the gradient of the sine in both cases.

Source: Vargas, Correa, Hinojosa, Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024.

Shapes: w and y any; the frequency $\omega$ is one positive number. With `hard` y is the square wave, 1 where
$\sin(\omega w) \ge 0$ and -1 elsewhere, so that zero becomes 1 (the authors' code leaves it at zero, which is no bit).
Kernels: w in float32, bfloat16 or float16; arithmetic in float32. Reference: any floating dtype, half precisions
computed in float32. In both, $\omega$ and the phase $t = \omega w$ are rounded to the dtype of the arithmetic, and the
sine is that of this phase, however large: the phase itself is sure to $2^{-24}|t|$ only.

With $G = \partial L/\partial y$ the gradient is $\nabla w = \omega\cos(\omega w)\,G$ for both: exact for the sine, and
for the square wave as if the sign were the identity. It is zero at the crests, where the bit is most
certain, and turns its sign with each branch.

What is saved for backward: w alone. Forward reads w and writes y, backward reads w and G and writes the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polylib import _checks
from polylib.kernels._common import check_tensors, choose_backend, widened

# --- the definition ---------------------------------------------------------------------------------------------------


def sine_binarize_reference(w: Tensor, freq: float, hard: bool) -> Tensor:
    """Return the sine of freq * w, or its sign, in plain PyTorch, in the dtype of w.

    Any floating dtype and device; differentiable any number of times, as the sine is; works under `torch.func`. PyTorch
    itself checks the arguments.
    """
    sine = (freq * widened(w)).sin()
    if hard:
        level = sine.detach()
        sine = torch.where(level < 0, -1.0, 1.0).to(sine.dtype) + (sine - level)  # what is not a number stays
    return sine.to(w.dtype)


# --- the public function ----------------------------------------------------------------------------------------------


def sine_binarize(w: Tensor, freq: float, hard: bool, *, backend: str = "auto") -> Tensor:
    """Return `sin(freq * w)`, or its sign, entry by entry; both have the gradient of the sine.

    Args:
        w: any shape and strides.
        freq: the frequency, above zero, in radians for each unit of w.
        hard: the square wave of -1 and 1, where zero becomes 1; else the sine.
        backend: "auto" runs the Triton kernels on CUDA tensors of float32, bfloat16 or float16 and the reference
            elsewhere and under `torch.func`; "triton" and "reference" insist. The kernels can be differentiated once.

    Returns:
        The shape and dtype of w; half precisions are computed in float32 and rounded once. Not a number where w is
        infinite or not a number.

    Raises:
        ValueError: a frequency that is not finite and above zero, a `hard` that is no truth value, an unknown backend.
        TypeError: not a floating-point tensor.
        RuntimeError: the "triton" backend was asked for and can't run here.

    Source: Vargas, Correa, Hinojosa, Arguello, "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024.
    """
    check_tensors({"w": w})
    freq = _checks.number("freq", freq, above=0)
    hard = _checks.choice("hard", hard, (True, False))
    choose_backend(backend, w)
    return sine_binarize_reference(w, freq, hard)
