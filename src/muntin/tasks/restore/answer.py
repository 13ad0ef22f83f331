"""A restored picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.images import encode_png, open_sink, write_image
from muntin.images.rasters import raster_at
from muntin.images.sources import raster_of
from muntin.tasks.base import Answering, ComputePicture, Floats, Picture, PictureFeature, Result
from muntin.tasks.restore.folders import RestoredFolders

ROUNDING = (1 / 255) ** 2 / 12
"""Power of the rounding to grey levels, of the full range: no correction is smaller."""


class RestoredAnswering(Answering):
    """A picture, or a GeoTIFF of a raster."""

    folders: ClassVar = RestoredFolders()
    videos: ClassVar = {"image": "restored.mp4"}
    routes = ("image",)
    useless = ("--truth", "--no-overlay")
    words = "an image, which has no mask"

    def files(self, path: Path, target: Path, signature: Signature, *, scaled: bool) -> dict[str, Path]:
        plain = ".npy" if signature.channels not in (1, 3, 4) or (scaled and path.suffix.lower() == ".npy") else ".png"
        return {"image": target.with_name(f"{target.name}.restored{'.tif' if raster_at(path) else plain}")}

    def write(self, picture: Picture, compute: ComputePicture) -> Result:
        file = self.files(picture.path, picture.target, picture.signature, scaled=picture.scaled)["image"]
        picture.target.parent.mkdir(parents=True, exist_ok=True)
        if raster_of(picture.image) is not None:
            with open_sink(file, like=picture.image) as sink:
                compute(sink)
        else:
            write_image(file, compute(None))
        return {"source": str(picture.path), "image": str(file)}

    def encode(self, image: NDArray[np.uint8], answer: NDArray[Any], route: str, signature: Signature) -> bytes:
        return encode_png(answer)

    def feature_list(self, signature: Signature) -> list[PictureFeature]:
        return [PictureFeature(name="correction by the model", more="stronger", less="weaker", unit="power")]

    def features(self, scores: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], signature: Signature) -> Floats:
        before = pixels_HWC.repeat(signature.scale, 0).repeat(signature.scale, 1).transpose(2, 0, 1).astype(np.float32)
        return np.array([np.log10(float(np.square(scores - before).mean()) / 255**2 + ROUNDING)])

    def frame(self, pixels_HWC: NDArray[np.uint8], answer: NDArray[Any], signature: Signature, *, painted: bool) -> dict[str, NDArray[Any]]:
        return {"image": answer}
