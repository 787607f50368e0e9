"""Networks with few bits: the methods of the book's part on quantisation."""

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
    "LSQQuantizer",
    "OscillationMeter",
    "QKReparamAttention",
    "QuantizedAttention",
    "StatsQuantizer",
    "UniformQuantizer",
    "activation_quantizer",
    "confidence_guided",
    "confidence_mask",
    "pack_codes",
    "quantizable",
    "quantize_model",
    "size_in_bytes",
    "unpack_codes",
    "weight_quantizers",
]
