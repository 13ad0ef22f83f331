"""Refusals that hold: who asks the same thing again before it can have changed is told the same, and nobody is asked.

A request that would be late by some milliseconds would still be late if it came a little earlier than that later: of a flood, most requests
are such. Reading one, holding it against the model and forecasting its batch costs several times what saying no does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

_GATES = 64
"""Requests that are told apart."""


class Turnstile:
    """For one thread. Times are seconds of one clock; a request's is when its last byte came. `count`: refusals since the beginning."""

    __slots__ = ("_gates", "count")

    def __init__(self) -> None:
        self._gates: OrderedDict[Hashable, list[float]] = OrderedDict()  # shut until; refused since the last that was let through
        self.count = 0

    def shut(self, what: Hashable, until: float) -> None:
        """A request was refused, and so will be every equal one that comes before `until`."""
        gate = self._gates.get(what)
        if gate is None:
            self._gates[what] = [until, 0]
            if len(self._gates) > _GATES:
                self._gates.popitem(last=False)
        else:
            gate[0] = max(gate[0], until)

    def left(self, what: Hashable, came: float) -> float:
        """Seconds for which it is still shut to a request, which is refused then and counted; 0: it is let through."""
        gate = self._gates.get(what)
        if gate is None or came >= gate[0]:
            return 0.0
        self.turn_away(what)
        return gate[0] - came

    def turn_away(self, what: Hashable) -> None:
        """A request is refused for another reason."""
        self.count += 1
        gate = self._gates.get(what)
        if gate is not None:
            gate[1] += 1

    def unseen(self, what: Hashable) -> int:
        """Equal requests that were refused since this was asked last."""
        gate = self._gates.get(what)
        if gate is None:
            return 0
        count, gate[1] = gate[1], 0
        return int(count)
