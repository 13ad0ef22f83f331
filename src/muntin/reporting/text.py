"""How values read in reports: sizes, times, ratios, lengths of bars, and the sentence at the top."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import datetime
from math import floor, log10

from muntin.artifact.answers import ANSWERS, ScoreFormat, Task
from muntin.artifact.classes import ClassInfo
from muntin.reporting.records import Hardware
from muntin.reporting.schema import Report

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
UNCHANGED = "unchanged"
# Shown in place of a value that was not measured.
DASH = "–"
# Shown beside a latency, in place of its ratio, where `LatencyRecord.disturbed`.
BESIDE = "beside other work"
_UNIT = re.compile(r"(?<=\d) (?=[A-Za-z%])")


@dataclass(frozen=True, kw_only=True)
class Metric(ScoreFormat):
    """The metric that the field `miou` holds for a task."""

    @property
    def unit_after(self) -> str:
        """The unit with what sets it off from a name: ' (dB)', or ''."""
        return self.unit and f" ({self.unit.strip()})"

    def exact(self, value: float) -> str:
        """Return `value` for the terminal: one digit more than elsewhere, or two of dB."""
        return f"{value:.{self.digits if self.unit else self.digits + 1}f}{self.unit}"

    def __call__(self, value: float | None) -> str:
        """Return `value` with the metric's digits and unit; a dash for None."""
        return DASH if value is None else with_minus(super().__call__(value))


METRICS: dict[Task, Metric] = {task: Metric(**asdict(answer.score)) for task, answer in ANSWERS.items()}


def with_minus(number: str) -> str:
    """Return `number` with the typographic minus sign instead of hyphens."""
    return number.replace("-", MINUS)


def unbroken(words: str) -> str:
    """Return `words` with a no-break space between each number and its unit."""
    return _UNIT.sub("\N{NO-BREAK SPACE}", words)


def capitalized(words: str) -> str:
    """Return `words` with a capital at the beginning, unless the first word has one: 'accuracy' -> 'Accuracy', but 'mIoU'."""
    first = words.split(" ", 1)[0]
    return words if first != first.lower() else f"{words[:1].upper()}{words[1:]}"


def size(count: int | None) -> str:
    """Return bytes in decimal units: 4100000 -> '4.1 MB'; a dash for None."""
    if count is None:
        return DASH
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{three_digits(value)} {unit}"


def amount(value: float | None) -> str:
    """Return a count in short form: 2812346 -> '2.81 M', 831 -> '831'; a dash for None."""
    if value is None:
        return DASH
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit * 0.9995:
            return f"{value / limit:.{0 if value / limit >= 99.95 else 1 if value / limit >= 9.995 else 2}f}{unit}"
    return f"{value:.0f}"


def gmacs(value: float) -> str:
    """Return 10⁹ multiply-adds with two decimals, small values with two significant digits: 3.114 -> '3.11', 0.00176 -> '0.0018'."""
    return f"{value:.2f}" if value >= 0.0995 or value == 0 else f"{value:.{1 - floor(log10(value))}f}"


def milliseconds(value: float | None) -> str:
    """Return milliseconds with their unit: 41.23 -> '41.2 ms', 0.345 -> '0.34 ms', 1786.2 -> '1,786 ms'; a dash for None."""
    return DASH if value is None else f"{three_digits(value)} ms"


def duration(seconds: float) -> str:
    """Return seconds in the units of a clock: 133.2 -> '2 min 13 s'."""
    if seconds < 60:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage, never rounded to 0 or 100: 0.9997 -> '99.9 %', 0.0002 -> '< 0.1 %'; a dash for None."""
    if share is None:
        return DASH
    scale = 10 ** (digits + 2)
    shown = round(share * scale) / scale
    if shown >= 1 > share:
        shown = 1 - 1 / scale
    if shown <= 0 < share:
        return f"< {100 / scale:.{digits}f} %"
    return f"{100 * shown:.{0 if shown in (0, 1) else digits}f} %"


def percent_of(value: float, whole: float) -> float:
    """Return the length of `value` in percent of `whole`, as CSS takes it; 0 where `whole` is 0."""
    return round(100 * value / whole, 2) if whole else 0.0


def change(first: float, now: float, digits: int) -> str:
    """Return the signed difference of two values as they are shown: (0.651, 0.649, 3) -> '−0.002'."""
    text = with_minus(f"{round(now, digits) - round(first, digits):+.{digits}f}")
    return f"±{text[1:]}" if not text.strip(f"+{MINUS}0.") else text


def ratio(first: float | None, now: float | None, *, less: str, more: str) -> str | None:
    """Return how `now` compares with `first`: (4.1, 1.1) -> '3.7× smaller'; None where either was not measured or is zero."""
    if not first or not now:
        return None
    factor, word = (first / now, less) if now <= first else (now / first, more)
    if factor < 1.005:
        return UNCHANGED
    return f"{factor:,.{0 if factor >= 99.5 else 1 if factor >= 1.95 else 2}f}× {word}"


def from_to(first: str, last: str) -> str:
    """Return both texts with an arrow between them, or one where they are equal."""
    return first if first == last else f"{first} {ARROW} {last}"


def moment(iso: str) -> str:
    """Return an ISO 8601 moment in words: '24 November 2026, 16:30 UTC'."""
    when = datetime.fromisoformat(iso)
    zone = "" if when.tzinfo is None else f" {when:%Z}"
    return f"{when.day} {when:%B %Y}, {when:%H:%M}{zone}"


def css_color(entry: ClassInfo) -> str:
    """Return the colour of a class in CSS notation."""
    return f"rgb({', '.join(map(str, entry.color))})"


def machine_facts(hardware: Hardware, muntin: str) -> list[tuple[str, str]]:
    """Return the machine and the versions as names with values; unknown values are left out."""
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


def disturbance(report: Report) -> str:
    """Return a sentence on other processes that used the CPUs while latencies were measured, '' if none did."""
    if report.latency is None or report.latency.others is None or not report.disturbed:
        return ""
    return f"Latencies were measured {BESIDE}, which used {report.latency.others:.1f} cores: they are too long. Measure again, alone."


def headline(report: Report) -> str:
    """Return the report in one sentence, about its first model and the deployed one."""
    parts, closing = headline_parts(report)
    return f"{', '.join(parts)}: {closing}" if closing else ", ".join(parts)


def headline_parts(report: Report) -> tuple[list[str], str]:
    """Return the figures of the headline, and its closing words: where the deployed artefact was measured, otherwise ''."""
    ends, metric, arrow = report.ends, METRICS[report.task], f" {ARROW} "
    parts = [arrow.join(size(step.bytes) for step in ends)]
    if all(step.latency_ms is not None for step in ends):
        parts.append(arrow.join(milliseconds(step.latency_ms) for step in ends) + (f" ({BESIDE})" if report.disturbed else ""))
    parts.append(f"{metric.name} {arrow.join(metric(step.miou) for step in ends)}")
    if report.steps[-1].name != "deployed":
        return parts, ""
    artifacts = report.artifacts
    name = "" if artifacts is None or len(artifacts.rows) < 3 else f" “{artifacts.take}”"
    return parts, f"measured on the deployed artefact{name}"


def three_digits(value: float) -> str:
    """Return about three significant digits, the precision of timings on a shared machine."""
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 0.995 else 2}f}"
