"""The roofline of a profile: the speed of each kernel against the limits of the machine for the data that the kernel moves.

The horizontal axis is the number of multiply-adds (MACs) for each byte that a kernel reads or writes, the vertical axis the number a
second; both are logarithmic. A kernel lies below the slope (the speed of copying bytes) and below the flat roof of its precision, unless
its data lies in a cache; the gap to the roof is the possible gain of a better kernel. Slope and roof meet at the ridge; a kernel left of it
is bound by memory.
Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures", 2009. Deviations: MACs
instead of floating-point operations, and time as the area of a dot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muntin.errors import MuntinError
from muntin.reporting import text
from muntin.reporting.axes import Axis, Tick, log_ticks
from muntin.reporting.files import template
from muntin.reporting.labels import Box, Disc, Label, place_labels, printable, shortened, text_width, wrapped
from muntin.reporting.layers import Family, family_of
from muntin.reporting.profile_schema import CeilingsRecord, KernelRow, ProfileRecord, parse_profile
from muntin.text import count

# Widths of a picture: one profile, one profile on a small screen, and each of several side by side.
WIDE, NARROW, BESIDE = 920.0, 360.0, 500.0
FONT = 12.0
LINE = 17.0
_LEFT, _RIGHT, _TOP, _BETWEEN = 58.0, 14.0, 44.0, 28.0
_LARGEST, _SMALLEST = 15.0, 1.6
# Kernels show a ceiling to be too low if they exceed it by this factor and take this share of the time.
_CLEARLY, _LEAST_SHARE = 1.1, 0.05
# Largest radius of the example in the key, whose lines are as high as text.
_EXAMPLE = 6.5


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A kernel as a disc in the colour of its family, with a tooltip."""

    x: float
    y: float
    radius: float
    family: Family
    tooltip: str


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The flat part of a roof, from its ridge to the right edge, and its label, which ends at that edge.

    `used` is true where some kernel of the picture computes in its precision.
    """

    family: Family
    used: bool
    left: float
    y: float
    label: str
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Slope:
    """The part of the roof that all precisions share; `label` is '' where it is too short for one, otherwise turned by `angle` degrees."""

    start: tuple[float, float]
    end: tuple[float, float]
    label: str
    at: tuple[float, float]
    angle: float


@dataclass(frozen=True, kw_only=True)
class KeyEntry:
    """A line of the key: a disc of `radius` (0: none) in the colour of `family`, and words beside it."""

    x: float
    y: float
    radius: float
    family: Family | None
    words: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One profile in a picture, between `left` and `right`."""

    title: str
    left: float
    right: float
    x_ticks: tuple[Tick, ...]
    roofs: tuple[Roof, ...]
    slope: Slope
    dots: tuple[Dot, ...]
    labels: tuple[Label, ...]
    key: tuple[KeyEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A picture of one or more profiles on one scale; `summary` is read aloud instead of the drawing."""

    width: float
    height: float
    top: float
    bottom: float
    summary: str
    y_ticks: tuple[Tick, ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """The axes of a panel; a dot of `longest` ms has the largest radius."""

    x: Axis
    y: Axis
    longest: float

    def radius(self, ms: float) -> float:
        return round(max(_SMALLEST, _LARGEST * math.sqrt(ms / self.longest)), 2)


Profiles = ProfileRecord | Mapping[str, Any] | Sequence[ProfileRecord | Mapping[str, Any]]


def roofline_svg(profile: Profiles, *, title: str | None = None) -> str:
    """Return an SVG file of one profile, or of several side by side on one scale (before and after), each under its title.

    The file needs no other files and follows the reader's light or dark mode. Raises MuntinError where a profile does not fit the schema,
    or where there is none.
    """
    profiles = [profile] if isinstance(profile, ProfileRecord | Mapping) else list(profile)
    if not profiles:
        raise MuntinError("a roofline of no profiles: give one profile, or several to stand side by side")
    width = WIDE if len(profiles) == 1 else BESIDE * len(profiles)
    picture = roofline([parse_profile(one) for one in profiles], width=width, most_labels=6)
    return template("roofline.svg.j2").render(picture=picture, title=None if title is None else printable(title))


def roofline(profiles: Sequence[ProfileRecord], *, width: float, most_labels: int) -> Roofline:
    """Return the geometry of a picture `width` units wide, with labels for the `most_labels` slowest kernels of each profile."""
    panel = (width - _LEFT - _RIGHT - _BETWEEN * (len(profiles) - 1)) / len(profiles)
    bottom = _TOP + min(400.0, max(260.0, 0.85 * panel))
    (x_low, x_high), (y_low, y_high) = _ranges(profiles)
    y_axis = Axis(low=y_low, high=y_high, start=bottom, end=_TOP, log=True)
    longest = max([kernel.ms for profile in profiles for kernel in drawn(profile)], default=1.0)
    panels = []
    for index, profile in enumerate(profiles):
        left = _LEFT + index * (panel + _BETWEEN)
        x_axis = Axis(low=x_low, high=x_high, start=left, end=left + panel, log=True)
        panels.append(_panel(profile, _Scale(x=x_axis, y=y_axis, longest=longest), most_labels))
    return Roofline(
        width=width,
        height=max(entry.y for one in panels for entry in one.key) + 10,
        top=_TOP,
        bottom=bottom,
        summary=" ".join(map(_summary, profiles)),
        y_ticks=_ticks(y_axis),
        panels=tuple(panels),
    )


def drawn(profile: ProfileRecord) -> list[KernelRow]:
    """Return the kernels that have a place in the picture: those with multiply-adds, bytes and a measured time."""
    return [kernel for kernel in profile.kernels if kernel.macs and kernel.bytes and kernel.ms]


def memory_bound(kernel: KernelRow, ceilings: CeilingsRecord) -> bool:
    """Return whether bytes limit a kernel that multiplies: it lies left of the ridge of its precision. False where that is unknown."""
    roof = ceilings.gmacs.get(kernel.precision)
    return roof is not None and kernel.macs_per_byte is not None and kernel.macs_per_byte < roof / ceilings.copy_gb_s


def beyond(profile: ProfileRecord) -> list[KernelRow]:
    """Return kernels that multiply clearly faster than their roof: no cache explains this, so the ceiling was measured too low.

    Empty where they take so little of the time that the engine's clock may be wrong instead.
    """
    faster = [
        kernel
        for kernel in drawn(profile)
        if (roof := profile.ceilings.gmacs.get(kernel.precision)) is not None
        and (kernel.gmac_s or 0.0) > _CLEARLY * roof
        and not memory_bound(kernel, profile.ceilings)
    ]
    return faster if sum(kernel.ms for kernel in faster) > _LEAST_SHARE * profile.kernels_ms else []


def _ranges(profiles: Sequence[ProfileRecord]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of both axes, in data units, that hold all kernels and roofs."""
    kernels = [kernel for profile in profiles for kernel in drawn(profile)]
    xs = [value for kernel in kernels if (value := kernel.macs_per_byte)]
    ys = [value for kernel in kernels if (value := kernel.gmac_s)]
    # Without a roof the slope alone is drawn, as high as the kernels.
    tops = [(roof, profile) for profile in profiles for roof in profile.ceilings.gmacs.values() or [max(ys, default=1.0)]]
    roofs = [roof for roof, _ in tops]
    ridges = [roof / profile.ceilings.copy_gb_s for roof, profile in tops]
    x_range = min([*xs, min(ridges) / 4]) / 1.6, max([*xs, 4 * max(ridges)]) * 1.6
    # The room above the highest roof is for the labels of the roofs.
    return x_range, (min([*ys, min(roofs) / 6]) / 1.6, max([*ys, *roofs]) * 2.2)


def _panel(profile: ProfileRecord, scale: _Scale, most_labels: int) -> Panel:
    kernels = sorted(drawn(profile), key=lambda kernel: -kernel.ms)
    dots = [_dot(kernel, scale) for kernel in kernels]
    discs = [(dot.x, dot.y, dot.radius) for dot in dots]
    roofs = _roofs(profile.ceilings, {kernel.precision for kernel in kernels}, scale)
    slope = _slope(profile.ceilings, scale)
    left, right, top, bottom = scale.x.start, scale.x.end, scale.y.end, scale.y.start
    letters = 36 if right - left > 600 else 30 if right - left > 400 else 24
    names = [f"{_name(kernel, letters)}, {text.milliseconds(kernel.ms)}" for kernel in kernels[:most_labels]]
    return Panel(
        title=printable(profile.title),
        left=left,
        right=right,
        x_ticks=_ticks(scale.x),
        roofs=roofs,
        slope=slope,
        dots=tuple(dots),
        labels=place_labels(
            list(zip(discs, names, strict=False)),
            size=FONT,
            frame=(left + 2, top + 2, right - 2, bottom - 2),
            taken=[*_roof_boxes(roofs, right), *_slope_boxes(slope)],
            avoid=[*discs, *_line_points(roofs, slope, right)],
        ),
        key=_key(profile, scale),
    )


def _dot(kernel: KernelRow, scale: _Scale) -> Dot:
    per_byte, speed = kernel.macs_per_byte or scale.x.low, kernel.gmac_s or scale.y.low
    share = "" if kernel.ceiling_share is None else f", {text.percent(kernel.ceiling_share, 0)} of its ceiling"
    amounts = f"{text.three_digits(per_byte)} MACs a byte, {text.three_digits(speed)} GMAC/s{share}"
    return Dot(
        x=scale.x(per_byte),
        y=scale.y(speed),
        radius=scale.radius(kernel.ms),
        family=family_of(kernel.precision),
        tooltip=f"{_name(kernel, 120)}: {printable(kernel.precision)}, {text.milliseconds(kernel.ms)}, {amounts}",
    )


def _roofs(ceilings: CeilingsRecord, used: set[str], scale: _Scale) -> tuple[Roof, ...]:
    roofs, label_y = [], math.inf
    lines = sorted((scale.y(roof) for roof in ceilings.gmacs.values()), reverse=True)
    # Lowest first: a label that would lie on the label below it, or on the line of a higher roof, moves up.
    for precision, roof in sorted(ceilings.gmacs.items(), key=lambda pair: pair[1]):
        y = scale.y(roof)
        label_y = min(y - 5, label_y - FONT - 2)
        for line in lines:
            if label_y - FONT - 1 < line < label_y + 4:
                label_y = line - 5
        label = f"{printable(precision)} {text.three_digits(roof)} GMAC/s"
        left = scale.x(roof / ceilings.copy_gb_s)
        roofs.append(Roof(family=family_of(precision), used=precision in used, left=left, y=y, label=label, label_y=round(label_y, 1)))
    return tuple(roofs)


def _slope(ceilings: CeilingsRecord, scale: _Scale) -> Slope:
    rate, highest = ceilings.copy_gb_s, max(ceilings.gmacs.values(), default=scale.y.high)
    low, high = max(scale.x.low, scale.y.low / rate), min(highest / rate, scale.x.high)
    start, end = (scale.x(low), scale.y(low * rate)), (scale.x(high), scale.y(high * rate))
    across, up = end[0] - start[0], start[1] - end[1]
    length, label = math.hypot(across, up), f"{text.three_digits(rate)} GB/s"
    width = text_width(label, FONT)
    if length < width + 20:
        return Slope(start=start, end=end, label="", at=start, angle=0)
    middle = (width / 2 + 10) / length
    at = (start[0] + across * middle - 7 * up / length, start[1] - up * middle - 7 * across / length)
    angle = round(-math.degrees(math.atan2(up, across)), 1)
    return Slope(start=start, end=end, label=label, at=(round(at[0], 1), round(at[1], 1)), angle=angle)


def _roof_boxes(roofs: Sequence[Roof], right: float) -> list[Box]:
    return [(right - text_width(roof.label, FONT), roof.label_y - FONT, right, roof.label_y + 3) for roof in roofs]


def _slope_boxes(slope: Slope) -> list[Box]:
    """Return the label of the slope, which is turned, as a row of small squares."""
    half, turn = text_width(slope.label, FONT) / 2, math.radians(slope.angle)
    steps = [step / 4 * half for step in range(-4, 5)] if slope.label else []
    middles = [(slope.at[0] + step * math.cos(turn), slope.at[1] + step * math.sin(turn)) for step in steps]
    return [(x - 7, y - 7, x + 7, y + 7) for x, y in middles]


def _line_points(roofs: Sequence[Roof], slope: Slope, right: float) -> list[Disc]:
    """Return points of the lines, so that labels lie across the lines only where no other place is free."""
    lines = [(slope.start, slope.end), *(((roof.left, roof.y), (right, roof.y)) for roof in roofs)]
    parts = [part / 40 for part in range(41)]
    return [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part, 0.0) for (x0, y0), (x1, y1) in lines for part in parts]


def _key(profile: ProfileRecord, scale: _Scale) -> tuple[KeyEntry, ...]:
    entries: list[KeyEntry] = []
    left, right = scale.x.start, scale.x.end
    x, y = left, scale.y.start + 60
    for radius, family, words in _key_words(profile, scale):
        indent = max(5.0, radius) * 2 + 5 if radius else 0.0
        if x > left and x + indent + text_width(words, FONT) > right:
            x, y = left, y + LINE
        first, *more = wrapped(words, right - x - indent, FONT)
        entries.append(KeyEntry(x=round(x, 1), y=y, radius=radius, family=family, words=first))
        for line in more:
            y += LINE
            entries.append(KeyEntry(x=round(x + indent, 1), y=y, radius=0.0, family=None, words=line))
        x += indent + text_width(more[-1] if more else first, FONT) + 14
    return tuple(entries)


def _key_words(profile: ProfileRecord, scale: _Scale) -> list[tuple[float, Family | None, str]]:
    """Return radius, family and words of each entry of the key."""
    shown = drawn(profile)
    entries: list[tuple[float, Family | None, str]] = []
    for precision in dict.fromkeys([*profile.ceilings.gmacs, *(kernel.precision for kernel in shown)]):
        if own := [kernel for kernel in shown if kernel.precision == precision]:
            entries.append((5.0, family_of(precision), f"{printable(precision) or 'unknown'}: {_count_and_time(own)}"))
    if shown:
        example = _round_below(scale.longest * (_EXAMPLE / _LARGEST) ** 2)
        entries.append((scale.radius(example), None, f"the area is the time, this is {example:g} ms"))
    if without := [kernel for kernel in profile.kernels if not kernel.macs]:
        entries.append((0.0, None, f"Not drawn, no multiply-adds: {_count_and_time(without)}"))
    if unplaced := [kernel for kernel in profile.kernels if kernel.macs and not (kernel.bytes and kernel.ms)]:
        entries.append((0.0, None, f"Not drawn, time or bytes not known: {_count_and_time(unplaced)}"))
    return entries


def _round_below(value: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is not above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return power * (5 if value >= 5 * power else 2 if value >= 2 * power else 1)


def _count_and_time(kernels: Sequence[KernelRow]) -> str:
    return f"{count(len(kernels), 'kernel')}, {text.milliseconds(sum(kernel.ms for kernel in kernels))}"


def _summary(profile: ProfileRecord) -> str:
    kernels = drawn(profile)
    roofs = ", ".join(f"{printable(name)} {text.three_digits(roof)} GMAC/s" for name, roof in profile.ceilings.gmacs.items())
    copying = f"copying {text.three_digits(profile.ceilings.copy_gb_s)} GB/s"
    summary = f"Roofline of {printable(profile.title)}: roofs {roofs or 'not measured'}, {copying}"
    if not kernels:
        return f"{summary}; no kernel with multiply-adds."
    xs, ys = [kernel.macs_per_byte or 0.0 for kernel in kernels], [kernel.gmac_s or 0.0 for kernel in kernels]
    bound = sum(memory_bound(kernel, profile.ceilings) for kernel in kernels)
    return (
        f"{summary}; {_count_and_time(kernels)} with {text.three_digits(min(xs))} to {text.three_digits(max(xs))} MACs a byte at "
        f"{text.three_digits(min(ys))} to {text.three_digits(max(ys))} GMAC/s, {bound} of them bound by memory."
    )


def _name(kernel: KernelRow, limit: int) -> str:
    names = (printable(name or "") for name in (kernel.layer, kernel.name, kernel.kind))
    return shortened(next((name for name in names if name), "kernel without a name"), limit)


def _ticks(axis: Axis) -> tuple[Tick, ...]:
    """Return ticks with labels at powers of ten, on a short axis also at 2 and 5 times them; other whole multiples have no label."""
    labelled = (1,) if math.log10(axis.high / axis.low) > 2 else (1, 2, 5)
    return tuple(
        Tick(at=axis(value), label=(f"{value:,.0f}" if value >= 1 else f"{value:g}") if digit in labelled else "")
        for value, digit in log_ticks(axis.low, axis.high)
    )
