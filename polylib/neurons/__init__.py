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
from polylib.neurons.quadratic_networks import (
    QuadraticConv2d,
    QuadraticLinear,
    relinear_param_groups,
    relinear_shrink_,
)

__all__ = [
    "KNOWN_LAYERS",
    "Candidate",
    "EvoNorm2d",
    "GraphNormAct",
    "HierarchicalPolynomial",
    "LayerGraph",
    "QuadraticConv2d",
    "QuadraticLinear",
    "ThreeLayerResidualNet",
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
    "relinear_param_groups",
    "relinear_shrink_",
    "stress_test",
]
