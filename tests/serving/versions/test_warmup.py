"""Compiling while requests go on: when, how often, and that the compiled model is used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.runtime.options import SessionOptions
from muntin.serving.versions import warmup as module
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import Version
from muntin.serving.versions.warmup import COMPILED, OFTEN, Compiler
from muntin.serving.worker.opening import Call

OPTIONS = SessionOptions(threads=1, dynamic=True)


@pytest.fixture
def version(write_version: Callable[..., Path], in_process: ArtifactLoader, tmp_path: Path) -> Version:
    loader = type(in_process)(options=OPTIONS)
    return Slot("m", loader, rollout=Rollout()).load(write_version(tmp_path / "1"), "1")


def test_frequent_size_is_compiled(version: Version, wait_until: Callable[..., None]) -> None:
    call, compiler = Call((3, 11, 7), labels=True), Compiler(OPTIONS)
    session: Any = version.session
    note(compiler, version, call, times=OFTEN - 1)
    assert compiler._threads.pending == 0
    note(compiler, version, call, times=1)
    wait_until(lambda: ((3, 11, 7, 3), True) in session._compiled, 60)
    assert session._compiled[(3, 11, 7, 3), True].kept  # the other process had compiled it
    compiler.close()


def note(compiler: Compiler, version: Version, *calls: Call, times: int = OFTEN) -> None:
    for call in calls:
        for _ in range(times):
            version.latencies.add(call, 0.01)
            compiler.note(version, call)


@pytest.fixture
def compiled(version: Version, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Calls that were compiled for, which takes no time here."""
    calls: list[Call] = []
    monkeypatch.setattr(module, "probe", lambda path, options, lately, **_: calls.extend(lately))
    monkeypatch.setattr(version.session, "warm_up", lambda shapes, *, labels: None)
    return calls


def test_close_does_not_wait_for_an_engine_that_hangs(version: Version, compiled: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    entered, let_go = threading.Event(), threading.Event()

    def hang(shapes: object, *, labels: bool) -> None:
        entered.set()
        assert let_go.wait(60)

    monkeypatch.setattr(module, "END_S", 0.01)
    monkeypatch.setattr(version.session, "warm_up", hang)
    compiler = Compiler(OPTIONS)
    note(compiler, version, Call((1, 9, 5)))
    assert entered.wait(60)
    compiler.close()
    let_go.set()


def test_number_of_sizes_is_bounded(version: Version, compiled: list[Call], wait_until: Callable[..., None]) -> None:
    version.start = version.warm
    compiler = Compiler(OPTIONS)
    calls = [Call((1, 1 + n, 3)) for n in range(COMPILED + 20)]
    note(compiler, version, *calls, times=3 * OFTEN)
    wait_until(lambda: len(compiled) == COMPILED)
    compiler.close()
    assert compiled == calls[:COMPILED]


def test_artefact_loaded_again_is_compiled_again(
    version: Version, compiled: list[Call], in_process: ArtifactLoader, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Slot("m", type(in_process)(options=OPTIONS), rollout=Rollout()).load(version.path, "1")
    monkeypatch.setattr(again.session, "warm_up", lambda shapes, *, labels: None)
    assert again.digest == version.digest
    compiler, call = Compiler(OPTIONS), Call((1, 20, 20))
    for loaded in (version, again):
        note(compiler, loaded, call)
    wait_until(lambda: compiled == [call, call])
    compiler.close()


def test_pixels_of_sizes_are_bounded(version: Version, compiled: list[Call], wait_until: Callable[..., None]) -> None:
    """Sizes that the version was warmed up for beside the start count, too; smaller sizes that fit are still compiled for."""
    before, start = Call((1, 10, 10)), Call((8, 100, 100))
    version.warm, version.start = frozenset({before, start}), frozenset({start})
    compiler = Compiler(OPTIONS, budget=lambda channels: 3000 / channels)
    first, second, third, last = Call((2, 10, 30)), Call((1, 20, 20)), Call((3, 10, 10), labels=True), Call((1, 1, 1))
    note(compiler, version, first, second, third, last, times=2 * OFTEN)
    wait_until(lambda: len(compiled) == 2)
    compiler.close()
    assert compiled == [first, third]  # 100 + 600 + 300 of 1000


def test_sizes_of_the_start_are_not_compiled(version: Version, compiled: list[Call]) -> None:
    compiler = Compiler(OPTIONS)
    version.warm = frozenset({Call((1, 8, 8))})
    note(compiler, version, *version.warm, times=2 * OFTEN)
    compiler.close()
    assert not compiled


def test_failed_size_is_computed_as_before(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Call] = []

    def fail(path: Path, options: SessionOptions, lately: list[Call], **_: Any) -> None:
        tried.extend(lately)
        raise MemoryError

    monkeypatch.setattr(module, "probe", fail)
    compiler, calls = Compiler(OPTIONS), [Call((1, 20, 20)), Call((1, 6, 6))]
    note(compiler, version, *calls, times=3 * OFTEN)
    compiler._threads.join(60)
    assert version.session.labels(np.zeros((1, 20, 20, 3), np.uint8)).shape == (1, 20, 20)
    version.close()
    note(compiler, version, Call((1, 30, 30)))
    compiler.close()
    assert tried == calls
