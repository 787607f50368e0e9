"""Learning-rate schedules: factors on the rate, as functions of the fraction of the training that is over."""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(_: float) -> float:
    """The schedule that leaves the learning rate alone."""
    return 1.0


def one_cycle(fraction: float, warmup: float = 0.3) -> float:
    """The one-cycle schedule: from 1/25 of the peak up to it in the first `warmup` of training, then to zero.

    Both halves are half periods of a cosine (Smith and Topin, 2017; the defaults of
    `torch.optim.lr_scheduler.OneCycleLR`).

    Args:
        fraction: of the training that is over, from 0 to 1.
    """
    if fraction < warmup:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * fraction / warmup))
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
