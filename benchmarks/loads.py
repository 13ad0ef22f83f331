"""Load versions while clients keep the server busy, all by `tritonclient` with its own time-outs.

    python benchmarks/loads.py [--output runs/benchmark-loads] [--loads 20] [--clients 3] [--json]

One server (`muntin serve`, on all cores) has a segmentation at 512 x 512. Each client is a process that sends one picture after the other,
over HTTP, and compares every answer with the first one, byte for byte. First without loads for 30 s, then new versions are loaded one after
the other, by HTTP and gRPC in turns: the same model in artefacts of their own, so nothing is compiled yet. Goals: every load within 30 s,
no request failed, and the same labels throughout. Ten seconds pass between two loads. What is measured already is not measured again.
Time: about a quarter of an hour. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from kept import Row, kept_row
from muntin.artifact.manifest import render_manifest
from muntin.artifact.store import read_manifest
from muntin.runtime import describe_hardware
from serving_peers.load import HOST
from serving_peers.models import WORKLOADS, make_artifact, pictures
from serving_peers.servers import Launch, free_port, running

LONGEST_S = 30.0
QUIET_S, BETWEEN_S = 30.0, 10.0
NAME = "segment"
Answer = tuple[float, float, str]
"""Time when it was sent, seconds that it took, and what was wrong with it ("" for a right answer)."""


def client(port: int, number: int, stop: Event, answers: Any) -> None:
    """Send pictures until `stop`, and put the list of `Answer` into `answers`."""
    images = pictures(WORKLOADS[NAME].side)[number : number + 1]
    first: np.ndarray | None = None
    done: list[Answer] = []
    with tritonclient.http.InferenceServerClient(f"{HOST}:{port}") as server:
        tensor = tritonclient.http.InferInput("images", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        while not stop.is_set():
            began = time.monotonic()
            try:
                labels = server.infer(NAME, [tensor]).as_numpy("labels")
                first = labels if first is None else first
                problem = "" if np.array_equal(labels, first) else "other labels"
            except Exception as error:  # noqa: BLE001 - counted
                problem = f"{type(error).__name__}: {error}"[:200]
            done.append((began, time.monotonic() - began, problem))
    answers.put(done)


def copy_version(artifact: Path, path: Path, number: int) -> None:
    """Write the same model as an artefact with another digest."""
    draft = path.with_name(f".{path.name}")
    shutil.copytree(artifact, draft)
    manifest = read_manifest(artifact)
    _, content = render_manifest(manifest.model_copy(update={"measured": {**manifest.measured, "copy": number}}))
    (draft / "manifest.json").write_bytes(content)
    draft.rename(path)


def load(http_port: int, grpc_port: int, number: int) -> Row:
    """Load the newest version, with the time-outs that `tritonclient` has."""
    began = time.monotonic()
    problem = ""
    try:
        if number % 2:
            with tritonclient.http.InferenceServerClient(f"{HOST}:{http_port}") as server:
                server.load_model(NAME)
        else:
            with tritonclient.grpc.InferenceServerClient(f"{HOST}:{grpc_port}") as server:
                server.load_model(NAME)
    except Exception as error:  # noqa: BLE001 - reported
        problem = f"{type(error).__name__}: {error}"[:200]
    return {"by": "http" if number % 2 else "grpc", "began": began, "seconds": time.monotonic() - began, "problem": problem}


def measure(output: Path, loads: int, clients: int) -> Row:
    artifact, models = output / "artifact", output / "models"
    make_artifact(WORKLOADS[NAME], artifact)
    for folder in (models, output / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    copy_version(artifact, models / "1", 1)
    port, grpc_port = free_port(), free_port()
    command = [
        sys.executable, "-m", "muntin", "serve", str(models), "--host", HOST, "--http-port", str(port), "--grpc-port", str(grpc_port),
        "--name", NAME, "--trial", "50",
    ]  # fmt: skip
    launch = Launch(command=command, ready="/v2/health/ready")
    context = multiprocessing.get_context("spawn")
    stop, answers = context.Event(), context.Queue()
    cores = set(range(describe_hardware()["cores"]))
    with running(launch, port, cores=cores, log=output / "server.log", variables={"MUNTIN_CACHE": str((output / "cache").resolve())}):
        workers = [context.Process(target=client, args=(port, number, stop, answers)) for number in range(clients)]
        for worker in workers:
            worker.start()
        time.sleep(5.0)
        quiet = time.monotonic()
        time.sleep(QUIET_S)
        rows = []
        for number in range(2, loads + 2):
            copy_version(artifact, models / str(number), number)
            rows.append(load(port, grpc_port, number))
            print(f"load {number - 1}: {rows[-1]['seconds']:.1f} s by {rows[-1]['by']} {rows[-1]['problem']}", file=sys.stderr)
            time.sleep(BETWEEN_S)
        stop.set()
        done: list[Answer] = [answer for _ in workers for answer in answers.get(timeout=60)]
        for worker in workers:
            worker.join(60)
    before = [seconds for began, seconds, _ in done if quiet <= began < quiet + QUIET_S]
    during = [
        seconds
        for began, seconds, _ in done
        if any(row["began"] <= began + seconds and began <= row["began"] + row["seconds"] for row in rows)
    ]
    problems = [problem for _, _, problem in done if problem]
    wrong = problems.count("other labels")
    return {
        "loads": [{key: row[key] for key in ("by", "seconds", "problem")} for row in rows], "clients": clients, "requests": len(done),
        "failed": len(problems) - wrong, "wrong": wrong, "problems": sorted(set(problems))[:5],
        "before": _figures(before, QUIET_S), "during": _figures(during, sum(row["seconds"] for row in rows)),
    }  # fmt: skip


def _figures(seconds: list[float], over: float) -> Row:
    p50, p99, worst = (float(value) * 1e3 for value in np.percentile(seconds, (50, 99, 100)))
    return {"answers_per_s": len(seconds) / over, "p50_ms": p50, "p99_ms": p99, "worst_ms": worst}


def print_table(row: Row) -> None:
    seconds = sorted(load["seconds"] for load in row["loads"])
    failed = sum(bool(load["problem"]) for load in row["loads"])
    print(f"{len(seconds)} loads: median {np.median(seconds):.1f} s, longest {seconds[-1]:.1f} s (goal {LONGEST_S:g}), {failed} failed")
    print(f"{row['requests']} requests of {row['clients']} clients: {row['failed']} failed, {row['wrong']} with other labels (goal 0 each)")
    for when in ("before", "during"):
        figures = row[when]
        print(
            f"{when:<7} {figures['answers_per_s']:6.1f}/s, p50 {figures['p50_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms, "
            f"worst {figures['worst_ms']:.0f} ms"
        )
    for problem in row["problems"]:
        print(problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-loads"))
    parser.add_argument("--loads", type=int, default=20)
    parser.add_argument("--clients", type=int, default=3, help="at most 8")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    settings = {"loads": arguments.loads, "clients": arguments.clients, "workload": asdict(WORKLOADS[NAME])}
    measured = partial(measure, output, arguments.loads, arguments.clients)
    row = kept_row(output / "loads.json", settings, measured, hardware=describe_hardware())
    if arguments.json:
        print(json.dumps({"benchmark": "loads", **row}, indent=1))
        return
    print_table(row)
    print(f"{row['hardware']['cpu']}, {row['hardware']['cores']} cores, {row['created']}")


if __name__ == "__main__":
    main()
