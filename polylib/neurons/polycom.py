"""Polynomial composition activations: a learned polynomial of low degree in place of a fixed activation.

Z. Zhuo, Y. Wang, Y. Zeng, X. Li, X. Zhou and J. Ma, "Polynomial Composition Activations: Unleashing the Dynamics of
Large Language Models", ICLR 2025 (arXiv 2411.03884). Two of them, with r + 1 learned numbers a layer each:

    PolyReLU   y = sum_p a_p relu(x)^p + a_0
    PolyNorm   y = sum_p a_p x^p / rms(x^p) + a_0,  the root mean square of each power over the features

The coefficients are stored highest power first, as in the published checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import poly_norm, poly_relu


class _Polynomial(nn.Module):
    """The coefficients that both activations have: `weight` `(order,)`, highest power first, and `bias` `(1,)`."""

    def __init__(
        self,
        order: int,
        init: Sequence[float] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _checks.integer("order", order, least=1)
        _checks.floating("dtype", dtype)
        self.init = [1 / order] * order if init is None else [float(value) for value in init]
        if len(self.init) != order:
            raise ValueError(f"init must have order = {order} values, highest power first, got {len(self.init)}")
        self.order = order
        self.weight = nn.Parameter(torch.empty(order, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the coefficients to their initial values and the constant to 0."""
        self.weight.copy_(torch.tensor(self.init))
        self.bias.zero_()

    def extra_repr(self) -> str:
        return f"order={self.order}"


class PolyReLU(_Polynomial):
    """A learned polynomial of relu(x): any shape to the same, entry by entry.

    Contains ReLU, at the coefficients (0, 0, 1), and its square, at (0, 1, 0).

    Args:
        order: the degree r, at least 1. Powers above 3 overflow early in half precision.
        init: the r coefficients at the start, highest power first; 1/r each by default. The constant starts at 0.

    Raises:
        ValueError: an `order` below 1, or an `init` of another length.
        TypeError: an integer `dtype` or input.
    """

    def __init__(
        self,
        order: int = 3,
        init: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(order, init, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return poly_relu(x, self.weight, self.bias)


class PolyNorm(_Polynomial):
    """A learned sum of normalised powers of x: any shape to the same; the mean squares run over the dimension `dim`.

    At the coefficients (0, 0, 1) it is RMS normalisation. It barely changes when x is scaled by s > 0, and not at all
    as `eps` goes to 0.

    Args:
        order, init: as in `PolyReLU`.
        eps: added to each mean square. It silences the cubic term where all x are far below 0.1, the sixth root of eps.
        dim: the dimension of the features.

    Raises:
        ValueError: an `order` below 1, an `init` of another length, `eps` not above 0, or an input without features.
        TypeError: an integer `dtype` or input.
    """

    def __init__(
        self,
        order: int = 3,
        eps: float = 1e-6,
        dim: int = -1,
        init: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(order, init, device, dtype)
        _checks.number("eps", eps, above=0)
        self.eps, self.dim = eps, dim

    def forward(self, x: Tensor) -> Tensor:
        if not -x.dim() <= self.dim < x.dim():
            raise ValueError(f"x must have the dimension dim = {self.dim}, got {x.dim()} dimensions")
        return poly_norm(x.movedim(self.dim, -1), self.weight, self.bias, self.eps).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, dim={self.dim}"
