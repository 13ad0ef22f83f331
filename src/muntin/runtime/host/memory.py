"""Resident memory of a block of work, at its end and at its peak; and errors for lack of memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_NO_MEMORY = (
    "bad_alloc",
    "out of memory",
    "failed to allocate",
    "cannot allocate",
    "can't allocate",
    "not enough memory",
    "resource temporarily unavailable",
)
"""The last one: a thread's stack was refused."""
_KILLS = Path("/proc/vmstat")
_RESET_PEAK = "5"  # proc(5), clear_refs: sets the peak to the present size


class MemoryWatch:
    """Bytes that a block added to this process. `held`: resident at its end; `peak`: the maximum. None where unknown."""

    def __init__(self) -> None:
        self.held: int | None = None
        self.peak: int | None = None


@contextmanager
def watch_memory() -> Iterator[MemoryWatch]:
    """Measures around a block: `with watch_memory() as watch: ...`, then `watch.peak`. Linux only; elsewhere both stay None.

    Reused memory that was freed before is not counted, so the figures are low in a process that has done other work.
    """
    watch = MemoryWatch()
    with suppress(OSError):  # a sandbox may not allow it: an old peak is left out below
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before, peak = resident()
    yield watch
    after, highest = resident()
    if before is not None and after is not None:
        watch.held = max(0, after - before)
        if peak is not None and highest is not None and peak - before < 16 << 20:
            watch.peak = max(0, highest - before)


def resident() -> tuple[int | None, int | None]:
    """Resident bytes of this process now, and at its peak; None where unknown."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None, None
    now, peak = (re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    return (int(now[1]) << 10 if now else None), (int(peak[1]) << 10 if peak else None)


def resident_of(process: int) -> int | None:
    """Resident bytes of another process, shared ones included; None where it has ended, or unknown."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def kills_for_memory() -> int | None:
    """Number of processes that the kernel has killed since boot for lack of memory, the machine's or a control group's. None where unknown
    (Linux before 4.13, other systems)."""
    try:
        match = re.search(r"^oom_kill (\d+)$", _KILLS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def no_memory(error: BaseException) -> bool:
    """Returns True for an error for lack of memory. OpenVINO, ONNX Runtime and PyTorch tell it in their messages only."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)
