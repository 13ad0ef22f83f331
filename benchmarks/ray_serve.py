"""Compare `muntin serve` with muntin's application of Ray Serve, and kill replicas under load.

    python benchmarks/ray_serve.py [--output runs/benchmark-ray] [--model segment] [--seconds 5] [--kills 5] [--json]

The same artefact, requests (one picture each, binary tensors of the Open Inference Protocol) and engine (OpenVINO, one thread a replica) in
`muntin serve` with one stream for each replica, and in Ray Serve with one replica and with two. Ray's processes, the two ingresses and the
replicas share all cores; the load generator is on the last one. Every answer is compared with the expected one. The table's columns:
    answers/s   closed loop, the best of the model's concurrencies, and the 50th and 99th percentile there
    alone       concurrency 1: 50th and 99th percentile
    killed      Poisson arrivals at 30 % of the server's own saturation, while a replica's process is killed (SIGKILL) `--kills` times, the
                next time when a new one has taken its place: requests, those without a right answer (goal 0), the longest time of one.
                In `muntin serve` the engine's process is killed
Existing rows are not measured again; a row of other settings, or of another machine, is refused. Needs the extras `bench` and `ray`, and
Linux. Run it alone: it takes some ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

import muntin
from kept import Row, kept_row
from muntin.runtime import describe_hardware
from options import at_least
from serving_peers.load import HOST, Exchange, Load, same
from serving_peers.models import WORKLOADS, Workload, check_distinct, exchange, make_artifact, pictures
from serving_peers.servers import Launch, family, free_port, running, scratch

SPREAD = 0.01
"""Largest difference of an answer from the expected one, a share of the scores' spread: batches are rounded otherwise than single rows."""
SHARE = 0.3
"""Share of saturation, at which replicas are killed."""
LOOK_S, RETURNS_S, PAUSE_S = 0.1, 60.0, 2.0
"""Polling interval; seconds in which a killed process has to be replaced; pause between kills."""
HERE = Path(__file__).resolve().parent
VICTIMS = {"muntin": "serving.worker.child", "ray": "ray::ServeReplica:{name}:Model"}
"""Part of the command line of the processes to be killed, by the kind of server."""


class Rounded(Exchange):
    """Answers that agree within `SPREAD`."""

    def alike(self, which: int, came: bytes) -> bool:
        return same(self.answers[which], came, self.dtype, spread=SPREAD)


def launch(kind: str, replicas: int, workload: Workload, artifact: Path, port: int, folder: Path) -> Launch:
    options = {"name": workload.name, "max-rows": workload.max_rows}
    if kind == "muntin":
        options = {"name": workload.name, "max-batch": workload.max_rows, "host": HOST, "http-port": port, "streams": replicas}
        command = [sys.executable, "-m", "muntin", "serve", str(artifact), "--no-grpc", "--threads", str(replicas)]
    else:
        options |= {"port": port, "replicas": replicas, "scratch": folder}
        command = [sys.executable, str(HERE / "serving_peers" / "ray_replicas.py"), str(artifact)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return Launch(command=command, ready="/v2/health/ready", variables={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


def victims(server: int, title: str) -> list[int]:
    """The processes of a server with this text in their command line, the oldest first."""
    named = []
    for process, began in family(server).items():
        with suppress(OSError):  # it ends meanwhile
            if title in Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " "):
                named.append((began, process))
    return [process for _, process in sorted(named)]


def kill_in_turn(server: int, title: str, count: int, stop: threading.Event) -> list[float]:
    """Kill the oldest such process `count` times. Returns the seconds until a new one had taken the place of each."""
    number, returned = len(victims(server, title)), []
    for _ in range(count):
        if stop.wait(PAUSE_S):
            break
        killed = victims(server, title)[0]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        while len(left := victims(server, title)) < number or killed in left:
            if time.monotonic() > began + RETURNS_S or stop.wait(LOOK_S):
                raise RuntimeError(f"{title}: a killed process was not replaced within {RETURNS_S:g} s")
        returned.append(time.monotonic() - began)
    return returned


def under_kills(load: Load, rate: float, seconds: float, kills: Callable[[threading.Event], list[float]]) -> Row:
    """Loads in a row, until the killing has ended."""
    stop, parts = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kills, stop)
        try:
            while not killing.done() or not parts:
                parts.append(load.open(rate=rate, seconds=seconds, objective_ms=1000, warm=0.0, seed=len(parts), grace=RETURNS_S))
        finally:
            stop.set()
        returned = killing.result()
    failures: Counter[str] = Counter()
    for part in parts:
        failures.update(part["failures"])
    return {
        "rate": rate,
        "kills": len(returned),
        "returned_s": returned,
        "requests": sum(part["requests"] for part in parts),
        "failures": dict(failures),
        "worst_ms": max((part["worst_ms"] for part in parts if part["worst_ms"] is not None), default=None),
    }


def measure(
    kind: str, replicas: int, found: Exchange, workload: Workload, artifact: Path, output: Path, seconds: float, kills: int,
    cores: tuple[set[int], set[int]],
) -> Row:  # fmt: skip
    port, title = free_port(), VICTIMS[kind].format(name=workload.name)
    os.sched_setaffinity(0, cores[1])
    variables = {"MUNTIN_CACHE": str(output / "cache")}
    with scratch() as folder:
        command = launch(kind, replicas, workload, artifact, port, folder)
        server = running(command, port, cores=cores[0], log=output / f"{kind}-{replicas}.log", variables=variables)
        with server as process, Load(port, found) as load:
            load.closed(concurrency=2, seconds=seconds)  # all replicas get some
            alone = load.closed(concurrency=1, seconds=seconds)
            closed = [load.closed(concurrency=number, seconds=seconds) for number in workload.concurrency]
            best = max(closed, key=lambda row: float(row["answers_per_s"]))
            rate = SHARE * best["answers_per_s"]
            killed = under_kills(load, rate, seconds, partial(kill_in_turn, process.pid, title, kills))
    return {"kind": kind, "replicas": replicas, "alone": alone, "closed": closed, "best": best, "killed": killed}


def print_table(rows: list[Row]) -> None:
    heads = f"{'answers/s':>9} {'p50':>9} {'p99':>9}   {'alone p50':>9} {'p99':>9}"
    print(f"{'server':<24} {heads}   killed: requests, lost, longest time of one, replaced in")
    for row in rows:
        kind, unit = ("muntin serve", "streams") if row["kind"] == "muntin" else ("Ray Serve", "replicas")
        name = f"{kind}, {unit}: {row['replicas']}"
        best, alone, killed = row["best"], row["alone"], row["killed"]
        p50, p99, alone50, alone99 = (
            "-" if value is None else f"{value:.1f} ms" for value in (best["p50_ms"], best["p99_ms"], alone["p50_ms"], alone["p99_ms"])
        )
        returned = f"{np.mean(killed['returned_s']):.1f} s" if killed["returned_s"] else "-"
        worst = "-" if killed["worst_ms"] is None else f"{killed['worst_ms']:,.0f} ms"
        lost = ", ".join(f"{count} {status}" for status, count in killed["failures"].items()) or "none"
        print(
            f"{name:<24} {best['answers_per_s']:>9.1f} {p50:>9} {p99:>9}   {alone50:>9} {alone99:>9}   "
            f"{killed['kills']} killed: {killed['requests']:,}, {lost}, {worst}, {returned}"
        )
    others = sum(sum(load["failures"].values()) for row in rows for load in (row["alone"], *row["closed"]))
    print(f"without kills: {others} requests without a right answer (goal 0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-ray"))
    parser.add_argument("--model", choices=list(WORKLOADS), default="segment")
    parser.add_argument("--seconds", type=at_least(1), default=5, help="of each load")
    parser.add_argument("--kills", type=at_least(1), default=5, help="processes that are killed, one after the other")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server that runs is stopped too
    output, workload = arguments.output.resolve(), WORKLOADS[arguments.model]
    output.mkdir(parents=True, exist_ok=True)
    hardware = describe_hardware()  # before this process is bound to a core
    usable = sorted(os.sched_getaffinity(0))
    cores = (set(usable), {usable[-1]})
    artifact = output / workload.name
    make_artifact(workload, artifact)
    images = pictures(workload.side)
    session = muntin.load(artifact, threads=1, shapes=())
    call = session.labels if workload.output == "labels" else session
    answers = np.concatenate([call(images[n : n + 1]) for n in range(len(images))])
    plain = exchange(workload, images, answers, path=f"/v2/models/{workload.name}/infer", tensors=True)
    found = Rounded(requests=plain.requests, answers=plain.answers, dtype=plain.dtype)
    check_distinct(found)
    rows = []
    for kind, replicas in (("muntin", 1), ("ray", 1), ("muntin", 2), ("ray", 2)):
        settings = {"kind": kind, "replicas": replicas, "model": workload.name, "seconds": arguments.seconds, "kills": arguments.kills}
        measured = partial(measure, kind, replicas, found, workload, artifact, output, arguments.seconds, arguments.kills, cores)
        rows.append(kept_row(output / f"{workload.name}-{kind}-{replicas}.json", settings, measured, hardware=hardware))
    if arguments.json:
        print(json.dumps({"benchmark": "ray_serve", "rows": rows}, indent=1))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
