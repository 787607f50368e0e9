import pytest
import torch
from torch import nn

from polylib.lab import Split, train_many
from polylib.lab.transformer import Attention, Decoder, SignalTransformer


def feed_forward():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal):
    ours, theirs = Attention(16, 4, causal).double(), nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.inputs.weight), theirs.in_proj_bias.copy_(ours.inputs.bias)
        theirs.out_proj.weight.copy_(ours.output.weight), theirs.out_proj.bias.copy_(ours.output.bias)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.ones(7, 7).triu(1).bool() if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_a_decoder_does_not_see_the_future():
    model = Decoder(11, 8, feed_forward, width=16)
    tokens = torch.randint(11, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])
    assert model(tokens[:, :3]).shape == (3, 3, 11)


def test_a_decoder_takes_another_attention_and_leaves_out_positions_and_bias():
    class Shift(nn.Module):
        """Every token gets what stood before it."""

        def forward(self, x):
            return nn.functional.pad(x, (0, 0, 1, 0))[..., :-1, :]

    model = Decoder(11, 8, feed_forward, width=16, attention=Shift, positions=False, bias=False)
    assert model.head.bias is None and "positions" not in dict(model.named_parameters())
    logits = model(torch.full((2, 8), 3))
    torch.testing.assert_close(logits[:, 2:], logits[:, 2:3].expand(-1, 6, -1))  # two blocks see two tokens back
    assert not torch.allclose(logits[:, 0], logits[:, 2])


def test_both_train_as_a_stack():
    x = torch.randint(5, (24, 6))
    data = Split(x[:16], x[:16].roll(-1, 1), x[16:], x[16:].roll(-1, 1))
    models = [Decoder(5, 6, feed_forward, width=16, depth=1) for _ in range(2)]
    groups = [[{"params": list(m.parameters()), "lr": 0.01}] for m in models]

    def loss(logits, y):
        return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())

    history = train_many(models, groups, data, epochs=30, batch_size=8, optimizer="adamw", loss=loss)
    assert history["loss"].shape == (2, 60)
    assert (history["loss"][:, -5:].mean(1) < 0.7 * history["loss"][:, 0]).all()
    models = [SignalTransformer(20, 3, feed_forward, width=16) for _ in range(2)]
    assert torch.func.vmap(lambda x: models[0](x))(torch.randn(2, 4, 20)).shape == (2, 4, 3)


def test_sizes_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="width must be a multiple of heads = 4, got 10"):
        Attention(10, 4, True)
    with pytest.raises(ValueError, match="samples must be a multiple of patch = 4, got 21"):
        SignalTransformer(21, 3, feed_forward)
