"""The factors of a model in one tensor, refreshed together, against one after the other."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.optimization import MKOR
from polylib.optimization.factor_arena import FactorArena
from polylib.optimization.inverse_factors import sherman_morrison_ema_, stabilise_

GAMMA, STABILIZER, ZETA = 0.8, 1.4, 0.9


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("stabilizer", [None, STABILIZER])
def test_together_is_one_after_the_other_also_when_factors_were_changed_in_between(backend, stabilizer):
    draw = torch.Generator().manual_seed(0)
    arena = FactorArena([3, 70], torch.float32, "cpu")
    alone = [factor.clone() for factor in arena.factors]
    for step in range(6):
        if step == 3:  # the largest entries change behind the arena's back: above the threshold, and below it
            for factors in (arena.factors, alone):
                factors[0].mul_(10)
                factors[1].mul_(0.1)
        vectors = [torch.randn(len(factor), generator=draw) for factor in alone]
        arena.refresh_(vectors, GAMMA, stabilizer, ZETA, backend=backend)
        for factor, v in zip(alone, vectors, strict=True):
            if stabilizer is not None:
                stabilise_(factor, stabilizer, ZETA)
            sherman_morrison_ema_(factor, v, GAMMA)
        torch.testing.assert_close(arena.factors, alone, rtol=2e-5, atol=2e-6)


def test_it_holds_its_own_factors_and_no_others():
    arena = FactorArena([2, 3], torch.float64, "cpu")
    own = arena.factors
    assert arena.holds(own)
    assert not arena.holds(own[:1]) and not arena.holds([own[1], own[0]])
    assert not arena.holds([own[0], own[1].clone()])
    assert not arena.holds(copy.deepcopy(own))


def trained(device, meddle):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 3, bias=False)).to(device)
    mkor = MKOR(model, torch.optim.SGD(model.parameters(), 0.1), update_freq=1, stabilizer=STABILIZER)
    for step in range(8):
        if step == 4:
            meddle(mkor)
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 5, generator=draw), torch.randint(3, (12,), generator=draw)
        model.zero_grad()
        F.cross_entropy(model(x.to(device)), y.to(device)).backward()
        mkor.step()
    return [f.cpu() for layer in mkor.layers.values() for f in (layer.left, layer.right)]


def scale_in_place(mkor):
    mkor.layers["0"].left.mul_(10)


def replace(mkor):
    mkor.layers["2"].right = mkor.layers["2"].right * 10


def load(mkor):
    state = copy.deepcopy(mkor.state_dict())
    state["factors"]["0"]["right"].mul_(10)
    mkor.load_state_dict(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("meddle", [scale_in_place, replace, load])
def test_on_a_gpu_the_optimizer_refreshes_all_at_once_and_is_the_same(meddle):
    torch.testing.assert_close(trained("cuda", meddle), trained("cpu", meddle), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("meddle", [scale_in_place, replace, load])
def test_an_optimizer_that_refreshes_all_at_once_is_the_same(meddle, monkeypatch):
    """As on a GPU, with the reference in the place of the kernel: the way there is chosen by the tensor's device."""
    plain = trained("cpu", meddle)
    seen = []
    refresh = FactorArena.refresh_

    def counted(*args):
        seen.append(args)
        refresh(*args)

    monkeypatch.setattr(FactorArena, "refresh_", counted)
    monkeypatch.setattr(FactorArena, "on_gpu", True)
    torch.testing.assert_close(trained("cpu", meddle), plain, rtol=1e-4, atol=1e-5)
    assert len(seen) == (4 if meddle is replace else 8)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda arena: pickle.loads(pickle.dumps(arena))])
def test_a_copy_is_refreshed_one_by_one_since_its_factors_are_no_views(way):
    arena = way(FactorArena([2, 3], torch.float32, "cpu"))
    assert not arena.holds(arena.factors)
