"""The page of a report: well-formed, self-contained and escaped, with absent parts left out."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from muntin.errors import DataError, MuntinError
from muntin.reporting import render_html, terminal_table, text
from muntin.reporting.charts import MOST_WORST
from muntin.reporting.page import MOST_EXAMPLES, panes
from muntin.reporting.schema import parse_report

LOADING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "formaction", "background"}
CHROMIUM = shutil.which("chromium")
EVIL = "<script>alert(1)</script>"
QUOTED = f'"{EVIL}" onload="x'

ReadPage = Callable[[str], Any]


def test_page_is_self_contained(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    html = render_html(report, drawn)
    page = read_page(html)
    assert not re.search(r"https?://|@import|url\((?!#)", html.replace(" ", ""))
    assert page.all("script") == []
    assert not page.has_handlers
    for _, attrs in page.elements:
        for name in LOADING & attrs.keys():
            target = attrs[name] or ""
            assert target.startswith("data:image/") or (drawn / target).is_file() or target == "report.json", target
    policy = next(attrs["content"] or "" for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert len(html.encode()) < 3_000_000


def test_front_of_a_budget(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    points = [
        {"number": number, "name": name, "width": 1.0, "score": 0.7 - number / 100, "drop": number / 100, "bytes": 10 ** (6 - number),
         "ms": 4.0 - number, "kept": True, "artifact": name}
        for number, name in enumerate(("FP32", "trial 1"))
    ]  # fmt: skip
    hardware = {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "features": []}
    about = {"muntin": "1.0", "created": "2026-11-30T12:00:00+00:00", "title": "a run", "metric": "mIoU", "objective": "size"}
    search = {**about, "max_drop": 0.02, "chosen": 1, "hardware": hardware, "points": points}
    html = render_html(report | {"search": search}, drawn)
    assert len([attrs for attrs in read_page(html).all("svg") if attrs.get("class") == "front"]) == 1
    assert "muntin compress</code> tried for a loss of at most 0.02" in html and ".front .dot" in html
    assert "tried for a loss" not in (plain := render_html(report, drawn)) and ".front .dot" not in plain


@pytest.mark.skipif(CHROMIUM is None, reason="lays the page out in Chromium")
@pytest.mark.parametrize("width", [1200, 800])
def test_page_tables_fit_the_window(report: dict[str, Any], drawn: Path, tmp_path: Path, width: int) -> None:
    for step, name in zip(report["steps"], ("FP32", "low rank, trained on", "W4A8", "mixed precision", "deployed"), strict=True):
        step |= {"name": name, "weights": step["bytes"], "engine": "PyTorch 2.12.0 eager FP32, simulating integers, 2 threads"}
    script = "<script>document.title = [...document.querySelectorAll('section > .scroll')].map(e => e.scrollWidth - e.clientWidth)</script>"
    html = re.sub("<meta http-equiv[^>]*>", "", render_html(report, drawn)).replace("</body>", f"{script}</body>")
    (tmp_path / "page.html").write_text(html)
    command = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--dump-dom"]
    dom = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.findall("<title>(.*)</title>", dom)[0] == "0,0"  # the tables of steps and of artefacts


def test_page_accessibility(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    page = read_page(render_html(report, drawn))
    images = page.all("img")
    assert len(images) == 1 + 3 * 4
    assert all(attrs["alt"] for attrs in images)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in page.all("svg"))
    assert len(page.identifiers) == len(set(page.identifiers))


def test_page_contents(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    html = render_html(report, drawn)
    page = read_page(html)
    rows = re.findall(r"<tr.*?</tr>", html, flags=re.DOTALL)
    for step in report["steps"]:
        row = next(row for row in rows if f">{step['name']}</th>" in row and step["engine"] in row)
        assert f"{step['miou']:.3f}" in row
    for layer in report["layers"]:
        assert layer["name"] in page.text
    for entry in report["classes"]:
        assert entry["name"] in page.text
        assert f"{report['steps'][-1]['iou'][entry['name']]:.3f}" in page.text
    for words in [
        *report["notes"],
        report["recipe"].strip(),
        report["hardware"]["cpu"],
        report["hardware"]["openvino"],
        text.unbroken("99.73 %"),
    ]:
        assert words in page.text


def test_artefacts_and_which_to_take(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    html = render_html(report, drawn)
    section = html[html.index('id="artifacts"') : html.index('id="latency"')]
    rows = [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in re.findall(r"<tr.*?</tr>", section, flags=re.DOTALL)]
    assert rows[0] == "Artefact Validation mIoU Test mIoU Labels as fp32 On disk Latency P90"
    assert rows[1] == "fp32 0.662 0.651 – 11.3 MB 41.3 ms 45.4 ms"
    assert rows[2].startswith("int8 0.655 −0.007 0.643 −0.008 97.3 % 3.9 MB 2.9× smaller 8.2 ms 5.0× faster 9.0 ms")
    assert "The rest of this page describes it." in section
    assert re.findall(r'<tr class="final"><th scope="row">(\w+)<', section) == ["mixed"]
    words = read_page(html).words
    assert "Of 2 deployed artefacts, take “mixed”, in runs/earth/artifact: " in words
    assert "measured on the deployed artefact “mixed”" in words  # one story: the headline is about the one to take
    del report["artifacts"]["rows"][1]
    assert "take “mixed”" not in render_html(report, drawn)  # of a single artefact the table of steps says all


def test_layer_table_contents(report: dict[str, Any], drawn: Path) -> None:
    html = render_html(report, drawn)

    def row(name: str) -> str:
        match = re.search(rf'<tr><th scope="row">{re.escape(name)}</th>.*?</tr>', html)
        assert match is not None
        return " ".join(re.sub("<[^>]*>", " ", match.group()).split())

    assert row("stem.0") == "stem.0 Conv2d W16 the first and the last layer bf16 864 56.6 M – –"
    assert row("stages.3.0.qkv.reduce") == "stages.3.0.qkv.reduce Linear W4 A8 i8 21.8 k 5.57 M 18.4 0.19 %"
    assert "W8 A8 4 bits cost 0.4 points" in row("stages.3.2.mlp.0.expand")
    assert "f32 not integer" in row("decoder.lateral.reduce")
    for layer in report["layers"]:
        layer["clipped"] = None
    assert "Clipped" in html
    assert "Clipped" not in render_html(report, drawn)


def test_user_names_are_escaped(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {poisoned(key): poisoned(inner) for key, inner in value.items()}
        return [poisoned(inner) for inner in value] if isinstance(value, list) else EVIL if value == "ocean" else value

    report = poisoned(report)
    report["title"] = report["recipe"] = report["hardware"]["cpu"] = QUOTED
    report["notes"] = [QUOTED]
    report["ranks"][0]["name"] = report["ranks"][1]["reason"] = report["ranks"][1]["kind"] = QUOTED
    next(layer for layer in report["layers"] if layer["histogram"]).update(name=f"worst {QUOTED}", note=QUOTED)
    report["layers"][0]["name"] = report["latency"]["rows"][0]["name"] = report["pictures"]["examples"][0]["name"] = QUOTED
    html = render_html(report, drawn)
    page = read_page(html)
    assert "<script" not in html
    assert EVIL in page.text
    assert not page.has_handlers


def test_page_with_a_single_step_alone(report: dict[str, Any], tmp_path: Path, read_page: ReadPage) -> None:
    needed = ("title", "created", "muntin", "hardware", "task")
    report = {key: report[key] for key in needed} | {"steps": [{**report["steps"][0], "iou": {}, "latency_ms": None}]}
    page = read_page(render_html(report, tmp_path))
    assert set(page.identifiers) == {"steps", "machine"}
    assert page.all("img") == []
    assert "fp32" in page.text
    assert "Latency" not in page.text


@pytest.mark.parametrize(
    ("part", "absent_identifiers", "absent_words"),
    [
        ("artifacts", {"artifacts"}, "Which artefact to take"),
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
def test_page_without_one_part(
    report: dict[str, Any], drawn: Path, read_page: ReadPage, part: str, absent_identifiers: set[str], absent_words: str
) -> None:
    whole = read_page(render_html(report, drawn))
    del report[part]
    page = read_page(render_html(report, drawn))
    assert set(page.identifiers) == set(whole.identifiers) - absent_identifiers
    assert absent_words in whole.text
    assert absent_words not in page.text


def test_ranks_and_bits_as_text(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    html = render_html(report, drawn)
    page = read_page(html)
    lanes = re.findall(r"<li>.*?</li>", html[html.index('id="ranks"') : html.index('id="worst"')], flags=re.DOTALL)
    assert [re.sub("<[^>]*>", "", lane).startswith(row["name"]) for lane, row in zip(lanes, report["ranks"], strict=True)] == [True] * 45
    qkv = next(lane for lane in lanes if "stages.<wbr>3.0.<wbr>qkv" in lane)  # a line may break after a dot only
    assert " ".join(re.sub("<[^>]*>", "", qkv).split()) == "stages.3.0.qkv 85 of 256, 197 k → 87.0 k parameters, bits of the weights: 4 4"
    assert 'title="stages.3.2.mlp.0.reduce: W8 A8, 4 bits cost 0.4 points, more than in any other layer"' in html
    assert "a depthwise kernel has no rank to cut (10)" in page.text
    assert any((attrs.get("aria-label") or "").startswith("Shares of weights: ") for attrs in page.all("svg"))


def test_worst_layers(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    first, second, *_ = (layer for layer in report["layers"] if layer["histogram"])
    first["sqnr_db"], second["sqnr_db"] = None, -3.21
    page = read_page(render_html(report, drawn))
    assert "SQNR not measured; " in page.text
    assert "SQNR \N{MINUS SIGN}3.2 dB; " in page.text
    summaries = [label for attrs in page.all("svg") if (label := attrs.get("aria-label") or "").startswith("Input values of ")]
    assert len(summaries) == 4
    assert all("the 8-bit grid covers" in label and "of the values lie outside the grid" in label for label in summaries)


def test_more_worst_layers_than_drawn(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    histogram = next(layer["histogram"] for layer in report["layers"] if layer["histogram"])
    report["layers"] = [{**layer, "histogram": histogram} for layer in report["layers"]]
    assert f"{len(report['layers']) - MOST_WORST} more are in report.json" in read_page(render_html(report, drawn)).text


def test_latency_beside_other_work(report: dict[str, Any], drawn: Path) -> None:
    report["latency"]["others"] = report["artifacts"]["others"] = 0.05
    quiet = render_html(report, drawn)
    assert "× faster" in quiet and text.BESIDE not in quiet
    report["latency"]["others"] = report["artifacts"]["others"] = 0.93
    checked = parse_report(report)
    times = f"41.3 ms {text.ARROW} 6.9 ms"
    assert f"{times} ({text.BESIDE})" in text.headline(checked)
    assert f'<dd class="big">{text.unbroken(times)}</dd>' in render_html(report, drawn)
    assert (times, text.BESIDE) in [(pane.figure, pane.detail) for pane in panes(checked)]
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table(report))
    assert isinstance(console.file, io.StringIO)
    shown, page = console.file.getvalue(), render_html(report, drawn)
    assert "6.9 ms" in shown and f"6.9 ms ({text.BESIDE})" not in shown  # said once, below
    for output in (page, shown):
        assert f"Latencies were measured {text.BESIDE}, which used 0.9 cores" in output and "faster" not in output
    report["steps"] = report["steps"][:1]
    assert (text.milliseconds(41.3), f"at 512 × 512, {text.BESIDE}") in [(p.figure, p.detail) for p in panes(parse_report(report))]


def test_page_of_an_uncompressed_model(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    report["ranks"] = []
    report["layers"] = [{**layer, "weight_bits": 32, "activation_bits": None, "histogram": None} for layer in report["layers"]]
    assert not {"ranks", "worst"} & set(read_page(render_html(report, drawn)).identifiers)


def test_page_of_a_classification(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    report["task"], report["agreement"], report["recipe"] = "classify", None, None
    report["pictures"] = {"overlay": None, "examples": [{"name": "seven", "image": "examples/0-image.png"}]}
    html = render_html(report, drawn)
    page = read_page(html)
    assert "accuracy 0.651" in page.text
    assert "<dt>Accuracy</dt>" in html and '<th scope="col">Accuracy</th>' in html and "Recall of each class" in page.text
    assert "<figcaption>seven</figcaption>" in html and "where the two differ" not in html
    assert "IoU" not in page.text
    assert len(page.all("img")) == 1


def test_page_of_a_restoration(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    report["task"] = "restore"
    for row in [*report["steps"], *report["validation"]]:
        row.update(miou=40 * row["miou"], iou={name: 40 * value for name, value in row["iou"].items()})
    report["baseline"] = {"name": "the input", "score": 20.5, "ssim": 0.3, "deployed_ssim": 0.7}
    html = render_html(report, drawn)
    words = read_page(html).words
    assert "+5.46 dB" in words and "Over the input" in words and "SSIM 0.300 \N{RIGHTWARDS ARROW} 0.700" in words
    assert "before" in words and "clean picture" in words and "where the two differ" not in words
    assert "PSNR 26.04 dB \N{RIGHTWARDS ARROW} 25.96 dB" in read_page(html).words
    assert '<span class="fill before" style="width:100.0%">' in html  # the best class, ocean, at its 37.92 dB
    assert "The whole width is 1" not in html


def test_class_missing_from_the_test_part(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    for step in report["steps"]:
        step["iou"]["ice"] = None
    assert "not in the test part" in read_page(render_html(report, drawn)).text


def test_page_size_with_many_large_examples(report: dict[str, Any], tmp_path: Path) -> None:
    Image.effect_noise((700, 700), 90).save(tmp_path / "noise.jpg")
    report["pictures"] = {
        "overlay": "noise.jpg",
        "examples": [{"name": f"{index}", "image": "noise.jpg", "truth": "noise.jpg"} for index in range(MOST_EXAMPLES + 2)],
    }
    html = render_html(report, tmp_path)
    assert len(html.encode()) < 3_000_000
    assert "2 more lie in the report's folder" in html.replace("&#39;", "'")


def test_missing_picture(report: dict[str, Any], drawn: Path) -> None:
    report["pictures"]["examples"][1]["truth"] = "examples/none.png"
    with pytest.raises(DataError, match=r"'examples/none\.png'") as caught:
        render_html(report, drawn)
    assert "\n" not in str(caught.value)


def test_page_with_a_confusion_matrix(report: dict[str, Any], drawn: Path, read_page: ReadPage) -> None:
    assert "confusion" not in read_page(render_html(report, drawn)).identifiers
    names = [entry["name"] for entry in report["classes"]]
    counts = [[80 if row == column else 4 for column in names] for row in names]
    report["confusion"] = {"counts": counts, "mistakes": [{"truth": names[0], "predicted": names[1], "count": 4}]}
    report["pictures"]["worst"] = report["pictures"]["examples"][:1]
    report["splits"] = {"train": {"count": 3, "names": ["a", "b"]}, "test": {"count": 1, "names": ["c/d"]}}
    html = render_html(report, drawn)
    page = read_page(html)
    assert {"confusion", "mistakes"} <= set(page.identifiers)
    assert f"{names[0]} taken for {names[1]} (4, 4.0 % of the class)" in page.text
    assert html.count('<td class="right" style="--share:0.800"') == len(names)
    assert "3 train, 1 test" in page.text and "a, b, and 1 more: see splits.csv" in page.text and "c/d" in page.text
    report["classes"].pop()
    with pytest.raises(MuntinError, match=r"confusion\.counts is no table of 5 by 5"):
        parse_report({**report, "steps": [{**step, "iou": {}} for step in report["steps"]], "validation": []})
