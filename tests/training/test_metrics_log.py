"""The log of a run and of a resumed run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from muntin.training.metrics_log import MetricsLog


def point(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 100}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is always full")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsLog(tmp_path, 0, [], []) as log:
        for step in (10, 20):
            log.write("training", point(step))
    place = tmp_path / "metrics.jsonl"
    assert log.failed == f"{place} cannot be written (No space left on device): the curve is only in checkpoints"


def test_resumed_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0, [], []) as log:
        for step in (10, 20, 30):  # 30 is after the checkpoint
            log.write("training", point(step))
    time.sleep(1.1)  # TensorBoard orders files by the second of their creation
    with MetricsLog(tmp_path, 20, [point(10), point(20)], []) as log:
        log.write("training", point(40))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [line["step"] for line in lines] == [event.step for event in board.Scalars("training/loss")] == [10, 20, 40]
