import math

import pytest
import torch

from polylib.regimes import aligned_init, effective_rank, low_rank_init


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 5, 11, 12])
def test_rank_and_norm(rank):
    weight = draw(12, 20)
    low = low_rank_init(weight, rank)
    assert torch.linalg.matrix_rank(low) == rank
    assert low.norm().item() == pytest.approx(weight.norm().item(), rel=1e-12)
    spectral = low_rank_init(weight, rank, norm="spectral")
    assert torch.linalg.matrix_norm(spectral, 2).item() == pytest.approx(torch.linalg.matrix_norm(weight, 2).item())
    plain = low_rank_init(weight, rank, norm=None)  # the truncation itself: its error is the singular values left out
    assert (plain - weight).norm().item() == pytest.approx(torch.linalg.svdvals(weight)[rank:].norm().item(), abs=1e-12)


def test_full_rank_is_the_identity_map():
    weight = draw(7, 7)
    low = low_rank_init(weight, 7)
    assert torch.equal(low, weight)
    assert low is not weight


def test_the_spectral_norm_grows_as_the_rank_falls():
    sizes = [torch.linalg.matrix_norm(low_rank_init(draw(16, 16), rank), 2) for rank in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0].item() == pytest.approx(draw(16, 16).norm().item())


def test_dtype_and_gradient():
    weight = torch.nn.Parameter(draw(4, 4).float())
    low = low_rank_init(weight, 2)
    assert low.dtype == torch.float32
    assert not low.requires_grad


def test_low_rank_errors():
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 3, got 0"):
        low_rank_init(draw(3, 4), 0)
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 3, got 4"):
        low_rank_init(draw(3, 4), 4)
    with pytest.raises(ValueError, match=r"weight must be a matrix of finite numbers, got shape \(3,\)"):
        low_rank_init(draw(3), 1)
    with pytest.raises(ValueError, match=r"weight must be a matrix of finite numbers, got shape \(2, 2\)"):
        low_rank_init(torch.full((2, 2), math.nan), 1)
    with pytest.raises(ValueError, match=r"norm must be one of \('fro', 'spectral', None\), got 'l1'"):
        low_rank_init(draw(3, 3), 1, norm="l1")
    with pytest.raises(ValueError, match=r"weight must be a matrix.*, got one that is zero"):
        low_rank_init(torch.zeros(3, 3), 1)


def test_aligned_start_sees_only_its_directions():
    weight, directions = draw(9, 6), draw(2, 6, seed=1)
    aligned = aligned_init(weight, directions)
    assert torch.linalg.matrix_rank(aligned) == 2
    assert aligned.norm().item() == pytest.approx(weight.norm().item())
    orthogonal = torch.linalg.svd(directions, full_matrices=True).Vh[2:]
    torch.testing.assert_close(aligned @ orthogonal.mT, torch.zeros(9, 4, dtype=torch.float64))
    same = aligned_init(weight, torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64) @ directions)
    torch.testing.assert_close(same, aligned)  # only their span counts
    torch.testing.assert_close(aligned_init(weight, draw(6, 6, seed=2)), weight)


def test_aligned_errors():
    with pytest.raises(ValueError, match=r"directions must have shape \(r, 6\), r from 1 to that number, got \(2, 5\)"):
        aligned_init(draw(4, 6), draw(2, 5))
    with pytest.raises(ValueError, match="depend on each other"):
        aligned_init(draw(4, 6), torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"directions must leave something of.*, got some that all"):
        aligned_init(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("kind", ["entropy", "participation", "stable"])
def test_effective_rank(kind):
    orthogonal = torch.linalg.qr(draw(6, 6)).Q
    assert effective_rank(orthogonal, kind).item() == pytest.approx(6)
    assert effective_rank(5 * draw(8, 1) @ draw(1, 6), kind).item() == pytest.approx(1, abs=1e-9)
    weight = draw(3, 5, 7)
    ranks = effective_rank(weight, kind)
    assert ranks.shape == (3,)
    torch.testing.assert_close(effective_rank(10 * weight, kind), ranks)
    assert ((ranks > 1) & (ranks < 5)).all()


def test_effective_rank_by_hand():
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(weight, "participation").item() == pytest.approx(100 / 82)
    assert effective_rank(weight, "stable").item() == pytest.approx(10 / 9)
    assert effective_rank(weight).item() == pytest.approx(4 / 3**0.75)
    with pytest.raises(ValueError, match="got 'rank'"):
        effective_rank(weight, "rank")
    with pytest.raises(ValueError, match="weight must be a matrix or a stack"):
        effective_rank(torch.ones(3))
