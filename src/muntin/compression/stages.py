"""From a trained model to one that is small and quantised, in stages that each train: low rank, W4A8, mixed precision.

    FP32 checkpoint -> low rank, recover -> quantisation-aware training in W4A8 -> measure, give key layers more bits, train on
                                     every stage learns from the labels and from the FP32 model's answers

The first stage begins by cutting out the channels that gates have closed. A stage starts from the averaged weights of the one before and
writes checkpoints of its own, so that compression that was interrupted goes on where it stood and ends in the same bits
(where no `training.minutes` limit the run and its stages).

    RUN/compressed/1-low-rank/checkpoints/step-...     2-w4a8/...     3-mixed/...

Each layer's bits are measured, not named by a rule such as “the first and the last in 16 bits”.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from muntin.compression.batch_norm import FOLDED, apply_folds
from muntin.compression.change import Change
from muntin.compression.fold import fold
from muntin.compression.low_rank import apply_structure, low_rank, structure_of
from muntin.compression.qat import FLOAT, apply_qat, bits_of, float_weights, prepare_qat, qat_structure, set_bits
from muntin.compression.rewrite import check_kept, is_kept, keepable, named, number_paddings
from muntin.compression.sensitivity import Sensitivity, assign_bits, measure_sensitivity
from muntin.compression.slimming import apply_widths, remove_closed_channels, widths_of
from muntin.data import Source, calibration_batches, open_source
from muntin.errors import CheckpointError, DataError, RecipeError
from muntin.training.checkpoint import (
    AVERAGE,
    Checkpoint,
    CheckpointState,
    build_model,
    check_classes,
    checkpoints_in,
    load_weights,
    read_checkpoint,
)
from muntin.training.config import CompressionConfig, QuantizationConfig, StageConfig, TrainingConfig
from muntin.training.interrupt import Interruption
from muntin.training.loop import FitProgress, Training, prepare_hardware
from muntin.training.precision import check_maps
from muntin.training.recipe import Recipe
from muntin.training.schedule import share_done, steps_expected
from muntin.training.trainer import Trainer

Stage = Literal["low-rank", "w4a8", "mixed"]
STAGES: tuple[Stage, ...] = ("low-rank", "w4a8", "mixed")
FOLDER = "compressed"
SENSITIVITY_IMAGES = 8
"""Calibration crops that each layer's need for bits is measured on: every pixel answers. Of a classifier, which has one answer for a
picture, it is measured on all of them."""
Report = Callable[[Stage, FitProgress], None]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage that is done, or as far as it came."""

    stage: Stage
    checkpoint: Path
    step: int
    steps: int
    seconds: float
    """Of its training."""
    finished: bool
    score: float | None
    """On the validation split, when that was last asked."""


@dataclass(frozen=True, kw_only=True)
class CompressionRun:
    """What `compress_checkpoint` left behind."""

    directory: Path
    stages: tuple[StageResult, ...]
    interrupted: bool
    """Steps or stages are left."""
    asked_to_stop: bool
    """Ctrl-C or SIGTERM came, during the last step or what follows it, too."""
    notes: tuple[str, ...]
    """What makes the result less than it could be."""

    @property
    def checkpoint(self) -> Path:
        """The last stage's."""
        return self.stages[-1].checkpoint


def source_of(checkpoint: Checkpoint) -> Source:
    """The data that a checkpoint was trained on. Raises `DataError` where they are gone, or their classes no longer its own."""
    root = Path(checkpoint.state.root)
    try:
        source = open_source(checkpoint.recipe.data, root=root)
    except DataError as error:
        if root.is_dir():
            raise
        then = "" if checkpoint.state.compression is None else ", and then `muntin compress RUN --resume` its stages"
        raise DataError(
            f"{checkpoint.path} was trained on data in {root}, which is no folder any more: `muntin fit RECIPE --resume` tells the run "
            f"where its recipe lies now{then}"
        ) from error
    check_classes(checkpoint, source)
    return source


def calibration_of(checkpoint: Checkpoint, source: Source) -> list[Tensor]:
    """Crops of the training split, never of another one, that calibrate a checkpoint's activations."""
    recipe = checkpoint.recipe
    return calibration_batches(
        source.split("train"),
        task=recipe.task,
        crop=recipe.data.crop,
        count=recipe.quantization.calibration_images,
        batch_size=8,
        seed=recipe.seed,
    )


def compress_checkpoint(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    config: CompressionConfig | None = None,
    quantization: QuantizationConfig | None = None,
    until: Stage = "mixed",
    resume: bool = False,
    report: Report = lambda stage, progress: None,
) -> CompressionRun:
    """Take a trained checkpoint through the stages that `config`, or its recipe's `compression`, describes.

    `quantization`: in place of the recipe's; of it `calibration_images` and `keep` count here. `directory`: where the stages go, each in a
    folder of its own. `until`: the last stage to go through. `resume`: go on from what is there; without it, a directory that holds a
    stage is refused. Ctrl-C ends after the step in progress and leaves a checkpoint. Costs the stages' training, each step about twice
    one of FP32 (every product rounds, and the FP32 model answers every batch too), and a forward pass a layer and width to measure bits.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} is compressed already: give the checkpoint of `muntin fit` that it was made from")
    given = {"compression": config, "quantization": quantization}
    recipe = checkpoint.recipe.model_copy(update={section: value for section, value in given.items() if value is not None})
    checkpoint = replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe}))
    run = _Compression(checkpoint, directory, resume, report)
    with Interruption() as interruption:
        return run.run(interruption, until)


def read_model(checkpoint: Checkpoint) -> nn.Module:
    """The model of any checkpoint, compressed or not, in `eval` mode; in quantisation-aware training it is not frozen yet."""
    state = checkpoint.state
    model = build_model(state.recipe, state.classes).eval()
    made = state.compression
    if made is not None:
        apply_widths(model, made.get("widths", {}))  # there are none in checkpoints from before channels were cut
        number_paddings(model)
        apply_structure(model, made["ranks"])
        if quantized(checkpoint):
            fold(model)
            norms = [change.layer for change in changes_of(checkpoint) if change.pass_ == "fold" and change.done == FOLDED]
            apply_folds(model, norms, checkpoint.tensors[AVERAGE])
            apply_qat(model, made["qat"] or {})
    load_weights(model, checkpoint.tensors[AVERAGE], checkpoint.path / AVERAGE)
    return model.eval()


def quantized(checkpoint: Checkpoint) -> bool:
    """Whether a stage of compression has quantised it, be it to 16 bits because all of its layers are in `keep`."""
    made = checkpoint.state.compression
    return made is not None and made["stage"] != "low-rank"


def changes_of(checkpoint: Checkpoint) -> list[Change]:
    """What every stage up to this checkpoint did to every layer."""
    made = checkpoint.state.compression
    return [] if made is None else [Change(**{**change, "ranks": tuple(change["ranks"])}) for change in made["changes"]]


def stage_checkpoints(directory: Path) -> dict[Stage, Path]:
    """The newest checkpoint of each stage below `directory`, in their order."""
    found: dict[Stage, Path] = {}
    for stage in STAGES:
        there = checkpoints_in(_folder(directory, stage) / "checkpoints")
        if there:
            found[stage] = there[-1]
    return found


def stage_steps(recipe: Recipe, stage: Stage) -> int:
    """The steps that a stage trains for by a recipe."""
    return round(_stage_config(recipe.compression, stage).share * recipe.training.steps)


def stage_training(recipe: Recipe, stage: Stage) -> TrainingConfig:
    """How a stage trains by a recipe.

    Quantisation-aware training is one fall of the learning rate over both of its stages: the first ends where the second goes on.
    The second warms up all the same: its optimiser is new, and the first steps of a new one, each as long as the learning rate allows,
    throw a network off the grids that it has just settled on (docs/log.md).
    """
    config, minutes, steps = recipe.compression, recipe.training.minutes, stage_steps(recipe, stage)
    mine = _stage_config(config, stage)
    both = stage_steps(recipe, "w4a8") > 0 and stage_steps(recipe, "mixed") > 0
    return recipe.training.model_copy(
        update={
            "steps": steps,
            "minutes": None if minutes is None else minutes * mine.share,
            "learning_rate": mine.learning_rate,
            "final_learning_rate": min(mine.learning_rate, config.mix.learning_rate) if both and stage == "w4a8" else 0.0,
            "average": config.average,
            "gate_budget": 1.0,  # what closed in FP32 is cut out; no stage after that would cut again
            "validate_every": max(1, steps),
            "compile": False,
        }
    )


def stage_finished(checkpoint: Checkpoint, stage: Stage) -> bool:
    """Whether a checkpoint of a stage is its last one."""
    return share_done(stage_training(checkpoint.recipe, stage), checkpoint.state.step, checkpoint.state.seconds) >= 1


def broken_off(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note on a checkpoint that is not the last one of its training, `fit`'s or a stage's: what is missing, and what goes on."""
    made, state = checkpoint.state.compression, checkpoint.state
    config = checkpoint.recipe.training if made is None else stage_training(checkpoint.recipe, made["stage"])
    if share_done(config, state.step, state.seconds) >= 1:
        return () if _judged(state) else (f"its last step was not validated: `muntin {_command(made)} --resume` does it",)
    newest = (checkpoints_in(checkpoint.path.parent) or [checkpoint.path])[-1]  # a copy may have another name
    goes_on = f"`muntin {_command(made)} --resume` goes on"
    rest = goes_on if newest.name == checkpoint.path.name else f"{newest.name} is there, too"
    return (f"step {state.step} of {steps_expected(config, state.step, state.seconds)}: {rest}",)


def _judged(state: CheckpointState) -> bool:
    """Whether the last step was validated, and what comes with that: it was not if it was broken off there."""
    return state.step == 0 or bool(state.validation and state.validation[-1]["step"] == state.step)


def _command(made: Any) -> str:
    """Which trained what has this record of its compression."""
    return "fit" if made is None else "compress"


def _stage_config(config: CompressionConfig, stage: Stage) -> StageConfig:
    stages: dict[Stage, StageConfig] = {"low-rank": config.recover, "w4a8": config.quantize, "mixed": config.mix}
    return stages[stage]


def _folder(directory: Path, stage: Stage) -> Path:
    return directory / f"{STAGES.index(stage) + 1}-{stage}"


class _Compression:
    def __init__(self, checkpoint: Checkpoint, directory: Path, resume: bool, report: Report) -> None:
        self.checkpoint, self.recipe, self.directory, self.report = checkpoint, checkpoint.recipe, directory, report
        self.config = self.recipe.compression
        self.keep = (*self.config.keep, *self.recipe.quantization.keep)
        if not resume and stage_checkpoints(directory):
            raise CheckpointError(f"{directory} already holds stages; --resume goes on with them, another --output starts anew")
        model = checkpoint.model()
        check_kept(self.keep, keepable(model))
        hardware, data = self.recipe.training.model_copy(update={"compile": False}), self.recipe.data
        precision = prepare_hardware(hardware, begun=checkpoint.state.precision)
        self.precision = check_maps(model, precision, crop=data.crop, channels=data.channels, asked=hardware.precision)
        self.told = [] if self.precision.name == precision.name else [f"trained in {self.precision.name}: {self.precision.reason}"]
        """What went otherwise than the recipe says, on the way."""
        self.source = source_of(checkpoint)
        self.calibration = calibration_of(checkpoint, self.source)
        self.origin = checkpoint.state.sha256[AVERAGE]

    def run(self, interruption: Interruption, until: Stage) -> CompressionRun:
        results: list[StageResult] = []
        before = self.checkpoint
        wanted = [stage for stage in STAGES[: STAGES.index(until) + 1] if stage != "low-rank" or self.config.low_rank is not None]
        if not wanted:
            raise RecipeError("compression.low_rank is null, so there is no stage before 'w4a8': go on until that one, or give it a value")
        for stage in wanted:
            result = self._stage(stage, before, interruption)
            results.append(result)
            if not result.finished or interruption.asked:  # asked in a stage's last step: that one is finished, and the next not begun
                break
            before = read_checkpoint(result.checkpoint)
        interrupted = len(results) < len(wanted) or not results[-1].finished
        noted = (read_checkpoint(results[-1].checkpoint).state.compression or {}).get("notes", [])
        notes = (*broken_off(self.checkpoint), *self._idle(wanted), *self._unused(), *noted, *self.told)
        return CompressionRun(
            directory=self.directory, stages=tuple(results), interrupted=interrupted, asked_to_stop=interruption.asked, notes=notes
        )

    def _idle(self, wanted: list[Stage]) -> list[str]:
        idle = [stage for stage in wanted if stage_steps(self.recipe, stage) == 0 < _stage_config(self.config, stage).share]
        if not idle:
            return []
        steps, shares = self.recipe.training.steps, ", ".join(f"{_stage_config(self.config, stage).share:g}" for stage in idle)
        return [
            f"no training in {', '.join(idle)}: fit had {steps} step{'' if steps == 1 else 's'}, of which a share of {shares} leaves none: "
            "set training.steps, or that share (compression.recover, .quantize, .mix), higher"
        ]

    def _unused(self) -> list[str]:
        """What the recipe says and no stage goes by."""
        notes = []
        if self.recipe.training.compile:
            notes.append("training.compile is for fit: the stages train without it")
        if self.recipe.quantization.min_sqnr_db != QuantizationConfig().min_sqnr_db:
            notes.append(
                "quantization.min_sqnr_db is for `muntin export` of what no stage has quantised: here bits are measured, set "
                "compression.average_bits, or name layers in compression.keep"
            )
        return notes

    def _stage(self, stage: Stage, before: Checkpoint, interruption: Interruption) -> StageResult:
        folder = _folder(self.directory, stage)
        config = stage_training(self.recipe, stage)
        start = read_checkpoint(folder) if checkpoints_in(folder / "checkpoints") else None
        if start is not None:
            self._check_origin(start)
            state = start.state
            done = share_done(config, state.step, state.seconds) >= 1 and _judged(state)
            if done and state.root == self.checkpoint.state.root:
                return self._result(stage, config, start.path, state.step, state.seconds, state.validation)
            model, made = read_model(start), state.compression
        else:
            torch.manual_seed(self.recipe.seed)
            model = read_model(before)
            changes = changes_of(before)
            if before.state.compression is None:
                changes += remove_closed_channels(model)
                widths = widths_of(model)
            else:
                widths = before.state.compression.get("widths", {})
            prepared = self._prepare(stage, before, model)
            changes += prepared
            notes = [*(before.state.compression or {}).get("notes", []), *self._uncertain(prepared)]
            if stage == "mixed":
                notes += self._overspent(model)
            made = {
                "stage": stage, "origin": self.origin, "widths": widths, "ranks": structure_of(model), "qat": qat_structure(model) or None,
                "changes": [asdict(change) for change in changes], "notes": notes,
                "sensitivity": self._measure(model) if stage == "w4a8" else {},
            }  # fmt: skip
        trainer = Trainer(
            model, config, task=self.recipe.task, precision=self.precision, teacher=self.checkpoint.model(),
            distillation=self.config.distillation,
        )  # fmt: skip
        training = Training(
            trainer, self.recipe, self.source, directory=folder, root=Path(self.checkpoint.state.root), start=start,
            report=lambda progress: self.report(stage, progress), seed=self.recipe.seed + 7919 * (STAGES.index(stage) + 1),
            compression=made,
        )  # fmt: skip
        path = training.run(interruption)
        self.told += training.notes
        return self._result(stage, config, path, training.step, training.seconds, training.validation)

    def _result(
        self, stage: Stage, config: TrainingConfig, path: Path, step: int, seconds: float, validation: list[dict[str, Any]]
    ) -> StageResult:
        return StageResult(
            stage=stage, checkpoint=path, step=step, steps=steps_expected(config, step, seconds), seconds=seconds,
            finished=share_done(config, step, seconds) >= 1, score=validation[-1]["score"] if validation else None,
        )  # fmt: skip

    def _check_origin(self, start: Checkpoint) -> None:
        made = start.state.compression
        same = start.recipe.model_dump(mode="json") == self.recipe.model_dump(mode="json")  # where a tuple is the list it is read as
        if not same or made is None or made["origin"] != self.origin:
            raise CheckpointError(
                f"{start.path} was made from another checkpoint or recipe: give another --output, or remove {self.directory}"
            )

    def _prepare(self, stage: Stage, before: Checkpoint, model: nn.Module) -> list[Change]:
        if stage == "low-rank":
            config = self.config.low_rank
            assert config is not None
            layers = dict(named(model, nn.Linear, nn.Conv2d))
            kept = (entry for entry in self.config.keep if any(is_kept(name, (entry,)) for name in layers))  # products have no ranks
            return low_rank(self.calibration, config.model_copy(update={"keep": (*config.keep, *kept)}))(model)
        if stage == "w4a8":
            return prepare_qat(self.calibration, bits=self.config.weight_bits, keep=self.keep)(model)
        made = before.state.compression
        assert made is not None
        return self._mix(model, _sensitivity_of(made))

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        enough = len(self.calibration) if self.recipe.task == "classify" else max(1, SENSITIVITY_IMAGES // len(self.calibration[0]))
        batches = self.calibration[:enough]
        measured = measure_sensitivity(model, self.checkpoint.model(), batches, task=self.recipe.task)
        return {name: asdict(entry) for name, entry in measured.items()}

    def _mix(self, model: nn.Module, measured: dict[str, Sensitivity]) -> list[Change]:
        before = bits_of(model)
        bits = assign_bits(measured, self.config.average_bits, floats=float_weights(model))
        set_bits(model, bits)
        changes = []
        for name, width in bits.items():
            gain = measured[name].gains.get(width, 0.0)
            most = max([0.0, *measured[name].gains.values()])
            done = "16 bits" if width == FLOAT else f"W{width}A8"
            reason = (
                f"more bits would take {most:.2%} of the rounding error away" if width == before[name]
                else f"takes {gain:.2%} of the rounding error away"
            )  # fmt: skip
            changes.append(Change(layer=name, pass_="mix", done=done, reason=reason))
        return changes

    def _uncertain(self, changes: list[Change]) -> list[str]:
        noted = [change for change in changes if change.note]
        if not noted:
            return []
        first, others = noted[0], len(noted) - 1
        more = f", and {others} other layer{'' if others == 1 else 's'} by few, too" if others else ""
        return [
            f"low rank: {first.layer} was factored by {first.note}{more}: what rank other images need is a guess, set "
            f"quantization.calibration_images (now {self.recipe.quantization.calibration_images}) higher"
        ]

    def _overspent(self, model: nn.Module) -> list[str]:
        """Of a model that has its bits: a note where they are more on average than they were to be."""
        floats, widths = float_weights(model), bits_of(model)
        spent = {name: model.get_parameter(f"{name}.weight").numel() for name in widths}
        weights = floats + sum(spent.values())
        average = (16 * floats + sum(widths[name] * count for name, count in spent.items())) / max(1, weights)
        if average <= self.config.average_bits:
            return []
        return [
            f"a weight has {average:.2f} bits on average, not compression.average_bits {self.config.average_bits:g}: {floats:,} of "
            f"{weights:,} weights are in layers that stay in 16 bits (compression.keep, quantization.keep, or no integer form)"
        ]


def _sensitivity_of(made: dict[str, Any]) -> dict[str, Sensitivity]:
    """As measured; JSON has turned the widths into text."""
    return {
        name: Sensitivity(**{**entry, "gains": {int(width): gain for width, gain in entry["gains"].items()}})
        for name, entry in made["sensitivity"].items()
    }
