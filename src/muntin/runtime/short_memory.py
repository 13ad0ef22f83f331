"""Computation in smaller parts where memory is short. What was done is returned.

a batch -> one row at a time -> tiles of half the longer side, at most TILE -> of half of that -> ... -> SMALLEST
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, TypeVar

from muntin.artifact import Signature
from muntin.errors import ArtifactError
from muntin.runtime.exact_tiles.tiles import SIDE
from muntin.runtime.host.memory import no_memory
from muntin.runtime.tiles import TILE, allowed_tile

ComputedT = TypeVar("ComputedT")
SMALLEST = 64
"""Side of the smallest tile that is tried, pixels: below it most of a tile is overlap or the engine's own memory."""
RETRYING = Lock()
"""For `compute_in_parts` in one process: calls that run out of memory together may fit one after the other."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """How inputs are divided into calls.

    `rows`: of a call. `tile`: side of the tiles of each picture, pixels; None: whole pictures, or the default of `predict`. `overlap`,
    `exact`: as `predict` takes them.
    """

    rows: int = 1
    tile: int | None = None
    overlap: int | None = None
    exact: bool = False

    def smaller(self, signature: Signature | None, longest: int) -> Parts | None:
        """Smaller parts, or None where there are none.

        `signature`: of an image model; None: rows have no tiles. `longest`: longer side of a picture, which a tile is smaller than.
        """
        if self.rows > 1:
            return replace(self, rows=1)
        if signature is None:
            return None
        side = min(self.tile or (SIDE if self.exact else 2 * TILE), longest)
        if self.exact:
            return replace(self, tile=side // 2) if side // 2 >= SMALLEST else None
        allowed = allowed_tile(signature, max(SMALLEST, side // 2))
        if allowed is None or allowed >= side:
            return None
        overlap = None if self.overlap is None or self.tile is None else self.overlap * allowed // self.tile
        return replace(self, tile=allowed, overlap=overlap)


def compute_in_parts(
    compute: Callable[[Parts], ComputedT],
    parts: Parts,
    smaller: Callable[[Parts], Parts | None],
    lock: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - it holds nothing
) -> tuple[ComputedT, Parts]:
    """Returns `compute(parts)` and the parts. After an error for lack of memory, computes again in `smaller` ones, holding `lock`.

    The smallest parts' error is raised.
    """
    value, less = _attempt(compute, parts, smaller)
    if less is None:
        return value[0], parts
    with lock:
        while less is not None:
            parts = less
            value, less = _attempt(compute, parts, smaller)
    return value[0], parts


def _attempt(
    compute: Callable[[Parts], ComputedT], parts: Parts, smaller: Callable[[Parts], Parts | None]
) -> tuple[tuple[ComputedT, ...], Parts | None]:
    """Returns the value, or the smaller parts to compute it with. The error's frames are gone then, and the memory that they held."""
    try:
        return (compute(parts),), None
    except (MemoryError, ArtifactError) as error:
        less = smaller(parts) if no_memory(error) else None
        if less is None:
            raise
    return (), less
