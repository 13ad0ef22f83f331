"""INT8 on kernels whose sums of 8-bit products saturate in 16 bits, as on x86 CPUs without VNNI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muntin
from muntin.layers import LocalAttention
from muntin.runtime import describe_hardware
from muntin.runtime.verification.exactness import sums_saturate


class Attending(nn.Module):
    """A convolution, attention and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, 32, 4, 4), LocalAttention(32, heads=2, window=4), nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        x_BHWC = self.attention(torch.relu(self.stem(x / 60 - 2)).permute(0, 2, 3, 1))
        scores: Tensor = self.head(x_BHWC.mean((1, 2)))
        return scores


def export_both(folder: Path) -> None:
    """Export a calibrated model, and one that is quantised in PyTorch; check both in the engines."""
    assert sums_saturate()
    torch.manual_seed(0)
    model = Attending().eval()
    images = torch.randint(0, 256, (8, 3, 32, 32)).float()
    calibrated = muntin.export(model, images, folder / "calibrated", calibration=[images])
    muntin.prepare_qat(model, [images], bits=8)
    muntin.freeze(model, [images])
    quantised = muntin.export(model, images, folder / "quantised")
    for artifact in (calibrated, quantised):
        layers = {layer.name: layer for layer in artifact.manifest.layers}
        assert {layers[name].weight_bits for name in ("stem", "head")} == {7}
        assert all("saturate" in layer.note for layer in layers.values() if layer.activation_bits is None)
        assert "weights have 7 bits" in str(artifact.manifest.measured["notes"])
        weights = [values for values in onnx_weights(artifact.model_bytes()) if values.dtype == np.int8 and values.ndim > 1]
        assert weights and max(abs(values.astype(int)).max() for values in weights) == 63
        assert muntin.verify(artifact.path).passed


def onnx_weights(model: bytes) -> list[NDArray[Any]]:
    return [onnx.numpy_helper.to_array(one) for one in onnx.load_model_from_string(model).graph.initializer]


@pytest.mark.skipif(not sums_saturate() and "avx512_vnni" not in describe_hardware()["features"], reason="VNNI cannot be switched off here")
def test_weights_of_seven_bits(tmp_path: Path) -> None:
    if sums_saturate():
        export_both(tmp_path)
        return
    code = "import sys, pathlib, test_saturating_cpu as tests; tests.export_both(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
