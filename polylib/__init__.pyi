"""Methods and fused kernels for neural networks beyond the plain neuron."""

from . import kernels as kernels
from . import lab as lab
from . import neurons as neurons
from . import optimization as optimization
from . import quantization as quantization
from . import regimes as regimes
from . import sequences as sequences
from . import sparsity as sparsity

__version__: str
