"""MKOR around torch's optimizers: its statistics, factors, gradients and states, against dense definitions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.optimization import MKOR, GainSwitch


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)


def batch(count=12, seed=1, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=draw, dtype=dtype), torch.randint(3, (count,), generator=draw)


def wrapped(model, rate=0.1, momentum=0.0, **options):
    options = {"factor_dtype": torch.float64} | options
    return MKOR(model, torch.optim.SGD(model.parameters(), rate, momentum=momentum), **options)


def backward(model, x, y):
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def statistics_by_hand(model, x, y):
    """The means over samples of the inputs and of the gradients of each sample's loss, for the first layer."""
    rows = []
    for own, label in zip(x, y, strict=True):
        z = model[0](own[None]).detach().requires_grad_()
        rows.append(torch.autograd.grad(F.cross_entropy(model[1:](z), label[None]), z)[0][0])
    return torch.stack(rows).mean(0), torch.cat([x.mean(0), x.new_ones(1)])


def test_factors_are_inverse_averages_of_the_vectors_and_directions_follow():
    model = network()
    mkor = wrapped(model, gamma=0.9, update_freq=2, stabilizer=None, rescale=False)
    layer = mkor.layers["0"]
    averages = [torch.eye(7, dtype=torch.float64), torch.eye(6, dtype=torch.float64)]
    for step in range(6):
        x, y = batch(seed=step)
        vectors = statistics_by_hand(model, x, y)
        backward(model, x, y)
        grad = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        if step % 2 == 0:
            averages = [0.9 * a + 0.1 * torch.outer(v, v) for a, v in zip(averages, vectors, strict=True)]
        inverses = [torch.linalg.inv(a) for a in averages]
        old = model[0].weight.detach().clone()
        mkor.step()
        torch.testing.assert_close([layer.left, layer.right], inverses)
        moved = inverses[0] @ grad @ inverses[1]
        torch.testing.assert_close(model[0].weight, old - 0.1 * moved[:, :5])
        torch.testing.assert_close(model[0].bias.grad, moved[:, 5])
    assert mkor.layers["2"].right.shape == (7, 7)  # no bias


@pytest.mark.parametrize("variant", ["exact", "package", "printed"])
def test_directions_have_the_length_of_the_gradients(variant):
    model = network(dtype=torch.float32)
    mkor = wrapped(model, variant=variant, factor_dtype=torch.float32, update_freq=1)
    for step in range(3):
        backward(model, *batch(seed=step, dtype=torch.float32))
        before = [layer.gradient().clone() for layer in mkor.layers.values()]
        mkor.precondition()
        for layer, grad in zip(mkor.layers.values(), before, strict=True):
            assert layer.gradient().norm().item() == pytest.approx(grad.norm().item(), rel=1e-5)
            assert not torch.allclose(layer.gradient(), grad, rtol=1e-3)


def test_a_zero_gradient_stays_zero():
    model = network()
    mkor = wrapped(model)
    (model(batch()[0]) * 0).mean().backward()
    mkor.precondition()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_with_gamma_near_one_it_is_the_optimizer_alone():
    alone, model = network(), network()
    sgd = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9)
    mkor = wrapped(model, momentum=0.9, gamma=1 - 1e-12, update_freq=1)
    for step in range(5):
        backward(alone, *batch(seed=step))
        sgd.step()
        backward(model, *batch(seed=step))
        mkor.step()
    torch.testing.assert_close(model.state_dict(), alone.state_dict())


def factors(mkor):
    return [f.clone() for layer in mkor.layers.values() for f in (layer.left, layer.right)]


def test_a_batch_twice_over_and_two_passes_of_it_are_the_same_statistics():
    x, y = batch()
    found = []
    for kind in ("once", "doubled", "two passes", "scaled"):
        model = network()
        mkor = wrapped(model)
        if kind == "doubled":
            x, y = torch.cat([x, x]), torch.cat([y, y])
        scale = 8.0 if kind == "scaled" else 1.0
        for _ in range(2 if kind == "two passes" else 1):
            (scale * F.cross_entropy(model(x), y)).backward()
        mkor.step(loss_scale=scale)
        found.append(factors(mkor))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_module_used_twice_gives_the_mean_of_its_calls():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    mkor = wrapped(layer, stabilizer=None, gamma=0.5)
    x = batch()[0][:, :4]
    middle = layer(x)
    out = layer(middle.tanh())
    grads = torch.autograd.grad(out.square().mean(), [middle, out], retain_graph=True)
    out.square().mean().backward()
    mkor.precondition()
    v = (grads[0].sum(0) + grads[1].sum(0)) / 2
    a = torch.cat([(x.mean(0) + middle.tanh().mean(0)) / 2, x.new_ones(1)]).detach()
    for factor, vector in ((mkor.layers[""].left, v), (mkor.layers[""].right, a)):
        torch.testing.assert_close(factor.inverse(), 0.5 * torch.eye(len(vector)).double() + 0.5 * vector.outer(vector))


CONVOLUTIONS = [
    {"padding": 1, "stride": 2},
    {"padding": "same", "dilation": (2, 1)},
    {"padding": "valid", "bias": False},
    {"padding": (0, 2), "padding_mode": "circular"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of unequal sides, which are meant
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_of_patches(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, (3, 2), **options).double()
    mkor = wrapped(conv, stabilizer=None, gamma=0.5)
    x = torch.randn(4, 2, 6, 7, dtype=torch.float64)
    conv(x).square().sum((1, 2, 3)).mean().backward()
    mkor.precondition()
    # The sum over positions of a patch's entry is the output of a convolution with one weight of 1.
    patches = []
    for k in range(12):
        probe = copy.deepcopy(conv)
        with torch.no_grad():
            probe.weight.zero_()[0].view(-1)[k] = 1
            if probe.bias is not None:
                probe.bias.zero_()
            patches.append(probe(x)[:, 0].mean())
    a = torch.stack(patches + [torch.ones((), dtype=torch.float64)] * (conv.bias is not None))
    out = conv(x).detach()
    v = (2 * out).mean((0, 2, 3))
    layer = mkor.layers[""]
    for factor, vector in ((layer.left, v), (layer.right, a)):
        torch.testing.assert_close(factor.inverse(), 0.5 * torch.eye(len(vector)).double() + 0.5 * vector.outer(vector))


def test_convolutions_in_a_network_that_changes_outputs_in_place():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(36, 3))
    mkor = MKOR(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9), update_freq=2)
    assert list(mkor.layers) == ["0", "4"]
    x, y = torch.randn(24, 1, 5, 5), torch.arange(24) % 3
    losses = []
    for _ in range(40):
        losses.append(backward(net, x, y))
        mkor.step()
    assert losses[-1] < 0.3 * losses[0]


def test_only_refresh_steps_in_training_mode_take_statistics():
    model = network()
    mkor = wrapped(model, update_freq=3, warmup=2)
    changed, due = [], []
    for step in range(7):
        due.append(mkor.due)
        before = factors(mkor)
        with torch.no_grad():
            model(1e6 * batch(seed=100)[0])
        model.eval()
        model(1e6 * batch(seed=101)[0]).sum().backward()
        model.train()
        backward(model, *batch(seed=step))
        if not mkor.due:
            assert not any(layer.collected for layer in mkor.layers.values())
        mkor.step()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, factors(mkor), strict=True)))
    assert changed == due == [True, True, False, True, False, False, True]


def test_excluded_frozen_and_unused_layers_are_left_alone():
    model = network()
    mkor = wrapped(model, exclude=["2"])
    backward(model, *batch())
    grad = model[2].weight.grad.clone()
    mkor.precondition()
    torch.testing.assert_close(model[2].weight.grad, grad)
    model[0].weight.requires_grad_(False)
    assert list(wrapped(model).layers) == ["2"]
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]).double()
    mkor = wrapped(model)
    F.cross_entropy(model[0](batch()[0]), batch()[1]).backward()
    mkor.step()
    torch.testing.assert_close(mkor.layers["1"].left, torch.eye(3).double())


def test_a_bias_that_is_frozen_is_no_column():
    model = network()
    model[0].bias.requires_grad_(False)
    mkor = wrapped(model)
    assert mkor.layers["0"].right.shape == (5, 5)
    backward(model, *batch())
    mkor.step()


def test_switched_off_it_is_the_optimizer_and_hooks_can_go():
    model = network()
    mkor = wrapped(model)
    mkor.active = False
    backward(model, *batch())
    grads = [p.grad.clone() for p in model.parameters()]
    mkor.step()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)
    mkor.remove_hooks()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_saved_run_goes_on_as_it_would():
    def steps(model, mkor, first, last):
        for step in range(first, last):
            backward(model, *batch(seed=step))
            mkor.step()

    model = network()
    mkor = wrapped(model, momentum=0.9, update_freq=3)
    steps(model, mkor, 0, 5)
    saved = copy.deepcopy((model.state_dict(), mkor.state_dict()))
    steps(model, mkor, 5, 12)
    other = network(seed=9)
    other.load_state_dict(saved[0])
    again = wrapped(other, momentum=0.9, update_freq=3)
    again.load_state_dict(saved[1])
    steps(other, again, 5, 12)
    torch.testing.assert_close(other.state_dict(), model.state_dict())
    torch.testing.assert_close(factors(again), factors(mkor))
    with pytest.raises(ValueError, match="state must have factors of 0, got 0, 2"):
        wrapped(network(), exclude=["2"]).load_state_dict(saved[1])
    saved[1]["factors"]["0"]["left"] = torch.eye(3)
    with pytest.raises(ValueError, match=r"0\.left must have shape"):
        again.load_state_dict(saved[1])


def test_half_precision_factors_and_networks():
    model = network(dtype=torch.bfloat16)
    mkor = wrapped(model, factor_dtype=torch.float16, momentum=0.9)
    x, y = batch(dtype=torch.bfloat16)
    losses = []
    for _ in range(40):
        losses.append(backward(model, x, y))
        mkor.step()
    assert mkor.layers["0"].left.dtype == torch.float16
    assert losses[-1] < 0.7 * losses[0]


def test_statistics_that_are_missing_or_not_finite_raise_and_change_nothing():
    model = network()
    mkor = wrapped(model)
    with pytest.raises(RuntimeError, match="training mode, got none of any layer"):
        mkor.step()
    model.eval()
    backward(model, *batch())
    with pytest.raises(RuntimeError, match="training mode, got none of 0, 2"):
        mkor.step()
    model.train()
    x, y = batch()
    backward(model, x * float("nan"), y)
    before, weights = factors(mkor), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="statistics and their squares must be finite"):
        mkor.step()
    assert all(torch.equal(a, b) for a, b in zip(before, factors(mkor), strict=True))
    torch.testing.assert_close(model.state_dict(), weights)
    backward(model, x, y)
    mkor.step()
    assert mkor.steps == 1 and mkor.layers["0"].left.isfinite().all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (network(), {"gamma": 1.0}, "gamma must be"),
        (network(), {"update_freq": 0}, "update_freq must be"),
        (network(), {"variant": "plus"}, "variant must be one of"),
        (network(), {"stabilizer": 0}, "stabilizer must be"),
        (network(), {"zeta": 2}, "zeta must be"),
        (network(), {"warmup": -1}, "warmup must be"),
        (network(), {"exclude": ["1"]}, "exclude must name layers of 0, 2, got 1"),
        (network(), {"exclude": ["0", "2"]}, "model must have a Linear or Conv2d layer"),
        (nn.LayerNorm(3), {}, "model must have a Linear or Conv2d layer"),
        (Tied(), {}, "model must not share a weight between layers, got a and b"),
    ],
)
def test_bad_settings(model, options, message):
    with pytest.raises(ValueError, match=message):
        wrapped(model, **options)


def test_bad_types_and_scales():
    with pytest.raises(TypeError, match="factor_dtype must be"):
        wrapped(network(), factor_dtype=torch.int32)
    with pytest.raises(ValueError, match="loss_scale must be"):
        wrapped(network()).step(loss_scale=0)


def test_the_switch_stops_where_the_loss_stops_falling():
    switch = GainSwitch(decay=0.9, fraction=0.1, patience=10)
    answers = [switch.update(max(0.9**step, 0.9**40)) for step in range(100)]
    assert all(answers[:45]) and not any(answers[75:])
    steady = GainSwitch(decay=0.9, fraction=0.1, patience=10)
    assert all(steady.update(0.98**step) for step in range(200))
    # A pause that is shorter than the patience is no end.
    pause = GainSwitch(decay=0.0, fraction=0.1, patience=10)
    assert all(pause.update(0.9 ** (step - min(max(step - 20, 0), 8))) for step in range(60))
    for loss in (0.0, float("nan")):
        with pytest.raises(ValueError, match="loss must be"):
            switch.update(loss)
    with pytest.raises(ValueError, match="patience must be"):
        GainSwitch(patience=0)


def test_vectors_are_averaged_over_processes(monkeypatch):
    """As one of two processes would see it: each has half of a batch, and the factors are those of all of it."""
    x, y = batch()
    alone = network()
    whole = wrapped(alone)
    backward(alone, x, y)
    whole.precondition()
    sent = []

    def keep_or_add(flat, group):
        assert group == "both"
        sent.append(flat.clone())
        flat.add_(sent[0] if len(sent) == 2 else torch.zeros_like(flat))

    monkeypatch.setattr(torch.distributed, "all_reduce", keep_or_add)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    for rank in range(2):
        model = network()
        mkor = wrapped(model, process_group="both")
        backward(model, x[rank::2], y[rank::2])
        mkor.precondition()
    assert [len(flat) for flat in sent] == [7 + 6 + 3 + 7] * 2  # all that is exchanged
    torch.testing.assert_close(factors(mkor), factors(whole))


def test_a_batch_that_is_skipped_leaves_nothing_behind():
    model, other = network(), network()
    mkor, plain = wrapped(model), wrapped(other)
    x, y = batch()
    backward(model, x * float("inf"), y)
    mkor.skip()
    for own, optimizer in ((model, mkor), (other, plain)):
        backward(own, x, y)
        optimizer.step()
    torch.testing.assert_close(factors(mkor), factors(plain))
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_factors_that_break_raise_before_the_gradients_are_touched():
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    mkor = wrapped(model, 0.05, factor_dtype=torch.float32, update_freq=1, gamma=0.5, stabilizer=None)
    with pytest.raises(RuntimeError, match="no longer finite: a direction without statistics grows"):
        for _ in range(400):
            backward(model, torch.randn(64, 20), torch.randint(0, 5, (64,)))
            mkor.step()
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in model.parameters())


def test_statistics_whose_squares_overflow_raise():
    model = nn.Linear(3, 2)
    mkor = wrapped(model, factor_dtype=torch.float32)
    model(torch.full((4, 3), 1e20)).mean().backward()
    with pytest.raises(ValueError, match="statistics and their squares must be finite"):
        mkor.step()
    assert mkor.layers[""].right.equal(torch.eye(4))


def test_a_bias_that_is_frozen_later_is_named():
    model = network()
    mkor = wrapped(model)
    model[0].bias.requires_grad_(False)
    backward(model, *batch())
    model[0].bias.grad = None
    with pytest.raises(RuntimeError, match=r"layer '0' must have a gradient of \(7, 6\) with its bias, got \(7, 5\)"):
        mkor.step()


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_layers_without_a_weight_of_their_own_are_no_layers():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    assert list(wrapped(model).layers) == ["1"]
    with pytest.raises(ValueError, match="model must have a Linear or Conv2d layer"):
        wrapped(nn.Linear(2, 2).to(torch.complex64))


def test_a_state_without_counts_changes_nothing():
    mkor = wrapped(network())
    state = copy.deepcopy(mkor.state_dict())
    state["factors"]["0"]["left"].mul_(3)
    del state["steps"]
    before = factors(mkor)
    with pytest.raises(KeyError):
        mkor.load_state_dict(state)
    torch.testing.assert_close(factors(mkor), before)
