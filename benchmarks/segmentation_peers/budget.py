"""The budget of a model's training, and the training itself: muntin's own loop for every model.

A budget of minutes is wall-clock time of training (`training.minutes`): the learning rate falls with the time that is left, so every
model uses its minutes up, whatever pace the machine is in. Where a hybrid goes through the stages of compression their training counts,
too. What comes between and after does not, for any model: the validation at the end of each training, a hybrid's low rank, calibration
and measuring of bits, NNCF and export. What of that belongs to training is in a row as `other_minutes` (not where it was interrupted).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import muntin
from muntin.compression.stages import FOLDER, CompressionRun, compress_checkpoint
from muntin.data.config import DataConfig
from muntin.data.folders import FolderPair
from muntin.models import create_model
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import checkpoints_in
from muntin.training.model_checks import check_maps
from muntin.training.precision import resolve_precision
from muntin.training.recipe import Recipe, load_recipe, override_recipe
from segmentation_peers.models import Entry

ENDLESS = 10**7
"""Steps that no budget of minutes reaches."""


class Interrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """Ctrl-C came during training: a checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that all models share: the recipe (data, crops, augmentation, loss, optimiser and stages), the precision of training, and
    threads (the deployed model's, too). `source`: name of the comparison. `root`: folder that the recipe's paths start at."""

    source: str
    recipe: Recipe
    root: Path
    precision: str
    threads: int

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the settings of a row. They hold no path of this machine except the recipe's own."""
        pictures = {"pictures": digest_of(self.recipe.data, self.root)} if self.recipe.data.images is not None else {}
        return {
            "source": self.source, "recipe": self.recipe.model_dump(mode="json"), "precision": self.precision, "threads": self.threads,
            **pictures,
        }  # fmt: skip


def digest_of(data: DataConfig, root: Path) -> str:
    """Compute a digest of the names and contents of a recipe's folders or shards: changed pictures need new rows. Reads all files."""
    pairs = [FolderPair(images=data.images or Path(), masks=data.masks)]
    pairs += [share for share in (data.validation, data.test) if isinstance(share, FolderPair)]
    folders = [folder for pair in pairs for folder in (pair.under(root).images, pair.under(root).masks) if folder is not None]
    found = hashlib.sha256()
    for number, place in enumerate(folders):
        folder = place if place.is_dir() else place.parent
        for path in sorted(place.rglob("*") if folder is place else folder.glob(place.name)):
            if path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                found.update(json.dumps([number, path.relative_to(folder).as_posix(), content]).encode())
    return found.hexdigest()


def base_recipe(path: Path | None, source: str, *, crop: int | None, batch_size: int | None) -> Recipe:
    """The user's, or the demonstration's with another source; crops and batches as in there unless others are given."""
    changes = {} if path is not None else {"data.source": source}
    changes |= {key: str(value) for key, value in {"data.crop": crop, "training.batch_size": batch_size}.items() if value is not None}
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml" if path is None else path, overrides)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Wall-clock minutes of training, or crops seen in it: one of the two."""

    minutes: float | None = None
    samples: int | None = None

    @property
    def name(self) -> str:
        return f"minutes-{self.minutes:g}" if self.samples is None else f"samples-{self.samples}"

    @property
    def told(self) -> str:
        return f"{self.minutes:g} min of training" if self.samples is None else f"{self.samples} crops of training"


def recipe_for(entry: Entry, setting: Setting, budget: Budget, *, seed: int, learning_rate: float, stages: bool) -> Recipe:
    """The setting's recipe with another model and length: its crops, augmentation, loss, optimiser and averaged weights.

    `stages`: what the stages train for is left to them. A checkpoint is written at the end, or when the run is interrupted: a larger
    model loses no minutes to writing one.
    """
    changes = {
        "name": entry.name, "seed": seed, "model": f"{{name: '{entry.model}'}}", "training.learning_rate": learning_rate,
        "training.precision": precision_for(entry, setting), "training.threads": setting.threads,
        "training.validate_every": ENDLESS, "training.checkpoint_every": ENDLESS,
    }  # fmt: skip
    recipe = override_recipe(setting.recipe, [f"{key}={value}" for key, value in changes.items()])
    made = recipe.compression
    recover = 0.0 if made.low_rank is None else made.recover.share  # without it there is nothing to recover from
    whole = 1 + (recover + made.quantize.share + made.mix.share if stages else 0)
    if budget.samples is not None:
        steps, minutes = int(budget.samples / recipe.training.batch_size / whole), None
        if steps < 1:
            raise ValueError(f"{recipe.name}: {budget.name} leaves no step of {recipe.training.batch_size} crops: give it more")
    else:
        assert budget.minutes is not None
        steps, minutes = ENDLESS, budget.minutes / whole
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps, "minutes": minutes})})


def precision_for(entry: Entry, setting: Setting) -> str:
    """Return the precision that one model is trained in: FP32 in place of BF16 where `muntin fit` chooses that (`check_maps`)."""
    if setting.precision != "bf16" or torch.cuda.is_available():
        return setting.precision
    data = setting.recipe.data
    model = create_model(entry.model, classes=2, channels=data.channels)
    asked = resolve_precision("bf16", "cpu")
    return check_maps(model, asked, crop=data.crop, channels=data.channels, requested="auto").name


def train(recipe: Recipe, folder: Path, root: Path) -> Checkpoint:
    """`muntin fit`, gone on with where it was interrupted."""
    result = muntin.fit(recipe, directory=folder, root=root, resume=bool(checkpoints_in(folder / "checkpoints")))
    if result.stop_requested:
        raise Interrupted
    return read_checkpoint(folder)


def compress(checkpoint: Checkpoint, folder: Path) -> CompressionRun:
    """`muntin compress` through all stages, gone on with where it was interrupted."""
    run = compress_checkpoint(checkpoint, folder, resume=True)
    if run.stop_requested:
        raise Interrupted
    return run


def train_whole(entry: Entry, recipe: Recipe, folder: Path, root: Path) -> tuple[Checkpoint, Checkpoint | None, dict[str, Any]]:
    """The FP32 model, what the stages made of it where the entry goes through them, and what both used of the budget."""
    begun, started = folder.exists(), time.perf_counter()
    checkpoint = train(recipe, folder, root)
    trained = [checkpoint]
    if entry.way == "stages":
        trained += [read_checkpoint(stage.checkpoint) for stage in compress(checkpoint, folder / FOLDER).stages]
    seconds = sum(one.state.training[-1]["seconds"] for one in trained)
    steps = [one.state.step for one in trained]
    figures = {
        "steps": steps[0],
        "stage_steps": steps[1:],
        "samples": recipe.training.batch_size * sum(steps),
        "minutes": seconds / 60,
        "other_minutes": None if begun else (time.perf_counter() - started - seconds) / 60,
        "images_per_s": checkpoint.state.training[-1]["images_per_s"],
    }
    return checkpoint, trained[-1] if len(trained) > 1 else None, figures
