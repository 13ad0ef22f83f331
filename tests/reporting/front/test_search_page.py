from __future__ import annotations

from pathlib import Path
from typing import Any

from muntin.reporting.front.search_page import SearchRecord, render_search, write_search

HEAD = {
    "muntin": "1.0", "created": "2026-11-30T12:00:00+00:00", "title": "a <search>", "metric": "mIoU", "objective": "latency",
    "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "features": ["avx2"]},
}  # fmt: skip


def record(**changes: Any) -> SearchRecord:
    points = [
        {"number": number, "name": name, "width": 1.0, "score": score, "drop": 0.7 - score, "bytes": 400_000, "ms": ms,
         "kept": score >= 0.7, "artifact": f"networks/{name}/artifact"}
        for number, name, score, ms in ((0, "recipe", 0.7, 3.0), (4, "004", 0.71, 2.5))
    ]  # fmt: skip
    networks = [
        {"name": point["name"], "score": point["score"], "float_score": 0.7, "short_score": 0.6 if point["number"] else None,
         "bytes": point["bytes"], "ms": point["ms"], "parameters": 300_000,
         "artifact": point["artifact"]}
        for point in points
    ]  # fmt: skip
    front = {"number": 4, "score": 0.6, "cost": 2.4, "options": "depths [1]", "parameters": 300_000, "command": "muntin fit r.yaml -o x"}
    picture = {**HEAD, "max_drop": 0.0, "chosen": None, "points": points, "legend": "dashed: the recipe"}
    values = {"scored": 50, "front": [front], "networks": networks, "picture": picture, "notes": ["a note"], **HEAD, **changes}
    return SearchRecord.model_validate(values)


def test_page(tmp_path: Path) -> None:
    importances = {"score": {"depths.0": 0.75, "dims.0": 0.25}, "cost": {"dims.0": 1.0}}
    page = write_search(tmp_path, record(importances=importances, correlation=0.8))
    text = page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.svg", "search.html"]
    assert "a &lt;search&gt;" in text and "network 004 scores best" in text and "muntin fit r.yaml" in text and "a note" in text
    assert "0.80, of 1 networks" in text and "75.0" in text and "<script" not in text
    assert "mIoU upwards; dashed: the recipe<" in text


def test_page_without_a_correlation() -> None:
    text = render_search(record())
    assert "Too few networks were trained alone" in text and "What the choices are worth" not in text
