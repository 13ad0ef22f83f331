"""`muntin drift`: exit codes, one JSON document, the report, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.images import write_image

MODEL = """
from torch import nn

def make(*, task, classes, channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 3, padding=1))
"""


def pictures(folder: Path, count: int, seed: int, *, gain: float = 1.0, channels: int = 3) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(count):
        patches = generator.normal(110, 30, (4, 4, channels)).repeat(6, 0).repeat(6, 1) + generator.normal(0, 5, (24, 24, channels))
        write_image(folder / f"{number:03d}.png", np.clip(gain * patches, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def known(write_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with the reference of a folder."""
    from muntin.artifact import open_artifact
    from muntin.runtime import load
    from muntin.updating.drift.comparison import describe_files, pictures_in
    from muntin.updating.drift.features import feature_list
    from muntin.updating.drift.reference import make_reference, write_reference

    root = tmp_path_factory.mktemp("drift")
    artifact = open_artifact(write_small(root / "artifact"))
    session = load(artifact.path, threads=1)
    features, _, _ = describe_files(session, pictures_in(pictures(root / "train", 96, 0))[0])
    write_reference(artifact, make_reference(features, feature_list(session.signature)))
    return artifact.path


def test_no_drift(call: Callable[..., Any], known: Path, tmp_path: Path) -> None:
    document = call("drift", known, pictures(tmp_path / "new", 32, 1), "--threads", 1, "--json").document()
    assert document["drift"] is False and document["effect"] <= document["threshold"] and document["pictures"] == 32
    assert len(document["farthest"]) == 8 and not document["skipped"]
    answer = call("drift", known, tmp_path / "new", "--threads", 1)
    assert answer.code == 0 and answer.out.startswith("no drift  ") and "as by chance" in answer.out


def test_drift_with_a_report(call: Callable[..., Any], known: Path, tmp_path: Path) -> None:
    folder, report = pictures(tmp_path / "new", 32, 2, gain=0.6), tmp_path / "out" / "week.html"
    answer = call("drift", known, folder, "--threads", 1, "--report", report, "--json")
    assert answer.code == 1 and json.loads(answer.out)["drift"] is True
    assert answer.err.startswith(f"muntin: {folder}: drift: ") and "darker" in answer.err and answer.err.count("\n") == 1
    page = report.read_text()
    assert page.count("data:image/") >= 9 and "darker" in page and "<script" not in page
    values = json.loads((tmp_path / "out" / "week.json").read_text())
    assert values["drifted"] is True and len(values["farthest"]) == 8 and "uri" not in values["farthest"][0]


def test_newest_pictures_only(call: Callable[..., Any], known: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "new", 12, 3)
    assert call("drift", known, folder, "--newest", 9, "--threads", 1, "--json").document()["pictures"] == 9


def test_masks_are_left_out(call: Callable[..., Any], known: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "images", 32, 1)
    pictures(tmp_path / "masks", 32, 2, gain=0.02)
    document = call("drift", known, tmp_path, "--threads", 1, "--json").document()
    assert document["pictures"] == 32 and document["notes"] == [f"{tmp_path}: read images/; left out masks/"]


def test_reference_of_a_folder(call: Callable[..., Any], write_small: Callable[..., Path], tmp_path: Path) -> None:
    artifact, train = write_small(tmp_path / "artifact", task="classify", side=24), pictures(tmp_path / "train", 64, 0)
    assert f"--reference {'RUN'}" in call("drift", artifact, train).mistake()
    document = call("drift", artifact, "--reference", train, "--threads", 1, "--json").document()
    assert document["windows"] == 64 and not document["notes"] and list(document["thresholds"]) == ["8", "16", "32"]
    assert call("verify", artifact).code == 0
    assert call("drift", artifact, train, "--threads", 1).code == 0


def test_reference_is_spread_over_a_folder(
    call: Callable[..., Any], write_small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of the pictures is dark: of the first ones alone, the reference would have no deviation."""
    from muntin.artifact import open_artifact
    from muntin.updating.drift.reference import read_reference

    monkeypatch.setattr("muntin.updating.drift.reference.REFERENCE_PICTURES", 64)
    artifact, train = write_small(tmp_path / "artifact", task="classify", side=24), pictures(tmp_path / "train", 64, 0)
    for number in range(63):
        write_image(train / f"z{number:03d}.png", np.zeros((24, 24, 3), np.uint8))
    assert call("drift", artifact, "--reference", train, "--threads", 1, "--json").document()["windows"] == 64
    opened = open_artifact(artifact)
    reference = read_reference(opened, opened.manifest.signature)
    assert reference is not None and 0.15 < reference.mean[0] < 0.3  # 110/255 of half of the pictures


@pytest.mark.usefixtures("fixed_sizes")
def test_reference_of_a_run(
    call: Callable[..., Any], write_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artefact is still that of the run's weights, so that an export has nothing to do."""
    (tmp_path / "one_convolution.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    tiny = write_tiny(tmp_path / "data", model={"name": "one_convolution:make", "options": {}})
    for kind in ("images", "masks"):
        for number in range(60):
            shutil.copyfile(tiny.root / "train" / kind / "train-0.png", tiny.root / "train" / kind / f"more-{number}.png")
    run, artifact = tmp_path / "run", tmp_path / "run" / "artifact"
    assert call("fit", tiny.recipe, "--output", run, "--json").code == 0
    assert call("export", run, "--json").code == 0
    assert call("drift", artifact, tiny.root / "train" / "images", "--threads", 1).code == 0
    answer = call("drift", artifact, "--reference", run, "--threads", 1)
    assert answer.code == 0 and "the reference, 64 windows" in answer.out
    assert json.loads(call("export", run, "--json").out)["written"] is False
    for kind in ("images", "masks"):
        for number in range(4):
            (tiny.root / "train" / kind / f"more-{number}.png").unlink()
    few = call("export", run, "--output", tmp_path / "few")
    assert "no drift reference: the training images give" in few.out and not (tmp_path / "few" / "drift.json").exists()


@pytest.mark.parametrize("words", [(), ("new", "--report", "page.txt"), ("--report", "page.html", "--reference", "run")])
def test_usage(call: Callable[..., Any], known: Path, words: tuple[str, ...]) -> None:
    assert call("drift", known, *words).code == 2


def test_mistakes(call: Callable[..., Any], known: Path, tmp_path: Path) -> None:
    assert "does not exist" in call("drift", known, "--reference", tmp_path / "none").mistake()
    few = pictures(tmp_path / "few", 5, 0)
    assert "at least 8" in call("drift", known, few, "--threads", 1).mistake()
    assert "a reference takes at least 64" in call("drift", known, "--reference", few, "--threads", 1).mistake()
    (few / "x.png").write_bytes(b"x")
    assert "1 of 6 pictures cannot be read" in call("drift", known, "--reference", few, "--threads", 1).mistake()
    assert "named tensors" not in call("drift", tmp_path / "none", few).mistake()
