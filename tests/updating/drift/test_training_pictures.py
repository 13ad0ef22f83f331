"""The training pictures of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from muntin.artifact import ClassInfo, Signature
from muntin.compression import load_model
from muntin.errors import DataError
from muntin.models.session import TorchSession
from muntin.training import fit, read_checkpoint
from muntin.updating.drift.features import feature_list
from muntin.updating.drift.training_pictures import _draws, check_origin, describe_training


def test_windows_of_a_run(write_tiny: Callable[..., Any], tmp_path: Any) -> None:
    tiny = write_tiny(tmp_path / "data")
    fit(tiny.recipe, directory=tmp_path / "run")
    checkpoint = read_checkpoint(tmp_path / "run")
    session = TorchSession(load_model(checkpoint), checkpoint.signature)
    done: list[tuple[float, float]] = []
    features, pictures = describe_training(session, checkpoint, most=12, progress=lambda at, total: done.append((at, total)))
    rows = min(12, pictures)  # each is smaller than a window
    assert features.shape == (rows, len(feature_list(checkpoint.signature))) and done[-1] == (rows, rows)
    assert np.array_equal(features, describe_training(session, checkpoint, most=12)[0])
    check_origin(checkpoint.signature, checkpoint)
    other = checkpoint.signature.model_copy(update={"classes": (ClassInfo(name="x", color=(0, 0, 0)),)})
    with pytest.raises(DataError, match="a run of another model"):
        check_origin(other, checkpoint)


def test_draws_of_many_and_of_few_pictures() -> None:
    signature = Signature(task="segment", channels=3, classes=(ClassInfo(name="x", color=(0, 0, 0)),))
    generator = np.random.default_rng(0)
    many = [index for index, _ in _draws([(10, 10)] * 100, signature, 30, generator)]
    assert len(set(many)) == 30 and many == sorted(many)
    few = [index for index, _ in _draws([(256, 256), (257, 256), (2560, 2560)], signature, 300, generator)]
    assert len(few) == 300 and few.count(0) < 10 and 0 < few.count(1) < 20  # 1, 8 and 400 windows
    small = [index for index, _ in _draws([(10, 10)] * 20, signature, 300, generator)]
    assert small == list(range(20))  # no picture twice
    classifier = Signature(task="classify", channels=3, classes=signature.classes)
    assert [index for index, _ in _draws([(10, 10)] * 5, classifier, 30, generator)] == [0, 1, 2, 3, 4]
