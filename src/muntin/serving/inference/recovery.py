"""Compute a batch although memory is short, and remember for a while which calls were too large. What was done is returned and counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import NamedTuple
from weakref import WeakKeyDictionary

from muntin.errors import MuntinError, VerificationError
from muntin.runtime.host.memory import no_memory
from muntin.runtime.inputs import Named
from muntin.runtime.session import Session
from muntin.runtime.short_memory import Parts, compute_in_parts
from muntin.serving.inference.groups import Group
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, OutOfMemoryError

SHORT_S = 60.0
"""Seconds in which a call that was too large for the memory is not tried again: each try may cost an engine, and seconds to restart it."""
_Kind = tuple[Hashable, ...]
"""Outputs; one row or several; None, or of tiles the picture's size, whose answer is held beside them."""


class Computed(NamedTuple):
    """Answers, and how they were computed for lack of memory; empty: in one call."""

    answers: Named
    recovered: str


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

    def refused(self, session: Session, group: Group, parts: Parts) -> None:
        """Remember that there was no memory for calls of a group's inputs in `parts`."""
        kind, size = _call(group, parts)
        if not self.too_large(session, group, parts):
            self._refused.setdefault(session, {})[kind] = size, self._clock()

    def too_large(self, session: Session, group: Group, parts: Parts) -> bool:
        """Return whether such calls should not be tried now."""
        kind, size = _call(group, parts)
        least, at = self._refused.get(session, {}).get(kind, (inf, 0.0))
        return size >= least and self._clock() - at < SHORT_S


def _call(group: Group, parts: Parts) -> tuple[_Kind, int]:
    """Return the kind and the size of a call, in pixels or values."""
    size = parts.rows * group.row_size if parts.tile is None else parts.tile * parts.tile
    return (group.outputs, min(parts.rows, 2), None if parts.tile is None else group.dims), size


class Recovery:
    """Computes batches in one call each if there is memory for it, else in smaller parts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts = Recoveries()
        self._shortages = Shortages(clock)

    def compute(self, session: Session, group: Group, inputs: Named, *, deaths: int = 0) -> Computed:
        """Compute inputs with a session. `deaths`: of engines that computed them, for lack of memory.

        Raises OutOfMemoryError if the engine dies for lack of memory, MuntinError if nothing fits.
        """
        whole = Parts(rows=group.rows(inputs))

        def compute(parts: Parts) -> Named:
            try:
                return group.compute_parts(session, inputs, parts)
            except OutOfMemoryError:
                self._shortages.refused(session, group, parts)
                raise
            except (EngineDiedError, NotReadyError, VerificationError):  # their messages quote an engine that could not be begun
                raise
            except Exception as error:
                if not no_memory(error):
                    raise
                self._shortages.refused(session, group, parts)
                raise MemoryError(str(error)) from error  # an OSError where the engine is a process

        try:
            first = self._first(session, group, whole.rows, deaths)
            answers, parts = compute_in_parts(compute, first, partial(group.smaller, session.signature))
        except MemoryError as error:
            raise MuntinError(f"no memory for {group.row_text}: send smaller ones, or try again later") from error
        self.counts.rows += whole.rows > 1 and parts != whole
        self.counts.tiles += 0 if parts.tile is None else whole.rows
        return Computed(
            answers, "" if parts == whole else "one row at a time" if parts.tile is None else f"in tiles of {parts.tile} pixels"
        )

    def exhausted(self, session: Session, group: Group, rows: int) -> bool:
        """Return whether even the smallest parts of a batch found no memory lately."""
        return self._shortages.too_large(session, group, self._first(session, group, rows, deaths=2))

    def _first(self, session: Session, group: Group, rows: int, deaths: int) -> Parts:
        """Return the largest parts that may fit; single rows at most after an engine's death, the smallest parts after two."""
        parts = Parts(rows=rows)
        while (deaths > 1 or (deaths == 1 and parts.rows > 1) or self._shortages.too_large(session, group, parts)) and (
            less := group.smaller(session.signature, parts)
        ) is not None:
            parts = less
        return parts
