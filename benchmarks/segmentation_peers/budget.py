"""What a model may spend on training, how many steps that is on this machine, and the training itself: muntin's own loop for every model.

A budget of minutes is wall-clock time. The loop's learning rate falls over a number of steps that is fixed when it starts, so each run is
preceded by a short one of the same model that is timed; the minutes that the run then really took are in its row. All that trains or
decides before the weights are final counts: validation at the end of each training and, where a hybrid goes through the stages of
compression, these too (low rank, W4A8 and mixed precision; a step of them counts as a step, and their own preparation as time). What
`muntin export` and NNCF do with the final weights does not count for any model.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import muntin
from muntin.compression.stages import FOLDER, CompressionRun, StageResult, compress_checkpoint, stage_checkpoints
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import checkpoints_in
from muntin.training.config import CompressionConfig
from muntin.training.recipe import Recipe, load_recipe
from segmentation_peers.models import Entry

PACE_STEPS = 40
"""Of the run that is timed, and of each of its stages."""


class Interrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """Ctrl-C came during training: a checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for every model: data, crops and batches, what training computes in, threads (the deployed model's, too)."""

    source: str
    crop: int
    batch_size: int
    precision: str
    threads: int


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

    def part(self, share: float) -> Budget:
        return Budget(
            minutes=None if self.minutes is None else share * self.minutes,
            samples=None if self.samples is None else round(share * self.samples),
        )


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds on this machine: of a step of FP32 training and of all else in a run of it; of the stages, where a model goes through them.

    `stages_step_s`: of the stages' steps that belong to one step of FP32 training.
    """

    step_s: float
    fixed_s: float
    stages_step_s: float = 0.0
    stages_fixed_s: float = 0.0


def recipe_for(entry: Entry, setting: Setting, *, seed: int, steps: int, learning_rate: float) -> Recipe:
    """The demonstration's recipe with another model, source and length: its crops, augmentation, loss, optimiser and averaged weights.

    A checkpoint is written at the end, or when the run is interrupted: a larger model loses no minutes to writing one.
    """
    changes = {
        "name": entry.name, "seed": seed, "model.name": entry.model, "data.source": setting.source, "data.crop": setting.crop,
        "training.steps": steps, "training.batch_size": setting.batch_size, "training.learning_rate": learning_rate,
        "training.precision": setting.precision, "training.threads": setting.threads,
        "training.validate_every": steps, "training.checkpoint_every": steps,
    }  # fmt: skip
    return load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml", [f"{key}={value}" for key, value in changes.items()])


def steps_of(budget: Budget, pace: Pace | None, recipe: Recipe, *, stages: bool) -> int:
    """Steps of FP32 training that, with the stages' own where there are any, use the budget up. `pace` is for a budget of minutes."""
    shares = _shares(recipe.compression) if stages else []
    if budget.minutes is None:
        assert budget.samples is not None
        steps = int(budget.samples / recipe.training.batch_size / (1 + sum(shares)))
    else:
        assert pace is not None
        fixed = pace.fixed_s + (pace.stages_fixed_s if stages else 0)
        steps = int((60 * budget.minutes - fixed) / (pace.step_s + (pace.stages_step_s if stages else 0)))
    if steps < 1:
        raise ValueError(f"{recipe.name}: {budget.name} leaves {steps} steps of {pace}: give it more")
    return steps


def measure_pace(entry: Entry, recipe: Recipe, folder: Path) -> Pace:
    """Train a model for a moment in `folder`, which is removed again; `recipe` is the one whose length is to be found."""
    shutil.rmtree(folder, ignore_errors=True)
    training = {"steps": PACE_STEPS, "validate_every": PACE_STEPS, "checkpoint_every": PACE_STEPS}
    short = recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})
    checkpoint = train(short, folder)
    step_s = _step_seconds(checkpoint)
    fixed_s = checkpoint.state.seconds - PACE_STEPS * step_s
    stages_step_s = stages_fixed_s = 0.0
    if entry.way == "stages":
        made, each = recipe.compression, {"share": 1.0}
        stages = {name: getattr(made, name).model_copy(update=each) for name in ("recover", "quantize", "mix")}
        started = time.perf_counter()
        run = compress(checkpoint, folder / FOLDER, made.model_copy(update=stages))
        seconds = [_step_seconds(read_checkpoint(stage.checkpoint)) for stage in run.stages]
        stages_fixed_s = time.perf_counter() - started - PACE_STEPS * sum(seconds)
        stages_step_s = sum(share * s for share, s in zip(_shares(made), seconds, strict=True))
    shutil.rmtree(folder)
    return Pace(step_s=step_s, fixed_s=fixed_s, stages_step_s=stages_step_s, stages_fixed_s=stages_fixed_s)


def train(recipe: Recipe, folder: Path) -> Checkpoint:
    """`muntin fit`, gone on with where it was interrupted."""
    result = muntin.fit(recipe, directory=folder, root=Path.cwd(), resume=bool(checkpoints_in(folder / "checkpoints")))
    if result.interrupted:
        raise Interrupted
    return read_checkpoint(folder)


def compress(checkpoint: Checkpoint, folder: Path, config: CompressionConfig | None = None) -> CompressionRun:
    """`muntin compress` through all stages, gone on with where it was interrupted."""
    run = compress_checkpoint(checkpoint, folder, config=config, resume=True)
    if run.interrupted:
        raise Interrupted
    return run


def train_whole(entry: Entry, recipe: Recipe, folder: Path) -> tuple[Checkpoint, Checkpoint | None, dict[str, Any]]:
    """The FP32 model, what the stages made of it where the entry goes through them, and what both used of the budget.

    Where the stages were interrupted, what the interrupted part took for its preparation (some seconds) is not known any more.
    """
    checkpoint = train(recipe, folder)
    batch, seconds = recipe.training.batch_size, checkpoint.state.seconds
    stages: tuple[StageResult, ...] = ()
    if entry.way == "stages":
        before = sum(read_checkpoint(path).state.seconds for path in stage_checkpoints(folder / FOLDER).values())
        started = time.perf_counter()
        stages = compress(checkpoint, folder / FOLDER).stages
        seconds += max(before + time.perf_counter() - started, sum(stage.seconds for stage in stages))
    figures = {
        "steps": checkpoint.state.step,
        "stage_steps": [stage.steps for stage in stages],
        "samples": batch * (checkpoint.state.step + sum(stage.steps for stage in stages)),
        "minutes": seconds / 60,
        "images_per_s": checkpoint.state.training[-1]["images_per_s"],
    }
    return checkpoint, read_checkpoint(stages[-1].checkpoint) if stages else None, figures


def _shares(config: CompressionConfig) -> list[float]:
    return [config.recover.share, config.quantize.share, config.mix.share]


def _step_seconds(checkpoint: Checkpoint) -> float:
    """Of training, after its first ten steps: they are slower, for memory is found and kernels are made in them."""
    batch = checkpoint.recipe.training.batch_size
    first, *_, last = ((point["step"], point["step"] * batch / point["images_per_s"]) for point in checkpoint.state.training)
    return (last[1] - first[1]) / (last[0] - first[0])
