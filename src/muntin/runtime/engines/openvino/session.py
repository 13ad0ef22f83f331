"""The OpenVINO engine: integer kernels for QDQ layers, BF16 or FP16 for the others where the CPU has it.

The graph has dynamic sizes, but a kernel compiled for one size is faster. So each size is compiled when it is first called, in a few tenths
of a second, and the last few are kept. With `dynamic` only the sizes that `warm_up` names are compiled; one model for one image of any size
computes all others, image by image. (In 16 bits that model runs in float32 where it computes floats from its image's sides.) An artefact of
one size needs no such model: its images are computed by models of that size, in the batches that `warm_up` names. Compiled models are also
kept in the user's cache (`engines.compile_cache`).

With one stream all threads work on one image: the lowest latency. With several, each works on an image of its own with its share of the
threads: more images a second, each with a higher latency.

A QDQ graph runs on integers (OpenVINO 2026.4) with: weights in symmetric int8 (uint8 with a zero point runs in float), a Linear's input of
rank 2 or 3 (at rank 4 its bias, activation and requantisation become a pass of their own), and no quantiser of scale 1 and zero point 0 on
the uint8 image (it is removed as a no-op, and its layer runs in float).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.engines.compile_cache import CompiledModels
from muntin.runtime.engines.onnx_nodes import ComputeNodes, compute_nodes
from muntin.runtime.engines.openvino.output_fusion import ending_in_labels, ending_in_scores
from muntin.runtime.engines.openvino.workarounds import computes_with_sizes, with_biases, with_whole_masks
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import STATIC_SHAPES, ExecutedLayer, Labels, Session, Shape, check_shapes

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

# With free sizes OpenVINO 2026.4 may return without an answer and without an error where it cannot allocate what a size needs. The memory
# would then hold another answer. So both ends of an answer are marked with values that no model gives: the highest value of a label's type
# is no class, and this NaN comes from no computation.
_NO_SCORE = 0x7FC0BEEF

InputShape = tuple[int, ...]
Variant = tuple[InputShape | None, bool]
"""One compiled form of the model: its input shape (None: dynamic sizes), and True if it ends in labels instead of scores."""


class _Compiled:
    """A compiled model and its free inference requests, one for each stream.

    `shape`: None for one image of any size. `kept`: True for a model from the cache.
    """

    def __init__(self, model: Any, shape: InputShape | None, streams: int, *, kept: bool) -> None:
        self.model, self.shape = model, shape
        self.kept = kept
        self.free: LifoQueue[Any] = LifoQueue()  # the last request used has its memory in the CPU's caches
        for _ in range(streams):
            self.free.put(model.create_infer_request())

    def __del__(self) -> None:
        with signal_stack_kept():  # a deleted model restores a signal stack, on whichever thread deletes it
            self.__dict__.clear()


class OpenVinoSession(Session):
    """A model in OpenVINO's CPU plugin. `streams` calls compute at a time, further ones wait."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        self._core = openvino.Core()
        precision = choose_precision(self._core, options.precision, artifact.manifest.precision)
        data = artifact.model_bytes()
        threads = options.thread_count
        streams = min(options.streams, threads)
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY" if options.streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": streams,
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
        self._retrying = Lock()  # held by one retry at a time
        self._compiling = Lock()  # held for a whole compilation, so that calls that need none go on
        self._compiled: OrderedDict[Variant, _Compiled] = OrderedDict()
        self._warmed_up: set[Variant] = set()
        signature = artifact.manifest.signature
        self._input_sides: InputShape = (*signature.sizes.dims, signature.channels)
        """(H, W, C) of the model's input, -1 where it is free."""
        self._warm_sides: set[InputShape] = {self._input_sides} if signature.sizes.fixed else set()
        """(H, W, C) of the images in `_warmed_up`, or of an artefact of one size."""
        super().__init__(
            signature=signature,
            engine="openvino",
            precision=precision,
            threads=threads,
            streams=streams,
        )

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores = self.outputs.take(self.signature.scores_shape(*images_BHWC.shape[:3]), np.float32)
        self._run(images_BHWC, scores, labels=False)
        return scores

    def _infer_labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        B, _, *sides = self.signature.scores_shape(*images_BHWC.shape[:3])
        labels = self.outputs.take((B, *sides), self.signature.label_type)
        self._run(images_BHWC, labels, labels=True)
        return labels

    def _run(self, images_BHWC: NDArray[np.uint8], answer: NDArray[Any], *, labels: bool) -> None:
        first = 0
        for rows in self._batches(images_BHWC.shape, labels=labels):
            part = slice(first, first + rows)
            self._run_batch(images_BHWC[part], answer[part], labels=labels)
            first += rows

    def _batches(self, shape: InputShape, *, labels: bool) -> list[int]:
        """Rows of the calls that compute a batch of this shape.

        With `dynamic`, images of a size that was warmed up are computed by models of that size only, in any batch and for any output: the
        model of dynamic sizes rounds differently.
        """
        rows, sides = shape[0], shape[1:]
        if not self._dynamic or sides not in self._warm_sides or (shape, labels) in self._compiled:
            return [rows]
        with self._lock:
            compiled = {other[0] for other, ending in self._compiled if other is not None and other[1:] == sides and ending == labels}
        batches = []
        while rows:
            batches.append(max((number for number in compiled if number <= rows), default=1))
            rows -= batches[-1]
        return batches

    def _run_batch(self, images_BHWC: NDArray[np.uint8], answer: NDArray[Any], *, labels: bool) -> None:
        shape = images_BHWC.shape
        compiled = self._compiled_for((shape, labels), new=not self._dynamic or shape[1:] in self._warm_sides)
        request = compiled.free.get()
        try:
            self._compute(compiled, request, images_BHWC, answer)
        except (RuntimeError, MemoryError) as error:
            # With dynamic sizes a call that computes at the same time may have caused this failure.
            others = compiled.free.qsize() < self.streams - 1
            if compiled.shape is not None or (self._drop(compiled) and not others):
                raise failure(self._path, f"cannot compute images of shape {images_BHWC.shape}", error) from error
        else:
            return
        finally:
            compiled.free.put(request)
        self._retry(images_BHWC, answer, labels=labels)

    def _retry(self, images_BHWC: NDArray[np.uint8], answer: NDArray[Any], *, labels: bool) -> None:
        """Computes once more, on a new model of dynamic sizes that no other call uses."""
        variant: Variant = (None, labels)
        with self._retrying:
            compiled = self._compile(variant)
            request = compiled.free.get()
            try:
                self._compute(compiled, request, images_BHWC, answer)
            except (RuntimeError, MemoryError) as error:
                raise failure(self._path, f"cannot compute images of shape {images_BHWC.shape}", error) from error
            compiled.free.put(request)
            if self._find_compiled(variant) is None:
                self._keep(variant, compiled)

    def _compute(self, compiled: _Compiled, request: Any, images_BHWC: NDArray[np.uint8], answer: NDArray[Any]) -> None:
        """Nothing is copied: the engine reads the images and writes the answer where they lie."""
        dynamic = compiled.shape is None
        step = 1 if dynamic else len(images_BHWC)
        for first in range(0, len(images_BHWC), step):
            part = answer[first : first + step]
            self._write_to(request, part)
            scores = part.dtype == np.float32
            flat, mark = (part.reshape(-1).view(np.uint32), _NO_SCORE) if scores else (part.reshape(-1), np.iinfo(part.dtype).max)
            if dynamic:
                flat[0] = flat[-1] = mark
            request.infer([images_BHWC[first : first + step]], share_inputs=True, share_outputs=True)
            if dynamic and (shape := tuple(request.get_output_tensor(0).shape)) != part.shape:
                raise self._wrong_output(shape, part)  # of a smaller output, the rest of the answer was not written
            if dynamic and mark in (flat[0], flat[-1]):
                raise MemoryError("it returned without an answer, as it does where it cannot allocate what a size needs: out of memory")

    def _drop(self, compiled: _Compiled) -> bool:
        """Drops a model of dynamic sizes that failed to compute. Returns False if another call has dropped it.

        After a failure OpenVINO 2026.4 also refuses the size before it until another size comes.
        """
        with self._lock:
            variant = next((variant for variant, other in self._compiled.items() if other is compiled), None)
            dropped = None if variant is None else self._compiled.pop(variant)
        return dropped is not None

    def _write_to(self, request: Any, answer: NDArray[Any]) -> None:
        try:
            request.set_output_tensor(openvino.Tensor(answer, shared_memory=True))
        except RuntimeError as error:
            raise self._wrong_output(tuple(request.get_output_tensor(0).shape), answer) from error

    def _wrong_output(self, shape: tuple[int, ...], answer: NDArray[Any]) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: the model gives {shape} where its signature says {answer.dtype} {answer.shape}: export the artefact again"
        )

    def layers(self) -> list[ExecutedLayer]:
        """As compiled for the size of the last call; before any call, for dynamic sizes, or for one image of the only size."""
        first: Variant = ((1, *self._input_sides) if self.signature.sizes.fixed else None, False)
        with self._lock:
            last = next(reversed(self._compiled), first)
        compiled = self._compiled_for(last, new=True)
        return _executed(compiled.model.get_runtime_model(), self._nodes)

    @property
    def from_cache(self) -> bool:
        """True if every compiled model came from the user's cache."""
        with self._lock:
            return bool(self._compiled) and all(compiled.kept for compiled in self._compiled.values())

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        shapes = check_shapes(shapes, self.signature.sizes)
        for shape in shapes:
            variant = ((*shape, self.signature.channels), labels)
            with self._lock:
                self._warmed_up.add(variant)
                self._warm_sides.add((*shape[1:], self.signature.channels))
            self._compiled_for(variant, new=True)
        if compute:
            super().warm_up(shapes, labels=labels)

    def _compiled_for(self, variant: Variant, *, new: bool) -> _Compiled:
        """The model for an input shape: compiled now if `new` allows it, otherwise the one of dynamic sizes."""
        compiled = self._find_compiled(variant)
        if compiled is None and not new:
            variant = (None, variant[1])
            compiled = self._find_compiled(variant)
        if compiled is not None:
            return compiled
        with self._compiling:
            compiled = self._find_compiled(variant)  # another thread may have compiled it meanwhile
            if compiled is None:
                compiled = self._compile(variant)
                self._keep(variant, compiled)
        return compiled

    def _find_compiled(self, variant: Variant) -> _Compiled | None:
        with self._lock:
            if variant in self._compiled:
                self._compiled.move_to_end(variant)
            return self._compiled.get(variant)

    def _keep(self, variant: Variant, compiled: _Compiled) -> None:
        """Keeps a model. Of the static shapes that were not warmed up, the least recently used ones are dropped."""
        with self._lock:
            self._compiled[variant] = compiled
            evictable = [other for other in self._compiled if other[0] is not None and other not in self._warmed_up]
            dropped = [self._compiled.pop(other) for other in evictable[:-STATIC_SHAPES]]
        del dropped  # outside of the lock: deleting a model takes time

    def _compile(self, variant: Variant) -> _Compiled:
        shape, labels = variant
        if labels:
            self._check_classes()
        try:
            with signal_stack_kept():
                cached = self._from_cache(variant)
                if cached is not None:
                    return _Compiled(cached, shape, self.streams, kept=True)
                model = (
                    ending_in_labels(self._model.clone(), self.signature.label_type) if labels else ending_in_scores(self._model.clone())
                )
                # One image: with a free batch size, too, OpenVINO 2026.4 computes some networks wrongly (docs/log.md).
                model.reshape([1, *self._input_sides] if shape is None else list(shape))
                if shape is None:
                    model = with_biases(model)
                if self.precision != "f32":
                    model = with_whole_masks(model)
                compiled = self._core.compile_model(model, "CPU", self._options_for(shape))
                if self._cache is not None:
                    with suppress(RuntimeError, MemoryError):  # exporting takes the model's memory once more
                        self._cache.write(self._key(variant), compiled.export_model().getvalue())
                return _Compiled(compiled, shape, self.streams, kept=False)
        except RuntimeError as error:
            size = "dynamic sizes" if shape is None else f"images of shape {shape}"
            raise failure(self._path, f"cannot compile it for {size}", error) from error

    def _check_classes(self) -> None:
        """Raises ArtifactError unless the model gives the signature's number of classes, which labels would not show."""
        shape, classes = self._model.output(0).partial_shape, self.signature.outputs
        if shape.rank.is_dynamic or shape.rank.get_length() < 2 or shape[1].is_dynamic or shape[1].get_length() != classes:
            raise ArtifactError(
                f"{self._path}: the model gives {shape} where its signature says {classes} classes: export the artefact again"
            )

    def _from_cache(self, variant: Variant) -> Any:
        """The model that an earlier process compiled for this shape with these options, or None."""
        data = None if self._cache is None else self._cache.read(self._key(variant))
        if data is None:
            return None
        try:
            return self._core.import_model(data, "CPU", self._options_for(variant[0]))
        except RuntimeError:
            return None

    def _key(self, variant: Variant) -> str:
        shape, labels = variant
        ending = "labels before pixels, classes last" if labels else "pixels in one pass"
        masks = "" if self.precision == "f32" else " whole masks"
        biases = " biases" if shape is None else ""
        return f"{shape or 'one image'} {ending}{masks}{biases} {sorted(self._options_for(shape).items())}"

    def _options_for(self, shape: InputShape | None) -> dict[str, Any]:
        """Options of a compilation: in float32 for dynamic sizes where floats are computed from them."""
        rounds_sizes = shape is None and self.precision != "f32" and self._computes_with_sizes
        return {**self._options, "INFERENCE_PRECISION_HINT": "f32"} if rounds_sizes else self._options

    @cached_property
    def _computes_with_sizes(self) -> bool:
        return computes_with_sizes(self._model)


def open_openvino(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OpenVinoSession:
    """Opens an artefact in OpenVINO on the CPU.

    Precision "recorded" is the manifest's, or f32 on a CPU without it (the session's `.precision` says which). Raises DependencyError for
    another precision that the CPU lacks. A session has at most one stream a thread.
    """
    with signal_stack_kept():
        return OpenVinoSession(artifact, options)


def choose_precision(core: Any, requested: str, recorded: str) -> str:
    """The precision of float layers. Raises DependencyError for a requested one that the CPU lacks."""
    capabilities = tuple(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    if requested == "recorded":
        return recorded if _CAPABILITIES[recorded] in capabilities else "f32"
    if _CAPABILITIES[requested] not in capabilities:
        raise DependencyError(
            f'precision="{requested}": this CPU has no {_CAPABILITIES[requested]} (it has {", ".join(capabilities)}): '
            'ask for "recorded", or for "f32"'
        )
    return requested


def layer_info(op: Any) -> dict[str, str]:
    """Information on an operation of a compiled model: its type, origins, precision, implementation and layouts, by OpenVINO's keys."""
    return {key: str(value.astype(str)) for key, value in op.get_rt_info().items() if key in _RUNTIME_INFO}


def _executed(runtime_model: Any, nodes: ComputeNodes) -> list[ExecutedLayer]:
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
