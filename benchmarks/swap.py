"""Count late, failed and wrong answers while versions change under load.

    python benchmarks/swap.py [--output runs/benchmark-swap] [--share 0.4] [--memory-swaps 200] [--json]

One server (`muntin serve`, two threads, on all cores: with one thread OpenVINO 2026.4 does not raise what it fails at), one load generator
(on the last core): Poisson arrivals of 512 x 512 pictures at `--share` of the server's saturation. First without swaps: 40 s to measure the
normal latency, and two minutes more, in which bursts of arrivals make some answers late without any swap. Then 20 versions are loaded
through the repository API one after the other. Fifteen are sound, and each answers differently; one has an altered file, one does not
compute its golden answers, one lacks its weights. Two pass every check and take over: then the engine of one raises an error at every
request, and the process of the other's is killed (SIGKILL) while it computes one (an engine that dies between two requests is started again
by the next one, and its version stays). Requests continue all the time, and failed and late ones count as at any other time. Every answer
is compared with the versions' expected answers. Goal: none failed, none wrong, none later than the normal p99 + 50 ms; and every sound
version takes over, every broken one is refused, and the two whose engines fail and die are sent back.

Then a small classifier is swapped `--memory-swaps` times under light load. The resident memory of the server and of its engine's process is
read each time when the old version's process has ended, or after some seconds. Its growth is the slope of the second half's readings, by
least squares; the quarters' values are means. Existing parts are not measured again; a part of other settings, or of another machine, is
refused. Time: about a quarter of an hour for the first, half an hour for the second. Run it alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import muntin
from kept import Row, kept_row
from muntin.artifact import open_artifact, write_artifact
from muntin.runtime import describe_hardware
from muntin.runtime.host.memory import resident_of
from serving_peers.load import HOST, Exchange, Load, same
from serving_peers.models import WORKLOADS, Workload, exchange, make_artifact, pictures
from serving_peers.servers import Launch, family, free_port, open_local, running

SOUND, LATER_MS, CONTROL = 4, 50.0, 6
SPREAD = 0.01
"""Largest difference in scores between an answer and its version's. Versions have to differ by more."""
ENDS_S = 10.0
"""Seconds in which the process of an old version's engine has to end before memory is read."""
QUARTERS = 4
COMPUTES_S, LOOK_S, LOOKS = 10.0, 0.001, 3
"""Seconds in which the engine to be killed has to get a request, the polling interval, and how many polls in a row have to find it busy:
its threads may spin for a moment after a call."""
MARK = 7
"""First byte of every picture that is sent. The engine of the failing version fails at it."""
PLAN = [kind for broken in ("altered", "golden", "dies", "missing", "fails") for kind in ("sound", "sound", "sound", broken)]
DUE = {"sound": "took over", "altered": "refused", "golden": "refused", "missing": "refused", "dies": "sent back", "fails": "sent back"}
"""Expected outcome of a version of each kind."""


@dataclass(frozen=True, kw_only=True)
class AnyVersion(Exchange):
    """An answer is right if one of the versions gives it."""

    versions: tuple[tuple[bytes, ...], ...]

    def alike(self, which: int, came: bytes) -> bool:
        return any(same(answers[which], came, self.dtype, spread=SPREAD) for answers in self.versions)


def make_failing(sound: Path, path: Path) -> Path:
    """The same model with a step behind it that cannot be done where a picture starts with `MARK`; golden and warm-up pictures pass."""
    artifact = open_artifact(sound)
    model = onnx.load_model_from_string(artifact.model_bytes())
    graph, manifest = model.graph, artifact.manifest
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["sound" if name == output else name for name in node.output]
        node.input[:] = ["sound" if name == output else name for name in node.input]
    constants = {"zero": [0], "one": [1], "mark": [MARK], "all": [-1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), f"trap.{name}") for name, value in constants.items())
    graph.initializer.append(numpy_helper.from_array(np.float32(1e-6), "trap.little"))
    graph.node.extend(
        [
            helper.make_node("Reshape", [graph.input[0].name, "trap.all"], ["trap.bytes"]),
            helper.make_node("Slice", ["trap.bytes", "trap.zero", "trap.one"], ["trap.first"]),
            helper.make_node("Cast", ["trap.first"], ["trap.wide"], to=TensorProto.INT64),
            helper.make_node("Equal", ["trap.wide", "trap.mark"], ["trap.is"]),
            helper.make_node("Cast", ["trap.is"], ["trap.flag"], to=TensorProto.INT64),
            helper.make_node("Add", ["trap.flag", "trap.one"], ["trap.count"]),
            helper.make_node("Slice", ["trap.bytes", "trap.zero", "trap.count"], ["trap.one_or_two"]),
            helper.make_node("Squeeze", ["trap.one_or_two", "trap.zero"], ["trap.single"]),
            # it has to count for the answer, if ever so little, or an engine takes it out
            helper.make_node("Cast", ["trap.single"], ["trap.float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["trap.float", "trap.little"], ["trap.nothing"]),
            helper.make_node("Add", ["sound", "trap.nothing"], [output]),
        ]
    )
    write_artifact(
        path, model=model, signature=manifest.signature, layers=manifest.layers, golden=list(artifact.golden()),
        golden_tolerance=manifest.golden_tolerance, precision=manifest.precision, example=manifest.example,
    )  # fmt: skip
    return path


def make(kind: str, sound: Path, new: Path) -> Path:
    """A version of one kind beside the directory of versions. One that dies is sound: `kill_engine` sees to the rest."""
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(exist_ok=True)
    if kind == "fails":
        make_failing(sound, new)
    else:
        shutil.copytree(sound, new)
    weights = new / "weights.safetensors"
    if kind == "altered":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif kind == "missing":
        weights.unlink()
    elif kind == "golden":
        artifact = open_artifact(sound)
        shutil.rmtree(new)
        shifted = [(images, np.roll(scores, 1, axis=1)) for images, scores in artifact.golden()]
        manifest = artifact.manifest
        write_artifact(
            new, model=onnx.load_model_from_string(artifact.model_bytes()), signature=manifest.signature, layers=manifest.layers,
            golden=shifted, golden_tolerance=manifest.golden_tolerance, precision=manifest.precision, example=manifest.example,
        )  # fmt: skip
    return new


def load_version(port: int, name: str, number: int) -> tuple[int, float]:
    """(status, seconds) of loading it through the repository API. Raises RuntimeError where no answer comes."""
    body = json.dumps({"parameters": {"version": str(number)}}).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}/v2/repository/models/{name}/load", body)
    began = time.monotonic()
    try:
        with open_local(request, timeout=600) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
    except (OSError, http.client.HTTPException) as error:
        waited = time.monotonic() - began
        raise RuntimeError(f"version {number} of {name}: no answer to its loading came, after {waited:.0f} s: {error}") from error
    return status, time.monotonic() - began


def read_index(port: int, output: Path) -> list[Row]:
    """Return the server's list of its versions, without this machine's paths."""
    with open_local(f"http://{HOST}:{port}/v2/repository/index", b"{}", timeout=60) as answer:
        index: list[Row] = json.loads(answer.read().decode().replace(f"{output}/", ""))
    return index


def kill_engine(server: int, before: set[int]) -> None:
    """Kills the engine that a server has begun beside the processes of `before`, when it computes. Raises RuntimeError where there is none,
    or nothing is asked of it."""
    started = [pid for pid in family(server).keys() - before if "serving.worker.child" in command_of(pid)]
    if len(started) != 1:
        raise RuntimeError(f"the engine of the version that is to die: {len(started)} processes were begun for it, not one")
    (engine,) = started
    end, busy = time.monotonic() + COMPUTES_S, 0
    while busy < LOOKS:
        if time.monotonic() > end:
            raise RuntimeError(f"the engine of the version that is to die: it was asked nothing in {COMPUTES_S:g} s")
        time.sleep(LOOK_S)
        busy = busy + 1 if computes(engine) else 0
    os.kill(engine, signal.SIGKILL)


def command_of(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    return ""


def computes(process: int) -> bool:
    """Return whether one of its threads runs, or waits for a core."""
    with suppress(OSError):  # it ends meanwhile
        for thread in Path(f"/proc/{process}/task").glob("[0-9]*"):
            # A name stands before this in brackets, and may hold blanks and brackets.
            if (thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "R":
                return True
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


def sound_versions(workload: Workload, folder: Path, count: int) -> list[Path]:
    """Artefacts of the same model with weights of their own, made where they are not there yet."""
    paths = [folder / str(seed) for seed in range(count)]
    for seed, path in enumerate(paths):
        make_artifact(workload, path, seed=seed)
    return paths


def any_version(workload: Workload, paths: list[Path]) -> AnyVersion:
    """Return the requests and each version's answers. Raises ValueError if two versions answer alike, because a wrong
    answer would not be noticed. (Two pictures may have the same answer; `serving.py` checks that answers are not mixed up.)"""
    images = pictures(workload.side).copy()
    images[:, 0, 0, 0] = MARK
    versions = []
    for path in paths:
        session = muntin.load(path, threads=1, shapes=())
        call = session.labels if workload.output == "labels" else session
        answers = np.concatenate([call(images[n : n + 1]) for n in range(len(images))])
        versions.append(exchange(workload, images, answers, path=f"/v2/models/{workload.name}/infer", tensors=True))
    first = versions[0]
    found = AnyVersion(
        requests=first.requests, answers=first.answers, dtype=first.dtype, versions=tuple(version.answers for version in versions)
    )
    for one, other in combinations(versions, 2):
        if any(same(due, came, first.dtype, spread=SPREAD) for due, came in zip(one.answers, other.answers, strict=True)):
            raise ValueError("two versions answer alike: make others")
    return found


def swaps(output: Path, share: float, cores: tuple[set[int], set[int]]) -> Row:
    workload = WORKLOADS["segment"]
    sound = sound_versions(workload, output / "sound", SOUND)
    found = any_version(workload, sound)
    models = _empty(output / "models")
    make("sound", sound[0], models / "1")
    # Before the load: it is this process that sends requests, and one that is sent late would count as answered late.
    made = [make(kind, sound[number % SOUND], output / "new" / str(number)) for number, kind in enumerate(PLAN, 2)]
    loads: list[Row] = []
    back: set[str] = set()
    stop, port = threading.Event(), free_port()

    def change(pid: int) -> None:
        for number, (kind, new) in enumerate(zip(PLAN, made, strict=True), 2):
            new.rename(models / str(number))
            before = set(family(pid))
            status, seconds = load_version(port, workload.name, number)
            if kind == "dies" and status == 200:
                kill_engine(pid, before)
            loads.append({"version": number, "kind": kind, "status": status, "seconds": seconds})
            print(f"  version {number:>2} {kind:<8} {status} {seconds:.1f} s", file=sys.stderr)
            if stop.wait(2.0):
                return
            back.update(sent_back(read_index(port, output)))  # each time: the server forgets what became of versions of long ago

    os.sched_setaffinity(0, cores[1])
    server = running(_server(workload, models, port), port, cores=cores[0], log=output / "server.log", variables=_cache(output))
    # The server ends before the thread is waited for: what it asks then fails.
    with ThreadPoolExecutor(1) as pool, server as process, Load(port, found) as load:
        most = load.closed(concurrency=4, seconds=6)["answers_per_s"]
        rate = share * most
        normal = load.open(rate=rate, seconds=40, objective_ms=1000)
        late_ms = normal["p99_ms"] + LATER_MS
        control = _together([load.open(rate=rate, seconds=20, objective_ms=late_ms, seed=101 + n, warm=0.0) for n in range(CONTROL)])
        changing = pool.submit(change, process.pid)
        parts = []
        try:
            while not changing.done():
                parts.append(load.open(rate=rate, seconds=20, objective_ms=late_ms, seed=len(parts) + 1, warm=0.0))
        finally:
            stop.set()
        changing.result()  # raises what ended it too early
        index = read_index(port, output)
    back |= sent_back(index)
    for entry in loads:
        entry["outcome"] = outcome_of(entry, back)
        entry["as_due"] = entry["outcome"] == DUE[entry["kind"]]
    return {
        "saturation_per_s": most, "rate": rate, "normal": normal, "control": control, "loads": loads, "index": index,
        "not_as_due": sum(not entry["as_due"] for entry in loads), **_together(parts),
    }  # fmt: skip


def _together(parts: list[Row]) -> Row:
    """Add up several loads with one objective; `later`: answers beyond it. A load that got no answer has no times."""
    failures: dict[str, int] = {}
    for part in parts:
        for status, count in part["failures"].items():
            failures[status] = failures.get(status, 0) + count
    requests = sum(part["requests"] for part in parts)
    inside = sum(round(part["goodput_per_s"] * part["seconds"]) for part in parts)
    return {
        "requests": requests, "failures": failures, "later": requests - sum(failures.values()) - inside,
        **{name: max((part[name] for part in parts if part[name] is not None), default=None) for name in ("p99_ms", "worst_ms")},
    }  # fmt: skip


def _told(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.1f} ms"


def memory(output: Path, count: int, cores: tuple[set[int], set[int]]) -> Row:
    workload = WORKLOADS["classify"]
    sound = sound_versions(workload, output / "small", 2)
    found = any_version(workload, sound)
    models = _empty(output / "small-models")
    make("sound", sound[0], models / "1")
    resident: list[float] = []
    engines: list[int] = []
    stop, port = threading.Event(), free_port()

    def change(pid: int, fewest: int) -> None:
        for number in range(2, count + 2):
            if stop.is_set():
                return
            make("sound", sound[number % 2], output / "new" / str(number)).rename(models / str(number))
            status, _ = load_version(port, workload.name, number)
            if status != 200:
                raise RuntimeError(f"version {number}, a sound one, was not taken: {status}")
            shutil.rmtree(models / str(number - 1))
            children = engines_left(pid, fewest)
            engines.append(len(children))
            resident.append(sum(resident_of(process) or 0 for process in (pid, *children)) / 2**20)

    os.sched_setaffinity(0, cores[1])
    server = running(_server(workload, models, port), port, cores=cores[0], log=output / "server-small.log", variables=_cache(output))
    with ThreadPoolExecutor(1) as pool, server as process, Load(port, found) as load:
        fewest = max(1, len(engines_left(process.pid, 1)))
        changing = pool.submit(change, process.pid, fewest)
        failed: dict[str, int] = {}
        asked = 0
        try:
            while not changing.done():
                part = load.open(rate=20, seconds=20, objective_ms=1000, warm=0.0, seed=asked)
                asked += part["requests"]
                for status, number in part["failures"].items():
                    failed[status] = failed.get(status, 0) + number
        finally:
            stop.set()
        changing.result()
    quarters = [float(np.mean(part)) for part in np.array_split(resident, QUARTERS)]
    second_half = resident[count // 2 :]
    return {
        "swaps": count, "requests": asked, "failures": failed, "resident_mib": resident, "engines": engines,
        "more_engines": sum(left > fewest for left in engines), "quarters_mib": quarters,
        "mib_per_swap": float(np.polynomial.Polynomial.fit(range(len(second_half)), second_half, 1).convert().coef[1]),
    }  # fmt: skip


def engines_left(server: int, wanted: int) -> set[int]:
    """The processes that a server has started, when there are no more of them than wanted, or after `ENDS_S` seconds."""
    end = time.monotonic() + ENDS_S
    while len(started := family(server).keys() - {server}) > wanted and time.monotonic() < end:
        time.sleep(0.2)
    return started


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _server(workload: Workload, models: Path, port: int) -> Launch:
    command = [
        sys.executable, "-m", "muntin", "serve", str(models), "--host", HOST, "--http-port", str(port), "--no-grpc",
        "--name", workload.name, "--threads", "2", "--max-batch", "4", "--trial", "50",
    ]  # fmt: skip
    return Launch(command=command, ready="/v2/health/ready")


def _cache(output: Path) -> dict[str, str]:
    return {"MUNTIN_CACHE": str((output / "cache").resolve())}


def print_table(row: Row, held: Row | None) -> None:
    normal = row["normal"]
    print(f"{len(row['loads'])} versions at {row['rate']:.1f} requests/s ({row['saturation_per_s']:.1f} is the most):")
    for load in row["loads"]:
        outcome = load["outcome"] if load["status"] == 200 else f"{load['outcome']}, {load['status']}"
        note = "" if load["as_due"] else f"  NOT AS DUE: {DUE[load['kind']]}"
        print(f"  {load['version']:>3}  {load['kind']:<8} {outcome:<14} {load['seconds']:>6.1f} s{note}")
    print(f"versions (goal 0): {row['not_as_due']} of {len(row['loads'])} not taken, refused or sent back as they should")
    print(f"normal: p50 {normal['p50_ms']:.1f} ms, p99 {normal['p99_ms']:.1f} ms, worst {normal['worst_ms']:.1f} ms")
    control = row["control"]
    print(
        f"no swaps: {control['later']} of {control['requests']} later than p99 + {LATER_MS:g} ms, worst {_told(control['worst_ms'])}, "
        f"failures: {control['failures'] or 'none'}"
    )
    print(f"swapping: p99 {_told(row['p99_ms'])} at most, worst {_told(row['worst_ms'])}")
    wrong = row["failures"].get("wrong", 0)
    failed = sum(row["failures"].values()) - wrong
    print(f"{row['requests']} requests (goal 0 each): {failed} failed, {wrong} wrong, {row['later']} later than p99 + {LATER_MS:g} ms")
    if held is not None:
        quarters = ", ".join(f"{mib:.1f}" for mib in held["quarters_mib"])
        print(
            f"{held['swaps']} swaps of a small model: {quarters} MiB (means of quarters), {held['mib_per_swap'] * 1024:+.1f} KiB a swap "
            f"over the second half, {held['more_engines']} readings with more engines than one; {held['requests']} requests, failures: "
            f"{held['failures'] or 'none'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-swap"))
    parser.add_argument("--share", type=float, default=0.4, help="of what the server can do, that is asked of it")
    parser.add_argument("--memory-swaps", type=int, default=200, help="swaps of the second part; 0: leave it out")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    if 0 < arguments.memory_swaps < QUARTERS:
        parser.error(f"--memory-swaps {arguments.memory_swaps}: give at least {QUARTERS}, a reading for each quarter, or 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server that runs is stopped too
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    hardware = describe_hardware()  # before this process is bound to a core
    usable = sorted(os.sched_getaffinity(0))
    cores = (set(usable), {usable[-1]})
    settings = {"share": arguments.share, "plan": PLAN, "later_ms": LATER_MS, "workload": asdict(WORKLOADS["segment"])}
    row = kept_row(output / "swaps.json", settings, partial(swaps, output, arguments.share, cores), hardware=hardware)
    held = None
    if arguments.memory_swaps:
        settings = {"swaps": arguments.memory_swaps, "workload": asdict(WORKLOADS["classify"])}
        held = kept_row(output / "memory.json", settings, partial(memory, output, arguments.memory_swaps, cores), hardware=hardware)
    if arguments.json:
        print(json.dumps({"benchmark": "swap", "swaps": row, "memory": held}, indent=1))
    else:
        print_table(row, held)


if __name__ == "__main__":
    main()
