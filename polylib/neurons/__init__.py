"""Neurons beyond the inner product: the methods of the book's first part."""

from polylib.neurons.evonorm import EvoNorm2d
from polylib.neurons.evonorm_search import (
    KNOWN_LAYERS,
    Candidate,
    GraphNormAct,
    LayerGraph,
    evolve,
    mutate,
    pareto_front,
    pareto_tournament,
    random_graph,
    stress_test,
)
from polylib.neurons.hypercomplex_networks import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHMLinear,
    algebra_angle,
    algebra_matrices,
)
from polylib.neurons.kolmogorov_arnold_transformer import GRKANLinear, GroupRational, rational_gain
from polylib.neurons.polycom import PolyNorm, PolyReLU
from polylib.neurons.quadratic_networks import QuadraticConv2d, QuadraticLinear, relinear_param_groups, relinear_shrink_
from polylib.neurons.selectable_kan import SelectableKANLinear, train_skan

__all__ = [
    "KNOWN_LAYERS",
    "Candidate",
    "EvoNorm2d",
    "GRKANLinear",
    "GraphNormAct",
    "GroupRational",
    "LayerGraph",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHMLinear",
    "PolyNorm",
    "PolyReLU",
    "QuadraticConv2d",
    "QuadraticLinear",
    "SelectableKANLinear",
    "algebra_angle",
    "algebra_matrices",
    "evolve",
    "mutate",
    "pareto_front",
    "pareto_tournament",
    "random_graph",
    "rational_gain",
    "relinear_param_groups",
    "relinear_shrink_",
    "stress_test",
    "train_skan",
]
