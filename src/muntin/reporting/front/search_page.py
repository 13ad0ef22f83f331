"""The page of an architecture search: what was trained and deployed, the front, and what the choices are worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from muntin.reporting import text
from muntin.reporting.files import template, write_files
from muntin.reporting.front.picture import front_picture, front_svg
from muntin.reporting.front.schema import FrontRecord
from muntin.reporting.records import Amount, Count, Hardware, IsoTime, Record, Text

PAGE_NAME, PICTURE_NAME, RESULTS_NAME = "search.html", "front.svg", "search.json"
UNITS = {"latency": "ms", "size": "bytes", "memory": "bytes"}


class SearchedPoint(Record):
    """A point of the front. `score`: of its last short training; `cost`: of the objective. `options`: fields that it changes."""

    number: Count
    score: float
    cost: Amount
    options: str
    parameters: Count
    command: Text


class SearchedNetwork(Record):
    """A network that was trained alone. `short_score`: of its last short training; None for the recipe's own model."""

    name: Text
    score: float
    float_score: float
    short_score: float | None
    bytes: Count
    ms: Amount
    parameters: Count
    artifact: Text


class SearchRecord(Record):
    """A finished search. `importances`: of the choices, by "score" and "cost". `picture`: of the trained networks."""

    muntin: Text
    created: IsoTime
    title: Text
    metric: Text
    objective: Literal["latency", "size", "memory"]
    scored: Count
    front: tuple[SearchedPoint, ...]
    networks: tuple[SearchedNetwork, ...]
    picture: FrontRecord
    importances: Mapping[str, Mapping[str, float]] = {}
    correlation: float | None = None
    notes: tuple[str, ...] = ()
    hardware: Hardware


def write_search(directory: Path, record: SearchRecord) -> Path:
    """Write `search.html` and `front.svg` into `directory` and return the page's path. Raises MuntinError, one line."""
    write_files(directory, {PAGE_NAME: render_search(record), PICTURE_NAME: front_svg(record.picture)}, what="search")
    return directory / PAGE_NAME


def render_search(record: SearchRecord) -> str:
    """Return the page as text."""
    best = max(record.networks, key=lambda network: network.score)
    parts = [f"{record.metric} {best.score:.4g}", text.size(best.bytes), text.milliseconds(best.ms)]
    names = list({name: None for values in record.importances.values() for name in values})
    return template("search.html.j2").render(
        record=record,
        headline=f"{', '.join(parts)}: {best.name}",
        headline_parts=(parts, f"network {best.name} scores best" if len(record.networks) > 1 else ""),
        json_name=RESULTS_NAME,
        picture=front_picture(record.picture),
        cost=lambda value: text.milliseconds(value) if record.objective == "latency" else text.size(round(value)),
        importances=[(name, [record.importances[kind].get(name, 0.0) for kind in record.importances]) for name in names],
    )
