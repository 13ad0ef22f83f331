"""Training on the classes of pictures, and their scores.

Axes: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchvision.transforms import InterpolationMode

from muntin.artifact import ClassInfo
from muntin.images import to_rgb
from muntin.images.legend import LegendEntry
from muntin.images.opening import UInt8
from muntin.runtime.tiles import Predictor, predict
from muntin.tasks.base_learning import LossTerms, at_least_float32
from muntin.tasks.classify.pictures import write_class_examples
from muntin.tasks.crops import Draw, changed, mirrored_window, recolored, window
from muntin.tasks.labels import LabelLearning, LabelScores
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging
from muntin.text import list_some


class PictureScores(LabelScores):
    """Scores of the classes of pictures: the accuracy."""

    @property
    def score(self) -> float:
        return self.accuracy

    @property
    def by_class(self) -> dict[str, float | None]:
        """The recall of each class."""
        return self.recall

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on classes that the truth lacks."""
        return (f"no image is of {list_some(self.absent)}: the accuracy does not cover it",) if self.absent else ()

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy (Wilson 1927)."""
        z, n, p = 1.96, self.counted, self.accuracy
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    @property
    def pictures(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.confusion)


class ClassLearning(LabelLearning):
    """Crops with the number of a class, or with shares of the classes, (K,). What a rotation brings in from outside is the mirror image."""

    mixtures: ClassVar = ("mixup", "cutmix")
    small: ClassVar = "they are enlarged"
    made: ClassVar = PictureScores

    def window_side(self, crop: int, zoom: float, height: int, width: int) -> int:
        """The largest square that fits, divided by the zoom."""
        return min(max(1, round(min(height, width) / zoom)), height, width)

    def cut(self, sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
        """The target is a scalar."""
        read = partial(mirrored_window, sample.image[:, :]) if draw.angle else partial(window, sample.image, fill=0)
        return recolored(changed(read, draw, crop, InterpolationMode.BILINEAR), draw), torch.tensor(sample.target)

    def random_target(self, images_BCHW: Tensor, *, classes: int, scale: int) -> Tensor:
        return torch.randint(0, classes, (len(images_BCHW),))

    def counted(self, target: Tensor) -> Tensor:
        return torch.ones(len(target), dtype=torch.int64, device=target.device)

    def class_counts(self, target: Tensor, classes: int) -> Tensor:
        return _class_shares(target, classes).double().sum(0)

    def sums(self, scores: Tensor, target: Tensor, terms: LossTerms) -> Tensor:
        """The cross-entropy."""
        if not terms.gamma and terms.weights is None:
            return F.cross_entropy(at_least_float32(scores), target, reduction="sum").double()[None]
        log_BK = at_least_float32(scores).log_softmax(1)
        share_BK = _class_shares(target, scores.shape[1]).to(log_BK) * (1 if terms.weights is None else terms.weights)
        focus_BK = (1 - log_BK.exp()).clamp_min(torch.finfo(log_BK.dtype).eps) ** terms.gamma
        return -(share_BK * focus_BK * log_BK).sum().double()[None]

    def answer(self, session: Predictor, sample: Sample, side: int | None) -> NDArray[Any]:
        """The label, (1,)."""
        return np.array([np.argmax(predict(session, sample.image))], dtype=session.signature.label_type)

    def truth(self, sample: Sample) -> Iterator[tuple[int, NDArray[Any]]]:
        yield 0, np.array([sample.target])

    def measure(self, session: Predictor, samples: Sequence[Sample], *, tile: int) -> list[float]:
        """1 for each right picture, 0 for each wrong one."""
        return [float(self.answer(session, sample, None)[0] == sample.target) for sample in samples]

    def examples(self, directory: Path, judged: Judging, classes: Sequence[ClassInfo], *, side: int) -> dict[str, Any]:
        return {"examples": write_class_examples(directory, judged.session, judged.samples, judged.answers or [], classes, side=side)}

    def shown(self, image_HWC: UInt8, target: NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
        return to_rgb(image_HWC)

    def caption(self, target: NDArray[Any], classes: Sequence[ClassInfo]) -> list[LegendEntry]:
        """The class of a picture, or its shares of classes, the largest first."""
        if not target.ndim:
            return [(classes[int(target)].name, classes[int(target)].color)]
        order = sorted(np.flatnonzero(target).tolist(), key=lambda k: -target[k])
        return [(f"{classes[k].name} {target[k]:.0%}", classes[k].color) for k in order]


def _class_shares(target: Tensor, classes: int) -> Tensor:
    """Shares of the classes in each picture `(B, K)`, from class numbers `(B,)` or such shares."""
    return F.one_hot(target, classes) if target.ndim == 1 else target
