"""Networks with few bits: the methods of the book's part on quantisation."""

from polylib.quantization.bit_allocation import ParetoFrontier, pareto_frontier, select_bits
from polylib.quantization.hawq_v2 import (
    HutchinsonTrace,
    activation_trace,
    hutchinson_trace,
    quantization_sensitivity,
)
from polylib.quantization.oscillation import OscillationMeter, confidence_guided, confidence_mask
from polylib.quantization.quantized_attention import (
    ActivationQuantizer,
    QKReparamAttention,
    QuantizedAttention,
    activation_quantizer,
)
from polylib.quantization.quantized_models import (
    pack_codes,
    quantizable,
    quantize_model,
    size_in_bytes,
    unpack_codes,
    weight_quantizers,
)
from polylib.quantization.quantizers import (
    BinaryQuantizer,
    FixedPointQuantizer,
    LSQQuantizer,
    StatsQuantizer,
    UniformQuantizer,
)

__all__ = [
    "ActivationQuantizer",
    "BinaryQuantizer",
    "FixedPointQuantizer",
    "HutchinsonTrace",
    "LSQQuantizer",
    "OscillationMeter",
    "ParetoFrontier",
    "QKReparamAttention",
    "QuantizedAttention",
    "StatsQuantizer",
    "UniformQuantizer",
    "activation_quantizer",
    "activation_trace",
    "confidence_guided",
    "confidence_mask",
    "hutchinson_trace",
    "pack_codes",
    "pareto_frontier",
    "quantizable",
    "quantization_sensitivity",
    "quantize_model",
    "select_bits",
    "size_in_bytes",
    "unpack_codes",
    "weight_quantizers",
]
