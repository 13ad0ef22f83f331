"""Compression: passes that rewrite a model and return what they changed, and the stages that train it in between."""

from muntin.compression.channels.pruning import prune
from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.distillation import Distillation, distil
from muntin.compression.equivalent.batch_norm import fold_batch_norms
from muntin.compression.equivalent.fold import fold
from muntin.compression.loading import load_model
from muntin.compression.low_rank.factorization import low_rank
from muntin.compression.quantization.embeddings import QuantizedEmbedding
from muntin.compression.quantization.post_training import quantize
from muntin.compression.quantization.qat import freeze, prepare_qat, set_bits
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct
from muntin.compression.saving import load_compressed, save
from muntin.compression.sparsity.pattern import hold_sparsity
from muntin.compression.sparsity.sparsification import sparsify
from muntin.models.compression_record import Change

__all__ = [
    "Change",
    "Distillation",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedProduct",
    "QuantizedSoftmaxProduct",
    "distil",
    "fold",
    "fold_batch_norms",
    "freeze",
    "hold_sparsity",
    "load_compressed",
    "load_model",
    "low_rank",
    "prepare_qat",
    "prune",
    "quantize",
    "remove_closed_channels",
    "save",
    "set_bits",
    "sparsify",
]
