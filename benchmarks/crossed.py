"""Tables in which two properties of the rows cross: a line for each value of one, a column for each value of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from documents import Column, Document, Row, Table


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
