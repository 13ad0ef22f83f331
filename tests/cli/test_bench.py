"""`muntin bench`: a table for a person, one JSON document for a program, one line for a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
QUICK = ("--threads", "1", "--rounds", "2")


def test_the_document_holds_every_row(call: Call, exported: Any) -> None:
    document = call("bench", exported.artifact, "--size", "24x16", "--batch", "1,2", *QUICK, "--json").document()
    assert [row["shape"] for row in document["rows"]] == [[1, 24, 16], [2, 24, 16]]
    assert all(row["latency"]["median_ms"] > 0 and row["images_per_s"] > 0 for row in document["rows"])


def test_a_run_is_a_baseline_in_pytorch(call: Call, exported: Any) -> None:
    document = call("bench", exported.artifact, "--baseline", exported.run, "--size", "32", *QUICK, "--json").document()
    base, row = document["rows"]
    assert (base["engine"], base["precision"], row["engine"]) == ("pytorch eager", "f32", "openvino")
    assert row["ratio"] == pytest.approx(base["latency"]["median_ms"] / row["latency"]["median_ms"])


def test_the_table_shows_the_baseline_beside_it(call: Call, exported: Any) -> None:
    answer = call("bench", exported.artifact, "--baseline", exported.artifact, "--size", "16", *QUICK)
    assert (answer.code, answer.err) == (0, "")
    for words in ("median ms", "p99", "images/s", "load s", "MiB", "faster", f"baseline {exported.artifact.name}", "1.00x"):
        assert words in answer.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "big"], "--size big: give"),
        (["--batch", "1,x"], "--batch 1,x: give whole numbers"),
        (["--threads", "0"], "threads=0"),
        (["--baseline", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(call: Call, exported: Any, words: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in call("bench", exported.artifact, *words).mistake()


def test_compiling_an_artefact_makes_no_sense(call: Call, exported: Any) -> None:
    text = call("bench", exported.artifact, "--baseline", exported.artifact, "--compile").mistake()
    assert "--compile is for a PyTorch baseline" in text
