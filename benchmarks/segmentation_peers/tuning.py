"""Choosing how to train: on parts of `earth` that training may see, and not on its validation split.

That split is a strip of ocean with hardly any desert, and could not tell 5e-4 from 2e-3 for a model that ends four points apart
(docs/log.md). For a choice, and for it alone, parts of the training split are held out in its place: four strips beside the rest for a
learning rate, or a whole region, which tells more of what a change is worth in a part of the world that was never seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from muntin.data import open_source
from muntin.data.config import DataConfig
from muntin.data.earth import GAP_DEGREES, EarthSource
from muntin.data.source import HeldSamples, Sample, Samples, SplitName
from muntin.training.checkpoint import build_model
from muntin.training.interrupt import Interruption
from muntin.training.loop import Training, prepare_hardware
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer
from segmentation_peers.budget import Interrupted

Spans = tuple[tuple[float, float], ...]
"""From where to where, degrees east."""
HELD_OUT: Spans = ((-90.0, -75.0), (-22.5, -7.5), (30.0, 45.0), (90.0, 105.0))
"""Each beside another split, so that what is left is in four pieces (the Americas, West Africa, Arabia, China)."""
REGIONS: dict[str, Spans] = {"Americas": ((-90.0, -45.0),), "Africa": ((-22.5, 45.0),), "Asia": ((90.0, 179.0),)}
"""The training split's stretches that hold more land than sea, each with what lies beside it: Europe, Australia. The fourth, -180 to -135,
stays with what is trained on, and a degree lies between it and Asia."""


class Held:
    """A source of `earth` whose training split gives strips away to be validated on."""

    def __init__(self, source: EarthSource, spans: Spans = HELD_OUT) -> None:
        self.whole, self.task, self.channels, self.classes, self.notes = source, source.task, source.channels, source.classes, source.notes
        self._spans = spans

    def split(self, name: SplitName) -> Samples:
        """Training without what is held out, and a degree beside it; what is held out; the test split is not to be had here."""
        if name == "test":
            raise ValueError("nothing is chosen on the test split")
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


def admission(source: EarthSource) -> Samples:
    """What a quantised variant is held against f32 on: the validation split, and land that has been trained on, with every class."""
    strips = Held(source).split("validation")
    return HeldSamples([*source.split("validation"), *strips])


def held_out(recipe: Recipe, folder: Path, spans: Spans = HELD_OUT) -> Training:
    """A training by a recipe on all but what is held out, over and validated on that."""
    source = open_source(DataConfig(source=recipe.data.source), root=Path.cwd())
    assert isinstance(source, EarthSource)
    held = Held(source, spans)
    precision = prepare_hardware(recipe.training, begun=None)
    torch.manual_seed(recipe.seed)
    trainer = Trainer(build_model(recipe, source.classes), recipe.training, task=recipe.task, precision=precision)
    training = Training(trainer, recipe, held, directory=folder, root=Path.cwd(), start=None, report=lambda progress: None)
    with Interruption() as interruption:
        training.run(interruption)
    if not training.finished:
        raise Interrupted
    return training


def held_out_score(recipe: Recipe, folder: Path) -> tuple[float, int]:
    """mIoU on what is held out after training on the rest by a recipe, and the steps that it took."""
    training = held_out(recipe, folder)
    return float(training.validation[-1]["score"]), training.step
