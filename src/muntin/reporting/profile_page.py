"""The page of a profile: its files, and the values that the template `profile.html.j2` lays out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muntin.reporting import text
from muntin.reporting.axes import linear_ticks
from muntin.reporting.files import json_text, template, write_files
from muntin.reporting.layers import Segment, segments
from muntin.reporting.page import Pane
from muntin.reporting.profile_schema import FindingRecord, KernelRow, KindRow, ProfileRecord, parse_profile
from muntin.reporting.roofline import NARROW, WIDE, beyond, drawn, memory_bound, roofline, roofline_svg
from muntin.text import count

JSON_NAME = "profile.json"
HTML_NAME = "profile.html"
PICTURE_NAME = "roofline.svg"
MOST_FINDINGS = 3
# The number of hues that are easy to tell apart; the kinds that take least time share a grey.
HUES = 7
REST = "kind-rest"
# Two drawings, of which CSS shows the one that fits the screen: CSS class, width and number of labels.
_PICTURES = (("wide", WIDE, 6), ("narrow", NARROW, 3))
# A lane of a smaller share of the time is not drawn.
_LEAST_SHARE = 0.0005
# Time between kernels below this share of the call is not mentioned.
_LEAST_BETWEEN = 0.005
# Ticks beyond this share of the axis would run into its end.
_LAST_TICK = 0.87


@dataclass(frozen=True, kw_only=True)
class KindBar:
    """The kernels of one kind: `length` is in percent of the longest bar, `inner` the time at the ceilings in percent of the bar."""

    row: KindRow
    style: str
    length: float
    inner: float


@dataclass(frozen=True, kw_only=True)
class TimeLane:
    """The kernels of one kind, or all kernels, along the time."""

    name: str
    figure: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class TimeLine:
    """The lanes, their common axis (labels at percent of its length) and the picture in words."""

    lanes: tuple[TimeLane, ...]
    ticks: tuple[tuple[float, str], ...]
    summary: str


def write_profile(directory: Path, profile: ProfileRecord | Mapping[str, Any]) -> Path:
    """Check `profile`, write `profile.json`, `profile.html` and `roofline.svg` into `directory`, and return the page's path.

    The folder is created if absent. All three are complete on the disk before any takes its name. Raises MuntinError, one line.
    """
    checked = parse_profile(profile)
    contents = {
        JSON_NAME: json_text(checked.model_dump(mode="json")),
        PICTURE_NAME: roofline_svg(checked),
        HTML_NAME: render_profile(checked),
    }
    write_files(directory, contents, what="profile")
    return directory / HTML_NAME


def render_profile(profile: ProfileRecord | Mapping[str, Any]) -> str:
    """Return the page as text. Raises MuntinError where the profile does not fit the schema."""
    return template("profile.html.j2").render(_context(parse_profile(profile)))


def _context(profile: ProfileRecord) -> dict[str, Any]:
    parts, closing = headline_parts(profile)
    findings = by_saving(profile.findings)
    faster = beyond(profile)
    bound = [kernel for kernel in profile.kernels if kernel.ms and memory_bound(kernel, profile.ceilings)]
    return {
        "record": profile,
        "profile": profile,
        "json_name": JSON_NAME,
        "headline": " ".join([*parts, closing]).strip(),
        "headline_parts": (parts, closing),
        "panes": panes(profile),
        "findings": findings[:MOST_FINDINGS],
        "more_findings": findings[MOST_FINDINGS:],
        "ran": _ran(profile),
        "kinds": kind_bars(profile),
        "timeless": ", ".join(f"{row.kind or text.DASH} ({count_kernels(row.count)})" for row in profile.kinds if row.count and not row.ms),
        "between": _between(profile),
        "measured": _measured(profile),
        "pictures": [(roofline([profile], width=width, most_labels=labels), style) for style, width, labels in _PICTURES],
        "drawn": bool(drawn(profile)),
        "picture_name": PICTURE_NAME,
        "time_line": time_line(profile),
        "kernels": sorted(profile.kernels, key=lambda kernel: -kernel.ms),
        "count_kernels": count_kernels,
        "memory_bound": memory_bound,
        "bound": f"{count_kernels(len(bound))}, {text.milliseconds(_sum_ms(bound))}" if bound else "",
        "beyond": count_kernels(len(faster)) if faster else "",
    }


def headline_parts(profile: ProfileRecord) -> tuple[list[str], str]:
    """Return the latency, and the share of it that the ceilings allow.

    The latter is '' where kernels show the ceilings to be too low, or other processes used the CPUs.
    """
    least = least_ms(profile.kernels)
    latency = f"{text.milliseconds(profile.whole_ms)} for {_inputs(profile)}"
    if profile.disturbed:
        return [f"{latency} ({text.BESIDE})"], ""
    return [latency], f"at {text.percent(least / profile.whole_ms, 0)} of the machine's ceiling" if least and not _doubtful(profile) else ""


def least_ms(kernels: Iterable[KernelRow]) -> float:
    """Return the milliseconds that `kernels` would take at the ceilings; a kernel with an unknown ceiling counts as 0."""
    return sum(kernel.attainable_ms or 0.0 for kernel in kernels)


def by_saving(findings: Iterable[FindingRecord]) -> list[FindingRecord]:
    """Return findings with the largest saving first and those without a number last."""
    return sorted(findings, key=lambda finding: -1.0 if finding.saves_ms is None else finding.saves_ms, reverse=True)


def panes(profile: ProfileRecord) -> list[Pane]:
    """Return the large figures: latency, latency at the ceilings, the kind that takes most time, the artefact's size."""
    rounds = f"median of {profile.rounds} rounds" if profile.rounds > 1 else "one round"
    figures = [Pane(label="Latency", figure=text.milliseconds(profile.whole_ms), detail=f"{_size(profile)}, {rounds}")]
    least = least_ms(profile.kernels)
    if least:
        share = "more than" if least > profile.whole_ms else f"{text.percent(least / profile.whole_ms, 0)} of"
        doubt = "; the ceilings are too low" if _doubtful(profile) else ""
        figures.append(Pane(label="At the ceilings", figure=text.milliseconds(least), detail=f"{share} the latency{doubt}"))
    if profile.kinds:
        first = _by_time(profile)[0]
        detail = f"{first.kind or text.DASH}, {text.milliseconds(first.ms)}"
        figures.append(Pane(label="Takes most", figure=text.percent(first.share, 0), detail=detail))
    figures.append(Pane(label="Size", figure=text.size(profile.artifact.bytes), detail=profile.artifact.path))
    return figures


def kind_styles(profile: ProfileRecord) -> dict[str, str]:
    """Return a CSS class for each kind: a separate hue for those whose kernels take most time, one grey for the rest."""
    styles = dict.fromkeys((row.kind for row in profile.kinds), REST)
    with_kernels = [row.kind for row in _by_time(profile) if row.count]
    return styles | {kind: f"kind-{index}" for index, kind in enumerate(with_kernels[:HUES])}


def kind_bars(profile: ProfileRecord) -> list[KindBar]:
    """Return a bar for each kind that takes time, the slowest kind first."""
    styles, ordered = kind_styles(profile), [row for row in _by_time(profile) if row.ms]
    bars = []
    for row in ordered:
        least = min(row.ms, least_ms(kernel for kernel in profile.kernels if kernel.kind == row.kind))
        length, inner = text.percent_of(row.ms, ordered[0].ms), text.percent_of(least, row.ms)
        bars.append(KindBar(row=row, style=styles[row.kind], length=length, inner=inner))
    return bars


def time_line(profile: ProfileRecord) -> TimeLine | None:
    """Return the kernels in execution order, as wide as their time: a lane of all, then a lane a kind. None without times."""
    total = _sum_ms(profile.kernels)
    if not total:
        return None
    styles = kind_styles(profile)
    blocks = segments([(kernel.ms, styles[kernel.kind], _tooltip(kernel)) for kernel in profile.kernels], total)
    lanes = [TimeLane(name="all", figure=text.milliseconds(total), segments=blocks)]
    hues = [(row.kind or text.DASH, styles[row.kind]) for row in _by_time(profile) if styles[row.kind] != REST]
    for name, style in [*hues, ("others", REST)]:
        own = tuple(block for block in blocks if block.style == style)
        ms = _sum_ms(kernel for kernel in profile.kernels if styles[kernel.kind] == style)
        if own and ms >= _LEAST_SHARE * total:
            lanes.append(TimeLane(name=name, figure=text.milliseconds(ms), segments=own))
    ticks = [value for value in linear_ticks(0.0, total, 5) if 0 <= value <= _LAST_TICK * total]
    kinds = ", ".join(f"{row.kind or text.DASH} {text.milliseconds(row.ms)}" for row in _by_time(profile)[:HUES] if row.count)
    return TimeLine(
        lanes=tuple(lanes),
        ticks=tuple((text.percent_of(value, total), f"{value:g} ms" if value else "0") for value in ticks),
        summary=f"{count_kernels(len(profile.kernels))} in the order they run, {text.milliseconds(total)} in all: {kinds}.",
    )


def count_kernels(number: int) -> str:
    """Return a number of kernels in words."""
    return "1 kernel" if number == 1 else f"{number:,} kernels"


def _doubtful(profile: ProfileRecord) -> bool:
    """Return whether the ceilings were measured too low: kernels, or the whole call, are faster than they allow."""
    return bool(beyond(profile)) or least_ms(profile.kernels) > profile.whole_ms


def _tooltip(kernel: KernelRow) -> str:
    name = kernel.layer or kernel.name or text.DASH
    return f"{name}: {kernel.kind}, {text.milliseconds(kernel.ms)}, {text.percent(kernel.share)}"


def _ran(profile: ProfileRecord) -> str:
    threads, cores = count(profile.threads, "thread"), count(profile.hardware.cores, "core")
    return f"{profile.engine}, float layers in {profile.precision}, {threads} on {cores} of {profile.hardware.cpu}"


def _measured(profile: ProfileRecord) -> list[tuple[str, str]]:
    roofs = [(f"ceiling {name}", f"{text.three_digits(roof)} GMAC/s") for name, roof in profile.ceilings.gmacs.items()]
    copying = ("ceiling of copying", f"{text.three_digits(profile.ceilings.copy_gb_s)} GB/s")
    artifact = profile.artifact
    return [*roofs, copying, ("artefact", artifact.path), ("its size", text.size(artifact.bytes)), ("its digest", artifact.sha256[:16])]


def _by_time(profile: ProfileRecord) -> list[KindRow]:
    return sorted(profile.kinds, key=lambda row: -row.ms)


def _between(profile: ProfileRecord) -> str:
    """Return the time of the profiled call between kernels; '' where it is negligible, or already a row of the kinds."""
    if not all(row.count for row in profile.kinds):
        return ""
    rest = profile.profiled_ms - profile.kernels_ms
    share = rest / profile.profiled_ms
    return f"{text.milliseconds(rest)} ({text.percent(share)})" if share > _LEAST_BETWEEN else ""


def _sum_ms(kernels: Iterable[KernelRow]) -> float:
    return sum(kernel.ms for kernel in kernels)


def _inputs(profile: ProfileRecord) -> str:
    if profile.shape is None:
        return _size(profile)
    images = "an image" if profile.shape[0] == 1 else f"{profile.shape[0]} images"
    return f"{images} of {_size(profile)}"


def _size(profile: ProfileRecord) -> str:
    if profile.shape is not None:
        return f"{profile.shape[1]} × {profile.shape[2]}"
    return ", ".join(f"{name} {size}" for name, size in (profile.dims or {}).items()) or "the only size"
