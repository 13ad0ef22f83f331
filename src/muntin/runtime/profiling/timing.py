"""Latency and throughput of several sessions in one run, interleaved: if the machine's speed drifts, it drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from muntin.runtime.tiles import Predictor

BATCHES = 8
"""Batches of a throughput measurement, for each stream of the session."""


class Mapper(Protocol):
    """A session, of an engine or a live model, that can keep several batches in flight. Batches are images or named inputs."""

    @property
    def streams(self) -> int: ...

    def __call__(self, batch: Any, /) -> Any: ...

    def map(self, batches: Iterable[Any], /) -> Iterator[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latency of one call, in ms, over `calls` calls."""

    median_ms: float
    p90_ms: float
    p99_ms: float
    calls: int


def interleaved_latency(sessions: Mapping[str, Callable[[Any], object]], batch: Any, *, rounds: int) -> dict[str, Latency]:
    """Measures one call on a batch, images or named inputs, for each session.

    Each round calls every session twice and times the second call: the first brings its weights back into the caches that the other
    sessions filled, as in a process that runs one model. Raises `ValueError` for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: a median needs at least 1")
    batch = _contiguous(batch)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session(batch)
    for _ in range(rounds):
        for name, session in sessions.items():
            session(batch)
            started = time.perf_counter()
            session(batch)
            times[name].append((time.perf_counter() - started) * 1e3)
    latencies = {}
    for name, milliseconds in times.items():
        median, p90, p99 = (float(np.percentile(milliseconds, q)) for q in (50, 90, 99))
        latencies[name] = Latency(median_ms=median, p90_ms=p90, p99_ms=p99, calls=rounds)
    return latencies


def interleaved_throughput(sessions: Mapping[str, Mapper], batch: Any, *, rounds: int, rows: int | None = None) -> dict[str, float]:
    """Images (or rows) a second with every stream busy: the median of `rounds` rounds, in which the sessions map some batches in turn.

    `rows`: those of the batch; None: its length. Raises `ValueError` for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: a median needs at least 1")
    batch = _contiguous(batch)
    rows = len(batch) if rows is None else rows
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(rounds + 1):  # the first does not count
        for name, session in sessions.items():
            batches = [batch] * (BATCHES * session.streams)
            started = time.perf_counter()
            for _ in session.map(batches):
                pass
            if round_:
                rates[name].append(len(batches) * rows / (time.perf_counter() - started))
    return {name: float(np.median(values)) for name, values in rates.items()}


def _contiguous(batch: Any) -> Any:
    return batch if isinstance(batch, Mapping) else np.ascontiguousarray(batch)


def latency_report(rows: Mapping[str, tuple[str, Predictor]], image_HWC: NDArray[np.uint8], *, rounds: int) -> dict[str, Any]:
    """The `latency` part of a report. `rows`: name -> description of the engine, session; the first is the baseline."""
    measured = interleaved_latency({name: session for name, (_, session) in rows.items()}, image_HWC[None], rounds=rounds)
    return {
        "height": image_HWC.shape[0],
        "width": image_HWC.shape[1],
        "rounds": rounds,
        "rows": [
            {"name": name, "engine": engine, "median_ms": measured[name].median_ms, "p90_ms": measured[name].p90_ms}
            for name, (engine, _) in rows.items()
        ],
    }
