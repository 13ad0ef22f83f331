"""NVIDIA's load generator, which compares the answers, where it is installed (Linux, glibc 2.38 and newer)."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.serving.server import Server

perf_analyzer = pytest.importorskip("perf_analyzer", reason="no perf_analyzer: `make test` installs it where it has a wheel")
PROGRAM = Path(perf_analyzer.__file__).parent / "bin" / "perf_analyzer"
SIDE = 16


@pytest.fixture(scope="module")
def server(make_server: Any, write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A classifier whose scores are the means of the pixels: perf_analyzer compares only answers whose shape the model fixes."""
    with make_server(write_pixels(tmp_path_factory.mktemp("perf") / "means", task="classify"), max_batch=4) as running:
        yield running


def write_input(folder: Path, *, label: int | None = 1) -> Path:
    """Write a file of one picture and the expected answers; with `label` None of the picture alone."""
    image_HWC = np.broadcast_to(np.array([10, 30, 20], np.uint8), (SIDE, SIDE, 3))
    path = folder / "input.json"
    document = {
        "data": [{"images": {"content": image_HWC.ravel().tolist(), "shape": [SIDE, SIDE, 3]}}],
        **({} if label is None else {"validation_data": [{"labels": [label], "scores": [10.0, 30.0, 20.0]}]}),
    }
    path.write_text(json.dumps(document))
    return path


def run(server: Server, face: str, *options: object) -> subprocess.CompletedProcess[str]:
    port = server.http_port if face == "http" else server.grpc_port
    command = [PROGRAM, "-m", "means", "-i", face, "-u", f"127.0.0.1:{port}", "--request-count", 20, "--max-threads", 2, *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("face", "options"),
    [
        ("http", ("-a", "--concurrency-range", 3, "-b", 2)),
        ("http", ("--input-tensor-format", "json", "--output-tensor-format", "json")),
        ("grpc", ("-a", "--streaming")),
        ("grpc", ("--grpc-compression-algorithm", "gzip")),
    ],
)
def test_measurement_with_compared_answers(server: Server, tmp_path: Path, face: str, options: tuple[object, ...]) -> None:
    report = tmp_path / "report.csv"
    data = write_input(tmp_path, label=None if "-b" in options else 1)  # it compares a batch with one picture's answer
    done = run(server, face, "--input-data", data, "-f", report, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(csv.DictReader(report.read_text().splitlines()))
    assert float(row["Inferences/Second"]) > 0
    assert all(float(row[f"Server Compute {part}"]) > 0 for part in ("Input", "Infer", "Output")), row


def test_wrong_answer_is_reported(server: Server, tmp_path: Path) -> None:
    done = run(server, "http", "--input-data", write_input(tmp_path, label=2))
    assert done.returncode != 0
    assert "Output doesn't match expected output" in done.stdout + done.stderr


def test_shared_memory_is_refused(server: Server) -> None:
    done = run(server, "grpc", "--shared-memory", "system", "--shape", f"images:{SIDE},{SIDE},3")
    assert done.returncode != 0
    assert "this server shares none with its clients" in done.stdout + done.stderr
