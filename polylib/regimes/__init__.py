"""Rich and lazy training: the methods of the book's part on regimes."""

from polylib.regimes.initialisation import aligned_init, effective_rank, low_rank_init
from polylib.regimes.rich_lazy_rank import LinearRankTheory, ReluRNN, linear_rank_theory, train_to_loss
from polylib.regimes.tangent_kernel import empirical_ntk, kernel_alignment, representation_alignment

__all__ = [
    "LinearRankTheory",
    "ReluRNN",
    "aligned_init",
    "effective_rank",
    "empirical_ntk",
    "kernel_alignment",
    "linear_rank_theory",
    "low_rank_init",
    "representation_alignment",
    "train_to_loss",
]
