"""How much memory a block of work takes, as the system counts it: resident pages of this process, at the end and at the peak.

And whether it failed for want of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_NO_MEMORY = ("bad_alloc", "out of memory", "failed to allocate", "cannot allocate", "can't allocate", "not enough memory")
_KILLS = Path("/proc/vmstat")
_RESET_PEAK = "5"  # proc(5), clear_refs: sets the peak to what is resident now


class MemoryWatch:
    """What a block added to this process, in bytes. `held`: still resident at its end; `peak`: at the most. None where not known."""

    def __init__(self) -> None:
        self.held: int | None = None
        self.peak: int | None = None


@contextmanager
def watch_memory() -> Iterator[MemoryWatch]:
    """Measures around a block: `with watch_memory() as watch: ...`, then `watch.peak`. Linux only; elsewhere both stay None.

    Memory that was freed before and is used again is not seen, so in a process that has done much else the figures are low.
    """
    watch = MemoryWatch()
    with suppress(OSError):  # a sandbox may not let the peak be reset: then it is left out below, since it is of long ago
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before, peak = resident()
    yield watch
    after, highest = resident()
    if before is not None and after is not None:
        watch.held = max(0, after - before)
        if peak is not None and highest is not None and peak - before < 16 << 20:
            watch.peak = max(0, highest - before)


def resident() -> tuple[int | None, int | None]:
    """Resident bytes of this process now, and at its peak; None where the system does not say."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None, None
    now, peak = (re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    return (int(now[1]) << 10 if now else None), (int(peak[1]) << 10 if peak else None)


def resident_of(process: int) -> int | None:
    """Resident bytes of another process, shared ones among them; None where it has ended, or the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def kills_for_memory() -> int | None:
    """How many processes the kernel has ended since the machine began, for want of memory: its own or a control group's. None where it does
    not say (Linux before 4.13, other systems)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", _KILLS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def no_memory(error: BaseException) -> bool:
    """Whether something failed for want of memory. OpenVINO, ONNX Runtime and PyTorch say it in words alone."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)
