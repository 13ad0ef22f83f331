"""The seams of a task: its answers as files, documents and numbers (`Answering`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.images import PictureSink
from muntin.images.sources import PictureSource
from muntin.tasks.reading import TaskFolders

Result = dict[str, Any]
"""Paths and figures of one picture, as `muntin predict --json` prints them."""
Floats = NDArray[np.float64]
ComputePicture = Callable[[PictureSink | None], Any]
"""Computes a picture's answer, and returns it, or writes it into a sink."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture whose answer is written as files. `target`: their path without endings. `notes`: of the result, to be added to.

    `truth`: the file of its mask. `scaled`: it is read with a range. `painted`: with an overlay.
    """

    path: Path
    image: PictureSource
    target: Path
    signature: Signature
    max_pixels: int
    truth: Path | None
    scaled: bool
    painted: bool
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class PictureFeature:
    """One feature of pictures or answers, for drift. `more`, `less`: words for a rise and a fall of its mean.

    `unit`: "share" from 0 to 1; "grey" levels from 0 to 1, shown from 0 to 255; "power" of grey levels as a logarithm, shown as their root
    mean square. `least`: smallest standard deviation that counts, times the square root of the number of pictures: without it, the first
    picture of a rare class would be drift.
    """

    name: str
    more: str
    less: str
    unit: Literal["share", "grey", "power"]
    least: float = 0.1

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        if self.unit == "share":
            return f"{100 * value:.2g} %" if value < 0.0995 else f"{100 * value:.0f} %"
        return f"{255 * (value if self.unit == 'grey' else 10 ** (value / 2)):.3g}"


class Answering(ABC):
    """The answers of a task, and its files.

    `folders`: of its pictures. `videos`: the ending of each result of a video, by kind; empty: a video has no answer. `routes`: what
    `/predict` of a server returns, the default first. `useless`: options of `muntin predict` without effect. `words`: what an answer is.
    """

    folders: ClassVar[TaskFolders]
    videos: ClassVar[dict[str, str]]
    routes: tuple[str, ...]
    useless: tuple[str, ...]
    words: str

    @abstractmethod
    def files(self, path: Path, target: Path, signature: Signature, *, scaled: bool) -> dict[str, Path]:
        """Return the file of each result of an image. None has an image's own name, because results may lie beside images.

        `scaled`: the image is read with a range.
        """

    @abstractmethod
    def write(self, picture: Picture, compute: ComputePicture) -> Result:
        """Compute a picture, write the files of its answer, whose folder is made, and return their paths and figures."""

    def line(self, result: Result) -> str:
        """Return what is printed of a result: by default its files."""
        return ", ".join(result[kind] for kind in ("mask", "image", "overlay", "difference") if kind in result)

    @abstractmethod
    def encode(self, image: NDArray[np.uint8], answer: NDArray[Any], route: str, signature: Signature) -> bytes | Result:
        """Return what `/predict` sends for one of `routes`: a PNG, or the content of a JSON document."""

    @abstractmethod
    def feature_list(self, signature: Signature) -> list[PictureFeature]:
        """Return the features of an answer, in the order of `features`."""

    @abstractmethod
    def features(self, scores: NDArray[np.float32], pixels_HWC: NDArray[np.uint8], signature: Signature) -> Floats:
        """Return the features of the scores, (K,) or (K, H, W), of one picture."""

    def frame(self, pixels_HWC: NDArray[np.uint8], answer: NDArray[Any], signature: Signature, *, painted: bool) -> dict[str, NDArray[Any]]:
        """Return the pictures to write for a frame of a video, by kind."""
        raise NotImplementedError
