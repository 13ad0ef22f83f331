"""The plan of a search: what a call will do, and the seconds that it expects, from measured figures where there are some.

With minutes the lengths of trainings follow from them; without, a step is measured. Candidates are rough until some are tried.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from muntin.searching.settings import SearchSettings
from muntin.searching.trials import KEPT, RUNGS

ROUGH_EXPORT_S = 30.0
"""Seconds of a network's export and score, before any is measured."""
MEAN_SHARE = sum(1 / divisor / KEPT**rung for rung, divisor in enumerate(RUNGS))
"""Mean share of a candidate's trainings in one of a network alone, if a third goes on after each rung."""


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What a call of a search will do, in seconds.

    `network_s`: of the training of one network alone. `candidate_s`: of one candidate, the mean; `first_s`: of the first one, which comes
    to the last rung; `rough`: True until some are tried. `scored`: candidates so far. `study_s`: of all that the call tries. `networks`:
    number of those trained alone. `export_s`: of the export and the score of one of them, rough.
    """

    settings: SearchSettings
    scored: int
    network_s: float
    candidate_s: float
    first_s: float
    rough: bool
    study_s: float
    networks: int
    export_s: float = ROUGH_EXPORT_S

    @property
    def total_s(self) -> float:
        """Seconds of the call: of all work, or its minutes if these end before."""
        minutes = self.settings.minutes
        return min(self.work_s, math.inf if minutes is None else 60 * minutes)

    @property
    def work_s(self) -> float:
        """Seconds of all work, at the sizes that the minutes give it."""
        return self.study_s + self.networks * (self.network_s + self.export_s)

    @property
    def least_s(self) -> float:
        """Seconds until one network is trained and exported: a candidate if none is tried yet, and this network."""
        return (0 if self.scored else self.first_s) + self.network_s + self.export_s

    @property
    def too_short(self) -> bool:
        """True if no network will be trained and exported within the minutes."""
        return self.settings.minutes is not None and self.least_s > 60 * self.settings.minutes

    def row(self) -> dict[str, Any]:
        """The plan as plain values."""
        totals = {name: getattr(self, name) for name in ("total_s", "work_s", "least_s", "too_short")}
        return {**asdict(self), **totals}


def candidate_seconds(network_s: float, *, scored: int, study_s: float, deployed: bool) -> tuple[float, float, bool]:
    """Seconds of a candidate, the mean and those of the first one, and whether they are rough. `deployed`: candidates are exported."""
    export = ROUGH_EXPORT_S / 2 if deployed else 0.0
    first = network_s * sum(1 / divisor for divisor in RUNGS) + 2 * export
    return (study_s / scored, first, False) if scored and study_s else (network_s * MEAN_SHARE + export, first, True)
