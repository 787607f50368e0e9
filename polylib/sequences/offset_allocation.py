"""Where each tensor goes in memory, decided once for all: dynamic storage allocation as an integer program.

Tensor i has a size S_i and a time; A_i is its address, M the peak, and z_ij = 0 puts i below j. P. Zhao and others,
"MEMO", SIGMOD 2025 (arXiv 2407.12117), section 4.2:

    least M  with  A_i + S_i <= M  and, for i and j that live at a common time,
    A_i + S_i <= A_j + z_ij C,   A_j + S_j <= A_i + (1 - z_ij) C.

The paper solves it by Gurobi, here it is HiGHS. C may be the peak of any plan that is known, and is that of the best of
two simple rules; M is at least what is live at one time. Sizes are whole, so that a gap below 1 is none.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from polylib import _checks
from polylib.sequences.first_fit import MemoryPlan, first_fit_plan, peak
from polylib.sequences.memory_requests import Requests, checked, pairs_at_once


def solve_offset_allocation(
    sizes: Tensor | Sequence[int],
    starts: Tensor | Sequence[int],
    ends: Tensor | Sequence[int],
    capacity: int | None = None,
    time_limit: float | None = None,
    node_limit: int | None = None,
) -> MemoryPlan:
    """The plan of the lowest peak, by HiGHS; at a limit the best one that was found, never worse than first fit.

    Args:
        sizes: `(n,)`, whole numbers of at least 0.
        starts: `(n,)`, the time at which each tensor is asked for.
        ends: `(n,)`, the time at which it is freed, which no longer belongs to it.
        capacity: the memory there is.
        time_limit: seconds of search at most. What is found then depends on the machine.
        node_limit: nodes of the search tree at most.

    Raises:
        ValueError: other shapes, sizes below 0, an end that is not after its start, or a capacity that no plan that was
            found keeps to.
    """
    requests = checked(sizes, starts, ends)
    limits = {}
    if time_limit is not None:
        limits["time_limit"] = _checks.number("time_limit", time_limit, above=0)
    if node_limit is not None:
        limits["node_limit"] = _checks.integer("node_limit", node_limit, least=1)
    rules = [first_fit_plan(*requests, order="size"), first_fit_plan(*requests, order="time")]
    best = rules[0] if rules[0].peak <= rules[1].peak else rules[1]
    if best.status != "optimal":
        best = _by_program(requests, best, limits)
    if capacity is not None and best.peak > _checks.integer("capacity", capacity, least=0):
        raise ValueError(f"capacity must be at least {best.peak}, got {capacity} (no plan: below {best.lower_bound})")
    return best


def _by_program(requests: Requests, known: MemoryPlan, limits: dict[str, float]) -> MemoryPlan:
    lower, upper = pairs_at_once(requests).nonzero(as_tuple=True)
    count, pairs = len(requests.sizes), len(lower)
    unit = int(np.gcd.reduce(requests.sizes.numpy())) or 1
    S, C, floor = requests.sizes.numpy() / unit, known.peak / unit, known.lower_bound / unit
    i, j = lower.numpy(), upper.numpy()
    each, z, M = np.arange(pairs), count + 1 + np.arange(pairs), count
    above = {  # A_i - A_j - C z <= -S_i, then A_j - A_i + C z <= C - S_j, then A_k - M <= -S_k
        "row": [each, each, each, pairs + each, pairs + each, pairs + each],
        "column": [i, j, z, j, i, z],
        "value": [np.full(pairs, own) for own in (1.0, -1.0, -C, 1.0, -1.0, C)],
    }
    last = 2 * pairs + np.arange(count)
    rows = np.concatenate([*above["row"], last, last])
    columns = np.concatenate([*above["column"], np.arange(count), np.full(count, M)])
    values = np.concatenate([*above["value"], np.ones(count), -np.ones(count)])
    total = count + 1 + pairs
    A = coo_array((values, (rows, columns)), shape=(2 * pairs + count, total)).tocsr()
    limit = np.concatenate([-S[i], C - S[j], -S])
    bounds = Bounds(np.zeros(total), np.concatenate([C - S, [C], np.ones(pairs)]))
    bounds.lb[M] = floor
    found = milp(
        np.eye(total)[M],
        integrality=np.concatenate([np.zeros(count + 1), np.ones(pairs)]),
        bounds=bounds,
        constraints=LinearConstraint(A, -np.inf, limit),
        options={"mip_rel_gap": 0.9 / C, **limits},
    )
    offsets, top = known.offsets, known.peak
    if found.x is not None:  # the order of the addresses is exact where the addresses are rounded
        order = np.argsort(found.x[:count], kind="stable").tolist()
        packed = stack_up(requests, order)
        if peak(requests, packed) < top:
            offsets, top = packed, peak(requests, packed)
    proved = known.lower_bound
    if found.mip_dual_bound is not None and np.isfinite(found.mip_dual_bound):
        proved = min(top, max(proved, unit * int(np.ceil(found.mip_dual_bound - 1e-6))))
    status: Literal["optimal", "feasible"] = "optimal" if top == proved else "feasible"
    return MemoryPlan(top, offsets, status, proved, pairs, int(found.mip_node_count or 0))


def stack_up(requests: Requests, order: Sequence[int]) -> Tensor:
    """Each tensor in that order right above all those before it that it meets."""
    meets = pairs_at_once(requests)
    meets = meets | meets.T
    tops, offsets = torch.zeros_like(requests.sizes), torch.zeros_like(requests.sizes)
    for k in order:
        offsets[k] = (tops * meets[k]).max()
        tops[k] = offsets[k] + requests.sizes[k]
    return offsets
