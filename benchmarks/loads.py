"""Load versions while clients keep the server busy, all by `tritonclient` with its own time-outs.

    python benchmarks/loads.py [--loads 20] [--clients 3]

Each client is a process that sends one image after the other to `muntin serve` and compares every answer with the first one. After 30 s
without loads new versions are loaded by HTTP and gRPC in turns, with ten seconds between them: the same model in artifacts of their own, so
nothing is compiled yet. Time: about a quarter of an hour. Run it alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from documents import Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from muntin.artifact.manifest import render_manifest
from muntin.artifact.store import read_manifest
from serving_peers.load import HOST, figures
from serving_peers.models import IMAGES, SEGMENT, make_artifact, sample_images
from serving_peers.servers import free_port, muntin_launch, running

LONGEST_S = 30.0
QUIET_S, BETWEEN_S = 30.0, 10.0
OTHER = "other labels"
Answer = tuple[float, float, str]
"""Time when it was sent, seconds that it took, and what was wrong with it ("" for a right answer)."""


class LoadsOptions(Options):
    loads: int = option(20, "versions to load", least=1)
    clients: int = option(3, f"at most {IMAGES}", least=1)


def client(port: int, number: int, stop: Event, answers: Any) -> None:
    """Send images until `stop`, and put the list of `Answer` into `answers`."""
    import tritonclient.http

    images = sample_images(SEGMENT.side)[number : number + 1]
    first: np.ndarray | None = None
    done: list[Answer] = []
    with tritonclient.http.InferenceServerClient(f"{HOST}:{port}") as server:
        tensor = tritonclient.http.InferInput("images", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        while not stop.is_set():
            began = time.monotonic()
            try:
                labels = server.infer(SEGMENT.name, [tensor]).as_numpy("labels")
                first = labels if first is None else first
                problem = "" if np.array_equal(labels, first) else OTHER
            except Exception as error:  # noqa: BLE001 - counted
                problem = f"{type(error).__name__}: {error}"[:200]
            done.append((began, time.monotonic() - began, problem))
    answers.put(done)


def copy_version(artifact: Path, path: Path, number: int) -> None:
    """Write the same model as an artifact with another digest."""
    draft = path.with_name(f".{path.name}")
    shutil.copytree(artifact, draft)
    manifest = read_manifest(artifact)
    _, content = render_manifest(manifest.model_copy(update={"measured": {**manifest.measured, "copy": number}}))
    (draft / "manifest.json").write_bytes(content)
    draft.rename(path)


def load(ports: dict[str, int], number: int) -> Row:
    """Load the newest version, with the time-outs that `tritonclient` has."""
    by = "http" if number % 2 else "grpc"
    began, problem = time.monotonic(), ""
    try:
        with import_module(f"tritonclient.{by}").InferenceServerClient(f"{HOST}:{ports[by]}") as server:
            server.load_model(SEGMENT.name)
    except Exception as error:  # noqa: BLE001 - reported
        problem = f"{type(error).__name__}: {error}"[:200]
    row = {"by": by, "began": began, "seconds": time.monotonic() - began, "problem": problem}
    print(f"load {number - 1}: {row['seconds']:.1f} s by {by} {problem}", file=sys.stderr)
    return row


def measure(output: Path, loads: int, clients: int) -> Row:
    artifact, models = output / "artifact", output / "models"
    make_artifact(SEGMENT, artifact)
    for folder in (models, output / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    copy_version(artifact, models / "1", 1)
    ports = {"http": free_port(), "grpc": free_port()}
    launch = muntin_launch(models, name=SEGMENT.name, port=ports["http"], grpc_port=ports["grpc"], trial=50)
    context = multiprocessing.get_context("spawn")
    stop, answers = context.Event(), context.Queue()
    os.environ["MUNTIN_CACHE"] = str((output / "cache").resolve())
    with running(launch, ports["http"], cores=os.sched_getaffinity(0), log=output / "server.log"):
        workers = [context.Process(target=client, args=(ports["http"], number, stop, answers)) for number in range(clients)]
        for worker in workers:
            worker.start()
        time.sleep(5.0)
        quiet = time.monotonic()
        time.sleep(QUIET_S)
        rows = []
        for number in range(2, loads + 2):
            copy_version(artifact, models / str(number), number)
            rows.append(load(ports, number))
            time.sleep(BETWEEN_S)
        stop.set()
        done: list[Answer] = [answer for _ in workers for answer in answers.get(timeout=60)]
        for worker in workers:
            worker.join(60)
    spans = [(row["began"], row["began"] + row["seconds"]) for row in rows]
    times = [(began, began + seconds, "200") for began, seconds, _ in done]
    before = [answer for answer in times if quiet <= answer[0] < quiet + QUIET_S]
    during = [(began, end, status) for began, end, status in times if any(first <= end and began <= last for first, last in spans)]
    problems = [problem for _, _, problem in done if problem]
    wrong = problems.count(OTHER)
    return {
        "loads": [{key: row[key] for key in ("by", "seconds", "problem")} for row in rows], "clients": clients, "requests": len(done),
        "failed": len(problems) - wrong, "wrong": wrong, "problems": sorted(set(problems))[:5],
        "before": figures(before, QUIET_S), "during": figures(during, sum(row["seconds"] for row in rows)),
    }  # fmt: skip


def rows(run: Run) -> Iterator[Row]:
    given = run.options
    yield run.row("loads", measure, run.folder, given.loads, given.clients, workload=asdict(SEGMENT))


def summary(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        seconds, problems = [load["seconds"] for load in row["loads"]], [load["problem"] for load in row["loads"] if load["problem"]]
        times = {"count": len(seconds), "median": np.median(seconds), "longest": max(seconds)}
        yield {**row, **times, "refused": len(problems), "told": "; ".join(dict.fromkeys((*problems, *row["problems"])))}


NEWEST = (
    "{count} loads by `tritonclient` beside {clients} clients: median {median:.1f} s, longest {longest:.1f}; {requests:,} requests, "
    "{failed} failed, {wrong} with other labels; p99 {during[p99_ms]:.0f} ms during loads, {before[p99_ms]:.0f} before"
)
BENCHMARK = Benchmark(
    name="loads",
    options=LoadsOptions,
    measure=rows,
    about="""512 x 512, clients that leave no pause, all cores for server and clients. Goals: every load within 30 s, no request failed, the
same labels throughout.""",
    newest=lambda document: NEWEST.format(**next(summary(document.rows))),
    n=lambda rows: f"{len(rows[0]['loads'])} loads",
    unrecorded=(
        "Xeon, 29 November 2026: 20 loads by `tritonclient` beside three clients at 512 x 512: each 21.3 to 22.4 s, none failed (goal: "
        "within 30 s); 18,830 requests, none failed, the same labels throughout (goals). During loads 26.0 answers a second, p50 112 ms, "
        "p99 213, worst 592; before 31.9, 93, 132 and 206 ms"
    ),
    tables=(
        Table(
            columns=columns(
                "loads=count, median s=median:.1f, longest s=longest:.1f, failed loads=refused, clients, requests, failed, wrong, "
                "problems=told"
            ),
            rows=summary,
        ),
        Table(
            columns=columns("when, answers/s=answers_per_s:.1f, p50 ms=p50_ms:.0f, p99 ms=p99_ms:.0f, worst ms=worst_ms:.0f"),
            rows=lambda rows: [{"when": when, **row[when]} for row in rows for when in ("before", "during")],
        ),
    ),
    goals=(
        Goal(name="longest load, s", values="longest", rows=summary, at_most=LONGEST_S),
        *(
            Goal(name=name, values=column, rows=summary, at_most=0)
            for name, column in (("failed loads", "refused"), ("failed requests", "failed"), ("requests with other labels", "wrong"))
        ),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
