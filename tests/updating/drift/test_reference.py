"""The calibration of the effect size on drawn features, and the reference as a file of an artefact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from muntin.artifact import open_artifact
from muntin.errors import ArtifactError, DataError
from muntin.tasks.base import Floats, PictureFeature
from muntin.updating.drift.features import feature_list
from muntin.updating.drift.reference import FILE, DriftReference, FeatureMoments, make_reference, read_reference, write_reference

FEATURES = [PictureFeature(name=f"f{number}", more="more", less="less", unit="grey") for number in range(6)]


def draw(count: int, seed: int, *, shift: float = 0.0) -> Floats:
    """Correlated features with heavy tails."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(4, (count, 6)) @ np.array(np.random.default_rng(9).normal(size=(6, 6)))
    values[:, 0] += shift * 4
    return np.asarray(values, np.float64)


@pytest.fixture(scope="module")
def reference() -> DriftReference:
    return make_reference(draw(512, 0), FEATURES)


@pytest.mark.parametrize("size", [8, 20, 32, 256, 2000])
def test_false_alarms(reference: DriftReference, size: int) -> None:
    moments = FeatureMoments.of(reference)
    alarms = sum(moments.effect(draw(size, 100 + seed)) > reference.threshold(size) for seed in range(200))
    assert alarms <= 10  # of 200


def test_detection_grows_with_the_batch(reference: DriftReference) -> None:
    moments = FeatureMoments.of(reference)
    alarms = [
        sum(moments.effect(draw(size, 500 + seed, shift=0.1)) > reference.threshold(size) for seed in range(50)) for size in (8, 32, 128)
    ]
    assert alarms[0] < alarms[1] <= alarms[2] == 50


def test_effect_does_not_grow_with_the_batch(reference: DriftReference) -> None:
    """A p-value would go to zero."""
    moments = FeatureMoments.of(reference)
    effects = [np.mean([moments.effect(draw(size, 900 + seed, shift=1)) for seed in range(20)]) for size in (64, 256, 1024)]
    assert max(effects) < 1.1 * min(effects)
    assert reference.threshold(10**6) == reference.threshold(256) == reference.thresholds[-1]


def test_thresholds_fall_with_the_batch(reference: DriftReference) -> None:
    assert reference.batches == (8, 16, 32, 64, 128, 256)
    assert list(reference.thresholds) == sorted(reference.thresholds, reverse=True)
    assert reference.threshold(32) < reference.threshold(24) < reference.threshold(16)


def test_one_picture_of_a_class_that_never_occurred() -> None:
    features = [
        *FEATURES,
        *(PictureFeature(name=name, more="more", less="less", unit="share", least=2.0) for name in ("class a", "class b")),
    ]
    batch = np.hstack([draw(32, 3), np.tile([1.0, 0.0], (32, 1))])
    reference = make_reference(np.hstack([draw(512, 0), np.tile([1.0, 0.0], (512, 1))]), features)
    moments = FeatureMoments.of(reference)
    before = moments.effect(batch)
    batch[0, 6:] = [0, 1]
    assert before < reference.threshold(32) > moments.effect(batch)
    batch[:12, 6:] = [0, 1]
    assert moments.effect(batch) > reference.threshold(32)


def test_same_pictures_same_reference() -> None:
    assert make_reference(draw(80, 1), FEATURES) == make_reference(draw(80, 1), FEATURES)


def test_too_few_pictures() -> None:
    with pytest.raises(DataError, match="63 pictures: a reference takes at least 64"):
        make_reference(draw(63, 0), FEATURES)


def test_reference_in_an_artifact(write_channels: Callable[..., Path], tmp_path: Path) -> None:
    artifact = open_artifact(write_channels(tmp_path / "a"))
    signature = artifact.manifest.signature
    assert read_reference(artifact, signature) is None
    features = feature_list(signature)
    values = np.random.default_rng(0).random((64, len(features)))
    reference = make_reference(values, features)
    size = artifact.bytes
    write_reference(artifact, reference)
    again = open_artifact(tmp_path / "a")
    assert read_reference(again, signature) == reference
    assert (
        again.digest != artifact.digest and again.bytes > size and again.golden_images()[0][0].shape == artifact.golden_images()[0][0].shape
    )
    write_reference(again, reference)
    assert open_artifact(tmp_path / "a").digest == again.digest

    data = (tmp_path / "a" / FILE).read_bytes()
    (tmp_path / "a" / FILE).write_bytes(data.replace(b"64", b"65", 1))
    with pytest.raises(ArtifactError, match="sha256"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.0]}, "other lengths"),
        ({"features": ["x"]}, "other lengths"),
        ({"batches": [8, 8]}, "lists|increase"),
        ({"format": 2}, "format"),
    ],
)
def test_damaged_reference(write_channels: Callable[..., Path], tmp_path: Path, change: dict[str, object], message: str) -> None:
    from muntin.artifact.store import with_optional_file

    artifact = open_artifact(write_channels(tmp_path / "a"))
    features = feature_list(artifact.manifest.signature)
    values = json.loads(make_reference(np.random.default_rng(0).random((64, len(features))), features).model_dump_json())
    with_optional_file(artifact, FILE, json.dumps(values | change).encode())
    with pytest.raises(ArtifactError, match=message) as error:
        read_reference(open_artifact(tmp_path / "a"), artifact.manifest.signature)
    assert "--reference" in str(error.value)
