"""Rich and lazy training: the methods of the book's part on regimes."""

from .initialisation import aligned_init as aligned_init
from .initialisation import effective_rank as effective_rank
from .initialisation import low_rank_init as low_rank_init
from .rich_lazy_rank import LinearRankTheory as LinearRankTheory
from .rich_lazy_rank import ReluRNN as ReluRNN
from .rich_lazy_rank import linear_rank_theory as linear_rank_theory
from .rich_lazy_rank import train_to_loss as train_to_loss
from .tangent_kernel import empirical_ntk as empirical_ntk
from .tangent_kernel import kernel_alignment as kernel_alignment
from .tangent_kernel import representation_alignment as representation_alignment
