"""An ONNX graph of any model: rewritten, calibrated and quantised with numpy and ONNX Runtime, without PyTorch.

float ONNX -> simplify -> products -> calibrate (ranges, histograms) -> plan -> measure each product -> insert QDQ
-> artefact (`artifacts`)
"""

from muntin.graph.artifacts.export import export_onnx
from muntin.graph.onnx_file import quantize_onnx
from muntin.graph.records import QuantizedOnnx

__all__ = ["QuantizedOnnx", "export_onnx", "quantize_onnx"]
