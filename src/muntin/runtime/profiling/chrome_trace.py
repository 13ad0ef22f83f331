"""A profile in the Trace Event Format, for chrome://tracing and https://ui.perfetto.dev.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, complete events ("X"), times in microseconds.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

from muntin.runtime.profiling.kernels import Kernel
from muntin.runtime.profiling.profile import Profile
from muntin.text import count, plain

WHOLE, KERNELS = 0, 1
"""The two rows of the trace."""
_STAMPED = "median starts, as the engine stamps them"
_UNSTAMPED = "the engine gives no time stamps: kernels are laid end to end in the order of execution"


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """One inference as a trace: a row for the whole and one for its kernels, each with its work and share of the ceiling.

    Kernels begin at the engine's time stamps. Without these (OpenVINO) they are laid end to end in the order of execution, which the
    metadata state.
    """
    stamped = all(kernel.start_ms is not None for kernel in profile.kernels)
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            _named("process_name", WHOLE, f"{profile.engine}, {count(profile.threads, 'thread')}, {profile.precision}"),
            _named("thread_name", WHOLE, "inference"),
            _named("thread_name", KERNELS, "kernels"),
            _complete("inference", "whole", WHOLE, 0.0, profile.profiled_ms, {"whole_ms without counters": profile.whole_ms}),
            *(
                _complete(kernel.label, kernel.words, KERNELS, start, kernel.ms, _arguments(kernel, profile))
                for kernel, start in _starts(profile.kernels, stamped)
            ),
        ],
        "otherData": {
            "muntin": importlib.metadata.version("muntin"),
            "artifact": plain(str(profile.artifact.path)),
            "shape": profile.size,
            "created": profile.created,
            "times": f"median durations; {_STAMPED if stamped else _UNSTAMPED}",
        },
    }


def _starts(kernels: Iterable[Kernel], stamped: bool) -> Iterator[tuple[Kernel, float]]:
    """Every kernel and its start, in ms."""
    end = 0.0
    for kernel in kernels:
        yield kernel, kernel.start_ms if stamped and kernel.start_ms is not None else end
        end += kernel.ms


def _complete(name: str, category: str, row: int, start_ms: float, ms: float, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "cat": category, "ph": "X", "ts": start_ms * 1e3, "dur": ms * 1e3, "pid": 1, "tid": row, "args": arguments}


def _named(what: str, row: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}


def _arguments(kernel: Kernel, profile: Profile) -> dict[str, Any]:
    return {
        "kernel": kernel.name,
        "kind": kernel.kind,
        "implementation": kernel.implementation,
        "precision": kernel.precision,
        "macs": kernel.macs,
        "bytes": kernel.bytes,
        "ceiling_share": kernel.ceiling_share(profile.ceilings),
    }
