"""A bound on the memory of this process, which the system checks before each allocation: beyond it, allocations fail with an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muntin.errors import DependencyError, RecipeError
from muntin.runtime.host.memory import resident

_STATUS = Path("/proc/self/status")


@contextmanager
def memory_bound(limit: int | None) -> Iterator[None]:
    """Let allocations fail that would take this process beyond `limit` resident bytes; None: no bound. Linux only.

    The bound is on the data that can be allocated from now on (RLIMIT_DATA), so memory that is mapped and not yet used counts only if it is
    allocated inside the block. Raises `RecipeError` for a limit below what the process holds already.
    """
    if limit is None:
        yield
        return
    held, data = resident()[0], _data()
    if held is None or data is None:
        raise DependencyError(f"training.memory {limit:,} bytes: this system does not tell a process's memory (Linux does): leave it out")
    if limit <= held:
        raise RecipeError(f"training.memory {limit:,} bytes: the process holds {held:,} before the first step: give more")
    import resource  # Windows has none

    before = resource.getrlimit(resource.RLIMIT_DATA)
    bound = data + limit - held
    resource.setrlimit(resource.RLIMIT_DATA, (bound if before[1] == resource.RLIM_INFINITY else min(bound, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data() -> int | None:
    """Bytes of data that this process has mapped; None where unknown."""
    try:
        match = re.search(r"^VmData:\s*(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) << 10 if match else None
