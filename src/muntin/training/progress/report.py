"""Progress of a run, as its caller is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Progress of a run. Notes (`FitResult.notes`) are reported before the first step.

    `kind`: "check" (of pictures), "note", "prepare" (`note`: a part of an update), "step"
    (each one; `loss` is a mean over at most 10, `waiting` share of time spent waiting for batches), "validating" (`step` of `steps`
    pictures), "validation" (end). `share`: of the run that is done, for a run with a limit in time; `steps` is then an estimate.
    """

    kind: Literal["check", "note", "prepare", "step", "validating", "validation"]
    step: int
    steps: int
    loss: float | None = None
    score: float | None = None
    images_per_second: float | None = None
    waiting: float | None = None
    seconds_left: float | None = None
    note: str | None = None
    share: float | None = None

    @property
    def position(self) -> str:
        """The step in words: of all steps, or with the share of a run with a limit in time."""
        return f"step {self.step} of {self.steps}" if self.share is None else f"step {self.step}, {self.share:.0%} done"


FitReport = Callable[[FitProgress], None]
