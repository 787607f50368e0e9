"""Neurons beyond the inner product: the methods of the book's first part."""

from polylib.neurons.hypercomplex_networks import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHMLinear,
    algebra_angle,
    algebra_matrices,
)
from polylib.neurons.polycom import PolyNorm, PolyReLU
from polylib.neurons.quadratic_networks import (
    QuadraticConv2d,
    QuadraticLinear,
    relinear_param_groups,
    relinear_shrink_,
)

__all__ = [
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHMLinear",
    "PolyNorm",
    "PolyReLU",
    "QuadraticConv2d",
    "QuadraticLinear",
    "algebra_angle",
    "algebra_matrices",
    "relinear_param_groups",
    "relinear_shrink_",
]
