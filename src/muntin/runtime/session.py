"""Sessions: inputs in, outputs out, with any engine.

A session computes named tensors. An image model has one input, `images` (B, H, W, C), and its session is also called with images alone.

Axis letters: B images, H and W rows and columns, C channels of an image, K channels of the scores (classes, or channels to restore).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, Artifact, Signature
from muntin.errors import ArtifactError
from muntin.runtime.buffers import Buffers
from muntin.runtime.host.thread_pool import thread_pool
from muntin.runtime.inputs import LABELS, SCORES, Dims, Named, Shape, check_classes, check_dims, check_inputs, check_outputs
from muntin.runtime.options import SessionOptions
from muntin.runtime.pipeline import ordered

STATIC_SHAPES = 4
"""Input sizes, beside those given to `warm_up`, that an engine keeps compiled."""
Labels = NDArray[np.unsignedinteger[Any]]
"""Class numbers, in the signature's `label_type`."""


@dataclass(frozen=True, kw_only=True)
class ExecutedLayer:
    """One operation as the engine runs it.

    `name`: the node of `model.onnx` for operations that multiply (Conv, ConvTranspose, MatMul, Gemm), otherwise the engine's own name.
    `kind`: the engine's name of the operation. `precision`: "i8" (of either sign), "f32", "bf16" or "f16". `compute`: True if `name` is
    a node of `model.onnx`, which verification compares with the manifest.
    """

    name: str
    kind: str
    precision: str
    compute: bool


class Session(ABC):
    """An opened artefact that computes. Threads may share one; each call returns arrays of its own.

    `signature`: `Signature` of an image model, otherwise `TensorSignature` (the artefact decides, so its annotation is `Any`). `tensors`:
    inputs and outputs by name, of either. `precision`: the real precision of float layers ("f32", "bf16", "f16"). `threads`: of the engine.
    `streams`: calls that compute at the same time, each on its share of the threads.
    """

    def __init__(self, *, signature: AnySignature, engine: str, precision: str, threads: int, streams: int = 1) -> None:
        self.signature: Any = signature
        self.tensors = signature.tensors
        self.images = isinstance(signature, Signature)
        """True for an image model."""
        self.engine = engine
        self.precision = precision
        self.threads = threads
        self.streams = streams
        self.opened: tuple[Artifact, SessionOptions] | None = None
        """The artefact, and how it was opened; None for a session without one."""
        self.buffers = Buffers()
        """Memory of results."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.signature.text}, {self.engine} in {self.precision}, {self.threads} threads>"

    @overload
    def __call__(self, inputs: NDArray[np.uint8], /) -> NDArray[np.float32]: ...

    @overload
    def __call__(self, inputs: Mapping[str, NDArray[Any]], /, outputs: Sequence[str] | None = None) -> Named: ...

    def __call__(self, inputs: Any, /, outputs: Sequence[str] | None = None) -> Any:
        """Scores of images, or outputs by name for inputs by name (or for the array of the only input).

        Images are uint8 (B, H, W, C); their scores float32 (B, K, scale*H, scale*W), or (B, K) where a picture has one answer. `outputs`:
        names of those to return; None: all, in the model's order. Raises DataError for inputs that the signature does not allow and for
        an unknown output, ArtifactError when the model does not give what its signature says.
        """
        tensors, dims = check_inputs(inputs, self.signature)
        if self.images and isinstance(inputs, np.ndarray) and outputs is None:
            return self.infer(tensors, dims, SCORES)["scores"]
        return self.infer(tensors, dims, check_outputs(outputs, self.tensors))

    def labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        """The class of the highest score, the first of equal ones: (B, scale*H, scale*W), or (B,), in the signature's
        `label_type`. Of one image (H, W, C): (scale*H, scale*W), or one number.

        Equals `argmax` of the scores. An engine that computes labels itself writes one byte for each pixel instead of 4 K, which saves
        several milliseconds at 512 x 512 with six classes. Raises as a call does, and DataError where no class is the answer.
        """
        if isinstance(images_BHWC, np.ndarray) and images_BHWC.ndim == 3:
            one: Labels = self.labels(images_BHWC[None])[0]
            return one
        tensors, dims = check_inputs(images_BHWC, self.signature)
        check_classes(self.signature)
        return self.infer(tensors, dims, LABELS)["labels"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by number: `session.class_names[label]`."""
        return class_names(self.signature)

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The answer to each batch, in order; the next batches are read and computed while the caller works on the last result.

        At most `streams` + 1 batches are in flight. Each is copied, so that the iterator may reuse its memory. An error of reading or
        computing a batch is raised in place of its result.
        """
        return ordered(self, map(_copy, batches), workers=self.streams, window=self.streams + 1)

    def warm_up(self, sizes: Iterable[Shape | Mapping[str, int] | Dims], *, labels: bool = False, compute: bool = True) -> None:
        """Computes zeros once for each size, in every stream, so that the first real call of a size is as fast as later ones.

        `sizes`: of images (B, H, W); of named tensors sizes of the free dimensions, `{"batch": 8, "tokens": 128}`. `labels`: warms up
        `labels` instead of scores. Without `compute` an engine that can compile without computing only compiles, and the first call takes
        a little longer.
        """
        if labels:
            check_classes(self.signature)
        outputs = LABELS if labels else SCORES if self.images else ()
        for dims in check_dims(sizes, self.signature):
            self.prepare(dims, outputs, compute=compute)

    def prepare(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        """Warms up calls with these sizes of free dimensions. `outputs`: as of `infer`; empty: those of a call without `outputs`."""
        if not compute:
            return
        default = SCORES if self.images else check_outputs(None, self.tensors)
        zeros = self.tensors.zeros(dict(dims))
        if self.streams == 1:
            self.infer(zeros, dims, outputs or default)
            return
        with thread_pool(self.streams, "muntin-warm-up") as pool:
            list(pool.map(lambda _: self.infer(zeros, dims, outputs or default), range(self.streams)))

    def infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        """Outputs by name for checked, contiguous inputs with these sizes of free dimensions. `outputs`: at least one."""
        if len(outputs) > 1 and self.images:
            return {name: self.infer(inputs, dims, (name,))[name] for name in outputs}
        answer = self._infer(inputs, dims, tuple(outputs))
        if (problem := self.signature.outputs_problem(answer, dict(dims))) is not None:
            raise ArtifactError(f"the model gave another output than its signature says: {problem}: export the artefact again")
        return answer

    def _labels_of_scores(self, inputs: Named, dims: Dims) -> Named:
        """Labels where the engine gives scores only."""
        return {"labels": self.infer(inputs, dims, SCORES)["scores"].argmax(axis=1).astype(self.signature.label_type)}

    def close(self) -> None:  # noqa: B027 (most sessions have nothing outside)
        """Lets go of what lies outside of this process. Nobody may call the session any more."""

    @abstractmethod
    def _infer(self, inputs: Named, dims: Dims, outputs: tuple[str, ...]) -> Named:
        """Outputs by name, in arrays of their own. Of an image model `outputs` is `SCORES` or `LABELS`."""

    @abstractmethod
    def layers(self) -> list[ExecutedLayer]:
        """Every operation and the precision that it really runs in. May compile, so takes as long as opening."""


def class_names(signature: Signature) -> tuple[str, ...]:
    """Return the names of a signature's classes."""
    return tuple(entry.name for entry in signature.classes)


def _copy(batch: Any) -> Any:
    return {name: np.array(tensor) for name, tensor in batch.items()} if isinstance(batch, Mapping) else np.array(batch)
