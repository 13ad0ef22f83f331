"""From a trained model to a small quantised one in three stages of training: low rank, W4A8, mixed precision.

    FP32 checkpoint -> low rank, recover -> quantisation-aware training in W4A8 -> measure, give key layers more bits, train on
                                     every stage learns from the labels and from the FP32 model's answers

The first stage begins by cutting closed channels. A stage starts from the averaged weights of the stage before and writes checkpoints of
its own, so interrupted compression continues in the same bits (unless `training.minutes` limits it).

    RUN/compressed/1-low-rank/checkpoints/step-...     2-w4a8/...     3-mixed/...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.history import remember
from muntin.compression.loading import load_model
from muntin.compression.low_rank.factorization import low_rank
from muntin.compression.quantization.qat import FLOAT, QATConv2d, QATLinear, bits_of, float_weights, prepare_qat, set_bits
from muntin.compression.quantization.reconstruction import reconstruct
from muntin.compression.rewrite import check_kept, is_kept, keepable, named
from muntin.compression.sensitivity import assign_bits, measure_sensitivity
from muntin.compression.structure import structure_fields
from muntin.errors import CheckpointError, RecipeError
from muntin.models.compression_record import STAGES, Change, CompressionRecord, Sensitivity, Stage
from muntin.training.checkpoint import Checkpoint, calibration_of, checkpoints_in, newest_sound, read_checkpoint, source_of
from muntin.training.config import CompressionConfig, QuantizationConfig, StageConfig, TrainingConfig
from muntin.training.distributed.ranks import Ranks, joined_processes, restarted
from muntin.training.fitting import held_folder
from muntin.training.loop import Training
from muntin.training.loss import class_weights
from muntin.training.model_checks import check_maps
from muntin.training.precision import prepare_hardware
from muntin.training.progress.best import out_of_patience
from muntin.training.progress.interrupt import PREPARATION, Interruption
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer

FOLDER = "compressed"
SENSITIVITY_IMAGES = 8
"""Calibration crops for the measurement of each layer's sensitivity. A classifier, with one answer an image, uses all crops."""
StageReport = Callable[[Stage, FitProgress], None]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished or interrupted stage."""

    stage: Stage
    checkpoint: Path
    step: int
    steps: int
    seconds: float
    """Training time."""
    finished: bool
    score: float | None
    """Last score on the validation split."""


@dataclass(frozen=True, kw_only=True)
class CompressionRun:
    """Result of `compress_checkpoint`."""

    directory: Path
    stages: tuple[StageResult, ...]
    interrupted: bool
    """True if steps or stages are left."""
    stop_requested: bool
    """True after Ctrl-C or SIGTERM, also during the last step."""
    notes: tuple[str, ...]
    """Reasons why the result is worse or less certain."""

    @property
    def checkpoint(self) -> Path:
        """The last stage's checkpoint."""
        return self.stages[-1].checkpoint


def compress_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    config: CompressionConfig | None = None,
    quantization: QuantizationConfig | None = None,
    until: Stage = "mixed",
    resume: bool = False,
    report: StageReport = lambda stage, progress: None,
) -> CompressionRun:
    """Take a trained checkpoint through the stages of `config`, by default its recipe's `compression`, each a share of its training.

    `quantization`: replaces the recipe's; only its `calibration_images` and `keep` are used. `directory`: each stage gets a folder in it.
    `until`: the last stage. `resume`: continue from the stages in `directory`; without it, such a directory is refused, and so is one that
    another process compresses into. Ctrl-C ends after the step in progress and leaves a checkpoint. Costs the training of the stages, each
    step about twice one of `fit`, and a forward pass for each layer and width to measure bits.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} is compressed already: give the checkpoint of `muntin fit` that it was made from")
    sections = {"compression": config, "quantization": quantization}
    recipe = checkpoint.recipe.model_copy(update={name: section for name, section in sections.items() if section is not None})
    checkpoint = replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe}))
    with joined_processes() as ranks, held_folder(directory, "muntin compress", ranks) as notes:
        report = report if ranks.first else lambda stage, progress: None
        compression = _Compression(checkpoint, directory, resume or ranks.any(restarted()), report, ranks)
        compression.notes += notes
        with Interruption(answers=ranks.first) as interruption:
            return compression.run(interruption, until)


def stage_checkpoints(directory: Path) -> dict[Stage, Path]:
    """The newest checkpoint of each stage in `directory`, in the stages' order."""
    paths = {stage: checkpoints_in(stage_folder(directory, stage) / "checkpoints") for stage in STAGES}
    return {stage: checkpoints[-1] for stage, checkpoints in paths.items() if checkpoints}


def trained_steps(checkpoint: Checkpoint) -> int:
    """Steps that a run took to train a model, at least 1: fewer than its recipe's if `training.minutes` or `patience` ended it."""
    return max(1, min(checkpoint.state.step, checkpoint.recipe.training.steps))


def stage_steps(recipe: Recipe, stage: Stage) -> int:
    """Training steps of a stage."""
    return round(_stage_config(recipe.compression, stage).share * recipe.training.steps)


def stage_training(recipe: Recipe, stage: Stage) -> TrainingConfig:
    """Training configuration of a stage.

    The learning rate falls once over both stages of quantisation-aware training: the first ends at the rate at which the second begins.
    The second warms up nevertheless: with a new optimiser, first steps of the full rate move a network off its grids (docs/log.md).
    """
    config, minutes, steps = recipe.compression, recipe.training.minutes, stage_steps(recipe, stage)
    own = _stage_config(config, stage)
    both = stage_steps(recipe, "w4a8") > 0 and stage_steps(recipe, "mixed") > 0
    return recipe.training.model_copy(
        update={
            "steps": steps,
            "minutes": None if minutes is None else minutes * own.share,
            "learning_rate": own.learning_rate,
            "final_learning_rate": min(own.learning_rate, config.mix.learning_rate) if both and stage == "w4a8" else 0.0,
            "average": config.average,
            "gate_budget": 1.0,  # closed channels are cut before the first stage
            "validate_every": max(1, steps),
            "patience": None,
            "compile": False,
        }
    )


def stage_finished(checkpoint: Checkpoint, stage: Stage) -> bool:
    """Return True if a stage's checkpoint is its last one."""
    return stage_training(checkpoint.recipe, stage).share_done(checkpoint.state.step, checkpoint.state.seconds) >= 1


def broken_off(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note if training, by `fit` or a stage, ended before its last step or its validation, with the command that continues."""
    record, state = checkpoint.state.compression, checkpoint.state
    own = record is None or state.update is not None
    config = checkpoint.recipe.training if record is None or own else stage_training(checkpoint.recipe, record.stage)
    command = f"`muntin {'fit RECIPE' if own else 'compress RUN'} --resume`" if state.update is None else "the same `muntin update`"
    if config.share_done(state.step, state.seconds) >= 1 or (own and out_of_patience(config.patience, state.validation)):
        return () if state.judged else (f"its last step was not validated: {command} does it",)
    newest = (checkpoints_in(checkpoint.path.parent) or [checkpoint.path])[-1]  # a copied checkpoint may have another name
    rest = f"{command} goes on" if newest.name == checkpoint.path.name else f"{newest.name} is there, too"
    return (f"step {state.step} of {config.steps_expected(state.step, state.seconds)}: {rest}",)


def _stage_config(config: CompressionConfig, stage: Stage) -> StageConfig:
    stages: dict[Stage, StageConfig] = {"low-rank": config.recover, "w4a8": config.quantize, "mixed": config.mix}
    return stages[stage]


def stage_folder(directory: Path, stage: Stage) -> Path:
    """Folder of a stage in the folder of all stages."""
    return directory / f"{STAGES.index(stage) + 1}-{stage}"


class _Compression:
    def __init__(self, checkpoint: Checkpoint, directory: Path, resume: bool, report: StageReport, ranks: Ranks) -> None:
        self.ranks = ranks
        self.checkpoint, self.directory, self.report = checkpoint, directory, report
        self.recipe = _of_trained_steps(checkpoint)
        self.config = self.recipe.compression
        self.keep = (*self.config.keep, *self.recipe.quantization.keep)
        self.origin = checkpoint.state.weights
        if any(read_checkpoint(path).recipe == checkpoint.recipe for path in stage_checkpoints(directory).values()):
            self.recipe = checkpoint.recipe  # stages of muntin 0.1, whose steps are shares of the recipe's
        if not resume and (existing := stage_checkpoints(directory)):
            for path in existing.values():
                self._own_record(read_checkpoint(path))  # raises if --resume would be refused, too
            raise CheckpointError(f"{directory} already holds stages; --resume goes on with them, another --output starts anew")
        model = load_model(checkpoint)
        check_kept(self.keep, keepable(model))
        hardware, data = self.recipe.training.model_copy(update={"compile": False}), self.recipe.data
        precision = prepare_hardware(hardware, begun=checkpoint.state.precision, ranks=ranks)
        self.precision = check_maps(model, precision, crop=data.crop, channels=data.channels, requested=hardware.precision)
        self.notes = [] if self.precision.name == precision.name else [f"trained in {self.precision.name}: {self.precision.reason}"]
        self.source = source_of(checkpoint)
        self.calibration = calibration_of(checkpoint, self.source)
        self.class_weights = class_weights(self.recipe.training, self.source)

    def run(self, interruption: Interruption, until: Stage) -> CompressionRun:
        results: list[StageResult] = []
        before = self.checkpoint
        stages = [stage for stage in STAGES[: STAGES.index(until) + 1] if stage != "low-rank" or self.config.low_rank is not None]
        if not stages:
            raise RecipeError("compression.low_rank is null, so there is no stage before 'w4a8': choose a later stage, or give it a value")
        for stage in stages:
            before = self._stage(stage, before, interruption)
            results.append(_result(stage, before))
            if not results[-1].finished or interruption.requested:
                break
        record = before.state.compression
        assert record is not None
        return CompressionRun(
            directory=self.directory, stages=tuple(results), interrupted=len(results) < len(stages) or not results[-1].finished,
            stop_requested=interruption.requested,
            notes=(*broken_off(self.checkpoint), *self._untrained(stages), *self._unused(), *record.notes, *self.notes),
        )  # fmt: skip

    def _untrained(self, stages: list[Stage]) -> list[str]:
        """A note on stages whose share of training is not 0 and gives no step."""
        untrained = [stage for stage in stages if stage_steps(self.recipe, stage) == 0 < _stage_config(self.config, stage).share]
        if not untrained:
            return []
        return [
            f"no training in {', '.join(untrained)}: a share of the {self.recipe.training.steps} steps of fit is less than a step: set "
            "training.steps, or that share (compression.recover, .quantize, .mix), higher"
        ]

    def _unused(self) -> list[str]:
        """Notes on settings of the recipe that no stage uses."""
        notes = []
        if self.recipe.training.compile:
            notes.append("training.compile is for fit: the stages train without it")
        if self.recipe.quantization.min_sqnr_db != QuantizationConfig().min_sqnr_db:
            notes.append(
                "quantization.min_sqnr_db is for `muntin export` of unquantised checkpoints: the stages measure bits, set "
                "compression.average_bits, or name layers in compression.keep"
            )
        return notes

    def _stage(self, stage: Stage, before: Checkpoint, interruption: Interruption) -> Checkpoint:
        folder = stage_folder(self.directory, stage)
        config = stage_training(self.recipe, stage)
        written = folder / "checkpoints"
        start = newest_sound(written, ranks=self.ranks, note=self.notes.append) if checkpoints_in(written) else None
        interruption.work = PREPARATION
        self.report(stage, FitProgress(kind="prepare", step=0, steps=config.steps))
        if start is None:
            torch.manual_seed(self.recipe.seed)
            model, record = self._begin(stage, before)
        else:
            record = self._own_record(start)
            if stage_finished(start, stage) and start.state.judged and start.state.root == self.checkpoint.state.root:
                return start
            model = load_model(start)
        seed = self.recipe.seed + 7919 * (STAGES.index(stage) + 1)
        trainer = Trainer(
            model, config, task=self.recipe.task, precision=self.precision, teacher=load_model(self.checkpoint),
            distillation=self.config.distillation, class_weights=self.class_weights, seed=seed, ranks=self.ranks,
        )  # fmt: skip
        training = Training(
            trainer, self.recipe, self.source, directory=folder, root=Path(self.checkpoint.state.root), start=start,
            report=lambda progress: self.report(stage, progress), seed=seed, compression=record,
        )  # fmt: skip
        path = training.run(interruption)
        self.notes += training.notes
        return read_checkpoint(path)

    def _own_record(self, start: Checkpoint) -> CompressionRecord:
        """The record of a stage's checkpoint. Raises `CheckpointError` if it is of another run or recipe."""
        record = start.state.compression
        same = start.recipe.model_dump(mode="json") == self.recipe.model_dump(mode="json")
        if not same or record is None or record.origin != self.origin:
            raise CheckpointError(
                f"{start.path} was made from another checkpoint or recipe: give another --output, or remove {self.directory}"
            )
        return record

    def _begin(self, stage: Stage, before: Checkpoint) -> tuple[nn.Module, CompressionRecord]:
        """The model that a stage starts from, and its record."""
        model, previous = load_model(before), before.state.compression
        cut = remove_closed_channels(model) if previous is None else []
        rewritten = self._rewrite(stage, previous, model)
        sensitivity: dict[str, Sensitivity] = {}
        if stage == "w4a8":
            sensitivity = self._measure(model)  # before weights move: more bits are to bring back those of the float model
            weighted: dict[str, QATLinear | QATConv2d] = dict(named(model, QATLinear, QATConv2d))
            rewritten += remember(model, reconstruct(model, weighted, self.calibration))
        notes = [*(() if previous is None else previous.notes), *self._uncertain(rewritten)]
        if stage == "mixed":
            notes += self._overspent(model)
        return model, CompressionRecord(
            stage=stage, origin=self.origin, **structure_fields(model) | {"changes": (*before.changes, *cut, *rewritten)},
            notes=tuple(notes), sensitivity=sensitivity,
        )  # fmt: skip

    def _rewrite(self, stage: Stage, previous: CompressionRecord | None, model: nn.Module) -> list[Change]:
        if stage == "low-rank":
            config = self.config.low_rank
            assert config is not None
            layers = dict(named(model, nn.Linear, nn.Conv2d))
            kept = (entry for entry in self.config.keep if any(is_kept(name, (entry,)) for name in layers))  # not names of products
            return low_rank(model, self.calibration, **config.model_copy(update={"keep": (*config.keep, *kept)}).model_dump())
        if stage == "w4a8":
            return prepare_qat(model, self.calibration, bits=self.config.weight_bits, keep=self.keep)
        assert previous is not None
        return self._mix(model, previous.sensitivity)

    def _measure(self, model: nn.Module) -> dict[str, Sensitivity]:
        count = len(self.calibration) if self.recipe.answer.one else max(1, SENSITIVITY_IMAGES // len(self.calibration[0]))
        return measure_sensitivity(model, load_model(self.checkpoint), self.calibration[:count], task=self.recipe.task)

    def _mix(self, model: nn.Module, measured: dict[str, Sensitivity]) -> list[Change]:
        before = bits_of(model)
        bits = assign_bits(measured, self.config.average_bits, floats=float_weights(model))
        set_bits(model, bits)
        changes = []
        for name, width in bits.items():
            gain = measured[name].gains.get(width, 0.0)
            largest = max([0.0, *measured[name].gains.values()])
            done = "16 bits" if width == FLOAT else f"W{width}A8"
            reason = (
                f"more bits would take {largest:.2%} of the rounding error away" if width == before[name]
                else f"takes {gain:.2%} of the rounding error away"
            )  # fmt: skip
            changes.append(Change(layer=name, pass_="mix", done=done, reason=reason))
        return changes

    def _uncertain(self, changes: list[Change]) -> list[str]:
        """A note on layers that were factored by few calibration rows."""
        uncertain = [change for change in changes if change.note]
        if not uncertain:
            return []
        return [
            f"low rank: few calibration rows for {len(uncertain)} layers ({uncertain[0].layer}: {uncertain[0].note}), so their ranks are "
            f"uncertain: set quantization.calibration_images (now {self.recipe.quantization.calibration_images}) higher"
        ]

    def _overspent(self, model: nn.Module) -> list[str]:
        """A note if the average of the assigned bits is above `average_bits`."""
        floats, widths = float_weights(model), bits_of(model)
        counts = {name: model.get_parameter(f"{name}.weight").numel() for name in widths}
        weights = floats + sum(counts.values())
        average = (16 * floats + sum(widths[name] * count for name, count in counts.items())) / max(1, weights)
        if average <= self.config.average_bits:
            return []
        return [
            f"a weight has {average:.2f} bits on average, not compression.average_bits {self.config.average_bits:g}: {floats:,} of "
            f"{weights:,} weights are in layers that stay in 16 bits (compression.keep, quantization.keep, or no integer form)"
        ]


def _of_trained_steps(checkpoint: Checkpoint) -> Recipe:
    """The recipe of a checkpoint, with the steps of a run that ended before its limits (`training.patience`, an interruption)."""
    recipe, state = checkpoint.recipe, checkpoint.state
    if recipe.training.share_done(state.step, state.seconds) >= 1:  # after training.minutes, stages are shares of these
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": trained_steps(checkpoint)})})


def _result(stage: Stage, checkpoint: Checkpoint) -> StageResult:
    state, config = checkpoint.state, stage_training(checkpoint.recipe, stage)
    return StageResult(
        stage=stage, checkpoint=checkpoint.path, step=state.step, steps=config.steps_expected(state.step, state.seconds),
        seconds=state.seconds, finished=stage_finished(checkpoint, stage),
        score=state.validation[-1]["score"] if state.validation else None,
    )  # fmt: skip
