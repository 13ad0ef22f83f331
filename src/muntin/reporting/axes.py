"""Axes of charts: ticks at round values, and the mapping from data to coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Steps between ticks, as multiples of a power of ten.
_STEPS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15)
# A range far from zero has its ticks counted from an offset, a power of ten: when its middle is this many times its length.
_OFFSET_FROM = 100
# Relative length below which a range counts as a single point, and the share of its values by which it is then widened.
_POINT, _WIDENED = 1e-14, 1e-13


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis: its coordinate and its label ('' for a line without one)."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps data values from `low` to `high` to coordinates from `start` to `end`, linearly or by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of `value`, rounded to a tenth."""
        distance, length = value - self.low, self.high - self.low
        if self.log:
            distance, length = math.log(value / self.low), math.log(self.high / self.low)
        return round(self.start + distance / length * (self.end - self.start), 1)

    def ticks(self, values: Iterable[float], label: Callable[[float], str]) -> tuple[Tick, ...]:
        """Return a tick for each of `values` that lies between `low` and `high`."""
        return tuple(Tick(at=self(value), label=label(value)) for value in values if self.low <= value <= self.high)


def linear_ticks(low: float, high: float, intervals: int, *, integer: bool = False) -> list[float]:
    """Return round values at equal distances that cover `low` to `high`, with at most `intervals` of their steps inside.

    The first and the last value lie on the ends or just outside. `integer` takes ends that are integers and returns only integers.
    The rule is that of matplotlib's MaxNLocator.
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(_POINT * largest, 1e-290):
        margin = max(_WIDENED * largest, 1e-280)
        low, high = low - margin, high + margin
    length, middle = high - low, (low + high) / 2
    offset = 0.0 if abs(middle) / length < _OFFSET_FROM else math.copysign(_power_of_ten(abs(middle)), middle)
    low, high = low - offset, high - offset
    power = _power_of_ten(length / intervals)
    steps = [multiple * power for multiple in _STEPS]
    if integer:
        steps = [max(step, 1.0) for step in steps if step < 1 or step.is_integer()]
    step = next((step for step in steps if step >= (high - low) / intervals), steps[-1])
    first = (low // step) * step
    # Ends that miss a tick by a rounding error count as lying on it; a large offset makes that error larger.
    error = min(0.4999, max(1e-10, 1e-12 * abs(offset) / step))
    indices = range(math.floor((low - first) / step + error), math.ceil((high - first) / step - error) + 1)
    return [index * step + first + offset for index in indices]


def log_ticks(low: float, high: float) -> list[tuple[float, int]]:
    """Return the whole multiples of powers of ten from `low` to `high`, each with its leading digit (1 to 9)."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    multiples = [(digit * 10.0**power, digit) for power in powers for digit in range(1, 10)]
    return [(value, digit) for value, digit in multiples if low <= value <= high]


def _power_of_ten(value: float) -> float:
    """Return the largest power of ten that is not above `value`."""
    return float(10 ** (math.log10(value) // 1))
