"""The page: whole, self-contained, escaped, and graceful about what is absent."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muntin.errors import DataError
from muntin.reporting import render_html
from muntin.reporting.histograms import MOST_WORST
from muntin.reporting.page import MOST_EXAMPLES

VOID = {"meta", "link", "img", "br"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "formaction", "background"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Every element with its attributes, and whether the tags nest."""

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
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def test_the_page_is_well_formed_and_self_contained(report: dict[str, Any], drawn: Path) -> None:
    html = render_html(report, drawn)
    page = Page(html)
    assert not re.search(r"https?://|@import|url\((?!#)", html.replace(" ", ""))
    assert page.all("script") == []
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs), f"{tag} has an event handler"
        for name in LOADING & attrs.keys():
            target = attrs[name] or ""
            assert target.startswith("data:image/") or (drawn / target).is_file() or target == "report.json", target
    policy = next(attrs["content"] or "" for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert len(html.encode()) < 3_000_000


def test_every_picture_has_a_text_and_every_heading_a_scope(report: dict[str, Any], drawn: Path) -> None:
    page = Page(render_html(report, drawn))
    images = page.all("img")
    assert len(images) == 1 + 3 * 4
    assert all(attrs["alt"] for attrs in images)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in page.all("svg"))
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_every_step_layer_class_and_note_appears(report: dict[str, Any], drawn: Path) -> None:
    page = Page(render_html(report, drawn))
    rows = re.findall(r"<tr.*?</tr>", render_html(report, drawn), flags=re.DOTALL)
    for step in report["steps"]:
        row = next(row for row in rows if f">{step['name']}</th>" in row and step["engine"] in row)
        assert f"{step['miou']:.3f}" in row
    for layer in report["layers"]:
        assert layer["name"] in page.text
    for entry in report["classes"]:
        assert entry["name"] in page.text
        assert f"{report['steps'][-1]['iou'][entry['name']]:.3f}" in page.text
    for told in [*report["notes"], report["recipe"].strip(), report["hardware"]["cpu"], report["hardware"]["openvino"], "99.73 %"]:
        assert told in page.text


def test_what_a_user_names_is_text(report: dict[str, Any], drawn: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {poisoned_key(key): poisoned(inner) for key, inner in value.items()}
        return [poisoned(inner) for inner in value] if isinstance(value, list) else EVIL if value == "ocean" else value

    def poisoned_key(key: str) -> str:
        return EVIL if key == "ocean" else key

    report = poisoned(report)
    quoting = f'"{EVIL}" onload="x'
    report["title"] = report["recipe"] = report["hardware"]["cpu"] = quoting
    report["notes"] = [quoting]
    report["ranks"][0]["name"] = report["ranks"][1]["reason"] = report["ranks"][1]["kind"] = quoting
    next(layer for layer in report["layers"] if layer["histogram"]).update(name=f"worst {quoting}", note=quoting)
    report["layers"][0]["name"] = report["latency"]["rows"][0]["name"] = report["pictures"]["examples"][0]["name"] = quoting
    html = render_html(report, drawn)
    page = Page(html)
    assert "<script" not in html
    assert EVIL in page.text
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_absent_parts_drop_out(report: dict[str, Any], tmp_path: Path) -> None:
    for part in ("latency", "agreement", "pictures"):
        report[part] = None
    for part in ("training", "validation", "ranks", "layers", "notes", "classes"):
        report[part] = []
    report["seconds"] = {}
    report["steps"] = [{**report["steps"][0], "iou": {}, "latency_ms": None}]
    del report["recipe"]
    page = Page(render_html(report, tmp_path))
    identifiers = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert identifiers == {"steps", "machine"}
    assert page.all("img") == []
    assert "fp32" in page.text
    assert "Latency" not in page.text


@pytest.mark.parametrize(
    ("part", "gone", "unsaid"),
    [
        ("latency", {"latency"}, "The whisker"),
        ("agreement", set(), "Agreement"),
        ("pictures", {"examples"}, "Full size"),
        ("training", {"clip-loss", "clip-rate", "clip-speed"}, "The loss is smoothed"),
        ("validation", {"clip-validation"}, "Thin lines in the validation chart"),
        ("ranks", set(), "Ranks and bits"),
        ("layers", {"layers", "worst"}, "Ranks and bits"),
        ("notes", {"notes"}, "What to know"),
        ("recipe", set(), "The recipe"),
    ],
)
def test_each_part_may_be_absent_alone(report: dict[str, Any], drawn: Path, part: str, gone: set[str], unsaid: str) -> None:
    def identifiers(page: Page) -> set[str | None]:
        return {attrs["id"] for _, attrs in page.elements if "id" in attrs}

    whole = Page(render_html(report, drawn))
    del report[part]
    page = Page(render_html(report, drawn))
    assert identifiers(page) == identifiers(whole) - gone
    assert unsaid in whole.text
    assert unsaid not in page.text


def test_ranks_and_bits_are_told_without_colour(report: dict[str, Any], drawn: Path) -> None:
    page = Page(render_html(report, drawn))
    html = render_html(report, drawn)
    lanes = re.findall(r"<li>.*?</li>", html[html.index('id="ranks"') : html.index('id="worst"')], flags=re.DOTALL)
    assert [re.sub("<[^>]*>", "", lane).startswith(row["name"]) for lane, row in zip(lanes, report["ranks"], strict=True)] == [True] * 45
    qkv = next(lane for lane in lanes if "stages.3.0.qkv" in lane)
    assert " ".join(re.sub("<[^>]*>", "", qkv).split()) == ("stages.3.0.qkv 85 of 256, 197 k → 87.0 k parameters, bits of the weights: 4 4")
    assert "a depthwise kernel has no rank to cut (10)" in page.text
    assert any((attrs.get("aria-label") or "").startswith("Shares of weights: ") for attrs in page.all("svg"))


def test_the_worst_layers_say_what_they_draw(report: dict[str, Any], drawn: Path) -> None:
    page = Page(render_html(report, drawn))
    drawings = [told for attrs in page.all("svg") if (told := attrs.get("aria-label") or "").startswith("Input values of ")]
    assert len(drawings) == 4
    assert all("the 8-bit grid covers" in told and "of the values lie outside the grid" in told for told in drawings)


def test_the_worst_layers_beyond_the_page_are_counted(report: dict[str, Any], drawn: Path) -> None:
    histogram = next(layer["histogram"] for layer in report["layers"] if layer["histogram"])
    report["layers"] = [{**layer, "histogram": histogram} for layer in report["layers"]]
    text = Page(render_html(report, drawn)).text
    assert f"{len(report['layers']) - MOST_WORST} more are in report.json" in text


def test_a_report_of_32_bits_and_no_ranks_has_no_lanes(report: dict[str, Any], drawn: Path) -> None:
    report["ranks"] = []
    report["layers"] = [{**layer, "weight_bits": 32, "activation_bits": None, "histogram": None} for layer in report["layers"]]
    page = Page(render_html(report, drawn))
    assert not {"ranks", "worst"} & {attrs["id"] for _, attrs in page.elements if "id" in attrs}


def test_a_classification_report(report: dict[str, Any], drawn: Path) -> None:
    report["task"], report["agreement"], report["recipe"] = "classify", None, None
    report["pictures"] = {"overlay": None, "examples": [{"name": "seven", "image": "examples/0-image.png"}]}
    page = Page(render_html(report, drawn))
    assert "accuracy 0.651" in page.text
    assert "IoU" not in page.text
    assert len(page.all("img")) == 1


def test_a_class_that_the_test_part_lacks(report: dict[str, Any], drawn: Path) -> None:
    for step in report["steps"]:
        step["iou"]["ice"] = None
    assert "not in the test part" in Page(render_html(report, drawn)).text


def test_many_large_examples_stay_small(report: dict[str, Any], tmp_path: Path) -> None:
    Image.effect_noise((700, 700), 90).save(tmp_path / "noise.jpg")
    report["pictures"] = {
        "overlay": "noise.jpg",
        "examples": [{"name": f"{index}", "image": "noise.jpg", "truth": "noise.jpg"} for index in range(MOST_EXAMPLES + 2)],
    }
    html = render_html(report, tmp_path)
    assert len(html.encode()) < 3_000_000
    assert "2 more lie in the report's folder" in html.replace("&#39;", "'")


def test_a_missing_picture(report: dict[str, Any], drawn: Path) -> None:
    report["pictures"]["examples"][1]["truth"] = "examples/none.png"
    with pytest.raises(DataError, match=r"'examples/none\.png'") as caught:
        render_html(report, drawn)
    assert "\n" not in str(caught.value)
