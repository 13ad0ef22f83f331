"""Budget: the accuracy that a compressed model may lose, and the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from muntin.errors import MuntinError

Objective = Literal["size", "latency"]
"""Quantity to make least: bytes of the artefact, or milliseconds of a call of one row in the engine."""


ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An accuracy budget.

    `max_drop`: most that the metric of the deployed artefact may lose against the FP32 model's, in the metric's own units; 0 or more.
    `objective`: what is made least within it. `confidence`: from 0.5 to below 1; the drop is within `max_drop` with this certainty on data
    like those of `evaluate`, if it returns samples (a one-sided bound, `scores.drop_bound`); None: the measured drop counts as it is.
    Raises `MuntinError` for other values.
    """

    max_drop: float
    objective: Objective = "size"
    confidence: float | None = 0.95

    def __post_init__(self) -> None:
        if isinstance(self.max_drop, bool) or not isinstance(self.max_drop, int | float) or not 0 <= self.max_drop < math.inf:
            raise MuntinError(f"max_drop={self.max_drop!r}: give a number from 0, in the units of what evaluate returns")
        if self.objective not in get_args(Objective):
            raise MuntinError(f"objective={self.objective!r}: give one of {', '.join(get_args(Objective))}")
        confidence = self.confidence
        if confidence is not None and (not isinstance(confidence, int | float) or not 0.5 <= confidence < 1):
            raise MuntinError(f"confidence={confidence!r}: give a number from 0.5 to below 1, such as 0.95, or None")

    def keeps(self, drop: float) -> bool:
        """Return True for a drop within the budget, up to the rounding of a difference of two scores."""
        return drop <= self.max_drop + ROUNDING
