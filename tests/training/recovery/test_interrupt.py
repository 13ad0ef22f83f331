from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from io import StringIO

import pytest

from muntin.training.recovery.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_by_signal(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before, threads = signal.getsignal(number), threading.active_count()
    with Interruption() as interruption:
        assert not interruption.requested
        interruption.work = "this step"
        os.kill(os.getpid(), number)
        assert interruption.requested
    assert capsys.readouterr().err == "muntin: stops after this step, with a checkpoint; Ctrl-C again ends at once\n"
    assert (threading.active_count(), signal.set_wakeup_fd(-1)) == (threads, -1)
    with pytest.raises(ZeroDivisionError), Interruption():
        assert signal.getsignal(number) is not before
        raise ZeroDivisionError
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
def test_answer_during_a_call_into_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a backward pass: this one ends by the line itself, and Python has run no signal handler by then."""
    receiver, sender = os.pipe()
    read, byte = ctypes.CDLL(None).read, ctypes.create_string_buffer(1)
    begun, interval, requested = threading.Event(), sys.getswitchinterval(), []

    class Errors(StringIO):
        def write(self, text: str) -> int:
            requested.append(interruption.requested)
            os.write(sender, b".")
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Errors())
    with Interruption() as interruption:
        # To a thread of its own, because a signal that the main thread receives would end the call.
        thread = threading.Thread(target=lambda: begun.wait() and signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        thread.start()
        sys.setswitchinterval(60)  # the thread runs only when the main thread is in the call, and not before
        try:
            begun.set()
            read(receiver, byte, 1)
        finally:
            sys.setswitchinterval(interval)
        thread.join()
    assert requested[0] is False and interruption.requested
    os.close(receiver)
    os.close(sender)


def test_second_signal() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have switched Ctrl-C off
    try:
        with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.requested
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_interruption_in_another_thread() -> None:
    """Handlers can be set only in the main thread; `fit` works in others without them."""
    before, during = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interruption() as interruption:
            during.append((interruption.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [(False, before)]
