"""The plan of a search: what a call will do, and the seconds that it expects, from measured figures where there are some.

A training step is measured. Latencies and candidates are not, before a search has scored some: their figures are rough until then.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from muntin.searching.settings import SearchSettings

ROUGH_PART_S, ROUGH_SCORE_S, ROUGH_EXPORT_S = 5.0, 5.0, 30.0
"""Seconds of the latency of a part, of a candidate's score and of a network's export, before any is measured."""


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What a call of a search will do, in seconds.

    `steps`: of the shared weights, with those done. `step_s`: of one of them, measured. `supernet_s`, `study_s`, `network_s`: expected
    for the shared weights, for the candidates, and for the training of one network alone. `parts`, `missing`: latencies that `candidates`
    random networks need, and how many of these the cache lacks; 0 for other objectives. `candidate_s`: of one candidate with its
    latencies, the mean; `first_s`: of the first one, whose parts are all new; `rough`: True until some are measured. `networks`: number
    of those trained alone. `export_s`: of the export and the score of one of them, rough.
    """

    settings: SearchSettings
    steps: int
    steps_done: int
    step_s: float
    supernet_s: float
    parts: int
    missing: int
    scored: int
    candidate_s: float
    first_s: float
    rough: bool
    study_s: float
    networks: int
    network_s: float
    export_s: float = ROUGH_EXPORT_S

    @property
    def total_s(self) -> float:
        """Seconds of the call: of all work, or its minutes if these end before."""
        minutes = self.settings.minutes
        return min(self.work_s, math.inf if minutes is None else 60 * minutes)

    @property
    def work_s(self) -> float:
        """Seconds of all work, at the sizes that the minutes give it."""
        return self.supernet_s + self.study_s + self.networks * (self.network_s + self.export_s)

    @property
    def least_s(self) -> float:
        """Seconds until one network is trained and exported: the shared weights, a candidate if none is scored yet, and this network."""
        return self.supernet_s + (0 if self.scored else self.first_s) + self.network_s + self.export_s

    @property
    def too_short(self) -> bool:
        """True if no network will be trained and exported within the minutes."""
        return self.settings.minutes is not None and self.least_s > 60 * self.settings.minutes

    def row(self) -> dict[str, Any]:
        """The plan as plain values."""
        totals = {name: getattr(self, name) for name in ("total_s", "work_s", "least_s", "too_short")}
        return {**asdict(self), **totals}


def candidate_seconds(*, scored: int, study_s: float, missing: int, candidates: int) -> tuple[float, bool]:
    """Seconds of one candidate, and whether they are rough: measured once some are scored. `missing`: parts that all candidates need."""
    if scored:
        return study_s / scored, False
    return ROUGH_SCORE_S + ROUGH_PART_S * missing / candidates, True
