"""Memory plans for many equal layers in two levels: inside one layer, then of whole layers.

P. Zhao and others, "MEMO", SIGMOD 2025 (arXiv 2407.12117), section 4.2. The requests of a layer repeat, so they are
planned once. Each layer then is a single tensor as large as its own plan, and what is shared between layers is planned
together with those. Addresses inside a layer are added to the address of the layer.
"""

import torch

from polylib import _checks
from polylib.sequences.first_fit import MemoryPlan
from polylib.sequences.memory_requests import Requests, checked
from polylib.sequences.offset_allocation import solve_offset_allocation


def replicate_layers(layer_forward: Requests, layer_backward: Requests, n_layers: int, shared: Requests) -> Requests:
    """All requests of a training step: n forward passes one after the other, n backward passes, what is shared.

    A pass lasts from 0 to the last end of its requests. `shared` has times of the whole step.

    Raises:
        ValueError: requests that `solve_offset_allocation` would refuse, or a start before 0.
    """
    each, slots = _slots(layer_forward, layer_backward, n_layers)
    whole = checked(*shared)
    parts = [Requests(own.sizes, own.starts + at, own.ends + at) for own, (at, _) in zip(each, slots, strict=True)]
    return Requests(*(torch.cat(columns) for columns in zip(*parts, whole, strict=True)))


def bilevel_plan(
    layer_forward: Requests,
    layer_backward: Requests,
    n_layers: int,
    shared: Requests,
    time_limit: float | None = None,
    node_limit: int | None = None,
) -> MemoryPlan:
    """A plan for `replicate_layers`, in the order of its requests, from three small integer programs.

    Its status is `"optimal"` only if the peak is what is live at one time: what two levels cost is not searched.

    Args:
        layer_forward: the requests of the forward pass of one layer, from time 0.
        layer_backward: those of its backward pass, from time 0.
        n_layers: how many layers there are.
        shared: what lives across layers, in the times of the whole step.
        time_limit: seconds for each of the three programs.
        node_limit: nodes of the search tree of each.

    Raises:
        ValueError: as `replicate_layers`.
    """
    each, slots = _slots(layer_forward, layer_backward, n_layers)

    def solve(requests: Requests) -> MemoryPlan:
        return solve_offset_allocation(*requests, time_limit=time_limit, node_limit=node_limit)

    inner = [solve(own) for own in (each[0], each[-1])]
    plans = [inner[0]] * n_layers + [inner[1]] * n_layers
    blocks = Requests(
        torch.tensor([plan.peak for plan in plans]),
        torch.tensor([start for start, _ in slots]),
        torch.tensor([end for _, end in slots]),
    )
    whole = checked(*shared)
    outer = solve(Requests(*(torch.cat(two) for two in zip(blocks, whole, strict=True))))
    count = len(plans)
    offsets = [plan.offsets + at for plan, at in zip(plans, outer.offsets[:count], strict=True)]
    bound = replicate_layers(layer_forward, layer_backward, n_layers, whole).lower_bound
    return MemoryPlan(
        peak=outer.peak,
        offsets=torch.cat([*offsets, outer.offsets[count:]]),
        status="optimal" if outer.peak == bound else "feasible",
        lower_bound=bound,
        binaries=outer.binaries + sum(plan.binaries for plan in inner),
        nodes=outer.nodes + sum(plan.nodes for plan in inner),
    )


def _slots(forward: Requests, backward: Requests, n_layers: int) -> tuple[list[Requests], list[tuple[int, int]]]:
    n_layers = _checks.integer("n_layers", n_layers, least=1)
    kinds = []
    for name, own in (("layer_forward", forward), ("layer_backward", backward)):
        kinds.append(checked(*own))
        if not len(kinds[-1].sizes) or kinds[-1].starts.min() < 0:
            raise ValueError(f"{name} must have requests, from time 0 on, got {own!r:.80}")
    each = [kinds[0]] * n_layers + [kinds[1]] * n_layers
    ends = torch.tensor([int(own.ends.max()) for own in each]).cumsum(0).tolist()
    return each, list(zip([0, *ends[:-1]], ends, strict=True))
