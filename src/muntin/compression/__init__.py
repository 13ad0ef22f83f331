"""Compression: passes that rewrite a model and return what they changed, and the stages that train it in between."""

from muntin.compression.batch_norm import fold_batch_norms
from muntin.compression.fold import fold
from muntin.compression.loading import load_model
from muntin.compression.low_rank import low_rank
from muntin.compression.qat import freeze, prepare_qat, set_bits
from muntin.compression.quantization import quantize
from muntin.compression.quantized import QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct
from muntin.compression.rewrite import Pass
from muntin.compression.slimming import remove_closed_channels
from muntin.models.compression_record import Change

__all__ = [
    "Change", "Pass", "QuantizedConv2d", "QuantizedLinear", "QuantizedProduct", "QuantizedSoftmaxProduct", "fold", "fold_batch_norms",
    "freeze", "load_model", "low_rank", "prepare_qat", "quantize", "remove_closed_channels", "set_bits",
]  # fmt: skip
