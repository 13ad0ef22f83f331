"""The harness of the benchmarks: options, rows that are measured once, processes of their own, documents."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Row = dict[str, Any]
HERE: Row = {"cpu": "this", "cores": 2, "features": ["avx2"], "openvino": "1", "torch": "2", "memory_gib": 8}


@pytest.fixture
def harness() -> ModuleType:
    return importlib.import_module("harness")


@pytest.fixture
def counted(harness: ModuleType) -> Any:
    """A benchmark of two rows a seed, which counts its measurements, and a goal that seed 1 misses."""
    documents = importlib.import_module("documents")
    calls: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class CountedOptions(harness.Options):  # type: ignore[misc,name-defined]
        seeds: tuple[int, ...] = harness.seeds_option(0)
        steps: int = harness.option(5, "steps", least=1)
        kinds: tuple[str, ...] = harness.option(("a", "b"), "kinds", choices=("a", "b"), selects=True)
        fast: bool = harness.option(False, "no training")

    def rows(run: Any) -> Iterator[Row]:
        for seed in run.options.seeds:
            for kind in run.options.kinds:

                def measure(seed: int = seed, kind: str = kind) -> Row:
                    calls.append(seed)
                    return {"seed": seed, "kind": kind, "ms": 10.0 + seed}

                yield run.row(f"{kind} {seed}", measure, kind=kind)

    benchmark = harness.Benchmark(
        name="counted",
        options=CountedOptions,
        measure=rows,
        tables=(documents.Table(columns=documents.columns("seed, kind, time=ms:.1f, never")),),
        newest=lambda document: f"{document.rows[0]['ms']:.0f} ms",
        n=documents.seeds_of,
        goals=(documents.Goal(name="ms", values=lambda d: {f"seed {row['seed']}": row["ms"] for row in d.rows}, at_most=10.5),),
    )
    return benchmark, calls


def test_command_line_of_options(counted: Any) -> None:
    benchmark, _ = counted
    options = benchmark.parse(["--seeds", "0", "2", "--kinds", "b", "--fast"])
    assert (options.seeds, options.steps, options.kinds, options.fast) == ((0, 2), 5, ("b",), True)
    assert options.output == Path("runs/benchmark-counted")
    assert benchmark.parse(["--kinds", "b", "--kinds", "a"]).kinds == ("b", "a")
    assert benchmark.parse([]).kinds == ("a", "b")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "argument --steps: 0: give at least 1"),
        (["--kinds", "c"], "argument --kinds: invalid choice: 'c'"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (["--speed", "1"], "unrecognized arguments: --speed 1"),
    ],
)
def test_wrong_options(counted: Any, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        counted[0].parse(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_rows_measured_once(counted: Any, tmp_path: Path) -> None:
    benchmark, calls = counted
    first = benchmark.run(benchmark.parse(["--output", str(tmp_path)]))
    again = benchmark.run(benchmark.parse(["--output", str(tmp_path), "--seeds", "0", "1", "--kinds", "b"]))
    assert calls == [0, 0, 1]
    assert first.rows == [{"seed": 0, "kind": "a", "ms": 10.0}, {"seed": 0, "kind": "b", "ms": 10.0}]
    assert [row["seed"] for row in again.rows] == [0, 1]
    assert (first.n, again.n, first.settings) == ("1 seed", "2 seeds", {"steps": 5, "fast": False})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.json", "b-0.json", "b-1.json"]
    with pytest.raises(SystemExit, match=r"a-0\.json was measured with steps 5 \(now 6\): give another --output"):
        benchmark.run(benchmark.parse(["--output", str(tmp_path), "--steps", "6"]))


def test_document_and_its_text(counted: Any, tmp_path: Path) -> None:
    documents = importlib.import_module("documents")
    benchmark, _ = counted
    document = benchmark.run(benchmark.parse(["--output", str(tmp_path / "rows"), "--seeds", "0", "1", "--kinds", "a"]))
    (tmp_path / "counted.json").write_text(document.to_json())
    read = documents.read_document(tmp_path / "counted.json")
    assert (read.rows, read.machine, read.versions, read.commit) == (document.rows, document.machine, document.versions, document.commit)
    table, goals = benchmark.markdown([read], paged=True)
    assert table.splitlines()[0].split() == ["|", "seed", "|", "kind", "|", "time", "|"]
    assert table.splitlines()[3].split() == ["|", "1", "|", "a", "|", "11.0", "|"]
    assert [cell.strip() for cell in goals.splitlines()[-1].split("|")[1:-1]] == ["ms", "at most 10.5", "seed 0 10", "seed 1 11"]


def test_row_of_another_machine(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    row: Row = {"settings": {"steps": 5}, "ms": 1.5, "hardware": {**HERE, "cpu": "another", "features": []}}
    harness.write_whole(path, row)
    assert harness.read_row(path, {"steps": 5}, {**row["hardware"], "memory_gib": 1}) == row
    with pytest.raises(SystemExit) as ended:
        harness.read_row(path, {"steps": 5}, HERE)
    differs = "hardware.cpu another (now this); hardware.features [] (now ['avx2'])"
    assert ended.value.code == f"{path} was measured with {differs}: give another --output"


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"steps": 5, "training": {"rate": 0.2}, "sides": (512,)}, "training.rate 0.1 (now 0.2)"),
        ({"steps": 5, "training": {"rate": 0.1}}, "sides [512] (now None)"),
        (
            {"steps": 6, "training": {"rate": 0.2}, "sides": [], "x": 1, "y": 2, "z": 3},
            "steps 5 (now 6); training.rate 0.1 (now 0.2); sides [512] (now []); x None (now 1) and 2 more",
        ),
    ],
)
def test_row_of_other_settings(harness: ModuleType, tmp_path: Path, settings: Row, differs: str) -> None:
    path = tmp_path / "row.json"
    row: Row = {"settings": {"steps": 5, "training": {"rate": 0.1}, "sides": [512]}, "ms": 1.5, "hardware": HERE}
    harness.write_whole(path, row)
    assert harness.read_row(path, {**row["settings"], "sides": (512,)}, HERE) == row
    with pytest.raises(SystemExit) as ended:
        harness.read_row(path, settings, HERE)
    assert ended.value.code == f"{path} was measured with {differs}: give another --output"


def test_row_without_settings(harness: ModuleType, tmp_path: Path) -> None:
    harness.write_whole(tmp_path / "row.json", [1, 2])
    with pytest.raises(SystemExit, match="does not say what it was measured with: give another --output"):
        harness.read_row(tmp_path / "row.json", {}, HERE)


def test_failed_row_is_tried_again(harness: ModuleType, tmp_path: Path) -> None:
    answers = iter([{"cannot": "no memory"}, {"ms": 1.5}])
    run = harness.Run(options=harness.Options(output=tmp_path), hardware=HERE)
    assert run.row("deep/row", lambda: next(answers))["cannot"] == "no memory"
    assert not list(tmp_path.rglob("*.json"))
    made = run.row("deep/row", lambda: next(answers))
    assert made["ms"] == 1.5
    assert run.row("deep/row", lambda: next(answers)) == made
    assert json.loads((tmp_path / "deep" / "row.json").read_text()) == made


def _double(value: int) -> Row:
    return {"value": 2 * value, "process": os.getpid()}


def _fail() -> Row:
    raise ValueError("five\nis odd")


def _die() -> Row:
    os._exit(7)


def _sleep() -> Row:
    time.sleep(60)
    return {}


def _fill() -> Row:
    return {"bytes": len(bytearray(6 * 2**30))}


@pytest.mark.slow
def test_process_of_its_own(harness: ModuleType) -> None:
    row = harness.apart(_double, 4)
    assert row["value"] == 8 and row["process"] != os.getpid()
    assert harness.apart(_fail) == {"cannot": "ValueError: five is odd"}
    assert harness.apart(_die) == {"cannot": "its process ended with status 7"}
    assert harness.apart(_sleep, limit_s=3) == {"cannot": "not within 3 s"}
    assert harness.apart(_fill, memory_gib=4)["cannot"].startswith("MemoryError")
