"""The ONNX Runtime engine: portable, on its CPU provider, or on a GPU by its CUDA and TensorRT providers.

Float layers run in FP32, in TensorRT in FP16 if asked for: it has no BF16 matrix product on CPUs. On CPUs a QDQ layer runs on integers only
where its pattern fuses (seen with 1.32): MatMul always; Conv and Gemm only when their output, after at most a ReLU with zero point 0, is
quantised again at once. `layers()` says what did.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.cache import compiled_folder, make_room
from muntin.runtime.graph import ComputeNodes, compute_nodes
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.quiet import onnxruntime
from muntin.runtime.session import ExecutedLayer, Session, Shape, check_shapes

states = onnxruntime.capi.onnxruntime_pybind11_state
INTEGER = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul"}
)
# Not quantised, but no float either: what only moves 8-bit values would need type inference to tell, so it is not claimed.
INTEGER_ELEMENTWISE = frozenset({"QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool"})
MULTIPLY = frozenset({"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}) | INTEGER
FAILURES = (
    states.Fail,
    states.InvalidGraph,
    states.InvalidArgument,
    states.NotImplemented,
    states.RuntimeException,
    states.InvalidProtobuf,
    states.EPFail,
)


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where ONNX Runtime computes: the engine's name in muntin, the provider's name and options, and what its float layers run in."""

    engine: str
    name: str
    precision: str = "f32"
    options: Mapping[str, str] = field(default_factory=dict)


TENSORRT = "TensorrtExecutionProvider"
CPU = Provider(engine="onnxruntime", name="CPUExecutionProvider")


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime. Threads may call it at the same time; `streams` is how many `map` has in flight."""

    def __init__(self, artifact: Artifact, provider: Provider, options: SessionOptions) -> None:
        self._artifact = artifact
        self._provider = provider
        threads = options.thread_count
        streams = min(options.streams, threads)
        # One pool for all calls, of one worker less than this; each call computes on the thread that makes it, too: `threads` together.
        self._session = self._open(artifact.model_bytes(), _options(threads - streams + 1))
        names = [item.name for item in self._session.get_inputs()]
        if len(names) != 1:
            raise ArtifactError(f"{artifact.path}: its model takes {names} where images alone are allowed: export the artefact again")
        self._input = names[0]
        super().__init__(
            signature=artifact.manifest.signature,
            engine=provider.engine,
            precision=provider.precision,
            threads=threads,
            streams=streams,
            plan=artifact.manifest.plan,
        )

    def _open(self, data: bytes, options: Any) -> Any:
        session = _open(self._artifact, data, options, self._provider)
        used = session.get_providers()[0]
        if used != self._provider.name:  # it goes on with the CPU, and only logs that it does
            raise DependencyError(
                f'engine="{self._provider.engine}": ONNX Runtime has the {self._provider.name} and could not start it (it would use '
                f"{used}): check the GPU's driver and that its CUDA, cuDNN and TensorRT are the versions that onnxruntime-gpu "
                f"{onnxruntime.__version__} was built for"
            )
        return session

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            scores: NDArray[np.float32] = self._session.run(None, {self._input: images_BHWC})[0]
        except FAILURES as error:
            raise ArtifactError(
                f"{self._artifact.path}: ONNX Runtime {onnxruntime.__version__} cannot compute images of shape {images_BHWC.shape}: "
                f"{' '.join(str(error).split())}"
            ) from error
        return scores

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        if compute or self._provider.name != CPU.name:  # on the CPU nothing is compiled for a size
            super().warm_up(shapes, labels=labels)
        else:
            check_shapes(shapes)

    def layers(self) -> list[ExecutedLayer]:
        """Read from the optimised graph, which a second session writes to a temporary file: takes as long as opening. None of TensorRT,
        which has no such graph."""
        if self._provider.name == TENSORRT:  # what it has compiled cannot be written as a graph
            return []
        data = self._artifact.model_bytes()
        with tempfile.TemporaryDirectory(prefix="muntin-") as folder:
            file = Path(folder) / "optimized.onnx"
            options = _options(self.threads)
            options.optimized_model_filepath = str(file)
            self._open(data, options)
            optimized = onnx.load(str(file))
        return _executed(optimized, compute_nodes(data))


def open_onnxruntime(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OnnxRuntimeSession:
    """Opens an artefact in ONNX Runtime on the CPU, in f32. Raises DependencyError for a 16-bit precision."""
    check_precision(options.precision, ("f32",), "on CPUs")
    return OnnxRuntimeSession(artifact, CPU, options)


def open_cuda(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OnnxRuntimeSession:
    """Opens an artefact on a GPU by the CUDA provider: all layers in f32 (no TF32), since it has no integer kernels for quantised ones.
    Raises DependencyError without onnxruntime-gpu or a GPU."""
    provider = Provider(engine="onnxruntime-cuda", name="CUDAExecutionProvider", options={"use_tf32": "0"})
    check_precision(options.precision, ("f32",), "in its CUDA provider for an FP32 graph")
    _require(provider)
    return OnnxRuntimeSession(artifact, provider, options)


def open_tensorrt(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OnnxRuntimeSession:
    """Opens an artefact on a GPU by the TensorRT provider: quantised layers in INT8, float ones in f16 ("recorded": if a 16-bit type was)
    or f32. Raises DependencyError without onnxruntime-gpu, TensorRT or a GPU."""
    check_precision(options.precision, ("f32", "f16"), "in its TensorRT provider")
    recorded = "f32" if artifact.manifest.precision == "f32" else "f16"
    precision = recorded if options.precision == "recorded" else options.precision
    quantised = any(record.activation_bits for record in artifact.manifest.layers)
    settings = {"trt_fp16_enable": str(int(precision == "f16")), "trt_int8_enable": str(int(quantised))}
    provider = Provider(engine="onnxruntime-tensorrt", name=TENSORRT, precision=precision, options=settings)
    _require(provider)
    folder = compiled_folder("tensorrt", onnxruntime.__version__, artifact.manifest.sha256) if options.cache else None
    if folder is not None:
        make_room(folder)
        settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
    return OnnxRuntimeSession(artifact, provider, options)


def check_precision(precision: str, allowed: tuple[str, ...], where: str) -> None:
    """Raises DependencyError unless `precision` is "recorded" or one of `allowed`."""
    if precision not in ("recorded", *allowed):
        raise DependencyError(
            f'precision="{precision}": ONNX Runtime has no {precision} kernels {where}: ask for "recorded" or '
            f'{" or ".join(allowed)}, or engine="openvino"'
        )


def _require(provider: Provider) -> None:
    available = onnxruntime.get_available_providers()
    if provider.name not in available:
        raise DependencyError(
            f'engine="{provider.engine}" needs the {provider.name}, and this onnxruntime has {", ".join(available)}: on a machine with '
            "a CUDA GPU, pip uninstall onnxruntime, then pip install onnxruntime-gpu (one in place of the other)"
        )


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions, and as one line of ours
    return options


def _open(artifact: Artifact, data: bytes, options: Any, provider: Provider) -> Any:
    onnxruntime.disable_telemetry_events()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=[(provider.name, dict(provider.options))])
    except FAILURES as error:
        text = " ".join(str(error).split())
        raise ArtifactError(f"{artifact.path}: ONNX Runtime {onnxruntime.__version__} cannot open its model: {text}") from error
    session.disable_fallback()  # a call that fails would move the session to the CPU for good, and say so on standard output alone
    return session


def _executed(optimized: onnx.ModelProto, nodes: ComputeNodes) -> list[ExecutedLayer]:
    layers = []
    for node in optimized.graph.node:
        found = nodes.find([node.name, *node.output], derived=True) if node.op_type in MULTIPLY else None
        layers.append(
            ExecutedLayer(
                name=found or node.name or node.output[0],
                kind=node.op_type,
                precision="i8" if node.op_type in INTEGER | INTEGER_ELEMENTWISE else "f32",
                compute=found is not None,
            )
        )
    return layers
