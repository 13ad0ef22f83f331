"""Compute images although memory is short: one row at a time, then in tiles. What was done is returned and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import MuntinError, VerificationError
from muntin.runtime import Session, predict
from muntin.runtime.host.memory import no_memory
from muntin.runtime.tiles import TILE, allowed_tile
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, OutOfMemoryError

SHORT_S = 60.0
"""Seconds in which a call that was too large for the memory is not tried again: each try may cost an engine, and seconds to restart it."""
_NOT_THE_CALLS = (EngineDiedError, NotReadyError, VerificationError)
"""Errors that say nothing of the call, whatever their text: there may have been no memory to start an engine."""
_Kind = tuple[bool, bool]
"""Labels or scores; one image or several."""


class Parts(IntEnum):
    """The parts in which a request is computed; smaller ones after each death of an engine for lack of memory."""

    WHOLE = 0
    ROWS = 1
    TILES = 2


class Computed(NamedTuple):
    """Answers for images, and for each image how it was computed for lack of memory; empty: `whole`, in one call."""

    answers: NDArray[Any]
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
    """The smallest calls, in pixels, of each session and kind that found no memory within the last `SHORT_S`. `clock`: seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._refused: WeakKeyDictionary[Session, dict[_Kind, tuple[int, float]]] = WeakKeyDictionary()

    def refused(self, session: Session, kind: _Kind, pixels: int) -> None:
        """Remember that there was no memory for a call."""
        if pixels < self._known(session, kind):
            self._refused.setdefault(session, {})[kind] = pixels, self._clock()

    def too_many(self, session: Session, kind: _Kind, pixels: int) -> bool:
        """Return whether a call of so many pixels should not be tried now."""
        return pixels >= self._known(session, kind)

    def _known(self, session: Session, kind: _Kind) -> float:
        least, at = self._refused.get(session, {}).get(kind, (inf, 0.0))
        return least if self._clock() - at < SHORT_S else inf


class Recovery:
    """Computes images in one call if there is memory for it, else in rows and tiles."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts = Recoveries()
        self._shortages = Shortages(clock)

    def compute(self, session: Session, images_BHWC: NDArray[np.uint8], *, labels: bool, parts: Parts) -> Computed:
        """Compute scores or labels, in `parts` or smaller ones.

        Raises OutOfMemoryError if the engine dies for lack of memory, MuntinError if an image that has no tiles does not fit.
        """
        B, H, W, _ = images_BHWC.shape
        kind, pixels = (labels, B == 1), B * H * W
        tile = smaller_tile(session.signature, H, W)
        divisible = B > 1 or tile is not None
        divided = parts >= (Parts.TILES if B == 1 else Parts.ROWS) or self._shortages.too_many(session, kind, pixels)
        if not (divisible and divided):
            try:
                return Computed(call(session, images_BHWC, labels=labels), [""] * B)
            except OutOfMemoryError:
                self._shortages.refused(session, kind, pixels)
                raise
            except Exception as error:
                if isinstance(error, _NOT_THE_CALLS) or not no_memory(error):
                    raise
                self._shortages.refused(session, kind, pixels)
        if B > 1:
            self.counts.rows += 1
            rows = [self.compute(session, images_BHWC[n : n + 1], labels=labels, parts=parts) for n in range(B)]
            return Computed(np.concatenate([row.answers for row in rows]), [row.recovered[0] or "one row at a time" for row in rows])
        if tile is None:
            raise MuntinError(f"no memory for one image of {W}x{H}: send smaller ones, or try again later")
        self.counts.tiles += 1
        answer = predict(session, images_BHWC[0], tile=tile, output="labels" if labels else "scores")
        return Computed(answer[None], [f"in tiles of {tile} pixels"])


def smaller_tile(signature: Signature, height: int, width: int) -> int | None:
    """Return the side of the tiles in which one image can be computed; None if it has no smaller parts."""
    longest = max(height, width)
    tile = allowed_tile(signature, min(TILE, (longest + 1) // 2))
    return tile if tile is not None and tile < longest else None


def call(session: Session, images_BHWC: NDArray[np.uint8], *, labels: bool) -> NDArray[Any]:
    return session.labels(images_BHWC) if labels else session(images_BHWC)
