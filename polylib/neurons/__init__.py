"""Neurons beyond the inner product: the methods of the book's first part."""

from polylib.neurons.kolmogorov_arnold_transformer import GRKANLinear, GroupRational, rational_gain
from polylib.neurons.polycom import PolyNorm, PolyReLU
from polylib.neurons.quadratic_networks import QuadraticConv2d, QuadraticLinear, relinear_param_groups, relinear_shrink_

__all__ = [
    "GRKANLinear",
    "GroupRational",
    "PolyNorm",
    "PolyReLU",
    "QuadraticConv2d",
    "QuadraticLinear",
    "rational_gain",
    "relinear_param_groups",
    "relinear_shrink_",
]
