"""The values of a front's page, which are also its file `front.json`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from muntin.reporting.records import Amount, Count, Hardware, IsoTime, Record, Text, check_unique

FORMAT: Literal[1] = 1


class FrontPoint(Record):
    """The reference (number 0) or a trial; `number` is the place among the points.

    `artifact`: its folder, relative to the page's. `kept`: True if its measured drop is within the budget. `bound`: the upper confidence
    bound of the drop, and `verdict`: with it; None and empty where nothing was judged.
    """

    number: Count
    name: Text
    width: Amount
    score: float
    drop: float
    bound: float | None = None
    bytes: Count
    ms: Amount
    kept: bool
    verdict: Literal["", "kept", "uncertain", "broken"] = ""
    artifact: Text


class FrontRecord(Record):
    """A search.

    `chosen`: the number of a point, None if nothing was tried. `held_out`: the figures to report, in words. `weights`: of the checkpoint
    that was compressed (`CheckpointState.weights`); empty in pages of muntin 0.1.
    """

    format: Literal[1] = FORMAT
    muntin: Text
    created: IsoTime
    title: Text
    weights: str = ""
    metric: Text
    objective: Literal["size", "latency", "memory"]
    max_drop: Amount
    chosen: int | None
    held_out: str = ""
    legend: Text = "dashed: the least score of the budget; blue: kept, hollow: kept without certainty, red: broken; ring: chosen"
    """Words below the picture: what the dashed line and the colours say."""
    notes: tuple[str, ...] = ()
    hardware: Hardware
    points: tuple[FrontPoint, ...]

    @model_validator(mode="after")
    def _sound(self) -> Self:
        check_unique("points", [point.name for point in self.points])
        numbers = [point.number for point in self.points]
        if 0 not in numbers or (self.chosen is not None and self.chosen not in numbers):
            raise ValueError("points holds the reference, number 0, and the chosen trial")
        return self

    @property
    def reference(self) -> FrontPoint:
        """The FP32 model."""
        return next(point for point in self.points if point.number == 0)

    @property
    def least_score(self) -> float:
        """The score below which the budget is broken."""
        return self.reference.score - self.max_drop
