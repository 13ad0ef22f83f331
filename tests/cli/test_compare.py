"""`muntin compare`: every artefact of a run in one table, which one to take, and the commands for those that are missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.deployment.run_artifacts import missing_forms, run_artifacts
from muntin.training import read_checkpoint

Call = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("loading_here")


def test_compare_two_artefacts(call: Call, exported: Any, run: Path) -> None:
    shutil.copytree(exported.floats, run / "floats")
    document = call("compare", run, "--rounds", "2", "--json").document()
    first, *rows = document["artifacts"]["rows"]
    assert [row["name"] for row in (first, *rows)] == ["fp32", "int8", "float"]
    assert [Path(row["path"]) for row in rows] == [run / "artifact", run / "floats"]
    for row, path in zip(rows, (run / "artifact", run / "floats"), strict=True):
        assert row["test"] == pytest.approx(call("evaluate", path, "--json").document()["score"])
        assert row["validation"] == pytest.approx(call("evaluate", path, "--split", "validation", "--json").document()["score"])
        assert row["bytes"] == sum(file.stat().st_size for file in path.iterdir())
        assert 0 < row["median_ms"] <= row["p90_ms"] and 0.9 < row["same_labels"] <= 1
        assert row["peak_mib"] is None or row["peak_mib"] > 0
    assert first["same_labels"] == 1 and first["test"] == pytest.approx(call("evaluate", run, "--json").document()["score"])
    assert document["artifacts"]["take"] in ("int8", "float")
    assert (document["artifacts"]["height"], document["artifacts"]["samples"]) == (64, {"validation": 2, "test": 2})
    assert document["missing"] == [{"name": "compressed", "command": f"muntin compress {run}"}]


def test_compare_output(call: Call, run: Path, tmp_path: Path, write_small: Callable[..., Path]) -> None:
    write_small(run / "other")
    answer = call("compare", run, "--rounds", "1")
    assert (answer.code, answer.err) == (0, "")
    assert all(words in answer.out for words in ("validation mIoU", "test mIoU", "labels as fp32", "peak memory"))
    assert f"take int8 ({run / 'artifact'}): the fastest whose validation score" in " ".join(answer.out.split())
    lines = answer.out.splitlines()
    assert all(line == line.rstrip() and line for line in lines)
    take = next(number for number, line in enumerate(lines) if line.startswith("take "))
    assert lines[take + 1].startswith(" " * 10) and len(lines[take + 1]) <= 100
    assert "missing   compressed: `muntin compress" in answer.out
    assert "size      latency at 64x64: the size of the export; pictures: validation 2, test 2\n" in answer.out
    assert f"note      left out, of other weights than the run's newest: {run / 'other'}; export again" in answer.out
    shutil.rmtree(run / "artifact")
    text = call("compare", run).mistake()
    assert "holds no artefact of its weights" in text and text.endswith(f"`muntin export {run}` writes one")


def test_compare_of_older_artefacts(call: Call, run: Path) -> None:
    """All artefacts of other weights are named, with what renews them."""
    shutil.copytree(run / "artifact", run / "backup")
    shutil.rmtree(run / "checkpoints" / "step-00000150")  # the newest weights are others now
    text = call("compare", run).mistake()
    assert f"left out, of other weights than the run's newest: {run / 'artifact'}, {run / 'backup'}; export again, or" in text
    assert text.endswith(f"`muntin export {run}` writes one")  # it replaces the older artefact


def test_artefacts_of_a_run(call: Call, run: Path) -> None:
    shutil.copytree(run / "artifact", run / "backup")  # the same artefact again: not one of its own
    call("export", run, "--set", "quantization.keep=['0']", "-o", run / "kept", "--sizes", "fixed", "--json").document()
    checkpoint = read_checkpoint(run)
    artifacts, notes = run_artifacts(checkpoint)
    assert ([entry.name for entry in artifacts], notes) == (["int8 in artifact", "int8 in kept"], [])
    assert len(run_artifacts(checkpoint, run)[0]) == 2  # the run's folder given again
    (run / "compressed").mkdir()
    record = run / "compressed" / "front.json"
    front = {"chosen": 1, "weights": checkpoint.state.weights, "points": [{"number": 1, "artifact": "../kept", "kept": True}]}
    record.write_text(json.dumps(front))
    assert [entry.name for entry in run_artifacts(checkpoint)[0]] == ["int8 in artifact", "int8 in kept", "compressed"]
    missed = [{"number": 1, "artifact": "../kept", "kept": False}]
    for other, words in (
        ({"weights": "0"}, "of other weights than the run's newest"), ({"weights": ""}, "did not record its weights"),
        ({"points": []}, f"{record}: "), ({"points": missed}, "keeps its budget"),
    ):  # fmt: skip
        record.write_text(json.dumps(front | other))
        assert words in run_artifacts(checkpoint)[1][0]
    shutil.rmtree(run / "compressed")
    (run / "kept" / "weights.safetensors").write_bytes(b"")
    artifacts, notes = run_artifacts(checkpoint)
    assert [entry.name for entry in artifacts] == ["int8"] and notes[0].startswith(f"left out: {run / 'kept' / 'weights.safetensors'}: ")
    assert run_artifacts(read_checkpoint(run / "checkpoints" / "step-00000075"))[0] == []  # of other weights


def test_place_of_the_missing_artefact(exported: Any, run: Path) -> None:
    shutil.rmtree(run / "artifact")
    shutil.copytree(exported.floats, run / "artifact")
    checkpoint = read_checkpoint(run)
    missing = missing_forms(checkpoint, run_artifacts(checkpoint)[0])
    assert (missing[0].name, missing[0].command) == ("int8", f"muntin export {run} -o {run / 'artifact-int8'}")
