"""The sharpness of a loss: the largest eigenvalue of its Hessian, followed along training at the cost of few gradients.

Gradient descent at rate r is stable along a direction of curvature c if r < 2 / c, so that the sharpness says how large
a step the loss bears where it stands. J. M. Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the
Edge of Stability", ICLR 2021 (arXiv 2103.00065).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from polylib.optimization.curvature import hessian_matvec, lanczos


def hessian_top_eigenvalue(
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    params: dict[str, Tensor],
    *,
    num_steps: int = 12,
    v0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of the Hessian of `loss_fn` at `params`, and its vector, by Lanczos' iteration.

    Each step costs a product with the Hessian, about two and a half gradients. Power iteration finds the eigenvalue of
    the largest size, which early in training may be negative; this finds the largest, and in fewer steps. Along a path
    of training the vector found before is a good start: a handful of steps is enough.

    Args:
        loss_fn: maps parameters, a dict of tensors, to a scalar; see `hessian_vector_product`.
        params: where the Hessian is taken.
        num_steps: of the iteration; as many as there are parameters at most are taken.
        v0: the start, `(P,)`, in the order of `flat_matvec`; by default the same random direction each time.

    Returns:
        The eigenvalue, a scalar, never above the true one but for rounding; and the vector, `(P,)`, of length one.

    Raises:
        ValueError: `v0` that is no direction, `num_steps` below 1, or a Hessian that is not finite.
    """
    # Copies, since the tangent of a view is as large as what it is a view of: all of training, for one of its steps.
    params = {name: value.detach().clone() for name, value in params.items()}
    size = sum(value.numel() for value in params.values())
    if v0 is None:
        like = next(iter(params.values()))
        v0 = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    found = lanczos(hessian_matvec(loss_fn, params), v0, min(num_steps, size))
    tridiagonal = torch.diag(found.alpha) + torch.diag(found.beta, 1) + torch.diag(found.beta, -1)
    along = torch.linalg.eigh(tridiagonal.double().cpu())[1][:, -1].to(found.basis)
    return found.ritz[-1], along @ found.basis
