"""The class of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.tasks.base import Answering, ComputePicture, Floats, Picture, PictureFeature, Result
from muntin.tasks.class_shares import class_shares, probabilities, share_features
from muntin.tasks.classify.folders import ClassFolders


class ClassAnswering(Answering):
    """The most probable class with its probability; no files."""

    folders: ClassVar = ClassFolders()
    videos: ClassVar = {}
    routes = ("json",)
    useless = ("--output", "--resume", "--truth", "--no-overlay", "--tile", "--overlap", "--exact")
    words = "the name of a class, which is printed"

    def files(self, path: Path, target: Path, signature: Signature, *, scaled: bool) -> dict[str, Path]:
        return {}

    def write(self, picture: Picture, compute: ComputePicture) -> Result:
        shares = probabilities(compute(None))
        best = int(shares.argmax())
        return {"source": str(picture.path), "class": picture.signature.classes[best].name, "probability": float(shares[best])}

    def line(self, result: Result) -> str:
        return f"{result['class']} (probability {result['probability']:.3f})"

    def encode(self, image: NDArray[np.uint8], answer: NDArray[Any], route: str, signature: Signature) -> Result:
        pairs = sorted(zip(probabilities(answer).tolist(), signature.classes, strict=True), key=lambda pair: -pair[0])
        return {"classes": [{"name": entry.name, "probability": share} for share, entry in pairs]}

    def feature_list(self, signature: Signature) -> list[PictureFeature]:
        return share_features(signature, least=2.0)  # a picture has one class

    def features(self, scores: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], signature: Signature) -> Floats:
        return class_shares(scores.argmax(0), len(signature.classes))
