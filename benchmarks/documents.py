"""Documents of benchmarks, and what is shown of them: tables, goals, and statistics over rows."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WIDEST = 40
"""Characters up to which a column of a table is padded."""


# Documents


@dataclass(frozen=True, kw_only=True)
class Document:
    """One call on one machine. `n`: how often it was repeated, in words. `marks`: warnings to the reader. `file`: below results/."""

    benchmark: str
    created: str
    machine: Row
    rows: list[Row]
    settings: Row
    n: str = "1 run"
    commit: str | None = None
    versions: Row = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    file: str = ""

    @property
    def where(self) -> str:
        """Machine and date, as the pages name them."""
        day = datetime.fromisoformat(self.created)
        matrix_units = " with AMX" if "amx_int8" in self.machine.get("features", ()) else ""
        return f"{self.machine.get('name') or self.machine['cpu'] + matrix_units}, {day.day} {day:%B %Y}"

    def to_json(self) -> str:
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "file"}
        return json.dumps(values, indent=1, default=str) + "\n"


def read_document(path: Path) -> Document:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Document(**{**values, "marks": tuple(values.get("marks", ()))}, file=path.name)


# Tables and goals


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: the value of a row by its dotted path or by a function, and its format (`{:.2f}`). A missing value is a dash."""

    title: str
    value: str | Callable[[Row], Any]
    form: str = "{}"

    def text(self, row: Row) -> str:
        value = look_up(row, self.value) if isinstance(self.value, str) else self.value(row)
        return "–" if value is None else self.form.format(value)


def look_up(row: Row, path: str) -> Any:
    """The value at a dotted path; None where a part of it is missing."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def columns(text: str) -> tuple[Column, ...]:
    """Columns in a line, each `title=path:format`: "preset, ms=ways.i8.ms:.2f, share:.1%". The path is the title unless given."""
    made = []
    for part in text.split(","):
        names, _, form = part.strip().partition(":")
        title, _, path = names.partition("=")
        made.append(Column(title=title, value=path or title, form=f"{{:{form}}}"))
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a document. `rows`: from the document's rows to the table's, which are all of them unless given. `paged`: False for a
    table that only the command prints. A column without values is left out."""

    columns: tuple[Column, ...] | Callable[[Document], tuple[Column, ...]]
    rows: Callable[[list[Row]], Iterable[Row]] = list
    title: str = ""
    paged: bool = True

    def markdown(self, document: Document) -> str:
        """The table; empty if the document has no row for it."""
        shown = self.columns if isinstance(self.columns, tuple) else self.columns(document)
        lines = [[column.title for column in shown]]
        for row in self.rows(document.rows):
            cells = [column.text(row) for column in shown]
            if "cannot" in row:
                cells = [cell for cell in cells if cell != "–"]
                cells = [*cells, f"cannot: {row['cannot']}", *[""] * len(shown)][: len(shown)]
            lines.append(cells)
        used = [place for place in range(len(shown)) if len(lines) > 1 and any(line[place] not in ("–", "") for line in lines[1:])]
        if not used:
            return ""
        table = grid([[line[place] for place in used] for line in lines])
        return f"**{self.title}**\n\n{table}" if self.title else table


def crossed(
    keys: str, across: str, cell: Callable[[Row], str], *, select: Callable[[list[Row]], Iterable[Row]] = list, head: str = "{}",
    more: Iterable[Column] = (), title: str = "",
) -> Table:  # fmt: skip
    """A table with a line for each combination of the `keys` ("preset, side") and a column, titled by `head`, for each value of `across`.

    `more`: columns after them, of a line's first row or of all its `rows`. A row that says `cannot` is a cell like others.
    """
    names = keys.split(", ")

    def shown(document: Document) -> tuple[Column, ...]:
        places = dict.fromkeys(row.get(across) for row in select(document.rows))
        cells = (Column(title=head.format(place), value=lambda line, place=place: line["cells"].get(place)) for place in places)
        return (*(Column(title=name, value=name) for name in names), *cells, *more)

    def lines(rows: list[Row]) -> Iterator[Row]:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in select(rows):
            groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
        for group in groups.values():
            cells = {row.get(across): f"cannot: {row['cannot']}" if "cannot" in row else cell(row) for row in group}
            yield {key: value for key, value in group[0].items() if key != "cannot"} | {"rows": group, "cells": cells}

    return Table(columns=shown, rows=lines, title=title)


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, so that a terminal shows it as well. The first line is its head."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(min(len(line[place]), WIDEST) for line in lines)) for place in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "| " + " | ".join("-" * width for width in widths) + " |", *rows[1:]])


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on one or several cases of a document; a case of None was not measured. One of the bounds is given.

    `values`: the cases or the only one of a document; or a dotted path in each of the `rows`, with `case` as the format of its case's name.
    """

    name: str
    values: Callable[[Document], Mapping[str, float | None] | float | None] | str
    case: str = ""
    rows: Callable[[list[Row]], Iterable[Row]] = list
    at_least: float | None = None
    at_most: float | None = None
    form: str = "{:.3g}"

    def cases(self, document: Document) -> dict[str, float]:
        """Measured cases; the only one has an empty name."""
        if isinstance(self.values, str):
            values: Any = {self.case.format(**row): look_up(row, self.values) for row in self.rows(document.rows) if "cannot" not in row}
        else:
            values = self.values(document)
        cases = values if isinstance(values, Mapping) else {"": values}
        return {case: value for case, value in cases.items() if value is not None}

    def met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def bound(self) -> str:
        return f"at least {self.form.format(self.at_least)}" if self.at_most is None else f"at most {self.form.format(self.at_most)}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal over every document on record: the values of each case."""

    goal: Goal
    cases: Mapping[str, Sequence[float]]

    @property
    def missed(self) -> list[str]:
        """Cases that a document misses."""
        return [case for case, values in self.cases.items() if not all(map(self.goal.met, values))]

    @property
    def met(self) -> bool:
        return not self.missed

    def figures(self, cases: Iterable[str]) -> str:
        """Cases and their values, or their lowest and highest ones."""
        told = []
        for case in cases:
            ends = dict.fromkeys(self.goal.form.format(value) for value in (min(self.cases[case]), max(self.cases[case])))
            told.append(f"{case} {' to '.join(ends)}".strip())
        return ", ".join(told)

    @property
    def summary(self) -> str:
        """The goal, its bound, and the worst value; of several cases the number that is met."""
        worst = (min if self.goal.at_most is None else max)(value for values in self.cases.values() for value in values)
        count = "" if len(self.cases) == 1 or self.met else f"{len(self.cases) - len(self.missed)} of {len(self.cases)} cases, "
        return f"{self.goal.name} ({self.goal.bound}): {count}{'worst ' if len(self.cases) > 1 else ''}{self.goal.form.format(worst)}"


def judge(goals: Iterable[Goal], documents: Sequence[Document]) -> list[Verdict]:
    """Goals that a document says something about."""
    verdicts = []
    for goal in goals:
        cases: dict[str, list[float]] = {}
        for document in documents:
            for case, value in goal.cases(document).items():
                cases.setdefault(case, []).append(value)
        if cases:
            verdicts.append(Verdict(goal=goal, cases=cases))
    return verdicts


def goal_table(verdicts: Iterable[Verdict]) -> str:
    """A line for each goal: the cases that meet it and those that do not."""
    lines = [["goal", "bound", "met", "missed"]]
    for verdict in verdicts:
        met = [case for case in verdict.cases if case not in verdict.missed]
        lines.append([verdict.goal.name, verdict.goal.bound, verdict.figures(met), verdict.figures(verdict.missed)])
    return grid(lines)


# Statistics


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of some keys, in the order of their first row; rows that say `cannot` are left out."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "cannot" not in row:
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def values_of(rows: Iterable[Row], path: str) -> list[Any]:
    """The values at a dotted path, of the rows that have one."""
    return [value for row in rows if (value := look_up(row, path)) is not None]


def mean(rows: Iterable[Row], path: str) -> float | None:
    return statistics.fmean(values) if (values := values_of(rows, path)) else None


def median(rows: Iterable[Row], path: str) -> float | None:
    return statistics.median(values) if (values := values_of(rows, path)) else None


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean and standard deviation, the latter from two values on; a dash without values."""
    if not values:
        return "–"
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def seeds_of(rows: Iterable[Row]) -> str:
    """How many seeds the rows have, in words."""
    count = len({row["seed"] for row in rows if "seed" in row})
    return f"{count} seed" + ("" if count == 1 else "s")
