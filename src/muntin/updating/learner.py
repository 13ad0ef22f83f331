"""Training that goes on from a checkpoint with new data, into a run folder of its own.

    parent's checkpoint -> more classes -> trainer (compressed models: ranks and bits stay, quantisation-aware training goes on)
    old data, new data  -> RUN/data     -> batches by strategy -> checkpoints, whose lineage names the parent and the data

A killed update goes on from its newest checkpoint, in the same bits.

Axes: K classes, H W map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from muntin.compression.loading import load_model
from muntin.compression.structure import structure_fields
from muntin.data import Crops, calibration_batches, open_source
from muntin.data.batches import BatchMaker
from muntin.data.source import Samples, Source
from muntin.errors import CheckpointError
from muntin.images import IGNORED
from muntin.images.opening import UInt8
from muntin.models import TorchSession
from muntin.models.compression_record import CompressionRecord
from muntin.runtime.tiles import predict
from muntin.tasks.folders import SplitName
from muntin.tasks.samples import Sample
from muntin.text import list_some
from muntin.training.checkpoint import Checkpoint, UpdateRecord, checkpoints_in, newest_sound, read_checkpoint
from muntin.training.config import TrainingConfig
from muntin.training.evaluation import tile_of
from muntin.training.loop import Training
from muntin.training.loss import class_weights, loss_of
from muntin.training.model_checks import check_maps, measured_precision
from muntin.training.precision import prepare_hardware
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.report import FitProgress, FitReport
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer
from muntin.training.weights import new_model
from muntin.updating.features import FeatureTaps, UpdateLoss, feature_names, mean_features
from muntin.updating.growth import classifier_tensors, grown_model
from muntin.updating.strategies import STRATEGIES, ReplayCrops, Strategy, freeze_body
from muntin.updating.update_data import NEW, OLD, Describe, Relabel, UpdatePlan, of_kind, read_listing, update_data_config, write_data

SEED = 15485863
"""Added to the recipe's seed, so that an update draws other crops than `fit`."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A finished or interrupted training. `checkpoint`: the newest one."""

    checkpoint: Checkpoint
    finished: bool
    notes: tuple[str, ...]


def learn(plan: UpdatePlan, directory: Path, *, report: FitReport = lambda progress: None) -> Learned:
    """Write the data of an update into `directory`, and train there; go on if it holds a part of the same update.

    Costs `update.share` of the first training, each step with a teacher a third more. Raises `CheckpointError` if the folder holds another
    run, or another update.
    """
    listing, folder = read_listing(directory), directory / "checkpoints"
    if (listing is None and checkpoints_in(folder)) or (listing is not None and not plan.same(listing)):
        raise CheckpointError(f"{directory} holds another run, or an update with other data or settings: give another --output")
    if listing is None:
        _prepare(plan, directory, report)
    return _Learner(plan, directory, report).run()


def update_recipe(plan: UpdatePlan) -> Recipe:
    """The recipe of an update: that of its parent with the data in its own folder, and with its own training."""
    recipe, config = plan.parent.recipe, plan.config
    strategy, base = STRATEGIES[config.strategy], base_steps(plan.parent)
    steps = base if strategy.whole else max(1, round(config.share * base))
    rate = config.learning_rate
    changes: dict[str, Any] = {"steps": steps, "minutes": None, "compile": False, "validate_every": steps, "patience": None}
    changes |= {"sharding": "none"}
    if not (strategy.whole and plan.parent.state.compression is None):
        changes |= {"learning_rate": rate, "final_learning_rate": 0.0, "average": config.average}
    if strategy.head_only:
        changes |= {"weight_decay": 0.0}  # frozen rows of the last layer keep their weights
    training = TrainingConfig.model_validate(recipe.training.model_dump() | changes)
    return recipe.model_copy(update={"data": update_data_config(plan.parent, plan.classes), "training": training, "update": config})


def base_steps(parent: Checkpoint) -> int:
    """Steps of the first training of a checkpoint's model."""
    state = parent.state
    if state.update is not None:
        return state.update.steps
    return parent.trained_steps if state.compression is None else state.compression.steps


def _prepare(plan: UpdatePlan, directory: Path, report: FitReport) -> None:
    def stage(name: str) -> None:
        report(FitProgress(kind="prepare", step=0, steps=0, note=name))

    stage("checking the new pictures")
    plan.new.check()
    describe: Describe | None = None
    relabel: Relabel | None = None
    if plan.config.choice == "herding":
        model = load_model(plan.parent)
        (crop,) = _one_crop(plan.old.split("train"), plan.parent.recipe)
        taps = FeatureTaps(model, feature_names(model, crop, classifier_tensors(model, plan.parent))).attach()

        def describe(image: UInt8) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
            return mean_features(taps, image)

    if plan.config.background is not None and plan.parent.recipe.answer.masks:
        relabel = hidden_classes(plan)
    write_data(plan, directory, describe=describe, relabel=relabel, report=stage)


def _one_crop(samples: Samples, recipe: Recipe) -> list[torch.Tensor]:
    return list(calibration_batches(samples, crop=recipe.data.crop, count=1, batch_size=1, seed=recipe.seed, task=recipe.task))


def hidden_classes(plan: UpdatePlan) -> Relabel:
    """A function that finds old classes in the background of new pictures (see `update_data`). Costs a prediction of each picture."""
    name, names = plan.config.background, [entry.name for entry in plan.parent.state.classes]
    if name not in names:
        raise CheckpointError(f"update.background: the model has no class {name!r}: it has {', '.join(names)}")
    background = names.index(name)
    session, tile = TorchSession(load_model(plan.parent), plan.parent.signature), tile_of(plan.parent.recipe.data.crop)

    def relabel(image_HWC: UInt8, labels_HW: UInt8, judging: bool) -> UInt8:
        scores_KHW = predict(session, image_HWC, tile=tile, output="scores")
        p_KHW = np.exp(scores_KHW - scores_KHW.max(0))
        p_KHW /= p_KHW.sum(0)
        found_HW = p_KHW.argmax(0).astype(np.uint8)
        hidden_HW = (labels_HW == background) & (found_HW != background) & (p_KHW.max(0) >= plan.config.confidence)
        return np.where(hidden_HW, IGNORED if judging else found_HW, labels_HW).astype(np.uint8)

    return relabel


class _Learner:
    def __init__(self, plan: UpdatePlan, directory: Path, report: FitReport) -> None:
        self.plan, self.directory, self.report = plan, directory.resolve(), report
        self.strategy: Strategy = STRATEGIES[plan.config.strategy]
        self.recipe = update_recipe(plan)
        self.source = open_source(self.recipe.data, task=self.recipe.task, root=self.directory)
        self.notes: list[str] = [*plan.new.notes]
        listing = read_listing(directory)
        if listing is not None and listing.unseen and self.strategy.old != "all":
            self.notes.append(
                f"no picture to train with shows {list_some(listing.unseen)}: add pictures of it, or keep more old ones (update.memory)"
            )

    def run(self) -> Learned:
        plan, parent, recipe = self.plan, self.plan.parent, self.recipe
        folder = self.directory / "checkpoints"
        start = newest_sound(folder, note=self.notes.append) if checkpoints_in(folder) else None
        precision = prepare_hardware(recipe.training, begun=None if start is None else start.state.precision)
        torch.manual_seed(recipe.seed)
        model = load_model(start) if start is not None else self._begin()
        precision = measured_precision(model, precision, recipe, tuple(self.source.classes))
        precision = check_maps(model, precision, crop=recipe.data.crop, channels=recipe.data.channels, requested=recipe.training.precision)
        classifier = classifier_tensors(load_model(parent), parent)
        if self.strategy.head_only:
            freeze_body(model, classifier, added=bool(plan.added))
        taught = self.strategy.teacher and plan.config.distillation + plan.config.features > 0
        teacher = load_model(parent) if taught else None
        weights_K = class_weights(recipe.training, _TrainedWith(self.source, self._samples()))
        usual = loss_of(recipe.training, task=recipe.task, weights=weights_K, distillation=1.0)
        loss = UpdateLoss(
            **vars(usual), scores=plan.config.distillation, features=plan.config.features,
            taps=None if teacher is None else self._taps(model, teacher, classifier),
        )  # fmt: skip
        seed = recipe.seed + SEED
        trainer = Trainer(
            model, recipe.training, task=recipe.task, precision=precision, teacher=teacher, loss=loss if taught else None,
            class_weights=weights_K, seed=seed,
        )  # fmt: skip
        if loss.taps is not None:  # after the trainer has copied the model
            for taps in loss.taps:
                taps.attach()
        training = _UpdateTraining(
            trainer, recipe, _TrainedWith(self.source, self._samples()), directory=self.directory, root=self.directory, start=start,
            report=self.report, seed=seed, compression=self._record(model),
        )  # fmt: skip
        training.update = UpdateRecord(
            parent=parent.state.weights, data=plan.new.listing_digest(), strategy=plan.config.strategy, added=plan.added,
            steps=base_steps(parent),
        )  # fmt: skip
        training.mix = self._mixed if self.strategy.old == "memory" else None
        with Interruption() as interruption:
            path = training.run(interruption)
        return Learned(checkpoint=read_checkpoint(path), finished=training.finished, notes=(*self.notes, *training.notes))

    def _begin(self) -> nn.Module:
        if self.strategy.whole and self.plan.parent.state.compression is None:
            return new_model(self.recipe, tuple(self.source.classes))
        return grown_model(self.plan.parent, tuple(self.source.classes))

    def _record(self, model: nn.Module) -> CompressionRecord | None:
        record = self.plan.parent.state.compression
        if record is None:
            return None
        return record.model_copy(update=structure_fields(model) | {"changes": record.changes})

    def _taps(self, model: nn.Module, teacher: nn.Module, classifier: dict[str, int]) -> tuple[FeatureTaps, FeatureTaps] | None:
        if not self.plan.config.features:
            return None
        (crop,) = _one_crop(self.source.split("train"), self.recipe)
        names = feature_names(teacher, crop, classifier)
        if not names:
            self.notes.append("the model has no map before its last layer: update.features has no effect")
            return None
        return FeatureTaps(model, names), FeatureTaps(teacher, names)

    def _samples(self) -> Samples:
        """The pictures to train with: of the run's folder, for `joint` all of the parent's, for `frozen` see `strategies`."""
        train = self.source.split("train")
        if self.strategy.old == "none" and not (self.strategy.head_only and not self.plan.added):
            return of_kind(train, NEW)
        if self.strategy.old == "all":
            return _Joined(self.plan.old.split("train"), of_kind(train, NEW))
        return train

    def _mixed(self, crops: Callable[[Samples], BatchMaker]) -> BatchMaker:
        train, size = self.source.split("train"), self.recipe.training.batch_size
        old, new = (crops(of_kind(train, prefix)) for prefix in (OLD, NEW))
        return ReplayCrops(old, new, batch_size=size, share=self.plan.config.replay, seed=self.recipe.seed + SEED)


class _UpdateTraining(Training):
    """A `Training` whose batches `mix` may make, from a function that makes crops of some samples."""

    keeps_best = False
    mix: Callable[[Callable[[Samples], BatchMaker]], BatchMaker] | None = None

    def crops(self, samples: Samples) -> BatchMaker:
        usual: Callable[[Samples], Crops] = super().crops  # type: ignore[assignment]
        return usual(samples) if self.mix is None else self.mix(usual)


class _TrainedWith:
    """A source with another training split."""

    def __init__(self, source: Source, train: Samples) -> None:
        self.task, self.classes, self.channels, self.notes = source.task, source.classes, source.channels, source.notes
        self._source, self._train = source, train

    def split(self, name: SplitName) -> Samples:
        return self._train if name == "train" else self._source.split(name)

    def check(self, progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
        return self._source.check(progress)


class _Joined(Samples):
    """Samples of two splits, one after the other."""

    def __init__(self, first: Samples, second: Samples) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def load(self, index: int) -> Sample:
        return self._first.load(index) if index < len(self._first) else self._second.load(index - len(self._first))

    def sizes(self) -> list[tuple[int, int]]:
        return [*self._first.sizes(), *self._second.sizes()]
