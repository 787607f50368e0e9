"""The tensors that a power-law graph attention infers from its queries: density, metric, potential, energy-curvature.

B. Gokden, "PLDR-LLMs Learn A Generalizable Tensor Operator That Can Replace Its Own Deep Neural Net At Inference", 2025
(arXiv 2502.13502), after "PLDR-LLM" (arXiv 2410.16703) and "Power Law Graph Transformer" (arXiv 2107.02039). Initial
values and constants as in the author's code, burcgokden/PLDR-LLM-with-KVG-cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import widened

_EPSILON = 1e-9  # of the metric tensor, so that its powers exist


class Deductive(NamedTuple):
    """What an attention infers from its input, each `(batch, heads, d, d)`; None for what was not computed.

    `A`: the density matrix after the residual network. `A_LM`: the metric tensor, positive. `A_P`: the potential.
    `G_LM`: the energy-curvature tensor, the bilinear form of the attention.
    """

    A: Tensor | None
    A_LM: Tensor | None
    A_P: Tensor | None
    G_LM: Tensor


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), each with a bias, `(..., d_in)` to `(..., d_out)`.

    Weights start uniform by Xavier's rule, biases at zero.

    Args:
        d_in, d_hidden, d_out: widths.

    Raises:
        ValueError: widths that are no positive integers.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        d_in, d_hidden = _checks.integer("d_in", d_in, least=1), _checks.integer("d_hidden", d_hidden, least=1)
        self.gate = xavier(nn.Linear(d_in, d_hidden))
        self.value = xavier(nn.Linear(d_in, d_hidden))
        self.output = xavier(nn.Linear(d_hidden, _checks.integer("d_out", d_out, least=1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return `(..., d_out)`."""
        return self.output(F.silu(self.gate(x)) * self.value(x))


class MetricLearner(nn.Module):
    """From the queries of a layer the bilinear form G of its attention.

    For each head, with the queries as rows of q, (n, d):

        A    = LN(q^T q), then for each residual unit A = LN(A + f(A)), f a chain of SwiGLUs on the rows of A
        A_LM = x^2 sigmoid(x) + 1e-9 with x = W A + b
        A_P  = A_LM^p, entry by entry
        G_LM = a A_P + b_a

    The sum in q^T q runs over all positions, later ones too. The residual network is shared by the heads; W, b, p, a
    and b_a, each `(heads, d, d)`, are their own. W, p and a start normal by Xavier's rule as torch reads it for three
    axes, of variance 2 / (d^2 + heads d), the biases at zero. What is squared and raised is kept in float32 at least:
    with A_LM near 1e-9 the derivative p A_LM^(p - 1) is huge, and training needs its gradients clipped.

    Args:
        n_heads: heads.
        d_head: d, the width of a head.
        n_res_units: residual units.
        n_dense: SwiGLUs in each of them.
        d_metric: their hidden width.

    Raises:
        ValueError: sizes that are no positive integers; `n_res_units` and `n_dense` may be 0.
    """

    def __init__(self, n_heads: int, d_head: int, n_res_units: int, n_dense: int, d_metric: int) -> None:
        super().__init__()
        heads, d = _checks.integer("n_heads", n_heads, least=1), _checks.integer("d_head", d_head, least=1)
        units, dense = (
            _checks.integer("n_res_units", n_res_units, least=0),
            _checks.integer("n_dense", n_dense, least=0),
        )
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.units = nn.ModuleList(nn.Sequential(*(SwiGLU(d, d_metric, d) for _ in range(dense))) for _ in range(units))
        self.norms = nn.ModuleList(nn.LayerNorm(d, eps=1e-6) for _ in range(units))
        self.W, self.p, self.a = (nn.Parameter(nn.init.xavier_normal_(torch.empty(heads, d, d))) for _ in range(3))
        self.b, self.b_a = (nn.Parameter(torch.zeros(heads, d, d)) for _ in range(2))

    def forward(self, q: Tensor) -> Deductive:
        """The tensors of queries `(batch, heads, n, d)`.

        Raises:
            ValueError: another shape.
        """
        heads, d = self.W.shape[:2]
        fits = q.dim() == 4 and q.shape[1] == heads and q.shape[3] == d
        _checks.shape("q", q, f"(batch, {heads}, n, {d})", fits)
        A = self.norm(q.transpose(-2, -1) @ q)
        for norm, unit in zip(self.norms, self.units, strict=True):
            A = norm(A + unit(A))
        return self.curvature(A)

    def curvature(self, A: Tensor) -> Deductive:
        """The same from `A`, (batch, heads, d, d), that a cache has kept."""
        x = self.W @ A + self.b
        wide = x.double() if x.dtype == torch.float64 else x.float()
        A_LM = wide * F.silu(wide) + _EPSILON
        A_P = A_LM ** self.p.to(wide.dtype)
        return Deductive(A, A_LM, A_P, self.a @ A_P.to(A.dtype) + self.b_a)


def dag_regularizer(M: Tensor) -> Tensor:
    """The mean over the matrices `(..., d, d)` of the distance of log(tr exp(M * M) / d) from 0, a scalar.

    M * M is taken entry by entry, exp is that of a matrix. A matrix is the adjacency matrix of a graph without cycles
    exactly if its distance is 0. Multiplied by coefficients and added to the loss for A_LM, A_P and G_LM, it draws them
    towards such matrices. Entries of about ten overflow. Half precisions are computed, and returned, in float32.

    Raises:
        TypeError: entries that are not floating.
        ValueError: matrices that are not square, or none.
    """
    _checks.floating("dtype of M", M.dtype)
    fits = M.dim() >= 2 and M.shape[-1] == M.shape[-2] and M.numel() > 0
    _checks.shape("M", M, "(..., d, d) with at least one entry", fits)
    wide = widened(M)
    trace = torch.matrix_exp(wide * wide).diagonal(dim1=-2, dim2=-1).mean(-1)
    return trace.log().abs().mean()


def xavier(layer: nn.Linear) -> nn.Linear:
    """The layer, with weights uniform by Xavier's rule and a bias of zero."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
