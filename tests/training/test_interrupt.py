from __future__ import annotations

import os
import signal
import threading

import pytest

from muntin.training.interrupt import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_by_signal(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
    with pytest.raises(ZeroDivisionError), Interruption():
        assert signal.getsignal(number) is not before
        raise ZeroDivisionError
    assert signal.getsignal(number) is before


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
