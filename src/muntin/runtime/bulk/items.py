"""One picture or video of many: computed and written, or its failure as a value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from muntin.artifact import Signature
from muntin.errors import ArtifactError, DataError, DependencyError, memory_advice
from muntin.images import TooManyPixelsError
from muntin.images.sources import source_size
from muntin.images.video import is_video
from muntin.runtime.bulk.pictures import Range, predict_picture
from muntin.runtime.bulk.videos import predict_video, video_files
from muntin.runtime.exact_tiles.tiles import SIDE
from muntin.runtime.host.memory import no_memory
from muntin.runtime.pipeline import StoppedError
from muntin.runtime.session import Session
from muntin.runtime.short_memory import RETRYING, Parts, compute_in_parts
from muntin.tasks.answers import ANSWERING
from muntin.tasks.base import Result

SourceState = tuple[int, int]
"""Bytes of a file and the time of its last change, nanoseconds."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options that all pictures of a run share. `truth`: the mask of its only picture. `painted`: masks have overlays. `value_range`: the
    values that are read as 0 and 255."""

    tiles: Parts
    max_pixels: int
    truth: Path | None = None
    painted: bool = True
    value_range: Range | None = None


@dataclass(frozen=True, kw_only=True)
class ItemOutcome:
    """The result of one picture or video, or why there is none; a damaged video has both: its frames before the damage are computed.

    `state`: of the source before it was read.
    """

    source: Path
    state: SourceState | None
    result: Result | None = None
    error: str = ""


@dataclass(kw_only=True)
class ItemComputer:
    """Computes pictures and videos by one session. Threads may share it. `stop`: ends the call of a thread at its next tile."""

    session: Session
    options: PredictOptions
    stop: Event = field(default_factory=Event)

    def __call__(self, source: Path, target: Path | None, advance: Callable[[float], None] = lambda done: None) -> ItemOutcome:
        """Compute one file. `target`: path of its results without their endings. `advance` is called with the part of a picture, or the
        number of frames, that is done.

        Raises StoppedError after `stop`. Failures that concern this file alone are returned.
        """
        state = source_state(source)
        try:
            if is_video(source):
                result, error = self._video(source, target, advance)
                return ItemOutcome(source=source, state=state, result=result, error=error)
            return ItemOutcome(source=source, state=state, result=self._picture(source, target, advance))
        except (DataError, ArtifactError, DependencyError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not no_memory(error):
                raise
            text = f"{source}: {memory_advice(error)}" if isinstance(error, MemoryError | RuntimeError) else str(error)
            text += ", or allow more by --max-pixels" if isinstance(error, TooManyPixelsError) else ""
            return ItemOutcome(source=source, state=state, error=text)

    def _picture(self, source: Path, target: Path | None, advance: Callable[[float], None]) -> Result:
        options, signature = self.options, self.session.signature
        self._check_stop()
        given = self.session, source, target or source.with_suffix(""), options.truth, options.max_pixels

        def compute(tiles: Parts) -> Result:
            return predict_picture(*given, self._arguments(tiles, advance), options.value_range, painted=options.painted)

        if signature.answer.one:
            return predict_picture(*given, {}, options.value_range)
        longest = options.tiles.tile or 1
        with suppress(DataError):  # `predict_picture` raises it
            longest = max(source_size(source, max_pixels=options.max_pixels))
        result, used = compute_in_parts(compute, options.tiles, lambda tiles: tiles.smaller(signature, longest), RETRYING)
        return self._noted(result, source, used)

    def _video(self, source: Path, target: Path | None, advance: Callable[[float], None]) -> tuple[Result, str]:
        if not ANSWERING[self.session.signature.task].videos or target is None:
            raise DataError(f"{source}: a classifier has no answer for a video: extract the frames that count, and name them")
        if self.options.truth is not None:
            raise DataError(f"{source}: --truth is the mask of a picture, and this is a video: leave it out")
        result, error, used = predict_video(
            self.session,
            source,
            target,
            tiles=self.options.tiles,
            max_pixels=self.options.max_pixels,
            painted=self.options.painted,
            arguments=self._arguments,
            advance=advance,
        )
        return self._noted(result, source, used), error

    def _noted(self, result: Result, source: Path, used: Parts) -> Result:
        first = self.options.tiles.tile
        if used.tile == first:
            return result
        first = first or SIDE
        note = f"{source}: not enough memory for tiles of {first} pixels: computed in tiles of {used.tile}" + (
            "" if used.exact else ", which may change labels a little"
        )
        return result | {"notes": [*result.get("notes", ()), note]}

    def _arguments(self, tiles: Parts, advance: Callable[[float], None] = lambda done: None) -> dict[str, Any]:
        """The arguments of `predict` for these tiles."""

        def tile_done(done: int, total: int) -> None:
            self._check_stop()
            advance(done / total)

        return {"tile": tiles.tile, "overlap": tiles.overlap, "exact": tiles.exact, "progress": tile_done}

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise StoppedError


def item_files(source: Path, target: Path, signature: Signature, *, scaled: bool = False) -> dict[str, Path]:
    """Return the file of each result of a picture or video, by kind. `scaled`: it is read with a range."""
    return video_files(target, signature) if is_video(source) else ANSWERING[signature.task].files(source, target, signature, scaled=scaled)


def source_state(path: Path) -> SourceState | None:
    """The state of a file, which changes when it is written; None where there is no such file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None
