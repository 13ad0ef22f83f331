"""Compare `muntin serve` with LitServe, Ray Serve and a real Triton: the same artefact, the same engine, the same cores, the same requests.

    python benchmarks/serving.py [--output runs/benchmark-serving] [--models segment classify] [--servers NAME ...] [--seconds 5]
                                 [--requests 2000] [--prepare] [--json]

Two models: a segmentation at 512 x 512 (UINT8 pixels in, 262,144 bytes of labels out) and a small classifier at 64 x 64 (scores out). Every
server holds it in muntin's runtime (OpenVINO), with one thread on one core; the load generator has another core. muntin and Triton speak
the Open Inference Protocol with binary tensors, LitServe and Ray Serve are given raw bytes, which is less work. Every answer is compared
with the expected one. The table's columns:
    of bare     closed loop, the best of several concurrencies: answers a second as a share of the engine's own, which is called without a
                server on the same core before and after it, with its fastest number of rows; this benchmark pauses all of the server's
                processes meanwhile (SIGSTOP)
    1 ms, over  concurrency 1: median latency, and the part beyond the engine's call plus an echo of the same bytes over a raw socket
    90 %        Poisson arrivals at 90 % of the server's own saturation: share of the admitted requests that were answered inside the
                objective, share of all of them, 99th percentile
    same        the same at 90 % of muntin's saturation (which is measured first)
    3x          three times its own saturation: answers inside the objective, as a share of saturation, and the share of requests refused
The objective is five calls of the bare engine with one picture of the first model, sixteen of the second. A refusal (503, 429) counts as
one only inside the objective, and for muntin only if the request was not admitted before (its message says so). Wrong answers and failures
are summed over all loads.

The peers' environments are made with pip below --output/peers (--prepare: that and the artefacts, and no more); a peer that cannot be
installed or started is left out with the reason. The servers run in a network namespace that has only a loopback, since Ray's own processes
listen on every interface; this needs Linux, `unshare`, and root or user namespaces.

Load and servers are on different physical cores if there are two; otherwise the last line says so. Existing rows are not measured again;
a row of other settings, or of another machine, is refused. Run it alone: it takes about an hour, and other work on the cores would be part
of the measurement.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from operator import ge, le
from pathlib import Path
from statistics import mean

import numpy as np

from kept import Row, kept_row, now, read_row, refuse_other
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import affinity, parse_cpus
from muntin.serving.batching.batcher import BROKEN
from serving_peers.environments import PEERS, is_made, make_environment, versions
from serving_peers.load import Exchange, Load
from serving_peers.models import WORKLOADS, Workload, check_distinct, exchange, make_artifact, origin_of, pictures
from serving_peers.servers import SERVERS, Launch, Wanted, free_port, running, scratch, stopped

HERE = Path(__file__).resolve().parent
THREADS = 1
ANSWER_S = 60.0
STEADY, OVERLOAD = 0.9, 3.0
"""Load, as a share of saturation."""
NOISE = 0.03
"""Share by which a server's saturation differs from itself in another order: a smaller lead is none."""
GOALS = {"saturation_of_bare": 0.95, "over_ms": 0.5, "inside_admitted": 0.999, "goodput_of_saturation": 0.9}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of all measurements. `cores`: of the servers; this process runs on another one. `apart`: True if that is another
    physical core. `hardware`: the machine, as described to a process that may run on all of it."""

    output: Path
    cores: set[int]
    apart: bool
    seconds: float
    requests: int
    hardware: Row

    @property
    def variables(self) -> dict[str, str]:
        return {"MUNTIN_CACHE": str(self.output / "cache")}

    def artifact(self, workload: Workload) -> Path:
        return self.output / "artifacts" / workload.name

    def rows(self) -> Path:
        return self.output / "rows"

    def of_rows(self, workload: Workload) -> Row:
        """Return the settings that a row must have to belong to these measurements."""
        measured = {"seconds": self.seconds, "requests": self.requests, "threads": THREADS, "apart": self.apart}
        return {**measured, "workload": asdict(workload), "artifact": origin_of(self.artifact(workload))}


class Bare:
    """The engine without a server, in a process of its own on the servers' core; asleep unless it is asked. Use as a context."""

    def __init__(self, setting: Setting, workload: Workload) -> None:
        with ExitStack() as undone:  # of one that does not start nothing is left
            self._folder = Path(tempfile.mkdtemp(prefix="bare-"))
            undone.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self.images = pictures(workload.side)
            np.save(self._folder / "images.npy", self.images)
            artifact, files = setting.artifact(workload), (self._folder / "images.npy", self._folder / "answers.npy")
            options = (artifact, workload.side, THREADS, workload.max_rows, *files)
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "serving_peers.bare", *map(str, options)],
                cwd=HERE,
                env=os.environ | setting.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, setting.cores),
            )
            undone.callback(self._process.wait)
            undone.callback(self._process.kill)
            if self._line() != "ready":
                raise RuntimeError("the bare engine did not start; what it said is above")
            self.answers = np.load(files[1], allow_pickle=False)
            undone.pop_all()

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)

    def measure(self, rows: int, seconds: float) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rows} {seconds}\n")
        self._process.stdin.flush()
        return dict(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Rows:
    """Finished measurements, a file each. One of other settings, or of another machine, ends the program."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._folder = setting.rows()
        self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, *key: str) -> Row | None:
        return read_row(self._file(key), self._setting.of_rows(WORKLOADS[key[0]]), self._setting.hardware)

    def once(self, *key: str, measure: Callable[[], Row]) -> Row:
        """The row; measured now if it is not there. `key`: model, server, measurement."""
        row = self.read(*key)
        if row is None:
            model, server, what = key
            settings, hardware = self._setting.of_rows(WORKLOADS[model]), self._setting.hardware
            named = {"model": model, "server": server, "measurement": what}
            row = kept_row(self._file(key), settings, lambda: {**named, **measure()}, hardware=hardware)
            print(f"{datetime.now(UTC):%H:%M:%S}  {', '.join(key)}", file=sys.stderr)
        return row

    def all(self) -> list[Row]:
        rows = []
        for file in sorted(self._folder.glob("*.json")):
            row = json.loads(file.read_text(encoding="utf-8"))
            refuse_other(file, row, self._setting.of_rows(WORKLOADS[row["model"]]), self._setting.hardware)
            rows.append(row)
        return rows

    def _file(self, key: tuple[str, ...]) -> Path:
        return self._folder / f"{'--'.join(part.replace(' ', '-').replace(',', '') for part in key)}.json"


def measure_floor(setting: Setting, workload: Workload, bare: Bare) -> Row:
    """The engine alone at several numbers of rows, and an echo of the same bytes."""
    sizes = sorted({1, 2, workload.max_rows // 2, workload.max_rows})
    found = [bare.measure(rows, setting.seconds / 2) for rows in sizes]
    best = max(found, key=lambda entry: entry["images_per_s"])
    echo = measure_echo(setting, exchange(workload, bare.images, bare.answers, path="/", tensors=True))
    return {
        "bare": found,
        "rows": best["rows"],
        "call_ms": found[0]["call_ms"],
        "objective_ms": round(workload.objective_calls * found[0]["call_ms"], 1),
        "images_per_s": best["images_per_s"],
        "echo_ms": echo["p50_ms"],
    }


def measure_echo(setting: Setting, due: Exchange) -> Row:
    request, answer = due.requests[0], due.answers[0]
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n".encode()
    port = free_port()
    with scratch() as folder:
        (folder / "answer").write_bytes(head + answer)
        command = [sys.executable, str(HERE / "serving_peers" / "echo.py"), str(port), str(len(request)), str(folder / "answer")]
        launch = Launch(command=command)
        one = Exchange(requests=due.requests[:1], answers=due.answers[:1], dtype=due.dtype)
        with running(launch, port, cores=setting.cores, log=folder / "log", variables={}), Load(port, one) as load:
            return load.closed(concurrency=1, seconds=setting.seconds)


def measure_closed(setting: Setting, workload: Workload, name: str, bare: Bare, rows: Rows, best: int) -> None:
    """Latency at concurrency 1 and saturation, each with the engine alone before and after it. Without a promise: nothing is refused."""
    if all(rows.read(workload.name, name, what) for what in ("single", "saturation")):
        return
    with served(setting, workload, name, bare, objective_ms=None) as (load, server):

        def engine(count: int) -> Row:
            """The engine alone, while the server stands still."""
            load.closed(concurrency=1, seconds=0.5, warm=0.0)  # answered after what was given up before: nothing is under way then
            with stopped(server):
                return bare.measure(count, 1.0)

        def alone() -> Row:
            beside = [engine(1)["call_ms"]]
            found = load.closed(concurrency=1, seconds=setting.seconds)
            beside.append(engine(1)["call_ms"])
            return {**found, "bare_ms": beside}

        def saturate() -> Row:
            beside = [engine(best)["images_per_s"]]
            tried: list[Row] = []
            failures: Counter[str] = Counter()
            for concurrency in workload.concurrency:
                found = load.closed(concurrency=concurrency, seconds=setting.seconds)
                beside.append(engine(best)["images_per_s"])
                tried.append({**found, "of_bare": found["answers_per_s"] / mean(beside[-2:])})
                failures.update(found["failures"])
            fastest = max(tried, key=lambda entry: entry["of_bare"])
            shares = {str(entry["concurrency"]): entry["of_bare"] for entry in tried}
            return {**fastest, "failures": dict(failures), "tried": shares, "bare_per_s": beside}

        rows.once(workload.name, name, "single", measure=alone)
        rows.once(workload.name, name, "saturation", measure=saturate)


def measure_open(setting: Setting, workload: Workload, name: str, bare: Bare, rows: Rows, objective_ms: float) -> None:
    """Poisson arrivals: near its own saturation, near muntin's, and far beyond its own. With a promise, where a server can be told."""
    saturation = rows.read(workload.name, name, "saturation")
    ours = rows.read(workload.name, "muntin", "saturation")
    if saturation is None or not saturation["answers_per_s"]:
        return
    rates = {"steady": STEADY * saturation["answers_per_s"], "overload": OVERLOAD * saturation["answers_per_s"]}
    if ours is not None and name != "muntin":
        rates["same"] = STEADY * ours["answers_per_s"]
    if all(rows.read(workload.name, name, what) for what in rates):
        return
    with served(setting, workload, name, bare, objective_ms=objective_ms) as (load, _):
        for what, rate in sorted(rates.items(), key=lambda item: item[1]):
            seconds = max(setting.seconds, setting.requests / rate)
            arrive = partial(load.open, rate=rate, seconds=seconds, objective_ms=objective_ms, warm=min(2.0, setting.seconds))
            rows.once(workload.name, name, what, measure=arrive)


@contextmanager
def served(setting: Setting, workload: Workload, name: str, bare: Bare, *, objective_ms: float | None) -> Iterator[tuple[Load, int]]:
    """Load on a server that has been started, answers rightly and is warm: batches of every size have come to it. And its process."""
    server, port = SERVERS[name], free_port()
    due = exchange(workload, bare.images, bare.answers, path=server.path(workload), tensors=server.tensors)
    if server.peer is None:  # of the others every 503 inside the objective is taken for a refusal, which is in their favour
        due = replace(due, broken=BROKEN.encode())
    check_distinct(due)
    log = setting.output / "logs" / f"{workload.name}-{name.replace(' ', '-').replace(',', '')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with scratch() as folder:
        wanted = Wanted(
            workload=workload,
            artifact=setting.artifact(workload),
            environment=setting.output / "peers" / (server.peer or ""),
            scratch=folder,
            port=port,
            threads=THREADS,
            objective_ms=objective_ms,
            wait_ms=server.wait_ms,
        )
        started = running(server.launch(wanted), port, cores=setting.cores, log=log, variables=setting.variables)
        with started as process, Load(port, due) as load:
            first_answer(load)
            for concurrency in (2, workload.max_rows, 2 * workload.max_rows):
                load.closed(concurrency=concurrency, seconds=min(1.0, setting.seconds / 2), warm=0.0)
            yield load, process.pid


def first_answer(load: Load) -> None:
    """Waits for the first right answers: a server that says it is ready may still be finding its own model. Raises RuntimeError."""
    end = time.monotonic() + ANSWER_S
    failures: dict[str, int] = {}
    while time.monotonic() < end:
        found = load.closed(concurrency=1, seconds=1.0, warm=0.0)
        failures = found["failures"]
        if found["answers_per_s"] and not failures:
            return
    raise RuntimeError(f"it does not answer as it should: {failures or 'nothing came'}")


def measure(setting: Setting, models: list[str], servers: list[str]) -> None:
    rows = Rows(setting)
    rows.all()  # what is refused is refused before anything is measured
    for workload in (WORKLOADS[model] for model in models):
        try:
            bare = Bare(setting, workload)
        except (RuntimeError, OSError, ValueError) as error:
            print(f"left out  {workload.name}: {error}", file=sys.stderr)
            continue
        with bare:
            floor = rows.once(workload.name, "bare", "floor", measure=partial(measure_floor, setting, workload, bare))
            for name in sorted(servers, key=lambda name: name != "muntin"):  # the others are asked at its rate, too
                try:
                    measure_closed(setting, workload, name, bare, rows, floor["rows"])
                    measure_open(setting, workload, name, bare, rows, floor["objective_ms"])
                except (RuntimeError, OSError, ValueError) as error:
                    print(f"left out  {workload.name}, {name}: {error}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A server with one model, for the table and the goals; None where it was not measured."""

    model: str
    server: str
    of_bare: float | None = None
    answers_per_s: float | None = None
    single_ms: float | None = None
    over_ms: float | None = None
    admitted: float | None = None
    offered: float | None = None
    p99_ms: float | None = None
    same_admitted: float | None = None
    same_offered: float | None = None
    goodput: float | None = None
    refused: float | None = None
    wrong: int = 0
    client_cpu: float = 0.0
    client_behind_ms: float | None = None


def lines(rows: list[Row]) -> list[Line]:
    """One for each model and server that has rows, in the order of `SERVERS`."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["server"]), {})[row["measurement"]] = row
    floors = {model: rows_["floor"] for (model, server), rows_ in found.items() if server == "bare"}
    order = [(model, server) for model in WORKLOADS for server in SERVERS if (model, server) in found]
    return [_line(model, server, found[model, server], floors[model]) for model, server in order]


def _line(model: str, server: str, found: dict[str, Row], floor: Row) -> Line:
    single, saturation, steady, same, overload = (found.get(what, {}) for what in ("single", "saturation", "steady", "same", "overload"))
    most = saturation.get("answers_per_s")
    return Line(
        model=model,
        server=server,
        of_bare=saturation.get("of_bare"),
        answers_per_s=most,
        single_ms=single.get("p50_ms"),
        over_ms=None if not single.get("p50_ms") else single["p50_ms"] - mean(single["bare_ms"]) - floor["echo_ms"],
        admitted=steady.get("inside_admitted"),
        offered=steady.get("inside_offered"),
        p99_ms=steady.get("p99_ms"),
        same_admitted=same.get("inside_admitted"),
        same_offered=same.get("inside_offered"),
        goodput=overload["goodput_per_s"] / most if overload and most else None,
        refused=overload["refused"] / overload["requests"] if overload else None,
        wrong=sum(row["failures"].get("wrong", 0) for row in found.values()),
        client_cpu=max((row["client_cpu"] for row in found.values()), default=0.0),
        client_behind_ms=best(row.get("client_behind_p99_ms") for row in found.values()),
    )


def judge(table: list[Line]) -> list[Row]:
    """Each goal with what was found and whether it is met; None where it was not measured."""
    judged: list[Row] = []

    def add(goal: str, found: float | None, met: Callable[[float, float], bool], wanted: float | None, *, apart: float = 0.0) -> None:
        """`apart`: share by which two figures have to differ, or they are not told apart."""
        known = found is not None and wanted is not None and abs(found - wanted) >= apart * wanted
        judged.append({"goal": goal, "found": found, "wanted": wanted, "met": met(found, wanted) if known else None})  # type: ignore[arg-type]

    for model in dict.fromkeys(line.model for line in table):
        ours = next((line for line in table if line.model == model and line.server == "muntin"), None)
        if ours is None:
            continue
        peers = [line for line in table if line.model == model and not line.server.startswith("muntin")]
        fixed = [line for line in peers if line.server.startswith("triton")]
        near = f"at {STEADY:.0%}, inside the objective"
        if model == "segment":
            add(f"{model}: saturation, of the bare engine", ours.of_bare, ge, GOALS["saturation_of_bare"])
        add(f"{model}: saturation, and the best peer's", ours.of_bare, ge, best(line.of_bare for line in peers), apart=NOISE)
        add(f"{model}: concurrency 1, ms beyond echo and engine", ours.over_ms, le, GOALS["over_ms"])
        add(f"{model}: {near}, of the admitted", ours.admitted, ge, GOALS["inside_admitted"])
        add(f"{model}: {near}, of the admitted, and Triton's best at its own 90 %", ours.admitted, more, best(t.admitted for t in fixed))
        add(f"{model}: {near}, of all, and Triton's best at its own 90 %", ours.offered, more, best(t.offered for t in fixed))
        add(f"{model}: {near}, of the admitted, and Triton's best at this rate", ours.admitted, more, best(t.same_admitted for t in fixed))
        add(f"{model}: {near}, of all, and Triton's best at this rate", ours.offered, more, best(t.same_offered for t in fixed))
        add(f"{model}: {OVERLOAD:g}x overload, goodput of saturation", ours.goodput, ge, GOALS["goodput_of_saturation"])
        add(f"{model}: wrong answers", ours.wrong, le, 0)
    return judged


def more(found: float, than: float) -> bool:
    """Return whether a share is larger than another, or is 1."""
    return found > than or found == 1


def best(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def print_table(table: list[Line], rows: list[Row], goals: list[Row], hardware: Row) -> None:
    columns = {
        "answers_per_s": ("/s", ".1f"), "of_bare": ("of bare", ".1%"), "single_ms": ("1 ms", ".2f"), "over_ms": ("over", ".2f"),
        "admitted": ("90 % adm.", ".2%"), "offered": ("of all", ".2%"), "p99_ms": ("p99 ms", ".1f"), "same_admitted": ("same adm.", ".2%"),
        "same_offered": ("of all", ".2%"), "goodput": ("3x", ".1%"), "refused": ("refused", ".1%"), "wrong": ("wrong", "d"),
    }  # fmt: skip
    print(f"{'model':<10}{'server':<24}" + "".join(f"{title:>10}" for title, _ in columns.values()))
    floors = {row["model"]: row for row in rows if row["measurement"] == "floor"}
    for model, floor in floors.items():
        told = f"{floor['rows']} rows a call; one row {floor['call_ms']:.2f} ms, echo {floor['echo_ms']:.2f} ms"
        told += f", objective {floor['objective_ms']:g} ms"
        print(f"{model:<10}{'bare engine':<24}{floor['images_per_s']:>10.1f}   {told}")
        for line in (line for line in table if line.model == model):
            cells = [(getattr(line, name), form) for name, (_, form) in columns.items()]
            print(f"{model:<10}{line.server:<24}" + "".join(f"{'–' if cell is None else format(cell, form):>10}" for cell, form in cells))
    for goal in goals:
        found, wanted = ("–" if value is None else f"{value:.4g}" for value in (goal["found"], goal["wanted"]))
        unknown = "not measured" if None in (goal["found"], goal["wanted"]) else "not told apart"
        print(f"{ {True: 'met', False: 'MISSED', None: unknown}[goal['met']]:<16}{goal['goal']}: {found} (wanted {wanted})")
    busy = max((line.client_cpu for line in table), default=0.0)
    print(f"The load generator used {busy:.0%} of its core at the most (it polls without sleep when an arrival is near).")
    if (behind := best(line.client_behind_ms for line in table)) is not None:
        print(f"99 of 100 requests went out within {behind:.2f} ms of when they were due.")
    where = "one core for the servers, one for the load" if hardware["apart"] else "servers and load on hyper-threads of one core"
    print(f"{hardware['cpu']}, {where}; {hardware['created']}")


def prepare(output: Path, models: list[str], servers: list[str]) -> None:
    """Environments and artefacts, where they are not there yet; says which peer cannot be had, and why."""
    for workload in (WORKLOADS[model] for model in models):
        make_artifact(workload, output / "artifacts" / workload.name)
    for peer in PEERS:
        wanted = any(SERVERS[name].peer == peer for name in servers)
        reason = make_environment(peer, output / "peers") if wanted else None
        if reason:
            print(f"left out  {peer}: {reason}", file=sys.stderr)


def enter_namespace(arguments: list[str]) -> None:
    """Starts this again where no network but a loopback is. Does not return; raises OSError where `unshare` is not there."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.execvp("unshare", ["unshare", *user, "--net", sys.executable, __file__, *arguments, "--inside"])  # noqa: S606, S607


def raise_loopback() -> None:
    """A new namespace's loopback is down; sets IFF_UP and IFF_RUNNING by SIOCSIFFLAGS."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


def siblings(cpu: int) -> set[int]:
    """The logical CPUs of its physical core, itself among them; itself alone where the system does not say."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return {cpu}
    return {cpu} | parse_cpus(text.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-serving"))
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--requests", type=int, default=2000, help="of each measurement with Poisson arrivals, at least")
    parser.add_argument("--prepare", action="store_true", help="make the peers' environments and the artefacts, and end")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    machine = describe_hardware()  # before this process is bound to a core
    hardware = {**machine, "created": now()}
    if not arguments.inside:
        prepare(output, arguments.models, arguments.servers)
        if not arguments.prepare:
            enter_namespace(sys.argv[1:])
        return
    raise_loopback()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server that runs is stopped too
    there = {peer for peer in PEERS if is_made(peer, output / "peers")}
    own, *others = sorted(affinity())
    if not others:
        sys.exit("serving.py needs two cores, one for the load and one for the servers")
    elsewhere = [core for core in others if core not in siblings(own)]
    hardware["apart"] = len(elsewhere) >= THREADS
    os.sched_setaffinity(0, {own})
    setting = Setting(
        output=output,
        cores=set((elsewhere if hardware["apart"] else others)[:THREADS]),
        apart=hardware["apart"],
        seconds=arguments.seconds,
        requests=arguments.requests,
        hardware=machine,
    )
    measure(setting, arguments.models, [name for name in arguments.servers if SERVERS[name].peer is None or SERVERS[name].peer in there])
    rows = Rows(setting).all()
    table = lines(rows)
    goals = judge(table)
    if arguments.json:
        told = {peer: versions(peer, output / "peers") for peer in sorted(there)}
        print(json.dumps({"benchmark": "serving", "hardware": hardware, "peers": told, "rows": rows, "goals": goals}, indent=1))
    else:
        print_table(table, rows, goals, hardware)


if __name__ == "__main__":
    main()
