"""A child that is killed, and signals that reach it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from muntin.runtime.host import supervised_process
from muntin.runtime.host.supervised_process import ProcessEnd, run_muntin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.mark.parametrize(("kills", "for_memory"), [((4, 5), True), ((4, 4), False), ((None, None), False)])
def test_sigkill(kills: tuple[int | None, int | None], for_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(kills)
    monkeypatch.setattr(supervised_process, "kills_for_memory", lambda: next(counter))
    monkeypatch.setattr(supervised_process, "_START", "import os; os.kill(os.getpid(), 9)")
    assert run_muntin(()) == ProcessEnd(code=-9, signal="SIGKILL", for_memory=for_memory)


def test_exit_code_of_the_command_line() -> None:
    assert run_muntin(["--version"]) == ProcessEnd(code=0, signal=None, for_memory=False)
    assert run_muntin(["fit"]).code == 2


def test_signals_are_passed_on_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "signals"
    script = (
        "import signal, sys, time, pathlib\n"
        f"log = pathlib.Path({str(log)!r})\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append('int'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "log.write_text('ready')\n"
        "while True:\n    time.sleep(0.02)\n    log.write_text(' '.join(seen) or 'ready')\n"
    )
    monkeypatch.setattr(supervised_process, "_START", script.replace("{", "{{").replace("}", "}}"))

    def send() -> None:
        for number, awaited in ((signal.SIGINT, "ready"), (signal.SIGTERM, "int")):
            deadline = time.monotonic() + 30
            while not log.is_file() or log.read_text() != awaited:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    assert run_muntin(()) == ProcessEnd(code=3, signal=None, for_memory=False)
    sender.join()
    assert signal.getsignal(signal.SIGTERM) is before
