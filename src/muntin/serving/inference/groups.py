"""Groups: the properties that requests must share to be computed in one call, and how such a call is put together and taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from muntin.artifact import Signature
from muntin.artifact.answers import OutputName
from muntin.runtime import predict
from muntin.runtime.inputs import LABELS, SCORES, Dims, Named
from muntin.runtime.session import Session
from muntin.runtime.short_memory import Parts
from muntin.serving.batching.job import Job
from muntin.serving.versions.rollout import label_agreement, tensor_agreement
from muntin.serving.versions.version import Version
from muntin.serving.worker.calls import Call


class Group(NamedTuple):
    """Inputs by name whose free dimensions, other than the batch, have the same sizes.

    `dims`: these sizes. `batch`: name of the dimension that calls are joined along, None: each is computed alone. `row_size`: pixels, or
    values of all inputs, of a row: what its computation and its memory grow with. `outputs`: the requested ones; of images scores, or
    labels if nothing else is requested. `images`: the model is one of images.
    """

    version: Version
    dims: Dims
    batch: str | None
    row_size: int
    outputs: tuple[str, ...]
    images: bool = False

    @property
    def alone(self) -> bool:
        """True if requests are not joined."""
        return self.batch is None

    @property
    def row_text(self) -> str:
        sizes = dict(self.dims)
        if self.images:
            return f"one image of {sizes['width']}x{sizes['height']}"
        text = ", ".join(f"{name} {size}" for name, size in self.dims)
        return f"one row{f' of {text}' if text else ''}" if self.batch is not None else f"inputs of {text or 'this size'}"

    def rows(self, inputs: Named) -> int:
        return 1 if self.batch is None else len(next(iter(inputs.values())))

    def nbytes(self, inputs: Named) -> int:
        return sum(tensor.nbytes for tensor in inputs.values())

    def joined(self, parts: Sequence[Named]) -> Named:
        """Join inputs, or answers."""
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def part(self, arrays: Named, first: int, end: int) -> Named:
        """Return some rows of inputs, or of an answer."""
        return {name: array[first:end] for name, array in arrays.items()}

    def apart(self, answer: Named, jobs: Sequence[Job]) -> list[Named]:
        """Return each job's rows of an answer."""
        if len(jobs) == 1:
            return [answer]
        parts, first = [], 0
        for job in jobs:
            parts.append(self.part(answer, first, first + job.rows))
            first += job.rows
        return parts

    def call(self, rows: int) -> Call:
        return Call(self._all_dims(rows), self.batch or "", self.outputs if self.images else ())

    def compute(self, session: Session, inputs: Named) -> Named:
        """Have a session of the group's model, of any version, compute inputs."""
        return session.infer(inputs, self._all_dims(self.rows(inputs)), self.outputs)

    def smaller(self, signature: Any, parts: Parts) -> Parts | None:
        """Return smaller parts of such inputs for a model of the group's kind, or None where there are none."""
        return parts.smaller(signature, max(size for _, size in self.dims)) if self.images else parts.smaller(None, 0)

    def compute_parts(self, session: Session, inputs: Named, parts: Parts) -> Named:
        """As `compute`, in calls of `parts`."""
        rows = self.rows(inputs)
        if parts.tile is not None:
            output: OutputName = "labels" if self.outputs == LABELS else "scores"
            answers = [predict(session, image, tile=parts.tile, output=output) for image in inputs["images"]]
            return {output: answers[0][None] if rows == 1 else np.stack(answers)}  # a copy of one may be what does not fit
        if rows <= parts.rows:
            return self.compute(session, inputs)
        firsts = range(0, rows, parts.rows)
        return self.joined([self.compute(session, self.part(inputs, first, first + parts.rows)) for first in firsts])

    def agreement(self, answer: Named, shadow: Named) -> float | None:
        """Return the agreement of two answers, from 0 to 1; None where it cannot be said."""
        if not self.images:
            return tensor_agreement(answer, shadow)
        (name,), signature = self.outputs, self.version.signature
        assert isinstance(signature, Signature)
        return label_agreement(answer[name], shadow[name], signature, labels=self.outputs == LABELS)

    def _all_dims(self, rows: int) -> Dims:
        return self.dims if self.batch is None else tuple(sorted((*self.dims, (self.batch, rows))))


def image_group(version: Version, height: int, width: int, *, labels: bool) -> Group:
    """Return the group of images of one size. `labels`: labels are requested, and no scores."""
    return Group(version, (("height", height), ("width", width)), "batch", height * width, LABELS if labels else SCORES, images=True)
