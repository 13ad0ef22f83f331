"""A child process that the kernel may kill for lack of memory (SIGKILL, which no process can catch), and its end as the parent sees it.

The child has the parent's standard streams. It is in a process group of its own, and the parent passes on signals: Ctrl-C, SIGTERM, SIGHUP
and Ctrl-Z reach it once, whether the terminal or another process sends them. If the parent dies, the child gets SIGTERM. Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from muntin.runtime.host.memory import kills_for_memory

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_START = (
    f"import ctypes, sys; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}); sys.path[:] = {{path!r}}; "
    "from muntin.cli import main; main()"
)


@dataclass(frozen=True, kw_only=True)
class ProcessEnd:
    """How a process ended. `code`: its exit code; `signal`: the name of the signal that ended it, or None.

    `for_memory`: it was SIGKILL, and the kernel has killed a process for lack of memory in this time.
    """

    code: int
    signal: str | None
    for_memory: bool


def run_muntin(words: Sequence[str]) -> ProcessEnd:
    """Run the command line with these words in a child process, and wait for its end."""
    before = kills_for_memory()
    command = [sys.executable, "-c", _START.format(path=sys.path), *words]
    with subprocess.Popen(command, process_group=0) as child:  # noqa: S603 - this Python, and our own command

        def pass_on(number: int, frame: FrameType | None) -> None:
            child.send_signal(number)

        def pause(number: int, frame: FrameType | None) -> None:
            child.send_signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)  # returns when this process is continued
            child.send_signal(signal.SIGCONT)

        handlers = dict.fromkeys(PASSED_ON, pass_on) | {signal.SIGTSTP: pause}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    after = kills_for_memory()
    rose = before is not None and after is not None and after > before
    return ProcessEnd(code=code, signal=signal.Signals(-code).name if code < 0 else None, for_memory=code == -signal.SIGKILL and rose)
