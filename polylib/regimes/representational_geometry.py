"""What a hidden layer keeps of its input and takes from its target: alignment, parallelism, generalisation.

The measures and the task of Alleman, Lindsey and Fusi, "Task structure and nonlinearity jointly determine learned
representational geometry" (2024). The parallelism score and the generalisation over conditions are those of Bernardi
and others, "The geometry of abstraction in the hippocampus and prefrontal cortex" (2020). All functions take any number
of leading dimensions, such as one for the networks of a stack.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from polylib import _checks

MOST_CONDITIONS = 12  # the pairings of twelve conditions are 720


class DichotomyTask(NamedTuple):
    """Four conditions in a noisy input space, and a label that splits them in two; `dichotomy_task` makes one.

    `axes`: `(3, dim)`, orthonormal; the last one carries the label. `means`: `(4, dim)`. `labels`: `(4,)`, -1 or 1.
    """

    axes: Tensor
    means: Tensor
    labels: Tensor
    noise: float

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs `(count, dim)`, labels `(count,)` and the number of the condition of each, `(count,)`."""
        condition = torch.randint(len(self.means), (_checks.integer("count", count, 1),), generator=generator)
        x = self.means[condition]
        x = x + self.noise * torch.randn(x.shape, generator=generator)
        return x, self.labels[condition], condition


def dichotomy_task(separation: float, dim: int = 20, noise: float = 0.3, seed: int = 0) -> DichotomyTask:
    """The task x = z1 q1 + z2 q2 + separation z1 z2 q3 + noise, with the label z1 z2, for z1, z2 in {-1, 1}.

    Args:
        separation: how far the label moves the input along an axis of its own. At 0 the label is the exclusive or of z1
            and z2, at 1 the four means are the corners of a tetrahedron, beyond that the label is the widest axis.
        dim: of the input, at least 3. The axes q1, q2, q3 are random and orthonormal.
        noise: standard deviation of normal noise in each coordinate.
        seed: of the axes.

    Raises:
        ValueError: a negative separation or noise, or `dim` below 3.
    """
    separation = _checks.number("separation", separation, least=0)
    noise = _checks.number("noise", noise, least=0)
    dim = _checks.integer("dim", dim, least=3)
    draw = torch.randn(dim, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes = torch.linalg.qr(draw).Q.T.float()
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    labels = z.prod(1)
    means = torch.cat([z, separation * labels[:, None]], 1) @ axes
    return DichotomyTask(axes, means, labels, noise)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Centred kernel alignment of two representations of the same samples, between 0 and 1.

    It is the cosine of the two centred Gram matrices, X X^T and Y Y^T. The products of features, X^T Y, give the same
    without them, and are taken where they are smaller.

    Args:
        x: `(..., n, p)`.
        y: `(..., n, q)`, or `(..., n)` for a single feature.

    Returns:
        `(...)`.

    Raises:
        ValueError: different numbers of samples, fewer than two, or a representation that is the same for all of them.
    """
    y = y[..., None] if y.dim() == x.dim() - 1 else y
    fits = x.dim() >= 2 and y.dim() >= 2 and x.shape[-2] == y.shape[-2] and x.shape[-2] >= 2
    _checks.shape("y", y, f"(..., n, q) with n = {x.shape[-2] if x.dim() >= 2 else '2 or more'} as in x", fits)
    x, y = (z - z.mean(-2, keepdim=True) for z in (x, y))
    if (x.shape[-2]) ** 2 < x.shape[-1] * y.shape[-1]:
        x, y = x @ x.mT, y @ y.mT
        dot, norms = (x * y).sum((-2, -1)), x.square().sum((-2, -1)) * y.square().sum((-2, -1))
    else:
        dot = (x.mT @ y).square().sum((-2, -1))
        norms = (x.mT @ x).square().sum((-2, -1)) * (y.mT @ y).square().sum((-2, -1))
    if (norms == 0).any():
        raise ValueError("x and y must vary over the samples, got one that is constant")
    return dot / norms.sqrt()


def parallelism_score(means: Tensor, labels: Tensor) -> Tensor:
    """How parallel the steps from one side of a dichotomy to the other are: the mean cosine, for the best pairing.

    Args:
        means: `(..., C, N)`, the mean representation of each condition.
        labels: `(C,)`, two values, each of as many conditions, C from 4 to 12.

    Returns:
        `(...)`, at most 1, which says that one and the same step leads from each condition to its partner.

    Raises:
        ValueError: labels that don't split the conditions in two halves, or too many conditions.
    """
    first, second = _halves(labels, means.shape[-2])
    size = len(first)
    scores = []
    for order in itertools.permutations(range(size)):
        steps = means[..., first, :] - means[..., second[list(order)], :]
        steps = steps / steps.norm(dim=-1, keepdim=True)
        cosines = steps @ steps.mT
        scores.append((cosines.sum((-2, -1)) - size) / (size * (size - 1)))
    return torch.stack(scores).amax(0)


def ccgp(hidden: Tensor, condition: Tensor, labels: Tensor, ridge: float = 1e-3) -> Tensor:
    """Cross-condition generalisation: the accuracy of a linear decoder of the label on conditions it was not fitted to.

    For each choice of one condition of either label, a ridge regression is fitted on the samples of all other
    conditions, and its sign is tested on these two; the accuracies are averaged. Chance is 0.5. Below it the code of
    the held-out conditions runs against that of the others.

    Args:
        hidden: `(..., n, N)`, the representation of n samples.
        condition: `(n,)`, the number of the condition of each sample; every condition must occur.
        labels: `(C,)`, two values, each of as many conditions, C from 4 to 12.
        ridge: the penalty, as a fraction of the mean variance of the features.

    Returns:
        `(...)`.

    Raises:
        ValueError: labels that don't split the conditions in two halves, a condition without samples, or a ridge that
            is not above 0.
    """
    ridge = _checks.number("ridge", ridge, above=0)
    first, second = _halves(labels, len(labels))
    _checks.shape(
        "condition", condition, f"({hidden.shape[-2]},), one for each sample", condition.shape == hidden.shape[-2:-1]
    )
    if set(condition.tolist()) != set(range(len(labels))):
        raise ValueError(f"condition must hold each of 0 to {len(labels) - 1}, got {sorted(set(condition.tolist()))}")
    sign = torch.empty(len(labels), dtype=hidden.dtype, device=hidden.device)
    sign[first], sign[second] = 1.0, -1.0
    target = sign[condition]
    right = []
    for held in itertools.product(first.tolist(), second.tolist()):
        tested = (condition == held[0]) | (condition == held[1])
        guess = _ridge(hidden[..., ~tested, :], target[~tested], hidden[..., tested, :], ridge)
        right.append((guess * target[tested] > 0).float().mean(-1))
    return torch.stack(right).mean(0)


def label_axis_share(weight: Tensor, axes: Tensor) -> Tensor:
    """The share of the input weights, within the task's axes, that lies on the last one, the label's.

    Args:
        weight: `(..., N, dim)`.
        axes: `(..., 3, dim)`, orthonormal.

    Returns:
        `(...)`, from 0 to 1.
    """
    squares = (weight @ axes.mT).square().sum(-2)
    return squares[..., -1] / squares.sum(-1)


def _ridge(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Predictions of a ridge regression at new points."""
    centre, level = x.mean(-2, keepdim=True), y.mean()
    gram = (x - centre).mT @ (x - centre)
    penalty = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram + penalty[..., None, None] * eye, (x - centre).mT @ (y - level)[:, None])
    return ((new - centre) @ weight)[..., 0] + level


def _halves(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The conditions of the two labels."""
    values, sizes = labels.unique(return_counts=True)
    if labels.shape != (count,) or len(values) != 2 or sizes[0] != sizes[1] or not 4 <= count <= MOST_CONDITIONS:
        raise ValueError(
            f"labels must split {count} conditions, 4 to {MOST_CONDITIONS}, in two halves, got {labels.tolist()}"
        )
    return (labels == values[1]).nonzero()[:, 0], (labels == values[0]).nonzero()[:, 0]
