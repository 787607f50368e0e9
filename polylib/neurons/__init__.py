"""Neurons beyond the inner product: the methods of the book's first part."""

from polylib.neurons.kolmogorov_arnold_transformer import GRKANLinear, GroupRational, rational_gain
from polylib.neurons.quadratic_networks import (
    QuadraticConv2d,
    QuadraticLinear,
    relinear_param_groups,
    relinear_shrink_,
)
from polylib.neurons.selectable_kan import SelectableKANLinear, train_skan

__all__ = [
    "GRKANLinear",
    "GroupRational",
    "QuadraticConv2d",
    "QuadraticLinear",
    "SelectableKANLinear",
    "rational_gain",
    "relinear_param_groups",
    "relinear_shrink_",
    "train_skan",
]
