import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polylib.neurons import (
    KNOWN_LAYERS,
    Candidate,
    EvoNorm2d,
    GraphNormAct,
    LayerGraph,
    evolve,
    mutate,
    pareto_front,
    pareto_tournament,
    random_graph,
    stress_test,
)
from polylib.neurons.evonorm_search import BINARY, OPERATIONS, REDUCTIONS, UNARY


def inputs(seed=0):
    return torch.randn(5, 6, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("BN-ReLU", nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())),
        ("Swish", nn.SiLU()),
        ("EvoNorm-B0", EvoNorm2d(6, "B0")),
        ("EvoNorm-S0", EvoNorm2d(6, "S0", groups=3)),
    ],
)
def test_known_layers_are_graphs(name, layer):
    x = inputs()
    torch.testing.assert_close(GraphNormAct(6, KNOWN_LAYERS[name], groups=3).double()(x), layer.double()(x))


def test_every_operation_gives_the_shape_of_the_input_and_a_gradient():
    x = inputs().requires_grad_()
    for op in OPERATIONS:
        first = GraphNormAct(6, LayerGraph([(op, 0, 3)]), groups=2).double()
        again = GraphNormAct(6, LayerGraph([("layer_mean", 0), (op, 4, 4)]), groups=2).double()  # no channel axis
        for layer in (first, again):
            y = layer(x)
            assert y.shape == x.shape and y.isfinite().all(), op
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert gradient.isfinite().all(), op


@pytest.mark.parametrize("axes", ["batch", "instance", "layer", "group"])
def test_statistics_by_hand(axes):
    x = inputs()
    parts = {
        "batch": lambda n, c: x[:, c],
        "instance": lambda n, c: x[n, c],
        "layer": lambda n, c: x[n],
        "group": lambda n, c: x[n, c // 2 * 2 : c // 2 * 2 + 2],
    }[axes]
    for name, statistic in {
        "mean": torch.mean,
        "rms": lambda t: (t.square().mean() + 1e-5).sqrt(),
        "std": lambda t: (t.var(correction=0) + 1e-5).sqrt(),
    }.items():
        y = GraphNormAct(6, LayerGraph([(f"{axes}_{name}", 0)]), groups=3).double()(x)
        expected = torch.stack([torch.stack([statistic(parts(n, c)) for c in range(6)]) for n in range(5)])
        torch.testing.assert_close(y, expected[..., None, None].expand_as(y))


def test_there_are_24_operations():
    assert (len(BINARY), len(UNARY), len(REDUCTIONS), len(set(OPERATIONS))) == (4, 8, 12, 24)


def test_dependence_on_the_input():
    assert LayerGraph([("neg", 0)]).depends_on_input()
    assert not LayerGraph([("neg", 0), ("neg", 1)]).depends_on_input()
    assert not LayerGraph([("neg", 1, 0)]).depends_on_input()  # the second argument of "neg" is ignored
    assert LayerGraph([("add", 1, 0)]).depends_on_input()


def test_a_graph_prints_the_nodes_it_uses():
    assert str(LayerGraph([("exp", 0), ("neg", 3, 4), ("max", 5, 0)])) == "n5 = neg(v1); n6 = max(n5, x)"
    assert str(KNOWN_LAYERS["Swish"]) == "n4 = mul(v1, x); n5 = sigmoid(n4); n6 = mul(x, n5)"


def test_random_graphs_and_mutations():
    rng = random.Random(0)
    graphs = [random_graph(6, rng) for _ in range(200)]
    assert {len(graph) for graph in graphs} == {6} and len(set(graphs)) > 190
    assert {node.op for graph in graphs for node in graph} == set(OPERATIONS)
    assert random_graph(6, random.Random(3)) == random_graph(6, random.Random(3))
    changed = set()
    for graph in graphs:
        differences = [k for k, (a, b) in enumerate(zip(graph, mutate(graph, rng), strict=True)) if a != b]
        assert len(differences) <= 1
        changed.update(differences)
    assert changed == set(range(6))


def network(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), norm, nn.Conv2d(8, 8, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def cross_entropy(call):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 4, 4, generator=generator), torch.arange(12) % 3
    return F.cross_entropy(call(x), y)


def test_the_stress_test_tells_layers_apart_and_leaves_the_model_alone():
    models = {
        "BN-ReLU": network(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())).eval(),
        "S0": network(EvoNorm2d(8, groups=2)),
        "exp of square": network(GraphNormAct(8, LayerGraph([("square", 0), ("exp", 4)]))),
    }
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    norms = {name: stress_test(model, cross_entropy, 20, 0.1) for name, model in models.items()}
    assert norms["S0"] < 1e4 and norms["exp of square"] > 1e8
    for name, model in models.items():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[name], strict=True))
        assert all(p.grad is None for p in model.parameters())


def test_the_first_norm_of_the_stress_test_is_that_of_the_gradient():
    model = network(EvoNorm2d(8, groups=2))
    weights = [model[0].weight, model[2].weight]
    gradient = torch.autograd.grad(cross_entropy(model), weights)
    expected = sum(g.square().sum() for g in gradient).sqrt().item()
    assert stress_test(model, cross_entropy, 1) == pytest.approx(expected)
    assert stress_test(model, cross_entropy, 5) > expected


def test_pareto_front_and_tournament():
    graph = LayerGraph([("neg", 0)])
    people = [Candidate(graph, scores) for scores in ((1, 1), (2, 0), (0, 2), (1, 0), (0, 0))]
    assert pareto_front(people) == people[:3]
    assert pareto_front(people[:1] * 2) == people[:1] * 2  # equals do not beat each other
    winners = {pareto_tournament(people, 5, random.Random(seed)).scores for seed in range(40)}
    assert winners == {(1, 1), (2, 0), (0, 2)}
    assert {pareto_tournament(people, 1, random.Random(seed)).scores for seed in range(60)} == {
        p.scores for p in people
    }


def test_evolution_replaces_the_oldest_and_drops_the_rejected():
    target = "tanh"

    def evaluate(graph):
        return None if graph[0].op == "exp" else (float(graph[0].op == target), float(graph[1].op == target))

    first = LayerGraph([("neg", 0), ("neg", 4)])
    ever = evolve([Candidate(first, evaluate(first))] * 8, evaluate, 400, 3, random.Random(0))
    assert len(ever) < 408 and not any(c.graph[0].op == "exp" for c in ever)
    assert max(ever, key=lambda c: sum(c.scores)).scores == (1.0, 1.0)
    assert ever == evolve([Candidate(first, evaluate(first))] * 8, evaluate, 400, 3, random.Random(0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LayerGraph([]), "nodes must have at least one entry, got none"),
        (lambda: LayerGraph([("cosine", 0)]), r"node 4 must have one of.*, got 'cosine'"),
        (lambda: LayerGraph([("neg", 0), ("add", 0, 5)]), "j of node 5 must be an earlier node, 0 to 4, got 5"),
        (lambda: LayerGraph([("neg", -1)]), "i of node 4 must be an earlier node, 0 to 3, got -1"),
        (lambda: random_graph(0, random.Random(0)), "nodes must be an integer of at least 1, got 0"),
        (
            lambda: GraphNormAct(6, KNOWN_LAYERS["Swish"], groups=4),
            "groups must be a divisor of num_features = 6, got 4",
        ),
        (
            lambda: GraphNormAct(6, KNOWN_LAYERS["Swish"])(torch.zeros(2, 5, 3, 3)),
            r"x must have shape \(N, 6, H, W\), got \(2, 5, 3, 3\)",
        ),
        (
            lambda: stress_test(nn.Linear(2, 2), cross_entropy),
            "model must have at least one Conv2d, got a Linear without",
        ),
        (lambda: stress_test(network(nn.ReLU()), cross_entropy, 0), "steps must be an integer of at least 1, got 0"),
        (lambda: pareto_tournament([], 1, random.Random(0)), "size must be an integer from 1 to 0, got 1"),
    ],
)
def test_bad_input_raises(make, words):
    with pytest.raises(ValueError, match=words):
        make()
