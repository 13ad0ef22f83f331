"""An ONNX graph of any model: rewritten, calibrated and quantised with numpy and ONNX Runtime, without PyTorch.

float ONNX -> simplify -> products -> calibrate (ranges, histograms) -> plan -> measure each product -> insert QDQ
"""

from muntin.graph.onnx_file import quantize_onnx
from muntin.graph.records import QuantizedOnnx

__all__ = ["QuantizedOnnx", "quantize_onnx"]
