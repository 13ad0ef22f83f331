"""The roofline: places and words of dots and roofs, and the picture file."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.errors import MuntinError
from muntin.reporting import roofline_svg
from muntin.reporting.profile_schema import ProfileRecord, parse_profile
from muntin.reporting.roofline import WIDE, Panel, Roofline, beyond, drawn, memory_bound, roofline

SVG = "{http://www.w3.org/2000/svg}"
UNKNOWN = ("attainable_ms", "ceiling_share")
EVIL = '"</text><script>alert(1)</script>&\x01'


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314  # a file of this package


def picture(*profiles: dict[str, Any] | ProfileRecord, width: float = WIDE) -> Roofline:
    return roofline([parse_profile(profile) for profile in profiles], width=width, most_labels=6)


def only(drawing: Roofline) -> Panel:
    (panel,) = drawing.panels
    return panel


def kernel(profile: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in profile["kernels"] if row["name"] == name)


def test_kernel_intensity_and_speed(profile: dict[str, Any]) -> None:
    rows = {row.name: row for row in parse_profile(profile).kernels}
    smooth = rows["decoder.smooth"]
    assert smooth.macs_per_byte == pytest.approx(603_979_776 / 2_134_016)
    assert smooth.gmac_s == pytest.approx(603.979776 / 1.912)
    assert (rows["scores"].macs_per_byte, rows["scores"].gmac_s) == (None, None)


def test_memory_bound_kernels(profile: dict[str, Any]) -> None:
    checked = parse_profile(profile)
    bound = {row.name for row in checked.kernels if memory_bound(row, checked.ceilings)}
    # The ridges lie at 36 MACs a byte for INT8 and at 16.8 for BF16.
    assert bound == {"decoder.lateral", "stages.0.blocks.0.attention.scores"}


def test_roofline_without_roofs(profile: dict[str, Any]) -> None:
    profile["ceilings"]["gmacs"] = {}
    checked = parse_profile(profile)
    assert not any(memory_bound(row, checked.ceilings) for row in checked.kernels)
    panel = only(picture(profile))
    assert panel.roofs == ()
    assert len(panel.dots) == 5
    assert "not measured" in picture(profile).summary


def test_places_of_dots_and_roofs(profile: dict[str, Any]) -> None:
    drawing = picture(profile)
    panel = only(drawing)
    assert len(panel.dots) == len(drawn(parse_profile(profile))) == 5
    for dot in panel.dots:
        assert panel.left <= dot.x <= panel.right
        assert drawing.top <= dot.y <= drawing.bottom
    assert [roof.label for roof in panel.roofs] == ["f32 110 GMAC/s", "bf16 420 GMAC/s", "i8 900 GMAC/s"]
    assert [roof.used for roof in panel.roofs] == [False, True, True]
    assert [roof.y for roof in panel.roofs] == sorted((roof.y for roof in panel.roofs), reverse=True)
    assert panel.slope.end == (panel.roofs[-1].left, panel.roofs[-1].y)


def test_slope_is_the_bandwidth(profile: dict[str, Any]) -> None:
    """A kernel that moves its bytes exactly as fast as copying lies on the slope."""
    row = kernel(profile, "decoder.lateral")
    row["ms"] = row["bytes"] / 25.0 / 1e6
    panel = only(picture(profile))
    dot = next(dot for dot in panel.dots if dot.tooltip.startswith("decoder.lateral"))
    (x0, y0), (x1, y1) = panel.slope.start, panel.slope.end
    assert dot.y == pytest.approx(y0 + (dot.x - x0) / (x1 - x0) * (y1 - y0), abs=0.3)


def test_dot_area_is_time(profile: dict[str, Any]) -> None:
    dots = {dot.tooltip.split(":")[0]: dot for dot in only(picture(profile)).dots}
    slow, quick = dots["decoder.smooth"], dots["stem.conv"]
    assert (slow.radius / quick.radius) ** 2 == pytest.approx(1.912 / 0.412, rel=0.01)


def test_key_names_kernels_not_drawn(profile: dict[str, Any]) -> None:
    kernel(profile, "stem.conv")["ms"] = 0.0
    words = " ".join(entry.words for entry in only(picture(profile)).key)
    assert "Not drawn, no multiply-adds: 5 kernels, 1.1 ms" in words
    assert "Not drawn, time or bytes not known: 1 kernel, 0.00 ms" in words
    assert "i8: 3 kernels, 2.7 ms" in words


def test_labels_of_the_slowest_kernels(profile: dict[str, Any]) -> None:
    labels = {label.text for label in only(picture(profile)).labels}
    assert {"decoder.smooth, 1.9 ms", "stages.0.blocks.0.attention.project, 0.63 ms", "stem.conv, 0.41 ms"} <= labels


def test_labels_of_equal_roofs(profile: dict[str, Any]) -> None:
    profile["ceilings"]["gmacs"] = {"f32": 100.0, "bf16": 101.0, "f16": 102.0}
    heights = sorted(roof.label_y for roof in only(picture(profile)).roofs)
    assert all(below - above >= 12 for above, below in itertools.pairwise(heights))


def test_labels_of_close_roofs(profile: dict[str, Any]) -> None:
    profile["ceilings"]["gmacs"] = {"f32": 100.0, "bf16": 108.0, "i8": 420.0}
    panel = only(picture(profile))
    assert panel.roofs[0].y - panel.roofs[1].y > 4  # far enough apart for a label between them, not for its whole height
    assert not [
        (label.label, line.label) for label in panel.roofs for line in panel.roofs if label.label_y - 12 < line.y < label.label_y + 3
    ]


def test_profiles_side_by_side(profile: dict[str, Any]) -> None:
    before = copy.deepcopy(profile)
    for row in before["kernels"]:
        row["ms"] *= 4
    drawing = picture(before, profile, width=1000)
    first, second = drawing.panels
    assert first.right < second.left
    moved = {dot.tooltip.split(":")[0]: dot for dot in first.dots}
    for dot in second.dots:
        slower = moved[dot.tooltip.split(":")[0]]
        assert dot.x - second.left == pytest.approx(
            (slower.x - first.left) * (second.right - second.left) / (first.right - first.left), abs=0.3
        )
        assert dot.y < slower.y
        assert dot.radius <= slower.radius
    assert [tick.label for tick in first.x_ticks] == [tick.label for tick in second.x_ticks]


def test_kernels_beyond_their_ceiling(profile: dict[str, Any]) -> None:
    assert beyond(parse_profile(profile)) == []
    profile["ceilings"]["gmacs"]["i8"] = 150.0
    assert {row.name for row in beyond(parse_profile(profile))} == {"decoder.smooth", "stages.0.blocks.0.attention.project", "stem.conv"}
    kernel(profile, "decoder.smooth")["ms"] = kernel(profile, "stages.0.blocks.0.attention.project")["ms"] = 100.0
    kernel(profile, "stem.conv")["ms"] = 0.1
    profile["kernels_ms"] = 201.0
    assert beyond(parse_profile(profile)) == []


def test_roofline_without_multiply_adds(profile: dict[str, Any]) -> None:
    for row in profile["kernels"]:
        row.update(macs=None, compute=False)
    drawing = picture(profile)
    assert only(drawing).dots == ()
    assert "no kernel with multiply-adds" in drawing.summary
    parsed(roofline_svg(profile))


def test_svg_file_is_self_contained(profile: dict[str, Any]) -> None:
    svg = roofline_svg([profile, profile], title="before & after")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|href|<script", svg)
    root = parsed(svg)
    assert root.get("role") == "img"
    assert "Roofline of earth" in (root.get("aria-label") or "")
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert texts.count("earth, INT8: 1 × 512 × 512") == 2
    assert {"before & after", "GMAC/s (10⁹ multiply-adds a second)", "MACs for each byte read or written"} <= set(texts)
    assert "prefers-color-scheme: dark" in svg
    titles = [circle.find(f"{SVG}title") for circle in root.iter(f"{SVG}circle")]
    assert sum(title is not None for title in titles) == 10


def test_svg_file_is_reproducible(profile: dict[str, Any]) -> None:
    assert roofline_svg(profile) == roofline_svg(parse_profile(profile)) == roofline_svg([profile])


def test_svg_names_are_escaped(profile: dict[str, Any]) -> None:
    profile["title"] = EVIL
    for row in profile["kernels"]:
        row.update(name=EVIL, precision=EVIL)
        row["layer"] = EVIL if row["layer"] else None
    profile["ceilings"]["gmacs"] = {EVIL: 900.0}
    svg = roofline_svg(profile, title=EVIL)
    assert "<script" not in svg
    root = parsed(svg)
    assert any("<script>alert(1)</script>&\ufffd" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_roofline_of_nothing(profile: dict[str, Any]) -> None:
    with pytest.raises(MuntinError, match="a roofline of no profiles"):
        roofline_svg([])
    del profile["kernels"]
    with pytest.raises(MuntinError, match="kernels is missing"):
        roofline_svg(profile)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(1e-4, 1e5), st.integers(1, 10**13), st.integers(1, 10**11)), min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(["f32", "bf16", "i8"]), st.floats(1e-2, 1e6), max_size=3),
    st.floats(1e-2, 1e4),
)
def test_roofline_of_any_measurements(rows: list[tuple[float, int, int]], gmacs: dict[str, float], copy_gb_s: float) -> None:
    base = {
        "implementation": "",
        "precision": "i8",
        "compute": True,
        "layer": None,
        "share": 0.1,
        "attainable_ms": None,
        "ceiling_share": None,
    }
    kernels = [{**base, "name": f"k{at}", "kind": "k", "ms": ms, "macs": macs, "bytes": size} for at, (ms, macs, size) in enumerate(rows)]
    values = {
        "title": "t", "created": "2026-11-24T16:30:00+00:00", "muntin": "0", "engine": "e", "precision": "f32", "threads": 1,
        "hardware": {"cpu": "c", "cores": 1, "memory_gib": None, "features": []}, "artifact": {"path": "", "bytes": 0, "sha256": ""},
        "shape": [1, 1, 1], "rounds": 1, "whole_ms": 1.0, "profiled_ms": 1.0, "kernels_ms": 1.0, "kernels": kernels,
        "ceilings": {"gmacs": gmacs, "copy_gb_s": copy_gb_s}, "kinds": [{"kind": "k", "ms": 1.0, "share": 1.0, "count": len(kernels)}],
    }  # fmt: skip
    drawing = picture(values)
    panel = only(drawing)
    assert len(panel.dots) == len(rows)
    places = [(dot.x, dot.y) for dot in panel.dots] + [(roof.left, roof.y) for roof in panel.roofs] + [panel.slope.start, panel.slope.end]
    for x, y in places:
        assert panel.left - 0.1 <= x <= panel.right + 0.1
        assert drawing.top - 0.1 <= y <= drawing.bottom + 0.1
    assert len(panel.x_ticks) >= 1
