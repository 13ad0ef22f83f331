from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import muntin
from muntin.artifact import open_artifact
from muntin.deployment.sources.source_export import SourceOptions, export_source
from muntin.errors import MuntinError

SMALL = """
import torch
from torch import nn

class Normalised(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def small():
    torch.manual_seed(0)
    return Normalised(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
"""


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_pictures: Callable[..., Path]) -> Path:
    (tmp_path / "small_source.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return write_pictures(tmp_path / "photos", 4)


def test_export_and_prediction(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\nhorse\n\n")
    options = SourceOptions(calibration=pictures, size="32", classes="names.txt", overrides=["quantization.keep=['0']"])
    artifact, notes = export_source("small_source:small", tmp_path / "artifact", options, integer=True, sizes="fixed")
    manifest = artifact.manifest
    assert (manifest.measured["source"], manifest.signature.side) == ("small_source:small", 32)
    assert [entry.name for entry in manifest.signature.classes] == ["cat", "dog", "horse"]
    assert {layer.name: layer.activation_bits for layer in manifest.layers} == {"0": None, "2": 8, "5": 8}
    assert any("4 used" in note for note in notes)
    picture = np.asarray(Image.open(pictures / "001.png"))
    scores = muntin.predict(muntin.load(tmp_path / "artifact"), picture)
    expected = muntin.open_model("small_source:small", size=32)
    (pixels,) = expected.pictures(pictures)
    with torch.no_grad():
        assert np.abs(scores - expected.model(pixels[1:2]).numpy()).max() < 0.05
    assert muntin.verify(tmp_path / "artifact").passed


def test_export_of_a_name(tmp_path: Path, pictures: Path) -> None:
    artifact = muntin.export("small_source:small", path=tmp_path / "artifact", calibration=pictures, classes=["cat", "dog", "horse"])
    assert (artifact.manifest.measured["source"], artifact.manifest.integers) == ("small_source:small", True)
    assert [entry.name for entry in artifact.picture.classes] == ["cat", "dog", "horse"]
    assert muntin.verify(artifact.path).passed
    opened = muntin.open_model("small_source:small", size=32)
    floats = muntin.export(opened, opened.pictures(pictures)[0], tmp_path / "floats")
    assert (floats.manifest.integers, floats.manifest.shape) == (False, (1, 32, 32))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("small_source:small", {}, "example is missing"),
        ("small_source:small", {"calibration": "none"}, "calibration none: does not exist"),
        (torch.nn.Identity(), {"calibration": "photos"}, "calibration 'photos': a folder is for a model of open_model"),
        ("small.onnx", {"classes": ["a", "b"]}, "classes: of PyTorch models, and this is an ONNX file"),
        ("small.onnx", {"example": np.zeros(1)}, "small.onnx cannot be read"),
        ("nothing", {}, "'nothing' is no source of a model"),
    ],
)
def test_arguments_that_do_not_fit_the_model(tmp_path: Path, pictures: Path, model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MuntinError, match=re.escape(message)):
        muntin.export(model, path=tmp_path / "artifact", **options)
    assert not (tmp_path / "artifact").exists()


def test_floats_without_pictures(tmp_path: Path, pictures: Path) -> None:
    options = SourceOptions(size="24x32")
    artifact, notes = export_source("small_source:small", tmp_path / "artifact", options, integer=False, sizes=None)
    assert (artifact.manifest.integers, artifact.manifest.shape) == (False, (1, 24, 32))
    recorded = open_artifact(tmp_path / "artifact").manifest.measured["source_notes"]
    assert any("generated pictures" in note for note in recorded)
    assert recorded == list(notes[: len(recorded)])


@pytest.mark.parametrize(
    ("options", "integer", "message"),
    [
        ({}, True, "give some pictures by --calibration FOLDER"),
        ({"calibration": "none"}, True, "calibration none: does not exist"),
        ({"size": "32,32"}, False, "--size 32,32: give a side in pixels, or HEIGHTxWIDTH"),
        ({"mean": "0.5 0.5", "std": "1"}, False, "--mean 0.5 0.5: give a number for each channel, with commas"),
        ({"classes": "names"}, False, "--classes names: there is no such file; give a file with a name on each line"),
        ({"classes": "gap"}, False, "--classes gap: line 2 is empty"),
        (
            {"overrides": ["quantization.kep=1"], "calibration": "photos"},
            True,
            "quantization.kep: Extra inputs are not permitted; keys are",
        ),
        ({"overrides": ["data.crop=1"], "calibration": "photos"}, True, "only quantization.KEY=VALUE can be set here"),
        ({"overrides": ["quantization.keep=[]"]}, False, "--set says how to quantise, and --float that nothing is"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], integer: bool, message: str, tmp_path: Path, pictures: Path) -> None:
    Path("gap").write_text("a\n\nb\n")
    values = {key: Path(value) if key == "calibration" else value for key, value in options.items()}
    with pytest.raises(MuntinError, match=re.escape(message)):
        export_source("small_source:small", tmp_path / "artifact", SourceOptions(**values), integer=integer, sizes=None)
    assert not (tmp_path / "artifact").exists()
