import copy
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polylib.lab import Stack

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Network(nn.Module):
    """Every kind of parameter: in a layer used twice, normalised, a single number, and one that may be left out."""

    def __init__(self, width, *, tied=False, norm=False, used=True):
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, width)
        self.third = self.second if tied else nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.LayerNorm(width)
        self.gain, self.aside, self.used = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(2, 2)), used
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        x = self.third(self.norm(self.second(self.first(x).tanh())).tanh())
        return self.out(self.gain * x + (self.aside.sum() if self.used else 0))


def squared(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def networks(count, seed=0, width=4, **options):
    torch.manual_seed(seed)
    return [Network(width, **options).double() for _ in range(count)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(models, groups, batches, optimizer="sgd", clip=None, loss=squared, factor=lambda step: 1.0, **options):
    """What torch does with one network at a time; `batches[step][k]` is what network k sees."""
    values = []
    for k, model in enumerate(models):
        steps = OPTIMIZERS[optimizer](groups[k], **options)
        rates, own = [group["lr"] for group in steps.param_groups], []
        for step, batch in enumerate(batches):
            for group, rate in zip(steps.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            steps.zero_grad()
            value = loss(model, batch[k])
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip[k])
            steps.step()
            own.append(value.detach())
        values.append(torch.stack(own))
    return torch.stack(values)


def assert_same(models, others):
    for model, other in zip(models, others, strict=True):
        for (name, mine), its in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, its, msg=lambda text, name=name: f"{name}: {text}")


@st.composite
def problems(pick):
    """Networks, groups, options and batches."""
    count, number = pick(st.integers(1, 3)), st.floats(0.0, 0.1)
    options = {name: pick(st.booleans()) for name in ("tied", "norm", "used")}
    models = networks(count, pick(st.integers(0, 99)), pick(st.integers(1, 4)), **options)
    optimizer = pick(st.sampled_from(sorted(OPTIMIZERS)))
    names = [name for name, _ in models[0].named_parameters()]
    frozen = set(pick(st.lists(st.sampled_from(names), max_size=4))) - {"out.weight"}
    parts, left_out = pick(st.integers(1, 3)), pick(st.booleans())
    where = {name: pick(st.integers(0, parts - 1)) for name in names}
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    groups = []
    for model in models:
        own = [{"params": [], "lr": pick(number), "weight_decay": pick(number)} for _ in range(parts)]
        for group in own:
            group["eps"] = 1e-3  # the gradient of a bias before a norm is nothing but rounding
            group["momentum"] = pick(st.sampled_from([0.0, 0.5, 0.9]))
            group["betas"] = (pick(st.sampled_from([0.0, 0.8, 0.9])), 0.99)
        for name, parameter in model.named_parameters():
            if name not in frozen or not left_out:
                own[where[name]]["params"].append(parameter)
        groups.append(own)
    clip = [pick(st.floats(0.01, 2.0)) for _ in models] if pick(st.booleans()) else None
    mode = pick(st.booleans())
    for model in models:
        model.norm.train(mode)
    return models, groups, optimizer, clip, pick(st.booleans()), pick(st.integers(0, 99))


def groups_like(groups, model, other):
    """The same groups for another network."""
    places = {id(p): q for p, q in zip(model.parameters(), other.parameters(), strict=True)}
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        its.requires_grad_(mine.requires_grad)
    return [group | {"params": [places[id(p)] for p in group["params"]]} for group in groups]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems())
def test_a_stack_trains_what_each_network_would_be_alone(problem):
    models, groups, optimizer, clip, shared, seed = problem
    together = copy.deepcopy(models)
    own = [groups_like(groups[k], models[k], together[k]) for k in range(len(models))]
    x, y = draw(3, len(models), 8, 3, seed=seed), draw(3, len(models), 8, 2, seed=seed + 1)
    if shared:
        x, y = x[:, :1].expand_as(x), y[:, :1].expand_as(y)

    def factor(step):
        return 1 / (1 + step)

    batches = [list(zip(x[step], y[step], strict=True)) for step in range(3)]
    expected = alone(
        models, [[g for g in own if g["params"]] for own in groups], batches, optimizer, clip, squared, factor
    )
    stack = Stack(together, own, optimizer=optimizer, clip=clip)
    for step in range(3):
        batch = (x[step, 0], y[step, 0]) if shared else (x[step], y[step])
        values = stack.step(squared, batch, shared=shared, factor=factor(step))
        torch.testing.assert_close(values, expected[:, step])
    stack.write_back()
    assert_same(together, models)
    torch.testing.assert_close(stack.evaluate(lambda model, x: model(x), x[0]), outputs(models, x[0]))


@torch.no_grad()
def outputs(models, x):
    return torch.stack([copy.deepcopy(model).eval()(own) for model, own in zip(models, x, strict=True)])


def rates(models, values):
    return [[{"params": list(m.parameters()), "lr": value}] for m, value in zip(models, values, strict=True)]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = nn.Linear(5, 4), nn.Linear(4, 1)

    def advance(self, state, x):
        return self.cell(torch.cat([state, x])).tanh()


def unrolled(model, batch):
    """A recurrent state: methods and parts of the model are called, more than once."""
    series, target = batch
    state = series.new_zeros(4)
    for x in series:
        state = model.advance(state, x[None])
    return (model.readout(state) - target).square().sum()


def residual(model, batch):
    """u' = u at points, by differentiation inside the loss."""
    slope = torch.func.vmap(torch.func.grad(lambda t: model(t[None])[0]))
    u = model(batch[:, None])[:, 0]
    return (slope(batch) - u).square().mean() + (model(torch.zeros_like(batch[:1])) - 1).square().sum()


def alone_residual(model, batch):
    t = batch.clone().requires_grad_()
    u = model(t[:, None])[:, 0]
    (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    return (slope - u).square().mean() + (model(torch.zeros_like(batch[:1])) - 1).square().sum()


def policy_gradient(model, batch):
    state, action, reward = batch
    return -(model(state).log_softmax(-1).gather(-1, action[:, None])[:, 0] * reward).mean()


def curve():
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize(
    ("make", "loss", "single", "batch"),
    [
        (Recurrent, unrolled, unrolled, (draw(2, 5), draw(2, seed=1))),
        (curve, residual, alone_residual, draw(2, 7).abs()),
        (curve, policy_gradient, policy_gradient, None),
    ],
    ids=["recurrent state", "differential equation", "policy gradient"],
)
def test_any_loss_of_a_model_and_a_batch(make, loss, single, batch):
    torch.manual_seed(0)
    if batch is None:
        make, batch = (lambda: nn.Linear(3, 4)), (draw(2, 9, 3), torch.arange(18).view(2, 9) % 4, draw(2, 9, seed=2))
    models = [make().double() for _ in range(2)]
    others = copy.deepcopy(models)
    own = [batch[k] if torch.is_tensor(batch) else tuple(part[k] for part in batch) for k in range(2)]
    expected = alone(others, rates(others, [0.1, 0.2]), [own] * 4, loss=single)
    stack = Stack(models, [0.1, 0.2])
    for step in range(4):
        torch.testing.assert_close(stack.step(loss, batch), expected[:, step])
    stack.write_back()
    assert_same(models, others)


def test_a_loss_returns_more_beside_it_and_a_batch_is_shared_in_part():
    models, x, y = networks(2), draw(6, 3), draw(2, 6, 2)
    stack = Stack(models, 0.1)

    def loss(model, batch):
        answer = model(batch[0])
        return (answer - batch[1]).square().mean(), {"answer": answer}

    values, beside = stack.step(loss, (x, y), shared=(True, False))
    assert values.shape == (2,) and beside["answer"].shape == (2, 6, 2) and not beside["answer"].requires_grad
    torch.testing.assert_close((beside["answer"] - y).square().mean((1, 2)), values)


def test_settings_of_each_network_as_numbers_arrays_and_tensors():
    models = networks(3)
    others = copy.deepcopy(models)
    lr, decay = np.array([0.01, 0.02, 0.03]), torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)
    first = torch.tensor([0.8, 0.9, 0.8], dtype=torch.float64)
    batch = (draw(3, 8, 3), draw(3, 8, 2))
    stack = Stack(models, lr, optimizer="adam", weight_decay=decay, betas=(first, 0.99), epsilon=1e-3)
    for _ in range(3):
        stack.step(squared, batch)
    stack.write_back()
    for k, model in enumerate(others):
        own = {"weight_decay": decay[k].item(), "betas": (first[k].item(), 0.99), "eps": 1e-3}
        one = [list(zip(*batch, strict=True))[k]]
        alone([model], rates([model], [lr[k]]), [one] * 3, "adam", **own)
    assert_same(models, others)


@pytest.mark.parametrize("rate", [torch.tensor(0.1), np.float32(0.1), np.float64(0.1), torch.tensor([0.1])])
def test_learning_rates_of_any_number_type(rate):
    models, others = networks(2), networks(2)
    batch = (draw(8, 3), draw(8, 2))
    plain = Stack(networks(2), [rate, rate])
    plain.step(squared, batch, shared=True)
    for stack in (Stack(models, rates(models, [rate, rate])), Stack(others, rates(others, [float(rate)] * 2))):
        stack.step(squared, batch, shared=True)
        stack.write_back()
        torch.testing.assert_close(plain.parameters, stack.parameters)
    assert_same(models, others)


def test_a_parameter_that_is_used_now_and_then_is_moved_only_then():
    models = networks(2)
    others = copy.deepcopy(models)
    x, y = draw(2, 8, 3), draw(2, 8, 2)
    batches = [[(x[k], y[k], step % 2 == 0) for k in range(2)] for step in range(4)]

    def loss(model, batch):
        model.used = batch[2]
        return squared(model, batch)

    options = {"weight_decay": 0.1, "betas": (0.8, 0.9)}
    alone(others, rates(others, [0.01, 0.02]), batches, "adamw", loss=loss, eps=1e-3, **options)
    stack = Stack(models, [0.01, 0.02], optimizer="adamw", epsilon=1e-3, **options)
    for step in range(4):
        stack.step(lambda model, batch, used=step % 2 == 0: loss(model, (*batch, used)), (x, y))
    stack.write_back()
    assert_same(models, others)


class Assigned(nn.Module):
    """A buffer that a forward replaces, and one it changes in place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        self.calls += 1
        return (x - self.mean) @ self.weight


def test_buffers_follow_the_forward_passes_but_not_an_evaluation():
    models = [Assigned(), Assigned()]
    x = draw(2, 5, 3)
    stack = Stack(models, 0.1)
    for _ in range(2):
        stack.step(lambda model, x: model(x).square().mean(), x)
    stack.evaluate(lambda model, x: model(x), x)
    assert torch.equal(models[0].mean, torch.zeros(3, dtype=torch.float64))
    stack.write_back()
    torch.testing.assert_close(torch.stack([m.mean for m in models]), 0.75 * x.mean(1))
    assert [m.calls.item() for m in models] == [2, 2]


class Remembering(nn.Module):
    """Buffers that a forward makes, and that grow and shrink."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("made", None)
        self.register_buffer("grown", torch.zeros(1, 3, dtype=torch.float64))
        self.register_buffer("shrunk", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        mean = x.detach().mean(0)
        self.made = mean if self.made is None else self.made + mean
        self.grown = torch.cat([self.grown, mean[None]])
        self.shrunk = mean.sum()
        return (x - self.made - self.grown.sum(0) - self.shrunk) @ self.weight


def test_buffers_that_a_forward_makes_or_reshapes_are_given_back():
    models, x = [Remembering(), Remembering()], draw(2, 5, 3)
    others = copy.deepcopy(models)
    alone(others, rates(others, [0.01] * 2), [x] * 3, loss=lambda model, x: model(x).square().mean())
    stack = Stack(models, 0.01)
    for _ in range(3):
        stack.step(lambda model, x: model(x).square().mean(), x)
    stack.write_back()
    assert models[0].grown.shape == (4, 3) and "made" in models[0].state_dict()
    assert_same(models, others)


def test_what_was_handed_out_does_not_follow_the_steps():
    models = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double() for _ in range(2)]
    batch = (draw(2, 8, 3), draw(2, 8, 2))
    stack = Stack(models, 0.1)

    def parts(model, batch=None):
        return {"weight": model[0].weight, "mean": model[1].running_mean, "row": [model[0].weight[0]]}

    seen = stack.evaluate(parts), stack.step(lambda model, batch: (squared(model, batch), parts(model)), batch)[1]
    before = copy.deepcopy(seen)
    watched = stack.fit(squared, [batch] * 2, watch=lambda parameters: parameters["0.weight"])["watched"]
    torch.testing.assert_close(seen, before, rtol=0, atol=0)
    assert not torch.equal(watched[:, 0], watched[:, 1]) and not torch.equal(watched[:, 1], watched[:, 2])


def test_a_network_that_diverges_stays_so_and_disturbs_no_other():
    models, single = networks(3), networks(3)[:1]
    with torch.no_grad():
        models[1].out.weight.fill_(torch.nan)
    batch = (draw(8, 3), draw(8, 2))
    stack, reference = Stack(models, [0.1, 0.1, 1e200], clip=1.0), Stack(single, 0.1, clip=1.0)
    for _ in range(3):
        values, expected = (each.step(squared, batch, shared=True) for each in (stack, reference))
        torch.testing.assert_close(values[0], expected[0])
    assert values[1].isnan() and not values[2].isfinite()
    assert stack.parameters["out.weight"][1].isnan().all()


def test_fit_follows_the_schedule_and_watches():
    models, others = networks(2), networks(2)
    batch = (draw(8, 3), draw(8, 2))

    def schedule(fraction):
        return 1 - fraction

    stack, by_hand = Stack(models, 0.1), Stack(others, 0.1)
    result = stack.fit(
        squared, [batch] * 5, shared=True, schedule=schedule, watch=lambda p: p["gain"].clone(), watch_every=2
    )
    values = [by_hand.step(squared, batch, shared=True, factor=schedule(step / 5)) for step in range(5)]
    torch.testing.assert_close(result["loss"], torch.stack(values, 1))
    assert result["watched"].shape == (2, 3) and (result["watched"][:, 0] == 1.5).all()
    assert stack.fit(squared, [])["loss"].shape == (2, 0)


def test_an_optimizer_of_ones_own():
    models = networks(2)
    start = copy.deepcopy(models)

    def sign_descent(block, gradient, factor, scale):
        block.value -= (factor * block.rate)[:, None] * gradient.sign()

    stack = Stack(models, [0.1, 0.2], optimizer=sign_descent)
    stack.step(squared, (draw(8, 3), draw(8, 2)), shared=True, factor=0.5)
    stack.write_back()
    for k, rate in enumerate((0.05, 0.1)):
        moved = (models[k].out.weight - start[k].out.weight).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate))


def test_going_on_with_some_of_the_networks():
    models, others = networks(3), networks(3)
    batch = (draw(3, 8, 3), draw(3, 8, 2))
    few, every = (Stack(each, [0.01, 0.02, 0.03], optimizer="adamw", clip=[1, 2, 3]) for each in (models, others))
    few.step(squared, batch)
    few.keep(torch.tensor([True, False, True]))
    few.step(squared, tuple(part[[0, 2]] for part in batch))
    few.write_back()
    every.step(squared, batch)
    every.write_back()
    assert_same([models[1]], [others[1]])
    every.step(squared, batch)
    every.write_back()
    assert_same([models[0], models[2]], [others[0], others[2]])


def slope(value):
    return nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(value))


def in_eval(k):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    return model.train(k == 0)


def frozen(k):
    return nn.Linear(2, 2).requires_grad_(k == 0)


def curve_of(k):
    model = nn.Linear(2, 2)
    model.act = [torch.sin, lambda x: x.tanh()][k] if k < 2 else None
    return model


def holding(k, value):
    model = nn.Linear(2, 2)
    model.held = value(k)
    return model


def hooked(k):
    model = nn.Linear(2, 2)
    model.register_forward_hook([lambda module, x, y: y, lambda module, x, y: 2 * y][k])
    return model


def redefined(k):
    """As in a notebook, where a cell was edited between two models."""

    class Edited(nn.Linear):
        factor = k

        def forward(self, x):
            return super().forward(x) * self.factor

    return Edited(2, 2)


def patched(k):
    model = nn.Linear(2, 2)
    model.forward = types.MethodType([lambda self, x: self.weight @ x, lambda self, x: x @ self.weight][k], model)
    return model


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


def reaching_itself(k=0):
    model = nn.Linear(2, 2)
    model.forward = lambda x: x @ model.weight
    return model


def with_hook_on_weight():
    model = nn.Linear(2, 2)
    model.weight.register_hook(lambda gradient: 2 * gradient)
    return model


LINEAR, SAME = nn.Linear(2, 2), nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "at least one network"),
        ([nn.Linear(2, 2), nn.Linear(2, 3)], "out_features = 2 in models.0. and 3 in models.1."),
        ([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)], "type.model. = Linear"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], "tensor bias"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).double()], "float64"),
        ([slope(0.1), slope(0.2)], "1.negative_slope = 0.1"),
        ([in_eval(0), in_eval(1)], "training = True"),
        ([frozen(0), frozen(1)], "frozen parameter"),
        ([curve_of(0), curve_of(1)], "act = "),
        ([Network(2, tied=True), Network(2)], "the same as second"),
        ([LINEAR, LINEAR], "of their own"),
        ([nn.LazyLinear(2)], "first input"),
        ([nn.Linear(2, 2), nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))], "tensor weight = .* missing"),
        ([nn.Linear(2, 2).requires_grad_(False)], "parameter that requires a gradient"),
        ([holding(k, lambda k: types.SimpleNamespace(scale=k)) for k in range(2)], "held = namespace.scale=0."),
        ([holding(k, lambda k: np.array(k)) for k in range(2)], "held = array.0. in models.0. and array.1."),
        ([holding(k, lambda k: np.float32(k)) for k in range(2)], "held = np.float32.0.0."),
        ([holding(k, lambda k: {k}) for k in range(2)], "held = {0}"),
        ([holding(k, lambda k: [[[[[[k]]]]]]) for k in range(2)], "held = "),
        ([holding(k, lambda k: [nn.Linear(2, 2)]) for k in range(2)], "held = .* something else that is written"),
        ([holding(k, Scale) for k in range(2)], "held = "),
        ([holding(k, lambda k: Scale(k).__call__) for k in range(2)], "held = "),
        ([hooked(0), hooked(1)], "_forward_hooks = "),
        ([hooked(0), nn.Linear(2, 2)], "_forward_hooks = .* and missing in models.1."),
        ([redefined(0), redefined(1)], r"type.model. = .*Edited in models.0. and something else .*Edited"),
        ([patched(0), patched(1)], "forward = "),
        ([reaching_itself()], "functions that reach a model by a name.* reaches 'the model'"),
        ([with_hook_on_weight()], "no hooks on parameters, got one on 'weight' of models.0."),
        ([nn.ParameterList([torch.ones(2, dtype=torch.complex64)])], "real parameters, got .0. of torch.complex64"),
    ],
)
def test_models_that_are_not_alike_are_refused(models, words):
    with pytest.raises(ValueError, match=words):
        Stack(models, 0.1)


def looped(k):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__["parent"] = model
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda k: holding(k, lambda k: Scale(np.ones(2))),
        lambda k: holding(k, lambda k: torch.tensor(torch.nan)),
        lambda k: holding(k, lambda k: lambda x: 2 * x),
        lambda k: redefined(1),
        lambda k: patched(0),
        lambda k: hooked(0),
        looped,
        lambda k: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda k: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
        lambda k: copy.deepcopy(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_models_that_hold_equal_things_are_alike(make):
    models = [make(k).double() for k in range(2)]
    others, batch = copy.deepcopy(models), (draw(2, 2, 2), draw(2, 2, 2))
    stack = Stack(models, [0.1, 0.2])
    values = torch.stack([stack.step(squared, batch) for _ in range(2)], 1)
    batches = [list(zip(*batch, strict=True))] * 2
    torch.testing.assert_close(values, alone(others, rates(others, [0.1, 0.2]), batches))
    stack.write_back()
    assert_same(models, others)


@pytest.mark.parametrize("models", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), (m for m in [LINEAR]), None])
def test_what_is_no_list_of_models_is_refused(models):
    with pytest.raises(TypeError, match="models must be a list of torch modules, got "):
        Stack(models, 0.1)


PARAMETERS = list(SAME.parameters())


@pytest.mark.parametrize(
    ("groups", "options", "words"),
    [
        ([[{"params": PARAMETERS, "lr": 0.1}]] * 2, {}, "one list for each of the 1 models, got 2"),
        ([0.1, 0.2], {}, "groups must be one number or one for each of the 1 models, got 2"),
        ([[{"params": PARAMETERS[:1], "lr": 0.1}]], {}, "got none for 'bias'"),
        ([[{"params": PARAMETERS * 2, "lr": 0.1}]], {}, "once"),
        ([[{"params": [*PARAMETERS, LINEAR.weight], "lr": 0.1}]], {}, "none of them"),
        ([[{"params": PARAMETERS}]], {}, "must say 'lr'"),
        ([[{"params": PARAMETERS, "lr": -0.1}]], {}, "lr must be a finite number .*at least 0, got -0.1"),
        ([[{"params": PARAMETERS, "lr": 0.1, "nesterov": True}]], {}, "must not set 'nesterov'"),
        (0.1, {"momentum": 1.0}, "momentum must be a finite number .*got 1.0"),
        (0.1, {"optimizer": "lion"}, "got 'lion'"),
        (float("nan"), {}, "lr must be"),
        ([[{"params": PARAMETERS, "lr": 0.1, "decoupled_weight_decay": True}]], {}, "must not set 'decoupled_weight_d"),
        ([[{"lr": 0.1}]], {}, r"groups.0. must hold dicts with 'params'"),
        ([PARAMETERS], {}, r"groups.0. must hold dicts with 'params' and 'lr', got Parameter"),
        (
            [{"params": PARAMETERS, "lr": 0.1}],
            {},
            "groups must be one number or one for each of the 1 models, got .{'par",
        ),
        ("fast", {}, "groups must be one number or one for each of the 1 models, got fast"),
        (None, {}, "groups must be one number .*, got None"),
        (0.1, {"clip": -1.0}, "clip must be a finite number at least 0, got -1.0"),
        (0.1, {"clip": float("nan")}, "clip must be a finite number"),
        (0.1, {"betas": (0.9,)}, "betas must be two, got .0.9,."),
        (0.1, {"betas": 0.9}, "betas must be two, got 0.9"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, options, words):
    with pytest.raises(ValueError, match=words):
        Stack([SAME], groups, **options)


def test_batches_and_losses_that_do_not_fit_are_refused():
    stack = Stack(networks(2), 0.1)
    x, y = draw(8, 3), draw(8, 2)
    with pytest.raises(ValueError, match="row for each of the 2 networks"):
        stack.step(squared, (x, y))
    with pytest.raises(ValueError, match=r"one number for each network, got shape \(8, 2\)"):
        stack.step(lambda model, batch: model(batch[0]), (x, y), shared=True)
    with pytest.raises(ValueError, match="depend on a parameter"):
        stack.step(lambda model, batch: batch[0].sum(), (x, y), shared=True)
    with pytest.raises(ValueError, match=r"one number for each network, got tuple"):
        stack.step(lambda model, batch: (model(batch[0]).sum(), batch[0], batch[1]), (x, y), shared=True)
    with pytest.raises(ValueError, match="one number for each network"):
        stack.step(lambda model, batch: model(batch[0]).sum() * 1j, (x, y), shared=True)
    with pytest.raises(ValueError, match=r"factor must be a finite number, got tensor"):
        stack.step(squared, (x, y), shared=True, factor=torch.ones(3))
    with pytest.raises(ValueError, match="steps must be given for batches without a length, got generator"):
        stack.fit(squared, ((x, y) for _ in range(2)), shared=True)
    with pytest.raises(ValueError, match="steps must be the number of batches, got 1 and one batch more"):
        stack.fit(squared, [(x, y)] * 2, shared=True, steps=1)
    with pytest.raises(ValueError, match="got a pair"):
        stack.fit(lambda model, batch: (squared(model, batch), batch[0]), [(x, y)], shared=True)
    for rows in ([0, 0], [2], [], [True]):
        with pytest.raises(ValueError, match="rows must be places of 2 networks, each once, or a mask, got "):
            stack.keep(rows)
    with pytest.raises(TypeError, match="torch modules"):
        Stack([F.relu], 0.1)
