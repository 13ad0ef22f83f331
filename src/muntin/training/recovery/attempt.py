"""The marker of a run in progress, in its folder: what is left of an attempt that was killed (SIGKILL), which cannot write anything.

It holds how the run used memory, and how many processes the kernel had killed for lack of memory when it began. An attempt that finds the
marker of an earlier one, and a larger number, takes less memory: after a restart by `muntin fit`, by torchrun, or by hand.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from muntin.artifact.atomic_files import write_files
from muntin.runtime.host.memory import kills_for_memory
from muntin.training.recovery.out_of_memory import MemoryUse

MARKER = "attempt.json"


class AttemptMarker(BaseModel):
    """Content of the marker. `kills`: processes that the kernel had killed for lack of memory since boot; None where unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: MemoryUse
    kills: int | None


class Attempt:
    """The marker in a run's folder. As a context, removes it at the end, also after an error.

    `earlier`: of an attempt that was killed, or None. `writes`: True in the one process of a run that writes it.
    """

    def __init__(self, directory: Path, *, writes: bool = True) -> None:
        self.directory, self.writes = directory, writes
        self.kills = kills_for_memory()
        self.earlier: AttemptMarker | None = None
        self._written: MemoryUse | None = None
        with suppress(OSError, ValidationError):  # none, or of another version
            self.earlier = AttemptMarker.model_validate_json((directory / MARKER).read_bytes())

    @property
    def lacked_memory(self) -> bool:
        """True if the kernel has killed a process for lack of memory since the earlier attempt began: probably that one."""
        before = None if self.earlier is None else self.earlier.kills
        return before is not None and self.kills is not None and self.kills > before

    def note(self, memory: MemoryUse) -> None:
        """Write the marker if the use of memory is another than before. Raises OSError."""
        if self.writes and memory != self._written:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_files(self.directory, {MARKER: AttemptMarker(memory=memory, kills=self.kills).model_dump_json().encode()})
            self._written = memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writes:
            (self.directory / MARKER).unlink(missing_ok=True)
