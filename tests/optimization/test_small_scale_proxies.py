import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.lab import text_windows, train_many
from polylib.lab.transformer import Decoder
from polylib.optimization import (
    AdamWIndependent,
    QKNormAttention,
    cross_entropy_z_loss,
    decay_groups,
    initialise_,
    lr_sensitivity,
    max_attention_logits,
    mu_param_groups,
    rope,
    warmup_cosine,
)

F64 = torch.float64


def decoder(seed=0, qk_norm=True, width=16, symbols=60):
    def feed_forward():
        return nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    torch.manual_seed(seed)
    return initialise_(
        Decoder(
            symbols,
            8,
            feed_forward,
            width=width,
            norm=lambda size: nn.LayerNorm(size, eps=1e-6, bias=False),
            attention=lambda: QKNormAttention(width, 4, qk_norm=qk_norm),
            positions=False,
            bias=False,
        )
    )


def test_rotations_depend_on_the_difference_of_positions_and_keep_lengths():
    q, k = torch.randn(2, 8, dtype=F64)
    rotated_q, rotated_k = rope(q.expand(10, 8)), rope(k.expand(10, 8))
    products = rotated_q @ rotated_k.T
    for offset in range(-9, 10):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(10))
    torch.testing.assert_close(rotated_q[0], q)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_normalised_logits_are_bounded_and_do_not_see_the_scale_of_the_weights(scale):
    torch.manual_seed(0)
    layer, x = QKNormAttention(32, 4).double(), torch.randn(3, 9, 32, dtype=F64)
    before = layer(x)
    with torch.no_grad():
        layer.inputs.weight[:64] *= scale
    layer.track = True
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    assert 0 < layer.max_logit <= math.sqrt(8) + 1e-9


def test_logits_without_the_norm_grow_with_the_weights():
    torch.manual_seed(0)
    layer, x = QKNormAttention(32, 4, qk_norm=False).double(), torch.randn(3, 9, 32, dtype=F64)
    layer.track, sizes = True, []
    for factor in (1, 10):
        with torch.no_grad():
            layer.inputs.weight[:32] *= factor
        layer(x)
        sizes.append(layer.max_logit.item())
    assert sizes[1] == pytest.approx(10 * sizes[0])


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_causal_and_agrees_with_torchs(qk_norm):
    torch.manual_seed(0)
    layer, x = QKNormAttention(16, 2, qk_norm=qk_norm).double(), torch.randn(2, 7, 16, dtype=F64)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(layer(x)[:, :4], layer(changed)[:, :4])
    assert not torch.allclose(layer(x)[:, 4:], layer(changed)[:, 4:])
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer.inputs(x).chunk(3, -1))
    q, k = (F.layer_norm(part, (8,), eps=1e-6) if qk_norm else part for part in (q, k))
    mixed = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.output(mixed.transpose(1, 2).flatten(-2)))


def test_the_probe_reads_every_layer_and_leaves_no_trace():
    model = decoder()
    logits = max_attention_logits(model, torch.randint(60, (4, 8)))
    assert logits.shape == (2,) and (logits > 0).all()
    assert not any(layer.track for layer in model.modules() if isinstance(layer, QKNormAttention))
    with pytest.raises(ValueError, match="must have at least one QKNormAttention"):
        max_attention_logits(nn.Linear(2, 2), torch.ones(1, 2))


def test_initial_values_have_the_deviations_of_the_paper():
    torch.manual_seed(0)
    model = initialise_(nn.ModuleDict({"matrix": nn.Linear(400, 300), "tokens": nn.Embedding(500, 64)}))
    weight = model["matrix"].weight
    assert weight.std().item() == pytest.approx(1 / 20, rel=0.01)
    assert weight.abs().max() <= 2 / 20 / 0.8796 + 1e-6
    assert not model["matrix"].bias.any()
    assert model["tokens"].weight.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_without_a_coefficient_the_loss_is_cross_entropy():
    logits, target = torch.randn(12, 7, dtype=F64), torch.randint(7, (12,))
    target[3] = -100
    loss, log_z = cross_entropy_z_loss(logits, target, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(log_z, logits.exp().sum(-1).log())
    shaped, _ = cross_entropy_z_loss(logits.view(3, 4, 7), target.view(3, 4), 0.1)
    torch.testing.assert_close(shaped, cross_entropy_z_loss(logits, target, 0.1)[0])


def test_a_shift_of_the_logits_changes_the_z_term_only():
    logits, target = torch.randn(12, 7, dtype=F64), torch.randint(7, (12,))
    (plain, log_z), (shifted, moved) = (cross_entropy_z_loss(logits + c, target, 0.01) for c in (0.0, 3.0))
    torch.testing.assert_close(moved, log_z + 3)
    torch.testing.assert_close(shifted - plain, 0.01 * (moved.square() - log_z.square()).mean())


def test_the_gradient_of_the_z_loss():
    logits = torch.randn(6, 5, dtype=F64, requires_grad=True)
    target = torch.tensor([0, 1, 4, -100, 2, 2])
    assert torch.autograd.gradcheck(lambda z: cross_entropy_z_loss(z, target, 0.1)[0], logits)
    loss, log_z = cross_entropy_z_loss(logits, target, 0.1)
    expected = logits.softmax(-1) * (1 + 0.2 * log_z[:, None]) - F.one_hot(target.clamp(min=0), 5)
    expected[3] = 0
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected.detach() / 5)


def test_extreme_and_half_precision_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    loss, _ = cross_entropy_z_loss(logits, torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    half, target = torch.randn(8, 5).bfloat16(), torch.randint(5, (8,))
    loss, log_z = cross_entropy_z_loss(half, target)
    assert loss.dtype == log_z.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy_z_loss(half.float(), target)[0])


def test_independent_decay_does_not_depend_on_the_rate():
    factors = [0.1, 0.5, 1.0, 0.7, 0.2]
    for lr in (1e-3, 1.0):
        w, rival = nn.Parameter(torch.ones(3, dtype=F64)), nn.Parameter(torch.ones(3, dtype=F64))
        ours, theirs = AdamWIndependent([w], lr, 0.05), torch.optim.AdamW([rival], lr, weight_decay=0.05)
        for s in factors:
            for optimizer, parameter in ((ours, w), (theirs, rival)):
                optimizer.param_groups[0]["lr"] = lr * s
                parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
        torch.testing.assert_close(w.detach(), torch.full_like(w, math.prod(1 - 0.05 * s for s in factors)))
        torch.testing.assert_close(rival.detach(), torch.full_like(w, math.prod(1 - 0.05 * lr * s for s in factors)))


def test_independent_decay_is_coupled_decay_divided_by_the_rate():
    start = torch.randn(6, dtype=F64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first = AdamWIndependent([{"params": [ours], "lr": 0.02}], weight_decay=0.01)
    second = torch.optim.AdamW([theirs], 0.02, betas=(0.9, 0.95), weight_decay=0.01 / 0.02)
    for k in range(5):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            parameter.grad = (parameter.detach() - k).sin()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5)
    assert schedule.get_last_lr() == [0.01]


def test_decay_spares_vectors():
    model = decoder()
    matrices, scales = decay_groups(model.parameters(), 0.02, 1e-3)
    assert matrices["weight_decay"] == pytest.approx(0.05) and scales["weight_decay"] == 0
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in scales["params"]} == {1}
    assert decay_groups(model.parameters(), 0.02, 1e-3, independent=False)[0]["weight_decay"] == 1e-3


def test_mu_param_scales_hidden_layers_by_their_fan_in():
    model = decoder(width=16)
    groups = mu_param_groups(model, 0.1, base_fan_in=8, weight_decay=1e-3)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    block = model.blocks[0]
    assert rate[id(block.attention.inputs.weight)] == pytest.approx(0.05)
    assert rate[id(block.feed_forward[2].weight)] == pytest.approx(0.1 * 8 / 64)
    for same in (model.tokens.weight, model.head.weight, block.norm1.weight, block.attention.q_norm.weight):
        assert rate[id(same)] == 0.1
    assert all(g["weight_decay"] * g["lr"] == pytest.approx(1e-3) for g in groups if g["params"][0].dim() > 1)
    at_base = mu_param_groups(model, 0.1, base_fan_in=16)
    assert {id(p) for g in at_base if g["lr"] == 0.1 for p in g["params"]} >= {id(block.attention.inputs.weight)}


def test_the_schedule():
    assert warmup_cosine(0.0) == 0 and warmup_cosine(0.025) == pytest.approx(0.5)
    assert warmup_cosine(0.05) == pytest.approx(1) and warmup_cosine(1.0, floor=0.1) == pytest.approx(0.1)
    assert warmup_cosine(0.525) == pytest.approx(0.5)


def test_sensitivity_clamps_what_diverged():
    losses = torch.tensor([[2.0, 1.0, 3.0, float("nan")], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(lr_sensitivity(losses, 4.0), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(lr_sensitivity(losses, torch.tensor([2.5, 9.0])), torch.tensor([1.0, 0.0]))
    assert lr_sensitivity(torch.tensor([float("inf")]), 3.0) == 0
    with pytest.raises(ValueError, match=r"losses must have shape .*got \(0,\)"):
        lr_sensitivity(torch.ones(0), 1.0)


def loss(logits, y):
    return cross_entropy_z_loss(logits, y)[0]


def test_a_stack_of_decoders_trains_on_text_as_one_does():
    data, rates = text_windows(8, train=64, test=16), [0.01, 0.1, 1e30]
    models = [decoder(0) for _ in rates]
    groups = [decay_groups(model.parameters(), rate) for model, rate in zip(models, rates, strict=True)]
    settings = {"epochs": 2, "batch_size": 16, "optimizer": "adamw", "betas": (0.9, 0.95), "loss": loss, "clip": 1.0}
    together = train_many(models, groups, data, **settings)
    for k in (0, 1):
        single = decoder(0)
        group = [decay_groups(single.parameters(), rates[k])]
        alone = train_many([single], group, data, **settings)
        torch.testing.assert_close(together["loss"][k], alone["loss"][0], rtol=1e-3, atol=1e-4)
    assert together["test_loss"][1] < math.log(60)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"dim must give each head.*, got 30 for num_heads = 4"):
        QKNormAttention(30, 4)
    with pytest.raises(ValueError, match="even number of features"):
        QKNormAttention(12, 4)
    with pytest.raises(ValueError, match=r"target must have shape \(4,\), as the logits, got \(3,\)"):
        cross_entropy_z_loss(torch.ones(4, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="z_coeff must be a finite number at least 0, got -1"):
        cross_entropy_z_loss(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), -1)
    with pytest.raises(IndexError):
        cross_entropy_z_loss(torch.ones(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"lr must be a number above 0 with independent weight decay, got 0\.0"):
        AdamWIndependent([nn.Parameter(torch.ones(2))], lr=0.0)
    with pytest.raises(ValueError, match="base_fan_in must be an integer of at least 1, got 0"):
        mu_param_groups(decoder(), 0.1, 0)
