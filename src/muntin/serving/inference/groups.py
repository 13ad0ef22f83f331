"""Groups: the properties that requests must share to be computed in one call, and how such a call is put together and taken apart.

ImageGroup     one array of images (rows, H, W, C)       -> labels or scores
TensorGroup    named arrays, joined along the batch axis -> named arrays
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.runtime import predict
from muntin.runtime.tensors import Dims, Named
from muntin.runtime.tiles import TILE, allowed_tile
from muntin.serving.batching.job import Job
from muntin.serving.versions.rollout import label_agreement, tensor_agreement
from muntin.serving.versions.version import Version
from muntin.serving.worker.calls import Call, TensorCall


class ImageGroup(NamedTuple):
    """Images of one size. `labels`: labels are requested, and no scores."""

    version: Version
    height: int
    width: int
    labels: bool

    @property
    def alone(self) -> bool:
        """True if requests are not joined."""
        return False

    @property
    def row_size(self) -> int:
        """Pixels of a row: what its computation and its memory grow with."""
        return self.height * self.width

    @property
    def kind(self) -> Hashable:
        """Calls of one kind need memory by their size alone."""
        return self.labels

    @property
    def row_text(self) -> str:
        return f"one image of {self.width}x{self.height}"

    def rows(self, images_BHWC: NDArray[np.uint8]) -> int:
        return len(images_BHWC)

    def nbytes(self, images_BHWC: NDArray[np.uint8]) -> int:
        return images_BHWC.nbytes

    def joined(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Join inputs, or answers."""
        return np.concatenate(parts)

    def part(self, array: NDArray[Any], first: int, end: int) -> NDArray[Any]:
        """Return some rows of inputs, or of an answer."""
        return array[first:end]

    def apart(self, answer: NDArray[Any], jobs: Iterable[Job]) -> list[NDArray[Any]]:
        """Return each job's rows of an answer."""
        return taken_apart(answer, jobs)

    def call(self, rows: int) -> Call:
        return Call((rows, self.height, self.width), self.labels)

    def compute(self, session: Any, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        """Have a session of the group's model, of any version, compute inputs."""
        answer: NDArray[Any] = session.labels(images_BHWC) if self.labels else session(images_BHWC)
        return answer

    def tile(self, signature: Any) -> int | None:
        """Return the side of the tiles in which one image can be computed; None if it has no smaller parts."""
        longest = max(self.height, self.width)
        tile = allowed_tile(signature, min(TILE, (longest + 1) // 2))
        return tile if tile is not None and tile < longest else None

    def compute_tiles(self, session: Any, image_1HWC: NDArray[np.uint8], tile: int) -> NDArray[Any]:
        return predict(session, image_1HWC[0], tile=tile, output="labels" if self.labels else "scores")[None]

    def agreement(self, answer: NDArray[Any], shadow: NDArray[Any]) -> float | None:
        """Return the agreement of two answers, from 0 to 1; None where it cannot be said."""
        signature = self.version.signature
        assert isinstance(signature, Signature)
        return label_agreement(answer, shadow, signature, labels=self.labels)


class TensorGroup(NamedTuple):
    """Named tensors whose free dimensions, other than the batch, have the same sizes.

    `dims`: these sizes. `batch`: name of the dimension that calls are joined along, None: each is computed alone. `row_size`: values of
    all inputs of a row. `outputs`: the requested ones.
    """

    version: Version
    dims: Dims
    batch: str | None
    row_size: int
    outputs: tuple[str, ...]

    @property
    def alone(self) -> bool:
        return self.batch is None

    @property
    def kind(self) -> Hashable:
        return self.outputs

    @property
    def row_text(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.dims)
        return f"one row{f' of {sizes}' if sizes else ''}" if self.batch is not None else f"inputs of {sizes or 'this size'}"

    def rows(self, inputs: Named) -> int:
        return 1 if self.batch is None else len(next(iter(inputs.values())))

    def nbytes(self, inputs: Named) -> int:
        return sum(tensor.nbytes for tensor in inputs.values())

    def joined(self, parts: Sequence[Named]) -> Named:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def part(self, arrays: Named, first: int, end: int) -> Named:
        return {name: array[first:end] for name, array in arrays.items()}

    def apart(self, answer: Named, jobs: Sequence[Job]) -> list[Named]:
        if len(jobs) == 1:
            return [answer]
        parts, first = [], 0
        for job in jobs:
            parts.append(self.part(answer, first, first + job.rows))
            first += job.rows
        return parts

    def call(self, rows: int) -> TensorCall:
        return TensorCall(self._all_dims(rows), self.batch or "")

    def compute(self, session: Any, inputs: Named) -> Named:
        answer: Named = session.infer(inputs, self._all_dims(self.rows(inputs)), self.outputs)
        return answer

    def tile(self, signature: Any) -> None:
        return None

    def compute_tiles(self, session: Any, inputs: Named, tile: int) -> Named:
        raise AssertionError("named tensors have no tiles")

    def agreement(self, answer: Named, shadow: Named) -> float | None:
        return tensor_agreement(answer, shadow)

    def _all_dims(self, rows: int) -> Dims:
        return self.dims if self.batch is None else tuple(sorted((*self.dims, (self.batch, rows))))


Group = ImageGroup | TensorGroup
WorkInputs = NDArray[Any] | Named
"""Inputs of a group: images, or named arrays in the model's order, contiguous and checked."""
WorkAnswer = NDArray[Any] | Named


def taken_apart(answer: Any, jobs: Iterable[Job]) -> list[Any]:
    """Return each job's part of a list or an array that has an entry for each row of all jobs, in order."""
    parts, first = [], 0
    for job in jobs:
        parts.append(answer[first : first + job.rows])
        first += job.rows
    return parts
