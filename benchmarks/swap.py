"""Count late, failed and wrong answers while versions change under load.

    python benchmarks/swap.py [--share 0.4] [--memory-swaps 200]

One `muntin serve` with two threads (with one OpenVINO 2026.4 does not raise its errors), Poisson arrivals of 512 x 512 images. First 160 s
without swaps, since bursts make some answers late without any. Then 20 versions are loaded through the repository API: fifteen are sound;
one has an altered file, one does not compute its reference outputs, one lacks its weights; two take over before the engine of one raises
an error at every request, and that of the other is killed (SIGKILL) while it computes. Then a small classifier is swapped `--memory-swaps`
times (0: not at all) under light load. Time: a quarter of an hour, and half an hour. Run it alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from muntin.artifact import open_artifact, write_artifact
from muntin.runtime.host.memory import resident_of
from serving_peers.load import Exchange, Load, together
from serving_peers.models import CLASSIFY, SEGMENT, Workload, check_distinct, engine_answers, exchange, make_artifact, sample_images
from serving_peers.servers import EARLIER, ENGINE, ask, begin, family, free_port, loaded, muntin_launch, processes_with

SOUND, LATER_MS, CONTROL, QUARTERS = 4, 50.0, 6, 4
ENDS_S = 10.0
"""Seconds in which the process of an old version's engine has to end before memory is read."""
COMPUTES_S, LOOK_S, LOOKS = 10.0, 0.001, 3
"""Seconds in which the engine to be killed has to get a request, the polling interval, and how many polls in a row have to find it busy:
its threads may spin for a moment after a call."""
MARK = 7
"""First byte of every image that is sent. The engine of the failing version fails at it."""
PLAN = [kind for broken in ("altered", "golden", "dies", "missing", "fails") for kind in ("sound", "sound", "sound", broken)]
DUE = {"sound": "took over", "altered": "refused", "golden": "refused", "missing": "refused", "dies": "sent back", "fails": "sent back"}
"""Expected outcome of a version of each kind."""


class SwapOptions(Options):
    share: float = option(0.4, "rate of requests, of the server's saturation")
    memory_swaps: int = option(200, "swaps of the second part; 0: leave it out", least=0, selects=True)

    def __post_init__(self) -> None:
        if 0 < self.memory_swaps < QUARTERS:
            raise ValueError(f"--memory-swaps {self.memory_swaps}: give at least {QUARTERS}, a reading for each quarter, or 0")


# Versions


def make_failing(sound: Path, path: Path) -> None:
    """Write the same model with a step behind it that fails where an image starts with `MARK`; reference and warm-up images pass."""
    artifact = open_artifact(sound)
    model = onnx.load_model_from_string(artifact.model_bytes())
    graph, pixels, output = model.graph, model.graph.input[0].name, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["sound" if name == output else name for name in node.output]
        node.input[:] = ["sound" if name == output else name for name in node.input]
    constants = {"zero": np.int64([0]), "one": np.int64([1]), "mark": np.int64([MARK]), "all": np.int64([-1]), "little": np.float32(1e-6)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), f"trap.{name}") for name, value in constants.items())
    integer, number = {"to": TensorProto.INT64}, {"to": TensorProto.FLOAT}
    steps: list[tuple[str, list[str], str, Row]] = [
        ("Reshape", [pixels, "trap.all"], "trap.bytes", {}),
        ("Slice", ["trap.bytes", "trap.zero", "trap.one"], "trap.first", {}),
        ("Cast", ["trap.first"], "trap.wide", integer),
        ("Equal", ["trap.wide", "trap.mark"], "trap.is", {}),
        ("Cast", ["trap.is"], "trap.flag", integer),
        ("Add", ["trap.flag", "trap.one"], "trap.count", {}),
        ("Slice", ["trap.bytes", "trap.zero", "trap.count"], "trap.one_or_two", {}),
        ("Squeeze", ["trap.one_or_two", "trap.zero"], "trap.single", {}),
        ("Cast", ["trap.single"], "trap.float", number),  # it has to count for the answer a little, or an engine removes it
        ("Mul", ["trap.float", "trap.little"], "trap.nothing", {}),
        ("Add", ["sound", "trap.nothing"], output, {}),
    ]
    graph.node.extend(helper.make_node(kind, inputs, [result], **attributes) for kind, inputs, result, attributes in steps)
    write_changed(sound, path, model, list(artifact.golden_images()))


def write_changed(sound: Path, path: Path, model: onnx.ModelProto, golden: list[Any]) -> None:
    """Write an artifact like another one with other reference outputs or another graph."""
    manifest = open_artifact(sound).manifest
    write_artifact(
        path, model=model, signature=manifest.signature, layers=manifest.layers, golden=golden,
        golden_tolerance=manifest.golden_tolerance, precision=manifest.precision, example=manifest.example,
    )  # fmt: skip


def make(kind: str, sound: Path, new: Path) -> Path:
    """A version of one kind beside the directory of versions. One that dies is sound: `kill_engine` does the rest."""
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fails":
        make_failing(sound, new)
    elif kind == "golden":
        artifact = open_artifact(sound)
        shifted = [(images, np.roll(scores, 1, axis=1)) for images, scores in artifact.golden_images()]
        write_changed(sound, new, onnx.load_model_from_string(artifact.model_bytes()), shifted)
    else:
        shutil.copytree(sound, new)
        weights = new / "weights.safetensors"
        if kind == "altered":
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        elif kind == "missing":
            weights.unlink()
    return new


def sound_versions(workload: Workload, folder: Path, count: int) -> tuple[list[Path], Exchange]:
    """Artifacts of the same model with weights of their own, and requests that any of them may answer. Raises ValueError if two answer
    alike. (Two images may have the same answer; `serving.py` checks that answers are not mixed up.)"""
    paths = [folder / str(seed) for seed in range(count)]
    for seed, path in enumerate(paths):
        make_artifact(workload, path, seed=seed)
    images = sample_images(workload.side).copy()
    images[:, 0, 0, 0] = MARK
    found = exchange(workload, images, *(engine_answers(workload, path, images) for path in paths))
    check_distinct(found)
    return paths, found


# Loads and kills


def load_version(port: int, name: str, number: int) -> tuple[int, float]:
    """(status, seconds) of loading it through the repository API. Raises OSError without a response."""
    began = time.monotonic()
    body = json.dumps({"parameters": {"version": str(number)}}).encode()
    status, _ = ask(port, f"/v2/repository/models/{name}/load", body, timeout=600)
    return status, time.monotonic() - began


def read_index(port: int, output: Path) -> list[Row]:
    """Return the server's list of its versions, without this machine's paths."""
    _, text = ask(port, "/v2/repository/index", b"{}", timeout=60)
    index: list[Row] = json.loads(text.decode().replace(f"{output}/", ""))
    return index


def kill_engine(server: int, before: set[int]) -> None:
    """Kill the engine that a server has started beside the processes of `before`, when it computes. Raises RuntimeError where there is
    none, or it gets no request."""
    started = [process for process in processes_with(server, ENGINE) if process not in before]
    if len(started) != 1:
        raise RuntimeError(f"the engine of the version that is to die: {len(started)} processes were started for it, not one")
    end, busy = time.monotonic() + COMPUTES_S, 0
    while busy < LOOKS:
        if time.monotonic() > end:
            raise RuntimeError(f"the engine of the version that is to die got no request in {COMPUTES_S:g} s")
        time.sleep(LOOK_S)
        busy = busy + 1 if computes(started[0]) else 0
    os.kill(started[0], signal.SIGKILL)


def computes(process: int) -> bool:
    """Return whether one of its threads runs, or waits for a core."""
    with suppress(OSError):  # it ends meanwhile
        stats = [(thread / "stat").read_text(encoding="utf-8", errors="replace") for thread in Path(f"/proc/{process}/task").iterdir()]
        return any(stat.rpartition(") ")[2].startswith("R") for stat in stats)
    return False


def sent_back(index: list[Row]) -> set[str]:
    """The versions that took over and were rolled back."""
    return {entry["version"] for entry in index if entry["reason"].startswith("rolled back")}


def outcome_of(load: Row, back: set[str]) -> str:
    """Return the outcome of a version, in the words of `DUE`; "failed": the server failed. `back`: versions that were rolled back, perhaps
    before the load was answered."""
    if str(load["version"]) in back:
        return "sent back"
    return "took over" if load["status"] == 200 else "refused" if 400 <= load["status"] < 500 else "failed"


# Measurements


@contextmanager
def served(output: Path, workload: Workload, models: Path, port: int, found: Exchange, cores: set[int]) -> Iterator[tuple[Load, int]]:
    begin(output)
    launch = muntin_launch(models, name=workload.name, port=port, threads=2, max_batch=4, trial=50)
    with loaded(launch, port, found, cores=cores, log=output / f"server-{workload.name}.log") as running:
        yield running


def swaps(output: Path, share: float, cores: set[int]) -> Row:
    (sound, found), models, port = sound_versions(SEGMENT, output / "sound", SOUND), output / "models", free_port()
    shutil.rmtree(models, ignore_errors=True)
    make("sound", sound[0], models / "1")
    # Before the load: this process sends requests, and one that is sent late would count as answered late.
    made = [make(kind, sound[number % SOUND], output / "new" / str(number)) for number, kind in enumerate(PLAN, 2)]
    loads: list[Row] = []
    back: set[str] = set()

    def change(server: int, stop: threading.Event) -> None:
        for number, (kind, new) in enumerate(zip(PLAN, made, strict=True), 2):
            new.rename(models / str(number))
            before = set(family(server))
            status, seconds = load_version(port, SEGMENT.name, number)
            if kind == "dies" and status == 200:
                kill_engine(server, before)
            loads.append({"version": number, "kind": kind, "status": status, "seconds": seconds})
            print(f"  version {number:>2} {kind:<8} {status} {seconds:.1f} s", file=sys.stderr)
            if stop.wait(2.0):
                return
            back.update(sent_back(read_index(port, output)))  # each time: the server forgets earlier versions

    with served(output, SEGMENT, models, port, found, cores) as (load, server):
        most = load.closed(concurrency=4, seconds=6)["answers_per_s"]
        rate = share * most
        normal = load.open(rate=rate, seconds=40, objective_ms=1000)
        late = {"rate": rate, "seconds": 20, "objective_ms": normal["p99_ms"] + LATER_MS}
        control = together([load.open(**late, seed=101 + number, warm=0.0) for number in range(CONTROL)])
        _, parts = load.open_until(partial(change, server), **late)
        index = read_index(port, output)
    for entry in loads:
        entry["outcome"] = outcome_of(entry, back | sent_back(index))
    rates = {"saturation_per_s": most, "rate": rate}
    return {"part": "swaps", **rates, "normal": normal, "control": control, "loads": loads, "index": index, **together(parts)}


def memory(output: Path, count: int, cores: set[int]) -> Row:
    (sound, found), models, port = sound_versions(CLASSIFY, output / "small", 2), output / "small-models", free_port()
    shutil.rmtree(models, ignore_errors=True)
    make("sound", sound[0], models / "1")
    resident: list[float] = []
    engines: list[int] = []

    def change(server: int, fewest: int, stop: threading.Event) -> None:
        for number in range(2, count + 2):
            if stop.is_set():
                return
            make("sound", sound[number % 2], output / "new" / str(number)).rename(models / str(number))
            status, _ = load_version(port, CLASSIFY.name, number)
            if status != 200:
                raise RuntimeError(f"version {number}, a sound one, was not taken: {status}")
            shutil.rmtree(models / str(number - 1))
            children = engines_left(server, fewest)
            engines.append(len(children))
            resident.append(sum(resident_of(process) or 0 for process in (server, *children)) / 2**20)

    with served(output, CLASSIFY, models, port, found, cores) as (load, server):
        fewest = max(1, len(engines_left(server, 1)))
        _, parts = load.open_until(partial(change, server, fewest), rate=20, seconds=20, objective_ms=1000)
    more, total = sum(left > fewest for left in engines), together(parts)
    return {
        "part": "memory", "swaps": count, "requests": total["requests"], "failures": total["failures"], "resident_mib": resident,
        "engines": engines, "more_engines": more,
    }  # fmt: skip


def engines_left(server: int, expected: int) -> set[int]:
    """The processes that a server has started, when there are no more of them than expected, or after `ENDS_S` seconds."""
    end = time.monotonic() + ENDS_S
    while len(started := family(server).keys() - {server}) > expected and time.monotonic() < end:
        time.sleep(0.2)
    return set(started)


def measure(run: Run) -> Iterator[Row]:
    output, cores, count = run.folder.resolve(), os.sched_getaffinity(0), run.options.memory_swaps
    plan = {"plan": PLAN, "later_ms": LATER_MS, "workload": asdict(SEGMENT)}
    yield run.row("swaps", swaps, output, run.options.share, cores, **plan)
    if count:
        yield run.row("memory", memory, output, count, cores, swaps=count, workload=asdict(CLASSIFY))


# Figures


def answers(rows: list[Row]) -> Iterator[Row]:
    """A row for each kind of load: normal, without swaps, with swaps, and the classifier's."""
    for row in rows:
        loads = {"normal latency": row["normal"], "without swaps": row["control"]} if row["part"] == "swaps" else {}
        loads[f"{len(row['loads'])} versions" if loads else f"{row['swaps']} swaps of a classifier"] = row
        for name, load in loads.items():
            wrong, late = load["failures"].get("wrong", 0), load.get("later")
            counts = {"failed": sum(load["failures"].values()) - wrong, "wrong": wrong}
            yield {**load, **counts, "load": name, "late": None if late is None else late / load["requests"], "swapping": load is row}


def versions(rows: list[Row]) -> Iterator[Row]:
    """The versions with their outcomes, which the oldest documents say in the index alone."""
    for row in (row for row in rows if row["part"] == "swaps"):
        for load in row["loads"]:
            yield {"outcome": outcome_of(load, sent_back(row["index"])), **load, "expected": DUE[load["kind"]]}


def held(rows: list[Row]) -> Iterator[Row]:
    """Memory: means of quarters, and the slope of the second half by least squares."""
    for row in (row for row in rows if row["part"] == "memory"):
        resident, half = row["resident_mib"], row["resident_mib"][row["swaps"] // 2 :]
        slope = np.polynomial.Polynomial.fit(range(len(half)), half, 1).convert().coef[1]
        quarters = ", ".join(f"{np.mean(part):.1f}" for part in np.array_split(resident, QUARTERS))
        yield {**row, "first": resident[0], "last": resident[-1], "quarters": quarters, "kib": 1024 * float(slope)}


def swapping(rows: list[Row]) -> list[Row]:
    """The loads during swaps."""
    return [row for row in answers(rows) if row["swapping"]]


def unexpected(document: Document) -> float:
    return sum(row["outcome"] != row["expected"] for row in versions(document.rows))


def growth(document: Document) -> float | None:
    return next((row["kib"] for row in held(document.rows)), None)


def told(text: str) -> Callable[[list[Document]], str]:
    """A text with figures of the newest documents."""

    def written(documents: list[Document]) -> str:
        row = swapping(documents[-1].rows)[0]
        took = [load["seconds"] for load in versions(documents[-1].rows) if load["outcome"] == "took over"]
        grown = [(document.marks, kib) for document in documents if (kib := growth(document)) is not None]
        marks, kib = grown[-1] if grown else ((), np.nan)
        where = " in an earlier server; with today's it was not measured" if EARLIER in marks else ""
        share = f"{100 * row['late']:.2g} %"
        return text.format(**{**row, "late": share, "low": min(took), "high": max(took), "kib": kib, "where": where}).replace(
            " 0 ", " none "
        )

    return written


def newest(document: Document) -> str:
    texts = [told("{load} under load, opened in {low:.2g} to {high:.2g} s: " + COUNTS + ", worst {worst_ms:.0f} ms")([document])]
    return "; ".join(texts + [f"{row['swaps']} swaps: {row['first']:.0f} to {row['last']:.0f} MiB" for row in held(document.rows)])


COUNTS = "{requests:,} answers, {failed} failed, {wrong} wrong, {late} late"
BENCHMARK = Benchmark(
    name="swap",
    options=SwapOptions,
    measure=measure,
    about="""Server and load on both cores, 40 % of the server's saturation, 20 versions one after the other, five of them broken or dying.
Late: later than the normal 99th percentile + 50 ms. Goals: no answer failed, wrong or late; every sound version takes over, every broken
one is refused, and the two whose engines fail and die are sent back. Memory: resident, of the server and its engine's process; the slope of
the second half's readings by least squares. What each swap leaves behind is not known.""",
    newest=newest,
    n=lambda rows: ", ".join(f"{len(row['loads'])} versions" if row["part"] == "swaps" else f"{row['swaps']} swaps" for row in rows),
    variant=lambda document: "20 versions" + " and memory" * (growth(document) is not None),
    tables=(
        Table(
            columns=columns(
                "load, requests, failed, wrong, late=later, of all=late:.3%, p50 ms=p50_ms:.1f, p99 ms=p99_ms:.1f, worst ms=worst_ms:.1f"
            ),
            rows=answers,
        ),
        Table(title="Versions", columns=columns("version, kind, outcome, expected, status, s=seconds:.1f"), rows=versions, paged=False),
        Table(
            title="Memory, MiB",
            columns=columns("swaps, first:.1f, last:.1f, means of quarters=quarters, KiB a swap=kib:+.1f, more engines=more_engines"),
            rows=held,
        ),
    ),
    goals=(
        Goal(name="failed", values="failed", case="{load}", rows=swapping, at_most=0, form="{:.0f}"),
        Goal(name="wrong", values="wrong", case="{load}", rows=swapping, at_most=0, form="{:.0f}"),
        Goal(name="late, of all", values="late", case="{load}", rows=swapping, at_most=0, form="{:.3%}"),
        Goal(name="versions not taken, refused or sent back as expected", values=unexpected, at_most=0, form="{:.0f}"),
        Goal(name="KiB a swap", values=growth, at_most=0, form="{:+.0f}"),
    ),
    blocks={
        "M21": told("20 versions swapped under load: " + COUNTS + " (goal none)"),
        "batcher": told("20 swaps, {failed} failed, {wrong} wrong, {late} late"),
        "limits": told("Swaps delay some answers: {late} were late. Memory grew by some {kib:.0f} KiB a swap{where}."),
    },
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
