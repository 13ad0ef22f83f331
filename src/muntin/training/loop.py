"""The training loop: a recipe in, a checkpoint out.

    batch(step) -> autocast forward -> loss -> backward -> clip -> AdamW -> averaged weights -> (validate, checkpoint)

A batch depends on nothing but the recipe's seed and the step, and a checkpoint holds all other state, so a run that was interrupted
and resumed ends in the same bits as one that was not (on the same machine, with the same number of threads).

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.data import Crops, Source, open_source, prefetch
from muntin.errors import CheckpointError, DependencyError, MuntinError, RecipeError
from muntin.layers import ChannelGate
from muntin.models import TorchSession
from muntin.training.average import WeightAverage
from muntin.training.checkpoint import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    Checkpoint,
    build_model,
    checkpoints_in,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from muntin.training.config import TrainingConfig
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.interrupt import Interruption
from muntin.training.loss import task_loss
from muntin.training.precision import resolve_precision
from muntin.training.recipe import Recipe, load_recipe

LOG_EVERY = 10
"""Steps between two points of the training curve."""


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Where a run stands: what a progress line shows."""

    kind: Literal["check", "step", "validation"]
    step: int
    steps: int
    loss: float | None = None
    score: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None


Report = Callable[[FitProgress], None]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a run left behind."""

    directory: Path
    checkpoint: Path
    step: int
    steps: int
    interrupted: bool
    precision: str
    seconds: float
    validation: list[dict[str, Any]]
    notes: tuple[str, ...]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def fit(
    recipe: Recipe | Path | str,
    *,
    directory: Path | str | None = None,
    root: Path | str | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> FitResult:
    """Train by a recipe: a `Recipe`, or the path of a YAML file.

    `directory`: where the run goes, `runs/NAME` unless given. `root`: the folder that the recipe's relative paths start at (the
    file's own, or the current one). `resume`: go on from the newest checkpoint; without it, a directory that already holds a run
    is refused. Ctrl-C ends after the step in progress and leaves a checkpoint.
    Writes `checkpoints/`, `metrics.jsonl` and TensorBoard events; raises kinds of `MuntinError`.
    """
    if not isinstance(recipe, Recipe):
        root = Path(recipe).resolve().parent if root is None else root
        recipe = load_recipe(recipe)
    run = _Run(recipe, Path(directory or Path("runs") / recipe.name), Path(root or ".").resolve(), resume, report)
    with Interruption() as interruption:
        return run.train(interruption)


class _Run:
    def __init__(self, recipe: Recipe, directory: Path, root: Path, resume: bool, report: Report | None) -> None:
        self.recipe, self.config, self.directory, self.root = recipe, recipe.training, directory, root
        self.report = report or (lambda progress: None)
        self.checkpoint = self._find_checkpoint(resume)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = resolve_precision(self.config.precision, self.device)
        if self.config.compile:
            require_compiler(self.device)
        self.source = open_source(recipe.data, root=root)
        if self.source.task != recipe.task:
            raise RecipeError(f"task: the data are for '{self.source.task}' and the recipe says '{recipe.task}'; make them agree")
        self.notes = tuple(self.source.check(lambda done, total: self.report(FitProgress(kind="check", step=done, steps=total))))
        self.signature = signature_of(recipe, self.source)
        self._prepare()

    def _find_checkpoint(self, resume: bool) -> Checkpoint | None:
        folder = self.directory / "checkpoints"
        if not checkpoints_in(folder):
            return None
        if not resume:
            raise CheckpointError(f"{self.directory} already holds a run; --resume goes on with it, another --output starts anew")
        checkpoint = read_checkpoint(folder)
        if checkpoint.recipe != self.recipe:
            raise CheckpointError(
                f"{checkpoint.path} was trained by another recipe; give its recipe to resume, or another --output to start anew"
            )
        return checkpoint

    def _prepare(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.model = build_model(self.recipe, tuple(self.source.classes)).to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = WeightAverage(self.model, self.config.average)
        self.optimizer = make_optimizer(self.model, self.config)
        self.scaler = self.precision.scaler()
        self.gates = [m for m in self.model.modules() if isinstance(m, ChannelGate)]
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.validation: list[dict[str, Any]] = []
        if self.checkpoint is not None:
            state, tensors = self.checkpoint.state, self.checkpoint.tensors
            load_weights(self.model, tensors[MODEL], self.checkpoint.path / MODEL)
            load_weights(self.average.model, tensors[AVERAGE], self.checkpoint.path / AVERAGE)
            load_optimizer(self.model, self.optimizer, self.scaler, tensors[OPTIMIZER])
            self.step, self.seconds, self.losses = state.step, state.seconds, list(state.pending)
            self.curve, self.validation = list(state.training), list(state.validation)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if self.config.compile else self.model
        self.session = TorchSession(self.average.model, self.signature, dtype=self.precision.dtype)

    def train(self, interruption: Interruption) -> FitResult:
        config, data = self.config, self.recipe.data
        crops = Crops(
            self.source.split("train"), task=self.recipe.task, crop=data.crop, batch_size=config.batch_size, seed=self.recipe.seed,
            augmentation=data.augmentation, rare=data.rare,
        )  # fmt: skip
        validation = self.source.split("validation")
        path = None if self.checkpoint is None else self.checkpoint.path
        with MetricsLog(self.directory, self.step, self.curve, self.validation) as log:
            started, first = time.perf_counter(), self.step
            before = self.seconds
            for step, (images, target) in prefetch(crops, self.step, config.steps):
                self.losses.append(self.update(step, images, target))
                self.step, self.seconds = step + 1, before + time.perf_counter() - started
                if self.step % LOG_EVERY == 0 or self.step == config.steps:
                    rate = (self.step - first) * config.batch_size / (time.perf_counter() - started)
                    self._log_step(log, sum(self.losses) / len(self.losses), rate)
                    self.losses = []
                if self.step % config.validate_every == 0 or self.step == config.steps:
                    self._validate(log, validation)
                    self.seconds = before + time.perf_counter() - started
                last = self.step == config.steps or interruption.asked  # read once: a checkpoint follows for sure
                if last or self.step % config.checkpoint_every == 0:
                    path = self._write()
                if last:
                    break
        if path is None:
            path = self._write()
        return FitResult(
            directory=self.directory, checkpoint=path, step=self.step, steps=config.steps, interrupted=self.step < config.steps,
            precision=f"{self.precision.name} on {self.device}: {self.precision.reason}", seconds=self.seconds,
            validation=self.validation, notes=self.notes,
        )  # fmt: skip

    def update(self, step: int, images: Tensor, target: Tensor) -> float:
        """One optimiser step. Raises `MuntinError` when the loss is no longer finite; weights are then as they were."""
        if not self.config.compile:
            return self._update(step, images, target)
        from torch._dynamo.exc import TorchDynamoException  # takes seconds, and what compiles has loaded it

        try:
            return self._update(step, images, target)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise DependencyError(
                f"training.compile: PyTorch {torch.__version__} cannot compile this model in {self.precision.name} ({reason}): "
                "set compile: false, or another precision"
            ) from error

    def _update(self, step: int, images: Tensor, target: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        self.model.train()
        images = images.to(self.device, torch.float32, memory_format=torch.channels_last)
        scores = self._scores(images)
        loss = task_loss(self.recipe.task, scores, target.to(self.device), overlap=self.config.overlap_loss)
        if self.config.gate_cost and self.gates:
            loss = loss + self.config.gate_cost * torch.stack([gate.cost() for gate in self.gates]).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise MuntinError(
                f"the loss is {value} at step {step + 1}: lower training.learning_rate (now {self.config.learning_rate:g}) and go on from "
                "the last checkpoint"
            )
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.update(self.model, step)
        return value

    def _scores(self, images: Tensor) -> Tensor:
        try:
            with self.precision.autocast():
                return self.forward(images)
        except ValueError as error:
            if len(images) > 1:  # one picture is what a foreign model's batch norm may refuse
                raise
            raise RecipeError(
                f"training.batch_size 1 with data.crop {images.shape[2]}: {' '.join(str(error).split())}; raise either of them"
            ) from error

    def _log_step(self, log: MetricsLog, loss: float, rate: float) -> None:
        point = {
            "step": self.step, "loss": loss, "learning_rate": learning_rate(self.step - 1, self.config), "images_per_s": rate
        }  # fmt: skip
        self.curve.append(point)
        log.write("training", point)
        left = (self.config.steps - self.step) * self.config.batch_size / rate
        score = self.validation[-1]["score"] if self.validation else None
        self.report(
            FitProgress(
                kind="step", step=self.step, steps=self.config.steps, loss=loss, score=score, images_per_second=rate, seconds_left=left
            )
        )

    def _validate(self, log: MetricsLog, samples: Any) -> None:
        result = evaluate(self.session, samples, tile=tile_of(self.recipe.data.crop))
        point: dict[str, Any] = {"step": self.step, "score": result.score, "accuracy": result.accuracy, "iou": result.iou}
        if self.recipe.task == "segment":
            point["miou"] = result.miou
        self.validation.append(point)
        log.write("validation", point)
        self.report(FitProgress(kind="validation", step=self.step, steps=self.config.steps, score=result.score))

    def _write(self) -> Path:
        state = {
            "step": self.step, "recipe": self.recipe, "root": str(self.root), "classes": tuple(self.source.classes),
            "precision": self.precision.name, "seconds": self.seconds, "training": self.curve, "pending": self.losses,
            "validation": self.validation,
        }  # fmt: skip
        tensors = {
            MODEL: dict(self.model.state_dict()),
            AVERAGE: dict(self.average.model.state_dict()),
            OPTIMIZER: optimizer_tensors(self.model, self.optimizer, self.scaler),
        }
        return write_checkpoint(self.directory / "checkpoints", state, tensors)


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events. A resumed run rewrites what was logged up to its checkpoint and goes on from there."""

    def __init__(self, directory: Path, step: int, training: list[dict[str, float]], validation: list[dict[str, Any]]) -> None:
        self.directory, self.step = directory, step
        self.past = [("training", p) for p in training] + [("validation", p) for p in validation]

    def __enter__(self) -> MetricsLog:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn about what is not ours to mend
            from torch.utils.tensorboard import SummaryWriter
        self.directory.mkdir(parents=True, exist_ok=True)
        self.file = (self.directory / "metrics.jsonl").open("w", encoding="utf-8")
        self.board = SummaryWriter(self.directory / "tensorboard", purge_step=self.step)
        for kind, point in sorted(self.past, key=lambda entry: float(entry[1]["step"])):
            self._line(kind, point)
        return self

    def __exit__(self, *details: object) -> None:
        self.file.close()
        self.board.close()

    def _line(self, kind: str, point: dict[str, Any]) -> None:
        self.file.write(json.dumps({"kind": kind, **point}) + "\n")
        self.file.flush()

    def write(self, kind: str, point: dict[str, Any]) -> None:
        """Add one point."""
        self._line(kind, point)
        for key, value in point.items():
            if key != "step" and isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{key}", value, int(point["step"]))


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101); vectors (biases, norms, gates) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)


def signature_of(recipe: Recipe, source: Source) -> Signature:
    """What goes in and comes out of a model trained by a recipe."""
    side = recipe.data.crop if recipe.task == "classify" else None
    return Signature(task=recipe.task, channels=recipe.data.channels, scale=recipe.model.scale, classes=tuple(source.classes), side=side)


def require_compiler(device: str) -> None:
    """Raises `DependencyError` where `torch.compile` would find no C++ compiler."""
    if device != "cpu":
        return
    from torch._inductor import config  # takes most of a second, and only compiling needs it

    found = config.cpp.cxx  # what PyTorch will call: the variable CXX, or its own choice
    names = [found] if isinstance(found, str) else [name for name in found if name]
    if not any(shutil.which(name) for name in names):
        raise DependencyError(
            f"training.compile needs a C++ compiler on CPUs and there is no {' or '.join(names)}: install it, or set compile: false"
        )
