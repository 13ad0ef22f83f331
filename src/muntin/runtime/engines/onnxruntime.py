"""The ONNX Runtime engine: portable, on its CPU provider, or on a GPU by its CUDA and TensorRT providers.

Float layers run in FP32, or in FP16 in TensorRT; there is no BF16 matrix product on CPUs. On CPUs a QDQ layer runs on integers only
where its pattern fuses (1.32): MatMul always; Conv and Gemm only when their output, after at most a ReLU with zero point 0, is
quantised again directly. `layers()` tells which did.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.engines.compile_cache import compiled_folder, make_room
from muntin.runtime.engines.onnx_nodes import ComputeNodes, compute_nodes
from muntin.runtime.host.quiet_imports import onnxruntime
from muntin.runtime.inputs import LABELS, SCORES, Dims, Named
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import ExecutedLayer, Session

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


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime. Threads may call it at the same time; `streams` is the number of calls in flight in `map`."""

    def __init__(self, artifact: Artifact, provider: Provider, options: SessionOptions) -> None:
        threads, signature = options.thread_count, artifact.manifest.signature
        streams = min(options.streams, threads)
        super().__init__(signature=signature, engine=provider.engine, precision=provider.precision, threads=threads, streams=streams)
        self._artifact, self._provider = artifact, provider
        # One pool of threads for all calls; each call also computes on the thread that makes it. Together these are `threads`.
        self._session = self._open(artifact.model_bytes(), session_options(threads - streams + 1))
        outputs = SCORES if self.images else [spec.name for spec in self.tensors.outputs]
        for kind, given, names in (
            ("inputs", self._session.get_inputs(), [spec.name for spec in self.tensors.inputs]),
            ("outputs", self._session.get_outputs(), outputs),
        ):
            if sorted(found := [item.name for item in given]) != sorted(names):
                raise ArtifactError(
                    f"{artifact.path}: the model's {kind} are {found}, its signature's {', '.join(names)}: export the artefact again"
                )

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

    def _infer(self, inputs: Named, dims: Dims, outputs: tuple[str, ...]) -> Named:
        if outputs == LABELS and self.images:
            return self._labels_of_scores(inputs, dims)
        try:
            values = self._session.run(outputs, inputs)
        except FAILURES as error:
            shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in inputs.items())
            raise failure(self._artifact, f"cannot compute {shapes}", error) from error
        return dict(zip(outputs, values, strict=True))

    def prepare(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        # the provider of GPUs compiles for a size when it computes it, that of CPUs does not
        super().prepare(dims, outputs, compute=compute or self._provider.name != CPU.name)

    def layers(self) -> list[ExecutedLayer]:
        """Reads the optimised graph, which a second session writes to a temporary file: takes as long as opening. Empty for TensorRT,
        whose compiled model cannot be written as a graph."""
        if self._provider.name == TENSORRT:
            return []
        data = self._artifact.model_bytes()
        return _executed(optimized_model(lambda options: self._open(data, options), session_options(self.threads)), compute_nodes(data))


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
