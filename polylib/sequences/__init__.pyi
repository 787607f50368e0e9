"""Sequence models at less than quadratic cost: the methods of the book's part on sequences."""

from .causal_monarch import causal_monarch_convolution as causal_monarch_convolution
from .causal_monarch import causal_monarch_factors as causal_monarch_factors
from .diagonal_state_space import S4D as S4D
from .diagonal_state_space import S4DKernel as S4DKernel
from .diagonal_state_space import s4d_groups as s4d_groups
from .hippo import hippo_legs as hippo_legs
from .hippo import s4d_spectrum as s4d_spectrum
from .implicit_filter import ImplicitFilter as ImplicitFilter
from .implicit_filter import LongConvolution as LongConvolution
from .kernelized_attention import KernelizedSelfAttention as KernelizedSelfAttention
from .kernelized_attention import kernelized_attention_rpe as kernelized_attention_rpe
from .long_convolution import causal_convolution as causal_convolution
from .long_convolution import two_sided_convolution as two_sided_convolution
from .monarch import BlockDiagonalLinear as BlockDiagonalLinear
from .monarch import MonarchLinear as MonarchLinear
from .monarch_factors import dft_factors as dft_factors
from .monarch_factors import monarch_dense as monarch_dense
from .monarch_factors import project_to_monarch as project_to_monarch
from .monarch_factors import shuffled as shuffled
from .monarch_mixer import BlockDiagonalGLU as BlockDiagonalGLU
from .monarch_mixer import MonarchMixer as MonarchMixer
from .monarch_mixer import ShortConvolution as ShortConvolution
from .monarch_mixer import monarch_mixer_groups as monarch_mixer_groups
from .random_features import orthogonal_projections as orthogonal_projections
from .random_features import positive_random_features as positive_random_features
from .toeplitz import toeplitz_matmul as toeplitz_matmul
