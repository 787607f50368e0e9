"""Linear layers with structured matrices: block-diagonal ones, and Monarch, two of these with a transposition between.

D. Fu, S. Arora, J. Grogan, I. Johnson, S. Eyuboglu, A. Thomas, B. Spector, M. Poli, A. Rudra and C. Re, "Monarch Mixer:
A Simple Sub-Quadratic GEMM-Based Architecture", NeurIPS 2023 (arXiv 2310.12109).
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels.monarch_multiply import monarch_multiply


class _Structured(nn.Module, ABC):
    """What the two linear layers share: sizes that need not be multiples of the blocks, and the bias."""

    def __init__(self, in_features: int, out_features: int, nblocks: int, bias: bool) -> None:
        super().__init__()
        self.in_features = _checks.integer("in_features", in_features, least=1)
        self.out_features = _checks.integer("out_features", out_features, least=1)
        self.nblocks = _checks.integer("nblocks", nblocks, least=1)
        bound = self.out_features**-0.5
        self.bias = nn.Parameter(torch.empty(self.out_features).uniform_(-bound, bound)) if bias else None

    def _block(self, *shape: int) -> nn.Parameter:
        """Blocks that are uniform within 1 / root of their inputs, as torch's own linear layer is."""
        bound = shape[-1] ** -0.5
        return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor:
        """The product of what fills the blocks, without a bias."""

    def _padded(self, x: Tensor) -> Tensor:
        """The product without the bias, (..., in_features) to (..., out_features)."""
        blocks = self.nblocks * -(-self.in_features // self.nblocks)
        return self._multiply(F.pad(x, (0, blocks - self.in_features)))[..., : self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) of (..., in_features).

        Raises:
            ValueError: another shape.
        """
        fits = x.dim() > 0 and x.shape[-1] == self.in_features
        _checks.shape("x", x, f"(..., {self.in_features})", fits)
        y = self._padded(x)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> Tensor:
        """Return the weight (out_features, in_features) of a dense layer that computes the same."""
        weight = next(self.parameters() if self.bias is None else (p for p in self.parameters() if p is not self.bias))
        return self._padded(torch.eye(self.in_features, dtype=weight.dtype, device=weight.device)).T

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, nblocks={self.nblocks}, bias={self.bias is not None}"


class BlockDiagonalLinear(_Structured):
    """A linear layer whose matrix is zero outside of `nblocks` blocks on its diagonal.

    An input that the blocks don't divide is filled up with zeros, and superfluous outputs are dropped. Blocks start
    uniform within 1 / root of their number of inputs, the bias within 1 / root of `out_features`.

    Attributes:
        weight: (nblocks, out, in), the blocks.

    Raises:
        ValueError: sizes or blocks that are no positive integers.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: int = 4, bias: bool = True) -> None:
        super().__init__(in_features, out_features, nblocks, bias)
        self.weight = self._block(self.nblocks, -(-out_features // self.nblocks), -(-in_features // self.nblocks))

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (self.nblocks, -1)), self.weight).flatten(-2)


class MonarchLinear(_Structured):
    """A linear layer with a Monarch matrix: two block-diagonal ones of `nblocks` blocks each, transposed between.

    The numbers between the two are as many as the smaller of inputs and outputs. Sizes that the blocks don't divide and
    the start as in `BlockDiagonalLinear`. With the root of n blocks and n inputs and outputs it has 2 n^(3/2) weights,
    and each input reaches each output in one way; with fewer blocks, in several.

    Attributes:
        w1, w2: (nblocks, middle, in) and (nblocks, out, middle), the factors.

    Raises:
        ValueError: sizes or blocks that are no positive integers.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: int = 4, bias: bool = True) -> None:
        super().__init__(in_features, out_features, nblocks, bias)
        inner, outer = (-(-size // self.nblocks) for size in (in_features, out_features))
        self.w1 = self._block(self.nblocks, min(inner, outer), inner)
        self.w2 = self._block(self.nblocks, outer, min(inner, outer))

    def _multiply(self, x: Tensor) -> Tensor:
        return monarch_multiply(x, self.w1, self.w2)
