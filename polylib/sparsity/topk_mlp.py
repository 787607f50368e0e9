"""Activations with at most k nonzeros, and the MLP of a Top-k Transformer.

Z. Li and others, "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers", ICLR 2023 (arXiv
2210.06313). The layout of the second weight, and `TopKMLP.gathered`, are of this implementation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polylib import _checks, kernels

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class TopK(nn.Module):
    """Keeps the k largest entries along one dimension and makes the others zero, in training and afterwards.

    The gradient goes through what is kept. Nothing is rescaled. Of equal entries at the border some are kept, so that
    there are always k. After a ReLU fewer than k may be positive, and the others stay zero; before it or after it is
    the same.

    Args:
        k: at least 1; as many as there are entries, or more, changes nothing.
        dim: along which entries compete.

    Raises:
        ValueError: k below 1, or an input without this dimension.
    """

    def __init__(self, k: int, dim: int = -1) -> None:
        super().__init__()
        self.k, self.dim = _checks.integer("k", k, least=1), _checks.integer("dim", dim)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape("x", x, f"with dimension {self.dim}", -x.dim() <= self.dim < x.dim())
        if self.k >= x.shape[self.dim]:
            return x
        values, places = x.topk(self.k, self.dim, sorted=False)
        return torch.zeros_like(x).scatter(self.dim, places, values)

    def extra_repr(self) -> str:
        return f"k={self.k}, dim={self.dim}"


class TopKMLP(nn.Module):
    r"""The MLP of a Transformer on its k largest hidden units: $W_2\,\text{Top}_k(\sigma(W_1x+b_1))+b_2$ of a token x.

    With k = m it is the dense MLP. Weights start as those of `nn.Linear`. The second weight, (d, m), lies in memory as
    its transpose, so that what belongs to one hidden unit is contiguous.

    Args:
        d: width of the tokens.
        m: hidden units.
        k: how many of them may be nonzero for a token; m or more means all.
        activation: `"relu"` or `"gelu"`.

    Raises:
        ValueError: a size below 1, an unknown activation, or an input that is not `(..., d)`.
    """

    def __init__(self, d: int, m: int, k: int, activation: str = "relu") -> None:
        super().__init__()
        self.d, self.m = _checks.integer("d", d, least=1), _checks.integer("m", m, least=1)
        _checks.choice("activation", activation, _ACTIVATIONS)
        self.up, self.activation = nn.Linear(d, m), _ACTIVATIONS[activation]()
        self.topk, self.down = TopK(k), nn.Linear(m, d)
        self.down.weight = nn.Parameter(self.down.weight.detach().T.contiguous().T)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` to the same."""
        return self.down(self.topk(self._hidden(x)))

    def gathered(self, x: Tensor) -> Tensor:
        """The same, with a second product over the k units that are kept: for few tokens, and inference.

        The first product is dense: which units are large is known only after it.
        """
        values, places = self._hidden(x).topk(min(self.topk.k, self.m), sorted=False)
        weight, bias = self.down.weight.T, self.down.bias
        out = kernels.sparse_down(values.flatten(0, -2), places.flatten(0, -2), weight, bias)
        return out.view(x.shape)

    def _hidden(self, x: Tensor) -> Tensor:
        _checks.shape("x", x, f"(..., {self.d})", x.dim() > 0 and x.shape[-1] == self.d)
        return self.activation(self.up(x))
