"""What a run logs while it trains: `metrics.jsonl`, a line a point, and TensorBoard events."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any


def _after_earlier_events(directory: Path) -> None:
    """Wait, less than two seconds, until an event file that is opened now is read after those that lie in `directory`.

    TensorBoard reads event files in the order of their names. These begin with the second that a file was opened in. Within one second, the
    process's id and a counter decide, as text ("10" before "9"); what a resumed run logged would be read as older than what it replaces.
    """
    seconds = [name[3] for place in directory.glob("events.out.tfevents.*") if len(name := place.name.split(".")) > 3]
    wait = max((int(second) for second in seconds if second.isdecimal()), default=-1) + 1 - time.time()
    if 0 < wait < 2:  # a clock that was set back further than this is not waited for
        time.sleep(wait)


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events. A resumed run rewrites what was logged up to its checkpoint and goes on from there."""

    def __init__(self, directory: Path, step: int, training: list[dict[str, float]], validation: list[dict[str, Any]]) -> None:
        self.directory, self.step = directory, step
        self.failed = ""
        """Why a point could not be written, if one could not."""
        self.past = [("training", p) for p in training] + [("validation", p) for p in validation]

    def __enter__(self) -> MetricsLog:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own imports warn about what is not ours to mend
            from torch.utils.tensorboard import SummaryWriter
        self.directory.mkdir(parents=True, exist_ok=True)
        self.file = (self.directory / "metrics.jsonl").open("w", encoding="utf-8")
        _after_earlier_events(self.directory / "tensorboard")
        self.board = SummaryWriter(self.directory / "tensorboard", purge_step=self.step + 1 if self.step else 0)
        for kind, point in sorted(self.past, key=lambda entry: float(entry[1]["step"])):
            self._line(kind, point)
        return self

    def __exit__(self, *details: object) -> None:
        for closing in (self.file, self.board):
            with suppress(OSError):  # what could not be written was told, and the checkpoint has it all
                closing.close()

    def _line(self, kind: str, point: dict[str, Any]) -> None:
        self.file.write(json.dumps({"kind": kind, **point}) + "\n")
        self.file.flush()

    def write(self, kind: str, point: dict[str, Any]) -> None:
        """Add one point. Where there is no room, training goes on without: a checkpoint has all points, and a run that goes on writes them
        anew."""
        try:
            self._line(kind, point)
            for key, value in point.items():
                if key != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{key}", value, int(point["step"]))
        except OSError as error:
            if not self.failed:
                self.failed = (
                    f"{self.file.name} cannot be written ({error.strerror or error}): points of the curve are in checkpoints alone"
                )
