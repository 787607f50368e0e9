"""Plans for memory: never two tensors in one place, against brute force, bounds, two levels, and bad input."""

import itertools

import pytest
import torch

from polylib.sequences import (
    MemoryPlan,
    Requests,
    bilevel_plan,
    first_fit_plan,
    overlaps,
    replicate_layers,
    solve_offset_allocation,
)

NONE = Requests(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))


def drawn(count, seed, span=10, longest=5, largest=9):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(span, (count,), generator=generator)
    return Requests(
        torch.randint(1, largest, (count,), generator=generator),
        starts,
        starts + torch.randint(1, longest, (count,), generator=generator),
    )


def live_by_time(requests):
    """The most that is live, one time after the other."""
    times = range(int(requests.starts.min()), int(requests.ends.max()))
    columns = list(zip(*(column.tolist() for column in requests), strict=True))
    return max(sum(size for size, start, end in columns if start <= time < end) for time in times)


def least_peak(requests):
    """Over all orders of placing: one of them leads to a best plan."""
    columns = list(zip(*(column.tolist() for column in requests), strict=True))
    best = sum(size for size, *_ in columns)
    for order in itertools.permutations(range(len(columns))):
        top = {}
        for k in order:
            _, start, end = columns[k]
            below = [top[j] for j in top if columns[j][1] < end and start < columns[j][2]]
            top[k] = max(below, default=0) + columns[k][0]
        best = min(best, max(top.values()))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_lowest_peak_is_that_of_brute_force(seed):
    requests = drawn(7, seed, span=6)
    plan = solve_offset_allocation(*requests)
    assert plan.status == "optimal" and plan.peak == plan.lower_bound == least_peak(requests)
    assert overlaps(requests, plan.offsets) == 0 and (plan.offsets >= 0).all()


@pytest.mark.parametrize("seed", [1, 4, 100])
def test_a_program_that_no_simple_rule_solves(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1, 1, 2, 3, 4, 4, 8, 11])[torch.randint(8, (24,), generator=generator)]
    starts = torch.randint(30, (24,), generator=generator)
    requests = Requests(sizes, starts, starts + torch.randint(2, 9, (24,), generator=generator))
    plan = solve_offset_allocation(*requests, time_limit=60)
    rules = [first_fit_plan(*requests, order=order) for order in ("time", "size")]
    assert plan.status == "optimal" and overlaps(requests, plan.offsets) == 0
    assert requests.lower_bound <= plan.peak <= min(rule.peak for rule in rules)
    if seed < 100:
        assert plan.binaries > 0 and plan.peak < min(rule.peak for rule in rules)
    wide = Requests(512 * sizes, *requests[1:])
    assert solve_offset_allocation(*wide, time_limit=60).peak == 512 * plan.peak


@pytest.mark.parametrize("order", ["time", "size"])
@pytest.mark.parametrize("seed", range(4))
def test_first_fit(seed, order):
    requests = drawn(30, seed)
    plan = first_fit_plan(*requests, order=order)
    assert overlaps(requests, plan.offsets) == 0
    assert plan.peak >= plan.lower_bound == requests.lower_bound == live_by_time(requests)
    tops = plan.offsets + requests.sizes
    at_once = (requests.starts[:, None] < requests.ends) & (requests.starts < requests.ends[:, None])
    for k, offset in enumerate(plan.offsets.tolist()):  # nothing lies lower than on something, or on the ground
        assert offset == 0 or offset in tops[at_once[k]].tolist()


def test_by_hand():
    sizes, starts, ends = [1, 1, 2], [0, 0, 1], [1, 2, 2]
    first = first_fit_plan(sizes, starts, ends)
    assert first.offsets.tolist() == [0, 1, 2] and first.peak == 4
    best = solve_offset_allocation(sizes, starts, ends)
    assert best.peak == 3 and best.status == "optimal" and best.offsets.tolist()[2] in (0, 1)


def test_a_tensor_may_follow_another_in_its_place():
    plan = solve_offset_allocation([5, 5, 5], [0, 1, 2], [1, 2, 3])
    assert plan.peak == 5 and plan.offsets.tolist() == [0, 0, 0]


def test_equal_sizes_leave_nothing_to_plan():
    for seed in range(5):
        requests = drawn(40, seed, largest=2)
        assert first_fit_plan(*requests).status == "optimal"


def test_a_limit_gives_the_best_that_is_known():
    requests = drawn(60, 3, span=20, longest=9)
    plan = solve_offset_allocation(*requests, time_limit=1e-3)
    rules = [first_fit_plan(*requests, order=order).peak for order in ("time", "size")]
    assert plan.peak <= min(rules) and overlaps(requests, plan.offsets) == 0
    assert plan.lower_bound <= plan.peak


def test_nothing_and_sizes_of_nothing():
    assert solve_offset_allocation([], [], []).peak == first_fit_plan([], [], []).peak == 0
    plan = solve_offset_allocation([0, 3, 0], [0, 0, 0], [2, 2, 2])
    assert plan.peak == 3 and isinstance(plan, MemoryPlan)


def test_capacity():
    assert solve_offset_allocation([1, 2], [0, 0], [1, 1], capacity=3).peak == 3
    with pytest.raises(ValueError, match="capacity must be at least 3, got 2"):
        solve_offset_allocation([1, 2], [0, 0], [1, 1], capacity=2)


def shared_between(requests, n_layers, size=1):
    """One tensor from each layer to the next, from half of a forward pass on."""
    length = int(requests.ends.max())
    starts = torch.arange(n_layers - 1) * length + length // 2
    return Requests(torch.full_like(starts, size), starts, starts + length)


@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_two_levels(n_layers):
    forward, backward = drawn(10, 0), drawn(12, 1)
    shared = shared_between(forward, n_layers)
    plan = bilevel_plan(forward, backward, n_layers, shared)
    whole = replicate_layers(forward, backward, n_layers, shared)
    assert len(whole.sizes) == n_layers * 22 + n_layers - 1
    assert overlaps(whole, plan.offsets) == 0
    assert plan.peak == int((plan.offsets + whole.sizes).max())
    assert whole.lower_bound <= plan.peak
    inner = [solve_offset_allocation(*own).peak for own in (forward, backward)]
    assert max(inner) <= plan.peak <= max(inner) + 2
    assert (plan.offsets[:10] - plan.offsets[:10].min()).tolist() == solve_offset_allocation(*forward).offsets.tolist()


def test_layers_follow_each_other():
    forward, backward = Requests(*map(torch.tensor, ([2], [0], [3]))), Requests(*map(torch.tensor, ([4], [1], [5])))
    whole = replicate_layers(forward, backward, 2, NONE)
    assert [column.tolist() for column in whole] == [[2, 2, 4, 4], [0, 3, 7, 12], [3, 6, 11, 16]]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([1, -1], [0, 0], [1, 1]), "sizes must be at least 0, got -1"),
        (([1, 1], [0, 2], [1, 2]), "ends must be after starts, got 2 to 2 for tensor 1"),
        (([1, 1], [0], [1, 1]), "same length"),
        (([1.5], [0], [1]), "sizes must be a vector of whole numbers"),
        (([[1]], [0], [1]), "sizes must be a vector"),
        (([1.0], [0.0], [float("inf")]), r"ends must be a vector of whole numbers, got \[inf\]"),
    ],
)
def test_bad_requests(columns, words):
    for function in (solve_offset_allocation, first_fit_plan):
        with pytest.raises(ValueError, match=words):
            function(*columns)
    bad = Requests(*map(torch.tensor, columns))
    good = drawn(3, 0)
    for parts in ((bad, good, 2, NONE), (good, bad, 2, NONE), (good, good, 2, bad)):
        with pytest.raises(ValueError, match=words):
            bilevel_plan(*parts)


def test_bad_arguments():
    good = drawn(3, 0)
    for arguments, words in (((good, good, 0, NONE), "n_layers"), ((NONE, good, 2, NONE), "layer_forward")):
        with pytest.raises(ValueError, match=words):
            bilevel_plan(*arguments)
    with pytest.raises(ValueError, match="order"):
        first_fit_plan(*good, order="random")
    with pytest.raises(ValueError, match="time_limit"):
        solve_offset_allocation(*good, time_limit=0)
    with pytest.raises(ValueError, match="node_limit"):
        solve_offset_allocation(*good, node_limit=0)
    with pytest.raises(ValueError, match="offsets must have shape"):
        overlaps(good, torch.zeros(2))
