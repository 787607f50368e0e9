import math

import pytest
import torch

from polylib.optimization import extrapolate, optimal_learning_rate

RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@pytest.mark.parametrize("best", [2.5e-3, 8e-3, 0.02])
def test_the_vertex_of_a_parabola_over_log_rate_is_found(best: float) -> None:
    losses = torch.tensor([1.5 + 0.2 * math.log(rate / best) ** 2 for rate in RATES])
    assert optimal_learning_rate(RATES, losses) == pytest.approx(best, rel=1e-3)


def test_at_an_end_of_the_grid_or_beside_a_diverged_run_it_is_the_rate_itself() -> None:
    assert optimal_learning_rate(RATES, torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])) == pytest.approx(0.1)
    assert optimal_learning_rate(RATES, torch.tensor([1.0, 4.0, 3.0, 2.0, 2.5])) == pytest.approx(1e-3)
    assert optimal_learning_rate(RATES, torch.tensor([3.0, 2.0, 1.0, math.nan, math.inf])) == pytest.approx(1e-2)


def test_a_flat_bottom_of_equal_losses_gives_a_finite_rate() -> None:
    assert optimal_learning_rate(RATES, torch.ones(5)) == pytest.approx(1e-3)
    assert 1e-3 <= optimal_learning_rate(RATES, torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0])) <= 1e-1


def test_a_power_law_with_a_bend_is_continued_exactly() -> None:
    def law(size: float) -> float:
        return 3.0 * size**1.5 * math.exp(-0.1 * math.log(size) ** 2)

    sizes = [16, 24, 32, 64]
    assert extrapolate(sizes, [law(size) for size in sizes], 1000) == pytest.approx(law(1000), rel=1e-6)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rates must be at least three positive numbers that ascend"):
        optimal_learning_rate([0.1, 0.01, 0.001], torch.ones(3))
    with pytest.raises(ValueError, match="losses must have one entry for each of 5 rates"):
        optimal_learning_rate(RATES, torch.ones(4))
    with pytest.raises(ValueError, match="losses must have a finite entry"):
        optimal_learning_rate(RATES, torch.full((5,), math.nan))
    with pytest.raises(ValueError, match="sizes must be at least three"):
        extrapolate([1, 2], [1, 2], 4)
    with pytest.raises(ValueError, match="values must be 3 positive numbers"):
        extrapolate([1, 2, 4], [1, -2, 4], 4)
    with pytest.raises(ValueError, match="size must be a finite number above 0"):
        extrapolate([1, 2, 4], [1, 2, 4], 0)
