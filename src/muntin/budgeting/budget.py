"""Budget: the accuracy that a compressed model may lose, and the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from muntin.errors import MuntinError

Objective = Literal["size", "latency"]
"""Quantity to minimise: bytes of the artifact, or milliseconds of a call of one row in the engine."""
TrialVerdict = Literal["kept", "uncertain", "broken", "failed"]
"""Judgement of a trial: within the budget with certainty; within it on the samples, not certain on others; outside; not measured."""


ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An accuracy budget.

    `max_drop`: maximum loss of the metric of the deployed artifact against the FP32 model, in the metric's own units, from 0.
    `objective`: quantity to minimise within it. `confidence`: certainty of the verdict "kept", from 0.5 to below 1: the upper bound of the
    drop (`scores.drop_bound`) on data like those of `evaluate` is within `max_drop`, too. None: no bound is computed.
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

    def judge(self, drop: float, bound: float) -> TrialVerdict:
        """Return the verdict on a drop and its upper bound, up to the rounding of a difference of two scores."""
        if not drop <= self.max_drop + ROUNDING:
            return "broken"
        return "kept" if bound <= self.max_drop + ROUNDING else "uncertain"

    def accepts(self, drop: float, bound: float) -> bool:
        """Return True for a drop that the search settles for: its bound is within the budget, or its value within half of the budget.

        The second is for data that are too few to certify half of the budget: no search could end there otherwise.
        """
        return drop + min(bound - drop, self.max_drop / 2) <= self.max_drop + ROUNDING
