import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.lab import Split, search, train_many

SETTINGS = {"epochs": 3, "batch_size": 10}


def linear(seed):
    return nn.Linear(4, 3)


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(90) % 3
    x = torch.randn(90, 4, generator=generator) + 2 * F.one_hot(y, 4)
    return Split(x[:60], y[:60], x[60:], y[60:])


def by_hand(rate, seeds, data):
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(linear(seed))
    return train_many(models, [rate] * len(seeds), data, seeds=seeds, **SETTINGS), models


def test_two_tensors_choose_the_rate_and_the_test_part_has_no_say():
    whole, rates, seeds = data(), [1e-4, 0.1, 0.3], [3, 5]
    held = whole.x_test[:12], whole.y_test[:12]
    found = search(linear, rates, seeds, whole, validation=held, **SETTINGS)
    tables = [by_hand(rate, seeds, Split(*whole[:2], *held))[0]["accuracy"] for rate in rates]
    torch.testing.assert_close(found.table, torch.stack(tables))
    assert found.best == rates[int(found.table.mean(1).argmax())]
    expected, models = by_hand(found.best, seeds, whole)
    for name, value in expected.items():
        torch.testing.assert_close(found.result[name], value)
    for mine, other in zip(found.models, models, strict=True):
        torch.testing.assert_close(mine.weight, other.weight)
    swapped = Split(*whole[:2], whole.x_test, (whole.y_test + 1) % 3)
    again = search(linear, rates, seeds, swapped, validation=held, **SETTINGS)
    assert again.best == found.best and torch.equal(again.table, found.table)


def test_a_fraction_is_held_out_of_the_training_part():
    whole = data()
    found = search(linear, [0.1], [0], whole, validation=0.5, epochs=2, batch_size=30)
    assert found.result["loss"].shape == (1, 2)  # thirty samples were left to learn from
    assert not found.at_edge and found.best == 0.1


def test_another_draw_chooses_and_the_winner_is_trained_afresh():
    whole, other = data(), data(seed=1)
    found = search(linear, (1e-4, 0.1), range(3), whole, validation=other, validation_seeds=[7, 8], **SETTINGS)
    torch.testing.assert_close(found.table[1], by_hand(0.1, [7, 8], other)[0]["accuracy"])
    expected = by_hand(found.best, [0, 1, 2], whole)[0]
    torch.testing.assert_close(found.result["accuracy"], expected["accuracy"])
    assert found.best == 0.1 and found.at_edge


def test_without_classes_the_loss_decides_and_a_rate_that_diverges_is_not_chosen():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    whole = Split(x[:40], x[:40, :1], x[40:], x[40:, :1])
    settings = SETTINGS | {"loss": F.mse_loss}
    found = search(lambda seed: nn.Linear(4, 1), np.array([1e-3, 0.1, 1e30]), np.arange(2), whole, **settings)
    assert found.best == 0.1 and not found.at_edge and set(found.result) == {"loss", "test_loss"}
    with pytest.raises(ValueError, match="at which the validation loss is finite"):
        search(lambda seed: nn.Linear(4, 1), [1e30], [0], whole, **settings)


def test_more_than_a_rate_is_searched():
    def groups(model, point):
        rate, momentum = point
        return [{"params": model.parameters(), "lr": rate, "momentum": momentum}]

    found = search(linear, [(1e-4, 0.0), (0.1, 0.9)], [0], data(), groups=groups, **SETTINGS)
    assert found.best == (0.1, 0.9)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rates": []}, "learning_rates must be at least one"),
        ({"seeds": []}, "seeds must be at least one"),
        ({"validation": 1.0}, "validation must be a fraction"),
        ({"validation_seeds": [1]}, "validation_seeds must come with"),
    ],
)
def test_bad_input_raises(changed, words):
    with pytest.raises(ValueError, match=words):
        search(**{"make": linear, "learning_rates": [0.1], "seeds": [0], "data": data()} | SETTINGS | changed)
