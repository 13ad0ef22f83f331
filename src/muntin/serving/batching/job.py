"""The values that pass through the batcher: a job, the batch that it is computed in, and the refusal that it may get instead."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

RefusalKind = Literal["full", "late", "too large", "draining", "stuck"]


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request as the batcher sees it. Equal only to itself, and submitted once. Times are seconds of the batcher's clock.

    `group`: only jobs of equal groups share a batch. `rows`: rows of a batch that it takes, at least 1. `nbytes`: memory that it holds
    while it waits. `priority`: 0 is the most urgent. `deadline`: when its client stops waiting, or None. `patient`: it has no objective,
    and is admitted to a full queue: for callers that bound the number of such jobs themselves. `cost`: cost of a row relative to rows of
    other groups (`LatencyModel`). `alone`: no other job shares its batch; the same for all jobs of a group. `arrived`: start of its
    objective; by default the time of its submission.

    Set by the batcher: `due`: latest time of its answer. `latest_start`: time after which it may be too late to compute it. `standing`:
    sort key of the queue, smaller values go first. `ticket`: number of its admission, from 1. `promised`: whether it was admitted because
    the forecast says that it will be in time.
    """

    group: Hashable
    rows: int = 1
    nbytes: int = 0
    priority: int = 0
    deadline: float | None = None
    patient: bool = False
    cost: float | None = None
    alone: bool = False
    payload: Any = None
    arrived: float = math.nan
    due: float = field(default=math.inf, init=False)
    latest_start: float = field(default=math.inf, init=False)
    standing: float = field(default=math.nan, init=False)
    ticket: int = field(default=0, init=False)
    waiting: bool = field(default=False, init=False)
    promised: bool = field(default=False, init=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """The jobs of one call of the engine. `within`: seconds after which the call counts as hanging."""

    jobs: tuple[Job, ...]
    group: Hashable
    rows: int
    within: float = math.inf


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a job is not computed. `retry_after`: seconds after which another try may succeed; None if unknown or never."""

    kind: RefusalKind
    message: str
    retry_after: float | None = None
