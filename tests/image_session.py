"""Base of sessions of images without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.runtime import ExecutedLayer, Session
from muntin.runtime.inputs import LABELS, Dims, Named


class ImageSession(Session):
    """Gives the scores of `scores`, and their labels."""

    def scores(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise NotImplementedError

    def _infer(self, inputs: Named, dims: Dims, outputs: tuple[str, ...]) -> Named:
        return self._labels_of_scores(inputs, dims) if outputs == LABELS else {"scores": self.scores(inputs["images"])}

    def layers(self) -> list[ExecutedLayer]:
        return []


def compiled_forms(session: Any) -> set[tuple[tuple[int, ...] | None, bool]]:
    """The (B, H, W) that an OpenVINO session of images is compiled for (None: free sizes), and whether for labels."""
    return {(None if dims is None else tuple(size for _, size in dims), labels) for dims, labels in session._compiled}
