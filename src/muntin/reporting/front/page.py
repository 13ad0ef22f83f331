"""The page of a front: its files, and the values that the template `front.html.j2` lays out."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from muntin.reporting import text
from muntin.reporting.files import json_text, template, write_files
from muntin.reporting.front.picture import front_picture, front_svg, on_front
from muntin.reporting.front.schema import FrontPoint, FrontRecord

JSON_NAME, HTML_NAME, PICTURE_NAME = "front.json", "front.html", "front.svg"


def write_front(directory: Path, record: FrontRecord) -> Path:
    """Write `front.json`, `front.html` and `front.svg` into `directory`, which is created if absent, and return the page's path.

    All three are complete on the disk before any takes its name. Raises MuntinError, one line.
    """
    contents = {JSON_NAME: json_text(record.model_dump(mode="json")), HTML_NAME: render_front(record), PICTURE_NAME: front_svg(record)}
    write_files(directory, contents, what="front")
    return directory / HTML_NAME


def render_front(record: FrontRecord) -> str:
    """Return the page as text."""
    first, chosen = record.reference, next((point for point in record.points if point.number == record.chosen), None)
    fronts = on_front(record.points, attrgetter("bytes")), on_front(record.points, attrgetter("ms"))
    best = {point.number for points in fronts for point in points}
    parts = headline_parts(record, first, chosen)
    return template("front.html.j2").render(
        record=record,
        headline=f"{', '.join(parts[0])}: {parts[1]}",
        headline_parts=parts,
        json_name=JSON_NAME,
        picture=front_picture(record),
        rows=[(point, point.number in best) for point in record.points],
    )


def headline_parts(record: FrontRecord, first: FrontPoint, chosen: FrontPoint | None) -> tuple[list[str], str]:
    """Return the figures of the headline and its closing words."""
    if chosen is None:
        return [f"{text.size(first.bytes)}", f"{record.metric} {first.score:.4g}"], "nothing was tried"
    pairs = [(text.size(first.bytes), text.size(chosen.bytes)), (text.milliseconds(first.ms), text.milliseconds(chosen.ms))]
    figures = [text.from_to(before, after) for before, after in pairs]
    scores = text.from_to(f"{first.score:.4g}", f"{chosen.score:.4g}")
    closing = "within the budget" if chosen.kept else "outside the budget"
    if chosen.verdict == "uncertain":
        closing += " on the validation data, not with certainty on other data"
    return [*figures, text.with_minus(f"{record.metric} {scores}")], f"the deployed artifact is {closing}"
