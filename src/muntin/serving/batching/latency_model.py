"""Time of a batch of n rows, learned from the batches that finished.

A group's latency is a line, fixed + per_row * n, through one remembered figure for each size of batch that was measured (sizes above eight
share buckets, a quarter of an octave wide). So a machine that ran full batches for an hour still knows the time of a single row.

The machine may become faster or slower for every size. So a batch moves the figures of all sizes by a sixteenth of its own deviation, which
counts as a quarter at most. When the median deviation of the last nine batches is a fifth, all figures jump by it. The ratio of one size to
another belongs to the engine: a batch moves its own size's ratio eight times more slowly.

Promises rest on `safe`: the line times the spread of the last 128 batches around it, their 97th percentile stretched to the 99th as for a
normal distribution: three hiccups among 128 batches do not count.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import NamedTuple

GROUPS = 128
"""Number of groups that are remembered; the least recently measured one is forgotten first."""
_WINDOW = 128  # deviations that the spread is computed from
_OUTLIERS = 4  # largest deviations of a full window that do not count: 97th percentile
_STRETCH = 1.24  # from the 97th to the 99th percentile of a normal distribution: 2.33 / 1.88
_RECENT = 9  # batches whose median tells whether the machine changed
_SHIFT, _CLIP = 0.2, 0.25  # deviation that counts as a change, and largest deviation of one batch
_GAIN, _OWN_GAIN = 1 / 16, 1 / 128  # weight of one batch in the figures of all sizes and of its own size
_ROUGH, _EARLY = 8, 16  # batches before deviations are collected, and before their percentile is used
_MIN_SPREAD, _EARLY_SPREAD = 0.03, 0.15
_SETTLED = 4  # batches of a size after which its own figure is the reference for the next one
_FORGET, _FADED = 1024, 0.02  # batches after which the weight of a size that is not measured has fallen to this
_FIRM, _STALE = 8, 512  # batches that make a size firm (`LatencyLine.firm_rows`), and how long ago the last one may be
_MIN_S, _MAX_S = 1e-9, 1e9
_ALL_ROWS = 1 << 30  # for lines on which rows cost nothing
_RELIABLE = 2  # batches after which a line is more than a first call, which may have compiled
OVERDUE_S, OVERDUE = 10.0, 20
"""A batch counts as hanging after so many seconds, or so many times its safe time if that is longer: short of memory it may be computed
twice, and in tiles, and a machine may stand still for seconds."""
OVERDUE_UNKNOWN_S = 120.0
"""The same for a group that was hardly measured: a first call may compile."""


class LatencyLine(NamedTuple):
    """Seconds of a batch of n rows: at least `minimum`, otherwise `fixed` + `per_row` * n. `spread` >= 1 leads to the safe time.

    `largest_rows`: rows of the largest batch measured; the line beyond is extrapolated. `batch_count`: batches measured. `firm_rows`: rows
    of the largest size measured often and recently enough to tell what it gains over smaller ones; 0: none.
    """

    fixed: float
    per_row: float
    minimum: float
    spread: float
    largest_rows: int
    batch_count: int
    firm_rows: int
    guessed: bool = False
    """True for another group's line, scaled."""

    def expected(self, rows: int) -> float:
        """Usual seconds of a batch."""
        seconds = self.fixed + self.per_row * rows
        return seconds if seconds > self.minimum else self.minimum

    def safe(self, rows: int) -> float:
        """Seconds that about 99 of 100 recent batches kept."""
        return self.expected(rows) * self.spread

    def overdue(self, rows: int) -> float:
        """Seconds after which a batch counts as hanging."""
        if self.batch_count < _RELIABLE:
            return OVERDUE_UNKNOWN_S
        return max(OVERDUE_UNKNOWN_S if self.guessed else OVERDUE_S, OVERDUE * self.safe(rows))

    def rows_within(self, seconds: float) -> int:
        """Rows of the largest batch whose safe time is within these seconds; 0 if one row takes longer."""
        left = seconds / self.spread
        if left < self.minimum or left < self.fixed + self.per_row:
            return 0
        return int((left - self.fixed) / self.per_row) if left < self.fixed + self.per_row * _ALL_ROWS else _ALL_ROWS


UNKNOWN = LatencyLine(0.0, 0.0, 0.0, 1.0, 0, 0, 0)


class LatencyModel:
    """Latency of batches by group and rows, in bounded memory.

    A `cost` is the cost of a row relative to rows of other groups, in any unit (pixels, for pictures). A group that was never measured gets
    the line of the measured group with the nearest cost, scaled by the ratio of the costs.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def observe(self, group: Hashable, rows: int, seconds: float, *, cost: float | None = None) -> None:
        """Learn from a finished batch; less than a nanosecond counts as one."""
        seconds = max(seconds, _MIN_S)
        measured = self._groups.get(group)
        if measured is None:
            measured = self._groups[group] = _Group()
            if len(self._groups) > GROUPS:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(group)
        if cost is not None:
            measured.cost = cost
        measured.observe(rows, seconds)

    def line(self, group: Hashable, *, cost: float | None = None) -> LatencyLine | None:
        """Return the group's own line, else the line of another group by `cost`, else None.

        The first batch of a group says little: until the second, the line of another group of the same cost is preferred.
        """
        own = self._groups.get(group)
        if own is not None and (own.line.batch_count >= _RELIABLE or cost is None):
            return own.line
        nearest = None if cost is None else self._nearest(cost, but=own)
        if own is None or (nearest is not None and not nearest.guessed and nearest.batch_count >= _RELIABLE):
            return nearest
        return own.line

    def _nearest(self, cost: float, *, but: _Group | None) -> LatencyLine | None:
        """Line of the group with the nearest cost, scaled to this one; of equally near groups the last one used."""
        nearest, distance = None, math.inf
        for group in self._groups.values():
            if group is not but and group.cost is not None and cost > 0 < group.cost:
                ratio = abs(math.log(cost / group.cost))
                if ratio <= distance:
                    nearest, distance = group, ratio
        if nearest is None or nearest.cost is None:
            return None
        line, factor = nearest.line, cost / nearest.cost
        if factor == 1:  # two versions are as fast for images of one size
            return line
        return line._replace(fixed=line.fixed * factor, per_row=line.per_row * factor, minimum=line.minimum * factor, guessed=True)


class _Size:
    """One size of batch: mean rows and seconds, the number of batches and the number of the last one."""

    def __init__(self, rows: int, seconds: float) -> None:
        self.rows, self.seconds = float(rows), seconds
        self.count = self.last = 0
        self._early: list[float] = []

    def add(self, rows: int, seconds: float, number: int) -> None:
        """Add batch `number` of the group."""
        self.count += 1
        self.last = number
        gain = max(_OWN_GAIN, 1 / self.count)
        self.rows += (rows - self.rows) * gain
        if self.count <= _SETTLED:  # the lower median: the first call may have compiled
            insort(self._early, seconds)
            self.seconds = self._early[(self.count - 1) // 2]
            return
        low, high = self.seconds * (1 - _CLIP), self.seconds * (1 + _CLIP)
        self.seconds += (min(max(seconds, low), high) - self.seconds) * gain

    def scale(self, factor: float) -> None:
        self.seconds = min(max(self.seconds * factor, _MIN_S), _MAX_S)
        if self.count < _SETTLED:
            self._early = [seconds * factor for seconds in self._early]


class _Group:
    """Measurements of one group; `line` is fitted anew after every batch."""

    def __init__(self) -> None:
        self.cost: float | None = None
        self.line = UNKNOWN
        self._count = 0
        self._largest = 0
        self._sizes: dict[int, _Size] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # rows, seconds
        self._deviations = deque[float](maxlen=_WINDOW)  # seconds / line

    def observe(self, rows: int, seconds: float) -> None:
        self._count += 1
        self._largest = max(self._largest, rows)
        size = self._sizes.get(_bucket(rows))
        if size is None:  # there is only an extrapolation to compare it with
            size = self._sizes[_bucket(rows)] = _Size(rows, seconds)
        else:
            self._follow(size, rows, seconds)
        size.add(rows, seconds, self._count)
        fixed, per_row, minimum = self._fit()
        self.line = LatencyLine(fixed, per_row, minimum, self._spread(), self._largest, self._count, self._firm_rows())

    def _follow(self, size: _Size, rows: int, seconds: float) -> None:
        """Move the figures of all sizes, and collect the deviation from the line for the spread."""
        self._recent.append((rows, seconds))
        deviation = seconds / self._reference(rows) - 1
        if abs(deviation) > _SHIFT and abs((median := self._median()) - 1) > _SHIFT:
            self._scale(median)
            self._deviations.clear()
            return
        if self._count > _ROUGH:
            self._deviations.append(seconds / self.line.expected(rows))
        if size.count >= _SETTLED:  # before that, the line may be wrong
            self._scale(1 + min(max(deviation, -_CLIP), _CLIP) * _GAIN)

    def _median(self) -> float:
        """Median deviation of the last batches. One or two count only if they are faster: then the very first call compiled."""
        deviations = sorted(seconds / self._reference(rows) for rows, seconds in self._recent)
        median = deviations[(len(deviations) - 1) // 2]
        return median if len(deviations) > 2 else min(median, 1.0)

    def _reference(self, rows: int) -> float:
        """Seconds to compare a batch with: its own size's, if measured often enough, so that a misfit of the line does not count."""
        size = self._sizes.get(_bucket(rows))
        if size is None or size.count < _SETTLED:
            return self.line.expected(rows)
        return size.seconds * self.line.expected(rows) / (self.line.fixed + self.line.per_row * size.rows)

    def _scale(self, factor: float) -> None:
        for size in self._sizes.values():
            size.scale(factor)

    def _fit(self) -> tuple[float, float, float]:
        """`fixed`, `per_row` and `minimum` of the line with the least relative error, with no part below 0."""
        if len(self._sizes) == 1:
            (only,) = self._sizes.values()
            # A single size tells nothing of the fixed part: smaller batches are assumed to be as slow, larger ones to gain nothing.
            return 0.0, only.seconds / only.rows, only.seconds
        s0 = s1 = s2 = t0 = t1 = 0.0
        for size in self._sizes.values():
            weight = min(size.count, 32) * max(_FADED, 1 - (self._count - size.last) / _FORGET) / size.seconds**2
            s0 += weight
            s1 += weight * size.rows
            s2 += weight * size.rows**2
            t0 += weight * size.seconds
            t1 += weight * size.seconds * size.rows
        determinant = s0 * s2 - s1 * s1
        if determinant <= 1e-9 * s0 * s2:  # the same rows, but for rounding
            return 0.0, t1 / s2, 0.0
        fixed, per_row = (t0 * s2 - t1 * s1) / determinant, (s0 * t1 - s1 * t0) / determinant
        if fixed < 0:
            return 0.0, t1 / s2, 0.0
        return (fixed, per_row, 0.0) if per_row >= 0 else (t0 / s0, 0.0, 0.0)

    def _spread(self) -> float:
        count = len(self._deviations)
        if count < _EARLY:
            return 1 + _EARLY_SPREAD
        outliers = (_OUTLIERS * count + _WINDOW // 2) // _WINDOW
        return 1 + max(_MIN_SPREAD, (sorted(self._deviations)[-1 - outliers] - 1) * _STRETCH)

    def _firm_rows(self) -> int:
        smallest = min(self._sizes)
        firm = (
            size.rows
            for bucket, size in self._sizes.items()
            if bucket > smallest and size.count >= _FIRM and self._count - size.last < _STALE
        )
        return round(max(firm, default=0))


def _bucket(rows: int) -> int:
    return rows if rows <= 8 else int(4 * math.log2(rows))
