"""The inverse factors of a whole model in one tensor, where one kernel refreshes all of them.

M. Mozaffari, S. Li, Z. Zhang and M. Mehri Dehnavi, "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using
Rank-1 Updates", NeurIPS 2023 (arXiv 2306.01685), with the formula of Sherman and Morrison.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polylib.kernels import factor_arena, mkor_refresh_


class FactorArena:
    """Identity matrices of several sizes, to be refreshed together.

    The kernel carries the largest entry of each factor from one refresh to the next, so that its stabiliser needs no
    pass of its own. torch counts the changes of a tensor through all of its views: when somebody else has written into
    a factor since, the largest entries are found anew. (Writing through `.data` is not counted; then the stabiliser of
    one refresh goes by the entry before.)

    Args:
        sizes: of the factors, 1 or more each.
        dtype, device: of the factors.

    Attributes:
        factors: a matrix `(d, d)` for each size, all of them views of one tensor.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.sizes = list(sizes)
        self._all, self.factors = factor_arena(self.sizes, dtype=dtype, device=device)
        self._largest = torch.ones(len(self.sizes), device=device)
        self._version = self._all._version

    @property
    def on_gpu(self) -> bool:
        """Whether one kernel is worth more than a loop over the factors."""
        return self._all.is_cuda

    def holds(self, factors: Sequence[Tensor]) -> bool:
        """Whether these are all of the factors, in their order, and none was replaced by another tensor.

        In a copy, or after pickling, the factors are no longer views of one tensor, and the answer is no.
        """
        same = len(factors) == len(self.factors)
        pairs = zip(factors, self.factors, strict=True)
        return same and all(given is own and own._base is self._all for given, own in pairs)

    @torch.no_grad()
    def refresh_(
        self, vectors: Sequence[Tensor], gamma: float, stabilizer: float | None, zeta: float, backend: str = "auto"
    ) -> None:
        """`stabilise_`, then `sherman_morrison_ema_`, of every factor with its vector, by `mkor_refresh_`.

        Args:
            vectors: `(d,)` for each factor.
            gamma: the weight of the past, above 0 and below 1.
            stabilizer: the entry above which a factor is blended with the identity; None: never.
            zeta: the weight of the factor in that.
            backend: of the kernel.
        """
        if self._all._version != self._version:
            self._largest.copy_(torch.stack([factor.abs().amax() for factor in self.factors]))
        threshold = math.inf if stabilizer is None else stabilizer
        together = torch.cat(list(vectors))
        mkor_refresh_(
            self._all, together, self._largest, self.sizes,
            gamma=gamma, threshold=threshold, zeta=zeta, backend=backend,
        )  # fmt: skip
        self._version = self._all._version
