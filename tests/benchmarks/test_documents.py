"""Tables, goals and statistics over the rows of documents."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def documents() -> ModuleType:
    return importlib.import_module("documents")


def document(rows: list[dict[str, Any]]) -> Any:
    made = importlib.import_module("documents").Document
    return made(benchmark="any", created="2026-12-02T10:00:00+00:00", machine={"cpu": "one"}, rows=rows, settings={})


def test_columns_by_path_and_form(documents: ModuleType) -> None:
    found = documents.columns("name, ms=ways.int8.ms:.2f, share:.0%")
    row = {"name": "a", "ways": {"int8": {"ms": 1.234}}, "share": 0.5}
    assert [column.title for column in found] == ["name", "ms", "share"]
    assert [column.text(row) for column in found] == ["a", "1.23", "50%"]
    assert [column.text({"name": "b", "ways": {}}) for column in found] == ["b", "–", "–"]


def test_table_with_a_failed_row(documents: ModuleType) -> None:
    table = documents.Table(columns=documents.columns("name, ms:.1f, empty"), title="Times")
    text = table.markdown(document([{"name": "a", "ms": 1.0}, {"name": "b|c", "cannot": "no memory"}]))
    lines = [[cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert text.startswith("**Times**\n\n")
    assert (lines[0], *lines[2:]) == (["name", "ms"], ["a", "1.0"], ["b/c", "cannot: no memory"])
    assert table.markdown(document([])) == ""


def test_goal_needs_every_run(documents: ModuleType) -> None:
    goal = documents.Goal(name="faster", values=lambda d: {row["name"]: row.get("x") for row in d.rows}, at_least=2, form="{:.1f}")
    runs = [document([{"name": "a", "x": 2.0}, {"name": "b", "x": 3.0}, {"name": "c"}]), document([{"name": "b", "x": 1.9}])]
    (verdict,) = documents.judge([goal], runs)
    assert (verdict.met, verdict.missed) == (False, ["b"])
    assert verdict.figures(["a", "b"]) == "a 2.0, b 1.9 to 3.0"
    assert verdict.summary == "faster (at least 2.0): 1 of 2 cases, worst 1.9"
    (alone,) = documents.judge([goal], runs[:1])
    assert (alone.met, alone.summary) == (True, "faster (at least 2.0): worst 2.0")


def test_goal_of_a_single_figure(documents: ModuleType) -> None:
    goal = documents.Goal(name="memory", values=lambda d: d.rows[0].get("mib"), at_most=100)
    (verdict,) = documents.judge([goal], [document([{"mib": 99.6}])])
    assert (verdict.met, verdict.summary, verdict.figures(verdict.cases)) == (True, "memory (at most 100): 99.6", "99.6")
    assert documents.judge([goal], [document([{}])]) == []


def test_statistics_over_rows(documents: ModuleType) -> None:
    rows = [{"seed": 0, "kind": "a", "x": {"y": 1.0}}, {"seed": 1, "kind": "a", "x": {"y": 2.0}}, {"seed": 1, "kind": "b", "cannot": "no"}]
    groups = documents.grouped(rows, "kind")
    assert list(groups) == [("a",)]
    assert documents.mean(groups["a",], "x.y") == documents.median(groups["a",], "x.y") == 1.5
    assert documents.spread([1.0, 2.0], "{:.1f}") == "1.5 ± 0.7"
    assert documents.spread([1.0]) == "1.000"
    assert documents.seeds_of(rows) == "2 seeds"
