"""The page of a drift comparison, its values, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from muntin.reporting.files import json_text, template, write_files
from muntin.reporting.records import Amount, Count, Hardware, IsoTime, Record, Text

FORMAT: Literal[1] = 1


class DriftChangeRow(Record):
    """One statistic, as text with its unit. `effect`: change of the mean in standard deviations. `notable`: beyond chance."""

    name: Text
    before: Text
    after: Text
    effect: float
    words: Text
    notable: bool


class DriftPicture(Record):
    """A picture far from the training pictures. `distance`: 1 is usual. `uri`: a small copy, as a data URI."""

    name: Text
    distance: Amount
    reason: Text
    uri: Text


class DriftRecord(Record):
    """A comparison. `effect`, `threshold`: in standard deviations; the threshold of so many `windows`."""

    format: Literal[1] = FORMAT
    muntin: Text
    created: IsoTime
    title: Text
    hardware: Hardware
    drifted: bool
    effect: Amount
    threshold: Amount
    pictures: Count
    windows: Count
    changes: tuple[DriftChangeRow, ...]
    farthest: tuple[DriftPicture, ...]
    notes: tuple[str, ...] = ()


def write_drift(file: Path, record: DriftRecord) -> None:
    """Write the page, and its values beside it as JSON without the pictures. Raises MuntinError, one line."""
    values = record.model_dump(mode="json", exclude={"farthest": {"__all__": {"uri"}}})
    json_name = f"{file.stem}.json"
    write_files(file.parent, {json_name: json_text(values), file.name: render_drift(record, json_name)}, what="report of the drift")


def render_drift(record: DriftRecord, json_name: str) -> str:
    """Return the page as text."""
    figures = [f"effect {record.effect:.2f}", f"by chance {record.threshold:.2f} in {record.windows} pictures"]
    closing = "the pictures are not like those of the training" if record.drifted else "no drift"
    return template("drift.html.j2").render(
        record=record, headline=f"{', '.join(figures)}: {closing}", headline_parts=(figures, closing), json_name=json_name
    )
