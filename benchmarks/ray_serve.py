"""Compare `muntin serve` with muntin's application of Ray Serve, and kill replicas under load.

    python benchmarks/ray_serve.py [--model segment] [--seconds 5] [--kills 5]

The same artifact, requests (one image each, binary tensors) and engine in `muntin serve` with one stream for each replica, and in Ray Serve
with one replica and with two. A killed process (in `muntin serve` the engine's) is replaced before the next one is killed. Needs the extras
`bench` and `ray`, and Linux. Run it alone: it takes some ten minutes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from serving_peers.load import Exchange, Load, together
from serving_peers.models import WORKLOADS, Workload, check_distinct, engine_answers, exchange, make_artifact, sample_images
from serving_peers.servers import ENGINE, Launch, Wanted, begin, free_port, loaded, muntin_launch, processes_with, ray_replicas

SHARE = 0.3
"""Share of saturation, at which replicas are killed."""
LOOK_S, RETURNS_S, PAUSE_S = 0.1, 60.0, 2.0
"""Polling interval; seconds in which a killed process has to be replaced; pause between kills."""
VICTIMS = {"muntin": ENGINE, "ray": "ray::ServeReplica:{name}:Model"}
"""Part of the command line of the processes to be killed, by the kind of server."""


class RayServeOptions(Options):
    model: str = option("segment", "model", choices=tuple(WORKLOADS))
    seconds: int = option(5, "of each load", least=1)
    kills: int = option(5, "processes that are killed, one after the other", least=1)


def launch(kind: str, replicas: int, workload: Workload, artifact: Path, port: int, folder: Path) -> Launch:
    if kind == "muntin":
        options = {"max_batch": workload.max_rows, "streams": replicas, "threads": replicas}
        return muntin_launch(artifact, name=workload.name, port=port, **options)
    common = {"environment": Path(sys.prefix), "threads": 1, "objective_ms": None, "wait_ms": 0}
    wanted = Wanted(workload=workload, artifact=artifact, scratch=folder, port=port, **common)
    return ray_replicas(wanted, replicas=replicas)


def kill_in_turn(server: int, title: str, count: int, stop: threading.Event) -> list[float]:
    """Kill the oldest such process `count` times. Returns the seconds until a new one had taken the place of each."""
    number, returned = len(processes_with(server, title)), []
    for _ in range(count):
        if stop.wait(PAUSE_S):
            break
        killed = processes_with(server, title)[0]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        while len(left := processes_with(server, title)) < number or killed in left:
            if time.monotonic() > began + RETURNS_S or stop.wait(LOOK_S):
                raise RuntimeError(f"{title}: a killed process was not replaced within {RETURNS_S:g} s")
        returned.append(time.monotonic() - began)
    return returned


def under_kills(load: Load, rate: float, seconds: float, server: int, title: str, kills: int) -> Row:
    """Loads in a row, until the killing has ended."""
    arrivals = {"rate": rate, "seconds": seconds, "objective_ms": 1000, "grace": RETURNS_S}
    returned, parts = load.open_until(partial(kill_in_turn, server, title, kills), **arrivals)
    total = together(parts)
    figures = {name: total[name] for name in ("requests", "failures", "worst_ms")}
    return {"rate": rate, "kills": len(returned), "returned_s": returned, **figures}


def measure(kind: str, replicas: int, found: Exchange, run: Run, cores: set[int]) -> Row:
    workload, seconds, output, port = WORKLOADS[run.options.model], run.options.seconds, run.folder.resolve(), free_port()
    with TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        command = launch(kind, replicas, workload, output / workload.name, port, Path(folder))
        with loaded(command, port, found, cores=cores, log=output / f"{kind}-{replicas}.log") as (load, server):
            load.closed(concurrency=2, seconds=seconds)  # all replicas get some
            alone = load.closed(concurrency=1, seconds=seconds)
            closed = [load.closed(concurrency=number, seconds=seconds) for number in workload.concurrency]
            best = max(closed, key=lambda row: float(row["answers_per_s"]))
            title = VICTIMS[kind].format(name=workload.name)
            killed = under_kills(load, SHARE * best["answers_per_s"], seconds, server, title, run.options.kills)
    return {"kind": kind, "replicas": replicas, "alone": alone, "closed": closed, "best": best, "killed": killed}


def rows(run: Run) -> Iterator[Row]:
    workload, cores = WORKLOADS[run.options.model], os.sched_getaffinity(0)
    artifact, images = run.folder / workload.name, sample_images(workload.side)
    make_artifact(workload, artifact)
    found = exchange(workload, images, engine_answers(workload, artifact, images))
    check_distinct(found)
    begin(run.folder)
    for kind, replicas in (("muntin", 1), ("ray", 1), ("muntin", 2), ("ray", 2)):
        yield run.row(f"{workload.name}-{kind}-{replicas}", measure, kind, replicas, found, run, cores, kind=kind, replicas=replicas)


def shown(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        name, unit = ("muntin serve", "stream") if row["kind"] == "muntin" else ("Ray Serve", "replica")
        server = f"{name}, {row['replicas']} {unit}" + "s" * (row["replicas"] > 1)
        unkilled = sum(sum(load["failures"].values()) for load in (row["alone"], *row["closed"]))
        returned = fmean(row["killed"]["returned_s"]) if row["killed"]["returned_s"] else None
        yield {**row, "server": server, "lost": sum(row["killed"]["failures"].values()), "unkilled": unkilled, "returned": returned}


def newest(document: Document) -> str:
    found = list(shown(document.rows))
    rates = ", ".join(f"{row['server']} {row['best']['answers_per_s']:.1f}" for row in found)
    killed = [row["killed"] for row in found if row["kind"] == "ray"]
    requests, kills = (sum(row[name] for row in killed) for name in ("requests", "kills"))
    worst = max(row["worst_ms"] for row in killed)
    lost = sum(row["lost"] for row in found if row["kind"] == "ray")
    return f"answers a second: {rates}. {kills} of Ray's replicas killed: {requests} requests, {lost} lost, one waited {worst / 1e3:.0f} s"


BENCHMARK = Benchmark(
    name="ray_serve",
    options=RayServeOptions,
    measure=rows,
    about="""512 x 512 unless another model is named, OpenVINO, one thread a replica; processes are killed during Poisson arrivals at 30 %
of saturation. Ray's proxy, two ingresses and the replicas share the cores with each other. With one replica a request waits until a new one
has started. Goal: no request without a right answer.""",
    newest=newest,
    n=lambda rows: f"{rows[0]['killed']['kills']} kills a server",
    variant=lambda document: str(document.settings["model"]),
    tables=(
        Table(
            columns=columns(
                "server, answers/s=best.answers_per_s:.1f, p50 ms=best.p50_ms:.1f, p99 ms=best.p99_ms:.1f, alone p50=alone.p50_ms:.1f, "
                "alone p99=alone.p99_ms:.1f, killed=killed.kills, requests=killed.requests, lost, longest ms=killed.worst_ms:.0f, "
                "replaced in s=returned:.1f, lost without kills=unkilled"
            ),
            rows=shown,
        ),
    ),
    goals=tuple(
        Goal(name=name, values=key, case="{server}", rows=shown, at_most=0)
        for name, key in (("lost during kills", "lost"), ("lost without kills", "unkilled"))
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
