from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from muntin.reporting.drift.page import DriftRecord, render_drift, write_drift
from muntin.reporting.pictures import thumbnail

RECORD: dict[str, Any] = {
    "muntin": "1.0", "created": "2026-11-30T12:00:00+00:00", "title": "<new> beside artifact",
    "hardware": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "features": ["avx2"]},
    "drifted": True, "effect": 1.234, "threshold": 0.43, "pictures": 32, "windows": 32, "notes": ["Left out: x.png"],
    "changes": [
        {"name": "class ice", "before": "2.1 %", "after": "15 %", "effect": 1.42, "words": "more frequent", "notable": True},
        {"name": "brightness of red", "before": "80", "after": "79", "effect": -0.02, "words": "darker", "notable": False},
    ],
    "farthest": [{"name": "<b>.png", "distance": 3.2, "reason": "detail at 1 px more blurred (-4.4)",
                  "uri": thumbnail(np.zeros((9, 9, 3), np.uint8))}],
}  # fmt: skip


def test_page() -> None:
    page = render_drift(DriftRecord.model_validate(RECORD), "x.json")
    assert "are not like those of the training" in page and "effect 1.23" in page and "more frequent" in page
    assert "as by chance" in page and "darker" not in page and "&lt;b&gt;.png" in page and "&lt;new&gt;" in page and "Left out" in page
    assert "no drift" in render_drift(DriftRecord.model_validate(RECORD | {"drifted": False}), "x.json")


def test_files(tmp_path: Path) -> None:
    write_drift(tmp_path / "a" / "x.html", DriftRecord.model_validate(RECORD))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.html", "x.json"]
    values = json.loads((tmp_path / "a" / "x.json").read_text())
    assert values["farthest"] == [{"name": "<b>.png", "distance": 3.2, "reason": "detail at 1 px more blurred (-4.4)"}]
