"""From a path to a version that is open: verified, compiled, and opened in a process of its own (`worker.remote_session`).

A version is compiled for the same calls whenever it is loaded, so its answers do not depend on earlier requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from muntin.artifact.manifest import Manifest
from muntin.artifact.store import read_manifest
from muntin.errors import VerificationError
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.serving.worker.calls import starting_calls
from muntin.serving.worker.opening import REPLACED, Opened, open_version
from muntin.serving.worker.remote_session import can_open_remote, open_remote
from muntin.text import plain

UPDATE, LINE = "update", 240
"""Key of an update's lineage among the measured values of a manifest, and the characters of it that are shown."""
OPENING_S = 300.0
"""Seconds that opening a version may take."""


@dataclass(frozen=True, kw_only=True)
class ArtifactLoader:
    """Opens artefacts for a slot, compiled for batches of up to `max_batch` rows of the exported size, and of `sizes` (height, width) of
    images or `dims` of named tensors."""

    options: SessionOptions = DEFAULT_OPTIONS
    max_batch: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    dims: tuple[Mapping[str, int], ...] = ()

    def open(
        self,
        path: Path,
        *,
        digest: str = "",
        busy: Callable[[], bool] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[str], None] = lambda step: None,
    ) -> Opened:
        """Verify and open an artefact, the very one whose manifest says for which calls. `digest`: that it must have; empty: any.

        `busy`: as of `start_engine`; it has no effect where an engine has no process of its own. `stopped`: asked now and then; once it
        returns True, this may raise NotReadyError. `progress`: called with the name of each step. Raises the errors of `open_version` and
        `start_engine`.
        """
        manifest = read_manifest(path)
        if digest and manifest.sha256 != digest:
            raise VerificationError(f"{path}: {REPLACED}")
        calls = starting_calls(manifest, self.max_batch, self.sizes, self.dims)
        if can_open_remote():
            opened = open_remote(
                path, self.options, calls, digest=manifest.sha256, seconds=OPENING_S, busy=busy, stopped=stopped, progress=progress
            )
        else:
            opened = open_version(path, self.options, calls, digest=manifest.sha256, verify=True, progress=progress)
        return replace(opened, lineage=lineage_of(manifest))


def lineage_of(manifest: Manifest) -> str:
    """The line on its origin in the manifest of an updated artefact, at most `LINE` characters; "" for others."""
    update = manifest.measured.get(UPDATE)
    summary = update.get("summary") if isinstance(update, dict) else None
    return plain(" ".join(summary.split())[:LINE]) if isinstance(summary, str) else ""
