"""Networks with few bits: the methods of the book's part on quantisation."""

from .bit_allocation import ParetoFrontier as ParetoFrontier
from .bit_allocation import pareto_frontier as pareto_frontier
from .bit_allocation import select_bits as select_bits
from .hawq_v2 import HutchinsonTrace as HutchinsonTrace
from .hawq_v2 import activation_trace as activation_trace
from .hawq_v2 import hutchinson_trace as hutchinson_trace
from .hawq_v2 import quantization_sensitivity as quantization_sensitivity
from .oscillation import OscillationMeter as OscillationMeter
from .oscillation import confidence_guided as confidence_guided
from .oscillation import confidence_mask as confidence_mask
from .quantized_attention import ActivationQuantizer as ActivationQuantizer
from .quantized_attention import QKReparamAttention as QKReparamAttention
from .quantized_attention import QuantizedAttention as QuantizedAttention
from .quantized_attention import activation_quantizer as activation_quantizer
from .quantized_models import pack_codes as pack_codes
from .quantized_models import quantizable as quantizable
from .quantized_models import quantize_model as quantize_model
from .quantized_models import size_in_bytes as size_in_bytes
from .quantized_models import unpack_codes as unpack_codes
from .quantized_models import weight_quantizers as weight_quantizers
from .quantizers import BinaryQuantizer as BinaryQuantizer
from .quantizers import FixedPointQuantizer as FixedPointQuantizer
from .quantizers import LSQQuantizer as LSQQuantizer
from .quantizers import StatsQuantizer as StatsQuantizer
from .quantizers import UniformQuantizer as UniformQuantizer
