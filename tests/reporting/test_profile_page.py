"""The page of a profile: well-formed, self-contained and escaped, with unknown values left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import MuntinError
from muntin.reporting import parse_profile, render_profile, roofline_svg, write_profile
from muntin.reporting.profile_page import HUES, MOST_FINDINGS, REST, kind_bars, kind_styles, panes, time_line

EVIL = '"<script>alert(1)</script> onload="x'

ReadPage = Callable[[str], Any]


def table_rows(html: str) -> list[list[str]]:
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = re.findall(r"<tr>.*?</tr>", body, flags=re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)] for row in rows]


def test_write_profile_files(profile: dict[str, Any], tmp_path: Path) -> None:
    page = write_profile(tmp_path / "a" / "b", profile)
    assert page == tmp_path / "a" / "b" / "profile.html"
    assert {file.name for file in page.parent.iterdir()} == {"profile.html", "profile.json", "roofline.svg"}
    assert json.loads((page.parent / "profile.json").read_text(encoding="utf-8")) == profile
    assert (page.parent / "roofline.svg").read_text(encoding="utf-8") == roofline_svg(profile)
    assert page.read_text(encoding="utf-8") == render_profile(parse_profile(profile))


def test_refused_profile_keeps_earlier_files(profile: dict[str, Any], tmp_path: Path) -> None:
    before = write_profile(tmp_path, profile).read_bytes()
    profile["kernels"][0]["ms"] = float("nan")
    with pytest.raises(MuntinError, match=r"kernels\[0\]\.ms is nan"):
        write_profile(tmp_path, profile)
    assert (tmp_path / "profile.html").read_bytes() == before


def test_profile_page_is_self_contained(profile: dict[str, Any], read_page: ReadPage) -> None:
    html = render_profile(profile)
    page = read_page(html)
    assert not re.search(r"https?://|@import|url\((?!#)|<script|<img", html.replace(" ", ""))
    assert not page.has_handlers
    targets = {attrs["href"] for _, attrs in page.elements if "href" in attrs}
    assert {target for target in targets if not (target or "").startswith("data:")} == {"profile.json", "roofline.svg"}
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.elements if tag == "meta")
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in page.elements if tag == "svg")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.elements if tag == "th")
    assert page.identifiers == ["wins", "kinds", "roofline", "time", "kernels", "notes", "machine"]


def test_head_of_the_page(profile: dict[str, Any], read_page: ReadPage) -> None:
    words = read_page(render_profile(profile)).words
    # 1.86 ms of 4.5 at the ceilings.
    assert "4.5 ms for an image of 512 × 512: at 41 % of the machine's ceiling" in words
    assert "openvino, float layers in bf16, 2 threads on 2 cores of Intel Xeon Platinum 8481C" in words
    assert "24 November 2026, 16:30 UTC" in words
    assert profile["notes"][0] in words
    assert "ceiling i8900 GMAC/s" in words


def test_head_with_several_images(profile: dict[str, Any], read_page: ReadPage) -> None:
    profile["shape"] = [4, 256, 320]
    assert "for 4 images of 256 × 320" in read_page(render_profile(profile)).words


def test_findings_by_saving(profile: dict[str, Any]) -> None:
    html = render_profile(profile)
    wins = re.findall(r"<li>.*?</li>", html[html.index('class="window wins"') : html.index("</ol>")])
    texts = [re.sub("<[^>]*>", "", win) for win in wins]
    assert len(texts) == MOST_FINDINGS
    assert texts[0] == "up to 0.50 ms10.8 % of the time12% of the time is writing the scores; labels of one byte would be 0.26 MB"
    assert [text[:13] for text in texts] == ["up to 0.50 ms", "up to 0.19 ms", "up to 0.10 ms"]
    assert "2 smaller" in html
    assert "other processes were at work" in html


def test_shares_of_a_call_faster_than_profiled(profile: dict[str, Any], read_page: ReadPage) -> None:
    """Counters slow a call down: savings are shares of the profiled call, the ceilings a share of the call without counters."""
    profile["whole_ms"] = profile["profiled_ms"] / 4
    words = read_page(render_profile(profile)).words
    assert "10.8 % of the time" in words
    assert "of the machine's ceiling" not in words
    assert "more than the latency; the ceilings are too low" in words


def test_page_without_findings(profile: dict[str, Any], read_page: ReadPage) -> None:
    profile["findings"] = []
    assert "nothing was found that would save much" in read_page(render_profile(profile)).words


def test_kind_bars(profile: dict[str, Any]) -> None:
    bars = kind_bars(parse_profile(profile))
    assert [bar.row.kind for bar in bars] == [
        "convolution",
        "matrix product",
        "layout change",
        "element-wise",
        "between kernels",
        "quantise / convert",
    ]
    assert (bars[0].row.count, bars[0].length) == (3, 100)
    assert (bars[4].row.count, bars[4].style, bars[4].inner) == (0, REST, 0)
    # Convolutions need 84 + 671 + 172 µs at their ceilings, of 2445.
    assert bars[0].inner == pytest.approx(100 * (0.0839 + 0.6711 + 0.172) / 2.445, abs=0.1)


def test_kind_without_time(profile: dict[str, Any], read_page: ReadPage) -> None:
    profile["kernels"][6]["kind"] = "view"
    profile["kinds"].append({"kind": "view", "ms": 0.0, "share": 0.0, "count": 1})
    assert "Too quick for the engine's clock: view (1 kernel)." in read_page(render_profile(profile)).words


def test_more_kinds_than_hues(profile: dict[str, Any]) -> None:
    for index, row in enumerate(profile["kernels"]):
        row["kind"] = f"kind {index}"
    profile["kinds"] = [{"kind": row["kind"], "ms": row["ms"], "share": row["share"], "count": 1} for row in profile["kernels"]]
    checked = parse_profile(profile)
    styles = list(kind_styles(checked).values())
    assert len(set(styles) - {REST}) == HUES
    assert styles.count(REST) == len(profile["kinds"]) - HUES
    line = time_line(checked)
    assert line is not None
    assert [lane.name for lane in line.lanes][-1] == "others"
    assert len(line.lanes) == HUES + 2


def test_time_between_kernels(profile: dict[str, Any], read_page: ReadPage) -> None:
    assert "are spent between kernels" not in render_profile(profile)
    profile["kinds"] = [row for row in profile["kinds"] if row["count"]]
    assert "Another 0.30 ms (6.5 %) are spent between kernels." in read_page(render_profile(profile)).words


def test_time_line_order(profile: dict[str, Any]) -> None:
    line = time_line(parse_profile(profile))
    assert line is not None
    whole, *lanes = line.lanes
    starts = [block.start for block in whole.segments]
    assert starts == sorted(starts)
    assert sum(block.width for block in whole.segments) == pytest.approx(1000, abs=0.1)
    assert sorted(block.tooltip for lane in lanes for block in lane.segments) == sorted(block.tooltip for block in whole.segments)
    assert [block.tooltip.split(":")[0] for block in whole.segments] == [row["name"] for row in profile["kernels"] if row["ms"]]


def test_page_of_kernels_without_times(profile: dict[str, Any], read_page: ReadPage) -> None:
    for row in profile["kernels"]:
        row.update(ms=0.0, share=0.0, ceiling_share=None)
    page = read_page(render_profile(profile))
    assert "time" not in page.identifiers
    assert "there is nothing to draw" in page.words


def test_kernel_table(profile: dict[str, Any]) -> None:
    rows = table_rows(render_profile(profile))
    assert [row[0] for row in rows] == [row["name"] for row in sorted(profile["kernels"], key=lambda row: -row["ms"])]
    implementation = "Convolution, brgconv_avx512_amx_i8"
    assert rows[0] == ["decoder.smooth", "convolution", implementation, "i8", "1.912", "41.2 %", "604 M", "2.1 MB", "316", "35.1 %"]
    by_name = {row[0]: row for row in rows}
    assert by_name["decoder.lateral"][-1] == "142.1 %memory-bound"
    assert by_name["scores"][-4:] == ["–", "12.6 MB", "–", "93.2 %"]
    assert by_name["stages.0.blocks.0.view"][-6:] == ["0.000", "–", "–", "–", "–", "–"]
    assert sum("memory-bound" in row[-1] for row in rows) == 2


def test_layer_of_a_fused_kernel(profile: dict[str, Any]) -> None:
    profile["kernels"][1].update(name="fused_17", layer="stem.conv")
    profile["kernels"][2].update(name="stages.0.blocks.0.attention.project/DequantizationMultiply")
    names = {row[0] for row in table_rows(render_profile(profile))}
    assert {"fused_17stem.conv", "stages.0.blocks.0.attention.project/DequantizationMultiply"} <= names


def test_ceilings_measured_too_low(profile: dict[str, Any], read_page: ReadPage) -> None:
    assert "measured too low" not in render_profile(profile)
    profile["ceilings"]["gmacs"]["i8"] = 150.0
    words = read_page(render_profile(profile)).words
    assert "3 kernels multiplied faster than the roof: the ceilings were measured too low" in words
    assert "of the machine's ceiling" not in words
    assert "the ceilings are too low" in panes(parse_profile(profile))[1].detail


def test_profile_names_are_escaped(profile: dict[str, Any], read_page: ReadPage) -> None:
    for place in ("title", "engine", "precision"):
        profile[place] = EVIL
    profile["hardware"]["cpu"] = profile["artifact"]["path"] = profile["artifact"]["sha256"] = EVIL
    profile["ceilings"]["gmacs"][EVIL] = 1.0
    profile["notes"] = [EVIL]
    profile["findings"] = [{"kind": EVIL, "words": EVIL, "saves_ms": 1.0}]
    profile["kinds"][0]["kind"] = EVIL
    for row in profile["kernels"]:
        row.update(name=EVIL, implementation=EVIL, precision=EVIL)
        row["kind"] = EVIL if row["kind"] == "quantise / convert" else row["kind"]
    html = render_profile(profile)
    page = read_page(html)
    assert "<script" not in html
    assert EVIL in page.text
    assert not page.has_handlers


def test_unusual_kernel_names(profile: dict[str, Any]) -> None:
    names = ["", "   ", "n" * 500, "日本語の層/畳み込み", "🙂" * 9, "a\x00b\u202e"]
    for row, name in zip(profile["kernels"], names, strict=False):
        row.update(name=name, layer=name, kind=name or row["kind"])
    profile["kinds"] = [
        {"kind": kind, "ms": 0.1, "share": 0.1, "count": 1} for kind in dict.fromkeys(row["kind"] for row in profile["kernels"])
    ]
    rows = {row[0] for row in table_rows(render_profile(profile))}
    assert {"–", "n" * 500, "日本語の層/畳み込み", "🙂" * 9} <= rows
