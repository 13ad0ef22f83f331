"""How numbers read: sizes, times, ratios and the sentence at the top of a report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from math import floor, log10

from muntin.artifact.manifest import Task
from muntin.reporting.records import Hardware
from muntin.reporting.schema import Report, Step

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
UNCHANGED = "unchanged"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What the field `miou` holds for a task: its name, the name of its per-class part, its unit and its digits."""

    name: str
    each: str
    unit: str
    digits: int

    def __call__(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit}".replace("-", MINUS)


METRICS: dict[Task, Metric] = {
    "segment": Metric(name="mIoU", each="IoU", unit="", digits=3),
    "classify": Metric(name="accuracy", each="recall", unit="", digits=3),
    "restore": Metric(name="PSNR", each="PSNR", unit=" dB", digits=2),
}


def size(count: int | None) -> str:
    """Bytes in decimal units: 4100000 -> '4.1 MB'; a dash for None."""
    if count is None:
        return "–"
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{three_digits(value)} {unit}"


def amount(value: float) -> str:
    """A count in short: 2812346 -> '2.81 M', 831 -> '831'."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit * 0.9995:
            return f"{value / limit:.{0 if value / limit >= 99.95 else 1 if value / limit >= 9.995 else 2}f}{unit}"
    return f"{value:.0f}"


def gmacs(value: float) -> str:
    """Billions of multiply-accumulates: 3.114 -> '3.11', 0.00176 -> '0.0018'; two digits of it, however few they are."""
    return f"{value:.2f}" if value >= 0.0995 or value == 0 else f"{value:.{1 - floor(log10(value))}f}"


def milliseconds(value: float) -> str:
    """Milliseconds: 41.23 -> '41.2 ms', 0.345 -> '0.34 ms', 1786.2 -> '1,786 ms'."""
    return f"{three_digits(value)} ms"


def duration(seconds: float) -> str:
    """Seconds a person reads: 133.2 -> '2 min 13 s'."""
    if seconds < 60:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage, never rounded to all or nothing: 0.9997 -> '99.9 %', 0.0002 -> '< 0.1 %'."""
    scale = 10 ** (digits + 2)
    shown = round(share * scale) / scale
    if shown >= 1 > share:
        shown = 1 - 1 / scale
    if shown <= 0 < share:
        return f"< {100 / scale:.{digits}f} %"
    return f"{100 * shown:.{0 if shown in (0, 1) else digits}f} %"


def change(first: float, now: float, digits: int) -> str:
    """A signed difference: (0.651, 0.649, 3) -> '−0.002'."""
    text = f"{now - first:+.{digits}f}".replace("-", MINUS)
    return f"±{text[1:]}" if not text.strip(f"+{MINUS}0.") else text


def ratio(first: float | None, now: float | None, *, less: str, more: str) -> str | None:
    """How much `now` lowers `first`: (4.1, 1.1) -> '3.7× smaller'; None where either was not measured or is zero."""
    if not first or not now:
        return None
    factor, word = (first / now, less) if now <= first else (now / first, more)
    if factor < 1.005:
        return UNCHANGED
    return f"{_ratio_digits(factor)}× {word}"


def moment(iso: str) -> str:
    """An ISO moment for a person: '24 November 2026, 16:30 UTC'."""
    when = datetime.fromisoformat(iso)
    zone = "" if when.tzinfo is None else f" {when:%Z}"
    return f"{when.day} {when:%B %Y}, {when:%H:%M}{zone}"


def machine_facts(hardware: Hardware, muntin: str) -> list[tuple[str, str]]:
    """The machine and the versions as names with values, for the end of a page; what is not known is left out."""
    facts = [("CPU", hardware.cpu), ("cores", str(hardware.cores))]
    if hardware.memory_gib is not None:
        facts.append(("memory", f"{hardware.memory_gib:.1f} GiB"))
    if hardware.features:
        facts.append(("features", ", ".join(hardware.features)))
    facts.append(("muntin", muntin))
    for name, value in (hardware.model_extra or {}).items():
        if value is not None:
            facts.append((name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return facts


def headline(report: Report) -> str:
    """The report in one sentence, computed from its first and last steps."""
    parts, closing = headline_parts(report)
    return f"{', '.join(parts)}: {closing}" if closing else ", ".join(parts)


def headline_parts(report: Report) -> tuple[list[str], str]:
    """The figures of the headline, and how it closes: where they were measured, if that is the deployed artefact."""
    first, last = report.steps[0], report.steps[-1]
    metric = METRICS[report.task]
    parts = [_pair(size(first.bytes), size(last.bytes), first, last)]
    if first.latency_ms is not None and last.latency_ms is not None:
        parts.append(_pair(milliseconds(first.latency_ms), milliseconds(last.latency_ms), first, last))
    parts.append(f"{metric.name} {_pair(metric(first.miou), metric(last.miou), first, last)}")
    return parts, "measured on the deployed artefact" if last.name == "deployed" else ""


def three_digits(value: float) -> str:
    """About three significant digits: more would promise a precision that timings on a shared machine do not have."""
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 0.995 else 2}f}"


def _pair(first: str, last: str, first_step: Step, last_step: Step) -> str:
    return first if first_step is last_step else f"{first} {ARROW} {last}"


def _ratio_digits(factor: float) -> str:
    return f"{factor:,.{0 if factor >= 99.5 else 1 if factor >= 1.95 else 2}f}"
