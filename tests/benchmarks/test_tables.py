"""The pages' figures are those of the documents in `benchmarks/results/`."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables() -> ModuleType:
    return importlib.import_module("tables")


def test_pages_agree_with_results(tables: ModuleType) -> None:
    for name in tables.PAGES:
        page = (tables.ROOT / name).read_text(encoding="utf-8")
        assert tables.written(page) == page, f"{name} differs from results/: run `python benchmarks/tables.py`"
        assert page.count("<!-- figures: ") == page.count("<!-- end -->")


def test_page_follows_a_result(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "Before <!-- figures: demo.front -->old<!-- end --> after."
    first = tables.written(page)
    for row in tables.documents()["demo"][-1].rows:
        monkeypatch.setitem(row, "bytes_ratio", 77.7)
    assert "77.7× smaller" not in first
    assert "77.7× smaller" in tables.written(page)


def test_unknown_block_of_a_page(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"demo\.nothing: no such block; demo has front"):
        tables.written("<!-- figures: demo.nothing --><!-- end -->")


def test_every_result_is_shown(tables: ModuleType) -> None:
    named = {document.file for runs in tables.documents().values() for document in runs}
    assert named == {path.name for path in (FOLDER / "results").glob("*.json")}
    figures = (FOLDER / "figures.md").read_text(encoding="utf-8")
    assert [name for name in sorted(named) if name not in figures] == []


def test_every_benchmark_has_a_row(tables: ModuleType) -> None:
    overview = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in tables.benchmarks() if f"`{name}.py`" not in overview] == []
