"""The passes that make a model smaller and faster; each rewrites a model and says what it did."""

from muntin.compression.batch_norm import fold_batch_norms
from muntin.compression.change import Change, Pass
from muntin.compression.fold import fold
from muntin.compression.low_rank import low_rank
from muntin.compression.qat import freeze, prepare_qat, set_bits
from muntin.compression.quantization import quantize
from muntin.compression.quantized import QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct
from muntin.compression.slimming import remove_closed_channels

__all__ = [
    "Change", "Pass", "QuantizedConv2d", "QuantizedLinear", "QuantizedProduct", "QuantizedSoftmaxProduct", "fold", "fold_batch_norms",
    "freeze", "low_rank", "prepare_qat", "quantize", "remove_closed_channels", "set_bits",
]  # fmt: skip
