"""Start, pause and end each server around an artefact. Each is tuned a little; its function says which settings were tried.

All have one process with an engine on the same cores, the same threads and batches of at most the same size. Each kind is one function
from what is wanted to a command line; a new one is a function and a line in `SERVERS`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from muntin.serving.triton.batching import TritonBatching
from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from serving_peers.load import HOST
from serving_peers.models import Workload
from start_triton import triton_launch

HERE = Path(__file__).resolve().parent
READY_S = 180.0
STOP_S = 20.0
ENDS_S = 5.0
"""Seconds in which the processes that a server started have to end after it."""
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A server that is to be started. `environment`: of the peer. `scratch`: a short path of its own, removed when it has stopped.

    `objective_ms`: what is promised, for those that can be told. `wait_ms`: how long a batch is waited for, None for no batches.
    """

    workload: Workload
    artifact: Path
    environment: Path
    scratch: Path
    port: int
    threads: int
    objective_ms: float | None
    wait_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A command line, variables beside this process's, the signal that ends it, and the path that answers 200 when it is ready; None: it
    is as soon as it takes connections."""

    command: list[str]
    ready: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    stop: signal.Signals = signal.SIGTERM


@dataclass(frozen=True, kw_only=True)
class Server:
    """One row of the table: a kind of server and how it batches. `tensors`: it speaks the Open Inference Protocol."""

    launch: Callable[[Wanted], Launch]
    peer: str | None = None
    tensors: bool = False
    wait_ms: float | None = None

    def path(self, workload: Workload) -> str:
        return f"/v2/models/{workload.name}/infer" if self.tensors else "/predict"


def muntin(wanted: Wanted, *, source: str | None = None) -> Launch:
    """`source`: the `src` folder of another checkout."""
    promise = [] if wanted.objective_ms is None else ["--objective-ms", f"{wanted.objective_ms:g}"]
    return Launch(
        command=[
            sys.executable, "-m", "muntin", "serve", str(wanted.artifact), "--host", HOST, "--http-port", str(wanted.port), "--no-grpc",
            "--name", wanted.workload.name, "--threads", str(wanted.threads), "--max-batch", str(wanted.workload.max_rows), *promise,
        ],
        ready="/v2/health/ready",
        variables={} if source is None else {"PYTHONPATH": source},
    )  # fmt: skip


def litserve(wanted: Wanted) -> Launch:
    """Its ZeroMQ queues (`fast_queue`) were within the noise of the default ones, and are not used."""
    return Launch(command=_app(wanted, "litserve_app.py"), ready="/health", stop=signal.SIGINT)


def ray(wanted: Wanted) -> Launch:
    """With HAProxy in place of the Python proxy (four to five times the rate), and one event loop in the replica in place of three."""
    folder = wanted.scratch
    return Launch(
        command=[*_app(wanted, "ray_app.py"), "--scratch", str(folder)],
        ready="/-/healthz",
        variables={
            "HOME": str(folder),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    )


def triton(wanted: Wanted) -> Launch:
    """The exported repository, with a fixed delay in its dynamic batcher, or without batches."""
    if wanted.wait_ms is None:
        return _triton(wanted, batcher="")
    return _triton(wanted, batcher=f"dynamic_batching {{ max_queue_delay_microseconds: {wanted.wait_ms * 1e3:.0f} }}")


def triton_exported(wanted: Wanted) -> Launch:
    """As `muntin triton --objective-ms` writes it, with a delay from measured batches; without an objective, none."""
    return _triton(wanted)


def triton_rejecting(wanted: Wanted) -> Launch:
    """A fixed delay, and what has waited for half of the objective is rejected: the other half is for computing it."""
    policy = ""
    if wanted.objective_ms is not None:
        policy = f"default_queue_policy {{ timeout_action: REJECT default_timeout_microseconds: {wanted.objective_ms * 500:.0f} }}"
    return _triton(wanted, batcher=f"dynamic_batching {{ max_queue_delay_microseconds: {(wanted.wait_ms or 0) * 1e3:.0f} {policy} }}")


SERVERS: dict[str, Server] = {
    "muntin": Server(launch=muntin, tensors=True),
    "litserve": Server(launch=litserve, peer="litserve"),
    "litserve 2 ms": Server(launch=litserve, peer="litserve", wait_ms=2),
    "ray": Server(launch=ray, peer="ray"),
    "ray 2 ms": Server(launch=ray, peer="ray", wait_ms=2),
    "triton": Server(launch=triton, peer="triton", tensors=True),
    "triton exported": Server(launch=triton_exported, peer="triton", tensors=True),
    "triton 0 ms": Server(launch=triton, peer="triton", tensors=True, wait_ms=0),
    "triton 1 ms": Server(launch=triton, peer="triton", tensors=True, wait_ms=1),
    "triton 5 ms": Server(launch=triton, peer="triton", tensors=True, wait_ms=5),
    "triton 20 ms": Server(launch=triton, peer="triton", tensors=True, wait_ms=20),
    "triton 0 ms, rejecting": Server(launch=triton_rejecting, peer="triton", tensors=True, wait_ms=0),
}
if before := os.environ.get("MUNTIN_BEFORE"):  # the `src` folder of an earlier checkout, to be measured in the same run
    SERVERS["muntin before"] = Server(launch=partial(muntin, source=before), tensors=True)


def _app(wanted: Wanted, file: str) -> list[str]:
    rows = 1 if wanted.wait_ms is None else wanted.workload.max_rows
    options = {"port": wanted.port, "side": wanted.workload.side, "threads": wanted.threads, "max-rows": rows}
    command = [str(wanted.environment / "bin" / "python"), str(HERE / file), str(wanted.artifact)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*command, "--batch-timeout", f"{(wanted.wait_ms or 0) / 1e3:g}"]


def _triton(wanted: Wanted, *, batcher: str | None = None) -> Launch:
    """The exported repository. `batcher`: replaces its line of dynamic batching."""
    repository, workload = wanted.scratch / "models", wanted.workload
    options = TritonOptions(name=workload.name, max_batch=workload.max_rows, threads=wanted.threads, objective_ms=wanted.objective_ms)
    exported = write_repository(wanted.artifact, repository, options, batching=None if batcher is None else TritonBatching())
    if batcher is not None:
        file = exported.model / "config.pbtxt"
        file.write_text(re.sub(r"(?m)^dynamic_batching .*$", batcher, file.read_text(encoding="utf-8")), encoding="utf-8")
    launch = triton_launch(wanted.environment, repository, http_port=wanted.port)
    return Launch(command=launch.command, ready="/v2/health/ready", variables=launch.variables)


@contextmanager
def running(launch: Launch, port: int, *, cores: set[int], log: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ready, on these cores, with its output in `log`; stopped on leaving, with all that it started.

    Raises RuntimeError where it ends, or is not ready within `READY_S` seconds.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(  # noqa: S603 - our own command
            launch.command,
            env=os.environ | variables | launch.variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        _wait_until_ready(process, port, launch.ready, log)
        yield process
    finally:
        started = family(process.pid)  # now: what has left its session is not found any more when its parent has ended
        process.send_signal(launch.stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _end(process.pid, started)


class _Process(NamedTuple):
    """A process, as /proc describes it. `began`: clock ticks since the system started; with its number it identifies the process."""

    state: str
    parent: int
    session: int
    began: int


def _processes() -> dict[int, _Process]:
    """All processes by number, except zombies."""
    found: dict[int, _Process] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends meanwhile
            # A name stands before this in brackets, and may hold blanks and brackets.
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            process = _Process(state=fields[0], parent=int(fields[1]), session=int(fields[3]), began=int(fields[19]))
            if process.state not in ("Z", "X"):
                found[int(folder.name)] = process
    return found


def family(root: int) -> dict[int, int]:
    """A server's processes by number, itself included, and when each began: its session, and all processes started from it, in any group or
    session."""
    everyone = _processes()
    members = {number for number, process in everyone.items() if root in (number, process.session)}
    while new := {number for number, process in everyone.items() if process.parent in members} - members:
        members |= new
    return {number: everyone[number].began for number in members}


def _end(root: int, started: dict[int, int]) -> None:
    """Wait until all processes that an ended server `started` are gone, and kill those that remain: an engine that hangs."""
    end = time.monotonic() + ENDS_S
    while left := {number for number, process in _processes().items() if process.session == root or started.get(number) == process.began}:
        if time.monotonic() >= end:
            _signal(left, signal.SIGKILL)
            return
        time.sleep(0.05)


@contextmanager
def stopped(root: int) -> Iterator[None]:
    """A server stands still, with all that it has started, so that none of its threads takes a turn on its core. Nothing should be under
    way in it: what it does by the clock then goes on as if nothing had been."""
    still: set[int] = set()
    try:
        while new := family(root).keys() - still:  # again: one may start another before its own turn comes
            still |= new
            _signal(new, signal.SIGSTOP)
        yield
    finally:
        _signal(still, signal.SIGCONT)


def _signal(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def open_local(request: str | urllib.request.Request, data: bytes | None = None, *, timeout: float) -> Any:
    """`urlopen` without the proxy that the environment may name, which would be asked for this machine's own addresses, too."""
    return _DIRECTLY.open(request, data, timeout)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of its own with a short name (the path of a Unix socket has at most 107 bytes), removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="peer-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str | None, log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode}: {_last_lines(log)}")
        with contextlib.suppress(OSError):
            if _is_ready(port, path) and process.poll() is None:  # or it is another one that has the port
                return
        time.sleep(0.2)
    raise RuntimeError(f"not ready within {READY_S:g} s: {_last_lines(log)}")


def _is_ready(port: int, path: str | None) -> bool:
    if path is None:
        socket.create_connection((HOST, port), timeout=1).close()
        return True
    with open_local(f"http://{HOST}:{port}{path}", timeout=1) as answer:
        return bool(answer.status == 200)


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-2:])[-300:]
