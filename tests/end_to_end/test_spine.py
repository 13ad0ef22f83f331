"""From pictures in folders to a verified INT8 artefact and its report, by the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from muntin.artifact import open_artifact
from muntin.cli import app
from muntin.data import EarthSource
from muntin.images import read_image, read_mask, write_image
from muntin.runtime import load, predict

SIDE = 192
# Degrees (north, east) of each crop's centre: coasts, deserts and ice, so that every class is in every split.
PLACES = {
    "train": ((30, -5), (65, -48), (20, 22), (-25, 138), (62, 75), (12, 38), (45, 65), (70, -100), (-75, 20), (38, -100)),
    "validation": ((-30, -65), (68, -25), (25, 60)),
    "test": ((18, 5), (66, -40), (-22, 20), (48, 95)),
}


def write_pictures(root: Path) -> dict[str, Any]:
    """Crops of the photograph and of its labels as PNG files; returns the `data` of a recipe for them."""
    source = EarthSource("cover")
    image_HWC, labels_HW = source.picture()
    scale = image_HWC.shape[1] / 360
    for split, places in PLACES.items():
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for north, east in places:
            top, left = round((90 - north) * scale) - SIDE // 2, round((east + 180) * scale) - SIDE // 2
            window = (slice(top, top + SIDE), slice(left, left + SIDE))
            write_image(root / split / "images" / f"{north}_{east}.png", image_HWC[window])
            write_image(root / split / "masks" / f"{north}_{east}.png", labels_HW[window])
    folders = {split: {kind: f"{split}/{kind}" for kind in ("images", "masks")} for split in PLACES}
    classes = [{"name": entry.name, "color": list(entry.color)} for entry in source.classes]
    return {"source": "folders", **folders.pop("train"), **folders, "classes": classes, "crop": 96, "rare": 0.3}


def run(*words: object) -> Any:
    """A command's one JSON document; nothing else is said."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.mark.slow
def test_pictures_to_a_verified_artefact(tmp_path: Path) -> None:
    recipe = {
        "name": "slice",
        "data": write_pictures(tmp_path),
        "model": {"name": "hybrid-xs"},
        "training": {"steps": 100, "batch_size": 6, "learning_rate": 0.003, "validate_every": 30, "checkpoint_every": 30, "average": 0.9},
        "quantization": {"calibration_images": 16},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    directory, artifact = tmp_path / "run", tmp_path / "run" / "artifact"

    fitted = run("fit", tmp_path / "recipe.yaml", "-o", directory)
    assert (fitted["step"], fitted["interrupted"]) == (100, False)
    assert fitted["validation"][-1]["score"] > 0.25  # of six classes: a sixth is what one colour everywhere reaches at best

    live = run("evaluate", directory)
    assert live["counted"] == 4 * SIDE**2
    assert live["iou"]["ocean"] > 0.5

    exported = run("export", directory)
    manifest = open_artifact(artifact).manifest
    assert exported["int8_layers"] > 0.8 * len(manifest.layers)
    assert all(layer.note for layer in manifest.layers if layer.activation_bits is None)  # nothing is left out without a reason

    verified = run("verify", artifact)
    assert verified["passed"]
    assert verified["fallbacks"] == []

    deployed = run("evaluate", directory, "--artifact", artifact)
    assert deployed["counted"] == live["counted"]

    report = run("report", directory)
    check_report(directory, report, live, deployed)
    check_predictions(tmp_path, artifact)


def check_report(directory: Path, report: dict[str, Any], live: dict[str, Any], deployed: dict[str, Any]) -> None:
    assert (directory / "report.html").stat().st_size > 10_000
    written = json.loads((directory / "report.json").read_text())
    assert written.items() <= report.items()
    first, last = steps = written["steps"]
    for step in steps:
        assert {"name", "miou", "iou", "params", "bytes", "gmacs", "latency_ms", "engine"} <= step.keys()
    assert (first["name"], last["name"]) == ("fp32", "deployed")
    assert "FP32" in first["engine"]
    assert "openvino" in last["engine"]
    # The figures of a report are those that the commands give.
    assert first["miou"] == pytest.approx(live["score"], abs=1e-6)
    assert last["miou"] == pytest.approx(deployed["score"], abs=1e-6)
    assert abs(last["miou"] - first["miou"]) < 0.05
    assert written["agreement"] >= 0.97
    assert last["bytes"] < first["bytes"] / 2.5  # of so small a model the graph and the golden pairs are a quarter
    assert (directory / "artifact" / "weights.safetensors").stat().st_size < first["bytes"] / 3.5
    assert {layer["executed"] for layer in written["layers"] if layer["activation_bits"] == 8} == {"i8"}


def check_predictions(root: Path, artifact: Path) -> None:
    (image_path,) = (root / "test" / "images").glob("18_5.png")
    mask_path = root / "test" / "masks" / "18_5.png"
    document = run("predict", artifact, image_path, "--truth", mask_path, "--tile", "96", "-o", root / "out")
    (result,) = document["results"]
    mask = read_mask(result["mask"])
    assert mask.shape == (SIDE, SIDE)
    assert result["agreement"] == pytest.approx((mask == read_mask(mask_path)).mean())
    whole = predict(load(artifact), read_image(image_path))
    assert (mask == whole).mean() > 0.8  # tiles see less context, and no more than that
    assert not np.array_equal(mask, np.full_like(mask, mask[0, 0]))
    overlay, difference = (read_image(result[part]) for part in ("overlay", "difference"))
    assert overlay[:SIDE].shape == difference.shape == (SIDE, SIDE, 3) and len(overlay) > SIDE  # a legend is below the overlay
