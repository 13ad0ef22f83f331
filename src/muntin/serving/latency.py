"""What a batch of n rows takes, learned from the batches that finished.

A group's latency is a line, fixed + each * n, through one remembered figure for each size of batch that was seen (sizes above eight share
buckets, a quarter of an octave wide): a machine that ran full batches for an hour still knows what a lone row takes.

Two things change. The machine becomes faster or slower, at once and for every size: another process, a lower clock. So a batch moves the
figures of all sizes, by a sixteenth of its own deviation, and its deviation counts as a quarter at most: one hiccup, however long, moves
them by a sixty-fourth. When the median deviation of the last nine batches is a fifth, that is no hiccup, and all figures jump by it. The
proportion of one size to another is the engine's and lasts: a batch moves its own size's share of it eight times more slowly, so that
sizes which are not seen keep their proportion to those that are.

What may be promised is `safe`: the line times the spread of the last 128 batches around it, their 97th percentile stretched to the 99th as
for a normal distribution. Three hiccups among 128 batches therefore do not count, a fourth does.

Nothing here knows a clock or a lock. Observing costs some 20 µs.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import NamedTuple

from muntin.serving.window import Window

GROUPS = 128
"""Groups that are remembered; the one that was not used for the longest time goes first."""
_WINDOW = 128  # deviations that the spread is taken from
_OUTLIERS = 4  # of a full window, the largest that do not count: 97th percentile
_STRETCH = 1.24  # from the 97th to the 99th percentile of a normal distribution: 2.33 / 1.88
_RECENT = 9  # batches whose median says whether the machine changed
_SHIFT, _CLIP = 0.2, 0.25
_GAIN, _OWN_GAIN = 1 / 16, 1 / 128  # of one batch, in the figures of all sizes and in those of its own
_ROUGH, _EARLY = 8, 16  # batches that the line is still too rough for, and before which a percentile means nothing
_LEAST_SPREAD, _EARLY_SPREAD = 0.03, 0.15
_SETTLED = 4  # batches after which a size's own figure is what the next one is held against
_FORGET, _FADED = 1024, 0.02  # batches after which a size that is not seen any more counts for no more than this
_FIRM, _STALE = 8, 512  # see `Line.firm`: batches of a larger size, and how many batches ago at most
_LEAST, _MOST = 1e-9, 1e9  # s
_ANY = 1 << 30  # rows, where their number makes no difference
_RELIABLE = 2  # batches from which on a line is more than what a first call, which may have compiled, says
OVERDUE_S, OVERDUE = 10.0, 20
"""Seconds, and times its safe ones if those are more, after which a batch counts as one that does not come back: short of memory it may be
computed twice, and in tiles, and a machine may stand still for seconds."""
OVERDUE_UNKNOWN_S = 120.0
"""The same where next to nothing was measured: a first call may compile."""


class Line(NamedTuple):
    """Seconds of a batch of n rows: at least `least`, otherwise `fixed` + `each` * n. `spread` >= 1 leads to what may be promised.

    `largest`: rows of the largest batch that this rests on; beyond it the line is a guess. `seen`: how many batches it rests on.
    `firm`: rows of the largest batches that were seen often enough, and lately enough, to tell what they gain over smaller ones; 0: none.
    """

    fixed: float
    each: float
    least: float
    spread: float
    largest: int
    seen: int
    firm: int
    guessed: bool = False
    """Whether it is another group's, scaled."""

    def expected(self, rows: int) -> float:
        """Seconds that a batch takes as a rule."""
        seconds = self.fixed + self.each * rows
        return seconds if seconds > self.least else self.least

    def safe(self, rows: int) -> float:
        """Seconds that about 99 of 100 batches keep, as far as recent ones tell."""
        return self.expected(rows) * self.spread

    def overdue(self, rows: int) -> float:
        """Seconds after which a batch counts as one that does not come back."""
        if self.seen < _RELIABLE:
            return OVERDUE_UNKNOWN_S
        return max(OVERDUE_UNKNOWN_S if self.guessed else OVERDUE_S, OVERDUE * self.safe(rows))

    def rows_within(self, seconds: float) -> int:
        """The most rows whose `safe` seconds are within these; 0 where not even one is."""
        left = seconds / self.spread
        if left < self.least or left < self.fixed + self.each:
            return 0
        return int((left - self.fixed) / self.each) if left < self.fixed + self.each * _ANY else _ANY

    def scaled(self, factor: float) -> Line:
        """The line of a machine that is this many times slower."""
        return self._replace(fixed=self.fixed * factor, each=self.each * factor, least=self.least * factor)


UNKNOWN = Line(0.0, 0.0, 0.0, 1.0, 0, 0, 0)


class LatencyModel:
    """Latency of batches by group and rows. At most `groups` groups and, for each, a bounded number of samples are kept.

    A `cost` is what a row of a group costs in comparison with a row of another, in any unit (pixels, for pictures). It gives a group that
    was never measured the figures of the measured group whose cost is nearest, scaled by the quotient of the costs.
    """

    def __init__(self, *, groups: int = GROUPS) -> None:
        if groups < 1:
            raise ValueError(f"groups={groups}: at least 1 must be remembered")
        self._limit = groups
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def observe(self, group: Hashable, rows: int, seconds: float, *, cost: float | None = None) -> None:
        """Learns from one finished batch; below a nanosecond it counts as that. Raises `ValueError` for less than one row, and for no time
        or more than 30 years of it."""
        if rows < 1 or not 0 < seconds < _MOST:
            raise ValueError(f"rows={rows}, seconds={seconds}: a finished batch has at least 1 row and took a positive, sensible time")
        seconds = max(seconds, _LEAST)
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = _Group()
            if len(self._groups) > self._limit:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(group)
        if cost is not None:
            found.cost = cost
        found.observe(rows, seconds)

    def line(self, group: Hashable, *, cost: float | None = None) -> Line | None:
        """What is known of a group: its own line, else by `cost` that of another, else None.

        Of one batch alone its own line says little: until the second it is that of another group of the same cost, if there is one.
        """
        found = self._groups.get(group)
        if found is not None and (found.line.seen >= _RELIABLE or cost is None):
            return found.line
        near = None if cost is None else self._nearest(cost, but=found)
        return near if found is None or (near is not None and not near.guessed and near.seen >= _RELIABLE) else found.line

    def expected(self, group: Hashable, rows: int, *, cost: float | None = None) -> float | None:
        """Seconds that a batch takes as a rule; None where nothing is known."""
        line = self.line(group, cost=cost)
        return None if line is None else line.expected(rows)

    def safe(self, group: Hashable, rows: int, *, cost: float | None = None) -> float | None:
        """Seconds that may be promised for a batch; None where nothing is known."""
        line = self.line(group, cost=cost)
        return None if line is None else line.safe(rows)

    def _nearest(self, cost: float, *, but: _Group | None) -> Line | None:
        """The line of the group with the nearest cost, scaled to this one; of several the one that was used last."""
        best, distance = None, math.inf
        for found in self._groups.values():
            if found is not but and found.cost is not None and cost > 0 < found.cost:
                apart = abs(math.log(cost / found.cost))
                if apart <= distance:
                    best, distance = found, apart
        if best is None or best.cost is None:
            return None
        line = best.line.scaled(cost / best.cost)
        return line if cost == best.cost else line._replace(guessed=True)  # images of one size take as long in two versions


class _Size:
    """One size of batch: mean rows and seconds, how many were seen and which was the last."""

    __slots__ = ("_early", "count", "last", "rows", "seconds")

    def __init__(self, rows: int, seconds: float) -> None:
        self.rows, self.seconds = float(rows), seconds
        self.count = self.last = 0
        self._early: list[float] = []

    def add(self, rows: int, seconds: float, number: int) -> None:
        """Counts batch `number` of the group."""
        self.count += 1
        self.last = number
        gain = max(_OWN_GAIN, 1 / self.count)
        self.rows += (rows - self.rows) * gain
        if self.count <= _SETTLED:  # the lower median: the first may have compiled
            insort(self._early, seconds)
            self.seconds = self._early[(self.count - 1) // 2]
            return
        least, most = self.seconds * (1 - _CLIP), self.seconds * (1 + _CLIP)
        self.seconds += (min(max(seconds, least), most) - self.seconds) * gain

    def scale(self, factor: float) -> None:
        self.seconds = min(max(self.seconds * factor, _LEAST), _MOST)
        if self.count < _SETTLED:
            self._early = [seconds * factor for seconds in self._early]


class _Group:
    """What is remembered of one group; `line` is what it comes to, renewed by every batch."""

    __slots__ = ("_count", "_deviations", "_largest", "_recent", "_sizes", "cost", "line")

    def __init__(self) -> None:
        self.cost: float | None = None
        self.line = UNKNOWN
        self._count = 0
        self._largest = 0
        self._sizes: dict[int, _Size] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # rows, seconds
        self._deviations = Window(_WINDOW)  # seconds / line

    def observe(self, rows: int, seconds: float) -> None:
        self._count += 1
        self._largest = max(self._largest, rows)
        size = self._sizes.get(_key(rows))
        if size is None:  # nothing to hold it against but a guess
            size = self._sizes[_key(rows)] = _Size(rows, seconds)
        else:
            self._follow(size, rows, seconds)
        size.add(rows, seconds, self._count)
        fixed, each, least = self._fit()
        self.line = Line(fixed, each, least, self._spread(), self._largest, self._count, self._firm())

    def _follow(self, size: _Size, rows: int, seconds: float) -> None:
        """Moves the figures of all sizes, and puts the deviation from the line into the window of the spread."""
        self._recent.append((rows, seconds))
        deviation = seconds / self._reference(rows) - 1
        if abs(deviation) > _SHIFT and abs((median := self._median()) - 1) > _SHIFT:
            self._scale(median)
            self._renew(median)
            return
        if self._count > _ROUGH:
            self._deviations.add(seconds / self.line.expected(rows))
        if size.count >= _SETTLED:  # before that, the line may be to blame
            self._scale(1 + min(max(deviation, -_CLIP), _CLIP) * _GAIN)

    def _median(self) -> float:
        """Of what the last few batches deviate. One or two say nothing unless they are faster: then the first call of all compiled."""
        deviations = sorted(seconds / self._reference(rows) for rows, seconds in self._recent)
        median = deviations[(len(deviations) - 1) // 2]
        return median if len(deviations) > 2 else min(median, 1.0)

    def _reference(self, rows: int) -> float:
        """Seconds to hold a batch against: its own size's, where enough of it were seen, so that a crooked line does not pass for speed."""
        size = self._sizes.get(_key(rows))
        if size is None or size.count < _SETTLED:
            return self.line.expected(rows)
        return size.seconds * self.line.expected(rows) / (self.line.fixed + self.line.each * size.rows)

    def _scale(self, factor: float) -> None:
        for size in self._sizes.values():
            size.scale(factor)

    def _renew(self, factor: float) -> None:
        """After a jump: what the last batches deviate by now, so that the jump itself does not count as spread."""
        self._deviations.drop(len(self._recent) - 1)
        if self._count > _ROUGH:
            for rows, seconds in self._recent:
                self._deviations.add(seconds / (self.line.expected(rows) * factor))

    def _fit(self) -> tuple[float, float, float]:
        """The line of the least relative error through the sizes, with neither part below 0: `fixed`, `each`, `least`."""
        if len(self._sizes) == 1:
            (only,) = self._sizes.values()
            # A single size says nothing of the fixed part: smaller batches are taken to be as slow, larger ones to gain nothing.
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
        fixed, each = (t0 * s2 - t1 * s1) / determinant, (s0 * t1 - s1 * t0) / determinant
        if fixed < 0:
            return 0.0, t1 / s2, 0.0
        return (fixed, each, 0.0) if each >= 0 else (t0 / s0, 0.0, 0.0)

    def _spread(self) -> float:
        count = len(self._deviations)
        if count < _EARLY:
            return 1 + _EARLY_SPREAD
        outliers = (_OUTLIERS * count + _WINDOW // 2) // _WINDOW
        return 1 + max(_LEAST_SPREAD, (self._deviations.largest(outliers) - 1) * _STRETCH)

    def _firm(self) -> int:
        smallest = min(self._sizes)
        enough = (size.rows for key, size in self._sizes.items() if key > smallest and self._is_firm(size))
        return round(max(enough, default=0))

    def _is_firm(self, size: _Size) -> bool:
        return size.count >= _FIRM and self._count - size.last < _STALE


def _key(rows: int) -> int:
    """Of the bucket that a size falls into."""
    return rows if rows <= 8 else int(4 * math.log2(rows))
