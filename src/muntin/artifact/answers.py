"""Facts of each task: the form of a model's answer, its classes, its score, and the pictures that it takes.

Code that asks for one of these facts reads `Signature.answer`, or `ANSWERS` by a task's name, and compares no names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["segment", "classify", "restore"]
AnswerForm = Literal["row", "map"]
OutputName = Literal["labels", "scores", "image"]


@dataclass(frozen=True, kw_only=True)
class ScoreFormat:
    """The score of a task: its name, its unit and its digits.

    `each`: the name of its part for a class or a picture. `same`: what the share of equal answers of two forms of a model counts. `margin`:
    differences below it do not count. `share`: the score is one, from 0 to 1.
    """

    name: str
    each: str
    unit: str = ""
    digits: int = 3
    margin: float = 0.01
    share: bool = True
    same: str = "labels"

    def __call__(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Facts of a task.

    `form`: row: scores (B, K), one answer a picture; map: (B, K, scale*H, scale*W). `has_classes`: K counts classes. `argmax`: the class of
    the highest score is the label. `masks`: the truth is a mask of class numbers. `outputs`: what `predict` returns, the default first.
    `channels`: those that pictures of clients may have: an answer in a PNG has not two. `most_classes`: in masks of bytes 255 is no class.
    `usual_crop`: side of training crops, in pixels, unless pictures are smaller. `values`: K of a task without classes; None: channels of
    the pictures.
    """

    form: AnswerForm
    has_classes: bool = True
    argmax: bool = True
    masks: bool = False
    outputs: tuple[OutputName, ...]
    channels: tuple[int, ...] = (1, 2, 3, 4)
    most_classes: int
    usual_crop: int
    score: ScoreFormat
    values: int | None = None

    @property
    def picture(self) -> bool:
        """True if the answer is a picture."""
        return self.form == "map" and not self.has_classes

    def width(self, classes: int, channels: int) -> int:
        """Return K for a model of so many classes and channels of its pictures."""
        return classes if self.has_classes else self.values or channels

    @property
    def one(self) -> bool:
        """True if a picture has one answer: it is resized as a whole, and no tiles are cut."""
        return self.form == "row"


ANSWERS: dict[Task, Answer] = {
    "segment": Answer(
        form="map", masks=True, outputs=("labels", "scores"), most_classes=255, usual_crop=256,
        score=ScoreFormat(name="mIoU", each="IoU"),
    ),
    "classify": Answer(
        form="row", outputs=("scores",), most_classes=65535, usual_crop=224,
        score=ScoreFormat(name="accuracy", each="recall"),
    ),
    "restore": Answer(
        form="map", has_classes=False, argmax=False, outputs=("image", "scores"), channels=(1, 3, 4), most_classes=0, usual_crop=128,
        score=ScoreFormat(name="PSNR", each="PSNR", unit=" dB", digits=2, margin=0.1, share=False, same="values (± 1 level)"),
    ),
}  # fmt: skip
