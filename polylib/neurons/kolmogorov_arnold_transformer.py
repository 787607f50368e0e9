"""Group-rational layers: learned rational functions, one for a group of channels, in place of a fixed activation.

X. Yang and X. Wang, "Kolmogorov-Arnold Transformer", ICLR 2025 (arXiv 2409.10594). A GR-KAN layer is

    y = W F(x) + bias,    F(x) = P(x) / Q(x) for each channel, with the coefficients of its group.

In the Kolmogorov-Arnold Transformer two such layers, the first started at the identity and the second at swish, take
the place of the feed-forward part. Weights are drawn with the variance 1 / (fan_in E[F(x)^2]), so that the variance of
the activations stays what it is from layer to layer.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels.group_rational import ORDER, VARIANTS, group_rational, group_rational_reference

Coefficients = tuple[tuple[float, ...], tuple[float, ...]]

_IDENTITY: Coefficients = ((0.0, 1.0), ())
_SWISH: Coefficients = (
    (3.054880e-07, 0.5000007854, 0.2499978342, 0.0532662827, 0.0058030346, 0.0002751961),
    (-4.1116e-06, 0.1065289934, -1.2690e-06, 0.0005502331),
)

# Numerator and denominator of the functions that a layer can start as, and the variant that they were fitted for. Zeros
# at the end are left out. Swish and the fit of GELU for B are those of the authors' code, which evaluates the latter
# under A, where it is another function (1.5 at x = 3). The fits of GELU and ReLU for A are least squares on [-3, 3].
START: dict[str, dict[str, Coefficients]] = {
    "identity": {"A": _IDENTITY, "B": _IDENTITY},
    "swish": {"A": _SWISH, "B": _SWISH},
    "gelu": {
        "A": ((0.0, 0.5, 0.405879, 0.104625, 0.0080659), (0.0, 0.20925)),
        "B": (
            (-0.00153969, 0.51692871, 0.44075827, 0.0972553, -0.00884418, -0.00378675),
            (-0.14171056, -0.06481231, -0.0444695, 0.01283776),
        ),
    },
    "relu": {
        "A": (
            (0.02997715, 0.6169224, 2.373785, 3.061645, 1.521328, 0.2520496),
            (1.190879, 4.401685, 0.9090837, 0.3477959),
        ),
    },
}


def rational_gain(numerator: Tensor, denominator: Tensor, variant: str = "A") -> Tensor:
    """Return 1 / E[F(x)^2] for x from the standard normal distribution, by Gauss-Hermite quadrature.

    Args:
        numerator, denominator: (G, m + 1) and (G, n), or with one row where it is shared.
        variant: "A" or "B", see `polylib.kernels.group_rational`.

    Returns:
        One value for each row, float64: 1 for the identity, 2 for ReLU, 2.80 for swish.

    Raises:
        ValueError: an unknown variant, or shapes that do not go together.
    """
    _checks.choice("variant", variant, VARIANTS)
    if numerator.dim() != 2 or denominator.dim() != 2:
        raise ValueError(
            f"numerator and denominator have shapes {tuple(numerator.shape)} and {tuple(denominator.shape)};"
            " expected (groups, m + 1) and (groups, n)"
        )
    groups = max(len(numerator), len(denominator))
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(100))
    x = points.to(numerator.device).unsqueeze(-1).expand(-1, groups)
    with torch.no_grad():
        square = group_rational_reference(x, numerator, denominator, groups, variant).square()
    return math.sqrt(2 * math.pi) / (weights.to(square) @ square)


class GroupRational(nn.Module):
    """A learned activation: `(..., dim)` to the same, one rational function for each group of neighbouring channels.

    Args:
        dim: the number of channels.
        groups: G, how many groups they form; divides `dim`.
        init: the function to start as, `"identity"`, `"swish"`, `"gelu"` or `"relu"`.
        order: the degrees (m, n) of numerator and denominator; a start that was fitted with (5, 4) needs at least that.
        variant: which denominator, "A" or "B", see `polylib.kernels.group_rational`.
        share_numerator: one numerator for all groups, as in the paper. Denominators are never shared.

    Raises:
        ValueError: `groups` does not divide `dim`, an unknown `init` or `variant`, a start that has no fit for the
            variant or does not fit into the order, or an input of another size.
        TypeError: an input that is not floating point.
    """

    def __init__(
        self,
        dim: int,
        groups: int = 8,
        init: str = "swish",
        order: tuple[int, int] = ORDER,
        variant: str = "A",
        share_numerator: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.integer("dim", dim, least=1)
        _checks.divisor("groups", groups, "dim", dim)
        _checks.choice("variant", variant, VARIANTS)
        self.dim, self.groups, self.variant = dim, groups, variant
        rows = 1 if share_numerator else groups
        self.numerator = nn.Parameter(torch.empty(rows, order[0] + 1, device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(groups, order[1], device=device, dtype=dtype))
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str = "swish") -> None:
        """Set the coefficients to those of a known function."""
        _checks.choice("init", init, START)
        if self.variant not in START[init]:
            raise ValueError(f"init must have a fit for variant {self.variant!r}, got {init!r}")
        for parameter, values in zip((self.numerator, self.denominator), START[init][self.variant], strict=True):
            if len(values) > parameter.shape[1]:
                order = (self.numerator.shape[1] - 1, self.denominator.shape[1])
                raise ValueError(f"order must be at least {ORDER} for init {init!r}, got {order}")
            parameter.zero_()
            parameter[:, : len(values)] = parameter.new_tensor(values)

    def gain(self) -> Tensor:
        """Return 1 / E[F(x)^2] of each group, for x from the standard normal distribution."""
        return rational_gain(self.numerator, self.denominator, self.variant).expand(self.groups)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}), got {tuple(x.shape)}")
        return group_rational(x, self.numerator, self.denominator, self.groups, self.variant)

    def extra_repr(self) -> str:
        order = (self.numerator.shape[1] - 1, self.denominator.shape[1])
        return f"dim={self.dim}, groups={self.groups}, order={order}, variant={self.variant!r}"


class GRKANLinear(nn.Module):
    """A group-rational activation, then a linear map: `(..., in_features)` to `(..., out_features)`.

    Weights start normal with the variance 1 / (in_features E[F(x)^2]) of the activation at its start, which keeps the
    variance of standard normal inputs; the bias starts at zero.

    Args:
        in_features, out_features: at least 1.
        bias: learn a bias.
        groups, init, order, variant, share_numerator: of the activation, see `GroupRational`.

    Raises:
        ValueError: as `GroupRational`, or `out_features` below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        groups: int = 8,
        init: str = "swish",
        order: tuple[int, int] = ORDER,
        variant: str = "A",
        share_numerator: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.integer("out_features", out_features, least=1)
        self.in_features, self.out_features = in_features, out_features
        self.activation = GroupRational(in_features, groups, init, order, variant, share_numerator, device, dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters(init)

    def reset_parameters(self, init: str = "swish") -> None:
        """Set the activation to a known function, and draw the weights with the variance that belongs to it."""
        self.activation.reset_parameters(init)
        numerator, denominator = (
            torch.tensor([values or (0.0,)], dtype=torch.float64, device="cpu")  # parameters on "meta" have no values
            for values in START[init][self.activation.variant]
        )
        gain = rational_gain(numerator, denominator, self.activation.variant).item()
        nn.init.normal_(self.weight, std=math.sqrt(gain / self.in_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
