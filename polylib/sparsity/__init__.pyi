"""Computing only what matters: the methods of the book's part on sparsity."""

from .calibration import expected_calibration_error as expected_calibration_error
from .delta_activation import Activity as Activity
from .delta_activation import DeltaActivation as DeltaActivation
from .delta_activation import SparseActivation as SparseActivation
from .delta_activation import activity_penalty as activity_penalty
from .delta_activation import delta_quantize as delta_quantize
from .delta_activation import mac_density as mac_density
from .delta_activation import recorded as recorded
from .delta_network import DeltaInference as DeltaInference
from .delta_network import FrameNetwork as FrameNetwork
from .delta_network import delta_inference as delta_inference
from .gaussian_moe import GaussianMoE as GaussianMoE
from .gaussian_moe import dense_to_sparse_gate as dense_to_sparse_gate
from .lazy_neuron import activation_sparsity as activation_sparsity
from .lazy_neuron import firing_rates as firing_rates
from .moe_distance import hellinger as hellinger
from .moe_distance import voronoi_loss as voronoi_loss
from .moe_estimation import MoEFit as MoEFit
from .moe_estimation import fisher_information as fisher_information
from .moe_estimation import fit_mle as fit_mle
from .routing import SparseOTRouter as SparseOTRouter
from .sparse_transport import SparseOTResult as SparseOTResult
from .sparse_transport import sparse_ot as sparse_ot
from .topk_mlp import TopK as TopK
from .topk_mlp import TopKMLP as TopKMLP
from .topk_simplex import topk_simplex_projection as topk_simplex_projection
