"""The search that found EvoNorm: layers as graphs of primitive operations, mutated, rejected early, and selected.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", arXiv 2004.02967. A layer is a graph. Nodes 0
to 3 are given: the input, a tensor of zeros, and two trainable parameters for each channel, v0 (0 at the start) and v1
(1). Each further node applies one operation to earlier nodes, and the last one is the output. The guards of the
logarithm, of the roots and of the deviation near zero, EPS, are ours.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polylib import _checks

EPS = 1e-5
GIVEN = 4

BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": lambda a: a.sign() * (a.abs() + EPS).log(),
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": lambda a: a.sign() * (a.abs() + EPS).sqrt(),
}
# Each statistic, over one of four sets of values; channels are grouped for the last.
STATISTICS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "mean": lambda a, axes: a.mean(axes, keepdim=True),
    "rms": lambda a, axes: (a.square().mean(axes, keepdim=True) + EPS).sqrt(),
    "std": lambda a, axes: (a.var(axes, correction=0, keepdim=True) + EPS).sqrt(),
}
AXES = {"batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3), "group": (2, 3, 4)}
REDUCTIONS = {f"{axes}_{name}": (axes, name) for axes, name in product(AXES, STATISTICS)}
OPERATIONS = (*BINARY, *UNARY, *REDUCTIONS)


class Node(NamedTuple):
    """An operation and the numbers of the nodes it is applied to. Operations with one argument ignore `j`."""

    op: str
    i: int
    j: int = 0


class LayerGraph(tuple):
    """A layer: a tuple of nodes, the first of which has number 4. Equal graphs compare and hash as equal.

    The argument `j` of an operation with one argument plays no part; it is set to 0.

    Raises:
        ValueError: no nodes, an unknown operation, or an argument that is not an earlier node.
    """

    def __new__(cls, nodes: Sequence[tuple[Any, ...]]) -> "LayerGraph":
        graph = super().__new__(cls, (Node(*node) for node in nodes))
        if not graph:
            raise ValueError("nodes must have at least one entry, got none")
        for number, node in enumerate(graph, start=GIVEN):
            if node.op not in OPERATIONS:
                raise ValueError(
                    f"node {number} must have one of the operations {', '.join(OPERATIONS)}, got {node.op!r}"
                )
            for name, earlier in (("i", node.i), ("j", node.j)):
                if not 0 <= earlier < number:
                    raise ValueError(
                        f"{name} of node {number} must be an earlier node, 0 to {number - 1}, got {earlier}"
                    )
        return super().__new__(cls, (node if node.op in BINARY else node._replace(j=0) for node in graph))

    def used(self) -> set[int]:
        """The numbers of all nodes that the output depends on, 0 to 3 among them."""
        found, waiting = set(), [GIVEN + len(self) - 1]
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                if number >= GIVEN:
                    node = self[number - GIVEN]
                    waiting += [node.i, node.j] if node.op in BINARY else [node.i]
        return found

    def __str__(self) -> str:
        """The nodes that the output depends on."""
        given = ("x", "zeros", "v0", "v1")

        def name(number: int) -> str:
            return given[number] if number < GIVEN else f"n{number}"

        def call(node: Node) -> str:
            return f"{node.op}({name(node.i)}{', ' + name(node.j) if node.op in BINARY else ''})"

        used = self.used()
        return "; ".join(f"{name(k)} = {call(node)}" for k, node in enumerate(self, start=GIVEN) if k in used)

    def depends_on_input(self) -> bool:
        return 0 in self.used()


KNOWN_LAYERS = {
    "BN-ReLU": LayerGraph(
        [("batch_mean", 0), ("neg", 4), ("add", 0, 5), ("batch_std", 0), ("div", 6, 7), ("max", 8, 1)]
    ),
    "Swish": LayerGraph([("mul", 3, 0), ("sigmoid", 4), ("mul", 0, 5)]),
    "EvoNorm-B0": LayerGraph(
        [("mul", 3, 0), ("instance_std", 0), ("add", 4, 5), ("batch_std", 0), ("max", 6, 7), ("div", 0, 8)]
    ),
    "EvoNorm-S0": LayerGraph([("mul", 3, 0), ("sigmoid", 4), ("mul", 0, 5), ("group_std", 0), ("div", 6, 7)]),
}


def _random_node(number: int, rng: random.Random) -> Node:
    return Node(rng.choice(OPERATIONS), rng.randrange(number), rng.randrange(number))


def random_graph(nodes: int, rng: random.Random) -> LayerGraph:
    """A graph of `nodes` nodes, each a uniform operation of uniform earlier nodes."""
    _checks.integer("nodes", nodes, least=1)
    return LayerGraph([_random_node(number, rng) for number in range(GIVEN, GIVEN + nodes)])


def mutate(graph: LayerGraph, rng: random.Random) -> LayerGraph:
    """The graph with one node, chosen uniformly, replaced by a random one."""
    index = rng.randrange(len(graph))
    return LayerGraph([*graph[:index], _random_node(GIVEN + index, rng), *graph[index + 1 :]])


class GraphNormAct(nn.Module):
    """The layer that a graph describes, `(N, C, H, W)` to the same, followed by a trainable scale and shift.

    Statistics of the batch always come from the batch at hand, in evaluation too: a search compares layers on one large
    batch. Parameters, all (C,): `weight` (1), `bias` (0), `v0` (0), `v1` (1).

    Raises:
        ValueError: groups that do not divide `num_features`, or an input that is not (N, C, H, W).
    """

    def __init__(self, num_features: int, graph: LayerGraph, groups: int = 1) -> None:
        super().__init__()
        _checks.divisor("groups", groups, "num_features", num_features)
        self.num_features, self.graph, self.groups = num_features, graph, groups
        self.weight, self.v1 = (nn.Parameter(torch.ones(num_features)) for _ in range(2))
        self.bias, self.v0 = (nn.Parameter(torch.zeros(num_features)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x must have shape (N, {self.num_features}, H, W), got {tuple(x.shape)}")
        weight, bias, v0, v1 = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias, self.v0, self.v1))
        values = {0: x, 1: torch.zeros_like(weight), 2: v0, 3: v1}
        needed = self.graph.used()
        for number, node in enumerate(self.graph, start=GIVEN):
            if number in needed:
                values[number] = self._value(node, values)
        return (values[number] * weight + bias).expand_as(x)

    def _value(self, node: Node, values: dict[int, Tensor]) -> Tensor:
        a = values[node.i]
        if node.op in BINARY:
            return BINARY[node.op](a, values[node.j])
        if node.op in UNARY:
            return UNARY[node.op](a)
        axes, name = REDUCTIONS[node.op]
        if axes != "group":
            return STATISTICS[name](a, AXES[axes])
        grouped = a.expand(-1, self.num_features, -1, -1).unflatten(1, (self.groups, -1))
        return STATISTICS[name](grouped, AXES[axes]).expand_as(grouped[..., :1, :1]).flatten(1, 2)


def stress_test(model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 100, lr: float = 0.1) -> float:
    """How large the gradient of a loss can be made: the second rejection of the search.

    The weights of the convolutions climb the squared norm of their gradient, ||d loss / d w||^2, for `steps` steps at
    the rate `lr`, all else fixed. Returns the largest norm on the way, infinity if it is no longer a number. `model`
    is left as it was.

    Args:
        loss: `loss(call)` returns the loss on a fixed batch, where `call(x)` is the model with the weights at hand.

    Raises:
        ValueError: fewer than one step, or a model without convolution.
    """
    _checks.integer("steps", steps, least=1)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not layers:
        raise ValueError(f"model must have at least one Conv2d, got a {type(model).__name__} without")
    weights = {f"{name}.weight".lstrip("."): m.weight.detach().clone() for name, m in layers.items()}
    largest = 0.0
    for _ in range(steps):
        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        value = loss(lambda x, weights=weights: functional_call(model, weights, (x,)))
        gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, materialize_grads=True)
        square = sum(g.square().sum() for g in gradients)
        norm = square.detach().sqrt().item()
        if norm != norm or norm == float("inf"):
            return float("inf")
        largest = max(largest, norm)
        if not square.requires_grad:  # the loss is linear in the weights: nothing to climb
            return largest
        ascent = torch.autograd.grad(square, list(weights.values()), materialize_grads=True)
        weights = {name: w + lr * a for (name, w), a in zip(weights.items(), ascent, strict=True)}
    return largest


class Candidate(NamedTuple):
    """A graph and its scores, one for each architecture it was tried in; larger is better."""

    graph: LayerGraph
    scores: tuple[float, ...]


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other candidate beats: at least as good in every architecture, and better in one."""

    def beats(a: Candidate, b: Candidate) -> bool:
        return a.scores != b.scores and all(s >= t for s, t in zip(a.scores, b.scores, strict=True))

    return [c for c in candidates if not any(beats(other, c) for other in candidates)]


def pareto_tournament(population: Sequence[Candidate], size: int, rng: random.Random) -> Candidate:
    """Draw `size` candidates without replacement; the winner is a random member of their Pareto front."""
    _checks.integer("size", size, least=1, most=len(population))
    return rng.choice(pareto_front(rng.sample(list(population), size)))


def evolve(
    population: Sequence[Candidate],
    evaluate: Callable[[LayerGraph], tuple[float, ...] | None],
    children: int,
    tournament: int,
    rng: random.Random,
) -> list[Candidate]:
    """Evolve for a number of children, and return every candidate that ever lived, the first population among them.

    Each child is a mutation of the winner of a tournament. `evaluate` returns its scores, or None to reject it. A child
    that lives takes the place of the oldest.
    """
    alive, ever = deque(population), list(population)
    for _ in range(children):
        graph = mutate(pareto_tournament(alive, tournament, rng).graph, rng)
        scores = evaluate(graph)
        if scores is not None:
            alive.popleft()
            alive.append(Candidate(graph, scores))
            ever.append(alive[-1])
    return ever
