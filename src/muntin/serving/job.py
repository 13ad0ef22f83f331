"""What goes through the batcher: a job, the batch that it is computed in, or the refusal that it gets instead."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

RefusalKind = Literal["full", "late", "too large", "draining", "stuck"]


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request, as far as batching is concerned. Equal only to itself, and submitted once.

    `group`: only equal groups share a batch. `rows` >= 1: what batches are counted in. `nbytes`: what it holds while it waits. `priority`:
    0 is the most urgent. `deadline`: seconds of the batcher's clock, or None. `came`: from when on its objective counts, where it was not
    submitted at once. `patient`: it has no objective, and finds room in any queue: for whoever bounds by himself how many such there are.
    `cost`: of a row, relative to other groups (`LatencyModel`). `unseen`: equal jobs refused since the last one without asking the batcher
    (`Refusal.holds`). The rest is the batcher's.
    """

    group: Hashable
    rows: int = 1
    nbytes: int = 0
    priority: int = 0
    deadline: float | None = None
    came: float | None = None
    patient: bool = False
    cost: float | None = None
    unseen: int = 0
    payload: Any = None
    arrived: float = field(default=math.nan, init=False)
    """When it was submitted."""
    due: float = field(default=math.inf, init=False)
    """When its answer must be there."""
    standing: float = field(default=math.nan, init=False)
    """What it is ordered by: the smaller, the sooner."""
    ticket: int = field(default=0, init=False)
    """Number of its admission, from 1; 0: not admitted."""
    waiting: bool = field(default=False, init=False)
    promised: bool = field(default=False, init=False)
    """Whether it was admitted because it would be in time."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of the engine computes. `within`: seconds after which it counts as one that does not come back."""

    jobs: tuple[Job, ...]
    group: Hashable
    rows: int
    within: float = math.inf


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a job is not computed. `retry_after`: seconds after which it might be, None where that is unknown or never.

    `holds`: seconds for which an equal job would be refused as well, as far as can be told.
    """

    kind: RefusalKind
    message: str
    retry_after: float | None = None
    holds: float = 0.0
