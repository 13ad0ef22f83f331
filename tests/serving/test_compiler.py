"""Compiling beside the requests: when, how often, and that what is compiled is then used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.runtime.options import SessionOptions
from muntin.serving import compiler as module
from muntin.serving.compiler import COMPILED, OFTEN, Compiler
from muntin.serving.probation import ArtifactLoader
from muntin.serving.rollout import Rollout
from muntin.serving.scheduling import Demand
from muntin.serving.slot import Slot
from muntin.serving.version import Call, TookTooLongError, Version

OPENING = SessionOptions(threads=1, dynamic=True)


@pytest.fixture
def version(write_version: Callable[..., Path], in_process: ArtifactLoader, tmp_path: Path) -> Version:
    loader = type(in_process)(opening=OPENING)
    return Slot("m", loader, rollout=Rollout()).load(write_version(tmp_path / "1"), "1")


def test_a_size_that_comes_often_is_compiled_for(version: Version, wait_until: Callable[..., None]) -> None:
    call, compiler = Call((3, 11, 7), labels=True), Compiler(OPENING)
    compiled: Any = version.session
    for _ in range(OFTEN - 1):
        compiler.note(version, call)
    assert not any(thread.name == "muntin-compile" for thread in threading.enumerate())
    compiler.note(version, call)
    wait_until(lambda: ((3, 11, 7, 3), True) in compiled._compiled, 60)
    assert compiled._compiled[(3, 11, 7, 3), True].kept  # the other process had compiled it
    compiler.close()
    assert not any(thread.name == "muntin-compile" for thread in threading.enumerate())


def test_who_is_served_is_not_kept_waiting_by_it(version: Version, wait_until: Callable[..., None]) -> None:
    asked: list[Demand] = []

    def demand() -> Demand:
        asked.append(Demand.WAITING if len(asked) < 4 else Demand.SERVED)
        return asked[-1]

    call, compiler = Call((1, 9, 5)), Compiler(OPENING, demand=demand)
    for _ in range(OFTEN):
        compiler.note(version, call)
    compiled: Any = version.session
    wait_until(lambda: ((1, 9, 5, 3), False) in compiled._compiled, 60)
    compiler.close()
    assert Demand.SERVED in asked  # it stood still as long as somebody waited, and was asked again


def test_without_a_thread_for_it_nothing_is_compiled_and_it_is_tried_again(
    version: Version, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    asked: list[Call] = []
    monkeypatch.setattr(module, "probe", lambda path, opening, lately, **_: asked.extend(lately))
    monkeypatch.setattr(version.session, "warm_up", lambda shapes, *, labels: None)
    call, compiler = Call((1, 9, 5)), Compiler(OPENING)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(OFTEN):
            compiler.note(version, call)
    compiler.close()
    assert not asked
    compiler = Compiler(OPENING)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(OFTEN):
            compiler.note(version, call)
    for _ in range(OFTEN):
        compiler.note(version, call)
    wait_until(lambda: asked == [call])
    compiler.close()


def test_an_engine_that_hangs_is_not_waited_for_at_the_end(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, let_go = threading.Event(), threading.Event()

    def hang(shapes: object, *, labels: bool) -> None:
        entered.set()
        assert let_go.wait(60)

    monkeypatch.setattr(module, "END_S", 0.01)
    monkeypatch.setattr(module, "probe", lambda *_, **__: None)
    monkeypatch.setattr(version.session, "warm_up", hang)
    compiler = Compiler(OPENING)
    for _ in range(OFTEN):
        compiler.note(version, Call((1, 9, 5)))
    assert entered.wait(60)
    compiler.close()
    let_go.set()


def test_each_size_once_and_not_without_end(version: Version, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]) -> None:
    asked: list[Call] = []
    monkeypatch.setattr(module, "probe", lambda path, opening, lately, **_: asked.extend(lately))
    monkeypatch.setattr(version.session, "warm_up", lambda shapes, *, labels: None)
    compiler = Compiler(OPENING)
    calls = [Call((1, 1 + n, 3)) for n in range(COMPILED + 20)]
    for call in calls:
        for _ in range(3 * OFTEN):
            compiler.note(version, call)
    wait_until(lambda: len(asked) == COMPILED)
    compiler.close()
    assert asked == calls[:COMPILED]


def test_a_size_that_was_forgotten_is_not_compiled_again(
    version: Version, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    asked: list[Call] = []
    monkeypatch.setattr(module, "probe", lambda path, opening, lately, **_: asked.extend(lately))
    monkeypatch.setattr(version.session, "warm_up", lambda shapes, *, labels: None)
    compiler, often, last = Compiler(OPENING, budget=lambda channels: 3000 / channels), Call((1, 20, 20)), Call((1, 10, 10))
    for turn in range(3):
        for _ in range(OFTEN):
            compiler.note(version, often)
        for n in range(COMPILED + 1):  # each of them once
            compiler.note(version, Call((1, 1 + n, 1 + turn)))
    for _ in range(OFTEN):
        compiler.note(version, last)
    wait_until(lambda: last in asked)
    compiler.close()
    assert asked == [often, last]


def test_an_artefact_that_is_loaded_again_is_compiled_for_its_sizes_again(
    version: Version, in_process: ArtifactLoader, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    asked: list[Call] = []
    monkeypatch.setattr(module, "probe", lambda path, opening, lately, **_: asked.extend(lately))
    again = Slot("m", type(in_process)(opening=OPENING), rollout=Rollout()).load(version.path, "1")
    assert again.digest == version.digest
    compiler, call = Compiler(OPENING), Call((1, 20, 20))
    for number, loaded in enumerate((version, again), 1):
        monkeypatch.setattr(loaded.session, "warm_up", lambda shapes, *, labels: None)
        for _ in range(OFTEN):
            compiler.note(loaded, call)
        wait_until(lambda: len(asked) == number)  # noqa: B023 - it is over before the next one
    compiler.close()
    assert asked == [call, call]


def test_what_is_compiled_for_is_bounded_in_pixels(
    version: Version, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    """No more than the budget allows, what the version was warmed up for beside the start included; smaller ones that fit still are."""
    asked: list[Call] = []
    monkeypatch.setattr(module, "probe", lambda path, opening, lately, **_: asked.extend(lately))
    monkeypatch.setattr(version.session, "warm_up", lambda shapes, *, labels: None)
    before, start = Call((1, 10, 10)), Call((8, 100, 100))
    version.warm, version.start = frozenset({before, start}), frozenset({start})
    compiler = Compiler(OPENING, budget=lambda channels: 3000 / channels)
    first, second, third, last = Call((2, 10, 30)), Call((1, 20, 20)), Call((3, 10, 10), labels=True), Call((1, 1, 1))
    for call in (first, second, third, last):
        for _ in range(2 * OFTEN):
            compiler.note(version, call)
    wait_until(lambda: len(asked) == 2)
    compiler.close()
    assert asked == [first, third]  # 100 + 600 + 300 of 1000


def test_what_it_was_opened_for_is_not_compiled_again(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda *_, **__: pytest.fail("it was compiled already"))
    compiler = Compiler(OPENING)
    assert version.warm
    for call in version.warm:
        for _ in range(2 * OFTEN):
            compiler.note(version, call)
    assert not any(thread.name == "muntin-compile" for thread in threading.enumerate())
    compiler.close()


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_what_cannot_be_compiled_changes_nothing(
    version: Version, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None], kind: type[Exception]
) -> None:
    tried: list[Call] = []

    def fail(path: Path, opening: SessionOptions, lately: list[Call], **_: Any) -> None:
        tried.extend(lately)
        raise kind("no")

    monkeypatch.setattr(module, "probe", fail)
    compiler = Compiler(OPENING)
    for call in (Call((1, 5, 5)), Call((1, 6, 6))):
        for _ in range(OFTEN):
            compiler.note(version, call)
    wait_until(lambda: len(tried) == 2)
    compiler.close()
    compiled: Any = version.session
    assert not any(shape in ((1, 5, 5, 3), (1, 6, 6, 3)) for shape, _ in compiled._compiled)
    assert version.session.labels(np.zeros((1, 5, 5, 3), np.uint8)).shape == (1, 5, 5)


def test_a_size_that_could_not_be_compiled_is_tried_once_more_and_none_of_a_version_that_went(
    version: Version, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    asked: list[Call] = []

    def fails(path: Path, opening: SessionOptions, lately: list[Call], **_: Any) -> None:
        asked.extend(lately)
        raise TookTooLongError("the machine is busy")

    monkeypatch.setattr(module, "probe", fails)
    compiler, call = Compiler(OPENING), Call((1, 20, 20))
    for tries in (1, 2):
        for _ in range(OFTEN):
            compiler.note(version, call)
        wait_until(lambda: len(asked) == tries and (tries == 2 or call not in compiler._compiled[version]))  # noqa: B023
    for _ in range(3 * OFTEN):
        compiler.note(version, call)
    version.close()
    for _ in range(OFTEN):
        compiler.note(version, Call((1, 30, 30)))
    wait_until(compiler._queue.empty)
    compiler.close()
    assert asked == [call, call]
