"""Choosing a learning rate: on parts of `earth` that training may see, and not on its validation split.

That split is a strip of ocean with hardly any desert, and could not tell 5e-4 from 2e-3 for a model that ends four points apart
(docs/log.md). For the search, and for it alone, four strips of the training split are held out in its place.
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

HELD_OUT = ((-90.0, -75.0), (-22.5, -7.5), (30.0, 45.0), (90.0, 105.0))
"""Degrees east, each beside another split, so that what is left is in four pieces (the Americas, West Africa, Arabia, China)."""


class Held:
    """A source of `earth` whose training split gives strips away to be validated on."""

    def __init__(self, source: EarthSource) -> None:
        self.whole, self.task, self.channels, self.classes, self.notes = source, source.task, source.channels, source.classes, source.notes

    def split(self, name: SplitName) -> Samples:
        """Training without what is held out, and a degree beside it; what is held out; the test split is not to be had here."""
        if name == "test":
            raise ValueError("a learning rate is not chosen on the test split")
        image_HWC, labels_HW = self.whole.picture()
        degree = image_HWC.shape[1] / 360
        found = []
        for start, end, split in self.whole.borders():
            if split != "train":
                continue
            held = [(round((west + 180) * degree), round((east + 180) * degree)) for west, east in HELD_OUT]
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


def held_out_score(recipe: Recipe, folder: Path) -> tuple[float, int]:
    """mIoU on what is held out after training on the rest by a recipe, and the steps that it took."""
    source = open_source(DataConfig(source=recipe.data.source), root=Path.cwd())
    assert isinstance(source, EarthSource)
    held = Held(source)
    precision = prepare_hardware(recipe.training, begun=None)
    torch.manual_seed(recipe.seed)
    trainer = Trainer(build_model(recipe, source.classes), recipe.training, task=recipe.task, precision=precision)
    training = Training(trainer, recipe, held, directory=folder, root=Path.cwd(), start=None, report=lambda progress: None)
    with Interruption() as interruption:
        training.run(interruption)
    if not training.finished:
        raise Interrupted
    return float(training.validation[-1]["score"]), training.step
