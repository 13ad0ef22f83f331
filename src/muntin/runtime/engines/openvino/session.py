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

from collections.abc import Iterable
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError
from muntin.runtime.engines.openvino.compiled import Compiled, CompiledForms, failure
from muntin.runtime.engines.openvino.output_fusion import ending_in_labels, ending_in_scores
from muntin.runtime.engines.openvino.tensor_session import OpenVinoTensorSession
from muntin.runtime.engines.openvino.workarounds import with_biases, with_whole_masks
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import ExecutedLayer, Labels, Session, Shape, check_shapes

# With free sizes OpenVINO 2026.4 may return without an answer and without an error where it cannot allocate what a size needs. The memory
# would then hold another answer. So both ends of an answer are marked with values that no model gives: the highest value of a label's type
# is no class, and this NaN comes from no computation.
_NO_SCORE = 0x7FC0BEEF

InputShape = tuple[int, ...]
Variant = tuple[InputShape | None, bool]
"""One compiled form of the model: its input shape (None: dynamic sizes), and True if it ends in labels instead of scores."""


class OpenVinoSession(CompiledForms[Variant], Session):
    """An image model in OpenVINO's CPU plugin."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        CompiledForms.__init__(self, artifact, options)
        self._retrying = Lock()  # held by one retry at a time
        signature = artifact.picture
        self._input_sides: InputShape = (*signature.sizes.dims, signature.channels)
        """(H, W, C) of the model's input, -1 where it is free."""
        self._warm_sides: set[InputShape] = {self._input_sides} if signature.sizes.fixed else set()
        """(H, W, C) of the images in `_warmed_up`, or of an artefact of one size."""
        Session.__init__(
            self, signature=signature, engine="openvino", precision=self._precision, threads=self._threads, streams=self._streams
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
        compile_new = not self._dynamic or shape[1:] in self._warm_sides
        variant: Variant = (shape, labels)
        compiled = None if compile_new else self._find_compiled(variant)
        if compiled is None:
            compiled = self._compiled_for(variant if compile_new else (None, labels))
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

    def _compute(self, compiled: Compiled, request: Any, images_BHWC: NDArray[np.uint8], answer: NDArray[Any]) -> None:
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

    def _drop(self, compiled: Compiled) -> bool:
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
        return self._executed(((1, *self._input_sides) if self.signature.sizes.fixed else None, False))

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        shapes = check_shapes(shapes, self.signature.sizes)
        for shape in shapes:
            variant = ((*shape, self.signature.channels), labels)
            with self._lock:
                self._warmed_up.add(variant)
                self._warm_sides.add((*shape[1:], self.signature.channels))
            self._compiled_for(variant)
        if compute:
            super().warm_up(shapes, labels=labels)

    def _prepared(self, form: Variant) -> Any:
        shape, labels = form
        if labels:
            self._check_classes()
        model = ending_in_labels(self._model.clone(), self.signature.label_type) if labels else ending_in_scores(self._model.clone())
        # One image: with a free batch size, too, OpenVINO 2026.4 computes some networks wrongly (docs/log.md).
        model.reshape([1, *self._input_sides] if shape is None else list(shape))
        if shape is None:
            model = with_biases(model)
        return model if self.precision == "f32" else with_whole_masks(model)

    def _key(self, form: Variant) -> str:
        shape, labels = form
        ending = "labels before pixels, classes last" if labels else "pixels in one pass"
        masks = "" if self.precision == "f32" else " whole masks"
        biases = " biases" if shape is None else ""
        return f"{shape or 'one image'} {ending}{masks}{biases}"

    def _words(self, form: Variant) -> str:
        return "dynamic sizes" if form[0] is None else f"images of shape {form[0]}"

    def _is_free(self, form: Variant) -> bool:
        return form[0] is None

    def _shape(self, form: Variant) -> InputShape | None:
        return form[0]

    def _check_classes(self) -> None:
        """Raises ArtifactError unless the model gives the signature's number of classes, which labels would not show."""
        shape, classes = self._model.output(0).partial_shape, self.signature.outputs
        if shape.rank.is_dynamic or shape.rank.get_length() < 2 or shape[1].is_dynamic or shape[1].get_length() != classes:
            raise ArtifactError(
                f"{self._path}: the model gives {shape} where its signature says {classes} classes: export the artefact again"
            )


def open_openvino(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OpenVinoSession | OpenVinoTensorSession:
    """Opens an artefact in OpenVINO on the CPU.

    Precision "recorded" is the manifest's, or f32 on a CPU without it (the session's `.precision` says which). Raises DependencyError for
    another precision that the CPU lacks. A session has at most one stream a thread.
    """
    with signal_stack_kept():
        if artifact.manifest.named is not None:
            return OpenVinoTensorSession(artifact, options)
        return OpenVinoSession(artifact, options)
