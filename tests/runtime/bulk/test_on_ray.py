from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from muntin.errors import ArtifactError, DataError
from muntin.images import write_image
from muntin.runtime.bulk.items import PredictOptions
from muntin.runtime.bulk.on_ray import ATTEMPTS, RayJob, compute_on_ray
from muntin.runtime.options import SessionOptions
from muntin.runtime.short_memory import Parts
from ray_cluster import ON_LINUX, processes

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [
    pytest.mark.skipif(not ON_LINUX, reason="processes are listed on Linux only"),
    pytest.mark.filterwarnings("ignore"),  # of Ray itself
]


def workers() -> Iterator[int]:
    """The actors' processes."""
    return processes("ray::RayWorker")


@pytest.fixture
def job(convolutions: Any) -> RayJob:
    options = PredictOptions(tiles=Parts(tile=64, overlap=None), max_pixels=1 << 28)
    return RayJob(artifact=convolutions.path, session=SessionOptions(threads=1, shapes=(), dynamic=True), shapes=(), options=options)


def test_files_of_a_killed_worker(job: RayJob, ray_address: str, tmp_path: Path) -> None:
    for number in range(8):
        write_image(tmp_path / f"{number}.png", np.full((200, 300, 3), number, np.uint8))
    targets: dict[Path, Path | None] = {path: tmp_path / "out" / path.stem for path in sorted(tmp_path.glob("*.png"))}
    outcomes = compute_on_ray(job, targets, ray_address)
    ended = [next(outcomes)]
    killed = list(workers())
    for process in killed:
        os.kill(process, signal.SIGKILL)
    ended += outcomes
    assert killed and sorted(outcome.source for outcome in ended) == sorted(targets)
    assert not any(outcome.error for outcome in ended)
    assert len(list((tmp_path / "out").glob("*.mask.png"))) == 8
    deadline = time.monotonic() + 30
    while list(workers()):  # Ray ends them after the call
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_file_that_kills_its_workers(job: RayJob, ray_address: str, tmp_path: Path) -> None:
    """Of a machine whose kernel ends every worker: after some attempts that is the file's failure."""
    write_image(tmp_path / "large.png", np.zeros((4000, 4000, 3), np.uint8))
    ended, killed = Event(), set()

    def kill() -> None:
        while not ended.is_set():
            for process in workers():
                os.kill(process, signal.SIGKILL)
                killed.add(process)
            time.sleep(0.02)

    thread = Thread(target=kill)
    thread.start()
    try:
        (outcome,) = compute_on_ray(job, {tmp_path / "large.png": tmp_path / "out"}, ray_address)
    finally:
        ended.set()
        thread.join()
    assert f"large.png: {ATTEMPTS} workers ended while they computed it" in outcome.error and len(killed) >= ATTEMPTS


@pytest.mark.parametrize("problem", ["artefact", "threads", "address"])
def test_errors_of_the_whole_run(job: RayJob, ray_address: str, tmp_path: Path, problem: str) -> None:
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    broken, error, says, place = {
        "artefact": (replace(job, artifact=tmp_path / "none"), ArtifactError, "none", ray_address),
        "threads": (replace(job, session=SessionOptions(threads=4000)), DataError, "--threads 4000: the largest machine", ray_address),
        "address": (job, DataError, "--on ray:127.0.0.1:1: no connection", "127.0.0.1:1"),
    }[problem]
    with pytest.raises(error, match=says):
        list(compute_on_ray(broken, {tmp_path / "a.png": tmp_path / "out"}, place))
