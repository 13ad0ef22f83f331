"""Choosing how to train: on parts of what training may see, and not on the validation split.

That of `earth` is a strip of ocean with hardly any desert, and could not tell 5e-4 from 2e-3 for a model that ends four points apart.
Nor could narrow strips beside what is trained on: a low rate learns them best, while a part of the world that was never seen, as the test
split is, wants a high one, the more so the longer training is (docs/log.md). So for a choice, and for it alone, a whole region of the
training split is held out in its place, and what is tried is trained as long as it will be. Of pictures in folders it is every fifth that
training has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

from muntin.data import open_source
from muntin.data.earth import GAP_DEGREES, EarthSource
from muntin.data.source import CheckProgress, HeldSamples, Sample, Samples, Source, SplitName
from muntin.errors import DataError
from muntin.training.loop import Training
from muntin.training.model_checks import measured_precision
from muntin.training.precision import prepare_hardware
from muntin.training.progress.interrupt import Interruption
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer
from muntin.training.weights import build_model
from segmentation_peers.budget import Interrupted

Spans = tuple[tuple[float, float], ...]
"""From where to where, degrees east."""
REGIONS: dict[str, Spans] = {"Americas": ((-90.0, -45.0),), "Africa": ((-22.5, 45.0),), "Asia": ((90.0, 179.0),)}
"""The training split's stretches that hold more land than sea, each with what lies beside it: Europe, Australia. The fourth, -180 to -135,
stays with what is trained on, and a degree lies between it and Asia."""
HELD_OUT = REGIONS["Africa"]
"""For a rate."""
ADMITTING: Spans = ((-90.0, -75.0), (-22.5, -7.5), (30.0, 45.0), (90.0, 105.0))
"""Land with every class: the Americas, West Africa, Arabia, China."""
EACH = 5
"""Pictures in folders, of which one is held out."""


class Held(ABC):
    """A source whose training split gives parts away to be validated on. Its test split is not to be had."""

    def __init__(self, source: Source) -> None:
        self.task, self.channels, self.classes, self.notes = source.task, source.channels, source.classes, source.notes

    def split(self, name: SplitName) -> Samples:
        """Training without what is held out; what is held out."""
        if name == "test":
            raise ValueError("nothing is chosen on the test split")
        return self.parted(name)

    @abstractmethod
    def parted(self, name: SplitName) -> Samples: ...

    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        """Nothing: whoever made the source has checked it."""
        return ()


class HeldStrips(Held):
    """Strips of `earth`, with a degree left out beside each."""

    def __init__(self, source: EarthSource, spans: Spans = HELD_OUT) -> None:
        super().__init__(source)
        self.whole, self._spans = source, spans

    def parted(self, name: SplitName) -> Samples:
        image_HWC, labels_HW = self.whole.picture()
        degree = image_HWC.shape[1] / 360
        found = []
        for start, end, split in self.whole.borders():
            if split != "train":
                continue
            held = [(round((west + 180) * degree), round((east + 180) * degree)) for west, east in self._spans]
            inside = [(max(start, first), min(end, last)) for first, last in held if first < end and last > start]
            if name == "validation":
                found += inside
                continue
            gap, kept = round(GAP_DEGREES * degree), np.ones(end - start, dtype=bool)
            for first, last in inside:
                kept[max(0, first - start - gap) : last - start + gap] = False
            edges = np.flatnonzero(np.diff(np.concatenate(([0], kept, [0])))) + start
            found += list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        return HeldSamples(
            [Sample(name=f"{start}-{end}", image=image_HWC[:, start:end], target=labels_HW[:, start:end]) for start, end in found]
        )


class HeldPictures(Held):
    """Every fifth picture."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._samples = source.split("train")
        if len(self._samples) < EACH:
            raise DataError(f"{len(self._samples)} pictures to train on: a search for the rate holds one of {EACH} out; give more")

    def parted(self, name: SplitName) -> Samples:
        return self._samples.select([index for index in range(len(self._samples)) if (index % EACH == 0) == (name == "validation")])


def admission(source: Source) -> Samples:
    """Return the data on which a quantised variant is compared with f32: the validation split; for `earth` also land that was trained on,
    with every class."""
    if not isinstance(source, EarthSource):
        return source.split("validation")
    return HeldSamples([*source.split("validation"), *HeldStrips(source, ADMITTING).split("validation")])


def held_out(recipe: Recipe, folder: Path, spans: Spans = HELD_OUT, *, root: Path | None = None) -> Training:
    """A training by a recipe on all but what is held out, over and validated on that. `root`: where the recipe's paths start."""
    root = Path.cwd() if root is None else root
    source = open_source(recipe.data, root=root)
    held = HeldStrips(source, spans) if isinstance(source, EarthSource) else HeldPictures(source)
    precision = prepare_hardware(recipe.training, begun=None)
    torch.manual_seed(recipe.seed)
    model, classes = build_model(recipe, source.classes), tuple(source.classes)
    precision = measured_precision(model, precision, recipe, classes)
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=precision)
    training = Training(trainer, recipe, held, directory=folder, root=root, start=None, report=lambda progress: None)
    with Interruption() as interruption:
        training.run(interruption)
    if interruption.requested:  # in the validation at its end, too
        raise Interrupted
    return training


def held_out_score(recipe: Recipe, folder: Path, *, root: Path) -> tuple[float, int]:
    """mIoU on what is held out after training on the rest by a recipe, and the steps that it took."""
    training = held_out(recipe, folder, root=root)
    return float(training.validation[-1]["score"]), training.step
