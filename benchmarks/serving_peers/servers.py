"""Start, load, pause, and end each kind of server around an artifact.

All have the same cores, the same threads and batches of at most the same size. Each kind is one function from a `Wanted` to a command line;
it says which settings were tried. A new one is a function and a line in `SERVERS`.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

import start_triton
from harness import ROOT, write_whole
from muntin.serving.triton.batching import TritonBatching
from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from serving_peers.load import HOST, Exchange, Load
from serving_peers.models import Workload

APPS = Path(__file__).resolve().parent
READY_S, STOP_S, ENDS_S = 180.0, 20.0, 5.0
"""Seconds until a server is ready, until it has stopped, and until the processes that it started have ended after it."""
ENGINE = "serving.worker.child"
"""Part of the command line of an engine's process in `muntin serve`."""


# Command lines


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A server to start. `environment`: of the peer. `scratch`: a short path of its own, removed when it has stopped. `objective_ms`: the
    promised latency, for those that can be told. `wait_ms`: how long a batch is waited for, None for no batches."""

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
    """A command line, the path that answers 200 when it is ready, variables beside this process's, and the signal that ends it."""

    command: list[str]
    ready: str = "/v2/health/ready"
    variables: dict[str, str] = field(default_factory=dict)
    stop: signal.Signals = signal.SIGTERM


@dataclass(frozen=True, kw_only=True)
class Server:
    """A kind of server and how it batches. `tensors`: it speaks the Open Inference Protocol; otherwise it is given raw bytes."""

    launch: Callable[[Wanted], Launch]
    peer: str | None = None
    tensors: bool = False
    wait_ms: float | None = None


def muntin_launch(model: Path, *, name: str, port: int, grpc_port: int | None = None, source: str | None = None, **options: Any) -> Launch:
    """`muntin serve` with the given options that are not None. `source`: the `src` folder of another checkout."""
    given = {"host": HOST, "http-port": port, "grpc-port": grpc_port, "name": name, **options}
    command = [sys.executable, "-m", "muntin", "serve", str(model), *flags(**given), *([] if grpc_port else ["--no-grpc"])]
    return Launch(command=command, variables={} if source is None else {"PYTHONPATH": source})


def flags(**values: Any) -> list[str]:
    """Options of a command line, those that are not None."""
    return [part for name, value in values.items() if value is not None for part in (f"--{name.replace('_', '-')}", str(value))]


def muntin(wanted: Wanted, *, source: str | None = None) -> Launch:
    promise = None if wanted.objective_ms is None else f"{wanted.objective_ms:g}"
    rows, name = wanted.workload.max_rows, wanted.workload.name
    return muntin_launch(
        wanted.artifact, name=name, port=wanted.port, source=source, threads=wanted.threads, max_batch=rows, objective_ms=promise
    )  # fmt: skip


def litserve(wanted: Wanted) -> Launch:
    """Its ZeroMQ queues (`fast_queue`) were within the noise of the default ones, and are not used."""
    return Launch(command=_app(wanted, "litserve_app.py"), ready="/health", stop=signal.SIGINT)


def ray(wanted: Wanted) -> Launch:
    """With HAProxy in place of the Python proxy (four to five times the rate), and one event loop in the replica in place of three."""
    folder = wanted.scratch
    serve = {
        "ENABLE_HA_PROXY": "1", "HAPROXY_NBTHREAD": "1", "HAPROXY_METRICS_ENABLED": "0", "LOG_TO_STDERR": "0",
        "HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg", "HAPROXY_SOCKET_PATH": folder / "admin.sock",
        "HAPROXY_SERVER_STATE_BASE": folder, "HAPROXY_SERVER_STATE_FILE": folder / "server-state",
        "RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RUN_ROUTER_IN_SEPARATE_LOOP": "0", "REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    }  # fmt: skip
    variables = {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", **{f"RAY_SERVE_{name}": str(value) for name, value in serve.items()}}
    command = _app(wanted, "ray_app.py", scratch=folder, name=wanted.workload.name, replicas=0)
    return Launch(command=command, ready="/-/healthz", variables=variables)


def ray_replicas(wanted: Wanted, *, replicas: int) -> Launch:
    """muntin's own application, in this environment. Replicas listen on all interfaces, therefore the token."""
    command = _app(wanted, "ray_app.py", scratch=wanted.scratch, name=wanted.workload.name, replicas=replicas)
    variables = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_SERVE_LOG_TO_STDERR": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    return Launch(command=command, variables=variables)


def _app(wanted: Wanted, file: str, **more: Any) -> list[str]:
    rows = 1 if wanted.wait_ms is None else wanted.workload.max_rows
    options = flags(
        port=wanted.port, side=wanted.workload.side, threads=wanted.threads, max_rows=rows,
        batch_timeout=f"{(wanted.wait_ms or 0) / 1e3:g}", **more,
    )  # fmt: skip
    return [str(wanted.environment / "bin" / "python"), str(APPS / file), str(wanted.artifact), *options]


def triton(wanted: Wanted, *, exported: bool = False, rejecting: bool = False) -> Launch:
    """The repository as `muntin triton --objective-ms` writes it if `exported`, with a delay from measured batches (without an objective,
    none); otherwise with a fixed delay in its dynamic batcher, or without batches. `rejecting`: requests that have waited for half of the
    objective are rejected, since the other half is needed for computing."""
    repository, workload = wanted.scratch / "models", wanted.workload
    options = TritonOptions(name=workload.name, max_batch=workload.max_rows, threads=wanted.threads, objective_ms=wanted.objective_ms)
    written = write_repository(wanted.artifact, repository, options, batching=None if exported else TritonBatching())
    if not exported:
        file, batcher, policy = written.model / "config.pbtxt", "", ""
        if rejecting and wanted.objective_ms is not None:
            policy = f"default_queue_policy {{ timeout_action: REJECT default_timeout_microseconds: {wanted.objective_ms * 500:.0f} }}"
        if wanted.wait_ms is not None:
            batcher = f"dynamic_batching {{ max_queue_delay_microseconds: {wanted.wait_ms * 1e3:.0f} {policy} }}"
        file.write_text(re.sub(r"(?m)^dynamic_batching .*$", batcher, file.read_text(encoding="utf-8")), encoding="utf-8")
    launch = start_triton.triton_launch(wanted.environment, repository, http_port=wanted.port)
    return Launch(command=launch.command, variables=launch.variables)


TRITON = partial(Server, peer="triton", tensors=True)
SERVERS: dict[str, Server] = {
    "muntin": Server(launch=muntin, tensors=True),
    "litserve": Server(launch=litserve, peer="litserve"),
    "litserve 2 ms": Server(launch=litserve, peer="litserve", wait_ms=2),
    "ray": Server(launch=ray, peer="ray"),
    "ray 2 ms": Server(launch=ray, peer="ray", wait_ms=2),
    "triton": TRITON(launch=triton),
    "triton exported": TRITON(launch=partial(triton, exported=True)),
    **{f"triton {wait} ms": TRITON(launch=triton, wait_ms=wait) for wait in (0, 1, 5, 20)},
    "triton 0 ms, rejecting": TRITON(launch=partial(triton, rejecting=True), wait_ms=0),
}
EARLIER = "earlier server"
"""Mark of documents whose `muntin serve` has been replaced."""
BEFORE = "muntin before"
"""Name of the server of an earlier checkout, measured in the same run: the environment variable MUNTIN_BEFORE names its `src` folder."""
if before := os.environ.get("MUNTIN_BEFORE"):
    SERVERS[BEFORE] = Server(launch=partial(muntin, source=before), tensors=True)


# Processes


@contextmanager
def running(launch: Launch, port: int, *, cores: set[int], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ready, on these cores, with its output in `log`; stopped on leaving, with all that it started.

    Raises RuntimeError where it ends, or is not ready within `READY_S` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(  # noqa: S603 - our own command
            launch.command,
            env=os.environ | launch.variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        _wait_until_ready(process, port, launch.ready, log)
        yield process
    finally:
        started = family(process.pid)  # now: a process that has left its session is not found any more when its parent has ended
        process.send_signal(launch.stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _, hanging = psutil.wait_procs({**started, **family(process.pid)}.values(), timeout=ENDS_S)
        for each in hanging:
            with suppress(psutil.Error):
                each.kill()


@contextmanager
def loaded(launch: Launch, port: int, exchange: Exchange, *, cores: set[int], log: Path) -> Iterator[tuple[Load, int]]:
    """A running server: a load for it, and the number of its process."""
    with running(launch, port, cores=cores, log=log) as process, Load(port, exchange) as load:
        yield load, process.pid


def begin(output: Path, core: int | None = None) -> None:
    """Make this process a load generator on a core, the last one unless it is given. Servers keep compiled models below `output`. SIGTERM
    ends the program in order, so that they are stopped."""
    os.environ["MUNTIN_CACHE"] = str(output.resolve() / "cache")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if core is None else core})


def family(root: int) -> dict[int, psutil.Process]:
    """A server's processes by number, itself included: its session, and all processes started from it, in any group or session."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it ends meanwhile
            if process.pid == root or os.getsid(process.pid) == root:
                members = (process, *process.children(recursive=True))
                found |= {member.pid: member for member in members if member.status() != psutil.STATUS_ZOMBIE}
    return found


def processes_with(root: int, text: str) -> list[int]:
    """Those of a server's processes that have a text in their command line, the oldest first."""
    found = []
    for number, process in family(root).items():
        with suppress(psutil.Error):
            if text in " ".join(process.cmdline()):
                found.append((process.create_time(), number))
    return [number for _, number in sorted(found)]


@contextmanager
def stopped(root: int) -> Iterator[None]:
    """Pause a server with all processes that it has started, so that none takes a turn on its core. No request should be under way."""
    paused: dict[int, psutil.Process] = {}
    try:
        while new := {number: process for number, process in family(root).items() if number not in paused}:
            paused |= new  # again: one may start another before its own turn comes
            for process in new.values():
                with suppress(psutil.Error):
                    process.suspend()
        yield
    finally:
        for process in paused.values():
            with suppress(psutil.Error):
                process.resume()


# Addresses and folders


def ask(port: int, path: str, body: bytes | None = None, *, timeout: float) -> tuple[int, bytes]:
    """Status and body of a server's response, without a proxy that the environment may name. Raises OSError without one."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=timeout)) as connection:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with {process.returncode}: {_last_lines(log)}")
        with suppress(OSError, http.client.HTTPException):
            if ask(port, path, timeout=1)[0] == 200 and process.poll() is None:  # or another one has the port
                return
        time.sleep(0.2)
    raise RuntimeError(f"not ready within {READY_S:g} s: {_last_lines(log)}")


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-2:])[-300:]


# Environments: one for each peer, made with pip, as their dependencies exclude each other. Triton runs in muntin's own.

PEERS = {"litserve": "litserve", "ray": "ray[serve]", "triton": start_triton.REQUIREMENT}
_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"


def make_environment(name: str, folder: Path) -> str | None:
    """Make `folder/NAME` unless it is there with this environment's engine: None, or the reason why it cannot be made. The first time takes
    a minute or two. muntin is installed as it is here (editable, without extras)."""
    root, ready = folder / name, folder / name / "ready.json"
    if versions(name, folder):
        return None
    ready.unlink(missing_ok=True)  # of another engine: after a failure there is no environment
    if name == "triton":
        try:
            start_triton.install(root)
        except (subprocess.CalledProcessError, SystemExit) as error:
            return str(error)
        package, _, its_version = start_triton.REQUIREMENT.partition("==")
        write_whole(ready, {package: its_version, **{package: version(package) for package in ("openvino", "numpy")}})
        return None
    python = str(root / "bin" / "python")
    pins = [f"{engine}=={version(engine)}" for engine in ("openvino", "onnxruntime")]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEERS[name], *pins, "--editable", str(ROOT)]
    package = PEERS[name].partition("[")[0]
    for command in ([sys.executable, "-m", "venv", "--clear", str(root)], pip, [python, "-c", _VERSIONS, package, "openvino", "numpy"]):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
        if ran.returncode:
            lines = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
            return f"{' '.join(command[1:6])} ... : {(lines or ['no message'])[-1][:200]}"
    packages = next((root / "lib").glob("python3.*")) / "site-packages"
    (packages / "serving-benchmark.pth").write_text(f"{ROOT / 'benchmarks'}\n", encoding="utf-8")  # for `serving_peers`
    write_whole(ready, json.loads(ran.stdout))
    return None


def versions(name: str, folder: Path) -> dict[str, str]:
    """Versions in a complete environment with this environment's engine; empty without one."""
    ready = folder / name / "ready.json"
    found: dict[str, str] = json.loads(ready.read_text(encoding="utf-8")) if ready.is_file() else {}
    return found if found.get("openvino") == version("openvino") else {}
