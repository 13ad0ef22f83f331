"""The slot under events in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Lease, Slot
from muntin.serving.versions.version import Begun, Version


class AnyOrder(RuleBasedStateMachine):
    """Events in any order: a version with a lease stays open, and one without a lease or a purpose is closed."""

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
    def leased_versions_are_open(self) -> None:
        assert all(one.version.open for one in (*self.held, *self.begun))
        for version in self.loaded:
            assert version.leases == sum(one.version is version for one in (*self.held, *self.begun))

    @invariant()
    def unused_versions_are_closed(self) -> None:
        in_service = self.slot.open
        assert len(in_service) <= 2
        assert [version for version in self.loaded if version.open and not version.leases and version not in in_service] == []
        assert all(version.open and version.state == "ready" for version in in_service)


def test_any_order_of_events(shelf: Any, clock: Any) -> None:
    machine = type("Machine", (AnyOrder,), {"new_shelf": type(shelf), "new_clock": type(clock)})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))  # type: ignore[no-untyped-call]
