"""The ONNX Runtime engine: portable, on its CPU provider, or on a GPU by its CUDA and TensorRT providers.

Float layers run in FP32, or in FP16 in TensorRT; there is no BF16 matrix product on CPUs. On CPUs a QDQ layer runs on integers only
where its pattern fuses (1.32): MatMul always; Conv and Gemm only when their output, after at most a ReLU with zero point 0, is
quantised again directly. `layers()` tells which did.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.engines.compile_cache import compiled_folder, make_room
from muntin.runtime.engines.onnx_nodes import ComputeNodes, compute_nodes
from muntin.runtime.host.quiet_imports import onnxruntime
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import Dims, ExecutedLayer, Named, Session, Shape, check_shapes
from muntin.runtime.tensors import TensorSession, check_dims

states = onnxruntime.capi.onnxruntime_pybind11_state
INTEGER = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul"}
)
# Operations that only move 8-bit values are missing: their types are known after type inference only.
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
    """A provider of ONNX Runtime: the engine's name in muntin, its own name and options, and the precision of its float layers."""

    engine: str
    name: str
    precision: str = "f32"
    options: Mapping[str, str] = field(default_factory=dict)


TENSORRT = "TensorrtExecutionProvider"
CPU = Provider(engine="onnxruntime", name="CPUExecutionProvider")


class _Opened:
    """Base of sessions in ONNX Runtime. Threads may call one at the same time; `streams` is the number of calls in flight in `map`."""

    def __init__(self, artifact: Artifact, provider: Provider, options: SessionOptions) -> None:
        self._artifact = artifact
        self._provider = provider
        self._threads = options.thread_count
        self._streams = min(options.streams, self._threads)
        # One pool of threads for all calls; each call also computes on the thread that makes it. Together these are `threads`.
        self._session = self._open(artifact.model_bytes(), session_options(self._threads - self._streams + 1))
        self._inputs = [item.name for item in self._session.get_inputs()]

    def _open(self, data: bytes, options: Any) -> Any:
        session = open_model(self._artifact, data, options, self._provider)
        used = session.get_providers()[0]
        if used != self._provider.name:  # ONNX Runtime falls back to the CPU and only logs it
            raise DependencyError(
                f'engine="{self._provider.engine}": ONNX Runtime has the {self._provider.name} and could not start it (it would use '
                f"{used}): check the GPU's driver and that its CUDA, cuDNN and TensorRT are the versions that onnxruntime-gpu "
                f"{onnxruntime.__version__} was built for"
            )
        return session

    @property
    def _compiles(self) -> bool:
        """True if the provider compiles for a size; that of CPUs does not."""
        return self._provider.name != CPU.name

    def layers(self) -> list[ExecutedLayer]:
        """Reads the optimised graph, which a second session writes to a temporary file: takes as long as opening. Empty for TensorRT,
        whose compiled model cannot be written as a graph."""
        if self._provider.name == TENSORRT:
            return []
        data = self._artifact.model_bytes()
        return _executed(optimized_model(lambda options: self._open(data, options), session_options(self._threads)), compute_nodes(data))


class OnnxRuntimeSession(_Opened, Session):
    """An image model in ONNX Runtime."""

    def __init__(self, artifact: Artifact, provider: Provider, options: SessionOptions) -> None:
        _Opened.__init__(self, artifact, provider, options)
        if len(self._inputs) != 1:
            raise ArtifactError(
                f"{artifact.path}: its model takes {self._inputs} where images alone are allowed: export the artefact again"
            )
        self._input = self._inputs[0]
        Session.__init__(
            self,
            signature=artifact.picture,
            engine=provider.engine,
            precision=provider.precision,
            threads=self._threads,
            streams=self._streams,
        )

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            scores: NDArray[np.float32] = self._session.run(None, {self._input: images_BHWC})[0]
        except FAILURES as error:
            raise failure(self._artifact, f"cannot compute images of shape {images_BHWC.shape}", error) from error
        return scores

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        if compute or self._compiles:
            super().warm_up(shapes, labels=labels)
        else:
            check_shapes(shapes, self.signature.sizes)


class OnnxRuntimeTensorSession(_Opened, TensorSession):
    """A model with named tensors in ONNX Runtime."""

    def __init__(self, artifact: Artifact, provider: Provider, options: SessionOptions) -> None:
        _Opened.__init__(self, artifact, provider, options)
        signature = artifact.manifest.signature.tensors
        TensorSession.__init__(
            self,
            signature=signature,
            engine=provider.engine,
            precision=provider.precision,
            threads=self._threads,
            streams=self._streams,
        )
        for kind, names, specs in (
            ("inputs", self._inputs, signature.inputs),
            ("outputs", [item.name for item in self._session.get_outputs()], signature.outputs),
        ):
            if sorted(names) != sorted(spec.name for spec in specs):
                own = ", ".join(spec.name for spec in specs)
                raise ArtifactError(f"{artifact.path}: the model's {kind} are {names}, its signature's {own}: export the artefact again")

    def _infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        try:
            values = self._session.run(list(outputs), inputs)
        except FAILURES as error:
            shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in inputs.items())
            raise failure(self._artifact, f"cannot compute {shapes}", error) from error
        return dict(zip(outputs, values, strict=True))

    def warm_up(self, dims: Iterable[Mapping[str, int] | Dims], *, compute: bool = True) -> None:
        checked = check_dims(dims, self.signature)
        if compute or self._compiles:
            super().warm_up(checked)


def _session(artifact: Artifact, provider: Provider, options: SessionOptions) -> OnnxRuntimeSession | OnnxRuntimeTensorSession:
    if artifact.manifest.named is not None:
        return OnnxRuntimeTensorSession(artifact, provider, options)
    return OnnxRuntimeSession(artifact, provider, options)


def open_onnxruntime(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OnnxRuntimeSession | OnnxRuntimeTensorSession:
    """Opens an artefact in ONNX Runtime on the CPU, in f32. Raises DependencyError for a 16-bit precision."""
    check_precision(options.precision, ("f32",), "on CPUs")
    return _session(artifact, CPU, options)


def open_cuda(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OnnxRuntimeSession | OnnxRuntimeTensorSession:
    """Opens an artefact on a GPU by the CUDA provider: all layers in f32 (no TF32), since it has no integer kernels for quantised ones.
    Raises DependencyError without onnxruntime-gpu or a GPU."""
    provider = Provider(engine="onnxruntime-cuda", name="CUDAExecutionProvider", options={"use_tf32": "0"})
    check_precision(options.precision, ("f32",), "in its CUDA provider for an FP32 graph")
    _require(provider)
    return _session(artifact, provider, options)


def open_tensorrt(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OnnxRuntimeSession | OnnxRuntimeTensorSession:
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
    return _session(artifact, provider, options)


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


def session_options(threads: int) -> Any:
    """ONNX Runtime's options: failures are raised, not logged."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def open_model(artifact: Artifact, data: bytes, options: Any, provider: Provider = CPU) -> Any:
    """Opens a model in one provider. Raises ArtifactError."""
    onnxruntime.disable_telemetry_events()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=[(provider.name, dict(provider.options))])
    except FAILURES as error:
        raise failure(artifact, "cannot open its model", error) from error
    session.disable_fallback()  # otherwise a failing call would move the session to the CPU for good
    return session


def optimized_model(open_: Callable[[Any], Any], options: Any) -> onnx.ModelProto:
    """The graph that ONNX Runtime executes: `open_(options)` writes it to a temporary file."""
    with tempfile.TemporaryDirectory(prefix="muntin-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        open_(options)
        return onnx.load(options.optimized_model_filepath)


def failure(artifact: Artifact, what: str, error: Exception) -> ArtifactError:
    """The ArtifactError for an error of ONNX Runtime."""
    return ArtifactError(f"{artifact.path}: ONNX Runtime {onnxruntime.__version__} {what}: {' '.join(str(error).split())}")


def _executed(optimized: onnx.ModelProto, nodes: ComputeNodes) -> list[ExecutedLayer]:
    layers = []
    for node in optimized.graph.node:
        name = nodes.find([node.name, *node.output], derived=True) if node.op_type in MULTIPLY else None
        layers.append(
            ExecutedLayer(
                name=name or node.name or node.output[0],
                kind=node.op_type,
                precision="i8" if node.op_type in INTEGER | INTEGER_ELEMENTWISE else "f32",
                compute=name is not None,
            )
        )
    return layers
