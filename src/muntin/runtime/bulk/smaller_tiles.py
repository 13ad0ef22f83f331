"""Computation in smaller tiles where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import TypeVar

from muntin.artifact import Signature
from muntin.errors import ArtifactError
from muntin.runtime.exact_tiles.tiles import SIDE
from muntin.runtime.host.memory import no_memory
from muntin.runtime.tiles import allowed_tile

ComputedT = TypeVar("ComputedT")
SMALLEST = 64
"""Side of the smallest tile that is tried, pixels: below it most of a tile is overlap or the engine's own memory."""
_retrying = Lock()
"""Held by one retry at a time: pictures that run out of memory together may fit one after the other."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Side of the tiles, pixels that neighbours share, and exactness, as `predict` takes them; None: its defaults."""

    tile: int | None
    overlap: int | None = None
    exact: bool = False

    def smaller(self, signature: Signature, longest: int) -> Tiles | None:
        """Tiles of half the side, or of the next smaller one that the model takes; None where there is none.

        `longest`: the longer side of the picture, which a tile is never larger than.
        """
        if self.exact:
            tile = min(self.tile or SIDE, longest) // 2
            return replace(self, tile=tile) if tile >= SMALLEST else None
        if self.tile is None:
            return None
        allowed = allowed_tile(signature, max(SMALLEST, min(self.tile, longest) // 2))
        if allowed is None or allowed >= min(self.tile, longest):
            return None
        return replace(self, tile=allowed, overlap=None if self.overlap is None else self.overlap * allowed // self.tile)


def in_smaller_tiles(compute: Callable[[Tiles], ComputedT], tiles: Tiles, signature: Signature, longest: int) -> tuple[ComputedT, Tiles]:
    """Returns `compute(tiles)` and the tiles. After an error for lack of memory, computes again in smaller tiles, one call at a time.

    The smallest tiles' error is raised.
    """
    value, smaller = _attempt(compute, tiles, signature, longest)
    if smaller is None:
        return value[0], tiles
    with _retrying:
        while smaller is not None:
            tiles = smaller
            value, smaller = _attempt(compute, tiles, signature, longest)
    return value[0], tiles


def _attempt(
    compute: Callable[[Tiles], ComputedT], tiles: Tiles, signature: Signature, longest: int
) -> tuple[tuple[ComputedT, ...], Tiles | None]:
    """Returns the value, or the smaller tiles to compute it with. The error's frames are gone then, and the memory that they held."""
    try:
        return (compute(tiles),), None
    except (MemoryError, ArtifactError) as error:
        smaller = tiles.smaller(signature, longest) if no_memory(error) else None
        if smaller is None:
            raise
    return (), smaller
