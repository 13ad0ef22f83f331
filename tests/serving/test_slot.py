"""The slot: who answers, how a version takes over, and that no request notices."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from muntin.errors import ArtifactError, DataError, MuntinError, VerificationError
from muntin.runtime.memory import resident
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.serving.executor import compute_somewhere
from muntin.serving.probation import ArtifactLoader, Limits
from muntin.serving.rollout import ENOUGH, Rollout
from muntin.serving.slot import HISTORY, Lease, Slot
from muntin.serving.version import Begun, Call, NotReadyError, RefusedError, UnknownVersionError, Version

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
CALL = Call((1, 8, 8), labels=True)


def label_of(session: Session) -> int:
    found = np.unique(session.labels(IMAGES))
    assert found.size == 1
    return int(found[0])


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def make_slot(shelf: Any, clock: Any, told: list[str]) -> Callable[..., Slot]:
    """`make_slot(canary=..., ...)`: versions without an engine, a clock that stands still."""

    def make(*, random: Callable[[], float] = lambda: 0.0, **bounds: Any) -> Slot:
        return Slot("model", shelf, rollout=Rollout(**bounds), clock=clock, random=random, notify=told.append)

    return make


def states(slot: Slot) -> dict[str, tuple[str, str]]:
    return {entry.version: (entry.state, entry.reason) for entry in slot.index()}


def observe(slot: Slot, version: Version, count: int = 1, **seen: Any) -> None:
    for _ in range(count):
        slot.observe(version, **({"seconds": 0.01, "rows": 1, "call": CALL} | seen))


@contextmanager
def loading(slot: Slot, path: str, name: str) -> Iterator[list[Any]]:
    """A load on a thread of its own, as a watcher's, once its version is on trial; afterwards the list holds what came of it."""
    outcome: list[Any] = []
    if slot.current is not None:
        observe(slot, slot.current, error=DataError())  # beside a version that nobody asks anything there is no trial

    def load() -> None:
        try:
            outcome.append(slot.load(path, name))
        except MuntinError as error:
            outcome.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        while not outcome and not states(slot).get(name, ("", ""))[1].startswith("candidate"):
            pass
        yield outcome
    except BaseException:
        slot.close()  # a load that nobody waits for any more would wait for its verdict
        raise
    finally:
        thread.join(20)
        assert not thread.is_alive()


# ---- one version after the other ----


def test_a_slot_serves_what_is_loaded(make_slot: Callable[..., Slot], told: list[str]) -> None:
    slot = make_slot()
    assert not slot.ready
    with pytest.raises(NotReadyError, match="model: no version is ready"):
        slot.lease()
    version = slot.load("1", "1")
    assert slot.ready
    assert slot.current is version
    with slot.lease() as lease, slot.lease("1") as named:
        assert lease.version is named.version is version
        assert (version.leases, label_of(lease.version.session)) == (2, 1)
    assert version.leases == 0
    assert states(slot) == {"1": ("ready", "current")}
    assert told == ["model: version 1 serves"]


def test_a_version_whose_engine_is_left_alone_is_not_listed_as_ready(make_slot: Callable[..., Slot], monkeypatch: Any) -> None:
    slot = make_slot()
    version = slot.load("1", "1")
    with monkeypatch.context() as dying:
        dying.setattr(type(version.session), "able", False)
        assert states(slot) == {"1": ("unable", "current; its engine died again and again, and is left alone for a while")}
        with pytest.raises(NotReadyError, match="died again and again"):
            slot.lease()
    assert states(slot) == {"1": ("ready", "current")}


@pytest.mark.parametrize("allowed", [0.0, 0.5])
def test_a_version_on_probation_that_cannot_be_asked_is_sent_back(make_slot: Callable[..., Slot], told: list[str], allowed: float) -> None:
    """Also where nothing counts against it, or what does is allowed: it is asked nothing, so nothing more would ever be counted."""
    slot = make_slot(max_error_rate=allowed)
    slot.load("1", "1")
    version = slot.load("2", "2")
    observe(slot, version, 20)
    version.session.alone = True  # type: ignore[attr-defined]
    with slot.lease() as lease:
        assert lease.version.name == "1"
    assert slot.ready
    assert told[-1] == "model: version 2 is rolled back to 1: its engine died again and again, or could not be begun again"


def test_images_that_end_both_engines_send_no_version_back(make_slot: Callable[..., Slot], told: list[str]) -> None:
    """A moment after the third death the predecessor has died twice, and can still be asked."""
    slot = make_slot()
    previous, version = slot.load("1", "1"), slot.load("2", "2")
    previous.session.deaths, version.session.deaths = 2, 3
    version.session.alone = True  # type: ignore[attr-defined]
    slot.settle()
    assert states(slot)["1"] == ("ready", "previous: kept warm")
    assert not any("rolled back" in line for line in told)


def test_a_candidate_that_cannot_be_asked_does_not_take_over(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(canary=0.5, max_error_rate=0.5)
    slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:
        candidate = slot.open[1]
        observe(slot, candidate, 20)
        candidate.session.alone = True  # type: ignore[attr-defined]
    assert isinstance(outcome[0], RefusedError)
    assert "could not be begun again" in str(outcome[0])
    assert slot.ready


def test_a_version_is_not_sent_back_to_one_that_can_do_no_better(make_slot: Callable[..., Slot], monkeypatch: Any, clock: Any) -> None:
    slot = make_slot(for_seconds=10)
    slot.load("1", "1")
    version = slot.load("2", "2")
    with monkeypatch.context() as dying:
        dying.setattr(type(version.session), "able", False)
        clock.now += 20
        slot.settle()
        assert states(slot)["1"][1].startswith("previous: kept warm")  # nor does it pass
    slot.settle()
    assert states(slot)["2"] == ("ready", "current")


@pytest.mark.parametrize("back", [True, False])
def test_no_version_is_sent_back_to_one_whose_engine_is_gone(
    make_slot: Callable[..., Slot], told: list[str], clock: Any, back: bool
) -> None:
    """However slow it is, it answers. If the other one is there again before its time is over, it is judged."""
    slot = make_slot(for_seconds=10)
    previous = slot.load("1", "1")
    observe(slot, previous, 20)
    previous.session.gone = True  # type: ignore[attr-defined]
    version = slot.load("2", "2")
    observe(slot, version, 40, seconds=1.0)
    assert slot.current is version and slot.open == (version, previous)
    version.session.alone = True  # type: ignore[attr-defined]
    slot.settle()
    assert slot.current is version
    version.session.alone = False  # type: ignore[attr-defined]
    previous.session.gone = not back  # type: ignore[attr-defined]
    clock.now += 20
    slot.settle()
    assert slot.open == ((previous,) if back else (version,))
    assert told[-1].endswith("(allowed: 3)" if back else "version 2 stays (the engine of 1 died again and again), 1 goes")


def test_of_two_that_could_be_gone_back_to_the_one_that_is_there_is_kept(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    first, second = slot.load("1", "1"), slot.load("2", "2")
    first.session.gone = True  # type: ignore[attr-defined]
    assert slot.open == (second, first)
    third = slot.load("3", "3")
    assert slot.open == (third, second)


@pytest.mark.parametrize("may_begin_again", [False, True])
def test_a_proved_version_comes_before_one_on_trial(make_slot: Callable[..., Slot], may_begin_again: bool) -> None:
    slot = make_slot()
    proved, current = slot.load("1", "1"), slot.load("2", "2")
    slot.rollout = Rollout(canary=0.5)
    with loading(slot, "3", "3") as outcome:
        current.session.gone, current.session.alone = True, not may_begin_again  # type: ignore[attr-defined]
        slot.settle()
        assert slot.current is (current if may_begin_again else proved)  # the previous one computes what the current one cannot
        slot.unload("3")
    assert isinstance(outcome[0], NotReadyError)


@pytest.mark.parametrize("died", ["before", "meanwhile"])
@pytest.mark.parametrize("bounds", [{"canary": 0.1}, {"shadow": 1.0}])
def test_where_the_engine_that_serves_is_gone_a_candidate_takes_over_at_once(
    make_slot: Callable[..., Slot], told: list[str], bounds: dict[str, float], died: str
) -> None:
    slot = make_slot(random=lambda: 0.99, **bounds)
    old = slot.load("1", "1")
    if died == "before":
        observe(slot, old)
        old.session.alone = True  # type: ignore[attr-defined]
        slot.load("2", "2")
    else:
        with loading(slot, "2", "2"):
            old.session.alone = True  # type: ignore[attr-defined]
            with slot.lease() as lease:
                assert lease.version.name == "2"
        assert "model: version 2 takes over from 1 (the engine of 1 died again and again)" in told
    with slot.lease() as lease:
        assert lease.version.name == "2"
    assert states(slot)["1"][1].startswith("previous: kept warm")


def test_a_trial_begins_anew_beside_another_version(make_slot: Callable[..., Slot], clock: Any) -> None:
    """What was compared with a version that was sent back is not held against its fix."""
    slot = make_slot(shadow=1.0)
    slot.rollout = Rollout()
    slot.load("1", "1")
    wrong = slot.load("2", "2")
    slot.rollout = Rollout(shadow=1.0)
    with loading(slot, "3", "3") as outcome:
        candidate = slot.open[1]
        for _ in range(ENOUGH - 1):
            slot.observe_shadow(candidate, beside=wrong, agreement=0.0, seconds=0.01, rows=1, call=CALL)
        observe(slot, wrong, error=RuntimeError("the engine is gone"))
        slot.observe_shadow(candidate, beside=wrong, agreement=0.0, seconds=0.01, rows=1, call=CALL)  # one that was on its way
        assert slot._trial is not None
        assert (slot._trial.compared, slot._trial.rows) == (0, 1)
        slot.unload("3")
    assert isinstance(outcome[0], NotReadyError)


def test_a_lease_is_given_back_once(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    version = slot.load("1", "1")
    first, second = slot.lease(), slot.lease()
    for _ in range(3):
        first.release()
    assert version.leases == 1
    second.release()
    assert version.leases == 0


def test_a_slot_is_busy_for_a_second_after_a_batch(make_slot: Callable[..., Slot], clock: Any) -> None:
    slot = make_slot(for_requests=1)
    version = slot.load("1", "1")
    assert not slot.busy
    slot.observe(version, rows=1, seconds=0.01, begun=slot.begin(version, rows=1))
    assert slot.busy
    clock.now += 2
    assert not slot.busy


def test_an_old_version_goes_with_its_last_lease(make_slot: Callable[..., Slot], wait_until: Callable[..., None]) -> None:
    slot = make_slot(for_seconds=0)
    old = slot.load("1", "1")
    gone = weakref.ref(old.session)
    first, second = slot.lease(), slot.lease()
    slot.load("2", "2")
    assert old.state == "draining"
    assert label_of(first.version.session) == 1
    first.release()
    assert (old.state, old.open) == ("draining", True)
    with pytest.raises(NotReadyError, match="version 1 is draining"):
        slot.lease("1")
    second.release()
    assert (old.state, old.open) == ("unloaded", False)
    wait_until(lambda: gone() is None)
    assert slot.lease().version.name == "2"


def test_a_name_is_only_looked_up(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    slot.load("1", "1")
    for name in ("2", "../1", "/etc/passwd", "1\0", "1\n", "\u0661", "", "x" * 10_000):
        with pytest.raises(UnknownVersionError, match=r"no version .*: there is 1") as caught:
            slot.lease(name)
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


def test_what_cannot_be_loaded_changes_nothing(make_slot: Callable[..., Slot], shelf: Any, signature_of: Callable[..., Any]) -> None:
    slot = make_slot()
    current = slot.load("1", "1")
    shelf.trouble = {"2": ArtifactError("2: altered"), "3": RuntimeError("no kernel\nfor this")}
    shelf.signatures = {"4": signature_of(channels=1)}
    with pytest.raises(ArtifactError, match="2: altered"):
        slot.load("2", "2")
    with pytest.raises(VerificationError, match=r"3: it cannot be opened here \(RuntimeError: no kernel\)"):
        slot.load("3", "3")
    with pytest.raises(RefusedError, match=r"version 4 has another contract \(channels 1 where 3 is served\)"):
        slot.load("4", "4")
    assert shelf.opened == ["1"]  # the other contract was known before it was opened here
    assert slot.current is current
    found = states(slot)
    assert found["1"] == ("ready", "current")
    assert found["2"] == ("failed", "2: altered")
    assert [found[name][0] for name in ("3", "4")] == ["failed", "failed"]
    with pytest.raises(NotReadyError, match=r"version 2 is failed \(2: altered\)"):
        slot.lease("2")


def test_classes_may_be_added(make_slot: Callable[..., Slot], shelf: Any, signature_of: Callable[..., Any], clock: Any) -> None:
    shelf.signatures = {"2": signature_of(classes=("sea", "field", "roof", "road", "tree")), "3": signature_of(classes=("tree", "sea"))}
    slot = make_slot()
    slot.load("1", "1")
    slot.load("2", "2")
    with pytest.raises(RefusedError, match="class 0"):
        slot.load("3", "3")
    lenient = Slot("model", shelf, rollout=Rollout(), other_classes=True, clock=clock)
    lenient.load("1", "1")
    assert lenient.load("3", "3").state == "ready"


def test_a_new_version_is_warmed_up_for_what_the_old_one_was_asked(make_slot: Callable[..., Slot], shelf: Any) -> None:
    slot = make_slot()
    version = slot.load("1", "1")
    observe(slot, version, 3)
    observe(slot, version, call=None)
    slot.load("2", "2")
    assert shelf.lately == {CALL: 3}


def test_the_index_forgets_what_is_long_gone(make_slot: Callable[..., Slot], shelf: Any) -> None:
    slot = make_slot(for_seconds=0)
    shelf.trouble = {"0": ArtifactError("broken")}
    for number in range(1, 3 * HISTORY):
        slot.load(str(number), str(number))
    for _ in range(3):
        with pytest.raises(ArtifactError):
            slot.load("0", "0")
    names = [entry.version for entry in slot.index()]
    assert len(names) <= HISTORY + 2
    assert names.count("0") == 1
    assert str(3 * HISTORY - 1) in names


def test_one_loads_at_a_time(make_slot: Callable[..., Slot], shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = make_slot()
    inside: list[int] = []
    most: list[int] = []
    probe = type(shelf).probe

    def counting(*arguments: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()
        return probe(*arguments)

    monkeypatch.setattr(type(shelf), "probe", counting)
    threads = [threading.Thread(target=slot.load, args=(str(n), str(n))) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


# ---- after the flip ----


def test_the_old_version_stays_warm_until_the_new_one_has_proved_itself(make_slot: Callable[..., Slot], told: list[str]) -> None:
    slot = make_slot(for_requests=10)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    assert states(slot) == {"1": ("ready", "previous: kept warm"), "2": ("ready", "current, on probation")}
    observe(slot, new, 9)
    assert old.open
    observe(slot, new)
    assert states(slot) == {"1": ("unloaded", ""), "2": ("ready", "current")}
    assert told[1:] == ["model: version 2 takes over from 1", "model: version 2 stays (10 images in 0 s, 0 failed), 1 goes"]


def test_in_quiet_hours_time_ends_a_probation(make_slot: Callable[..., Slot], clock: Any) -> None:
    slot = make_slot(for_seconds=30)
    old, _ = slot.load("1", "1"), slot.load("2", "2")
    clock.now += 29
    slot.settle()
    assert old.open
    clock.now += 1
    slot.settle()
    assert not old.open


def test_a_version_that_fails_is_rolled_back(make_slot: Callable[..., Slot], told: list[str]) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    held = slot.lease()
    observe(slot, new, error=RuntimeError("the engine is gone"))
    assert slot.current is old
    assert states(slot) == {
        "1": ("ready", "current"),
        "2": ("failed", "rolled back: 1 of its 1 images failed (allowed: 0.00%): RuntimeError: the engine is gone"),
    }
    assert told[-1] == "model: version 2 is rolled back to 1: 1 of its 1 images failed (allowed: 0.00%): RuntimeError: the engine is gone"
    assert new.open  # somebody has it still
    held.release()
    assert not new.open


def test_a_version_that_is_slow_is_rolled_back(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(max_slowdown=2)
    old = slot.load("1", "1")
    observe(slot, old, 40, seconds=0.01)
    new = slot.load("2", "2")
    observe(slot, new, 40, seconds=0.03)
    assert slot.current is old
    assert "it takes 3.0 times as long" in new.reason


def test_what_the_caller_got_wrong_is_no_failure(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    slot.load("1", "1")
    new = slot.load("2", "2")
    observe(slot, new, error=DataError("images of dtype float32"))
    assert slot.current is new
    with pytest.raises(DataError):
        compute_somewhere(slot, new, lambda session: session(IMAGES[0]), rows=1)
    assert slot.current is new


def test_the_proven_version_is_kept_where_one_follows_the_other(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    first, second, third = (slot.load(name, name) for name in "123")
    assert (first.state, second.state, third.state) == ("ready", "unloaded", "ready")
    observe(slot, third, error=RuntimeError())
    assert slot.current is first


def test_where_what_failed_can_be_computed(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(canary=1)
    first = slot.load("1", "1")
    assert slot.fallback(first) is None
    with loading(slot, "2", "2"):
        candidate = slot.lease().version
        lease = slot.fallback(candidate)
        assert lease is not None
        assert lease.version is first
        lease.release()
        observe(slot, candidate, 100)  # it takes over
        assert slot.current is candidate
        lease = slot.fallback(candidate)
        assert lease is not None
        assert lease.version is first
        lease.release()
        assert slot.fallback(first) is None  # never back
        observe(slot, candidate, error=RuntimeError())
        assert slot.current is first
        lease = slot.fallback(candidate)  # for the requests that it still has
        assert lease is not None
        assert lease.version is first
        lease.release()


class DeadError(Exception):
    """What an engine raises."""


def break_engine(version: Version) -> None:
    def die(images_BHWC: Any) -> Any:
        raise DeadError

    version.session._infer = die  # type: ignore[method-assign]


def test_a_batch_that_fails_is_computed_by_the_version_that_can(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    with slot.lease() as lease:
        assert lease.version is new
        break_engine(new)
        assert compute_somewhere(slot, new, label_of, rows=1) == (1, old)
        assert slot.current is old
        assert compute_somewhere(slot, new, label_of, rows=1) == (1, old)  # the rest of what was admitted before
    assert not new.open
    assert (len(new.latencies.of(1)), len(old.latencies.of(1))) == (0, 2)
    assert (old.leases, new.leases) == (0, 0)


def test_images_that_no_version_can_compute_send_none_back(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")

    def impossible(session: Session) -> None:
        raise DeadError(session.label)  # type: ignore[attr-defined]

    for _ in range(20):
        with pytest.raises(DeadError, match="2"):  # what the version said that was asked
            compute_somewhere(slot, new, impossible, rows=1)
    assert slot.current is new
    assert slot._probation is not None
    assert (slot._probation.failed, old.leases) == (0, 0)


def test_an_answer_holds_no_images_after_a_failure(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    break_engine(new)
    images = np.zeros((1, 4, 4, 3), np.uint8)
    gone = weakref.ref(images)
    gc.disable()
    try:
        assert compute_somewhere(slot, new, lambda session, images=images: session.labels(images).shape, rows=1) == ((1, 4, 4), old)
        del images
        assert gone() is None
    finally:
        gc.enable()


# ---- before the flip ----


def test_a_canary_answers_its_share(make_slot: Callable[..., Slot], told: list[str]) -> None:
    slot = make_slot(canary=0.25, for_requests=200, random=random.Random(3).random)  # noqa: S311
    old = slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:
        assert states(slot)["2"] == ("ready", "candidate: canary 25%, shadow 0%")
        with slot.lease("2") as lease:  # by name it can be had already
            candidate = lease.version
        leases = [slot.lease().version for _ in range(400)]
        assert 70 <= sum(version is candidate for version in leases) <= 130
        for version in leases:
            observe(slot, version)
            if version is candidate:
                assert not outcome
        assert slot.current is old
        assert slot._trial is not None
        observe(slot, candidate, 200 - slot._trial.rows)
    assert outcome == [candidate]
    assert slot.current is candidate
    assert "model: version 2 takes over from 1 (200 images in 0 s, 0 failed)" in told


def test_a_canary_that_fails_is_refused(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(canary=0.5)
    old = slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:
        candidate = slot.lease().version
        break_engine(candidate)
        assert compute_somewhere(slot, candidate, label_of, rows=1) == (1, old)
    assert isinstance(outcome[0], RefusedError)
    assert str(outcome[0]) == "model: version 2 is refused on trial: 1 of its 1 images failed (allowed: 0.00%): DeadError"
    assert slot.current is old
    assert slot.lease().version is old


def test_a_shadow_is_compared_and_never_answers(make_slot: Callable[..., Slot]) -> None:
    numbers = iter([0.0, 0.9, 0.1, 0.5])
    slot = make_slot(shadow=0.5, min_agreement=0.9, for_requests=30, random=lambda: next(numbers, 0.0))
    old = slot.load("1", "1")
    assert slot.shadow(old) is None
    with loading(slot, "2", "2") as outcome:
        candidate = slot.lease("2").version
        assert slot.lease().version is old  # draws 0.0: below no canary
        assert slot.shadow(candidate) is None  # with itself
        drawn = [slot.shadow(old) for _ in range(3)]
        assert [lease is not None for lease in drawn] == [False, True, False]
        with drawn[1] as lease:  # type: ignore[union-attr]
            for _ in range(30):
                slot.observe_shadow(lease.version, beside=old, agreement=0.95, seconds=0.01, rows=1)
    assert outcome == [slot.current]
    assert slot.shadow(old) is None  # the previous one says nothing of the place of the current one
    with loading(slot, "3", "3") as outcome, slot.shadow(candidate) as lease:  # type: ignore[union-attr]
        for _ in range(20):
            slot.observe_shadow(lease.version, beside=candidate, agreement=0.5, seconds=0.01, rows=1)
        slot.observe_shadow(lease.version, beside=candidate, agreement=0.5, seconds=0.01, rows=1)  # one that was on its way
    assert "it agrees on 50.0% of the labels" in str(outcome[0])
    assert slot.current is not None
    assert slot.current.name == "2"


def test_a_trial_that_nobody_takes_part_in_ends_by_time(make_slot: Callable[..., Slot], clock: Any) -> None:
    slot = make_slot(canary=0.1, for_seconds=60)
    slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:
        clock.now += 61
    assert outcome == [slot.current]


def test_there_is_no_trial_where_nobody_asks_anything(make_slot: Callable[..., Slot], clock: Any, told: list[str]) -> None:
    slot = make_slot(canary=0.1, for_seconds=60)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    assert told[1:] == ["model: version 2 takes over from 1 (untried: nobody asked anything in the last 60 s)"]
    assert states(slot)["1"] == ("ready", "previous: kept warm")
    observe(slot, new, error=RuntimeError())
    assert slot.current is old  # it is on probation as any other
    clock.now += 60
    assert slot.load("3", "3") is slot.current


def test_a_trial_counts_its_time_from_the_last_image_before_it(make_slot: Callable[..., Slot], clock: Any, told: list[str]) -> None:
    slot = make_slot(canary=0.1, for_seconds=60, random=lambda: 0.5)
    old = slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:  # it observes an image
        assert told[-1] == "model: version 2 is on trial beside 1: until 100 images, 60 s at most"
        clock.now += 59
        slot.settle()
        assert slot.current is old
        observe(slot, old)
        clock.now += 1
    assert outcome == [slot.current]
    assert told[-1] == "model: version 2 takes over from 1 (0 images in 60 s, 0 failed)"
    slot = make_slot(canary=0.1, for_seconds=60)
    observe(slot, slot.load("1", "1"))
    clock.now += 59
    thread = threading.Thread(target=slot.load, args=("2", "2"))
    thread.start()
    while "2" not in states(slot) or not states(slot)["2"][1]:
        pass
    assert states(slot)["1"] == ("ready", "current")
    clock.now += 1
    thread.join(20)
    assert states(slot)["2"] == ("ready", "current, on probation")


# ---- what does not come back ----


def test_a_version_does_not_pass_while_it_hangs(make_slot: Callable[..., Slot], clock: Any, told: list[str]) -> None:
    slot = make_slot(for_seconds=2)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    begun = slot.begin(new, rows=3, within=10)
    for _ in range(9):
        clock.now += 1
        slot.settle()
        assert (slot.current, old.open) == (new, True)
    clock.now += 1
    with slot.lease() as lease:  # whoever comes by
        assert lease.version is old
    reason = "it does not come back with 3 of its images: its engine hangs"
    assert states(slot)["2"] == ("failed", f"rolled back: {reason}")
    assert told[-2:] == ["model: version 2 did not come back with 3 images in 10 s", f"model: version 2 is rolled back to 1: {reason}"]
    assert (new.open, new.overdue) == (True, 1)  # its thread is inside it
    slot.observe(new, seconds=60.0, rows=3, begun=begun)
    assert (new.open, new.overdue, new.leases) == (False, 0, 0)


@pytest.mark.parametrize("by", ["time", "images"])
def test_what_was_begun_before_a_version_passed_is_waited_for(make_slot: Callable[..., Slot], clock: Any, by: str) -> None:
    """And what was begun after it is not: beside two streams there is always something."""
    slot = make_slot(for_seconds=30, for_requests=5)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    slow = slot.begin(new, rows=1, within=100)
    observe(slot, new, 9 if by == "images" else 1)
    clock.now += 29 if by == "images" else 31
    slot.settle()
    assert old.open
    clock.now += 1
    slot.begin(new, rows=1, within=100)
    slot.observe(new, seconds=31.0, rows=1, begun=slow)
    assert (slot.current, old.open) == (new, False)


def test_a_candidate_whose_shadow_hangs_is_refused(make_slot: Callable[..., Slot], clock: Any) -> None:
    slot = make_slot(shadow=1.0, for_seconds=5)
    old = slot.load("1", "1")
    with loading(slot, "2", "2") as outcome, slot.shadow(old) as lease:  # type: ignore[union-attr]
        begun = slot.begin(lease.version, rows=1, within=10)
        clock.now += 9
        slot.settle()
        assert not outcome
        assert slot.current is old
        clock.now += 1
    assert "its engine hangs" in str(outcome[0])
    slot.end(begun)
    slot.end(begun)
    assert (lease.version.leases, lease.version.open) == (0, False)


def test_what_waits_for_a_version_that_hangs_is_computed_by_another(make_slot: Callable[..., Slot], clock: Any) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    with slot.lease() as waits:
        begun = slot.begin(new, rows=1, within=10)
        clock.now += 11
        assert compute_somewhere(slot, waits.version, label_of, rows=1) == (1, old)
        assert slot.current is old
    only = slot.begin(old, rows=1, within=10)
    clock.now += 11
    assert compute_somewhere(slot, old, label_of, rows=1) == (1, old)  # there is no other one: it may have been this one batch
    for one in (begun, only):
        slot.end(one)
    assert (old.overdue, old.leases, new.open) == (0, 0, False)


def test_what_is_interrupted_is_computed_by_another_and_counted_once(make_slot: Callable[..., Slot], clock: Any, told: list[str]) -> None:
    slot = make_slot(max_error_rate=0.5)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    interrupted: list[float] = []
    new.session.interrupt = lambda seconds: interrupted.append(seconds) or True  # type: ignore[method-assign, func-returns-value]

    def hang(session: Session) -> int:
        if new.open and session is new.session:
            clock.now += 11
            began = clock.now - 11
            assert slot.interrupt(began)
            assert not slot.interrupt(clock.now + 1)
            raise DeadError
        return label_of(session)

    assert compute_somewhere(slot, new, hang, rows=1, within=10) == (1, old)
    assert interrupted == [10]
    assert (slot.current, old.leases, new.leases, new.open) == (old, 0, 0, False)
    assert "1 of its images: its engine hangs" in "".join(told)


# ---- out of service ----


def test_unloading(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    first, second = slot.load("1", "1"), slot.load("2", "2")
    slot.unload("2")
    assert slot.current is first  # it was still warm
    assert second.state == "unloaded"
    with pytest.raises(UnknownVersionError):
        slot.unload("9")
    with pytest.raises(NotReadyError, match="version 2 is unloaded"):
        slot.unload("2")
    slot.load("3", "3")
    slot.unload()
    assert not slot.ready
    assert {state for state, _ in states(slot).values()} == {"unloaded"}
    slot.load("4", "4")
    assert slot.ready


def test_unloading_what_is_on_trial_and_beside_it(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(canary=1)
    slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:
        slot.unload("2")
    assert isinstance(outcome[0], NotReadyError)
    with loading(slot, "3", "3") as outcome:
        slot.unload("1")
    assert outcome == [slot.current]
    assert outcome[0].name == "3"


def test_a_closed_slot_admits_nobody_and_answers_who_is_in(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(canary=0.5)
    slot.load("1", "1")
    lease = slot.lease("1")
    with loading(slot, "2", "2") as outcome:
        slot.close()
    assert isinstance(outcome[0], NotReadyError)
    for refused in (slot.lease, lambda: slot.load("3", "3")):
        with pytest.raises(NotReadyError):
            refused()
    assert label_of(lease.version.session) == 1
    lease.release()
    assert not lease.version.open
    slot.close()


def test_what_was_opened_when_the_slot_closed_is_closed_again(make_slot: Callable[..., Slot], shelf: Any, wait_until: Any) -> None:
    """It may be a process, which nobody would end."""
    slot, closed = make_slot(), list[Session]()
    opens = shelf.open

    def last_moment(*given: Any) -> Any:
        opened = opens(*given)
        opened.session.close = lambda: closed.append(opened.session)
        slot.end_loads()
        return opened

    shelf.open = last_moment
    with pytest.raises(NotReadyError, match="closed"):
        slot.load(Path("1"), "1")
    wait_until(lambda: len(closed) == 1)


def test_calls_that_nobody_waits_for_any_more_are_ended(make_slot: Callable[..., Slot], monkeypatch: pytest.MonkeyPatch) -> None:
    slot, ended = make_slot(), list[tuple[Session, float]]()
    monkeypatch.setattr(Session, "interrupt", lambda session, seconds: bool(ended.append((session, seconds))))
    old, new = (slot.load(Path(name), name) for name in ("1", "2"))
    begun = slot.begin(old, rows=1)
    slot.end_calls()
    assert ended == [(old.session, 0.0)]
    slot.end(begun)
    slot.end_calls()
    assert len(ended) == 1
    assert new.open


def test_loads_end_and_what_serves_goes_on(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot(canary=1)
    first = slot.load("1", "1")
    with loading(slot, "2", "2") as outcome:
        candidate = slot.lease()
        slot.end_loads()
        slot.end_loads()
    assert isinstance(outcome[0], NotReadyError)
    assert label_of(candidate.version.session) == 2  # who is in is answered
    candidate.release()
    with slot.lease() as lease:
        assert lease.version is first
    with pytest.raises(NotReadyError):
        slot.load("3", "3")
    assert (slot.ready, slot.closed) == (True, True)
    slot.close()


def test_who_cannot_be_told_costs_no_batch(shelf: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def broken(line: str) -> None:
        raise BrokenPipeError(line)

    slot = Slot("model", shelf, rollout=Rollout(), clock=clock, notify=broken)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    break_engine(new)
    assert compute_somewhere(slot, new, label_of, rows=1) == (1, old)
    assert "rolled back to 1" in str(reported[-1].exc_value)


def test_a_reload_that_fails_hides_nothing(make_slot: Callable[..., Slot], shelf: Any) -> None:
    """An artefact that is loaded again has the name that it had."""
    slot = make_slot()
    slot.load("1", "1")
    shelf.trouble["1"] = ArtifactError("no such file")
    with pytest.raises(ArtifactError):
        slot.load("1", "1")
    assert [(entry.version, entry.state, entry.reason) for entry in slot.index()] == [("1", "ready", "current")]


def test_what_is_unloaded_after_a_reload_does_not_come_back(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("1", "1")
    assert (old.state, slot.current) == ("ready", new)
    assert [(entry.version, entry.state, entry.reason) for entry in slot.index()] == [("1", "ready", "current, on probation")]
    slot.unload("1")
    assert (old.state, new.state, slot.current) == ("unloaded", "unloaded", None)
    with pytest.raises(NotReadyError):
        slot.unload("1")


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whichever order: who has a lease can compute, and what nobody has or needs is closed."""

    leases = Bundle("leases")
    new_shelf: Any
    new_clock: Any

    def __init__(self) -> None:
        super().__init__()
        self.clock = self.new_clock()
        self.slot = Slot("model", self.new_shelf(), rollout=Rollout(for_requests=5, for_seconds=30), clock=self.clock)
        self.loaded: list[Version] = []
        self.held: list[Lease] = []
        self.begun: list[Begun] = []

    @rule()
    def load(self) -> None:
        name = str(len(self.loaded) + 1)
        self.loaded.append(self.slot.load(name, name))

    @precondition(lambda self: self.slot.ready)
    @rule(target=leases)
    def lease(self) -> Lease:
        self.held.append(self.slot.lease())
        return self.held[-1]

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        lease.release()
        if lease in self.held:
            self.held.remove(lease)

    @rule(lease=leases, fails=st.booleans())
    def observe(self, lease: Lease, fails: bool) -> None:
        self.slot.observe(lease.version, seconds=0.1, rows=2, error=RuntimeError() if fails else None)

    @rule(lease=leases, seconds=st.integers(1, 31))
    def begin(self, lease: Lease, seconds: int) -> None:
        if lease in self.held:
            self.begun.append(self.slot.begin(lease.version, rows=2, within=seconds))

    @precondition(lambda self: self.begun)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        begun = self.begun.pop(data.draw(st.integers(0, len(self.begun) - 1)))
        self.slot.observe(begun.version, seconds=0.1, rows=2, error=RuntimeError() if fails else None, begun=begun)

    @rule(lease=leases)
    def fall_back(self, lease: Lease) -> None:
        version, steps = lease.version, 0
        while (other := self.slot.fallback(version)) is not None:
            assert other.version.open
            assert other.version is not version
            other.release()
            version, steps = other.version, steps + 1
        assert steps <= 2

    @rule(seconds=st.integers(1, 31))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds
        self.slot.settle()

    @precondition(lambda self: self.slot.ready)
    @rule(everything=st.booleans())
    def unload(self, everything: bool) -> None:
        current = self.slot.current
        self.slot.unload(None if everything or current is None else current.name)

    @invariant()
    def whoever_has_a_lease_can_compute(self) -> None:
        assert all(one.version.open for one in (*self.held, *self.begun))
        for version in self.loaded:
            assert version.leases == sum(one.version is version for one in (*self.held, *self.begun))
            assert version.overdue == sum(begun.overdue for begun in version.begun)

    @invariant()
    def what_nobody_has_or_needs_is_closed(self) -> None:
        needed = [entry.version for entry in self.slot.index() if entry.reason.startswith(("current", "previous"))]
        assert len(needed) <= 2
        assert [version for version in self.loaded if version.open and not version.leases and version.name not in needed] == []
        assert all(version.open and version.state == "ready" for version in self.loaded if version.name in needed)


def test_any_order_of_events(shelf: Any, clock: Any) -> None:
    machine = type("Machine", (AnyOrder,), {"new_shelf": type(shelf), "new_clock": type(clock)})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))  # type: ignore[no-untyped-call]


# ---- with artefacts ----


@contextmanager
def crowd(slot: Slot, names: dict[str, int], *, threads: int = 4) -> Iterator[list[int]]:
    """Threads that take leases, compute and compare: an answer must be that of the version that gave it. Yields a count of answers."""
    over, answers, problems = threading.Event(), [0] * threads, []

    def ask(number: int) -> None:
        try:
            while not over.is_set():
                with slot.lease() as lease:
                    session = lease.version.session
                    label, version = compute_somewhere(slot, lease.version, label_of, rows=1, call=CALL)
                    if label != names[version.name] or lease.version.session is not session:
                        problems.append((label, version.name))
                answers[number] += 1
        except BaseException as error:
            problems.append(error)
            raise

    crowd = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in crowd:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in crowd:
            thread.join()
        assert problems == []


def test_versions_change_under_load(
    in_process: ArtifactLoader, write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    names = {str(number): number % 4 for number in range(1, 9)}
    paths = {name: write_version(tmp_path / name, label) for name, label in names.items()}
    slot = Slot("model", in_process, rollout=Rollout(for_requests=20, max_slowdown=inf))
    slot.load(paths["1"], "1")
    sessions = []
    with crowd(slot, names):
        for name in list(names)[1:]:
            version = slot.load(paths[name], name)
            sessions.append(weakref.ref(version.session))
            wait_until(lambda version=version: len(version.latencies.of(CALL)) > 20)
    slot.settle()
    current = slot.current
    assert current is not None
    assert current.name == "8"
    wait_until(lambda: [session() is not None for session in sessions] == [False] * 6 + [True])


def test_an_engine_that_dies_after_the_flip_costs_no_request(
    in_process: ArtifactLoader, write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None], told: list[str]
) -> None:
    names = {"1": 1, "2": 2}
    paths = {name: write_version(tmp_path / name, label) for name, label in names.items()}
    slot = Slot("model", in_process, rollout=Rollout(for_requests=10**9, max_slowdown=inf), notify=told.append)
    old = slot.load(paths["1"], "1")
    with crowd(slot, names) as answers:
        new = slot.load(paths["2"], "2")
        wait_until(lambda: len(new.latencies.of(CALL)) > 20)
        with slot.lease("2"):
            break_labels(new)
            wait_until(lambda: slot.current is old)
        before = sum(answers)
        wait_until(lambda: sum(answers) > before + 20)
    assert not new.open
    assert len([line for line in told if "rolled back to 1" in line]) == 1


def break_labels(version: Version) -> None:
    def die(images_BHWC: Any) -> Any:
        raise RuntimeError("Exception from src/inference: the primitive is gone")

    version.session._infer_labels = die  # type: ignore[method-assign]


def test_a_broken_artefact_never_takes_over(
    write_version: Callable[..., Path], signature_of: Callable[..., Any], tmp_path: Path, told: list[str]
) -> None:
    """The whole way, the other process included."""
    loader = ArtifactLoader(opening=SessionOptions(threads=1), limits=Limits(seconds=60))
    slot = Slot("model", loader, rollout=Rollout(), notify=told.append)
    first = slot.load(write_version(tmp_path / "1", 1), "1")
    altered, wrong = write_version(tmp_path / "2", 2), write_version(tmp_path / "3", 3, shift=30)
    other = write_version(tmp_path / "4", 0, signature=signature_of(channels=4))
    incomplete = write_version(tmp_path / "5", 0)
    (altered / "weights.safetensors").write_bytes((altered / "weights.safetensors").read_bytes()[:-1] + b"?")
    (incomplete / "weights.safetensors").unlink()
    for path, kind, message in (
        (altered, ArtifactError, "content is not what"),
        (wrong, VerificationError, "golden pair"),
        (other, RefusedError, "channels 4 where 3"),
        (incomplete, ArtifactError, "missing"),
    ):
        with pytest.raises(kind, match=message):
            slot.load(path, path.name)
        assert slot.current is first
    with slot.lease() as lease:
        assert label_of(lease.version.session) == 1
    second = slot.load(write_version(tmp_path / "6", 2), "6")
    assert slot.current is second
    assert [state for state, _ in states(slot).values()] == ["ready", "failed", "failed", "failed", "failed", "ready"]


def swap(slot: Slot, paths: list[Path], count: int, wait_until: Callable[..., None]) -> int:
    """Loads `count` versions one after the other; resident bytes once the old ones are gone."""
    for number in range(count):
        slot.load(paths[number % len(paths)], str(number))
        with slot.lease() as lease:
            label_of(lease.version.session)
    wait_until(lambda: not any(thread.name == "muntin-unload" for thread in threading.enumerate()))
    now, _ = resident()
    assert now is not None
    return now


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read in Linux's form")
def test_twenty_swaps_take_no_more_memory(
    in_process: ArtifactLoader, write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None], signal_stack: Any
) -> None:
    slot = Slot("model", in_process, rollout=Rollout(for_seconds=0))
    paths = [write_version(tmp_path / str(label), label) for label in range(4)]
    stack = signal_stack()
    before = swap(slot, paths, 8, wait_until)
    after = swap(slot, paths, 20, wait_until)
    assert (after - before) / 20 < 256 << 10
    assert signal_stack() == stack  # of this thread, on which all of them were opened


def test_deaths_of_engines_are_counted_beyond_their_versions_end(make_slot: Callable[..., Slot]) -> None:
    slot = make_slot()
    slot.load("1", "1")
    dying = slot.load("2", "2")
    assert slot.deaths() == {"1": 0, "2": 0}
    dying.session.deaths = 2
    observe(slot, dying, error=RuntimeError("its engine died"))
    assert (dying.state, dying.open) == ("failed", False)
    assert slot.deaths() == {"1": 0, "2": 2}
    again = slot.load("2", "2")
    again.session.deaths = 1
    assert slot.deaths()["2"] == 3
