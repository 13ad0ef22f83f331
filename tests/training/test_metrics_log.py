"""What a run logs: a run that goes on rewrites what it had logged, and loses none of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muntin.training.metrics_log import MetricsLog


def point(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 100}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is always full")
def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsLog(tmp_path, 0, [], []) as log:
        for step in (10, 20):
            log.write("training", point(step))
    place = tmp_path / "metrics.jsonl"
    assert log.failed == f"{place} cannot be written (No space left on device): points of the curve are in checkpoints alone"


def test_the_points_of_the_step_that_a_log_goes_on_from_stay_and_later_ones_go(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0, [], []) as log:
        for step in (10, 20, 30):  # the last after the checkpoint that is gone on from
            log.write("training", point(step))
    with MetricsLog(tmp_path, 20, [point(10), point(20)], []) as log:
        log.write("training", point(40))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [line["step"] for line in lines] == [event.step for event in board.Scalars("training/loss")] == [10, 20, 40]


def test_what_goes_on_within_the_same_second_is_read_last_whatever_the_files_are_called(tmp_path: Path) -> None:
    """TensorBoard reads files in the order of their names: the second, the host, the process and a counter, all as text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0, [], []) as log:
        for step in (10, 20, 30):
            log.write("training", point(step))
    (file,) = (tmp_path / "tensorboard").iterdir()
    second = file.name.split(".")[3]
    file.rename(file.with_name(f"events.out.tfevents.{second}.~"))  # after every other of this second
    with MetricsLog(tmp_path, 20, [point(10), point(20)], []) as log:
        log.write("training", point(40))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("training/loss")] == [10, 20, 40]
