"""Layers of a model, for one device, without any policy for precision, compilation or distribution.

Attention layers and blocks map `(B, H, W, C)` to the same shape, and have a windowed form, `(S, T, C)`, that a model keeps for a whole
stage. Convolutions, the decoder and `PixelHead` take maps `(B, C, H, W)`; gates and the operations of `ops` take either form.
"""

from muntin.layers.attention import Attention
from muntin.layers.block import ParallelBlock, Perceptron, SerialBlock
from muntin.layers.chunks import chunked
from muntin.layers.convolution import ConvUnit, PositionUnit, ResidualPair
from muntin.layers.gate import ChannelGate
from muntin.layers.hybrid import DenseAttention, HybridAttention
from muntin.layers.latent import GlobalAttention
from muntin.layers.local import LocalAttention
from muntin.layers.norm import MapNorm, TokenNorm
from muntin.layers.ops import DenseProduct, Gain, Product, SoftmaxProduct, Sum
from muntin.layers.upsample import OneStepUpsampler, PixelHead, ProgressiveUpsampler, PyramidFusion
from muntin.layers.windows import Grid, merge, partition

Gated = Perceptron | ResidualPair
"""Modules with a `ChannelGate` between the two layers in `ends`."""

__all__ = [
    "Attention", "ChannelGate", "ConvUnit", "DenseAttention", "DenseProduct", "Gain", "Gated", "GlobalAttention", "Grid",
    "HybridAttention", "LocalAttention", "MapNorm", "OneStepUpsampler", "ParallelBlock", "Perceptron", "PixelHead", "PositionUnit",
    "Product", "ProgressiveUpsampler", "PyramidFusion", "ResidualPair", "SerialBlock", "SoftmaxProduct", "Sum", "TokenNorm", "chunked",
    "merge", "partition",
]  # fmt: skip
