"""Export of a checkpoint of `muntin fit` or `muntin compress` as an artefact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from muntin.artifact import Artifact, Manifest, check_target, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.compression import freeze, load_model
from muntin.deployment.export import export
from muntin.deployment.sizes.requested import parse_sizes, usual_sizes
from muntin.errors import ArtifactError, ExportError, RecipeError
from muntin.tasks.classes import relabel_artifact
from muntin.training.checkpoint import Checkpoint, calibration_of, source_of
from muntin.training.evaluation import tile_of
from muntin.training.recipe import Recipe, override_recipe

ARTIFACT = "artifact"
"""Default folder of a run's artefact."""
SIZES = "sizes"
"""Key of the requested sizes among the measured figures of a manifest."""
SIZE_REASON = "the size of the export"
"""Why `export_side` is the size that a run is measured at, in words."""
REVISION = 9
"""Version of what export makes of the same weights. Raise it with every change of that, so that existing artefacts are exported again."""


def export_side(recipe: Recipe) -> int:
    """Return the side of the images that an artefact is exported for and a run is measured at, pixels: a tile's, or a classifier's crop."""
    return recipe.data.crop if recipe.answer.one else tile_of(recipe.data.crop)


def quantized_by(checkpoint: Checkpoint, overrides: Iterable[str]) -> Checkpoint:
    """Return the checkpoint with `quantization.KEY=VALUE` of its recipe replaced.

    Raises RecipeError for other keys, and for a checkpoint that `compress` has quantised.
    """
    overrides = tuple(overrides)
    other = next((override for override in overrides if not override.startswith("quantization.")), None)
    if other is not None:
        raise RecipeError(f"'{other}': the model is trained already; only quantization.KEY=VALUE can be set here")
    if overrides and checkpoint.quantized:
        raise RecipeError(f"{checkpoint.path} was quantised by `muntin compress`: its --set changes how")
    recipe = override_recipe(checkpoint.recipe, overrides)
    return replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe}))


def export_checkpoint(
    checkpoint: Checkpoint, path: Path, *, integer: bool = True, sizes: str | None = None, begin: Callable[[], None] = lambda: None
) -> Artifact:
    """Quantise a checkpoint (unless `integer` is False) and write its artefact. An artefact of the same weights and sizes is reused, and
    gets the present names of the classes.

    `sizes`: those of the artefact, as `parse_sizes` reads them; None: those of an artefact to reuse, otherwise `usual_sizes`. `begin` is
    called when work begins, after all checks that may refuse it.
    Raises ExportError for `integer=False` and a checkpoint that is quantised already.
    """
    if not integer and checkpoint.quantized:
        raise ExportError(
            f"{checkpoint.path} is quantised already and has no float form: leave out --float (integer=False), or export the checkpoint of "
            "`muntin fit`"
        )
    text = sizes or usual_sizes(checkpoint.recipe.task)
    requested = parse_sizes(text)
    if (existing := exported(checkpoint, path, integer=integer, sizes=sizes)) is not None:
        if existing.picture.classes == checkpoint.classes:
            return existing
        return relabel_artifact(existing, checkpoint.classes)
    check_target(path)
    begin()
    calibration = calibration_of(checkpoint, source_of(checkpoint))
    model, changes, side = load_model(checkpoint), list(checkpoint.changes), export_side(checkpoint.recipe)
    calibrated = integer and not checkpoint.quantized
    if not calibrated and checkpoint.state.compression is not None:
        changes += freeze(model, calibration)
    return export(
        model, calibration[0], path, signature=checkpoint.signature, changes=changes,
        calibration=calibration if calibrated else None, quantization=checkpoint.recipe.quantization if calibrated else None,
        measured={"origin": _origin_of(checkpoint, integer), SIZES: text}, shape=(1, side, side), sizes=requested,
    )  # fmt: skip


def exported(checkpoint: Checkpoint, path: Path, *, integer: bool = True, sizes: str | None = None) -> Artifact | None:
    """Return the artefact at `path` if `export_checkpoint` would reuse it."""
    try:
        existing = open_artifact(path)
    except ArtifactError:
        return None
    measured = existing.manifest.measured
    same = measured.get("origin") == _origin_of(checkpoint, integer) and existing.manifest.muntin == version("muntin")
    return existing if same and sizes in (None, measured.get(SIZES)) else None


def other_artifact(checkpoint: Checkpoint, path: Path, *, integer: bool = True) -> str | None:
    """Describe the artefact of other weights or another kind at `path` that an export would replace. None without one."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        manifest = open_artifact(path).manifest
    except ArtifactError as error:
        return f"unreadable: {error}"
    origin = manifest.measured.get("origin")
    if origin == _origin_of(checkpoint, integer):
        return None
    kind = "compressed" if {"qat", "low_rank"} & {entry.get("pass") for entry in manifest.passes} else "plain"
    numbers = "INT8" if any(layer.activation_bits == 8 for layer in manifest.layers) else "float"
    weights = origin_weights(manifest)
    own = weights == checkpoint.state.weights
    source = "these weights" if own else f"weights {weights[:8]}" if weights else "weights not recorded"
    return f"{kind} {numbers} of {source}, exported {manifest.created}"


def origin_weights(manifest: Manifest) -> str | None:
    """Return the sha256 of the weights that an artefact was exported from; None where it is not recorded."""
    origin = manifest.measured.get("origin")
    return origin.partition(":")[0] if isinstance(origin, str) else None


def quantized_at_export(manifest: Manifest) -> bool:
    """Return False for an artefact that was exported with `--float`."""
    return not str(manifest.measured.get("origin")).partition(":")[2].startswith("float:")


def _origin_of(checkpoint: Checkpoint, integer: bool) -> str:
    """Return an artefact's origin as recorded in its manifest: weights, quantisation and `REVISION`."""
    quantization = checkpoint.recipe.quantization.model_dump_json() if integer else "float"
    return f"{checkpoint.state.weights}:{quantization}:{REVISION}"
