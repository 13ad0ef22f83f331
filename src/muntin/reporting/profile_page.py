"""The page of a profile: what `profile.html` tells, as values for the template. The template lays out, this module counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from muntin.reporting import text
from muntin.reporting.files import write_files
from muntin.reporting.labels import breakable
from muntin.reporting.layers import Family, family_of
from muntin.reporting.page import Pane, page_frame, percent_of
from muntin.reporting.profile_schema import Finding, KernelRow, KindRow, Profile, parse_profile, profile_values
from muntin.reporting.roofline import NARROW, WIDE, beyond, drawn, memory_bound, roofline, roofline_svg, speed
from muntin.reporting.templating import template

JSON_NAME = "profile.json"
HTML_NAME = "profile.html"
PICTURE_NAME = "roofline.svg"
MOST_WINS = 3
# As many hues as stay apart; the kinds that take least time share the grey one.
HUES = 7
REST = "kind-rest"
# Two drawings, of which CSS shows the one that fits: scaled to a telephone the wide one could not be read. Width and labels of each.
_PICTURES = {"wide": (WIDE, 6), "narrow": (NARROW, 3)}
# What a bar or a lane is drawn for: less is not to be seen.
_LEAST_SHARE = 0.0005


@dataclass(frozen=True, kw_only=True)
class KindBar:
    """The kernels of one kind: `length` is in percent of the longest bar, `inner` what the ceilings allow in percent of it."""

    name: str
    color: str
    count: str
    figure: str
    share: str
    length: float
    inner: float


@dataclass(frozen=True, kw_only=True)
class Block:
    """A kernel on the time line, in thousandths of all kernels' time."""

    start: float
    width: float
    color: str
    told: str


@dataclass(frozen=True, kw_only=True)
class TimeLane:
    """The kernels of one kind, or all of them, along the time."""

    name: str
    figure: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class TimeLine:
    """The lanes, their common axis (labels at percent of its length) and the picture in words."""

    lanes: tuple[TimeLane, ...]
    ticks: tuple[tuple[float, str], ...]
    summary: str


@dataclass(frozen=True, kw_only=True)
class KernelCells:
    """A row of the kernel table. `layer` is '' where the name holds it; `length` is in percent of the slowest kernel's time.

    `name` and `implementation` are in parts between which a line may break.
    """

    name: tuple[str, ...]
    layer: str
    kind: str
    implementation: tuple[str, ...]
    precision: str
    family: Family
    ms: str
    share: str
    length: float
    macs: str
    bytes: str
    speed: str
    ceiling: str
    bound: bool


@dataclass(frozen=True, kw_only=True)
class Win:
    """What could be won: how much, which part of the profiled time it is, and the words, in parts between which a line may break."""

    figure: str
    share: str
    words: tuple[str, ...]


def write_profile(directory: Path, profile: Profile | Mapping[str, Any]) -> Path:
    """Checks `profile`, writes `profile.json`, `profile.html` and `roofline.svg` into `directory`, returns the page's path.

    The folder is made if absent. All three are complete on the disk before any takes its name. Raises MuntinError, one line.
    """
    checked = parse_profile(profile)
    values = json.dumps(profile_values(checked), indent=1, ensure_ascii=False, allow_nan=False)
    contents = {JSON_NAME: f"{values}\n", PICTURE_NAME: roofline_svg(checked), HTML_NAME: render_profile(checked)}
    write_files(directory, contents, what="profile")
    return directory / HTML_NAME


def render_profile(profile: Profile | Mapping[str, Any]) -> str:
    """The page as text. Raises MuntinError where the profile does not fit the schema."""
    return template("profile.html.j2").render(_context(parse_profile(profile)))


def _context(profile: Profile) -> dict[str, Any]:
    parts, closing = headline_parts(profile)
    wins = [_win(finding, profile) for finding in by_gain(profile.findings)]
    return {
        **page_frame(profile, headline=" ".join([*parts, closing]).strip(), json=JSON_NAME),
        "profile": profile,
        "headline_parts": (parts, closing),
        "panes": panes(profile),
        "wins": wins[:MOST_WINS],
        "more_wins": wins[MOST_WINS:],
        "ran": _ran(profile),
        "kinds": kind_bars(profile),
        "timeless": ", ".join(f"{row.kind or '–'} ({_kernels(row.count)})" for row in profile.kinds if row.count and not row.ms),
        "between": _between(profile),
        "profiled": text.milliseconds(profile.profiled_ms),
        "measured": _measured(profile),
        "pictures": [
            (roofline([profile], width=WIDE, most_labels=6), "wide"),
            (roofline([profile], width=NARROW, most_labels=3), "narrow"),
        ],
        "drawn": len(drawn(profile)),
        "picture_name": PICTURE_NAME,
        "time_line": time_line(profile),
        "rows": kernel_rows(profile),
        "bound": _bound(profile),
        "beyond": _kernels(len(faster)) if (faster := beyond(profile)) else "",
    }


def headline_parts(profile: Profile) -> tuple[list[str], str]:
    """The latency, and how it compares with the least time that the machine's ceilings allow, unless kernels show these too low."""
    images = "an image" if profile.shape[0] == 1 else f"{profile.shape[0]} images"
    least = least_ms(profile.kernels)
    told = [f"{text.milliseconds(profile.whole_ms)} for {images} of {_size(profile)}"]
    return told, f"at {text.percent(least / profile.whole_ms, 0)} of the machine's ceiling" if least and not _doubtful(profile) else ""


def least_ms(kernels: tuple[KernelRow, ...] | list[KernelRow]) -> float:
    """Milliseconds that `kernels` would take at the ceilings; one whose ceiling is not known counts nothing."""
    return sum(kernel.attainable_ms or 0.0 for kernel in kernels)


def _doubtful(profile: Profile) -> bool:
    """Whether the ceilings were measured too low: kernels, or the whole call, are faster than they allow."""
    return bool(beyond(profile)) or least_ms(profile.kernels) > profile.whole_ms


def by_gain(findings: tuple[Finding, ...]) -> list[Finding]:
    """Findings with the largest saving first, those without a number last."""
    return sorted(findings, key=lambda finding: -1.0 if finding.saves_ms is None else finding.saves_ms, reverse=True)


def panes(profile: Profile) -> list[Pane]:
    """The large figures: latency, the same at the ceilings, the kind that takes most, the artefact's size."""
    rounds = f"median of {profile.rounds} rounds" if profile.rounds > 1 else "one round"
    found = [Pane(label="Latency", figure=text.milliseconds(profile.whole_ms), detail=f"{_size(profile)}, {rounds}")]
    least = least_ms(profile.kernels)
    if least:
        share = "more than" if least > profile.whole_ms else f"{text.percent(least / profile.whole_ms, 0)} of"
        doubt = "; the ceilings are too low" if _doubtful(profile) else ""
        found.append(Pane(label="At the ceilings", figure=text.milliseconds(least), detail=f"{share} the latency{doubt}"))
    if profile.kinds:
        first = _by_time(profile)[0]
        detail = f"{first.kind or '–'}, {text.milliseconds(first.ms)}"
        found.append(Pane(label="Takes most", figure=text.percent(first.share, 0), detail=detail))
    found.append(Pane(label="Size", figure=text.size(profile.artifact.bytes), detail=profile.artifact.path))
    return found


def kind_colors(profile: Profile) -> dict[str, str]:
    """A CSS class for each kind: a hue of its own for those whose kernels take most time, the same grey for the rest."""
    colors = dict.fromkeys((row.kind for row in profile.kinds), REST)
    with_kernels = [row.kind for row in _by_time(profile) if row.count]
    return colors | {kind: f"kind-{index}" for index, kind in enumerate(with_kernels[:HUES])}


def kind_bars(profile: Profile) -> list[KindBar]:
    """A bar a kind that takes time, the one that takes most first."""
    colors, ordered = kind_colors(profile), [row for row in _by_time(profile) if row.ms]
    longest = max((row.ms for row in ordered), default=0.0) or 1.0
    bars = []
    for row in ordered:
        least = min(row.ms, least_ms([kernel for kernel in profile.kernels if kernel.kind == row.kind]))
        bars.append(
            KindBar(
                name=row.kind or "–",
                color=colors[row.kind],
                count=_kernels(row.count) if row.count else "",
                figure=text.milliseconds(row.ms),
                share=text.percent(row.share),
                length=percent_of(row.ms, longest),
                inner=percent_of(least, row.ms),
            )
        )
    return bars


def time_line(profile: Profile) -> TimeLine | None:
    """The kernels in execution order, as wide as their time: all of them in the first lane, then a lane a kind; None without times."""
    total = sum(kernel.ms for kernel in profile.kernels)
    if not total:
        return None
    colors, start, blocks = kind_colors(profile), 0.0, []
    for kernel in profile.kernels:
        width = 1000 * kernel.ms / total
        if width:
            told = f"{kernel.layer or kernel.name or '–'}: {kernel.kind}, {text.milliseconds(kernel.ms)}, {text.percent(kernel.share)}"
            blocks.append((kernel, Block(start=round(start, 2), width=round(width, 2), color=colors[kernel.kind], told=told)))
        start += width
    lanes = [TimeLane(name="all", figure=text.milliseconds(total), blocks=tuple(block for _, block in blocks))]
    ordered = [row for row in _by_time(profile) if row.count]
    groups = [(row.kind or "–", {row.kind}) for row in ordered[:HUES]] + [("others", {row.kind for row in ordered[HUES:]})]
    for name, kinds in groups:
        own = [(kernel, block) for kernel, block in blocks if kernel.kind in kinds]
        if own and sum(kernel.ms for kernel, _ in own) >= _LEAST_SHARE * total:
            figure = text.milliseconds(sum(kernel.ms for kernel, _ in own))
            lanes.append(TimeLane(name=name, figure=figure, blocks=tuple(block for _, block in own)))
    return TimeLine(lanes=tuple(lanes), ticks=_time_ticks(total), summary=_time_summary(profile, total))


def kernel_rows(profile: Profile) -> list[KernelCells]:
    """A row a kernel, the slowest first."""
    ordered = sorted(profile.kernels, key=lambda kernel: -kernel.ms)
    return [_cells(kernel, profile, ordered[0].ms) for kernel in ordered]


def _cells(kernel: KernelRow, profile: Profile, longest: float) -> KernelCells:
    reached = speed(kernel)
    return KernelCells(
        name=breakable(kernel.name) or ("–",),
        layer="" if kernel.layer is None or kernel.layer in kernel.name else kernel.layer,
        kind=kernel.kind or "–",
        implementation=breakable(kernel.implementation) or ("–",),
        precision=kernel.precision or "–",
        family=family_of(kernel.precision),
        ms=f"{kernel.ms:,.3f}",
        share=text.percent(kernel.share) if kernel.ms else "–",
        length=percent_of(kernel.ms, longest) if longest else 0.0,
        macs=text.amount(kernel.macs) if kernel.macs else "–",
        bytes=text.size(kernel.bytes) if kernel.bytes else "–",
        speed="–" if reached is None else text.three_digits(reached),
        ceiling="–" if kernel.ceiling_share is None or not kernel.ms else text.percent(kernel.ceiling_share),
        bound=memory_bound(kernel, profile.ceilings),
    )


def _win(finding: Finding, profile: Profile) -> Win:
    if finding.saves_ms is None:
        return Win(figure="", share="", words=breakable(finding.words))
    # Findings are told of the call with counters on, as in their words; without, it is shorter.
    share = f"{text.percent(min(1.0, finding.saves_ms / profile.profiled_ms))} of the time"
    return Win(figure=f"up to {text.milliseconds(finding.saves_ms)}", share=share, words=breakable(finding.words))


def _ran(profile: Profile) -> str:
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    cores = "1 core" if profile.hardware.cores == 1 else f"{profile.hardware.cores} cores"
    return f"{profile.engine}, float layers in {profile.precision}, {threads} on {cores} of {profile.hardware.cpu}"


def _measured(profile: Profile) -> list[tuple[str, str]]:
    roofs = [(f"ceiling {name}", f"{text.three_digits(roof)} GMAC/s") for name, roof in profile.ceilings.gmacs.items()]
    copying = ("ceiling of copying", f"{text.three_digits(profile.ceilings.copy_gb_s)} GB/s")
    artifact = profile.artifact
    return [*roofs, copying, ("artefact", artifact.path), ("its size", text.size(artifact.bytes)), ("its digest", artifact.sha256[:16])]


def _by_time(profile: Profile) -> list[KindRow]:
    return sorted(profile.kinds, key=lambda row: -row.ms)


def _between(profile: Profile) -> str:
    """What of the profiled call no kernel accounts for; '' where that is nothing to speak of, or a row of the kinds already."""
    if not all(row.count for row in profile.kinds):
        return ""
    rest = profile.profiled_ms - profile.kernels_ms
    return f"{text.milliseconds(rest)} ({text.percent(rest / profile.profiled_ms)})" if rest > 0.005 * profile.profiled_ms else ""


def _bound(profile: Profile) -> str:
    bound = [kernel for kernel in profile.kernels if kernel.ms and memory_bound(kernel, profile.ceilings)]
    return f"{_kernels(len(bound))}, {text.milliseconds(sum(kernel.ms for kernel in bound))}" if bound else ""


def _time_ticks(total: float) -> tuple[tuple[float, str], ...]:
    values = [float(value) for value in MaxNLocator(nbins=5).tick_values(0.0, total) if 0 <= value <= 0.87 * total]
    return tuple((percent_of(value, total), f"{value:g} ms" if value else "0") for value in values)


def _time_summary(profile: Profile, total: float) -> str:
    parts = [f"{row.kind or '–'} {text.milliseconds(row.ms)}" for row in _by_time(profile)[:HUES] if row.count]
    return f"{_kernels(len(profile.kernels))} in the order they run, {text.milliseconds(total)} in all: {', '.join(parts)}."


def _kernels(count: int) -> str:
    return "1 kernel" if count == 1 else f"{count:,} kernels"


def _size(profile: Profile) -> str:
    return f"{profile.shape[1]} × {profile.shape[2]}"
