"""Parameterised hypercomplex layers: linear maps and convolutions whose weight is a learned sum of Kronecker products.

E. Grassucci, A. Zhang and D. Comminiello, "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex
Convolutions", IEEE TNNLS, 2024 (arXiv 2110.04176). The weight of a layer with o outputs and i inputs is

    W = sum_k A_k (x) S_k,    A_k (n, n),  S_k (o/n, i/n),  k = 1..n,

n^3 + o i / n numbers instead of o i. The matrices A_k are the rule by which n components are multiplied: with fixed
signs they are those of the complex numbers (n = 2) or of the quaternions (n = 4); here they can be learned.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels import kronecker_weight, phm_linear

ALGEBRAS = {"real": 1, "complex": 2, "quaternion": 4}


def algebra_matrices(name: str) -> Tensor:
    """The matrices A_k of a known algebra, `(n, n, n)`: multiplication by the k-th unit from the left.

    `"real"` has n = 1, `"complex"` n = 2, `"quaternion"` n = 4.

    Raises:
        ValueError: another name.
    """
    _checks.choice("algebra", name, ALGEBRAS)
    # What stands in the block matrix of a left multiplication: the component, from 1, with its sign.
    rows = {
        "real": [[1]],
        "complex": [[1, -2], [2, 1]],
        "quaternion": [[1, -2, -3, -4], [2, 1, -4, 3], [3, 4, 1, -2], [4, -3, 2, 1]],
    }
    table = torch.tensor(rows[name])
    return torch.stack([table.sign() * (table.abs() == k + 1) for k in range(len(table))]).float()


def algebra_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle, in radians, between the spans of two sets of matrices, each `(n, n, n)`.

    Two layers that differ by an invertible mixing of their A_k, undone in their S_k, have the same weight; so only the
    span of the A_k has a meaning.

    Raises:
        ValueError: shapes that are not `(n, n, n)`, or not the same.
    """
    for name, value in (("a", a), ("b", b)):
        if value.dim() != 3 or len(set(value.shape)) != 1 or value.shape != a.shape:
            raise ValueError(f"{name} must have shape (n, n, n), the same for both, got {tuple(value.shape)}")
    bases = [torch.linalg.qr(value.detach().double().flatten(1).T).Q for value in (a, b)]
    residual = bases[1] - bases[0] @ (bases[0].T @ bases[1])  # its norm is the sine, which is exact at small angles
    sine = torch.linalg.matrix_norm(residual, 2).clamp(max=1)
    return torch.asin(sine).item()


class _Hypercomplex(nn.Module):
    """The parameters that all layers share: `A` `(n, n, n)`, `S` `(n, o/n, i/n, *kernel)` and `bias` `(o,)`."""

    def __init__(
        self,
        outputs: tuple[str, int],
        inputs: tuple[str, int],
        n: int,
        kernel: tuple[int, ...],
        bias: bool,
        algebra: str | None,
        learn_algebra: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, size in (("n", n), outputs, inputs, *(("kernel_size", size) for size in kernel)):
            _checks.integer(name, size, least=1)
        for name, size in (outputs, inputs):
            _checks.multiple(name, size, "n", n)
        known = None if algebra is None else algebra_matrices(algebra)
        if known is not None and len(known) != n:
            raise ValueError(f"algebra must be one of dimension n = {n}, got {algebra!r}, of dimension {len(known)}")
        _checks.floating("dtype", dtype)
        self.n, self.algebra = n, algebra
        (_, o), (_, i) = outputs, inputs
        empty = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(n, n, n, **empty), requires_grad=learn_algebra)
        self.S = nn.Parameter(torch.empty(n, o // n, i // n, *kernel, **empty))
        self.bias = nn.Parameter(torch.empty(o, **empty)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """Draw new values, such that the entries of the weight have the variance gain^2 / fan-in.

        Var(W) = n Var(A) Var(S). Learned matrices A are normal of variance 1/n, and S of variance gain^2 / fan-in. A
        known algebra has one entry of size 1 in each place, so that S alone sets the variance.
        """
        fan_in = self.n * self.S[0, 0].numel()
        if self.algebra is None:
            nn.init.normal_(self.A, std=self.n**-0.5)
        else:
            self.A.copy_(algebra_matrices(self.algebra))
        nn.init.normal_(self.S, std=gain * fan_in**-0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def weight(self) -> Tensor:
        """The weight `(o, i, *kernel)` that the parameters stand for."""
        return kronecker_weight(self.A, self.S)


class PHMLinear(_Hypercomplex):
    """A hypercomplex linear layer: `(..., in_features)` to `(..., out_features)`.

    Args:
        in_features, out_features: multiples of `n`.
        n: the number of components; the layer has about 1/n of the parameters of the real one.
        algebra: start from a known algebra of dimension n, `"real"`, `"complex"` or `"quaternion"`; random otherwise.
        learn_algebra: learn the matrices A. Without it they stay as they start.

    Raises:
        ValueError: a size below 1 or not divisible by `n`, an algebra of another dimension, or an input whose last
            dimension is not `in_features`.
        TypeError: an integer `dtype`, or an input whose dtype is not that of the weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        bias: bool = True,
        algebra: str | None = None,
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        outputs, inputs = ("out_features", out_features), ("in_features", in_features)
        super().__init__(outputs, inputs, n, (), bias, algebra, learn_algebra, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return phm_linear(x, self.A, self.S, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n={self.n}"


class _PHConv(_Hypercomplex):
    """What the convolutions of one, two and three dimensions share."""

    dimensions: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        n: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        bias: bool = True,
        algebra: str | None = None,
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = (kernel_size,) * self.dimensions if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(kernel) != self.dimensions:
            raise ValueError(f"kernel_size must be {self.dimensions} integers or one, got {kernel_size!r}")
        outputs, inputs = ("out_channels", out_channels), ("in_channels", in_channels)
        super().__init__(outputs, inputs, n, kernel, bias, algebra, learn_algebra, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.dimensions + 2 or x.shape[1] != self.in_channels:
            sizes = ", ".join(["batch", str(self.in_channels), *["size"] * self.dimensions])
            raise ValueError(f"x must have shape ({sizes}), got {tuple(x.shape)}")
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        return convolve(x, self.weight(), self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.S.shape[3:])}"
        return f"{sizes}, n={self.n}, stride={self.stride}, padding={self.padding}"


class PHConv1d(_PHConv):
    """A hypercomplex convolution, `(batch, in_channels, length)` to `(batch, out_channels, length')`.

    The Kronecker product runs over the channels, so that a component is a block of neighbouring channels. Arguments and
    errors as in `PHMLinear` and `torch.nn.Conv1d`.
    """

    dimensions = 1


class PHConv2d(_PHConv):
    """As `PHConv1d`, for `(batch, in_channels, height, width)`."""

    dimensions = 2


class PHConv3d(_PHConv):
    """As `PHConv1d`, for `(batch, in_channels, depth, height, width)`."""

    dimensions = 3
