"""The curve of a run: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard events; a resumed run first rewrites the points up to its checkpoint."""

    def __init__(self, directory: Path, step: int, training: list[dict[str, float]], validation: list[dict[str, Any]]) -> None:
        self.directory = directory
        self.failed = ""
        """Error of the first point that could not be written."""
        self._begin = step, training, validation

    def __enter__(self) -> MetricsLog:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._open(*self._begin)
        return self

    def __exit__(self, *details: object) -> None:
        for file in (self.file, self.board):
            with suppress(OSError):  # `failed` has the error, and checkpoints have all points
                file.close()

    def go_back(self, step: int, training: list[dict[str, float]], validation: list[dict[str, Any]]) -> None:
        """Drop the points after a step. The points up to it are given."""
        self.__exit__()
        self._open(step, training, validation)

    def _open(self, step: int, training: list[dict[str, float]], validation: list[dict[str, Any]]) -> None:
        """Begin the files anew with the past points."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        self.file = (self.directory / "metrics.jsonl").open("w", encoding="utf-8")
        self.board = SummaryWriter(self.directory / "tensorboard", purge_step=step + 1 if step else 0)
        past = [("training", point) for point in training] + [("validation", point) for point in validation]
        for kind, point in sorted(past, key=lambda entry: float(entry[1]["step"])):
            self._line(kind, point)

    def _line(self, kind: str, point: dict[str, Any]) -> None:
        self.file.write(json.dumps({"kind": kind, **point, "step": int(point["step"])}) + "\n")
        self.file.flush()

    def write(self, kind: str, point: dict[str, Any]) -> None:
        """Add one point. After an error (full disk) training continues: checkpoints have all points."""
        try:
            self._line(kind, point)
            for key, value in point.items():
                if key != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{key}", value, int(point["step"]))
        except OSError as error:
            if not self.failed:
                self.failed = f"{self.file.name} cannot be written ({error.strerror or error}): the curve is only in checkpoints"


class NoLog(MetricsLog):
    """The log of a process that is not the first."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def go_back(self, step: int, training: list[dict[str, float]], validation: list[dict[str, Any]]) -> None:
        """Does nothing."""

    def write(self, kind: str, point: dict[str, Any]) -> None:
        """Writes nothing."""
