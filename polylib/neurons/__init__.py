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
from polylib.neurons.hierarchical_polynomials import (
    HierarchicalPolynomial,
    ThreeLayerResidualNet,
    fit_layerwise,
    gaussian_mean_derivative,
    hermite_link,
    largest_eigenvalue,
    least_squares,
    pair_product_feature,
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
    "HierarchicalPolynomial",
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
    "ThreeLayerResidualNet",
    "algebra_angle",
    "algebra_matrices",
    "evolve",
    "fit_layerwise",
    "gaussian_mean_derivative",
    "hermite_link",
    "largest_eigenvalue",
    "least_squares",
    "mutate",
    "pair_product_feature",
    "pareto_front",
    "pareto_tournament",
    "random_graph",
    "rational_gain",
    "relinear_param_groups",
    "relinear_shrink_",
    "stress_test",
    "train_skan",
]
