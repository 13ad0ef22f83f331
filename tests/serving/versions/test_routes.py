"""The routing table: trials, probation, roll-back, and what is listed. No threads, no engines; time is an argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import DataError
from muntin.serving.versions.rollout import ENOUGH, Rollout
from muntin.serving.versions.routes import HISTORY, Routes
from muntin.serving.versions.version import Begun, RefusedError, UnknownVersionError, Version
from muntin.serving.worker.opening import NotReadyError
from serving_parts import image_call

CALL = image_call((1, 8, 8), labels=True)
NOW = 1000.0
ADMIT = Callable[..., Version]


@pytest.fixture
def admit(shelf: Any) -> ADMIT:
    """`admit(routes, name)`: loads a version at the time `NOW`. `untried`: a trial ends without requests."""

    def load(routes: Routes, name: str, *, untried: bool = False) -> Version:
        version, path = Version(name=name, path=Path(name)), Path(name)
        version.opened(shelf.open(path))
        routes.add(version)
        routes.admit(version, NOW)
        if untried:
            routes.settle(NOW + routes.rollout.for_seconds)
        return version

    return load


def observe(routes: Routes, version: Version, count: int = 1, *, seconds: float = 0.01, error: Exception | None = None) -> None:
    for _ in range(count):
        if error is None:
            version.latencies.add(CALL, seconds)
        routes.count(version, 1, error)
        routes.settle(NOW)


def states(routes: Routes) -> dict[str, tuple[str, str]]:
    return {entry.version: (entry.state, entry.reason) for entry in routes.index()}


def test_first_version(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    with pytest.raises(NotReadyError, match="model: no version is ready"):
        routes.choose(None, canary=False)
    version = admit(routes, "1")
    assert routes.choose(None, canary=False) is routes.choose("1", canary=False) is version
    assert states(routes) == {"1": ("READY", "current")}
    assert routes.lines == ["version 1 serves"]


@pytest.mark.parametrize("name", ["2", "../1", "/etc/passwd", "1\0", "1\n", "\u0661", "", "x" * 10_000])
def test_unknown_name(admit: ADMIT, name: str) -> None:
    routes = Routes("model", Rollout())
    admit(routes, "1")
    with pytest.raises(UnknownVersionError, match=r"no version .*: there is 1") as caught:
        routes.choose(name, canary=False)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_contract(admit: ADMIT, signature_of: Any) -> None:
    routes, version = Routes("model", Rollout()), Version(name="2", path=Path("2"))
    routes.require_contract(version, signature_of(channels=1))
    admit(routes, "1")
    with pytest.raises(RefusedError, match=r"version 2 has another contract \(channels 1 where 3 is served\)"):
        routes.require_contract(version, signature_of(channels=1))


def test_index_history(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(for_seconds=0))
    for number in range(1, 3 * HISTORY):
        admit(routes, str(number))
    for _ in range(3):
        routes.add(broken := Version(name="0", path=Path("0")))
        routes.fail(broken, "broken")
    names = [entry.version for entry in routes.index()]
    assert len(names) == len(set(names)) <= HISTORY + 2
    assert {"0", str(3 * HISTORY - 1)} < set(names)


def test_engine_that_cannot_be_called(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    version = admit(routes, "1")
    version.session.alone = True  # type: ignore[attr-defined]
    assert states(routes) == {"1": ("UNAVAILABLE", "current; its engine died again and again, and is left alone for a while")}
    with pytest.raises(NotReadyError, match="died again and again"):
        routes.choose(None, canary=False)


def test_deaths_of_engines(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    first, second = admit(routes, "1"), admit(routes, "2")
    second.session.deaths, second.session.last_death = 2, "its engine died"
    observe(routes, second, error=RuntimeError())
    assert not second.open
    assert "version 2: its engine died" in routes.lines
    assert routes.deaths() == {"1": 0, "2": 2}
    first.session.deaths = 1
    assert routes.deaths()["1"] == 1


# ---- after the flip ----


def test_probation_passed(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(for_requests=10))
    old, new = admit(routes, "1"), admit(routes, "2")
    assert states(routes) == {"1": ("READY", "previous: kept warm"), "2": ("READY", "current, on probation")}
    observe(routes, new, 9)
    assert old.open
    observe(routes, new)
    assert states(routes) == {"1": ("UNAVAILABLE", ""), "2": ("READY", "current")}
    assert routes.lines[1:] == ["version 2 takes over from 1", "version 2 stays (10 rows in 0 s, 0 failed), 1 goes"]


def test_version_loaded_again(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(for_requests=10))
    admit(routes, "1").digest = "before the files changed"
    observe(routes, admit(routes, "1"), 10)
    observe(routes, admit(routes, "1"), error=RuntimeError("gone"))
    changed, same = "its earlier load (changed artefact)", "its earlier load (same artefact)"
    assert routes.lines[1:4] == [
        f"version 1 takes over from {changed}", f"version 1 stays (10 rows in 0 s, 0 failed), {changed} goes",
        f"version 1 takes over from {same}",
    ]  # fmt: skip
    assert routes.lines[4].startswith(f"version 1 is rolled back to {same}: ")


def test_failure_rolls_back(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    old, new = admit(routes, "1"), admit(routes, "2")
    new.leases += 1
    observe(routes, new, error=RuntimeError("the engine is gone\nat line 3"))
    reason = "1 of its 1 rows failed (allowed: 0.00%): RuntimeError: the engine is gone"
    assert routes.current is old
    assert states(routes) == {"1": ("READY", "current"), "2": ("UNAVAILABLE", f"rolled back: {reason}")}
    assert routes.lines[-1] == f"version 2 is rolled back to 1: {reason}"
    assert new.open
    routes.give_back(new)
    assert not new.open


def test_flip_during_probation(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    first, second, third = (admit(routes, name) for name in "123")
    assert (first.state, second.state, third.state) == ("ready", "unloaded", "ready")
    observe(routes, third, error=RuntimeError())
    assert routes.current is first


@pytest.mark.parametrize("allowed", [0.0, 0.5])
def test_engine_gone_on_probation(admit: ADMIT, allowed: float) -> None:
    routes = Routes("model", Rollout(max_error_rate=allowed))
    old, new = admit(routes, "1"), admit(routes, "2")
    observe(routes, new, 20)
    new.session.alone = True  # type: ignore[attr-defined]
    routes.settle(NOW)
    assert routes.current is old
    assert routes.lines[-1] == "version 2 is rolled back to 1: its engine died again and again, or could not be begun again"


def test_previous_engine_gone_on_probation(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    old, new = admit(routes, "1"), admit(routes, "2")
    new.session.alone = old.session.alone = True  # type: ignore[attr-defined]
    routes.settle(NOW)
    assert routes.in_service == (new, old)
    new.session.alone = False  # type: ignore[attr-defined]
    routes.settle(NOW)
    assert routes.in_service == (new,)
    assert routes.lines[-1] == "version 2 stays (the engine of 1 died again and again), 1 goes"


def test_batch_begun_before_passing(admit: ADMIT) -> None:
    """A version passes only after the batches that it began before: they may hang."""
    for by in ("time", "images"):
        routes = Routes("model", Rollout(for_seconds=30, for_requests=5))
        old, new = admit(routes, "1"), admit(routes, "2")
        observe(routes, new, 4)
        slow = Begun(new, 1, NOW, NOW + 100)
        new.begun.add(slow)
        observe(routes, new, 4 if by == "images" else 0)
        routes.settle(NOW + (29 if by == "images" else 31))
        assert old.open
        new.begun = {Begun(new, 1, NOW + 32, NOW + 100)}
        routes.settle(NOW + 32)
        assert not old.open


# ---- before the flip ----


def test_canary(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(canary=0.25, for_requests=30))
    old, candidate = admit(routes, "1"), admit(routes, "2")
    assert states(routes)["2"] == ("READY", "candidate: canary 25%, shadow 0%")
    assert routes.lines[-1] == "version 2 is on trial beside 1: until 30 rows, 60 s at most"
    assert routes.choose(None, canary=True) is routes.choose("2", canary=False) is candidate
    assert routes.choose(None, canary=False) is old
    observe(routes, candidate, 30)
    assert routes.current is candidate
    assert routes.lines[-1] == "version 2 takes over from 1 (30 rows in 0 s, 0 failed)"


def test_shadow_agreement(admit: ADMIT) -> None:
    for agreement in (0.95, 0.5):
        routes = Routes("model", Rollout(shadow=0.5, min_agreement=0.9, for_requests=30))
        old, candidate = admit(routes, "1"), admit(routes, "2")
        for _ in range(30):
            candidate.latencies.add(CALL, 0.01)
            routes.count(candidate, 1, None, agreement)
            routes.settle(NOW)
        assert routes.current is (candidate if agreement > 0.9 else old)
    assert "its answers agree by 50.0%" in candidate.reason


def test_trial_without_requests(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(canary=0.1, for_seconds=60))
    old, new = admit(routes, "1"), admit(routes, "2", untried=True)
    assert routes.lines[2:] == ["version 2 takes over from 1 (untried: no request in 60 s)"]
    observe(routes, new, error=RuntimeError())
    assert routes.current is old


def test_candidate_engine_gone(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(canary=0.5, max_error_rate=0.5))
    old, candidate = admit(routes, "1"), admit(routes, "2")
    candidate.session.alone = True  # type: ignore[attr-defined]
    assert routes.choose(None, canary=True) is old
    routes.settle(NOW)
    assert routes.in_service == (old,)
    assert "could not be begun again" in candidate.reason


@pytest.mark.parametrize("bounds", [{"canary": 0.1}, {"shadow": 1.0}])
def test_current_engine_gone_during_trial(admit: ADMIT, bounds: dict[str, float]) -> None:
    routes = Routes("model", Rollout(**bounds))
    old, candidate = admit(routes, "1"), admit(routes, "2")
    old.session.alone = True  # type: ignore[attr-defined]
    routes.settle(NOW)
    assert routes.in_service == (candidate,)
    assert "version 2 takes over from 1 (the engine of 1 died again and again)" in routes.lines
    candidate.session.alone = True  # type: ignore[attr-defined]
    third = admit(routes, "3")
    routes.settle(NOW)
    assert routes.current is third


def test_current_engine_gone_beside_previous(admit: ADMIT) -> None:
    """The previous version, which has proved itself, comes before a candidate."""
    routes = Routes("model", Rollout(canary=0.5))
    previous, current = admit(routes, "1"), admit(routes, "2", untried=True)
    candidate = admit(routes, "3")
    current.session.alone = True  # type: ignore[attr-defined]
    routes.settle(NOW)
    assert routes.current is previous
    assert routes.candidate is candidate


def test_trial_restarts_beside_another_version(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(shadow=1.0))
    admit(routes, "1")
    wrong = admit(routes, "2", untried=True)
    candidate = admit(routes, "3")
    for _ in range(ENOUGH - 1):
        routes.count(candidate, 1, None, 0.0)
        routes.settle(NOW)
    observe(routes, wrong, error=RuntimeError())
    assert routes.trial is not None
    assert (routes.trial.compared, routes.trial.rows) == (0, 0)


# ---- fallback and unloading ----


def test_fallback(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(canary=1))
    first = admit(routes, "1")
    assert routes.fallback(first) is None
    second = admit(routes, "2")
    assert routes.fallback(second) is first
    observe(routes, second, 100)
    assert routes.in_service == (second, first)
    assert routes.fallback(second) is first
    assert routes.fallback(first) is None
    observe(routes, second, error=DataError())
    assert routes.current is first
    assert routes.fallback(second) is first


def test_unload_current(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    first, second = admit(routes, "1"), admit(routes, "2")
    routes.take_out(second, NOW)
    assert (routes.in_service, second.state) == ((first,), "unloaded")
    assert routes.lines[-1] == "version 2 is unloaded, 1 serves"
    with pytest.raises(NotReadyError, match="version 2 is unloaded"):
        routes.named("2")
    routes.take_out(first, NOW)
    assert routes.in_service == ()


def test_unload_during_trial(admit: ADMIT) -> None:
    routes = Routes("model", Rollout(canary=1))
    first, second = admit(routes, "1"), admit(routes, "2")
    routes.take_out(second, NOW)
    assert (routes.in_service, second.state) == ((first,), "unloaded")
    third = admit(routes, "3")
    routes.take_out(first, NOW)
    assert (routes.in_service, routes.trial) == ((third,), None)


def test_reload_under_the_same_name(admit: ADMIT) -> None:
    routes = Routes("model", Rollout())
    old, new = admit(routes, "1"), admit(routes, "1")
    assert routes.in_service == (new, old)
    assert states(routes) == {"1": ("READY", "current, on probation")}
    routes.add(broken := Version(name="1", path=Path("1")))
    routes.fail(broken, "no such file")
    assert states(routes) == {"1": ("READY", "current, on probation")}
    assert routes.holds("1", "digest of 1")
    assert not routes.holds("1", "digest of another")
