"""From a path to a version that is open: tried in a process that ends (`trial`), then opened in one that serves (`remote_session`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from muntin.artifact.store import read_manifest
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.serving.versions.trial import OPENING_S, TrialResult, probe
from muntin.serving.worker.opening import Call, Opened, open_version, starting_calls
from muntin.serving.worker.remote_session import can_open_remote, open_remote

REST = 3.0
"""Rest after each step of opening while requests are answered, in multiples of the step's time. Compiling and warming up without a rest
would delay requests for as long as all of it takes."""
OFTEN = 4
"""Batches of a size after which the next version is compiled for it, where other sizes need no compiling."""


@dataclass(frozen=True, kw_only=True)
class ArtifactLoader:
    """Opens artefacts for a slot: `probe` in a process that can do no harm, then `open` in the one that serves.

    `lately`: number of batches of each call of the current version. `stopped`: asked now and then; once it returns True, both may raise
    NotReadyError. `tried`: the result of `probe`.

    Each is compiled for batches of up to `max_batch` images of the size that it was exported with, and for the calls in `lately`; with
    `options.dynamic`, only for those with `OFTEN` batches. `budget`: pixels (rows x height x width) for a model of so many channels that
    calls in `lately` may have together, beside those of the start; the most frequent ones go first.
    """

    options: SessionOptions = DEFAULT_OPTIONS
    max_batch: int = 0
    budget: Callable[[int], float] = lambda channels: inf

    def probe(self, path: Path, lately: Mapping[Call, int], stopped: Callable[[], bool]) -> TrialResult:
        return probe(path, self.options, self._calls(path, self._start(path), lately), stopped=stopped)

    def open(self, path: Path, lately: Mapping[Call, int], tried: TrialResult, stopped: Callable[[], bool] = lambda: False) -> Opened:
        start = self._start(path)
        rest, calls = REST if lately else 0.0, self._calls(path, start, lately)
        if can_open_remote():
            opened = open_remote(path, self.options, calls, rest=rest, seconds=OPENING_S, stopped=stopped, digest=tried.digest)
        else:
            opened = open_version(path, self.options, calls, rest=rest, digest=tried.digest)
        return replace(opened, start=start)

    def _start(self, path: Path) -> tuple[Call, ...]:
        """Calls that every version is compiled for. Reads only the manifest."""
        return starting_calls(read_manifest(path), self.max_batch)

    def _calls(self, path: Path, start: tuple[Call, ...], lately: Mapping[Call, int]) -> tuple[Call, ...]:
        requested = {call: count for call, count in lately.items() if count >= OFTEN or not self.options.dynamic}
        kept = set(start)
        if requested.keys() - kept:
            left = self.budget(read_manifest(path).signature.channels)
            for call in sorted(requested.keys() - kept, key=lambda call: (-requested[call], call.pixels)):
                if call.pixels <= left:
                    left -= call.pixels
                    kept.add(call)
        return (*start, *(call for call in requested if call in kept and call not in start))
