"""Models trained once and artefacts exported once, for benchmarks that can be interrupted. (Rows measured once: `kept`.)"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import muntin
from documents import Row
from muntin.artifact import Artifact, open_artifact
from muntin.budgeting.candidate import CourseStage, apply_plan, course_stages, narrowed
from muntin.budgeting.forms.plans import Plan
from muntin.budgeting.run_budget import RecipeCourse
from muntin.compression import Change, fold, freeze, load_model, prepare_qat, remove_closed_channels
from muntin.deployment.checkpoint_export import REVISION
from muntin.errors import ArtifactError
from muntin.models import PRESETS, ModelConfig
from muntin.training import Checkpoint, Recipe, load_recipe, read_checkpoint
from muntin.training.checkpoint import calibration_of, checkpoints_in, recipe_changes, source_of
from muntin.training.config import CompressionConfig
from muntin.training.distributed.stored_tensors import AVERAGE


def network_of(name: str) -> Row:
    """Describe a network beyond its name: the preset's structure, and the version of the export. Both may change under the same name."""
    structure = ModelConfig(**PRESETS[name]).model_dump(mode="json") if name in PRESETS else None
    return {"structure": structure, "revision": REVISION}


def demo_recipe(changes: Mapping[str, Any], path: Path | None = None) -> Recipe:
    """The demonstration's recipe, or the one of a path, with some values replaced, by `section.key`."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return load_recipe(path or Path(muntin.__file__).parent / "recipes" / "demo.yaml", overrides)


def trained(recipe: Recipe, folder: Path, root: Path | None = None) -> Checkpoint:
    """The recipe's last checkpoint: trained from where it stands. One of another recipe ends the program, and so does Ctrl-C, which leaves
    one in between: neither is this recipe's result."""
    begun = bool(checkpoints_in(folder / "checkpoints"))
    if begun:
        # First: `fit` would go on from it, and write it as its own recipe's.
        checkpoint = _of_recipe(read_checkpoint(folder, trust_code=True), recipe)
        if checkpoint.state.step == recipe.training.steps:
            return checkpoint
    result = muntin.fit(recipe, directory=folder, root=root or Path.cwd(), resume=begun)
    if result.stop_requested:
        raise SystemExit(f"interrupted at step {result.step} of {result.steps} in {folder}: the same command goes on from there")
    return _of_recipe(read_checkpoint(folder, trust_code=True), recipe)


def _of_recipe(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    if what := recipe_changes(checkpoint, recipe):
        raise SystemExit(f"{checkpoint.path} was trained by another recipe ({what}): give another --output")
    return checkpoint


def train_stage(checkpoint: Checkpoint, config: CompressionConfig, folder: Path, stage: CourseStage, model: nn.Module) -> None:
    """Train a candidate in place for one stage as `muntin compress` does, from where the folder stands. `config`: with steps."""
    course = RecipeCourse(checkpoint, source_of(checkpoint), config)
    place = folder / "1" / stage.name  # in the folder of a trial's number, which notes name
    course.train(stage, model, load_model(checkpoint), seed=checkpoint.recipe.seed, folder=place, report=lambda step, loss: None)


def planned(checkpoint: Checkpoint, plan: Plan, config: CompressionConfig, folder: Path) -> tuple[nn.Module, Artifact]:
    """Apply a plan to the checkpoint's model by the course in `config`. Return the model in integers, and its artifact."""
    calibration = calibration_of(checkpoint, source_of(checkpoint))
    base = narrowed(load_model(checkpoint), plan.width, calibration)
    stages = course_stages(config, config.steps or 0, config.learning_rate or config.mix.learning_rate)
    model = apply_plan(base, plan, calibration, stages=stages, train=partial(train_stage, checkpoint, config, folder))
    return model, muntin.export(model, calibration[0], folder / "artifact", signature=checkpoint.signature)


def float_artifact(checkpoint: Checkpoint, path: Path) -> Artifact:
    """The model in floats, its norms and gates folded first, as they are in every quantised form: a baseline at its best."""
    return _exported(checkpoint, path, "folded floats", lambda model, calibration: fold(model))


def integer_artifact(checkpoint: Checkpoint, path: Path) -> Artifact:
    """The model in W4A8 without training, attention products in 8 bits too: `direct` of `quantization.py`."""
    return _exported(
        checkpoint,
        path,
        "W4A8",
        lambda model, calibration: prepare_qat(model, calibration) + freeze(model, calibration),
    )


def _exported(checkpoint: Checkpoint, path: Path, how: str, rewrite: Callable[[nn.Module, list[Tensor]], list[Change]]) -> Artifact:
    """The artefact that is there, if it was made of these weights in this way, by this state of the code; otherwise a new one."""
    origin = f"{checkpoint.state.sha256[AVERAGE]}:{how}:{REVISION}"
    try:
        there = open_artifact(path)
    except ArtifactError:  # none, or an altered one
        pass
    else:
        if there.manifest.measured.get("origin") == origin and there.manifest.muntin == version("muntin"):
            return there
    source = source_of(checkpoint)
    calibration, model = calibration_of(checkpoint, source), load_model(checkpoint)
    changes = remove_closed_channels(model) + rewrite(model, calibration)
    return muntin.export(
        model, calibration[0], path, signature=checkpoint.recipe.signature(source.classes), changes=changes, measured={"origin": origin}
    )
