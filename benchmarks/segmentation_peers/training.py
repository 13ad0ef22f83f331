"""The training of every compared model by muntin's own loop: its budget, its recipe, and the data on which choices are made.

A budget of minutes is wall-clock time of training (`training.minutes`): the learning rate falls with the time that is left. All candidates
of a hybrid's compression count too. For no model the rest counts: validation after each training, tables of ranks and bits, calibration,
NNCF, export and scores. The part of the rest that belongs to training is a row's `other_minutes` (None if it was interrupted).

The validation split of `earth` is a strip of ocean with hardly any desert, and strips beside the training data favour rates that are too
low for unseen regions (docs/log.md). A rate is chosen on a whole region of the training split, which is left out of training for that
choice alone; with folders, on every fifth image. Each trial trains as long as the final training.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from documents import Row
from muntin.budgeting.run_budget import compress_run
from muntin.data import DataConfig, EarthSource, FolderPair, Sample, Samples, Source, open_source
from muntin.data.earth import GAP_DEGREES
from muntin.data.source import CheckProgress, HeldSamples
from muntin.errors import DataError
from muntin.models import create_model
from muntin.models.trusted_code import trust_model
from muntin.tasks.folders import SplitName
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import digest_of_file
from muntin.training.loop import Training
from muntin.training.model_checks import check_maps, measured_precision
from muntin.training.precision import prepare_hardware, resolve_precision
from muntin.training.progress.interrupt import Interruption
from muntin.training.recipe import Recipe, override_recipe
from muntin.training.trainer import Trainer
from muntin.training.weights import build_model
from resumed import demo_recipe
from resumed import trained as train
from segmentation_peers.models import Entry

ENDLESS = 10**7
"""Steps that no budget of minutes reaches."""
CANDIDATES = 3
"""Candidates of a hybrid's compression."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all models of a comparison share. `source`: its name. `root`: folder that the recipe's paths start at. `precision`: of
    training. `threads`: of training and of the deployed models."""

    source: str
    recipe: Recipe
    root: Path
    precision: str
    threads: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings of a row. They hold no path of this machine except the recipe's own."""
        images = {"pictures": digest_of(self.recipe.data, self.root)} if self.recipe.data.images is not None else {}
        shared = {"source": self.source, "precision": self.precision, "threads": self.threads}
        return {**shared, "recipe": self.recipe.model_dump(mode="json"), **images}


def digest_of(data: DataConfig, root: Path) -> str:
    """Compute a digest of the names and contents of a recipe's folders or shards: changed images need new rows. Reads all files."""
    pairs = [FolderPair(images=data.images or Path(), masks=data.masks)]
    pairs += [share for share in (data.validation, data.test) if isinstance(share, FolderPair)]
    folders = [folder for pair in pairs for folder in (pair.under(root).images, pair.under(root).masks) if folder is not None]
    digest = hashlib.sha256()
    for number, place in enumerate(folders):
        folder = place if place.is_dir() else place.parent
        for path in sorted(place.rglob("*") if folder is place else folder.glob(place.name)):
            if path.is_file():
                digest.update(json.dumps([number, path.relative_to(folder).as_posix(), digest_of_file(path)]).encode())
    return digest.hexdigest()


def base_recipe(path: Path | None, source: str, *, crop: int | None, batch_size: int | None) -> Recipe:
    """The user's recipe, or the demonstration's with another source; with other crops and batches if they are given."""
    changes = {"data.source": None if path is not None else source, "data.crop": crop, "training.batch_size": batch_size}
    return demo_recipe({key: value for key, value in changes.items() if value is not None}, path)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Wall-clock minutes of training, or crops seen in it: one of the two."""

    minutes: float | None = None
    samples: int | None = None

    @property
    def name(self) -> str:
        return f"minutes-{self.minutes:g}" if self.samples is None else f"samples-{self.samples}"


def recipe_for(entry: Entry, setting: Setting, budget: Budget, *, seed: int, learning_rate: float, compressed: bool) -> Recipe:
    """The setting's recipe with another model and length.

    `compressed`: the share that candidates of compression train for is left to them. A checkpoint is written at the end, or when the run is
    interrupted, so that a larger model loses no minutes to writing.
    """
    changes = {
        "name": entry.name, "seed": seed, "model": f"{{name: '{entry.model}'}}", "training.learning_rate": learning_rate,
        "training.precision": precision_for(entry, setting), "training.threads": setting.threads,
        "training.validate_every": ENDLESS, "training.checkpoint_every": ENDLESS,
        "compression.trials": CANDIDATES, "compression.widths": [1], "compression.course": "direct",
    }  # fmt: skip
    recipe = override_recipe(setting.recipe, [f"{key}={value}" for key, value in changes.items()])
    config = recipe.compression
    share = 1 + (CANDIDATES * (config.recover.share + config.quantize.share + config.mix.share) if compressed else 0)
    if budget.samples is not None:
        steps, minutes = int(budget.samples / recipe.training.batch_size / share), None
        if steps < 1:
            raise ValueError(f"{recipe.name}: {budget.name} leaves no step of {recipe.training.batch_size} crops: give it more")
    else:
        assert budget.minutes is not None
        steps, minutes = ENDLESS, budget.minutes / share
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps, "minutes": minutes})})


def precision_for(entry: Entry, setting: Setting) -> str:
    """The precision that one model is trained in: FP32 in place of BF16 where `muntin fit` chooses that (`check_maps`)."""
    if setting.precision != "bf16" or torch.cuda.is_available():
        return setting.precision
    crop, channels = setting.recipe.data.crop, setting.recipe.data.channels
    model = create_model(entry.model, classes=2, channels=channels)
    return check_maps(model, resolve_precision("bf16", "cpu"), crop=crop, channels=channels, requested="auto").name


def train_whole(entry: Entry, recipe: Recipe, folder: Path, root: Path) -> tuple[Checkpoint, Path | None, Row]:
    """The FP32 model, the chosen artifact if the entry is compressed, and what all candidates used of the budget."""
    begun, started = folder.exists(), time.perf_counter()
    checkpoint = train(recipe, folder, root)
    found = compress_run(checkpoint) if entry.way == "compressed" else None
    trials = () if found is None else found.trials
    trained = [checkpoint, *(read_checkpoint(trial.folder) for trial in trials if trial.number and not trial.failed)]
    seconds = sum(each.state.training[-1]["seconds"] for each in trained)
    steps = [each.state.step for each in trained]
    figures = {
        "steps": steps[0], "candidate_steps": steps[1:], "samples": recipe.training.batch_size * sum(steps), "minutes": seconds / 60,
        "other_minutes": None if begun else (time.perf_counter() - started - seconds) / 60,
        "images_per_s": checkpoint.state.training[-1]["images_per_s"],
    }  # fmt: skip
    return checkpoint, None if found is None else found.artifact.path, figures


# Data on which choices are made


Spans = tuple[tuple[float, float], ...]
"""Ranges of longitude, degrees east."""
REGIONS: dict[str, Spans] = {"Americas": ((-90.0, -45.0),), "Africa": ((-22.5, 45.0),), "Asia": ((90.0, 179.0),)}
"""Parts of the training split that hold more land than sea, each with the land beside it: Europe, Australia. A fourth, -180 to -135, is
always trained on; a degree lies between it and Asia."""
HELD_OUT = REGIONS["Africa"]
"""The region that a rate is chosen on."""
ADMITTING: Spans = ((-90.0, -75.0), (-22.5, -7.5), (30.0, 45.0), (90.0, 105.0))
"""Land with every class: the Americas, West Africa, Arabia, China."""
EACH = 5
"""Number of images in folders, of which one is held out."""


class Held:
    """A source whose training split gives a part away for validation. Its test split is not available."""

    def __init__(self, source: Source, *, train: Samples, validation: Samples) -> None:
        self.task, self.channels, self.classes, self.notes = source.task, source.channels, source.classes, source.notes
        self._train, self._validation = train, validation

    def split(self, name: SplitName) -> Samples:
        if name == "test":
            raise ValueError("nothing is chosen on the test split")
        return self._train if name == "train" else self._validation

    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        return ()  # the source was checked when it was opened


def held_strips(source: EarthSource, spans: Spans = HELD_OUT) -> Held:
    """Hold strips of `earth` out, and leave out a degree beside each."""
    image_HWC, labels_HW = source.picture()
    degree = image_HWC.shape[1] / 360
    gap, held = round(GAP_DEGREES * degree), [(round((west + 180) * degree), round((east + 180) * degree)) for west, east in spans]
    train: list[tuple[int, int]] = []
    validation: list[tuple[int, int]] = []
    for start, end, split in source.borders():
        if split == "train":
            inside = [(max(start, first), min(end, last)) for first, last in held if first < end and last > start]
            remaining = np.ones(end - start, dtype=bool)
            for first, last in inside:
                remaining[max(0, first - start - gap) : last - start + gap] = False
            edges = np.flatnonzero(np.diff(np.concatenate(([0], remaining, [0])))) + start
            validation += inside
            train += zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)

    def samples(strips: Iterable[tuple[int, int]]) -> Samples:
        return HeldSamples([
            Sample(name=f"{start}-{end}", image=image_HWC[:, start:end], target=labels_HW[:, start:end]) for start, end in strips
        ])  # fmt: skip

    return Held(source, train=samples(train), validation=samples(validation))


def held_images(source: Source) -> Held:
    """Hold every fifth image out."""
    samples = source.split("train")
    if len(samples) < EACH:
        raise DataError(f"{len(samples)} pictures to train on: a search for the rate holds one of {EACH} out; give more")
    parts = [[index for index in range(len(samples)) if (index % EACH == 0) is out] for out in (False, True)]
    return Held(source, train=samples.select(parts[0]), validation=samples.select(parts[1]))


def admission(source: Source) -> Samples:
    """The data on which a quantised variant is compared with f32: the validation split; for `earth` also land that was trained on, with
    every class."""
    if not isinstance(source, EarthSource):
        return source.split("validation")
    return HeldSamples([*source.split("validation"), *held_strips(source, ADMITTING).split("validation")])


def held_out(recipe: Recipe, folder: Path, spans: Spans = HELD_OUT, *, root: Path | None = None) -> Training:
    """Train on all but the held-out part, and validate on it. `root`: where the recipe's paths start. Ctrl-C ends the program."""
    root = Path.cwd() if root is None else root
    source = open_source(recipe.data, task=recipe.task, root=root)
    held = held_strips(source, spans) if isinstance(source, EarthSource) else held_images(source)
    precision = prepare_hardware(recipe.training, begun=None)
    torch.manual_seed(recipe.seed)
    trust_model(recipe.model.name)
    model, classes = build_model(recipe, source.classes), tuple(source.classes)
    precision = measured_precision(model, precision, recipe, classes)
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=precision)
    training = Training(trainer, recipe, held, directory=folder, root=root, start=None, report=lambda progress: None)
    with Interruption() as interruption:
        training.run(interruption)
    if interruption.requested:
        raise SystemExit("interrupted; the same command goes on, that training anew")
    return training
