"""Networks with few bits: the methods of the book's part on quantisation."""

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
    "BinaryQuantizer",
    "FixedPointQuantizer",
    "LSQQuantizer",
    "StatsQuantizer",
    "UniformQuantizer",
    "pack_codes",
    "quantizable",
    "quantize_model",
    "size_in_bytes",
    "unpack_codes",
    "weight_quantizers",
]
