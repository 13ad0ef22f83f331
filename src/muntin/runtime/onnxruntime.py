"""The ONNX Runtime engine: portable, on its CPU provider, float layers in FP32.

It has no BF16 matrix product on CPUs. A QDQ layer runs on integers only where its pattern fuses (seen with 1.32): MatMul always; Conv and
Gemm only when their output, after at most a ReLU with zero point 0, is quantised again at once. `layers()` says what did.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.graph import ComputeNodes, compute_nodes
from muntin.runtime.hardware import physical_cores
from muntin.runtime.quiet import onnxruntime
from muntin.runtime.session import ExecutedLayer, Session

states = onnxruntime.capi.onnxruntime_pybind11_state
_PROVIDERS = ["CPUExecutionProvider"]
_INTEGER = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul"}
)
# Not quantised, but no float either: what only moves 8-bit values would need type inference to tell, so it is not claimed.
_INTEGER_ELEMENTWISE = frozenset({"QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool"})
_MULTIPLY = frozenset({"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}) | _INTEGER
_FAILURES = (
    states.Fail,
    states.InvalidGraph,
    states.InvalidArgument,
    states.NotImplemented,
    states.RuntimeException,
    states.InvalidProtobuf,
)


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime's CPU provider. Threads may call it at the same time."""

    def __init__(self, artifact: Artifact, *, threads: int) -> None:
        self._artifact = artifact
        self._session = _open(artifact, artifact.model_bytes(), _options(threads))
        super().__init__(
            signature=artifact.manifest.signature,
            engine="onnxruntime",
            precision="f32",
            threads=threads,
            plan=artifact.manifest.plan,
        )

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        (name,) = (item.name for item in self._session.get_inputs())
        scores: NDArray[np.float32] = self._session.run(None, {name: images_BHWC})[0]
        return scores

    def layers(self) -> list[ExecutedLayer]:
        """Read from the optimised graph, which a second session writes to a temporary file: takes as long as opening."""
        data = self._artifact.model_bytes()
        with tempfile.TemporaryDirectory(prefix="muntin-") as folder:
            file = Path(folder) / "optimized.onnx"
            options = _options(self.threads)
            options.optimized_model_filepath = str(file)
            _open(self._artifact, data, options)
            optimized = onnx.load(str(file))
        return _executed(optimized, compute_nodes(data))


def open_onnxruntime(artifact: Artifact, precision: str = "recorded", threads: int | None = None) -> OnnxRuntimeSession:
    """Opens an artefact in ONNX Runtime on the CPU. "recorded" runs in f32, which the session's `.precision` says; a 16-bit type asked for
    by name is a DependencyError. `threads` None: the usable physical cores."""
    if precision not in ("recorded", "f32"):
        raise DependencyError(
            f'precision="{precision}": ONNX Runtime has no {precision} kernels on CPUs: ask for "recorded" or "f32", or engine="openvino"'
        )
    return OnnxRuntimeSession(artifact, threads=threads or physical_cores())


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; a warning that an optimised file is of this machine only would be about our own temporary one
    return options


def _open(artifact: Artifact, data: bytes, options: Any) -> Any:
    onnxruntime.disable_telemetry_events()
    try:
        return onnxruntime.InferenceSession(data, options, providers=_PROVIDERS)
    except _FAILURES as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{artifact.path}: ONNX Runtime {onnxruntime.__version__} cannot open its model: {text}") from error


def _executed(optimized: onnx.ModelProto, nodes: ComputeNodes) -> list[ExecutedLayer]:
    layers = []
    for node in optimized.graph.node:
        found = nodes.find([node.name, *node.output], derived=True) if node.op_type in _MULTIPLY else None
        layers.append(
            ExecutedLayer(
                name=found or node.name or node.output[0],
                kind=node.op_type,
                precision="i8" if node.op_type in _INTEGER | _INTEGER_ELEMENTWISE else "f32",
                compute=found is not None,
            )
        )
    return layers
