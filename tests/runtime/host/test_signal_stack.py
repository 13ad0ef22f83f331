from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from muntin.runtime import load

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="alternate signal stacks are read in Linux's form")


def test_signal_stack_after_models_are_deleted(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Any, signal_stack: Callable[[], Any]
) -> None:
    """The first model that goes used to leave the second's stack to be put back after it was freed: Ctrl-C then crashed."""
    write_layers(tmp_path / "a", [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)])
    before, heard = signal_stack(), []
    first, second = load(tmp_path / "a"), load(tmp_path / "a")
    assert signal_stack() == before
    del first
    gc.collect()
    del second
    gc.collect()
    assert signal_stack() == before
    previous = signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(heard) == 1
