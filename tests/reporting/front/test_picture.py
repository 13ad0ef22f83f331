from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from muntin.errors import MuntinError
from muntin.reporting.front.picture import front_picture, front_svg, on_front
from muntin.reporting.front.schema import FrontRecord
from muntin.reporting.records import parse_record


def values(*trials: tuple[float, int, float], chosen: int | None = 1, **others: Any) -> dict[str, Any]:
    rows = [(0.9, 1_000_000, 8.0), *trials]
    points = [
        {
            "number": number, "name": f"trial {number}" if number else "FP32", "width": 1.0, "score": score, "drop": 0.9 - score,
            "bytes": size, "ms": ms, "kept": score >= 0.89, "artifact": f"trials/{number:03d}/artifact",
        }
        for number, (score, size, ms) in enumerate(rows)
    ]  # fmt: skip
    hardware = {"cpu": "a CPU", "cores": 2, "memory_gib": None, "features": []}
    return {
        "muntin": "1.0", "created": "2026-11-30T12:00:00+00:00", "title": "a <run>", "metric": "accuracy", "objective": "size",
        "max_drop": 0.01, "chosen": chosen, "hardware": hardware, "points": points, **others,
    }  # fmt: skip


TRIALS = ((0.895, 90_000, 3.0), (0.85, 60_000, 2.5), (0.84, 80_000, 2.0), (0.9, 120_000, 9.0))


def record(*trials: tuple[float, int, float], **others: Any) -> FrontRecord:
    return FrontRecord.model_validate(values(*trials, **others))


def test_points_in_both_panels() -> None:
    picture = front_picture(record(*TRIALS))
    for panel in picture.panels:
        assert len(panel.dots) == 5 and len(panel.labels) == 5
        assert all(panel.left < dot.x < panel.right and picture.top < dot.y < picture.bottom for dot in panel.dots)
        assert [dot.style for dot in panel.dots] == ["reference", "kept", "broken", "broken", "kept"]
        assert [dot.chosen for dot in panel.dots] == [False, True, False, False, False]
        for dot in panel.dots:
            assert (dot.y <= picture.budget) == (dot.style != "broken")
    sizes = picture.panels[0].dots
    assert sizes[2].x < sizes[3].x < sizes[1].x < sizes[4].x < sizes[0].x
    assert picture.summary.endswith("trial 1 was chosen: accuracy 0.895, 90.0 kB, 3.0 ms.")


def test_points_on_the_front() -> None:
    points = record(*TRIALS).points
    assert [point.number for point in on_front(points, lambda point: point.bytes)] == [2, 1, 4]
    assert [point.number for point in on_front(points, lambda point: point.ms)] == [3, 2, 1, 0]


@pytest.mark.parametrize("trials", [(), ((0.9, 1_000_000, 8.0),), ((0.0, 0, 0.0),), TRIALS * 8])
def test_svg_is_sound(trials: Any) -> None:
    found = record(*trials, chosen=1 if trials else None)
    root = ET.fromstring(front_svg(found))  # noqa: S314 - our own file
    circles = [entry for entry in root.iter("{http://www.w3.org/2000/svg}circle") if entry.get("class", "").startswith("dot")]
    assert len(circles) == 2 * (len(trials) + 1)
    assert "nan" not in front_svg(found).lower().replace("nanum", "")


@pytest.mark.parametrize(
    ("others", "words"), [({"chosen": 9}, "the chosen trial"), ({"points": []}, "number 0"), ({"max_drop": -1}, "max_drop is -1")]
)
def test_refused_values(others: Any, words: str) -> None:
    with pytest.raises(MuntinError, match=words):
        parse_record(FrontRecord, {**values(*TRIALS), **others}, what="front", newest=1)
