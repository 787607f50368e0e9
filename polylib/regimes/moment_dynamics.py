"""Gradient descent of a network of polynomial units and of its linearised twin, without their weights.

The step of full-batch gradient descent moves all units by the same affine map, w_i <- w_i - c sum_p r_p phi'(w_i . x_p)
x_p, with the residuals r. So the lifted moment C of `grokking_lazy_rich` follows a recursion of its own, C <- B^T C B,
which is exact at any width and costs nothing that grows with it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polylib import _checks
from polylib.regimes.grokking_lazy_rich import Scale, lifted_input, moment_kernel, moment_output, scales


def moment_descent(
    moment: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: Scale,
    epsilon: Scale,
    *,
    rate: float,
    record: Sequence[int],
    stop: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Train networks on the mean of (f - y)^2 / (2 alpha^2), by full-batch steps W <- W - rate N grad.

    Args:
        moment: `(..., D + 1, D + 1)`, the lifted moment of the weights at the start.
        x, y: `(..., P, D)` and `(..., P)`, the inputs and targets. Leading dimensions broadcast.
        alpha, epsilon: numbers above 0, or tensors `(...)`.
        rate: of the steps, above 0. In the lazy limit the output moves by -rate K r / P, whatever alpha is.
        record: after how many steps to keep the moment, ascending from 0 or more.
        stop: given the moment at a step of `record`, whether to end there.

    Returns:
        `(T, ..., D + 1, D + 1)`, the moments after the first T steps of `record`; all of them without `stop`.

    Raises:
        ValueError: shapes that don't fit, a scale or rate not above 0, or steps that don't ascend.
    """
    alpha, epsilon = _checked(moment, x, y, alpha, epsilon, rate, record)
    batch = torch.broadcast_shapes(moment.shape[:-2], x.shape[:-2], y.shape[:-1], alpha.shape, epsilon.shape)
    count, dim = x.shape[-2:]
    z = lifted_input(x.expand(*batch, count, dim), epsilon).contiguous()
    moved = z.clone()
    moved[..., 0] = 0  # the lifted 1 of a unit is no weight
    half, offset = (alpha * epsilon / 2)[..., None], (alpha / (2 * epsilon))[..., None]
    size = (rate * epsilon / (alpha * count))[..., None, None]
    eye = torch.eye(dim + 1, dtype=x.dtype, device=x.device)
    moment = moment.expand(*batch, dim + 1, dim + 1)
    kept = []
    for step in range(record[-1] + 1):
        if step == record[len(kept)]:
            kept.append(moment)
            if stop is not None and stop(moment):
                break
        residual = half * torch.linalg.vecdot(z @ moment, z) - offset - y
        map_ = eye - size * (z.mT @ (residual[..., None] * moved))
        moment = map_.mT @ moment @ map_
    return torch.stack(kept)


def linearized_descent(
    moment: Tensor, x: Tensor, y: Tensor, alpha: Scale, epsilon: Scale, *, rate: float, record: Sequence[int]
) -> Tensor:
    """Train the linearised twins of the networks, with the same steps, in closed form.

    The twin starts from the same weights W and trains f0 + alpha / N sum_i phi'(w_i . x) (v_i - w_i) . x. Its kernel K
    stays, so that the residuals after t steps are (1 - rate K / P)^t r_0. What it computes is what a network with the
    mean of V and the second moment M + S + S^T would, S = mean_i (v_i - w_i) w_i^T.

    Arguments, errors and shape of the result as in `moment_descent`. The result is a lifted moment, though of no real
    weights: it may have negative eigenvalues. `moment_output` and `quadratic_test_loss` take it.
    """
    alpha, epsilon = _checked(moment, x, y, alpha, epsilon, rate, record)
    dtype, count = x.dtype, x.shape[-2]
    moment, x, y, alpha, epsilon = (tensor.double() for tensor in (moment, x, y, alpha, epsilon))
    values, vectors = torch.linalg.eigh(moment_kernel(moment, x, epsilon) * rate / count)
    start = moment_output(moment, x, alpha, epsilon) - y
    along = (vectors.mT @ start[..., None])[..., 0]
    z = lifted_input(x, epsilon)
    slopes = epsilon[..., None, None] * (z @ moment)  # mean_i phi'(w_i . x) (1, w_i), for each sample
    kept = []
    for step in record:
        sums = torch.where(values.abs() > 1e-12, (1 - (1 - values) ** step) / values, float(step))
        summed = vectors @ (sums * along)[..., None]  # the residuals, added up over the steps
        change = -(rate / (alpha * count))[..., None, None] * (x.mT @ (summed * slopes))  # (D, D + 1)
        mixed = torch.nn.functional.pad(change, (0, 0, 1, 0))
        kept.append((moment + mixed + mixed.mT).to(dtype))
    return torch.stack(kept)


def _checked(
    moment: Tensor, x: Tensor, y: Tensor, alpha: Scale, epsilon: Scale, rate: float, record: Sequence[int]
) -> tuple[Tensor, Tensor]:
    alpha, epsilon = scales(moment, x, alpha, epsilon)
    _checks.shape("y", y, f"(..., {x.shape[-2]}), a target for each sample", y.shape[-1:] == x.shape[-2:-1])
    _checks.number("rate", rate, above=0)
    if not record or record[0] < 0 or list(record) != sorted(set(record)):
        raise ValueError(f"record must be ascending numbers of steps from 0 or more, got {list(record)}")
    return alpha, epsilon
