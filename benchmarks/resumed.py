"""What benchmarks that can be interrupted share: models trained once, artefacts exported once, rows measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import muntin
from muntin.artifact import Artifact, open_artifact
from muntin.compression import Change, fold, freeze, prepare_qat, remove_closed_channels
from muntin.compression.stages import calibration_of, source_of
from muntin.runtime import describe_hardware
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import checkpoints_in
from muntin.training.loop import signature_of
from muntin.training.recipe import Recipe, load_recipe

Row = dict[str, Any]
PERCENTILE = 99.99
"""Of a layer's inputs: where W4A8 without training clips them."""


def demo_recipe(changes: Mapping[str, Any]) -> Recipe:
    """The demonstration's recipe with some values replaced, by `section.key`."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml", overrides)


def trained(recipe: Recipe, folder: Path) -> Checkpoint:
    """The recipe's last checkpoint: trained from where it stands. Ctrl-C leaves one in between, which is no result: it ends the program."""
    begun = bool(checkpoints_in(folder / "checkpoints"))
    if begun:
        checkpoint = read_checkpoint(folder)
        if checkpoint.recipe == recipe and checkpoint.state.step == recipe.training.steps:
            return checkpoint
    result = muntin.fit(recipe, directory=folder, root=Path.cwd(), resume=begun)
    if result.interrupted:
        raise SystemExit(f"interrupted at step {result.step} of {result.steps} in {folder}: the same command goes on from there")
    return read_checkpoint(folder)


def float_artifact(checkpoint: Checkpoint, path: Path) -> Artifact:
    """The model in floats, its norms and gates folded first, as they are in every quantised form: a baseline at its best."""
    return _exported(checkpoint, path, lambda model, calibration: fold(model))


def integer_artifact(checkpoint: Checkpoint, path: Path) -> Artifact:
    """The model in W4A8 without training, attention products in 8 bits too: `direct` of `quantization.py`."""
    return _exported(
        checkpoint, path, lambda model, calibration: prepare_qat(calibration, percentile=PERCENTILE)(model) + freeze(calibration)(model)
    )


def _exported(checkpoint: Checkpoint, path: Path, rewrite: Callable[[nn.Module, list[Tensor]], list[Change]]) -> Artifact:
    if (path / "manifest.json").is_file():  # an artefact is written whole or not at all
        return open_artifact(path)
    source = source_of(checkpoint)
    calibration, model = calibration_of(checkpoint, source), checkpoint.model()
    changes = remove_closed_channels(model) + rewrite(model, calibration)
    return muntin.export(model, calibration[0], path, signature=signature_of(checkpoint.recipe, source), changes=changes)


def kept_row(path: Path, settings: Mapping[str, Any], measure: Callable[[], Row]) -> Row:
    """The row that lies there already, or a new one, written whole or not at all. One of other settings is an error."""
    if path.is_file():
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        if row["settings"] != settings:
            raise SystemExit(f"{path} was measured with {row['settings']}, and {dict(settings)} is asked for: give another --output")
        return row
    row = {
        "settings": dict(settings),
        **measure(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(row, indent=1), encoding="utf-8")
    draft.replace(path)
    return row


def print_machines(rows: list[Row]) -> None:
    """Where and when the rows were measured: a line, or more where they come from several machines."""
    machines: dict[str, list[str]] = {}
    for row in rows:
        hardware = row["hardware"]
        words = f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}, OpenVINO {hardware['openvino']}"
        machines.setdefault(words, []).append(row["created"])
    for words, created in machines.items():
        print(f"{words}; {min(created)}" + (f" to {max(created)}" if len(created) > 1 else ""))
