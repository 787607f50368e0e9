import pytest
import torch

from polylib.regimes import ccgp, dichotomy_task, label_axis_share, linear_cka, parallelism_score

F64 = torch.float64
LABELS = torch.tensor([1.0, 1.0, -1.0, -1.0])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("n", "p", "q"), [(50, 3, 4), (6, 20, 30), (2, 1, 1)])
def test_cka_is_the_cosine_of_the_centred_gram_matrices(n, p, q):
    x, y = draw(n, p), draw(n, q, seed=1)
    centre = torch.eye(n, dtype=F64) - 1 / n
    first, second = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    torch.testing.assert_close(linear_cka(x, y), (first * second).sum() / (first.norm() * second.norm()))


def test_cka_does_not_see_rotations_scales_and_shifts_and_sees_other_maps():
    x, y = draw(40, 5), draw(40, 6, seed=1)
    rotation = torch.linalg.qr(draw(5, 5, seed=2)).Q
    torch.testing.assert_close(linear_cka(3 * x @ rotation + 7, y), linear_cka(x, y))
    torch.testing.assert_close(linear_cka(x, -2 * x), torch.tensor(1.0, dtype=F64))
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1], dtype=F64)
    assert abs(linear_cka(stretched, y) - linear_cka(x, y)) > 1e-3


def test_cka_takes_stacks_and_a_single_feature():
    x, y = draw(3, 30, 4), draw(30, seed=1)
    each = torch.stack([linear_cka(one, y[:, None]) for one in x])
    torch.testing.assert_close(linear_cka(x, y.expand(3, 30)), each)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (draw(5, 2), draw(4, 2), "y must have shape"),
        (draw(1, 2), draw(1, 2), "y must have shape"),
        (draw(5, 2), torch.ones(5, 2, dtype=F64), "must vary"),
    ],
)
def test_cka_refuses_what_it_cannot_compare(x, y, words):
    with pytest.raises(ValueError, match=words):
        linear_cka(x, y)


@pytest.mark.parametrize("separation", [0.0, 0.5, 1.0, 2.0])
def test_parallelism_of_the_inputs_follows_from_the_separation(separation):
    """By hand: both pairings of the four means give (s^2 - 1) / (s^2 + 1)."""
    task = dichotomy_task(separation, noise=0.0)
    expected = torch.tensor((separation**2 - 1) / (separation**2 + 1))
    torch.testing.assert_close(parallelism_score(task.means, task.labels), expected, atol=1e-5, rtol=0)


def test_a_factorised_code_is_parallel_and_generalises():
    directions = torch.linalg.qr(draw(9, 2)).Q.T  # the label's and another one, the label's twice as long
    code = torch.tensor([[2.0, 1], [2, -1], [-2, 1], [-2, -1]], dtype=F64) @ directions
    torch.testing.assert_close(parallelism_score(code, LABELS), torch.tensor(1.0, dtype=F64))
    condition = torch.arange(4).repeat(20)
    hidden = code[condition] + 0.05 * draw(80, 9, seed=1)
    assert ccgp(hidden, condition, LABELS) == 1.0


def test_parallelism_takes_the_best_pairing_of_any_number_of_conditions():
    step, base = draw(7), draw(3, 7, seed=1)
    means = torch.cat([base + step, base[[2, 0, 1]]])
    labels = torch.tensor([0, 0, 0, 5, 5, 5])
    torch.testing.assert_close(parallelism_score(means, labels), torch.tensor(1.0, dtype=F64))
    torch.testing.assert_close(parallelism_score(means, 1 - labels), torch.tensor(1.0, dtype=F64))
    stack = torch.stack([means, draw(6, 7, seed=3)])
    torch.testing.assert_close(
        parallelism_score(stack, labels), torch.stack([parallelism_score(m, labels) for m in stack])
    )


def test_exclusive_or_does_not_generalise_and_below_chance_is_anti_parallel():
    task = dichotomy_task(0.3, noise=0.1)
    x, _, condition = task.sample(400, torch.Generator().manual_seed(0))
    assert ccgp(x, condition, task.labels) < 0.2  # a decoder on two conditions points the wrong way for the others


def test_generalisation_takes_stacks():
    condition = torch.arange(4).repeat(10)
    hidden = draw(2, 40, 6)
    torch.testing.assert_close(
        ccgp(hidden, condition, LABELS), torch.stack([ccgp(h, condition, LABELS) for h in hidden])
    )


@pytest.mark.parametrize("labels", [[1, 1, 1, -1], [1, 2, 3, 3], [1, -1], [1] * 7 + [0] * 7])
def test_labels_must_split_the_conditions_in_two_halves(labels):
    with pytest.raises(ValueError, match="labels must split"):
        parallelism_score(draw(len(labels), 5), torch.tensor(labels))


def test_generalisation_needs_samples_of_every_condition():
    with pytest.raises(ValueError, match="condition must hold"):
        ccgp(draw(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), LABELS)
    with pytest.raises(ValueError, match="condition must have shape"):
        ccgp(draw(6, 3), torch.tensor([0, 1, 2, 3]), LABELS)
    with pytest.raises(ValueError, match="ridge"):
        ccgp(draw(4, 3), torch.arange(4), LABELS, ridge=0)


def test_the_task_is_what_its_formula_says():
    task = dichotomy_task(0.7, dim=12, noise=0.2, seed=3)
    torch.testing.assert_close(task.axes @ task.axes.T, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(task.means @ task.axes[2], 0.7 * task.labels, atol=1e-5, rtol=0)
    x, y, condition = task.sample(8000, torch.Generator().manual_seed(1))
    assert x.shape == (8000, 12) and set(condition.tolist()) == {0, 1, 2, 3}
    assert (y == task.labels[condition]).all()
    torch.testing.assert_close((x - task.means[condition]).std(), torch.tensor(0.2), atol=0.005, rtol=0)
    again = task.sample(8000, torch.Generator().manual_seed(1))
    assert all((a == b).all() for a, b in zip((x, y, condition), again, strict=True))
    assert (dichotomy_task(0.7, seed=4).axes - dichotomy_task(0.7, seed=5).axes).abs().max() > 0.01


@pytest.mark.parametrize("bad", [{"separation": -1}, {"noise": float("nan")}, {"dim": 2}])
def test_the_task_refuses_bad_arguments_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        dichotomy_task(**{"separation": 1.0, **bad})


def test_label_axis_share():
    task = dichotomy_task(1.0)
    weight = torch.tensor([[3.0, 0, 4], [0, 0, 5]]) @ task.axes
    torch.testing.assert_close(label_axis_share(weight, task.axes), torch.tensor(41 / 50))
    torch.testing.assert_close(label_axis_share(weight.expand(2, 2, 20), task.axes), torch.tensor([41 / 50] * 2))
