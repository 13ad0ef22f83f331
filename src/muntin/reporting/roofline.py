"""The roofline of a profile: how fast each kernel multiplies, against what the machine can do with the data it moves.

To the right goes how many multiply-adds (MACs) a kernel does with each byte that it reads or writes, upwards how many it does a second;
both are logarithmic. No kernel passes the slope (bytes come no faster) nor the flat roof of its precision, unless its data lies in a cache:
the gap to the roof is what a better kernel could win. Where slope and roof meet is the ridge; a kernel left of it is bound by memory.
Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures", 2009; here with MACs
instead of floating-point operations, and with time as the area of a dot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator

from muntin.errors import MuntinError
from muntin.reporting import text
from muntin.reporting.charts import Tick
from muntin.reporting.labels import Box, Disc, Label, place_labels, printable, shortened, text_width, wrapped
from muntin.reporting.layers import Family, family_of
from muntin.reporting.profile_schema import Ceilings, KernelRow, Profile, parse_profile
from muntin.reporting.templating import template

WIDE, NARROW, BESIDE = 920.0, 360.0, 500.0
FONT = 12.0
LINE = 17.0
_LEFT, _RIGHT, _TOP, _BETWEEN = 58.0, 14.0, 44.0, 28.0
_LARGEST, _SMALLEST = 15.0, 1.6
_CLEARLY, _WORTH = 1.1, 0.05
# The radius of the example in the key, at most: lines of the key are as high as text.
_EXAMPLE = 6.5


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A kernel: its colour, and what it is in words."""

    x: float
    y: float
    radius: float
    family: Family
    told: str


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The flat part of a roof, from its ridge to the right edge, and its label, whose right end is at the edge.

    `used` says that some kernel of the picture computes in its precision.
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
    """The ranges (data units) that all panels share and the pixels of a panel; a dot of `longest` ms has the largest radius."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    longest: float
    left: float
    right: float
    top: float
    bottom: float

    def x(self, value: float) -> float:
        return round(self.left + _part(value, self.x_range) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        return round(self.bottom - _part(value, self.y_range) * (self.bottom - self.top), 1)

    def radius(self, ms: float) -> float:
        return round(max(_SMALLEST, _LARGEST * math.sqrt(ms / self.longest)), 2)


Profiles = Profile | Mapping[str, Any] | Sequence[Profile | Mapping[str, Any]]


def roofline_svg(profile: Profiles, *, title: str | None = None) -> str:
    """A picture file of one profile, or of several side by side on one scale (before and after), each under its title.

    It needs nothing from outside and follows the reader's light or dark. Raises MuntinError where a profile does not fit the schema, or
    where there is none.
    """
    given = [profile] if isinstance(profile, Profile | Mapping) else list(profile)
    if not given:
        raise MuntinError("a roofline of no profiles: give one profile, or several to stand side by side")
    picture = roofline([parse_profile(one) for one in given], width=WIDE if len(given) == 1 else BESIDE * len(given), most_labels=6)
    return template("roofline.svg.j2").render(picture=picture, title=None if title is None else printable(title))


def roofline(profiles: Sequence[Profile], *, width: float, most_labels: int) -> Roofline:
    """The geometry of the picture, `width` units wide, with the slowest `most_labels` kernels of each profile labelled."""
    panel = (width - _LEFT - _RIGHT - _BETWEEN * (len(profiles) - 1)) / len(profiles)
    lefts = [_LEFT + index * (panel + _BETWEEN) for index in range(len(profiles))]
    bottom = _TOP + min(400.0, max(260.0, 0.85 * panel))
    ranges = _ranges(profiles)
    longest = max([kernel.ms for profile in profiles for kernel in drawn(profile)], default=1.0)
    scales = [
        _Scale(
            x_range=ranges[0], y_range=ranges[1], longest=longest, top=_TOP, bottom=bottom,
            left=left, right=left + panel,
        )
        for left in lefts
    ]  # fmt: skip
    panels = [_panel(profile, scale, most_labels) for profile, scale in zip(profiles, scales, strict=True)]
    return Roofline(
        width=width,
        height=max(entry.y for one in panels for entry in one.key) + 10,
        top=_TOP,
        bottom=bottom,
        summary=" ".join(map(_summary, profiles)),
        y_ticks=_ticks(ranges[1], scales[0].y),
        panels=tuple(panels),
    )


def drawn(profile: Profile) -> list[KernelRow]:
    """The kernels that have a place in the picture: with multiply-adds, bytes and a time that the engine's clock showed."""
    return [kernel for kernel in profile.kernels if kernel.macs and kernel.bytes and kernel.ms]


def intensity(kernel: KernelRow) -> float | None:
    """MACs for each byte moved; None where either is not known or zero."""
    return kernel.macs / kernel.bytes if kernel.macs and kernel.bytes else None


def speed(kernel: KernelRow) -> float | None:
    """GMAC/s; None for a kernel without multiply-adds or too quick for the engine's clock."""
    return kernel.macs / kernel.ms / 1e6 if kernel.macs and kernel.ms else None


def memory_bound(kernel: KernelRow, ceilings: Ceilings) -> bool:
    """Whether bytes limit a kernel that multiplies: it lies left of the ridge of its precision. False where that is not known."""
    roof, per_byte = ceilings.gmacs.get(kernel.precision), intensity(kernel)
    return roof is not None and per_byte is not None and per_byte < roof / ceilings.copy_gb_s


def beyond(profile: Profile) -> list[KernelRow]:
    """Kernels that multiply clearly faster than their roof, which no cache explains: the ceiling was measured too low.

    None where they take so little of the time that the clock of the engine may be what is wrong.
    """
    faster = [
        kernel
        for kernel in drawn(profile)
        if (roof := profile.ceilings.gmacs.get(kernel.precision)) is not None
        and (speed(kernel) or 0.0) > _CLEARLY * roof
        and not memory_bound(kernel, profile.ceilings)
    ]
    return faster if sum(kernel.ms for kernel in faster) > _WORTH * profile.kernels_ms else []


def _ranges(profiles: Sequence[Profile]) -> tuple[tuple[float, float], tuple[float, float]]:
    kernels = [kernel for profile in profiles for kernel in drawn(profile)]
    xs = [value for kernel in kernels if (value := intensity(kernel))]
    ys = [value for kernel in kernels if (value := speed(kernel))]
    # Without a roof the slope alone is drawn: as high as the kernels.
    tops = [(roof, profile) for profile in profiles for roof in profile.ceilings.gmacs.values() or [max(ys, default=1.0)]]
    roofs = [(roof, roof / profile.ceilings.copy_gb_s) for roof, profile in tops]
    ridges = [ridge for _, ridge in roofs]
    x_range = min([*xs, min(ridges) / 4]) / 1.6, max([*xs, 4 * max(ridges)]) * 1.6
    # Room over the highest roof for the labels of the roofs.
    return x_range, (min([*ys, min(roof for roof, _ in roofs) / 6]) / 1.6, max([*ys, *(roof for roof, _ in roofs)]) * 2.2)


def _panel(profile: Profile, scale: _Scale, most_labels: int) -> Panel:
    kernels = sorted(drawn(profile), key=lambda kernel: -kernel.ms)
    dots = [_dot(kernel, scale) for kernel in kernels]
    roofs = _roofs(profile.ceilings, {kernel.precision for kernel in kernels}, scale)
    slope = _slope(profile.ceilings, scale)
    width = scale.right - scale.left
    letters = 36 if width > 600 else 30 if width > 400 else 24
    wanted = [
        ((dot.x, dot.y, dot.radius), f"{_name(kernel, letters)}, {text.milliseconds(kernel.ms)}")
        for kernel, dot in zip(kernels[:most_labels], dots, strict=False)
    ]
    return Panel(
        title=printable(profile.title),
        left=scale.left,
        right=scale.right,
        x_ticks=_ticks(scale.x_range, scale.x),
        roofs=roofs,
        slope=slope,
        dots=tuple(dots),
        labels=place_labels(
            wanted,
            size=FONT,
            frame=(scale.left + 2, scale.top + 2, scale.right - 2, scale.bottom - 2),
            taken=[*_roof_boxes(roofs, scale), *_slope_boxes(slope)],
            avoid=[*((dot.x, dot.y, dot.radius) for dot in dots), *_along(roofs, slope, scale)],
        ),
        key=_key(profile, scale),
    )


def _dot(kernel: KernelRow, scale: _Scale) -> Dot:
    per_byte, reached = intensity(kernel) or scale.x_range[0], speed(kernel) or scale.y_range[0]
    share = "" if kernel.ceiling_share is None else f", {text.percent(kernel.ceiling_share, 0)} of its ceiling"
    amounts = f"{text.three_digits(per_byte)} MACs a byte, {text.three_digits(reached)} GMAC/s{share}"
    return Dot(
        x=scale.x(per_byte),
        y=scale.y(reached),
        radius=scale.radius(kernel.ms),
        family=family_of(kernel.precision),
        told=f"{_name(kernel, 120)}: {printable(kernel.precision)}, {text.milliseconds(kernel.ms)}, {amounts}",
    )


def _roofs(ceilings: Ceilings, used: set[str], scale: _Scale) -> tuple[Roof, ...]:
    roofs, above = [], math.inf
    lines = sorted((scale.y(roof) for roof in ceilings.gmacs.values()), reverse=True)
    # Lowest first: a label that would lie on the one below, or on the line of a higher roof, moves up.
    for precision, roof in sorted(ceilings.gmacs.items(), key=lambda pair: pair[1]):
        y = scale.y(roof)
        above = min(y - 5, above - FONT - 2)
        for line in lines:
            if above - FONT - 1 < line < above + 4:
                above = line - 5
        label = f"{printable(precision)} {text.three_digits(roof)} GMAC/s"
        left = scale.x(roof / ceilings.copy_gb_s)
        roofs.append(Roof(family=family_of(precision), used=precision in used, left=left, y=y, label=label, label_y=round(above, 1)))
    return tuple(roofs)


def _slope(ceilings: Ceilings, scale: _Scale) -> Slope:
    rate, highest = ceilings.copy_gb_s, max(ceilings.gmacs.values(), default=scale.y_range[1])
    low, high = max(scale.x_range[0], scale.y_range[0] / rate), min(highest / rate, scale.x_range[1])
    start, end = (scale.x(low), scale.y(low * rate)), (scale.x(high), scale.y(high * rate))
    across, up = end[0] - start[0], start[1] - end[1]
    length, label = math.hypot(across, up), f"{text.three_digits(rate)} GB/s"
    if length < text_width(label, FONT) + 20:
        return Slope(start=start, end=end, label="", at=start, angle=0)
    middle = (text_width(label, FONT) / 2 + 10) / length
    at = (start[0] + across * middle - 7 * up / length, start[1] - up * middle - 7 * across / length)
    return Slope(
        start=start, end=end, label=label, at=(round(at[0], 1), round(at[1], 1)), angle=round(-math.degrees(math.atan2(up, across)), 1)
    )


def _roof_boxes(roofs: Sequence[Roof], scale: _Scale) -> list[Box]:
    return [(scale.right - text_width(roof.label, FONT), roof.label_y - FONT, scale.right, roof.label_y + 3) for roof in roofs]


def _slope_boxes(slope: Slope) -> list[Box]:
    # A turned text as a row of small squares.
    half, turn = text_width(slope.label, FONT) / 2, math.radians(slope.angle)
    steps = [step / 4 * half for step in range(-4, 5)] if slope.label else []
    middles = [(slope.at[0] + step * math.cos(turn), slope.at[1] + step * math.sin(turn)) for step in steps]
    return [(x - 7, y - 7, x + 7, y + 7) for x, y in middles]


def _along(roofs: Sequence[Roof], slope: Slope, scale: _Scale) -> list[Disc]:
    """Points of the lines, so that labels lie across them only where nothing else is free."""
    lines = [(slope.start, slope.end), *(((roof.left, roof.y), (scale.right, roof.y)) for roof in roofs)]
    parts = [part / 40 for part in range(41)]
    return [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part, 0.0) for (x0, y0), (x1, y1) in lines for part in parts]


def _key(profile: Profile, scale: _Scale) -> tuple[KeyEntry, ...]:
    entries: list[KeyEntry] = []
    x, y = scale.left, scale.bottom + 60
    for radius, family, words in _key_words(profile, scale):
        indent = max(5.0, radius) * 2 + 5 if radius else 0.0
        if x > scale.left and x + indent + text_width(words, FONT) > scale.right:
            x, y = scale.left, y + LINE
        first, *more = wrapped(words, scale.right - x - indent, FONT)
        entries.append(KeyEntry(x=round(x, 1), y=y, radius=radius, family=family, words=first))
        for line in more:
            y += LINE
            entries.append(KeyEntry(x=round(x + indent, 1), y=y, radius=0.0, family=None, words=line))
        x += indent + text_width(more[-1] if more else first, FONT) + 14
    return tuple(entries)


def _key_words(profile: Profile, scale: _Scale) -> list[tuple[float, Family | None, str]]:
    shown = drawn(profile)
    words: list[tuple[float, Family | None, str]] = []
    for precision in dict.fromkeys([*profile.ceilings.gmacs, *(kernel.precision for kernel in shown)]):
        if own := [kernel for kernel in shown if kernel.precision == precision]:
            words.append((5.0, family_of(precision), f"{printable(precision) or 'unknown'}: {_amount(own)}"))
    if shown:
        example = _round_below(scale.longest * (_EXAMPLE / _LARGEST) ** 2)
        words.append((scale.radius(example), None, f"the area is the time, this is {example:g} ms"))
    without = [kernel for kernel in profile.kernels if not kernel.macs]
    if without:
        words.append((0.0, None, f"Not drawn, no multiply-adds: {_amount(without)}"))
    unplaced = [kernel for kernel in profile.kernels if kernel.macs and not (kernel.bytes and kernel.ms)]
    if unplaced:
        words.append((0.0, None, f"Not drawn, time or bytes not known: {_amount(unplaced)}"))
    return words


def _round_below(value: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return power * (5 if value >= 5 * power else 2 if value >= 2 * power else 1)


def _amount(kernels: Sequence[KernelRow]) -> str:
    noun = "kernel" if len(kernels) == 1 else "kernels"
    return f"{len(kernels)} {noun}, {text.milliseconds(sum(kernel.ms for kernel in kernels))}"


def _summary(profile: Profile) -> str:
    shown = drawn(profile)
    roofs = ", ".join(f"{printable(name)} {text.three_digits(roof)} GMAC/s" for name, roof in profile.ceilings.gmacs.items())
    copying = f"copying {text.three_digits(profile.ceilings.copy_gb_s)} GB/s"
    told = f"Roofline of {printable(profile.title)}: roofs {roofs or 'not measured'}, {copying}"
    if not shown:
        return f"{told}; no kernel with multiply-adds."
    xs, ys = [intensity(kernel) or 0.0 for kernel in shown], [speed(kernel) or 0.0 for kernel in shown]
    bound = sum(memory_bound(kernel, profile.ceilings) for kernel in shown)
    return (
        f"{told}; {_amount(shown)} with {text.three_digits(min(xs))} to {text.three_digits(max(xs))} MACs a byte at "
        f"{text.three_digits(min(ys))} to {text.three_digits(max(ys))} GMAC/s, {bound} of them bound by memory."
    )


def _name(kernel: KernelRow, limit: int) -> str:
    names = (printable(name or "") for name in (kernel.layer, kernel.name, kernel.kind))
    return shortened(next((name for name in names if name), "kernel without a name"), limit)


def _ticks(span: tuple[float, float], at: Callable[[float], float]) -> tuple[Tick, ...]:
    """Decades with a label (in a short span 2 and 5 times them too); the other whole multiples are lines without one."""
    decades = math.log10(span[1] / span[0])
    labelled = (1,) if decades > 2 else (1, 2, 5)
    ticks = []
    for value in map(float, LogLocator(subs=range(1, 10), numticks=20 + math.ceil(decades)).tick_values(*span)):
        if span[0] <= value <= span[1]:
            told = round(value / 10 ** math.floor(math.log10(value) + 1e-9)) in labelled
            ticks.append(Tick(at=at(value), label=(f"{value:,.0f}" if value >= 1 else f"{value:g}") if told else ""))
    return tuple(ticks)


def _part(value: float, span: tuple[float, float]) -> float:
    return math.log(value / span[0]) / math.log(span[1] / span[0])
