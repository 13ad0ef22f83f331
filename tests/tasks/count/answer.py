"""A number."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from muntin.tasks.count.folders import NumberFolders
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.tasks.base import Answering, ComputePicture, Floats, Picture, PictureFeature, Result


class NumberAnswering(Answering):
    """A number; no files."""

    folders: ClassVar = NumberFolders()
    videos: ClassVar = {}
    routes = ("json",)
    useless = ("--output", "--resume", "--truth", "--no-overlay", "--tile", "--overlap", "--exact")
    words = "a number, which is printed"

    def files(self, path: Path, target: Path, signature: Signature, *, scaled: bool) -> dict[str, Path]:
        return {}

    def write(self, picture: Picture, compute: ComputePicture) -> Result:
        return {"source": str(picture.path), "number": float(compute(None)[0])}

    def line(self, result: Result) -> str:
        return f"{result['number']:.2f}"

    def encode(self, image: NDArray[np.uint8], answer: NDArray[Any], route: str, signature: Signature) -> Result:
        return {"number": float(answer[0])}

    def feature_list(self, signature: Signature) -> list[PictureFeature]:
        return [PictureFeature(name="number", more="larger", less="smaller", unit="grey")]

    def features(self, scores: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], signature: Signature) -> Floats:
        return scores.astype(np.float64)
