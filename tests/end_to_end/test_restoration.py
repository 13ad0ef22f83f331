"""From photographs in a folder to a verified INT8 artefact, its report and a restored picture, by the commands that a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from muntin.cli import app
from muntin.data import EarthSource
from muntin.images import read_image, write_image
from muntin.tasks.restore.degradation import reduced
from muntin.tasks.restore.scores import psnr

MODEL = {"stem": [16, 48, 48], "pairs": [1, 0], "dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 48}
PLACES = ((300, 900), (520, 1300), (700, 1700), (400, 200), (600, 1900), (350, 1500), (800, 1100))


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with photographs, and a recipe of `muntin init` for them that is made small."""
    picture = EarthSource("cover").picture()[0]
    (tmp_path / "photos").mkdir()
    for top, left in PLACES:
        write_image(tmp_path / "photos" / f"p{top}.png", np.ascontiguousarray(picture[top : top + 96, left : left + 128]))
    recipe = Path(run("init", tmp_path, "--task", "restore", "-o", tmp_path / "written.yaml")["recipe"])
    content = yaml.safe_load(recipe.read_text())
    content["data"] |= {"crop": 32, "images": "photos"}
    content |= {"name": "small", "model": {"name": "hybrid-xs", "options": MODEL}, "quantization": {"calibration_images": 4}}
    content["training"] |= {"steps": 40, "batch_size": 8, "validate_every": 40, "precision": "fp32", "average": 0.95}
    content["compression"] = {"trials": 1, "steps": 4, "widths": [1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.mark.slow
def test_photographs_to_a_verified_artefact(root: Path) -> None:
    """Noise and double size at once."""
    validation = run("fit", root / "recipe.yaml", "-o", root / "run", "--set", "data.degrade={noise: 15, scale: 2}")["validation"]
    assert validation[-1]["score"] > validation[-1]["input_psnr"] + 0.1
    run("export", root / "run", "-o", root / "run" / "artifact", "--sizes", "fixed")
    floats, integers = run("evaluate", root / "run"), run("evaluate", root / "run" / "artifact")
    assert integers["psnr"] > floats["psnr"] - 0.1  # the residual sum keeps its precision
    assert floats["input_psnr"] == integers["input_psnr"] < integers["psnr"]
    picture = next(iter((root / "photos").glob("*.png")))
    clean = read_image(picture, 3)
    write_image(root / "small.png", reduced(clean, 2))
    run("predict", root / "run" / "artifact", root / "small.png", "-o", root / "out")
    restored = read_image(root / "out" / "small.restored.png", 3)
    assert restored.shape == clean.shape
    assert psnr(restored, clean) > 20


@pytest.mark.soak
def test_budget_in_decibels(root: Path) -> None:
    run("fit", root / "recipe.yaml", "-o", root / "run", "--set", "data.degrade={noise: 15, scale: 2}")
    run("export", root / "run", "-o", root / "run" / "artifact")
    integers = run("evaluate", root / "run" / "artifact")
    chosen = run("compress", root / "run", "--max-drop", "1", "--confidence", "0.5")
    assert chosen["kept"] and run("evaluate", chosen["artifact"])["psnr"] > integers["psnr"] - 1
