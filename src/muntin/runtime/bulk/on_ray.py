"""Pictures and videos spread over a Ray cluster, or over processes of this machine that Ray starts.

Each worker is an actor that opens the artefact once and computes the files whose paths it gets, several at a time. It writes the results
itself, so the pictures, the artefact and the folder of the results have the same paths on all machines. A file whose worker died goes to
another worker, `ATTEMPTS` times at most; a worker that died is replaced.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from muntin.errors import DataError, DependencyError, MuntinError, install
from muntin.runtime.bulk.items import ItemComputer, ItemOutcome, PredictOptions
from muntin.runtime.engines.registry import open_image_session
from muntin.runtime.host.hardware import usable_cores
from muntin.runtime.inputs import Shape
from muntin.runtime.options import SessionOptions

ATTEMPTS = 3
"""Times that a file is computed whose worker dies, before it counts as failed: it may be what kills them."""
AHEAD = 2
"""Files that a worker has beyond those that its engine computes: they are decoded and encoded meanwhile."""

_CONNECT_S = 5.0
"""Seconds to wait for an answer of the cluster's port."""
_STORE_BYTES = 80 << 20
"""Ray's memory for objects, nearly its minimum: only paths and figures travel."""


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """Artefact and options of every worker. `shapes`: sizes to compile for."""

    artifact: Path
    session: SessionOptions
    shapes: tuple[Shape, ...]
    options: PredictOptions


class RayWorker:
    """The actor. Its method runs in several threads at a time; the first call opens the artefact."""

    def __init__(self, job: RayJob) -> None:
        self._job, self._opening = job, Lock()
        self._compute: ItemComputer | None = None

    def compute(self, source: Path, target: Path | None) -> ItemOutcome:
        """Compute one file, as `ItemComputer` does. Raises MuntinError where the artefact cannot be opened."""
        with self._opening:
            if self._compute is None:
                session = open_image_session(self._job.artifact, self._job.session)
                session.warm_up(self._job.shapes, compute=False)
                self._compute = ItemComputer(session=session, options=self._job.options)
        return self._compute(source, target)


def compute_on_ray(job: RayJob, targets: Mapping[Path, Path | None], address: str = "") -> Iterator[ItemOutcome]:
    """Yield the outcome of each file of `targets` (sources, and the paths of their results without endings), in the order of their ends.

    `address`: of a running cluster; empty: workers on this machine alone. Workers take `job.session.threads` cores each; by default all of
    the smallest machine's. Raises DependencyError without Ray, DataError where no machine has so many cores, and the error of a worker that
    cannot open the artefact.
    """
    with _connected(address) as ray:
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        threads = job.session.threads or max(1, min(filter(None, cores), default=1))
        if threads > max(cores, default=0):
            raise DataError(f"--threads {threads}: the largest machine that Ray has lends {max(cores, default=0)} cores: give fewer")
        job = replace(job, session=replace(job.session, threads=threads))
        depth = min(job.session.streams, threads) + AHEAD
        actor = ray.remote(RayWorker).options(num_cpus=threads, max_concurrency=depth, max_restarts=0)
        workers = [actor.remote(job) for _ in range(min(len(targets), sum(number // threads for number in cores)))]
        left, deaths = deque(targets), Counter[Path]()
        begun: dict[Any, tuple[Path, Any]] = {}
        while left or begun:
            for worker in workers:
                while left and sum(other is worker for _, other in begun.values()) < depth:
                    source = left.popleft()
                    begun[worker.compute.remote(source, targets[source])] = (source, worker)
            (reference,), _ = ray.wait(list(begun))
            source, worker = begun.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, MuntinError):
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError:
                if worker in workers:  # the first of its files that fails
                    workers[workers.index(worker)] = actor.remote(job)
                deaths[source] += 1
                if deaths[source] < ATTEMPTS:
                    left.append(source)
                else:
                    text = f"{source}: {ATTEMPTS} workers ended while they computed it, perhaps for lack of memory: compute it alone"
                    yield ItemOutcome(source=source, state=None, error=text)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster or to a new one of this machine: bound to loopback, without dashboard and usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # both are read on import
    if not address:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # whatever its name: nodes of this machine alone, on loopback
    try:
        import ray
    except ModuleNotFoundError as error:
        raise DependencyError(f"--on ray needs the package ray: {install('ray')}") from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # Ray sets its own, and leaves them
    try:
        if address:
            _check_port(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(
                address="local", num_cpus=usable_cores(), include_dashboard=False, object_store_memory=_STORE_BYTES,
                log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise DataError(
            f"--on ray:{address}: no connection to the cluster ({' '.join(str(error).split())[:200]}): check the address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _check_port(address: str) -> None:
    """Raises OSError or ValueError where nothing listens at HOST:PORT: Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and "://" not in address:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
