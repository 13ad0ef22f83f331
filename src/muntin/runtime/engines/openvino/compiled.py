"""The compiled forms of a model in OpenVINO's CPU plugin: the last few are kept, others lie in the user's cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any, NamedTuple

from muntin.artifact import Artifact, Signature
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.engines.compile_cache import CompiledModels
from muntin.runtime.engines.onnx_nodes import ComputeNodes, compute_nodes
from muntin.runtime.engines.openvino.output_fusion import ending_in_labels, ending_in_scores
from muntin.runtime.engines.openvino.workarounds import computes_with_sizes, with_biases, with_whole_masks
from muntin.runtime.host.hardware import disabled_features
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.inputs import SCORES, Dims
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import STATIC_SHAPES, ExecutedLayer

OPENVINO_PRECISIONS = {"u8": "i8", "f16": "f16", "bf16": "bf16", "f32": "f32", "i8": "i8"}
"""OpenVINO's name of an element type -> the precision of an `ExecutedLayer`."""
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""Precision -> the capability that a CPU needs for it."""
MULTIPLY = frozenset({"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"})
"""Layer types that multiply."""
MAY_MULTIPLY = frozenset({"Subgraph", "MHA", "ScaledDotProductAttention"})
"""Layer types that multiply if they fuse attention: they count only for nodes that they name."""
_PLAIN_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution"})
_LEFT_OUT = frozenset({"Const", "Input", "Output"})
_RUNTIME_INFO = frozenset({"layerType", "originalLayersNames", "runtimePrecision", "primitiveType", "outputLayouts"})


class CompiledForm(NamedTuple):
    """A form of the model: for these sizes of the free dimensions (None: free ones, one row), ending in scores or in labels."""

    dims: Dims | None
    labels: bool = False


FREE = CompiledForm(None)


class Compiled:
    """A compiled model and its free inference requests, one for each stream. `kept`: True for a model from the cache."""

    def __init__(self, model: Any, streams: int, *, kept: bool) -> None:
        self.model, self.kept = model, kept
        self.free: LifoQueue[Any] = LifoQueue()  # the last request used has its memory in the CPU's caches
        for _ in range(streams):
            self.free.put(model.create_infer_request())

    def __del__(self) -> None:
        with signal_stack_kept():  # a deleted model restores a signal stack, on whichever thread deletes it
            self.__dict__.clear()


class CompiledForms:
    """Base of the session: a model that is read once, and its compiled forms. `streams` calls compute at a time, others wait."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        self._core = openvino.Core()
        self._precision = choose_precision(self._core, options.precision, artifact.manifest.precision)
        data = artifact.model_bytes()
        self._threads = options.thread_count
        self._streams = min(options.streams, self._threads)
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": self._threads,
            "PERFORMANCE_HINT": "LATENCY" if options.streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": self._streams,
        }
        self._cache = CompiledModels("openvino", openvino.__version__, artifact.manifest.sha256) if options.cache else None
        try:
            self._model = self._core.read_model(model=data, weights=b"")
        except RuntimeError as error:
            raise failure(artifact.path, "cannot read its model", error) from error
        self._path = artifact.path
        signature = artifact.manifest.signature
        self._described: Any = signature
        images = isinstance(signature, Signature)
        outputs = SCORES if images else [spec.name for spec in signature.tensors.outputs]
        self._ports = self._positions(self._model.inputs, [spec.name for spec in signature.tensors.inputs], "inputs")
        self._answers = self._positions(self._model.outputs, outputs, "outputs")
        if images:
            self._answers["labels"] = 0  # of the form that ends in labels
        self._nodes: ComputeNodes = compute_nodes(data)
        self._dynamic = options.dynamic
        self._lock = Lock()  # guards _compiled and _warmed_up
        self._compiling = Lock()  # held for a whole compilation, so that calls that need none go on
        self._compiled: OrderedDict[CompiledForm, Compiled] = OrderedDict()
        self._warmed_up: set[CompiledForm] = set()

    def _positions(self, ports: Sequence[Any], names: Sequence[str], kind: str) -> dict[str, int]:
        """Position of each input or output of the signature in the model. An input that nothing reads has none."""
        positions = {name: index for name in names for index, port in enumerate(ports) if name in port.get_names()}
        if len(positions) < len(ports if kind == "inputs" else names):
            given = ", ".join("/".join(sorted(port.get_names())) for port in ports)
            raise ArtifactError(
                f"{self._path}: the model's {kind} are {given}, its signature's {', '.join(names)}: export the artefact again"
            )
        return positions

    def _prepared(self, form: CompiledForm) -> Any:
        """A copy of the model to compile for a form."""
        model = self._model.clone()
        if form.labels:
            self._check_classes()
            model = ending_in_labels(model, self._described.label_type)
        elif isinstance(self._described, Signature):
            model = ending_in_scores(model)
        shapes = self._described.tensors.input_shapes(self._described.row if form.dims is None else dict(form.dims))
        model.reshape({model.inputs[index]: list(shapes[name]) for name, index in self._ports.items()})
        if form.dims is None:
            model = with_biases(model)
        return model if self._precision == "f32" else with_whole_masks(model)

    def _check_classes(self) -> None:
        """Raises ArtifactError unless the model gives the signature's number of classes, which labels would not show."""
        shape, classes = self._model.output(0).partial_shape, self._described.outputs
        if shape.rank.is_dynamic or shape.rank.get_length() < 2 or shape[1].is_dynamic or shape[1].get_length() != classes:
            raise ArtifactError(
                f"{self._path}: the model gives {shape} where its signature says {classes} classes: export the artefact again"
            )

    def _key(self, form: CompiledForm) -> str:
        """The form's name in the cache, which has whatever changes what is compiled."""
        ending = "labels before pixels, classes last" if form.labels else "pixels in one pass"
        masks = "" if self._precision == "f32" else " whole masks"
        return f"{'one row, free biases' if form.dims is None else form.dims} {ending}{masks}"

    def _words(self, form: CompiledForm) -> str:
        return "free sizes" if form.dims is None else ", ".join(f"{name} {size}" for name, size in form.dims) or "its only sizes"

    @property
    def from_cache(self) -> bool:
        """True if every compiled model came from the user's cache."""
        with self._lock:
            return bool(self._compiled) and all(compiled.kept for compiled in self._compiled.values())

    def _executed(self, default: CompiledForm) -> list[ExecutedLayer]:
        """The operations as compiled for the last call; before any call, for `default`."""
        with self._lock:
            last = next(reversed(self._compiled), default)
        return executed_layers(self._compiled_for(last).model.get_runtime_model(), self._nodes)

    def _compiled_for(self, form: CompiledForm) -> Compiled:
        """The model of a form, compiled now if it is not there."""
        compiled = self._find_compiled(form)
        if compiled is not None:
            return compiled
        with self._compiling:
            compiled = self._find_compiled(form)  # another thread may have compiled it meanwhile
            if compiled is None:
                compiled = self._compile(form)
                self._keep(form, compiled)
        return compiled

    def _find_compiled(self, form: CompiledForm) -> Compiled | None:
        with self._lock:
            if form in self._compiled:
                self._compiled.move_to_end(form)
            return self._compiled.get(form)

    def _keep(self, form: CompiledForm, compiled: Compiled) -> None:
        """Keeps a model. Of the static sizes that were not warmed up, the least recently used ones are dropped."""
        with self._lock:
            self._compiled[form] = compiled
            evictable = [other for other in self._compiled if other.dims is not None and other not in self._warmed_up]
            dropped = [self._compiled.pop(other) for other in evictable[:-STATIC_SHAPES]]
        del dropped  # outside of the lock: deleting a model takes time

    def _compile(self, form: CompiledForm) -> Compiled:
        options = self._options_for(form)
        try:
            with signal_stack_kept():
                cached = self._from_cache(form)
                if cached is not None:
                    return Compiled(cached, self._streams, kept=True)
                compiled = self._core.compile_model(self._prepared(form), "CPU", options)
                if self._cache is not None:
                    with suppress(RuntimeError, MemoryError):  # exporting takes the model's memory once more
                        self._cache.write(self._cache_key(form), compiled.export_model().getvalue())
                return Compiled(compiled, self._streams, kept=False)
        except RuntimeError as error:
            raise failure(self._path, f"cannot compile it for {self._words(form)}", error) from error

    def _from_cache(self, form: CompiledForm) -> Any:
        """The model that an earlier process compiled for this form with these options, or None."""
        data = None if self._cache is None else self._cache.read(self._cache_key(form))
        if data is None:
            return None
        try:
            return self._core.import_model(data, "CPU", self._options_for(form))
        except RuntimeError:
            return None

    def _cache_key(self, form: CompiledForm) -> str:
        return f"{self._key(form)} {sorted(self._options_for(form).items())}"

    def _options_for(self, form: CompiledForm) -> dict[str, Any]:
        """Options of a compilation: in float32 for free sizes where floats are computed from them."""
        rounds_sizes = form.dims is None and self._precision != "f32" and self._computes_with_sizes
        return {**self._options, "INFERENCE_PRECISION_HINT": "f32"} if rounds_sizes else self._options

    @cached_property
    def _computes_with_sizes(self) -> bool:
        return computes_with_sizes(self._model)


def capabilities(core: Any) -> tuple[str, ...]:
    """The numbers that OpenVINO computes in here, such as "FP32", "BF16", "INT8". It would name BF16 where AVX-512 is disabled."""
    without = {"BF16"} if "avx512f" in disabled_features() else set()
    return tuple(one for one in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") if one not in without)


def choose_precision(core: Any, requested: str, recorded: str) -> str:
    """The precision of float layers. Raises DependencyError for a requested one that the CPU lacks."""
    available = capabilities(core)
    if requested == "recorded":
        return recorded if _CAPABILITIES[recorded] in available else "f32"
    if _CAPABILITIES[requested] not in available:
        raise DependencyError(
            f'precision="{requested}": this CPU has no {_CAPABILITIES[requested]} (it has {", ".join(available)}): '
            'ask for "recorded", or for "f32"'
        )
    return requested


def layer_info(op: Any) -> dict[str, str]:
    """Information on an operation of a compiled model: its type, origins, precision, implementation and layouts, by OpenVINO's keys."""
    return {key: str(value.astype(str)) for key, value in op.get_rt_info().items() if key in _RUNTIME_INFO}


def executed_layers(runtime_model: Any, nodes: ComputeNodes) -> list[ExecutedLayer]:
    """The operations of a compiled model and their precisions."""
    layers: list[ExecutedLayer] = []
    seen: dict[str, int] = {}
    for op in runtime_model.get_ordered_ops():
        info = layer_info(op)
        kind = info.get("layerType", op.get_type_name())
        if kind in _LEFT_OUT:
            continue
        originals = [name for name in info.get("originalLayersNames", "").split(",") if name]
        multiplies = kind in MULTIPLY
        node = nodes.find(originals, derived=multiplies) if multiplies or kind in MAY_MULTIPLY else None
        if node is None and multiplies and op.get_input_size() > 1:  # a MatMul may lose its name in a fusion; its weight keeps it
            node = nodes.find([op.input_value(1).get_node().get_friendly_name()], derived=True)
        precision = info.get("runtimePrecision", "")
        layer = ExecutedLayer(
            name=node or (originals[0] if originals else op.get_friendly_name()),
            kind=kind,
            precision=OPENVINO_PRECISIONS.get(precision, precision),
            compute=node is not None,
        )
        if node is not None and node in seen:  # a fused neighbour may keep the node's name: the layer that multiplies counts
            if multiplies and layers[seen[node]].kind not in MULTIPLY:
                layers[seen[node]] = layer
            continue
        if node is not None:
            seen[node] = len(layers)
        layers.append(layer)
    return layers


def executed_products(runtime_model: Any) -> dict[str, str]:
    """The products of a compiled model: the engine's name of the kernel -> OpenVINO's name of its precision."""
    infos = {str(op.get_friendly_name()): layer_info(op) for op in runtime_model.get_ordered_ops()}
    return {name: info["runtimePrecision"] for name, info in infos.items() if info.get("layerType") in _PLAIN_PRODUCTS}


def failure(path: Path, what: str, error: RuntimeError | MemoryError) -> ArtifactError:
    """The ArtifactError for an error of OpenVINO: its message in one line, without the source locations that it starts with."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check 'false' failed")))[:600]
    return ArtifactError(f"{path}: OpenVINO {openvino.__version__} {what}: {text}")
