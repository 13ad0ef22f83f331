"""How fast: an artefact, and a baseline beside it, over batches, threads and streams, in one run.

    for each number of threads and streams: open every candidate (time and memory of it)
        for each batch: latency, one call after the other, interleaved; images a second, all streams busy, interleaved

Medians, and the ratios between rows of the same run, are what to quote: a machine's absolute times drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muntin.artifact import Artifact, open_artifact
from muntin.errors import DataError
from muntin.runtime.contention import watch_cpu
from muntin.runtime.engines import DEFAULT_ENGINE, load
from muntin.runtime.hardware import describe_hardware, physical_cores
from muntin.runtime.latency import Latency, Mapper, interleaved_latency, interleaved_throughput
from muntin.runtime.memory import watch_memory
from muntin.runtime.profile import BUSY, default_shape, fill
from muntin.runtime.session import Shape, check_shape, check_streams, check_threads

ROUNDS = 50
"""Timed calls a row; the 99th percentile of fewer says little."""
Opener = Callable[[int, int, tuple[Shape, ...]], Mapper]
"""(threads, streams, shapes to be ready for) -> session"""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One candidate with so many threads and streams on batches of one shape.

    `images_per_s`: with every stream busy. `load_s`: opening it, compilation or the cache's copy and a first call of every batch included.
    `held_mib`, `peak_mib`: resident memory that opening and calling it added, after and at the most; None where the system does not say.
    `ratio`: the baseline's median latency over this one, None without a baseline.
    """

    name: str
    engine: str
    precision: str
    threads: int
    streams: int
    shape: Shape
    latency: Latency
    images_per_s: float
    load_s: float
    held_mib: float | None
    peak_mib: float | None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All rows of a run. `others`: cores' worth of CPU time that other processes used meanwhile. `notes`: what makes the times doubtful."""

    rows: tuple[BenchRow, ...]
    others: float | None
    notes: tuple[str, ...]
    created: str
    hardware: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def bench(
    path: str | Path,
    *,
    baseline: tuple[str, Opener] | None = None,
    engine: str = DEFAULT_ENGINE,
    precision: str = "recorded",
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
    streams: Sequence[int] = (1,),
    size: tuple[int, int] | None = None,
    rounds: int = ROUNDS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measures an artefact, interleaved with a baseline if one is given (its name, and how to open it: see `artifact_opener`).

    `batches`, `threads`, `streams`: every combination is a row (None threads: the usable physical cores; more streams than threads count as
    so many). `size`: height and width in pixels, those of the manifest's example unless given. `rounds`: timed calls a row. The
    images are the artefact's golden ones, mirrored up to the size. `report` is called with (rows done, rows in all).

    Raises what `load` raises, and DataError for a value out of range.
    """
    _check(batches, threads, streams, size, rounds)
    artifact = open_artifact(path)
    _, height, width = default_shape(artifact)
    shapes = tuple((batch, *(size or (height, width))) for batch in batches)
    candidates: dict[str, Opener] = {} if baseline is None else {f"baseline {baseline[0]}": baseline[1]}
    candidates[Path(path).name or str(path)] = artifact_opener(path, engine=engine, precision=precision)
    settings = list(dict.fromkeys((n or physical_cores(), min(s, n or physical_cores())) for n in threads for s in streams))
    rows: list[BenchRow] = []
    with watch_cpu() as watch:
        for done, (n, s) in enumerate(settings):
            report(done, len(settings))
            rows += _measure(artifact, candidates, shapes, threads=n, streams=s, rounds=rounds)
        report(len(settings), len(settings))
    return Bench(
        rows=tuple(rows if baseline is None else _with_ratios(rows)),
        others=watch.others,
        notes=tuple(_notes(watch.others, max(n for n, _ in settings))),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=describe_hardware(),
    )


def artifact_opener(path: str | Path, *, engine: str = DEFAULT_ENGINE, precision: str = "recorded") -> Opener:
    """How to open an artefact in an engine: a candidate for `bench`."""
    return lambda threads, streams, shapes: load(path, engine=engine, precision=precision, threads=threads, streams=streams, shapes=shapes)


def _measure(
    artifact: Artifact, candidates: Mapping[str, Opener], shapes: tuple[Shape, ...], *, threads: int, streams: int, rounds: int
) -> list[BenchRow]:
    sessions: dict[str, Mapper] = {}
    opened: dict[str, dict[str, float | None]] = {}
    for name, opener in candidates.items():
        started = time.perf_counter()
        with watch_memory() as watch:
            sessions[name] = opener(threads, streams, shapes)
        opened[name] = {"load_s": time.perf_counter() - started, "held_mib": _mib(watch.held), "peak_mib": _mib(watch.peak)}
    rows = []
    for shape in shapes:
        images_BHWC = fill(artifact.golden()[0][0], shape)
        latencies = interleaved_latency(sessions, images_BHWC, rounds=rounds)
        rates = interleaved_throughput(sessions, images_BHWC, rounds=max(1, rounds // 10))
        for name, session in sessions.items():
            described: Any = {key: getattr(session, key) for key in ("engine", "precision")} | opened[name]
            rows.append(
                BenchRow(
                    name=name,
                    threads=threads,
                    streams=session.streams,
                    shape=shape,
                    latency=latencies[name],
                    images_per_s=rates[name],
                    **described,
                )
            )
    return rows


def _with_ratios(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Every row beside the baseline's of the same setting, which comes before it."""
    found, base = [], rows[0]
    for row in rows:
        base = row if row.name == rows[0].name else base
        found.append(replace(row, ratio=base.latency.median_ms / row.latency.median_ms))
    return found


def _notes(others: float | None, threads: int) -> list[str]:
    notes, cores = [], physical_cores()
    if others is not None and others >= BUSY:
        notes.append(f"other processes used {others:.1f} of the cores meanwhile: the times are too long; measure alone")
    if threads > cores:
        notes.append(f"{threads} threads on {cores} physical cores: they wait for each other; compare with --threads {cores}")
    return notes


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _check(
    batches: Sequence[int], threads: Sequence[int | None], streams: Sequence[int], size: tuple[int, int] | None, rounds: int
) -> None:
    for name, values in (("batches", batches), ("threads", threads), ("streams", streams)):
        if not values:
            raise DataError(f"{name}={values!r}: give at least one number")
    for batch in batches:
        check_shape((batch, *(size or (1, 1))))
    for number in threads:
        check_threads(number)
    for number in streams:
        check_streams(number)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 10_000:
        raise DataError(f"rounds={rounds!r}: give a whole number from 1 to 10000")
