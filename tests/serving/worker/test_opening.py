"""Opening artefacts: golden pair, warm-up, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from image_session import compiled_forms
from muntin.artifact import Sizes, open_artifact
from muntin.artifact.store import read_manifest
from muntin.errors import ArtifactError, DataError, VerificationError
from muntin.runtime.options import SessionOptions
from muntin.serving.worker.calls import batch_sizes, starting_calls
from muntin.serving.worker.opening import open_version
from serving_parts import image_call

SCORES, LABELS = image_call((2, 8, 8)), image_call((1, 4, 8), labels=True)


def test_warm_up(write_version: Any, tmp_path: Path) -> None:
    path = write_version(tmp_path / "1", 2)
    opened = open_version(path, SessionOptions(threads=1), [SCORES, LABELS, SCORES])
    assert opened.calls == (SCORES, LABELS)
    assert opened.digest == open_artifact(path).digest
    golden = ((1, 6, 8), False)
    assert compiled_forms(opened.session) == {golden, ((2, 8, 8), False), ((1, 4, 8), True)}
    assert (opened.session.labels(np.zeros((1, 4, 8, 3), np.uint8)) == 2).all()


def test_warm_up_of_dynamic_sizes(write_version: Any, tmp_path: Path) -> None:
    session = open_version(write_version(tmp_path / "1"), SessionOptions(threads=1, dynamic=True), [SCORES]).session
    assert compiled_forms(session) == {(None, False), (None, True), ((2, 8, 8), False)}


def test_warm_up_of_one_size(write_version: Any, signature_of: Any, tmp_path: Path) -> None:
    """No model of dynamic sizes: other batches are computed in those that are compiled."""
    path = write_version(tmp_path / "1", 2, signature=signature_of(sizes=Sizes.only(6, 8)), example=(1, 6, 8))
    calls = starting_calls(read_manifest(path), 2)
    session = open_version(path, SessionOptions(threads=1, dynamic=True), calls, verify=True).session
    variants = {((1, 6, 8), False), ((1, 6, 8), True), ((2, 6, 8), True)}
    assert compiled_forms(session) == variants
    images = np.zeros((5, 6, 8, 3), np.uint8)
    assert (session.labels(images) == 2).all() and (session(images).argmax(1) == 2).all()
    assert compiled_forms(session) == variants
    with pytest.raises(DataError, match="--sizes 8x8: the model takes 6 x 8: give 6x8, or leave it out"):
        starting_calls(read_manifest(path), 2, [(6, 8), (8, 8)])


def test_wrong_golden_pair(write_version: Any, tmp_path: Path) -> None:
    path = write_version(tmp_path / "1", shift=30)
    with pytest.raises(VerificationError, match=r"1: openvino in \w+ differs from its reference: scores .* \(allowed: 0.05"):
        open_version(path, SessionOptions(), [])
    (path / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        open_version(path, SessionOptions(), [])


def test_hurry(write_version: Any, tmp_path: Path) -> None:
    """The smallest call for labels is compiled at once, the others later."""
    calls = [LABELS, image_call((2, 4, 8), labels=True), image_call((1, 4, 8))]
    opened = open_version(write_version(tmp_path / "1"), SessionOptions(threads=1), calls, hurry=True)
    variants = [(tuple(size for _, size in call.dims), call.outputs == ("labels",)) for call in calls]
    assert compiled_forms(opened.session).intersection(variants) == {variants[0]}
    opened.compile_rest()
    assert compiled_forms(opened.session) >= {*variants}


@pytest.mark.parametrize(
    ("most", "side", "sizes"),
    [
        (16, 64, [*range(1, 17)]),
        (64, 64, [*range(1, 17), 32, 64]),
        (8, 512, [1, 2, 3, 4, 8]),
        (6, 4096, [1, 2, 4]),
        (1, 1, [1]),
    ],
)
def test_batch_sizes(most: int, side: int, sizes: list[int]) -> None:
    assert batch_sizes(most, side * side) == sizes
