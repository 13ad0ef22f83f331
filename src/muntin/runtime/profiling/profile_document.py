"""A profile as plain values: the content of `profile.json`, from which the page is made."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from muntin.runtime.profiling.diagnosis import findings
from muntin.runtime.profiling.kernels import BETWEEN, INTERRUPTIONS, Kernel
from muntin.runtime.profiling.profile import Profile
from muntin.text import plain

FORMAT = 1
INTERRUPTED = 0.01
"""Share of the time from which on interruptions are a row; less is the error of adding medians."""


def profile_dict(profile: Profile) -> dict[str, Any]:
    """The profile, its kinds and findings as JSON values. Times in ms, shares of the profiled time, ceilings in 1e9 a second."""
    return {
        "format": FORMAT,
        "title": f"{plain(profile.artifact.path.absolute().name)}: {profile.size}",
        "created": profile.created,
        "muntin": importlib.metadata.version("muntin"),
        "hardware": profile.hardware,
        "artifact": {"path": plain(str(profile.artifact.path)), "bytes": profile.bytes, "sha256": profile.artifact.digest},
        "engine": profile.engine,
        "precision": profile.precision,
        "threads": profile.threads,
        "shape": None if profile.shape is None else list(profile.shape),
        "dims": None if profile.dims is None else dict(profile.dims),
        "rounds": profile.rounds,
        "whole_ms": profile.whole_ms,
        "profiled_ms": profile.profiled_ms,
        "kernels_ms": profile.kernels_ms,
        "others": profile.others,
        "ceilings": {"gmacs": dict(profile.ceilings.gmacs), "copy_gb_s": profile.ceilings.copy_gb_s},
        "kernels": [kernel_dict(kernel, profile) for kernel in profile.kernels],
        "kinds": kinds(profile),
        "findings": [{"kind": finding.kind, "words": finding.words, "saves_ms": finding.saves_ms} for finding in findings(profile)],
        "notes": list(profile.notes),
    }


def kernel_dict(kernel: Kernel, profile: Profile) -> dict[str, Any]:
    """One kernel: `kind` in words; `implementation`: the engine's names of the operation and of its code."""
    return {
        "name": kernel.name,
        "kind": kernel.words,
        "implementation": f"{kernel.kind}, {kernel.implementation}",
        "precision": kernel.precision,
        "compute": kernel.compute,
        "layer": kernel.layer,
        "ms": kernel.ms,
        "share": kernel.ms / profile.profiled_ms,
        "macs": kernel.macs,
        "bytes": kernel.bytes,
        "attainable_ms": kernel.attainable_ms(profile.ceilings),
        "ceiling_share": kernel.ceiling_share(profile.ceilings),
    }


def kinds(profile: Profile) -> list[dict[str, Any]]:
    """Kernels by kind, longest first, with rows for the remaining profiled time: between the kernels of every inference, and interruptions
    of some. The rows sum to the profiled time, unless the kernels' medians sum to more."""
    sums: dict[str, list[float]] = {}
    for kernel in profile.kernels:
        sums.setdefault(kernel.words, []).append(kernel.ms)
    rows = [_kind(kind, times, profile) for kind, times in sums.items()]
    rest = max(0.0, profile.profiled_ms - profile.kernels_ms)
    between = min(rest, max(0.0, profile.between_ms)) if rest - profile.between_ms > INTERRUPTED * profile.profiled_ms else rest
    rows.append(_kind(BETWEEN, [between], profile) | {"count": 0})
    if rest > between:
        rows.append(_kind(INTERRUPTIONS, [rest - between], profile) | {"count": 0})
    return sorted(rows, key=lambda row: -row["ms"])


def _kind(kind: str, times: Iterable[float], profile: Profile) -> dict[str, Any]:
    times = list(times)
    return {"kind": kind, "ms": sum(times), "share": sum(times) / profile.profiled_ms, "count": len(times)}
