from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from muntin.artifact.file_lock import folder_in_use
from muntin.cli.report import REPORT_LOCK
from muntin.training import read_checkpoint

Call = Callable[..., Any]


def test_report_in_another_folder(call: Call, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run / "artifact", out / "artifact")
    (run / "compressed").mkdir()
    (run / "compressed" / "front.json").write_text(
        json.dumps({"weights": read_checkpoint(run).state.weights, "chosen": None, "points": "?"})
    )
    document = call("report", run / "checkpoints" / "step-00000150", "-o", out, "--json").document()
    assert document["search"] is None and "front.json is damaged: the front does not fit: muntin is missing" in " ".join(document["notes"])
    assert sorted(path.name for path in out.iterdir() if "artifact" in path.name) == ["artifact"]  # of the same weights: taken as it is
    assert Path(document.pop("report")) == out / "report.html"
    assert not list(run.glob("*report*"))
    page = (out / "report.html").read_text()
    assert all(part in page for part in ("<html", ">Weights</th>", ">On disk</th>"))
    assert json.loads((out / "report.json").read_text()) == document
    steps = document["steps"]
    assert [step["name"] for step in steps] == ["fp32", "deployed"]
    for step in steps:
        assert set(step) == {"name", "miou", "iou", "params", "weights", "bytes", "gmacs", "latency_ms", "engine"}
        assert set(step["iou"]) == {"sea", "field", "roof"}
    assert document["counted"] == [64, 64] and "multiply-adds (MACs) are of a picture of 64 × 64" in page
    counted = sum(layer["macs"] for layer in document["layers"]) / 1e9
    assert steps[-1]["gmacs"] == pytest.approx(counted) and counted == pytest.approx(steps[0]["gmacs"], rel=0.1)  # of the same picture
    assert steps[0]["latency_ms"] > 0
    assert steps[-1]["latency_ms"] > 0
    assert steps[0]["weights"] > 3 * steps[1]["weights"] and steps[1]["weights"] < steps[1]["bytes"]
    assert steps[-1]["bytes"] == sum(file.stat().st_size for file in (out / "artifact").iterdir())
    assert 0.9 < document["agreement"] <= 1
    assert [row["name"] for row in document["artifacts"]["rows"]] == ["fp32", "int8"] and "Which artefact to take" not in page
    assert [(row["test"], row["median_ms"]) for row in document["artifacts"]["rows"]] == [
        (step["miou"], step["latency_ms"]) for step in (steps[0], steps[-1])
    ]
    executed = {layer["executed"] for layer in document["layers"] if layer["activation_bits"] == 8}
    assert executed == {"i8"}
    for example in document["pictures"]["examples"]:
        assert all((out / example[kind]).is_file() for kind in ("image", "truth", "prediction", "difference"))
    assert json.loads((out / "report.json").read_text())["task"] == "segment"


def test_report_checks_the_folder_first(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.deployment.artifact_comparison.evaluate", lambda *arguments, **options: pytest.fail("it was computed"))
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file: name a folder" in call("report", run, "-o", tmp_path / "file").mistake()
    shutil.rmtree(run / "artifact")
    (tmp_path / "mine" / "artifact").mkdir(parents=True)
    (tmp_path / "mine" / "artifact" / "letters.txt").touch()
    assert "letters.txt" in call("report", run, "-o", tmp_path / "mine").mistake()


def test_report_beside_another_one(call: Call, run: Path, tree: Callable[[Path], dict[str, bytes]]) -> None:
    before = tree(run)
    with folder_in_use(run, "muntin demo", name=REPORT_LOCK):
        for words in (["report", run], ["demo", "-o", run]):
            assert call(*words).mistake().startswith(f"{run} is in use by muntin demo (process {os.getpid()} on ")
    assert tree(run) == before


def test_report_to_a_full_disk(call: Call, run: Path, full_disk: Callable[[int], AbstractContextManager[None]]) -> None:
    with full_disk(30_000):
        text = call("report", run).mistake()
    assert "File too large" in text
    assert not list(run.glob("*report*"))


def test_report_notes_on_the_terminal(call: Call, run: Path) -> None:
    answer = call("report", run)
    assert (answer.code, answer.err) == (0, "")
    notes = [line.removeprefix("note      ") for line in answer.out.splitlines() if line.startswith("note ")]
    assert "size      latency at 64x64: the size of the export; pictures: validation 2, test 2\n" in answer.out
    assert notes == json.loads((run / "report.json").read_text())["notes"] and "Trained in" in notes[0]


def test_report_notes_other_processes(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "cores meanwhile: the times are too long; measure alone"
    monkeypatch.setattr("muntin.deployment.artifact_comparison.watch_cpu", lambda: nullcontext(SimpleNamespace(others=0.9)))
    answer = call("report", run)
    assert "note      Latency: other processes used 0.9 " in answer.out and f" {told}.\n" in answer.out
    written = json.loads((run / "report.json").read_text())
    assert "Latencies were measured beside other work" in answer.out and written["latency"]["others"] == 0.9
    assert any(told in note for note in written["notes"]) and told in (run / "report.html").read_text()
