"""Rich and lazy training: the methods of the book's part on regimes."""

from .grokking_lazy_rich import PolynomialTwoLayer as PolynomialTwoLayer
from .grokking_lazy_rich import QuadraticTestLoss as QuadraticTestLoss
from .grokking_lazy_rich import lifted_moment as lifted_moment
from .grokking_lazy_rich import moment_kernel as moment_kernel
from .grokking_lazy_rich import moment_output as moment_output
from .grokking_lazy_rich import quadratic_test_loss as quadratic_test_loss
from .initialisation import aligned_init as aligned_init
from .initialisation import effective_rank as effective_rank
from .initialisation import low_rank_init as low_rank_init
from .linearized_model import LinearizedModel as LinearizedModel
from .moment_dynamics import linearized_descent as linearized_descent
from .moment_dynamics import moment_descent as moment_descent
from .representational_geometry import DichotomyTask as DichotomyTask
from .representational_geometry import ccgp as ccgp
from .representational_geometry import dichotomy_task as dichotomy_task
from .representational_geometry import label_axis_share as label_axis_share
from .representational_geometry import linear_cka as linear_cka
from .representational_geometry import parallelism_score as parallelism_score
from .rich_lazy_rank import LinearRankTheory as LinearRankTheory
from .rich_lazy_rank import ReluRNN as ReluRNN
from .rich_lazy_rank import linear_rank_theory as linear_rank_theory
from .rich_lazy_rank import train_to_loss as train_to_loss
from .tangent_kernel import empirical_ntk as empirical_ntk
from .tangent_kernel import kernel_alignment as kernel_alignment
from .tangent_kernel import representation_alignment as representation_alignment
