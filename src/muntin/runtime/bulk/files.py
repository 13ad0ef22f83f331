"""All files of a run: their sizes, and their computation with overlapping steps, on this machine or on Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock

from muntin.artifact import Signature
from muntin.errors import DataError, DependencyError
from muntin.images.sources import source_size
from muntin.images.video import is_video, video_info
from muntin.runtime.blending import tile_origins
from muntin.runtime.bulk.items import ItemComputer, ItemOutcome, PredictOptions
from muntin.runtime.bulk.on_ray import RayJob, compute_on_ray
from muntin.runtime.host.hardware import usable_cores
from muntin.runtime.inputs import Shape
from muntin.runtime.options import SessionOptions
from muntin.runtime.pipeline import ordered
from muntin.runtime.session import STATIC_SHAPES, Session
from muntin.runtime.short_memory import Parts
from muntin.runtime.tiles import tile_side

COMPILED = 128
"""Minimum number of tiles of one size for which that size is compiled: half a second or more, to save some ms a tile."""
PIXELS_IN_FLIGHT = 1 << 23
"""Pixels of answers for each thread: of 8 million pixels, decoded, painted and encoded, up to 20 bytes each are in memory."""


USUAL_STREAMS = 4
"""Largest number of calls at the same time by default: each has its own memory for what a model computes on the way."""


@dataclass(frozen=True, kw_only=True)
class ItemSize:
    """Sides of a picture or of a video's frames. `frames`: 1 for a picture, 0 where a video does not say. `held`: frames in memory."""

    height: int
    width: int
    frames: int = 1
    held: int = 1


def item_sizes(sources: Iterable[Path], *, max_pixels: int, streams: int) -> dict[Path, ItemSize]:
    """Return the sizes of files by their headers. An unreadable one is left out, and reported when it is computed."""
    sizes = {}
    for source in sources:
        with suppress(DataError, DependencyError):
            if is_video(source):
                info = video_info(source, max_pixels=max_pixels)
                sizes[source] = ItemSize(height=info.height, width=info.width, frames=info.frames, held=streams + 5)
            else:
                height, width = source_size(source, max_pixels=max_pixels)
                sizes[source] = ItemSize(height=height, width=width)
    return sizes


def usual_streams(sources: Collection[Path], signature: Signature, options: PredictOptions, threads: int) -> int:
    """Return the number of calls to compute at the same time: as many as threads and calls, at most `USUAL_STREAMS`. Exact tiles: one."""
    if options.tiles.exact:
        return 1
    most = min(threads, USUAL_STREAMS)
    if len(sources) < most:
        sizes = item_sizes(sources, max_pixels=options.max_pixels, streams=most)
        if all(size.frames for size in sizes.values()):  # some videos do not say how many they have
            most = min(most, call_counts(sizes.values(), signature, options.tiles).total())
    return max(1, most)


def call_counts(sizes: Iterable[ItemSize], signature: Signature, tiles: Parts) -> Counter[Shape]:
    """Return the number of calls of each size (B, H, W)."""
    calls: Counter[Shape] = Counter()
    for size in sizes:
        if signature.answer.one:
            side = signature.side
            calls[1, *(signature.sizes.at_least(size.height, size.width) if side is None else (side, side))] += 1
            continue
        sides = (size.height, signature.sizes.height), (size.width, signature.sizes.width)
        h, w = (tile_side(side, tiles.tile, allowed) for side, allowed in sides)
        rows, columns = (
            len(tile_origins(side, part, part // 4 if tiles.overlap is None else tiles.overlap))
            for side, part in ((size.height, h), (size.width, w))
        )
        calls[1, h, w] += rows * columns * max(1, size.frames)
    return calls


def common_shapes(sizes: Iterable[ItemSize], signature: Signature, tiles: Parts) -> tuple[Shape, ...]:
    """Return the (B, H, W) of calls worth a compilation: of `COMPILED` calls or more, or where all calls have one size. Exact tiles are
    compiled in parts, and not here."""
    if tiles.exact:
        return ()
    if signature.side is not None:
        return ((1, signature.side, signature.side),)
    calls = call_counts(sizes, signature, tiles)
    return tuple(shape for shape, count in calls.most_common(STATIC_SHAPES) if count >= COMPILED or len(calls) == 1)


@dataclass(frozen=True, kw_only=True)
class RayTarget:
    """Cluster, artefact and session options of a run on Ray. `address`: of a running cluster; empty: workers on this machine."""

    address: str
    artifact: Path
    opening: SessionOptions


class _Progress:
    """Pictures and frames that are done, with parts of pictures. Thread-safe."""

    def __init__(self, expected: Mapping[Path, int], report: Callable[[float, float], None]) -> None:
        self._expected, self._report, self._lock = expected, report, Lock()
        self._parts: dict[Path, float] = {}
        self._done, self._total = 0.0, float(sum(expected.values()))

    def advance(self, source: Path, done: float) -> None:
        """Set what is done of a file, and report the sums."""
        with self._lock:
            before, self._parts[source] = self._parts.get(source, 0.0), done
            self._done += done - before
            self._total += max(done, self._expected[source]) - max(before, self._expected[source])
            self._report(self._done, self._total)


def compute_files(
    session: Session,
    options: PredictOptions,
    targets: Mapping[Path, Path | None],
    *,
    record: Callable[[ItemOutcome], None],
    progress: Callable[[float, float], None],
    ray: RayTarget | None = None,
) -> Iterator[ItemOutcome]:
    """Yield the outcome of each file of `targets`: sources, and the paths of their results without endings. In their order; on Ray in that
    in which they end.

    `record` is called with each outcome when it ends, perhaps by several threads. `progress`: called with the number of pictures and frames
    that are done, parts of pictures included, and of all.

    On this machine one thread for each stream and each usable core decodes, waits for the engine, and encodes. The files in work have at
    most `PIXELS_IN_FLIGHT` a thread, or there is one file.
    """
    sizes = item_sizes(targets, max_pixels=options.max_pixels, streams=session.streams)
    units = _Progress({source: sizes[source].frames if source in sizes else 1 for source in targets}, progress)
    shapes = common_shapes(sizes.values(), session.signature, options.tiles)
    if ray is not None:
        opening = replace(ray.opening, precision=session.precision)
        for outcome in compute_on_ray(RayJob(artifact=ray.artifact, session=opening, shapes=shapes, options=options), targets, ray.address):
            record(outcome)
            units.advance(outcome.source, (outcome.result or {}).get("frames", 1))
            yield outcome
        return
    session.warm_up(shapes, compute=False)
    computer = ItemComputer(session=session, options=options)

    def compute(source: Path) -> ItemOutcome:
        outcome = computer(source, targets[source], partial(units.advance, source))
        record(outcome)
        units.advance(source, (outcome.result or {}).get("frames", 1))
        return outcome

    def pixels(source: Path) -> int:
        size = sizes.get(source)
        return 0 if size is None else size.height * size.width * size.held * session.signature.scale**2

    workers = session.streams + usable_cores()
    with closing(
        ordered(compute, targets, workers=workers, cost=pixels, capacity=workers * PIXELS_IN_FLIGHT, stop=computer.stop)
    ) as outcomes:
        yield from outcomes
