import itertools

import pytest
import torch

from polylib.quantization import pareto_frontier, select_bits

BITS = [2, 3, 4, 6, 8]


def problem(seed, layers=5, ties=False):
    """Costs and sizes; with `ties` there are many choices of equal size and cost."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5 if ties else 40, (layers,), generator=generator).tolist()
    if ties:
        return torch.randint(4, (layers, len(BITS)), generator=generator).double(), sizes
    return torch.rand(layers, len(BITS), generator=generator, dtype=torch.float64), sizes


def every_choice(omega, sizes):
    """Bits `(C, L)`, size and cost of all choices, by brute force."""
    places = torch.tensor(list(itertools.product(range(len(BITS)), repeat=len(sizes))))
    chosen = torch.tensor(BITS)[places]
    return chosen, chosen @ torch.tensor(sizes), omega.gather(1, places.T).sum(0)


def cost_of(choice, omega):
    return sum(row[BITS.index(b)].item() for row, b in zip(omega, choice, strict=True))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_brute_force(seed, ties):
    omega, sizes = problem(seed, ties=ties)
    _, size, cost = every_choice(omega, sizes)
    for budget in size.double().quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).double()).tolist():
        choice = select_bits(omega, sizes, BITS, budget)
        assert sum(b * n for b, n in zip(choice, sizes, strict=True)) <= budget
        assert cost_of(choice, omega) == pytest.approx(cost[size <= budget].min().item())


@pytest.mark.parametrize("seed", range(4))
def test_the_monotone_choice_is_that_of_brute_force(seed):
    omega, sizes = problem(seed)
    key = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed))
    chosen, size, cost = every_choice(omega, sizes)
    allowed = (chosen[:, key.argsort()].diff(dim=1) >= 0).all(1)
    for budget in size.double().quantile(torch.tensor([0.0, 0.1, 0.5, 1.0]).double()).tolist():
        choice = torch.tensor(select_bits(omega, sizes, BITS, budget, monotone_by=key))
        assert (choice[key.argsort()].diff() >= 0).all()
        assert choice @ torch.tensor(sizes) <= budget
        assert cost_of(choice.tolist(), omega) == pytest.approx(cost[allowed & (size <= budget)].min().item())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_frontier_is_that_of_brute_force(seed, ties):
    omega, sizes = problem(seed, ties=ties)
    _, size, cost = every_choice(omega, sizes)
    front = pareto_frontier(omega, sizes, BITS)
    best = {s: cost[size == s].min().item() for s in size.unique().tolist()}
    expected = [s for s in best if all(best[s] < best[t] - 1e-12 for t in best if t < s)]
    assert front.size_bits.tolist() == expected
    assert front.omega.tolist() == pytest.approx([best[s] for s in expected])
    for choice, s, c in zip(front.bits.tolist(), front.size_bits.tolist(), front.omega.tolist(), strict=True):
        assert sum(b * n for b, n in zip(choice, sizes, strict=True)) == s
        assert cost_of(choice, omega) == pytest.approx(c)


def test_the_choice_lies_on_the_frontier_and_a_larger_budget_is_no_worse():
    omega, sizes = problem(0, layers=10)  # ten million choices
    front = pareto_frontier(omega, sizes, BITS)
    costs = []
    for budget in range(2 * sum(sizes), 8 * sum(sizes), 40):
        choice = select_bits(omega, sizes, BITS, budget)
        costs.append(cost_of(choice, omega))
        assert costs[-1] == pytest.approx(front.omega[front.size_bits <= budget][-1].item())
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(costs))


def test_the_order_of_bits_and_layers_does_not_matter():
    omega, sizes = problem(1)
    bits, layers = [4, 0, 3, 1, 2], [2, 0, 4, 1, 3]
    turned = omega[layers][:, bits]
    key = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7])
    for by in (None, key):
        straight = select_bits(omega, sizes, BITS, 4 * sum(sizes), by)
        shuffled = [sizes[i] for i in layers], [BITS[k] for k in bits]
        other = select_bits(turned, *shuffled, 4 * sum(sizes), None if by is None else by[layers])
        assert other == [straight[i] for i in layers]


def test_bad_input():
    omega, sizes = problem(0)
    with pytest.raises(ValueError, match=f"budget must be at least {2 * sum(sizes)} bits"):
        select_bits(omega, sizes, BITS, 2 * sum(sizes) - 1)
    with pytest.raises(ValueError, match="budget must be at least 182 bits, 2 everywhere, got nan"):
        select_bits(omega, sizes, BITS, float("nan"))
    with pytest.raises(ValueError, match="monotone_by"):
        select_bits(omega, sizes, BITS, 8 * sum(sizes), monotone_by=[1.0])
    for call in (pareto_frontier, lambda *a: select_bits(*a, 1e9)):
        with pytest.raises(ValueError, match=r"omega must have shape \(5,.*, got \(4, 5\), or"):
            call(omega[:4], sizes, BITS)
        with pytest.raises(ValueError, match="omega"):
            call(omega / 0, sizes, BITS)
        with pytest.raises(ValueError, match="sizes"):
            call(omega, [1.5] * 5, BITS)
        with pytest.raises(ValueError, match="bits"):
            call(omega, sizes, [])
