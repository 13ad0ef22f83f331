from __future__ import annotations

import json
from pathlib import Path

from muntin.reporting.front.page import render_front, write_front
from muntin.reporting.front.schema import FrontRecord

RECORD = {
    "muntin": "1.0", "created": "2026-11-30T12:00:00+00:00", "title": "a <run>", "metric": "mIoU", "objective": "latency", "max_drop": 0.02,
    "chosen": 1, "held_out": "On held-out data: mIoU 0.6.", "notes": ["width 0.8 was left"],
    "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "features": ["avx2"]},
    "points": [
        {"number": 0, "name": "FP32", "width": 1.0, "score": 0.7, "drop": 0.0, "bytes": 4_100_000, "ms": 8.0, "kept": True,
         "artifact": "reference/artifact"},
        {"number": 1, "name": "trial 1", "width": 0.8, "score": 0.69, "drop": 0.01, "bytes": 410_000, "ms": 2.0, "kept": True,
         "artifact": "trials/001/artifact"},
    ],
}  # fmt: skip


def test_files(tmp_path: Path) -> None:
    record = FrontRecord.model_validate(RECORD)
    page = write_front(tmp_path / "budget", record)
    assert sorted(path.name for path in page.parent.iterdir()) == ["front.html", "front.json", "front.svg"]
    assert FrontRecord.model_validate(json.loads((page.parent / "front.json").read_text(encoding="utf-8"))) == record


def test_page_says_where_the_artifacts_are() -> None:
    text = render_front(FrontRecord.model_validate(RECORD))
    assert "trials/001/artifact" in text and "the deployed artifact is within the budget" in text and "a &lt;run&gt;" in text
    assert "\N{MINUS SIGN}0.0100" in text and "410 kB" in text and "width 0.8 was left" in text and "<script" not in text


def test_page_of_an_uncertain_trial() -> None:
    points = [RECORD["points"][0], {**RECORD["points"][1], "verdict": "uncertain", "bound": 0.0321}]  # type: ignore[index]
    text = render_front(FrontRecord.model_validate({**RECORD, "points": points}))
    assert "within the budget on the validation data, not with certainty on other data" in text
    assert "\N{MINUS SIGN}0.0321" in text and "<td>uncertain</td>" in text and 'class="dot uncertain"' in text


def test_page_without_trials() -> None:
    text = render_front(FrontRecord.model_validate({**RECORD, "chosen": None, "points": RECORD["points"][:1]}))  # type: ignore[index]
    assert "nothing was tried" in text
