"""`muntin bench`: a table for a person, one JSON document for a program, one line for a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muntin.cli.bench import table_lines
from muntin.runtime.profiling.bench import Bench, BenchRow
from muntin.runtime.profiling.timing import Latency
from tensor_models import write_tensors

Call = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("loading_here")
QUICK = ("--threads", "1", "--rounds", "2")


def test_bench_json(call: Call, exported: Any) -> None:
    document = call("bench", exported.artifact, "--size", "24x16", "--batch", "1,2", *QUICK, "--json").document()
    assert [row["shape"] for row in document["rows"]] == [[1, 24, 16], [2, 24, 16]]
    assert all(row["latency"]["median_ms"] > 0 and row["images_per_s"] > 0 for row in document["rows"])


def test_bench_options_of_every_artefact(call: Call, exported: Any) -> None:
    words = (exported.artifact, exported.artifact, "--engine", "onnxruntime", "--precision", "f32", "--size", "16")
    document = call("bench", *words, *QUICK, "--json").document()
    assert [(row["engine"], row["precision"], row["cached"]) for row in document["rows"]] == [("onnxruntime", "f32", None)] * 2


def test_bench_of_a_run_beside_artefacts(call: Call, exported: Any) -> None:
    document = call("bench", exported.run, exported.artifact, exported.artifact, *QUICK, "--json").document()
    first, *others = document["rows"]
    assert (first["engine"], first["precision"], first["integers"]) == ("pytorch eager", "f32", False)
    assert first["cached"] is None and first["load_s"] > 0 and (first["peak_mib"] is None or first["peak_mib"] > 0)
    assert document["size_reason"] == "the size of the export of run/artifact"
    for row in others:
        assert row["shape"] == first["shape"] == [1, 64, 64] and row["cached"] is not None
        assert (row["engine"], row["integers"]) == ("openvino", True)
        assert row["ratio"] == pytest.approx(first["latency"]["median_ms"] / row["latency"]["median_ms"])


def test_bench_of_a_run_alone(call: Call, exported: Any) -> None:
    text = call("bench", exported.run, *QUICK).out
    assert "A  trained/run: pytorch eager, f32\n" in text and "64x64" in text and "faster: " not in text
    assert "size: the size of the export; --size measures another\n" in text


def test_bench_table_of_two_artefacts(call: Call, exported: Any) -> None:
    answer = call("bench", exported.artifact, exported.artifact, "--size", "16", "--precision", "f32", *QUICK)
    assert (answer.code, answer.err) == (0, "")
    for words in ("median ms", "p99", "images/s", "load s", "cached", "MiB", "faster", "1.00x", "size: as given\n"):
        assert words in answer.out
    assert "A  run/artifact: openvino, INT8, float layers in f32\nB  run/artifact (2): openvino, INT8, float layers in f32\n" in answer.out


def test_bench_table_of_two_tasks(call: Call, exported: Any, write_small: Callable[..., Path], tmp_path: Path) -> None:
    answer = call("bench", exported.artifact, write_small(tmp_path / "other", task="classify"), "--size", "16", *QUICK)
    assert "differ in task, channels or classes: not compared" in answer.out and "faster: " not in answer.out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be given one core")
def test_bench_on_one_core(exported: Any) -> None:
    cpu = min(os.sched_getaffinity(0))
    start = f"import os; os.sched_setaffinity(0, {{{cpu}}}); from muntin.cli import main; main()"
    words = ("bench", str(exported.artifact), "--size", "16", "--threads", "2", "--rounds", "2")
    ended = subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True, check=True)
    assert ", 1 core, " in ended.stdout
    assert "2 threads on 1 physical core: " in ended.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "big"], "--size big: give"),
        (["--batch", "1,x"], "--batch 1,x: give whole numbers"),
        (["--threads", "0"], "--threads 0: give whole numbers from 1"),
        (["--batch", "0"], "--batch 0: give whole numbers from 1"),
        (["--streams", "1,-2"], "--streams 1,-2: give whole numbers from 1"),
        (["--size", "99999", "--batch", "100"], "100 images of 99999 x 99999 pixels"),
        (["--compile"], "--compile is for runs, which compute in PyTorch, and all of these are artefacts"),
        (["nowhere"], "nowhere does not exist: name an artefact, a run or a checkpoint"),
        (["a"] * 26, "27 candidates: give at most 26"),
    ],
)
def test_bench_mistakes(call: Call, exported: Any, words: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "muntin.training", None)  # as where there is no PyTorch
    assert message in call("bench", exported.artifact, *words).mistake()


def latency(ms: float) -> Latency:
    return Latency(median_ms=ms, p90_ms=ms, p99_ms=ms, calls=1)


def test_bench_table_with_wide_numbers() -> None:
    common: dict[str, Any] = {
        "engine": "openvino", "precision": "f32", "integers": True, "threads": 16, "streams": 16, "held_mib": 1.0, "peak_mib": 12345.0,
        "cached": False, "load_s": 123.25,
    }  # fmt: skip
    rows = [
        BenchRow(name=name, shape=(128, 4096, 4096), latency=latency(ms), images_per_s=1e3, ratio=1.0, **common)
        for name, ms in (("b", 1.25), ("a", 123456.78))
    ]
    lines = table_lines(Bench(rows=tuple(rows), size_reason="", others=None, notes=(), created="", hardware={}), {"b": "A", "a": "B"})
    assert lines[2].split() == [
        "B", "128", "4096x4096", "16", "16", "123456.78", "123456.78", "123456.78", "1000.0", "123.25", "no", "12345", "1.00x",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    apart = Bench(rows=(rows[0], replace(rows[1], ratio=None)), size_reason="", others=None, notes=(), created="", hardware={})
    assert table_lines(apart, {"b": "A", "a": "B"})[2].split()[-1] == "-"


def test_bench_of_named_tensors(call: Call, exported: Any, tmp_path: Path) -> None:
    one, other = (write_tensors(tmp_path / name) for name in ("one", "other"))
    document = call("bench", one.path, other.path, exported.artifact, "--batch", "1,3", "--json", *QUICK).document()
    rows = [(row["shape"], row["dims"], row["rows"], row["ratio"] is None) for row in document["rows"]]
    assert rows[:4] == [(None, {"tokens": 8}, number, False) for number in (1, 1, 3, 3)]
    assert [row[0] for row in rows[4:]] == [[1, 64, 64], [3, 64, 64]]
    assert any("differ in task, channels or classes: not compared" in note for note in document["notes"])
    text = call("bench", one.path, "--dims", "tokens=20", *QUICK)
    assert (text.code, text.err) == (0, "")
    assert "tokens=20" in text.out
    assert "size: as given\n" in text.out
    for words, problem in (
        (("--size", "8"), "takes named tensors: give dims (batch, tokens)"),
        (("--dims", "words=3"), "dims with words=3: give a number from 1 for some of tokens"),
        (("--dims", "tokens"), "--dims tokens: give whole numbers from 1 by the names"),
    ):
        assert problem in call("bench", one.path, *words, *QUICK).mistake()
    assert "takes images: give size" in call("bench", exported.artifact, "--dims", "tokens=3", *QUICK).mistake()
