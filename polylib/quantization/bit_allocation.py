"""Which layer gets how many bits: the best choice within a budget, and all choices that nothing beats.

Each layer takes one of B numbers of bits, at a known cost and size. The least total cost within a total size is a
multiple-choice knapsack problem, and is solved exactly here.

Source of the use: Dong and others, "HAWQ-V2", NeurIPS 2020, whose cost is Omega (`quantization_sensitivity`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ParetoFrontier(NamedTuple):
    """All choices of bits that no other one beats, from the smallest to the largest.

    `size_bits`, `(P,)`, int64: their sizes, ascending. `omega`, `(P,)`: descending. `bits`, `(P, L)`, int64.
    """

    size_bits: Tensor
    omega: Tensor
    bits: Tensor


def pareto_frontier(omega: Tensor, sizes: Sequence[int], bits: Sequence[int]) -> ParetoFrontier:
    """All choices of bits for which no other choice has a smaller sum of `omega` and is not larger.

    Exact: layers are added one after the other, and what is dominated among the first layers can be dropped, because
    whatever the others add is added to both. The work grows with the number of different sizes that can be reached, not
    with B**L.

    Args:
        omega: `(L, B)`, what layer i costs with the j-th number of bits.
        sizes: the numbers of weights of the L layers.
        bits: the B numbers of bits.

    Raises:
        ValueError: shapes that do not match, sizes or bits below 1, or an `omega` that is not finite.
    """
    costs, counts, choices = _checked(omega, sizes, bits)
    front = _search(costs, counts, choices, range(len(counts)))
    return ParetoFrontier(front.size_bits, front.omega, choices[front.bits])


def select_bits(
    omega: Tensor,
    sizes: Sequence[int],
    bits: Sequence[int],
    budget: float,
    monotone_by: Tensor | Sequence[float] | None = None,
) -> list[int]:
    """The number of bits of each layer that makes the sum of `omega` least within a budget, exactly.

    Dynamic programming over the sizes that can be reached, as in `pareto_frontier`; of equally good choices the
    smallest in size.

    Args:
        omega, sizes, bits: as in `pareto_frontier`.
        budget: the largest size, the sum of bits times weights, in bits.
        monotone_by: `(L,)`; a layer with a larger value never gets fewer bits than one with a smaller value. Layers of
            equal values count as ascending in their order.

    Raises:
        ValueError: as in `pareto_frontier`; a `monotone_by` of another length; a budget that no choice meets.
    """
    costs, counts, choices = _checked(omega, sizes, bits)
    least = int(choices.min() * counts.sum())
    if not budget >= least:
        raise ValueError(f"budget must be at least {least} bits, {int(choices.min())} everywhere, got {budget}")
    order = torch.arange(len(counts))
    if monotone_by is not None:
        key = torch.as_tensor(monotone_by)
        if key.shape != counts.shape:
            raise ValueError(f"monotone_by must have shape {tuple(counts.shape)}, one a layer, got {tuple(key.shape)}")
        order = key.argsort(stable=True)
    best = _search(costs, counts, choices, order.tolist(), budget, monotone_by is not None).bits[-1]
    return choices[best[order.argsort()]].tolist()


def _search(
    omega: Tensor, sizes: Tensor, bits: Tensor, order: Sequence[int], budget: float = math.inf, monotone: bool = False
) -> ParetoFrontier:
    """The frontier within a budget; its `bits` are the places in `bits` of the choices, in the given order of layers.

    With `monotone` no layer gets fewer bits than the one before it in the order.
    """
    nothing = ParetoFrontier(sizes.new_zeros(1), omega.new_zeros(1), sizes.new_zeros(1, 0))
    # fronts[k]: what may stand before a layer with the k-th fewest bits. If monotone, all of it has no more bits.
    fronts, rest = [nothing] * len(bits), int(bits.min() * sizes.sum())
    for i in order:
        rest -= int(bits.min() * sizes[i])  # what the layers to come take at least
        reached: list[ParetoFrontier] = []
        for front, k in zip(fronts, bits.argsort().tolist(), strict=True):
            grown = _with_layer(front, k, int(sizes[i] * bits[k]), omega[i, k])
            reached.append(_undominated([*reached[-1:], grown], budget - rest))
        fronts = reached if monotone else reached[-1:] * len(bits)
    return fronts[-1]


def _with_layer(front: ParetoFrontier, k: int, size: int, cost: Tensor) -> ParetoFrontier:
    chosen = torch.cat([front.bits, front.bits.new_full((len(front.bits), 1), k)], 1)
    return ParetoFrontier(front.size_bits + size, front.omega + cost, chosen)


def _undominated(parts: Sequence[ParetoFrontier], limit: float) -> ParetoFrontier:
    """Of the choices of all parts, in the order of their sizes, those that cost less than all before them."""
    size, omega, chosen = (torch.cat(column) for column in zip(*parts, strict=True))
    order = omega.argsort(stable=True)
    order = order[size[order].argsort(stable=True)]
    cost = omega[order]
    better = torch.ones_like(cost, dtype=torch.bool)
    better[1:] = cost[1:] < cost.cummin(0).values[:-1]
    kept = order[better & (size[order] <= limit)]
    return ParetoFrontier(size[kept], omega[kept], chosen[kept])


def _checked(omega: Tensor, sizes: Sequence[int], bits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    omega = torch.as_tensor(omega).detach().double().cpu()
    counts, choices = torch.as_tensor(sizes).cpu(), torch.as_tensor(bits).cpu()
    for name, value in (("sizes", counts), ("bits", choices)):
        if value.dim() != 1 or not len(value) or value.is_floating_point() or (value < 1).any():
            raise ValueError(f"{name} must be whole numbers of at least 1, got {value.tolist()}")
    if omega.shape != (len(counts), len(choices)) or not omega.isfinite().all():
        expected = f"({len(counts)}, {len(choices)}), a finite number for each layer and number of bits"
        raise ValueError(f"omega must have shape {expected}, got {tuple(omega.shape)}, or values that are not finite")
    return omega, counts.long(), choices.long()
