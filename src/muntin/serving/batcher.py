"""Which requests are admitted, and what a free worker computes next: pure decisions, told the time, with no thread and no clock.

**Order.** A job is due at min(arrived + objective, its own deadline), or never (a patient one has no objective). It counts as due no later
than max(`patience`, objective) seconds after it arrived, and with priority p p * `patience` later than that. That moment is its standing:
the earliest goes first, equal ones as they arrived. So within a priority by due, then arrival; a more urgent priority goes first; and
nothing starves, since whoever arrives after a job's standing has passed stands behind it, and no client says when that is.

**Batches.** Only jobs of one group share a batch. A free worker takes the most urgent job's group, in order, as many rows as are worth a
batch (`Lane.worth`), while the batch by its safe latency still ends before the earliest due moment in it, and leaves the most urgent job of
each other group its time where it can. A less urgent job that would make the batch smaller is passed over.

**Waiting.** A batch goes at once, unless waiting pays: no other group waits; rows arrive faster than 0.8 times what batches of the present
size get through; a larger one would get through more; and fewer rows wait than were lately outstanding at once (c clients that each await
their answer never have more than c). Then it waits for the smallest size that sustains the arrivals, but no longer than the fixed part of a
batch, which is what sharing saves, nor than two mean gaps without an arrival, nor past the latest safe moment.

**Promises.** A job that has a due moment is admitted only if it will be met by the forecast (`forecast.py`). Its own batch is reckoned at
the size that the arrivals call for. Were a lone row's latency enough, an overloaded queue would fill until every job at its head has just
the time to run alone, and the engine would never see a large batch again. For the same reason a group that was refused for want of such
time is owed it by the others for a while: else the one with the smallest batches would crowd out the rest. A job that overtakes others may
not make late what was promised to its own or a more urgent priority. A less urgent one is promised as if more urgent ones went on arriving
at their present rate; if more of them come, it is dropped.

A promise needs figures. Jobs of a group that was measured less than twice are admitted without one. So is one of a group that would be late
even alone: whenever nothing waits or runs, if it is the objective that it would miss and no deadline of its own, since an engine that
cannot keep the objective would answer nobody (one that can has been handed it too late); otherwise now and then, or
nobody would find out that the engine has recovered. But where others keep the objective, a job that takes many times as long as that is
admitted only if its group was measured itself, and hardly ever: while it is computed all the others are refused. By a guess, which errs
where a call's fixed part is large, it is tried as rarely, of all such groups together, when nothing else waits or runs, but for far too
long ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import get_args

from muntin.errors import DataError
from muntin.serving.forecast import Forecast, Run
from muntin.serving.job import Batch, Job, Refusal, RefusalKind
from muntin.serving.lane import LOAD, PAYS, Lane, Peak, Rate
from muntin.serving.latency import UNKNOWN, LatencyModel
from muntin.serving.overhead import Overhead

__all__ = ["BROKEN", "LANES", "PRIORITIES", "Batch", "Batcher", "Job", "Refusal", "RefusalKind", "Snapshot", "Step"]

LANES = 256
"""Groups that are remembered while nothing of them waits or runs."""
PRIORITIES = 1 << 32
_LEVELS = 16  # priorities whose load is told apart
_EASY = 1.5  # times the backlog: who is in time even then is admitted without a forecast
_BUSIEST = 0.9  # of the engines, that more urgent jobs are taken to use at most
_FLOOD = 2  # times what full batches get through: arrivals of which most are refused
_BEYOND, _BEYOND_S = 0.3, 0.01  # of an objective, or seconds without one, that answers may be taken to need beyond the engine
_PASSED = 64  # jobs that a batch passes over at most
_PROBE, _PROBES = 0.25, 8  # s, and times its latency: pause between two jobs of a group that would be late even alone
_HUGE = 4  # objectives: who takes longer, alone, keeps away all who come meanwhile
_GUESSED = 16  # objectives: who takes longer by a guess is not tried, to see whether it is right
_KEPT_S = 60.0  # s for which the objective counts as one that is kept
_HUGE_PROBES = 64  # times its latency: pause between two such jobs
_FRESH = 0.02  # of an objective: how long a forecast is kept when the batch that it waits for ought to have ended
_FORGOTTEN = 8  # jobs that wait no more and are still remembered, and twice as many as wait
BROKEN = "the engine was slower than foreseen, or more urgent requests came: try again later"
"""What is said to who was admitted and is not computed."""
_STUCK = "the engine does not come back, and no thread is left to compute on: start the server again, or send the request to another one"
_standing = attrgetter("standing")


@dataclass(frozen=True, slots=True)
class Step:
    """What a free worker does: answers `dropped`, computes `batch`; without one, looks again at `wake`, or after the next event if None."""

    batch: Batch | None
    dropped: tuple[tuple[Job, Refusal], ...]
    wake: float | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Counts at one moment. `admitted`, `dropped`, `cancelled`, `finished` and `refused` (by kind) are jobs since the beginning.

    `backlog_s`: seconds of engine time that wait.
    """

    waiting_jobs: int
    waiting_rows: int
    waiting_bytes: int
    waiting_groups: int
    running_batches: int
    running_rows: int
    backlog_s: float
    admitted: int
    dropped: int
    cancelled: int
    finished: int
    refused: dict[RefusalKind, int]


class Batcher:
    """Admits jobs, and forms batches for `workers` engines that run side by side.

    `objective`: seconds from arrival to answer that every admitted job keeps, or None. `max_rows`: of a batch. `queue_rows`, `queue_bytes`:
    bounds of what waits. `patience`: seconds that a step of priority is worth. `margin`: seconds that an answer takes beyond the engine at
    the least; `delivered` tells what it really takes.

    Calls come from one thread at a time, with a `now` that never goes back. With 1,000 jobs waiting `submit` costs some 10 µs, `poll` as
    much and 1 µs for each job that it takes; groups with waiting jobs add to both. Raises DataError for a bound that means nothing.
    """

    def __init__(
        self,
        latencies: LatencyModel,
        *,
        objective: float | None,
        max_rows: int,
        queue_rows: int,
        queue_bytes: int,
        workers: int = 1,
        patience: float = 1.0,
        margin: float = 0.0002,
    ) -> None:
        for name, value in {"max_rows": max_rows, "queue_rows": queue_rows, "queue_bytes": queue_bytes, "workers": workers}.items():
            if value < 1:
                raise DataError(f"{name}={value}: give a whole number from 1")
        if queue_rows < max_rows:
            raise DataError(
                f"queue_rows={queue_rows}, max_rows={max_rows}: the largest request must find room, let at least as many rows wait"
            )
        if objective is not None and not 0 < objective < math.inf:
            raise DataError(f"objective={objective}: give seconds above 0, or None for no objective")
        if not (0 < patience < math.inf and 0 <= margin < math.inf):
            raise DataError(f"patience={patience}, margin={margin}: give seconds, patience above 0 and margin from 0")
        self.objective, self.max_rows, self.workers = objective, max_rows, workers
        self.queue_rows, self.queue_bytes = queue_rows, queue_bytes
        self.patience = patience
        self._overhead = Overhead(margin, max(margin, _BEYOND * objective if objective else _BEYOND_S))
        self._latencies = latencies
        self._lanes: OrderedDict[Hashable, Lane] = OrderedDict()  # the least recently used first
        self._active: dict[Hashable, Lane] = {}  # those with waiting jobs
        self._running: list[Run] = []
        self._jobs = self._rows = self._bytes = 0
        self._backlog = 0.0  # seconds of engine time
        self._last = -math.inf  # no waiting job stands behind this
        self._expiring: list[tuple[float, int, Job]] = []  # heap, by the moment from which on a job may be too late
        self._owed = Peak()  # seconds that jobs which were refused would have needed for their batch
        self._forecast: Forecast | None = None  # as things are; None: they changed
        self._outdated = -math.inf
        self._guesses_at = -math.inf  # from when on a job that is huge by a guess may be tried
        self._busy = Rate()
        self._work: dict[int, Rate] = {}  # seconds of engine time that were admitted, by priority
        self._draining = self._stuck = False
        self._admitted = self._dropped = self._cancelled = self._finished = 0
        self._refused: dict[RefusalKind, int] = dict.fromkeys(get_args(RefusalKind), 0)

    # ---- in

    def submit(self, job: Job, now: float) -> Refusal | None:
        """Admits a job, or says why not. Raises ValueError for a job that was admitted before, and for numbers that mean nothing."""
        _check(job)
        if refusal := self._bounds(job):
            return refusal
        lane = self._lane(job)
        lane.arrivals.add(job.rows * (1 + job.unseen), now)
        due = math.inf if self.objective is None or job.patient else (now if job.came is None else min(job.came, now)) + self.objective
        if job.deadline is not None and job.deadline < due:
            due = job.deadline
        job.arrived, job.due, job.promised = now, due, False
        job.standing = min(due, now + max(self.patience, self.objective or 0.0)) + job.priority * self.patience
        late, holds = self._lateness(job, lane, now) if due < math.inf else (0.0, 0.0)
        if late > 0:
            if late == math.inf:
                return self._refuse_hopeless(job, lane, now, holds)
            message = f"{self._jobs} requests wait and leave it too little time: try again in {max(late * 1e3, 1):.0f} ms"
            return self._refuse("late", message, late, holds)
        self._enter(job, lane, now)
        return None

    def _refuse_hopeless(self, job: Job, lane: Lane, now: float, holds: float) -> Refusal:
        """Of a job that would be late even alone."""
        if job.deadline is not None and job.deadline <= job.due:
            message = "the time until its deadline does not suffice even for the engine alone: give it more"
            return self._refuse("late", message, holds=holds)
        assert self.objective is not None
        seconds = lane.line.safe(job.rows)
        if job.due <= now or seconds + self.margin <= self.objective:  # it was read too late
            return self._refuse(
                "late", "more requests come than can be read in time: try again", self._backlog / self.workers or None, holds
            )
        message = (
            f"the engine alone may take {seconds * 1e3:.0f} ms for it (usually {lane.line.expected(job.rows) * 1e3:.0f}), and answers are "
            f"promised within {self.objective * 1e3:g} ms: send smaller images, or fewer in a request, or have them served with a longer "
            "objective"
        )
        return self._refuse("late", message, holds=holds)

    def _bounds(self, job: Job) -> Refusal | None:
        if self._draining:
            return self._refuse("draining", "the server is shutting down: send the request to another one")
        if self._stuck:
            return self._refuse("stuck", _STUCK)
        if job.rows > self.max_rows or job.nbytes > self.queue_bytes:
            what = f"{job.rows} rows, {job.nbytes} bytes in one request"
            return self._refuse("too large", f"{what}: send at most {self.max_rows} rows and {self.queue_bytes} bytes at once")
        rows, size = self._rows + job.rows, self._bytes + job.nbytes
        if job.patient or (rows <= self.queue_rows and size <= self.queue_bytes):
            return None
        what = f"{self._rows} rows, {self._bytes} bytes wait, of at most {self.queue_rows} rows and {self.queue_bytes} bytes"
        excess = max(1 - self.queue_rows / rows, 1 - self.queue_bytes / max(size, 1))
        return self._refuse("full", f"{what}: try again later", excess * self._backlog / self.workers if self._backlog else None)

    def _refuse(self, kind: RefusalKind, message: str, retry_after: float | None = None, holds: float = 0.0) -> Refusal:
        self._refused[kind] += 1
        return Refusal(kind, message, retry_after, holds)

    def _lane(self, job: Job) -> Lane:
        """The job's group, made if it is new. As long as it was not measured itself, what is known of it may change any time."""
        lane = self._lanes.get(job.group)
        if lane is None:
            lane = self._lanes[job.group] = Lane(job.group)
            if len(self._lanes) > LANES:
                self._forget(lane)
        else:
            self._lanes.move_to_end(job.group)
        if job.cost is not None:
            lane.cost = job.cost
        if lane.tried == -math.inf:
            self._learn(lane)
        return lane

    def _forget(self, new: Lane) -> None:
        """Drops the group that was not used for the longest time, of those with nothing to do."""
        for group, lane in self._lanes.items():
            if not lane.outstanding and lane is not new:
                del self._lanes[group]
                return

    def _learn(self, lane: Lane) -> None:
        line = self._latencies.line(lane.group, cost=lane.cost) or UNKNOWN
        if line != lane.line:
            lane.line = line
            self._reckon(lane)

    def _reckon(self, lane: Lane) -> None:
        """Brings the backlog up to date with a lane that changed."""
        self._forecast = None
        self._backlog -= lane.seconds
        lane.seconds = lane.span(lane.rows)
        self._backlog = max(self._backlog + lane.seconds, 0.0) if self._jobs else 0.0  # no rounding error outlives the queue

    def _enter(self, job: Job, lane: Lane, now: float) -> None:
        self._admitted += 1
        job.ticket, job.waiting = self._admitted, True
        if not lane.jobs:
            self._active[lane.group] = lane
        lane.insert(job)
        self._last = max(self._last, job.standing)
        self._jobs += 1
        self._rows += job.rows
        self._bytes += job.nbytes
        self._reckon(lane)
        lane.outstanding += job.rows
        lane.peak.raise_to(lane.outstanding, now)
        level = _level(job.priority)
        work = self._work.get(level)
        if work is None:
            work = self._work[level] = Rate()
        work.add(lane.line.expected(lane.most) / lane.most * job.rows, now)
        if job.due < math.inf:
            latest = job.due - lane.line.expected(job.rows) if job.promised else job.due
            heappush(self._expiring, (latest, job.ticket, job))
            if len(self._expiring) > _FORGOTTEN + 2 * self._jobs:  # each holds what a client sent
                self._expiring = [entry for entry in self._expiring if entry[2].waiting]
                heapify(self._expiring)

    # ---- promises

    def _lateness(self, job: Job, lane: Lane, now: float) -> tuple[float, float]:
        """By how many seconds the job would be late, or make late another that may not be; at most 0: in time; inf: not even alone.

        And the seconds for which that is so for any equal job, unless something happens before: a batch ends, a job is taken back.
        """
        if job.due <= now:
            return math.inf, 0.0
        if not lane.known:
            return 0.0, 0.0
        line, time = lane.line, job.due - now - self.margin
        if line.safe(job.rows) > time:
            wait = self._until_probe(job, lane, now)
            return (math.inf, min(line.safe(job.rows) - time, wait)) if wait > 0 else (0.0, 0.0)
        job.promised = True
        if not self._jobs and len(self._running) < self.workers:
            return 0.0, 0.0
        reserve, owed = self._reserve(lane, time, now)
        stretch = self._stretch(job.priority, now)
        ends = sum(run.left(now) for run in self._running)
        batch = max(job.rows, min(lane.most, lane.rows + job.rows))
        easy = ends + _EASY * self._backlog + max(reserve, owed, line.safe(batch))
        if stretch * easy <= time and job.standing >= self._last:
            return 0.0, 0.0
        forecast = self._foresee(now)
        place = forecast.place(job, lane)
        own = line.expected(place.rows)
        own += math.sqrt(place.variance + (own * (line.spread - 1)) ** 2)
        least = max(reserve, owed)
        if least > line.safe(place.rows):
            own = max(own, least + math.sqrt(place.variance))
        late = stretch * max(0.0, place.start - now) + own - time
        if late > 0:
            self._owed.raise_to(reserve, now)
            free = len(self._running) < self.workers  # what it takes in a moment changes everything
            return late, 0.0 if free else late / stretch
        return forecast.harm(place, job.priority), 0.0

    def _foresee(self, now: float) -> Forecast:
        """The forecast; made once for all the jobs that are refused until something happens, or ought to have."""
        if self._forecast is None or now >= self._outdated:
            free = [run.free(now) for run in self._running] + [(now, 0.0)] * (self.workers - len(self._running))
            self._outdated = max(min(end for end, _ in free), now + (self.objective or 0.0) * _FRESH)
            self._forecast = Forecast(self._active.values(), free, margin=self.margin, backlog=self._backlog)
        return self._forecast

    def _until_probe(self, job: Job, lane: Lane, now: float) -> float:
        """Seconds until a job that would be late even alone is let through, if nothing happens before: at once where nothing else is to do,
        if the objective is what it would miss; otherwise now and then; hardly ever where it would keep away others."""
        huge = self._huge(job, lane, now)
        if job.deadline is None or job.deadline > job.due:
            assert self.objective is not None
            unable = lane.line.safe(job.rows) + self.margin > self.objective  # else it was read too late, and the next one need not be
            if unable and not huge and not self._jobs and not self._running:
                return 0.0
        if lane.outstanding:
            return math.inf
        if huge and lane.tried == -math.inf:
            assert self.objective is not None
            guess = lane.line.expected(job.rows)
            if self._jobs or self._running or now < self._guesses_at or guess > _GUESSED * self.objective:
                return math.inf
            self._guesses_at = now + _HUGE_PROBES * guess
            return 0.0
        return lane.tried + max(_PROBE, (_HUGE_PROBES if huge else _PROBES) * lane.line.expected(job.rows)) - now

    def _huge(self, job: Job, lane: Lane, now: float) -> bool:
        """Whether a job usually takes many times the objective, which others keep: a stall makes none of what was quick before."""
        if self.objective is None or lane.line.expected(job.rows) <= _HUGE * self.objective:
            return False
        return any(other.kept > now - _KEPT_S for other in self._lanes.values() if other is not lane)

    def _reserve(self, lane: Lane, time: float, now: float) -> tuple[float, float]:
        """Seconds that a batch of the size that the arrivals call for needs, and those that are owed to other groups.

        Both as far as two batches, one after the other, keep the objective: whoever arrives when one has just begun waits for it.
        """
        part = (time if self.objective is None else self.objective) * self._part(lane, now)
        return lane.line.safe(self._aim(lane, part, now)), min(self._owed.value(now), part)

    def _part(self, lane: Lane, now: float) -> float:
        """Of an objective, what a batch may take: more where most requests are refused anyway, such as those early in a long batch."""
        flood = lane.arrivals.per_second(now) * lane.line.expected(self.max_rows) > _FLOOD * self.workers * self.max_rows
        return 0.6 if flood else 0.5

    def _sustaining(self, lane: Lane, now: float) -> int:
        others = self._busy.per_second(now) - lane.busy.per_second(now)
        return lane.sustaining(max(0.0, self.workers - others), now, self.max_rows)

    def _aim(self, lane: Lane, seconds: float, now: float) -> int:
        """Rows of a batch that the arrivals call for and that are worth it, as far as it takes no longer than so many seconds."""
        sustaining, reach = self._sustaining(lane, now), lane.line.rows_within(seconds)
        return max(1, min(lane.worth(sustaining, self.max_rows, reach), sustaining, reach))

    def _stretch(self, priority: int, now: float) -> float:
        """How many times longer a job waits because more urgent ones arrive and overtake it, if they go on as they did."""
        urgent = sum(work.per_second(now) for level, work in self._work.items() if level < _level(priority))
        return 1 / (1 - min(_BUSIEST, urgent / self.workers)) if urgent else 1.0

    # ---- out

    def poll(self, now: float) -> Step:
        """What a free worker does now."""
        dropped = self.expire(now) if self._expiring and self._expiring[0][0] < now else ()
        if not self._active or len(self._running) >= self.workers:
            return Step(None, dropped, None)
        lane = next(iter(self._active.values())) if len(self._active) == 1 else min(self._active.values(), key=_standing)
        part = math.inf if self.objective is None else self.objective * self._part(lane, now)
        most = lane.explored(lane.worth(self._sustaining(lane, now), self.max_rows, lane.line.rows_within(part)))
        if most != lane.most:
            lane.most = most
            self._reckon(lane)
        chosen, rows, due = self._choose(lane, now)
        if len(self._active) == 1 and len(chosen) == len(lane.jobs) and (wake := self._linger(lane, rows, due, now)) > now:
            return Step(None, dropped, wake)
        batch = Batch(self._remove(lane, chosen), lane.group, rows, lane.line.overdue(rows))
        lane.lingers, lane.tried = None, now
        self._running.append(Run(batch, lane, now))
        return Step(batch, dropped, None)

    def _choose(self, lane: Lane, now: float) -> tuple[list[int], int, float]:
        """Which of the lane's jobs make a batch, their rows, and when it has to end."""
        line, time = lane.line, now + self.margin
        due = self._others(lane, now)
        limit = min(lane.most, line.rows_within(due - time))
        least = lane.head.priority
        chosen: list[int] = []
        rows = passed = 0
        for index, (_, _, job) in enumerate(lane.jobs):
            allowed = limit if job.due >= due else min(limit, line.rows_within(job.due - time))
            lesser = job.priority > least
            if chosen and (rows + job.rows > allowed or (lesser and allowed < min(limit, lane.rows))):
                passed += 1
                if not lesser or allowed == limit or passed > _PASSED:
                    break
                continue
            limit, due = allowed, min(due, job.due)
            rows += job.rows
            chosen.append(index)
            if rows >= limit:
                break
        return chosen, rows, due

    def _others(self, lane: Lane, now: float) -> float:
        """When a batch of this lane has to end for the sake of the most urgent job of each other group, where that can be met at all."""
        if len(self._active) == 1 or len(self._running) + 1 < self.workers:
            return math.inf
        sooner = min((run.left(now) for run in self._running), default=math.inf)  # another worker is free then
        least, latest, ahead = lane.line.safe(lane.head.rows), math.inf, 0.0
        for other in sorted(self._active.values(), key=_standing):
            if other is lane:
                continue
            rows = min(other.rows, other.most)
            time = other.head.due - now - self.margin - ahead - other.line.safe(rows)
            if least <= time < sooner:
                latest = min(latest, now + time)
            ahead += other.line.expected(rows)
        return latest

    def _linger(self, lane: Lane, rows: int, due: float, now: float) -> float:
        """Until when it pays to wait for more rows than these, which are all that wait; not after `now`: it does not."""
        line = lane.line
        rate = lane.arrivals.per_second(now)
        if self._draining or not lane.known or rate * line.expected(rows) < LOAD * rows or rows > lane.peak.value(now) - 0.5:
            return now
        target = self._aim(lane, (due - now if self.objective is None else self.objective) / 2, now)
        gains = line.least or target * line.expected(rows) >= PAYS * rows * line.expected(target)
        if rows >= target or not gains:
            return now
        if lane.lingers is None:
            lane.lingers = now
        gaps = 2 / lane.arrivals.per_second(lane.arrivals.at)
        saved = line.fixed or line.least / 4  # with one size measured, it is anybody's guess
        return min(due - self.margin - line.safe(rows), lane.lingers + saved, max(lane.lingers, lane.arrivals.at) + gaps)

    @property
    def expiry(self) -> float:
        """The moment before which `expire` finds nothing; inf: there is none."""
        return self._expiring[0][0] if self._expiring else math.inf

    def expire(self, now: float) -> tuple[tuple[Job, Refusal], ...]:
        """Drops what cannot be met any more. A job that nobody waits behind gets its chance until its time has passed.

        `poll` does so too: this is for the time that no worker is free.
        """
        dropped = []
        while self._expiring and (self._expiring[0][0] < now or not self._expiring[0][2].waiting):
            _, ticket, job = heappop(self._expiring)
            if not job.waiting:
                continue
            expected = self._lanes[job.group].line.expected(job.rows)
            if job.due >= now and not (job.promised and self._jobs > 1 and now + expected > job.due):
                heappush(self._expiring, (job.due, ticket, job))
                continue
            self._leave(job)
            self._dropped += 1
            dropped.append((job, Refusal("late", BROKEN, self._backlog / self.workers)))
        return tuple(dropped)

    def done(self, batch: Batch, now: float, seconds: float | None) -> None:
        """A worker is free again. `seconds` of engine time are learned; None: it failed. Raises ValueError for one that does not run."""
        run = next((run for run in self._running if run.batch is batch), None)
        if run is None:
            raise ValueError("this batch does not run: give each batch of `poll` back once")
        self._running.remove(run)
        self._forecast = None
        lane = run.lane
        lane.outstanding -= batch.rows
        self._finished += len(batch.jobs)
        lane.busy.add(now - run.started, now)
        self._busy.add(now - run.started, now)
        if seconds is not None:
            self._latencies.observe(batch.group, batch.rows, seconds, cost=lane.cost)
            self._learn(lane)
            if self.objective is not None and seconds + self.margin <= self.objective:
                lane.kept = now

    @property
    def margin(self) -> float:
        """Seconds that an answer is taken to need beyond the engine."""
        return self._overhead.seconds

    def delivered(self, batch: object, seconds: float) -> None:
        """An answer went out so long after its batch was computed. `batch`: equal for answers of one."""
        self._overhead.add(batch, seconds)

    def cancel(self, job: Job) -> bool:
        """Takes back a job that waits; False for one that runs, was answered or was never admitted."""
        if not job.waiting:
            return False
        self._leave(job)
        self._cancelled += 1
        return True

    def drain(self) -> None:
        """Refuses every job from now on; what waits is still served."""
        self._draining = True

    def discard(self) -> tuple[tuple[Job, Refusal], ...]:
        """Gives up everything that waits."""
        return self._give_up(Refusal("draining", "the server was shut down before the request was computed: send it to another one"))

    def stick(self) -> tuple[tuple[Job, Refusal], ...]:
        """No engine comes back any more: gives up everything that waits, and refuses every job until `loosen`."""
        self._stuck = True
        return self._give_up(Refusal("stuck", _STUCK))

    def loosen(self) -> None:
        """One came back after all."""
        self._stuck = False

    def _give_up(self, refusal: Refusal) -> tuple[tuple[Job, Refusal], ...]:
        jobs = [job for lane in self._active.values() for _, _, job in lane.jobs]
        for job in jobs:
            self._leave(job)
        self._dropped += len(jobs)
        return tuple((job, refusal) for job in jobs)

    def _leave(self, job: Job) -> None:
        lane = self._lanes[job.group]
        self._remove(lane, [lane.index(job)])
        lane.outstanding -= job.rows

    def _remove(self, lane: Lane, indices: list[int]) -> tuple[Job, ...]:
        jobs = lane.take(indices)
        for job in jobs:
            job.waiting = False
            self._rows -= job.rows
            self._bytes -= job.nbytes
        self._jobs -= len(jobs)
        self._reckon(lane)
        if not lane.jobs:
            del self._active[lane.group]
        if not self._jobs:
            self._last = -math.inf
            self._expiring.clear()
        return jobs

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return self._jobs

    def snapshot(self) -> Snapshot:
        """What there is to count."""
        return Snapshot(
            waiting_jobs=self._jobs,
            waiting_rows=self._rows,
            waiting_bytes=self._bytes,
            waiting_groups=len(self._active),
            running_batches=len(self._running),
            running_rows=sum(run.batch.rows for run in self._running),
            backlog_s=self._backlog,
            admitted=self._admitted,
            dropped=self._dropped,
            cancelled=self._cancelled,
            finished=self._finished,
            refused=dict(self._refused),
        )


def _level(priority: int) -> int:
    """What the load of a priority is counted under."""
    return min(priority, _LEVELS - 1)


def _check(job: Job) -> None:
    if job.ticket:
        raise ValueError("this job was admitted before: make one for each request")
    if job.rows < 1 or job.nbytes < 0 or not 0 <= job.priority < PRIORITIES:
        raise ValueError(
            f"rows={job.rows}, nbytes={job.nbytes}, priority={job.priority}: rows from 1, the others from 0, priorities of 32 bits"
        )
    if (job.deadline is not None and math.isnan(job.deadline)) or (job.cost is not None and not 0 < job.cost < math.inf):
        raise ValueError(f"deadline={job.deadline}, cost={job.cost}: a deadline is a number, a cost is above 0 and finite")
