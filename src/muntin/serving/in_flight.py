"""The batches that versions compute now, and those that are overdue.

Nothing here takes a lock: the slot holds its own around every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from muntin.runtime.session import Session
from muntin.serving.version import Begun, Version

RETRY_S = 0.1
"""Seconds between attempts to interrupt an overdue call. A session counts a call's time from a later moment than the batch does."""


class InFlight:
    """Batches from begin to end.

    `asked`: when the last batch was begun or computed. `stuck`: sessions with an overdue call, for the caller to interrupt, and the seconds
    after which the call was overdue.
    """

    def __init__(self) -> None:
        self.asked = -inf
        self.stuck: list[tuple[Session, float]] = []
        self._next_check = inf

    def begin(self, version: Version, *, rows: int, now: float, within: float) -> Begun:
        begun = Begun(version, rows, now, now + within)
        version.begun.add(begun)
        self.asked = now
        self._next_check = min(self._next_check, begun.due)
        return begun

    def newly_overdue(self, versions: Iterable[Version], now: float) -> list[Begun]:
        """Return the batches that became overdue since the last check. Those that still are get interrupted again."""
        if now < self._next_check:
            return []
        batches = [begun for version in versions for begun in version.begun]
        late = [begun for begun in batches if begun.due <= now]
        self.stuck += [(begun.version.session, begun.due - begun.at) for begun in late]
        dues = [begun.due for begun in batches if begun.due > now]
        self._next_check = min([*dues, now + RETRY_S] if late else dues, default=inf)
        newly = [begun for begun in late if not begun.overdue]
        for begun in newly:
            begun.overdue = True
        return newly
