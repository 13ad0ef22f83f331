"""Sessions: inputs in, outputs out, with any engine. `Session` is of image models, `TensorSession` of named tensors.

Axis letters: B images, H and W rows and columns, C channels of an image, K channels of the scores (classes, or channels to restore).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact, Signature, Sizes, TensorSignature
from muntin.errors import ArtifactError, DataError
from muntin.runtime.buffers import Buffers
from muntin.runtime.host.thread_pool import thread_pool
from muntin.runtime.pipeline import ordered

if TYPE_CHECKING:
    from muntin.runtime.options import SessionOptions

STATIC_SHAPES = 4
"""Input sizes, beside those given to `warm_up`, that an engine keeps compiled."""
Shape = tuple[int, int, int]
"""(B, H, W) of a batch of images."""
GivenT = TypeVar("GivenT")
AnswerT = TypeVar("AnswerT")
Named = dict[str, NDArray[Any]]
Dims = tuple[tuple[str, int], ...]
"""Sizes of free dimensions by name, sorted."""
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


class AnySession(ABC, Generic[GivenT, AnswerT]):
    """An opened artefact that computes. Threads may share one; each call returns arrays of its own.

    `precision`: the real precision of float layers ("f32", "bf16", "f16"). `threads`: of the engine. `streams`: calls that compute at the
    same time, each on its share of the threads.
    """

    def __init__(self, *, engine: str, precision: str, threads: int, streams: int = 1) -> None:
        self.engine = engine
        self.precision = precision
        self.threads = threads
        self.streams = streams
        self.opened: tuple[Artifact, SessionOptions] | None = None
        """The artefact, and how it was opened; None for a session without one."""

    @property
    @abstractmethod
    def tensors(self) -> TensorSignature:
        """Inputs and outputs by name."""

    @abstractmethod
    def __call__(self, batch: GivenT, /) -> AnswerT:
        """Computes a batch."""

    def map(self, batches: Iterable[GivenT]) -> Iterator[AnswerT]:
        """The answer to each batch, in order; the next batches are read and computed while the caller works on the last result.

        At most `streams` + 1 batches are in flight. Each is copied, so that the iterator may reuse its memory. An error of reading or
        computing a batch is raised in place of its result.
        """
        return ordered(self, map(self._copy, batches), workers=self.streams, window=self.streams + 1)

    def _in_every_stream(self, call: Callable[[GivenT], object], batch: GivenT) -> None:
        """Computes a batch in all streams at the same time."""
        if self.streams == 1:
            call(batch)
            return
        with thread_pool(self.streams, "muntin-warm-up") as pool:
            list(pool.map(call, [batch] * self.streams))

    def close(self) -> None:
        """Lets go of what lies outside of this process. Nobody may call the session any more."""

    @abstractmethod
    def infer_named(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        """Named outputs for checked, contiguous inputs with these sizes of free dimensions, of the signature's `tensors`."""

    @abstractmethod
    def warm_up_named(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        """Warms up a call of `infer_named`."""

    @staticmethod
    @abstractmethod
    def _copy(batch: GivenT) -> GivenT:
        """A copy of a batch."""

    @abstractmethod
    def layers(self) -> list[ExecutedLayer]:
        """Every operation and the precision that it really runs in. May compile, so takes as long as opening."""


class Session(AnySession[NDArray[np.uint8], NDArray[np.float32]]):
    """A session of an image model."""

    def __init__(self, *, signature: Signature, engine: str, precision: str, threads: int, streams: int = 1) -> None:
        super().__init__(engine=engine, precision=precision, threads=threads, streams=streams)
        self.signature = signature
        self.outputs = Buffers()
        """Memory of results, for engines that can write into given memory."""

    def __repr__(self) -> str:
        task, channels = self.signature.task, self.signature.channels
        return f"<{type(self).__name__}: {task}, {channels} channels, {self.engine} in {self.precision}, {self.threads} threads>"

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores of a batch of images: uint8 (B, H, W, C) -> float32 (B, K, scale*H, scale*W), or (B, K) where a picture has one answer.

        Raises DataError for another type or shape, ArtifactError when the model does not give what its signature says.
        """
        check_images(images_BHWC, self.signature)
        return self.infer(np.ascontiguousarray(images_BHWC))

    def infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores of a checked, contiguous batch."""
        scores = self._infer(images_BHWC)
        expected = self.signature.scores_shape(*images_BHWC.shape[:3])
        if scores.shape != expected or scores.dtype != np.float32:
            raise ArtifactError(
                f"the model gave {scores.dtype} {scores.shape} where its signature says float32 {expected}: export the artefact again"
            )
        return scores

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by number: `session.class_names[label]`."""
        return class_names(self.signature)

    def labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        """The class of the highest score, the first of equal ones: (B, scale*H, scale*W), or (B,), in the signature's
        `label_type`. Of one image (H, W, C): (scale*H, scale*W), or one number.

        Equals `argmax` of the scores. An engine that computes labels itself writes one byte for each pixel instead of 4 K, which saves
        several milliseconds at 512 x 512 with six classes. Raises as a call does, and DataError where no class is the answer.
        """
        if isinstance(images_BHWC, np.ndarray) and images_BHWC.ndim == 3:
            one: Labels = self.labels(images_BHWC[None])[0]
            return one
        check_images(images_BHWC, self.signature)
        check_classes(self.signature)
        return self.infer_labels(np.ascontiguousarray(images_BHWC))

    def infer_labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        """Labels of a checked, contiguous batch. The model has classes."""
        return self._infer_labels(images_BHWC)

    @property
    def tensors(self) -> TensorSignature:
        return self.signature.tensors

    def infer_named(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        """The scores, or the labels, of checked, contiguous `images`, by name."""
        (name,) = outputs
        return {name: (self.infer_labels if name == "labels" else self.infer)(inputs["images"])}

    def warm_up_named(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        sizes = dict(dims)
        self.warm_up([(sizes["batch"], sizes["height"], sizes["width"])], labels=tuple(outputs) == ("labels",), compute=compute)

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        """Computes once for each shape (B, H, W), in every stream, so that the first real call of a shape is as fast as later ones.

        `labels`: warms up `labels` instead of scores. Without `compute` an engine that can compile without computing only compiles, and
        the first call takes a little longer.
        """
        call = self.labels if labels else self
        for shape in check_shapes(shapes, self.signature.sizes):
            images_BHWC = np.zeros((*shape, self.signature.channels), np.uint8)
            self._in_every_stream(call, images_BHWC)

    @staticmethod
    def _copy(batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.array(batch)

    @abstractmethod
    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores of a checked, contiguous batch, in an array of their own."""

    def _infer_labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        """Labels of a checked, contiguous batch, in an array of their own."""
        labels: Labels = self.infer(images_BHWC).argmax(axis=1).astype(self.signature.label_type)
        return labels


def check_images(images: object, signature: Signature) -> None:
    """Raises DataError unless `images` is a batch that fits the signature."""
    check_pixels(images, signature)
    assert isinstance(images, np.ndarray)
    if not signature.sizes.takes(*images.shape[1:3]):
        raise DataError(size_error(images.shape[1:3], signature.sizes))


def check_pixels(images: object, signature: Signature) -> None:
    """Raises DataError unless `images` is a batch of the signature's type and channels, of any size."""
    expected = f"{signature.dtype} (B, H, W, {signature.channels})"
    if not isinstance(images, np.ndarray):
        raise DataError(f"images of type {type(images).__name__}: give a numpy array, {expected}")
    if images.dtype != np.dtype(signature.dtype):
        raise DataError(f"images of dtype {images.dtype}: give {expected}; normalisation is part of the model")
    if images.ndim != 4 or images.shape[3] != signature.channels or 0 in images.shape:
        raise DataError(f"images of shape {images.shape}: give {expected}, with no side of 0")


def size_error(size: Sequence[int], sizes: Sizes) -> str:
    """Says which size images have and which the model takes, with the nearest one."""
    height, width = sizes.at_least(*size)
    return (
        f"images of {size[0]} x {size[1]} pixels: the model takes {sizes.text}: resize or pad them to {height} x {width}, or let "
        "`muntin predict` or the server's /predict do it"
    )


def class_names(signature: Signature) -> tuple[str, ...]:
    """Return the names of a signature's classes."""
    return tuple(entry.name for entry in signature.classes)


def check_classes(signature: Signature) -> None:
    """Raises DataError for a model that answers no classes, which has no labels."""
    if not signature.answer.argmax:
        raise DataError(f'labels of a model for "{signature.task}": its answers are no classes, ask for its scores')


def check_shape(shape: object) -> Shape:
    """Returns the shape as (B, H, W). Raises DataError unless it is three whole numbers from 1."""
    if isinstance(shape, tuple | list) and len(shape) == 3 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in shape):
        B, H, W = (int(n) for n in shape)
        if min(B, H, W) >= 1:
            return B, H, W
    raise DataError(f"shape {shape!r}: give (B, H, W), three whole numbers from 1")


def check_shapes(shapes: object, sizes: Sizes | None = None) -> tuple[Shape, ...]:
    """Returns each shape as (B, H, W). Raises DataError unless `shapes` is a list of shapes, of allowed `sizes` if these are given."""
    if not isinstance(shapes, Iterable):
        raise DataError(f"shapes={shapes!r}: give a list of (B, H, W), each three whole numbers from 1")
    checked = tuple(check_shape(shape) for shape in shapes)
    for shape in checked:
        if sizes is not None and not sizes.takes(*shape[1:]):
            raise DataError(size_error(shape[1:], sizes))
    return checked
