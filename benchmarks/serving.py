"""Compare `muntin serve` with LitServe, Ray Serve and a real Triton: the same artifact, engine, cores and requests.

    python benchmarks/serving.py [--models segment classify] [--servers NAME ...] [--seconds 5] [--requests 2000] [--prepare]

muntin and Triton speak the Open Inference Protocol with binary tensors, LitServe and Ray Serve are given raw bytes, which is less work. A
refusal (503, 429) counts as one only inside the objective, and for muntin only if the request was not admitted before (its message says
so). Saturation is the best of several concurrencies, with the engine alone timed before and after each while the server's processes are
paused. MUNTIN_BEFORE=SRC adds the server of an earlier checkout. The peers' environments are made with pip below --output/peers; a peer
that cannot be installed or started is left out with the reason. The servers run in a network namespace with only a loopback (Linux,
`unshare`, root or user namespaces), since Ray's processes listen on every interface. Run it alone: it takes about an hour.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from documents import Document, Goal, Row, Table, columns, look_up
from harness import Benchmark, Options, Run, main, option
from muntin.artifact import open_artifact
from muntin.runtime.host.hardware import affinity, parse_cpus
from muntin.serving.batching.batcher import BROKEN
from serving_peers.engine import child, echo, stand_by
from serving_peers.load import Load
from serving_peers.models import TITLES, WORKLOADS, Workload, check_distinct, exchange, make_artifact, sample_images
from serving_peers.servers import BEFORE, EARLIER, PEERS, SERVERS, Wanted, begin, free_port, loaded, make_environment, stopped, versions

THREADS = 1
ANSWER_S = 60.0
STEADY, OVERLOAD = 0.9, 3.0
"""Load, as a share of saturation."""
INSIDE = "MUNTIN_BENCHMARK_INSIDE"
"""Environment variable of the call that is made in the network namespace."""
NOISE = 0.03
"""Share by which a server's saturation differs from itself in another order: a smaller lead is none."""


class ServingOptions(Options):
    models: tuple[str, ...] = option(tuple(WORKLOADS), "models", choices=tuple(WORKLOADS), selects=True)
    servers: tuple[str, ...] = option(tuple(SERVERS), "servers", choices=tuple(SERVERS), selects=True)
    seconds: float = option(5.0, "of each measurement")
    requests: int = option(2000, "of each measurement with Poisson arrivals, at least", least=1)
    prepare: bool = option(False, "make the peers' environments and the artifacts, and end", selects=True)


# Measurements


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the measurements of a model share. `cores`: of the servers; this process runs on another one."""

    run: Run
    workload: Workload
    cores: set[int]
    apart: bool
    stack: ExitStack

    @property
    def artifact(self) -> Path:
        return self.run.folder.resolve() / "artifacts" / self.workload.name

    @property
    def seconds(self) -> float:
        return float(self.run.options.seconds)

    def row(self, server: str, what: str, measured: Callable[[], Row]) -> Row:
        settings = {"threads": THREADS, "apart": self.apart, "workload": asdict(self.workload)}
        settings["artifact"] = open_artifact(self.artifact).manifest.measured["origin"]
        named = {"model": self.workload.name, "server": server, "measurement": what}
        return self.run.row(f"rows/{self.workload.name}--{server}--{what}", lambda: {**named, **measured()}, **settings)

    @cached_property
    def _bare(self) -> Any:
        options = {"artifact": self.artifact, "side": self.workload.side, "threads": THREADS, "max_rows": self.workload.max_rows}
        return self.stack.enter_context(child(stand_by, self.cores, sample_images(self.workload.side), options))

    @cached_property
    def answers(self) -> Any:
        """The bare engine's answers to the sample images: the first message of its process."""
        return self._bare.recv()

    def bare(self, rows: int, seconds: float) -> Row:
        """The engine without a server, on the servers' core."""
        assert self.answers is not None
        self._bare.send((rows, seconds))
        return dict(self._bare.recv())


def floor(setting: Setting) -> Row:
    """The engine alone at several numbers of rows, and an echo of the same bytes."""
    workload = setting.workload
    found = [setting.bare(rows, setting.seconds / 2) for rows in sorted({1, 2, workload.max_rows // 2, workload.max_rows})]
    due = exchange(workload, sample_images(workload.side)[:1], setting.answers[:1])
    with child(echo, setting.cores, len(due.requests[0]), due.answers[0]) as pipe, Load(pipe.recv(), due) as load:
        echo_ms = load.closed(concurrency=1, seconds=setting.seconds)["p50_ms"]
    best, call_ms = max(found, key=lambda entry: entry["images_per_s"]), found[0]["call_ms"]
    return {
        "bare": found, "rows": best["rows"], "call_ms": call_ms, "objective_ms": round(workload.objective_calls * call_ms, 1),
        "images_per_s": best["images_per_s"], "echo_ms": echo_ms, "apart": setting.apart,
    }  # fmt: skip


@contextmanager
def served(setting: Setting, name: str, objective_ms: float | None) -> Iterator[tuple[Load, int]]:
    """Load on a server that answers rightly and is warm: batches of every size have come to it. And its process."""
    server, port, workload, output = SERVERS[name], free_port(), setting.workload, setting.run.folder.resolve()
    due = exchange(workload, sample_images(workload.side), setting.answers, path=None if server.tensors else "/predict")
    if server.peer is None:  # of the others every 503 inside the objective is taken for a refusal, which is in their favour
        due = replace(due, broken=BROKEN.encode())
    check_distinct(due)
    log = output / "logs" / f"{workload.name}-{name.replace(' ', '-').replace(',', '')}.log"
    with TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as scratch:
        wanted = Wanted(
            workload=workload, artifact=setting.artifact, environment=output / "peers" / (server.peer or ""), port=port,
            scratch=Path(scratch), threads=THREADS, objective_ms=objective_ms, wait_ms=server.wait_ms,
        )  # fmt: skip
        with loaded(server.launch(wanted), port, due, cores=setting.cores, log=log) as (load, process):
            first_answer(load)
            for concurrency in (2, workload.max_rows, 2 * workload.max_rows):
                load.closed(concurrency=concurrency, seconds=min(1.0, setting.seconds / 2), warm=0.0)
            yield load, process


def first_answer(load: Load) -> None:
    """Wait for the first right answers: a server that is ready may still be finding its own model. Raises RuntimeError."""
    end, failures = time.monotonic() + ANSWER_S, {}
    while time.monotonic() < end:
        found = load.closed(concurrency=1, seconds=1.0, warm=0.0)
        failures = found["failures"]
        if found["answers_per_s"] and not failures:
            return
    raise RuntimeError(f"it does not answer as it should: {failures or 'no response'}")


def alone(setting: Setting, load: Load, server: int, rows: int) -> Row:
    """The engine alone, while the server is paused."""
    load.closed(concurrency=1, seconds=0.5, warm=0.0)  # answered after requests that were given up: none is under way then
    with stopped(server):
        return setting.bare(rows, 1.0)


def single(setting: Setting, load: Load, server: int) -> Row:
    """Latency at concurrency 1, with the engine alone before and after it."""
    before = alone(setting, load, server, 1)["call_ms"]
    found = load.closed(concurrency=1, seconds=setting.seconds)
    return {**found, "bare_ms": [before, alone(setting, load, server, 1)["call_ms"]]}


def saturation(setting: Setting, load: Load, server: int, rows: int) -> Row:
    """The highest throughput, with the engine alone before and after each concurrency."""
    beside, tried = [alone(setting, load, server, rows)["images_per_s"]], []
    for concurrency in setting.workload.concurrency:
        found = load.closed(concurrency=concurrency, seconds=setting.seconds)
        beside.append(alone(setting, load, server, rows)["images_per_s"])
        tried.append({**found, "of_bare": found["answers_per_s"] / mean(beside[-2:])})
    failures = dict(sum((Counter(entry["failures"]) for entry in tried), Counter()))
    shares = {str(entry["concurrency"]): entry["of_bare"] for entry in tried}
    return {**max(tried, key=lambda entry: entry["of_bare"]), "failures": failures, "tried": shares, "bare_per_s": beside}


def measure_server(setting: Setting, name: str, base: Row, ours: float | None) -> Iterator[Row]:
    """A server's rows: latency and saturation without a promise, so that nothing is refused; arrivals with one, where it can be told.
    `ours`: muntin's answers a second."""
    with ExitStack() as stack:
        server = cache(lambda: stack.enter_context(served(setting, name, None)))  # started for a row that is not there yet
        yield setting.row(name, "single", lambda: single(setting, *server()))
        saturated = setting.row(name, "saturation", lambda: saturation(setting, *server(), base["rows"]))
        yield saturated
    most, objective = saturated["answers_per_s"], base["objective_ms"]
    rates = {"steady": STEADY * most, "overload": OVERLOAD * most, "same": STEADY * (ours or 0.0)}
    with ExitStack() as stack:
        server = cache(lambda: stack.enter_context(served(setting, name, objective)))
        for what, rate in sorted(rates.items(), key=lambda item: item[1]):
            if rate and most:
                seconds, warm = max(setting.seconds, setting.run.options.requests / rate), min(2.0, setting.seconds)
                arrivals = {"rate": rate, "seconds": seconds, "objective_ms": objective, "warm": warm}
                yield setting.row(name, what, lambda given=arrivals: server()[0].open(**given))


def measure(run: Run) -> Iterator[Row]:
    output, names = run.folder.resolve(), sorted(set(run.options.servers), key=["muntin", *SERVERS].index)  # the others need its rate
    if INSIDE not in os.environ:
        prepare(run.options, output)
        enter_namespace()
    raise_loopback()
    cores, apart = choose_cores(output)
    made = {peer: found for peer in PEERS if (found := versions(peer, output / "peers"))}
    yield from ({"measurement": "versions", "server": peer, **found} for peer, found in made.items())
    for model in run.options.models:
        with ExitStack() as stack:
            setting = Setting(run=run, workload=WORKLOADS[model], cores=cores, apart=apart, stack=stack)
            base, ours = setting.row("bare", "floor", partial(floor, setting)), None
            yield base
            for name in (name for name in names if SERVERS[name].peer in (None, *made)):
                try:
                    for row in measure_server(setting, name, base, ours):
                        yield row
                        if name == "muntin" and row["measurement"] == "saturation":
                            ours = row["answers_per_s"]
                except (RuntimeError, OSError, ValueError) as error:
                    yield {"model": model, "server": name, "measurement": "none", "cannot": str(error)}


def prepare(options: ServingOptions, output: Path) -> None:
    """Make environments and artifacts; says which peer cannot be installed, and why. Ends with `--prepare`."""
    for model in options.models:
        make_artifact(WORKLOADS[model], output / "artifacts" / model)
    for peer in dict.fromkeys(SERVERS[name].peer for name in options.servers):
        if peer and (reason := make_environment(peer, output / "peers")):
            print(f"left out  {peer}: {reason}", file=sys.stderr)
    if options.prepare:
        sys.exit()


def enter_namespace() -> None:
    """Start this again where no network but a loopback is. Does not return; raises OSError without `unshare`."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", *user, "--net", sys.executable, __file__, *sys.argv[1:]])  # noqa: S606, S607


def raise_loopback() -> None:
    """A new namespace's loopback is down; sets IFF_UP and IFF_RUNNING by SIOCSIFFLAGS."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


def choose_cores(output: Path) -> tuple[set[int], bool]:
    """Make this process the load generator. Returns the servers' cores, and whether they are of other physical cores."""
    own, *others = sorted(affinity())
    if not others:
        sys.exit("serving.py needs two cores, one for the load and one for the servers")
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{own}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        siblings = str(own)
    elsewhere = [core for core in others if core not in parse_cpus(siblings)]
    begin(output, own)
    return set((elsewhere or others)[:THREADS]), len(elsewhere) >= THREADS


# Figures

LARGE, SMALL = TITLES.values()
FIGURES = {
    "per_s": "saturation.answers_per_s", "of_bare": "saturation.of_bare", "single_ms": "single.p50_ms", "p99_ms": "steady.p99_ms",
    "admitted": "steady.inside_admitted", "all": "steady.inside_offered",
    "same_admitted": "same.inside_admitted", "same_all": "same.inside_offered",
}  # fmt: skip
GROUPS = {"peers": "", "triton": "triton", "exported": "triton exported", "before": BEFORE}
"""Groups of servers by the beginning of their names; `peers` are all but muntin's."""


def lines(rows: list[Row]) -> list[Row]:
    """A line of figures for each model and server, those that cannot be measured last."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "model" in row and "cannot" not in row:
            found.setdefault((row["model"], row["server"]), {})[row["measurement"]] = row
    order = [(model, server) for model in WORKLOADS for server in dict.fromkeys((*SERVERS, BEFORE)) if (model, server) in found]
    made = [_line(model, server, found[model, server], found[model, "bare"]["floor"]) for model, server in order]
    return made + [{**row, "model": TITLES[row["model"]]} for row in rows if "cannot" in row]


def _line(model: str, server: str, found: Row, base: Row) -> Row:
    line = {"model": TITLES[model], "server": server, **{name: look_up(found, path) for name, path in FIGURES.items()}}
    most, over = line["per_s"], found.get("overload")
    return line | {
        "over_ms": line["single_ms"] - mean(found["single"]["bare_ms"]) - base["echo_ms"] if line["single_ms"] else None,
        "goodput": over["goodput_per_s"] / most if over and most else None,
        "refused": over["refused"] / over["requests"] if over else None,
        "wrong": sum(row["failures"].get("wrong", 0) for row in found.values()),
        "client_cpu": max(row["client_cpu"] for row in found.values()),
        "behind_ms": max((late for row in found.values() if (late := row.get("client_behind_p99_ms")) is not None), default=None),
    }


def ours(rows: list[Row]) -> list[Row]:
    """muntin's lines, with the highest figures of each of the `GROUPS`, its own over them, and its shares minus Triton's."""
    found, made = [line for line in lines(rows) if "cannot" not in line], []
    for line in (line for line in found if line["server"] == "muntin"):
        others = [other for other in found if other["model"] == line["model"]]
        for group, start in GROUPS.items():
            mine = [other for other in others if other["server"].startswith(start) and (start or not other["server"].startswith("muntin"))]
            line[group] = {name: max((other[name] for other in mine if other[name] is not None), default=None) for name in FIGURES}
        line["over"] = {group: {name: line[name] / best for name, best in line[group].items() if line[name] and best} for group in GROUPS}
        if abs(line["over"]["peers"].get("of_bare", 1) - 1) < NOISE:
            line["over"]["peers"].pop("of_bare", None)
        triton = {name: value for name, value in line["triton"].items() if value is not None}
        shares = {name: line[name] for name in ("admitted", "all") if line[name] is not None}
        line["ahead"] = {name: {theirs: share - value for theirs, value in triton.items()} for name, share in shares.items()}
        made.append(line)
    return made


def goal(name: str, figure: str, form: str, *models: str, **bound: float) -> Goal:
    """A goal on a figure of muntin's line with each model, or only some of them."""
    rows = lambda rows: [line for line in ours(rows) if line["model"] in (models or TITLES.values())]  # noqa: E731
    return Goal(name=name, values=figure, case="{model}", rows=rows, form=form, **bound)


def newest(document: Document) -> str:
    told = []
    for line in ours(document.rows):
        theirs = " (best peer {of_bare:.1%})".format(**line["peers"]) if line["peers"]["of_bare"] else ""
        triton = " (Triton {all:.1%})".format(**line["triton"]) if line["triton"]["all"] else ""
        told.append(NEWEST.format(**line).format(model=line["model"], theirs=theirs, triton=triton))
    return ". ".join(told)


def variant(document: Document) -> str:
    found = lines(document.rows)
    servers = dict.fromkeys(BEFORE if line["server"] == BEFORE else line["server"].split()[0] for line in found)
    beside = ", ".join(server for server in servers if server != "muntin")
    return ", ".join(dict.fromkeys(line["model"] for line in found)) + (f" beside {beside}" if beside else "")


def told(text: str) -> Callable[[list[Document]], str]:
    """A text with figures of all documents; those beside Triton are of the newest with the repository of `muntin triton`."""

    def between(shares: list[float], digits: int) -> str:
        return " to ".join(dict.fromkeys(f"{100 * share:.{digits}f}" for share in (min(shares), max(shares)))) + " %"

    def written(documents: list[Document]) -> str:
        found = [(EARLIER in document.marks, line) for document in documents for line in ours(document.rows)]
        large, small = ([(earlier, line) for earlier, line in found if line["model"] == model] for model in (LARGE, SMALL))
        today = [line["admitted"] for earlier, line in large if not earlier]
        before = [line["admitted"] if earlier else line["before"]["admitted"] for earlier, line in large]
        before = [share for share in before if share is not None]
        return text.format(
            today=between(today, 1), runs=len(today), before=between(before, 1), before_runs=len(before),
            small=between([line["admitted"] for earlier, line in small if not earlier], 0),
            rate=between([line["of_bare"] for _, line in small], 0), goodput=between([line["goodput"] for _, line in small], 0),
            beside=[line for _, line in large if line["exported"]["all"]][-1],
        ).replace("%", " %").replace("  %", " %")  # fmt: skip

    return written


NEWEST = (
    "{{model}}: {of_bare:.1%} of the bare engine{{theirs}}, {over_ms:.2f} ms beyond it at concurrency 1; in time at 90 %: {admitted:.1%} "
    "of the admitted, {all:.1%} of all{{triton}}; {goodput:.1%} of saturation under three times the load"
)
BENCHMARK = Benchmark(
    name="serving",
    options=ServingOptions,
    measure=measure,
    about="""One core for the server, one for the load, HTTP; the same artifact in the same engine behind every server, batches of at most 4
(512 x 512) and 16 images (classifier). The objective is five and sixteen calls of the bare engine. Of bare: against the engine timed beside
each server. Over: ms beyond it and an echo of the bytes at concurrency 1. Admitted, all: answered inside the objective at 90 % of its own
saturation; same: at 90 % of muntin's. 3x: answered inside it under three times the load, of saturation. Differences of a few per cent mean
nothing: the machine's speed changes by a third within seconds. Earlier servers: HTTP by uvicorn, and requests could be refused unread.""",
    newest=newest,
    variant=variant,
    tables=(
        Table(
            title="The bare engine",
            columns=columns("model, rows, /s=images_per_s:.1f, call ms=call_ms:.2f, echo ms=echo_ms:.2f, objective=objective_ms"),
            rows=lambda rows: [{**row, "model": TITLES[row["model"]]} for row in rows if row["measurement"] == "floor"],
        ),
        Table(
            columns=columns(
                "model, server, /s=per_s:.1f, of bare=of_bare:.1%, 1 ms=single_ms:.2f, over=over_ms:.2f, admitted:.2%, all:.2%, "
                "p99 ms=p99_ms:.1f, same admitted=same_admitted:.2%, same all=same_all:.2%, 3x=goodput:.1%, refused:.1%, wrong, "
                "load=client_cpu:.0%, behind=behind_ms:.2f"
            ),
            rows=lines,
        ),
    ),
    goals=(
        goal("saturation, of the bare engine", "of_bare", "{:.1%}", LARGE, at_least=0.95),
        goal("saturation over the best peer's, if they differ by 3 %", "over.peers.of_bare", "{:.3f}", at_least=1),
        goal("ms beyond engine and echo at concurrency 1", "over_ms", "{:.2f}", at_most=0.5),
        goal("in time at 90 %, of the admitted", "admitted", "{:.2%}", at_least=0.999),
        goal("in time at 90 %, of the admitted, minus Triton's best", "ahead.admitted.admitted", "{:+.1%}", at_least=0),
        goal("in time at 90 %, of all, minus Triton's best", "ahead.all.all", "{:+.1%}", at_least=0),
        goal("the admitted minus Triton's best at this rate", "ahead.admitted.same_admitted", "{:+.1%}", at_least=0),
        goal("all minus Triton's best at this rate", "ahead.all.same_all", "{:+.1%}", at_least=0),
        goal("in time under three times the load, of saturation", "goodput", "{:.1%}", at_least=0.9),
        goal("wrong answers", "wrong", "{:.0f}", at_most=0),
        goal("saturation over that of the server before", "over.before.of_bare", "{:.1%}", LARGE, at_least=0.97),
        goal("classifier's saturation over that of the server before", "over.before.of_bare", "{:.1%}", SMALL, at_least=0.9),
        goal("latency alone over that of the server before", "over.before.single_ms", "{:.1%}", LARGE, at_most=1.03),
    ),
    blocks={
        "readme": told("**{beside[all]:.0%}** for {beside[triton][all]:.0%}"),
        "M15": told(
            "a real Triton 2.51 serves what `muntin triton` writes, with {beside[exported][of_bare]:.1%} of the bare engine's answers a "
            "second; `muntin serve`, which speaks its protocol, {beside[of_bare]:.1%} (goal 95)"
        ),
        "M18": told(
            "512 x 512 at 90% of saturation: {today} of the admitted inside the objective in {runs} runs (goal 99.9; earlier servers "
            "{before} in {before_runs}); of all requests {beside[all]:.0%} for Triton's {beside[triton][all]:.0%}. A classifier of a "
            "millisecond: {small} of the admitted"
        ),
        "batcher": told("{today} of the admitted in time at 512 x 512, {small} for a model of a millisecond"),
        "limits": told(
            "A classifier of a millisecond answers {rate} of the bare engine's rate; under three times the load {goodput} of its "
            "saturation is answered in time."
        ),
    },
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
