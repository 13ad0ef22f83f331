"""The page of a profile: whole, self-contained, escaped, and honest about what it was not told."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import MuntinError
from muntin.reporting import parse_profile, render_profile, roofline_svg, write_profile
from muntin.reporting.profile_page import HUES, MOST_WINS, REST, kernel_rows, kind_bars, kind_colors, panes, time_line

VOID = {"meta", "link", "img", "br", "wbr"}
EVIL = '"<script>alert(1)</script> onload="x'


class Page(HTMLParser):
    """The elements and the text of a page whose tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def identifiers(self) -> list[str | None]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]


def table_rows(html: str) -> list[list[str]]:
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = re.findall(r"<tr>.*?</tr>", body, flags=re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)] for row in rows]


def test_written_whole_with_its_numbers_and_its_picture(profile: dict[str, Any], tmp_path: Path) -> None:
    page = write_profile(tmp_path / "a" / "b", profile)
    assert page == tmp_path / "a" / "b" / "profile.html"
    assert {file.name for file in page.parent.iterdir()} == {"profile.html", "profile.json", "roofline.svg"}
    assert json.loads((page.parent / "profile.json").read_text(encoding="utf-8")) == profile
    assert (page.parent / "roofline.svg").read_text(encoding="utf-8") == roofline_svg(profile)
    assert page.read_text(encoding="utf-8") == render_profile(parse_profile(profile))


def test_a_refused_profile_leaves_the_old_one(profile: dict[str, Any], tmp_path: Path) -> None:
    before = write_profile(tmp_path, profile).read_bytes()
    profile["kernels"][0]["ms"] = float("nan")
    with pytest.raises(MuntinError, match=r"kernels\[0\]\.ms is nan"):
        write_profile(tmp_path, profile)
    assert (tmp_path / "profile.html").read_bytes() == before


def test_a_file_in_the_folders_place(profile: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(MuntinError, match="cannot write the profile into"):
        write_profile(tmp_path / "run", profile)


def test_the_page_is_well_formed_and_self_contained(profile: dict[str, Any]) -> None:
    html = render_profile(profile)
    page = Page(html)
    assert not re.search(r"https?://|@import|url\((?!#)|<script|<img", html.replace(" ", ""))
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    targets = {attrs["href"] for _, attrs in page.elements if "href" in attrs}
    assert {target for target in targets if not (target or "").startswith("data:")} == {"profile.json", "roofline.svg"}
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.elements if tag == "meta")
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in page.elements if tag == "svg")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.elements if tag == "th")
    assert page.identifiers == ["wins", "kinds", "roofline", "time", "kernels", "notes", "machine"]


def test_the_head_says_what_ran_where_and_how_fast(profile: dict[str, Any]) -> None:
    words = Page(render_profile(profile)).words
    # 1.86 ms of 4.5 at the ceilings.
    assert "4.5 ms for an image of 512 × 512: at 41 % of the machine's ceiling" in words
    assert "openvino, float layers in bf16, 2 threads on 2 cores of Intel Xeon Platinum 8481C" in words
    assert "24 November 2026, 16:30 UTC" in words
    assert profile["notes"][0] in words
    assert "ceiling i8900 GMAC/s" in words


def test_several_images(profile: dict[str, Any]) -> None:
    profile["shape"] = [4, 256, 320]
    assert "for 4 images of 256 × 320" in Page(render_profile(profile)).words


def test_the_largest_wins_first(profile: dict[str, Any]) -> None:
    html = render_profile(profile)
    wins = re.findall(r"<li>.*?</li>", html[html.index('class="window wins"') : html.index("</ol>")])
    told = [re.sub("<[^>]*>", "", win) for win in wins]
    assert len(told) == MOST_WINS
    assert told[0] == "up to 0.50 ms10.8 % of the time12% of the time is writing the scores; labels of one byte would be 0.26 MB"
    assert [text[:13] for text in told] == ["up to 0.50 ms", "up to 0.19 ms", "up to 0.10 ms"]
    assert "2 smaller" in html
    assert "other processes were at work" in html


def test_no_share_is_above_the_whole(profile: dict[str, Any]) -> None:
    """Counters make a call slower: what they tell is a share of that call, and the ceilings one of the call without."""
    profile["whole_ms"] = profile["profiled_ms"] / 4
    words = Page(render_profile(profile)).words
    assert "10.8 % of the time" in words
    assert "of the machine's ceiling" not in words
    assert "more than the latency; the ceilings are too low" in words


def test_nothing_to_win_is_said(profile: dict[str, Any]) -> None:
    profile["findings"] = []
    assert "nothing was found that would save much" in Page(render_profile(profile)).words


def test_kinds_as_bars(profile: dict[str, Any]) -> None:
    bars = kind_bars(parse_profile(profile))
    assert [bar.name for bar in bars] == [
        "convolution",
        "matrix product",
        "layout change",
        "element-wise",
        "between kernels",
        "quantise / convert",
    ]
    assert (bars[0].count, bars[0].figure, bars[0].length) == ("3 kernels", "2.4 ms", 100)
    assert (bars[4].count, bars[4].color, bars[4].inner) == ("", REST, 0)
    # Convolutions need 84 + 671 + 172 µs at their ceilings, of 2445.
    assert bars[0].inner == pytest.approx(100 * (0.0839 + 0.6711 + 0.172) / 2.445, abs=0.1)


def test_a_kind_without_time_is_named(profile: dict[str, Any]) -> None:
    profile["kernels"][6]["kind"] = "view"
    profile["kinds"].append({"kind": "view", "ms": 0.0, "share": 0.0, "count": 1})
    assert "Too quick for the engine's clock: view (1 kernel)." in Page(render_profile(profile)).words


def test_more_kinds_than_hues(profile: dict[str, Any]) -> None:
    for index, row in enumerate(profile["kernels"]):
        row["kind"] = f"kind {index}"
    profile["kinds"] = [{"kind": row["kind"], "ms": row["ms"], "share": row["share"], "count": 1} for row in profile["kernels"]]
    checked = parse_profile(profile)
    colors = list(kind_colors(checked).values())
    assert len(set(colors) - {REST}) == HUES
    assert colors.count(REST) == len(profile["kinds"]) - HUES
    line = time_line(checked)
    assert line is not None
    assert [lane.name for lane in line.lanes][-1] == "others"
    assert len(line.lanes) == HUES + 2


def test_what_passes_between_kernels_is_a_row_or_a_sentence(profile: dict[str, Any]) -> None:
    assert "are spent between kernels" not in render_profile(profile)
    profile["kinds"] = [row for row in profile["kinds"] if row["count"]]
    assert "Another 0.30 ms (6.5 %) are spent between kernels." in Page(render_profile(profile)).words


def test_the_time_line_is_whole_and_in_order(profile: dict[str, Any]) -> None:
    line = time_line(parse_profile(profile))
    assert line is not None
    whole, *lanes = line.lanes
    starts = [block.start for block in whole.blocks]
    assert starts == sorted(starts)
    assert sum(block.width for block in whole.blocks) == pytest.approx(1000, abs=0.1)
    assert sorted(block.told for lane in lanes for block in lane.blocks) == sorted(block.told for block in whole.blocks)
    assert [block.told.split(":")[0] for block in whole.blocks] == [row["name"] for row in profile["kernels"] if row["ms"]]


def test_kernels_without_any_time(profile: dict[str, Any]) -> None:
    for row in profile["kernels"]:
        row.update(ms=0.0, share=0.0, ceiling_share=None)
    page = Page(render_profile(profile))
    assert "time" not in page.identifiers
    assert "there is nothing to draw" in page.words


def test_every_kernel_is_in_the_table_slowest_first(profile: dict[str, Any]) -> None:
    rows = table_rows(render_profile(profile))
    assert [row[0] for row in rows] == [row["name"] for row in sorted(profile["kernels"], key=lambda row: -row["ms"])]
    implementation = "Convolution, brgconv_avx512_amx_i8"
    assert rows[0] == ["decoder.smooth", "convolution", implementation, "i8", "1.912", "41.2 %", "604 M", "2.1 MB", "316", "35.1 %"]
    by_name = {row[0]: row for row in rows}
    assert by_name["decoder.lateral"][-1] == "142.1 %memory-bound"
    assert by_name["scores"][-4:] == ["–", "12.6 MB", "–", "93.2 %"]
    assert by_name["stages.0.blocks.0.view"][-6:] == ["0.000", "–", "–", "–", "–", "–"]
    assert sum("memory-bound" in row[-1] for row in rows) == 2


def test_the_layer_is_told_where_the_name_does_not_hold_it(profile: dict[str, Any]) -> None:
    profile["kernels"][1].update(name="fused_17", layer="stem.conv")
    profile["kernels"][2].update(name="stages.0.blocks.0.attention.project/DequantizationMultiply")
    rows = {"".join(row.name): row.layer for row in kernel_rows(parse_profile(profile))}
    assert rows["fused_17"] == "stem.conv"
    assert rows["stages.0.blocks.0.attention.project/DequantizationMultiply"] == ""


def test_ceilings_measured_too_low_are_not_believed(profile: dict[str, Any]) -> None:
    assert "measured too low" not in render_profile(profile)
    profile["ceilings"]["gmacs"]["i8"] = 150.0
    words = Page(render_profile(profile)).words
    assert "3 kernels multiplied faster than the roof: the ceilings were measured too low" in words
    assert "of the machine's ceiling" not in words
    assert "the ceilings are too low" in panes(parse_profile(profile))[1].detail


def test_what_is_named_is_text(profile: dict[str, Any]) -> None:
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
    page = Page(html)
    assert "<script" not in html
    assert EVIL in page.text
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_names_may_be_empty_long_or_of_any_script(profile: dict[str, Any]) -> None:
    names = ["", "   ", "n" * 500, "日本語の層/畳み込み", "🙂" * 9, "a\x00b\u202e"]
    for row, name in zip(profile["kernels"], names, strict=False):
        row.update(name=name, layer=name, kind=name or row["kind"])
    profile["kinds"] = [
        {"kind": kind, "ms": 0.1, "share": 0.1, "count": 1} for kind in dict.fromkeys(row["kind"] for row in profile["kernels"])
    ]
    rows = {row[0] for row in table_rows(render_profile(profile))}
    assert {"–", "n" * 500, "日本語の層/畳み込み", "🙂" * 9} <= rows
