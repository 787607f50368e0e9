"""Sequence models at less than quadratic cost: the methods of the book's part on sequences."""

from .diagonal_state_space import S4D as S4D
from .diagonal_state_space import S4DKernel as S4DKernel
from .diagonal_state_space import causal_convolution as causal_convolution
from .diagonal_state_space import s4d_groups as s4d_groups
from .hippo import hippo_legs as hippo_legs
from .hippo import s4d_spectrum as s4d_spectrum
