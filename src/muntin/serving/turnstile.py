"""Refusals that hold: who asks the same thing again before it can have changed is told the same, and nobody is asked.

A request that would be late by some milliseconds would still be late if it came a little earlier than that later, unless something happens
meanwhile: of a flood, most requests are such. Reading one, holding it against the model and forecasting its batch costs several times what
saying no does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from muntin.serving.lane import MEMORY

_GATES = 64
"""Requests that are told apart."""


class _Gate:
    __slots__ = ("again", "last", "round", "unseen", "until", "why")

    def __init__(self) -> None:
        self.until = self.again = 0.0
        self.why = ""
        self.round = -1
        """In which it was shut."""
        self.unseen = 0
        self.last = 0.0
        """When one was refused."""


class Turnstile:
    """For one thread. Times are seconds of one clock; a request's is when its last byte came. `count`: refusals since the beginning."""

    __slots__ = ("_gates", "_round", "count")

    def __init__(self) -> None:
        self._gates: OrderedDict[Hashable, _Gate] = OrderedDict()
        self._round = 0
        self.count = 0

    def shut(self, what: Hashable, until: float, again: float, why: str = "") -> None:
        """A request was refused, and so will be every equal one that comes before `until`, or before the next `open`. `again`: from when on
        it is worth another try, not before `until`. `why`: what it was told."""
        gate = self._gates.get(what)
        if gate is None:
            gate = self._gates[what] = _Gate()
            if len(self._gates) > _GATES:
                self._gates.popitem(last=False)
        else:
            self._gates.move_to_end(what)
        gate.until, gate.again, gate.round, gate.why = until, max(until, again), self._round, why

    def open(self) -> None:
        """Something happened that nobody foresaw to the moment: everybody is let through once more."""
        self._round += 1

    def refused(self, what: Hashable, came: float) -> tuple[float, str] | None:
        """Of a request that is refused, and counted: seconds after which it is worth another try, and why. None: it is let through."""
        gate = self._gates.get(what)
        if gate is None or gate.round != self._round or came >= gate.until:
            return None
        self.turn_away(what, came)
        return gate.again - came, gate.why

    def turn_away(self, what: Hashable, came: float) -> None:
        """A request is refused for another reason."""
        self.count += 1
        gate = self._gates.get(what)
        if gate is not None:
            gate.unseen = self._fresh(gate, came) + 1
            gate.last = came

    def unseen(self, what: Hashable, came: float) -> int:
        """Equal requests that were refused since this was asked last: of late, as arrivals are remembered (`lane.MEMORY`)."""
        gate = self._gates.get(what)
        if gate is None:
            return 0
        count, gate.unseen = self._fresh(gate, came), 0
        return count

    def _fresh(self, gate: _Gate, came: float) -> int:
        return gate.unseen if came - gate.last < MEMORY else 0
