"""Groups of outliers whose gradients pull in opposite directions: how they are found, and a model that explains them.

E. Rosenfeld and A. Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization",
ICLR 2024 (arXiv 2311.04163). The groups are found by ranking the examples by how much their own loss changes in one
step of full-batch gradient descent. The model is a linear network with one hidden unit, f(x) = c b . x, on data in
which a rare strong feature tells something by its absolute value only; its descent and its Hessian depend on the
second moments of the data alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from polylib import _checks


def loss_change_groups(loss_before: Tensor, loss_after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The examples whose losses rise most in a step, and those whose losses fall most.

    Args:
        loss_before, loss_after: the loss of each example, `(..., n)`.
        k: the size of a group, 1 to n // 2, so that no example is in both.

    Returns:
        The indices of the two groups, `(..., k)` each, the largest change first.

    Raises:
        ValueError: losses of different shape or not finite, or `k` out of range.
    """
    _checks.shape("loss_before", loss_before, "(..., n)", loss_before.dim() > 0)
    want = f"{tuple(loss_before.shape)}, as loss_before"
    _checks.shape("loss_after", loss_after, want, loss_after.shape == loss_before.shape)
    k = _checks.integer("k", k, least=1, most=loss_before.shape[-1] // 2)
    change = loss_after - loss_before
    if not change.isfinite().all():
        raise ValueError(f"losses must be finite, got {int((~change.isfinite()).sum())} changes that are not")
    return change.topk(k, -1).indices, change.topk(k, -1, largest=False).indices


def group_gradients(
    model: nn.Module, loss: Callable[[Tensor, Any], Tensor], x: Tensor, y: Any, groups: Sequence[Tensor]
) -> Tensor:
    """The gradient of the mean loss of each group of examples, by all parameters of a model.

    Args:
        model: put layers that draw random numbers or use the statistics of the batch into evaluation mode.
        loss: from outputs and targets of m examples, the loss of each, `(m,)`.
        x, y: the examples, along the first axis.
        groups: the indices of each group, at least one.

    Returns:
        `(groups, P)`, each row in the order of `model.parameters()`, flattened.

    Raises:
        ValueError: no groups, an empty group, or a loss that is not one number for each example.
    """
    if len(groups) == 0 or any(len(group) == 0 for group in groups):
        raise ValueError(f"groups must each hold an example, got sizes {[len(group) for group in groups]}")
    params = {name: value.detach() for name, value in model.named_parameters()}

    def mean_loss(params: dict[str, Tensor], group: Tensor) -> Tensor:
        each = loss(functional_call(model, params, (x[group],)), y[group])
        _checks.shape("loss", each, f"({len(group)},), one for each example", each.shape == (len(group),))
        return each.mean()

    rows = [grad(mean_loss)(params, group) for group in groups]
    return torch.stack([torch.cat([part.flatten() for part in row.values()]) for row in rows])


class OpposingData(NamedTuple):
    """Inputs `(n, signals + outliers)`, targets `(n,)`, and the group of each example: 1, -1, or 0 for none."""

    x: Tensor
    y: Tensor
    group: Tensor


def opposing_data(
    n: int,
    *,
    signals: int = 10,
    outliers: int = 10,
    fraction: float = 0.02,
    power: float = 20.0,
    strength: float = 0.5,
    norm: float = 2.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> OpposingData:
    """Data with a rare strong feature that tells something by its absolute value only.

    x = (x_s, x_o) and y = beta . x_s + strength abs(1 . x_o) / sqrt(outliers), with standard normal signals x_s and a
    random beta of length `norm`. In a share `fraction` of the examples, half of them with each sign, all entries of
    x_o are +-sqrt(power / (fraction outliers)); in the others they are zero. So the mean of its squared length is
    `power`, however rare it is, and the best linear weight on it is zero.

    Args:
        n: the number of examples, whose first ones have the feature: the positive group, then the negative.
        fraction: rounded to groups of equal, whole size.
        dtype: float64 by default. The descent leaves the balance between the groups from numbers as small as rounding.

    Raises:
        ValueError: a number out of its range, or a fraction of `n` that leaves no two groups of equal size.
    """
    for name, size in (("n", n), ("signals", signals), ("outliers", outliers)):
        _checks.integer(name, size, least=1)
    _checks.number("fraction", fraction, above=0, most=1)
    for name, value in (("power", power), ("strength", strength), ("norm", norm)):
        _checks.number(name, value, least=0)
    members = round(n * fraction / 2)
    if not 1 <= members <= n // 2:
        raise ValueError(f"fraction must give two groups of at least one example each of {n}, got {fraction}")
    source = None if generator is None else generator.device
    x = torch.randn(n, signals + outliers, generator=generator, dtype=dtype, device=source)
    beta = torch.randn(signals, generator=generator, dtype=dtype, device=source)
    group = x.new_zeros(n)
    group[:members], group[members : 2 * members] = 1, -1
    x[:, signals:] = (group * (power / (2 * members / n * outliers)) ** 0.5)[:, None]
    feature = x[:, signals:].sum(1).abs() / outliers**0.5
    return OpposingData(x, x[:, :signals] @ (norm * beta / beta.norm()) + strength * feature, group)


class Moments(NamedTuple):
    """What the mean of (w . x - y)^2 / 2 needs to know: mean x x^T, mean y x and mean y^2, with leading dimensions."""

    second: Tensor
    cross: Tensor
    square: Tensor

    def loss(self, w: Tensor) -> Tensor:
        """The mean of (w . x - y)^2 / 2 for weights `(..., D)`."""
        quadratic = torch.linalg.vecdot((self.second @ w[..., None])[..., 0], w)
        return quadratic / 2 - torch.linalg.vecdot(self.cross, w) + self.square / 2


def moments(x: Tensor, y: Tensor) -> Moments:
    """The moments of examples x, `(..., n, D)`, and targets y, `(..., n)`.

    Raises:
        ValueError: shapes that don't fit, or no examples.
    """
    _checks.shape("x", x, "(..., n, D) with at least one example", x.dim() > 1 and x.shape[-2] > 0)
    _checks.shape("y", y, f"{tuple(x.shape[:-1])}, as x", y.shape == x.shape[:-1])
    n = x.shape[-2]
    return Moments(x.mT @ x / n, (x.mT @ y[..., None])[..., 0] / n, y.square().mean(-1))


def descend_product(data: Moments, b: Tensor, c: Tensor, rate: float | Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Train f(x) = c b . x by full-batch gradient descent on the mean of (f - y)^2 / 2.

    Args:
        data: of all examples.
        b, c: the start, `(..., D)` and `(...)`.
        rate: of the steps, above 0: a number, or a tensor `(...)`. Leading dimensions of all of these broadcast.
        steps: how many, 0 or more.

    Returns:
        b and c at the start and after each step, `(1 + steps, ..., D)` and `(1 + steps, ...)`. A run that diverges
        ends in infinities and NaN.

    Raises:
        ValueError: shapes that don't fit, a rate not above 0, or a negative number of steps.
    """
    size = data.cross.shape[-1]
    _checks.shape("b", b, f"(..., {size}), as the data", b.dim() > 0 and b.shape[-1] == size)
    rate = torch.as_tensor(rate, dtype=b.dtype, device=b.device)
    if not (rate > 0).all():
        raise ValueError(f"rate must be above 0, got {rate.min().item():g}")
    steps = _checks.integer("steps", steps, least=0)
    leading = torch.broadcast_shapes(data.cross.shape[:-1], b.shape[:-1], c.shape, rate.shape)
    bs, cs = [b.expand(*leading, size)], [c.expand(leading)]
    for _ in range(steps):
        b, c = bs[-1], cs[-1]
        slope = (data.second @ (c[..., None] * b)[..., None])[..., 0] - data.cross  # of the loss by c b
        bs.append(b - (rate * c)[..., None] * slope)
        cs.append(c - rate * torch.linalg.vecdot(b, slope))
    return torch.stack(bs), torch.stack(cs)


def product_hessian(data: Moments, b: Tensor, c: Tensor) -> Tensor:
    """The Hessian of the mean of (c b . x - y)^2 / 2 by (b, c): `(..., D + 1, D + 1)`. Arguments as above."""
    moved = (data.second @ b[..., None])[..., 0]
    mixed = 2 * c[..., None] * moved - data.cross
    leading, size = mixed.shape[:-1], mixed.shape[-1]
    hessian = mixed.new_empty(*leading, size + 1, size + 1)
    hessian[..., :size, :size] = c[..., None, None].square() * data.second
    hessian[..., :size, size] = hessian[..., size, :size] = mixed
    hessian[..., size, size] = torch.linalg.vecdot(b, moved)
    return hessian
