"""Batching from an objective and measured times."""

from __future__ import annotations

from pathlib import Path

import pytest

from muntin.errors import DataError
from muntin.serving.triton.batching import batching_for, measured_batching
from muntin.serving.triton.options import TritonOptions
from tensor_models import SIGNATURE, write_tensors


@pytest.mark.parametrize(
    ("objective_ms", "latency_ms", "delay_us", "preferred_rows"),
    [
        (100, {1: 10, 2: 12, 4: 16, 8: 24}, 7000, None),  # the whole batch fits twice: what a row saves by it, 10 - 24 / 8
        (40, {1: 10, 2: 12, 4: 16, 8: 24}, 6000, 4),  # a batch of 8 does not fit twice
        (33, {1: 10, 2: 12, 4: 16, 8: 24}, 1000, 4),  # the objective leaves 33 - 2 * 16
        (15, {1: 10, 2: 12, 4: 16, 8: 24}, 0, 1),  # not even one row fits twice
        (100, {1: 10, 2: 20, 4: 41}, 0, None),  # batches save nothing
        (100, {1: 10}, 0, None),
    ],
)
def test_delay_and_preferred_rows(objective_ms: float, latency_ms: dict[int, float], delay_us: int, preferred_rows: int | None) -> None:
    batching = batching_for(objective_ms, latency_ms)
    assert (batching.delay_us, batching.preferred_rows) == (delay_us, preferred_rows)


def test_measured_sizes_of_batches(tmp_path: Path) -> None:
    artifact = write_tensors(tmp_path / "named")
    batching = measured_batching(artifact, TritonOptions(name="m", max_batch=6, threads=1, objective_ms=1000))
    assert list(batching.latency_ms) == [1, 2, 4]
    assert all(ms > 0 for ms in batching.latency_ms.values())


def test_objective_without_rows_or_size(tmp_path: Path) -> None:
    options = TritonOptions(name="m", threads=1, objective_ms=10)
    alone = SIGNATURE.model_copy(update={"batch": None})
    with pytest.raises(DataError, match="no rows that could be joined"):
        measured_batching(write_tensors(tmp_path / "alone", signature=alone), options)
    with pytest.raises(DataError, match="give one by --sizes, or of named tensors by --dims"):
        measured_batching(write_tensors(tmp_path / "sizeless", example=None), options)
