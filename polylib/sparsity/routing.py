"""A router of a mixture of experts whose experts have at most k tokens each, by sparsity-constrained transport.

T. Liu, J. Puigcerver and M. Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023 (arXiv 2209.15466). The solver
with a fixed number of steps, the scale of its step and the gradient are of this implementation.
"""

import torch
from torch import Tensor, nn

from polylib import _checks
from polylib.kernels._common import widened
from polylib.sparsity.topk_simplex import project_columns

_MOMENTUM = 0.9


class SparseOTRouter(nn.Module):
    r"""From the scores of tokens for experts, weights W with at most k nonzeros for each expert.

    W is nearly the solution of

    $$\max_{W\ge0}\ \sum_{ij} W_{ij}\,\text{scores}_{ij} - \frac\gamma2\sum_{ij} W_{ij}^2$$

    where each token's weights have the sum 1, each expert's the sum tokens / experts, and each expert at most k of
    them. The sum of an expert and its bound of k hold exactly, at any number of steps. The sum of a token is 1 up to
    what the steps leave, and up to ties, where no choice of k tokens has the right sums.

    The semi-dual is maximised by steps of gamma / experts with momentum, which end at zero; a unit of step is safe, as
    the sum of a token changes by at most experts / gamma for a change of its dual variable. In backward the dual
    variables are constants: a gradient goes through the last projection alone. All this scales with the scores: with
    c times the scores and c times gamma the weights are the same. The layer has no parameters and no state. A score
    that is NaN or infinite, or is so after division by gamma, makes the weights of its experts NaN; minus infinity
    forbids a pair, but not all pairs of an expert.

    Args:
        k: tokens of an expert at most. `forward` asks for k experts >= tokens, so that each token can have a place.
        gamma: above 0, in the units of the scores: near 0 a token has one expert, a large one evens its weights out.
        iters: steps of the solver, fixed, so that it compiles and costs the same for each batch.
    """

    def __init__(self, k: int, gamma: float = 0.2, iters: int = 100) -> None:
        super().__init__()
        self.k = _checks.integer("k", k, least=1)
        self.gamma = _checks.number("gamma", gamma, above=0)
        self.iters = _checks.integer("iters", iters, least=0)

    def forward(self, scores: Tensor) -> Tensor:
        """Weights `(..., tokens, experts)` of scores `(..., tokens, experts)`, each leading index for itself.

        Raises:
            TypeError: scores that are not floating.
            ValueError: another shape, or too small a k.
        """
        _checks.floating("dtype of scores", scores.dtype)
        fits = scores.dim() >= 2 and min(scores.shape[-2:]) > 0
        _checks.shape("scores", scores, "(..., tokens, experts)", fits)
        tokens, experts = scores.shape[-2:]
        if self.k * experts < tokens:
            raise ValueError(f"k must be at least tokens / experts = {tokens / experts:g}, got {self.k}")
        wide = widened(scores) / self.gamma
        mass = torch.full_like(wide[..., 0, :], tokens / experts)
        potential = self._solve(wide.detach(), mass)
        return project_columns(wide + potential, self.k, mass, -2).to(scores.dtype)

    @torch.no_grad()
    def _solve(self, scores: Tensor, mass: Tensor) -> Tensor:
        """The dual variables of the tokens, `(..., tokens, 1)`, in units of gamma."""
        potential = torch.zeros_like(scores[..., :1])
        speed = torch.zeros_like(potential)
        for step in range(self.iters):
            missing = 1 - project_columns(scores + potential, self.k, mass, -2).sum(-1, keepdim=True)
            speed = _MOMENTUM * speed + missing
            potential = potential + (1 - step / self.iters) / scores.shape[-1] * speed
        return potential

    def extra_repr(self) -> str:
        return f"k={self.k}, gamma={self.gamma:g}, iters={self.iters}"
