"""Latency of several sessions in one run: interleaved, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.runtime.tiles import Predictor


def interleaved_latency(sessions: Mapping[str, Predictor], image_HWC: NDArray[np.uint8], *, rounds: int) -> dict[str, dict[str, float]]:
    """Median and 90th percentile, in ms, of one call on one image, for each session.

    Each of `rounds` rounds calls every session twice and times the second call: the first brings its weights back into the caches
    that the others filled, as in a process that runs one model. Raises `ValueError` for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: a median needs at least 1")
    images = np.ascontiguousarray(image_HWC[None])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session(images)
    for _ in range(rounds):
        for name, session in sessions.items():
            session(images)
            started = time.perf_counter()
            session(images)
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: {"median_ms": float(np.median(v)), "p90_ms": float(np.percentile(v, 90))} for name, v in times.items()}


def latency_report(rows: Mapping[str, tuple[str, Predictor]], image_HWC: NDArray[np.uint8], *, rounds: int) -> dict[str, Any]:
    """The `latency` part of a report: `rows` maps a name to its engine's description and its session; the first is the baseline."""
    measured = interleaved_latency({name: session for name, (_, session) in rows.items()}, image_HWC, rounds=rounds)
    return {
        "height": image_HWC.shape[0],
        "width": image_HWC.shape[1],
        "rounds": rounds,
        "rows": [{"name": name, "engine": engine, **measured[name]} for name, (engine, _) in rows.items()],
    }
