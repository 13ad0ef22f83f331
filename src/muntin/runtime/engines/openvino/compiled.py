"""The compiled forms of a model in OpenVINO's CPU plugin: chosen by a key, the last few kept, others in the user's cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any, Generic, TypeVar

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.engines.compile_cache import CompiledModels
from muntin.runtime.engines.onnx_nodes import ComputeNodes, compute_nodes
from muntin.runtime.engines.openvino.workarounds import computes_with_sizes
from muntin.runtime.host.hardware import disabled_features
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
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

CallForm = TypeVar("CallForm")
"""Key of a compiled form."""


class Compiled:
    """A compiled model and its free inference requests, one for each stream.

    `shape`: of the images, None for a model of free sizes, and for one of named tensors. `kept`: True for a model from the cache.
    """

    def __init__(self, model: Any, shape: tuple[int, ...] | None, streams: int, *, kept: bool) -> None:
        self.model, self.shape = model, shape
        self.kept = kept
        self.free: LifoQueue[Any] = LifoQueue()  # the last request used has its memory in the CPU's caches
        for _ in range(streams):
            self.free.put(model.create_infer_request())

    def __del__(self) -> None:
        with signal_stack_kept():  # a deleted model restores a signal stack, on whichever thread deletes it
            self.__dict__.clear()


class CompiledForms(ABC, Generic[CallForm]):
    """Base of sessions in OpenVINO: a model that is read once, and its compiled forms. `streams` calls compute at a time, others wait."""

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
        self._nodes: ComputeNodes = compute_nodes(data)
        self._dynamic = options.dynamic
        self._lock = Lock()  # guards _compiled and _warmed_up
        self._compiling = Lock()  # held for a whole compilation, so that calls that need none go on
        self._compiled: OrderedDict[CallForm, Compiled] = OrderedDict()
        self._warmed_up: set[CallForm] = set()

    @abstractmethod
    def _prepared(self, form: CallForm) -> Any:
        """A copy of the model to compile for a form."""

    @abstractmethod
    def _key(self, form: CallForm) -> str:
        """The form's name in the cache, which has whatever changes what is compiled."""

    @abstractmethod
    def _words(self, form: CallForm) -> str:
        """Describe what a form is compiled for."""

    @abstractmethod
    def _is_free(self, form: CallForm) -> bool:
        """Returns True for a form of free sizes."""

    def _shape(self, form: CallForm) -> tuple[int, ...] | None:
        """Shape of the images that a form computes; None for free sizes, and for named tensors."""
        return None

    @property
    def from_cache(self) -> bool:
        """True if every compiled model came from the user's cache."""
        with self._lock:
            return bool(self._compiled) and all(compiled.kept for compiled in self._compiled.values())

    def _executed(self, default: CallForm) -> list[ExecutedLayer]:
        """The operations as compiled for the last call; before any call, for `default`."""
        with self._lock:
            last = next(reversed(self._compiled), default)
        return executed_layers(self._compiled_for(last).model.get_runtime_model(), self._nodes)

    def _compiled_for(self, form: CallForm) -> Compiled:
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

    def _find_compiled(self, form: CallForm) -> Compiled | None:
        with self._lock:
            if form in self._compiled:
                self._compiled.move_to_end(form)
            return self._compiled.get(form)

    def _keep(self, form: CallForm, compiled: Compiled) -> None:
        """Keeps a model. Of the static sizes that were not warmed up, the least recently used ones are dropped."""
        with self._lock:
            self._compiled[form] = compiled
            evictable = [other for other in self._compiled if not self._is_free(other) and other not in self._warmed_up]
            dropped = [self._compiled.pop(other) for other in evictable[:-STATIC_SHAPES]]
        del dropped  # outside of the lock: deleting a model takes time

    def _compile(self, form: CallForm) -> Compiled:
        options = self._options_for(form)
        try:
            with signal_stack_kept():
                cached = self._from_cache(form)
                if cached is not None:
                    return Compiled(cached, self._shape(form), self._streams, kept=True)
                compiled = self._core.compile_model(self._prepared(form), "CPU", options)
                if self._cache is not None:
                    with suppress(RuntimeError, MemoryError):  # exporting takes the model's memory once more
                        self._cache.write(self._cache_key(form), compiled.export_model().getvalue())
                return Compiled(compiled, self._shape(form), self._streams, kept=False)
        except RuntimeError as error:
            raise failure(self._path, f"cannot compile it for {self._words(form)}", error) from error

    def _from_cache(self, form: CallForm) -> Any:
        """The model that an earlier process compiled for this form with these options, or None."""
        data = None if self._cache is None else self._cache.read(self._cache_key(form))
        if data is None:
            return None
        try:
            return self._core.import_model(data, "CPU", self._options_for(form))
        except RuntimeError:
            return None

    def _cache_key(self, form: CallForm) -> str:
        return f"{self._key(form)} {sorted(self._options_for(form).items())}"

    def _options_for(self, form: CallForm) -> dict[str, Any]:
        """Options of a compilation: in float32 for free sizes where floats are computed from them."""
        rounds_sizes = self._is_free(form) and self._precision != "f32" and self._computes_with_sizes
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
