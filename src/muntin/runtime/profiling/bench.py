"""Benchmark of one or several candidates over batches, threads and streams, in one run.

    for each number of threads and streams: open every candidate in a process of its own (time and memory)
    for each number of threads and streams: open all candidates here
        for each batch: latency, one call after the other, interleaved; images a second, all streams busy, interleaved

Quote medians and the ratios between rows of the same run: a machine's absolute times drift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.errors import DataError
from muntin.runtime.host.hardware import describe_hardware
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.cold_start import ArtifactCandidate, Candidate, Loading, measure_loading
from muntin.runtime.profiling.contention import notes_on, watch_cpu
from muntin.runtime.profiling.profile import enough_memory, fill
from muntin.runtime.profiling.timing import Latency, Mapper, interleaved_latency, interleaved_throughput
from muntin.runtime.session import Shape, check_shape
from muntin.text import count

ROUNDS = 50
"""Timed calls a row; a 99th percentile needs that many."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One candidate with one number of threads and streams on batches of one shape.

    `images_per_s`: with every stream busy. `load_s`, `held_mib`, `peak_mib`, `cached`: of opening it with these threads and streams for all
    batches of the run (`Loading`). `integers`: True if layers run on integer kernels; `precision` is that of the others. `ratio`: the first
    candidate's median latency over this one; None for a single candidate, and where the first has another number of streams, since a call
    has the threads of its stream.
    """

    name: str
    engine: str
    precision: str
    integers: bool
    threads: int
    streams: int
    shape: Shape
    latency: Latency
    images_per_s: float
    load_s: float
    held_mib: float | None
    peak_mib: float | None
    cached: bool | None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All rows of a run. `size_reason`: why its images have their height and width. `others`: cores' worth of CPU time that other processes
    used meanwhile. `notes`: reasons to doubt the times."""

    rows: tuple[BenchRow, ...]
    size_reason: str
    others: float | None
    notes: tuple[str, ...]
    created: str
    hardware: dict[str, Any]


def bench(
    candidates: Sequence[Candidate],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
    streams: Sequence[int] = (1,),
    size: tuple[int, int] | None = None,
    rounds: int = ROUNDS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measures candidates (`ArtifactCandidate(path=...)`) in turns. The first one is the base of the ratios.

    `batches`, `threads`, `streams`: every combination is a row (None threads: the usable physical cores; streams are limited to the number
    of threads, with a note). `rounds`: timed calls a row. The images are the golden ones of the first artefact (of a run's training split
    where there is no artefact), mirrored up to the size. `size`: height and width in pixels, by default of that example; of others than
    the first artefact takes, the nearest one. `report` is called with (steps done, number of steps).

    Raises the errors of `load`, and DataError for a value out of range, for images larger than memory and for candidates that take images
    of different channels.
    """
    _check(candidates, batches, threads, streams, size, rounds)
    combinations = [SessionOptions(threads=n, streams=s) for n in threads for s in streams]
    named = dict(zip(distinct_names([candidate.path for candidate in candidates]), candidates, strict=True))
    # An artefact holds its images; a run needs its data, which may be gone.
    owner = next((name for name, candidate in named.items() if isinstance(candidate, ArtifactCandidate)), next(iter(named)))
    example = named[owner].example()
    measured = example.size if size is None else example.signature.sizes.at_least(*size)
    reason = example.reason if size is None else "as given" if measured == size else f"nearest to {size[0]}x{size[1]} that it takes"
    shapes = tuple((batch, *measured) for batch in batches)
    settings = _settings(combinations, shapes)
    with enough_memory(example.signature, max(shapes, key=prod)):
        loadings: list[dict[str, Loading]] = []
        for done, setting in enumerate(settings):
            report(done, 2 * len(settings))
            loadings.append({name: measure_loading(candidate, setting) for name, candidate in named.items()})
            for name, channels in ((name, loading.channels) for name, loading in loadings[-1].items()):
                if channels != example.signature.channels:
                    expected = f"{owner} of {example.signature.channels}: compare what takes the same images"
                    raise DataError(f"{name} takes images of {channels} channels, {expected}")
        images = [fill(example.images, shape) for shape in shapes]
        rows: list[BenchRow] = []
        with watch_cpu() as watch:  # begins after the processes that loaded, which would count as others
            for done, (setting, loaded) in enumerate(zip(settings, loadings, strict=True), len(settings)):
                report(done, 2 * len(settings))
                rows += _measure(images, named, loaded, setting, rounds)
    report(2 * len(settings), 2 * len(settings))
    pairs = dict.fromkeys((options.thread_count, options.streams) for options in combinations)
    notes = notes_on(watch.others, threads=max(n for n, _ in pairs))
    notes += [f"{s} streams on {count(n, 'thread')}: a stream needs a thread, so they count as {n}" for n, s in pairs if s > n]
    if len(named) == 1:
        rows = [replace(row, ratio=None) for row in rows]
    elif any(row.ratio is None for row in rows):
        notes.append("a call has the threads of its stream, so latencies of different streams are not compared: compare images/s")
    return Bench(
        rows=tuple(rows),
        size_reason=f"{reason} of {owner}" if len(named) > 1 and size is None else reason,
        others=watch.others,
        notes=tuple(notes),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=describe_hardware(),
    )


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part; the path where another ends alike. A path that is given again has a number."""
    last = {path: Path(path).name or path for path in paths}
    names = [last[path] if list(last.values()).count(last[path]) == 1 else path for path in paths]
    return [name if name not in names[:index] else f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names)]


def _settings(combinations: Sequence[SessionOptions], shapes: tuple[Shape, ...]) -> list[SessionOptions]:
    """Each different combination once, with at most as many streams as threads."""
    limited = (
        replace(options, threads=options.thread_count, streams=min(options.streams, options.thread_count), shapes=shapes)
        for options in combinations
    )
    return list(dict.fromkeys(limited))


def _measure(
    images: Sequence[NDArray[np.uint8]],
    candidates: Mapping[str, Candidate],
    loading: Mapping[str, Loading],
    options: SessionOptions,
    rounds: int,
) -> list[BenchRow]:
    """One row for each candidate and batch; the first candidate is the base of the ratios."""
    sessions: dict[str, Mapper] = {name: candidate.open(options) for name, candidate in candidates.items()}
    first, rows = next(iter(sessions)), []
    for shape, images_BHWC in zip(options.shapes or (), images, strict=True):
        latencies = interleaved_latency(sessions, images_BHWC, rounds=rounds)
        rates = interleaved_throughput(sessions, images_BHWC, rounds=max(1, rounds // 10))
        for name, session in sessions.items():
            described: Any = {key: getattr(session, key) for key in ("engine", "precision")}
            described |= {key: getattr(loading[name], key) for key in ("load_s", "held_mib", "peak_mib", "cached")}
            comparable = session.streams == sessions[first].streams
            rows.append(
                BenchRow(
                    name=name,
                    integers=candidates[name].integers,
                    threads=options.thread_count,
                    streams=session.streams,
                    shape=shape,
                    latency=latencies[name],
                    images_per_s=rates[name],
                    ratio=latencies[first].median_ms / latencies[name].median_ms if comparable else None,
                    **described,
                )
            )
    return rows


def _check(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    threads: Sequence[int | None],
    streams: Sequence[int],
    size: tuple[int, int] | None,
    rounds: int,
) -> None:
    if not candidates:
        raise DataError("nothing to measure: give at least one artefact or run")
    for name, values in (("batches", batches), ("threads", threads), ("streams", streams)):
        if not values:
            raise DataError(f"{name}={values!r}: give at least one number")
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise DataError(f"batch={batch!r}: give a whole number of images from 1")
    if size is not None:
        check_shape((1, *size))
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 10_000:
        raise DataError(f"rounds={rounds!r}: give a whole number from 1 to 10000")
