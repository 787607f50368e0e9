"""Rich and lazy training by the rank of the initial weights: a linear theory, and small recurrent networks.

Y. H. Liu and others, ICLR 2024 (arXiv 2310.08513). The exact expressions for two-layer linear networks follow from the
conservation of W1 W1^T - w2 w2^T under gradient flow.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polylib import _checks
from polylib.lab.stack import Stack
from polylib.lab.training import seeds_of


class LinearRankTheory(NamedTuple):
    """What gradient flow did to a two-layer linear network when it has learned its task.

    `ka`: alignment of the tangent kernels before and after, over all parameters. `dw1_sq`, `dw2_sq`: squared Frobenius
    norms of the changes of the two layers.
    """

    ka: float
    dw1_sq: float
    dw2_sq: float


def linear_rank_theory(
    d: int, rank: int, sigma: float, beta_norm: float = 1.0, cos2: float | None = None
) -> LinearRankTheory:
    """Laziness of the network f(x) = w2 . W1 x as a function of the rank of W1, in closed form.

    The start is w2 = 0 and W1 = sigma / sqrt(rank) U V^T with orthonormal columns, the inputs are white, the target is
    beta . x, and gradient flow runs until the error is zero.

    Args:
        d: the number of inputs.
        rank: of W1 at the start, 1 to `d`.
        sigma: the Frobenius norm of W1 at the start, the same for all ranks.
        beta_norm: the length of the target.
        cos2: the squared cosine of the angle between the target and the row space of W1: 1 for an aligned start. By
            default rank / d, its mean over random targets. `ka` is linear in it, so that it is the mean then; the
            changes of the weights are those of a target at that angle.

    Raises:
        ValueError: a number out of its range.
    """
    _checks.integer("rank", rank, least=1, most=d)
    if not sigma > 0 or not beta_norm > 0:
        raise ValueError(f"sigma and beta_norm must be above 0, got {sigma} and {beta_norm}")
    cos2 = rank / d if cos2 is None else cos2
    _checks.number("cos2", cos2, least=0, most=1)
    s2 = sigma**2 / rank
    a2 = (math.sqrt(s2**2 + 4 * beta_norm**2) - s2) / 2  # the squared length of w2 at the end
    shared = s2 * (rank - 1) + (s2 + a2) * cos2 + a2 * rank
    end = s2**2 * (rank - 1) + (s2 + a2) ** 2 + d * a2**2 + 2 * a2 * s2 * (rank - 1) + 2 * a2 * (s2 + a2)
    change = 2 * s2 + a2 - 2 * math.sqrt(s2 * (s2 + a2) * cos2)
    return LinearRankTheory(shared / math.sqrt(rank * end), change, a2)


class ReluRNN(nn.Module):
    """A recurrent network without biases: h_t = relu((1 - a) h_(t-1) + a (W_in x_t + W h_(t-1))), read at the end.

    All three matrices start as those of `torch.nn.Linear`; set `recurrent.weight` to study its rank.

    Args:
        inputs, hidden, outputs: the numbers of units.
        leak: a, the step in units of the time constant; 1 forgets the last state except through W.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, leak: float = 1.0) -> None:
        super().__init__()
        _checks.number("leak", leak, above=0, most=1)
        self.leak = leak
        self.input = nn.Linear(inputs, hidden, bias=False)
        self.recurrent = nn.Linear(hidden, hidden, bias=False)
        self.readout = nn.Linear(hidden, outputs, bias=False)

    def states(self, x: Tensor) -> Tensor:
        """From inputs `(batch, time, inputs)` the states `(batch, time, hidden)`; the one before the first is zero."""
        driven = self.leak * self.input(x)
        states = [driven[:, 0].relu()]
        for t in range(1, x.shape[1]):
            now = driven[:, t] + self.leak * self.recurrent(states[-1])
            states.append((now if self.leak == 1 else now + (1 - self.leak) * states[-1]).relu())
        return torch.stack(states, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From inputs `(batch, time, inputs)` the outputs after the last step, `(batch, outputs)`."""
        return self.readout(self.states(x)[:, -1])


def train_to_loss(
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    rate: float,
    target: float,
    max_steps: int,
    batch_size: int = 32,
    momentum: float = 0.9,
    memory: float = 0.95,
    seeds: Sequence[int] | int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    watch: Callable[[dict[str, Tensor]], Tensor] | None = None,
    watch_at: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Train K networks of one architecture together, in place, each until its running loss is below `target`.

    Networks that learn at different speeds are compared at equal loss. The running loss is an exponential mean over
    mini-batches that starts at the first loss. A network that gets there is left as it is, and so is one whose loss is
    not finite; the others go on in a smaller stack. Batches are drawn with replacement.

    Args:
        models: K modules that differ in nothing but the values of their parameters and buffers.
        x, y: `(samples, ...)`, the inputs and targets of all networks.
        rate, momentum: of stochastic gradient descent.
        memory: the factor of the running loss from one step to the next.
        seeds: of the batches, one for each model or one for all. Models of one seed see the same batches.
        watch: what to measure along training: from the stacked parameters, each `(K, ...)`, a tensor `(K, ...)`.
        watch_at: after how many steps, ascending; a network that has stopped is measured as it stands.

    Returns:
        `loss`, `(K, steps)`: of each mini-batch, not a number after a network stopped; `steps`, `(K,)`: how many it
        took; `reached`, `(K,)`: whether it got to the target; with `watch`, `watched`, `(K, len(watch_at), ...)`.

    Raises:
        ValueError: no models, seeds that are not one for each, or a setting out of range.
    """
    order = seeds_of(seeds, len(models))
    if len(order) != len(models):
        raise ValueError(f"seeds must be one for each of the {len(models)} models or one for all, got {len(order)}")
    if max_steps < 1 or batch_size < 1 or not 0 <= memory < 1:
        given = f"{max_steps}, {batch_size} and {memory}"
        raise ValueError(
            f"max_steps, batch_size and memory must be 1 or more, 1 or more, and 0 to below 1, got {given}"
        )
    if list(watch_at) != sorted(set(watch_at)) or (watch_at and not 0 <= watch_at[0] <= watch_at[-1] <= max_steps):
        raise ValueError(f"watch_at must be ascending numbers of steps, from 0 to {max_steps}, got {list(watch_at)}")
    stack = Stack(models, rate, momentum=momentum)
    shared = len(set(order)) == 1
    generators = {seed: torch.Generator().manual_seed(seed) for seed in dict.fromkeys(order)}
    whole = {name: value.clone() for name, value in stack.parameters.items()}
    device = next(iter(whole.values())).device
    alive = torch.arange(len(models), device=device)
    losses, running, watched = [], None, []
    steps = torch.zeros(len(models), dtype=torch.long, device=device)
    reached = torch.zeros(len(models), dtype=torch.bool, device=device)

    def look(step: int) -> None:
        if watch and step in watch_at:
            watched.append(watch(_written(whole, stack.parameters, alive) if len(alive) else whole))

    look(0)
    for step in range(max_steps):
        drawn = {seed: torch.randint(len(x), (batch_size,), generator=g).to(x.device) for seed, g in generators.items()}
        index = drawn[order[0]] if shared else torch.stack([drawn[order[k]] for k in alive.tolist()])
        values = stack.step(lambda model, batch: loss(model(batch[0]), batch[1]), (x[index], y[index]), shared=shared)
        losses.append(values.new_full((len(models),), torch.nan).index_copy(0, alive, values))
        steps[alive] += 1
        running = values if running is None else memory * running + (1 - memory) * values
        done = running < target
        going = ~done & values.isfinite()
        if not going.all():
            whole = _written(whole, stack.parameters, alive)
            reached[alive[done]] = True
            alive, running = alive[going], running[going]
            if len(alive):
                stack.keep(going)
        if not len(alive):
            for later in (n for n in watch_at if n > step):
                look(later)
            break
        look(step + 1)
    stack.write_back()
    result = {"loss": torch.stack(losses, 1), "steps": steps, "reached": reached}
    return result | ({"watched": torch.stack(watched, 1)} if watched else {})


def _written(whole: dict[str, Tensor], part: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """All networks, with those that are still in training as they stand now."""
    return {name: value.index_copy(0, rows, part[name]) for name, value in whole.items()}
