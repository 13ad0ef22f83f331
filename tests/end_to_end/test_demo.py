"""`muntin demo` on the whole photograph, with a model so small that it says nothing and takes no time."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from muntin.cli import app
from muntin.data import EarthSource
from muntin.images import read_image, read_mask
from muntin.training import FitProgress, FitResult, fit

CHANGES = (
    "training.steps=30",  # the labels of a model that has learned nothing are ties, which no two engines break alike
    "training.batch_size=2",
    "model.name=product_model:make_coarse",  # PyTorch takes ten times as long to trace a hybrid
    "model.options={}",
    "quantization.calibration_images=4",
    "compression.trials=1",
    "compression.max_drop=1",
    "compression.steps=4",
)


@pytest.mark.slow
def test_demo_and_its_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["demo", "-o", str(tmp_path / "demo"), *(word for change in CHANGES for word in ("--set", change)), "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("muntin.training.fit", interrupted_at_its_end)
        stopped = CliRunner().invoke(app, words, catch_exceptions=False)
    assert (stopped.exit_code, stopped.stdout) == (1, "")
    assert stopped.stderr.endswith("\nmuntin: interrupted after step 30 of 30; the same command goes on\n")
    assert not (tmp_path / "demo" / "compressed").exists()

    first = CliRunner().invoke(app, words, catch_exceptions=False)
    assert (first.exit_code, first.stderr) == (0, "")
    document = json.loads(first.stdout)
    assert [step["name"] for step in document["steps"]][::2] in (["fp32"], ["fp32", "deployed"])
    assert document["search"]["points"]
    assert {entry["name"] for entry in document["classes"]} == {"ocean", "moist land", "steppe", "desert", "tundra", "ice"}
    directory = tmp_path / "demo"
    for name in ("report.html", "report.json", "compressed/front.html", "mask.png", "difference.png"):
        assert (directory / name).is_file()
    check_overlay(directory)

    first_step, deployed = document["steps"][0], document["steps"][-1]
    assert "FP32" in first_step["engine"] and "openvino" in deployed["engine"]
    assert abs(deployed["miou"] - first_step["miou"]) < 0.1 and document["agreement"] >= 0.97
    assert deployed["weights"] < first_step["weights"] / 3
    assert {layer["executed"] for layer in document["layers"] if layer["activation_bits"] == 8} == {"i8"}

    kept = {
        path: path.stat().st_mtime_ns
        for part in ("checkpoints", "compressed")
        for path in (directory / part).rglob("*")
        if "front" not in path.name
    }
    monkeypatch.setattr("muntin.deployment.comparison.compare", reached)
    with pytest.raises(ReachedError):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # neither trained nor compressed a second time


class ReachedError(Exception):
    """The second run begins its report: what a report repeats is tested with `muntin report`."""


def reached(*arguments: Any, **named: Any) -> None:
    raise ReachedError


def interrupted_at_its_end(*arguments: Any, **named: Any) -> FitResult:
    """`fit`, with a real Ctrl-C in the validation after its last step: nothing is left of training that could end for it."""

    def report(progress: FitProgress) -> None:
        if progress.kind == "validation" and progress.step == progress.steps:
            os.kill(os.getpid(), signal.SIGINT)

    return fit(*arguments, **(named | {"progress": report}))


def check_overlay(directory: Path) -> None:
    source = EarthSource("cover")
    image_HWC, labels_HW = source.picture()
    assert read_mask(directory / "mask.png").shape == labels_HW.shape
    shown = read_image(directory / "overlay.png")
    assert shown.shape == image_HWC.shape
    for start, end, split in source.borders():
        if split == "left out":
            assert np.array_equal(np.unique(shown[:, start:end]), [20])  # a dark bar between what was trained on and what was not
