from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_helpers import assert_same_state, one_line
from muntin.artifact.file_lock import FolderInUseError
from muntin.compression import load_model
from muntin.data import open_source
from muntin.errors import CheckpointError, DataError, DependencyError, MuntinError, RecipeError
from muntin.images import write_image
from muntin.layers import ChannelGate
from muntin.models import CompressionRecord, TorchSession
from muntin.training import loop, precision
from muntin.training.checkpoint import STATE, checkpoints_in, read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL
from muntin.training.evaluation import evaluate
from muntin.training.fitting import FitResult, fit
from muntin.training.loop import LOG_EVERY, Training
from muntin.training.precision import resolve_precision
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.metrics_log import MetricsLog
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import load_recipe
from muntin.training.trainer import Trainer
from muntin.training.weights import new_model

STEPS = LOG_EVERY + 4
TWO_STAGES = ("model.options.dims=[32, 32]", "model.options.depths=[1, 1]")


def train(tiny: Any, directory: Path, *overrides: str, **arguments: Any) -> FitResult:
    return fit(load_recipe(tiny.recipe, overrides), root=tiny.root, directory=directory, **arguments)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def ctrl_c_at(step: int) -> Callable[[FitProgress], None]:
    """A report that sends SIGINT to this process at a validation."""

    def report(progress: FitProgress) -> None:
        if progress.kind == "validation" and progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


# ---- a run and what it leaves ----


@pytest.fixture(scope="module")
def plan() -> list[str]:
    return [f"training.steps={STEPS}", "training.validate_every=4", "training.checkpoint_every=1000"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any], plan: list[str]) -> tuple[Any, FitResult]:
    """A data set and an uninterrupted run."""
    root = tmp_path_factory.mktemp("whole")
    tiny = write_tiny(root / "data")
    return tiny, train(tiny, root / "run", *plan)


@pytest.fixture
def write_foreign(tmp_path: Path, write_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`write_foreign(code)` writes a data set and a recipe for the model of the code's `make`."""

    def write(code: str) -> Any:
        (tmp_path / "foreign_model.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "foreign_model", raising=False)
        return write_tiny(tmp_path / "data", model={"name": "foreign_model:make", "options": {}})

    return write


def test_result_of_a_run(whole: tuple[Any, FitResult]) -> None:
    _, result = whole
    assert (result.step, result.steps, result.interrupted) == (STEPS, STEPS, False)
    assert result.checkpoint == result.directory / "checkpoints" / f"step-{STEPS:08d}"
    assert result.precision.split()[0] in ("fp32", "bf16", "fp16", "tf32")
    assert [point["step"] for point in result.validation] == [4, 8, 12, STEPS]
    assert set(result.validation[-1]["by_class"]) == {"sea", "field", "roof"}
    assert result.seconds > 0


def test_curves_in_checkpoint_and_logs(whole: tuple[Any, FitResult]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = whole
    checkpoint = read_checkpoint(result.checkpoint)
    state, config = checkpoint.state, checkpoint.recipe.training
    assert [point["step"] for point in state.training] == [LOG_EVERY, STEPS]
    assert [point["learning_rate"] for point in state.training] == [config.rate_at((step - 0.5) / STEPS) for step in (LOG_EVERY, STEPS)]
    assert all(0 <= point["waiting"] <= 1 for point in state.training)
    assert result.waiting is not None and 0 <= result.waiting <= 1
    assert state.pending == []
    logged = lines(result.directory)
    assert [{k: v for k, v in line.items() if k != "kind"} for line in logged if line["kind"] == "training"] == state.training
    assert [line["step"] for line in logged if line["kind"] == "validation"] == [4, 8, 12, STEPS]
    events = EventAccumulator(str(result.directory / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("training/loss")] == [LOG_EVERY, STEPS]
    assert [event.value for event in events.Scalars("training/loss")] == pytest.approx([p["loss"] for p in state.training], rel=1e-6)
    assert "validation/miou" in events.Tags()["scalars"]


def test_training_learns(tmp_path: Path, tiny: Any) -> None:
    result = train(
        tiny, tmp_path / "run", "training.steps=60", "training.validate_every=60", "training.average=0.9", "training.learning_rate=0.01"
    )
    curve = read_checkpoint(result.checkpoint).state.training
    assert curve[-1]["loss"] < 0.6 * curve[0]["loss"]
    assert result.validation[-1]["miou"] > 0.6


# ---- interrupted and resumed ----


def test_interrupted_run_ends_in_the_same_bits(tmp_path: Path, whole: tuple[Any, FitResult], plan: list[str]) -> None:
    """Interrupted twice, between points of the curve and without a due checkpoint; each part with another number of workers."""
    tiny, uninterrupted = whole
    for stop in (4, 12):
        result = train(tiny, tmp_path / "run", *plan, f"data.workers={stop // 4}", resume=stop > 4, progress=ctrl_c_at(stop))
        assert (result.step, result.interrupted, result.workers) == (stop, True, stop // 4)
        assert result.checkpoint.name == f"step-{stop:08d}"
        load_model(read_checkpoint(result.checkpoint))
        torch.manual_seed(stop)  # whatever else the process draws
    result = train(tiny, tmp_path / "run", *plan, "data.workers=2", "data.cache_mib=0", resume=True)
    assert (result.step, result.interrupted) == (STEPS, False)
    one, other = read_checkpoint(uninterrupted.checkpoint), read_checkpoint(result.checkpoint)
    assert_same_state(one, other)
    for key in ("step", "loss", "learning_rate"):
        assert [point[key] for point in one.state.training] == [point[key] for point in other.state.training]
    assert one.state.validation == other.state.validation


def test_interruption_after_the_last_step(tmp_path: Path, tiny: Any) -> None:
    """The run is complete; callers such as `muntin demo` start no further work."""
    plan = ("training.steps=2", "training.validate_every=2")
    result = train(tiny, tmp_path / "run", *plan, progress=ctrl_c_at(2))
    assert (result.step, result.interrupted, result.stop_requested) == (2, False, True)
    again = train(tiny, tmp_path / "run", *plan, resume=True)
    assert (again.interrupted, again.stop_requested, again.checkpoint) == (False, False, result.checkpoint)


class Drawing(nn.Conv2d):
    """Draws random numbers from PyTorch, NumPy and Python."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x / 255)
        return y * (random.uniform(1, 2) + np.random.rand() + torch.rand(())) if self.training else y  # noqa: S311


def drawing(*, task: str, classes: int, channels: int) -> nn.Module:
    return Drawing(channels, classes, 1)


def test_other_random_generators(tmp_path: Path, tiny: Any) -> None:
    plan = (f"model.name={__name__}:drawing", "model.options={}", "training.steps=4", "training.validate_every=2")
    whole = train(tiny, tmp_path / "whole", *plan)
    assert train(tiny, tmp_path / "run", *plan, progress=ctrl_c_at(2)).interrupted
    torch.manual_seed(99)  # whatever else the process draws
    assert_same_state(read_checkpoint(train(tiny, tmp_path / "run", *plan, resume=True).checkpoint), read_checkpoint(whole.checkpoint))


def test_resumed_log(tmp_path: Path, tiny: Any, plan: list[str]) -> None:
    train(tiny, tmp_path / "run", *plan, progress=ctrl_c_at(12))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:  # as if the process had died after logging what no checkpoint holds
        log.write('{"kind": "training", "step": 13, "loss": 9.0}\n{"kind": "trai')
    train(tiny, tmp_path / "run", *plan, resume=True)
    keys = [(line["kind"], line["step"]) for line in lines(tmp_path / "run")]
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys, key=lambda key: key[1])
    assert [step for kind, step in keys if kind == "validation"] == [4, 8, 12, STEPS]
    assert [step for kind, step in keys if kind == "training"] == [LOG_EVERY, STEPS]


def test_other_seed(tmp_path: Path, tiny: Any) -> None:
    results = [train(tiny, tmp_path / str(n), f"seed={seed}", "training.steps=2") for n, seed in enumerate([0, 0, 1])]
    models = [read_checkpoint(result.checkpoint) for result in results]
    assert_same_state(models[0], models[1])
    with pytest.raises(AssertionError):
        assert_same_state(models[0], models[2])


def test_resuming_a_finished_run(tmp_path: Path, tiny: Any) -> None:
    first = train(tiny, tmp_path / "run", "training.steps=2")
    before = {path: path.read_bytes() for path in first.checkpoint.iterdir()}
    again = train(tiny, tmp_path / "run", "training.steps=2", resume=True)
    assert (again.step, again.interrupted, again.checkpoint) == (2, False, first.checkpoint)
    assert {path: path.read_bytes() for path in first.checkpoint.iterdir()} == before
    assert again.validation == first.validation
    assert again.notes == ("ended at step 2 before, nothing was trained: to go on, raise training.steps (or minutes, patience)",)


def test_finished_run_with_moved_data(tmp_path: Path, tiny: Any) -> None:
    first = read_checkpoint(train(tiny, tmp_path / "run", "training.steps=2").checkpoint)
    root = Path(shutil.move(tiny.root, tmp_path / "elsewhere"))
    recipe = load_recipe(root / tiny.recipe.name, ["training.steps=2"])
    result = fit(recipe, root=root, directory=tmp_path / "run", resume=True)
    again = read_checkpoint(tmp_path / "run")
    assert (result.checkpoint, result.step) == (first.path, 2)
    assert all("nothing was trained" in note for note in result.notes)
    assert (first.state.root, again.state.root) == (str(tiny.root), str(root))
    assert again.state.model_dump(exclude={"root", "sha256"}) == first.state.model_dump(exclude={"root", "sha256"})
    changed = [name for name, digest in again.state.sha256.items() if digest != first.state.sha256[name]]
    assert changed == [STATE]


def test_recipe_with_tuples(tmp_path: Path, tiny: Any) -> None:
    recipe = load_recipe(tiny.recipe, ["training.steps=1"])
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.model.options.items()}
    assert options != recipe.model.options
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"options": options})})
    for resume in (False, True):
        assert fit(recipe, root=tiny.root, directory=tmp_path / "run", resume=resume).step == 1


def test_existing_run(tmp_path: Path, whole: tuple[Any, FitResult], plan: list[str]) -> None:
    tiny, result = whole
    before = sorted(result.directory.rglob("*"))
    with pytest.raises(CheckpointError, match="already holds a run; --resume goes on with it") as error:
        train(tiny, result.directory, *plan)
    one_line(error)
    for other, change in (
        ("training.gate_budget=0.5", "training.gate_budget was 1.0, is 0.5"),
        ("data.crop=40", "data.crop was 32, is 40"),
    ):
        message = rf"another recipe \({change}\), and a resumed run can change only keys of training, except"
        with pytest.raises(CheckpointError, match=message) as error:
            train(tiny, result.directory, *plan, other, "training.learning_rate=0.01", resume=True)
        one_line(error)
    assert sorted(result.directory.rglob("*")) == before


def test_recipe_changes(tmp_path: Path, tiny: Any) -> None:
    train(tiny, tmp_path / "run", progress=ctrl_c_at(3))
    changed = ("training.learning_rate=0.001", "training.clip=0.5", "training.batch_size=3", "training.average=0.9")
    result = train(tiny, tmp_path / "run", *changed, resume=True)
    (note,) = result.notes
    assert note.startswith("on the way, from step 3 on: training.batch_size was 2, is 3, training.learning_rate was 0.002, is 0.001, ")
    assert note.endswith(" and 1 more")
    checkpoint = read_checkpoint(tmp_path / "run")
    assert (checkpoint.state.step, checkpoint.recipe) == (6, load_recipe(tiny.recipe, changed))
    assert checkpoint.state.training[-1]["learning_rate"] == checkpoint.recipe.training.rate_at(5.5 / 6)
    (note,) = train(tiny, tmp_path / "run", *changed, resume=True).notes
    assert "ended at step 6 before, nothing was trained" in note  # and no change


@pytest.mark.parametrize(("steps", "reached"), [(9, 9), (6, 6), (4, 6)])
def test_steps_of_a_finished_run(tmp_path: Path, tiny: Any, steps: int, reached: int) -> None:
    train(tiny, tmp_path / "run")
    result = train(tiny, tmp_path / "run", f"training.steps={steps}", "training.clip=0.5", resume=True)
    assert (result.step, result.steps, result.interrupted) == (reached, reached, False)
    assert result.validation[-1]["step"] == reached
    checkpoint = read_checkpoint(tmp_path / "run")
    assert (checkpoint.state.step, checkpoint.recipe.training.steps, checkpoint.recipe.training.clip) == (reached, steps, 0.5)


def test_checkpoint_interval(tmp_path: Path, tiny: Any) -> None:
    train(tiny, tmp_path / "run", "training.steps=7", "training.checkpoint_every=2", "training.validate_every=100")
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-00000006", "step-00000007"]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_recipe_path(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tiny.recipe.write_text(tiny.recipe.read_text().replace("steps: 6", "steps: 1"))
    result = fit(str(tiny.recipe))
    assert result.directory.resolve() == tmp_path / "elsewhere" / "runs" / "tiny"
    assert read_checkpoint(result.checkpoint).state.root == str(tiny.root)


KILLED_FIT = """
import os, signal, sys
from pathlib import Path
from muntin.training import fitting, loop

def killed(training):
    write(training)
    training.writer.wait()
    os.kill(os.getpid(), signal.SIGKILL)

loop.FIRST_CHECKPOINT_S = 0.0
write, loop.Training._write = loop.Training._write, killed
recipe, directory, *plan = sys.argv[1:]
fitting.fit(fitting.load_recipe(recipe, plan), root=Path(recipe).parent, directory=directory)
"""


def test_killed_run_ends_in_the_same_bits(tmp_path: Path, tiny: Any) -> None:
    """Killed after its first checkpoint, which is written before the one that is due."""
    plan = ("training.steps=3", "training.validate_every=3", "training.checkpoint_every=2")
    words = [sys.executable, "-c", KILLED_FIT, str(tiny.recipe), str(tmp_path / "run")]
    assert subprocess.run([*words, *plan], check=False).returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
    result = train(tiny, tmp_path / "run", *plan, resume=True)
    (note,) = result.notes
    assert "was locked by muntin fit (process " in note and "its lock was taken over" in note
    assert_same_state(read_checkpoint(train(tiny, tmp_path / "whole", *plan).checkpoint), read_checkpoint(result.checkpoint))


def test_first_checkpoint(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = Training._write
    monkeypatch.setattr(Training, "_write", lambda training: written.append(training.step) or write(training))
    monkeypatch.setattr(loop, "FIRST_CHECKPOINT_S", 0.0)
    train(tiny, tmp_path / "run", "training.steps=7", "training.validate_every=100", "training.checkpoint_every=5")
    assert written == [1, 5, 7]  # one early, not one every few steps


def test_two_runs_in_one_folder(tmp_path: Path, tiny: Any) -> None:
    refusals: list[str] = []

    def second(progress: FitProgress) -> None:
        if progress.kind == "validation" and not refusals:
            with pytest.raises(FolderInUseError) as error:
                train(tiny, tmp_path / "run", resume=True)
            refusals.append(one_line(error))

    result = train(tiny, tmp_path / "run", progress=second)
    assert refusals[0].startswith(f"{tmp_path / 'run'} is in use by muntin fit (process {os.getpid()} on ")
    assert result.step == 6 and len(lines(tmp_path / "run")) == len(result.validation) + 1
    assert not (tmp_path / "run" / ".lock").exists()


# ---- what goes wrong ----


@pytest.fixture(scope="module")
def whole_of_six(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> FitResult:
    root = tmp_path_factory.mktemp("whole_of_six")
    return train(write_tiny(root / "data"), root / "run", "training.checkpoint_every=100", "data.cache_mib=0")


UNSOUND = """
from torch import nn

class Unsound(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.layer, self.calls = nn.Conv2d(channels, classes, 1), 0

    def forward(self, x):
        self.calls += self.training
        return self.layer(x / 255) * (float("nan") if self.calls > 4 else 1)

def make(*, task, classes, channels):
    return Unsound(classes, channels)
"""


def test_diverged_loss(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    tiny = write_foreign(UNSOUND)
    with pytest.raises(
        MuntinError, match=r"the loss is nan at step 4, and at 5 batches before it: lower training\.learning_rate \(now 0\.002\)"
    ) as error:
        train(tiny, tmp_path / "run")
    advised = one_line(error).partition(", by --resume --set ")[2].split(" --set ")
    assert advised == ["training.learning_rate=0.0005"]
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.state.step == 3
    assert all(value.isfinite().all() for value in load_model(checkpoint).state_dict().values())
    result = train(tiny, tmp_path / "run", *advised, resume=True)  # what the line advises works
    assert (result.step, result.notes) == (6, ("on the way, from step 3 on: training.learning_rate was 0.002, is 0.0005",))


def test_advice_after_divergence(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    """A constant learning rate, a run without a checkpoint, and a candidate of compression."""
    tiny = write_foreign(UNSOUND)
    plan = ("training.final_learning_rate=0.002", "training.validate_every=100", "training.checkpoint_every=100")
    with pytest.raises(MuntinError, match="and train anew, by --set") as error:
        train(tiny, tmp_path / "run", *plan)
    advised = one_line(error).partition(", by --set ")[2].split(" --set ")
    assert advised == ["training.learning_rate=0.0005", "training.final_learning_rate=0.0005"]
    assert train(tiny, tmp_path / "run", *plan, *advised, "training.steps=2").step == 2  # what the line advises works
    recipe = load_recipe(tiny.recipe)
    source, precision = open_source(recipe.data, task=recipe.task, root=tiny.root), resolve_precision("fp32", "cpu")
    trainer = Trainer(new_model(recipe, source.classes), recipe.training, task="segment", precision=precision)
    stage = Training(
        trainer,
        recipe,
        source,
        directory=tmp_path / "stage",
        root=tiny.root,
        start=None,
        report=lambda progress: None,
        compression=CompressionRecord(steps=1, origin="", ranks={}, changes=()),
    )
    with pytest.raises(MuntinError, match=r"lower learning_rate in compression \(now 0\.002\) and compress anew") as error:
        stage.run(Interruption())
    one_line(error)


STEEP = """
import torch
from torch import nn

class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, steep):
        ctx.steep = steep
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("inf") if ctx.steep else 1), None

class Model(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.layer, self.calls = nn.Conv2d(channels, classes, 1), 0

    def forward(self, x):
        self.calls += self.training
        return Steep.apply(self.layer(x / 255), self.calls == 3)

def make(*, task, classes, channels):
    return Model(classes, channels)
"""


def test_batch_with_an_infinite_gradient(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    tiny = write_foreign(STEEP)
    result = train(tiny, tmp_path / "run", "training.checkpoint_every=1")
    assert result.step == 6 and not result.interrupted
    (note,) = (note for note in result.notes if "gradient" in note)
    assert re.fullmatch(r"the gradient is (nan|inf) at step 3, and the loss [0-9.]+: its batch is skipped", note)
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.state.guard.skipped == 1
    assert all(value.isfinite().all() for tensors in checkpoint.tensors.values() for value in tensors.values())


def test_going_back_after_several_bad_batches(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    """Unsound at six calls, from step 5 on: five batches are skipped, then the run goes back to step 3, where nothing is wrong."""
    tiny = write_foreign(UNSOUND.replace("self.calls > 4", "4 < self.calls <= 10"))
    result = train(tiny, tmp_path / "run")
    assert result.step == 6
    assert sum(note.endswith("its batch is skipped") for note in result.notes) == 1  # a note once, and all are of step 5
    assert any("the run goes on from step 3, with other batches" in note for note in result.notes)
    guard = read_checkpoint(tmp_path / "run").state.guard
    assert (guard.rollbacks, guard.skipped, guard.in_a_row) == (1, 7, 0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


COLLAPSING = """
import torch
from torch import nn

class Collapsing(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.layer = nn.Conv2d(channels, classes, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.training
        return self.layer(x / 128 - 1) * torch.where(self.calls > 40, -30.0, 3.0)

def make(*, task, classes, channels):
    return Collapsing(classes, channels)
"""


def test_collapsed_score(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    tiny, seen = write_foreign(COLLAPSING), list[FitProgress]()
    plan = (
        "training.validate_every=20",
        "training.checkpoint_every=40",
        "training.average=0",
        "training.steps=80",
        "training.spike=null",
    )
    result = train(tiny, tmp_path / "run", *plan, "training.learning_rate=0.05", "training.clip=0.1", progress=seen.append)
    scores = {point["step"]: point["score"] for point in result.validation}
    best = max(scores, key=lambda step: scores[step])
    first, last = result.notes
    assert best <= 40 and f"fell from {scores[best]:.3f} at step {best} to {scores[60]:.3f} at step 60, and the training loss rose" in first
    assert f"to {scores[80]:.3f} at step 80" in last and "the learning rate (now 0.05) is probably too high; train anew" in last
    assert last.endswith(f"; the result has the weights of step {best}, of the best score")
    assert result.result is not None and result.result["step"] == best
    assert [progress.step for progress in seen if progress.kind == "note"] == [60, 80]


SHARED = """
from torch import nn

def make(*, task, classes, channels):
    twice = nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(nn.Conv2d(channels, 8, 1), twice, nn.ReLU(), twice, nn.Conv2d(8, classes, 1))
"""


def test_shared_layer(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    tiny = write_foreign(SHARED)
    train(tiny, tmp_path / "run")
    model = load_model(read_checkpoint(tmp_path / "run"))
    assert torch.equal(model[1].weight, model[3].weight) and model[1] is model[3]  # type: ignore[index]


MADE_LATE = """
import torch
from torch import nn

class Late(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.LazyConv2d(classes, 1)

    def forward(self, x):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", torch.full((1, x.shape[1], 1, 1), 100.0))
        return self.layer((x - self.mean) / 255)

def make(*, task, classes, channels):
    return Late(classes)
"""


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_parameters(tmp_path: Path, write_foreign: Callable[[str], Any]) -> None:
    tiny = write_foreign(MADE_LATE)
    train(tiny, tmp_path / "run", progress=ctrl_c_at(3))
    checkpoint = read_checkpoint(train(tiny, tmp_path / "run", resume=True).checkpoint)
    state = load_model(checkpoint).state_dict()
    assert set(state) == {"mean", "layer.weight", "layer.bias"}
    assert all(torch.equal(value, checkpoint.tensors[AVERAGE][name]) for name, value in state.items())


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_data_checked_first(tmp_path: Path, tiny: Any, kind: str) -> None:
    path = tiny.root / "test" / kind / "test-1.png"  # the split that training never touches
    path.write_bytes(path.read_bytes()[:-60])
    seen: list[FitProgress] = []
    with pytest.raises(DataError, match=r"test-1\.png") as error:
        train(tiny, tmp_path / "run", progress=seen.append)
    one_line(error)
    assert not (tmp_path / "run").exists()
    assert {progress.kind for progress in seen} == {"check"}


def test_task_of_the_data(tmp_path: Path, tiny: Any) -> None:
    for overrides, says in (
        (["task=classify"], "task: classify has no data.masks: leave it out"),
        (["task=classify", "data={}"], "the data are for 'segment' and the recipe says 'classify'"),
    ):
        with pytest.raises(RecipeError, match=says) as error:
            train(tiny, tmp_path / "run", *overrides)
        one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.name=hybrid-sx", "did you mean 'hybrid-"),
        ("model.options={dim: [32]}", "unknown option 'dim': did you mean 'dims'?"),
        ("model.scale=2", "unknown key 'model.scale'"),
        ("model.weights=none.safetensors", "there is no such file"),
    ],
)
def test_model_error(tmp_path: Path, tiny: Any, override: str, says: str) -> None:
    seen: list[FitProgress] = []
    with pytest.raises(RecipeError) as error:
        train(tiny, tmp_path / "run", override, progress=seen.append)
    assert says in one_line(error)
    assert not (tmp_path / "run").exists() and not seen  # nor has any picture been looked at


def test_batch_too_small(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MuntinError, match="train on larger crops") as error:
        train(tiny, tmp_path / "ours", "training.batch_size=1", *TWO_STAGES)
    one_line(error)
    (tmp_path / "batch_norm_model.py").write_text(
        "from torch import nn\n\ndef make(*, task, classes, channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, classes, 32), nn.BatchNorm2d(classes), nn.Upsample(scale_factor=32))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    foreign = ("model.name=batch_norm_model:make", "model.options={}", "training.batch_size=1")
    with pytest.raises(RecipeError, match=r"training\.batch_size 1 with data\.crop 32: .* raise either of them") as error:
        train(tiny, tmp_path / "foreign", *foreign)
    one_line(error)


@pytest.mark.parametrize("failing", [3, 6])
def test_failed_validation_is_repeated(tmp_path: Path, tiny: Any, whole_of_six: FitResult, failing: int) -> None:
    """A picture is damaged during training and repaired."""
    picture = tiny.root / "validation" / "images" / "validation-1.png"
    content = picture.read_bytes()

    def damage(progress: FitProgress) -> None:
        if (progress.kind, progress.step) == (("check", 8) if failing == 3 else ("validation", 3)):
            picture.write_bytes(content[:-60])

    options = ("training.checkpoint_every=100", "data.cache_mib=0")
    with pytest.raises(DataError, match=r"validation-1\.png is damaged"):
        train(tiny, tmp_path / "run", *options, progress=damage)
    state = read_checkpoint(tmp_path / "run").state
    assert (state.step, [point["step"] for point in state.validation]) == (failing, [3][: failing // 6])
    picture.write_bytes(content)
    result = train(tiny, tmp_path / "run", *options, resume=True)
    assert (result.step, result.interrupted, [point["step"] for point in result.validation]) == (6, False, [3, 6])
    assert [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "validation"] == [3, 6]
    one, other = read_checkpoint(whole_of_six.checkpoint), read_checkpoint(result.checkpoint)
    assert_same_state(one, other)
    assert one.state.validation == other.state.validation


def test_second_interrupt_in_a_validation(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(*given: Any, **more: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # where the second one is raised

    monkeypatch.setattr("muntin.training.loop.evaluate", validate)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have switched Ctrl-C off
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "run", "training.checkpoint_every=100")
    finally:
        signal.signal(signal.SIGINT, before)
    state = read_checkpoint(tmp_path / "run").state
    assert (state.step, state.validation) == (3, [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is always full")
def test_log_write_error(tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    result = train(tiny, tmp_path / "run")
    place = tmp_path / "run" / "metrics.jsonl"
    assert result.notes == (f"{place} cannot be written (No space left on device): the curve is only in checkpoints",)
    assert len(read_checkpoint(result.checkpoint).state.validation) == len(result.validation) == 2


def test_compile_without_a_compiler(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError, match=r"needs a C\+\+ compiler on CPUs .* or leave `compile` false") as error:
        train(tiny, tmp_path / "run", "training.compile=true")
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_resume_without_a_run(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(CheckpointError, match=r"run holds no checkpoint to resume from: .*, or leave out --resume"):
        train(tiny, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_impossible_gate_budget(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"training.gate_budget 0.001: one block of \d+ channels of each gate stays open"):
        train(tiny, tmp_path / "run", "training.gate_budget=0.001")
    assert not (tmp_path / "run").exists()


def test_crop_and_thread_settings(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options_of_crops: list[dict[str, Any]] = []

    class Watched(loop.Crops):
        def __init__(self, samples: Any, **options: Any) -> None:
            options_of_crops.append(options)
            super().__init__(samples, **options)

    monkeypatch.setattr(loop, "Crops", Watched)
    threads, seen = torch.get_num_threads(), []
    options = ["data.rare=0.25", "data.augmentation.brightness=0.125", "training.threads=2", "training.steps=1", "training.batch_size=3"]
    try:
        result = train(tiny, tmp_path / "run", *options, progress=lambda progress: seen.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(threads)
    recipe = read_checkpoint(result.checkpoint).recipe
    data = recipe.data
    assert options_of_crops[0] == {
        "task": "segment", "crop": data.crop, "batch_size": 3, "seed": recipe.seed, "augmentation": data.augmentation, "rare": 0.25,
        "classes": 3,
    }  # fmt: skip
    assert data.augmentation.brightness == 0.125
    assert set(seen) == {2}


def test_precision_of_a_resumed_run(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    resolve = resolve_precision

    def watch(*given: Any, **options: Any) -> Any:
        begun.append(options["begun"])
        return resolve(*given, **options)

    monkeypatch.setattr("muntin.training.precision.resolve_precision", watch)
    plan = ["training.steps=2", "training.validate_every=1"]
    assert train(tiny, tmp_path / "run", *plan, progress=ctrl_c_at(1)).interrupted
    train(tiny, tmp_path / "run", *plan, resume=True)
    assert begun == [None, read_checkpoint(tmp_path / "run").state.precision]


@pytest.mark.parametrize(("gain", "name"), [(1e9, "fp32"), (0.0, "bf16")])
def test_measured_precision(gain: float, name: str, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement is noted, and leaves the bits of the run as they are."""
    plan = ["training.steps=4", "training.batch_size=8", "training.validate_every=4"]
    monkeypatch.setattr(precision, "cpu_computes_bf16", lambda: True)
    monkeypatch.setattr(precision, "MAX_SHARE", 1.0)
    monkeypatch.setattr(precision, "MIN_GAIN", gain)
    result = train(tiny, tmp_path / "auto", *plan)
    asked = train(tiny, tmp_path / "asked", *plan, f"training.precision={name}")
    words = r"since BF16 is [0-9.]+ times as fast with this model \(.* in 5 pairs of steps\)(, too little: .*)?"
    assert re.fullmatch(rf"precision auto: {name}, {words}", result.notes[-1])
    assert result.precision.startswith(f"{name} on cpu: BF16 is ")
    one, other = read_checkpoint(result.checkpoint), read_checkpoint(asked.checkpoint)
    assert one.state.precision == other.state.precision == name
    for group in (MODEL, AVERAGE):
        assert all(torch.equal(value, other.tensors[group][key]) for key, value in one.tensors[group].items())


def test_data_notes(tmp_path: Path, tiny: Any) -> None:
    masks = tiny.root / "train" / "masks"
    for mask in (*masks.iterdir(), masks / "lonely.png"):
        write_image(mask, np.zeros((48, 48), np.uint8))
    seen: list[FitProgress] = []
    result = train(tiny, tmp_path / "run", "training.steps=1", progress=seen.append)
    assert any("1 mask without an image, not used: lonely.png" in note for note in result.notes)
    assert "no training picture holds field, roof: a model cannot learn what it does not see" in result.notes
    assert tuple(progress.note for progress in seen if progress.kind == "note") == result.notes
    kinds = [progress.kind for progress in seen]
    assert kinds.index("note") < kinds.index("step")


# ---- a limit in time ----


TIMED = ("training.minutes=0.05", "training.steps=1000000", "training.validate_every=1000000", "training.checkpoint_every=1000000")


def test_minutes_limit(tmp_path: Path, tiny: Any, clock: Any) -> None:
    clock.tick = 0.05
    seen: list[FitProgress] = []
    result = fit(load_recipe(tiny.recipe, list(TIMED)), directory=tmp_path / "run", root=tiny.root, progress=seen.append)
    assert not result.interrupted and result.seconds >= 3
    assert 1 < result.step == result.steps < 1_000_000
    curve = read_checkpoint(result.checkpoint).state.training
    assert curve[-1]["step"] == result.step and curve[-1]["seconds"] >= 3
    assert all(point["seconds"] < 3 for point in curve[:-1])
    rates = [point["learning_rate"] for point in curve]
    assert rates[-1] < 0.2 * load_recipe(tiny.recipe).training.learning_rate
    assert [point["step"] for point in result.validation] == [result.step]
    shares = [progress.share for progress in seen if progress.kind == "step"]
    assert None not in shares and shares == sorted(shares) and shares[-1] == 1  # type: ignore[type-var]
    expected = [progress.steps for progress in seen if progress.kind == "step"]
    assert all(progress.step <= progress.steps for progress in seen if progress.kind == "step")
    assert expected[-1] == result.step < 1_000_000
    state = read_checkpoint(result.checkpoint).state
    again = train(tiny, tmp_path / "run", *TIMED, resume=True)
    assert (again.step, again.interrupted, again.checkpoint) == (result.step, False, result.checkpoint)
    assert read_checkpoint(again.checkpoint).state == state


def test_time_of_an_interrupted_run(tmp_path: Path, tiny: Any, clock: Any) -> None:
    clock.tick = 0.02
    options = [*TIMED[:2], "training.validate_every=3", "training.checkpoint_every=1000000"]
    interrupt = ctrl_c_at(3)

    def slow(progress: FitProgress) -> None:
        if progress.kind == "validation":
            clock.now += 2
        interrupt(progress)

    first = train(tiny, tmp_path / "run", *options, progress=slow)
    assert first.interrupted and first.step == 3 and first.seconds >= 2
    again = train(tiny, tmp_path / "run", *options, resume=True)
    begun = read_checkpoint(first.checkpoint).state.seconds
    assert begun == first.seconds
    assert all(point["seconds"] > begun for point in read_checkpoint(again.checkpoint).state.training)
    seconds = [point["seconds"] for point in read_checkpoint(again.checkpoint).state.training]
    assert not again.interrupted and seconds == sorted(seconds)
    assert 3 <= again.seconds < 3.5  # no three seconds more of its own


def test_validation_at_the_time_limit(tmp_path: Path, tiny: Any, clock: Any) -> None:
    def slow(progress: FitProgress) -> None:
        if progress.kind == "validation":
            clock.now += 3

    options = [*TIMED[:2], "training.validate_every=2", "training.checkpoint_every=1000000"]
    result = train(tiny, tmp_path / "run", *options, progress=slow)
    assert (result.step, [point["step"] for point in result.validation]) == (2, [2])


# ---- parts ----


BUDGET = (*TWO_STAGES, "training.gate_budget=0.66", "training.steps=12", "training.validate_every=4", "training.checkpoint_every=1000")


def test_interrupted_gate_closing(tmp_path: Path, tiny: Any) -> None:
    whole = train(tiny, tmp_path / "whole", *BUDGET)
    gates = [module for module in load_model(read_checkpoint(whole.checkpoint)).modules() if isinstance(module, ChannelGate)]
    assert any(not gate.open_channels().all() for gate in gates) and all(gate.open_channels().any() for gate in gates)
    train(tiny, tmp_path / "parts", *BUDGET, progress=ctrl_c_at(4))
    parts = train(tiny, tmp_path / "parts", *BUDGET, resume=True)
    assert_same_state(read_checkpoint(whole.checkpoint), read_checkpoint(parts.checkpoint))


def write_colors(root: Path, model: dict[str, Any], *, steps: int) -> Path:
    """Write pictures of noisy colours in one folder a class, and a classifier's recipe."""
    generator = np.random.default_rng(0)
    for name, color in (("red", (200, 40, 40)), ("green", (40, 180, 60)), ("blue", (30, 60, 200))):
        (root / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            size = tuple(generator.integers(30, 50, 2))
            noise = generator.normal(0, 30, (*size, 3))
            write_image(root / "pictures" / name / f"{number}.png", np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))
    content = {
        "task": "classify",
        "data": {"source": "folders", "images": "pictures", "validation": 0.3, "test": 0.3, "seed": 1, "crop": 24},
        "model": model,
        "training": {"steps": steps, "batch_size": 8, "learning_rate": 0.01, "average": 0.8, "threads": 1},
    }
    (root / "colors.yaml").write_text(json.dumps(content))  # JSON is YAML
    return root / "colors.yaml"


def test_easy_classification(tmp_path: Path, tiny: Any) -> None:
    result = fit(write_colors(tmp_path, tiny.content["model"], steps=30), directory=tmp_path / "run")
    assert result.validation[-1]["accuracy"] == result.validation[-1]["score"] > 0.9
    assert "miou" not in result.validation[-1]


def test_validation_by_class(tmp_path: Path, tiny: Any) -> None:
    result = fit(write_colors(tmp_path, tiny.content["model"], steps=3), directory=tmp_path / "run")
    checkpoint = read_checkpoint(result.checkpoint)
    samples = open_source(checkpoint.recipe.data, task=checkpoint.recipe.task, root=tmp_path).split("validation")
    again = evaluate(TorchSession(load_model(checkpoint), checkpoint.signature), samples, tile=48)
    assert again.recall != again.iou, "it errs nowhere: this test plants nothing"
    assert result.validation[-1]["by_class"] == again.recall


# Log


def point(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 100}


def test_log_of_a_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0, [], []) as log:
        for step in (10, 20, 30):  # 30 is after the checkpoint
            log.write("training", point(step))
    time.sleep(1.1)  # TensorBoard orders files by the second of their creation
    with MetricsLog(tmp_path, 20, [point(10), point(20)], []) as log:
        log.write("training", point(40))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [line["step"] for line in lines] == [event.step for event in board.Scalars("training/loss")] == [10, 20, 40]
