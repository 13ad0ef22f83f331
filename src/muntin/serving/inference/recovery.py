"""Compute a batch although memory is short: one row at a time, then images in tiles. What was done is returned and counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from muntin.errors import MuntinError, VerificationError
from muntin.runtime.host.memory import no_memory
from muntin.runtime.session import Session
from muntin.serving.inference.groups import Group
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, OutOfMemoryError

SHORT_S = 60.0
"""Seconds in which a call that was too large for the memory is not tried again: each try may cost an engine, and seconds to restart it."""
_NOT_THE_CALLS = (EngineDiedError, NotReadyError, VerificationError)
"""Errors that say nothing of the call, whatever their text: there may have been no memory to start an engine."""
_Kind = tuple[Hashable, bool]
"""Kind of a group's calls; one row or several."""


class Parts(IntEnum):
    """The parts in which a request is computed; smaller ones after each death of an engine for lack of memory."""

    WHOLE = 0
    ROWS = 1
    TILES = 2


class Computed(NamedTuple):
    """Answers, and for each row how it was computed for lack of memory; empty: `whole`, in one call."""

    answers: Any
    recovered: list[str]

    @property
    def whole(self) -> bool:
        return not any(self.recovered)


@dataclass(kw_only=True)
class Recoveries:
    """How often batches were computed one row at a time, and images in tiles, because memory was short."""

    rows: int = 0
    tiles: int = 0


class Shortages:
    """The sizes of the smallest calls, of each session and kind, that found no memory within the last `SHORT_S`. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._refused: WeakKeyDictionary[Session, dict[_Kind, tuple[int, float]]] = WeakKeyDictionary()

    def refused(self, session: Session, kind: _Kind, size: int) -> None:
        """Remember that there was no memory for a call."""
        if size < self._known(session, kind):
            self._refused.setdefault(session, {})[kind] = size, self._clock()

    def too_many(self, session: Session, kind: _Kind, size: int) -> bool:
        """Return whether a call of this size should not be tried now."""
        return size >= self._known(session, kind)

    def _known(self, session: Session, kind: _Kind) -> float:
        least, at = self._refused.get(session, {}).get(kind, (inf, 0.0))
        return least if self._clock() - at < SHORT_S else inf


class Recovery:
    """Computes a batch in one call if there is memory for it, else in rows and tiles."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts = Recoveries()
        self._shortages = Shortages(clock)

    def compute(self, session: Any, group: Group, inputs: Any, *, parts: Parts) -> Computed:
        """Compute inputs with a session, in `parts` or smaller ones.

        Raises OutOfMemoryError if the engine dies for lack of memory, MuntinError if a row that has no tiles does not fit.
        """
        B = group.rows(inputs)
        kind, size = (group.kind, B == 1), B * group.row_size
        tile = group.tile(session.signature)
        divisible = B > 1 or tile is not None
        divided = parts >= (Parts.TILES if B == 1 else Parts.ROWS) or self._shortages.too_many(session, kind, size)
        if not (divisible and divided):
            try:
                return Computed(group.compute(session, inputs), [""] * B)
            except OutOfMemoryError:
                self._shortages.refused(session, kind, size)
                raise
            except Exception as error:
                if isinstance(error, _NOT_THE_CALLS) or not no_memory(error):
                    raise
                self._shortages.refused(session, kind, size)
        if B > 1:
            self.counts.rows += 1
            rows = [self.compute(session, group, group.part(inputs, n, n + 1), parts=parts) for n in range(B)]
            return Computed(group.joined([row.answers for row in rows]), [row.recovered[0] or "one row at a time" for row in rows])
        if tile is None:
            raise MuntinError(f"no memory for {group.row_text}: send smaller ones, or try again later")
        self.counts.tiles += 1
        return Computed(group.compute_tiles(session, inputs, tile), [f"in tiles of {tile} pixels"])
